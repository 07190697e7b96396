"""AutoTrainer's repairs in its order, with its numbers; its criterion is in test_repair_rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_recordings import made_recording

from diagnoser.diagnosis import default_rules
from diagnoser.repair_loop import AUTOTRAINER, Situation
from diagnoser.types import Finding, Repair

COMPONENTS = {name: ("linear", name.partition(".")[0], 4) for name in ("a", "a.x", "a.y", "head")}
OWN = ("a.x", "a.y", "head")
RULES = {rule.id: rule for rule in default_rules(Path("autotrainer"))}
Series = Mapping[str, Mapping[str, Sequence[float | None]]]


def found(rule: str) -> Finding:
    of = RULES[rule]
    repairs = tuple(Repair(r.name, "model", r.parameters) for r in of.repairs)
    return Finding(of.fault, "model", of.severity, 9, of.source, "", (), (), repairs)


def situation(*rules: str, rates: Mapping[str, float], adam: bool = True) -> Situation:
    series: dict[str, dict[str, Sequence[float | None]]] = {
        "learning_rate": {name: [rate / 2, rate, rate / 4] for name, rate in rates.items()}
    }
    if adam:
        series["moment_ratio"] = {name: [1.0] * 3 for name in rates}
    return of_series(*rules, series=series)


def of_series(*rules: str, series: Series) -> Situation:
    return Situation([found(r) for r in rules], made_recording(COMPONENTS, series), {}, 9, None)


def tried(of: Situation) -> list[list[tuple[str, str, Mapping[str, float | str]]]]:
    return [[(a.name, a.component, a.parameters) for a in p.actions] for p in AUTOTRAINER.plans(of)]


def rate(factor: float, component: str = "model") -> tuple[str, str, Mapping[str, float]]:
    return ("scale_learning_rate", component, {"factor": pytest.approx(factor, rel=1e-5)})


def test_what_swings_gets_lower_rates_and_then_new_weights() -> None:
    of = situation("oscillating-loss", rates=dict.fromkeys(OWN, 0.02))
    assert tried(of) == [
        [rate(0.001 / 0.02)],
        [rate(0.0001 / 0.02)],
        [rate(0.00001 / 0.02)],
        [("reinitialize", "model", {})],
    ]


def test_what_is_slow_gets_higher_rates_from_that_which_its_first_try_sets() -> None:
    of = situation("slow-convergence", rates=dict.fromkeys(OWN, 1e-5))
    assert tried(of) == [[rate(100)], [rate(1000)], [rate(10_000)], [("reinitialize", "model", {})]]


def test_plain_descent_begins_at_ten_times_that() -> None:
    of = situation("oscillating-loss", rates=dict.fromkeys(OWN, 1.0), adam=False)
    assert tried(of)[0] == [rate(0.01)]


def test_a_rate_that_is_set_already_is_no_repair() -> None:
    of = situation("oscillating-loss", rates=dict.fromkeys(OWN, 0.001))
    assert tried(of)[0] == [rate(0.1)]


def test_where_no_rate_is_known_none_is_changed() -> None:
    of = of_series("oscillating-loss", series={"moment_ratio": {"head": [1.0]}})
    assert tried(of) == [[("reinitialize", "model", {})]]


def test_one_problem_is_mended_and_that_of_gradients_first() -> None:
    of = situation("slow-convergence", "exploding-gradient", rates=dict.fromkeys(OWN, 0.1))
    assert tried(of) == [[("clip_gradient", "model", {"norm": 10.0})]]
    assert {plan.source for plan in AUTOTRAINER.plans(of)} == {"rule:exploding-gradient"}


def test_what_changes_the_program_is_not_tried() -> None:
    assert tried(situation("vanishing-gradient", rates={"head": 0.1})) == []


def test_what_is_in_force_of_an_earlier_repair_counts() -> None:
    of = of_series(
        "oscillating-loss",
        series={
            "learning_rate": {"head": [0.02, 0.002, 0.002]},
            "rate_factor": {"head": [None, 0.1, 0.1]},
            "moment_ratio": {"head": [1.0] * 3},
        },
    )
    assert tried(of)[0] == [rate(0.5)]


@given(
    rates=st.fixed_dictionaries({name: st.floats(1e-6, 1e2) for name in OWN}),
    rule=st.sampled_from(["oscillating-loss", "slow-convergence"]),
)
def test_every_part_gets_the_one_rate_that_is_set(rates: dict[str, float], rule: str) -> None:
    """It knows no rates of groups: whatever they are, there is one afterwards."""
    step = 0.1 if rule == "oscillating-loss" else 10.0
    wanted = [0.001 * step**i for i in range(3)]
    of = situation(rule, rates=rates)
    for actions in tried(of)[:-1]:
        after = dict(rates)
        for name, component, parameters in actions:
            assert name == "scale_learning_rate" and component in ("model", *OWN)
            for part in after if component == "model" else (component,):
                after[part] *= float(parameters["factor"])
        reached = next(w for w in wanted if math.isclose(after["head"], w, rel_tol=5e-3))
        assert list(after.values()) == pytest.approx([reached] * len(after), rel=5e-3)
