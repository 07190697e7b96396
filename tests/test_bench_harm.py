"""Proof of harm on made-up scores whose answer is known, and intervals against exact oracles."""

import math

import numpy as np
import pytest

from diagnoser.benchmark.harm import (
    Judged,
    calibrate,
    equivalence_p,
    judge,
    loss_alarm,
    sign_flip_p,
    worst_rank,
)
from diagnoser.benchmark.intervals import cluster_bootstrap
from diagnoser.errors import BenchmarkError

CLEAN = [0.90, 0.92, 0.91, 0.89, 0.90, 0.91, 0.92, 0.90, 0.91, 0.90, 0.92, 0.89]
FLOOR = {"made-up": (0.02, True)}
PAIRS = range(12)


def rows(scores, status="ok"):
    return [
        {
            "seed": seed,
            "status": status,
            "score": score,
            "diverged": math.isnan(score),
            "loss": -score,
            "area": -score,
            "last_loss": -score,
            "loss_alarm": "not finite" if math.isnan(score) else "",
        }
        for seed, score in enumerate(scores)
    ]


def harms(*groups, role="fault", runs=None):
    """Judges configurations whose scores lie below the clean ones by the given amounts."""
    table = {"clean": rows(CLEAN)} | (runs or {})
    entries = []
    for i, group in enumerate(groups):
        table.setdefault(f"h{i}", rows([c - g for c, g in zip(CLEAN, group, strict=True)]))
        entries.append(
            Judged(f"h{i}", "clean", "made-up", "a", role, f"X{i}", "high", "model", "",
                   tuple(PAIRS))
        )  # fmt: skip
    return judge(entries, table, FLOOR)


def test_better_than_clean_is_not_worse_and_the_same_numbers_are_no_effect():
    better = [-0.1, -0.2] * 6
    verdicts = [harm.harm for harm in harms(better, [0.0] * 12)]
    assert verdicts == ["not worse", "no effect"]


def test_a_twin_takes_no_part_in_holm():
    table = {"clean": rows(CLEAN)} | {f"h{i}": rows([0.5] * 12) for i in range(3)}
    entries = [
        Judged(f"h{i}", "clean", "made-up", "a", role, "X", "high", "model", "", tuple(PAIRS))
        for i, role in enumerate(("fault", "twin", "clean"))
    ]
    fault, *rest = judge(entries, table, FLOOR)
    assert fault.p_holm == fault.p == 2.0**-12
    assert [harm.harm for harm in rest] == ["clean", "clean"]


def test_harm_has_three_verdicts():
    heavy = [0.3 + 0.01 * seed for seed in PAIRS]
    nothing = [0.001, -0.001] * 6
    uneven = [0.2, -0.1] * 6
    slight = [0.015] * 12  # certain, but inside the spread of clean runs
    verdicts = [harm.harm for harm in harms(heavy, nothing, uneven, slight)]
    assert verdicts == ["proven", "equivalent", "ambiguous", "ambiguous"]


def test_holm_counts_the_configurations_of_the_subject():
    heavy = [0.3 + 0.01 * seed for seed in PAIRS]
    proven, *_ = harms(*[heavy] * 204)
    ambiguous, *_ = harms(*[heavy] * 205)
    assert (proven.harm, ambiguous.harm) == ("proven", "ambiguous")
    assert proven.p_holm == pytest.approx(204 / 4096)


def test_a_remedy_is_held_against_the_whole_margin_and_takes_no_part_in_holm():
    apart = [0.015 + 0.0001 * seed for seed in PAIRS]
    (mistake,), (remedy,) = harms(apart), harms(apart, role="remedy")
    assert (mistake.harm, remedy.harm) == ("ambiguous", "restored")
    assert math.isnan(remedy.p_holm)
    assert harms([0.1] * 12, role="remedy")[0].harm == "not restored"


def test_a_diverged_run_loses_more_than_any_other():
    diverged = [math.nan] * 12
    (harm, other) = harms(diverged, [0.5] * 12)
    assert harm.harm == "proven" and harm.diverged == 12 and harm.trivial
    assert harm.gap > other.gap
    # every score of the subject: from .39 to .92
    assert harm.score == pytest.approx(0.39 - (0.92 - 0.39))


def test_worst_rank_of_nothing_finite_stays_unknown():
    assert math.isnan(worst_rank([math.nan, math.inf]))
    assert worst_rank([0.5]) < 0.5
    assert worst_rank([1.0, 3.0, math.nan]) == -1.0


def test_runs_that_are_missing_or_failed_leave_harm_open():
    short = {"h0": rows([0.1] * 11)}
    failed = {"h0": rows([0.1] * 11) + [{**rows([0.1])[0], "seed": 11, "status": "failed"}]}
    for runs in (short, failed):
        (harm,) = harms([0.5] * 12, runs=runs)
        assert (harm.harm, harm.pairs, harm.unfinished) == ("incomplete", 11, 1)


def test_a_clean_twin_that_diverged_does_not_prove_harm():
    twins = {"clean": rows([math.nan] * 12)}
    (harm,) = harms([0.0] * 12, runs=twins)
    assert harm.harm != "proven"


def test_equivalence_needs_both_sides():
    differences = np.linspace(-0.01, 0.01, 12)
    assert equivalence_p(differences, 0.1) == 2.0**-12
    assert equivalence_p(differences + 0.2, 0.1) == 1.0
    assert equivalence_p(differences - 0.2, 0.1) == 1.0
    assert sign_flip_p(differences) > 0.4


def test_clean_runs_are_seldom_proven_harmful():
    generator = np.random.default_rng(3)
    clean = [dict(enumerate(level + 0.01 * generator.standard_normal(20))) for level in (0.6, 0.9)]
    found = calibrate("made-up", clean, (0.0, False), pairs=12)
    assert found is not None
    assert found.kills / found.splits <= 0.05
    assert found.low <= found.kills / found.splits <= found.high
    assert found == calibrate("made-up", clean, (0.0, False), pairs=12)


def test_too_few_clean_runs_calibrate_nothing():
    assert calibrate("made-up", [dict(enumerate(CLEAN))], (0.02, True), pairs=12) is None


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        ([1.0 - 0.009 * step for step in range(100)], ""),
        ([1.0] * 100, "no decrease"),
        ([1.0, math.nan], "not finite"),
        ([], "not finite"),
        ([1.0] + [0.5] * 59 + [1.1] * 20 + [0.3] * 20, "above the first loss"),
        ([1.0] + [9.0] * 9 + [0.5] * 90, ""),  # early: a warm-up may do that
    ],
)
def test_the_loss_alone(losses, says):
    assert loss_alarm(losses) == says


def test_clusters_widen_an_interval_of_runs_that_resemble_each_other():
    values = np.repeat(np.random.default_rng(0).standard_normal(8), 25)
    mean = lambda v: float(v.mean())  # noqa: E731
    low, high = cluster_bootstrap(values, [i // 25 for i in range(200)], mean)
    one, two = cluster_bootstrap(values, range(200), mean)
    assert high - low > 3 * (two - one)
    assert cluster_bootstrap(values, range(200), mean) == (one, two)


def test_an_undefined_statistic_has_no_interval():
    with pytest.raises(BenchmarkError, match="undefined in 2000 of 2000"):
        cluster_bootstrap(np.ones(3), range(3), lambda v: math.nan)
