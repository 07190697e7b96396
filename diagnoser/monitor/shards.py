"""Parameters that FSDP2 spreads over ranks: which of their elements are here, and which are whose.

Nothing here communicates. An operation on a DTensor may (a sum over shards is an all-reduce), so
none is made: what is read are the elements that lie on this rank, as plain tensors.

Between forward and backward FSDP2 lends some modules whole parameters, and the graph of the loss
ends at these, while optimizers hold the shards. `as_sharded` has the modules hold the shards for as
long as names are given.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diagnoser.errors import MeasurementError
from diagnoser.types import Component, Part


def local(tensor: Tensor) -> Tensor:
    """Returns the elements of a tensor that are on this rank, in its own memory."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        own: Any = tensor.to_local()  # type: ignore[attr-defined]
    found: Tensor = own.wait() if hasattr(own, "wait") else own
    return found


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor: maybe one of whose elements only some are here."""
    return hasattr(tensor, "to_local")


def refuse_flattened(modules: Iterable[nn.Module]) -> None:
    """Raises a `MeasurementError` for the older FSDP, which cuts modules up across parameters."""
    for module in modules:
        if any(one.__name__ == "FullyShardedDataParallel" for one in type(module).__mro__):
            raise MeasurementError(
                "FullyShardedDataParallel: which elements are on this rank is not known, so only "
                "losses are recorded; use torch.distributed.fsdp.fully_shard"
            )


def elements_of(part: Part, parameter: Tensor) -> int:
    """Returns the number of elements of a part, on all ranks together."""
    if part.dim is None:
        return parameter.numel()
    return parameter.numel() // max(parameter.shape[part.dim], 1) * part.length


def held(components: Sequence[Component], parameters: Mapping[str, Tensor]) -> list[Component]:
    """Returns components with those of their parts that are on this rank, as places in `local`.

    Of elements that several ranks hold (replicas of shards, parameters left whole) the first of
    these ranks has them, so that over all ranks each element is there once.

    Raises:
        MeasurementError: A parameter is spread in a way that is not understood.
    """
    here = {name: _piece(name, parameter) for name, parameter in parameters.items()}
    found = []
    for component in components:
        parts = [
            one
            for part in component.parts
            if (one := _held(part, here[part.parameter])) is not None
        ]
        found.append(dataclasses.replace(component, parts=tuple(parts)))
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """A range of a dimension that is on this rank; ``dim`` None: all of a parameter, or nothing."""

    dim: int | None
    start: int = 0
    length: int = 0
    ours: bool = True


def _piece(name: str, parameter: Tensor) -> _Piece:
    if not is_sharded(parameter):  # whole on every rank
        return _Piece(None, ours=torch.distributed.get_rank() == 0)
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()  # type: ignore[attr-defined]
    placements = parameter.placements  # type: ignore[attr-defined]
    if coordinate is None:
        return _Piece(None, ours=False)
    ours, piece = True, _Piece(None)
    for axis, placement in enumerate(placements):
        if placement.is_replicate():
            ours &= coordinate[axis] == 0
        elif type(placement).__name__ == "Shard" and piece.dim is None:
            # As torch.chunk cuts it: all alike but for the last ones.
            size = parameter.shape[placement.dim]
            each = -(-size // mesh.size(axis))
            start = min(coordinate[axis] * each, size)
            piece = _Piece(placement.dim, start, min(each, size - start))
        else:
            raise MeasurementError(
                f"{name}: spread over ranks as {placements}; only fully_shard along one dimension, "
                "with or without replicas, is understood"
            )
    return dataclasses.replace(piece, ours=ours)


def _held(part: Part, piece: _Piece) -> Part | None:
    if not piece.ours or (piece.dim is not None and piece.length == 0):
        return None
    if piece.dim is None or (part.dim is not None and part.dim != piece.dim):
        return part
    if part.dim is None:
        return part  # of the local tensor, all
    start = max(part.start, piece.start)
    end = min(part.start + part.length, piece.start + piece.length)
    if end <= start:
        return None
    return Part(part.parameter, part.dim, start - piece.start, end - start)


def can_be_run(modules: Iterable[nn.Module]) -> bool:
    """Whether FSDP2 stands between two steps, so that the model can be run forth and back.

    It may hold gradients that it has not reduced yet, a backward may step an optimizer, and a
    program's other ranks may have no part in the model.
    """
    size = torch.distributed.get_world_size()
    for group in _fsdp_groups(modules):
        if not group.reduce_grads or group._training_state.name != "IDLE":
            return False
        for one in group.fsdp_params:
            hooks = getattr(one.sharded_param, "_post_accumulate_grad_hooks", None)
            mesh = one.sharded_param.device_mesh
            if hooks or one.unsharded_accumulated_grad is not None or mesh.size() != size:
                return False
    return True


@contextmanager
def as_sharded(modules: Iterable[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Has modules hold the shards that optimizers step; yields these by the ids of what is lent."""
    lent: dict[int, Tensor] = {}
    before: list[tuple[dict[str, Any], str, Any]] = []
    for one in (one for group in _fsdp_groups(modules) for one in group.fsdp_params):
        shard, info = one.sharded_param, one._module_info
        whole = getattr(one, "_unsharded_param", None)
        if whole is not None:
            lent[id(whole)] = shard
        places = [
            (info.module, info.param_name),
            *zip(info.shared_modules, info.shared_param_names, strict=True),
        ]
        for module, name in places:
            before.append((module._parameters, name, module._parameters[name]))
    try:
        for owner, name, now in before:
            owner[name] = lent.get(id(now), now)
        yield lent
    finally:
        for owner, name, earlier in before:
            owner[name] = earlier


def _fsdp_groups(modules: Iterable[nn.Module]) -> Iterator[Any]:
    states = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_state")
    if states is None:  # nobody has sharded anything
        return
    for module in modules:
        state = states._get_module_fsdp_state(module)
        if state is None:
            continue
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch before 2.12 or so has one at most
            groups = [g for g in (state._fsdp_param_group,) if g is not None]
        yield from groups
