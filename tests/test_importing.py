"""Logs that scripts wrote themselves: what they tell becomes a run, what they do not is unknown."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diagnoser.cli import main
from diagnoser.diagnosis import diagnose, judges
from diagnoser.errors import DiagnoserError, LoggedFileError, UsageError
from diagnoser.importing import Imported, import_log
from diagnoser.importing.cells import number
from diagnoser.runlog import read_run
from diagnoser.types import Diagnosis

ROOT = Path(__file__).parents[1]
STEPS = 120
RATE, TOO_HIGH = 0.05, 1.6  # gradient descent on this task diverges from 1 on


def judged(imported: Imported) -> Diagnosis:
    return diagnose(read_run(imported.directory), *judges(imported=True))


def write_csv(path: Path, columns: Mapping[str, Sequence[Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def falling(steps: int = STEPS) -> list[float]:
    noise = np.random.default_rng(0).normal(0.0, 0.02, steps)
    return (0.3 + 2.0 * np.exp(-np.arange(steps) / 20.0) + noise).tolist()


# -- trainings that log ----------------------------------------------------------------------------


class Training:
    """Least squares by gradient descent, which says every step's loss, rate and gradient norm."""

    def __init__(self, rate: float) -> None:
        torch.manual_seed(0)
        self.rate = rate
        self.inputs = torch.randn(64, 4)
        self.weights = nn.Parameter(torch.zeros(4))
        self.optimizer = torch.optim.SGD([self.weights], lr=rate)

    def __iter__(self):
        for step in range(STEPS):
            self.optimizer.zero_grad()
            loss = (self.inputs @ self.weights - self.inputs.sum(1) - 1.0).square().mean()
            loss.backward()
            norm = self.weights.grad.norm()
            self.optimizer.step()
            yield step, loss.item(), norm.item()


def by_csv(folder: Path, rate: float) -> Path:
    rows = list(Training(rate))
    columns = dict(zip(("step", "train_loss", "grad_norm"), zip(*rows, strict=True), strict=True))
    return write_csv(folder / "curves.csv", {**columns, "lr": [rate] * STEPS})


def by_tensorboard(folder: Path, rate: float) -> Path:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "events")) as writer:
        for step, loss, norm in Training(rate):
            writer.add_scalar("Loss/train", loss, step)
            writer.add_scalar("grad_norm", norm, step)
            writer.add_scalar("lr", rate, step)
            writer.add_text("note", "no curve", step)
    return folder / "events"


