"""Products with a mean of losses whose graphs do not fit into memory together."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnoser.curvature.hessian import Hessian
from diagnoser.curvature.operator import Operator, trained
from diagnoser.errors import MeasurementError
from diagnoser.types import Part

Loss = Callable[[], Tensor]
"""Computes a scalar loss, always on the same samples and random numbers."""


class StreamedHessian(Operator):
    """The Hessian of a mean of losses whose graphs do not fit into memory together.

    One gradient graph exists at a time. Products with one chunk (see `chunks`) in a row share it;
    with all of them, each product builds every graph again, at nearly twice the cost.

    Args:
        losses: Each computes the scalar loss of one chunk.
        parameters: Name to leaf tensor.
        compute: How a loss is computed; by calling it, if left out.
    """

    def __init__(
        self,
        losses: Sequence[Loss],
        parameters: Mapping[str, Tensor],
        compute: Callable[[Loss], Tensor] | None = None,
    ) -> None:
        if not losses:
            raise MeasurementError("no loss to differentiate; give at least one")
        self.parameters = trained(parameters)
        self._losses = tuple(losses)
        self._compute = compute or _call
        self._slot = _Slot()
        self.dtype = self._open(self._losses[0]).dtype

    @property
    def chunks(self) -> tuple[StreamedHessian, ...]:
        """See `Operator`; they share the place for the one graph."""
        if len(self._losses) == 1:
            return (self,)
        return tuple(self._with_losses((loss,)) for loss in self._losses)

    def _with_losses(self, losses: tuple[Loss, ...]) -> StreamedHessian:
        part = copy.copy(self)
        part._losses = losses
        return part

    @property
    def loss(self) -> float:
        """See `Operator`; computed anew each time."""
        with torch.no_grad():
            return math.fsum(float(loss()) for loss in self._losses) / len(self._losses)

    @property
    def gradient(self) -> dict[str, Tensor]:
        """See `Operator`."""
        return self._mean(lambda hessian: hessian.gradient, list(self.parameters))

    def release(self) -> None:
        """Drops the graph and the losses; no product can be taken afterwards."""
        self._slot.release()
        self._losses = ()

    def _multiply(
        self, weights: Sequence[tuple[Part, Tensor]], names: Sequence[str]
    ) -> dict[str, Tensor]:
        return self._mean(lambda hessian: hessian._multiply(weights, names), names)

    def _mean(
        self, part: Callable[[Hessian], dict[str, Tensor]], names: Sequence[str]
    ) -> dict[str, Tensor]:
        if not self._losses:
            raise MeasurementError("this operator was released; build a new one")
        total: dict[str, Tensor] = {}
        for loss in self._losses:
            found = part(self._open(loss))
            total = self._sum([total, found], names, 1.0)
        return self._sum([total], names, 1.0 / len(self._losses))

    def _open(self, loss: Loss) -> Hessian:
        slot = self._slot
        if slot.loss is not loss or slot.hessian is None:
            slot.release()  # before the next is built: there is room for one
            slot.hessian, slot.loss = Hessian(self._compute(loss), self.parameters), loss
        return slot.hessian


@dataclass(slots=True, eq=False)
class _Slot:
    """The one graph that exists."""

    loss: Loss | None = None
    hessian: Hessian | None = None

    def release(self) -> None:
        if self.hessian is not None:
            self.hessian.release()
        self.loss = self.hessian = None


def _call(loss: Loss) -> Tensor:
    with torch.enable_grad():
        return loss()
