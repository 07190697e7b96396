"""What the monitor does on steps that measure nothing: no computation, and no waiting for a device.

All tensor operations that the listener's calls issue are caught by a dispatch mode. Where the
training runs on the CPU the loss is read and nothing is computed. For a device the tensors of the
``meta`` device stand in: like a device's they cannot be read for nothing - every way to a number
(``item``, ``bool``, ``tolist``, ``numpy``, ``cpu``) raises, and would be an event in the log.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from diagnoser.monitor import Plan, Schedule
from diagnoser.monitor.subject import Subject
from diagnoser.session import Watch

READ = "_local_scalar_dense"
FREE = {"detach", "alias", "view"}  # a new view of the same memory: no kernel


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


class Counted(Watch):
    """A watch that counts its own tensor operations, apart for steps that measure nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unmeasured: Counter[str] = Counter()
        self.measured: Counter[str] = Counter()
        self.backwards = 0  # of unmeasured steps

    def _count(self, call: Callable[[], None]) -> None:
        """A call that begins a step ends the one before: it is free only where both are."""
        before = bool(self._monitor._plan)
        with Ops() as ops:
            call()
        measured = before or bool(self._monitor._plan)
        (self.measured if measured else self.unmeasured).update(ops.seen)

    def before_backward(self, root: Any) -> None:
        before = bool(self._monitor._plan)
        self._count(lambda: super(Counted, self).before_backward(root))
        self.backwards += not (before or bool(self._monitor._plan))

    def after_backward(self) -> None:
        self._count(super().after_backward)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._count(lambda: super(Counted, self).before_step(optimizer))

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._count(lambda: super(Counted, self).after_step(optimizer))

    def kernels(self) -> dict[str, int]:
        """Operations of unmeasured steps that compute something, or read it."""
        return {name: n for name, n in self.unmeasured.items() if name not in FREE}


class Never(Schedule):
    """Measures nothing."""

    __slots__ = ()

    def plan(self, step: int) -> Plan:
        return Plan()

    def wants_checks(self, step: int) -> bool:
        return False


Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
STEPS = 60


def batches(device: str) -> Batches:
    generator = torch.Generator().manual_seed(0)
    while True:
        points = torch.randn(16, 5, generator=generator)
        yield points.to(device), points[:, :3].argmax(1).to(device)


def network(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.1), nn.Tanh(), nn.Linear(8, 3)).to(device)


def loss_of(model: nn.Module, supply: Batches) -> torch.Tensor:
    points, labels = next(supply)
    return F.cross_entropy(model(points), labels)


def usual(model: nn.Module, supply: Batches) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, supply).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        optimizer.step()


def accumulated(model: nn.Module, supply: Batches) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        for _ in range(3):
            (loss_of(model, supply) / 3).backward()
        optimizer.step()


def two_optimizers(model: nn.Module, supply: Batches) -> None:
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.Adam(model[3].parameters(), lr=0.01)
    for _ in range(STEPS):
        for optimizer in (first, second):
            model.zero_grad()
            loss_of(model, supply).backward()
            optimizer.step()


def scaled(model: nn.Module, supply: Batches) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, supply)).backward()
        optimizer.step()  # as `scaler.step`, which itself reads from the device


def by_hand(
    forget: Callable[[torch.Tensor], None], backwards: int = 1
) -> Callable[[nn.Module, Batches], None]:
    def train(model: nn.Module, supply: Batches) -> None:
        for _ in range(STEPS):
            for _ in range(backwards):
                (loss_of(model, supply) / backwards).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(parameter.grad, alpha=0.1)
                    forget(parameter)

    return train


def forget(parameter: torch.Tensor) -> None:
    parameter.grad = None


def write_zeros(parameter: torch.Tensor) -> None:
    parameter.grad.zero_()


LOOPS: dict[str, Callable[[nn.Module, Batches], None]] = {
    "usual": usual,
    "accumulated": accumulated,
    "two optimizers": two_optimizers,
    "scaled": scaled,
}


def write_zeros_unseen(parameter: torch.Tensor) -> None:
    parameter.grad.data.zero_()  # no version counter tells


FORGETTING = {"grad = None": forget, "grad.zero_()": write_zeros, "data": write_zeros_unseen}
BY_HAND = {name: by_hand(FORGETTING[name]) for name in ("grad = None", "grad.zero_()")}


@pytest.mark.parametrize("name", LOOPS)
def test_on_the_cpu_an_unmeasured_step_reads_its_losses_and_computes_nothing(
    name: str, tmp_path: Path
) -> None:
    model = network("cpu")
    with Counted(tmp_path / "run") as watch:
        LOOPS[name](model, batches("cpu"))
        log = watch.log
    assert watch.backwards > STEPS // 3
    assert watch.kernels() == {READ: watch.backwards}
    assert len(watch.measured) > 10  # the mode sees what measured steps do
    assert not [event for event in log.events if event.kind == "monitor_error"]
    assert len(log.losses.step) >= STEPS - 1


@pytest.mark.parametrize("name", [*LOOPS, *BY_HAND])
def test_on_a_device_it_computes_at_most_once_a_backward_and_reads_nothing(
    name: str, tmp_path: Path
) -> None:
    model = network("meta")
    with Counted(tmp_path / "run") as watch:
        monitor = watch._monitor
        monitor.schedule.__class__ = Never
        monitor.subject = Subject({"model": model}, {})  # as after a first sample
        (LOOPS | BY_HAND)[name](model, batches("meta"))
        events = watch.log.events
        assert not events, events[0].message  # a failed read-out would be one
        assert monitor.step >= STEPS - 1
        assert len(monitor._waiting) == monitor.step  # they are read together later
    assert watch.backwards >= STEPS
    found = watch.kernels()
    assert sum(found.values()) <= watch.backwards
    assert set(found) <= {"clone", "add"}


@pytest.mark.parametrize("backwards", [1, 2])
@pytest.mark.parametrize("name", FORGETTING)
def test_steps_made_by_hand_are_told_apart(name: str, backwards: int, tmp_path: Path) -> None:
    """Gradients are read only where nothing was seen to be done to them."""
    with Counted(tmp_path / "run") as watch:
        by_hand(FORGETTING[name], backwards)(network("cpu"), batches("cpu"))
    assert watch.log.losses.step.tolist() == list(range(STEPS))
    if name != "data":
        assert watch.kernels().get("any", 0) <= 3 * (backwards - 1) * STEPS
        assert (watch.kernels().get("any", 0) == 0) == (backwards == 1)


@pytest.mark.parametrize("wrong", ["item", "bool", "numpy", "kernel"])
def test_a_read_out_or_a_second_kernel_would_be_noticed(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    careless: dict[str, Callable[[torch.Tensor], Any]] = {
        "item": lambda loss: loss.item(),
        "bool": lambda loss: bool(loss > 0),
        "numpy": lambda loss: loss.detach().numpy(),
        "kernel": lambda loss: loss.detach().square(),
    }
    model = network("meta")
    with Counted(tmp_path / "run") as watch:
        monitor, original = watch._monitor, watch._monitor._note_loss
        monitor.schedule.__class__ = Never

        def note(loss: torch.Tensor) -> None:
            original(loss)
            careless[wrong](loss)

        monkeypatch.setattr(monitor, "_note_loss", note)
        usual(model, batches("meta"))
        failures = [event for event in watch.log.events if event.kind == "monitor_error"]
    assert failures or sum(watch.kernels().values()) > watch.backwards
