"""The table of actions, and how one or a few that belong together are applied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from inspect import Parameter, signature
from types import MappingProxyType
from typing import Any, Final

from diagnoser.errors import RepairError
from diagnoser.repair.learning_rate import (
    Undo,
    add_warmup,
    change_betas,
    clip_gradient,
    scale_learning_rate,
)
from diagnoser.repair.live import Live
from diagnoser.repair.weights import (
    register_parameters,
    reinitialize,
    reset_optimizer_state,
    roll_back,
    temper_attention,
    unfreeze,
)
from diagnoser.types import Repair
from diagnoser.vocabulary import REPAIRS

Action = Callable[..., Undo | None]  # (live, component, **parameters)

ACTIONS: Final[Mapping[str, Action]] = MappingProxyType(
    {
        "scale_learning_rate": scale_learning_rate,
        "clip_gradient": clip_gradient,
        "add_warmup": add_warmup,
        "change_betas": change_betas,
        "reset_optimizer_state": reset_optimizer_state,
        "reinitialize": reinitialize,
        "temper_attention": temper_attention,
        "register_parameters": register_parameters,
        "unfreeze": unfreeze,
        "roll_back": roll_back,
    }
)

# What an optimizer that the script builds anew half-way would not know of.
OF_OPTIMIZERS: Final = frozenset(
    {"scale_learning_rate", "clip_gradient", "add_warmup", "change_betas", "register_parameters"}
)


@dataclass(slots=True)
class Applied:
    """What is in force; `take_back` ends it, a `Snapshot` puts the tensors back."""

    repairs: tuple[Repair, ...]
    _undo: list[Undo] = field(default_factory=list)

    def take_back(self) -> None:
        """Takes away what changes steps; twice does nothing more."""
        while self._undo:
            self._undo.pop()()


def apply(live: Live, repairs: Iterable[Repair]) -> Applied:
    """Applies actions in their order.

    Raises:
        RepairError: One cannot be applied here. What changes steps is taken back then; tensors may
            have been changed by the ones before it.
    """
    applied = Applied(tuple(repairs))
    try:
        for repair in applied.repairs:
            action = ACTIONS.get(repair.name)
            if action is None and repair.name in REPAIRS:
                raise RepairError(f"{repair.name} changes the program: it needs a restart")
            if action is None:
                raise RepairError(f"no action {repair.name}; there are {', '.join(ACTIONS)}")
            parameters: dict[str, Any] = dict(repair.parameters)
            _check(repair.name, action, parameters)
            try:
                undo = action(live, repair.component, **parameters)
            except TypeError as error:  # text in the place of a number
                raise RepairError(f"{repair.name}: {error}") from error
            if undo is not None:
                applied._undo.append(undo)
    except BaseException:
        applied.take_back()
        raise
    return applied


def _check(name: str, action: Action, given: Mapping[str, Any]) -> None:
    takes = list(signature(action).parameters.values())[2:]
    if unknown := sorted(set(given) - {parameter.name for parameter in takes}):
        known = ", ".join(parameter.name for parameter in takes) or "no parameters"
        raise RepairError(f"{name} takes {known}, not {', '.join(unknown)}")
    missing = [p.name for p in takes if p.default is Parameter.empty and p.name not in given]
    if missing:
        raise RepairError(f"{name} needs {', '.join(missing)}")
