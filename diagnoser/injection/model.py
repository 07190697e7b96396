"""Mistakes of the model: norms, residual additions, and feed-forward layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from diagnoser.injection.changes import (
    attribute_change,
    clear,
    fresh_model,
    multiply,
    reinitialize,
    restore,
    set_module,
    weights_change,
)
from diagnoser.injection.operator import Change, Operator, Place, Remedy, Values
from diagnoser.injection.placing import blocks, components_in, spread
from diagnoser.injection.training import Training

NORM: Final = ("norm",)
FEED_FORWARD: Final = ("feed_forward",)


def scaled_plus(states: Tensor, change: Tensor, *, factor: float) -> Tensor:
    """A residual addition whose states are multiplied first; 0: none is left."""
    return factor * states + change


def shifted_relu(tensor: Tensor, *, shift: float) -> Tensor:
    """A rectifier that lets through only what is larger than the shift."""
    return torch.relu(tensor - shift)


def _without_norms(training: Training, place: Place, _: Values, __: torch.Generator) -> None:
    for path in _norms(training, place):
        set_module(training.model, path, nn.Identity())


def _norms_again(training: Training, place: Place, _: Values, generator: torch.Generator) -> None:
    right = fresh_model(training, generator)
    for path in _removed(training, place):
        set_module(training.model, path, right.get_submodule(path))


def _norms(training: Training, place: Place) -> tuple[str, ...]:
    return tuple(
        c.name for path in place.modules for c in components_in(training.components, path, NORM)
    )


def _removed(training: Training, place: Place) -> tuple[str, ...]:
    """Paths of the identities that stand in the place of norms."""
    prefixes = tuple(f"{path}." for path in place.modules)
    return tuple(
        path
        for path, module in training.model.named_modules()
        if path.startswith(prefixes) and type(module) is nn.Identity and "norm" in path
    )


def _of_norms(
    paths: Callable[[Training, Place], tuple[str, ...]], training: Training, place: Place
) -> tuple[str, ...]:
    found = paths(training, place)
    return (*(f"module.{path}" for path in found), *(f"*.{path}.*" for path in found))


def _adds(module: nn.Module) -> bool:
    return hasattr(module, "residual")


def _feed_forwards(training: Training) -> tuple[Place, ...]:
    """Modules that hold an activation and the weights around it."""
    found = []
    for path, module in training.model.named_modules():
        if path and hasattr(module, "activation"):
            names = tuple(c.name for c in components_in(training.components, path, FEED_FORWARD))
            found.append(Place("", (*names, path), (path,)))
    return spread(found)


def _sigmoid(module: Any, _: Values) -> Callable[[Tensor], Tensor]:
    return nn.Sigmoid() if isinstance(module.activation, nn.Module) else torch.sigmoid


def _dead_relu(module: Any, values: Values) -> Callable[[Tensor], Tensor]:
    relu = functools.partial(shifted_relu, shift=values["shift"])
    return Activation(relu) if isinstance(module.activation, nn.Module) else relu


class Activation(nn.Module):
    """A function, where a module is held."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, tensor: Tensor) -> Tensor:
        """(...) to the same."""
        return self.function(tensor)


def _residual_factor(_: Any, values: Values) -> Callable[..., Tensor]:
    return functools.partial(scaled_plus, factor=values["factor"])


