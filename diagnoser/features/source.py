"""A recording as matrices: what features are computed from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.features.program import NAMES
from diagnoser.runlog import Recording
from diagnoser.table import Array, Column
from diagnoser.vocabulary import MODEL

LOSS_WINDOW: Final = 10  # steps; at first half, later a tenth, of the run so far
INITIAL_LOSSES: Final = 3  # their mean is what the loss fell from
EPOCHS: Final = 20  # equal parts of the run that stand for epochs in AutoTrainer's formulas


class Source:
    """A recording as matrices: one row a subject, one column a measured step, NaN = not known."""

    def __init__(self, recording: Recording) -> None:
        rows = recording.measurements
        self.recording = recording
        of_checks = np.array([name in NAMES for name in rows.quantities], dtype=bool)
        checked = of_checks[rows.quantity] if len(of_checks) else np.zeros(0, dtype=bool)
        # Checks have steps of their own: they are seen at the samples, which decide what is judged.
        self.steps: NDArray[np.int64] = np.unique(rows.step[~checked if (~checked).any() else ...])
        listed = [component.name for component in recording.components]
        self.names: list[str] = listed
        self.kinds: dict[str, str] = {c.name: c.kind for c in recording.components}
        self.layers: dict[str, str] = {c.name: c.layer for c in recording.components}
        last = max(len(self.steps) - 1, 0)
        self._column_of = np.minimum(np.searchsorted(self.steps, rows.step), last)
        self._quantity = {name: i for i, name in enumerate(rows.quantities)}
        position = {name: i for i, name in enumerate(listed)}
        self._row_of = np.array([position.get(name, -1) for name in rows.components], dtype=int)
        self._model = rows.components.index(MODEL) if MODEL in rows.components else -2

    def _chosen(self, quantity: str) -> NDArray[np.bool_]:
        rows = self.recording.measurements
        chosen: NDArray[np.bool_] = rows.quantity == self._quantity.get(quantity, -1)
        return chosen

    def _fill(self, shape: int, row: NDArray[np.int64], chosen: NDArray[np.bool_]) -> Column:
        rows = self.recording.measurements
        value = np.full((shape, len(self.steps)), np.nan)
        error = np.zeros_like(value)
        at = (row, self._column_of[chosen])
        value[at] = rows.value[chosen]
        # An unknown error of the estimator makes the bounds unknown. That of the batch is unknown
        # on every single batch; there a rule asks for several measurements in a row.
        batch = rows.batch_std_error[chosen]
        error[at] = np.hypot(rows.std_error[chosen], np.where(np.isnan(batch), 0.0, batch))
        if not error.any():  # NaN counts as an error
            return Column.exact(value)
        return Column(value, value - 2.0 * error, value + 2.0 * error)

    @functools.cache  # noqa: B019 - a source lives as long as its tables
    def component(self, quantity: str) -> Column:
        """A quantity of every component; (components, steps)."""
        rows = self.recording.measurements
        row = self._row_of[rows.component]
        chosen = self._chosen(quantity) & (row >= 0) & (rows.other < 0)
        return self._fill(len(self.names), row[chosen], chosen)

    @functools.cache  # noqa: B019 - the same
    def run(self, quantity: str) -> Column:
        """A quantity of the whole model; (1, steps)."""
        rows = self.recording.measurements
        chosen = self._chosen(quantity) & (rows.component == self._model) & (rows.other < 0)
        return self._fill(1, np.zeros(int(chosen.sum()), dtype=int), chosen)

    @functools.cached_property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """All pairs of components that a coupling was measured of, in order of appearance."""
        rows = self.recording.measurements
        chosen = rows.other >= 0
        codes = dict.fromkeys(zip(rows.component[chosen], rows.other[chosen], strict=True))
        names = rows.components
        return tuple((names[a], names[b]) for a, b in codes)

    def pair(self, quantity: str) -> Column:
        """A quantity of every pair; (pairs, steps)."""
        rows = self.recording.measurements
        names = rows.components
        position = {pair: i for i, pair in enumerate(self.pairs)}
        chosen = self._chosen(quantity) & (rows.other >= 0)
        row = np.array(
            [
                position[names[a], names[b]]
                for a, b in zip(rows.component[chosen], rows.other[chosen], strict=True)
            ],
            dtype=int,
        )
        return self._fill(len(self.pairs), row, chosen)

    # -- the loss curve at measured steps ---------------------------------------------------------

    def windows(
        self, curve: Array, step: NDArray[np.int64], function: Callable[[Array], float]
    ) -> Array:
        """Applies a function to the part of a curve that ends at each measured step."""
        result = np.full((1, len(self.steps)), np.nan)
        for i, at in enumerate(self.steps):
            so_far = int(at) + 1
            width = max(3, min(LOSS_WINDOW, so_far // 2), so_far // 10)
            first, last = np.searchsorted(step, [at - width + 1, at + 1])
            if last > first:
                result[0, i] = function(curve[first:last])
        return result

    @functools.cached_property
    def loss(self) -> Array:
        """Mean loss of the window that ends at each measured step; NaN with a NaN in it.

        Also NaN where several optimizers step: adversaries have no common loss.
        """
        if np.nanmax(self.run("optimizers").value, initial=0.0) > 1:
            return np.full((1, len(self.steps)), np.nan)  # of rivals; their sum means nothing
        losses = self.recording.losses
        return self.windows(losses.value, losses.step, lambda w: float(np.mean(w)))

    @functools.cached_property
    def initial_loss(self) -> float:
        """Mean of the first three losses; NaN if none, or not all, are positive and finite."""
        first = self.recording.losses.value[:INITIAL_LOSSES]
        usable = len(first) and ((first > 0) & (first < np.inf)).all()
        return float(first.mean()) if usable else float("nan")

    @functools.cached_property
    def accuracy(self) -> Array:
        """Mean training accuracy of the window that ends at each measured step."""
        curve = self.recording.accuracies
        known = ~np.isnan(curve.value)
        return self.windows(curve.value[known], curve.step[known], lambda w: float(np.mean(w)))

    @functools.cached_property
    def epoch_accuracies(self) -> Array:
        """Mean training accuracy of twenty equal parts of the run, of ten steps or more each."""
        curve = self.recording.accuracies
        values = curve.value[~np.isnan(curve.value)]
        parts = min(EPOCHS, len(curve.value) // LOSS_WINDOW, len(values) // 2)
        if parts < 2:
            return np.empty(0)
        return np.array([part.mean() for part in np.array_split(values, parts)])
