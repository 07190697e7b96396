"""Intervals of proportions, and of any statistic of runs that belong together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from diagnoser.errors import BenchmarkError


def wilson(hits: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (Wilson 1927).

    Of n clusters ``hits`` may be the sum of their shares, which vary less than hits and misses do.

    >>> [round(bound, 3) for bound in wilson(16, 20)]
    [0.584, 0.919]
    """
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"{hits} of {n} is no proportion")
    share = hits / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def cluster_bootstrap(
    values: NDArray[np.float64],
    clusters: Sequence[object],
    statistic: Callable[[NDArray[np.float64]], float],
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a statistic where whole clusters are drawn (Cameron et al. 2008).

    Runs of one configuration resemble each other: drawing runs would make an interval too narrow.

    >>> cluster_bootstrap(np.array([1.0, 1.0, 3.0, 3.0]), "aabb", lambda v: float(v.mean()))
    (1.0, 3.0)

    Args:
        values: What the statistic is computed from; the first dimension is the run.
        clusters: To which cluster each run belongs.
        statistic: From the values of the runs drawn to a number. A draw in which it is NaN (such as
            one without a faulty run) is left out.
        draws: How many sets of clusters are drawn.
        seed: Of the draws.
        level: Share of the draws inside the interval.

    Returns:
        Lower and upper end.

    Raises:
        BenchmarkError: No runs, or a statistic that is NaN in more than half of the draws.
    """
    known = cluster_draws(values, clusters, statistic, draws=draws, seed=seed)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def cluster_draws(
    values: NDArray[np.float64],
    clusters: Sequence[object],
    statistic: Callable[[NDArray[np.float64]], float],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Returns the statistic of each draw of `cluster_bootstrap`, (draws,) less those with NaN.

    Raises:
        BenchmarkError: As there.
    """
    if len(values) == 0 or len(values) != len(clusters):
        raise BenchmarkError(f"{len(values)} values of {len(clusters)} runs have no interval")
    members: dict[object, list[int]] = {}
    for index, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(index)
    groups = [np.array(indices) for indices in members.values()]
    generator = np.random.default_rng(seed)
    drawn = np.array(
        [
            statistic(values[np.concatenate([groups[i] for i in chosen])])
            for chosen in generator.integers(len(groups), size=(draws, len(groups)))
        ]
    )
    known: NDArray[np.float64] = drawn[~np.isnan(drawn)]
    if 2 * len(known) < draws:
        raise BenchmarkError(f"a statistic is undefined in {draws - len(known)} of {draws} draws")
    return known
