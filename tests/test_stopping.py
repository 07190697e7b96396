"""``--stop-on`` ends a training for what is found, and keeps the state from before it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from diagnoser.cli import main
from diagnoser.errors import UsageError
from diagnoser.repair_loop.states import SCHEMA
from diagnoser.session import watch

torch.set_num_threads(1)
STEPS, BREAKS = 400, 150


class Training:
    """A classification whose data turns to NaN at a step; it remembers every state it was in."""

    def __init__(self, breaks: int | None = BREAKS) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.003)
        self.x = torch.randn(STEPS, 32, 6)
        self.y = self.x[..., :3].argmax(-1)
        self.breaks, self.made = breaks, 0
        self.weights = [self.copy()]

    def copy(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def step(self, i: int) -> None:
        x = self.x[i] * (float("nan") if i == self.breaks else 1.0)
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x), self.y[i]).backward()
        self.optimizer.step()
        self.made += 1
        self.weights.append(self.copy())

    def run(self) -> None:
        for i in range(STEPS):
            self.step(i)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in other)


def test_it_ends_soon_after_and_the_state_is_that_of_a_step_from_before(tmp_path, capsys):
    training = Training()
    with watch(training.model, training.optimizer, out=tmp_path, stop_on="critical"):
        training.run()
    assert BREAKS < training.made < BREAKS + 50
    said = capsys.readouterr().err
    assert "stopped, as was asked for at severity critical: non_finite in " in said
    assert str(tmp_path / "healthy.pt") in said
    state = torch.load(tmp_path / "healthy.pt", weights_only=True)
    assert (state["schema"], state["parameters"]) == (SCHEMA, {})
    assert BREAKS - 60 < state["step"] < BREAKS
    assert same(state["models"]["model"], training.weights[state["step"] + 1])
    (adam,) = state["optimizers"]
    assert {int(of["step"]) for of in adam["state"].values()} == {state["step"] + 1}


def test_the_training_is_left_as_it_was_when_it_ended(tmp_path):
    training = Training()
    with watch(training.model, training.optimizer, out=tmp_path, stop_on="critical", verbose=False):
        training.run()
    last, found = training.weights[-1], training.copy()
    assert all(torch.equal(last[n].isnan(), found[n].isnan()) for n in last)
    assert any(values.isnan().any() for values in found.values())
    assert not list(tmp_path.glob("snapshots/*"))


def test_from_the_state_the_training_goes_on_as_if_nothing_had_been(tmp_path):
    broken, whole = Training(), Training(breaks=None)
    with watch(broken.model, broken.optimizer, out=tmp_path, stop_on="critical", verbose=False):
        broken.run()
    whole.run()
    state = torch.load(tmp_path / "healthy.pt", weights_only=True)
    again = Training(breaks=None)
    again.model.load_state_dict(state["models"]["model"])
    again.optimizer.load_state_dict(state["optimizers"][0])
    for i in range(state["step"] + 1, STEPS):
        again.step(i)
    assert same(again.copy(), whole.copy())


def test_a_healthy_training_is_not_ended_and_keeps_every_bit(tmp_path):
    watched, plain = Training(breaks=None), Training(breaks=None)
    with watch(watched.model, watched.optimizer, out=tmp_path, stop_on="medium", verbose=False):
        watched.run()
    plain.run()
    assert watched.made == STEPS and same(watched.copy(), plain.copy())
    assert not (tmp_path / "healthy.pt").exists()


def test_what_is_less_grave_than_asked_for_ends_nothing(tmp_path, monkeypatch):
    training = Training(breaks=None)
    monkeypatch.setattr(
        training.optimizer, "zero_grad", lambda: None
    )  # a fault, not a critical one
    with watch(training.model, training.optimizer, out=tmp_path, stop_on="critical") as found:
        training.run()
    assert training.made == STEPS
    assert found.diagnose(write=False).verdict == "faulty"


def test_a_state_that_cannot_be_written_is_said_and_ends_the_training_all_the_same(
    tmp_path, capsys
):
    (tmp_path / "healthy.pt").mkdir()  # in the way
    training = Training()
    with watch(training.model, training.optimizer, out=tmp_path, stop_on="critical"):
        training.run()
    assert training.made < BREAKS + 50
    assert "healthy state cannot be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob(".healthy*")] == []


@pytest.mark.parametrize(
    ("stop_on", "repair"), [("worst", "off"), ("low", "off"), ("high", "apply")]
)
def test_what_does_not_fit_together_is_refused(tmp_path, stop_on, repair):
    with pytest.raises(UsageError, match="stop_on"):
        watch(out=tmp_path / "run", stop_on=stop_on, repair=repair)
    assert not (tmp_path / "run").exists()


SCRIPT = """
import torch
from test_stopping import Training
training = Training()
try:
    training.run()
finally:
    print("closed after", training.made)
print("never printed")
"""


def test_a_script_is_ended_and_closes_what_it_opened(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "diagnoser.cli", "run", "--out", "run", "--exit-verdict"]
    done = subprocess.run(
        [*command, "--stop-on", "critical", "train.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("closed after 1") and "never" not in done.stdout
    assert "Traceback" not in done.stderr and "healthy.pt" in done.stderr
    diagnosis = json.loads((tmp_path / "run" / "diagnosis.json").read_text("utf-8"))
    assert diagnosis["findings"][0]["fault"] == "non_finite"
    assert "insufficient_training" not in {cause["cause"] for cause in diagnosis["causes"]}
    assert (tmp_path / "run" / "healthy.pt").exists()


def test_a_severity_that_is_none_is_refused_before_the_script_starts(tmp_path: Path, capsys):
    (tmp_path / "train.py").write_text("print('began')")
    with pytest.raises(SystemExit) as stop:
        main(
            ["run", "--out", str(tmp_path / "run"), "--stop-on", "bad", str(tmp_path / "train.py")]
        )
    assert stop.value.code == 2 and capsys.readouterr().out == ""
