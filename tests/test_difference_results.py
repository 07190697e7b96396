"""How `diagnoser diff` is scored: which runs are paired, and what is kept of it."""

from __future__ import annotations

import json

from made_recordings import made_recording

from benchmarks.difference import (
    BOUNDS,
    CHANGED,
    DEV,
    FAULTY,
    KINDS,
    MODES,
    RESEEDED,
    RESULTS,
    SAME,
    TRAIN,
    judged,
    pairs,
)
from diagnoser.benchmark.dataset import Truth
from diagnoser.difference import SPREADS

PARTS = {name: ("feed_forward", name, 50) for name in ("a", "b")}


def truth(digest: str, role: str, harm: str = "", *components: str) -> Truth:
    return Truth(
        digest, "han", "dev", "a", role, ("O1",) if role == "fault" else (), "high", harm, False,
        False, (), (), components, "0",
    )  # fmt: skip


def recording(**gradients: float):
    series = {"gradient_norm": {name: [gradients.get(name, 1.0)] * 9 for name in PARTS}}
    return made_recording(PARTS, series)


KNOWN = {
    "clean": (truth("clean", "clean"), "clean"),
    "other": (truth("other", "HC2", "equivalent"), "clean"),
    "fault": (truth("fault", "fault", "proven", "b"), "clean"),
}
RUNS = {
    "clean": {seed: recording() for seed in range(12)},
    "other": {seed: recording() for seed in range(3)},
    "fault": {seed: recording(b=500.0) for seed in range(3)},
    "unknown": {0: recording()},
}


def test_healthy_runs_are_paired_with_other_seeds_and_faulty_ones_with_their_twins_too():
    found = list(pairs(RUNS, KNOWN, KINDS))
    count = {kind: [pair for pair in found if pair.kind == kind] for kind in KINDS}
    assert {kind: len(own) for kind, own in count.items()} == {
        SAME: 2 * 12 + 3,
        CHANGED: 3,
        FAULTY: 3,
        RESEEDED: 3,
    }
    for pair in found:
        assert (pair.seeds[0] == pair.seeds[1]) == (pair.kind == FAULTY)
        assert pair.good is not pair.bad
    assert [pair.kind for pair in pairs(RUNS, KNOWN, {SAME})] == [SAME] * 27


def test_what_is_said_of_a_pair_is_held_against_its_truth():
    rows = [judged("watched", pair) for pair in pairs(RUNS, KNOWN, KINDS)]
    for row in rows:
        faulty = row.kind in (FAULTY, RESEEDED)
        assert row.verdict == ("different" if faulty else "same")
        placed = (row.right, row.by_chance, row.by_gradient)
        assert placed == ((1.0, 0.5, 1.0) if faulty else (None, None, None))


def test_the_kept_comparisons_are_of_no_subject_that_is_kept_back_or_was_chosen_on():
    rows = json.loads(RESULTS.read_text("utf-8"))
    assert {row["subject"] for row in rows} == set(DEV)
    assert not set(DEV) & set(TRAIN)
    assert {(row["mode"], row["kind"]) for row in rows} == {(m, k) for m in MODES for k in KINDS}
    for row in rows:
        assert row["measured"] <= (row["verdict"] == "different")
        assert (row["first"] == "") == (not row["measured"])


def test_bounds_are_those_that_one_healthy_pair_in_two_hundred_passes():
    kept = json.loads(BOUNDS.read_text("utf-8"))
    assert kept == {quantity: spread.bound for quantity, spread in SPREADS.items()}
