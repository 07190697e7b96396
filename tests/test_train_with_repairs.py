"""Repairs in a loop that is handed over: nothing is lost, what is kept helps, and it shows."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diagnoser
from diagnoser.benchmark.subjects import SUBJECTS
from diagnoser.curvature import RandomStates
from diagnoser.diagnosis import diagnose
from diagnoser.errors import RepairError, UsageError
from diagnoser.injection.training import Training, learning_rate_factor
from diagnoser.repair_loop import script
from diagnoser.repair_loop.replaying import FEWEST, GUARANTEE, Feed, Replays, Stream, copied
from diagnoser.runlog import read_run
from diagnoser.stepping import groups_of_step

ALWAYS = """
title: Whatever is measured
status: test
description: Detects anything.
references: []
fault: slow_convergence
scope: run
when: median_update_ratio > 0
severity: high
message: "something"
causes: [learning_rate_too_high]
repairs:
  - name: reset_optimizer_state
    component: model
  - name: clip_gradient
    component: model
    parameters: {norm: 0.01}
  - name: add_warmup
    component: model
  - name: reinitialize
    component: model
  - name: temper_attention
    component: model
    parameters: {factor: 0.5}
falsepositives: [everything]
tests:
  - {name: always, series: {median_update_ratio: [1]}, fires: true}
  - {name: a step that changes nothing, series: {median_update_ratio: [0]}, fires: false}
"""


@pytest.fixture
def always(tmp_path):
    """A directory with one rule, which fires on everything."""
    folder = tmp_path / "rules"
    folder.mkdir()
    (folder / "always.yaml").write_text(ALWAYS.lstrip(), "utf-8")
    return folder


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.v_proj, self.out_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 2)
        self.calls, self.hidden = 0, torch.zeros(8)

    def forward(self, inputs):
        self.calls += 1
        states = self.embed(inputs) + 0.1 * self.hidden
        self.hidden = states.detach().mean((0, 1))
        scores = self.q_proj(states) @ self.k_proj(states).mT / 8**0.5
        states = states + self.out_proj(F.dropout(scores.softmax(-1), 0.1) @ self.v_proj(states))
        return self.head(self.norm(states.mT).mT.mean(1))


class Seen:
    """What the training that counts was trained on."""

    def __init__(self):
        self.sums = []

    def state_dict(self):
        return {"sums": list(self.sums)}

    def load_state_dict(self, state):
        self.sums = list(state["sums"])


class Setup:
    """A training of all that can be in one; what it learns is noise, so that no repair helps."""

    def __init__(self, make, schedule=None, *, scaled=False, accumulate=1, clip=None, steps=110):
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        self.model = Net()
        self.optimizer = make(self.model.parameters())
        self.scheduler = schedule(self.optimizer) if schedule else None
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=7)
        self.scaled, self.accumulate, self.clip = scaled, accumulate, clip
        self.seen = Seen()
        self.steps = steps
        self.own = np.random.default_rng(3)

    def batches(self):
        """Draws from every stream, in turn with the training."""
        for i in range(self.steps):
            size = random.choice((6, 8))
            inputs = torch.randn(self.accumulate, size, 4, 3)
            yield {"inputs": inputs, "targets": torch.from_numpy(np.random.randint(0, 2, (self.accumulate, size))), "i": i}  # fmt: skip

    def step(self, batch):
        self.seen.sums.append((batch["i"], float(batch["inputs"].sum())))
        self.optimizer.zero_grad()
        for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True):
            inputs += 0.01 * float(self.own.normal())  # in place, as augmentation is
            loss = F.cross_entropy(self.model(inputs), targets) / self.accumulate
            (self.scaler.scale(loss) if self.scaled else loss).backward()
        if self.scaled:
            self.scaler.unscale_(self.optimizer)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        if self.scaled:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(float(loss.detach()))
        elif self.scheduler is not None:
            self.scheduler.step()

    def plain(self):
        for batch in self.batches():
            self.step(batch)
        return copy.deepcopy(self.state())

    def repaired(self, out, step=None, batches=None, **options):
        others = [self.seen, self.own, self.scaler]
        others += [self.scheduler] if self.scheduler else []
        options = {"verbose": False, "others": others} | options
        return diagnoser.train_with_repairs(
            step or self.step, batches if batches is not None else self.batches(),
            model=self.model, optimizer=self.optimizer, out=out, **options,
        )  # fmt: skip

    def state(self):
        return {
            "model": self.model.state_dict(),
            "numbers": (self.model.calls, self.model.hidden),
            "gradients": [p.grad for p in self.model.parameters()],
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler and self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": [getattr(RandomStates.now(), n) for n in ("_cpu", "_python", "_numpy")],
            "own": self.own.bit_generator.state,
            "seen": self.seen.sums,
        }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or callable(a))


def different(mine, theirs):
    return [key for key in mine if not same(mine[key], theirs[key])]


SGD = lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)  # noqa: E731
CASES = {
    "sgd": dict(make=SGD),
    "adam one cycle clip": dict(
        make=lambda p: torch.optim.Adam(p, lr=1e-3),
        schedule=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 3e-3, total_steps=200),
        clip=0.5,
    ),
    "adamw fused plateau": dict(
        make=lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
        schedule=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=3),
    ),
    "adam scaler": dict(make=lambda p: torch.optim.Adam(p, lr=1e-3), scaled=True, clip=1.0),
    "rate in a tensor": dict(
        make=lambda p: torch.optim.SGD(p, lr=torch.tensor(1e-2)),
        schedule=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.99),
    ),
    "accumulation sequential": dict(
        make=lambda p: torch.optim.RMSprop(p, lr=1e-4),
        schedule=lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=30),
                torch.optim.lr_scheduler.CosineAnnealingLR(o, 200),
            ],
            [30],
        ),
        accumulate=2,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_rolled_back_leaves_no_trace(case, always, tmp_path):
    theirs = Setup(**CASES[case]).plain()
    setup = Setup(**CASES[case])
    diagnosis = setup.repaired(tmp_path / "run", rules=always, classifier="off")
    attempts = diagnosis.repairs
    assert len(attempts) >= 4
    assert not any(attempt.kept for attempt in attempts), attempts
    assert all(attempt.guarantee.startswith(GUARANTEE) for attempt in attempts)
    assert different(setup.state(), theirs) == []
