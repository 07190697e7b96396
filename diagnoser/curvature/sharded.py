r"""Curvature along a step where FSDP2 spreads parameters over ranks, by central differences.

Neither whole parameters nor a graph that can be differentiated twice is to be had there, only
gradients, by a forward and a backward of the model. With :math:`g` at two lengths on both sides

.. math:: d_i^\top (H d)_i \approx D_i(h)
    = \frac{d_i^\top \left[ g(\theta + h d) - g(\theta - h d) \right]_i}{2 h}

for all components *i* at once; :math:`(16\, D(h/4) - D(h)) / 15` is what is given, and how far both
are apart its stated error (see `finite_difference`, whose step lengths these are). Lengths are
fixed: a search would have to end alike on all ranks.

The model's passes are collectives, and so are two sums. All ranks must come here at the same step,
and a rank that fails on the way leaves the others waiting; so it is done where the program gave a
probe to measure on, and not otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from diagnoser.curvature.along import RowCurvature
from diagnoser.curvature.finite_difference import FIRST_PAIR, MARGIN, STEPS
from diagnoser.curvature.hessian import check_loss
from diagnoser.errors import MeasurementError
from diagnoser.types import Component, Estimate

METHOD = "central difference"


@dataclass(frozen=True, slots=True)
class ShardedAlong:
    """Curvature along a step on all ranks together.

    ``descent`` is g_i'd_i of each component, ``metric`` d_i'P_i d_i as far as P is known.
    """

    rows: RowCurvature
    descent: tuple[float, ...]
    metric: Mapping[str, float]
    loss: float


def sharded_row_curvature(
    losses: Sequence[Callable[[], Tensor]],
    parameters: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    weighted: Mapping[str, Tensor],
    components: Sequence[Component],
) -> ShardedAlong:
    """Returns d_i'(Hd)_i of every component, from four gradients of the mean loss of all ranks.

    Parameters and their ``.grad`` are put back, bit for bit, also after an exception.

    Args:
        losses: Compute this rank's losses, whose mean is meant.
        parameters: What is trained, by name, as the optimizer has it.
        own: The memory of their elements on this rank.
        direction: The step, of these elements.
        weighted: ``P d``, where it is known.
        components: With the parts that are on this rank, each element on one rank alone.

    Raises:
        MeasurementError: There is no step, or a gradient is not finite.
    """
    everything = [part for component in components for part in component.parts]
    first = next(iter(own.values()))

    def dots(*pairs: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]) -> Tensor:
        """Inner products per component, of all ranks: (pairs, components)."""
        table = first.new_zeros(len(pairs), len(components), dtype=torch.float64)
        for k, (a, b) in enumerate(pairs):
            for i, component in enumerate(components):
                for part in component.parts:
                    if part.parameter in a and part.parameter in b:
                        left, right = part.view(a[part.parameter]), part.view(b[part.parameter])
                        table[k, i] += (left.double() * right.double()).sum()
        dist.all_reduce(table)
        return table

    moved = {name: own[name] for name in direction}
    squares = dots((moved, moved), (direction, direction), (direction, weighted))
    size, length = squares[0].sum().sqrt().item(), squares[1].sum().sqrt().item()
    if not everything or not length > 0:
        raise MeasurementError("the step is zero or not finite: there is nothing to measure along")
    total_loss = 0.0
    gradients = []
    for share in (STEPS[FIRST_PAIR], STEPS[FIRST_PAIR + 1]):
        h = share * size / length
        for step in (h, -h):
            with _moved(moved, direction, step):
                loss, gradient = _gradient(losses, parameters, own)
            gradients.append((h, gradient))
            total_loss += loss / 4
    (long, a), (_, b), (short, c), (_, d) = gradients
    table = dots(*((direction, g) for g in (a, b, c, d)))
    mean_loss = first.new_tensor([total_loss], dtype=torch.float64)
    dist.all_reduce(mean_loss)
    coarse, fine = (table[0] - table[1]) / (2 * long), (table[2] - table[3]) / (2 * short)
    if not bool(torch.isfinite(table).all()):
        raise MeasurementError("a gradient beside the present weights is not finite")
    value, error = (16 * fine - coarse) / 15, MARGIN * (fine - coarse).abs()
    whole = (fine - coarse).sum().abs() * MARGIN
    dtype = str(first.dtype).removeprefix("torch.")
    estimates = [
        Estimate(v, e, method=METHOD, dtype=dtype)
        for v, e in zip(value.tolist(), error.tolist(), strict=True)
    ]
    total = Estimate(float(value.sum()), float(whole), method=METHOD, dtype=dtype)
    names = [component.name for component in components]
    return ShardedAlong(
        RowCurvature(dict(zip(names, estimates, strict=True)), total),
        tuple(((table[2] + table[3]) / 2).tolist()),
        dict(zip(names, squares[2].tolist(), strict=True)),
        mean_loss.item() / dist.get_world_size(),
    )


@contextmanager
def _moved(
    own: Mapping[str, Tensor], direction: Mapping[str, Tensor], step: float
) -> Iterator[None]:
    saved = {name: tensor.clone() for name, tensor in own.items()}
    try:
        for name, tensor in own.items():
            tensor.data.add_(direction[name], alpha=step)
        yield
    finally:
        for name, tensor in own.items():
            tensor.data.copy_(saved[name])


def _gradient(
    losses: Sequence[Callable[[], Tensor]],
    parameters: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
) -> tuple[float, dict[str, Tensor]]:
    """Returns the mean loss and its gradient on this rank, which FSDP2 has reduced over all."""
    # As it is without a watch, which is told of every backward.
    backward = getattr(torch.autograd.backward, "__wrapped__", torch.autograd.backward)
    standing = {name: parameter.grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.grad = None
        total = 0.0
        for loss in losses:
            with torch.enable_grad():
                value = loss() / len(losses)
                check_loss(value)
                backward(value)
            total += value.item()
        found = {}
        with torch.no_grad():
            for name, parameter in parameters.items():
                if parameter.grad is not None and name in own:
                    found[name] = parameter.grad.to_local().clone()  # type: ignore[attr-defined]
        return total, found
    finally:
        for name, parameter in parameters.items():
            parameter.grad = standing[name]
