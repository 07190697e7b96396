r"""Coupling norms: how large the cross block of the Hessian is between two components.

For components *a* and *b* the norm is :math:`\|H_{ab}\|_F`, in units of the loss over squared
parameters; it says how much a step of one can change the gradient of the other, over all
directions. It is not scale-free: compare it with :math:`\sqrt{\|H_{aa}\|_F \|H_{bb}\|_F}`, say.

A few columns :math:`H_{:,b} v` of each component serve all its pairs. With :math:`Q_a`, :math:`Q_b`
orthonormal bases (rows) of few directions in each, :math:`P = I - Q^\top Q`, the square falls into

.. math::
    \|H_{ab}\|_F^2 = \|H_{ab} Q_b^\top\|_F^2 + \|H_{ba} Q_a^\top\|_F^2 - \|Q_a H_{ab} Q_b^\top\|_F^2
    + \|P_a H_{ab} P_b\|_F^2

where columns along the bases give the first three terms exactly: those of *a*, by symmetry, the
second. Only the last is sampled, by columns along random directions outside the bases, again from
both sides: with :math:`u_1 \ldots u_k` a random orthonormal frame in the *d* dimensions that
:math:`P_b` leaves,

.. math:: \|P_a H_{ab} P_b\|_F^2 = \frac{d}{k}\, \mathbb{E} \sum_j \|P_a H_{ab} u_j\|^2

(Hutchinson 1990 with the deflation of Hutch++, Meyer et al. 2021, on both sides). A frame is a
sample without replacement of the directions there are, which makes the variance smaller by
:math:`1 - k/d`. Bases of Ritz vectors of :math:`H_{aa}` and :math:`H_{bb}` are what a Lanczos run
on each block leaves anyway, and cross blocks are large along them too.

With eight columns a component, four along Ritz vectors and four random, the root mean square error
over pairs of at least 5 % of the largest norm is below 5 % on a trained transformer and a trained
recurrent attention network (``tests/test_curvature_coupling.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diagnoser.curvature.batches import estimates_over_chunks
from diagnoser.curvature.decision import student
from diagnoser.curvature.lanczos import extreme_eigenvalues
from diagnoser.curvature.operator import Block, Operator
from diagnoser.errors import MeasurementError
from diagnoser.types import Component, Estimate

_LEAST = 3  # columns: one along the basis, two random ones for a spread


def coupling_norms(
    hessian: Operator,
    components: Sequence[Component],
    generator: torch.Generator,
    *,
    bases: Mapping[str, Tensor] | None = None,
    columns: int = 8,
) -> dict[tuple[str, str], Estimate]:
    r"""Returns :math:`\|H_{ab}\|_F` of all pairs of components.

    ``std_error`` is that of the root by the delta method, with the variance of the sampled part as
    the mean of two unbiased estimates: the spread of its columns, and what their inner products
    tell of the spectrum behind it. It is widened by Student's distribution, so that 1.96 of them
    cover the truth in about 95 % of cases. With at least two chunks, ``batch_std_error`` is, to
    first order, what the chunks' part in the norm varies by; it does not cover the bias: noise
    between samples makes every norm larger, the more so the fewer samples.

    Args:
        hessian: The operator; every column costs about as much as a full product (a chunk).
        components: What to pair, with different names; frozen parts count as zero.
        generator: Source of the random directions.
        bases: By component name, orthonormal rows, (any, elements), of which the first
            ``columns // 2`` are used, such as `lanczos.Ends.dominant`; where one is missing, a
            Lanczos run of twice as many steps makes it.
        columns: Columns a component; one of no more elements than that is exact.

    Returns:
        An entry a pair, named in the order of ``components``.

    Raises:
        MeasurementError: When there are less than three columns, names that are not unique, a
            basis that does not fit its component, or a product that is not finite.
    """
    names = [component.name for component in components]
    if len(set(names)) < len(names):
        raise MeasurementError("components of the same name; a pair is told apart by names")
    blocks = {component.name: hessian.known(component.parts) for component in components}
    probes = {
        name: _probe(hessian, block, generator, columns, (bases or {}).get(name), name)
        for name, block in blocks.items()
    }
    seen: dict[tuple[str, str], _Side] = {}
    for name, probe in probes.items():
        others = {other: probes[other] for other in names if other != name}
        for other, side in _sides(hessian, probe, others, generator).items():
            seen[other, name] = side
    return {
        (a, b): _estimate(hessian, [seen[a, b], seen[b, a]])
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }


def coupling_norm(
    hessian: Operator,
    block: Block,
    others: Sequence[Component],
    generator: torch.Generator,
    *,
    basis: Tensor | None = None,
    max_columns: int = 8,
) -> dict[str, Estimate]:
    r"""Returns :math:`\|H_{ib}\|_F` of one block *b* with every other component *i*.

    From columns of the block alone, which is ``len(others)`` times cheaper than all pairs, and
    twice as inaccurate. Arguments, errors and exceptions as for `coupling_norms`.
    """
    probe = _probe(hessian, hessian.known(block), generator, max_columns, basis, "the block")
    blocks = {other.name: _Probe(hessian.known(other.parts)) for other in others}
    sides = _sides(hessian, probe, blocks, generator)
    return {name: _estimate(hessian, [side]) for name, side in sides.items()}


@dataclass(frozen=True, slots=True)
class _Probe:
    """A block, the directions in it that are treated exactly, and how many are drawn outside."""

    block: Block
    basis: Tensor | None = None  # (any, elements) orthonormal rows
    drawn: int = 0
    outside: int = 0  # dimensions that the basis leaves

    def coordinates(self, v: Tensor) -> Tensor:
        """Returns where a vector lies in the basis: (rows of it,)."""
        return v.new_zeros(0) if self.basis is None else self.basis @ v

    def rest(self, v: Tensor) -> Tensor:
        """Returns vectors (in the last dimension) without what lies in the basis."""
        if self.basis is None:
            return v
        inside: Tensor = (v @ self.basis.T) @ self.basis
        return v - inside

    def frame(self, generator: torch.Generator) -> Tensor:
        """Returns random orthonormal rows outside the basis: (drawn, elements)."""
        assert self.basis is not None
        shape = (self.drawn, self.basis.shape[1])
        draw = torch.randn(shape, generator=generator, device=generator.device).to(self.basis)
        draw = self.rest(self.rest(draw))  # once leaves what rounding leaves
        rows: Tensor = torch.linalg.qr(draw.T).Q.T
        return rows


@dataclass(slots=True)
class _Side:
    """What the columns of one block tell of its cross block with another.

    Chunk values are inner products with the mean over chunks, so that their mean is the square.
    """

    outside: int
    known: list[Tensor] = field(default_factory=list)  # (chunks,) |H q|^2, a column of the basis
    inner: list[Tensor] = field(default_factory=list)  # (chunks,) |Q H q|^2, the same columns
    rest: list[Tensor] = field(default_factory=list)  # (chunks,) |P H u|^2, a random column
    images: list[Tensor] = field(default_factory=list)  # (elements of the other,) P H u
    gram: Tensor | None = None  # of the images, in place of them

    @property
    def exact(self) -> bool:
        return not self.rest

    @property
    def weight(self) -> float:
        """How much a side of k random columns tells, by a sample without replacement."""
        return len(self.rest) / (1.0 - len(self.rest) / self.outside)

    @property
    def variance(self) -> float:
        """Of the scaled mean of the random columns, from what these columns tell."""
        assert self.gram is not None
        count, d = len(self.rest), self.outside
        gram = self.gram * d
        spread = gram.diagonal().var()
        # With M = H'H: Var(d u'Mu) = 2 d^2 (d |M|^2 - tr(M)^2) / (d^2 (d + 2)) for a direction u,
        # and E (u'Mv)^2 = (d |M|^2 - tr(M)^2) / ((d - 1) d (d + 2)) for two of a frame.
        pairs = (gram.square().sum() - gram.diagonal().square().sum()) / (count * (count - 1))
        per_column = 0.5 * float(spread + 2.0 * pairs * (d - 1) / d)
        return per_column / self.weight


def _probe(
    hessian: Operator,
    block: Block,
    generator: torch.Generator,
    columns: int,
    basis: Tensor | None,
    name: str,
) -> _Probe:
    if columns < _LEAST:
        raise MeasurementError(f"{columns} columns a component; coupling norms need {_LEAST}")
    size = hessian.size(block)
    if size == 0:
        return _Probe(block)
    like = hessian.like(block)
    if size <= columns:
        return _Probe(block, torch.eye(size, dtype=like.dtype, device=like.device))
    kept = columns // 2
    if basis is None:
        basis = extreme_eigenvalues(
            lambda v: hessian.block_product(block, v),
            size,
            generator,
            max_steps=2 * kept,
            min_steps=2 * kept,
            dtype=like.dtype,
            device=like.device,
        ).dominant(kept)
    if basis.ndim != 2 or basis.shape[1] != size:
        raise MeasurementError(
            f"{name}: a basis of shape {tuple(basis.shape)} for {size} elements; "
            "give one vector a row"
        )
    Q = torch.linalg.qr(basis[:kept].to(like).T).Q.T
    return _Probe(block, Q, columns - Q.shape[0], size - Q.shape[0])


def _sides(
    hessian: Operator, probe: _Probe, others: Mapping[str, _Probe], generator: torch.Generator
) -> dict[str, _Side]:
    """Takes the columns of one block and looks at them in every other."""
    found = {name: _Side(probe.outside) for name in others}
    rows = {part.parameter for other in others.values() for part in other.block}
    for v, random in _directions(probe, generator):
        vector = _spread(hessian, probe.block, v)
        columns = [chunk.column(probe.block, vector, rows) for chunk in hessian.chunks]
        for name, other in others.items():
            if not other.block:
                continue
            side = found[name]
            images = [hessian.flatten(other.block, column) for column in columns]
            mean = images[0] if len(images) == 1 else torch.stack(images).mean(0)
            if random:
                mean = other.rest(mean)
                side.rest.append(_inner(mean, images))
                side.images.append(mean)
            else:
                side.known.append(_inner(mean, images))
                coordinates = [other.coordinates(image) for image in images]
                side.inner.append(_inner(other.coordinates(mean), coordinates))
    for side in found.values():
        if side.images:
            side.gram = _gram(side.images)
            side.images = []
    return found


def _directions(probe: _Probe, generator: torch.Generator) -> list[tuple[Tensor, bool]]:
    """Returns the directions of a block and whether each is random."""
    if probe.basis is None:
        return []
    drawn = probe.frame(generator) if probe.drawn else ()
    return [(q, False) for q in probe.basis] + [(u, True) for u in drawn]


def _spread(hessian: Operator, block: Block, v: Tensor) -> dict[str, Tensor]:
    """Returns a flat vector of a block as a vector over the parameters."""
    vector: dict[str, Tensor] = {}
    pieces = torch.split(
        v, [part.view(hessian.parameters[part.parameter]).numel() for part in block]
    )
    for part, piece in zip(block, pieces, strict=True):
        parameter = hessian.parameters[part.parameter]
        whole = vector.setdefault(part.parameter, torch.zeros_like(parameter))
        view = part.view(whole)
        view.copy_(piece.view(view.shape))
    return vector


def _estimate(hessian: Operator, sides: Sequence[_Side]) -> Estimate:
    """Returns the norm from the columns of one side or of both."""
    chunks = len(hessian.chunks)
    exact = [side for side in sides if side.exact]
    if exact:
        squares, variance, samples = _total(exact[0].known, chunks), 0.0, 0
    else:
        weights = [side.weight / sum(s.weight for s in sides) for side in sides]
        squares = sum(
            (_total(side.known, chunks) for side in sides), torch.zeros(chunks, dtype=torch.float64)
        )
        if len(sides) == 2:
            squares = squares - sum(_total(side.inner, chunks) for side in sides) / 2
        for side, weight in zip(sides, weights, strict=True):
            squares = squares + weight * side.outside * torch.stack(side.rest).mean(0)
        variance = sum(w * w * side.variance for w, side in zip(weights, sides, strict=True))
        samples = sum(len(side.rest) for side in sides)
    square = float(squares.mean())
    if not math.isfinite(square):
        raise MeasurementError(
            "a Hessian product is not finite; look for NaN or Inf in loss and gradient"
        )
    norm = math.sqrt(max(square, 0.0))  # below zero by rounding only
    error = 0.0
    if norm > 0.0 and samples:
        error = math.sqrt(variance) / (2.0 * norm) * student(1.96, samples - len(sides)) / 1.96
    parts = squares / norm if norm > 0.0 else torch.zeros_like(squares)
    return estimates_over_chunks(
        parts.unsqueeze(1),
        std_errors=[error],
        samples=samples or None,
        method="columns" if samples else "exact",
        dtype=hessian.dtype,
    )[0]


def _total(terms: Sequence[Tensor], chunks: int) -> Tensor:
    return sum(terms, torch.zeros(chunks, dtype=torch.float64))


def _inner(mean: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """Returns the inner products of each chunk's vector with the mean: (chunks,) on the host."""
    return torch.stack([(mean * v).sum(dtype=torch.float64) for v in vectors]).cpu()


def _gram(images: Sequence[Tensor]) -> Tensor:
    """Returns the inner products of all pairs: (k, k) float64 on the host."""
    rows = torch.stack(list(images)).to(torch.float64)
    return (rows @ rows.T).cpu()
