"""Counts of how often rules were right: they belong to what a rule said when it was counted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from diagnoser.diagnosis import default_rules
from diagnoser.errors import RuleError
from diagnoser.rules import Precision, precision, precision_of, save_precision
from diagnoser.rules.ranges import Range, Ranges

RULES = default_rules()
SPIKE = RULES[0]
COUNTED = Precision(n=9, faulty=8, causes=dict.fromkeys(SPIKE.causes, 7))


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "precision.json"
    save_precision(path, RULES, {SPIKE.id: COUNTED}, runs=100)
    return path


def test_what_was_counted_is_read_again(table):
    assert precision_of(RULES, table) == {SPIKE.id: COUNTED}


@pytest.mark.parametrize("change", [{"hold": 17}, {"causes": ("data_order",)}, {"scope": "pair"}])
def test_a_rule_that_was_changed_since_has_no_precision(table, change):
    assert precision_of([replace(SPIKE, **change)], table) == {}


@pytest.mark.parametrize("change", [{"title": "Another title"}, {"falsepositives": ("some",)}])
def test_words_around_a_rule_change_nothing(table, change):
    assert precision_of([replace(SPIKE, **change)], table) == {SPIKE.id: COUNTED}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda text: text[:-9], "cannot be read"),
        (lambda text: text.replace("precision/1", "precision/9"), "schema diagnoser.precision/9"),
        (lambda text: text.replace('"faulty": 8', '"faulty": 88'), "more often than it fired"),
        (lambda text: text.replace('"faulty": 8', '"faulty": "8"'), "cannot be read"),
        (lambda text: json.dumps([text]), "cannot be read"),
    ],
)
def test_a_damaged_table_is_named_with_what_makes_it_anew(table, spoil, says):
    table.write_text(spoil(table.read_text()))
    with pytest.raises(RuleError, match="benchmarks.teach") as refused:
        precision_of(RULES, table)
    assert str(table) in str(refused.value) and says in str(refused.value)


def test_other_healthy_ranges_make_a_count_void(table, monkeypatch):
    (asks,) = [rule for rule in RULES if rule.id == "concave-region"]
    save_precision(table, [asks, SPIKE], {asks.id: COUNTED, SPIKE.id: COUNTED}, runs=100)
    learned = {"negative_curvature_ratio": {"component.query": Range(9, (0, 0, 0), (2, 2, 2))}}
    monkeypatch.setattr(precision, "shipped_ranges", lambda: Ranges(runs=9, features=learned))
    assert set(precision_of([asks, SPIKE], table)) == {SPIKE.id}


def test_every_count_that_ships_is_of_a_rule_that_ships():
    shipped = json.loads((SPIKE.path.parent.parent / "precision.json").read_text())
    assert set(shipped["rules"]) == set(precision_of(RULES))
