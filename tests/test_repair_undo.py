"""Law 5: a repair taken back leaves a training as if it had never been, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from diagnoser.errors import RepairError
from diagnoser.repair import ACTIONS, Applied, Live, Snapshot, apply, schedules_of
from diagnoser.types import Repair

BATCHES = 40
MORE_STEPS = 20


class Attention(nn.Module):
    """Self-attention with projections of their own, dropout, batch norm, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.v_proj, self.out_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.frozen = nn.Linear(8, 8)
        self.left_out = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        """(batch, positions, 3) to (batch, 2)."""
        states = self.embed(inputs)
        scores = self.q_proj(states) @ self.k_proj(states).mT / 8**0.5
        states = states + self.out_proj(F.dropout(scores.softmax(-1), 0.1) @ self.v_proj(states))
        states = self.left_out(torch.relu(self.frozen(states)))
        return self.head(self.norm(states.mT).mT.mean(1))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw amsgrad foreach": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}
SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "warmup": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, step / 10)),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=BATCHES + 9),
}
REPAIRS = {
    "scale_learning_rate": Repair("scale_learning_rate", "q_proj", {"factor": 0.1}),
    "clip_gradient": Repair("clip_gradient", "model", {"norm": 0.01}),
    "add_warmup": Repair("add_warmup", "model", {"steps": 5}),
    "change_betas": Repair("change_betas", "model", {"beta2": 0.9}),
    "reset_optimizer_state": Repair("reset_optimizer_state", "k_proj"),
    "reinitialize": Repair("reinitialize", "q_proj"),
    "temper_attention": Repair("temper_attention", "q_proj", {"factor": 0.2}),
    "register_parameters": Repair("register_parameters", "left_out"),
    "unfreeze": Repair("unfreeze", "frozen"),
    "roll_back": Repair("roll_back", "model"),
}


class Training:
    """A loop as scripts write it, one step at a time."""

    def __init__(self, optimizer: str, schedule: str) -> None:
        torch.manual_seed(0)
        self.model = Attention()
        self.model.frozen.requires_grad_(False)
        own = [p for n, p in self.model.named_parameters() if not n.startswith("left_out")]
        split = len(own) // 2
        self.optimizer = OPTIMIZERS[optimizer](
            [{"params": own[:split]}, {"params": own[split:], "lr": 0.02}]
        )
        self.schedule = SCHEDULES[schedule](self.optimizer)
        self.batches = torch.randn(BATCHES, 4, 5, 3), torch.randint(2, (BATCHES, 4))
        self.losses: list[float] = []

    def run(self, first: int, count: int) -> None:
        for i in range(first, first + count):
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(self.batches[0][i]), self.batches[1][i])
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.losses.append(loss.item())

    @property
    def live(self) -> Live:
        return Live({"model": self.model}, [self.optimizer], [self.schedule])

    def state(self) -> list[Any]:
        """Everything a training is made of, comparable by ``==`` after `flat`."""
        return [
            self.losses,
            self.model.state_dict(),
            [None if p.grad is None else p.grad for p in self.model.parameters()],
            [p.requires_grad for p in self.model.parameters()],
            self.optimizer.state_dict(),
            self.schedule.state_dict(),
            torch.get_rng_state(),
        ]


