"""Trainings that look odd and are fine: no finding of severity medium or more (law 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from diagnoser.session import watch
from diagnoser.vocabulary import severity_rank

pytestmark = pytest.mark.slow
Batches = Callable[..., Iterator[tuple[Tensor, Tensor]]]


def digits() -> Batches:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16
    y = torch.tensor(labels)

    def batches(steps: int, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            chosen = torch.randint(len(x), (size,))
            yield x[chosen], y[chosen]

    return batches


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    loss: Callable[..., Tensor] = F.cross_entropy,
) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()


def mlp(width: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def momentum(batches: Batches) -> None:
    model = mlp()
    fit(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), batches(300))


def batches_of_four(batches: Batches) -> None:
    model = mlp()
    fit(model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), batches(500, 4))


def long_after_convergence(batches: Batches) -> None:
    model = mlp(256)
    fit(model, torch.optim.Adam(model.parameters(), 1e-2), batches(800))


def full_batch_at_the_edge_of_stability(batches: Batches) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    whole = next(batches(1, 400))
    fit(model, torch.optim.SGD(model.parameters(), 1.0), iter([whole] * 400))


def batch_norm(batches: Batches) -> None:
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(576, 10),
    )  # fmt: skip
    fit(model, torch.optim.Adam(model.parameters(), 3e-3), batches(300))


def linear_probe(batches: Batches) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), mlp()[2])
    model[4] = nn.Linear(128, 10)
    model[:4].requires_grad_(False)
    fit(model, torch.optim.Adam(model[4].parameters(), 1e-2), batches(250))


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(64, 64).requires_grad_(False)
        self.lora_A = nn.Linear(64, 4, bias=False)
        self.lora_B = nn.Linear(4, 64, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.lora_B(self.lora_A(x))


def low_rank_adapters(batches: Batches) -> None:
    model = nn.Sequential(Adapted(), nn.ReLU(), Adapted(), nn.ReLU(), nn.Linear(64, 10))
    trained = [p for p in model.parameters() if p.requires_grad]
    fit(model, torch.optim.AdamW(trained, 5e-3), batches(250))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def zero_initialised_residuals(batches: Batches) -> None:
    model = nn.Sequential(Residual(), Residual(), nn.Linear(64, 10))
    fit(model, torch.optim.AdamW(model.parameters(), 3e-3), batches(300))


def rivals(batches: Batches) -> None:
    generator = nn.Sequential(nn.Linear(16, 64), nn.ReLU(True), nn.Linear(64, 64), nn.Sigmoid())
    critic = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    g = torch.optim.Adam(generator.parameters(), 2e-4, betas=(0.5, 0.999))
    d = torch.optim.Adam(critic.parameters(), 2e-4, betas=(0.5, 0.999))
    loss, real, fake = nn.BCEWithLogitsLoss(), torch.ones(64, 1), torch.zeros(64, 1)
    for x, _ in batches(250):
        z = torch.randn(64, 16)
        d.zero_grad()
        (loss(critic(x), real) + loss(critic(generator(z).detach()), fake)).backward()
        d.step()
        g.zero_grad()
        loss(critic(generator(z)), real).backward()
        g.step()


def accumulation(batches: Batches) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for k, (x, y) in enumerate(batches(600, 16)):
        (F.cross_entropy(model(x), y) / 3).backward()
        if k % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()


def by_hand(batches: Batches) -> None:
    model = mlp()
    for x, y in batches(250):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.data.add_(parameter.grad, alpha=-0.1)


def small_regression(_: Batches) -> None:
    model, x = nn.Linear(3, 1), torch.randn(16, 3)
    data = iter([(x, x.sum(1, keepdim=True))] * 60)
    fit(model, torch.optim.SGD(model.parameters(), 0.05), data, F.mse_loss)


CONTROLS = (
    momentum, batches_of_four, long_after_convergence, full_batch_at_the_edge_of_stability,
    batch_norm, linear_probe, low_rank_adapters, zero_initialised_residuals, rivals, accumulation,
    by_hand, small_regression,
)  # fmt: skip


@pytest.mark.parametrize("training", CONTROLS, ids=lambda training: training.__name__)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_alarm(training: Callable[[Batches], None], seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with watch(out=tmp_path / "run", verbose=False) as observer:
            training(digits())
    finally:
        torch.set_num_threads(threads)
    diagnosis = observer.diagnose(write=False)
    alarms = [
        (finding.source, finding.component, finding.message)
        for finding in diagnosis.findings
        if severity_rank(finding.severity) >= severity_rank("medium")
    ]
    assert alarms == []
    assert diagnosis.verdict == "healthy"
    assert not [e for e in observer.log.events if e.kind == "monitor_error"]
