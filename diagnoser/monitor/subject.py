"""What is being watched: the models behind a loss, their components and their optimizers."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diagnoser.components import (
    free_component,
    head_of,
    layers_of,
    parameters_of,
    split_components,
)
from diagnoser.monitor.shards import (
    as_sharded,
    elements_of,
    held,
    is_sharded,
    local,
    refuse_flattened,
)
from diagnoser.statistics import PartList
from diagnoser.stepping import groups_of_step, own_rates
from diagnoser.types import Component

TORCHS_OWN = frozenset(vars(nn.Module()))  # attributes that every module has

Array = NDArray[np.float64]


HALF = (torch.float16, torch.bfloat16)
MAKES_LOGITS = ("query", "key", "attention_projection", "attention_context")


def is_rounded(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    """Whether an optimizer steps a half-precision parameter in place.

    It does not where it keeps the same numbers in a wider type beside it (master weights).
    """
    if parameter.dtype not in HALF:
        return False
    kept = (
        value
        for value in optimizer.state.get(parameter, {}).values()
        if isinstance(value, Tensor)
        and value.dtype in (torch.float32, torch.float64)
        and value.shape == parameter.shape
    )
    own = local(parameter).detach()
    return not any(torch.equal(local(value).to(own.dtype), own) for value in kept)


@dataclass(frozen=True)
class StepRule:
    """How an optimizer turns a gradient into a step, as far as stability depends on it.

    A quadratic with curvature ``lam`` along a direction is stable while
    ``learning_rate * lam * factor <= 1``: gradient descent with heavy-ball momentum m has
    ``factor = 1 / (2 + 2 m)``, Nesterov momentum ``(1 + 2 m) / (2 + 2 m)``; Adam, whose momentum is
    an average, ``(1 - beta1) / (2 + 2 beta1)`` for the curvature preconditioned by
    ``sqrt(v_hat) + eps`` (Cohen et al. 2021, 2207.14484 section 3).
    """

    learning_rate: float
    factor: float
    second_moment: Tensor | None  # bias-corrected, shaped like the parameter; None: no such thing
    eps: float
    rate_factor: float = 1.0  # what a repair multiplies the script's own learning rate by

    def preconditioner(self) -> Tensor:
        """Diagonal of P: the step is ``-learning_rate * P^-1 * average gradient``."""
        if self.second_moment is None:
            return torch.ones(())
        return self.second_moment.sqrt().add_(self.eps)


class Subject:
    """Models, their split into components, and the parameters as tensors by name.

    Attributes:
        sharded: Whether FSDP2 has spread parameters over ranks. Then `weights` and `gradients` are
            of the elements on this rank, and ``parts`` the places of these.
        held: The components, with those of their parts that are on this rank.
        parts: All of these parts.
        elements: How many of each component ``parts`` cover.

    Raises:
        MeasurementError: Parameters are spread over ranks in a way that is not understood.
    """

    def __init__(
        self, models: Mapping[str, nn.Module], free: Mapping[str, Tensor], *, heads: bool = False
    ) -> None:
        self.models = dict(models)
        refuse_flattened(self.modules)
        with as_sharded(self.modules) as lent:
            self.parameters: dict[str, Tensor] = dict(parameters_of(models))
            components = list(split_components(models, heads=heads))
        for name, tensor in free.items():
            components.append(free_component(name, tensor, order=len(components)))
            self.parameters[name] = tensor
        self.components: tuple[Component, ...] = tuple(components)
        self.layers = layers_of(self.components)
        self.sharded = any(map(is_sharded, self.parameters.values()))
        here = held(self.components, self.parameters) if self.sharded else self.components
        self.held = tuple(here)
        self.parts = PartList.of(self.held)
        self._all = PartList.of(self.components)
        self.elements = self.parts.add_up(self.parts.owner, self._sizes(self.parts, self.weights()))
        self.names = [component.name for component in self.components]
        self.name_of = {id(tensor): name for name, tensor in self.parameters.items()}
        self.name_of |= {key: self.name_of[id(p)] for key, p in lent.items()}
        self._owner: dict[str, list[int]] = {}
        for i, component in enumerate(self.components):
            for part in component.parts:
                self._owner.setdefault(part.parameter, []).append(i)
        self._fan_in = _fan_in_of(self.parameters, self.components)

    @property
    def modules(self) -> Iterator[nn.Module]:
        """All modules of all models."""
        for model in self.models.values():
            yield from model.modules()

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, of which those on this rank."""
        return {name: local(p).detach() for name, p in self.parameters.items()}

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that stand, by name, of which those on this rank."""
        standing = ((name, p.grad) for name, p in self.parameters.items())
        return {name: local(g) for name, g in standing if g is not None}

    @staticmethod
    def _sizes(parts: PartList, tensors: Mapping[str, Tensor]) -> Array:
        return np.array([elements_of(p, tensors[p.parameter]) for p in parts.parts], dtype=float)

    def knows(self, tensors: Iterable[Tensor]) -> bool:
        """Whether every one of ``tensors`` is one of the parameters."""
        return all(id(tensor) in self.name_of for tensor in tensors)

    def layer_of(self, tensors: Iterable[Tensor]) -> str | None:
        """The layer (or single component) whose attention has logits of the given parameters.

        Where some of them make logits, the others only go in: latents, or an embedding.
        """
        names = (self.name_of.get(id(tensor), "") for tensor in tensors)
        owners = {owner for name in names for owner in self._owner.get(name, [])}
        owners = {i for i in owners if self.components[i].kind in MAKES_LOGITS} or owners
        layers = {self.components[i].layer for i in owners}
        if len(layers) != 1:
            return None
        layer = layers.pop()
        if any(layer == known.name for known in self.layers):
            return layer
        return self.components[owners.pop()].name if len(owners) == 1 else None

    def query_heads(self, tensors: Iterable[Tensor]) -> list[str]:
        """The components of the query's heads, in order, of the attention with these parameters."""
        layer = self.layer_of(tensors)
        queries = (c.name for c in self.components if c.layer == layer and c.kind == "query")
        return [name for name in queries if head_of(name) is not None]

    def shares(self, flag: Mapping[str, bool]) -> Array:
        """Share of every component's elements whose parameter has a true flag."""
        every = self._all
        sizes = self._sizes(every, self.parameters)
        values = np.array([flag.get(part.parameter, False) for part in every.parts])
        total = every.add_up(every.owner, sizes)
        with np.errstate(invalid="ignore", divide="ignore"):
            share: Array = every.add_up(every.owner, sizes * values) / total
        return share

    def per_component(self, by_parameter: Mapping[str, float]) -> Array:
        """The largest value among a component's parameters; NaN where there is none."""
        result = np.full(len(self.components), np.nan)
        for i, component in enumerate(self.components):
            values = [
                by_parameter[p.parameter] for p in component.parts if p.parameter in by_parameter
            ]
            if values:
                result[i] = max(values)
        return result

    def weight_scale(self, weight_norms: Array) -> Array:
        """Root mean square weight times sqrt(fan-in): about 0.6 to 1.5 at usual initialisations.

        Of matrices only (He et al. 2015); NaN for embeddings, norms and recurrent components.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            scale: Array = weight_norms / np.sqrt(self.elements) * np.sqrt(self._fan_in)
        return scale


def _fan_in_of(parameters: Mapping[str, Tensor], components: Sequence[Component]) -> Array:
    result = np.full(len(components), np.nan)
    for i, component in enumerate(components):
        if component.kind in ("embedding", "norm", "recurrent", "other"):
            continue
        for part in component.parts:
            tensor = parameters[part.parameter]
            if tensor.ndim >= 2:
                result[i] = math.prod(tensor.shape[1:]) if part.dim != 1 else tensor.shape[0]
                break
    return result


def step_rules(optimizer: torch.optim.Optimizer, name_of: Mapping[int, str]) -> dict[str, StepRule]:
    """Reads an optimizer's groups and state: how it steps every parameter it has."""
    rules: dict[str, StepRule] = {}
    own = own_rates(optimizer) or {}
    for group in groups_of_step(optimizer):
        rate = float(group["lr"]) if "lr" in group else float("nan")
        betas = group.get("betas")
        momentum = float(group.get("momentum", 0.0) or 0.0)
        for parameter in group["params"]:
            name = name_of.get(id(parameter))
            if name is None:
                continue
            state = optimizer.state.get(parameter, {})
            # Of Adam and its kin alone: RAdam's first steps are shorter by a factor of their own.
            adam = "Adam" in (kind := type(optimizer).__name__) and "RAdam" not in kind
            second = state.get("max_exp_avg_sq", state.get("exp_avg_sq")) if adam else None
            if second is not None and betas is not None:
                second = local(second)
                beta1, beta2 = float(betas[0]), float(betas[1])
                count = state.get("step", 0.0)
                step = float(local(count) if isinstance(count, Tensor) else count)
                second = second / max(1.0 - beta2**step, 1e-38)
                factor = (1.0 - beta1) / (2.0 + 2.0 * beta1)
            elif group.get("nesterov"):
                factor = (1.0 + 2.0 * momentum) / (2.0 + 2.0 * momentum)
            elif type(optimizer) is torch.optim.SGD:
                factor = 1.0 / (2.0 + 2.0 * momentum)
            else:
                factor = float("nan")  # an optimizer whose stability is not known
            repaired = rate / own[id(parameter)] if own.get(id(parameter)) else 1.0
            eps = float(group.get("eps", 0.0))
            rules[name] = StepRule(rate, factor, second, eps, repaired)
    return rules


