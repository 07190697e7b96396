"""Rules are held to their own examples, and no condition of theirs may be decoration."""

from __future__ import annotations

from pathlib import Path

import pytest

from diagnoser.rules import check_directory
from diagnoser.table import Feature

CATALOGUE = {
    feature.name: feature
    for feature in (
        Feature("slow", "run", "a flag", low=0.0, high=1.0),
        Feature("first_gradient_ratio", "run", "a ratio", low=0.0),
        Feature("first_gradient_norm", "run", "a norm", low=0.0),
        Feature("ratio", "component", "a ratio", low=0.0),
        Feature("coupling", "pair", "a coupling", low=0.0),
    )
}

HEAD = """\
title: A rule
status: stable
description: Detects something.
fault: {fault}
severity: medium
message: "{{component}}"
causes: [initialization]
falsepositives: [none known]
"""

VANISHING = """\
scope: run
when: first_gradient_ratio < 1.0e-3 and first_gradient_norm < 1.0e-4 and slow
tests:
  - name: fades
    series: {first_gradient_ratio: [1.0e-4], first_gradient_norm: [1.0e-5], slow: [1]}
    fires: true
  - name: as large as in the last layer
    series: {first_gradient_ratio: [1.0e-2], first_gradient_norm: [1.0e-5], slow: [1]}
    fires: false
  - name: large enough to learn from
    series: {first_gradient_ratio: [1.0e-4], first_gradient_norm: [1.0e-3], slow: [1]}
    fires: false
  - name: learns all the same
    series: {first_gradient_ratio: [1.0e-4], first_gradient_norm: [1.0e-5], slow: [0]}
    fires: false
"""

CASCADE = """\
scope: pair
kind: sequence
within: 3
stages:
  - {on: a, when: ratio > 1 and kind == 'query'}
  - {on: "a,b", when: coupling > 0.5}
  - {on: b, when: ratio > 1}
tests:
  - name: spreads
    series: {a.ratio: [0, 2, 2], coupling: [1, 1, 1], b.ratio: [0, 0, 2]}
    kind: {a: query, b: value}
    fires: true
  - name: starts elsewhere
    series: {a.ratio: [0, 2, 2], coupling: [1, 1, 1], b.ratio: [0, 0, 2]}
    kind: {a: key, b: value}
    fires: false
  - name: is not coupled
    series: {a.ratio: [0, 2, 2], coupling: [0, 0, 0], b.ratio: [0, 0, 2]}
    kind: {a: query, b: value}
    fires: false
  - name: does not arrive
    series: {a.ratio: [0, 2, 2], coupling: [1, 1, 1], b.ratio: [0, 0, 0]}
    kind: {a: query, b: value}
    fires: false
  - name: has no origin
    series: {a.ratio: [0, 0, 0], coupling: [1, 1, 1], b.ratio: [0, 0, 2]}
    kind: {a: query, b: value}
    fires: false
"""


BEYOND = """\
scope: component
when: ratio > healthy_high(ratio) or ratio < healthy_low(ratio)
tests:
  - name: above
    series: {ratio: [5]}
    healthy: {ratio: [1, 4]}
    kind: query
    fires: true
  - name: below
    series: {ratio: [0.5]}
    healthy: {ratio: [1, 4]}
    fires: true
  - name: inside
    series: {ratio: [2]}
    healthy: {ratio: [1, 4]}
    fires: false
"""

SPREADS_BEYOND = """\
scope: pair
kind: sequence
within: 3
stages:
  - {on: a, when: ratio > healthy_high(ratio)}
  - {on: b, when: ratio > healthy_high(ratio)}
tests:
  - name: spreads
    series: {a.ratio: [0, 2, 2], b.ratio: [0, 0, 4]}
    healthy: {a.ratio: [0, 1], b.ratio: [0, 3]}
    kind: {a: query, b: value}
    fires: true
  - name: is nothing special in a
    series: {a.ratio: [0, 2, 2], b.ratio: [0, 0, 4]}
    healthy: {a.ratio: [0, 3], b.ratio: [0, 3]}
    fires: false
  - name: is nothing special in b
    series: {a.ratio: [0, 2, 2], b.ratio: [0, 0, 2]}
    healthy: {a.ratio: [0, 1], b.ratio: [0, 3]}
    kind: {a: query, b: value}
    fires: false
"""


def problems(directory: Path, body: str, fault: str = "vanishing_gradient") -> list[str]:
    family = directory / "family"
    family.mkdir(exist_ok=True)
    (family / "a-rule.yaml").write_text(HEAD.format(fault=fault) + body)
    return check_directory(directory, CATALOGUE)


def without(body: str, name: str) -> str:
    """Returns the body without one of its examples."""
    before, found, after = body.partition(f"  - name: {name}\n")
    assert found
    _, following, rest = after.partition("  - name: ")
    return before + following + rest


@pytest.mark.parametrize("body", [VANISHING, CASCADE, BEYOND, SPREADS_BEYOND])
def test_a_rule_whose_examples_need_every_condition_has_no_problem(tmp_path, body):
    assert problems(tmp_path, body) == []


@pytest.mark.parametrize(
    ("body", "example", "condition", "value"),
    [
        (VANISHING, "as large as in the last layer", "first_gradient_ratio < 0.001", "true"),
        (VANISHING, "large enough to learn from", "first_gradient_norm < 0.0001", "true"),
        (VANISHING, "learns all the same", "slow", "true"),
        (CASCADE, "starts elsewhere", "a.kind in (query)", "true"),
        (CASCADE, "is not coupled", "coupling > 0.5", "true"),
        (BEYOND, "below", "ratio < healthy_low(ratio)", "false"),
    ],
)
def test_a_condition_that_no_example_needs_is_decoration(tmp_path, body, example, condition, value):
    (problem,) = problems(tmp_path, without(body, example))
    assert f"'{condition}' is decoration: no example changes if it is always {value}" in problem


def test_an_alternative_that_no_example_takes_is_decoration(tmp_path):
    body = VANISHING.replace("and slow", "and (slow or first_gradient_norm < 1.0e-9)")
    (problem,) = problems(tmp_path, body)
    assert "'first_gradient_norm < 1e-09' is decoration" in problem
    assert problem.endswith("always false; add one that does")


def test_an_example_that_comes_out_wrong_is_named_with_its_line(tmp_path):
    (problem,) = problems(tmp_path, VANISHING.replace("[1.0e-4], f", "[1.0e-2], f", 1))
    path = tmp_path / "family" / "a-rule.yaml"
    assert problem == f"{path}:12: example 'fades' must fire but does not"
    (problem,) = problems(tmp_path, VANISHING.replace("slow: [0]", "slow: [1]"))
    assert problem.endswith("example 'learns all the same' must not fire but does")


def test_an_unmeasured_example_does_not_fire(tmp_path):
    (problem,) = problems(tmp_path, VANISHING.replace("slow: [1]", "slow: [null]", 1))
    assert "'fades' must fire but does not" in problem


def test_an_example_knows_only_the_ranges_that_it_gives(tmp_path):
    text = "    healthy: {ratio: [1, 4]}\n    kind: query\n"
    (problem,) = problems(tmp_path, BEYOND.replace(text, "    kind: query\n"))
    assert "'above' must fire but does not" in problem


def test_what_cannot_be_loaded_is_a_problem_a_line(tmp_path):
    body = VANISHING.replace("and slow", "and slwo")
    (problem,) = problems(tmp_path, body)
    assert "did you mean 'slow'?" in problem
    found = problems(tmp_path, body, fault="vanishing")
    assert len(found) == 1
    assert "unknown fault 'vanishing'" in found[0]
