"""Repairs of what was learned: weights, optimizer state, and what takes part in training.

These change the training's own tensors and groups; a `Snapshot` that was taken before takes them
back.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from diagnoser.curvature import RandomStates
from diagnoser.errors import RepairError
from diagnoser.repair.live import Live
from diagnoser.types import Part
from diagnoser.vocabulary import MODEL

LINEAR_STD = 1.0 / math.sqrt(3.0)  # of a uniform draw in [-1, 1], in which torch draws weights


def reinitialize(live: Live, component: str, seed: int = 0) -> None:
    """Draws a component's weights anew, as its author's code draws them, and forgets its averages.

    A model's own ``_init_weights`` (transformers, nanoGPT) is asked first, then the module's
    ``reset_parameters``; a bare parameter is drawn as torch's linear layers are. It is done on a
    copy of the module, and the training's random streams stay where they were.

    Raises:
        RepairError: There is no such component.
    """
    parts = live.parts(component)
    drawn: dict[int, Tensor] = {}
    random = RandomStates.now()
    try:
        torch.manual_seed(seed)
        for tensor, _ in parts:
            if id(tensor) not in drawn:
                drawn[id(tensor)] = _drawn(live, tensor)
    finally:
        random.restore()
    with torch.no_grad():
        for tensor, part in parts:
            part.view(tensor).copy_(part.view(drawn[id(tensor)]))
    _forget(live, parts)


def temper_attention(live: Live, component: str, factor: float) -> None:
    """Multiplies attention logits by ``factor``: weights of the query, or of the context vector.

    Where the component itself is a key, its own weights are multiplied: logits are the product of
    both.

    Raises:
        RepairError: It holds neither, or the factor is no positive number.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise RepairError(f"temper_attention: factor {factor} is no positive number")
    members = live.within(component)
    own = [c for c in members if c.kind in ("query", "attention_context")]
    if not own and len(members) == 1:
        own = [c for c in members if c.kind == "key"] or [
            c
            for c in live.components
            if c.layer == members[0].layer and c.kind in ("query", "attention_context")
        ]
    if not own:
        raise RepairError(f"temper_attention: no query or context vector in {component}")
    with torch.no_grad():
        for one in own:
            for tensor, part in live.parts(one.name):
                part.view(tensor).mul_(factor)


def reset_optimizer_state(live: Live, component: str) -> None:
    """Clears the running averages that an optimizer keeps of a component.

    Raises:
        RepairError: No optimizer steps it.
    """
    parts = live.parts(component)
    live.with_optimizers_of([tensor for tensor, _ in parts])
    _forget(live, parts)


def register_parameters(live: Live, component: str) -> None:
    """Gives a component's parameters to the optimizer that steps most of the model.

    They join the group that holds most parameters of as many dimensions, with its options. A
    gradient that has piled up until now is dropped.

    Raises:
        RepairError: There is no optimizer, or it has them already.
    """
    missing = [t for t in live.tensors(component) if live.optimizer_of(t) is None]
    if not missing:
        raise RepairError(f"register_parameters: an optimizer has all of {component}")
    groups = [group for optimizer in live.optimizers for group in optimizer.param_groups]
    if not groups:
        raise RepairError("register_parameters: there is no optimizer")
    for tensor in missing:
        alike = [sum(p.numel() for p in g["params"] if p.ndim == tensor.ndim) for g in groups]
        tensor.grad = None
        groups[alike.index(max(alike))]["params"].append(tensor)


def roll_back(live: Live, component: str) -> None:
    """Goes back to the weights and averages of the last healthy state, of a component or of all.

    Raises:
        RepairError: No healthy state was kept.
    """
    if live.healthy is None:
        raise RepairError("roll_back: no healthy state was kept before the fault")
    live.healthy.roll_back(None if component == MODEL else live.parts(component))


def unfreeze(live: Live, component: str) -> None:
    """Lets a component be trained: its parameters require a gradient, and an optimizer has them.

    Raises:
        RepairError: It is trained already, or there is no optimizer.
    """
    tensors = live.tensors(component)
    if all(tensor.requires_grad for tensor in tensors):
        raise RepairError(f"unfreeze: {component} requires gradients already")
    for tensor in tensors:
        tensor.requires_grad_(True)
    if any(live.optimizer_of(tensor) is None for tensor in tensors):
        register_parameters(live, component)


def _drawn(live: Live, tensor: Tensor) -> Tensor:
    """Returns new values for a parameter."""
    for model in live.models.values():
        for module in model.modules():
            name = next((n for n, p in module._parameters.items() if p is tensor), None)
            if name is not None:
                drawn = _by_author(model, module, name)
                return _by_rule(tensor) if drawn is None else drawn
    return _by_rule(tensor)


def _by_author(model: nn.Module, module: nn.Module, name: str) -> Tensor | None:
    """Returns a parameter as the module's and the model's own code draw it, None without any."""
    fresh = copy.deepcopy(module)
    own = getattr(fresh, "reset_parameters", None) or getattr(fresh, "_reset_parameters", None)
    whole = getattr(model, "_init_weights", None)
    with torch.no_grad():
        if callable(own):
            own()
        if callable(whole):
            with contextlib.suppress(Exception):  # somebody's code, which may be for other modules
                whole(fresh)
    drawn, old = fresh._parameters[name], module._parameters[name]
    assert drawn is not None
    assert old is not None
    return drawn.detach() if callable(own) or not torch.equal(drawn, old) else None


def _by_rule(tensor: Tensor) -> Tensor:
    if tensor.ndim < 2:  # a bias, a gain or a token of its own: torch.nn has no rule
        return 0.02 * torch.randn_like(tensor)
    fan_in = tensor[0].numel()
    return torch.randn_like(tensor) * (LINEAR_STD / math.sqrt(fan_in))


def _forget(live: Live, parts: Iterable[tuple[Tensor, Part]]) -> None:
    for tensor, part in parts:
        optimizer = live.optimizer_of(tensor)
        state = optimizer.state.get(tensor) if optimizer is not None else None
        if optimizer is None or not state:
            continue
        if part.dim is None:
            del optimizer.state[tensor]
            continue
        for value in state.values():  # the rest of a fused parameter keeps its averages
            if isinstance(value, Tensor) and value.shape == tensor.shape:
                part.view(value).zero_()
