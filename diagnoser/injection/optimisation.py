"""Mistakes of optimisation: step sizes, averages, what is stepped, and for how long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from diagnoser.injection.changes import local_components, rebuild, settings_change
from diagnoser.injection.operator import Change, Operator, Place, Remedy, Values
from diagnoser.injection.placing import (
    SCORING,
    anywhere,
    attentions,
    where,
)
from diagnoser.injection.training import Settings, Training, make_optimizers

WARMUP: Final = 0.1  # share of the steps that is right where it was taken away
BETAS: Final = (0.9, 0.999)


def _scaled_learning_rate(settings: Settings, _: Place, values: Values) -> Mapping[str, Any]:
    return {"learning_rate": settings.learning_rate * values["factor"]}


def _learning_rate_back(settings: Settings, _: Place, values: Values) -> Mapping[str, Any]:
    right = settings.learning_rate / values["factor"]
    return {"learning_rate": float(f"{right:.12g}")}  # the number that was written, to the bit


_SCALE_BACK: Final = Remedy(
    "scale_learning_rate", settings_change("learning_rate", to=_learning_rate_back)
)


def _local_learning_rate(_: Settings, place: Place, values: Values) -> Mapping[str, Any]:
    factor = values["factor"]
    return {"learning_rate_factors": tuple((name, factor) for name in local_components(place))}


def _second_average(settings: Settings, _: Place, values: Values) -> Mapping[str, Any]:
    return {"betas": (settings.betas[0], values["beta"])}


def _decay(settings: Settings, _: Place, values: Values) -> Mapping[str, Any]:
    decay = max(values["decay"], 2.0 * settings.weight_decay)
    return {"weight_decay": decay, "decay_everything": True}


def _summed(settings: Settings, _: Place, values: Values) -> Mapping[str, Any]:
    batches = values["batches"]  # the samples of a step stay as many as they were
    size = max(settings.batch_size // batches, 1)
    return {"batch_size": size, "accumulation": batches, "accumulated": "sum"}


def _adaptive(settings: Settings) -> bool:
    return settings.optimizer != "sgd"


def _clips(settings: Settings) -> bool:
    return settings.clip is not None


def _clip_again(_: Settings, __: Place, ___: Values) -> Mapping[str, Any]:
    return {"clip": 1.0}


_CLIP: Final = Remedy("clip_gradient", settings_change("clip", to=_clip_again))
_CHANGE_BETAS: Final = Remedy(
    "change_betas", settings_change("betas", to=lambda _, __, ___: {"betas": BETAS})
)


def _rebuilt_places(training: Training) -> tuple[Place, ...]:
    """Attention modules, and the head, which is a module of the model itself."""
    head = tuple(c.name for c in training.components if c.kind == "head")
    ends = tuple(Place("head", (name,), (name,)) for name in head)
    return attentions()(training) + ends


def _rebuild(training: Training, place: Place, _: Values, __: torch.Generator) -> None:
    for path in place.modules:
        rebuild(training, path)


def _stale(training: Training, place: Place) -> tuple[str, ...]:
    prefixes = tuple(f"{path}." for path in place.modules)
    known = [name for name, _ in training.model.named_parameters() if name.startswith(prefixes)]
    return (*(f"optimizer.*.{name}" for name in known), "optimizer.*.stale-*")


def _optimize_again(training: Training, _: Place, __: Values, ___: torch.Generator) -> None:
    training.optimizers = make_optimizers(training)


def _modules_of(field: str) -> Change:
    return settings_change(field, to=lambda _, place, __: {field: place.modules})


def _none_of(field: str) -> Change:
    return settings_change(field, to=lambda _, __, ___: {field: ()})


def _scored(training: Training) -> tuple[Place, ...]:
    return attentions(SCORING, whole=True)(training)


OPTIMISATION: Final[tuple[Operator, ...]] = (
    Operator(
        id="O1",
        name="learning-rate-too-high",
        summary="The learning rate of the whole model is many times too high.",
        change=settings_change("learning_rate", to=_scaled_learning_rate),
        places=anywhere,
        severities={
            "low": {"factor": 5.0},
            "mid": {"factor": 15.0},
            "high": {"factor": 50.0},
            "extreme": {"factor": 200.0},
        },
        faults=("sharpness_instability", "oscillating_loss", "exploding_gradient"),
        causes=("learning_rate_too_high",),
        remedies=(_SCALE_BACK,),
        defect=False,
        gradients="Y",
        curvature="+",
    ),
    Operator(
        id="O2",
        name="learning-rate-too-low",
        summary="The learning rate of the whole model is many times too low.",
        change=settings_change("learning_rate", to=_scaled_learning_rate),
        places=anywhere,
        severities={
            "low": {"factor": 1 / 30},
            "mid": {"factor": 1 / 100},
            "high": {"factor": 1 / 1000},
        },
        faults=("slow_convergence",),
        causes=("learning_rate_too_low",),
        remedies=(_SCALE_BACK,),
        defect=False,
        gradients="Y",
    ),
    Operator(
        id="O3",
        name="attention-learning-rate-too-high",
        summary="The weights that score attention have a parameter group of too high a rate.",
        change=settings_change("learning_rate_factors", to=_local_learning_rate),
        places=_scored,
        severities={
            "low": {"factor": 5.0},
            "mid": {"factor": 20.0},
            "high": {"factor": 100.0},
            "extreme": {"factor": 400.0},
        },
        faults=(
            "sharpness_instability",
            "coupled_components",
            "cascading_instability",
            "attention_logit_growth",
            "attention_entropy_collapse",
        ),
        causes=("learning_rate_too_high",),
        remedies=(Remedy("scale_learning_rate", _none_of("learning_rate_factors")),),
        defect=False,
        gradients="P",
        attention="Y",
        curvature="+",
    ),
    Operator(
        id="O4",
        name="no-warmup",
        summary="The learning rate starts at its full height.",
        change=settings_change("warmup", to=lambda _, __, ___: {"warmup": 0.0}),
        places=where(lambda settings: settings.warmup > 0.0),
        severities={"high": {}},
        faults=("sharpness_instability", "slow_convergence"),
        causes=("missing_warmup",),
        remedies=(
            Remedy(
                "add_warmup", settings_change("warmup", to=lambda _, __, ___: {"warmup": WARMUP})
            ),
        ),
        defect=False,
        gradients="P",
        curvature="+",
    ),
    Operator(
        id="O5a",
        name="second-average-too-long",
        summary="Adam averages squared gradients over too many steps and lags behind.",
        change=settings_change("betas", to=_second_average),
        places=where(_adaptive),
        severities={"mid": {"beta": 0.9999}, "high": {"beta": 0.99999}},
        faults=("sharpness_instability", "oscillating_loss"),
        causes=("optimizer_misconfigured",),
        remedies=(_CHANGE_BETAS,),
        defect=False,
        gradients="P",
        curvature="+",
    ),
    Operator(
        id="O5b",
        name="second-average-too-short",
        summary="Adam averages squared gradients over too few steps.",
        change=settings_change("betas", to=_second_average),
        places=where(_adaptive),
        severities={"high": {"beta": 0.5}, "extreme": {"beta": 0.0}},
        faults=("sharpness_instability", "oscillating_loss"),
        causes=("optimizer_misconfigured",),
        remedies=(_CHANGE_BETAS,),
        defect=False,
        gradients="P",
        curvature="+",
    ),
    Operator(
        id="O6a",
        name="epsilon-too-large",
        summary="Adam's epsilon is larger than the gradients, so that updates vanish.",
        change=settings_change("epsilon", to=lambda _, __, values: dict(values)),
        places=where(_adaptive),
        severities={
            "mid": {"epsilon": 1e-4},
            "high": {"epsilon": 1e-2},
            "extreme": {"epsilon": 1.0},
        },
        faults=("slow_convergence",),
        causes=("optimizer_misconfigured",),
        defect=False,
        gradients="Y",
    ),
    Operator(
        id="O6b",
        name="epsilon-too-small",
        summary="Adam's epsilon is too small to hold back updates of tiny gradients.",
        change=settings_change("epsilon", to=lambda _, __, values: dict(values)),
        places=where(_adaptive),
        severities={"high": {"epsilon": 1e-16}},
        faults=("sharpness_instability", "oscillating_loss"),
        causes=("optimizer_misconfigured",),
        defect=False,
        gradients="Y",
    ),
    Operator(
        id="O7",
        name="missing-zero-grad",
        summary="Gradients of former steps are never, or seldom, set to zero.",
        change=settings_change("zero_grad_every", to=lambda _, __, values: dict(values)),
        places=anywhere,
        severities={
            "low": {"zero_grad_every": 2},
            "mid": {"zero_grad_every": 5},
            "high": {"zero_grad_every": 0},
        },
        faults=("program_defect", "oscillating_loss", "exploding_gradient"),
        causes=("missing_zero_grad",),
        remedies=(
            Remedy(
                "zero_gradients",
                settings_change("zero_grad_every", to=lambda _, __, ___: {"zero_grad_every": 1}),
            ),
        ),
        gradients="Y",
    ),
    Operator(
        id="O8a",
        name="clip-too-tight",
        summary="Gradients are clipped to a norm far below their own.",
        change=settings_change("clip", to=lambda _, __, values: dict(values)),
        places=anywhere,
        severities={"mid": {"clip": 1e-2}, "high": {"clip": 1e-3}, "extreme": {"clip": 1e-6}},
        faults=("slow_convergence",),
        causes=("gradient_clipping",),
        remedies=(_CLIP,),
        defect=False,
        gradients="Y",
    ),
    Operator(
        id="O8b",
        name="clip-missing",
        summary="Gradients are not clipped.",
        change=settings_change("clip", to=lambda _, __, ___: {"clip": None}),
        places=where(_clips),
        severities={"high": {}},
        faults=("exploding_gradient", "oscillating_loss"),
        causes=("gradient_clipping",),
        remedies=(_CLIP,),
        defect=False,
        gradients="Y",
    ),
    Operator(
        id="O9",
        name="weight-decay-too-strong",
        summary="Weight decay is extreme and shrinks norms, biases and embeddings as well.",
        change=settings_change("weight_decay", "decay_everything", to=_decay),
        places=anywhere,
        severities={
            "low": {"decay": 0.1},
            "mid": {"decay": 1.0},
            "high": {"decay": 5.0},
            "extreme": {"decay": 20.0},
        },
        faults=("slow_convergence", "uniform_attention", "vanishing_gradient"),
        causes=("excessive_weight_decay",),
        defect=False,
        gradients="P",
        attention="P",
    ),
    Operator(
        id="O10",
        name="schedule-too-fast",
        summary="The scheduler moves several times in a step, and the learning rate ends early.",
        change=settings_change("schedule_calls", to=lambda _, __, values: dict(values)),
        places=where(lambda settings: settings.schedule == "cosine"),
        severities={
            "low": {"schedule_calls": 2},
            "mid": {"schedule_calls": 4},
            "high": {"schedule_calls": 10},
            "extreme": {"schedule_calls": 30},
        },
        faults=("slow_convergence", "program_defect"),
        causes=("optimizer_misconfigured",),
        gradients="Y",
    ),
    Operator(
        id="O11a",
        name="attention-not-in-optimizer",
        summary="The optimizer is not given the parameters of attention.",
        change=_modules_of("left_out"),
        places=attentions(),
        severities={"high": {}},
        faults=("dead_component", "program_defect"),
        causes=("component_not_optimized",),
        remedies=(Remedy("register_parameters", _none_of("left_out")),),
        gradients="Y",
    ),
    Operator(
        id="O11b",
        name="attention-frozen",
        summary="The parameters of attention are frozen by mistake.",
        change=_modules_of("frozen"),
        places=attentions(),
        severities={"high": {}},
        faults=("dead_component", "program_defect"),
        causes=("component_not_optimized",),
        remedies=(Remedy("unfreeze", _none_of("frozen")),),
        gradients="Y",
    ),
    Operator(
        id="O12",
        name="stale-optimizer",
        summary="A module is made anew after the optimizer, which goes on stepping the old one.",
        change=Change("optimizer", _rebuild, _stale),
        places=_rebuilt_places,
        severities={"high": {}},
        faults=("dead_component", "program_defect"),
        causes=("component_not_optimized",),
        remedies=(Remedy("register_parameters", Change("optimizer", _optimize_again, _stale)),),
        gradients="Y",
    ),
    Operator(
        id="O13",
        name="accumulation-not-averaged",
        summary="Gradients of several batches are added up and not averaged.",
        change=settings_change("batch_size", "accumulation", "accumulated", to=_summed),
        places=where(lambda settings: settings.batch_size > 16),
        severities={
            "low": {"batches": 2},
            "mid": {"batches": 4},
            "high": {"batches": 8},
            "extreme": {"batches": 16},
        },
        faults=("program_defect", "sharpness_instability"),
        causes=("optimizer_misconfigured", "learning_rate_too_high"),
        gradients="P",
        curvature="P",
    ),
    Operator(
        id="O14",
        name="attention-stepped-twice",
        summary="A second optimizer steps the parameters of attention again.",
        change=_modules_of("stepped_twice"),
        places=attentions(),
        severities={"high": {}},
        faults=("program_defect", "sharpness_instability"),
        causes=("optimizer_misconfigured", "learning_rate_too_high"),
        gradients="P",
        curvature="+",
    ),
    Operator(
        id="E1",
        name="stopped-too-early",
        summary="Training ends long before it is finished.",
        change=settings_change(
            "steps", to=lambda settings, _, values: {"steps": settings.steps // values["divisor"]}
        ),
        places=anywhere,
        severities={
            "mid": {"divisor": 4},
            "high": {"divisor": 8},
            "extreme": {"divisor": 16},
        },
        faults=("slow_convergence",),
        causes=("insufficient_training",),
        defect=False,
        gradients="Y",
    ),
)
