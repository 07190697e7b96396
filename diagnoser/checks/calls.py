"""What a training step called: modules at the outermost level, and loss functions.

A call is all that is needed to run a model once more on the batch it has just seen. `monitor`
records calls on the steps that are checked; everything in this room works on them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from diagnoser.types import Where


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One outermost call of a module, ``module(*args, **kwargs)``, and what it returned."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    training: bool
    grad: bool  # whether a graph was recorded
    place: Where | None

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that went in, in order."""
        return [*tensors_of(self.args), *tensors_of(dict(self.kwargs))]


@dataclass(frozen=True, slots=True, eq=False)
class LossCall:
    """One call of a loss function of `torch.nn.functional`: its scores and its target."""

    name: str
    scores: Tensor
    target: Tensor
    options: Mapping[str, Any]
    output: Any
    place: Where | None


@dataclass(slots=True)
class Calls:
    """What one step called, in order, and why nothing could be seen where that is so."""

    modules: list[Call] = field(default_factory=list)
    losses: list[LossCall] = field(default_factory=list)
    reason: str | None = None

    @property
    def main(self) -> Call | None:
        """The call with the most parameters that need a gradient: the model that is trained."""
        sized = [(sum(p.numel() for p in c.module.parameters() if p.requires_grad), c)
                 for c in self.modules if c.grad]  # fmt: skip
        sized = [(size, call) for size, call in sized if size]
        return max(sized, key=lambda pair: pair[0])[1] if sized else None


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested tuples, lists, mappings, dataclasses and plain objects."""
    yield from _tensors(value, depth=6)


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth == 0 or isinstance(value, nn.Module | str | bytes):
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, depth - 1)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item, depth - 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            yield from _tensors(getattr(value, entry.name, None), depth - 1)


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns nested arguments with every tensor replaced; what is no container stays."""
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, value)


def distinct(tensor: Tensor, dim: int | None = None) -> Tensor:
    """Returns the different values (or slices along an axis) of a tensor, in order."""
    found: Tensor = tensor.unique(dim=dim)  # type: ignore[no-untyped-call]
    return found


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary dense one: not nested, sparse, quantized or on meta."""
    return (
        tensor.layout == torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
        and tensor.device.type != "meta"
    )
