r"""The trace of a Hessian block by Hutchinson's estimator, with the interval it deserves.

.. math::
    \operatorname{tr} H = \mathbb{E}[z^\top H z], \qquad z_k = \pm 1 \text{ with equal chance}

(Hutchinson 1990, A stochastic estimator of the trace of the influence matrix). One random vector
has the variance :math:`2 (\|H\|_F^2 - \sum_k H_{kk}^2)`: for a block whose trace is small beside
its Frobenius norm no affordable number of vectors gives a small relative error. The estimator
therefore stops by its own standard error, and an undecided sign stays visible as one
(:math:`|value| \le 2.5` standard errors) instead of being returned as if it were known.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from diagnoser.curvature.batches import estimates_over_chunks
from diagnoser.curvature.operator import Block, Operator
from diagnoser.types import Estimate

DECISION = 2.5
"""A sign counts as decided when the value is this many standard errors away from zero."""

_LEAST = 8  # random vectors before the spread between them is trusted
_EVERY = 4  # random vectors between two looks at it: a look waits for the device


def hutchinson_trace(
    hessian: Operator,
    block: Block,
    generator: torch.Generator,
    *,
    max_products: int = 100,
    relative_error: float = 0.05,
    floor: float | None = None,
    decide: Literal["sign"] | None = None,
) -> Estimate:
    r"""Returns the trace of the block's diagonal Hessian block.

    Stops when the standard error is at most ``relative_error`` times max(|value|, ``floor``) or,
    with ``decide="sign"``, as soon as the sign is decided (`DECISION`); at the latest after
    ``max_products`` random vectors. A block of at most that many elements is summed exactly, by
    unit vectors. With at least two chunks, ``batch_std_error`` is the spread of the chunks' values.

    Args:
        hessian: The operator; each random vector costs one block product a chunk.
        block: The parts to restrict it to.
        generator: Source of the random vectors, so that the user's streams stay untouched.
        max_products: The largest number of random vectors.
        relative_error: The aim; 0 uses all of ``max_products``.
        floor: Smallest magnitude that a relative error refers to; None: the Frobenius norm of the
            block as the same products estimate it, :math:`\sqrt{E \|H z\|^2}`.
        decide: ``"sign"`` stops on the decided sign instead of on the relative error.
    """
    size = hessian.size(block)
    if size <= max_products:
        return exact_trace(hessian, block, size)

    like = hessian.like(block)
    values: list[Tensor] = []  # a row of chunk values each
    squares: list[Tensor] = []  # ||H z||^2 each
    error = math.nan
    for count in range(1, max_products + 1):
        z = random_signs(size, generator, like)
        value, square = _quadratic(hessian, block, z)
        values.append(value)
        squares.append(square)
        if count < max_products and (count < _LEAST or count % _EVERY):
            continue
        probes = torch.stack(values).mean(1)
        # A single probe has no spread: its error is not known, and NaN says so.
        spread = probes.std() if count > 1 else torch.full_like(probes[0], math.nan)
        summary = torch.stack([probes.mean(), spread, torch.stack(squares).mean()])
        mean, deviation, square_mean = summary.tolist()
        error = deviation / math.sqrt(count)
        if decide == "sign":
            done = abs(mean) > DECISION * error
        else:
            least = math.sqrt(square_mean) if floor is None else floor
            done = error <= relative_error * max(abs(mean), least)
        if done:
            break
    return estimates_over_chunks(
        torch.stack(values).mean(0).unsqueeze(1),
        std_errors=[error],
        samples=len(values),
        method="hutchinson",
        dtype=hessian.dtype,
    )[0]


def random_signs(size: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Returns ``size`` independent random signs, of ``like``'s type and device."""
    bits = torch.randint(0, 2, (size,), generator=generator, device=generator.device)
    return (2 * bits - 1).to(like)


def _quadratic(hessian: Operator, block: Block, z: Tensor) -> tuple[Tensor, Tensor]:
    """Returns z'Hz of each chunk, (chunks,), and the squared norm of their mean H z."""
    products = [chunk.block_product(block, z) for chunk in hessian.chunks]
    values = torch.stack([(z * Hz).sum(dtype=torch.float64) for Hz in products])
    mean = products[0] if len(products) == 1 else torch.stack(products).mean(0)
    return values, torch.linalg.vector_norm(mean, dtype=torch.float64).square()


def exact_trace(hessian: Operator, block: Block, size: int) -> Estimate:
    """Returns the trace of a block of ``size`` elements from as many products with unit vectors."""
    like = hessian.like(block)
    diagonals: list[Tensor] = []
    for k in range(size):
        unit = torch.zeros(size, dtype=like.dtype, device=like.device)
        unit[k] = 1.0
        rows = [chunk.block_product(block, unit)[k] for chunk in hessian.chunks]
        diagonals.append(torch.stack(rows).to(torch.float64))
    table = torch.stack(diagonals).sum(0).unsqueeze(1)
    return estimates_over_chunks(table, samples=size, dtype=hessian.dtype)[0]
