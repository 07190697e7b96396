"""A training as repairs see it: tensors by component, optimizers, and what else has a state."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diagnoser.components import free_component, layers_of, parameters_of, split_components
from diagnoser.errors import RepairError
from diagnoser.types import Component, Part
from diagnoser.vocabulary import MODEL


class Earlier(Protocol):
    """An earlier state of a training: a `Snapshot`."""

    def roll_back(self, parts: Iterable[tuple[Tensor, Part]] | None = None) -> None:
        """Puts weights and optimizer state back, of some parts of parameters or of all."""


@dataclass(slots=True, eq=False)
class Live:
    """A training that goes on.

    Attributes:
        models: Root modules by name, as `components.split_components` takes them.
        optimizers: All that step their parameters.
        others: What else has ``state_dict`` and ``load_state_dict``: schedules, gradient scalers.
        free: Parameters that no module owns, by name.
        components: Of the models and free parameters; found by itself if left out.
        healthy: The last state from before anything was wrong; None: none was kept.
        start: The state before the first step; None: it was not kept.
    """

    models: Mapping[str, nn.Module]
    optimizers: Sequence[torch.optim.Optimizer]
    others: Sequence[Any] = ()
    free: Mapping[str, Tensor] = field(default_factory=dict)
    components: Sequence[Component] = ()
    healthy: Earlier | None = None
    start: Earlier | None = None

    def __post_init__(self) -> None:
        """Splits the models where that was left out."""
        if not self.components:
            found = split_components(self.models)
            free = [
                free_component(name, tensor, len(found) + i)
                for i, (name, tensor) in enumerate(self.free.items())
            ]
            self.components = (*found, *free, *layers_of(found))

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All parameters by name."""
        return {**parameters_of(self.models), **self.free}

    @property
    def modules(self) -> Iterator[nn.Module]:
        """All modules, each once."""
        seen: set[int] = set()
        for model in self.models.values():
            for module in model.modules():
                if id(module) not in seen:
                    seen.add(id(module))
                    yield module

    def within(self, name: str) -> list[Component]:
        """Returns the components that a name stands for: itself, a layer's, a prefix's, all.

        Raises:
            RepairError: It stands for none.
        """
        names = {component.name for component in self.components}
        leaves = [
            c
            for c in self.components
            if not any(
                o is not c and o.layer == c.name and set(o.parts) <= set(c.parts)
                for o in self.components
            )
        ]
        if name == MODEL:
            return leaves
        found = [c for c in leaves if c.name == name] or [
            c
            for c in leaves
            if c.layer == name or c.name.startswith((f"{name}.", f"{name}[", f"{name}:"))
        ]
        if not found:
            known = ", ".join(sorted(names)[:5])
            raise RepairError(f"no component {name}; there are {known} and more")
        return found

    def parts(self, name: str) -> list[tuple[Tensor, Part]]:
        """Returns the tensors of a component, and which part of each is its.

        Raises:
            RepairError: There is no such component.
        """
        parameters = self.parameters
        return [
            (parameters[part.parameter], part)
            for component in self.within(name)
            for part in component.parts
            if part.parameter in parameters
        ]

    def tensors(self, name: str) -> list[Tensor]:
        """Returns the parameters that a component lies in, each once.

        Raises:
            RepairError: There is no such component.
        """
        return list({id(tensor): tensor for tensor, _ in self.parts(name)}.values())

    def optimizer_of(self, tensor: Tensor) -> torch.optim.Optimizer | None:
        """Returns the optimizer that steps a parameter, None where none does."""
        return next(
            (
                optimizer
                for optimizer in self.optimizers
                for group in optimizer.param_groups
                if any(parameter is tensor for parameter in group["params"])
            ),
            None,
        )

    def with_optimizers_of(self, tensors: Sequence[Tensor]) -> list[torch.optim.Optimizer]:
        """Returns the optimizers that step any of some parameters.

        Raises:
            RepairError: None does.
        """
        wanted = {id(tensor) for tensor in tensors}
        found = [
            optimizer
            for optimizer in self.optimizers
            if any(id(p) in wanted for group in optimizer.param_groups for p in group["params"])
        ]
        if not found:
            raise RepairError("no optimizer was given its parameters")
        return found


def schedules_of(optimizers: Sequence[torch.optim.Optimizer]) -> list[Any]:
    """Finds the learning rate schedules of some optimizers, wherever they are kept: 0.1 s and more.

    Those that are older than a watch were noted by nobody.
    """
    kind = torch.optim.lr_scheduler.LRScheduler
    known = set(map(id, optimizers))
    return [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), kind) and id(getattr(thing, "optimizer", None)) in known
    ]
