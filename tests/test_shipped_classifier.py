"""What ships as learned: it follows from what is kept, fits the rules, is small."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from benchmarks.outcomes import BENCH
from benchmarks.teach import RULES, SHIPPED, from_examples
from diagnoser.benchmark.configuration import catalogue
from diagnoser.benchmark.examples import read_examples
from diagnoser.classifier import load
from diagnoser.diagnosis import default_rules
from diagnoser.rules import precision_of

MEGABYTE = 10**6


@pytest.fixture(scope="module")
def examples():
    return read_examples(BENCH)[0]


def test_it_is_small_and_learned_from_the_training_subjects_alone(examples):
    assert SHIPPED.stat().st_size < 3 * MEGABYTE
    known = catalogue().subjects
    assert {known[e.origin].split for e in examples} == {"train"}
    assert {e.origin for e in examples} == {s.name for s in known.values() if s.split == "train"}


@pytest.mark.slow
def test_learned_again_from_what_is_kept_it_predicts_the_same(examples, tmp_path: Path):
    again, shipped = from_examples(BENCH, tmp_path / "again.npz"), load(SHIPPED)
    assert again.threshold == pytest.approx(shipped.threshold, abs=1e-9)
    for example in random.Random(0).sample(examples, 40):
        one, other = again.predict(example.vectors), shipped.predict(example.vectors)
        assert one.faulty == pytest.approx(other.faulty, abs=1e-9)
        assert dict(one.causes) == pytest.approx(dict(other.causes), abs=1e-9)
        assert dict(one.components) == pytest.approx(dict(other.components), abs=1e-9)
        assert [r.column for r in one.reasons] == [r.column for r in other.reasons]


def test_the_precision_that_ships_was_counted_with_the_rules_that_ship():
    counted = set(json.loads((RULES / "precision.json").read_text())["rules"])
    assert counted and set(precision_of(default_rules())) == counted


def test_the_documents_say_how_many_runs_it_was_learned_from():
    about = load(SHIPPED).about
    for name in ("README.md", "CHANGELOG.md"):
        text = " ".join((RULES.parent / name).read_text("utf-8").split())
        assert re.search(rf"learned from {about['runs']} (watched )?runs", text), name
    assert f"{about['budget_runs']} at the default budget" in text
