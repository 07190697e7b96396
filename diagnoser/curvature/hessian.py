r"""Hessian-vector products on a live graph: one retained gradient graph, any number of products.

With the gradient :math:`g(\theta) = \nabla L` kept as a graph, reverse over reverse gives

.. math:: H v = \nabla_\theta \, (g(\theta)^\top v)

(Pearlmutter 1994, Fast exact multiplication by the Hessian). For a block *b* of parameters only the
outputs :math:`g_b` and the inputs :math:`\theta_b` are touched, so that a product with a diagonal
block :math:`H_{bb}` costs a fraction of a full one.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from diagnoser.curvature.fused_attention import second_derivative_of_fused_attention
from diagnoser.curvature.memory import out_of_memory
from diagnoser.curvature.operator import Operator, trained
from diagnoser.curvature.sites import Site, find_sites
from diagnoser.errors import MeasurementError
from diagnoser.types import Part

ON_A_PROBE = "measure on a probe set, by watch(..., loss_fn=, probe=)"
"""What remains where a live graph will not do."""


class NoSecondDerivativeError(MeasurementError):
    """An operation on the way from loss to parameters cannot be differentiated twice."""


class Hessian(Operator):
    """The Hessian of a loss, by exact products on its live graph.

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
        self.parameters = trained(parameters)
        self._scale = scale
        with self._differentiable():
            self._graphs = tuple(_gradient_graph(chunk, self.parameters, sites) for chunk in losses)
        self.dtype = lowest_precision(losses[0], self.parameters.values())

    @property
    def chunks(self) -> tuple[Hessian, ...]:
        """The Hessians of the single losses, sharing this one's graphs."""
        if len(self._graphs) == 1:
            return (self,)
        return tuple(self._with_graphs((graph,)) for graph in self._graphs)

    def _with_graphs(self, graphs: tuple[Graph, ...]) -> Hessian:
        part = copy.copy(self)
        part._graphs = graphs
        return part

    @property
    def loss(self) -> float:
        """See `Operator`; reads a value from its device."""
        self._check_alive()
        return float(torch.stack([graph.loss for graph in self._graphs]).sum()) * self._factor

    @property
    def gradient(self) -> dict[str, Tensor]:
        """The gradient, detached; zero for parameters the loss does not depend on."""
        self._check_alive()
        found = [{n: g.detach() for n, g in graph.gradient.items()} for graph in self._graphs]
        return self._sum(found, self.parameters, self._factor)

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

    @property
    def _factor(self) -> float:
        return 1.0 / (self._scale * len(self._graphs))

    def _differentiable(self) -> AbstractContextManager[None]:
        """What must hold while autograd runs; nothing, for operations with a second derivative."""
        return nullcontext()

    def _check_alive(self) -> None:
        if not self._graphs:
            raise MeasurementError("this Hessian was released; build a new one from a live loss")

    def _multiply(
        self, weights: Sequence[tuple[Part, Tensor]], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """The gradient of the sum of <part of g, weight> with respect to ``names``."""
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
            with self._differentiable():
                rows = differentiate(outputs, inputs, directions, create_graph=False)
            found.append({n: r for n, r in zip(names, rows, strict=True) if r is not None})
        return self._sum(found, names, self._factor)


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A loss, detached, and its gradient as a graph: by parameter (those that exist), by site."""

    loss: Tensor
    gradient: Mapping[str, Tensor]
    sites: Sequence[Site] = ()
    at_sites: Sequence[Tensor] = ()


def _gradient_graph(loss: Tensor, parameters: Mapping[str, Tensor], with_sites: bool) -> Graph:
    """Differentiates one loss once, keeping the graph of the result."""
    check_loss(loss)
    sites = find_sites(loss, parameters) if with_sites else []
    inputs: list[Tensor | GradientEdge] = list(parameters.values())
    inputs += [site.edge for site in sites]
    with torch.enable_grad(), second_derivative_of_fused_attention():
        found = differentiate([loss], inputs, None, create_graph=True)
    gradient = {n: g for n, g in zip(parameters, found, strict=False) if g is not None}
    reached = [
        (site, g) for site, g in zip(sites, found[len(parameters) :], strict=True) if g is not None
    ]
    value = loss.detach().reshape(())
    return Graph(value, gradient, [site for site, _ in reached], [g for _, g in reached])


def check_loss(loss: Tensor) -> None:
    """Raises a `MeasurementError` for a loss that cannot be differentiated at all."""
    if loss.numel() != 1:
        raise MeasurementError(
            f"the loss has shape {tuple(loss.shape)}; curvature needs a scalar: take its mean"
        )
    if loss.grad_fn is None:
        raise MeasurementError("the loss has no graph; compute it with gradients enabled")


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
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise NoSecondDerivativeError(
            f"no second derivative here: {reason}; {ON_A_PROBE}, which then takes differences"
        ) from error


def lowest_precision(loss: Tensor, parameters: Collection[Tensor]) -> str:
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
