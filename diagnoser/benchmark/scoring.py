"""Scores of judges on runs whose truth is proven: is it faulty, why, where; with intervals.

A judge gives a `Verdict` for each run. Rates have Wilson intervals where runs are told apart one by
one, and cluster-bootstrap intervals over (subject, recipe, operator) elsewhere: runs of one
configuration resemble each other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from diagnoser.benchmark.dataset import HEALTHY, Truth
from diagnoser.benchmark.intervals import cluster_bootstrap, cluster_draws, wilson
from diagnoser.classifier import to_blame
from diagnoser.errors import BenchmarkError
from diagnoser.table import Array
from diagnoser.vocabulary import CAUSE_CATEGORY, CAUSES, MODEL

ORDINARY: Final = ("HC1", "HC2")  # nothing odd about them: what users have most
# Scored apart: latent defects, and controls that were not proven to be as good as clean runs.
CONTROLS: Final = (*HEALTHY, "HC5b", "HCx")
ALLOWED: Final = 0.05  # of ordinary runs that may be called faulty, of `recall_at_5`
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
    """A number with its 95 % interval and what it was counted on.

    Of a difference ``p`` is the share of the draws of its bootstrap in which it is not above zero.
    """

    name: str
    value: float
    low: float
    high: float
    n: int
    p: float = math.nan


@dataclass(frozen=True, slots=True)
class Statistic:
    """A figure of a set of runs: which count, their numbers (runs, any), and the figure of those.

    Numbers come first, so that a bootstrap draws rows of an array and not runs one by one.
    """

    counts: Callable[[Verdict], bool]
    numbers: Callable[[Sequence[Verdict]], Array]
    of: Callable[[Array], float]


def figures(verdicts: Sequence[Verdict]) -> list[Figure]:
    """Scores a judge; a figure that nothing was counted on is left out.

    ``auroc`` faulty against healthy controls (HC1 to HC4, HC5a); ``recall`` and ``false alarms`` of
    the judge's own decision, for each set of controls and for HC1 and HC2 together; ``recall_at_5``
    with the threshold, known only with the truth, that 5 % of HC1 and HC2 pass; ``macro_f1``
    over categories of causes, of the first cause of runs that are faulty; ``cause_top_1`` and
    ``_3``; ``component_top_1`` and ``_3`` of runs with a local fault. Causes and components are
    ranks, of all faulty runs, whether or not the judge calls them faulty.
    """
    found = [_rate("recall", [v.faulty for v in verdicts if v.truth.is_faulty])]
    for controls in (*((control,) for control in CONTROLS), ORDINARY):
        own = [v.faulty for v in verdicts if v.truth.control in controls]
        found.append(_rate(f"false alarms {'+'.join(controls)}", own))
    for name, statistic in STATISTICS.items():
        chosen = [v for v in verdicts if statistic.counts(v)]
        numbers = statistic.numbers(chosen)
        if chosen and not math.isnan(statistic.of(numbers)):
            found.append(_bootstrapped(name, chosen, numbers, statistic.of))
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


def by_fault(
    runs: Iterable[tuple[Truth, Collection[str]]],
) -> dict[str, tuple[int, int, int, int]]:
    """Counts how runs of which a fault is said compare with runs of which it is expected.

    Returns:
        By fault: runs of which it is said; of those, that are faulty, and of which it is expected
        too; and faulty runs of which it is expected.
    """
    counts: dict[str, tuple[int, int, int, int]] = {}
    for truth, said in runs:
        expected = set(truth.faults) if truth.is_faulty else set()
        for fault in {*said, *expected}:
            is_said = fault in said
            new = (is_said, is_said and truth.is_faulty, is_said and fault in expected)
            old = counts.get(fault, (0, 0, 0, 0))
            a, b, c, d = map(sum, zip(old, (*new, fault in expected), strict=True))
            counts[fault] = (a, b, c, d)
    return dict(sorted(counts.items()))


def reliability(verdicts: Iterable[Verdict]) -> list[tuple[float, float, int, int]]:
    """Returns how sure a judge is against how often it is right, in tenths of its score.

    Returns:
        For each tenth with any run: its lower end, the mean score, runs, and those faulty.
    """
    bins: dict[int, list[Verdict]] = {}
    for v in verdicts:
        if v.truth.is_scored:
            bins.setdefault(min(9, math.floor(10 * v.score)), []).append(v)
    return [
        (
            tenth / 10,
            float(np.mean([v.score for v in own])),
            len(own),
            sum(v.truth.is_faulty for v in own),
        )
        for tenth, own in sorted(bins.items())
    ]


def difference(name: str, ours: Sequence[Verdict], theirs: Sequence[Verdict]) -> Figure | None:
    """Returns how much better one judge is than another on the same runs, paired by run.

    None where the figure has no value for one of them.

    Args:
        name: A name of `STATISTICS`.
        ours: Verdicts of one judge.
        theirs: Those of the other, of the same runs in the same order.

    Raises:
        BenchmarkError: The runs are not the same.
    """
    if [(v.truth.hash, v.seed) for v in ours] != [(v.truth.hash, v.seed) for v in theirs]:
        raise BenchmarkError("two judges can only be compared on the same runs, in the same order")
    statistic = STATISTICS[name]
    chosen = [i for i, v in enumerate(ours) if statistic.counts(v)]
    both = [statistic.numbers([side[i] for i in chosen]) for side in (ours, theirs)]
    if not chosen or any(math.isnan(statistic.of(numbers)) for numbers in both):
        return None
    width = both[0].shape[1]

    def gap(numbers: Array) -> float:
        return statistic.of(numbers[:, :width]) - statistic.of(numbers[:, width:])

    return of_truths(name, [ours[i].truth for i in chosen], np.hstack(both), gap)


def of_truths(
    name: str, truths: Sequence[Truth], numbers: Array, of: Callable[[Array], float]
) -> Figure:
    """Returns any figure of runs, with its interval over configurations, and its ``p``.

    Args:
        name: What it is called.
        truths: Of each run.
        numbers: What the figure is computed from, (runs, any).
        of: From numbers to the figure.
    """
    draws = cluster_draws(numbers, [_cluster_of(truth) for truth in truths], of)
    low, high = np.quantile(draws, [0.025, 0.975]).tolist()
    p = (1.0 + float((draws <= 0.0).sum())) / (1.0 + len(draws))
    return Figure(name, of(numbers), low, high, len(numbers), p)


def auroc(truths: Sequence[Truth], scores: Sequence[float], *, level: float) -> Figure | None:
    """Returns the AUROC of scores over all runs given; None without runs of both kinds."""
    numbers = np.array([(s, t.is_faulty) for t, s in zip(truths, scores, strict=True)], dtype=float)
    numbers = numbers.reshape(-1, 2)
    value = area(numbers)
    if math.isnan(value):
        return None
    low, high = cluster_bootstrap(numbers, [_cluster_of(t) for t in truths], area, level=level)
    return Figure("auroc", value, low, high, len(numbers))


def category_of(causes: Iterable[str]) -> str:
    """Returns the category of the first cause; `UNNAMED` where there is none."""
    return next((CAUSE_CATEGORY[cause] for cause in causes), UNNAMED)


def area(numbers: Array) -> float:
    """Returns the probability that a faulty run scores above a healthy one, ties count half.

    ``numbers`` are score and whether it is faulty. NaN without runs of both kinds, or with a score
    that is NaN.
    """
    scores, faulty = numbers[:, 0], numbers[:, 1] > 0
    positives, negatives = int(faulty.sum()), int((~faulty).sum())
    if not positives or not negatives or np.isnan(scores).any():
        return math.nan
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    upper = np.cumsum(counts)
    rank = (upper - (counts - 1) / 2.0)[inverse]  # mean rank of ties, from 1
    above = rank[faulty].sum() - positives * (positives + 1) / 2.0
    return float(above / (positives * negatives))


def _recall_at_5(numbers: Array) -> float:
    """Share of faulty runs that score above all ordinary ones but the `ALLOWED`.

    ``numbers`` are score and whether it is faulty. NaN as in `area`.
    """
    scores, faulty = numbers[:, 0], numbers[:, 1] > 0
    ordinary = np.sort(scores[~faulty])
    if not faulty.any() or not len(ordinary) or np.isnan(scores).any():
        return math.nan
    bound = ordinary[-1 - math.floor(ALLOWED * len(ordinary))]
    return float((scores[faulty] > bound).mean())


def _scored(verdicts: Sequence[Verdict]) -> Array:
    return np.array([(v.score, v.truth.is_faulty) for v in verdicts], dtype=float).reshape(-1, 2)


def _categories(verdicts: Sequence[Verdict]) -> Array:
    """Returns the true category and that of the first cause, as numbers.

    A compound is right with the category of either of its causes; it then counts for that one.
    """
    order = {name: i for i, name in enumerate((UNNAMED, *CAUSES))}
    rows = []
    for v in verdicts:
        possible = [CAUSE_CATEGORY[cause] for cause in v.truth.causes]
        first = category_of(v.causes)
        rows.append((order[first if first in possible else possible[0]], order[first]))
    return np.array(rows, dtype=float).reshape(-1, 2)


def _macro_f1(numbers: Array) -> float:
    """Mean F1 over the categories that are true of some run; ``numbers``: true, said."""
    truth, said = numbers.T
    scores = [
        2.0 * ((truth == c) & (said == c)).sum() / ((truth == c).sum() + (said == c).sum())
        for c in np.unique(truth)
    ]
    return float(np.mean(scores)) if scores else math.nan


def _caused(verdicts: Sequence[Verdict], top: int) -> Array:
    """Whether a true cause is among the first, of each run."""
    return _hits(bool(set(v.causes[:top]) & set(v.truth.causes)) for v in verdicts)


def _placed(verdicts: Sequence[Verdict], top: int) -> Array:
    """Whether a component that is right to blame is among the first, of each run.

    The whole model is no place: it is passed over.
    """
    return _hits(
        any(
            to_blame(name, v.truth.components)
            for name in [name for name in v.components if name != MODEL][:top]
        )
        for v in verdicts
    )


def _hits(hits: Iterable[bool]) -> Array:
    return np.array(list(hits), dtype=float).reshape(-1, 1)


def _share(numbers: Array) -> float:
    return float(numbers.mean()) if len(numbers) else math.nan


STATISTICS: Final[Mapping[str, Statistic]] = {
    "auroc": Statistic(lambda v: v.truth.is_scored, _scored, area),
    "recall_at_5": Statistic(
        lambda v: v.truth.is_faulty or v.truth.control in ORDINARY, _scored, _recall_at_5
    ),
    "macro_f1": Statistic(
        lambda v: v.truth.is_faulty and bool(v.truth.causes), _categories, _macro_f1
    ),
    **{
        f"cause_top_{top}": Statistic(
            lambda v: v.truth.is_faulty and bool(v.truth.causes),
            functools.partial(_caused, top=top),
            _share,
        )
        for top in (1, 3)
    },
    **{
        f"component_top_{top}": Statistic(
            lambda v: v.truth.is_faulty and bool(v.truth.components),
            functools.partial(_placed, top=top),
            _share,
        )
        for top in (1, 3)
    },
}
"""Figures with a bootstrap interval, by name."""


def _bootstrapped(
    name: str, verdicts: Sequence[Verdict], numbers: Array, of: Callable[[Array], float]
) -> Figure:
    low, high = cluster_bootstrap(numbers, [_cluster(v) for v in verdicts], of)
    return Figure(name, of(numbers), low, high, len(verdicts))


def _rate(name: str, hits: Sequence[bool]) -> Figure | None:
    if not hits:
        return None
    low, high = wilson(sum(hits), len(hits))
    return Figure(name, sum(hits) / len(hits), low, high, len(hits))


def _cluster(verdict: Verdict) -> tuple[str, str, tuple[str, ...]]:
    return _cluster_of(verdict.truth)


def _cluster_of(truth: Truth) -> tuple[str, str, tuple[str, ...]]:
    return truth.subject, truth.recipe, truth.operators