def flat(value: Any) -> Any:
    """Returns a value with every tensor as its bytes."""
    if isinstance(value, Tensor):
        return (value.dtype, tuple(value.shape), value.detach().contiguous().numpy().tobytes())
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [flat(item) for item in value]
    return value


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@settings(max_examples=25, deadline=None)
@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    names=st.lists(st.sampled_from(sorted(ACTIONS)), min_size=1, max_size=3, unique=True),
    before=st.integers(0, 6),
    trial=st.integers(0, 4),
    on_disk=st.booleans(),
)
def test_after_undo_a_training_goes_on_as_if_never_touched(
    optimizer, schedule, names, before, trial, on_disk, tmp_path_factory
):
    if "sgd" in optimizer:
        names = [name for name in names if name != "change_betas"]
    untouched, tried = Training(optimizer, schedule), Training(optimizer, schedule)

    untouched.run(0, before)
    untouched.run(before, MORE_STEPS)
    expected = flat(untouched.state())

    torch.manual_seed(0)
    tried = Training(optimizer, schedule)
    tried.run(0, before // 2)
    live = tried.live
    live.healthy = Snapshot(live, None)
    tried.run(before // 2, before - before // 2)
    path = tmp_path_factory.mktemp("snapshot") / "state.pt" if on_disk else None
    snapshot = Snapshot(live, path)
    applied = apply(live, [REPAIRS[name] for name in names])
    tried.run(before, trial)
    applied.take_back()
    snapshot.restore()
    del tried.losses[before:]
    tried.run(before, MORE_STEPS)

    assert flat(tried.state()) == expected


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@settings(max_examples=10, deadline=None)
@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    names=st.lists(st.sampled_from(sorted(ACTIONS)), min_size=1, max_size=10, unique=True),
    at=st.integers(0, 6),
    later=st.integers(0, 3),
)
def test_what_is_taken_back_inside_a_step_leaves_no_bit(optimizer, schedule, names, at, later):
    """As in a script that runs: from a hook on its step, which knows the optimizer alone.

    What was applied behind one step is in force in ``later`` ones, or in none.
    """
    if "sgd" in optimizer:
        names = [name for name in names if name != "change_betas"]
    untouched = Training(optimizer, schedule)
    untouched.run(0, at + 1 + MORE_STEPS)

    tried = Training(optimizer, schedule)
    live = Live({"model": tried.model}, [tried.optimizer], schedules_of([tried.optimizer]))
    live.healthy = live.start = Snapshot(live, None)
    in_force: list[tuple[Snapshot, Applied]] = []

    def behind(stepping: torch.optim.Optimizer, *_: object) -> None:
        if len(tried.losses) == at:
            snapshot = Snapshot(live, None)
            in_force.append((snapshot, apply(live, [REPAIRS[name] for name in names])))
        if in_force and len(tried.losses) == at + later:
            snapshot, applied = in_force.pop()
            applied.take_back()
            snapshot.restore()

    hook = register_optimizer_step_post_hook(behind)
    try:
        tried.run(0, at + 1 + later)
    finally:
        hook.remove()
    del tried.losses[at + 1 :]
    tried.run(at + 1, MORE_STEPS)  # the batches of the trial once more
    assert flat(tried.state()) == flat(untouched.state())


@pytest.mark.parametrize("name", sorted(ACTIONS))
def test_every_action_changes_the_training(name):
    untouched, repaired = Training("adamw", "warmup"), Training("adamw", "warmup")
    untouched.run(0, 16)
    expected = flat(untouched.state())

    repaired.run(0, 6)
    live = repaired.live
    live.healthy = Snapshot(live, None)
    repaired.run(6, 2)
    random = torch.get_rng_state()
    applied = apply(live, [REPAIRS[name]])
    assert torch.equal(torch.get_rng_state(), random)  # no action draws from the training's stream
    repaired.run(8, 8)

    assert flat(repaired.state()[1]) != expected[1]
    applied.take_back()


def test_nothing_remains_once_all_is_taken_back():
    training = Training("adam", "warmup")
    applied = apply(
        training.live,
        [REPAIRS["scale_learning_rate"], REPAIRS["clip_gradient"], REPAIRS["add_warmup"]],
    )
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

    assert _global_optimizer_pre_hooks
    assert _global_optimizer_post_hooks
    applied.take_back()
    applied.take_back()
    assert not _global_optimizer_pre_hooks
    assert not _global_optimizer_post_hooks


def test_a_snapshot_goes_to_disk_where_memory_is_short_and_is_refused_where_neither_has_room(
    tmp_path: Path, monkeypatch
):
    training = Training("adam", "warmup")
    training.run(0, 3)
    monkeypatch.setattr("diagnoser.repair.snapshot.free_memory", lambda device: 100)
    snapshot = Snapshot.take(training.live, tmp_path / "kept")
    assert snapshot.path == tmp_path / "kept" / "snapshot-0.pt"
    snapshot.discard()
    assert not list((tmp_path / "kept").iterdir())

    class Full:
        free = 10

    monkeypatch.setattr("shutil.disk_usage", lambda path: Full)
    with pytest.raises(RepairError, match="neither memory nor .*kept has 2 times that free"):
        Snapshot.take(training.live, tmp_path / "kept")


def test_the_snapshot_of_a_directory_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch):
    training = Training("adam", "warmup")
    monkeypatch.setattr("diagnoser.repair.snapshot.free_memory", lambda device: 100)
    (tmp_path / "file").write_text("")
    with pytest.raises(RepairError, match="memory is short, and .* cannot be written"):
        Snapshot.take(training.live, tmp_path / "file" / "kept")
