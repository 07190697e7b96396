"""A1: a vision transformer on handwritten digits (8 x 8 pixels, UCI), 16 patches an image."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from diagnoser.benchmark.subjects.layers import Attention, PreNormLayer
from diagnoser.benchmark.subjects.objectives import accuracy, smoothed_cross_entropy
from diagnoser.benchmark.subjects.packages import folder_of
from diagnoser.injection.training import Batch, Data, Settings, Subject

HELD_OUT = 500
PATCH, PATCHES = 2, 16
BRIGHTEST = 16.0
CLASSES = 10


@functools.cache
def data() -> Data:
    """Reads the digits that scikit-learn ships and splits them.

    Raises:
        BenchmarkError: scikit-learn is not installed.
    """
    folder_of("sklearn", "vit", "pip install scikit-learn")
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    inputs = torch.tensor(digits.images, dtype=torch.float32) / BRIGHTEST - 0.5
    targets = torch.tensor(digits.target, dtype=torch.long)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    first, rest = order[:HELD_OUT], order[HELD_OUT:]
    return Data(
        train={"inputs": inputs[rest], "targets": targets[rest]},
        held_out={"inputs": inputs[first], "targets": targets[first]},
    )


class VisionTransformer(nn.Module):
    """Patches, learned positions, pre-norm blocks, the mean of all places, a linear head."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width, heads = settings.width, settings.heads
        self.embedding = nn.Linear(PATCH * PATCH, width)
        self.positions = nn.Parameter(0.1 * torch.randn(PATCHES, width))
        self.position_scale = 1.0
        self.layers = nn.ModuleList(
            PreNormLayer(Attention(width, heads), width, settings.dropout)
            for _ in range(settings.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 8, 8) to logits (batch, classes)."""
        rows = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
        states = self.embedding(rows.flatten(3).flatten(1, 2))
        states = states + self.position_scale * self.positions
        for layer in self.layers:
            states = layer(states)
        return self.head(self.norm(states).mean(1))  # type: ignore[no-any-return]


def predict(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a batch, (batch, classes)."""
    return model(batch["inputs"])  # type: ignore[no-any-return]


VIT = Subject(
    id="A1",
    name="vit",
    split="train",
    summary="vision transformer, pre-norm, learned positions, on handwritten digits",
    recipes={
        "a": Settings(steps=300, batch_size=64, learning_rate=3e-3, weight_decay=0.05),
        "b": Settings(
            steps=400, batch_size=32, learning_rate=3e-3, optimizer="adam", betas=(0.9, 0.98),
            weight_decay=0.0, warmup=0.1, schedule="constant", width=24, depth=3, dropout=0.05,
        ),
        "c": Settings(
            steps=400, batch_size=48, learning_rate=0.1, optimizer="sgd", weight_decay=0.0,
            schedule="constant",
        ),
    },
    data=data,
    build=VisionTransformer,
    predict=predict,
    criterion=smoothed_cross_entropy,
    score=accuracy,
    score_name="accuracy",
    packages=("scikit-learn",),
)  # fmt: skip
