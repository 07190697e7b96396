"""What the HTML page draws: the curves and matrices of one run, apart from how they were stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.runlog import Recording
from diagnoser.table import Array
from diagnoser.types import Cost
from diagnoser.vocabulary import MODEL

NO_UNIT: Final = "no unit"
CURVATURE: Final = "loss / weight²"
# The quantities that people are shown, in this order: name, unit, and how it is measured.
QUANTITIES: Final[dict[str, tuple[str, str, str]]] = {
    "gradient_norm": ("gradient norm", "loss / weight", "Euclidean norm, before any clipping"),
    "gradient_ratio": ("gradient ratio", CURVATURE, "norm of the gradient / norm of the weights"),
    "update_ratio": ("update ratio", NO_UNIT, "norm of the step / norm of the weights"),
    "step_sharpness": ("step sharpness", NO_UNIT, "step size x curvature / what is stable"),
    "attention_entropy": ("attention entropy", NO_UNIT, "share of the largest possible"),
    "head_entropy": ("attention entropy by head", NO_UNIT, "share of the largest possible"),
    "update_curvature": ("curvature along the step", "loss", "second-order change of the loss"),
    "lambda_max": ("largest curvature", CURVATURE, "largest eigenvalue of the Hessian block"),
    "attention_logit": ("attention logit", NO_UNIT, "largest absolute value before the softmax"),
    "input_scale": ("input scale", "input", "root mean square of what the weights multiply"),
    "input_similarity": ("input similarity", NO_UNIT, "mean cosine of two rows that go in"),
    "lambda_min": ("smallest curvature", CURVATURE, "smallest eigenvalue of the Hessian block"),
    "trace": ("curvature trace", CURVATURE, "sum of the eigenvalues of the Hessian block"),
    "gradient_cosine": ("gradient cosine", NO_UNIT, "between consecutive gradients"),
    "moment_ratio": ("moment ratio", NO_UNIT, "gradient / its running average, root mean square"),
}
COUPLING: Final = "coupling_share"


@dataclass(frozen=True, slots=True)
class ReportComponent:
    """A row of the page: a component, or a layer (kind ``layer``) that was measured as a whole."""

    name: str
    kind: str
    layer: str


@dataclass(frozen=True, slots=True, eq=False)
class ReportData:
    """The history of a run. C components in the model's order, T measured steps; NaN is missing.

    ``loss_values`` and ``accuracy_values`` belong to the steps beside them (both may be empty).
    ``quantities`` maps a quantity to a (C, T) matrix; ``coupling`` is the (C, C) matrix of the last
    measurement that has one, at ``coupling_step``, or None.
    """

    run: str
    loss_steps: NDArray[np.int64]
    loss_values: Array
    accuracy_steps: NDArray[np.int64]
    accuracy_values: Array
    components: tuple[ReportComponent, ...]
    steps: NDArray[np.int64]
    quantities: Mapping[str, Array]
    coupling: Array | None
    coupling_step: int | None
    cost: Cost


def report_data(recording: Recording, cost: Cost) -> ReportData:
    """Returns what the page draws of a recording."""
    rows = recording.measurements
    components = _components(recording)
    row_of = {component.name: row for row, component in enumerate(components)}
    row = np.array([row_of.get(name, -1) for name in rows.components], dtype=np.int64)
    steps = np.unique(rows.step)
    own = (rows.other < 0) & (row[rows.component] >= 0)
    quantities = {}
    for code, name in enumerate(rows.quantities):
        chosen = own & (rows.quantity == code)
        if (name in QUANTITIES or name == "weight_norm") and chosen.any():
            matrix = np.full((len(components), len(steps)), np.nan)
            column = np.searchsorted(steps, rows.step[chosen])
            matrix[row[rows.component[chosen]], column] = rows.value[chosen]
            quantities[name] = matrix
    weights = quantities.pop("weight_norm", None)
    if weights is not None and "gradient_norm" in quantities:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratio = quantities["gradient_norm"] / np.where(weights > 0, weights, np.nan)
        if not np.isnan(ratio).all():
            quantities["gradient_ratio"] = ratio
    coupling, coupling_step = _last_coupling(recording, row, len(components))
    seen = ~np.isnan(recording.accuracies.value)
    return ReportData(
        run=recording.run,
        loss_steps=recording.losses.step,
        loss_values=recording.losses.value,
        accuracy_steps=recording.accuracies.step[seen],
        accuracy_values=recording.accuracies.value[seen],
        components=components,
        steps=steps,
        quantities=quantities,
        coupling=coupling,
        coupling_step=coupling_step,
        cost=cost,
    )


def _components(recording: Recording) -> tuple[ReportComponent, ...]:
    """Returns the components, each layer with measurements of its own before the first of its."""
    measured = dict.fromkeys(recording.measurements.components)
    left = set(measured) - {component.name for component in recording.components} - {MODEL}
    rows = []
    for component in sorted(recording.components, key=lambda component: component.order):
        if component.layer in left:
            left.remove(component.layer)
            rows.append(ReportComponent(component.layer, "layer", component.layer))
        rows.append(ReportComponent(component.name, component.kind, component.layer))
    rows += [ReportComponent(name, "layer", name) for name in measured if name in left]
    return tuple(rows)


def _last_coupling(
    recording: Recording, row: NDArray[np.int64], size: int
) -> tuple[Array | None, int | None]:
    rows = recording.measurements
    if COUPLING not in rows.quantities:
        return None, None
    pairs = (rows.quantity == rows.quantities.index(COUPLING)) & (rows.other >= 0)
    pairs &= (row[rows.component] >= 0) & (row[rows.other] >= 0)
    if not pairs.any():
        return None, None
    step = int(rows.step[pairs].max())
    pairs &= rows.step == step
    matrix = np.full((size, size), np.nan)
    a, b = row[rows.component[pairs]], row[rows.other[pairs]]
    matrix[a, b] = matrix[b, a] = rows.value[pairs]
    return matrix, step
