"""``bench score`` and ``report``: learned on some subjects, scored on others, opened once."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_bench_scoring import CLEAN, FROZEN, HOT

from benchmarks import scores_document
from diagnoser.benchmark import commands
from diagnoser.benchmark.baselines import Opinion
from diagnoser.benchmark.dataset import Look, Seen
from diagnoser.benchmark.evaluate import learn, learn_classifier
from diagnoser.benchmark.families import FAMILIES
from diagnoser.benchmark.scores import read_scores
from diagnoser.classifier import Vectors
from diagnoser.cli import main
from diagnoser.diagnosis import Claim
from diagnoser.errors import BenchmarkError

NAMES = ("layers.0.attention.query", "layers.0.attention.key", "head")
DECIDE = ("loss", "autotrainer", "umlaut", "deeplocalize", "deepdiagnosis")
ORDER = ("gradient norm", "update ratio", "entropy")


def look(rng: np.random.Generator, truth, seed: int, prefix: float) -> Look:
    """A frozen layer does not move, a hot run is sharp; the rules see only the second."""
    sharp = rng.normal(0.1, 0.05) + (2.0 if truth.operators == ("O1",) else 0.0)
    moved = rng.normal(1.0, 0.1, 3)
    if truth.operators == ("O11b",):
        moved[:2] = 0.0
    claim = Claim("learning-rate-too-high", "high", "model", 5, ("learning_rate_too_high",))
    claims = (claim,) if sharp > 1.0 else ()
    said = {name: Opinion(False, -1.0, (), NAMES) for name in DECIDE}
    said |= {name: Opinion(True, math.nan, (), NAMES) for name in ORDER}
    vectors = Vectors(
        {"model_step_sharpness.highest": sharp, "loss_fall.latest": rng.normal(0.9, 0.05)},
        {"update_ratio.latest": moved, "trace_z.latest": rng.normal(0, 1, 3)},
        NAMES,
        ("query", "key", "head"),
    )
    return Look("watched", seed, prefix, vectors, claims, said, {"loss__mean": float(rng.normal())})


def runs(seed: int = 0) -> list[Seen]:
    rng = np.random.default_rng(seed)
    made = []
    for track in ("train", "dev", "test"):
        for subject in (f"{track}-1", f"{track}-2", f"{track}-3"):
            for truth in (CLEAN, CLEAN, HOT, FROZEN):
                own = replace(truth, subject=subject, track=track)
                for i in range(12 if track == "train" else 6):
                    made += [Seen(own, look(rng, own, i, prefix)) for prefix in (0.5, 1.0)]
    return made


@pytest.fixture(scope="module")
def learned():
    return learn([run for run in runs() if run.truth.track == "train"])


@pytest.fixture(autouse=True)
def made_up(monkeypatch, learned):
    """Runs that need not be made, of which what is learned is learned once."""
    monkeypatch.setattr(commands, "read", lambda *_: runs())
    monkeypatch.setattr(commands, "learn", lambda seen: learned)
    monkeypatch.setattr(commands.Store, "read_harm", lambda _: [])


def bench(action, out, *more):
    return main(["bench", action, "--size", "smoke", "--out", str(out), "--jobs", "1", *more])


def value(scores, judge, figure, prefix=1.0, mode="watched"):
    (found,) = [
        s for s in scores if (s.judge, s.figure, s.prefix, s.mode) == (judge, figure, prefix, mode)
    ]
    return found


def table(directory, name):
    return pq.read_table(directory / f"{name}-dev.parquet").to_pylist()


@pytest.mark.slow
def test_all_judges_are_scored_side_by_side_and_printed_again(tmp_path, capsys):
    assert bench("score", tmp_path) == 0
    printed = capsys.readouterr().out
    scores = read_scores(tmp_path)
    assert {s.split for s in scores} == {"dev"}
    assert {s.judge for s in scores} >= {"rules", "classifier", "together", "deepfd", "loss"}
    assert value(scores, "rules", "recall").value == 0.5
    assert value(scores, "classifier", "recall").value > 0.9
    assert value(scores, "classifier", "false alarms HC1").value == 0.0
    assert value(scores, "classifier", "component_top_1").value > 0.9
    gap = value(scores, "together - rules", "auroc")
    assert 0.0 <= gap.low < 0.2 < gap.value <= gap.high
    assert value(scores, "gradient norm", "component_top_1").value == 1.0
    assert not [s for s in scores if (s.judge, s.figure) == ("gradient norm", "auroc")]
    assert not (tmp_path / "openings.jsonl").exists()  # that is of the test subjects
    assert bench("report", tmp_path) == 0
    assert capsys.readouterr().out == printed
    assert "together - rules" in printed and "false alarms HC1" in printed
    (named,) = [r for r in table(tmp_path, "named") if r["mode"] == "watched"]
    # It fires on every hot run and on no other, and of those no fault is expected.
    assert (named["fault"], named["said"], named["faulty"]) == (
        "sharpness_instability",
        18,
        18,
    )
    surest = [r for r in table(tmp_path, "sureness") if r["judge"] == "classifier"]
    assert sum(r["faulty"] for r in surest if r["mode"] == "watched") == 36
    for name, make in scores_document.PARTS.items():
        made = make("dev", tmp_path)
        rows = [line for line in made.splitlines() if line.startswith("|")]
        assert len(rows) > 2 and "nan" not in made, name
        assert len({row.count("|") for row in rows}) == 1, name


def test_a_split_that_was_not_scored_says_so(tmp_path):
    made = scores_document.block(scores_document.targets, "test", tmp_path)
    assert made == "Not there yet: the test subjects have not been scored."


@pytest.mark.slow
def test_the_test_subjects_are_opened_once_a_version_and_every_opening_is_logged(tmp_path, capsys):
    assert bench("score", tmp_path, "--split", "test") == 0
    assert bench("score", tmp_path, "--split", "test") == 2
    assert "opened the test subjects on" in capsys.readouterr().err
    assert bench("score", tmp_path, "--split", "test", "--again", "a wrong interval") == 0
    log = [json.loads(line) for line in (tmp_path / "openings.jsonl").read_text().splitlines()]
    assert [entry["reason"] for entry in log] == ["first opening", "a wrong interval"]
    assert len({entry["code"] for entry in log}) == 1


def test_without_scores_it_is_said_what_makes_them(tmp_path, capsys):
    assert bench("report", tmp_path) == 2
    assert "`diagnoser bench score` makes them" in capsys.readouterr().err


def test_damaged_scores_are_named(tmp_path, capsys):
    (tmp_path / "scores-dev.parquet").write_bytes(b"PAR1 and nothing more")
    assert bench("report", tmp_path) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_nothing_of_a_family_that_is_left_out_is_learned_from():
    train = [run for run in runs() if run.truth.track == "train"]
    columns = {f: learn_classifier(train, f).run_columns for f in ("LG", "H", FAMILIES)}
    assert any("trace_z" in name for name in columns["H"])
    assert not any("trace_z" in name or "sharpness" in name for name in columns["LG"])
    assert {*columns["LG"], *columns["H"]} == {*columns[FAMILIES]}


def test_nothing_can_be_learned_while_no_truth_is_known():
    with pytest.raises(BenchmarkError, match="is `bench truth` finished"):
        learn([replace(run, truth=replace(run.truth, role="fault", harm="incomplete"))
               for run in runs()[:20]])  # fmt: skip


def test_labels_at_random_are_learned_to_no_effect():
    rng = np.random.default_rng(4)
    shuffled = []
    for run in runs():
        clean = rng.random() < 0.5
        truth = CLEAN if clean else (HOT if rng.random() < 0.5 else FROZEN)
        subject = run.truth.subject
        shuffled.append(replace(run, truth=replace(truth, subject=subject, track=run.truth.track)))
    train = [run for run in shuffled if run.truth.track == "train"]
    test = [run for run in shuffled if run.truth.track == "test"]
    judge = learn(train).classifier
    scores = [judge.predict(run.look.vectors, explain=False).faulty for run in test]
    faulty = np.array([run.truth.is_faulty for run in test])
    above = np.mean([a > b for a in np.array(scores)[faulty] for b in np.array(scores)[~faulty]])
    assert abs(above - 0.5) < 0.12
