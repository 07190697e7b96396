"""What is known of a run, as columns."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.errors import UsageError
from diagnoser.types import Component, Cost

LOG_FILE: Final = "log.jsonl"
IMPORTED: Final = "imported"  # what the header of a run has that was made of a script's own log

Data = Mapping[str, Any]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Codes = NDArray[np.int32]

# The columns of measurements, each with its type (`array` type codes: q int64, d float64, i int32).
COLUMNS: Final = {
    "step": "q",
    "quantity": "i",
    "component": "i",
    "other": "i",
    "value": "d",
    "std_error": "d",
    "batch_std_error": "d",
    "samples": "q",
    "method": "i",
    "dtype": "i",
}
# The table of names that an ``i`` column points into.
TABLE_OF: Final = {
    "quantity": "quantities",
    "component": "components",
    "other": "components",
    "method": "methods",
    "dtype": "dtypes",
}
TABLES: Final = ("quantities", "components", "methods", "dtypes")


@dataclass(frozen=True, slots=True)
class Fact:
    """Something the program does, of one component or of ``model``; ``data`` says more.

    For example ``trainable`` or ``in_optimizer`` (0 or 1), ``fully_masked_rows`` (a count),
    ``optimizer`` (its class and settings in ``data``).
    """

    step: int
    name: str
    component: str
    value: float
    data: Data = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to the monitor: a failure of its own, a trigger."""

    step: int
    kind: str
    message: str
    data: Data = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ending:
    """How the run ended. ``lost_records``: how many a full disk kept out of the log."""

    exit_code: int | None
    cost: Cost | None
    lost_records: int = 0


@dataclass(frozen=True, slots=True)
class Thinned:
    """How much is no longer in the log of a long run (see `thinning`); all zero in a shorter one.

    ``seconds`` is what the measurements that are gone took. Of the losses before the step ``until``
    some are gone, of those from there on none.
    """

    losses: int = 0
    measurements: int = 0
    rows: int = 0
    seconds: float = 0.0
    notes: int = 0
    until: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """A number at some steps: two arrays (S,), in the order of the run."""

    step: Integers
    value: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """One quantity over time: arrays (S,), in the order of the run; a NaN error is not known."""

    step: Integers
    value: Floats
    std_error: Floats
    batch_std_error: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Measurements:
    """All measured numbers, one row each, as columns (R,) in the order of the run.

    ``quantity``, ``component``, ``other``, ``method`` and ``dtype`` are positions in the tables of
    names (``other`` shares the table of components; -1: there is none). An error that is not known
    is NaN; ``samples`` that are not known are -1.
    """

    step: Integers
    quantity: Codes
    component: Codes
    other: Codes
    value: Floats
    std_error: Floats
    batch_std_error: Floats
    samples: Integers
    method: Codes
    dtype: Codes
    quantities: tuple[str, ...]
    components: tuple[str, ...]
    methods: tuple[str, ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """What is known of a run.

    ``losses`` and ``accuracies`` share their steps; an accuracy that was not seen is NaN.
    ``measured`` holds the seconds that each measurement took, also of those without rows.
    ``ending`` is None while the run goes on and when its process died. ``damaged_lines`` counts the
    lines of the log that could not be read, ``thinned`` what a long run has let go.
    """

    run: str
    header: Data
    components: tuple[Component, ...]
    facts: tuple[Fact, ...]
    losses: Curve
    accuracies: Curve
    measurements: Measurements
    measured: Curve
    events: tuple[Event, ...]
    ending: Ending | None
    damaged_lines: int
    thinned: Thinned = Thinned()

    @property
    def losses_seen(self) -> int:
        """How many losses were recorded, those that were let go included."""
        return len(self.losses.step) + self.thinned.losses

    @property
    def measurements_made(self) -> int:
        """How many measurements were made, those that were let go included."""
        return len(self.measured.step) + self.thinned.measurements

    @property
    def imported(self) -> bool:
        """Whether it was made of curves that a script had logged, and not of measurements."""
        return isinstance(self.header.get(IMPORTED), dict)

    def series(self, quantity: str, component: str, other: str | None = None) -> Series:
        """Returns one quantity of a component (or pair) over time; empty if never measured."""
        rows = self.measurements
        chosen = (
            (rows.quantity == _position(rows.quantities, quantity))
            & (rows.component == _position(rows.components, component))
            & (rows.other == (-1 if other is None else _position(rows.components, other)))
        )
        return Series(
            rows.step[chosen],
            rows.value[chosen],
            rows.std_error[chosen],
            rows.batch_std_error[chosen],
        )

    def until(self, step: int) -> Recording:
        """Returns what was known when ``step`` had just been made: a run that still goes on."""
        rows = self.measurements
        known = rows.step <= step
        columns = {name: getattr(rows, name)[known] for name in COLUMNS}
        return replace(
            self,
            facts=tuple(fact for fact in self.facts if fact.step <= step),
            losses=_head(self.losses, step),
            accuracies=_head(self.accuracies, step),
            measurements=replace(rows, **columns),
            measured=_head(self.measured, step),
            events=tuple(event for event in self.events if event.step <= step),
            ending=None,
        )

    def part(self, share: float) -> Recording:
        """Returns the recording as it was after a share of its steps; whole, with its ending."""
        if share >= 1.0:
            return self
        steps = int(self.losses.step[-1]) + 1 if len(self.losses.step) else 0
        return self.until(max(round(share * steps) - 1, 0))

    def frame(self) -> Any:
        """Returns the measurements as a pandas DataFrame, names as categories.

        Raises:
            UsageError: pandas is not installed.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ImportError:
            raise UsageError("Recording.frame(): pandas is missing; pip install pandas") from None
        rows = self.measurements
        columns = {name: getattr(rows, name) for name in COLUMNS}
        for name, table in TABLE_OF.items():
            columns[name] = pandas.Categorical.from_codes(columns[name], getattr(rows, table))
        return pandas.DataFrame(columns)


def _head(curve: Curve, step: int) -> Curve:
    return Curve(curve.step[curve.step <= step], curve.value[curve.step <= step])


def _position(names: tuple[str, ...], name: str) -> int:
    """Returns where a name stands; -2, where no row points, if nowhere."""
    return names.index(name) if name in names else -2