def coming_update(
    optimizer: torch.optim.Optimizer, gradient: Mapping[str, Tensor], name_of: Mapping[int, str]
) -> dict[str, Tensor] | None:
    """Computes the step an optimizer is about to make, from its state and the gradient.

    For SGD, Adam and AdamW as torch documents them; None for other classes and for options that
    change the formula (maximize). Gradients that still stand are added to, as backward will do.
    What clips or scales gradients before the step is not known here, which is why the prediction
    is compared with the step afterwards.
    """
    kind = type(optimizer)
    if kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        return None
    update: dict[str, Tensor] = {}
    for group in groups_of_step(optimizer):
        if group.get("maximize") or group.get("differentiable"):
            return None
        for parameter in group["params"]:
            name = name_of.get(id(parameter))
            if name is None or (name not in gradient and parameter.grad is None):
                continue  # the optimizer passes over a parameter without a gradient, too
            g, state = (
                _gradient_to_come(parameter, gradient.get(name)),
                optimizer.state.get(parameter, {}),
            )
            weight, rate = parameter.detach(), float(group["lr"])
            decay = float(group["weight_decay"])
            decoupled = kind is torch.optim.AdamW or group.get("decoupled_weight_decay", False)
            if decay and not decoupled:
                g = g + decay * weight
            if kind is torch.optim.SGD:
                step = _sgd_direction(g, group, state)
            else:
                step = _adam_direction(g, group, state)
            update[name] = -rate * (step + decay * weight if decay and decoupled else step)
    return update


