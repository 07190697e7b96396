"""The committed repairs: whole, paired, and of the trainings they say."""

from __future__ import annotations

import json

import pytest

from benchmarks import repair, repair_han
from benchmarks.forked import rows_of
from benchmarks.subject_harm import SUMMARY
from diagnoser.cases import load_case

ROWS = rows_of(repair_han.RESULTS)
ACCURACY = {
    arm: {row["seed"]: row["accuracy"] for row in ROWS if row["arm"] == arm}
    for arm in repair_han.ARMS
}


def test_every_seed_is_there_once_with_all_arms():
    assert len({(row["arm"], row["seed"]) for row in ROWS}) == len(ROWS)
    for arm, runs in ACCURACY.items():
        assert sorted(runs) == list(repair_han.SEEDS), arm


def test_the_fault_does_harm_in_every_pair_and_the_twins_are_as_the_case_says():
    metric = load_case("han").metric
    for seed, healthy in ACCURACY["healthy"].items():
        assert ACCURACY["nothing"][seed] < healthy - 2 * metric.within
    mean = sum(ACCURACY["healthy"].values()) / len(ACCURACY["healthy"])
    assert mean == pytest.approx(metric.healthy, abs=0.01)


@pytest.mark.parametrize("arm", ["paper", "diagnoser"])
def test_what_nobody_repaired_is_the_faulty_run_itself(arm):
    for row in ROWS:
        if row["arm"] == arm and not row["kept"]:
            assert row["accuracy"] == ACCURACY["nothing"][row["seed"]]


def test_what_is_kept_was_tried_and_has_its_numbers():
    for row in ROWS:
        if row["arm"] == "diagnoser":
            assert len(row["kept"]) <= row["attempts"]
            assert all(kept["actions"] and "%" in kept["reason"] for kept in row["kept"])
            assert set(row["before"]) == set(row["after"])


def test_the_new_start_is_of_a_mistake_whose_harm_is_proven():
    summary = json.loads(SUMMARY.read_text("utf-8"))["case:han"]["faults"]
    assert summary["batches-by-class"]["harm"] == "proven"


# -- mistakes of the fault benchmark --------------------------------------------------------------

ALL = rows_of(repair.RESULTS)
RUNS = [row for row in ALL if row["arm"] not in repair.UNWATCHED]


def test_every_run_is_there_once_and_none_failed():
    keys = [repair.key(row) for row in RUNS]
    tasks = repair.wanted(repair.CASES, repair.HEALTHY, tuple(repair.ARMS), repair.SEEDS)
    assert sorted(keys) == sorted(repair.key(repair.head(*task)) for task in tasks)
    assert [row for row in ALL if row.get("problem") or row.get("failures")] == []


def test_what_ran_on_another_processor_has_twins_that_ran_there():
    first = {row.get("processor") for row in RUNS if row["arm"] == "diagnoser"}
    later = [row for row in RUNS if row.get("processor") not in first]
    for arm in repair.UNWATCHED if later else ():
        twins = {(*repair.key(r)[:5], r["seed"]): r["processor"] for r in ALL if r["arm"] == arm}
        for row in later:
            assert twins[(*repair.key(row)[:5], row["seed"])] == row["processor"]


def test_there_are_as_many_mistakes_seeds_and_healthy_runs_as_the_document_says():
    assert len({case.operator for case in repair.CASES}) >= 16
    assert len(repair.SEEDS) >= 10
    assert sum(not row["operator"] for row in RUNS) >= 100


def test_what_nobody_repaired_is_one_training_whoever_watched_it():
    """Bit for bit on one processor: to look, to try and to put back changes nothing."""
    scores: dict[tuple[object, ...], set[str]] = {}
    for row in ALL:
        kept = any(attempt["kept"] for attempt in row.get("attempts", ()))
        if not kept and row["arm"] != "healthy":
            training = (*repair.key(row)[:5], row["seed"], row.get("processor"))
            scores.setdefault(training, set()).add(repr((row["score"], row["loss"])))
    assert len(scores) > len(repair.HEALTHY)
    assert {training: found for training, found in scores.items() if len(found) > 1} == {}


def test_an_arm_does_what_it_is_called_after():
    names = {"third": ["scale_learning_rate"], "paper": ["scale_learning_rate"]}
    for row in RUNS:
        for attempt in row["attempts"]:
            if row["arm"] in names:
                assert [name for name, _, _ in attempt["actions"]] == names[row["arm"]]
            if row["arm"] == "third":
                assert attempt["actions"][0][1] == "model"
    assert {row["arm"] for row in RUNS} == set(repair.ARMS)
    assert {row["arm"] for row in RUNS if row["attempts"]} >= {*names, "random", "diagnoser"}
