"""What one judge adds to another, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_bench_scoring import CLEAN, FROZEN, HOT

from diagnoser.benchmark.contrasts import (
    MARGINS,
    NEVER,
    contrasts,
    interaction,
    lead,
    threshold,
)
from diagnoser.benchmark.scoring import Verdict
from diagnoser.errors import BenchmarkError

PREFIXES = (0.25, 0.5, 1.0)
TRUTHS = [CLEAN] * 20 + [HOT] * 10 + [FROZEN] * 10


def verdict(i: int, score: float, place: str = "elsewhere") -> Verdict:
    truth = replace(TRUTHS[i], subject=f"s{i % 5}", hash=f"{i:x}")
    return Verdict(truth, 0, False, score, truth.causes, (place,))


def judged(alarm_from: dict[str, float], place: str = "elsewhere") -> dict[float, list[Verdict]]:
    """Faulty runs score 1 from a prefix on, by their operator; all else is below a half."""
    rng = np.random.default_rng(0)
    noise = rng.uniform(0.0, 0.4, (len(PREFIXES), len(TRUTHS)))
    noise[:, 20:] *= 0.5  # no faulty run alarms by chance

    def score(i: int, k: int) -> float:
        late = alarm_from.get("".join(TRUTHS[i].operators), NEVER)
        return 1.0 if PREFIXES[k] >= late else float(noise[k, i])

    return {
        prefix: [verdict(i, score(i, k), place) for i in range(len(TRUTHS))]
        for k, prefix in enumerate(PREFIXES)
    }


EARLY, LATE = judged({"O1": 0.25, "O11b": 0.25}), judged({"O1": 0.5, "O11b": 1.0})
BLIND = judged({})


@pytest.mark.parametrize(
    ("ours", "theirs", "earlier"),
    [
        (EARLY, LATE, 0.75 - 0.25),  # the median of ten at a half and ten at the end
        (LATE, EARLY, 0.25 - 0.75),
        (EARLY, BLIND, NEVER - 0.25),
        (LATE, LATE, 0.0),
    ],
)
def test_lead_is_how_much_earlier_half_of_the_faulty_runs_have_alarmed(ours, theirs, earlier):
    found = lead(ours, theirs)
    assert found.value == pytest.approx(earlier)
    assert found.low <= earlier <= found.high
    assert found.n == 20


def test_an_alarm_that_every_healthy_run_raises_is_no_lead():
    loud = {p: [replace(v, score=v.score + 5.0) for v in vs] for p, vs in EARLY.items()}
    assert lead(loud, EARLY).value == 0.0  # a threshold of its own, at equal false alarms
    healthy_too = {
        p: [replace(v, score=1.0 if not v.truth.is_faulty else v.score) for v in vs]
        for p, vs in EARLY.items()
    }
    assert lead(healthy_too, LATE).value == pytest.approx(0.75 - NEVER)


def test_other_runs_are_not_compared():
    fewer = {p: vs[:-1] for p, vs in LATE.items()}
    with pytest.raises(BenchmarkError, match="same runs"):
        lead(EARLY, fewer)


def test_what_is_certain_and_large_enough_helps_and_nothing_else_does():
    at_the_place = judged({"O1": 0.25, "O11b": 0.25}, FROZEN.components[0])
    found = contrasts(at_the_place, LATE)
    assert set(found) == set(MARGINS)
    assert {name for name, of in found.items() if of.helps} == {"lead", "component_top_1"}
    assert found["auroc"].figure.value == 0.0  # both are right at the end
    assert found["macro_f1"].figure.value == 0.0
    for contrast in found.values():
        assert contrast.p_holm >= contrast.figure.p
    assert not any(of.helps for of in contrasts(LATE, at_the_place).values())


def test_an_interaction_is_the_gain_here_less_the_gain_there():
    whole = EARLY[1.0]
    half_blind = [
        replace(v, score=BLIND[1.0][i].score if v.truth.operators == ("O1",) else v.score)
        for i, v in enumerate(whole)
    ]
    found = interaction(whole, half_blind, lambda v: v.truth.curvature == "+")
    assert HOT.curvature == "+" and FROZEN.curvature == "+"  # so that there is no other side
    assert found is None
    found = interaction(whole, half_blind, lambda v: v.truth.operators == ("O1",))
    healthy = [v.score for v in half_blind if not v.truth.is_faulty]
    hot = [v.score for v in half_blind if v.truth.operators == ("O1",)]
    area = np.mean([[a > b for b in healthy] for a in hot])
    assert found.value == pytest.approx(1.0 - area)
    assert found.low > 0.0 and found.p < 0.05
    # A faulty run that is on neither side counts on neither.
    nowhere = interaction(
        whole, half_blind, lambda v: None if v.truth.operators == ("O1",) else True
    )
    assert nowhere is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=200))
def test_at_most_one_healthy_run_in_twenty_alarms(highest):
    assert sum(score > threshold(highest) for score in highest) <= 0.05 * len(highest)
