"""`diagnoser check`: a script's first steps, all checks, then it is stopped; real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from check_models import Classifier, batch
from torch import nn

from diagnoser.checks import Call, Calls, LossCall, Seen, examine_before
from diagnoser.monitor.subject import Subject

SCRIPT = """
import sys
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)


class Pool(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.positions = nn.Parameter(torch.randn(1, 8, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions
        scores = self.query(x) @ self.key(x).mT / 4
        weights = scores.softmax(dim={axis})
        return self.head((weights @ self.value(x)).mean(1))


model = Pool()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
print("begin")
for step in range({steps}):
    {body}
print("end")
"""
TRAIN = """tokens = torch.randint(20, (16, 8))
    optimizer.zero_grad()
    loss = F.cross_entropy(model(tokens), tokens[:, 0] % 3)
    {backward}
    optimizer.step()"""
BACKWARD = "loss.backward()"
CATCHING = """try:
        loss.backward()
    except BaseException:
        print("caught")
        loss.backward()"""


def check(tmp_path, *, axis=-1, steps=100_000, backward=BACKWARD, options=(), env=None):
    script = tmp_path / "train.py"
    body = TRAIN.format(backward=backward)
    script.write_text(SCRIPT.format(axis=axis, steps=steps, body=body), encoding="utf-8")
    command = [sys.executable, "-m", "diagnoser.cli", "check", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, *options, str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        timeout=300,
        check=False,
    )
    file = tmp_path / "run" / "diagnosis.json"
    return done, json.loads(file.read_text("utf-8")) if file.exists() else None


def test_a_faulty_script_is_stopped_and_named_before_it_is_run(tmp_path):
    done, diagnosis = check(tmp_path, axis=1)
    assert done.returncode == 1
    assert done.stdout == "begin\n"
    assert "Traceback" not in done.stderr
    assert "instead of 10%" not in done.stderr  # it was asked for all checks
    assert diagnosis["verdict"] == "faulty"
    assert diagnosis["causes"][0]["cause"] == "softmax_axis"
    assert "check:softmax-over-another-axis" in diagnosis["causes"][0]["because"]
    finding = diagnosis["findings"][0]
    assert finding["where"]["file"].endswith("train.py")
    lines = (tmp_path / "train.py").read_text("utf-8").splitlines()
    assert "softmax" in lines[finding["where"]["line"] - 1]
    assert "softmax(dim=-1)" in finding["patch"]
    assert diagnosis["cost"]["steps"] <= 61


def test_a_right_script_is_healthy_and_its_copy_learns_a_batch(tmp_path):
    done, diagnosis = check(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "begin\n"
    assert diagnosis["verdict"] == "healthy"
    log = (tmp_path / "run" / "log.jsonl").read_text("utf-8")
    assert "overfit_fall" in log


def test_a_script_that_ends_before_is_judged_by_what_was_seen(tmp_path):
    done, diagnosis = check(tmp_path, steps=4)
    assert done.returncode == 3
    assert done.stdout == "begin\nend\n"
    assert diagnosis["verdict"] == "inconclusive"


def test_a_script_that_catches_everything_goes_on_and_is_diagnosed(tmp_path):
    done, diagnosis = check(tmp_path, steps=70, backward=CATCHING, options=["--steps", "30"])
    assert done.stdout == "begin\ncaught\nend\n"
    assert done.returncode == 0
    assert diagnosis["verdict"] == "healthy"


def test_switched_off_it_lets_the_script_run(tmp_path):
    done, diagnosis = check(tmp_path, steps=3, env={"DIAGNOSER_OFF": "1"})
    assert done.returncode == 0
    assert done.stdout == "begin\nend\n"
    assert diagnosis is None


def test_mistakes_of_the_command_line_are_said_before_the_script_starts(tmp_path):
    done, _ = check(tmp_path, options=["--steps", "0"])
    assert (done.returncode, done.stdout) == (2, "")
    assert "--steps" in done.stderr


# -- one batch, by heart --------------------------------------------------------------------------


def learnt(model, inputs, output, loss, losses=()):
    subject = Subject({"": model}, {})
    calls = Calls([Call(model, inputs, {}, output, True, True, None)], list(losses))
    found = examine_before(Seen(0, calls, loss, subject.parameters, subject.layer_of, [], {}))
    return {row.quantity: row.estimate.value for row in found.rows}, found.unknown


def test_one_batch_is_learnt_by_a_copy_and_the_model_stays_as_it_is():
    torch.manual_seed(0)
    tokens, target = batch()
    model = Classifier("")
    output = model(tokens)
    loss = F.cross_entropy(output, target)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen, _ = learnt(model, (tokens,), output, loss, [
        LossCall("cross_entropy", output, target, {}, loss, None)
    ])  # fmt: skip
    assert seen["overfit_fall"] >= 0.9
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_loss_that_the_model_returns_itself_is_followed():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, target):
            scores = self.layer(x)
            return {"loss": F.cross_entropy(scores, target), "scores": scores}

    torch.manual_seed(0)
    model, x, target = WithLoss(), torch.randn(6, 4), torch.arange(6) % 3
    output = model(x, target)
    assert learnt(model, (x, target), output, output["loss"])[0]["overfit_fall"] > 0.3


def test_what_cannot_be_learnt_is_seen_and_what_cannot_be_told_says_why():
    torch.manual_seed(0)
    model, x, target = nn.Linear(4, 3), torch.zeros(6, 4), torch.arange(6) % 3
    output = model(x)
    loss = F.cross_entropy(output, target)
    call = LossCall("cross_entropy", output, target, {}, loss, None)
    assert learnt(model, (x,), output, loss, [call])[0]["overfit_fall"] < 0.2
    _, unknown = learnt(model, (x,), output, output.square().mean())
    assert "no single call" in unknown["overfit_fall"]
    part = LossCall("cross_entropy", output[1:], target[1:], {}, loss, None)
    _, unknown = learnt(model, (x,), output, loss, [part])
    assert "a part of one" in unknown["overfit_fall"]


@pytest.mark.parametrize("text", ["check", "--help"])
def test_the_command_is_described(text):
    done = subprocess.run(
        [sys.executable, "-m", "diagnoser.cli", text, *(["--help"] if text == "check" else [])],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "first steps" in done.stdout
