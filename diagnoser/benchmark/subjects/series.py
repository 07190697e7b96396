"""A8: an encoder on time series, a regression.

A series is autoregressive noise, and a second channel marks one time; the target is what the
series was some steps before the mark, which no place knows by itself.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diagnoser.benchmark.subjects.layers import Attention, PreNormLayer
from diagnoser.injection.training import Batch, Criterion, Data, Settings, Subject

LENGTH, LAG = 10, 1
SLOWEST = 10.0  # time units a radian
MEMORY = 0.5  # share of a value that the next one keeps
NOISE = 0.1  # of the target, standard deviations
TRAIN, HELD_OUT = 12000, 600


@functools.cache
def data() -> Data:
    """Draws the series."""
    generator = torch.Generator().manual_seed(0)
    return Data(train=draw(TRAIN, generator), held_out=draw(HELD_OUT, generator))


def draw(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draws series, (count, LENGTH, 2), of mean 0 and variance 1, and targets (count,)."""
    fresh = torch.randn(count, LENGTH, generator=generator)
    values = [fresh[:, 0]]
    for time in range(1, LENGTH):
        values.append(MEMORY * values[-1] + (1.0 - MEMORY**2) ** 0.5 * fresh[:, time])
    series = torch.stack(values, dim=1)
    at = torch.randint(LAG, LENGTH, (count, 1), generator=generator)
    flag = torch.zeros(count, LENGTH).scatter_(1, at, 1.0)
    targets = series.gather(1, at - LAG).squeeze(1)
    targets = targets + NOISE * torch.randn(count, generator=generator)
    return {"inputs": torch.stack([series, flag], dim=-1), "targets": targets}


def waves(width: int) -> Tensor:
    """Sines and cosines of the time, (LENGTH, width); a shift in time is a linear map of them."""
    angles = torch.arange(LENGTH)[:, None] * SLOWEST ** (-torch.linspace(0, 1, width // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class SeriesEncoder(nn.Module):
    """Linear embedding, learned positions, pre-norm blocks, the mean of all times, one number."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width, heads = settings.width, settings.heads
        self.embedding = nn.Linear(2, width)
        self.positions = nn.Buffer(waves(width))
        self.position_scale = 1.0
        self.layers = nn.ModuleList(
            PreNormLayer(Attention(width, heads), width, settings.dropout)
            for _ in range(settings.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

    def forward(self, series: Tensor) -> Tensor:
        """(batch, length, 2) to (batch,)."""
        states = self.embedding(series) + self.position_scale * self.positions
        for layer in self.layers:
            states = layer(states)
        return self.head(self.norm(states).mean(1)).squeeze(-1)  # type: ignore[no-any-return]


def predict(model: nn.Module, batch: Batch) -> Tensor:
    """What is predicted of a batch, (batch,)."""
    return model(batch["inputs"])  # type: ignore[no-any-return]


def squared_error(_: Settings) -> Criterion:
    """Returns the mean squared error."""
    return F.mse_loss


def explained(outputs: Tensor, targets: Tensor) -> float:
    """Share of the variance that is explained, R squared."""
    return 1.0 - float(F.mse_loss(outputs, targets) / targets.var(unbiased=False))


SERIES = Subject(
    id="A8",
    name="series",
    split="test",
    summary="encoder on time series, pre-norm, a regression",
    recipes={
        "a": Settings(steps=400, batch_size=40, learning_rate=4e-3),
        "b": Settings(
            steps=400, batch_size=48, learning_rate=3e-3, optimizer="adam", betas=(0.9, 0.98),
            weight_decay=0.0, warmup=0.1, schedule="constant",
        ),
        "c": Settings(
            steps=350, batch_size=40, learning_rate=5e-3, betas=(0.9, 0.95), weight_decay=0.1,
            width=24, heads=2, depth=3, schedule="constant",
        ),
    },
    data=data,
    build=SeriesEncoder,
    predict=predict,
    criterion=squared_error,
    score=explained,
    score_name="explained variance",
)  # fmt: skip
