"""From values per chunk of a probe set to estimates: the error that other samples would make."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diagnoser.types import Estimate


def estimates_over_chunks(
    values: Tensor,
    *,
    std_errors: Sequence[float] | None = None,
    samples: int | None = None,
    method: str = "exact",
    dtype: str = "float32",
) -> list[Estimate]:
    """Returns one estimate a column: the mean over chunks and its standard error over chunks.

    Args:
        values: (chunks, quantities), read out from its device once.
        std_errors: What the estimator does not know, a quantity each; None: nothing (0.0).
        samples: Random vectors behind ``std_errors``; None: the number of chunks, when there are
            at least two.
        method: How the values were obtained.
        dtype: The precision they rest on.
    """
    chunks = values.shape[0]
    table = values.to(torch.float64)
    mean = table.mean(0)
    # One chunk says nothing about its spread: not known, rather than zero.
    spread = table.std(0) / math.sqrt(chunks) if chunks > 1 else torch.full_like(mean, math.nan)
    means, spreads = torch.stack([mean, spread]).tolist()
    return [
        Estimate(
            value=m,
            std_error=0.0 if std_errors is None else std_errors[i],
            batch_std_error=s if chunks > 1 else None,
            samples=samples if samples is not None else (chunks if chunks > 1 else None),
            method=method,
            dtype=dtype,
        )
        for i, (m, s) in enumerate(zip(means, spreads, strict=True))
    ]
