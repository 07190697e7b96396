"""Proof of harm: the statistics against exact oracles, the committed summary against the runs."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.subject_harm import (
    CASES,
    FIRST_SEED,
    SUMMARY,
    Run,
    Subject,
    cohen_d,
    holm,
    read_runs,
    read_subjects,
    sign_flip_p,
    summarise,
)

HEALTHY = [0.90, 0.92, 0.91, 0.89, 0.90, 0.91, 0.92, 0.90]  # margin: 2 standard deviations, 0.021


def summary_of(*faults):
    """Summarises a made-up subject whose faults take the given accuracies from the healthy runs."""
    names = ["none", *(f"fault{number}" for number in range(len(faults)))]
    subject = Subject("made-up", Path("train.py"), {name: {} for name in names}, "0")
    losses = [[0.0] * len(HEALTHY), *faults]
    runs = [
        Run("made-up", name, seed, "0", HEALTHY[seed] - loss, 1.0)
        for name, row in zip(names, losses, strict=True)
        for seed, loss in enumerate(row)
    ]
    return summarise(subject, runs)["faults"]


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=7))
def test_sign_flip_counts_every_pattern(differences):
    patterns = itertools.product([1, -1], repeat=len(differences))
    at_least = [np.dot(signs, differences) >= sum(differences) for signs in patterns]
    assert sign_flip_p(np.array(differences, dtype=float)) == np.mean(at_least)


@pytest.mark.parametrize("pairs", [6, 8, 12])
def test_the_smallest_p_is_one_pattern(pairs):
    assert sign_flip_p(np.linspace(0.1, 0.2, pairs)) == 2.0**-pairs
    assert sign_flip_p(-np.linspace(0.1, 0.2, pairs)) == 1.0


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), min_size=1))
def test_holm_lies_between_no_correction_and_bonferroni_and_keeps_the_order(p_values):
    adjusted = holm(p_values)
    assert adjusted.keys() == p_values.keys()
    for name, p in p_values.items():
        assert p <= adjusted[name] <= 1
        assert adjusted[name] >= min(1, p * sum(p <= other for other in p_values.values()))
    smallest = min(p_values, key=p_values.get)
    assert adjusted[smallest] == min(1, len(p_values) * p_values[smallest])
    order = sorted(p_values, key=p_values.get)
    assert [adjusted[name] for name in order] == sorted(adjusted.values())


def test_cohen_d():
    assert cohen_d([1.0, 3.0], [0.0, 2.0]) == pytest.approx(1 / 2**0.5)
    assert cohen_d([1.0, 1.0], [0.5, 0.5]) == float("inf")
    assert cohen_d([1.0, 1.0], [1.0, 1.0]) == 0


def test_harm_has_three_verdicts():
    heavy = [0.3 + 0.01 * seed for seed in range(8)]
    nothing = [0.001, -0.001] * 4
    uneven = [0.2, -0.1] * 4
    slight = [0.015] * 8  # certain, but inside the spread of healthy runs
    judged = summary_of(heavy, nothing, uneven, slight)
    harms = [judged[f"fault{number}"]["harm"] for number in range(4)]
    assert harms == ["proven", "equivalent", "ambiguous", "ambiguous"]


def test_too_few_pairs_for_the_number_of_faults_prove_nothing():
    heavy = [0.3 + 0.01 * seed for seed in range(8)]
    assert summary_of(*[heavy] * 12)["fault0"]["harm"] == "proven"  # 12 / 256 < 0.05
    assert summary_of(*[heavy] * 13)["fault0"]["harm"] == "ambiguous"  # 13 / 256 > 0.05


def test_the_committed_summary_is_what_the_committed_runs_say():
    subjects = read_subjects()
    summary = json.loads(SUMMARY.read_text())
    pairs = {name: entry["healthy"]["runs"] for name, entry in summary.items()}
    assert pairs.keys() == {subject.name for subject in subjects}
    for subject in subjects:
        seeds = range(FIRST_SEED, FIRST_SEED + pairs[subject.name])
        assert summarise(subject, read_runs(subjects, seeds).values()) == summary[subject.name]
        assert all(fault["runs"] >= 8 for fault in summary[subject.name]["faults"].values())


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.parent.name)
def test_the_case_file_states_what_was_measured(path):
    case = yaml.safe_load(path.read_text())
    measured = json.loads(SUMMARY.read_text())[f"case:{case['name']}"]
    assert case["metric"]["healthy"] == pytest.approx(measured["healthy"]["mean"], abs=0.005)
    assert measured["healthy"]["min"] >= case["metric"]["healthy"] - case["metric"]["within"]
    for fault in case["faults"]:
        assert fault["harm"] == measured["faults"][fault["name"]]["harm"]
