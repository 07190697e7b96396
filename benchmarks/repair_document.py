"""The tables of ``docs/repair.md``, from the kept runs (see `repair`, `repair_han`, `tables`)."""

from __future__ import annotations

import functools
import json
import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from benchmarks import repair, repair_han, subject_harm
from benchmarks.ablation_document import table
from benchmarks.forked import rows_of
from benchmarks.repair import ARMS, CASES, HEALTHY, RESTART, Case, Truth
from diagnoser.benchmark.harm import sign_flip_p
from diagnoser.benchmark.intervals import cluster_bootstrap, wilson

DOCUMENT: Final = repair.RESULTS.parents[2] / "docs" / "repair.md"
SEEN: Final = (0, 1)  # seeds whose runs under an earlier version of the loop were looked at
NOT_YET: Final = "Not there yet: these runs have not been made."
TITLES: Final[Mapping[str, str]] = {
    "nothing": "nothing is done",
    "restart": "restart with another seed",
    "third": "learning rate ÷ 3",
    "random": "a random action",
    "paper": "the paper's remedy",
    "autotrainer": "AutoTrainer's order and criterion",
    "diagnoser": "diagnoser",
}


@dataclass(frozen=True, slots=True)
class Pair:
    """A faulty run under an arm, its healthy twin, and the same run left alone."""

    case: Case
    seed: int
    score: float
    healthy: float
    nothing: float
    margin: float
    attempts: int
    acted: bool
    cpu_s: float

    @property
    def restored(self) -> bool:
        """Whether the score is within the margin of the twin's, or above; a NaN is not."""
        return self.score >= self.healthy - self.margin

    @property
    def closed(self) -> float:
        """Share of the gap that is closed, from nothing done to the healthy twin."""
        gap = self.healthy - self.nothing
        return (self.score - self.nothing) / gap if gap > self.margin else math.nan


@functools.cache
def pairs() -> dict[str, list[Pair]]:
    """Returns the runs of every arm, paired; only seeds that all arms have."""
    rows = {repair.key(row): row for row in rows_of(repair.RESULTS)}
    known = repair.truths(CASES)
    found: dict[str, list[Pair]] = {arm: [] for arm in TITLES}
    for case in CASES:
        truth = known[case]
        for seed in repair.SEEDS:
            acting = {arm: rows.get(repair.key(repair.head(case, arm, seed))) for arm in ARMS}
            if any(row is None or "score" not in row for row in acting.values()):
                continue
            twins = truth.healthy[seed], truth.nothing[seed]
            untouched = {"nothing": twins[1], "restart": truth.nothing[seed + RESTART]}
            for arm, score in untouched.items():
                found[arm].append(_pair(case, seed, truth.margin, twins, score, {}))
            for arm, row in acting.items():
                assert row is not None
                own = _twins(rows, row, case) or twins
                found[arm].append(_pair(case, seed, truth.margin, own, _score(row), row))
    return found


def _twins(
    rows: Mapping[tuple[Any, ...], Mapping[str, Any]], row: Mapping[str, Any], case: Case
) -> tuple[float, float] | None:
    """Returns the healthy and the untouched run on a row's processor; None: the benchmark's do."""
    own = [rows.get(repair.key(repair.head(case, arm, row["seed"]))) for arm in repair.UNWATCHED]
    there = [
        _score(twin)
        for twin in own
        if twin is not None and twin.get("processor") == row.get("processor")
    ]
    return (there[0], there[1]) if len(there) == len(own) else None


def _score(row: Mapping[str, Any]) -> float:
    return math.nan if row["score"] is None else float(row["score"])


def _pair(
    case: Case,
    seed: int,
    margin: float,
    twins: tuple[float, float],
    score: float,
    row: Mapping[str, Any],
) -> Pair:
    attempts = row.get("attempts", ())
    return Pair(
        case,
        seed,
        score,
        *twins,
        margin,
        len(attempts),
        any(attempt["kept"] for attempt in attempts),
        row.get("cpu_s", 0.0),
    )