def _gradient_to_come(parameter: Tensor, new: Tensor | None) -> Tensor:
    standing = parameter.grad
    if standing is None:
        assert new is not None
        return new
    standing = standing.detach()
    standing = standing if standing.layout == torch.strided else standing.to_dense()
    return standing if new is None else standing + new


def _sgd_direction(g: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    momentum, buffer = float(group["momentum"]), state.get("momentum_buffer")
    if not momentum:
        return g
    average = g if buffer is None else momentum * buffer + (1.0 - float(group["dampening"])) * g
    return g + momentum * average if group["nesterov"] else average


def _adam_direction(g: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    beta1, beta2 = (float(beta) for beta in group["betas"])
    step = float(state.get("step", 0.0)) + 1.0
    first, second = state.get("exp_avg", 0.0), state.get("exp_avg_sq", 0.0)
    first = beta1 * first + (1.0 - beta1) * g
    second = beta2 * second + (1.0 - beta2) * g * g
    if group["amsgrad"] and "max_exp_avg_sq" in state:
        second = torch.maximum(second, state["max_exp_avg_sq"])
    root = (second / (1.0 - beta2**step)).sqrt()
    direction: Tensor = first / (1.0 - beta1**step) / (root + float(group["eps"]))
    return direction


def find_models(
    modules: Iterable[nn.Module],
    reached: Sequence[Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """Finds and names the root modules behind a loss and its optimizers.

    A root is a module that is nobody's child. One root needs no name; several are named after the
    variables of the user's program that hold them, or after the list of the largest root that keeps
    them. A root that the loss does not reach although its optimizer also steps what is reached is a
    stale module, replaced after the optimizer was built: it is named, and the one that is reached
    needs no name still.

    Args:
        modules: All modules that exist.
        reached: Parameters the loss depends on.
        optimizers: All optimizers that exist.

    Returns:
        Roots by name (an empty name: none needed), and the parameters that no module owns, by their
        place in the optimizer (``param_groups[0][1]``).
    """
    everything = [m for m in modules if "_modules" in m.__dict__ and "_parameters" in m.__dict__]
    with as_sharded(everything) as lent:
        shards = [lent.get(id(p), p) for p in reached]
        return _find_models(everything, shards, optimizers)


def _find_models(
    everything: Sequence[nn.Module],
    reached: Sequence[Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    children = {id(c) for m in everything for c in m._modules.values() if c is not None}
    groups = [
        {id(p): p for group in optimizer.param_groups for p in group["params"]}
        for optimizer in optimizers
    ]
    wanted = {id(p): p for p in reached}
    for group in groups:
        wanted |= group
    own = {id(m): {id(p) for p in m.parameters()} for m in everything if id(m) not in children}
    roots = [m for m in everything if own.get(id(m), set()) & wanted.keys()]
    at_loss = {id(p) for p in reached}
    roots.sort(key=lambda root: -len(own[id(root)] & at_loss))
    chosen: list[nn.Module] = []
    covered: set[int] = set()
    for root in roots:
        if (own[id(root)] & wanted.keys()) - covered:
            chosen.append(root)
            covered |= own[id(root)]
    free = _free_tensors({k: p for k, p in wanted.items() if k not in covered}, optimizers)
    if not chosen:
        return {}, free
    main, *others = chosen
    shared = {key for group in groups if group.keys() & own[id(main)] for key in group}
    if all(not own[id(o)] & at_loss and own[id(o)] & shared for o in others):
        names = _variable_names(others, main)
        return {"": main, **{names[id(other)]: other for other in others}}, free
    for owner in chosen:
        kept = [other for other in chosen if other is not owner]
        if all(_kept_by(owner, other) for other in kept):
            names = _variable_names(kept, owner)
            return {"": owner, **{names[id(other)]: other for other in kept}}, free
    names = _variable_names(chosen)
    return {names[id(root)]: root for root in chosen}, free


def _free_tensors(
    tensors: Mapping[int, Tensor], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    places = {
        id(parameter): f"{f'optimizer{k}:' if k else ''}param_groups[{g}][{i}]"
        for k, optimizer in enumerate(optimizers)
        for g, group in enumerate(optimizer.param_groups)
        for i, parameter in enumerate(group["params"])
    }
    return {places.get(key, f"tensor[{n}]"): t for n, (key, t) in enumerate(tensors.items())}


def _kept_by(owner: nn.Module, kept: nn.Module) -> str | None:
    """The path of a module that another one keeps in a plain list, tuple or dict, if it does.

    Such a module is not registered: its parameters are in no ``parameters()``.
    """
    for path, module in owner.named_modules():
        for name, value in list(vars(module).items()):
            if name in TORCHS_OWN or not isinstance(value, list | tuple | dict):
                continue
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                if item is kept:
                    return ".".join(filter(None, (path, name, str(key))))
    return None


def _variable_names(roots: Sequence[nn.Module], owner: nn.Module | None = None) -> dict[int, str]:
    names: dict[int, str] = {}
    frame = sys._getframe(1)
    scopes: list[Mapping[str, object]] = []
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] not in ("torch", "diagnoser"):
            scopes += [frame.f_locals, frame.f_globals]
        frame = frame.f_back  # type: ignore[assignment]
    for root in roots:
        found = _kept_by(owner, root) if owner is not None else None
        for scope in scopes if found is None else ():
            found = next((k for k, v in list(scope.items()) if v is root), None)
            if found is not None and found != "self":
                break
        else:
            found = found or type(root).__name__.lower()
        name, count = found, 2
        while name in names.values():
            name, count = f"{found}{count}", count + 1
        names[id(root)] = name
    return names
