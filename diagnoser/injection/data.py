"""Mistakes of data: labels, order, and scale. Data are shared, so that they are never altered."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from diagnoser.injection.changes import settings_change
from diagnoser.injection.objective import IGNORED
from diagnoser.injection.operator import Change, Operator, Place, Values
from diagnoser.injection.placing import WHOLE_MODEL, anywhere
from diagnoser.injection.training import TARGETS, Training

INPUTS: Final = "inputs"


def _draw_labels(training: Training, _: Place, values: Values, generator: torch.Generator) -> None:
    """Gives a share of the training targets that are asked for those of other samples."""
    train = training.data.train
    targets = train[TARGETS].clone()
    asked = (targets != IGNORED).nonzero(as_tuple=True)
    right = targets[asked]
    other = right[torch.randint(len(right), (len(right),), generator=generator)]
    noisy = torch.rand(len(right), generator=generator) < values["share"]
    targets[asked] = torch.where(noisy, other, right)
    training.data = replace(training.data, train={**train, TARGETS: targets})


def _training_targets(_: Training, __: Place) -> tuple[str, ...]:
    return (f"data.train.{TARGETS}",)


def _scale_inputs(training: Training, _: Place, values: Values, __: torch.Generator) -> None:
    """Training and held-out inputs alike: who forgets to normalise forgets it in both."""
    data, factor = training.data, values["factor"]
    training.data = replace(
        data,
        train={**data.train, INPUTS: factor * data.train[INPUTS]},
        held_out={**data.held_out, INPUTS: factor * data.held_out[INPUTS]},
    )


def _inputs(_: Training, __: Place) -> tuple[str, ...]:
    return (f"data.train.{INPUTS}", f"data.held_out.{INPUTS}")


def _can_be_sorted(training: Training) -> tuple[Place, ...]:
    """The whole model, where the target that batches would be sorted by differs at all."""
    targets = training.subject.data().train[TARGETS]
    keys = targets.flatten(1)[:, 0] if targets.ndim > 1 else targets
    return WHOLE_MODEL if bool((keys != keys[0]).any()) else ()


def _has_inputs(training: Training) -> tuple[Place, ...]:
    return WHOLE_MODEL if INPUTS in training.subject.data().train else ()


DATA: Final[tuple[Operator, ...]] = (
    Operator(
        id="D1",
        name="label-noise",
        summary="A share of the training targets belongs to other samples.",
        change=Change("data", _draw_labels, _training_targets),
        places=anywhere,
        severities={
            "low": {"share": 0.2},
            "mid": {"share": 0.5},
            "high": {"share": 0.8},
            "extreme": {"share": 1.0},
        },
        faults=("slow_convergence", "overfitting"),
        causes=("label_noise",),
        defect=False,
        gradients="P",
        curvature="P",
    ),
    Operator(
        id="D2",
        name="sorted-batches",
        summary="Batches are taken in the order of the targets.",
        change=settings_change("shuffle", to=lambda _, __, ___: {"shuffle": False}),
        places=_can_be_sorted,
        severities={"high": {}},
        faults=("oscillating_loss", "program_defect"),
        causes=("data_order",),
        gradients="P",
    ),
    Operator(
        id="D3",
        name="inputs-unscaled",
        summary="Inputs are not normalised, in training and afterwards.",
        change=Change("data", _scale_inputs, _inputs),
        places=_has_inputs,
        severities={
            "low": {"factor": 4.0},
            "mid": {"factor": 16.0},
            "high": {"factor": 255.0},
            "extreme": {"factor": 1024.0},
        },
        faults=("sharpness_instability", "exploding_gradient"),
        causes=("input_scaling",),
        defect=False,
        gradients="Y",
        curvature="P",
    ),
)
