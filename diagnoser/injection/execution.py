"""Mistakes of execution: precision, disturbances from outside, and the mode of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from diagnoser.injection.changes import settings_change
from diagnoser.injection.operator import Operator, Place, Remedy, Values
from diagnoser.injection.placing import anywhere, attentions
from diagnoser.injection.training import Perturbation, Settings, Training

HALFWAY: Final = 0.5


def _perturbed(_: Settings, place: Place, values: Values) -> Mapping[str, Any]:
    return {"perturbation": Perturbation(place.modules, values["alpha"], HALFWAY)}


def _drops(training: Training) -> tuple[Place, ...]:
    """The whole model, where it has dropout to be active at the wrong time."""
    held = any(type(module).__name__ == "Dropout" for module in training.model.modules())
    return anywhere(training) if held else ()


EXECUTION: Final[tuple[Operator, ...]] = (
    Operator(
        id="X1a",
        name="half-precision-unscaled",
        summary="Gradients pass through half precision, and the loss is not scaled.",
        change=settings_change("half_gradients", to=lambda _, __, ___: {"half_gradients": True}),
        places=anywhere,
        severities={"high": {}},
        faults=("slow_convergence", "dead_component"),
        causes=("numeric_precision",),
        defect=False,
        gradients="Y",
    ),
    Operator(
        id="X1b",
        name="half-precision-underflow",
        summary="Gradients pass through half precision with a loss scale so small that they fade.",
        change=settings_change(
            "half_gradients",
            "loss_scale",
            to=lambda _, __, values: {"half_gradients": True, **values},
        ),
        places=anywhere,
        severities={
            "mid": {"loss_scale": 2.0**-8},
            "high": {"loss_scale": 2.0**-14},
            "extreme": {"loss_scale": 2.0**-20},
        },
        faults=("slow_convergence", "dead_component"),
        causes=("numeric_precision",),
        defect=False,
        gradients="Y",
    ),
    Operator(
        id="X2",
        name="weights-disturbed",
        summary="Noise is added to the weights of attention once, outside of the optimizer.",
        change=settings_change("perturbation", to=_perturbed),
        places=attentions(),
        severities={
            "low": {"alpha": 0.1},
            "mid": {"alpha": 0.5},
            "high": {"alpha": 2.0},
            "extreme": {"alpha": 10.0},
        },
        faults=("cascading_instability", "coupled_components"),
        causes=("perturbed_parameters",),
        remedies=(
            Remedy(
                "roll_back",
                settings_change("perturbation", to=lambda _, __, ___: {"perturbation": None}),
            ),
        ),
        defect=False,
        gradients="P",
        attention="P",
        curvature="+",
    ),
    Operator(
        id="X3a",
        name="scored-in-training-mode",
        summary="Dropout stays active while the model is scored.",
        change=settings_change(
            "dropout", "eval_mode", to=lambda _, __, values: {"eval_mode": False, **values}
        ),
        places=_drops,
        severities={
            "low": {"dropout": 0.1},
            "mid": {"dropout": 0.2},
            "high": {"dropout": 0.4},
        },
        faults=("program_defect",),
        causes=("train_eval_mode",),
        gradients="N",
    ),
    Operator(
        id="X3b",
        name="trained-in-evaluation-mode",
        summary="The model is put into evaluation mode and never back, so that nothing drops out.",
        change=settings_change(
            "dropout", "train_mode", to=lambda _, __, values: {"train_mode": False, **values}
        ),
        places=_drops,
        severities={"high": {"dropout": 0.2}},
        faults=("program_defect", "overfitting"),
        causes=("train_eval_mode",),
        gradients="N",
    ),
)
