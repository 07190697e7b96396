"""Rule files: what a good one becomes, and that every bad one is refused with its place."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnoser.errors import RuleError
from diagnoser.rules import load_rules, shipped_rules_directory
from diagnoser.rules.loading import load_rule
from diagnoser.rules.strict_yaml import read_document
from diagnoser.table import Feature

CATALOGUE = {
    feature.name: feature
    for feature in (
        Feature("loss", "run", "any number"),
        Feature("slow", "run", "a flag", low=0.0, high=1.0),
        Feature("update_ratio", "component", "a ratio", low=0.0),
        Feature("zero_share", "component", "a share", low=0.0, high=1.0),
        Feature("coupling", "pair", "a coupling", low=0.0),
    )
}

GOOD = """\
title: Dead component
status: stable
description: Detects a component that never moves.
references: ["UMLAUT, CHI 2021"]
fault: dead_component
scope: component
when: >
  update_ratio < 1.0e-9 and
    (slow or zero_share > 0.9)
  and kind != 'norm'
for: 3
severity: medium
message: "{component} moves by {update_ratio:.1e} a step, loss {loss}"
causes: [component_not_optimized, gradient_clipping]
repairs:
  - name: unfreeze
  - {name: scale_learning_rate, component: model, parameters: {factor: 10, how: "by hand"}}
explains: [slow_convergence]
falsepositives: [A component that is frozen on purpose.]
tests:
  - name: never moves
    series: {update_ratio: [0, null, .nan, 0], slow: [1, 1, 1, 1]}
    kind: query
    fires: true
  - name: moves, as far as one can tell
    series:
      update_ratio: {value: [0.0, 0.1], std_error: [0.5, null]}
      slow: [1, 1]
    fires: false
"""

SEQUENCE = """\
title: Cascade
status: experimental
description: Detects a disturbance that spreads.
fault: cascading_instability
scope: pair
kind: sequence
stages:
  - {on: a, when: update_ratio > 1}
  - {on: "a,b", when: coupling > 0.5}
  - {on: b, when: b.update_ratio > 1}
within: 4
severity: low
message: "from {component} to {other}"
causes: [learning_rate_too_high]
repairs: [{name: roll_back, component: other}]
falsepositives: [A step of the schedule.]
tests:
  - name: spreads
    series: {a.update_ratio: [0, 2, 2], coupling: [1, 1, 1], b.update_ratio: [0, 0, 2]}
    kind: {a: query, b: value}
    fires: true
  - name: does not
    series: {a.update_ratio: [0, 2, 2], coupling: [1, 1, 1], b.update_ratio: [0, 0, 0]}
    fires: false