def by_trainer(folder: Path, rate: float, breaks: int | None = None) -> Path:
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights, self.calls = nn.Parameter(torch.zeros(4)), 0

        def forward(self, inputs, labels):
            self.calls += self.training
            loss = (inputs @ self.weights - labels).square().mean()
            broken = breaks is not None and self.calls > breaks
            return {"loss": loss * float("nan") if broken else loss}

    torch.manual_seed(0)
    inputs = torch.randn(64, 4)
    data = [{"inputs": x, "labels": x.sum() + 1.0} for x in inputs]
    trainer = Trainer(
        model=Model(),
        args=TrainingArguments(
            output_dir=str(folder / "out"),
            max_steps=STEPS,
            per_device_train_batch_size=16,
            learning_rate=rate,
            optim="sgd",
            max_grad_norm=1e9,
            logging_steps=2,
            eval_strategy="steps",
            eval_steps=20,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=data,
        eval_dataset=data,
    )
    trainer.train()
    trainer.save_state()
    return folder / "out" / "trainer_state.json"


LOGS = [
    by_csv,
    by_tensorboard,
    pytest.param(by_trainer, marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore")]),
]


@pytest.mark.parametrize("log", LOGS)
def test_a_training_that_goes_well_is_not_called_faulty_and_not_healthy(log, tmp_path):
    imported = import_log(log(tmp_path, RATE), tmp_path / "run")
    losses = imported.recording.losses
    assert np.isfinite(losses.value).all() and losses.value[-1] < 0.5 * losses.value[0]
    diagnosis = judged(imported)
    assert diagnosis.verdict == "inconclusive" and not diagnosis.findings
    assert "cannot be told from curves" in diagnosis.reason
    assert {"components", "classifier", "checks"} <= {entry.rule for entry in diagnosis.unknown}


@pytest.mark.parametrize("log", LOGS)
def test_a_training_that_diverges_is_called_what_it_is(log, tmp_path):
    diagnosis = judged(import_log(log(tmp_path, TOO_HIGH), tmp_path / "run"))
    assert diagnosis.verdict == "faulty"
    assert diagnosis.findings[0].fault in ("oscillating_loss", "non_finite")
    assert diagnosis.findings[0].severity == "critical"
    assert diagnosis.causes[0].cause == "learning_rate_too_high"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_a_trainer_hides_shows_in_the_norm_of_its_gradient(tmp_path):
    path = by_trainer(tmp_path, RATE, breaks=60)
    history = json.loads(path.read_text())["log_history"]
    assert all(math.isfinite(entry["loss"]) for entry in history if "loss" in entry)
    diagnosis = judged(import_log(path, tmp_path / "run"))
    found = {finding.source: finding for finding in diagnosis.findings}
    assert found["rule:logged-gradient-lost"].fault == "non_finite"
    assert 55 <= found["rule:logged-gradient-lost"].since_step <= 65
    # That losses are finite is what this log cannot tell.
    (why,) = [entry.reason for entry in diagnosis.unknown if entry.rule == "logged-loss-lost"]
    assert "logging_nan_inf_filter" in why
    checked = {entry.rule for entry in diagnosis.checked}
    assert not checked & {"logged-loss-lost", "logged-loss-gaps"}


# -- curves that are known -------------------------------------------------------------------------


def overfitted(accuracy: Sequence[float] | None) -> dict[str, Sequence[Any]]:
    x = np.linspace(0.0, 1.0, 60)
    columns = {
        "epoch": range(60),
        "loss": 2.0 * np.exp(-5.0 * x) + 0.01,
        "val_loss": 0.5 + 2.0 * np.exp(-5.0 * x) + 3.0 * x * x,
    }
    return columns if accuracy is None else {**columns, "val_acc": accuracy}


CURVES: Mapping[str, tuple[Mapping[str, Sequence[Any]], str | None]] = {
    "not a number": (
        {"step": range(60), "loss": [*falling(40), *[math.nan] * 20]},
        "logged-loss-lost",
    ),
    "a loss that blows up": (
        {"step": range(60), "loss": [*falling(40), *[2.0 * 1.4**k for k in range(20)]]},
        "logged-loss-diverges",
    ),
    "a loss that climbs back": (
        {"step": range(80), "loss": [*falling(60), *[1.6] * 20]},
        "logged-loss-climbs-back",
    ),
    "nothing is learned": (
        {"step": range(60), "loss": [2.303 + 0.001 * (-1) ** k for k in range(60)]},
        "logged-loss-never-falls",
    ),
    "learned by heart": (overfitted(None), "logged-overfitting"),
    "surer mistakes, no more of them": (overfitted([0.8] * 60), None),
    "a rate below zero": (
        {"step": range(60), "loss": falling(60), "lr": [0.1 * (1 - k / 40) for k in range(60)]},
        "logged-rate-negative",
    ),
    "a schedule that is over at once": (
        {"step": range(60), "loss": [2 - k / 200 for k in range(60)], "lr": [0.1] * 5 + [0.0] * 55},
        "logged-rate-used-up",
    ),
    "no gradient": (
        {"step": range(60), "loss": [2.0] * 60, "grad_norm": [0.0] * 60},
        "logged-gradient-zero",
    ),
    "a scaler that skips its first steps": (
        {"step": range(60), "loss": falling(60), "grad_norm": [math.inf] * 5 + [1.0] * 55},
        None,
    ),
    "a spike that heals": (
        {"step": range(STEPS), "loss": [*falling(60), 30.0, 20.0, *falling()[62:]]},
        None,
    ),
    "a loss below zero": ({"step": range(60), "loss": [-0.01 * k for k in range(60)]}, None),
    "a smoothed loss": (
        {"step": range(600), "loss": np.convolve(falling(609), np.ones(10) / 10, "valid")},
        None,
    ),
    "one entry in a thousand": (
        {"step": range(1000, 121_000, 1000), "loss": falling(), "val_loss": falling()},
        None,
    ),
    "evaluations that are counted in epochs": (
        {
            "step": range(STEPS),
            "loss": falling(),
            "val_loss": [*[1.0 + k for k in range(10)], *[""] * (STEPS - 10)],
        },
        None,
    ),
}


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_is_called_what_it_is(name, tmp_path):
    columns, rule = CURVES[name]
    diagnosis = judged(import_log(write_csv(tmp_path / "c.csv", columns), tmp_path / "run"))
    grave = [finding.source for finding in diagnosis.findings if finding.severity != "low"]
    assert (f"rule:{rule}" in grave) if rule else not grave
    assert diagnosis.verdict == ("faulty" if rule else "inconclusive")


def test_a_loss_that_is_not_finite_for_once_is_told_and_makes_no_verdict(tmp_path):
    losses = falling()
    losses[50] = math.nan
    path = write_csv(tmp_path / "c.csv", {"step": range(STEPS), "loss": losses})
    diagnosis = judged(import_log(path, tmp_path / "run"))
    assert [(f.source, f.severity) for f in diagnosis.findings] == [
        ("rule:logged-loss-gaps", "low")
    ]
    assert diagnosis.verdict == "inconclusive"


def test_the_classifier_has_no_say(tmp_path):
    """It learned from measurements; by what a log lacks it would take most of them for faulty."""
    path = write_csv(tmp_path / "c.csv", {"step": range(STEPS), "loss": falling()})
    recording = import_log(path, tmp_path / "run").recording
    rules, classifier = judges()
    assert classifier is not None
    by_all = diagnose(recording, rules, classifier)
    assert by_all.verdict == "inconclusive" and not by_all.findings
    assert any(e.rule == "classifier" and "learned" in e.reason for e in by_all.unknown)
    assert "classifier" not in {entry.rule for entry in by_all.checked}
    assert judges(imported=True)[1] is None


@pytest.mark.parametrize("seed", range(8))
def test_noise_alone_is_no_fault(seed, tmp_path):
    random = np.random.default_rng(seed)
    trend = 0.2 + 3.0 * np.exp(-np.arange(400) / 40.0)
    columns = {
        "step": range(0, 4000, 10),
        "loss": trend * random.lognormal(0.0, 0.3, 400),
        "val_loss": trend * random.lognormal(0.1, 0.05, 400),
        "grad_norm": random.lognormal(0.0, 1.0, 400),
        "lr": 0.5 * (1.0 + np.cos(np.linspace(0.0, np.pi, 400))),
    }
    diagnosis = judged(import_log(write_csv(tmp_path / "c.csv", columns), tmp_path / "run"))
    assert not diagnosis.findings


# -- what is taken from a log ----------------------------------------------------------------------


def test_nothing_of_a_curve_is_lost_and_a_nan_stays_one(tmp_path):
    cells = ["1.5", "nan", "-inf", "1.#QNAN", "Infinity", "2e-1", "-1.#IND", "+Inf"]
    columns = {"step": range(8), "loss": cells, "acc": [0.5] * 8}
    recording = import_log(write_csv(tmp_path / "c.csv", columns), tmp_path / "run").recording
    expected = [1.5, math.nan, -math.inf, math.nan, math.inf, 0.2, math.nan, math.inf]
    np.testing.assert_array_equal(recording.losses.value, expected)
    np.testing.assert_array_equal(recording.losses.step, range(8))
    np.testing.assert_array_equal(recording.accuracies.value, [0.5] * 8)


def test_a_cell_without_a_number_is_a_step_without_one(tmp_path):
    text = "step,loss,val_loss\n0,2.0,\n1,1.5,N/A\n1,,1.7\n2,1.2,None\n\n3,1.1\n"
    (tmp_path / "c.csv").write_text(text)
    recording = import_log(tmp_path / "c.csv", tmp_path / "run").recording
    assert recording.losses.step.tolist() == [0, 1, 2, 3]
    evaluated = recording.series("evaluation_loss", "model")
    assert (evaluated.step.tolist(), evaluated.value.tolist()) == ([1], [1.7])


@pytest.mark.parametrize(
    ("names", "quantity", "taken"),
    [
        (["step", "loss", "Val Loss"], "evaluation_loss", "Val Loss"),
        (["global_step", "train/loss", "eval/loss"], "evaluation_loss", "eval/loss"),
        (["it", "Loss/train", "test_loss", "val_loss"], "evaluation_loss", "val_loss"),
        (["Epoch", "trainLoss", "learning_rate"], "learning_rate", "learning_rate"),
        (["step", "train_loss_step", "train_loss_epoch", "LR"], "learning_rate", "LR"),
        (["step", "loss", "train_acc", "val_acc"], "accuracy", "train_acc"),
        (["step", "loss", "train/grad_norm"], "gradient_norm", "train/grad_norm"),
    ],
)
def test_usual_names_are_found(names, quantity, taken, tmp_path):
    columns = {name: np.arange(30) / (1.0 if i == 0 else 50.0) for i, name in enumerate(names)}
    path = write_csv(tmp_path / "c.csv", columns)
    imported = import_log(path, tmp_path / "run")
    assert imported.recording.header["imported"]["columns"][quantity] == taken
    assert quantity in imported.summary.partition("; not: ")[0]


def test_other_names_are_given_and_a_quantity_is_left_out(tmp_path):
    columns = {"n": [5, 6, 7], "Value": [3, 2, 1], "lr": [1, 1, 1]}
    path = write_csv(tmp_path / "c.csv", columns)
    asked = {"loss": "Value", "step": "n", "learning_rate": ""}
    recording = import_log(path, tmp_path / "run", asked).recording
    assert recording.losses.step.tolist() == [5, 6, 7]
    assert "learning_rate" not in recording.measurements.quantities


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"loss": [3, 2, 1]}, "steps are its rows"),
        ({"epoch": [1, 2, 3], "loss": [3, 2, 1]}, "steps are its epoch"),
        (
            {"step": [1, 2, 3], "loss": [3, 2, 1], "acc": [50, 60, 72.5]},
            "accuracy is taken for a percentage: it goes up to 72.5",
        ),
        (
            {"step": [1, 2, 3], "loss": [3, 2, 1], "acc": [50, 60, 172]},
            "accuracy is no share: it goes from 0 to 172",
        ),
        (
            {"step": [1, 2, 3, 2, 3], "loss": [5, 4, 3, 2, 1]},
            "the steps of loss go back 1 times; 2 of its values were logged again and left out",
        ),
        (
            {"step": [1, 2, 2], "loss": [3, 2, 1]},
            "1 of its values were logged again and left out",
        ),
    ],
)
def test_what_is_made_of_a_log_is_said(columns, says, tmp_path):
    imported = import_log(write_csv(tmp_path / "c.csv", columns), tmp_path / "run")
    assert says in imported.summary
    assert imported.recording.events[0].message == imported.summary
    assert imported.recording.losses.value[-1] == 1.0


