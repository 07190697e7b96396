"""Does a mistake do harm? Paired, unmonitored runs say so, before any tool has looked at one.

A clean and a faulty run of the same subject, recipe and seed start from the same weights and see
the same batches; the difference of their held-out scores is one pair. The harm of a configuration
is

* ``proven`` when the exact sign-flip test, Holm-corrected over the configurations of its subject,
  has p < 0.05, Cohen's d is at least 0.5 (DeepCrime, ISSTA 2021), and the mean loss of score is at
  least the margin: the larger of 2 standard deviations of the clean runs and the subject's floor;
* ``equivalent`` when the same test places it inside half that margin on both sides, and ``not
  worse`` when it does so on the side of harm alone;
* ``no effect`` when every run gives the numbers of its clean twin, bit for bit;
* ``ambiguous`` otherwise, and ``incomplete`` where fewer than `FEWEST` pairs are finished.

A remedy is ``restored`` when the same test places it inside the margin, and ``identical`` when the
repaired training is the clean one, number for number, so that it need not be run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagnoser.benchmark.intervals import wilson

SIGNIFICANCE, EFFECT_SIZE = 0.05, 0.5
TRIVIAL = 0.95  # share of seeds on which the loss alone betrays a mistake
AT_THE_MARGIN = 0.1  # of the margin
FEWEST = 3  # pairs
SPLITS = 200
OK = "ok"
CLEAN_ROLES = ("clean", "twin")
NUMBERS = ("score", "loss", "area", "last_loss")  # of a run

Row = Mapping[str, Any]  # one run, as `results` stores it


@dataclass(frozen=True, slots=True)
class Judged:
    """What is to be judged: a configuration by its hash, its clean twin, and what it is for."""

    hash: str
    clean: str  # the hash of its clean twin
    subject: str
    recipe: str
    role: str  # clean, twin, fault, compound, remedy, HC2, HC3 or HC4
    operator: str
    severity: str
    place: str
    remedy: str
    seeds: tuple[int, ...]
    identical: bool = False


@dataclass(frozen=True, slots=True)
class Harm:
    """What a configuration does to the score of its subject; higher scores are better."""

    hash: str
    subject: str
    recipe: str
    role: str
    operator: str
    severity: str
    place: str
    remedy: str
    harm: str
    pairs: int
    unfinished: int  # runs that failed, were killed, or are missing
    clean_score: float
    score: float  # worst rank in place of a diverged run
    gap: float
    margin: float
    p: float
    p_holm: float
    p_equivalent: float
    p_not_worse: float
    cohen_d: float
    diverged: int
    loss_alarms: float  # share of the runs in which the loss alone raises an alarm
    trivial: bool

    @property
    def is_at_the_margin(self) -> bool:
        """Whether the gap is so near the margin that another processor's rounding may decide."""
        return abs(self.gap - self.margin) <= AT_THE_MARGIN * self.margin


@dataclass(frozen=True, slots=True)
class Calibration:
    """How often the rule that proves harm does so between clean runs and clean runs."""

    subject: str
    splits: int
    kills: int
    low: float
    high: float


def judge(
    judged: Iterable[Judged],
    rows: Mapping[str, Sequence[Row]],
    floors: Mapping[str, tuple[float, bool]],
) -> list[Harm]:
    """Judges configurations by their runs.

    Args:
        judged: Clean configurations and all others.
        rows: Runs of each configuration by its hash.
        floors: Of each subject the smallest loss of score that matters, and whether it is a share
            of the clean mean.

    Returns:
        One a configuration, in the order given.
    """
    by_subject: dict[str, list[Judged]] = {}
    for entry in judged:
        by_subject.setdefault(entry.subject, []).append(entry)
    found: dict[Judged, Harm] = {}
    for subject, entries in by_subject.items():
        known = {h: rows.get(h, ()) for e in entries for h in (e.hash, e.clean)}
        finished = [row for group in known.values() for row in group if row["status"] == OK]
        worst = worst_rank([float(row["score"]) for row in finished])
        scores = {h: scores_of(group, worst) for h, group in known.items()}
        raw = {e: _compare(e, known[e.hash], scores, floors[subject]) for e in entries}
        tested = {
            e.hash: harm.p for e, harm in raw.items() if e.role not in {*CLEAN_ROLES, "remedy"}
        }  # a configuration that two roles share is one test
        adjusted = holm({h: p for h, p in tested.items() if not math.isnan(p)})
        for entry, harm in raw.items():
            same = _is_same(known[entry.hash], known[entry.clean])
            found[entry] = _decide(entry, harm, adjusted.get(entry.hash, math.nan), same=same)
    return [found[entry] for group in by_subject.values() for entry in group]


