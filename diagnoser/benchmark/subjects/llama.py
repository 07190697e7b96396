"""A3: a decoder with root-mean-square norms, rotary positions and gated feed-forward, on recall.

A sequence tells some pairs of a key and a value and then asks for every key again, each question
followed by its answer; predicting an answer needs attention to the pair (associative recall, Arora
et al. 2023).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diagnoser.benchmark.subjects.layers import join_heads, plus, split_heads
from diagnoser.benchmark.subjects.objectives import IGNORED, accuracy, smoothed_cross_entropy
from diagnoser.benchmark.subjects.splitting import apart
from diagnoser.injection.training import Batch, Data, Settings, Subject
from diagnoser.injection.weighing import visible, weigh

PAIRS, SYMBOLS, PADDING = 5, 10, 0
LENGTH = 4 * PAIRS - 1  # the last answer is never read
SPOILT = 0.04  # share of answers that are drawn anew, so that no model is always right
TRAIN, HELD_OUT = 16000, 500
ROTARY_BASE = 100.0  # sequences are short


@functools.cache
def data() -> Data:
    """Draws the sequences."""
    generator = torch.Generator().manual_seed(0)
    return apart(draw(TRAIN, generator), draw(HELD_OUT, generator))


def draw(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draws sequences, (count, LENGTH); targets are the answers, at the questions."""
    keys = torch.rand(count, SYMBOLS, generator=generator).argsort(-1)[:, :PAIRS]
    values = torch.randint(SYMBOLS, (count, PAIRS), generator=generator)
    again = torch.rand(count, PAIRS, generator=generator).argsort(-1)
    pairs = torch.stack([keys, values + SYMBOLS], dim=-1) + 1
    asked = pairs.gather(1, again[..., None].expand(-1, -1, 2))
    tokens = torch.cat([pairs, asked], dim=1).flatten(1)[:, :LENGTH]
    answers = values.gather(1, again)
    spoilt = torch.rand(count, PAIRS, generator=generator) < SPOILT
    other = torch.randint(SYMBOLS, (count, PAIRS), generator=generator)
    targets = torch.full_like(tokens, IGNORED)
    targets[:, 2 * PAIRS :: 2] = torch.where(spoilt, other, answers)
    return {"tokens": tokens, "targets": targets}


class RotaryAttention(nn.Module):
    """Attention that turns queries and keys by their positions (Su et al. 2021)."""

    inverse_frequencies: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        head = width // heads
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.register_buffer(
            "inverse_frequencies", ROTARY_BASE ** (-torch.arange(0, head, 2) / head)
        )
        self.split_heads = split_heads
        self.weigh = functools.partial(weigh, scale=1.0 / math.sqrt(head))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """(batch, length, width) and a (batch, 1, length, length) mask to new states."""
        query = self.turn(self.split_heads(self.query(states), self.heads))
        key = self.turn(self.split_heads(self.key(states), self.heads))
        value = self.split_heads(self.value(states), self.heads)
        weights = self.weigh(query @ key.transpose(-2, -1), mask)
        return self.output(join_heads(weights @ value))  # type: ignore[no-any-return]

    def turn(self, tensor: Tensor) -> Tensor:
        """Turns pairs (i, i + half) of (..., length, width of a head) by position and frequency."""
        angles = torch.arange(tensor.shape[-2])[:, None] * self.inverse_frequencies
        cosine, sine = angles.cos(), angles.sin()
        first, second = tensor.chunk(2, dim=-1)
        return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class GatedFeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): one linear map, through an activation, multiplies another."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.activation: Callable[[Tensor], Tensor] = F.silu

    def forward(self, states: Tensor) -> Tensor:
        """(..., width) to the same."""
        gated = self.activation(self.gate(states)) * self.up(states)
        return self.down(gated)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """A pre-norm block."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = RotaryAttention(width, heads)
        self.feed_forward_norm = nn.RMSNorm(width, eps=1e-6)
        self.feed_forward = GatedFeedForward(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.residual = plus

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """(batch, length, width) to the same."""
        change = self.attention(self.attention_norm(states), mask)
        states = self.residual(states, self.dropout(change))
        change = self.feed_forward(self.feed_forward_norm(states))
        return self.residual(states, self.dropout(change))


class Llama(nn.Module):
    """A decoder without biases (Touvron et al. 2023)."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.embedding = nn.Embedding(1 + 2 * SYMBOLS, width)
        self.visible = functools.partial(visible, causal=True)
        self.layers = nn.ModuleList(
            Layer(width, settings.heads, settings.dropout) for _ in range(settings.depth)
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, SYMBOLS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) to logits of values, (batch, length, symbols)."""
        mask = self.visible(tokens != PADDING)
        states = self.embedding(tokens)
        for layer in self.layers:
            states = layer(states, mask)
        return self.head(self.norm(states))  # type: ignore[no-any-return]


def predict(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a batch, (batch, length, symbols)."""
    return model(batch["tokens"])  # type: ignore[no-any-return]


LLAMA = Subject(
    id="A3",
    name="llama",
    split="train",
    summary="decoder with rotary positions and gated feed-forward, on associative recall",
    recipes={
        "a": Settings(steps=320, batch_size=40, learning_rate=4e-3, schedule="constant"),
        "b": Settings(
            steps=200, batch_size=40, learning_rate=4e-3, optimizer="adam", betas=(0.9, 0.99),
            weight_decay=0.0, warmup=0.1, schedule="constant",
        ),
        "c": Settings(
            steps=220, batch_size=48, learning_rate=6e-3, weight_decay=0.1, depth=3, width=24,
            heads=2,
        ),
    },
    data=data,
    build=Llama,
    predict=predict,
    criterion=smoothed_cross_entropy,
    score=accuracy,
    score_name="accuracy",
)  # fmt: skip