def test_of_a_resumed_run_what_was_logged_later_counts(tmp_path):
    steps = [*range(100, 1100, 100), *range(750, 1350, 50)]
    columns = {"step": steps, "loss": range(len(steps))}
    losses = import_log(write_csv(tmp_path / "c.csv", columns), tmp_path / "run").recording.losses
    assert losses.step.tolist() == [*range(100, 800, 100), *range(750, 1350, 50)]
    assert losses.value.tolist() == [*range(7), *range(10, 22)]


def test_a_log_without_end_is_put_together_in_parts(tmp_path):
    steps = 20_000
    columns = {
        "step": range(steps),
        "loss": np.linspace(2.0, 1.0, steps),
        "grad_norm": [math.nan if k % 1000 == 7 else 1.0 + k for k in range(steps)],
    }
    recording = import_log(write_csv(tmp_path / "c.csv", columns), tmp_path / "run").recording
    assert len(recording.losses.step) == steps
    broken = recording.series("non_finite_gradient", "model")
    assert len(broken.step) == 64 and broken.value.sum() == 20
    assert recording.series("gradient_norm", "model").step[-1] == steps - 1
    assert recording.series("logged_losses", "model").value.sum() == steps


# -- TensorBoard and trainer_state.json ------------------------------------------------------------


