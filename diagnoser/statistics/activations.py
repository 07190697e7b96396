"""What goes into every matrix product with a parameter, as the autograd graph keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnoser.statistics.nodes import Node, is_there, operation_of

MOST_ELEMENTS = 131_072  # that are looked at of one input
SAVED_INPUT = {"Mm": "_saved_self", "Addmm": "_saved_mat1", "Convolution": "_saved_input"}


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """The activations that one parameter multiplies in the forward, as rows of features.

    ``scale`` is their root mean square (1 behind a norm), ``similarity`` the cosine of two rows on
    average, of different samples or positions (1: all rows say the same, Dong et al. 2021,
    2103.03404), ``zero_share`` the share of exact zeros (dead ReLU units). NaN where a number is
    not finite.
    """

    parameter: Tensor
    scale: float
    similarity: float
    zero_share: float


def saved_input(node: Node) -> Tensor | None:
    """Returns the rows that an operation multiplies with its parameter, (rows, features)."""
    kind = operation_of(node)
    saved: Tensor | None = getattr(node, SAVED_INPUT.get(kind, ""), None)
    if saved is None or not is_there(saved):  # None: the weight needs no gradient
        return None
    saved = saved.movedim(1, -1) if kind == "Convolution" else saved  # channels are its features
    return saved.reshape(-1, saved.shape[-1])


def read_inputs(found: Sequence[tuple[Tensor, Tensor]]) -> list[InputStatistics]:
    """Sums up the input rows (rows, features) of parameters; of long inputs evenly spaced rows."""
    if not found:
        return []
    device = found[0][1].device
    numbers = torch.stack([_numbers(rows).to(device) for _, rows in found]).tolist()
    return [
        InputStatistics(parameter, *three)
        for (parameter, _), three in zip(found, numbers, strict=True)
    ]


def _numbers(rows: Tensor) -> Tensor:
    rows = rows[:: max(1, -(-rows.numel() // MOST_ELEMENTS))].float()
    length = rows.norm(dim=1, keepdim=True)
    unit = torch.where(length > 0, rows / length, 0.0)
    count = (length > 0).sum()
    # The mean cosine of different rows: the square of their sum holds each row with itself, too.
    total = unit.sum(dim=0).square().sum()
    return torch.stack(
        [
            rows.square().mean().sqrt(),
            torch.where(count > 1, (total - count) / (count * (count - 1)), torch.nan),
            (rows == 0).float().mean(),
        ]
    )
