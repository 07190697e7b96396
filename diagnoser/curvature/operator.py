"""What estimators need of a Hessian, however its products come about."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from diagnoser.errors import MeasurementError
from diagnoser.types import Part

Block = Sequence[Part]
"""A group of parameters or of ranges of them: the ``parts`` of a `types.Component`."""

Vector = Mapping[str, Tensor]
"""A vector over the parameters: name to a tensor of the parameter's shape; left out means zero."""


class Operator(ABC):
    """The Hessian of a loss with respect to named parameters, as an operator.

    How its products come about: exactly on a live graph (`hessian.Hessian`), chunk by chunk
    (`probe.StreamedHessian`), through compiled calls made again (`replay.ReplayHessian`), or by
    differences (`finite_difference.CentralDifference`).

    Two spellings of a vector: a `Vector` (name to tensor) over all parameters, and for one block a
    flat tensor of `size` (block) elements, its parts one after the other in row-major order.

    Attributes:
        parameters: Name to leaf tensor, each tensor once.
        dtype: The narrowest floating type that the numbers rest on.
        method: How products are obtained; it belongs on every number made from them.
    """

    parameters: dict[str, Tensor]
    dtype: str
    method: str = "exact"

    @property
    def relative_error(self) -> float:
        """The largest error of a product so far, beyond rounding, as a share of its length."""
        return 0.0

    @property
    @abstractmethod
    def chunks(self) -> tuple[Operator, ...]:
        """The Hessians of the single losses whose mean is meant."""

    @property
    @abstractmethod
    def loss(self) -> float:
        """The mean loss."""

    @property
    @abstractmethod
    def gradient(self) -> dict[str, Tensor]:
        """The gradient, detached; zero for parameters the loss does not depend on."""

    @abstractmethod
    def release(self) -> None:
        """Drops all graphs; no product can be taken afterwards."""

    @abstractmethod
    def _multiply(
        self, weights: Sequence[tuple[Part, Tensor]], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Returns rows ``names`` of the product with the sum of ``weights``, each on its part."""

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
        return self._multiply(weights, self._names(rows))

    def column(
        self, block: Block, vector: Vector, rows: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Returns :math:`H_{:,b} v_b`: the product with only the block's elements of ``vector``."""
        weights = [(p, p.view(vector[p.parameter])) for p in block if p.parameter in vector]
        return self._multiply(weights, self._names(rows))

    def block_product(self, block: Block, v: Tensor) -> Tensor:
        """Returns :math:`H_{bb} v` for a flat ``v`` of `size` (block) elements, equally flat."""
        views = [part.view(self._parameter(part)) for part in block]
        pieces = torch.split(v, [view.numel() for view in views])
        weights = [
            (part, piece.view(view.shape))
            for part, piece, view in zip(block, pieces, views, strict=True)
        ]
        found = self._multiply(weights, self._names([part.parameter for part in block]))
        return self.flatten(block, found)

    def __enter__(self) -> Self:
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

    def _sum(
        self, found: Sequence[Mapping[str, Tensor]], names: Collection[str], factor: float
    ) -> dict[str, Tensor]:
        """Returns ``factor`` times the sum; a read-only zero where nothing had a value."""
        total: dict[str, Tensor] = {}
        for name in names:
            values = [one[name] for one in found if name in one]
            if values:
                value = functools.reduce(torch.add, values)
                if value.layout != torch.strided:  # rows of a sparse embedding
                    value = value.to_dense()
                total[name] = value if factor == 1.0 else value * factor
            else:
                parameter = self.parameters[name]
                total[name] = parameter.new_zeros(()).expand(parameter.shape)
        return total


def trained(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns those that require a gradient, a tensor under two names under its first only."""
    distinct: dict[int, str] = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            distinct.setdefault(id(parameter), name)
    if not distinct:
        raise MeasurementError("no parameter requires a gradient; nothing to differentiate by")
    return {name: parameters[name] for name in distinct.values()}
