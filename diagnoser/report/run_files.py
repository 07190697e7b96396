"""What a run directory holds beside the log: ``diagnosis.json`` and ``report.html``."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.errors import UsageError
from diagnoser.report.data import ReportComponent, ReportData
from diagnoser.report.html import write_report
from diagnoser.report.json_file import diagnosis_to_json
from diagnoser.runlog import Recording
from diagnoser.table import Array
from diagnoser.types import Cost, Diagnosis

SHOWN: Final = (
    "gradient_norm",
    "update_ratio",
    "attention_entropy",
    "attention_logit",
    "step_sharpness",
    "update_curvature",
    "trace",
    "lambda_max",
    "lambda_min",
    "gradient_cosine",
    "moment_ratio",
)


def write_run(diagnosis: Diagnosis, recording: Recording, directory: Path) -> None:
    """Writes ``diagnosis.json`` and ``report.html``, each whole or not at all.

    Raises:
        UsageError: The directory cannot be written.
    """
    path = directory / "diagnosis.json"
    part = path.with_suffix(".json.part")
    try:
        part.write_text(diagnosis_to_json(diagnosis), encoding="utf-8", newline="\n")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UsageError(
            f"{path}: cannot be written ({error.strerror}); the log is kept: "
            f"`diagnoser diagnose {directory}` repeats the diagnosis"
        ) from error
    write_report(diagnosis, report_data(recording, diagnosis.cost), directory / "report.html")


def report_data(recording: Recording, cost: Cost) -> ReportData:
    """Picks what the HTML page draws out of a recording."""
    rows = recording.measurements
    steps = np.unique(rows.step)
    components = recording.components
    position = {component.name: i for i, component in enumerate(components)}
    row_of = np.array([position.get(name, -1) for name in rows.components], dtype=int)
    quantities: dict[str, Array] = {}
    for quantity in SHOWN:
        if quantity not in rows.quantities:
            continue
        chosen = (rows.quantity == rows.quantities.index(quantity)) & (rows.other < 0)
        row = row_of[rows.component[chosen]]
        matrix = np.full((len(components), len(steps)), np.nan)
        at = np.searchsorted(steps, rows.step[chosen])
        matrix[row[row >= 0], at[row >= 0]] = rows.value[chosen][row >= 0]
        if not np.isnan(matrix).all():
            quantities[quantity] = matrix
    coupling, coupling_step = _last_coupling(recording, row_of)
    known = ~np.isnan(recording.accuracies.value)
    return ReportData(
        run=recording.run,
        loss_steps=recording.losses.step,
        loss_values=recording.losses.value,
        accuracy_steps=recording.accuracies.step[known],
        accuracy_values=recording.accuracies.value[known],
        components=tuple(ReportComponent(c.name, c.kind, c.layer) for c in components),
        steps=steps,
        quantities=quantities,
        coupling=coupling,
        coupling_step=coupling_step,
        cost=cost,
    )


def _last_coupling(
    recording: Recording, row_of: NDArray[np.int64]
) -> tuple[Array | None, int | None]:
    """The shares of the last measurement that has them; symmetric, NaN where not measured."""
    rows = recording.measurements
    if "coupling_share" not in rows.quantities:
        return None, None
    chosen = rows.quantity == rows.quantities.index("coupling_share")
    step = int(rows.step[chosen].max())
    chosen &= rows.step == step
    size = len(recording.components)
    matrix = np.full((size, size), np.nan)
    a, b = row_of[rows.component[chosen]], row_of[rows.other[chosen]]
    known = (a >= 0) & (b >= 0)
    matrix[a[known], b[known]] = matrix[b[known], a[known]] = rows.value[chosen][known]
    return matrix, step
