r"""Curvature along a direction *d* (the update, the gradient), per component and per pair.

With :math:`d_i` the part of *d* in component *i*, the second-order term of the loss along *d* is

.. math:: d^\top H d = \sum_{ij} M_{ij}, \qquad M_{ij} = d_i^\top H_{ij} d_j

Three views of it, all exact for the samples seen, in units of the loss: `row_curvature`
:math:`\sum_j M_{ij} = d_i^\top (H d)_i` (one product for all components), `block_curvature`
:math:`M_{ii}` (one small product a component), and `coupling_matrix`, all of *M* (part of a
column a component).

The often used ratio :math:`M_{ij} / \sqrt{|M_{ii}| |M_{jj}|}` looks like a correlation but is none:
that it stays within [-1, 1] is the Cauchy-Schwarz inequality, which holds for positive semidefinite
*H* only. With :math:`M_{ii}` near zero, as at the boundary between convex and concave, it grows
without limit. `Coupling.shares` is bounded for every *H*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnoser.curvature.batches import estimates_over_chunks
from diagnoser.curvature.operator import Block, Operator, Vector
from diagnoser.types import Component, Estimate


@dataclass(frozen=True, slots=True)
class RowCurvature:
    r""":math:`d_i^\top (H d)_i` by component name, and ``total`` :math:`d^\top H d`.

    ``total`` runs over all of the direction, also where no component covers it.
    """

    components: Mapping[str, Estimate]
    total: Estimate


@dataclass(frozen=True, slots=True)
class Coupling:
    r"""The matrix *M* and its shares; row and column k belong to ``names[k]``.

    Attributes:
        names: The components, in the order they were given.
        values: M[i][j] with the spread over chunks, if there are any.
        shares: :math:`M_{ij} / \sum_{kl} |M_{kl}|`, in [-1, 1]; NaN when all of M is zero.
    """

    names: tuple[str, ...]
    values: tuple[tuple[Estimate, ...], ...]
    shares: tuple[tuple[Estimate, ...], ...]


def row_curvature(
    hessian: Operator, direction: Vector, components: Sequence[Component]
) -> RowCurvature:
    """Returns d_i'(Hd)_i of every component and d'Hd, from one product (a chunk).

    Args:
        hessian: The operator, of one loss or several.
        direction: Name to tensor, of the parameters' shapes; left out means zero.
        components: What to attribute to; frozen parts count as zero.
    """
    blocks = [hessian.everything, *(hessian.known(component.parts) for component in components)]
    products = [chunk.product(direction) for chunk in hessian.chunks]
    table = torch.stack([_inner(hessian, blocks, direction, Hd) for Hd in products])
    lengths = _inner(hessian, blocks, direction, direction).sqrt()
    reach = torch.stack([_inner(hessian, blocks[:1], Hd, Hd) for Hd in products]).mean().sqrt()
    errors = (hessian.relative_error * reach * lengths).tolist()
    total, *rows = estimates_over_chunks(table, std_errors=errors, dtype=hessian.dtype)
    return RowCurvature(dict(zip((c.name for c in components), rows, strict=True)), total)


def block_curvature(
    hessian: Operator, direction: Vector, components: Sequence[Component]
) -> dict[str, Estimate]:
    """Returns d_i'H_ii d_i of every component, from one block product each (and a chunk)."""
    if not components:
        return {}
    blocks = [hessian.known(component.parts) for component in components]
    flats = [hessian.flatten(block, direction) if block else None for block in blocks]
    zero = _zero(hessian)
    table, reach = torch.stack(
        [
            torch.stack(
                [
                    torch.stack([zero, zero])
                    if d is None
                    else _value_and_reach(d, chunk.block_product(block, d)).to(zero.device)
                    for block, d in zip(blocks, flats, strict=True)
                ]
            )
            for chunk in hessian.chunks
        ]
    ).unbind(-1)
    errors = (hessian.relative_error * reach.mean(0)).tolist()
    found = estimates_over_chunks(table, std_errors=errors, dtype=hessian.dtype)
    return {component.name: e for component, e in zip(components, found, strict=True)}


def coupling_matrix(
    hessian: Operator, direction: Vector, components: Sequence[Component]
) -> Coupling:
    """Returns M_ij = d_i'H_ij d_j for all pairs, from one column product a component (and a chunk).

    Nothing is sampled: ``std_error`` is zero for exact products. Each column is taken from its own
    component on, the rest follows by the symmetry of H: with components in the order of the model,
    that part of a column costs little more than a block product, because it ends at the component
    instead of at the first layer.
    Whether this graph's products are symmetric is for `self_checks.symmetry_defect` to say.
    """
    size = len(components)
    if size == 0:
        return Coupling((), (), ())
    blocks = [hessian.known(component.parts) for component in components]
    both = torch.stack([_lower_triangle(chunk, blocks, direction) for chunk in hessian.chunks])
    table, reach = (both + both.tril(-1).transpose(2, 3)).unbind(1)
    error = hessian.relative_error * reach.mean(0)
    values = estimates_over_chunks(
        table.flatten(1), std_errors=error.flatten().tolist(), dtype=hessian.dtype
    )
    # The share of the mean matrix; its spread over chunks with the mean matrix's denominator.
    total = table.mean(0).abs().sum()
    shares = estimates_over_chunks(
        (table / total).flatten(1),
        std_errors=(error / total).flatten().tolist(),
        dtype=hessian.dtype,
    )
    names = tuple(component.name for component in components)
    return Coupling(names, _square(values, size), _square(shares, size))


def _lower_triangle(hessian: Operator, blocks: Sequence[Block], direction: Vector) -> Tensor:
    """Returns M, and the most that it can be by Cauchy-Schwarz: (2, blocks, blocks).

    On and below the diagonal, zero above.
    """
    lengths = _inner(hessian, blocks, direction, direction).sqrt()
    columns = []
    for j, block in enumerate(blocks):
        rows = {part.parameter for other in blocks[j:] for part in other}
        column = hessian.column(block, direction, rows)
        below = torch.stack(
            [
                _inner(hessian, blocks[j:], direction, column),
                lengths[j:] * _inner(hessian, blocks[j:], column, column).sum().sqrt(),
            ]
        )
        columns.append(torch.cat([below.new_zeros(2, j), below], dim=1))
    return torch.stack(columns, dim=2)


def _square(found: Sequence[Estimate], size: int) -> tuple[tuple[Estimate, ...], ...]:
    return tuple(tuple(found[i * size : (i + 1) * size]) for i in range(size))


def _inner(hessian: Operator, blocks: Sequence[Block], a: Vector, b: Vector) -> Tensor:
    """Returns the inner product of two vectors in each block: (blocks,), on one device."""
    zero = _zero(hessian)
    sums = []
    for block in blocks:
        total = zero
        for part in block:
            if part.parameter in a:
                here = _dot(part.view(a[part.parameter]), part.view(b[part.parameter]))
                total = total + here.to(zero.device)
        sums.append(total)
    return torch.stack(sums)


def _zero(hessian: Operator) -> Tensor:
    """Returns a zero where sums over parameters on several devices are collected."""
    device = next(iter(hessian.parameters.values())).device
    return torch.zeros((), dtype=torch.float64, device=device)


def _value_and_reach(d: Tensor, Hd: Tensor) -> Tensor:
    """Returns d'Hd and |d| |Hd|, in the unit of which an error of the product counts."""
    return torch.stack([_dot(d, Hd), (_dot(d, d) * _dot(Hd, Hd)).sqrt()])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dtype=torch.float64)
