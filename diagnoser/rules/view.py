"""The tables of a run as a rule of one scope sees them.

A rule's subjects and steps are those of its own table. Columns of the wider scope (the run) and,
in pairs, of the components are brought to that shape; a step at which they were not measured is
NaN there. Components and pairs are often measured at different steps: a pair sees both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from diagnoser.rules.expression import HealthyEnd
from diagnoser.rules.interval import is_exact
from diagnoser.rules.ranges import Ranges, range_key, shipped_ranges
from diagnoser.table import Array, Column, Scope, Table

Subject = tuple[str, str | None]
Tables = Mapping[Scope, Table]


class View:
    """The columns of one scope, each aligned when it is first asked for.

    Attributes:
        subjects: what is judged.
        steps: (S,) the optimizer steps at which it is judged.
    """

    def __init__(
        self,
        scope: Scope,
        tables: Tables,
        ranges: Ranges | None = None,
        *,
        both_ways: bool = False,
    ) -> None:
        """Prepares a view.

        Args:
            scope: the scope of the rules.
            tables: the run's tables by scope; a scope may be missing.
            ranges: the healthy ranges; the shipped ones if left out.
            both_ways: whether a pair (a, b) is seen as (b, a) too.
        """
        own = tables.get(scope)
        self.scope = scope
        self.subjects: tuple[Subject, ...] = own.subjects if own else ()
        self.steps = own.steps if own else np.zeros(0, np.int64)
        self._tables = tables
        self._ranges = shipped_ranges() if ranges is None else ranges
        self._rows = np.arange(len(self.subjects))
        self._cache: dict[str, Column] = {}
        self._ends: dict[HealthyEnd, Column] = {}
        if scope == "pair" and "component" in tables:
            self.steps = np.union1d(self.steps, tables["component"].steps)
        if both_ways:
            self._add_reversed()

    def _add_reversed(self) -> None:
        # What couples a to b couples b to a, unless the table measures the two separately.
        seen = set(self.subjects)
        more = [(i, (b, a)) for i, (a, b) in enumerate(self.subjects) if b and (b, a) not in seen]
        self.subjects += tuple(subject for _, subject in more)
        self._rows = np.append(self._rows, [i for i, _ in more]).astype(np.int64)

    @property
    def shape(self) -> tuple[int, int]:
        """(subjects, steps)."""
        return len(self.subjects), len(self.steps)

    def column(self, name: str) -> Column:
        """Returns a feature's column; its arrays broadcast to `shape`."""
        if name not in self._cache:
            self._cache[name] = self._align(name)
        return self._cache[name]

    def _align(self, name: str) -> Column:
        prefix, _, feature = name.rpartition(".")
        own, run = self._tables.get(self.scope), self._tables.get("run")
        if prefix:
            table = self._tables.get("component")
            place = {subject[0]: i for i, subject in enumerate(table.subjects)} if table else {}
            side = "ab".index(prefix)
            rows = np.array([place.get(subject[side] or "", -1) for subject in self.subjects], int)
        elif own and feature in own.columns:
            table, rows = own, self._rows
        else:
            table, rows = run, np.zeros(1, np.int64)
        if table is None or feature not in table.columns:
            return Column.exact(np.full((1, 1), np.nan))
        whole, positions = table.columns[feature], _positions(self.steps, table.steps)

        def take(x: Array) -> Array:
            return _take(x, rows, positions)

        if is_exact(whole):
            return Column.exact(take(whole.value))
        return Column(take(whole.value), take(whole.lower), take(whole.upper))

    def kinds(self, name: str) -> Sequence[str | None]:
        """Returns the component kind of each subject for ``kind``, ``a.kind`` or ``b.kind``."""
        side = 1 if name == "b.kind" else 0
        known: dict[str, str] = {}
        for scope in ("component", self.scope):
            if table := self._tables.get(scope):
                known.update(table.kinds)
        return [known.get(subject[side] or "") for subject in self.subjects]

    def range_keys(self, end: HealthyEnd) -> list[str | None]:
        """Returns what the range of each subject is filed under; None where a kind is unknown."""
        prefix = end.name.rpartition(".")[0]
        sides = {"run": (), "component": (f"{prefix or 'a'}.kind",), "pair": ("a.kind", "b.kind")}
        kinds = [self.kinds(side) for side in sides[end.scope]]
        return [range_key(end.scope, [of[i] for of in kinds]) for i in range(len(self.subjects))]

    def healthy(self, end: HealthyEnd) -> Column:
        """Returns an end of a healthy range for each subject, (subjects, 1) arrays."""
        if end not in self._ends:
            feature = end.name.rpartition(".")[2]
            rows = [self._ranges.end(feature, key, end.end) for key in self.range_keys(end)]
            value, lower, upper = np.array(rows, np.float64).reshape(-1, 3).T[:, :, np.newaxis]
            self._ends[end] = Column(value, lower, upper)
        return self._ends[end]


def _positions(wanted: NDArray[np.int64], measured: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Returns where each wanted step was measured, -1 where not; None: they are the same steps."""
    if wanted is measured or np.array_equal(wanted, measured):
        return None
    if len(measured) == 0:
        return np.full(len(wanted), -1, np.int64)
    found = np.minimum(np.searchsorted(measured, wanted), len(measured) - 1)
    return np.where(measured[found] == wanted, found, -1)


def _take(x: Array, rows: NDArray[np.int64], positions: NDArray[np.int64] | None) -> Array:
    if x.size == 0:
        return np.full((1, 1), np.nan)
    if x.shape[0] != len(rows) or (rows != np.arange(len(rows))).any():
        x = np.where((rows >= 0)[:, np.newaxis], x[rows], np.nan)
    if positions is not None:
        x = np.where(positions >= 0, x[:, positions], np.nan)
    return x


def until(tables: Tables, step: int) -> dict[Scope, Table]:
    """Returns the tables without what was measured after a step."""
    shorter: dict[Scope, Table] = {}
    for scope, table in tables.items():
        end = int(np.searchsorted(table.steps, step, side="right"))
        columns = {name: _cut(column, slice(end)) for name, column in table.columns.items()}
        shorter[scope] = Table(scope, table.steps[:end], table.subjects, columns, table.kinds)
    return shorter


def since(tables: Tables, step: int) -> dict[Scope, Table]:
    """Returns the tables without what was measured before a step."""
    later: dict[Scope, Table] = {}
    for scope, table in tables.items():
        first = int(np.searchsorted(table.steps, step))
        columns = {name: _cut(column, slice(first, None)) for name, column in table.columns.items()}
        later[scope] = Table(scope, table.steps[first:], table.subjects, columns, table.kinds)
    return later


def _cut(column: Column, part: slice) -> Column:
    if is_exact(column):
        return Column.exact(column.value[:, part])
    return Column(column.value[:, part], column.lower[:, part], column.upper[:, part])