def arms() -> str:
    """What each arm comes to over all mistakes."""
    runs = pairs()
    if not runs["diagnoser"]:
        return NOT_YET
    ours = runs["diagnoser"]
    rows = []
    for arm, title in TITLES.items():
        own = runs[arm]
        share = statistics.fmean(pair.restored for pair in own)
        low, high = _interval([pair.restored for pair in own], own)
        closed = [pair.closed for pair in own if not math.isnan(pair.closed)]
        rows.append(
            [
                title,
                f"{share:.2f} [{low:.2f}, {high:.2f}]",
                _ahead(ours, own) if arm != "diagnoser" else "",
                f"{statistics.median(closed):.2f}",
                f"{sum(_equivalent([p for p in own if p.case == c]) for c in CASES)}/{len(CASES)}",
                f"{statistics.fmean(pair.attempts for pair in own):.1f}" if arm in ARMS else "",
                f"{statistics.fmean(p.acted for p in own):.2f}" if arm in ARMS else "",
                f"{statistics.median(pair.cpu_s for pair in own):.0f}" if arm in ARMS else "",
            ]
        )
    head = [
        "what is done", "restored", "diagnoser is ahead by", "gap closed", "mistakes equivalent",
        "tried", "acted", "CPU s",
    ]  # fmt: skip
    unseen = [pair.restored for pair in ours if pair.seed not in SEEN]
    seeds = f"{min(s for s in repair.SEEDS if s not in SEEN)} to {max(repair.SEEDS)}"
    return table(head, rows) + (
        f"\n\nRuns of seeds {min(SEEN)} and {max(SEEN)} had been looked at before the loop was "
        f"last changed, those of seeds {seeds} had not; of these diagnoser restores "
        f"{statistics.fmean(unseen):.2f}."
    )


def _ahead(ours: Sequence[Pair], other: Sequence[Pair]) -> str:
    gain = [float(a.restored) - float(b.restored) for a, b in zip(ours, other, strict=True)]
    low, high = _interval(gain, ours)
    by_case = [
        statistics.fmean(g for g, pair in zip(gain, ours, strict=True) if pair.case == case)
        for case in CASES
    ]
    p = sign_flip_p(np.array(by_case))
    return f"{statistics.fmean(gain):.2f} [{low:.2f}, {high:.2f}], p {p:.2g}"


def _interval(values: Sequence[float], runs: Sequence[Pair]) -> tuple[float, float]:
    clusters = [pair.case.name for pair in runs]
    return cluster_bootstrap(np.array(values, float), clusters, lambda v: float(v.mean()))


def _equivalent(runs: Sequence[Pair]) -> bool:
    """Whether a mistake's runs are not worse than their twins by the margin (sign-flip test)."""
    gaps = np.array([pair.score - pair.healthy for pair in runs])
    if not np.isfinite(gaps).all() or not len(gaps):
        return False
    return bool(gaps.mean() > -runs[0].margin) and sign_flip_p(gaps + runs[0].margin) < 0.05


def by_mistake() -> str:
    """Restored runs of each mistake under each arm."""
    runs = pairs()
    if not runs["diagnoser"]:
        return NOT_YET
    rows = []
    for case in CASES:
        own = {arm: [p for p in runs[arm] if p.case == case] for arm in TITLES}
        if not own["diagnoser"]:
            continue
        some = own["diagnoser"]
        rows.append(
            [
                case.operator,
                f"{case.subject} {case.recipe}",
                f"{statistics.fmean(p.healthy for p in some):.3f}",
                f"{statistics.fmean(p.nothing for p in some):.3f}",
                f"{statistics.fmean(p.score for p in some):.3f}",
                *(f"{sum(p.restored for p in own[arm])}/{len(own[arm])}" for arm in TITLES),
            ]
        )
    head = ["mistake", "subject", "healthy", "faulty", "repaired", *TITLES.values()]
    return table(head, rows)


@dataclass(frozen=True, slots=True)
class Healthy:
    """A healthy run with ``--repair apply``, beside its twin that nobody watched."""

    tried: bool
    acted: bool
    worse: bool


@functools.cache
def _healthy_runs() -> list[Healthy]:
    rows = {repair.key(row): row for row in rows_of(repair.RESULTS)}
    known = repair.truths(HEALTHY)
    found = []
    for case in HEALTHY:
        for seed in repair.HEALTHY_SEEDS:
            row = rows.get(repair.key(repair.head(case, "diagnoser", seed)))
            if row is None or "score" not in row:
                continue
            attempts, twin = row["attempts"], known[case].healthy[seed]
            found.append(
                Healthy(
                    bool(attempts),
                    any(attempt["kept"] for attempt in attempts),
                    not _score(row) >= twin - _spread(known[case]),
                )
            )
    return found


def healthy() -> str:
    """How often a healthy run was acted on, and what came of it."""
    runs = _healthy_runs()
    if not runs:
        return NOT_YET
    acted = sum(run.acted for run in runs)
    low, high = wilson(acted, len(runs))
    tried, worse = sum(run.tried for run in runs), sum(run.worse for run in runs)
    return table(
        ["healthy runs", "something was tried", "something was kept", "worse than the margin"],
        [[str(len(runs)), str(tried), f"{acted} [{low:.3f}, {high:.3f}]", str(worse)]],
    )


def _spread(truth: Truth) -> float:
    return 2.0 * statistics.stdev(truth.healthy.values())


def _han(arm: str) -> dict[int, dict[str, Any]]:
    return {row["seed"]: row for row in rows_of(repair_han.RESULTS) if row["arm"] == arm}


