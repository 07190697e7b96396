"""Scores of judges on runs whose truth is proven: is it faulty, why, where; with intervals.

A judge gives a `Verdict` for each run. Rates have Wilson intervals where runs are told apart one by
one, and cluster-bootstrap intervals over (subject, recipe, operator) elsewhere: runs of one
configuration resemble each other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.benchmark.dataset import Truth
from diagnoser.benchmark.intervals import cluster_bootstrap, wilson
from diagnoser.classifier import to_blame
from diagnoser.errors import BenchmarkError
from diagnoser.vocabulary import CAUSE_CATEGORY, MODEL

HEALTHY: Final = ("HC1", "HC2", "HC3", "HC4", "HC5a")
# Scored apart: latent defects, and controls that were not proven to be as good as clean runs.
CONTROLS: Final = (*HEALTHY, "HC5b", "HCx")
UNNAMED: Final = ""  # the category of a judge that names no cause


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of a run, and its truth.

    ``score`` grows with how surely it is faulty, ``faulty`` is the judge's own decision. ``causes``
    and ``components`` are best first; either may be empty.
    """

    truth: Truth
    seed: int
    faulty: bool
    score: float
    causes: tuple[str, ...] = ()
    components: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its 95 % interval and what it was counted on."""

    name: str
    value: float
    low: float
    high: float
    n: int


def figures(verdicts: Sequence[Verdict]) -> list[Figure]:
    """Scores a judge; a figure that nothing was counted on is left out.

    ``auroc`` faulty against healthy controls (HC1 to HC4, HC5a); ``recall`` and, for each set of
    controls, ``false alarms`` of the judge's own decision; ``macro_f1`` over categories of causes,
    of the first cause of runs that are faulty; ``cause_top_1`` and ``_3``; ``component_top_1`` and
    ``_3`` of runs with a local fault. Causes and components are ranks, of all faulty runs, whether
    or not the judge calls them faulty.
    """
    faulty = [v for v in verdicts if v.truth.is_faulty]
    healthy = [v for v in verdicts if v.truth.control in HEALTHY]
    found = [_bootstrapped("auroc", [*faulty, *healthy], _auroc)]
    found.append(_rate("recall", [v.faulty for v in faulty]))
    for control in CONTROLS:
        own = [v.faulty for v in verdicts if v.truth.control == control]
        found.append(_rate(f"false alarms {control}", own))
    named = [v for v in faulty if v.truth.causes]
    found.append(_bootstrapped("macro_f1", named, _macro_f1))
    for top in (1, 3):
        found.append(_bootstrapped(f"cause_top_{top}", named, functools.partial(_caused, top=top)))
    local = [v for v in faulty if v.truth.components]
    for top in (1, 3):
        placed = functools.partial(_placed, top=top)
        found.append(_bootstrapped(f"component_top_{top}", local, placed))
    return [figure for figure in found if figure is not None]


def by_operator(verdicts: Sequence[Verdict]) -> dict[str, tuple[int, int]]:
    """Returns (found, runs) of each operator among faulty runs."""
    counts: dict[str, tuple[int, int]] = {}
    for v in verdicts:
        if v.truth.is_faulty:
            name = "+".join(v.truth.operators)
            found, runs = counts.get(name, (0, 0))
            counts[name] = (found + v.faulty, runs + 1)
    return dict(sorted(counts.items()))


def difference(
    name: str,
    ours: Sequence[Verdict],
    theirs: Sequence[Verdict],
    statistic: Callable[[Sequence[Verdict]], float],
) -> Figure:
    """Returns how much better one judge is than another on the same runs, paired by run.

    Raises:
        BenchmarkError: The runs are not the same.
    """
    pairs = list(zip(ours, theirs, strict=True))
    if any((a.truth.hash, a.seed) != (b.truth.hash, b.seed) for a, b in pairs):
        raise BenchmarkError("two judges can only be compared on the same runs, in the same order")

    def gap(indices: NDArray[np.generic]) -> float:
        a = statistic([pairs[int(i)][0] for i in indices])
        return a - statistic([pairs[int(i)][1] for i in indices])

    everything = np.arange(len(pairs))
    low, high = cluster_bootstrap(everything, [_cluster(a) for a, _ in pairs], gap)
    return Figure(name, gap(everything), low, high, len(pairs))


STATISTICS: Final[Mapping[str, Callable[[Sequence[Verdict]], float]]] = {
    "auroc": lambda vs: _auroc([v for v in vs if v.truth.is_faulty or v.truth.control in HEALTHY]),
    "macro_f1": lambda vs: _macro_f1([v for v in vs if v.truth.is_faulty and v.truth.causes]),
    "component_top_1": lambda vs: _placed(
        [v for v in vs if v.truth.is_faulty and v.truth.components], top=1
    ),
}


def category_of(causes: Iterable[str]) -> str:
    """Returns the category of the first cause; `UNNAMED` where there is none."""
    return next((CAUSE_CATEGORY[cause] for cause in causes), UNNAMED)


def _auroc(verdicts: Sequence[Verdict]) -> float:
    """Returns the probability that a faulty run scores above a healthy one, ties count half.

    NaN without runs of both kinds, or with a score that is NaN.
    """
    scores = np.array([v.score for v in verdicts])
    faulty = np.array([v.truth.is_faulty for v in verdicts], dtype=bool)
    positives, negatives = int(faulty.sum()), int((~faulty).sum())
    if not positives or not negatives or np.isnan(scores).any():
        return math.nan
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    upper = np.cumsum(counts)
    rank = (upper - (counts - 1) / 2.0)[inverse]  # mean rank of ties, from 1
    above = rank[faulty].sum() - positives * (positives + 1) / 2.0
    return float(above / (positives * negatives))


def _macro_f1(verdicts: Sequence[Verdict]) -> float:
    """Mean over the categories that are true of some run of the F1 of the first cause's category.

    A compound is right with the category of either of its causes; it then counts for that one.
    """
    truth, said = [], []
    for v in verdicts:
        possible = [CAUSE_CATEGORY[cause] for cause in v.truth.causes]
        first = category_of(v.causes)
        truth.append(first if first in possible else possible[0])
        said.append(first)
    scores = []
    for category in dict.fromkeys(truth):
        hits = sum(t == s == category for t, s in zip(truth, said, strict=True))
        scores.append(2.0 * hits / (truth.count(category) + said.count(category)))
    return _mean(scores)


def _caused(verdicts: Sequence[Verdict], top: int) -> float:
    """Share of runs with a true cause among the first."""
    return _mean([bool(set(v.causes[:top]) & set(v.truth.causes)) for v in verdicts])


def _placed(verdicts: Sequence[Verdict], top: int) -> float:
    """Share of runs with a component that is right to blame among the first.

    The whole model is no place: it is passed over.
    """
    return _mean(
        [
            any(
                to_blame(name, v.truth.components)
                for name in [name for name in v.components if name != MODEL][:top]
            )
            for v in verdicts
        ]
    )


def _bootstrapped(
    name: str, verdicts: Sequence[Verdict], statistic: Callable[[Sequence[Verdict]], float]
) -> Figure | None:
    if not verdicts or math.isnan(statistic(verdicts)):
        return None

    def of(indices: NDArray[np.generic]) -> float:
        return statistic([verdicts[int(i)] for i in indices])

    everything = np.arange(len(verdicts))
    low, high = cluster_bootstrap(everything, [_cluster(v) for v in verdicts], of)
    return Figure(name, of(everything), low, high, len(verdicts))


def _rate(name: str, hits: Sequence[bool]) -> Figure | None:
    if not hits:
        return None
    low, high = wilson(sum(hits), len(hits))
    return Figure(name, sum(hits) / len(hits), low, high, len(hits))


def _cluster(verdict: Verdict) -> tuple[str, str, tuple[str, ...]]:
    return verdict.truth.subject, verdict.truth.recipe, verdict.truth.operators


def _mean(values: Sequence[float] | Sequence[bool]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
