"""Learns from healthy runs how far each feature reaches, for each kind of component.

`extremes` says how far it reached in one run, `learn_ranges` what 99 of 100 runs do not exceed. The
run is what is counted: a range that one step in a hundred leaves would be left in every run. Names,
steps and times are not read: a range learnt on one model is about kinds.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diagnoser.benchmark.intervals import cluster_bootstrap
from diagnoser.errors import BenchmarkError
from diagnoser.rules.ranges import Bounds, Range, Ranges, range_key
from diagnoser.table import Scope, Table

FEWEST_CLUSTERS = 2  # from one cluster nothing is known about the next


@dataclass(frozen=True, slots=True)
class Extreme:
    """How far a feature reached in one run, over all subjects of one kind and all steps.

    ``key`` is what ranges are filed under (`diagnoser.rules.ranges.range_key`).
    """

    scope: Scope
    key: str
    feature: str
    lowest: float
    highest: float


def extremes(tables: Mapping[Scope, Table]) -> tuple[Extreme, ...]:
    """Returns the lowest and highest value of every feature of a run, for each kind.

    Infinite values count. Left out are values that are not known, subjects whose kind is not known,
    and features without any known value.
    """
    found = []
    for scope, table in tables.items():
        rows: dict[str, list[int]] = {}
        for row, subject in enumerate(table.subjects):
            names = () if scope == "run" else tuple(name for name in subject if name is not None)
            if key := range_key(scope, [table.kinds.get(name) for name in names]):
                rows.setdefault(key, []).append(row)
        for feature, column in table.columns.items():
            values = np.broadcast_to(column.value, (len(table.subjects), len(table.steps)))
            for key, members in rows.items():
                known = values[members]
                known = known[~np.isnan(known)]
                if known.size:
                    lowest, highest = float(known.min()), float(known.max())
                    found.append(Extreme(scope, key, feature, lowest, highest))
    return tuple(found)


def learn_ranges(
    runs: Sequence[tuple[Hashable, Sequence[Extreme]]], quantile: float = 0.99, fewest: int = 100
) -> Ranges:
    """Learns healthy ranges from the extremes of healthy runs.

    The high end is the quantile of the runs' highest values, the low end that of the lowest, each
    with the 95 % percentile bootstrap interval over clusters, widened to hold the end itself. A
    range is kept if it has enough runs, of two clusters or more, and both ends are finite.

    Args:
        runs: For each run its cluster (the configuration that it shares with others) and what
            `extremes` says of it.
        quantile: Of the highest values; 1 - quantile of the lowest.
        fewest: Runs that a range is learnt from.

    Raises:
        BenchmarkError: A quantile that is not between a half and one.
    """
    if not 0.5 < quantile < 1.0:
        raise BenchmarkError(f"quantile {quantile}: no high end of a range; between 0.5 and 1")
    seen: dict[tuple[str, str], list[tuple[Hashable, float, float]]] = {}
    for cluster, found in runs:
        for extreme in found:
            reached = (cluster, extreme.lowest, extreme.highest)
            seen.setdefault((extreme.feature, extreme.key), []).append(reached)
    features: dict[str, dict[str, Range]] = {}
    for (feature, key), reached_by_run in sorted(seen.items()):
        clusters, lowest, highest = zip(*reached_by_run, strict=True)
        if len(clusters) < fewest or len(set(clusters)) < FEWEST_CLUSTERS:
            continue
        low = _end(np.array(lowest), clusters, 1.0 - quantile)
        high = _end(np.array(highest), clusters, quantile)
        if low is not None and high is not None:
            features.setdefault(feature, {})[key] = Range(len(clusters), low, high)
    return Ranges(quantile, len(runs), features)


def _end(values: NDArray[np.float64], clusters: Sequence[Hashable], share: float) -> Bounds | None:
    """Returns a quantile with its interval, or nothing if one of the three is infinite."""

    def statistic(drawn: NDArray[np.float64]) -> float:
        return _quantile(drawn, share)

    value = statistic(values)
    if math.isinf(value):
        return None
    with np.errstate(invalid="ignore"):  # inf - inf, where many draws are infinite
        lower, upper = cluster_bootstrap(values, clusters, statistic)
    if not (math.isfinite(lower) and math.isfinite(upper)):
        return None
    return value, min(value, lower), max(value, upper)


def _quantile(values: NDArray[np.float64], share: float) -> float:
    """Returns numpy's linear quantile, or infinity where it lies beside an infinite value.

    numpy itself interpolates to NaN there; and this takes a fifteenth of its time, which counts
    where thousands of draws are made of hundreds of ranges.
    """
    position = share * (len(values) - 1)
    below = math.floor(position)
    above = min(below + 1, len(values) - 1)
    near = np.partition(values, (below, above))
    first, second = float(near[below]), float(near[above])
    if math.isinf(first) or math.isinf(second):
        return first if math.isinf(first) else second
    return first + (second - first) * (position - below)
