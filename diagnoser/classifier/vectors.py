"""A run as numbers that a classifier learns from: one row for the run, one for each component.

Every feature's series is summed up by its early and its latest value (median of the first and of
the last three that are known), its lowest and its highest; a component's latest values also
relative to the median component. A component has of the pairs that it is in the lowest, the highest
and the median. The run's row holds its own features alone: what those of components come to depends
on the model, and is judged by kind (`reference`). Nothing here knows step counts, sizes, names or
how long a series is (law 8); what was not measured, or does not apply, is NaN and stays so (law 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.table import Array, Scope, Table

AT_ONE_TIME: Final = 3  # known values whose median is the early or the latest one
EARLIER: Final = (0.25, 0.5)  # shares of a run at which it is also looked at
EXCESS: Final = "excess."  # how far the furthest component is beyond the healthy, in a run's row
PAIR: Final = "pair."  # of the pairs that a component is in
OF_SERIES: Final = ("early", "latest", "lowest", "highest")


@dataclass(frozen=True, slots=True)
class Vectors:
    """What the classifier sees of a run.

    ``run`` maps column names to numbers; ``components`` maps them to arrays (C,), one number for
    each of ``names``, whose kinds are ``kinds``. ``earlier`` is what was to be seen at the shares
    `EARLIER` of the same run: healthy or not, everything shrinks where a training set is fitted.
    """

    run: Mapping[str, float]
    components: Mapping[str, Array]
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    earlier: tuple[Vectors, ...] = ()


def vectors(tables: Mapping[Scope, Table]) -> Vectors:
    """Sums up the feature tables of a run."""
    run = {name: float(values[0]) for name, values in _summaries(tables["run"]).items()}
    components, names = _summaries(tables["component"]), tables["component"].subjects
    relative = {
        f"{name.removesuffix('.latest')}.relative": _relative(values)
        for name, values in components.items()
        if name.endswith(".latest")
    }
    kinds = tuple(tables["component"].kinds[name] for name, _ in names)
    paired = _of_pairs(tables["pair"], [name for name, _ in names])
    return Vectors(run, components | relative | paired, tuple(n for n, _ in names), kinds)


def matrix(rows: Sequence[Mapping[str, float]], columns: Sequence[str]) -> Array:
    """Returns rows as (rows, columns); a column that a row does not have is NaN."""
    return np.array([[row.get(name, np.nan) for name in columns] for row in rows], dtype=float)


def component_matrix(of: Vectors, columns: Sequence[str]) -> Array:
    """Returns the components of a run as (components, columns), NaN where there is no number."""
    absent = np.full(len(of.names), np.nan)
    return np.column_stack([of.components.get(name, absent) for name in columns])


def _summaries(table: Table) -> dict[str, Array]:
    """Returns ``feature.early``, ``.latest``, ``.lowest``, ``.highest`` of all subjects, (S,)."""
    result: dict[str, Array] = {}
    for name, column in table.columns.items():
        values = column.value
        for kind, numbers in zip(OF_SERIES, _of_series(values), strict=True):
            result[f"{name}.{kind}"] = numbers
    return result


def _of_series(values: Array) -> Array:
    """Returns early, latest, lowest and highest of each row; (4, rows)."""
    known = ~np.isnan(values)
    lowest, highest = np.fmin.reduce, np.fmax.reduce
    ends = (_median_of_first(values, known), _median_of_first(values[:, ::-1], known[:, ::-1]))
    return np.stack([*ends, *(f(values, axis=1, initial=np.nan) for f in (lowest, highest))])


def _median_of_first(values: Array, known: NDArray[np.bool_]) -> Array:
    """Returns the median of the first known values of each row, of as many as there are."""
    first = np.full((len(values), AT_ONE_TIME), np.nan)
    place = np.cumsum(known, axis=1) - 1
    rows, columns = np.nonzero(known & (place < AT_ONE_TIME))
    first[rows, place[rows, columns]] = values[rows, columns]
    result = np.full(len(values), np.nan)
    for count in range(1, AT_ONE_TIME + 1):
        of = (~np.isnan(first)).sum(axis=1) == count
        result[of] = np.median(first[of, :count], axis=1)
    return result


def _across(values: Array, kind: str) -> float:
    """Returns the lowest of the lowest, the highest of the highest, the median of the others."""
    known = values[~np.isnan(values)]
    if not len(known):
        return float("nan")
    of = {"lowest": np.min, "highest": np.max}.get(kind, np.median)
    return float(of(known))


def _of_pairs(pairs: Table, names: Sequence[str]) -> dict[str, Array]:
    """Returns what the pairs of each component come to, (components,)."""
    own = [[i for i, pair in enumerate(pairs.subjects) if name in pair] for name in names]
    return {
        f"{PAIR}{column}": np.array([_across(values[of], column.rpartition(".")[2]) for of in own])
        for column, values in _summaries(pairs).items()
    }


def _relative(values: Array) -> Array:
    """Returns how far each value is from the median one, on a scale that is a logarithm far out."""
    known = values[np.isfinite(values)]
    if not len(known):
        return np.full(len(values), np.nan)
    return np.asarray(np.arcsinh(values) - np.arcsinh(np.median(known)))
