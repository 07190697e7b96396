"""What is known of a run, as columns; and the builder that makes it of records, one by one."""

from __future__ import annotations

import importlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.errors import UsageError
from diagnoser.types import Component, Cost, Part

LOG_FILE: Final = "log.jsonl"
SCHEMA_VERSION: Final = 1

Data = Mapping[str, Any]
Record = dict[str, Any]
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
    lines of the log that could not be read.
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


class RecordingBuilder:
    """Builds a `Recording` of decoded records, one after the other, the header first.

    Each record is checked, and added whole or not at all.

    Raises:
        ValueError, TypeError, LookupError: The header is damaged.
    """

    def __init__(self, header: Record) -> None:
        self._run = _text(header["run"])
        self._header = _mapping(header["header"])
        self._components: tuple[Component, ...] = ()
        self._facts: list[Fact] = []
        self._events: list[Event] = []
        self._ending: Ending | None = None
        self._losses: tuple[array[Any], ...] = (array("q"), array("d"), array("d"))
        self._measured = (array("q"), array("d"))
        self._columns: dict[str, array[Any]] = {name: array(code) for name, code in COLUMNS.items()}
        self._tables: dict[str, dict[str, int]] = {table: {} for table in TABLES}

    def add(self, record: Record) -> None:
        """Adds one record.

        Raises:
            ValueError, TypeError, LookupError, OverflowError: The record is damaged.
        """
        match record["record"]:
            case "loss":
                found: tuple[array[Any], ...] = (
                    array("q", record["step"]),
                    _floats(record["value"]),
                    _floats(record["accuracy"]),
                )
                _check_lengths(*found)
                for column, values in zip(self._losses, found, strict=True):
                    column.extend(values)
            case "measurement":
                self._add_measurement(record)
            case "components":
                self._components = tuple(_component(item) for item in record["components"])
            case "fact":
                self._facts.append(
                    Fact(
                        step=_integer(record["step"]),
                        name=_text(record["name"]),
                        component=_text(record["component"]),
                        value=float(record["value"]),
                        data=_mapping(record["data"]),
                    )
                )
            case "event":
                self._events.append(
                    Event(
                        step=_integer(record["step"]),
                        kind=_text(record["kind"]),
                        message=_text(record["message"]),
                        data=_mapping(record["data"]),
                    )
                )
            case "end":
                self._ending = _ending(record)
            case unexpected:
                raise ValueError(f"no such record: {unexpected}")

    def recording(self, damaged_lines: int = 0) -> Recording:
        """Returns what was added so far, as a copy that nothing changes."""
        columns: dict[str, Any] = {name: _frozen(its) for name, its in self._columns.items()}
        columns |= {table: tuple(names) for table, names in self._tables.items()}
        return Recording(
            run=self._run,
            header=self._header,
            components=self._components,
            facts=tuple(self._facts),
            losses=Curve(_frozen(self._losses[0]), _frozen(self._losses[1])),
            accuracies=Curve(_frozen(self._losses[0]), _frozen(self._losses[2])),
            measurements=Measurements(**columns),
            measured=Curve(_frozen(self._measured[0]), _frozen(self._measured[1])),
            events=tuple(self._events),
            ending=self._ending,
            damaged_lines=damaged_lines,
        )

    def _add_measurement(self, record: Record) -> None:
        step, seconds = _integer(record["step"]), float(record["seconds"])
        names = {table: [_text(name) for name in record[table]] for table in TABLES}
        rows: dict[str, array[Any]] = {
            column: _floats(record["rows"][column])
            if code == "d"
            else array(code, record["rows"][column])
            for column, code in COLUMNS.items()
        }
        _check_lengths(*rows.values())
        for column, table in TABLE_OF.items():
            lowest = -1 if column == "other" else 0
            if rows["step"] and not (
                lowest <= min(rows[column]) and max(rows[column]) < len(names[table])
            ):
                raise IndexError("a row points at a name that is not there")

        # Checked. A record's positions are in its own lists of names; the recording has its own.
        for column, table in TABLE_OF.items():
            known = self._tables[table]
            positions = [known.setdefault(name, len(known)) for name in names[table]]
            positions.append(-1)  # so that -1, no other component, stays -1
            rows[column] = array("i", [positions[code] for code in rows[column]])
        for column, values in rows.items():
            self._columns[column].extend(values)
        self._measured[0].append(step)
        self._measured[1].append(seconds)


def _component(item: Record) -> Component:
    return Component(
        name=_text(item["name"]),
        kind=_text(item["kind"]),
        layer=_text(item["layer"]),
        order=_integer(item["order"]),
        parts=tuple(
            Part(
                parameter=_text(part["parameter"]),
                dim=None if part["dim"] is None else _integer(part["dim"]),
                start=_integer(part["start"]),
                length=_integer(part["length"]),
            )
            for part in item["parts"]
        ),
        elements=_integer(item["elements"]),
    )


def _ending(record: Record) -> Ending:
    code, cost = record["exit_code"], record["cost"]
    return Ending(
        exit_code=None if code is None else _integer(code),
        cost=None
        if cost is None
        else Cost(
            steps=_integer(cost["steps"]),
            measurements=_integer(cost["measurements"]),
            training_s=float(cost["training_s"]),
            monitoring_s=float(cost["monitoring_s"]),
            repairing_s=float(cost.get("repairing_s", 0.0)),
        ),
        lost_records=_integer(record["lost_records"]),
    )


def _floats(values: Any) -> array[float]:
    """Returns a column of floats; null and "NaN" are NaN."""
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1:
        raise ValueError("not a list of numbers")
    return array("d", column.tobytes())


def _check_lengths(*columns: array[Any]) -> None:
    if len({len(column) for column in columns}) > 1:
        raise ValueError("columns of different lengths")


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("not a whole number")
    if not -(2**63) <= value < 2**63:
        raise OverflowError("a whole number of more than 64 bits")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def _mapping(value: Any) -> Data:
    if not isinstance(value, dict):
        raise TypeError("not a mapping")
    return value


def _head(curve: Curve, step: int) -> Curve:
    return Curve(curve.step[curve.step <= step], curve.value[curve.step <= step])


def _frozen(column: array[Any]) -> NDArray[Any]:
    copy = np.array(column)
    copy.flags.writeable = False
    return copy


def _position(names: tuple[str, ...], name: str) -> int:
    """Returns where a name stands; -2, where no row points, if nowhere."""
    return names.index(name) if name in names else -2
