r"""Quadratic forms with a vector of its own at every sample.

The Hessian of a sum of per-sample losses is the sum of the samples' Hessians, so each sample *n*
may carry its own vector :math:`v_n`. Moving component *b* by :math:`s_n v_n` at sample *n* moves
the output of each site *j* by :math:`s_n \delta_j`. With :math:`g_j` the gradient of the loss at
site *j* and :math:`F = \sum_j \langle g_j, \delta_j \rangle = \sum_n \partial L / \partial s_n`

.. math:: c_n = \frac{\partial F}{\partial s_n} = v_n^\top H_{n,bb}\, v_n

one number a sample from one backward pass through the gradient's graph. With independent random
signs :math:`\sum_n c_n` is an unbiased trace, N random vectors for the price of one, and
the spread of :math:`c_n` over *n* and over repetitions tells the error of the probes from that of
the batch (`trace.block_trace`). With a given direction it is curvature along it, per sample.

Where one parameter acts several times in a row (a recurrent layer), :math:`\delta_j` depends on
earlier sites, and so does :math:`g_j` through the changed weights; by symmetry of the second
derivative the two contributions are equal, so the first is counted twice and the second never
computed:

.. math:: \tfrac{\partial F}{\partial s} = \sum_j \Big\langle \frac{\partial}{\partial o_j} \sum_k
   \big( \langle g_k, \bar\delta_k \rangle + 2 \langle \bar g_k, \delta_k \rangle \big), \delta_j
   \Big\rangle

with :math:`o_j` the outputs and a bar for «held fixed».
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diagnoser.curvature.hessian import Graph, Hessian, differentiate
from diagnoser.curvature.operator import Block, Operator, Vector
from diagnoser.curvature.sample_rows import sample_rows
from diagnoser.curvature.sites import GROUP_ELEMENTS, Rows, Site, Vectors
from diagnoser.types import Part

COMPLETE = 1e-3  # relative difference of two gradients that count as the same, at two vectors
_SURE = 1e-5  # the same at one vector, which by chance agrees so well even less often


@dataclass(frozen=True, slots=True, eq=False)
class SampleForms:
    """Per-sample quadratic forms on one loss's graph.

    Attributes:
        samples: How many samples the loss has.
    """

    samples: int
    _hessian: Hessian
    _graph: Graph
    _rows: Sequence[Rows | None]

    @classmethod
    def of(
        cls, hessian: Hessian, generator: torch.Generator, samples: int | None = None
    ) -> SampleForms | None:
        """Returns the forms of a Hessian of one loss; None where samples cannot be told apart.

        Args:
            hessian: Made with ``sites=True``.
            generator: Source of the seeds that find out which rows belong to which sample.
            samples: How many there are, if that is known.
        """
        (graph,) = hessian.graphs
        found = sample_rows(graph.sites, graph.at_sites, samples, generator)
        return None if found is None else cls(found[0], hessian, graph, found[1])

    def covers(self, block: Block, generator: torch.Generator) -> bool:
        """Whether the known sites are all there is: they give the block's whole gradient."""
        uses = self._uses(block)
        if not uses or any(use.rows is None for use in uses):
            return False
        if any(use.site.table for use in uses) and (
            len(uses) > 1 or any(part.dim is not None for part in block)
        ):
            return False  # rows of a table are drawn by token, once
        gradient = {
            part.parameter: self._graph.gradient[part.parameter].detach().to_dense()
            for part in block
            if part.parameter in self._graph.gradient
        }
        if len(gradient) < len({part.parameter for part in block}):
            return False
        real = torch.cat([p.view(gradient[p.parameter]).reshape(-1) for p in block])
        norm = torch.linalg.vector_norm(real)
        for _ in range(2):
            vector = {
                name: torch.randn(g.shape, generator=generator).to(g)
                for name, g in gradient.items()
            }
            flat = torch.cat([p.view(vector[p.parameter]).reshape(-1) for p in block])
            direction = Direction(block, vector)
            with torch.no_grad():
                ours = sum(use.products(use.change(direction), use.gradient).sum() for use in uses)
            difference = float((ours - (flat * real).sum(dtype=torch.float64)).abs() / norm)
            if not difference <= COMPLETE:  # nor NaN
                return False
            if difference <= _SURE:
                break
        return bool(norm > 0)  # a zero gradient proves nothing

    def forms(self, block: Block, vectors: Vectors) -> Tensor:
        """Returns c_n = v_n' H_n v_n of each sample, (samples,) float64; their sum is v'Hv."""
        uses = [use for use in self._uses(block) if vectors.names & set(use.site.names)]
        total = torch.zeros(self.samples + 1, dtype=torch.float64)  # the last one: of no sample
        outputs: list[Tensor] = []
        weights: list[Tensor] = []
        changes: list[Tensor] = []
        for use in uses:
            with torch.set_grad_enabled(len(uses) > 1):  # one site alone depends on no other
                change = use.change(vectors)
            changes.append(change.detach())
            if use.gradient.requires_grad:
                outputs.append(use.gradient)
                weights.append(change.detach())
            if change.requires_grad:
                outputs.append(change)
                weights.append(2.0 * use.gradient.detach())
        if not outputs:
            return total[:-1]
        edges = [use.site.edge for use in uses]
        found = differentiate(outputs, edges, weights, create_graph=False)
        for use, second, change in zip(uses, found, changes, strict=True):
            if second is None or use.rows is None:
                continue
            products = use.products(second, change)
            total = total.to(products.device)
            total.index_add_(0, use.rows.labels.remainder(self.samples + 1), products)
        return total[:-1] / self._hessian.scale

    def _uses(self, block: Block) -> list[_Use]:
        names = {part.parameter for part in block}
        graph = self._graph
        return [
            _Use(site, gradient, rows)
            for site, gradient, rows in zip(graph.sites, graph.at_sites, self._rows, strict=True)
            if names & set(site.names)
        ]


