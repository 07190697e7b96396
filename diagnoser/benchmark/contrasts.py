"""What one way of judging adds to another: on the same runs, paired, with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from diagnoser.benchmark.dataset import HEALTHY
from diagnoser.benchmark.harm import holm
from diagnoser.benchmark.scoring import Figure, Verdict, area, difference, of_truths
from diagnoser.errors import BenchmarkError
from diagnoser.table import Array

FALSE_ALARMS: Final = 0.05  # of healthy runs that alarm at any time
NEVER: Final = 2.0  # when a run alarms that never does, in lengths of the run
# The least that counts as a benefit, by figure.
MARGINS: Final[Mapping[str, float]] = {
    "auroc": 0.02,
    "macro_f1": 0.03,
    "component_top_1": 0.05,
    "lead": 0.05,
}

ByPrefix = Mapping[float, Sequence[Verdict]]
"""Verdicts on runs by how much of the run was seen; the same runs at each, in any order."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """A difference, its Holm-corrected p, and whether it is a benefit by the margin set before."""

    figure: Figure
    p_holm: float
    helps: bool


def contrasts(ours: ByPrefix, theirs: ByPrefix) -> dict[str, Contrast]:
    """Returns the four differences by name; of whole runs, but for the lead time.

    A figure that has no value is left out, and counts in no correction.
    """
    found: dict[str, Figure] = {}
    for name in MARGINS if ours else ():
        whole = ours[1.0], theirs[1.0]
        figure = lead(ours, theirs) if name == "lead" else difference(name, *whole)
        if figure is not None:
            found[name] = figure
    corrected = holm({name: figure.p for name, figure in found.items()})
    return {
        name: Contrast(
            figure,
            corrected[name],
            figure.value >= MARGINS[name] and figure.low > 0.0 and corrected[name] < 0.05,
        )
        for name, figure in found.items()
    }


def lead(ours: ByPrefix, theirs: ByPrefix) -> Figure | None:
    """Returns how much earlier one alarms than the other: a difference of medians, in run lengths.

    Each has the lowest threshold at which at most `FALSE_ALARMS` of the healthy runs alarm at some
    prefix; it stays the same in all draws of the bootstrap. A
    faulty run that never alarms counts as `NEVER`, which a median of those that do does not notice.
    """
    first = [_first_alarms(side) for side in (ours, theirs)]
    if not first[0]:
        return None
    if first[0].keys() != first[1].keys():
        raise BenchmarkError("lead times can only be compared on the same runs")
    order = sorted(first[0])
    numbers = np.array([[side[key] for side in first] for key in order])
    truths = {(v.truth.hash, v.seed): v.truth for v in ours[1.0]}

    def gap(drawn: Array) -> float:
        return float(np.median(drawn[:, 1]) - np.median(drawn[:, 0]))

    return of_truths("lead", [truths[key] for key in order], numbers, gap)


def interaction(
    ours: Sequence[Verdict], theirs: Sequence[Verdict], side: Callable[[Verdict], bool | None]
) -> Figure | None:
    """Returns how much larger the gain in AUROC is on some faulty runs than on others.

    Both are held against all healthy runs. None where one side has no faulty run.

    Args:
        ours: Verdicts of one judge.
        theirs: Those of the other, of the same runs in the same order.
        side: Whether a faulty run is one of some, or of others; None: of neither.
    """
    rows, truths = [], []
    for own, other in zip(ours, theirs, strict=True):
        here = side(own) if own.truth.is_faulty else False
        if here is not None and own.truth.is_scored:
            rows.append((own.score, other.score, own.truth.is_faulty, here))
            truths.append(own.truth)
    numbers = np.array(rows, dtype=float).reshape(-1, 4)

    def gain(drawn: Array, here: float) -> float:
        kept = drawn[(drawn[:, 2] == 0) | (drawn[:, 3] == here)]
        return area(kept[:, [0, 2]]) - area(kept[:, [1, 2]])

    def gap(drawn: Array) -> float:
        return gain(drawn, 1.0) - gain(drawn, 0.0)

    return None if math.isnan(gap(numbers)) else of_truths("interaction", truths, numbers, gap)


def threshold(highest: Sequence[float]) -> float:
    """Returns the lowest score of healthy runs that at most `FALSE_ALARMS` of them exceed."""
    return float(np.quantile(highest, 1.0 - FALSE_ALARMS, method="higher"))


def _first_alarms(by_prefix: ByPrefix) -> dict[tuple[str, int], float]:
    """Returns the prefix at which each faulty run first alarms, by (hash, seed)."""
    highest: dict[tuple[str, int], float] = {}
    for verdicts in by_prefix.values():
        for v in verdicts:
            if v.truth.control in HEALTHY:
                key = (v.truth.hash, v.seed)
                highest[key] = max(highest.get(key, -math.inf), v.score)
    if not highest:
        return {}
    beyond = threshold(list(highest.values()))
    first: dict[tuple[str, int], float] = {}
    for prefix in sorted(by_prefix, reverse=True):
        for v in by_prefix[prefix]:
            if v.truth.is_faulty:
                key = (v.truth.hash, v.seed)
                first.setdefault(key, NEVER)
                if v.score > beyond:
                    first[key] = prefix
    return first
