"""Checks a directory of rules by the examples in them.

Each example must come out as it says. And no condition may be decoration: with any single one
forced to be always true, or always false, some example must come out differently; else the rule
would pass its examples without it, and nothing shows that it is right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from diagnoser.errors import RuleError
from diagnoser.rules.engine import fires
from diagnoser.rules.interval import FALSE, TRUE
from diagnoser.rules.loading import load_rules
from diagnoser.rules.ranges import Range, Ranges, range_key
from diagnoser.rules.rule import Example, Rule
from diagnoser.rules.view import Subject, Tables
from diagnoser.table import Catalogue, Column, Scope, Table
from diagnoser.vocabulary import MODEL

_SUBJECTS: Final[dict[Scope, tuple[Subject, ...]]] = {
    "run": ((MODEL, None),),
    "component": (("a", None), ("b", None)),
    "pair": (("a", "b"),),
}


def check_directory(path: Path, catalogue: Catalogue) -> list[str]:
    """Loads the rules of a directory and runs their examples.

    Returns:
        One line for each problem; none means that every rule does what it says.
    """
    try:
        rules = load_rules(path, catalogue)
    except RuleError as error:
        return str(error).splitlines()
    return [problem for rule in rules for problem in check_rule(rule, catalogue)]


def check_rule(rule: Rule, catalogue: Catalogue) -> list[str]:
    """Runs the examples of one rule; returns one line for each problem."""
    given = [
        (example, example_tables(rule, example, catalogue), example_ranges(example, catalogue))
        for example in rule.tests
    ]
    problems = []
    for example, tables, ranges in given:
        if fires(rule, tables, ranges=ranges) is not example.fires:
            wanted = "must fire but does not" if example.fires else "must not fire but does"
            problems.append(f"{rule.path}:{example.line}: example '{example.name}' {wanted}")
    if problems:
        return problems  # what a condition contributes shows only where the examples are right
    for i, stage in enumerate(rule.stages):
        for j, condition in enumerate(stage.when.conditions):
            for value, word in ((TRUE, "true"), (FALSE, "false")):
                forced = {(i, j): value}
                if all(
                    fires(rule, tables, forced, ranges) is example.fires
                    for example, tables, ranges in given
                ):
                    problems.append(
                        f"{rule.path}: comparison '{condition}' is decoration: no example changes "
                        f"if it is always {word}; add one that does"
                    )
    return problems


def example_tables(rule: Rule, example: Example, catalogue: Catalogue) -> Tables:
    """Returns an example's series as the tables of a run with a component, or a pair of them."""
    steps = np.arange(next(iter(example.columns.values())).value.shape[1])
    columns: dict[Scope, dict[str, Column]] = {"run": {}, "component": {}, "pair": {}}
    for name, column in example.columns.items():
        prefix, _, feature = name.rpartition(".")
        scope = catalogue[feature].scope
        both = columns[scope].get(feature)
        columns[scope][feature] = _put(both, column, "ab".index(prefix)) if prefix else column
    subjects = dict(_SUBJECTS)
    if rule.scope != "pair":
        subjects["component"] = subjects["component"][:1]
    return {
        scope: Table(scope, steps, subjects[scope], columns[scope], example.kinds)
        for scope in subjects
    }


def example_ranges(example: Example, catalogue: Catalogue) -> Ranges:
    """Returns an example's healthy ranges, exact, and none beside them."""
    features: dict[str, dict[str, Range]] = {}
    for name, (low, high) in example.healthy.items():
        prefix, _, feature = name.rpartition(".")
        scope = catalogue[feature].scope
        sides = {"run": "", "component": prefix or "a", "pair": "ab"}[scope]
        key = range_key(scope, [example.kinds[side] for side in sides])
        assert key is not None  # an example's components have a kind, given or "other"
        features.setdefault(feature, {})[key] = Range(1, (low, low, low), (high, high, high))
    return Ranges(runs=1, features=features)


def _put(both: Column | None, column: Column, row: int) -> Column:
    """Returns the columns of a and b, unknown until put, with one of them put in its row."""
    blank = np.full((2, column.value.shape[1]), np.nan)
    value, lower, upper = (
        (both.value.copy(), both.lower.copy(), both.upper.copy())
        if both
        else (blank, blank.copy(), blank.copy())
    )
    value[row], lower[row], upper[row] = column.value[0], column.lower[0], column.upper[0]
    return Column(value, lower, upper)
