"""The rule engine: states, findings, what is unknown, sequences, order and speed."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnoser.rules import view
from diagnoser.rules.engine import FIRING, INACTIVE, PENDING, STATE_UNKNOWN, evaluate, states
from diagnoser.rules.message import Message, parse_message
from diagnoser.rules.parsing import compile_expression
from diagnoser.rules.ranges import Range, Ranges
from diagnoser.rules.rule import Rule, Stage, SuggestedRepair
from diagnoser.table import Column, Feature, Table

NAN = math.nan
SILENT = Message(())
CATALOGUE = {
    feature.name: feature
    for feature in (
        Feature("loss", "run", "any number"),
        Feature("finite", "run", "a flag", low=0.0, high=1.0),
        Feature("ratio", "component", "a ratio", low=0.0),
        Feature("growth", "component", "any number"),
        Feature("coupling", "pair", "a coupling", low=0.0),
    )
}


def make_rule(
    *when: str | tuple[str, str],
    scope: str = "component",
    name: str = "a-rule",
    hold: int = 1,
    within: int = 100,
    message: Message = SILENT,
    ends_run: bool = False,
    repairs: tuple[SuggestedRepair, ...] = (),
) -> Rule:
    stages = []
    for stage in when:
        on, text = stage if isinstance(stage, tuple) else ("", stage)
        component = on if on in ("a", "b") else ""
        stages.append(Stage(on, compile_expression(text, CATALOGUE, scope, component)))
    return Rule(
        id=name,
        family="family",
        path=Path(f"{name}.yaml"),
        title="A rule",
        status="stable",
        description="Detects something.",
        references=(),
        fault="dead_component",
        scope=scope,
        stages=tuple(stages),
        hold=hold,
        within=within,
        severity="medium",
        message=message,
        causes=("learning_rate_too_high", "initialization"),
        repairs=repairs,
        explains=(),
        ends_run=ends_run,
        falsepositives=("none known",),
        tests=(),
    )


def make_table(scope, subjects, steps=None, kinds=None, **columns) -> Table:
    made = {
        name: c if isinstance(c, Column) else Column.exact(np.array(c, dtype=float))
        for name, c in columns.items()
    }
    if steps is None:
        steps = range(0, 10 * next(iter(made.values())).value.shape[1], 10)
    pairs = tuple(s if isinstance(s, tuple) else (s, None) for s in subjects)
    return Table(scope, np.array(steps, np.int64), pairs, made, kinds or {})


def components(*subjects: str, **columns) -> dict[str, Table]:
    return {"component": make_table("component", subjects, **columns)}


# States


def slow_states(truth: list[int], hold: int) -> list[int]:
    held, result = 0, []
    for value in truth:
        held = held if value == 0 else (held + 1 if value == 1 else 0)
        state = STATE_UNKNOWN if value == 0 else (INACTIVE if value == -1 else PENDING)
        result.append(FIRING if value == 1 and held >= hold else state)
    return result


@given(st.lists(st.sampled_from([1, 0, -1]), min_size=1, max_size=20), st.integers(1, 4))
def test_states_follow_a_plain_state_machine(truth, hold):
    assert states(np.array([truth], np.int8), hold)[0].tolist() == slow_states(truth, hold)


@given(st.lists(st.sampled_from([1.0, NAN, 0.0]), min_size=1, max_size=15), st.integers(1, 4))
def test_a_finding_spans_its_first_long_enough_run_to_its_last_firing_step(series, hold):
    tables = components("layer", ratio=[series])
    expected = slow_states([1 if x == 1 else -1 if x == 0 else 0 for x in series], hold)
    found = evaluate([make_rule("ratio > 0.5", hold=hold)], tables)
    if FIRING not in expected:
        assert found.findings == ()
        return
    (finding,) = found.findings
    fired = expected.index(FIRING)
    start = max([i for i in range(fired) if series[i] == 0.0], default=-1) + 1
    start = next(i for i in range(start, fired + 1) if series[i] == 1.0)
    last = max(i for i, state in enumerate(expected) if state == FIRING)
    assert finding.since_step == 10 * start
    assert finding.evidence[0].steps == (10 * start, 10 * last)


# Findings


def test_a_finding_says_what_where_and_on_what_evidence():
    ratio = Column(np.array([[5.0, 6.0]]), np.array([[4.0, 5.0]]), np.array([[6.0, 7.0]]))
    tables = components("layer", ratio=ratio, growth=[[1.0, 2.0]])
    tables["run"] = make_table("run", ["model"], loss=[[0.25, NAN]])
    message = parse_message("{component} at {ratio:.1f}, {growth}, loss {loss}", lambda name: name)
    rule = make_rule(
        "ratio > 2 and not growth > 3",
        message=message,
        repairs=(
            SuggestedRepair("reinitialize", "component", {}),
            SuggestedRepair("scale_learning_rate", "model", {"factor": 0.3}),
        ),
    )
    (finding,) = evaluate([rule], tables).findings
    assert (finding.fault, finding.severity, finding.source) == (
        "dead_component",
        "medium",
        "rule:a-rule",
    )
    assert (finding.component, finding.other, finding.since_step) == ("layer", None, 0)
    assert finding.message == "layer at 6.0, 2, loss unknown"
    assert [c.cause for c in finding.causes] == ["learning_rate_too_high", "initialization"]
    assert [(r.name, r.component) for r in finding.repairs] == [
        ("reinitialize", "layer"),
        ("scale_learning_rate", "model"),
    ]
    first, second = finding.evidence
    assert (first.feature, first.observed, first.comparison, first.threshold) == (
        "ratio",
        6.0,
        ">",
        2.0,
    )
    assert (first.std_error, first.method) == (0.5, "bounds")  # the bounds are two each side
    assert (second.feature, second.comparison, second.threshold) == ("growth", "<=", 3.0)
    assert (second.std_error, second.method) == (0.0, "exact")


def test_each_subject_is_judged_by_itself_and_in_order():
    tables = components("c", "a", "b", ratio=[[1.0], [0.0], [1.0]])
    rules = [make_rule("ratio > 0.5", name="z"), make_rule("ratio < 0.5", name="y")]
    found = evaluate(rules, tables)
    assert [(f.source, f.component) for f in found.findings] == [
        ("rule:z", "c"),
        ("rule:z", "b"),
        ("rule:y", "a"),
    ]
    assert found == evaluate(rules, tables)


def test_run_features_are_seen_at_the_component_s_own_steps():
    tables = components("a", "b", steps=[10, 20, 30], ratio=np.ones((2, 3)))
    tables["run"] = make_table("run", ["model"], steps=[0, 20, 30, 40], loss=[[9.0, 1.0, 9.0, 9.0]])
    found = evaluate([make_rule("ratio > 0.5 and loss > 5")], tables)
    assert [(f.component, f.since_step) for f in found.findings] == [("a", 30), ("b", 30)]


def test_pairs_see_components_measured_at_other_steps():
    tables = components("q", "k", "v", steps=[0, 10, 20], ratio=[[1, 1, 9], [2, 2, 2], [3, 3, 3]])
    tables["pair"] = make_table(
        "pair", [("q", "k"), ("v", "q"), ("v", "gone")], steps=[0, 20], coupling=np.ones((3, 2))
    )
    found = evaluate([make_rule("a.ratio > b.ratio and coupling > 0.5", scope="pair")], tables)
    assert [(f.component, f.other, f.since_step) for f in found.findings] == [
        ("q", "k", 20),
        ("v", "q", 0),
    ]
    assert found.findings[0].evidence[0].threshold == 2.0
    assert [(u.component, u.missing) for u in found.unknown] == [("v - gone", ("b.ratio",))]


def test_kinds_come_from_the_tables():
    tables = components("a", "b", "c", kinds={"a": "query", "b": "norm"}, ratio=np.ones((3, 1)))
    found = evaluate([make_rule("ratio > 0.5 and kind == 'query'")], tables)
    assert [f.component for f in found.findings] == ["a"]
    assert [u.component for u in found.unknown] == ["c"]


# What is not a finding


def test_a_rule_that_is_fine_is_checked():
    tables = components("a", "b", ratio=[[0.0, NAN, 0.0], [0.0, NAN, NAN]])
    found = evaluate([make_rule("ratio > 0.5")], tables)
    assert found.findings == found.unknown == ()
    assert [(c.rule, c.components, c.measurements) for c in found.checked] == [("a-rule", 2, 2)]


def test_a_rule_without_its_features_is_unknown_and_never_fine():
    found = evaluate(
        [make_rule("ratio > 0.5 and growth > 0")],
        components("a", "b", ratio=np.ones((2, 3)), growth=np.full((2, 3), NAN)),
    )
    assert found.findings == found.checked == ()
    assert [(u.component, u.missing) for u in found.unknown] == [("model", ("growth",))]
    assert "never measured: growth" in found.unknown[0].reason


def test_one_unknown_subject_is_named():
    tables = components("a", "b", ratio=[[0.0, 0.0], [NAN, NAN]])
    found = evaluate([make_rule("ratio > 0.5")], tables)
    assert [(u.component, u.missing) for u in found.unknown] == [("b", ("ratio",))]
    assert found.checked[0].components == 1


def test_errors_too_large_to_decide_are_unknown():
    ratio = Column(np.ones((1, 2)), np.zeros((1, 2)), np.full((1, 2), 2.0))
    found = evaluate([make_rule("ratio > 1.5")], components("a", ratio=ratio))
    assert found.findings == found.checked == ()
    assert [(u.component, u.missing) for u in found.unknown] == [("model", ())]


@pytest.mark.parametrize("tables", [{}, components(ratio=np.zeros((0, 0)))])
def test_nothing_measured_is_unknown(tables):
    found = evaluate([make_rule("ratio > 1")], tables)
    assert found.findings == found.checked == ()
    assert [(u.component, u.missing) for u in found.unknown] == [("model", ("ratio",))]


def test_nothing_after_the_end_of_the_run_is_judged():
    tables = components("a", "b", ratio=[[0, 0, 9, 9], [0, 9, 9, 9]])
    tables["run"] = make_table("run", ["model"], finite=[[1, 1, 0, 1]])
    rules = [
        make_rule("ratio > 5", name="after", hold=2),
        make_rule("not finite", scope="run", name="end", ends_run=True),
    ]
    found = evaluate(rules, tables)
    # b reached its second step in the step that ended the run; a would have after it.
    assert [(f.source, f.component) for f in found.findings] == [
        ("rule:after", "b"),
        ("rule:end", "model"),
    ]
    assert found.findings[0].evidence[0].steps == (10, 20)
    alone = evaluate(rules[:1], tables)
    assert [f.component for f in alone.findings] == ["a", "b"]


# Sequences

CASCADE = (("a", "growth > 1"), ("a,b", "coupling > 0.5"), ("b", "growth > 1"))


def cascade(first, second, coupling, *, within=100, pairs=(("p", "q"),)):
    tables = components("p", "q", growth=[first, second])
    tables["pair"] = make_table("pair", pairs, coupling=[coupling] * len(pairs))
    return evaluate([make_rule(*CASCADE, scope="pair", within=within)], tables)


def test_a_disturbance_that_spreads_is_found_in_its_order():
    (finding,) = cascade([0, 2, 2, 2], [0, 0, 0, 2], [1, 0, 1, 1]).findings
    assert (finding.component, finding.other, finding.since_step) == ("p", "q", 10)
    assert [(e.feature, e.steps) for e in finding.evidence] == [
        ("a.growth", (10, 10)),
        ("coupling", (20, 20)),
        ("b.growth", (30, 30)),
    ]


def test_a_symmetric_pair_is_seen_from_both_sides():
    (finding,) = cascade([0, 0, 2], [0, 2, 2], [1, 1, 1]).findings
    assert (finding.component, finding.other) == ("q", "p")


@pytest.mark.parametrize(
    ("first", "second", "coupling", "within"),
    [
        ([0, 2, 2, 2], [0, 2, 2, 2], [1, 1, 1, 1], 100),  # at once: no order
        ([0, 2, 2, 2], [0, 0, 0, 2], [1, 0, 0, 0], 100),  # coupled only before
        ([0, 2, 2, 2], [0, 0, 0, 2], [1, 1, 1, 1], 1),  # too long after
        ([0, 2, 2, 2], [0, 0, 0, 0], [1, 1, 1, 1], 100),  # never arrives
        ([0, 0, 0, 0], [0, 0, 0, 2], [1, 1, 1, 1], 100),  # has no origin
    ],
)
def test_what_is_no_cascade(first, second, coupling, within):
    found = cascade(first, second, coupling, within=within)
    assert found.findings == ()
    assert len(found.checked) == 1


def test_a_component_does_not_disturb_itself():
    found = cascade([0, 2, 2], [0, 0, 0], [1, 1, 1], pairs=(("p", "p"),))
    assert found.findings == ()


def test_a_sequence_with_a_stage_never_measured_is_unknown():
    found = cascade([0, 2, 2], [0, 0, 2], [NAN, NAN, NAN])
    assert found.findings == found.checked == ()
    assert [(u.component, u.missing) for u in found.unknown] == [("model", ("coupling",))]


# Healthy ranges


def ranges(**features: dict[str, tuple[float, float]]) -> Ranges:
    """Exact ranges, ``feature={kinds: (low, high)}``."""
    return Ranges(
        runs=100,
        features={
            feature: {
                key.replace("_", "."): Range(100, (low, low, low), (high, high, high))
                for key, (low, high) in by_kind.items()
            }
            for feature, by_kind in features.items()
        },
    )


def test_a_range_is_that_of_the_subject_s_kind():
    kinds = {"a": "query", "b": "norm", "c": "head"}
    tables = components("a", "b", "c", "d", kinds=kinds, ratio=np.full((4, 2), 5.0))
    known = ranges(ratio={"component_query": (1, 4), "component_norm": (1, 6)})
    found = evaluate([make_rule("ratio > healthy_high(ratio)")], tables, known)
    assert [f.component for f in found.findings] == ["a"]
    assert found.findings[0].evidence[0].threshold == 4.0
    # Two lack a range; that is said once.
    assert [(u.component, u.missing, u.reason) for u in found.unknown] == [
        ("model", (), "no healthy range of ratio for an unknown kind, head")
    ]


def test_without_any_range_a_rule_is_unknown_once_and_not_checked():
    kinds = {"a": "query", "b": "norm"}
    tables = components("a", "b", kinds=kinds, ratio=np.full((2, 3), 5.0))
    found = evaluate([make_rule("ratio > healthy_high(ratio)")], tables, Ranges())
    assert found.findings == found.checked == ()
    assert [(u.component, u.reason) for u in found.unknown] == [
        ("model", "no healthy range of ratio for norm, query")
    ]


def test_what_was_not_measured_comes_before_what_was_not_learnt():
    kinds = {"a": "query", "b": "norm"}
    rule = make_rule("ratio > healthy_high(ratio)")
    never = components("a", "b", kinds=kinds, ratio=np.full((2, 3), NAN))
    (entry,) = evaluate([rule], never, Ranges()).unknown
    assert (entry.missing, entry.reason) == (("ratio",), "never measured: ratio")
    partly = components("a", "b", kinds=kinds, ratio=[[5.0], [NAN]])
    (entry,) = evaluate([rule], partly, Ranges()).unknown
    assert entry.reason == "no healthy range of ratio for query"


def test_many_kinds_without_a_range_are_counted():
    kinds = {f"c{i}": f"kind{i}" for i in range(9)}
    tables = components(*kinds, kinds=kinds, ratio=np.ones((9, 1)))
    (entry,) = evaluate([make_rule("ratio > healthy_high(ratio)")], tables, Ranges()).unknown
    assert entry.reason == "no healthy range of ratio for kind0, kind1 and 7 more"


def test_work_grows_as_the_number_of_subjects_does(monkeypatch):
    asked = []
    monkeypatch.setattr(view, "range_key", lambda *of: asked.append(of) or "component.norm")
    names = [f"c{i}" for i in range(100)]
    tables = components(*names, kinds=dict.fromkeys(names, "norm"), ratio=np.ones((100, 1)))
    evaluate([make_rule("ratio > healthy_high(ratio)")], tables, Ranges())
    assert 100 <= len(asked) <= 500


@pytest.mark.parametrize("pair", [("q", "k"), ("k", "q")])
def test_a_pair_has_one_range_in_either_order(pair):
    tables = components("q", "k", kinds={"q": "query", "k": "key"}, ratio=[[1.0], [1.0]])
    tables["pair"] = make_table("pair", [pair], coupling=[[5.0]])
    rule = make_rule("coupling > healthy_high(coupling)", scope="pair")
    for high, count in ((4, 1), (6, 0)):
        known = ranges(coupling={"pair_key|query": (0, high), "pair_query|query": (0, 1)})
        assert len(evaluate([rule], tables, known).findings) == count


def test_components_of_a_pair_and_the_run_have_their_own_ranges():
    tables = components("q", "k", kinds={"q": "query", "k": "key"}, growth=[[3.0], [3.0]])
    tables["pair"] = make_table("pair", [("q", "k")], coupling=[[1.0]])
    tables["run"] = make_table("run", ["model"], loss=[[9.0]])
    known = ranges(
        growth={"component_query": (0, 2), "component_key": (0, 4)}, loss={"run": (1, 8)}
    )
    for text, fired in (
        ("a.growth > healthy_high(a.growth)", True),
        ("b.growth > healthy_high(b.growth)", False),
        ("a.growth > healthy_high(b.growth)", False),
        ("loss > healthy_high(loss)", True),
        ("loss < healthy_low(loss)", False),
    ):
        found = evaluate([make_rule(text, scope="pair")], tables, known)
        assert bool(found.findings) is fired, text
        assert not found.unknown


def test_in_a_sequence_each_stage_has_the_range_of_its_component_s_kind():
    tables = components(
        *("p", "q"), kinds={"p": "query", "q": "head"}, growth=[[0, 3, 3, 3], [0, 0, 0, 9]]
    )
    tables["pair"] = make_table("pair", [("q", "p")], coupling=[[1, 1, 1, 1]])
    stage = "growth > healthy_high(growth)"
    rule = make_rule(("a", stage), ("a,b", "coupling > 0.5"), ("b", stage), scope="pair")
    known = ranges(growth={"component_query": (0, 2), "component_head": (0, 8)})
    (finding,) = evaluate([rule], tables, known).findings
    assert (finding.component, finding.other) == ("p", "q")
    assert [e.threshold for e in finding.evidence] == [2.0, 0.5, 8.0]
    other_way = ranges(growth={"component_query": (0, 8), "component_head": (0, 2)})
    assert evaluate([rule], tables, other_way).findings == ()


def test_a_value_within_the_error_of_the_end_is_not_beyond_it():
    kinds = {"a": "query"}
    tables = components("a", kinds=kinds, ratio=[[5.0]])
    rule = make_rule("ratio > healthy_high(ratio)")
    for upper, fired in ((4.5, True), (5.5, False)):
        end = Range(100, (0.0, 0.0, 0.0), (4.0, 3.0, upper))
        known = Ranges(runs=100, features={"ratio": {"component.query": end}})
        found = evaluate([rule], tables, known)
        assert bool(found.findings) is fired
        assert bool(found.unknown) is not fired


# Speed


@pytest.mark.alone
def test_thirty_rules_on_forty_components_are_fast():
    generator = np.random.default_rng(0)
    shape = (40, 60)
    value = generator.random(shape)
    names = [f"c{i}" for i in range(40)]
    tables = components(
        *names,
        ratio=Column(value, value - 0.01, value + 0.01),
        growth=generator.random(shape),
        kinds=dict.fromkeys(names, "query"),
    )
    tables["run"] = make_table("run", ["model"], loss=generator.random((1, 60)))
    text = "ratio > 2 and growth < 0.5 * loss or log(growth) > 1 and kind in ('query', 'key')"
    rules = [make_rule(text, name=f"r{i}", hold=3) for i in range(30)]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        found = evaluate(rules, tables)
        seconds.append(time.perf_counter() - start)
    assert len(found.checked) == 30
    assert min(seconds) < 0.1  # measured: 2 ms on one core
