"""Tiny models with every kind of layer that is measured, and their dense Hessians in float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diagnoser.types import Component, Part


class TinyTransformer(nn.Module):
    """One block: fused in_proj attention, layer norm, a feed-forward layer, a head."""

    def __init__(self, *, need_weights: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.feed_forward = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.need_weights = need_weights
        self.causal = causal

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        length = tokens.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1) if self.causal else None
        attended, _ = self.attention(x, x, x, need_weights=self.need_weights, attn_mask=mask)
        x = self.norm(x + attended)
        return self.head((x + F.gelu(self.feed_forward(x))).mean(1))


class TinyHAN(nn.Module):
    """A bidirectional GRU over padded words, then additive attention (Yang et al. 2016)."""

    def __init__(self, *, packed: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3, padding_idx=0)
        self.gru = nn.GRU(3, 2, batch_first=True, bidirectional=True)
        self.projection = nn.Linear(4, 3)
        self.context = nn.Linear(3, 1, bias=False)
        self.head = nn.Linear(4, 3)
        self.packed = packed

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.packed:
            lengths = (tokens != 0).sum(1)
            rows = nn.utils.rnn.pack_padded_sequence(
                x, lengths, batch_first=True, enforce_sorted=False
            )
            h, _ = nn.utils.rnn.pad_packed_sequence(
                self.gru(rows)[0], batch_first=True, total_length=tokens.shape[1]
            )
        else:
            h, _ = self.gru(x)
        scores = self.context(torch.tanh(self.projection(h))).squeeze(-1)
        weights = scores.masked_fill(tokens == 0, -math.inf).softmax(-1)
        return self.head((weights.unsqueeze(-1) * h).sum(1))


def batch(seed: int = 0, size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 7, (size, 4), generator=generator)
    tokens[0, 2:] = 0
    return tokens, torch.randint(0, 3, (size,), generator=generator)


def build(
    model: type[nn.Module], dtype: torch.dtype = torch.float64, **arguments: bool
) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        made = model(**arguments).double()  # one draw, whatever the precision
        for parameter in made.parameters():  # away from zero biases, where much is zero by chance
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return made.to(dtype)


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    tokens, labels = batch(seed)
    return F.cross_entropy(model(tokens), labels)


def dense(loss: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """Returns the full Hessian, row by row, through plain autograd."""
    tensors = list(parameters.values())
    gradients = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
    rows = []
    for tensor, gradient in zip(tensors, gradients, strict=True):
        for k in range(tensor.numel()):
            row: tuple[Tensor | None, ...] = (None,) * len(tensors)
            if gradient is not None and gradient.requires_grad:
                row = torch.autograd.grad(
                    gradient.reshape(-1)[k], tensors, retain_graph=True, allow_unused=True
                )
            rows.append(
                torch.cat(
                    [
                        (torch.zeros_like(t) if r is None else r).reshape(-1)
                        for t, r in zip(tensors, row, strict=True)
                    ]
                )
            )
    return torch.stack(rows)


def positions(parts: tuple[Part, ...], parameters: dict[str, Tensor]) -> Tensor:
    """Returns where the block's elements stand in the dense Hessian."""
    index: dict[str, Tensor] = {}
    offset = 0
    for name, p in parameters.items():
        index[name] = torch.arange(offset, offset + p.numel()).view(p.shape)
        offset += p.numel()
    return torch.cat([part.view(index[part.parameter]).reshape(-1) for part in parts])


def component(name: str, *parts: Part, kind: str = "other") -> Component:
    return Component(name=name, kind=kind, layer=name, order=0, parts=parts, elements=0)


def in_proj(name: str, third: int) -> tuple[Part, ...]:
    return (
        Part(f"{name}.in_proj_weight", 0, 4 * third, 4),
        Part(f"{name}.in_proj_bias", 0, 4 * third, 4),
    )


def transformer_components() -> list[Component]:
    return [
        component("embedding", Part("embedding.weight")),
        component("query", *in_proj("attention", 0)),
        component("key", *in_proj("attention", 1)),
        component("value", *in_proj("attention", 2)),
        component("out", Part("attention.out_proj.weight"), Part("attention.out_proj.bias")),
        component("norm", Part("norm.weight"), Part("norm.bias")),
        component("feed_forward", Part("feed_forward.weight"), Part("feed_forward.bias")),
        component("head", Part("head.weight"), Part("head.bias")),
    ]


def random_vector(parameters: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for n, p in parameters.items()
    }


def flat(vector: dict[str, Tensor]) -> Tensor:
    return torch.cat([v.reshape(-1) for v in vector.values()])