def events(folder: Path, values: Mapping[str, Sequence[float]]) -> Path:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for tag, curve in values.items():
            for step, value in enumerate(curve):
                writer.add_scalar(tag, value, step)
    (file,) = folder.glob("*tfevents*")
    return file


def test_folders_of_a_directory_stand_before_their_tags(tmp_path):
    events(tmp_path / "log" / "train", {"loss": falling()})
    events(tmp_path / "log" / "val", {"loss": falling()})
    imported = import_log(tmp_path / "log", tmp_path / "run")
    columns = imported.recording.header["imported"]["columns"]
    assert columns == {"loss": "train/loss", "evaluation_loss": "val/loss"}


def test_an_event_file_that_is_being_written_is_read_and_a_damaged_one_as_far_as_it_goes(tmp_path):
    whole = events(tmp_path / "log", {"loss": falling()}).read_bytes()
    file = tmp_path / "cut.tfevents.1"
    file.write_bytes(whole[:-5])
    cut = import_log(file, tmp_path / "cut")
    assert len(cut.recording.losses.step) == STEPS - 1 and "damaged" not in cut.summary
    spoilt = bytearray(whole)
    spoilt[len(whole) // 2] ^= 255
    file.write_bytes(bytes(spoilt))
    damaged = import_log(file, tmp_path / "damaged")
    assert "is damaged after" in damaged.summary
    assert 0 < len(damaged.recording.losses.step) < STEPS - 1


def test_a_log_of_a_trainer_in_tensorboard_hides_losses_too(tmp_path):
    tags = {"train/loss": falling(), "train/epoch": falling(), "eval/loss": falling()}
    diagnosis = judged(import_log(events(tmp_path / "log", tags), tmp_path / "run"))
    (why,) = [entry.reason for entry in diagnosis.unknown if entry.rule == "logged-loss-lost"]
    assert "logging_nan_inf_filter" in why


def test_without_tensorboard_the_command_that_brings_it_is_named(tmp_path, monkeypatch):
    file = events(tmp_path / "log", {"loss": [1.0]})
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_file_loader", None)
    with pytest.raises(UsageError, match=r"pip install 'diagnoser\[tensorboard\]'"):
        import_log(file, tmp_path / "run")


def state(*history: Any, **rest: Any) -> str:
    return json.dumps({"log_history": list(history), **rest})


def test_the_mean_of_a_whole_training_is_no_loss_of_a_step(tmp_path):
    entries = [{"loss": 3.0 - k, "step": 10 * k, "epoch": k / 2} for k in range(3)]
    last = {"train_runtime": 3.0, "train_loss": 7.0, "step": 20}
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text(state(*entries, last))
    losses = import_log(tmp_path / "checkpoint-20", tmp_path / "run").recording.losses
    assert (losses.step.tolist(), losses.value.tolist()) == ([0, 10, 20], [3.0, 2.0, 1.0])


# -- bad input -------------------------------------------------------------------------------------

ENTRY = {"loss": 1.0, "step": 1}
BAD: Mapping[str, tuple[str, str | bytes, str]] = {
    "empty": ("a.csv", "", "no header"),
    "a header alone": ("a.csv", "step,loss\n", "loss holds no value"),
    "no header": ("a.csv", "1,2\n2,3\n", "first line holds numbers"),
    "no loss": ("a.csv", "step,Value\n1,2\n", r"columns (step, Value); name it: --column loss="),
    "two losses": ("a.csv", "loss,train_loss\n1,2\n", "loss, train_loss could each be the loss"),
    "one name twice": ("a.csv", "step,loss,loss\n1,2,3\n", "two columns are called loss"),
    "a word": ("a.csv", "step,loss\n1,2\n2,tensor(3)\n", "line 3: loss is 'tensor(3)'"),
    "a number that only Python reads": ("a.csv", "step,loss\n1,1_0\n", "line 2: loss is '1_0'"),
    "half a step": ("a.csv", "step,loss\n1.5,2\n", "line 2: step is '1.5'"),
    "a step below zero": ("a.csv", "step,loss\n-1,2\n", "line 2: step is '-1'"),
    "a step beyond all": ("a.csv", "step,loss\n1e300,2\n", "line 2: step is '1e300'"),
    "no step": ("a.csv", "step,loss\n,2\n", "line 2: no step"),
    "two runs": ("a.csv", "step,loss\n0,2\n1,1\n0,2\n", "the steps of the loss start again"),
    "not text": ("a.csv", b"\xff\xfe\x00\x01" * 99, "not a CSV in UTF-8"),
    "binary rows": ("a.csv", b"step,loss\n\xff\xff\n", "not a CSV in UTF-8"),
    "hostile names": ("a.csv", "\x1b[31m,b\n1,2\n", r"\x1b[31m, b"),
    "an endless line": ("a.csv", "a," * 10**6, "its first line does not end"),
    "damaged": ("trainer_state.json", '{"log_history": [', "not JSON, or damaged"),
    "binary": ("trainer_state.json", b"\x80\x81\x82", "not JSON, or damaged"),
    "deep": ("trainer_state.json", "[" * 10**5, "not JSON, or damaged"),
    "a list": ("trainer_state.json", "[]", "no log_history"),
    "no list": ("trainer_state.json", '{"log_history": 3}', "no log_history"),
    "entries that are none": ("trainer_state.json", state(3), "no log_history"),
    "no entries": ("trainer_state.json", state(), "log_history is empty"),
    "a summary alone": ("trainer_state.json", state({"train_runtime": 1.0}), "history is empty"),
    "no loss in it": ("trainer_state.json", state({"eval_loss": 1.0, "step": 1}), "eval_loss"),
    "a loss in words": ("trainer_state.json", state({**ENTRY, "loss": [1]}), "entry 0"),
    "a yes": ("trainer_state.json", state({**ENTRY, "loss": True}), "entry 0"),
    "an entry without a step": ("trainer_state.json", state({"loss": 1.0}), "entry 0"),
    "an endless number": ("trainer_state.json", '{"log_history": [{"loss": 1%s}]}' % ("0" * 400),
                          "entry 0"),
    "no events": ("x.tfevents.1", b"", "no event file of TensorBoard"),
    "noise": ("x.tfevents.1", bytes(range(256)) * 40, "no event file of TensorBoard"),
    "an empty record": ("x.tfevents.1", b"\0" * 16, "no scalars in it"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_imported_is_refused_in_one_line(name, tmp_path, capsys):
    file, content, says = BAD[name]
    path = tmp_path / file
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert main(["import", str(path), "--out", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("diagnoser: ") and err.count("\n") == 1
    assert says in err and len(err) < 1000 and "\x1b" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "missing"),
        (lambda p: p.mkdir(), "no event file"),
        (os.mkfifo, "no file of curves"),
        (lambda p: (p.mkdir(), (p / "log.jsonl").touch()), "a run already"),
    ],
)
def test_what_is_no_log_is_refused(make: Callable[[Path], Any], says, tmp_path):
    make(tmp_path / "x")
    with pytest.raises(LoggedFileError, match=says):
        import_log(tmp_path / "x", tmp_path / "run")


@pytest.mark.parametrize(
    ("column", "says"),
    [
        ("loss=nothing", "no such column; there is step, loss"),
        ("speed=loss", "no quantity of a CSV; there is loss, evaluation_loss"),
        ("loss", "write QUANTITY=NAME"),
    ],
)
def test_a_column_that_is_not_there_is_refused(column, says, tmp_path, capsys):
    path = write_csv(tmp_path / "c.csv", {"step": [1], "loss": [1]})
    try:
        code = main(["import", str(path), "--column", column])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert code == 2 and says in capsys.readouterr().err


def test_a_run_is_not_written_over(tmp_path):
    path = write_csv(tmp_path / "c.csv", {"step": [1], "loss": [1]})
    import_log(path, tmp_path / "run")
    with pytest.raises(DiagnoserError, match="recorded here already"):
        import_log(path, tmp_path / "run")


def imports_or_says_why(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, run = Path(folder) / name, Path(folder) / "run"
        path.write_bytes(content)
        try:
            imported = import_log(path, run)
        except DiagnoserError as error:
            assert "\n" not in str(error) and str(error).isprintable()
            assert not run.exists()
            return
        recording = read_run(run)
        assert recording.damaged_lines == 0
        np.testing.assert_array_equal(recording.losses.value, imported.recording.losses.value)
        assert (np.diff(recording.losses.step) > 0).all()
        diagnosis = diagnose(recording, *judges(imported=True))
        assert diagnosis.verdict != "healthy"


CELLS = st.one_of(
    st.sampled_from(["", "nan", "inf", "-Infinity", "1.#IND", "None", "1e999", "1e-999", "0", "x"]),
    st.floats().map(str),
    st.integers(-3, 10**20).map(str),
    st.text(max_size=8),
)
HEADER = st.lists(
    st.sampled_from(["step", "loss", "val_loss", "lr", "grad_norm", "acc", "epoch", "y"]),
    min_size=1,
    max_size=6,
)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], delimiter: str) -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([header, *rows])
    return text.getvalue().encode("utf-8", "surrogatepass")


@settings(max_examples=150, deadline=None)
@given(HEADER, st.lists(st.lists(CELLS, max_size=7), max_size=12), st.sampled_from(",;\t|"))
def test_any_csv_is_imported_or_refused(header, rows, delimiter):
    imports_or_says_why("c.csv", table(header, rows, delimiter))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-1e308, 1e308) | st.just(math.nan)] * 3), min_size=1))