HAN_TITLES: Final = {
    "healthy": "healthy",
    "nothing": "faulty, nothing done",
    "paper": "the paper's remedy",
    "diagnoser": "diagnoser",
}
HAN_MARGIN: Final = 0.03  # of accuracy, as the case says


def han() -> str:
    """The paper's case: accuracy, equivalence, coupling and prediction variability."""
    runs = {arm: _han(arm) for arm in HAN_TITLES}
    seeds = sorted(set.intersection(*(set(of) for of in runs.values())))
    if not seeds:
        return NOT_YET
    rows = []
    for arm, title in HAN_TITLES.items():
        own = [runs[arm][seed] for seed in seeds]
        gaps = [runs[arm][s]["accuracy"] - runs["healthy"][s]["accuracy"] for s in seeds]
        near = sum(gap >= -HAN_MARGIN for gap in gaps)
        rows.append(
            [
                title,
                _mean([row["accuracy"] for row in own], "{:.3f}"),
                f"{near}/{len(seeds)}",
                *(
                    _mean([row["after"][name] for row in own], "{:.3f}")
                    for name in ("norm", "share", "ratio", "variability")
                ),
            ]
        )
    own = [
        runs["diagnoser"][seed]["before"] for seed in seeds if "before" in runs["diagnoser"][seed]
    ]
    if own:
        names = ("norm", "share", "ratio", "variability")
        rows.append(
            [
                "diagnoser, when it began to act",
                "",
                "",
                *(_mean([row[name] for row in own], "{:.3f}") for name in names),
            ]
        )
    head = [
        "run", "accuracy", "within 0.03 of the twin or better", "coupling norm", "coupling share",
        "the paper's ratio", "predictions changed",
    ]  # fmt: skip
    return table(head, rows)


def _mean(values: Sequence[float], form: str) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{form.format(statistics.fmean(values))} ± {form.format(1.96 * error)}"


def kept() -> str:
    """What was kept in the paper's case, and how often it named the cause."""
    own = list(_han("diagnoser").values())
    if not own:
        return NOT_YET
    counts: dict[str, int] = {}
    for row in own:
        what = "; ".join(
            " + ".join(f"{name} in {place}" for name, place, _ in attempt["actions"])
            for attempt in row["kept"]
        )
        counts[what or "nothing"] = counts.get(what or "nothing", 0) + 1
    named = sum(row["causes"][0] == ["learning_rate_too_high", "word_attention"] for row in own)
    rows = [[what, str(n)] for what, n in sorted(counts.items(), key=lambda item: -item[1])]
    return (
        f"In {named} of {len(own)} runs the first cause is `learning_rate_too_high` in "
        "`word_attention`.\n\n" + table(["kept", "runs"], rows)
    )


def by_class() -> str:
    """What only a new start mends: that it does harm, by how much (see `subject_harm`)."""
    of = json.loads(subject_harm.SUMMARY.read_text("utf-8"))["case:han"]
    healthy, faulty = of["healthy"], of["faults"]["batches-by-class"]
    rows = [
        [name, str(own["runs"]), f"{own['mean']:.3f}", f"{own['min']:.3f} to {own['max']:.3f}"]
        for name, own in (("random", healthy), ("by class", faulty))
    ]
    return (
        table(["order of the batches", "runs", "accuracy", "range"], rows)
        + f"\n\nHarm: {faulty['harm']} (p = {faulty['p_holm']}, d = {faulty['cohen_d']}; "
        f"the margin is {of['margin']})."
    )


def in_short() -> str:
    """What repairs come to, in two sentences."""
    runs, acted = pairs(), _healthy_runs()
    ours = runs["diagnoser"]
    if not ours:
        return NOT_YET
    share = {arm: statistics.fmean(pair.restored for pair in own) for arm, own in runs.items()}
    low, high = _interval([pair.restored for pair in ours], ours)
    other = max((arm for arm in share if arm != "diagnoser"), key=lambda arm: share[arm])
    worst, best = _interval([pair.restored for pair in runs[other]], ours)
    mistakes = len({case.operator for case in CASES})
    text = (
        f"`--repair apply` on {len(ours)} faulty runs of {mistakes} mistakes that can be undone "
        f"from outside: {share['diagnoser']:.2f} [{low:.2f}, {high:.2f}] end as good as their "
        f"healthy twins, {TITLES[other]} {share[other]:.2f} [{worst:.2f}, {best:.2f}]. It kept a "
        f"repair in {sum(run.acted for run in acted)} of {len(acted)} healthy runs: "
        "[docs/repair.md](docs/repair.md)."
    )
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


BLOCKS: Final[Mapping[str, Callable[[], str]]] = {
    "arms": arms,
    "by-mistake": by_mistake,
    "healthy": healthy,
    "han": han,
    "kept": kept,
    "by-class": by_class,
}
