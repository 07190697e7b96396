"""A small model with an attention that can be written in many ways, right and wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diagnoser.checks import Call, Calls, Found, LossCall, Seen, examine
from diagnoser.monitor.subject import Subject

VOCABULARY, WIDTH, HEADS, LENGTH, CLASSES, PADDING = 20, 16, 4, 9, 3, 0


class Attention(nn.Module):
    """Hand-written, with a mistake if one is named."""

    def __init__(self, mistake: str = "") -> None:
        super().__init__()
        self.mistake = mistake
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        if mistake == "zero":
            for projection in (self.query, self.key):
                nn.init.zeros_(projection.weight)
                nn.init.zeros_(projection.bias)
        if mistake == "alike":
            nn.init.constant_(self.value.weight, 0.1)

    def split(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        if self.mistake == "scrambled":
            return x.view(batch, HEADS, length, -1)
        return x.view(batch, length, HEADS, -1).transpose(1, 2)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        mistake = self.mistake
        query, key, value = self.query(x), self.key(x), self.value(x)
        if mistake == "shared":
            query = key
        if mistake == "heads":
            query, key = (t[..., :4].repeat(1, 1, HEADS) for t in (query, key))
        query, key, value = self.split(query), self.split(key), self.split(value)
        width = query.shape[-1]
        scale = {"unscaled": 1.0, "model": 1 / math.sqrt(WIDTH), "twice": 1 / width}.get(
            mistake, 1 / math.sqrt(width)
        )
        scores = query @ key.transpose(-2, -1)
        if mistake == "learned":
            scores = scores * self.temperature
        elif mistake != "after":
            scores = scores * scale
        hidden = padded[:, None, None, :]
        if mistake == "inverted":
            hidden = ~hidden
        if mistake == "queries":
            hidden = padded[:, None, :, None]
        if mistake == "everything":
            hidden = torch.ones_like(hidden)
        if mistake == "half":
            scores = scores.half()
        if mistake == "causal":
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            hidden = hidden | later
        if mistake not in ("unmasked", "mask after"):
            fill = -10.0 if mistake == "weak mask" else -1e9 if mistake != "half" else -6e4
            if mistake == "weak mask":
                scores = scores * 100.0
            scores = scores.masked_fill(hidden, fill)
        axis = {"axis": -2, "heads axis": 1, "batch": 0}.get(mistake, -1)
        weights = scores.softmax(axis).to(value.dtype)
        if mistake == "after":
            weights = weights / math.sqrt(width)
        if mistake == "mask after":
            weights = weights.masked_fill(hidden, 0.0)
        mixed = weights @ value
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, mistake: str) -> None:
        super().__init__()
        self.mistake = mistake
        self.norm = nn.Identity() if mistake == "no norm" else nn.LayerNorm(WIDTH)
        self.attention = Attention(mistake)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        if self.mistake == "residual behind norm":
            x = self.norm(x)
            return x + self.attention(x, padded)
        mixed = self.attention(self.norm(x), padded)
        return mixed if self.mistake == "no residual" else x + mixed


class Classifier(nn.Module):
    """Tokens (batch, length), padded with zeros, to one class each."""

    def __init__(self, mistake: str = "", depth: int = 2) -> None:
        super().__init__()
        self.mistake = mistake
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=PADDING)
        self.positions = nn.Parameter(torch.randn(1, LENGTH, WIDTH))
        self.blocks = nn.ModuleList(Block(mistake) for _ in range(depth))
        if mistake == "tied":
            self.blocks[1].attention.query.weight = self.blocks[0].attention.query.weight
        if mistake == "one block":
            self.blocks[1] = self.blocks[0]
        if mistake == "learned":
            for block in self.blocks:
                block.attention.temperature = nn.Parameter(torch.ones(1))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        padded = tokens == PADDING
        x = self.embedding(tokens)
        if self.mistake != "no positions":
            x = x + self.positions
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, padded)
        if self.mistake == "batch mean":
            x = x + x.mean(0, keepdim=True)
        if self.mistake == "pooled padding":
            return self.head(x.mean(1))
        seen = (~padded).unsqueeze(-1)
        return self.head((x * seen).sum(1) / seen.sum(1))


def batch(size: int = 16) -> tuple[Tensor, Tensor]:
    """Tokens with padding of many lengths, and classes."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCABULARY, (size, LENGTH), generator=generator)
    lengths = torch.randint(3, LENGTH + 1, (size, 1), generator=generator)
    tokens[torch.arange(LENGTH) >= lengths] = PADDING
    return tokens, torch.randint(CLASSES, (size,), generator=generator)


def checked(
    model: nn.Module,
    *inputs: Tensor,
    loss: Tensor | None = None,
    target: Tensor | None = None,
    output: object = None,
    optimizer: torch.optim.Optimizer | None = None,
    step: int = 0,
    losses: Sequence[LossCall] = (),
    memory: dict[str, Any] | None = None,
) -> Found:
    """Runs all checks on one call of a model, as the monitor would."""
    given = model(*inputs) if output is None else output
    if loss is None:
        loss = F.cross_entropy(given, target)
    subject = Subject({"": model}, {})
    calls = Calls([Call(model, inputs, {}, given, model.training, True, None)], list(losses))
    optimizers = [optimizer or torch.optim.AdamW(model.parameters())]
    kept = {} if memory is None else memory
    return examine(Seen(step, calls, loss, subject.parameters, subject.layer_of, optimizers, kept))


def numbers(found: Found, quantity: str) -> list[float]:
    """All values of a quantity, in the order of the model."""
    return [row.estimate.value for row in found.rows if row.quantity == quantity]
