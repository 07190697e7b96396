"""A recording as matrices: what features are computed from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.features.program import NAMES
from diagnoser.runlog import Curve, Recording, drawn, evenly, loss_blocks
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
        elements = [component.elements for component in recording.components]
        self.elements: Array = np.array(elements, dtype=float).reshape(-1, 1)
        last = max(len(self.steps) - 1, 0)
        self._column_of = np.minimum(np.searchsorted(self.steps, rows.step), last)
        # The rows of each quantity, in the order of the run.
        by_quantity = np.argsort(rows.quantity, kind="stable")
        edges = np.searchsorted(rows.quantity[by_quantity], np.arange(len(rows.quantities) + 1))
        self._rows_of = {
            name: by_quantity[edges[i] : edges[i + 1]] for i, name in enumerate(rows.quantities)
        }
        position = {name: i for i, name in enumerate(listed)}
        self._row_of = np.array([position.get(name, -1) for name in rows.components], dtype=int)
        self._model = rows.components.index(MODEL) if MODEL in rows.components else -2
        # What was asked for; `functools.cache` would keep every source as long as the process.
        self._of_components: dict[str, Column] = {}
        self._of_run: dict[str, Column] = {}

    def _chosen(self, quantity: str, *, paired: bool = False) -> NDArray[np.int64]:
        """Returns the rows of a quantity: those of single components, or those of pairs."""
        rows = self._rows_of.get(quantity, np.zeros(0, dtype=np.int64))
        of_pairs = self.recording.measurements.other[rows] >= 0
        chosen: NDArray[np.int64] = rows[of_pairs == paired]
        return chosen

    def _fill(self, shape: int, row: NDArray[np.int64], chosen: NDArray[np.int64]) -> Column:
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

    def component(self, quantity: str) -> Column:
        """A quantity of every component; (components, steps)."""
        if quantity not in self._of_components:
            chosen = self._chosen(quantity)
            row = self._row_of[self.recording.measurements.component[chosen]]
            listed = row >= 0
            found = self._fill(len(self.names), row[listed], chosen[listed])
            self._of_components[quantity] = found
        return self._of_components[quantity]

    def run(self, quantity: str) -> Column:
        """A quantity of the whole model; (1, steps)."""
        if quantity not in self._of_run:
            chosen = self._chosen(quantity)
            chosen = chosen[self.recording.measurements.component[chosen] == self._model]
            self._of_run[quantity] = self._fill(1, np.zeros(len(chosen), dtype=int), chosen)
        return self._of_run[quantity]

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
        chosen = self._chosen(quantity, paired=True)
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
        self, curve: Curve, function: Callable[[Array], float], *, of_neighbours: bool = False
    ) -> Array:
        """Applies a function to the part of a curve that ends at each measured step.

        Of a long run one old loss of each block of steps is left: a part that has also others is
        brought to its longest blocks. What is ``of_neighbours`` is not known there.
        """
        result = np.full((1, len(self.steps)), np.nan)
        so_far = (self.steps + 1) // self.spacing
        width = np.maximum(np.maximum(3, np.minimum(LOSS_WINDOW, so_far // 2)), so_far // 10)
        until = self.steps + 1
        edges = np.searchsorted(curve.step, [until - width * self.spacing, until])
        thinned = int(np.searchsorted(curve.step, self.recording.thinned.until))
        lengths = loss_blocks(curve.step)
        even: dict[int, NDArray[np.bool_]] = {}
        for i, (first, last) in enumerate(edges.T.tolist()):
            if last <= first:
                continue
            window = curve.value[first:last]
            if first < thinned:
                length = int(lengths[last - 1])
                if of_neighbours and length > 1:
                    continue
                if length not in even:
                    even[length] = drawn(curve.step, length)
                window = window[even[length][first:last]]
            if len(window):
                result[0, i] = function(window)
        return result

    @functools.cached_property
    def spacing(self) -> int:
        """Steps from one loss to the next: 1 where a training was watched; a script logs fewer."""
        if not self.recording.imported:
            return 1
        step = self.recording.losses.step
        step = step[step >= self.recording.thinned.until]
        return max(int(np.median(np.diff(step))), 1) if len(step) > 1 else 1

    @functools.cached_property
    def loss(self) -> Array:
        """Mean loss of the window that ends at each measured step; NaN with a NaN in it.

        Also NaN where several optimizers step that do not share one: adversaries have no common
        loss.
        """
        shared = self.run("shared_loss").value == 1
        if np.nanmax(np.where(shared, 1.0, self.run("optimizers").value), initial=0.0) > 1:
            return np.full((1, len(self.steps)), np.nan)  # of rivals; their sum means nothing
        return self.windows(self.recording.losses, lambda w: float(np.mean(w)))

    @functools.cached_property
    def initial_loss(self) -> float:
        """Mean of the first three losses; NaN if none, or not all, are positive and finite."""
        first = self.recording.losses.value[:INITIAL_LOSSES]
        usable = len(first) and ((first > 0) & (first < np.inf)).all()
        return float(first.mean()) if usable else float("nan")

    @functools.cached_property
    def accuracies(self) -> Curve:
        """The training accuracies that are known."""
        curve = self.recording.accuracies
        known = ~np.isnan(curve.value)
        return Curve(curve.step[known], curve.value[known])

    @functools.cached_property
    def accuracy(self) -> Array:
        """Mean training accuracy of the window that ends at each measured step."""
        return self.windows(self.accuracies, lambda w: float(np.mean(w)))

    def even(self, curve: Curve) -> Array:
        """Values of a curve, of a long run as many of each part."""
        return curve.value[evenly(curve.step, self.recording.thinned)]

    @functools.cached_property
    def epoch_accuracies(self) -> Array:
        """Mean training accuracy of twenty equal parts of the run, of ten steps or more each."""
        values = self.even(self.accuracies)
        parts = min(EPOCHS, self.recording.losses_seen // LOSS_WINDOW, len(values) // 2)
        if parts < 2:
            return np.empty(0)
        return np.array([part.mean() for part in np.array_split(values, parts)])
