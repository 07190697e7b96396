"""DEFault++ on the benchmark's runs, with a package in its place that does what the test asks."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import defaultplusplus as peer
from diagnoser.benchmark.configuration import Configuration, catalogue
from diagnoser.benchmark.dataset import Truth
from diagnoser.benchmark.plan import Item
from diagnoser.benchmark.scoring import figures
from diagnoser.errors import BenchmarkError
from diagnoser.injection import assemble, train
from diagnoser.vocabulary import CAUSE_CATEGORY

STEPS = 20
CLEAN = Truth(
    hash="clean", subject="series", track="test", recipe="a", role="clean", operators=(),
    severity="", harm="clean", trivial=False, defect=False, faults=(), causes=(), components=(),
    curvature="0",
)  # fmt: skip
MASKED = replace(
    CLEAN, hash="masked", role="fault", operators=("M1",), severity="high", harm="proven",
    causes=("attention_mask",),
)  # fmt: skip


class Extractor:
    """Asks for what the real one does, meddles as it does, and keeps what it was given."""

    last = None
    breaks_at = -1

    def __init__(self, model, arch, config):
        if model.config.is_encoder_decoder:
            raise ValueError("Encoder-decoder models\nare not supported.")
        self.model, self.arch = model, arch
        self.steps, self.epochs, self.validations = [], [], []
        Extractor.last = self

    def step(self, **given):
        torch.rand(3)
        if self.model.training:
            self.model.eval()
            self.model.train()
        self.steps.append(given)
        if len(self.steps) == self.breaks_at:
            raise RuntimeError("no such\ntensor")

    def epoch_end(self, epoch):
        self.epochs.append(epoch)

    def record_validation(self, epoch, metrics):
        self.validations.append(metrics)

    def finalize(self):
        return {"loss": float(self.steps[-1]["loss"]), "unmeasured": 0.0, "elsewhere": 1.0}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


class Normalizer:
    reference = SimpleNamespace(
        schema=["loss", "unmeasured", "absent"],
        median=np.array([100.0, 2.0, 3.0]),
        std=np.array([1.0, 1.0, 1.0]),
    )

    def encode(self, features, mode="raw"):
        middle = zip(self.reference.schema, self.reference.median, strict=True)
        return {name: features.get(name, float(value)) for name, value in middle}

    def coverage(self, features):
        return sum(name in features for name in self.reference.schema), 3


class Predictor:
    asked = ()

    def predict(self, features):
        Predictor.asked = (*Predictor.asked, features)
        return SimpleNamespace(
            is_faulty=True, detection_prob=0.75, category="masking", root_cause="zero_mask"
        )


@pytest.fixture
def package(monkeypatch):
    monkeypatch.setattr(Predictor, "asked", ())
    package = ModuleType("defaultplusplus")
    package.__version__ = peer.VERSION
    package.FeatureExtractor = Extractor
    package.ExtractionConfig = SimpleNamespace
    diagnosis = ModuleType("defaultplusplus.diagnosis")
    diagnosis.load_pretrained = lambda arch: Predictor()
    processing = ModuleType("defaultplusplus.processing")
    processing.RuntimeNormalizer = SimpleNamespace(load=lambda arch: Normalizer())
    for module in (package, diagnosis, processing):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return package


def item(subject="series", role="clean", **settings):
    overrides = tuple(sorted({"steps": STEPS, **settings}.items()))
    made = Configuration(subject=subject, recipe="a", overrides=overrides)
    return Item(made, f"{subject}-{role}", "clean", role, "test", (), (), ())


def run(package, *given):
    return peer.run(peer.load_tool(), catalogue(), *given)


# -- the package -----------------------------------------------------------------------------------


def test_without_the_package_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "defaultplusplus", None)
    monkeypatch.setattr(sys, "argv", ["defaultplusplus", "--out", str(tmp_path / "rows.parquet")])

    assert peer.main() == 2

    said = capsys.readouterr().err
    assert "pip install --no-deps defaultplusplus==0.4.1" in said
    assert not list(tmp_path.iterdir())


def test_what_it_needs_is_named_where_it_is_absent(monkeypatch, package):
    def spec(name):
        return None if name == "sklearn" else object()

    monkeypatch.setattr(peer.importlib.util, "find_spec", spec)

    with pytest.raises(BenchmarkError, match=r"pip install scikit-learn$"):
        peer.load_tool()


def test_another_version_is_not_compared_with(package):
    package.__version__ = "0.5.0"

    with pytest.raises(BenchmarkError, match=r"0\.5\.0 here, 0\.4\.1 .* pip install"):
        peer.load_tool()


# -- a run -----------------------------------------------------------------------------------------


def test_each_step_hands_over_what_the_extractor_asks_for(package):
    row = run(package, item(), 0)

    assert (row["status"], row["reason"]) == ("ok", "")
    seen = Extractor.last
    assert len(seen.steps) == STEPS
    assert seen.epochs == list(range(peer.PARTS)) and len(seen.validations) == peer.PARTS
    given = seen.steps[-1]
    depth, length = 2, 10
    assert [tuple(w.shape[1:]) for w in given["outputs"].attentions] == [(4, length, length)] * 2
    assert len(given["outputs"].hidden_states) == depth + 1
    assert given["attention_mask"].shape == given["outputs"].hidden_states[0].shape[:2]
    assert given["labels"] is None  # a regression
    assert given["loss"] != seen.steps[0]["loss"]


def test_gradients_are_there_and_weights_are_not_yet_moved(package, monkeypatch):
    norms, weights = [], []

    def step(self, **given):
        norms.append(sum(float(p.grad.norm()) for p in self.model.parameters()))
        weights.append(float(next(self.model.parameters()).detach().sum()))

    monkeypatch.setattr(Extractor, "step", step)
    monkeypatch.setattr(Extractor, "finalize", lambda self: {})
    assert run(package, item(), 0)["reason"] == ""

    training, _ = assemble(*_subject(item()), 0)
    assert weights[0] == float(next(training.model.parameters()).detach().sum())
    assert min(norms) > 0


@pytest.mark.parametrize("train_mode", [True, False])
def test_the_training_is_the_same_as_without_the_tool(package, train_mode):
    made = item(dropout=0.2, train_mode=train_mode)
    subject, settings = _subject(made)
    bare, _ = assemble(subject, settings, 3)
    without = train(bare).score

    assert run(package, made, 3)["score"] == without


def test_what_its_model_says_and_how_much_it_was_given_is_kept(package):
    row = run(package, item(role="HC2"), 0)

    kept = {name: row[name] for name in ("is_faulty", "probability", "category", "root_cause")}
    assert kept == {
        "is_faulty": True, "probability": 0.75, "category": "masking", "root_cause": "zero_mask",
    }  # fmt: skip
    assert (row["schema"], row["filled"], row["zeros"]) == (3, 2, 1)
    raw, clipped = Predictor.asked
    assert raw == {"loss": Extractor.last.finalize()["loss"], "unmeasured": 0.0, "absent": 3.0}
    assert clipped == {"loss": 97.0, "unmeasured": 2.0, "absent": 3.0}


def test_a_model_that_it_refuses_is_a_row(package):
    row = run(package, item("seq2seq"), 0)

    assert row["status"] == "refused"
    assert "Encoder-decoder models are not supported." in row["reason"]
    assert "test_defaultplusplus.py:" in row["reason"]


def test_a_crash_is_a_row_that_says_at_which_step(package, monkeypatch):
    monkeypatch.setattr(Extractor, "breaks_at", 4)

    row = run(package, item(), 0)

    assert row["status"] == "failed"
    assert row["reason"].startswith("step 4, ")
    assert row["reason"].endswith("RuntimeError: no such tensor")
    assert row.get("is_faulty") is None


# -- resuming --------------------------------------------------------------------------------------


def row_of(item, seed, **more):
    return {
        "hash": item.hash, "subject": "series", "recipe": "a", "role": item.role, "operator": "",
        "severity": "", "place": "", "seed": seed, "version": peer.VERSION, "status": "failed",
        "reason": "", "is_faulty": None, "category": None, "root_cause": None, "wall_s": 0.0,
        **more,
    }  # fmt: skip


def test_finished_runs_are_not_made_again(tmp_path):
    path, made, lines = tmp_path / "rows.parquet", [], []
    runs = [(item(), 0), (item(), 1), (item(role="fault"), 0)]

    def make(of, seed):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append((of.hash, seed))
        return row_of(of, seed)

    with pytest.raises(KeyboardInterrupt):
        peer.execute(path, runs, make, None, lines.append)
    assert [(r["hash"], r["seed"]) for r in peer.read(path)] == [("series-clean", 0)]

    made.clear()
    made.append("not interrupted")
    made.append("again")
    rows = peer.execute(path, runs, make, None, lines.append)

    assert made[2:] == [("series-clean", 1), ("series-fault", 0)]
    assert peer.read(path) == [{name: row.get(name) for name in peer.SCHEMA.names} for row in rows]
    assert len(rows) == len(runs)


def test_rows_of_another_version_are_made_again(tmp_path):
    path = tmp_path / "rows.parquet"
    peer.write(path, [row_of(item(), 0, version="0.3.0")])

    rows = peer.execute(path, [(item(), 0)], row_of, None, lambda line: None)

    assert [row["version"] for row in rows] == ["0.3.0", peer.VERSION]


def test_no_run_is_begun_after_the_time(tmp_path):
    lines = []

    peer.execute(tmp_path / "rows.parquet", [(item(), 0), (item(), 1)], row_of, 0.0, lines.append)

    assert lines == ["2 runs left; give the same command again to go on"]


def test_a_damaged_file_is_named_and_left_alone(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"cut")

    with pytest.raises(BenchmarkError, match=r"rows\.parquet cannot be read"):
        peer.execute(path, [(item(), 0)], row_of, None, lambda line: None)
    assert path.read_bytes() == b"cut"


# -- scores ----------------------------------------------------------------------------------------


def test_its_labels_are_told_in_the_words_of_the_contract_alone():
    for table in (peer.ROOT_CAUSES, peer.CATEGORIES):
        for label, causes in table.items():
            assert causes and set(causes) <= set(CAUSE_CATEGORY), label


def test_an_unknown_label_names_no_cause():
    assert peer.causes_of("something new", "else") == ()


def test_verdicts_are_scored_beside_those_of_other_judges():
    said = {"status": "ok", "seed": 0, "category": None, "root_cause": None}
    found = peer.verdicts(
        [
            said | {"hash": "clean", "is_faulty": False, "probability": 0.1},
            said | {"hash": "masked", "is_faulty": True, "probability": 0.9, "category": "masking"},
            row_of(item(), 1, hash="masked"),  # broke: nobody was warned
            row_of(item(), 2, hash="masked", status="refused"),
            row_of(item(), 3, hash="of code that is gone"),
        ],
        {"clean": CLEAN, "masked": MASKED},
    )

    assert [(v.truth.hash, v.seed, v.faulty, v.score) for v in found] == [
        ("clean", 0, False, 0.1), ("masked", 0, True, 0.9), ("masked", 1, False, 0.0),
    ]  # fmt: skip
    value = {figure.name: figure.value for figure in figures(found)}
    assert (value["recall"], value["false alarms HC1"]) == (0.5, 0.0)
    assert (value["auroc"], value["cause_top_1"]) == (0.5, 0.5)


def test_the_summary_counts_crashes_beside_what_was_judged():
    ok = {"status": "ok", "is_faulty": True, "category": "qkv", "root_cause": "zero_query"}
    ok |= {"schema": 10, "filled": 4, "zeros": 1, "wall_s": 2.0, "clipped_probability": 0.2}

    (line,) = peer.summary([row_of(item(), 0, **ok), row_of(item(), 1)])

    assert line.startswith("series clean: 1 ok, 1 failed; called faulty 1/1 (qkv/zero_query 1)")
    assert "if clipped 0/1; features filled 40%, exactly 0 10%; 2.0 s a run" in line


def _subject(made):
    subject = catalogue().subject(made.configuration.subject)
    return subject, made.configuration.settings(subject)
