"""Trials in the training itself, where its process cannot be forked."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from made_rules import always
from torch import Tensor, nn
from torch.nn import functional as F

from diagnoser import watch
from diagnoser.errors import RepairError
from diagnoser.repair import Snapshot
from diagnoser.types import Diagnosis

WHY = "it has other threads (reader), which a fork would lose"
STEPS = 150


@pytest.fixture(autouse=True)
def unforkable(monkeypatch):
    monkeypatch.setattr("diagnoser.repair_loop.forks.why_not", lambda live: WHY)


def by_torch(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def by_hand(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return -(model(x).log_softmax(-1)[torch.arange(len(y)), y]).mean()


@dataclass
class Loop:
    """A loop as scripts write it, with what stood behind each optimizer step."""

    left_out: bool = False
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = by_torch
    losses: list[float] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.ReLU(),
            nn.Linear(32, 4),
        )  # fmt: skip
        own = [p for n, p in self.model.named_parameters() if not (self.left_out and n[0] == "3")]
        self.optimizer = torch.optim.Adam(own, lr=3e-3)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: 0.99**s)
        self.answer = torch.randn(8, 4)

    def digest(self) -> str:
        """Everything a rollback has to put back."""
        sha = hashlib.sha256()
        for tensor in self.model.state_dict().values():
            sha.update(tensor.numpy().tobytes())
        for entry in self.optimizer.state.values():
            for key, value in sorted(entry.items()):
                sha.update(key.encode() + value.numpy().tobytes())
        sha.update(repr((self.optimizer.param_groups[0]["lr"], self.schedule.last_epoch)).encode())
        sha.update(torch.get_rng_state().numpy().tobytes())
        return sha.hexdigest()

    def step(self) -> None:
        x = torch.randn(32, 8)
        self.optimizer.zero_grad()
        loss = self.loss(self.model, x, (x @ self.answer).argmax(1))
        loss.backward()
        self.losses.append(loss.item())
        self.optimizer.step()
        self.states.append(self.digest())
        self.schedule.step()


def train(
    loop: Loop, folder: Path, rules: str | None = None, each: Callable[[int], None] | None = None
) -> Diagnosis:
    with watch(
        loop.model,
        loop.optimizer,
        out=folder / "run",
        repair="apply",
        rules=rules,
        classifier="off",
        verbose=False,
    ) as w:
        w._announce = loop.said.append
        for step in range(STEPS):
            if each is not None:
                each(step)
            loop.step()
    return w.diagnose()


def rule(folder: Path, *repairs: str) -> str:
    return always(folder, *repairs)[1]


def test_what_helps_is_kept_and_what_it_was_compared_with_is_said(tmp_path):
    loop = Loop(left_out=True)
    diagnosis = train(loop, tmp_path)
    (kept,) = [attempt for attempt in diagnosis.repairs if attempt.kept]
    assert [action.name for action in kept.actions] == ["register_parameters"]
    assert kept.guarantee.startswith("before and after, on one held batch, without a twin because")
    assert WHY in kept.guarantee
    assert (kept.batches, kept.twin) == (40, None)
    assert kept.difference is not None and kept.difference.value < 0
    assert any(
        parameter is loop.model[3].weight for parameter in loop.optimizer.param_groups[0]["params"]
    )
    assert any(WHY in line for line in loop.said)


def test_a_loss_that_cannot_be_taken_again_is_compared_on_different_batches(tmp_path):
    diagnosis = train(Loop(left_out=True, loss=by_hand), tmp_path)
    assert diagnosis.repairs
    assert all("different batches" in attempt.guarantee for attempt in diagnosis.repairs)


def test_what_does_not_help_is_taken_back_bit_for_bit(tmp_path):
    loop = Loop()
    attempts = train(loop, tmp_path, rule(tmp_path)).repairs
    assert attempts and not any(attempt.kept for attempt in attempts)
    first = attempts[0]
    begun, ended = first.step, first.step + first.batches
    assert loop.states[ended] == loop.states[begun]
    assert len(set(loop.states[begun : ended - 1])) == ended - 1 - begun  # it did train meanwhile


def test_a_plan_is_tried_once(tmp_path):
    attempts = train(Loop(), tmp_path, rule(tmp_path)).repairs
    tried = [str(attempt.actions) for attempt in attempts]
    assert len(tried) == len(set(tried))


def test_a_loss_that_is_no_number_ends_the_trial_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("diagnoser.repair_loop.planning._MOST", 1e38)
    blown = "{name: scale_learning_rate, component: model, parameters: {factor: 1.0e+38}}"
    loop = Loop()
    attempts = train(loop, tmp_path, rule(tmp_path, blown)).repairs
    worst = attempts[0]
    assert (worst.kept, worst.reason) == (False, "the loss became NaN or infinite")
    assert worst.batches < 5
    assert loop.states[worst.step + worst.batches] == loop.states[worst.step]


def test_a_trial_that_the_end_of_the_training_cuts_short_is_taken_back(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.STEPS", 60)
    loop = Loop()
    (attempt,) = train(loop, tmp_path, rule(tmp_path)).repairs
    assert (attempt.kept, attempt.reason) == (False, "the training ended during the trial")
    assert loop.digest() == loop.states[attempt.step]


def test_an_optimizer_that_is_built_anew_ends_the_trial(tmp_path):
    loop = Loop()
    weights: dict[int, dict[str, Tensor]] = {}

    def anew(step: int) -> None:
        weights[step] = {n: t.clone() for n, t in loop.model.state_dict().items()}
        if step == 50:
            loop.optimizer = torch.optim.Adam(loop.model.parameters(), lr=3e-3)
            loop.schedule = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda s: 1.0)

    first = train(loop, tmp_path, rule(tmp_path), anew).repairs[0]
    assert (first.kept, first.batches) == (False, 50 - first.step)
    assert first.reason == "the script built its optimizer anew during the trial"
    for name, tensor in weights[51].items():  # those from before the trial
        assert torch.equal(tensor, weights[first.step + 1][name]), name
    assert len(loop.losses) == STEPS


def interrupted(loop: Loop, folder: Path, at: int = 60) -> dict[str, Any]:
    """Trains, and interrupts in the middle of a trial."""
    seen: dict[str, Any] = {}

    def each(step: int) -> None:
        if step == at:
            seen["before"] = loop.digest()
            os.kill(os.getpid(), signal.SIGINT)
            seen["behind"] = loop.digest()

    try:
        seen["diagnosis"] = train(loop, folder, rule(folder), each)
    except KeyboardInterrupt:
        seen["caught"] = loop.digest()
    return seen


def test_ctrl_c_is_heard_by_the_script_with_its_own_state_in_place(tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    loop = Loop()
    seen = interrupted(loop, tmp_path)
    assert "caught" in seen and "diagnosis" not in seen
    # That in which the repair was applied, behind the first half of the trial.
    assert loop.states.index(seen["caught"]) == 42
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_script_s_own_is_called_and_the_state_put_back_behind_the_step(tmp_path):
    heard: list[int] = []
    earlier = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        seen = interrupted(Loop(), tmp_path)
        handler = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert heard == [signal.SIGINT]
    assert handler is not None and handler.__name__ == "<lambda>"  # type: ignore[union-attr]
    first = seen["diagnosis"].repairs[0]
    assert (first.kept, first.reason) == (False, "it was interrupted")


def test_without_room_for_a_snapshot_nothing_is_tried_and_the_training_goes_on(
    tmp_path, monkeypatch
):
    loop = Loop()
    take = Snapshot.take.__func__  # type: ignore[attr-defined]

    def none(cls: Any, live: Any, directory: Path) -> Any:
        if loop.losses:  # the state before the first step is kept
            raise RepairError("a snapshot takes 9 TB; nothing is tried")
        return take(cls, live, directory)

    monkeypatch.setattr(Snapshot, "take", classmethod(none))
    diagnosis = train(loop, tmp_path, rule(tmp_path))
    assert diagnosis.repairs == ()
    assert any("not tried: a snapshot takes 9 TB" in line for line in loop.said)
    assert len(loop.losses) == STEPS
