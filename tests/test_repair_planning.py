"""What is tried, in which order and with which numbers, from findings and tables made by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_recordings import made_recording

from diagnoser.features import CATALOGUE
from diagnoser.repair import ACTIONS
from diagnoser.repair_loop import Plan, Situation, instructions, plans
from diagnoser.rules import load_rules, shipped_rules_directory
from diagnoser.table import Column, Scope, Table
from diagnoser.types import Cause, Evidence, Finding, Repair
from diagnoser.vocabulary import REPAIRS

QUERY, KEY = "attention.in_proj[query]", "attention.in_proj[key]"
Values = Mapping[str, Mapping[str, Sequence[float]]]  # feature, component, its values


def finding(
    *names: str | Repair,
    component: str = "head",
    source: str = "rule:one",
    causes: Sequence[str] = (),
    severity: str = "high",
) -> Finding:
    repairs = tuple(n if isinstance(n, Repair) else Repair(n, component) for n in names)
    found = tuple(Cause(cause) for cause in causes)
    return Finding("slow_convergence", component, severity, 5, source, "", found, (), repairs)


def rate(factor: float, component: str = "head") -> Repair:
    return Repair("scale_learning_rate", component, {"factor": factor})


def table(scope: Scope, values: Values, steps: Sequence[int] = (0, 5, 10)) -> Table:
    subjects = list(dict.fromkeys(name for of in values.values() for name in of))
    columns = {
        feature: Column.exact(
            np.array([of.get(name, [math.nan] * len(steps)) for name in subjects], dtype=float)
        )
        for feature, of in values.items()
    }
    kinds = dict.fromkeys(subjects, "linear")
    pairs = tuple((name, None) for name in subjects)
    return Table(scope, np.array(steps), pairs, columns, kinds)


def situation(
    *findings: Finding,
    components: Values | None = None,
    run: Mapping[str, Sequence[float]] | None = None,
    healthy: int | None = None,
    step: int = 10,
    gradients: Mapping[str, Sequence[float | None]] | None = None,
) -> Situation:
    tables: dict[Scope, Table] = {}
    if components:
        tables["component"] = table("component", components)
    if run:
        tables["run"] = table("run", {name: {"model": values} for name, values in run.items()})
    known = {name: ("linear", name, 4) for name in gradients or {"head": ()}}
    recording = made_recording(known, {"gradient_norm": gradients} if gradients else {})
    return Situation(findings, recording, tables, step, healthy)


def named(plan: Plan) -> list[str]:
    return [action.name for action in plan.actions]


def first_rate(of: Situation) -> tuple[float, str]:
    """The factor of the first plan that lowers or raises rates and does nothing else."""
    plan = next(p for p in plans(of) if named(p) == ["scale_learning_rate"])
    return float(plan.actions[0].parameters["factor"]), plan.derivation


def general(plan: Plan) -> bool:
    return plan.derivation.startswith("whatever the cause, from the start with smaller steps")


# -- which, and in which order -------------------------------------------------------------------


def test_nothing_found_is_nothing_to_try():
    assert plans(situation()) == ()


def test_combinations_come_before_their_parts():
    found = plans(situation(finding("reinitialize", rate(0.01))))
    by_names = [named(p) for p in found if not general(p)]
    assert by_names[0] == ["reinitialize", "scale_learning_rate"]
    both = by_names.index(["reinitialize", "scale_learning_rate"])
    assert both < by_names.index(["scale_learning_rate"])
    assert both < by_names.index(["reinitialize"])
    for plan in found:  # weights first, then the rate with which they go on
        if "scale_learning_rate" in named(plan):
            assert named(plan)[-1] == "scale_learning_rate"


def test_findings_of_one_rule_on_several_components_are_mended_together():
    both = [finding("reinitialize", rate(0.01, c), component=c) for c in (QUERY, KEY)]
    for plan in plans(situation(*both)):
        if general(plan):
            continue
        places = {a.component for a in plan.actions}
        assert places == {QUERY, KEY}, plan
        assert plan.component == "model"
        for name in set(named(plan)):
            assert [a.component for a in plan.actions if a.name == name] == [QUERY, KEY]


def test_one_finding_is_mended_where_it_is():
    for plan in plans(situation(finding("reinitialize", rate(0.01)))):
        if not general(plan):
            assert {a.component for a in plan.actions} == {plan.component} == {"head"}


def test_a_repair_of_the_whole_model_is_made_once_however_many_components_are_concerned():
    whole = Repair("clip_gradient", "model", {"norm": 1.0})
    both = [finding(whole, component=c) for c in (QUERY, KEY)]
    (clip,) = [p for p in plans(situation(*both)) if "clip_gradient" in named(p)]
    assert clip.actions == (whole,)


def test_no_plan_comes_twice_and_all_can_be_applied():
    one = finding("reinitialize", rate(0.01), "temper_attention", source="rule:one")
    same = finding("temper_attention", "reinitialize", rate(0.01), source="rule:two")
    found = plans(situation(one, same, healthy=4))
    keys = [p.key for p in found]
    assert len(set(keys)) == len(keys)
    assert all(a.name in ACTIONS for p in found for a in p.actions)


def test_a_second_rule_has_its_turn_before_the_first_has_used_up_all():
    one = finding("reinitialize", "reset_optimizer_state", rate(0.01), "temper_attention")
    two = finding("unfreeze", component="embed", source="rule:two")
    sources = [p.source for p in plans(situation(one, two))]
    assert sources[:3] == ["rule:one", "rule:one", "rule:two"]


def test_the_same_situation_gives_the_same_plans():
    of = situation(finding("reinitialize", rate(0.01), "temper_attention"), healthy=4)
    assert plans(of) == plans(of)


def test_a_cause_brings_what_its_rule_does_not_list():
    found = plans(situation(finding(causes=["learning_rate_too_low"])))
    (action,) = found[0].actions
    assert (action.name, action.parameters) == ("scale_learning_rate", {"factor": 10.0})
    listed = plans(situation(finding("unfreeze", causes=["attention_scale"])))
    assert [named(p) for p in listed][0] == ["unfreeze"]
    assert ["temper_attention"] in [named(p) for p in listed]


def test_what_needs_a_restart_is_told_and_not_tried():
    stopped = finding("add_normalization", "zero_gradients", "reinitialize")
    of = situation(stopped)
    tried = {a.name for p in plans(of) for a in p.actions}
    assert "reinitialize" in tried
    assert not tried & {"add_normalization", "zero_gradients"}
    assert instructions([stopped]) == (
        (stopped, stopped.repairs[0]),
        (stopped, stopped.repairs[1]),
    )
    assert plans(situation(finding("add_normalization", "zero_gradients"))) == ()


def test_every_repair_is_either_tried_or_an_instruction():
    one = finding(*REPAIRS)
    told = {repair.name for _, repair in instructions([one])}
    assert told == set(REPAIRS) - set(ACTIONS)


def test_weights_that_started_far_too_large_are_drawn_anew_wherever_it_shows():
    scale = {"initial_weight_scale_to_median": {"embed": [40.0] * 3, "head": [1.0] * 3}}
    of = situation(finding("temper_attention", component=QUERY), components=scale)
    (drawn,) = [p for p in plans(of) if named(p) == ["reinitialize"]]
    assert drawn.actions == (Repair("reinitialize", "embed"),)
    assert drawn.component == "embed"
    assert drawn.derivation == "they started more than 3 times as large as the median matrix"


@pytest.mark.parametrize("scale", [1.0, 3.0, math.nan])
def test_weights_of_ordinary_or_unknown_size_are_not(scale):
    values = {"initial_weight_scale_to_median": {"embed": [scale] * 3}}
    of = situation(finding("temper_attention", component=QUERY), components=values)
    assert ["reinitialize"] not in [named(p) for p in plans(of)]


# -- going back ----------------------------------------------------------------------------------


def test_without_a_healthy_state_nothing_goes_back_to_one():
    found = plans(situation(finding("roll_back", "reinitialize", rate(0.01))))
    back = [a for p in found for a in p.actions if a.name == "roll_back"]
    assert all(a.parameters == {"to": "start"} for a in back)


def test_where_one_was_kept_a_part_goes_back_to_it_and_its_step_is_told():
    found = plans(situation(finding(rate(0.01)), healthy=7))
    first = found[0]
    assert first.actions == (Repair("roll_back", "head"), rate(0.01))
    assert "the last state from before the finding is that of step 7" in first.derivation
    plain = plans(situation(finding("roll_back"), healthy=7))[0]
    assert plain.actions == (Repair("roll_back", "head"),)


def test_too_high_rates_of_the_whole_model_go_back_to_the_start():
    whole = finding(rate(0.1, "model"), component="model")
    first = plans(situation(whole, healthy=7))[0]
    assert first.actions[0] == Repair("roll_back", "model", {"to": "start"})
    assert first.actions[1].name == "scale_learning_rate"
    assert "steps that are too long leave no healthy state but the first" in first.derivation


def test_higher_rates_go_on_from_where_the_training_is():
    whole = finding("roll_back", rate(10.0, "model"), component="model")
    raised = [p for p in plans(situation(whole, healthy=7)) if not general(p)]
    rates = [p for p in raised if "scale_learning_rate" in named(p)]
    assert rates and all(named(p) == ["scale_learning_rate"] for p in rates)
    factors = [p.actions[0].parameters["factor"] for p in rates]
    assert factors == [10.0, 30.0, 90.0, 3.3]


TO_THE_START = Repair("roll_back", "model", {"to": "start"})


def of_start(component: str = "head") -> Finding:
    """What a rule found in the first weights."""
    seen = (Evidence("initial_weight_scale_to_median", 9.0, ">", 3.0, (0, 5)),)
    return dataclasses.replace(finding("reinitialize", component=component), evidence=seen)


@pytest.mark.parametrize(
    "found", [finding("temper_attention", source="check:scale"), of_start()], ids=["seen", "drawn"]
)
def test_what_was_so_from_the_first_step_is_mended_there_while_that_costs_little(found):
    early = plans(situation(found, step=2))
    first, second = early[:2]
    assert first.actions == (TO_THE_START, *second.actions)
    assert "so it was from the first step, and 3 steps are little to make again" in first.derivation
    assert plans(situation(found, step=19))[0].actions[0] == TO_THE_START
    late = [p for p in plans(situation(found, step=20)) if not general(p)]
    assert all(TO_THE_START not in p.actions for p in late)


def test_what_came_later_is_mended_where_it_is_and_nothing_goes_back_twice():
    later = [p for p in plans(situation(finding("reinitialize"), step=2)) if not general(p)]
    assert all(TO_THE_START not in p.actions for p in later)
    back = finding("roll_back", rate(0.1), source="check:one")
    for plan in plans(situation(back, step=2, healthy=1)):
        assert named(plan).count("roll_back") <= 1


# -- what is tried for want of anything better ----------------------------------------------------


def test_rates_still_lower_than_derived_are_spare_and_higher_ones_are_not():
    found = [p for p in plans(situation(finding(rate(0.1)), healthy=7)) if not general(p)]
    factors = {p.actions[-1].parameters["factor"]: p.spare for p in found}
    assert factors == {0.1: False, 0.3: False, 0.033: True}


def test_a_factor_that_was_counted_is_not_searched_around():
    values = {"times_optimized": {"head": [2.0, 2.0, 2.0]}}
    found = plans(situation(finding(rate(0.3)), components=values, healthy=7))
    rates = [a for p in found if not general(p) for a in p.actions if "rate" in a.name]
    assert rates and {a.parameters["factor"] for a in rates} == {0.5}


def test_higher_rates_that_a_cause_suggests_are_spare_beside_what_its_rule_lists():
    listed = Repair("change_betas", "head", {"eps": 1e-8})
    found = plans(situation(finding(listed, causes=("learning_rate_too_low",))))
    own = [p for p in found if not general(p)]
    assert own[0].actions == (listed,) and not own[0].spare
    assert len(own) > 1 and all(p.spare for p in own if p.actions != (listed,))
    alone = plans(situation(finding(causes=("learning_rate_too_low",))))
    assert not any(p.spare for p in alone)


def test_lower_rates_that_a_cause_suggests_are_not():
    back = finding("roll_back", causes=("learning_rate_too_high",))
    found = plans(situation(back, healthy=7))
    assert named(found[0]) == ["roll_back", "scale_learning_rate"] and not found[0].spare


@pytest.mark.parametrize(
    ("run", "factor", "why"),
    [
        ({"overshoot": [50.0] * 3}, 0.01, "curvature takes back 50 times"),
        ({"median_update_ratio": [0.06] * 3}, 0.05, "a step changes 0.06 of the weights"),
        ({"median_update_ratio": [0.001] * 3}, 0.1, "the rule's own factor"),
        ({}, 0.1, "the rule's own factor"),
    ],
)
def test_smaller_steps_from_the_start_are_as_small_as_is_measured(run, factor, why):
    (plan,) = [p for p in plans(situation(finding("reinitialize"), run=run)) if general(p)]
    assert plan.actions == (TO_THE_START, rate(factor, "model"))
    assert why in plan.derivation


# -- numbers and where they come from ------------------------------------------------------------


def test_a_rate_of_its_own_is_brought_to_that_of_others():
    values = {"learning_rate_to_quartile": {"head": [80.0, 80.0, 80.0]}}
    assert first_rate(situation(finding(rate(0.01)), components=values)) == (
        0.013,
        "its learning rate is 80 times that of other components",
    )


def test_a_step_that_changes_more_than_others_is_brought_to_theirs():
    values = {
        "learning_rate_to_quartile": {"head": [1.0] * 3},
        "update_ratio_to_median": {"head": [20.0, 25.0, 12.5]},
    }
    factor, why = first_rate(situation(finding(rate(0.01)), components=values))
    assert (factor, why) == (0.04, "a step changes it 25 times as much as the median one")


def test_the_rate_comes_before_the_update():
    values = {
        "learning_rate_to_quartile": {"head": [100.0] * 3},
        "update_ratio_to_median": {"head": [20.0] * 3},
    }
    factor, why = first_rate(situation(finding(rate(0.3)), components=values))
    assert factor == 0.01
    assert why.startswith("its learning rate is 100 times")


def test_overshoot_gives_the_factor_at_which_the_quadratic_model_gains_most():
    whole = finding(rate(0.1, "model"), component="model")
    factor, why = first_rate(situation(whole, run={"overshoot": [1.0, 5.0, 2.0]}))
    assert factor == 0.1  # 0.5 / 5
    assert why == (
        "curvature takes back 5 times what the gradient gains along a step; "
        "0.5 is where the quadratic model gains most"
    )


@pytest.mark.parametrize(("listed", "update", "expected"), [(0.1, 0.12, 0.025), (10, 3e-5, 100.0)])
def test_a_median_update_gives_the_factor_that_makes_it_usual(listed, update, expected):
    whole = finding(rate(listed, "model"), component="model")
    factor, why = first_rate(situation(whole, run={"median_update_ratio": [update] * 3}))
    assert factor == expected
    assert why == f"a step changes {update:.2g} of the weights; 0.003 is usual"


@pytest.mark.parametrize(("listed", "update"), [(0.1, 1e-5), (10.0, 0.5)])
def test_a_derived_factor_that_points_the_other_way_is_not_used(listed, update):
    whole = finding(rate(listed, "model"), component="model")
    of = situation(whole, run={"median_update_ratio": [update] * 3})
    assert first_rate(of) == (listed, "the rule's own factor")


def test_where_nothing_was_measured_the_rule_s_factor_counts():
    assert first_rate(situation(finding(rate(0.07)))) == (0.07, "the rule's own factor")
    values = {"learning_rate_to_quartile": {"head": [math.nan] * 3}}
    assert first_rate(situation(finding(rate(0.07)), components=values))[0] == 0.07


@pytest.mark.parametrize(
    ("feature", "value", "listed", "factor"),
    [
        ("learning_rate_to_quartile", 1e9, 0.01, 1e-3),
        ("median_update_ratio", 1e-9, 10.0, 1000.0),
        ("median_update_ratio", 1e9, 0.1, 1e-3),
    ],
)
def test_factors_stay_within_a_thousandth_and_a_thousand(feature, value, listed, factor):
    component = "model" if feature.startswith("median") else "head"
    one = finding(rate(listed, component), component=component)
    measured = {feature: [value] * 3}
    of = (
        situation(one, run=measured)
        if component == "model"
        else situation(one, components={feature: {"head": [value] * 3}})
    )
    assert first_rate(of)[0] == factor
    for plan in plans(of):
        for action in plan.actions:
            if action.name == "scale_learning_rate":
                assert 1e-3 <= float(action.parameters["factor"]) <= 1000.0


@given(
    listed=st.sampled_from([0.01, 0.1, 0.3, 3.0, 10.0]),
    observed=st.lists(
        st.floats(min_value=0.0) | st.just(math.nan),
        min_size=3,
        max_size=3,
    ),
    feature=st.sampled_from(["overshoot", "median_update_ratio"]),
)
@settings(deadline=None, max_examples=60)
def test_whatever_was_measured_factors_are_numbers_and_point_as_the_rule_does(
    listed, observed, feature
):
    whole = finding(rate(listed, "model"), component="model")
    for plan in plans(situation(whole, run={feature: observed})):
        for action in plan.actions:
            if action.name == "scale_learning_rate":
                factor = float(action.parameters["factor"])
                assert 1e-3 <= factor <= 1000.0
    factor, why = first_rate(situation(whole, run={feature: observed}))
    assert (factor < 1) == (listed < 1)
    assert why


def test_the_same_plan_is_tried_with_a_third_and_three_times_the_factor():
    of = situation(finding("reinitialize", rate(0.01)))
    with_rates = [p for p in plans(of) if named(p) == ["reinitialize", "scale_learning_rate"]]
    assert [p.actions[1].parameters["factor"] for p in with_rates] == [0.01, 0.03, 0.0033]
    assert with_rates[1].derivation.endswith("3 times that factor (the rule's own factor)")
    assert with_rates[2].derivation.endswith("0.33 times that factor (the rule's own factor)")


@pytest.mark.parametrize(
    ("logit", "factor", "why"),
    [
        (80.0, 0.1, "its largest logit is 80; 8 is ample"),
        (1e6, 1e-3, "its largest logit is 1e+06; 8 is ample"),
        (9.0, 0.3, "a third of its logits"),
        (math.nan, 0.3, "a third of its logits"),
    ],
)
def test_tempering_is_derived_from_the_logit(logit, factor, why):
    one = finding("temper_attention", component="attention")
    of = situation(one, components={"attention_logit": {"attention": [logit] * 3}})
    tempered = [p for p in plans(of) if named(p) == ["temper_attention"]]
    assert tempered[0].actions[0].parameters == {"factor": factor}
    assert tempered[0].derivation == why
    assert {p.actions[0].parameters["factor"] for p in tempered} == {factor, 0.1}


def test_the_logit_of_a_layer_is_the_largest_of_its_parts():
    values = {"attention_logit": {QUERY: [16.0] * 3, KEY: [40.0] * 3, "attention2": [800.0] * 3}}
    of = situation(finding("temper_attention", component="attention"), components=values)
    assert plans(of)[0].actions[0].parameters == {"factor": 0.2}


def test_clipping_is_at_the_median_gradient_norm():
    norms = {"head": [3.0, 3.0, 300.0], "embed": [4.0, 4.0, 400.0]}
    whole = finding(Repair("clip_gradient", "model"), component="model")
    (clip, *_) = plans(situation(whole, gradients=norms))
    assert clip.actions[0].parameters == {"norm": 5.0}
    assert clip.derivation == "the median gradient norm so far"
    (local, *_) = plans(situation(finding("clip_gradient"), gradients=norms))
    assert local.actions[0].parameters == {"norm": 3.0}


@pytest.mark.parametrize("norms", [[math.nan] * 3, [0.0] * 3, [None] * 3])
def test_a_clipping_norm_is_a_positive_number_whatever_was_measured(norms):
    one = finding(Repair("clip_gradient", "model"), component="model")
    (clip, *_) = plans(situation(one, gradients={"head": norms, "embed": [None] * 3}))
    assert 0.0 < clip.actions[0].parameters["norm"] < math.inf


@pytest.mark.parametrize(("step", "steps"), [(3, 20), (99, 100), (5000, 200)])
def test_a_warmup_takes_as_many_steps_as_were_made(step, steps):
    of = situation(finding(Repair("add_warmup", "model"), component="model"), step=step)
    assert plans(of)[0].actions[0].parameters == {"steps": steps}


def test_numbers_of_the_rule_are_left_as_they_are():
    given_norm = Repair("clip_gradient", "head", {"norm": 0.25})
    (clip, *_) = plans(situation(finding(given_norm), gradients={"head": [1.0]}))
    assert clip.actions == (given_norm,)


@pytest.mark.parametrize(("ratio", "betas"), [(2.0, {"beta2": 0.999}), (1.0, {"beta2": 0.95})])
def test_averages_follow_what_the_steps_show(ratio, betas):
    one = finding("change_betas")
    of = situation(one, components={"adaptive_step": {"head": [ratio] * 3}})
    assert plans(of)[0].actions[0].parameters == betas


@pytest.mark.parametrize(
    ("actions", "local"),
    [
        ((rate(0.1),), True),
        ((rate(0.1, "model"),), False),
        ((Repair("reinitialize", "head"), rate(0.1, "model")), False),
        ((Repair("add_warmup", "model"),), False),
        ((Repair("roll_back", "model"),), True),
    ],
)
def test_only_what_leaves_the_rate_of_the_whole_model_alone_is_local(actions, local):
    assert Plan(actions, "", "rule:one", "head").is_local is local


def test_parameters_in_another_order_are_the_same_plan():
    one = Repair("change_betas", "head", {"beta1": 0.9, "beta2": 0.99})
    other = Repair("change_betas", "head", {"beta2": 0.99, "beta1": 0.9})
    keys = {Plan((r,), why, "rule:one", "head").key for r, why in ((one, "a"), (other, "b"))}
    assert len(keys) == 1


@pytest.mark.parametrize("family", ["diagnoser", "checks", "autotrainer"])
def test_plans_of_every_shipped_rule_repeat_nothing_and_name_their_source(family):
    for rule in load_rules(shipped_rules_directory(family), CATALOGUE):
        component = "model" if rule.scope == "run" else "head"
        repairs = [
            Repair(r.name, component if r.component == "component" else "model", r.parameters)
            for r in rule.repairs
        ]
        one = finding(
            *repairs, component=component, source=rule.source, causes=rule.causes, severity="high"
        )
        found = plans(situation(one, healthy=3))
        assert len({p.key for p in found}) == len(found), rule.id
        assert bool(found) or not {r.name for r in rule.repairs} & set(ACTIONS), rule.id
        assert all(p.source == rule.source and p.derivation for p in found)