def _is_same(rows: Sequence[Row], clean: Sequence[Row]) -> bool:
    """Whether all runs give the numbers of the clean run of their seed, bit for bit."""
    twins = {row["seed"]: row for row in clean if row["status"] == OK}
    own = [row for row in rows if row["status"] == OK]
    return bool(own) and all(
        row["seed"] in twins and all(row[name] == twins[row["seed"]][name] for name in NUMBERS)
        for row in own
    )


def worst_rank(scores: Sequence[float]) -> float:
    """Returns the score that a diverged run is given: the worst finite one less the range.

    Divergence is worse than any score, and a NaN cannot be compared; with this a diverged run loses
    its pair by more than any finite run loses one. NaN where no score is finite.
    """
    finite = [score for score in scores if math.isfinite(score)]
    if not finite:
        return math.nan
    spread = max(finite) - min(finite)
    return min(finite) - (spread or max(abs(min(finite)), 1.0))


def scores_of(rows: Iterable[Row], worst: float) -> dict[int, float]:
    """Returns the score of each finished run by seed, `worst` in place of a diverged one."""
    return {
        row["seed"]: worst if row["diverged"] or math.isnan(row["score"]) else float(row["score"])
        for row in rows
        if row["status"] == OK
    }


def _compare(
    entry: Judged,
    rows: Sequence[Row],
    scores: Mapping[str, Mapping[int, float]],
    floor: tuple[float, bool],
) -> Harm:
    """Everything but the verdict, which needs the other configurations of the subject."""
    own = [row for row in rows if row["status"] == OK and row["seed"] in entry.seeds]
    alarms = [bool(row["loss_alarm"]) for row in own]
    share = statistics.fmean(alarms) if alarms else math.nan
    clean, faulty = scores[entry.clean], scores[entry.hash]
    seeds = [seed for seed in entry.seeds if seed in clean and seed in faulty]
    margin = margin_of(list(clean.values()), *floor)
    gaps = np.array([clean[seed] - faulty[seed] for seed in seeds])
    enough = len(seeds) >= FEWEST and not bool(np.isnan(gaps).any())
    inside = margin if entry.role == "remedy" else margin / 2
    return Harm(
        entry.hash,
        entry.subject,
        entry.recipe,
        entry.role,
        entry.operator,
        entry.severity,
        entry.place,
        entry.remedy,
        harm="",
        pairs=len(seeds),
        unfinished=0 if entry.identical else len(entry.seeds) - len(own),
        clean_score=_mean([clean[seed] for seed in seeds]),
        score=_mean([faulty[seed] for seed in seeds]),
        gap=float(gaps.mean()) if enough else math.nan,
        margin=margin,
        p=sign_flip_p(gaps) if enough else math.nan,
        p_holm=math.nan,
        p_equivalent=equivalence_p(gaps, inside) if enough else math.nan,
        p_not_worse=sign_flip_p(inside - gaps) if enough else math.nan,
        cohen_d=cohen_d([clean[s] for s in seeds], [faulty[s] for s in seeds])
        if enough
        else math.nan,
        diverged=sum(bool(row["diverged"]) for row in own),
        loss_alarms=share,
        trivial=share >= TRIVIAL,
    )


def _decide(entry: Judged, harm: Harm, p_holm: float, *, same: bool) -> Harm:
    if entry.role in CLEAN_ROLES:
        verdict = "clean"
    elif entry.identical:
        verdict = "identical"
    elif math.isnan(harm.p) or harm.pairs < len(entry.seeds):
        verdict = "incomplete"
    elif entry.role == "remedy":
        verdict = "restored" if harm.p_equivalent < SIGNIFICANCE else "not restored"
    elif is_proven(p_holm, harm.cohen_d, harm.gap, harm.margin):
        verdict = "proven"
    elif same:
        verdict = "no effect"
    elif harm.p_equivalent < SIGNIFICANCE:
        verdict = "equivalent"
    else:
        verdict = "not worse" if harm.p_not_worse < SIGNIFICANCE else "ambiguous"
    values = {name: getattr(harm, name) for name in Harm.__slots__}
    return Harm(**{**values, "harm": verdict, "p_holm": p_holm})


