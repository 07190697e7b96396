"""A small subject for tests of injection: a padded classifier with three blocks, and a decoder.

Both hold what the operators look for, and train in a fraction of a second.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diagnoser.injection import Data, Settings, Subject
from diagnoser.injection.training import Batch
from diagnoser.injection.weighing import visible, weigh

WORDS, LENGTH, CLASSES = 6, 5, 3
SAMPLES = 560


def plus(states: Tensor, change: Tensor) -> Tensor:
    return states + change


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, rotary: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.split_heads = split_heads
        self.weigh = functools.partial(weigh, scale=1 / math.sqrt(width // heads))
        if rotary:
            half = width // heads // 2
            self.register_buffer("inverse_frequencies", 0.5 ** torch.arange(1.0, half + 1.0))

    def turn(self, tensor: Tensor) -> Tensor:
        if not hasattr(self, "inverse_frequencies"):
            return tensor
        angles = torch.arange(tensor.shape[2])[:, None] * self.inverse_frequencies
        first, second = tensor.chunk(2, dim=-1)
        return torch.cat(
            [
                first * angles.cos() - second * angles.sin(),
                first * angles.sin() + second * angles.cos(),
            ],
            dim=-1,
        )

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        query, key = (
            self.turn(self.split_heads(part(states), self.heads)) for part in (self.query, self.key)
        )
        value = self.split_heads(self.value(states), self.heads)
        weights = self.weigh(query @ key.transpose(-2, -1), mask)
        return self.output((weights @ value).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.activation = F.gelu

    def forward(self, states: Tensor) -> Tensor:
        return self.down(self.activation(self.up(states)))


class Block(nn.Module):
    def __init__(self, settings: Settings, rotary: bool) -> None:
        super().__init__()
        width = settings.width
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, settings.heads, rotary)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)
        self.dropout = nn.Dropout(settings.dropout)
        self.residual = plus

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        change = self.attention(self.attention_norm(states), mask)
        states = self.residual(states, self.dropout(change))
        change = self.feed_forward(self.feed_forward_norm(states))
        return self.residual(states, self.dropout(change))


class Model(nn.Module):
    def __init__(self, settings: Settings, *, decodes: bool) -> None:
        super().__init__()
        width = settings.width
        self.decodes = decodes
        self.embedding = nn.Embedding(WORDS, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.position_scale = 1.0
        self.visible = functools.partial(visible, causal=decodes)
        self.layers = nn.ModuleList(Block(settings, decodes) for _ in range(settings.depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, WORDS if decodes else CLASSES)

    def forward(self, tokens: Tensor, inputs: Tensor) -> Tensor:
        mask = self.visible(tokens != 0)
        states = self.embedding(tokens) + self.position_scale * self.positions.weight
        states = states + inputs[:, None, None]
        for layer in self.layers:
            states = layer(states, mask)
        states = self.norm(states)
        return self.head(states if self.decodes else states.mean(1))


@functools.cache
def data(decodes: bool) -> Data:
    """The class is the first token's; the decoder is asked for the next token."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, WORDS, (SAMPLES, LENGTH), generator=generator)
    length = torch.randint(3, LENGTH + 1, (SAMPLES, 1), generator=generator)
    tokens = tokens.masked_fill(torch.arange(LENGTH) >= length, 0)
    if decodes:
        targets = tokens.roll(-1, 1)
        targets[:, -1] = 0
        targets = targets.masked_fill(targets == 0, -100)
    else:
        targets = tokens[:, 0] % CLASSES
    batch = {"tokens": tokens, "inputs": 0.1 * torch.randn(SAMPLES, generator=generator)}
    batch["targets"] = targets
    return Data(
        train={name: tensor[40:] for name, tensor in batch.items()},
        held_out={name: tensor[:40] for name, tensor in batch.items()},
    )


def predict(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["tokens"], batch["inputs"])


def cross_entropy(outputs: Tensor, targets: Tensor, *, smoothing: float) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), label_smoothing=smoothing)


def criterion(settings: Settings) -> functools.partial[Tensor]:
    return functools.partial(cross_entropy, smoothing=settings.label_smoothing)


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    asked = targets != -100
    return float((outputs.argmax(-1) == targets)[asked].double().mean())


SETTINGS = Settings(steps=16, batch_size=32, learning_rate=5e-3, width=8, heads=2, depth=3)


def subject(name: str) -> Subject:
    """``classifier`` or ``decoder``."""
    decodes = name == "decoder"
    return Subject(
        id="T",
        name=name,
        split="dev",
        summary="for tests",
        recipes={"a": SETTINGS},
        data=lambda: data(decodes),
        build=lambda settings: Model(settings, decodes=decodes),
        predict=predict,
        criterion=criterion,
        score=accuracy,
        score_name="accuracy",
    )


CLASSIFIER, DECODER = subject("classifier"), subject("decoder")
