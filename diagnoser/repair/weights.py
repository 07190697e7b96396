"""Repairs of what was learned: weights, optimizer state, and what takes part in training.

These change the training's own tensors and groups; a `Snapshot` that was taken before takes them
back.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diagnoser.curvature import RandomStates
from diagnoser.errors import RepairError
from diagnoser.repair.learning_rate import Undo, step_along
from diagnoser.repair.live import Live
from diagnoser.types import Part
from diagnoser.vocabulary import MODEL

LINEAR_STD = 1.0 / math.sqrt(3.0)  # of a uniform draw in [-1, 1], in which torch draws weights


def reinitialize(live: Live, component: str, seed: int = 0) -> None:
    """Draws a component's weights anew, as its author's code draws them, and forgets its averages.

    The module's ``reset_parameters`` is called, then ``_init_weights`` of the innermost model
    around it that has one (transformers, nanoGPT). What neither draws: a bare parameter is drawn as
    torch's linear layers are, and a norm goes back to ones and zeros. It is done on a copy of the
    module, and the training's random streams stay where they were.

    Raises:
        RepairError: There is no such component.
    """
    parts = live.parts(component)
    norms = {p.parameter for c in live.within(component) if c.kind == "norm" for p in c.parts}
    drawn: dict[int, Tensor] = {}
    streams = RandomStates.now()
    try:
        _seed(int(seed))
        for tensor, part in parts:
            if id(tensor) not in drawn:
                drawn |= _drawn_with(live, tensor)
            if id(tensor) not in drawn:
                drawn[id(tensor)] = _by_rule(tensor, part.parameter, part.parameter in norms)
    finally:
        streams.restore()
    with torch.no_grad():
        for tensor, part in parts:
            part.view(tensor).copy_(part.view(drawn[id(tensor)]))
    _forget(live, parts)


def temper_attention(live: Live, component: str, factor: float) -> Undo:
    """Multiplies attention logits by ``factor``: weights of the query, or of the context vector.

    Where the component itself is a key, its own weights are multiplied: logits are the product of
    both. From then on these weights take steps that are shorter (or longer) in proportion, so that
    the training goes on as if the scale in the program had been changed; a part of a fused
    parameter cannot have steps of its own, and takes those of the whole.

    Returns:
        What gives the steps their length back; the weights come back with a snapshot.

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
    parts = [pair for one in own for pair in live.parts(one.name)]
    with torch.no_grad():
        for tensor, part in parts:
            part.view(tensor).mul_(factor)
    return step_along(live, [tensor for tensor, part in parts if part.dim is None], factor)


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

    They join the group that holds most parameters of as many dimensions, with its options; of
    several models each has its own groups, if it has any. A gradient that has piled up until now is
    dropped.

    Raises:
        RepairError: There is no optimizer that can take them, or it has them already.
    """
    missing = [t for t in live.tensors(component) if live.optimizer_of(t) is None]
    if not missing:
        raise RepairError(f"register_parameters: an optimizer has all of {component}")
    for tensor, group in [(tensor, _group_for(live, tensor)) for tensor in missing]:
        tensor.grad = None
        group["params"].append(tensor)
        if "param_names" in group:  # of an optimizer that was given named_parameters()
            group["param_names"].append(next(n for n, p in live.parameters.items() if p is tensor))


def roll_back(live: Live, component: str, to: str = "healthy") -> None:
    """Goes back to weights and averages of an earlier state, of a component or of all.

    Args:
        live: The training.
        component: What goes back.
        to: ``healthy``: the last state from before anything was wrong; ``start``: the first one.

    Raises:
        RepairError: There is no such state.
    """
    if to not in ("healthy", "start"):
        raise RepairError(f"roll_back: to {to[:40]}; give healthy or start")
    state = live.healthy if to == "healthy" else live.start
    if state is None:
        missing = "healthy state was kept before the fault" if to == "healthy" else "start was kept"
        raise RepairError(f"roll_back: no {missing}")
    state.roll_back(None if component == MODEL else live.parts(component))


def unfreeze(live: Live, component: str) -> None:
    """Lets a component be trained: its parameters require a gradient, and an optimizer has them.

    Raises:
        RepairError: It is trained already, or there is no optimizer.
    """
    tensors = live.tensors(component)
    if all(tensor.requires_grad for tensor in tensors):
        raise RepairError(f"unfreeze: {component} requires gradients already")
    without = [tensor for tensor in tensors if live.optimizer_of(tensor) is None]
    for tensor in without:
        _group_for(live, tensor)  # refuses before anything is changed
    for tensor in tensors:
        if not tensor.requires_grad:
            tensor.grad = None  # from before it was frozen
            tensor.requires_grad_(True)
    if without:
        register_parameters(live, component)


def _group_for(live: Live, tensor: Tensor) -> dict[str, Any]:
    """Returns the group that a parameter is to join.

    Raises:
        RepairError: There is no optimizer, or none that can take one more.
    """
    able = [o for o in live.optimizers if not isinstance(o, torch.optim.LBFGS)]
    groups = [group for optimizer in able for group in optimizer.param_groups]
    if not groups:
        why = "LBFGS cannot take more" if live.optimizers else "there is no optimizer"
        raise RepairError(f"register_parameters: {why}")
    related = {
        id(parameter)
        for model in live.models.values()
        if any(parameter is tensor for parameter in model.parameters())
        for parameter in model.parameters()
    }
    groups = [g for g in groups if any(id(p) in related for p in g["params"])] or groups
    alike = [sum(p.numel() for p in g["params"] if p.ndim == tensor.ndim) for g in groups]
    return groups[alike.index(max(alike))]


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)


def _drawn_with(live: Live, tensor: Tensor) -> dict[int, Tensor]:
    """Returns what the module that holds a parameter draws: for it, and for those beside it.

    Empty where the author's code draws nothing for it.
    """
    for model in live.models.values():
        for path in _paths(model):
            module = path[-1]
            if all(parameter is not tensor for parameter in module._parameters.values()):
                continue
            fresh = _by_author(path)
            return {
                id(parameter): values.detach()
                for name, parameter in module._parameters.items()
                if parameter is not None
                and (values := fresh.get(name)) is not None
                and not values.isnan().any()
            }
    return {}


def _paths(root: nn.Module) -> Iterator[tuple[nn.Module, ...]]:
    """Yields every module, each once, behind those that it lies in."""
    seen: set[int] = set()

    def below(path: tuple[nn.Module, ...]) -> Iterator[tuple[nn.Module, ...]]:
        if id(path[-1]) in seen:
            return
        seen.add(id(path[-1]))
        yield path
        for child in path[-1].children():
            yield from below((*path, child))

    yield from below((root,))


def _by_author(path: tuple[nn.Module, ...]) -> dict[str, Tensor | None]:
    """Returns a module's parameters as its author's code draws them; NaN: it does not."""
    module = path[-1]
    hooks = {id(value): type(value)() for m in module.modules() for value in _hooks(m)}
    try:
        fresh = copy.deepcopy(module, hooks)  # those of a watch are no part of it
    except Exception:
        return {}
    with torch.no_grad():
        for parameter in fresh._parameters.values():
            if parameter is not None and (parameter.is_floating_point() or parameter.is_complex()):
                parameter.fill_(torch.nan)
        whole = next(filter(None, map(_whole, path[::-1])), None)
        copies = [fresh]
        if len(path) > 1:  # some have rules for what stands where in a block
            copies.append(_block(path[-2], module, fresh))
        for made in copies:
            own = getattr(made, "reset_parameters", None) or getattr(
                made, "_reset_parameters", None
            )
            with contextlib.suppress(Exception):  # somebody's code, which may be for other modules
                if callable(own):
                    own()
            with contextlib.suppress(Exception):
                if whole is not None:
                    whole(made)
    return dict(fresh._parameters)


def _hooks(module: nn.Module) -> list[dict[int, Any]]:
    return [
        value
        for name, value in vars(module).items()
        if name.endswith("_hooks") and isinstance(value, dict)
    ]


def _whole(model: nn.Module) -> Callable[[nn.Module], object] | None:
    """Returns a model's ``_init_weights``, if that is one that wants a module."""
    method = getattr(model, "_init_weights", None)
    if not callable(method):
        return None
    wanted = list(inspect.signature(method).parameters.values())
    required = [p for p in wanted if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD]
    return method if len(required) == 1 and wanted[0] is required[0] else None


