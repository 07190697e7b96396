"""Which rows of every site's output belong to which sample, found out from backward passes.

No layout is assumed (see `sample_rows`); where samples are coupled, there is no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from diagnoser.curvature.sites import Rows, Site

_MATCH = 1e-3  # relative distance at which two projections of a row count as the same
_DEPENDS = 1e-7  # of the largest row: below it, a row that fits no sample counts as of none
_PROJECTIONS = 2  # numbers kept of a row: all of its elements are in each
_EXPONENTS = {torch.float16: 8}  # powers of two a digit may have, by the narrowest type in the way
_WIDE = 128  # the same for types with the exponents of float32: 2^-64 to 2^63


def sample_rows(
    sites: Sequence[Site],
    gradients: Sequence[Tensor],
    hint: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[int, list[Rows | None]] | None:
    r"""Finds out which rows of every site belong to which sample, from two backward passes.

    Backward is linear: rows of the site nearest to the loss get a random seed :math:`\epsilon`
    once as it is and once multiplied by a factor of their own sample, :math:`\ell_n`. A row of
    another site that only sample *n* depends on then receives twice the same, the second time
    :math:`\ell_n` as large; a row that several samples depend on does not. So no layout is assumed:
    batch first, time first, flattened, packed sequences; and samples that are coupled (batch norm
    in training mode) are noticed. A loss that couples them (a contrastive one) shows in the second
    derivative at the first site.

    The factors are powers of two with a sign, by which all rounding is multiplied, too: a row that
    is a small difference of large numbers (behind a softmax) is recognised like any other. More
    than 256 samples need a second digit and so a third pass.

    Args:
        sites: From `find_sites`.
        gradients: The loss's gradient at each site, with its graph.
        hint: How many samples there are, if that is known; else the rows of the first site, or
            what divides them.
        generator: Source of the seeds.

    Returns:
        The number of samples and the rows of each site (None: not separable there); None when
        the samples of this loss cannot be told apart.
    """
    if not sites:
        return None
    generator = generator or torch.Generator().manual_seed(0)
    with torch.autocast(gradients[0].device.type, enabled=False):
        return _sample_rows(sites, gradients, hint, generator)


def _sample_rows(
    sites: Sequence[Site], gradients: Sequence[Tensor], hint: int | None, generator: torch.Generator
) -> tuple[int, list[Rows | None]] | None:
    root, gradient = sites[0].edge, gradients[0]
    project = _Projection(generator)
    seed = torch.randn(gradient.shape, generator=generator).to(gradient)
    counts = [site.rows(at) for site, at in zip(sites, gradients, strict=True)]
    exponents = min(_EXPONENTS.get(at.dtype, _WIDE) for at in gradients)
    once: _Received | None = None
    best: tuple[int, list[Rows | None]] | None = None
    most = 0
    for samples, labels in _layouts(counts[0], hint, sites):
        code = _Code.of(samples, exponents, generator)
        scaled = [
            (seed.view(labels.numel(), -1) * factor[labels].to(seed).unsqueeze(1)).view_as(seed)
            for factor in code.factors
        ]
        if _coupled_by_the_loss(root, gradient, seed, scaled, labels, code, project):
            continue
        if once is None:
            once = _receive(root, seed, sites[1:], counts[1:], project)
        again = [_receive(root, s, sites[1:], counts[1:], project) for s in scaled]
        found = [
            Rows(labels.to(gradient.device), samples),
            *_rows_by_site(once, again, code, counts[1:], gradient.device),
        ]
        separable = sum(each is not None for each in found)
        if separable > most:  # among equals the first, which is the finest
            best, most = (samples, found), separable
        if separable == len(found):
            break
    return best


def _layouts(rows: int, hint: int | None, sites: Sequence[Site]) -> list[tuple[int, Tensor]]:
    """Ways in which the rows nearest to the loss may belong to samples: (samples, labels).

    Without a hint: every row a sample of its own (the finest that is right is the best), else one
    of the two leading sizes that activations have before a linear map flattens them.
    """
    at = torch.arange(rows)
    sizes = [rows, *_leading_sizes(sites)] if hint is None else [hint]
    found: list[tuple[int, Tensor]] = []
    for size in dict.fromkeys(sizes):
        if size < 2 or rows % size:
            continue
        found.append((size, at // (rows // size)))
        if size < rows:
            found.append((size, at % size))
    return found


def _leading_sizes(sites: Sequence[Site]) -> list[int]:
    sizes: list[int] = []
    for site in sites:
        for source, _ in site.edge.node.next_functions:
            shape = getattr(source, "_saved_self_sym_sizes", ())
            if len(shape) >= 3:
                sizes += [int(size) for size in shape[:2]]
    return sizes


def _coupled_by_the_loss(
    root: GradientEdge,
    gradient: Tensor,
    seed: Tensor,
    scaled: Sequence[Tensor],
    labels: Tensor,
    code: _Code,
    project: _Projection,
) -> bool:
    if not gradient.requires_grad:  # a loss that is linear from here on
        return False
    received = []
    for s in (seed, *scaled):
        (second,) = torch.autograd.grad(gradient, [root], s, retain_graph=True, allow_unused=True)
        if second is None:
            return False
        received.append(_numbers([project(second, labels.numel())]))
    once, *again = received
    if not bool(once.any()):
        return False
    own, fits, size = code.read(once, again)
    small = size <= _DEPENDS**2 * size.max()  # not of what is not finite
    return bool(torch.where(fits, own != labels, ~small).any())


@dataclass(frozen=True, slots=True, eq=False)
class _Code:
    """Numbers of samples, written in digits that a backward pass carries exactly.

    A digit is a sign and a power of two: multiplying by it never rounds.

    Attributes:
        factors: (digits, samples) what a digit's pass multiplies a sample's rows by.
        base: Values a digit may have.
        order: (samples,) the sample of each number; at random, so that no layout looks like it.
    """

    factors: Tensor
    base: int
    order: Tensor

    @classmethod
    def of(cls, samples: int, exponents: int, generator: torch.Generator) -> _Code:
        """Draws the numbers of some samples; ``exponents``: powers of two there may be."""
        base, digits = 2 * exponents, 1
        while base**digits < samples:
            digits += 1
        base = next(b for b in range(2, base + 2, 2) if b**digits >= samples)  # the narrowest
        order = torch.randperm(samples, generator=generator)
        number = torch.argsort(order)
        factors = []
        for _ in range(digits):
            digit, number = number % base, number // base
            power = torch.exp2((digit // 2 - base // 4).double())
            factors.append(power * (1 - 2 * (digit % 2)))
        return cls(torch.stack(factors), base, order)

    def read(self, once: Tensor, again: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns whose each row is, whether it is one sample's alone, and its squared size.

        Args:
            once: (k, rows) float64, what the rows received from the seed.
            again: The same of each digit's pass.
        """
        size = once.square().sum(0)
        fits = size > 0
        number = torch.zeros(size.shape, dtype=torch.long)
        for place, received in enumerate(again):
            ratio = (once * received).sum(0) / size
            power = ratio.abs().log2().round()
            factor = power.exp2().copysign(ratio)
            distance = (received - factor * once).square().sum(0)
            digit = 2 * (power + self.base // 4) + (ratio < 0)
            fits &= distance <= (_MATCH * factor).square() * size
            fits &= (digit >= 0) & (digit < self.base)
            number += torch.where(fits, digit, 0.0).long() * self.base**place
        fits &= number < self.order.numel()
        return self.order[torch.where(fits, number, 0)], fits, size


class _Projection:
    """Sums up rows of any width in few numbers, the same way at every pass."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._drawn: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, values: Tensor, rows: int) -> Tensor:
        """Returns (rows, k) of values that are so many rows."""
        flat = values.detach().reshape(rows, -1)
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        key = (flat.shape[1], flat.dtype, flat.device)
        if key not in self._drawn:
            drawn = torch.randn(flat.shape[1], _PROJECTIONS, generator=self._generator)
            self._drawn[key] = drawn.to(flat)
        return flat @ self._drawn[key]


def _numbers(projected: Sequence[Tensor]) -> Tensor:
    """Returns projections as one (k, rows) float64 tensor; few, and read where float64 exists."""
    return torch.cat([each.T.cpu().double() for each in projected], 1)


@dataclass(frozen=True, slots=True, eq=False)
class _Received:
    """What all sites received in one pass: (k, rows of all sites); and which were reached."""

    projected: Tensor
    reached: list[bool]


def _receive(
    root: GradientEdge,
    seed: Tensor,
    sites: Sequence[Site],
    counts: Sequence[int],
    project: _Projection,
) -> _Received:
    """Passes a seed back from the root; only few numbers a row are kept."""
    if not sites:
        return _Received(torch.zeros(_PROJECTIONS, 0, dtype=torch.float64), [])
    edges = [site.edge for site in sites]
    found = list(torch.autograd.grad([root], edges, [seed], retain_graph=True, allow_unused=True))
    reached = [values is not None for values in found]
    projected = []
    for rows in counts:
        values = found.pop(0)  # which frees it
        projected.append(
            seed.new_zeros(rows, _PROJECTIONS) if values is None else project(values, rows)
        )
    return _Received(_numbers(projected), reached)


def _rows_by_site(
    once: _Received,
    again: Sequence[_Received],
    code: _Code,
    counts: Sequence[int],
    device: torch.device,
) -> list[Rows | None]:
    """Returns the rows of each site; None where some row has several samples, or none has one."""
    if not counts:
        return []
    own, fits, size = code.read(once.projected, [each.projected for each in again])
    lengths = torch.tensor(counts)
    site = torch.repeat_interleave(lengths)
    largest = torch.zeros(len(counts), dtype=size.dtype).scatter_reduce(0, site, size, "amax")
    small = size <= _DEPENDS**2 * largest[site]
    apart = torch.bincount(site[~fits & ~small], minlength=len(counts)).tolist()
    known = torch.bincount(site[fits], minlength=len(counts)).tolist()
    labels = torch.where(fits, own, -1).to(device).split_with_sizes(list(counts))
    distinct: dict[int, list[Rows]] = {}
    return [
        _shared(Rows(mine, code.order.numel()), distinct) if here and one and not several else None
        for mine, here, one, several in zip(labels, once.reached, known, apart, strict=True)
    ]


def _shared(rows: Rows, distinct: dict[int, list[Rows]]) -> Rows:
    """Returns the tables that were made for equal labels before, or these."""
    alike = distinct.setdefault(rows.labels.numel(), [])
    for other in alike:
        if torch.equal(other.labels, rows.labels):
            return other
    alike.append(rows)
    return rows
