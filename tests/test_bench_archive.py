"""Runs that are kept: what comes back says the same, and packing it again changes nothing."""

from __future__ import annotations

import base64
import gzip
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from bench_subjects import SMALL
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import outcomes
from diagnoser.benchmark.archive import BITS, cut_digits, pack, unpack
from diagnoser.benchmark.configuration import Configuration, catalogue, content_hash
from diagnoser.benchmark.dataset import recording_of
from diagnoser.benchmark.families import family_of
from diagnoser.benchmark.plan import CLEAN, FAULT, SIZES, Item, Plan, make_plan
from diagnoser.benchmark.results import Store
from diagnoser.benchmark.worker import run
from diagnoser.diagnosis import vectors_of
from diagnoser.errors import BenchmarkError
from diagnoser.features import feature_tables
from diagnoser.monitor.schedule import GUARANTEED_STATISTICS
from diagnoser.runlog import LOG_FILE, Recording, RunLogWriter
from diagnoser.types import Component, Cost, Estimate, Measurement, Part

MADE = Configuration(
    subject="line",
    recipe="a",
    injections=(("SLOW", "high", "model"),),
    overrides=(("steps", 40),),
)
DIGEST = content_hash(MADE, SMALL)
ITEM = Item(MADE, DIGEST, DIGEST, FAULT, "train", (), (0, 1), ())


def made_log(directory: Path) -> bytes:
    """A log with everything that a number can be."""
    numbers = (0.0, 1.0, 0.999999, -3.14159265, 1e-300, 1e300, math.nan, math.inf, -math.inf)
    part = Part("a.weight", None, 0, 0)
    with RunLogWriter(directory, "made", {}) as log:
        log.components(0, [Component("a", "linear", "a", 0, (part,), 4097)])
        log.fact(0, "backward", "model", 1.0, {"file": "/home/someone/train.py", "line": 3})
        for step, number in enumerate(numbers):
            log.loss(step, number, math.nan if step else 0.123456789)
            estimate = Estimate(number, None if step % 2 else abs(number), number, step, "lanczos")
            rows = [Measurement(step, "trace", "a", estimate)]
            log.measurement(
                step, [*rows, Measurement(step, "coupling", "a", estimate, "b")], 0.0123
            )
        log.event(3, "trigger", "the loss rises", {"ratio": 2.5})
        log.end(0, Cost(9, 9, 1.23456, 0.5))
    return gzip.compress((directory / LOG_FILE).read_bytes())


def row(**different: object) -> dict[str, object]:
    texts = ("hash", "subject", "recipe", "operator", "severity", "place", "remedy", "reason")
    numbers = ("score", "loss", "area", "first_loss", "last_loss")
    words = dict.fromkeys(texts, "x") | {"mode": "watched", "status": "ok", "loss_alarm": ""}
    found = {**words, **dict.fromkeys(numbers, 0.1), "seed": 2, "steps": 9, "diverged": False}
    return {**found, **different}


def read(log: bytes, directory: Path) -> Recording:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return recording_of(log, directory)


def test_what_comes_back_says_the_same_but_for_digits_that_no_measurement_has(tmp_path: Path):
    log = made_log(tmp_path / "log")
    ((kept, back),) = unpack(pack([(row(score=math.nan), log)]))
    assert kept["seed"] == 2
    assert math.isnan(kept["score"])
    ours, theirs = read(back, tmp_path / "a"), read(log, tmp_path / "b")
    assert ours.damaged_lines == 0
    assert ours.components == theirs.components
    assert [(e.step, e.kind, e.message) for e in ours.events] == [(3, "trigger", "the loss rises")]
    assert ours.facts[0].data == {"file": "train.py", "line": 3}  # nobody's folders are kept
    assert ours.ending is not None
    assert ours.ending.cost == Cost(9, 9, 1.23, 0.5)
    for name in ("step", "quantity", "component", "other", "samples", "method", "dtype"):
        mine, other = (getattr(of.measurements, name) for of in (ours, theirs))
        np.testing.assert_array_equal(mine, other)
    inside = np.abs(theirs.measurements.value) < 1e30
    for name, rtol in (("value", 2.0**-BITS * 2), ("std_error", 0.07), ("batch_std_error", 0.07)):
        mine, other = (getattr(of.measurements, name) for of in (ours, theirs))
        np.testing.assert_array_equal(np.isnan(mine), np.isnan(other))
        np.testing.assert_array_equal(np.isinf(mine), np.isinf(other))
        np.testing.assert_allclose(mine[inside], other[inside], rtol=rtol, atol=1e-44)
    np.testing.assert_allclose(ours.losses.value[:4], theirs.losses.value[:4], rtol=2e-3)
    np.testing.assert_allclose(ours.accuracies.value[:1], [0.1234], rtol=2e-3)


def test_packing_what_was_unpacked_gives_the_same_bytes(tmp_path: Path):
    log = made_log(tmp_path / "log")
    content = pack([(row(seed=seed), log) for seed in range(3)])
    assert pack(unpack(content)) == content


@given(st.floats(), st.integers(2, 20))
def test_what_is_less_than_one_or_more_than_zero_stays_so(number: float, bits: int):
    cut = float(cut_digits(np.array([number]), bits)[0])
    if math.isnan(number):
        assert math.isnan(cut)
        return
    assert math.isinf(cut) == math.isinf(number)
    assert (cut == 0.0) == (number == 0.0)
    assert (abs(cut) < 1.0) == (abs(number) < 1.0)
    assert (cut < 0.0) == (number < 0.0)
    assert float(cut_digits(np.array([cut]), bits)[0]) == cut
    if 1e-30 < abs(number) < 1e30:
        assert abs(cut) <= abs(number) <= abs(cut) * (1.0 + 2.0 ** (2 - bits))