MODEL_OPERATORS: Final[tuple[Operator, ...]] = (
    Operator(
        id="N1",
        name="norm-missing",
        summary="The norms of a block are left out.",
        change=Change("model", _without_norms, functools.partial(_of_norms, _norms)),
        places=blocks(NORM),
        severities={"high": {}},
        faults=("sharpness_instability", "exploding_gradient", "program_defect"),
        causes=("normalization",),
        remedies=(
            Remedy(
                "add_normalization",
                Change("model", _norms_again, functools.partial(_of_norms, _removed)),
            ),
        ),
        gradients="P",
        curvature="+",
    ),
    Operator(
        id="N2a",
        name="norm-gain-small",
        summary="The gains of the norms of a block start far below one.",
        change=weights_change(NORM, multiply),
        places=blocks(NORM),
        severities={"mid": {"gain": 0.2}, "high": {"gain": 0.05}, "extreme": {"gain": 0.01}},
        faults=("vanishing_gradient", "slow_convergence"),
        causes=("normalization", "initialization"),
        remedies=(reinitialize(NORM),),
        defect=False,
        gradients="P",
        attention="P",
        curvature="+",
    ),
    Operator(
        id="N2b",
        name="norm-gain-large",
        summary="The gains of the norms of a block start far above one.",
        change=weights_change(NORM, multiply),
        places=blocks(NORM),
        severities={"mid": {"gain": 5.0}, "high": {"gain": 20.0}, "extreme": {"gain": 100.0}},
        faults=("sharpness_instability", "exploding_gradient", "cascading_instability"),
        causes=("normalization", "initialization"),
        remedies=(reinitialize(NORM),),
        defect=False,
        gradients="P",
        attention="P",
        curvature="+",
    ),
    Operator(
        id="N3a",
        name="residual-missing",
        summary="What a block does is not added to its states but takes their place.",
        change=attribute_change("residual", _residual_factor),
        places=blocks((), suits=_adds),
        severities={"high": {"factor": 0.0}},
        faults=("vanishing_gradient", "program_defect", "slow_convergence"),
        causes=("residual",),
        gradients="P",
        curvature="+",
    ),
    Operator(
        id="N3b",
        name="residual-scaled",
        summary="The states of a block are multiplied before its change is added to them.",
        change=attribute_change("residual", _residual_factor),
        places=blocks((), suits=_adds),
        severities={"mid": {"factor": 2.0}, "high": {"factor": 5.0}, "extreme": {"factor": 25.0}},
        faults=("exploding_gradient", "sharpness_instability"),
        causes=("residual",),
        defect=False,
        gradients="P",
        curvature="+",
    ),
    Operator(
        id="F1a",
        name="feed-forward-starts-large",
        summary="The weights of a feed-forward layer start many times too large.",
        change=weights_change(FEED_FORWARD, multiply),
        places=blocks(FEED_FORWARD),
        severities={"mid": {"gain": 5.0}, "high": {"gain": 20.0}, "extreme": {"gain": 100.0}},
        faults=("exploding_gradient", "sharpness_instability"),
        causes=("initialization",),
        remedies=(reinitialize(FEED_FORWARD),),
        defect=False,
        gradients="P",
        curvature="+",
    ),
    Operator(
        id="F1b",
        name="feed-forward-zero",
        summary="All weights of a feed-forward layer start at zero, so that its units are alike.",
        change=weights_change(FEED_FORWARD, clear),
        places=blocks(FEED_FORWARD),
        severities={"high": {}},
        faults=("dead_component", "concave_region", "slow_convergence"),
        causes=("initialization",),
        remedies=(reinitialize(FEED_FORWARD),),
        gradients="P",
        curvature="+",
    ),
    Operator(
        id="F2a",
        name="sigmoid",
        summary="The activation of a feed-forward layer is a sigmoid.",
        change=attribute_change("activation", _sigmoid),
        places=_feed_forwards,
        severities={"high": {}},
        faults=("vanishing_gradient", "slow_convergence"),
        causes=("activation_function",),
        remedies=(restore("change_activation", "activation"),),
        defect=False,
        gradients="Y",
    ),
    Operator(
        id="F2b",
        name="dead-rectifier",
        summary="The activation is a rectifier, shifted so far that hardly a unit is active.",
        change=attribute_change("activation", _dead_relu),
        places=_feed_forwards,
        severities={"low": {"shift": 0.5}, "mid": {"shift": 2.0}, "high": {"shift": 5.0}},
        faults=("dying_relu", "dead_component"),
        causes=("activation_function",),
        remedies=(restore("change_activation", "activation"),),
        defect=False,
        gradients="Y",
    ),
)