@dataclass(frozen=True, slots=True, eq=False)
class _Use:
    """A site, the loss's gradient there (with its graph), and which rows are whose."""

    site: Site
    gradient: Tensor
    rows: Rows | None

    def change(self, vectors: Vectors) -> Tensor:
        assert self.rows is not None
        return self.site.change(vectors, self.rows).reshape(self.gradient.shape)

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        """Returns the inner product of each row of two outputs, (rows,) float64."""
        exact = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        left, right = (t.reshape(-1, self.site.row_size).to(exact) for t in (a, b))
        products: Tensor = torch.linalg.vecdot(left, right)
        return products.double()


def forms_of(hessian: Hessian, generator: torch.Generator) -> list[SampleForms] | None:
    """Returns the forms of every chunk; None where the samples of one cannot be told apart."""
    found = [SampleForms.of(chunk, generator) for chunk in hessian.chunks]
    forms = [form for form in found if form is not None]
    return forms if len(forms) == len(found) else None


def forms_along(hessian: Operator, block: Block, v: Tensor, forms: Sequence[SampleForms]) -> Tensor:
    """Returns v'H_n v of each sample of all chunks, (samples,), for a flat vector of the block.

    Their sum is v'Hv; the spread between them times the root of their number (`batch_error`) is
    what other samples would have changed of it.
    """
    vector: dict[str, Tensor] = {}
    pieces = torch.split(v, [p.view(hessian.parameters[p.parameter]).numel() for p in block])
    for part, piece in zip(block, pieces, strict=True):
        whole = vector.setdefault(
            part.parameter, torch.zeros_like(hessian.parameters[part.parameter])
        )
        view = part.view(whole)
        view.copy_(piece.view(view.shape))
    direction = Direction(block, vector)
    return torch.cat([form.forms(block, direction) for form in forms]) / len(forms)


def batch_error(values: Tensor) -> float:
    """Returns the standard error of a sum over samples, (samples,), if they were drawn anew."""
    return math.sqrt(values.numel()) * float(values.std())


class RandomSigns:
    """Independent random signs, of every sample its own or (``shared``) the same for all."""

    def __init__(
        self, hessian: Operator, block: Block, generator: torch.Generator, *, shared: bool = False
    ) -> None:
        self.shared = shared
        self._parts: dict[str, list[Part]] = {}
        for part in block:
            self._parts.setdefault(part.parameter, []).append(part)
        self._parameters = hessian.parameters
        self._generator = generator
        self.names = frozenset(self._parts)
        self._states: dict[tuple[str, int], Tensor] = {}  # of the generator, before each draw
        self._drawn: dict[tuple[str, int], Tensor] = {}  # as many as fit into a group

    def batch(self, name: str, start: int, stop: int) -> Tensor:
        """See `Vectors`; all sites of a parameter get the same, kept or drawn again."""
        key = (name, start)
        if key in self._drawn:
            return self._drawn[key]
        generator = self._generator
        if key in self._states:
            generator = torch.Generator()
            generator.set_state(self._states[key])
        else:
            self._states[key] = generator.get_state()
        found = self._draw(name, stop - start, generator)
        held = sum(t.numel() for t in self._drawn.values())
        if held + found.numel() <= GROUP_ELEMENTS:
            self._drawn[key] = found
        return found

    def _draw(self, name: str, count: int, generator: torch.Generator) -> Tensor:
        parameter = self._parameters[name]
        parts = self._parts.get(name, [])
        if len(parts) == 1 and parts[0].dim is None:
            return signs((count, *parameter.shape), generator, parameter)
        whole = torch.zeros(count, *parameter.shape, dtype=parameter.dtype, device=parameter.device)
        for part in parts:
            for one in whole:
                view = part.view(one)
                view.copy_(signs(tuple(view.shape), generator, parameter))
        return whole

    def table_rows(self, name: str, tokens: Tensor, labels: Tensor) -> Tensor:
        """See `Vectors`; a token that a sample has twice gets the same row twice."""
        parameter = self._parameters[name]
        key = tokens if self.shared else labels * parameter.shape[0] + tokens
        distinct, place = torch.unique(key, return_inverse=True)
        return signs((distinct.numel(), parameter.shape[1]), self._generator, parameter)[place]


class Direction:
    """One given vector for all samples, restricted to a block."""

    def __init__(self, block: Block, vector: Vector) -> None:
        self.shared = True
        self._vector: dict[str, Tensor] = {}
        for part in block:
            if part.parameter in vector:
                whole = vector[part.parameter]
                if part.dim is None:
                    self._vector[part.parameter] = whole
                    continue
                kept = self._vector.setdefault(part.parameter, torch.zeros_like(whole))
                part.view(kept).copy_(part.view(whole))
        self.names = frozenset(self._vector)

    def batch(self, name: str, start: int, stop: int) -> Tensor:  # noqa: ARG002 - all the same
        """See `Vectors`."""
        return self._vector[name].unsqueeze(0)

    def table_rows(self, name: str, tokens: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002
        """See `Vectors`."""
        return self._vector[name][tokens]


def signs(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Returns independent random signs of ``like``'s type and device, a bit of the generator each.

    Sixty-four signs a drawn number: with a vector for every sample, drawing would else dominate.
    """
    count = int(np.prod(shape))
    words = torch.randint(
        -(2**63), 2**63 - 1, ((count + 63) // 64,), generator=generator, dtype=torch.int64
    )
    bits = np.unpackbits(words.numpy().view(np.uint8), count=count)
    drawn = torch.from_numpy(bits).to(like.device, like.dtype).mul_(2.0).sub_(1.0)
    return drawn.view(shape)