def test_a_csv_of_numbers_is_imported(values):
    rows = [[str(i), *map(repr, row)] for i, row in enumerate(values)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.csv"
        path.write_bytes(table(["step", "loss", "val_loss", "grad_norm"], rows, ","))
        recording = import_log(path, Path(folder) / "run").recording
        np.testing.assert_array_equal(recording.losses.value, [row[0] for row in values])
        diagnose(recording, *judges(imported=True))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400), st.sampled_from(["c.csv", "trainer_state.json", "x.tfevents.1"]))
def test_any_bytes_are_imported_or_refused(content, name):
    imports_or_says_why(name, content)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=3,
)
ENTRIES = st.dictionaries(
    st.sampled_from(["loss", "step", "eval_loss", "grad_norm", "learning_rate", "epoch", "z"]),
    st.integers(0, 40) | st.floats() | VALUES,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ENTRIES, max_size=10) | VALUES)
def test_any_state_is_imported_or_refused(history):
    imports_or_says_why("trainer_state.json", json.dumps({"log_history": history}).encode())


@given(st.floats())
def test_a_number_is_read_as_it_was_written(value):
    for text in (repr(value), f" {value!r} ", repr(value).upper()):
        np.testing.assert_array_equal(number(text), value)


# -- the commands ----------------------------------------------------------------------------------


