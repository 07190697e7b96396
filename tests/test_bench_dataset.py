"""From logs to what judges see: the same whether read or computed, and never more than was seen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from bench_subjects import SMALL, harm_of

from diagnoser.benchmark import dataset
from diagnoser.benchmark.configuration import Configuration, content_hash
from diagnoser.benchmark.dataset import PREFIXES, Look, features, recording_of, truths
from diagnoser.benchmark.plan import make_plan
from diagnoser.benchmark.results import Store
from diagnoser.benchmark.worker import measuring, run
from diagnoser.classifier import EARLIER, Vectors, vectors
from diagnoser.diagnosis import vectors_of
from diagnoser.features import feature_tables

MISTAKE = Configuration(
    subject="line",
    recipe="a",
    injections=(("SLOW", "high", "model"),),
    overrides=(("steps", 40),),
)
DIGEST = content_hash(MISTAKE, SMALL)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with two watched runs in it."""
    rows = []
    for seed in (0, 1):
        made = run(SMALL, MISTAKE, seed, "watched", tmp_path / f"run-{seed}")
        head = {"hash": DIGEST, "subject": "line", "recipe": "a", "operator": "SLOW"}
        head |= {"severity": "high", "place": "model", "remedy": "", "mode": "watched"}
        rows.append({**head, **made, "seed": seed, "cpu_s": 0.1})
    kept = Store(tmp_path / "out", complain=pytest.fail)
    kept.add("watched", DIGEST, MISTAKE.to_json(), rows)
    return kept


def looks(store: Store, tmp_path: Path, code: str = "now") -> list[Look]:
    folder = tmp_path / f"unpacked-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    return features(store, "watched", DIGEST, code, folder)


def same(ours: list[Look], theirs: list[Look]) -> None:
    for name in ("seed", "prefix", "claims"):
        assert [getattr(a, name) for a in ours] == [getattr(b, name) for b in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert repr(a.opinions) == repr(b.opinions)
        same_numbers(a.deepfd, b.deepfd)
        same_vectors(a.vectors, b.vectors)


def same_vectors(ours: Vectors, theirs: Vectors) -> None:
    assert (ours.names, ours.kinds) == (theirs.names, theirs.kinds)
    same_numbers(ours.run, theirs.run)
    for name, values in ours.components.items():
        np.testing.assert_array_equal(values, theirs.components[name], err_msg=name)
    assert len(ours.earlier) in {0, len(EARLIER)}
    for mine, other in zip(ours.earlier, theirs.earlier, strict=True):
        same_vectors(mine, other)


def same_numbers(ours: Mapping[str, float], theirs: Mapping[str, float]) -> None:
    for name in ours.keys() | theirs.keys():  # what was never known of any run has no column
        mine, other = ours.get(name, math.nan), theirs.get(name, math.nan)
        np.testing.assert_equal(mine, other, err_msg=name)


def test_what_was_computed_is_read_again_number_for_number(store, tmp_path, monkeypatch):
    computed = looks(store, tmp_path)
    assert [(look.seed, look.prefix) for look in computed] == [
        (seed, prefix) for seed in (0, 1) for prefix in PREFIXES
    ]
    monkeypatch.setattr(dataset, "compute", lambda *_: pytest.fail("it is there already"))
    same(looks(store, tmp_path), computed)


def test_the_classifier_sees_of_a_whole_run_what_a_diagnosis_shows_it(store, tmp_path):
    (whole, *_) = [look for look in looks(store, tmp_path) if look.prefix == 1.0]
    folder = tmp_path / "whole"
    folder.mkdir()
    recording = recording_of(store.log_path("watched", DIGEST, 0).read_bytes(), folder)
    same_vectors(whole.vectors, vectors_of(recording, feature_tables(recording)))
    assert len(whole.vectors.earlier) == len(EARLIER)
    half = recording.part(0.5)
    same_vectors(whole.vectors.earlier[1], vectors(feature_tables(half)))


def test_other_code_or_a_damaged_file_computes_them_again(store, tmp_path):
    computed = looks(store, tmp_path)
    same(looks(store, tmp_path, code="later"), computed)
    for path in (store.directory / "features" / "watched").iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    same(looks(store, tmp_path, code="later"), computed)


def test_the_first_part_of_a_run_knows_nothing_of_the_rest(store, tmp_path):
    (tmp_path / "whole").mkdir()
    packed = store.log_path("watched", DIGEST, 0).read_bytes()
    whole = recording_of(packed, tmp_path / "whole")
    half = whole.part(0.5)
    assert half.losses.step.tolist() == list(range(20)) and half.ending is None
    assert half.measurements.step.max() <= 19
    assert whole.part(1.0) is whole


def test_a_look_is_made_of_numbers_without_names_and_steps(store, tmp_path):
    for look in looks(store, tmp_path):
        assert not any("step" in n.split("_") and "count" in n for n in look.vectors.run)
        assert not {"steps", "elements", "seconds"} & set(look.vectors.run)
        assert set(look.vectors.kinds) <= {"feed_forward", "other", "head", "norm", "embedding"}


def test_what_is_true_of_a_configuration_comes_from_its_operator_and_its_proof(tmp_path):
    plan = make_plan(SMALL, "smoke")
    harms = [harm_of(item, "proven") for item in plan.items if item.role != "remedy"]
    found = truths(plan.items, harms, SMALL)
    assert set(found) == {item.hash for item in plan.items if item.role != "remedy"}
    for item in plan.items:
        if item.role == "fault":
            operator = SMALL.operator(item.configuration.operator)
            truth = found[item.hash]
            assert truth.is_faulty and truth.causes == operator.causes[:1]
            assert truth.components == ()  # the whole model is to blame, no part of it
    assert truths(plan.items, [], SMALL) == {}


def test_a_watched_run_is_measured_sixteen_times_with_room_for_both_steps():
    for steps in (40, 200, 317, 400):
        at = measuring(steps)
        assert min(at) == 10 and max(at) == steps - 2
        assert all(b - a >= 2 for a, b in zip(sorted(at), sorted(at)[1:], strict=False))
        if steps >= 60:
            assert len(at) == 16
            for turn, count in (("spectrum", 2), ("interaction", 3), ("norms", 1)):
                assert sum(turn in turns for turns in at.values()) == count
    for steps in range(1, 40):
        assert all(step + 1 < steps for step in measuring(steps))
