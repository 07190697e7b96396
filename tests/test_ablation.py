"""The ablation's script: what follows a faulty component, and the whole plan on made-up runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from test_bench_scores import runs
from test_bench_scoring import FROZEN, MASKED

from benchmarks import ablation
from diagnoser.benchmark.partners import COUPLING, FEATURE, follow
from diagnoser.benchmark.results import Store
from diagnoser.rules.ranges import Range, Ranges
from diagnoser.table import Column, Table

NAMES = ("0.query", "0.key", "1.query", "1.key")
USUAL = Range(100, (0.1, 0.1, 0.1), (10.0, 10.0, 10.0))
RANGES = Ranges(runs=100, features={FEATURE: {"component.query": USUAL, "component.key": USUAL}})
STEPS = np.arange(10, 60, 10)


def tables(grows_at: dict[str, int], coupling: dict[tuple[str, str], list[float]]):
    """Gradients that grow a hundredfold from a step on, coupling measured at two of five steps."""
    values = np.array([np.where(grows_at.get(name, 99) <= STEPS, 100.0, 1.0) for name in NAMES])
    kinds = {name: name.partition(".")[2] for name in NAMES}
    components = Table(
        "component", STEPS, tuple((n, None) for n in NAMES), {FEATURE: Column.exact(values)}, kinds
    )
    measured = np.array([[a, np.nan, np.nan, b, np.nan] for a, b in coupling.values()])
    pairs = Table("pair", STEPS, tuple(coupling), {COUPLING: Column.exact(measured)}, kinds)
    return {"component": components, "pair": pairs}


STRONG = {
    ("0.query", "0.key"): [0.1, 5.0],
    ("0.query", "1.query"): [0.9, 0.1],
    ("0.query", "1.key"): [0.2, 0.1],
    ("0.key", "1.key"): [9.0, 9.0],  # of two that are not at fault
}


def test_the_partner_that_is_coupled_most_before_the_onset_is_asked_for():
    found = follow(tables({"0.query": 20, "1.query": 40}, STRONG), ["0.query"], RANGES)
    assert (found.by_coupling, found.by_order) == (True, False)
    assert found.by_chance == pytest.approx(1 / 3)
    found = follow(tables({"0.query": 20, "0.key": 30, "1.query": 40}, STRONG), ["0.query"], RANGES)
    assert (found.by_coupling, found.by_order) == (False, True)
    # By the time of a later onset, another partner is coupled most.
    found = follow(tables({"0.query": 40, "0.key": 50}, STRONG), ["0.query"], RANGES)
    assert (found.by_coupling, found.by_order) == (True, True)


def test_who_left_before_the_faulty_component_cannot_be_the_next():
    found = follow(tables({"1.query": 10, "0.query": 20, "1.key": 30}, STRONG), ["0.query"], RANGES)
    assert (found.by_coupling, found.by_chance) == (True, 1 / 2)


@pytest.mark.parametrize(
    ("grows_at", "coupling", "ranges"),
    [
        ({"1.query": 20}, STRONG, RANGES),  # the faulty one stays
        ({"0.query": 20}, STRONG, RANGES),  # nobody follows
        ({"0.query": 20, "1.query": 40}, {NAMES[:2]: [math.nan, math.nan]}, RANGES),
        ({"0.query": 20, "1.query": 40}, STRONG, Ranges()),  # nothing is known of their kinds
    ],
)
def test_where_nothing_can_be_said_nothing_is(grows_at, coupling, ranges):
    assert follow(tables(grows_at, coupling), ["0.query"], ranges) is None


def test_a_number_that_is_none_is_null():
    assert ablation.plain({1.0: [math.nan, 0.5], "a": (math.inf,)}) == {
        "1.0": [None, 0.5],
        "a": [None],
    }


def where(run):
    return {"subject": run.truth.subject, "track": run.truth.track}


@pytest.mark.slow
def test_the_whole_plan_is_carried_out_once_and_opens_the_test_subjects_only_when_told(
    tmp_path, monkeypatch
):
    made = runs()
    # A third mistake, so that without one there are still two causes, and a place.
    made += [
        replace(run, truth=replace(MASKED, components=FROZEN.components, **where(run)))
        for run in made
        if run.truth.operators == FROZEN.operators
    ]
    hashes = sorted({(r.truth.subject, r.truth.operators) for r in made})
    number = {key: f"{i:016x}" for i, key in enumerate(hashes)}
    made = [
        replace(r, truth=replace(r.truth, hash=number[r.truth.subject, r.truth.operators]))
        for r in made
    ]
    looked_at = []

    def read(store, plan, harms, known, mode, jobs):
        tracks = {item.track for item in plan.items}
        looked_at.append(tracks)
        return [r for r in made if r.truth.track in tracks and mode == "watched"]

    monkeypatch.setattr(ablation, "read", read)
    for name in ("claims", "partners", "cost"):
        monkeypatch.setattr(ablation, name, lambda *_: {})
    monkeypatch.setattr(ablation, "RESULT", tmp_path / "ablation.json")
    monkeypatch.setattr(Store, "read_harm", lambda _: [])

    monkeypatch.setattr("sys.argv", ["ablation", "--bench", str(tmp_path)])
    ablation.main()
    assert "test" not in set().union(*looked_at)
    assert not (tmp_path / "openings.jsonl").exists()
    found = json.loads((tmp_path / "ablation-dev.json").read_text())
    assert set(found["families"]) == set(ablation.CONFIGURATIONS)
    # Only curvature betrays a hot run here, so that with it more is found than without.
    assert found["primary"]["auroc"]["figure"]["value"] > 0.1
    assert abs(found["permuted"]["auroc"]["figure"]["value"]) < 0.05
    assert found["secondary"]["auroc"]["figure"]["value"] > 0.1

    def must_not(*_):
        raise AssertionError("what is finished is not learned again")

    monkeypatch.setattr(ablation, "learn_classifier", must_not)
    monkeypatch.setattr(ablation, "of_labels_at_random", lambda *_: None)
    ablation.main()
    monkeypatch.undo()
