"""Attention masks and weights, with the mistakes that are made there as options.

Every attention module of the subjects holds ``weigh``, a `functools.partial` of `weigh`, and every
model that masks holds ``visible``, one of `visible`. The defaults are right, and an operator sets
an option otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Mask = Callable[[Tensor], Tensor]  # a boolean mask, True where a key may be seen, to another


class Attends(Protocol):
    """An attention module that operators know how to get wrong."""

    weigh: Callable[..., Tensor]


def weigh(
    scores: Tensor,
    visible: Tensor | None,
    *,
    scale: float = 1.0,
    axis: int = -1,
    scale_afterwards: float = 1.0,
    score_dropout: float = 0.0,
    training: bool = True,
    mask: Mask | None = None,
) -> Tensor:
    """Softmax of scaled and masked scores.

    Args:
        scores: Products of queries and keys, (..., queries, keys).
        visible: True where a query may see a key, broadcastable to the scores; None: everywhere.
            A row in which nothing is visible weighs every key alike.
        scale: What the scores are multiplied by.
        axis: The axis that sums to one; right is the last.
        scale_afterwards: What the weights are multiplied by; right is 1.
        score_dropout: Share of scores that are set to zero before the softmax; right is 0.
        training: Whether dropout is active.
        mask: What is done to ``visible`` first; right is nothing.

    Returns:
        Weights, shaped like the scores.
    """
    scores = scores * scale
    scores = torch.dropout(scores, score_dropout, training) if score_dropout else scores
    if visible is not None:
        visible = visible if mask is None else mask(visible)
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=axis)
    return weights if scale_afterwards == 1.0 else weights * scale_afterwards


def visible(
    present: Tensor,
    *,
    causal: bool = False,
    padding: bool = True,
    padding_axis: int = -1,
    inverted: bool = False,
    nothing: bool = False,
    ahead: int = 0,
) -> Tensor:
    """Which keys each query may see in self-attention.

    Args:
        present: True where a position holds a token and not padding, (batch, length).
        causal: Only positions up to the query's own.
        padding: Whether padding is hidden; right is True.
        padding_axis: The axis on which it is hidden; right is the last, the keys.
        inverted: Whether hidden and visible change places; right is False.
        nothing: Whether nothing is visible to anybody; right is False.
        ahead: How many later positions a causal query sees as well; right is 0.

    Returns:
        A boolean mask, (batch, 1, queries, keys); the 1 is for the heads.
    """
    length = present.shape[1]
    mask = torch.ones(len(present), 1, length, length, dtype=torch.bool)
    if causal:
        mask = mask.tril(ahead)
    if padding:
        mask = mask & (
            present[:, None, None, :] if padding_axis == -1 else present[:, None, :, None]
        )
    if inverted:
        mask = ~mask
    return torch.zeros_like(mask) if nothing else mask