def is_proven(p: float, effect: float, gap: float, margin: float) -> bool:
    """Whether harm is certain, large against the spread, and of practical weight, all three."""
    return p < SIGNIFICANCE and effect >= EFFECT_SIZE and gap >= margin


def margin_of(clean: Sequence[float], floor: float, relative: bool) -> float:
    """Returns the loss of score that matters; NaN with fewer than two clean runs."""
    if len(clean) < 2:
        return math.nan
    least = floor * abs(statistics.fmean(clean)) if relative else floor
    return max(2 * statistics.stdev(clean), least)


def calibrate(
    subject: str,
    clean: Iterable[Mapping[int, float]],
    floor: tuple[float, bool],
    *,
    pairs: int,
    splits: int = SPLITS,
    seed: int = 0,
) -> Calibration | None:
    """Counts how often clean runs are «proven» harmful against other clean runs.

    Runs of all recipes are put together, each less the mean of its recipe; the rule is that of
    `judge` without Holm's correction, so it kills more easily than it does in the table.

    Args:
        subject: Its name.
        clean: Scores by seed, one mapping a recipe.
        floor: As in `judge`.
        pairs: How many runs stand on each side.
        splits: How many random splits into two disjoint sides.
        seed: Of the splits.

    Returns:
        None where there are fewer than two sides of clean runs.
    """
    recipes = [np.array(list(scores.values())) for scores in clean if len(scores) >= 2]
    if not recipes or sum(map(len, recipes)) < 2 * pairs:
        return None
    rest = np.concatenate([scores - scores.mean() for scores in recipes])
    level = float(np.concatenate(recipes).mean())
    generator, kills = np.random.default_rng(seed), 0
    for _ in range(splits):
        drawn = generator.permutation(rest)[: 2 * pairs] + level
        one, other = drawn[:pairs], drawn[pairs:]
        kills += is_proven(
            sign_flip_p(one - other),
            cohen_d(one.tolist(), other.tolist()),
            float((one - other).mean()),
            margin_of((rest + level).tolist(), *floor),
        )
    return Calibration(subject, splits, kills, *wilson(kills, splits))


def sign_flip_p(differences: NDArray[np.floating[Any]]) -> float:
    """Returns the exact one-sided p value of a mean of paired differences above zero.

    Under the null each difference is as likely to have the other sign: p is the share of all 2^n
    sign patterns whose sum is at least the observed one.

    >>> sign_flip_p(np.array([0.1, 0.2, 0.3]))
    0.125
    """
    patterns = np.arange(2 ** len(differences))[:, None] >> np.arange(len(differences)) & 1
    sums = (1 - 2 * patterns) @ differences
    return float(np.mean(sums >= differences.sum() - 1e-12))


def equivalence_p(differences: NDArray[np.floating[Any]], margin: float) -> float:
    """Returns the p value of two one-sided tests: the mean lies within the margin of zero.

    >>> equivalence_p(np.array([0.01, -0.01, 0.0]), 0.5)
    0.125
    """
    return max(sign_flip_p(margin - differences), sign_flip_p(margin + differences))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Returns Holm's step-down adjusted p values (Scandinavian Journal of Statistics, 1979).

    >>> holm({"a": 0.01, "b": 0.5, "c": 0.02})
    {'a': 0.03, 'c': 0.04, 'b': 0.5}
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def cohen_d(healthy: Sequence[float], faulty: Sequence[float]) -> float:
    """Returns the difference of two means over their pooled standard deviation."""
    pooled = (statistics.variance(healthy) + statistics.variance(faulty)) / 2
    gap = statistics.fmean(healthy) - statistics.fmean(faulty)
    if not pooled:
        return math.copysign(math.inf, gap) if gap else 0.0
    return gap / math.sqrt(pooled)


def loss_alarm(losses: Sequence[float]) -> str:
    """What a detector that sees nothing but the training loss says; empty: nothing.

    It alarms at a loss that is not finite, at one (mean of 5 % of the steps) above the first loss
    after 20 % of the steps, and where the last 5 % are not below the first loss.
    """
    if not losses or not all(map(math.isfinite, losses)):
        return "not finite"
    window = max(1, len(losses) // 20)
    late = [
        statistics.fmean(losses[i : i + window])
        for i in range(len(losses) // 5, len(losses) - window + 1, window)
    ]
    if any(mean > losses[0] for mean in late):
        return "above the first loss"
    return "no decrease" if statistics.fmean(losses[-window:]) >= losses[0] else ""


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan
