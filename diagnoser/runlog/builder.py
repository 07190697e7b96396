"""Builds a `Recording` of records, one by one, and thins it where a run is long."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.runlog import thinning
from diagnoser.runlog.recording import (
    COLUMNS,
    TABLE_OF,
    TABLES,
    Curve,
    Ending,
    Event,
    Fact,
    Measurements,
    Recording,
    Thinned,
)
from diagnoser.runlog.records import (
    THINNED_VERSION,
    Record,
    component_of,
    components_record,
    end_record,
    ending_of,
    event_of,
    event_record,
    fact_of,
    fact_record,
    header_record,
    integer,
    loss_record,
    losses_of,
    mapping,
    number,
    rows_of,
    text,
    thinned_of,
    thinned_record,
)
from diagnoser.types import Component

LOSSES_A_RECORD: Final = 1024  # where many are written at once


class RecordingBuilder:
    """Builds a `Recording` of decoded records, one after the other, the header first.

    Each record is checked, and added whole or not at all.

    Raises:
        ValueError, TypeError, LookupError: The header is damaged.
    """

    def __init__(self, header: Record) -> None:
        self._run = text(header["run"])
        self._header = mapping(header["header"])
        self._listed_at, self._listings = 0, 0
        self._components: tuple[Component, ...] = ()
        self._facts: list[Fact] = []
        self._events: list[Event] = []
        self._ending: Ending | None = None
        self._thinned = Thinned()
        self._least = (0, 0, 0)  # rows, losses, notes below which it is not thinned again
        self._losses: tuple[array[Any], ...] = (array("q"), array("d"), array("d"))
        self._measured = (array("q"), array("d"), array("q"))  # step, seconds, rows
        self._columns: dict[str, array[Any]] = {name: array(code) for name, code in COLUMNS.items()}
        self._tables: dict[str, dict[str, int]] = {table: {} for table in TABLES}

    def add(self, record: Record) -> None:
        """Adds one record.

        Raises:
            ValueError, TypeError, LookupError, OverflowError: The record is damaged.
        """
        match record["record"]:
            case "loss":
                for column, values in zip(self._losses, losses_of(record), strict=True):
                    column.extend(values)
            case "measurement":
                self._add_measurement(record)
            case "components":
                self._components = tuple(component_of(item) for item in record["components"])
                self._listings += 1
            case "fact":
                self._facts.append(fact_of(record))
            case "event":
                self._events.append(event_of(record))
            case "end":
                self._ending = ending_of(record)
            case "thinned":
                self._thinned = thinned_of(record)
            case unexpected:
                raise ValueError(f"no such record: {unexpected}")

    def recording(self, damaged_lines: int = 0) -> Recording:
        """Returns what was added so far, as a copy that nothing changes."""
        return Recording(
            run=self._run,
            header=self._header,
            components=self._components,
            facts=tuple(self._facts),
            losses=Curve(_frozen(self._losses[0]), _frozen(self._losses[1])),
            accuracies=Curve(_frozen(self._losses[0]), _frozen(self._losses[2])),
            measurements=self._measurements(),
            measured=Curve(_frozen(self._measured[0]), _frozen(self._measured[1])),
            events=tuple(self._events),
            ending=self._ending,
            damaged_lines=damaged_lines,
            thinned=self._thinned,
        )

    def records(self) -> Iterator[Record]:
        """Yields records that make the same again, the header first."""
        is_thinned = self._thinned != Thinned()
        version = {"version": THINNED_VERSION} if is_thinned else {}
        yield header_record(self._run, self._header, **version)
        if is_thinned:
            yield thinned_record(self._thinned)
        if self._listings:
            yield components_record(0, self._components)
        yield from map(fact_record, self._facts)
        yield from map(event_record, self._events)
        losses = list(zip(*self._losses, strict=True))
        for first in range(0, len(losses), LOSSES_A_RECORD):
            yield loss_record(losses[first : first + LOSSES_A_RECORD])
        names = {table: list(known) for table, known in self._tables.items()}
        first = 0
        for step, seconds, size in zip(*self._measured, strict=True):
            rows = {name: its[first : first + size] for name, its in self._columns.items()}
            yield {
                "record": "measurement",
                "step": step,
                "seconds": number(seconds),
                **_of_their_own(rows, names),
            }
            first += size
        if self._ending is not None:
            ending = self._ending
            yield end_record(ending.exit_code, ending.cost, ending.lost_records)

    # -- long runs (see `thinning`) ----------------------------------------------------------------

    @property
    def is_long(self) -> bool:
        """Whether there is more than is kept of any run."""
        size = self._size()
        most = (thinning.MOST_ROWS, thinning.MOST_LOSSES, thinning.MOST_NOTES)
        return any(own > max(pair) for own, *pair in zip(size, most, self._least, strict=True))

    def thinned(self, beginnings: Iterable[int]) -> RecordingBuilder:
        """Returns one with less, which holds nothing that this one does not.

        Args:
            beginnings: Steps at which something began, the most important first.
        """
        rows = self._measurements()
        step, seconds, sizes = (_frozen(column) for column in self._measured)
        stays, rows_stay = thinning.thin_measurements(step, sizes, rows, beginnings)
        losses_stay, until = thinning.thin_losses(
            _frozen(self._losses[0]), _frozen(self._losses[1])
        )
        facts = thinning.thin_notes([_said(fact_record(fact)) for fact in self._facts])
        events = thinning.thin_notes([_said(event_record(event)) for event in self._events])

        left = RecordingBuilder({"run": self._run, "header": self._header})
        left._components, left._listings = self._components, min(self._listings, 1)
        left._facts = [self._facts[position] for position in facts]
        left._events = [self._events[position] for position in events]
        left._ending = self._ending
        left._losses = tuple(_selected(column, losses_stay) for column in self._losses)
        owner = np.repeat(np.arange(len(step)), sizes)[rows_stay]
        sizes_left = np.bincount(owner, minlength=len(step))[stays]
        left._measured = (
            _selected(self._measured[0], stays),
            _selected(self._measured[1], stays),
            array("q", sizes_left.astype(np.int64).tobytes()),
        )
        left._columns = {name: _selected(its, rows_stay) for name, its in self._columns.items()}
        left._take_names(self._tables)
        gone = self._thinned
        left._thinned = Thinned(
            losses=gone.losses + int((~losses_stay).sum()),
            measurements=gone.measurements + int((~stays).sum()),
            rows=gone.rows + int((~rows_stay).sum()),
            seconds=gone.seconds + float(np.nansum(seconds[~stays])),
            notes=gone.notes + len(self._facts) - len(facts) + len(self._events) - len(events),
            until=max(gone.until, until),
        )
        rows_left, losses_left, _ = left._size()
        left._least = 2 * rows_left, 2 * losses_left, 0
        return left

    def _size(self) -> tuple[int, int, int]:
        return (
            len(self._columns["step"]) + len(self._measured[0]),
            len(self._losses[0]),
            len(self._facts) + len(self._events) + self._listings,
        )

    def _take_names(self, tables: dict[str, dict[str, int]]) -> None:
        """Gives the rows, whose codes are of other tables, tables of the names that they use."""
        for table in TABLES:
            columns = [column for column, its in TABLE_OF.items() if its == table]
            # In the order in which they appear, row by row.
            codes = np.column_stack([np.array(self._columns[column]) for column in columns])
            used, places = np.unique(codes.ravel(), return_index=True)
            used = used[np.argsort(places)]
            used = used[used >= 0]
            names = list(tables[table])
            self._tables[table] = {names[code]: new for new, code in enumerate(used.tolist())}
            new_code = np.full(len(names) + 1, -1, dtype=np.int32)
            new_code[used] = np.arange(len(used))
            for column in columns:
                own = new_code[np.array(self._columns[column])]
                self._columns[column] = array("i", own.tobytes())

    def _measurements(self) -> Measurements:
        columns: dict[str, Any] = {name: _frozen(its) for name, its in self._columns.items()}
        columns |= {table: tuple(names) for table, names in self._tables.items()}
        return Measurements(**columns)

    def _add_measurement(self, record: Record) -> None:
        step, seconds = integer(record["step"]), float(record["seconds"])
        rows, names = rows_of(record)
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
        self._measured[2].append(len(rows["step"]))


def _of_their_own(rows: dict[str, array[Any]], names: dict[str, list[str]]) -> Record:
    """Returns rows of a measurement with lists of the names that they use."""
    own: dict[str, dict[str, int]] = {table: {} for table in TABLES}
    columns: dict[str, list[Any]] = {
        name: [number(value) for value in its] if COLUMNS[name] == "d" else its.tolist()
        for name, its in rows.items()
    }
    for at in range(len(columns["step"])):
        for column, table in TABLE_OF.items():
            code = columns[column][at]
            if code >= 0:
                known, name = own[table], names[table][code]
                columns[column][at] = known.setdefault(name, len(known))
    return {**{table: list(known) for table, known in own.items()}, "rows": columns}


def _said(record: Record) -> str:
    """Returns what a fact or an event says, whenever that was."""
    return json.dumps({**record, "step": 0}, sort_keys=True)


def _selected(column: array[Any], chosen: NDArray[np.bool_]) -> array[Any]:
    return array(column.typecode, np.array(column)[chosen].tobytes())


def _frozen(column: array[Any]) -> NDArray[Any]:
    copy = np.array(column)
    copy.flags.writeable = False
    return copy
