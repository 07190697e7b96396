"""What the subjects' models are built of, with the math of attention written out.

Whatever a mistake can be made in is an attribute (`weigh`, `split_heads`, `residual`,
`activation`), so that an operator replaces it and the code that runs stays the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from diagnoser.injection.weighing import weigh


def plus(states: Tensor, change: Tensor) -> Tensor:
    """The residual addition of a block."""
    return states + change


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    """(batch, length, width) to (batch, heads, length, width of a head)."""
    batch, length, width = tensor.shape
    return tensor.view(batch, length, heads, width // heads).transpose(1, 2)


def join_heads(tensor: Tensor) -> Tensor:
    """(batch, heads, length, width of a head) to (batch, length, width)."""
    return tensor.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Scaled dot-product attention with several heads (Vaswani et al. 2017, eq. 1)."""

    def __init__(self, width: int, heads: int, *, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)
        self.split_heads = split_heads
        self.weigh = functools.partial(weigh, scale=1.0 / math.sqrt(width // heads))

    def forward(
        self, states: Tensor, mask: Tensor | None = None, source: Tensor | None = None
    ) -> Tensor:
        """Attends from states to a source, or to themselves.

        Args:
            states: (batch, queries, width).
            mask: True where a query may see a key, (batch, 1, queries or 1, keys); None: all.
            source: (batch, keys, width); None: the states.

        Returns:
            What was attended to, (batch, queries, width).
        """
        source = states if source is None else source
        query = self.split_heads(self.query(states), self.heads)
        key = self.split_heads(self.key(source), self.heads)
        value = self.split_heads(self.value(source), self.heads)
        weights = self.weigh(query @ key.transpose(-2, -1), mask)
        return self.output(join_heads(weights @ value))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """Up, activation, down, at every position alike."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.activation: Callable[[Tensor], Tensor] = F.gelu

    def forward(self, states: Tensor) -> Tensor:
        """(..., width) to the same."""
        return self.down(self.activation(self.up(states)))  # type: ignore[no-any-return]


class PreNormLayer(nn.Module):
    """A block that normalises what each half reads (Xiong et al. 2020)."""

    def __init__(self, attention: nn.Module, width: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = attention
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.residual = plus

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """(batch, length, width) to the same."""
        change = self.attention(self.attention_norm(states), mask)
        states = self.residual(states, self.dropout(change))
        change = self.feed_forward(self.feed_forward_norm(states))
        return self.residual(states, self.dropout(change))


class PostNormLayer(nn.Module):
    """A block that normalises what each half leaves behind, as in the first transformer."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, 2 * width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.residual = plus

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """(batch, length, width) to the same."""
        change = self.attention(states, mask)
        states = self.attention_norm(self.residual(states, self.dropout(change)))
        change = self.feed_forward(states)
        return self.feed_forward_norm(  # type: ignore[no-any-return]
            self.residual(states, self.dropout(change))
        )