"""


def written(directory: Path, text: str | bytes, name: str = "family/a-rule.yaml") -> Path:
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_rule_file_becomes_a_rule(tmp_path):
    rule = load_rule(written(tmp_path, GOOD), CATALOGUE)
    assert (rule.id, rule.family, rule.scope, rule.hold) == ("a-rule", "family", "component", 3)
    assert rule.names == ("update_ratio", "slow", "zero_share")
    assert rule.causes == ("component_not_optimized", "gradient_clipping")
    assert [(r.name, r.component, r.parameters) for r in rule.repairs] == [
        ("unfreeze", "component", {}),
        ("scale_learning_rate", "model", {"factor": 10.0, "how": "by hand"}),
    ]
    assert not rule.is_sequence
    assert not rule.ends_run
    first, second = rule.tests
    assert (first.fires, first.kinds["a"], second.kinds["a"]) == (True, "query", "other")
    assert [math.isnan(x) for x in first.columns["update_ratio"].value[0]] == [
        False,
        True,
        True,
        False,
    ]
    ratio = second.columns["update_ratio"]
    assert (ratio.lower[0, 0], ratio.value[0, 0], ratio.upper[0, 0]) == (-1.0, 0.0, 1.0)
    assert math.isnan(ratio.value[0, 1])  # an error that is not known leaves the value unknown


def test_a_sequence_becomes_stages(tmp_path):
    rule = load_rule(written(tmp_path, SEQUENCE), CATALOGUE)
    assert rule.is_sequence
    assert [(s.on, s.when.names) for s in rule.stages] == [
        ("a", ("a.update_ratio",)),
        ("a,b", ("coupling",)),
        ("b", ("b.update_ratio",)),
    ]
    assert rule.within == 4
    assert rule.tests[0].kinds == {"a": "query", "b": "value"}


def test_rules_come_by_family_and_id(tmp_path):
    for name in ("z/b.yaml", "z/a.yaml", "y/c.yaml"):
        written(tmp_path, GOOD, name)
    assert [(r.family, r.id) for r in load_rules(tmp_path, CATALOGUE)] == [
        ("y", "c"),
        ("z", "a"),
        ("z", "b"),
    ]
    assert [(r.family, r.id) for r in load_rules(tmp_path / "z", CATALOGUE)] == [
        ("z", "a"),
        ("z", "b"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "place", "says"),
    [
        ("slow or", "slwo or", "9:6", "did you mean 'slow'?"),
        ("'norm'", "'nrom'", "10:15", "did you mean 'norm'?"),
        ("zero_share > 0.9", "zero_share > 9", "9:14", "never true"),
        ("for: 3", "for: 0", "11:6", "greater than or equal to 1"),
        ("for: 3", "for: no", "11:6", "disagree about 'no'"),
        ("for: 3", "for: 1e1", "11:6", "disagree about '1e1'"),
        ("for: 3", "for: 1:30", "11:6", "disagree about '1:30'"),
        ("for: 3", "for: 0x3", "11:6", "disagree about '0x3'"),
        ("for: 3", "for: 3.0", "11:6", "valid integer"),
        ("for: 3", "fro: 3", "11:1", "did you mean 'for'?"),
        ("for: 3", "for: 3\nfor: 4", "12:1", "given twice"),
        ("for: 3", "for: 3\nwithin: 4", "12:1", "belongs to a rule of kind: sequence"),
        ("for: 3", "for: &three 3", "11:6", "anchors"),
        ("for: 3", "for: *three", "11:6", "anchors"),
        ("for: 3", "for: !!int 3", "11:6", "tags"),
        ("for: 3", "for: !!python/object/apply:os.system [true]", "11:6", "tags"),
        ("for: 3", "? [for]\n: 3", "11:3", "a key must be plain text"),
        ("severity: medium", "severity: mediun", "12:11", "did you mean 'medium'?"),
        ("fault: dead_component", "fault: dead_componant", "5:8", "'dead_component'?"),
        ("gradient_clipping]", "gradient_cliping]", "14:35", "'gradient_clipping'?"),
        ("name: unfreeze", "name: unfreez", "16:11", "'unfreeze'?"),
        ("{factor: 10", "{factor: .inf", "17:72", "finite number"),
        ("component: model", "component: other", "17:5", "only a pair rule"),
        ("explains: [slow", "explains: [slwo", "18:12", "did you mean"),
        ("Detects a", "Finds a", "3:14", 'starts with "Detects"'),
        ("{loss}", "{los}", "13:10", "did you mean 'loss'?"),
        ("{loss}", "{other}", "13:10", "unknown feature 'other'"),
        ("{loss}", "{loss:>99999999}", "13:10", "format such as .2g"),
        ("{loss}", "{loss.__class__}", "13:10", "prefixes"),
        ("{loss}", "{loss", "13:10", "expected '}'"),
        ("{loss}", "{}", "13:10", "names nothing"),
        ("status: stable", "status: experimental", "12:11", "has severity: low"),
        ("falsepositives: [A component that is frozen on purpose.]", "", "1:1", "is missing"),
        ("fires: true", "fires: false", "20:1", "no example on which the rule must fire"),
        ("fires: false", "fires: true", "20:1", "no example on which the rule must not fire"),
        ("slow: [1, 1, 1, 1]", "slow: [1, 1]", "22:54", "has not 4 values"),
        ("slow: [1, 1, 1, 1]", "slow: [1, 1, 2, 1]", "22:54", "slow lies in [0, 1]"),
        ("slow: [1, 1, 1, 1]", "slwo: [1, 1, 1, 1]", "22:48", "did you mean 'slow'?"),
        ("slow: [1, 1, 1, 1]", "coupling: [1, 1, 1, 1]", "22:48", "cannot be seen"),
        ("    kind: query", "    kind: qery", "23:11", "did you mean 'query'?"),
        ("when: >", "when: >\n\n", "11:1", ""),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path, old, new, place, says):
    assert old in GOOD
    path = written(tmp_path, GOOD.replace(old, new, 1))
    if not says:  # the control: white space that moves nothing out of place
        assert load_rule(path, CATALOGUE).names == ("update_ratio", "slow", "zero_share")
        return
    with pytest.raises(RuleError) as caught:
        load_rule(path, CATALOGUE)
    assert str(caught.value).startswith(f"{path}:{place}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


RANGED = GOOD.replace("update_ratio < 1.0e-9", "update_ratio < healthy_low(update_ratio)").replace(
    "    kind: query", "    healthy: {update_ratio: [1.0e-3, 2]}\n    kind: query"
)


def test_an_example_has_its_own_healthy_ranges(tmp_path):
    first, second = load_rule(written(tmp_path, RANGED), CATALOGUE).tests
    assert first.healthy == {"update_ratio": (1e-3, 2.0)}
    assert second.healthy == {}


@pytest.mark.parametrize(
    ("new", "place", "says"),
    [
        ("update_ratio: [3, 2]", "23:29", "the low end comes first"),
        ("update_ratio: [-1, 2]", "23:29", "update_ratio lies in [0, inf]"),
        ("update_ratio: [1]", "23:29", "at least 2 items"),
        ("update_ratio: [1, 2, 3]", "23:29", "at most 2 items"),
        ("update_ratio: [1, .inf]", "23:33", "finite number"),
        ("update_ratio: [null, 2]", "23:30", "valid number"),
        ("update_ratio: [true, 2]", "23:30", "valid number"),
        ("zero_share: [0, 1]", "23:15", "no healthy_low or healthy_high of it"),
        ("updat_ratio: [1, 2]", "23:15", "did you mean 'update_ratio'?"),
        ("a.update_ratio: [1, 2]", "23:15", "no healthy_low or healthy_high of it"),
    ],
)
def test_mistakes_in_healthy_ranges_are_named_with_their_place(tmp_path, new, place, says):
    path = written(tmp_path, RANGED.replace("update_ratio: [1.0e-3, 2]", new))
    with pytest.raises(RuleError) as caught:
        load_rule(path, CATALOGUE)
    assert str(caught.value).startswith(f"{path}:{place}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["kind: {a: query, b: value}", "kind: query"])
def test_components_of_one_kind_have_one_range(tmp_path, kind):
    text = SEQUENCE.replace("update_ratio > 1}", "update_ratio > healthy_high(update_ratio)}")
    ends = "healthy: {a.update_ratio: [0, 1], b.update_ratio: [0, 1.5]}"
    path = written(tmp_path, text.replace("kind: {a: query, b: value}", f"{ends}\n    {kind}"))
    if "value" in kind:
        example = load_rule(path, CATALOGUE).tests[0]
        assert example.healthy == {"a.update_ratio": (0.0, 1.0), "b.update_ratio": (0.0, 1.5)}
        return
    with pytest.raises(RuleError, match="of one kind, 'query', and so have one range"):
        load_rule(path, CATALOGUE)


def test_an_error_that_quotes_the_file_stays_one_line(tmp_path):
    text = GOOD.replace('"{component} moves', '"{los\\ns} moves')
    with pytest.raises(RuleError, match="unknown feature 'los s'") as caught:
        load_rule(written(tmp_path, text), CATALOGUE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("within: 4\n", "", "key 'within' is missing"),
        ("within: 4\n", "within: 4\nfor: 2\n", "no 'for'"),
        ("on: a,", "on: c,", "must be 'a', 'b' or 'a,b'"),
        ("{on: a, when: update", "{on: 'a,b', when: a.update", "starts on one component"),
        ("b.update_ratio > 1}", "a.update_ratio > 1}", "on 'b' and cannot see 'a.update_ratio'"),
        ("update_ratio > 1}", "coupling > 1}", "cannot be seen from a stage on 'a'"),
        ("scope: pair", "scope: run", "a sequence has scope: pair"),
    ],
)
def test_mistakes_in_sequences(tmp_path, old, new, says):
    with pytest.raises(RuleError, match=r"yaml:\d+:\d+: ") as caught:
        load_rule(written(tmp_path, SEQUENCE.replace(old, new, 1)), CATALOGUE)
    assert says in str(caught.value)


def test_notes_show_the_line_with_a_caret(tmp_path):
    with pytest.raises(RuleError) as caught:
        load_rule(written(tmp_path, GOOD.replace("slow or", "slwo or")), CATALOGUE)
    assert caught.value.__notes__ == [
        "        (slwo or zero_share > 0.9)\n" + " " * 9 + "^",
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"title: \xff\xfe", ":1:8: not UTF-8"),
        (b"#" * 70_000, "larger than 64 KiB"),
        (b"", ":1:1: the file is empty"),
        (b"- a\n- b\n", ":1:1: the top of the file"),
        (b"title: a\n---\ntitle: b\n", ":2:1: a second document"),
        (b"%YAML 1.1\n---\ntitle: a\n", "a directive"),
        (b"title: [a\n", "not YAML"),
        (b"title: a\x00b\n", "not YAML"),
        (b"title: a: b\n", ":1:9: not YAML"),
        (b"a: &x [q]\nb: [*x, *x]\n", ":1:4: anchors"),
        (b"[" * 60_000, "nested too deeply"),
        (b"{a: " * 15_000, "nested too deeply"),
        (b"- " * 30_000, "nested too deeply"),
        (b"<<: {title: a}\n", "unknown key '<<'"),
        (b"title: " + b"9" * 60_000, "at most 4000"),
    ],
    ids=range(15),
)
def test_hostile_files_are_refused_at_once(tmp_path, content, says):
    path = written(tmp_path, content)
    start = time.perf_counter()
    with pytest.raises(RuleError) as caught:
        load_rule(path, CATALOGUE)
    assert time.perf_counter() - start < 1.0
    assert says in str(caught.value)
    assert all(len(line) < 600 for line in str(caught.value).splitlines())


def test_a_long_name_is_quoted_in_part(tmp_path):
    path = written(tmp_path, GOOD.replace("slow or", f"slow{'w' * 1900} or"))
    with pytest.raises(RuleError, match="unknown feature 'sloww") as caught:
        load_rule(path, CATALOGUE)
    assert len(str(caught.value)) < 1000 + len(str(path)) + 20


def test_all_problems_of_a_directory_are_reported_together(tmp_path):
    written(tmp_path, GOOD, "f/good.yaml")
    written(tmp_path, GOOD.replace("for: 3", "for: 0").replace("stable", "stabel"), "f/two.yaml")
    written(tmp_path, GOOD.replace("slow or", "slwo or"), "f/one.yaml")
    written(tmp_path, GOOD, "f/Bad_Name.yaml")
    written(tmp_path, GOOD, "g/good.yaml")
    written(tmp_path, GOOD, "g/other.yml")
    with pytest.raises(RuleError) as caught:
        load_rules(tmp_path, CATALOGUE)
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert all(line.startswith(str(tmp_path)) for line in lines)
    for word in ("stabel", "equal to 1", "slwo", "file's name", "same id", "ends in .yaml"):
        assert sum(word in line for line in lines) == 1


def test_a_directory_without_rules_is_an_error(tmp_path):
    with pytest.raises(RuleError, match="holds no rule file"):
        load_rules(tmp_path, CATALOGUE)
    with pytest.raises(RuleError, match="not a directory"):
        load_rules(tmp_path / "nowhere", CATALOGUE)


def test_shipped_families_are_found():
    assert shipped_rules_directory("autotrainer").is_dir()
    with pytest.raises(RuleError, match=r"no family 'autotraner'.*autotrainer"):
        shipped_rules_directory("autotraner")


def test_numbers_and_words_are_read_as_yaml_says(tmp_path):
    text = "a: [1, -2, 0.5, 1.0e-3, -.inf, true, false, null, '1e-3', \"no\", 1 < x, a b]\non: x\n"
    document = read_document(written(tmp_path, text))
    assert document.data["a"] == yaml.safe_load(text)["a"]
    assert document.data["on"] == "x"  # a key is text, never true


PIECES = st.sampled_from(
    [
        "title: x\n",
        "  ",
        "\n",
        "- ",
        "&a ",
        "*a",
        "!!int ",
        "[",
        "]",
        "{",
        "}",
        ": ",
        "'",
        '"',
        "no",
        "1e-3",
        "|\n",
        ">-\n",
        "? ",
        "#",
        "---\n",
        "\t",
        "é",
        "\x07",
        "loss",
        ".nan",
        "%",
        "9" * 30,
    ]
)


@settings(max_examples=150, deadline=1000)
@given(st.lists(st.tuples(st.integers(0, len(GOOD)), st.integers(0, 9), PIECES), max_size=4))
def test_a_damaged_file_is_a_rule_or_an_error_with_its_place(tmp_path_factory, cuts):
    text = GOOD
    for start, length, piece in cuts:
        text = text[:start] + piece + text[start + length :]
    path = written(tmp_path_factory.getbasetemp(), text, "fuzzed/rule.yaml")
    try:
        load_rule(path, CATALOGUE)
    except RuleError as error:
        assert all(line.startswith(f"{path}:") for line in str(error).splitlines())


@settings(max_examples=100, deadline=1000)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(tmp_path_factory, content):
    path = written(tmp_path_factory.getbasetemp(), content, "fuzzed/rule.yaml")
    with pytest.raises(RuleError):
        load_rule(path, CATALOGUE)


@pytest.mark.parametrize("name", ["loss{}", "x{}.loss", "b.{}", "known_{}(loss)"])
def test_a_name_without_end_makes_no_error_without_end(tmp_path, name):
    path = written(tmp_path, GOOD.replace("update_ratio < ", f"{name.format('a' * 5000)} < "))
    with pytest.raises(RuleError) as caught:
        load_rule(path, CATALOGUE)
    assert len(str(caught.value)) < len(str(path)) + 300
    assert "\n" not in str(caught.value)