def test_the_commands_work_on_it_without_torch(tmp_path):
    good = write_csv(tmp_path / "good.csv", {"step": range(STEPS), "loss": falling()})
    losses = [*falling()[:60], *[4.0] * 60]
    bad = write_csv(tmp_path / "bad.csv", {"step": range(STEPS), "loss": losses})
    code = f"""
import sys
from diagnoser.cli import main
for words, expected in (
    (["import", {str(good)!r}, "--out", "good"], 3),
    (["import", {str(bad)!r}, "--out", "bad"], 1),
    (["diagnose", "bad"], 1),
    (["diagnose", "good"], 3),
    (["report", "bad", "-o", "page.html"], 0),
    (["diff", "good", "bad"], 1),
    (["diff", "good", "good"], 0),
):
    assert main(words) == expected, words
heavy = {{"torch", "transformers", "pandas", "sklearn"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "good.csv, a CSV, holds loss (120 values, steps 0 to 119); not: " in done.stdout
    assert "the model left first, from step 6" in done.stdout
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "logged-loss-climbs-back" in page
    assert (tmp_path / "bad" / "report.html").exists()
    written = json.loads((tmp_path / "bad" / "diagnosis.json").read_text())
    assert written["verdict"] == "faulty"


def test_a_log_and_a_watched_run_have_nothing_to_be_compared_by(tmp_path, capsys):
    from diagnoser import watch

    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, out=tmp_path / "watched", verbose=False):
        for _ in range(30):
            optimizer.zero_grad()
            (model(torch.ones(4, 2)) - 1).square().mean().backward()
            optimizer.step()
    path = write_csv(tmp_path / "c.csv", {"step": range(30), "loss": falling(30)})
    import_log(path, tmp_path / "run")
    assert main(["diff", str(tmp_path / "watched"), str(tmp_path / "run")]) == 3
    assert "no component of one run" in capsys.readouterr().out