@pytest.mark.parametrize("damage", [b"", b"nothing of the sort", b"PAR1"])
def test_what_is_no_archive_is_refused_in_words(damage: bytes):
    with pytest.raises(BenchmarkError, match="no archive of runs"):
        list(unpack(damage))


def test_a_cut_archive_is_refused(tmp_path: Path):
    content = pack([(row(), made_log(tmp_path / "log"))])
    with pytest.raises(BenchmarkError, match="no archive of runs"):
        list(unpack(content[: len(content) // 2]))


def test_runs_that_are_kept_come_back_into_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(outcomes, "BENCH", tmp_path / "kept")
    monkeypatch.setattr(outcomes, "RUNS", tmp_path / "kept" / "truth.parquet")
    store = Store(tmp_path / "out", complain=pytest.fail)
    outcomes.keep_watched(store, "watched", "line", [ITEM])
    assert "2 runs are missing; not kept" in capsys.readouterr().out
    rows = []
    for seed in (0, 1):
        made = run(SMALL, MADE, seed, "watched", tmp_path / f"run-{seed}")
        rows.append(row(hash=DIGEST, subject="line", seed=seed, cpu_s=0.1) | made)
    store.add("watched", DIGEST, MADE.to_json(), rows)
    outcomes.keep_watched(store, "watched", "line", [ITEM])
    outcomes.write_runs(outcomes.RUNS, [row(hash="another", subject="line")])
    for name in ("harm.parquet", "calibration.parquet"):
        (tmp_path / "kept" / name).write_bytes(b"as it is")

    back = Store(tmp_path / "back", complain=pytest.fail)
    outcomes.restore(back, Plan(SIZES["small"], (ITEM,)))
    said = capsys.readouterr().out
    assert "truth: 0 runs put back, 1 are of another version" in said
    assert "watched: 2 runs put back, 0 are of another version" in said
    assert back.missing("watched", DIGEST, (0, 1)) == ()
    assert [r["score"] for r in back.rows("watched", DIGEST)] == [r["score"] for r in rows]
    for seed in (0, 1):
        ours, theirs = (
            read(of.log_path("watched", DIGEST, seed).read_bytes(), tmp_path / "read")
            for of in (back, store)
        )
        assert ours.components == theirs.components
        assert len(ours.measurements.value) == len(theirs.measurements.value) > 0
    archive = outcomes.archive_of("watched", "line")
    content = archive.read_bytes()
    outcomes.keep_watched(back, "watched", "line", [ITEM])
    assert archive.read_bytes() == content
    archive.write_bytes(content[:100])
    with pytest.raises(SystemExit, match=r"line\.parquet: no archive of runs: .*repository"):
        outcomes.restore(back, Plan(SIZES["small"], (ITEM,)))


@pytest.mark.slow
def test_a_live_run_fills_what_the_runs_that_are_learned_from_have_and_nothing_else(tmp_path: Path):
    known = catalogue()
    plan = make_plan(known, outcomes.SIZE, only=["han"])
    (item, *_) = [item for item in plan.items if item.role == CLEAN]
    kept = [
        known_numbers(log, tmp_path / "kept")
        for of, log in unpack(outcomes.archive_of("budget", "han").read_bytes())
        if of["hash"] == item.hash
    ]
    assert len(kept) == len(item.budgeted)
    made = run(known, item.configuration, 0, "budget", tmp_path / "live")
    live = known_numbers(base64.b64decode(made["log"]), tmp_path / "read")
    # What is measured beyond the guaranteed depends on the time that there is.
    assert set.intersection(*kept) <= live <= set.union(*kept)
    assert len(live) > 200


@pytest.mark.slow
def test_the_document_says_in_how_many_runs_two_stages_of_the_budget_would_differ(tmp_path: Path):
    """They were recorded before there were two: what it bought held curvature from the start."""
    bought = runs = 0
    for path in sorted((outcomes.BENCH / "budget").glob("*.parquet")):
        for _, log in unpack(path.read_bytes()):
            recording, runs = read(log, tmp_path / "run"), runs + 1
            steps = {*recording.measured.step.tolist()} - {*GUARANTEED_STATISTICS}
            triggered = {e.step for e in recording.events if e.kind == "trigger"}
            bought += bool(steps - triggered)
    text = (Path(__file__).parents[1] / "docs" / "ablation.md").read_text("utf-8")
    assert f"in {runs - bought} of the {runs} runs" in " ".join(text.split())


def known_numbers(log: bytes, directory: Path) -> set[tuple[str, str]]:
    """The columns of a run and of its components that are known at its end, to be learned from."""
    recording = read(log, directory)
    of = vectors_of(recording, feature_tables(recording))
    found = {("run", column) for column, value in of.run.items() if not math.isnan(value)}
    for column, values in of.components.items():
        found |= {
            (name, column)
            for name, value in zip(of.names, values.tolist(), strict=True)
            if not math.isnan(value)
        }
    return {
        (name, column)
        for name, column in found
        if family_of(column) != "P" and not column.startswith("accuracy")
    }
