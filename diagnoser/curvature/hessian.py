r"""Hessian-vector products on a live graph: one retained gradient graph, any number of products.

With the gradient :math:`g(\theta) = \nabla L` kept as a graph, reverse over reverse gives

.. math:: H v = \nabla_\theta \, (g(\theta)^\top v)

(Pearlmutter 1994, Fast exact multiplication by the Hessian). For a block *b* of parameters only the
outputs :math:`g_b` and the inputs :math:`\theta_b` are touched, so that a product with a diagonal
block :math:`H_{bb}` costs a fraction of a full one.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from diagnoser.curvature.fused_attention import second_derivative_of_fused_attention
from diagnoser.curvature.sites import Site, find_sites
from diagnoser.errors import MeasurementError
from diagnoser.types import Part

Block = Sequence[Part]
"""A group of parameters or of ranges of them: the ``parts`` of a `types.Component`."""

Vector = Mapping[str, Tensor]
"""A vector over the parameters: name to a tensor of the parameter's shape; left out means zero."""


class Hessian:
    """The Hessian of a loss with respect to named parameters, as an operator.

    Two spellings of a vector: a `Vector` (name to tensor) over all parameters, and for one block a
    flat tensor of `size` (block) elements, its parts one after the other in row-major order.

    The loss's own graph is never freed and no ``.grad`` is touched, so a training step may go on
    with its ``backward`` afterwards. A parameter the loss does not depend on has zero rows and
    columns. The parameters must not be changed in place (no optimizer step) while products are
    wanted. Autocast is off inside products: a graph that was built under it carries its own casts.

    Args:
        loss: The scalar loss with a live graph; or several losses (chunks of a probe set), whose
            mean is meant. `chunks` gives the Hessian of each.
        parameters: Name to leaf tensor. A tensor under two names counts once, under the first.
        scale: What the loss was multiplied by (a gradient scaler); gradient and products are
            divided by it.
        sites: Also keep the gradient at every site (`sites.Site`), which vectors that differ from
            sample to sample need (`per_sample`).

    Raises:
        MeasurementError: When the loss has no graph, is not a scalar, or an operation on the way
            has no second derivative (from the constructor or from a product).
    """

    def __init__(
        self,
        loss: Tensor | Sequence[Tensor],
        parameters: Mapping[str, Tensor],
        *,
        scale: float = 1.0,
        sites: bool = False,
    ) -> None:
        losses = (loss,) if isinstance(loss, Tensor) else tuple(loss)
        if not losses:
            raise MeasurementError("no loss to differentiate; give at least one")
        distinct: dict[int, str] = {}
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                distinct.setdefault(id(parameter), name)
        self.parameters: dict[str, Tensor] = {n: parameters[n] for n in distinct.values()}
        self._scale = scale
        self._graphs = tuple(_gradient_graph(chunk, self.parameters, sites) for chunk in losses)
        self.dtype = _lowest_precision(losses[0], self.parameters.values())

    @property
    def chunks(self) -> tuple[Hessian, ...]:
        """The Hessians of the single losses, sharing this one's graphs."""
        if len(self._graphs) == 1:
            return (self,)
        return tuple(self._with_graphs((graph,)) for graph in self._graphs)

    def _with_graphs(self, graphs: tuple[Graph, ...]) -> Hessian:
        part = object.__new__(Hessian)
        part.parameters, part._scale, part.dtype = self.parameters, self._scale, self.dtype
        part._graphs = graphs
        return part

    @property
    def gradient(self) -> dict[str, Tensor]:
        """The gradient, detached; zero for parameters the loss does not depend on."""
        self._check_alive()
        found = [{n: g.detach() for n, g in graph.gradient.items()} for graph in self._graphs]
        return self._mean(found, self.parameters)

    @property
    def everything(self) -> tuple[Part, ...]:
        """The block of all parameters."""
        return tuple(Part(name) for name in self.parameters)

    def known(self, block: Block) -> tuple[Part, ...]:
        """Returns the parts of a block that are measured: not the frozen ones, say."""
        return tuple(part for part in block if part.parameter in self.parameters)

    def size(self, block: Block) -> int:
        """Returns the number of elements of a block."""
        return sum(part.view(self._parameter(part)).numel() for part in block)

    def like(self, block: Block) -> Tensor:
        """Returns a tensor of the type and device that flat vectors of the block should have."""
        if not block:
            raise MeasurementError("a component without trained parameters has no curvature")
        return self._parameter(block[0])

    def flatten(self, block: Block, vector: Vector) -> Tensor:
        """Returns the block's elements of a vector as one flat tensor; left out means zero."""
        pieces = [
            part.view(vector[part.parameter]).reshape(-1)
            if part.parameter in vector
            else part.view(torch.zeros_like(self._parameter(part))).reshape(-1)
            for part in block
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def product(self, vector: Vector, rows: Collection[str] | None = None) -> dict[str, Tensor]:
        """Returns :math:`H v`, all of it or only the rows of some parameters.

        Args:
            vector: May leave parameters out (zero there); other names are ignored.
            rows: Names of the parameters whose rows are wanted; None: all.
        """
        weights = [(Part(name), vector[name]) for name in self.parameters if name in vector]
        return self._differentiate(weights, self._names(rows))

    def column(
        self, block: Block, vector: Vector, rows: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Returns :math:`H_{:,b} v_b`: the product with only the block's elements of ``vector``."""
        weights = [(p, p.view(vector[p.parameter])) for p in block if p.parameter in vector]
        return self._differentiate(weights, self._names(rows))

    def block_product(self, block: Block, v: Tensor) -> Tensor:
        """Returns :math:`H_{bb} v` for a flat ``v`` of `size` (block) elements, equally flat."""
        views = [part.view(self._parameter(part)) for part in block]
        pieces = torch.split(v, [view.numel() for view in views])
        weights = [
            (part, piece.view(view.shape))
            for part, piece, view in zip(block, pieces, views, strict=True)
        ]
        found = self._differentiate(weights, self._names([part.parameter for part in block]))
        return self.flatten(block, found)

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """The gradient graphs, one a chunk; what `per_sample` works on."""
        self._check_alive()
        return self._graphs

    @property
    def scale(self) -> float:
        """What the losses were multiplied by."""
        return self._scale

    def release(self) -> None:
        """Drops the gradient graphs; no product can be taken afterwards."""
        self._graphs = ()

    def __enter__(self) -> Hessian:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _names(self, rows: Collection[str] | None) -> list[str]:
        if rows is None:
            return list(self.parameters)
        return [name for name in self.parameters if name in rows]

    def _parameter(self, part: Part) -> Tensor:
        try:
            return self.parameters[part.parameter]
        except KeyError:
            raise MeasurementError(
                f"{part.parameter}: not among the measured parameters (frozen, unknown, or a "
                "second name of a shared tensor); leave it out of the component"
            ) from None

    def _check_alive(self) -> None:
        if not self._graphs:
            raise MeasurementError("this Hessian was released; build a new one from a live loss")

    def _differentiate(
        self, weights: Sequence[tuple[Part, Tensor]], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Returns the gradient of the sum of <part of g, weight> with respect to ``names``."""
        self._check_alive()
        inputs = [self.parameters[name] for name in names]
        found: list[dict[str, Tensor]] = []
        for graph in self._graphs:
            outputs: list[Tensor] = []
            directions: list[Tensor] = []
            for part, weight in weights:
                g = graph.gradient.get(part.parameter)
                # A gradient without a graph does not depend on any parameter: nothing to add.
                if g is not None and g.requires_grad:
                    outputs.append(part.view(g))
                    directions.append(weight.to(g))
            if not outputs or not inputs:
                found.append({})
                continue
            rows = differentiate(outputs, inputs, directions, create_graph=False)
            found.append({n: r for n, r in zip(names, rows, strict=True) if r is not None})
        return self._mean(found, names)

    def _mean(
        self, found: Sequence[Mapping[str, Tensor]], names: Collection[str]
    ) -> dict[str, Tensor]:
        """Returns the mean over chunks, unscaled; a read-only zero where no chunk had a value."""
        factor = 1.0 / (self._scale * len(found))
        mean: dict[str, Tensor] = {}
        for name in names:
            values = [chunk[name] for chunk in found if name in chunk]
            if values:
                total = functools.reduce(torch.add, values)
                if total.layout != torch.strided:  # rows of a sparse embedding
                    total = total.to_dense()
                mean[name] = total if factor == 1.0 else total * factor
            else:
                parameter = self.parameters[name]
                mean[name] = parameter.new_zeros(()).expand(parameter.shape)
        return mean


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """The gradient of one loss as a graph: by parameter (those that exist), and by site."""

    gradient: Mapping[str, Tensor]
    sites: Sequence[Site] = ()
    at_sites: Sequence[Tensor] = ()


def _gradient_graph(loss: Tensor, parameters: Mapping[str, Tensor], with_sites: bool) -> Graph:
    """Differentiates one loss once, keeping the graph of the result."""
    if not parameters:
        raise MeasurementError("no parameter requires a gradient; nothing to differentiate by")
    if loss.numel() != 1:
        raise MeasurementError(
            f"the loss has shape {tuple(loss.shape)}; curvature needs a scalar: take its mean"
        )
    if loss.grad_fn is None:
        raise MeasurementError("the loss has no graph; compute it with gradients enabled")
    sites = find_sites(loss, parameters) if with_sites else []
    inputs: list[Tensor | GradientEdge] = list(parameters.values())
    inputs += [site.edge for site in sites]
    with torch.enable_grad(), second_derivative_of_fused_attention():
        found = differentiate([loss], inputs, None, create_graph=True)
    gradient = {n: g for n, g in zip(parameters, found, strict=False) if g is not None}
    reached = [
        (site, g) for site, g in zip(sites, found[len(parameters) :], strict=True) if g is not None
    ]
    return Graph(gradient, [site for site, _ in reached], [g for _, g in reached])


def differentiate(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor | GradientEdge],
    weights: Sequence[Tensor] | None,
    *,
    create_graph: bool,
) -> tuple[Tensor | None, ...]:
    """Calls autograd; the graph always stays, because freeing ours would free the user's too.

    Raises:
        MeasurementError: When an operation on the way has no (second) derivative.
    """
    try:
        with torch.autocast(outputs[0].device.type, enabled=False):
            return torch.autograd.grad(
                outputs,
                inputs,  # type: ignore[arg-type]
                weights,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise MeasurementError(
            f"no second derivative here: {reason}; "
            "replay the step with an operation that has one, or leave curvature out"
        ) from error


def _lowest_precision(loss: Tensor, parameters: Collection[Tensor]) -> str:
    """Returns the name of the narrowest floating type in the graph: what the numbers rest on."""
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    dtypes = {parameter.dtype for parameter in parameters}
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        dtypes.update(meta.dtype for meta in node._input_metadata if meta.dtype.is_floating_point)
        waiting.extend(following for following, _ in node.next_functions)
    return str(min(dtypes, key=lambda dtype: -torch.finfo(dtype).eps)).removeprefix("torch.")