def _block(parent: nn.Module, module: nn.Module, fresh: nn.Module) -> nn.Module:
    """Returns a block with nothing in it but copies, and of its modules only the fresh one."""
    block = object.__new__(type(parent))
    vars(block).update(vars(parent))
    own: dict[str, Any] = {
        "_parameters": {name: copy.deepcopy(p) for name, p in parent._parameters.items()},
        "_buffers": {name: copy.deepcopy(buffer) for name, buffer in parent._buffers.items()},
        "_modules": {name: fresh for name, child in parent._modules.items() if child is module},
    }
    vars(block).update(own)
    return block


def _by_rule(tensor: Tensor, name: str, is_norm: bool) -> Tensor:
    if is_norm:
        shift = any(word in name.rpartition(".")[2] for word in ("bias", "beta", "shift"))
        return torch.zeros_like(tensor) if shift else torch.ones_like(tensor)
    if tensor.ndim < 2:  # a bias, a gain or a token of its own: torch.nn has no rule
        return 0.02 * torch.randn_like(tensor)
    fan_in = tensor[0].numel()
    return torch.randn_like(tensor) * (LINEAR_STD / math.sqrt(fan_in))


def _forget(live: Live, parts: Iterable[tuple[Tensor, Part]]) -> None:
    for tensor, part in parts:
        optimizer = live.optimizer_of(tensor)
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.state.clear()  # its one memory is of all parameters at once
            continue
        state = optimizer.state.get(tensor) if optimizer is not None else None
        if optimizer is None or not state:
            continue
        if isinstance(optimizer, torch.optim.Adagrad):  # some versions need it to be there
            if part.dim is None:
                state["step"].zero_()
            part.view(state["sum"]).fill_(optimizer.defaults["initial_accumulator_value"])
            continue
        if part.dim is None:
            del optimizer.state[tensor]
            continue
        for value in state.values():  # the rest of a fused parameter keeps its averages
            if isinstance(value, Tensor) and value.shape == tensor.shape:
                part.view(value).zero_()
