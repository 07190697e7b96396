"""Mistakes of the objective: what the loss is given, and what it counts.

All of them wrap the loss of training; a model is scored by the right one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from diagnoser.injection.operator import Change, Operator, Place, Remedy, Values
from diagnoser.injection.placing import WHOLE_MODEL, classifies
from diagnoser.injection.training import TARGETS, Criterion, Training

IGNORED: Final = -100  # a target that the loss leaves out, as torch has it


def after_softmax(outputs: Tensor, targets: Tensor, *, criterion: Criterion) -> Tensor:
    """A loss of logits that is given probabilities."""
    return criterion(torch.softmax(outputs, dim=-1), targets)


def of_scaled(outputs: Tensor, targets: Tensor, *, criterion: Criterion, factor: float) -> Tensor:
    """A loss of logits that were multiplied."""
    return criterion(factor * outputs, targets)


def over_everything(outputs: Tensor, targets: Tensor, *, criterion: Criterion) -> Tensor:
    """A loss that counts positions which nothing is asked of, as class 0."""
    return criterion(outputs, targets.clamp(min=0))


def unshifted(outputs: Tensor, targets: Tensor, *, criterion: Criterion) -> Tensor:
    """A loss that compares a position with its own token, the target of the one before it."""
    own = targets.roll(1, dims=1)
    own[:, 0] = IGNORED
    return criterion(outputs, own)


def _wrapped(
    wrapper: Callable[..., Tensor], options: Callable[[Values], Mapping[str, Any]] = lambda _: {}
) -> Change:
    def apply(training: Training, _: Place, values: Values, __: torch.Generator) -> None:
        training.criterion = functools.partial(
            wrapper, criterion=training.criterion, **options(values)
        )

    return Change("objective", apply, _criterion)


def _right(training: Training, _: Place, __: Values, ___: torch.Generator) -> None:
    training.criterion = training.subject.criterion(training.settings)


def _criterion(_: Training, __: Place) -> tuple[str, ...]:
    return ("criterion",)


def _partly_asked(training: Training) -> tuple[Place, ...]:
    """The whole model, where some positions have no target."""
    targets = training.subject.data().train[TARGETS]
    return WHOLE_MODEL if bool((targets == IGNORED).any()) else ()


def _sequences(training: Training) -> tuple[Place, ...]:
    """The whole model, where every position has a target of its own."""
    return WHOLE_MODEL if training.subject.data().train[TARGETS].ndim > 1 else ()


OBJECTIVE: Final[tuple[Operator, ...]] = (
    Operator(
        id="L1",
        name="softmax-before-loss",
        summary="The loss takes logits and is given probabilities.",
        change=_wrapped(after_softmax),
        places=classifies,
        severities={"high": {}},
        faults=("program_defect", "slow_convergence", "vanishing_gradient"),
        causes=("loss_function",),
        remedies=(Remedy("remove_softmax", Change("objective", _right, _criterion)),),
        gradients="P",
        curvature="P",
    ),
    Operator(
        id="L2",
        name="logits-multiplied",
        summary="Logits are multiplied many times before the loss.",
        change=_wrapped(of_scaled, lambda values: {"factor": values["factor"]}),
        places=classifies,
        severities={
            "low": {"factor": 5.0},
            "mid": {"factor": 20.0},
            "high": {"factor": 100.0},
            "extreme": {"factor": 500.0},
        },
        faults=("sharpness_instability", "exploding_gradient"),
        causes=("loss_function",),
        defect=False,
        gradients="P",
        curvature="+",
    ),
    Operator(
        id="L3a",
        name="loss-over-padding",
        summary="The loss counts positions that nothing is asked of.",
        change=_wrapped(over_everything),
        places=_partly_asked,
        severities={"high": {}},
        faults=("program_defect",),
        causes=("loss_function",),
    ),
    Operator(
        id="L3b",
        name="targets-unshifted",
        summary="The loss compares a position with its own token and not with the next.",
        change=_wrapped(unshifted),
        places=_sequences,
        severities={"high": {}},
        faults=("target_leak", "program_defect"),
        causes=("loss_function",),
    ),
)
