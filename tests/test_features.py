"""Features: each against a series whose answer is known, and the laws that hold for all of them."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_recordings import Components, Series, made_recording
from torch import nn
from torch.nn import functional as F

from diagnoser import watch
from diagnoser.features import CATALOGUE, FEATURES, PROGRAM_NAMES, feature_tables
from diagnoser.features.logged import OF_LOGS
from diagnoser.features.program import PROGRAM
from diagnoser.features.source import Source
from diagnoser.runlog import Recording
from diagnoser.table import Column

NAN = math.nan
COMPONENTS: Components = {  # name: kind, layer, elements
    "embed": ("embedding", "embed", 60),
    "a": ("other", "a", 24),  # an attention layer, and what it holds
    "a.query": ("query", "a", 20),
    "a.norm": ("norm", "a", 4),
    "b.query": ("query", "b", 20),
    "head": ("head", "head", 10),
}
# Windows at the measured steps 0, 5, 10 and 15 are the steps 0, 3-5, 6-10 and 8-15.
CURVE = [4.0] * 3 + [2.0] * 3 + [1.0] * 5 + [2.6] * 5  # their means: 4, 2, 1, 2
CLOCK = {"clock": {"model": [0.0] * 4}}  # four steps at which something was measured
SWINGING = [0.5, 0.6] * 10  # one epoch each; nine maxima and nine minima inside


def epochs(values: Sequence[float]) -> list[float]:
    return [value for value in values for _ in range(10)]


def case(
    series: Series, expected: Mapping[str, Sequence[float]], **rest: Any
) -> tuple[Series, Mapping[str, Sequence[float]], Mapping[str, Any]]:
    """A feature's quantities and answer; at each step something else is measured, too."""
    length = max(len(values) for of in series.values() for values in of.values())
    return {**series, "clock": {"model": [0.0] * length}}, expected, rest


def handed_on(quantity: str, place: str, values: Sequence[float]) -> Any:
    """A feature that is the measured number itself."""
    return case({quantity: {place: values}}, {place: values})


ADAPTIVE = {  # the head's optimizer has no second moment
    "update_norm": {
        "a.query": [math.sqrt(20)],
        "b.query": [3 * math.sqrt(20)],
        "head": [math.sqrt(10)],
    },
    "learning_rate": {"a.query": [2.0], "b.query": [2.0], "head": [2.0]},
    "moment_ratio": {"a.query": [1.0], "b.query": [1.0]},
}

KNOWN = {
    "rate_growth": case(
        {"learning_rate": {"embed": [0.0, 0.1, 0.4], "head": [0.0, 0.1, 0.4]}},
        {"model": [0, 1, 4]},
    ),
    "at_the_end": case(CLOCK, {"model": [0, 0, 0, 1]}, losses=[1.0] * 16, ended=True),
    "initial_attention_excess": case(
        {"attention_excess": {"a": [None, 2.8, 2.0]}}, {"a": [2.8, 2.8, 2.8]}
    ),
    "initial_attention_scores": case(
        {"attention_scores": {"a": [None, 0.5, 2.0]}}, {"a": [0.5, 0.5, 0.5]}
    ),
    "initial_head_similarity": case(
        {"head_similarity": {"a": [None, 0.75, 1.0]}}, {"a": [0.75, 0.75, 0.75]}
    ),
    # the run
    "loss_fall": case(CLOCK, {"model": [NAN, 0.5, 0.75, 0.5]}, losses=CURVE),
    "loss_rise": case(CLOCK, {"model": [0, 0, 0, 0.25]}, losses=CURVE),
    "loss_spread": case(CLOCK, {"model": [0, 0, 0, math.sqrt(0.6) / 2]}, losses=CURVE),
    "loss_trend": case(CLOCK, {"model": [NAN, 0.5, 0.5, 0.0]}, losses=CURVE),
    "loss_to_chance": case(
        {"classes": {"model": [None, 2.0, 4.0, 4.0]}},
        {"model": [4 / math.log(4), 2 / math.log(4), 1 / math.log(4), 2 / math.log(4)]},
        losses=CURVE,
    ),
    "initial_loss_to_chance": case(
        {"classes": {"model": [None, 2.0, 4.0, 4.0]}},
        {"model": [4 / math.log(4)] * 4},
        losses=CURVE,
    ),
    "loss_half_time": case(CLOCK, {"model": [NAN, 1, 1 / 2, 1 / 3]}, losses=CURVE),
    "loss_persistence": case(  # a window of ten losses first ends at step 20
        {"clock": {"model": [0.0] * 5}},
        {"model": [NAN, NAN, NAN, NAN, -0.75]},
        losses=[2.0] * 11 + [3, 1, 3, 1, 2, 2, 1, 3, 1, 3],
    ),
    "loss_spike": case(
        CLOCK,
        {"model": [1, 1, 3, 3]},
        losses=[4.0] * 3 + [2.0] * 3 + [1.0] * 4 + [3.0] + [1.0] * 5,
    ),
    "non_finite_loss": case(
        CLOCK, {"model": [0, 0, 1, 1]}, losses=[1.0] * 7 + [math.inf] + [1.0] * 8
    ),
    "accuracy": case(
        CLOCK,
        {"model": [0.25, 0.5, 1.0, 0.375]},
        losses=CURVE,
        accuracies=[0.25] * 3 + [0.5, NAN, 0.5] + [1.0] * 5 + [0.0] * 5,
    ),
    "carried_gradients": handed_on("carried_gradients", "model", [0.0, 0.5, 1.0]),
    "probabilities_into_loss": handed_on("probabilities_into_loss", "model", [0.0, 1.0]),
    "trained_share": case(
        {"trainable": {"embed": [0, 1], "a.query": [1, 1], "b.query": [1, NAN]}},
        {"model": [0.4, 1.0]},
    ),
    "median_update_ratio": case(
        {
            "update_ratio": {
                "a.query": [0.1, 0.2, 0.9, 0.9],
                "b.query": [0.3, 0.3, 0.3, 0.3],
                "head": [7.0, 7.0, 7.0, 7.0],  # weight decay alone: it has no gradient
            },
            "gradient_norm": {"a.query": [1] * 4, "b.query": [1] * 4, "head": [0] * 4},
        },
        {"model": [0.2, 0.225, 0.25, 0.6]},
    ),
    "median_adaptive_step": case(ADAPTIVE, {"model": [1.0]}),
    "highest_adaptive_step": case(
        {
            "update_norm": {"a.query": [2 * math.sqrt(20), 4 * math.sqrt(20), math.sqrt(20)]},
            "learning_rate": {"a.query": [2, 2, 1]},
            "moment_ratio": {"a.query": [1, 1, 1]},
        },
        {"model": [1, 2, 2]},
    ),
    "learning_rate_to_peak": case(
        {"learning_rate": {"a.query": [1, 2, 1], "b.query": [2, 4, 1], "head": [None, None, 3]}},
        {"model": [1, 1, 0.5]},
    ),
    "resting_share": case(
        {"learning_rate": {"head": [1, 1, 0.01, 0.01]}}, {"model": [0, 0, 5 / 11, 10 / 16]}
    ),
    "since_peak_share": case(
        {"learning_rate": {"head": [None, 1, 2, 2, 1]}}, {"model": [NAN, 0, 0, 5 / 16, 10 / 21]}
    ),
    "median_weight_growth": case(
        {
            "weight_norm": {"a.query": [1, 2, 4], "b.query": [2, 2, 6], "head": [1, 90, 90]},
            "gradient_norm": {"a.query": [1] * 3, "b.query": [1] * 3, "head": [0] * 3},
        },
        {"model": [1, 1.5, 3.5]},
    ),
    "model_step_sharpness": case(
        {"step_sharpness": {"model": [1.0, 9.0, 2.0, None, 3.0]}}, {"model": [1, 5, 2, NAN, 3]}
    ),
    "update_curvature_share": case(
        {"update_curvature": {"model": [2.0, 2.0, 2.0, -2.0]}},
        {"model": [0.25, 0.5, 1.0, -0.5]},
        losses=CURVE,
    ),
    "overshoot": handed_on("overshoot", "model", [-0.5, 3.0]),
    "first_gradient_norm": case(
        {"gradient_norm": {"a.norm": [9.0, 9.0], "a.query": [2.0, 3.0], "head": [4.0, 6.0]}},
        {"model": [2, 3]},
    ),
    "first_gradient_ratio": case(
        {"gradient_norm": {"a.norm": [9.0] * 3, "a.query": [2.0, 3.0, 1.0], "head": [4.0, 0.0, 2]}},
        {"model": [0.5, NAN, 0.5]},
    ),
    "zero_gradient_share": case(
        {"zero_share": {"a.query": [0.5, 1.0], "head": [0.2, None]}}, {"model": [0.4, 1.0]}
    ),
    "accuracy_best": case(
        CLOCK, {"model": [0.6] * 4}, losses=[1.0] * 200, accuracies=epochs(SWINGING)
    ),
    "accuracy_best_gain": case(
        CLOCK, {"model": [0.1] * 4}, losses=[1.0] * 200, accuracies=epochs(SWINGING)
    ),
    "accuracy_swings": case(
        CLOCK, {"model": [9 / 20] * 4}, losses=[1.0] * 200, accuracies=epochs(SWINGING)
    ),
    # the run, as published checks see it
    "epochs_seen": case(CLOCK, {"model": [NAN, 3, 5.5, 8]}, losses=[1.0] * 40),
    "learning_rate_highest": case(
        {"learning_rate": {"embed": [None, 0.1], "head": [None, 0.3]}}, {"model": [NAN, 0.3]}
    ),
    "learning_rate_lowest": case(
        {"learning_rate": {"embed": [None, 0.1], "head": [None, 0.3]}}, {"model": [NAN, 0.1]}
    ),
    "loss_from_logits": case(
        {
            "probabilities_into_loss": {"model": [None, 0.0, 1.0]},
            "classes": {"model": [None, None, 4.0]},
        },
        {"model": [NAN, 0, 1]},
    ),
    "loss_unchanged": case(  # the same five times, but not from the fifth step on, until step 14
        CLOCK, {"model": [NAN, 0, 0, 1]}, losses=[2.0, 2, 2, 2, 1, 1, 1, 1, 1, 2, *[3] * 6]
    ),
    "accuracy_unchanged": case(  # of the steps at which it is known
        CLOCK,
        {"model": [NAN, 0, 1, 1]},
        losses=[1.0] * 16,
        accuracies=[0.5, 0.5, 0.5, 0.5, 0.25, NAN, *[0.75] * 10],
    ),
    "loss_unchanged_epochs": case(
        CLOCK, {"model": [1] * 4}, losses=[*range(10), *[0.1] * 10, *range(20)]
    ),
    "accuracy_unchanged_epochs": case(
        CLOCK, {"model": [1] * 4}, losses=[1.0] * 50, accuracies=[0.1] * 50
    ),
    "accuracy_worst": case(
        CLOCK, {"model": [0.5] * 4}, losses=[1.0] * 200, accuracies=epochs(SWINGING)
    ),
    # components: what the program does with them
    "trainable": handed_on("trainable", "embed", [1.0, 0.0]),
    "optimized": handed_on("optimized", "head", [0.0, 1.0]),
    "ever_reached": case(
        {
            "reached": {"a.query": [None, 1, 1, 1], "b.query": [1, 1], "head": [0, 1]},
            "gradient_norm": {"a.query": [None, 0, 2, 0], "b.query": [0, None]},
            "non_finite_gradient": {"b.query": [0, 3]},  # a NaN is not a zero
        },
        {"a.query": [NAN, 0, 1, 1], "b.query": [0, 1, 1, 1], "head": [0, 0, 0, 0]},
    ),
    "in_graph": case(
        {"reached": {"a.query": [None, 0, 0.5, 0], "head": [0, 0]}},
        {"a.query": [NAN, 0, 1, 1], "head": [0, 0, 0, 0]},
    ),
    "layer_in_graph": case(
        {"reached": {"a.query": [0, 0, 1], "a.norm": [0, 0, 0], "head": [0, 0, 0]}},
        {"a": [0, 0, 1], "a.query": [0, 0, 1], "a.norm": [0, 0, 1], "head": [0, 0, 0]},
    ),
    "had_rate": case(
        {"learning_rate": {"head": [None, 0.0, 0.1, 0.0]}}, {"head": [NAN, 0.0, 1.0, 1.0]}
    ),
    "averaging_to_run": case(
        CLOCK | {"averaging_steps": {"model": [10.0, None, None, None]}},
        {"model": [10, 10 / 6, 10 / 11, 10 / 16]},
    ),
    "moved": case(
        {"update_norm": {"head": [None, 0, 0.1, 0], "a.query": [0, None, 0, None]}},
        {"head": [NAN, 0, 1, 1], "a.query": [0, 0, 0, 0]},
    ),
    "siblings_trainable": case(
        {"trainable": {"a.query": [1.0, 0.0], "b.query": [0.0, None], "head": [1.0, 1.0]}},
        {"a.query": [0, NAN], "b.query": [1, 0]},
    ),
    "frozen_prefix": case(
        {"trainable": {"embed": [0, 1], "a.query": [0, 0], "b.query": [1, 1], "head": [0, 0]}},
        {"embed": [1, 0], "a.query": [1, 0], "b.query": [0, 0], "head": [0, 0]},
    ),
    "learning_rate_to_quartile": case(
        {"learning_rate": {"embed": [0.1], "a.query": [0.3], "head": [0.8]}},
        {"embed": [0.5], "a.query": [1.5], "head": [4]},
    ),
    # components: gradients, weights, updates
    "gradient_to_start": case(
        {"gradient_norm": {"head": [1, 3, 2, 10, 10], "embed": [1.0, None, 1.0]}},
        {"head": [0.5, 1, 1, 1.5, 5]},  # two measurements are no early window
    ),
    "gradient_to_median": case(
        {
            "gradient_norm": {
                "a.query": [2 * math.sqrt(20)],
                "b.query": [4 * math.sqrt(20)],
                "head": [0],
            }
        },
        {"a.query": [2 / 3], "b.query": [4 / 3], "head": [0]},
    ),
    "gradient_cosine": case(
        {"gradient_cosine": {"head": [0.1, -0.5, 0.3]}}, {"head": [0.1, -0.2, 0.1]}
    ),
    "zero_share": handed_on("zero_share", "a.query", [0.0, 0.25]),
    "non_finite_gradient": handed_on("non_finite_gradient", "a.query", [0.0, 7.0]),
    "non_finite_weight": handed_on("non_finite_weight", "a.query", [0.0, 7.0]),
    "update_ratio": case(
        {"update_ratio": {"head": [1, 5, 2, None, 9]}}, {"head": [1, 3, 2, NAN, 5]}
    ),
    "update_ratio_to_median": case(
        {
            "update_ratio": {"embed": [0.9], "a.query": [0.1], "b.query": [0.4], "head": [0.2]},
            "gradient_norm": {"embed": [0], "a.query": [1], "b.query": [1], "head": [1]},
        },
        {"a.query": [0.5], "b.query": [2], "head": [1]},
    ),
    "adaptive_step": case(ADAPTIVE, {"a.query": [0.5], "b.query": [1.5]}),
    "weight_growth": case(
        {"weight_norm": {"head": [2, 4, 1], "embed": [0.0, 1.0, 1.0]}}, {"head": [1, 2, 0.5]}
    ),
    "initial_weight_scale": case(
        {"weight_scale": {"head": [None, 0.5, 0.7]}}, {"head": [0.5, 0.5, 0.5]}
    ),
    "initial_weight_scale_to_median": case(
        {"weight_scale": {"a.query": [1.0, 9.0], "b.query": [2.0, 9.0], "head": [8.0, 9.0]}},
        {"a.query": [0.5, 0.5], "b.query": [1, 1], "head": [4, 4]},
    ),
    "moment_ratio": handed_on("moment_ratio", "head", [1.0, 2.5]),
    # components, as published checks see them
    "gradient_rms": case(
        {"gradient_norm": {"a.query": [math.sqrt(20)], "head": [2 * math.sqrt(10)]}},
        {"a.query": [1], "head": [2]},
    ),
    "weight_zero": case({"weight_norm": {"head": [0, 0.1, None]}}, {"head": [1, 0, NAN]}),
    "weight_zero_times": case(
        {"weight_norm": {"head": [0, 0.1, None, 0, 1]}}, {"head": [1, 1 / 2, NAN, 2 / 3, 1 / 2]}
    ),
    "gradient_zero_times": case(
        {"zero_share": {"head": [0.9, 1, None, 1]}}, {"head": [0, 1 / 2, NAN, 2 / 3]}
    ),
    "input_zero_times": case(
        {"input_zero_share": {"head": [0.9, 1, None, 1]}}, {"head": [0, 1 / 2, NAN, 2 / 3]}
    ),
    "weight_unchanged": case(
        {"weight_norm": {"head": [2, 2, 2, 2, 1, 3, None, 3, 3, 3, 3], "embed": [1, 1, 1, 1]}},
        {"head": [NAN] * 4 + [0] * 6 + [1]},
    ),
    "gradient_unchanged": case(
        {"gradient_norm": {"head": [2, 2, 2, 2, 1, 3, None, 3, 3, 3, 3]}},
        {"head": [NAN] * 4 + [0] * 6 + [1]},
    ),
    "weight_unchanged_epochs": case(  # epochs of ten steps, of which the last measurement counts
        {"weight_norm": {"head": [1, 2] * 5, "embed": [2, 1] * 4 + [1, 2], "a.query": [1] * 8}},
        {"head": [1] * 10, "embed": [0] * 10},
        losses=[1.0] * 200,
    ),
    "gradient_unchanged_epochs": case(
        {"gradient_norm": {"head": [1] * 4, "embed": [3, 3, None, 3, 3, 3], "a.query": [1] * 4}},
        {"embed": [1] * 6},
    ),
    "input_zero_share_at_end": case(
        {"input_zero_share": {"head": [0.9, 0.1, 0.8, None]}}, {"head": [0.8] * 4}
    ),
    # components: curvature
    "step_sharpness": handed_on("step_sharpness", "head", [-0.5, 1.5]),
    "curvature_part": case(
        {"update_curvature": {"a.query": [-1.0, 0.0], "head": [3.0, 0.0]}},
        {"a.query": [0.25, NAN], "head": [0.75, NAN]},
    ),
    "component_curvature_share": case(
        {"update_curvature": {"head": [-2.0, 2.0, 2.0, 2.0]}},
        {"head": [0.25, 0.5, 1.0, 0.5]},
        losses=CURVE,
    ),
    "step_lambda": handed_on("step_lambda", "head", [0.5, 1.5]),
    "negative_curvature_ratio": case(
        {"lambda_min": {"head": [-3.0, 1.0]}, "lambda_max": {"head": [2.0, 2.0]}},
        {"head": [1.5, -0.5]},
    ),
    "trace_z": case({"trace": {"head": [6.0, -1.0]}}, {"head": [3.0, -0.5]}, std_error=2.0),
    # components: what their weights multiply
    "input_scale": handed_on("input_scale", "head", [1.0, 3.0]),
    "input_scale_to_start": case(
        {"input_scale": {"head": [None, 2.0, 1.0]}}, {"head": [NAN, 1.0, 0.5]}
    ),
    "input_similarity": handed_on("input_similarity", "head", [0.1, -0.2]),
    "input_similarity_change": case(
        {"input_similarity": {"head": [None, 0.25, -0.5]}}, {"head": [NAN, 0, -0.75]}
    ),
    "input_zero_share": handed_on("input_zero_share", "head", [0.0, 1.0]),
    # attention layers
    "attention_entropy": handed_on("attention_entropy", "a", [0.9, 0.1]),
    "initial_attention_entropy": case(
        {"attention_entropy": {"a": [None, 0.9, 0.1]}}, {"a": [0.9, 0.9, 0.9]}
    ),
    "attention_entropy_change": case({"attention_entropy": {"a": [0.75, 0.25]}}, {"a": [0, -0.5]}),
    "entropy_of_layer": case(
        {"attention_entropy": {"a": [0.9, 0.1]}},
        {"a": [0.9, 0.1], "a.query": [0.9, 0.1], "a.norm": [0.9, 0.1]},
    ),
    "attention_logit": handed_on("attention_logit", "a", [2.0, 50.0]),
    "attention_logit_growth": case({"attention_logit": {"a": [2.0, 50.0]}}, {"a": [1.0, 25.0]}),
    "empty_rows": handed_on("empty_rows", "a", [0.0, 0.5]),
    # pairs
    "coupling_share": case(
        {"coupling_share": {"a.query - head": [0.2, -0.3], "embed - head": [None, 0.1]}},
        {"a.query - head": [0.2, -0.3], "embed - head": [NAN, 0.1]},
    ),
    "coupling_to_curvature": case(
        {
            "coupling_norm": {"a.query - head": [6.0, 3.0]},
            "lambda_min": {"a.query": [-4.0, -1.0], "head": [0.0, None]},
            "lambda_max": {"a.query": [1.0, None], "head": [9.0, 9.0]},
        },
        {"a.query - head": [1.0, 1.0]},
    ),
}


KNOWN |= {  # of imported logs
    "logged_loss_lost": case(
        CLOCK, {"model": [0, 0, 1, 1]}, losses=[1.0] * 4 + [NAN, 1.0] + [NAN] * 10
    ),
    "logged_loss_gaps": case(
        CLOCK, {"model": [0.25] * 4}, losses=[1.0, 1.0, 1.0, NAN, math.inf, 1.0, 1.0, 1.0, NAN]
    ),
    "logged_loss_rise": case(
        CLOCK, {"model": [0.0, 0.0, 0.0, 0.4]}, losses=[*CURVE[:7], 99.0, *CURVE[8:]]
    ),
    "logged_loss_gain": case(CLOCK, {"model": [0.75] * 4}, losses=[*CURVE, *[2.6] * 4]),
    "logged_gradient_lost": case(
        {
            "gradient_norm": {"model": [1.0, None, 1.0, None, None]},
            "non_finite_gradient": {"model": [0.0, 1.0, 0.0, 2.0, 1.0]},
        },
        {"model": [0, 0, 0, 1, 1]},
    ),
    "logged_gradient_zero": case(
        {"gradient_norm": {"model": [1.0, 0.0, None, 0.0]}}, {"model": [0, 1, NAN, 1]}
    ),
    "evaluation_lost": case(
        {
            "evaluation_loss": {"model": [None, 1.0, None, None]},
            "non_finite_evaluation": {"model": [None, 0.0, None, 1.0]},
        },
        {"model": [NAN, 0, NAN, 1]},
    ),
    "evaluation_rise": case(
        {"evaluation_loss": {"model": [4.0, 2.0, None, 3.0]}}, {"model": [0, 0, NAN, 0.5]}
    ),
    "loss_since_best_evaluation": case(
        {"evaluation_loss": {"model": [4.0, 2.0, 3.0, None]}},
        {"model": [1, 1, 0.5, NAN]},
        losses=CURVE,
    ),
    "evaluation_accuracy_fall": case(
        {"evaluation_accuracy": {"model": [0.5, 0.75, None, 0.5]}}, {"model": [0, 0, NAN, 0.25]}
    ),
}


KNOWN |= {  # of program checks: each stays as it was last seen
    quantity.name: case(
        {quantity.name: {place: [None, 1.0, None, 0.5]}}, {place: [NAN, 1.0, 1.0, 0.5]}
    )
    for quantity in PROGRAM
    for place in ("model" if quantity.scope == "run" else "a",)
}


def column(recording: Recording, feature: str) -> Column:
    return feature_tables(recording)[CATALOGUE[feature].scope].columns[feature]


@pytest.mark.parametrize("feature", FEATURES)
def test_a_known_series_gives_the_known_answer_and_nothing_elsewhere(feature: str) -> None:
    series, expected, rest = KNOWN[feature]
    recording = made_recording(COMPONENTS, series, **rest)
    table = feature_tables(recording)[CATALOGUE[feature].scope]
    found = table.columns[feature].value
    assert found.shape == (len(table.subjects), len(table.steps))
    wanted = np.full(found.shape, NAN)
    for place, values in expected.items():
        subject = tuple((*place.split(" - "), None)[:2])
        wanted[table.subjects.index(subject)] = values
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_every_feature_is_about_what_it_says_it_needs() -> None:
    for feature, (series, _, _) in KNOWN.items():
        assert set(CATALOGUE[feature].quantities) <= series.keys(), feature


# -- uncertainty -----------------------------------------------------------------------------------


def test_bounds_are_two_standard_errors_of_both_kinds_together() -> None:
    series = {"step_lambda": {"head": [10.0]}}
    recording = made_recording(COMPONENTS, series, std_error=0.3, batch_std_error=0.4)
    found = column(recording, "step_lambda")
    row = list(COMPONENTS).index("head")
    bounds = found.lower[row, 0], found.value[row, 0], found.upper[row, 0]
    np.testing.assert_allclose(bounds, (9.0, 10.0, 11.0))


def test_an_unknown_error_of_the_estimator_makes_the_bounds_unknown() -> None:
    series = {"step_lambda": {"head": [10.0]}}
    found = column(made_recording(COMPONENTS, series, std_error=None), "step_lambda")
    row = list(COMPONENTS).index("head")
    assert found.value[row, 0] == 10.0
    assert np.isnan(found.lower[row, 0]) and np.isnan(found.upper[row, 0])


def test_the_most_negative_curvature_keeps_its_bounds_in_the_ratio() -> None:
    series = {"lambda_min": {"head": [-3.0]}, "lambda_max": {"head": [2.0]}}
    found = column(made_recording(COMPONENTS, series, std_error=0.5), "negative_curvature_ratio")
    row = list(COMPONENTS).index("head")
    bounds = found.lower[row, 0], found.value[row, 0], found.upper[row, 0]
    np.testing.assert_allclose(bounds, (1.0, 1.5, 2.0))


def test_an_exact_trace_has_no_standard_error_to_be_measured_in() -> None:
    recording = made_recording(COMPONENTS, {"trace": {"head": [6.0]}})
    assert np.isnan(column(recording, "trace_z").value).all()


# -- losses ----------------------------------------------------------------------------------------

OF_THE_LOSS = (
    *("loss_fall", "loss_rise", "loss_spread", "loss_trend", "loss_to_chance"),
    *("update_curvature_share", "component_curvature_share"),
)
WITH_LOSS = {
    "classes": {"model": [4.0] * 4},
    "update_curvature": {"model": [2.0] * 4, "head": [2.0] * 4},
}


def unknown(recording: Recording, features: Sequence[str] = OF_THE_LOSS) -> set[str]:
    return {name for name in features if np.isnan(column(recording, name).value).all()}


def test_rivals_have_no_common_loss() -> None:
    one = made_recording(COMPONENTS, {**WITH_LOSS, "optimizers": {"model": [1.0] * 4}}, CURVE)
    two = made_recording(COMPONENTS, {**WITH_LOSS, "optimizers": {"model": [1.0, 2.0]}}, CURVE)
    assert unknown(one) == set()
    assert unknown(two) == set(OF_THE_LOSS)


@pytest.mark.parametrize("first", [0.0, -1.0, math.inf, NAN])
def test_without_a_positive_finite_first_loss_nothing_is_measured_against_it(first: float) -> None:
    recording = made_recording(COMPONENTS, WITH_LOSS, [first, *CURVE[1:]])
    against_the_first = set(OF_THE_LOSS) - {"loss_spread", "loss_trend", "loss_to_chance"}
    assert unknown(recording, sorted(against_the_first)) == against_the_first


def test_a_small_loss_late_in_training_does_not_blow_up_what_is_divided_by_it() -> None:
    recording = made_recording(COMPONENTS, WITH_LOSS, [4.0] * 3 + [1e-9] * 13)
    share = column(recording, "update_curvature_share").value[0]
    np.testing.assert_allclose(share, [0.25, 2.5, 2.5, 2.5])  # over a tenth of the first loss


def test_a_window_with_a_nan_is_not_a_number() -> None:
    losses = [*CURVE[:7], NAN, *CURVE[8:]]
    fall = column(made_recording(COMPONENTS, CLOCK, losses), "loss_fall").value[0]
    np.testing.assert_array_equal(np.isnan(fall), [True, False, True, False])


def test_where_no_loss_was_seen_nothing_is_said_of_it() -> None:
    recording = made_recording(COMPONENTS, {**CLOCK, "classes": {"model": [4.0] * 4}})
    features = (*OF_THE_LOSS, "non_finite_loss", "accuracy", "accuracy_best", "accuracy_swings")
    assert unknown(recording, features) == set(features)


def test_a_single_class_leaves_nothing_to_guess() -> None:
    recording = made_recording(COMPONENTS, {"classes": {"model": [1.0] * 4}}, CURVE)
    assert unknown(recording, ["loss_to_chance"]) == {"loss_to_chance"}


def test_too_short_a_run_has_no_epochs() -> None:
    for steps, known in ((19, False), (20, True)):
        recording = made_recording(COMPONENTS, CLOCK, [1.0] * steps, [0.5] * steps)
        assert (unknown(recording, ["accuracy_best"]) == set()) is known


# -- laws ------------------------------------------------------------------------------------------

# What every quantity is multiplied by when the same training is told in other units: as powers of
# the unit of the loss, and of the unit of the weights. Others are pure numbers.
UNIT_OF_LOSS = {
    "gradient_norm": 1,
    "update_curvature": 1,
    "trace": 1,
    "lambda_max": 1,
    "lambda_min": 1,
    "coupling_norm": 1,
    "learning_rate": -1,  # of plain gradient descent
}
UNIT_OF_WEIGHTS = {
    "weight_norm": 1,
    "update_norm": 1,
    "weight_scale": 1,
    "gradient_norm": -1,
    "trace": -2,
    "lambda_max": -2,
    "lambda_min": -2,
    "coupling_norm": -2,
    "learning_rate": 2,
}
# Absolute on purpose: guessing has a loss of its own, initialisation a scale, a published check a
# limit.
WITH_UNIT_OF_LOSS = {
    "loss_to_chance": 1,
    "initial_loss_to_chance": 1,
    "first_gradient_norm": 1,
    "gradient_rms": 1,
    "learning_rate_highest": -1,
    "learning_rate_lowest": -1,
    # Of optimizers alone whose learning rate has the unit of the weights and no other.
    "adaptive_step": 1,
    "median_adaptive_step": 1,
    "highest_adaptive_step": 1,
}
WITH_UNIT_OF_WEIGHTS = {
    "initial_weight_scale": 1,
    "first_gradient_norm": -1,
    "gradient_rms": -1,
    "learning_rate_highest": 2,
    "learning_rate_lowest": 2,
    "adaptive_step": -1,
    "median_adaptive_step": -1,
    "highest_adaptive_step": -1,
}

SHARES = (  # quantities between 0 and 1
    *("trainable", "optimized", "reached", "zero_share", "carried_gradients"),
    *("probabilities_into_loss", "attention_entropy", "empty_rows", "gradient_cosine"),
    *("coupling_share", "input_similarity", "input_zero_share"),
)
SIGNED = ("update_curvature", "trace", "lambda_min", "step_sharpness", "step_lambda", "overshoot")
PLACES = (*COMPONENTS, "model", "a.query - head")
# Two of the program checks stand for all of them, which are handed on in one and the same way.
HANDED_ON = PROGRAM_NAMES - {"attention_scores", "sample_leak", "input_largest"}
QUANTITIES = sorted({q for feature in CATALOGUE.values() for q in feature.quantities} - HANDED_ON)
LENGTH = 4


def told(seed: int) -> tuple[Series, list[float]]:
    """Measurements of everything everywhere, in every other run with gaps, and losses."""
    random = Random(seed)
    gaps = random.choice([0.0, 0.2])

    def size() -> float:
        return math.exp(random.uniform(-5, 5))

    def number(quantity: str) -> float | None:
        if random.random() < gaps:
            return None
        if quantity == "classes":
            return float(random.randint(2, 100))
        if quantity in SHARES:
            return random.choice([0.0, 1.0, random.random()])
        return size() * (random.choice([-1, 1]) if quantity in SIGNED else 1)

    series = {q: {p: [number(q) for _ in range(LENGTH)] for p in PLACES} for q in QUANTITIES}
    return series, [size() for _ in range(16)]


runs = st.builds(told, st.integers(0, 2**32))


def scaled(series: Series, units: Mapping[str, int], factor: float) -> Series:
    return {
        q: {
            place: [None if v is None else v * factor ** units.get(q, 0) for v in values]
            for place, values in of.items()
        }
        for q, of in series.items()
    }


def values(series: Series, losses: Sequence[float]) -> dict[str, Any]:
    recording = made_recording(COMPONENTS, series, losses, [0.5] * len(losses), std_error=0.0)
    return {n: c.value for t in feature_tables(recording).values() for n, c in t.columns.items()}


def test_a_run_that_was_stopped_after_its_first_steps_has_no_end() -> None:
    of = {"clock": {"model": [0.0] * 4}}
    for facts, last in (((), 1.0), ([("stopped", "", 0)], 0.0)):
        run = made_recording(COMPONENTS, of, [1.0] * 16, facts=facts, ended=True)
        assert feature_tables(run)["run"].columns["at_the_end"].value[0, -1] == last


@settings(max_examples=25, deadline=None)
@given(runs, st.integers(-20, 20))
def test_the_unit_of_the_loss_does_not_matter(run: tuple[Series, list[float]], power: int) -> None:
    series, losses = run
    factor = 2.0**power  # exact
    ours = values(series, losses)
    theirs = values(scaled(series, UNIT_OF_LOSS, factor), [factor * loss for loss in losses])
    for name, value in ours.items():
        expected = value * factor ** WITH_UNIT_OF_LOSS.get(name, 0)
        np.testing.assert_allclose(theirs[name], expected, rtol=1e-9, err_msg=name)


@settings(max_examples=25, deadline=None)
@given(runs, st.integers(-20, 20))
def test_the_unit_of_the_weights_does_not_matter(
    run: tuple[Series, list[float]], power: int
) -> None:
    series, losses = run
    factor = 2.0**power
    ours, theirs = values(series, losses), values(scaled(series, UNIT_OF_WEIGHTS, factor), losses)
    for name, value in ours.items():
        expected = value * factor ** WITH_UNIT_OF_WEIGHTS.get(name, 0)
        np.testing.assert_allclose(theirs[name], expected, rtol=1e-9, err_msg=name)


@settings(max_examples=25, deadline=None)
@given(runs)
def test_features_stay_in_their_range(run: tuple[Series, list[float]]) -> None:
    for name, value in values(*run).items():
        known = value[~np.isnan(value)]
        assert (known >= CATALOGUE[name].low).all(), name
        assert (known <= CATALOGUE[name].high).all(), name


@settings(max_examples=25, deadline=None)
@given(runs, st.sampled_from(QUANTITIES), st.sampled_from(PLACES), st.integers(0, LENGTH - 1))
def test_what_was_not_measured_is_never_made_up(
    run: tuple[Series, list[float]], quantity: str, place: str, k: int
) -> None:
    def without(gap: float | None) -> Series:
        kept = list(series[quantity][place])
        kept[k] = gap
        return {**series, quantity: {**series[quantity], place: kept}}

    series, losses = run
    before, missing, nan = values(*run), values(without(None), losses), values(without(NAN), losses)
    for name in before:
        np.testing.assert_array_equal(missing[name], nan[name], err_msg=name)
        # A pair that was never measured is no pair. Parameters that are changed by hand are in no
        # optimizer: that it is not known of one does not make it one that is not trained.
        if CATALOGUE[name].scope != "pair" and quantity != "optimized":
            assert not (np.isnan(before[name]) & ~np.isnan(missing[name])).any(), name


@settings(max_examples=25, deadline=None)
@given(runs, st.lists(st.floats(width=64), min_size=LENGTH, max_size=LENGTH), st.data())
def test_the_wildest_numbers_are_no_trouble(
    run: tuple[Series, list[float]], wild: list[float], data: st.DataObject
) -> None:
    series, losses = run
    quantity = data.draw(st.sampled_from(QUANTITIES))
    series = {**series, quantity: dict.fromkeys(PLACES, wild)}
    recording = made_recording(COMPONENTS, series, [*losses[:10], *wild], std_error=wild[0])
    feature_tables(recording)  # a warning would fail the test


# -- what the monitor measures ---------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.first = nn.MultiheadAttention(4, 2, batch_first=True)
        self.second = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = x + self.first(x, x, x)[0]
        x = x + self.second(x, x, x)[0]
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    out: Path = tmp_path_factory.mktemp("run") / "run"
    with watch(model, optimizer, out=out, every=2, verbose=False) as w:
        for _ in range(30):
            tokens = torch.randint(7, (6, 5))
            optimizer.zero_grad()
            F.cross_entropy(model(tokens), tokens[:, 0] % 3).backward()
            optimizer.step()
    return w.log


def test_features_are_computed_of_what_the_monitor_measures(watched: Recording) -> None:
    watched_ones = [f for name, f in CATALOGUE.items() if name not in OF_LOGS]
    needed = {q for feature in watched_ones for q in feature.quantities}
    assert needed - PROGRAM_NAMES <= set(watched.measurements.quantities)
    applying = {"attention_scale", "sample_leak", "label_classes", "position_share"}
    assert applying <= set(watched.measurements.quantities)


def test_every_feature_is_known_somewhere_in_a_watched_training(watched: Recording) -> None:
    found = {n: c for t in feature_tables(watched).values() for n, c in t.columns.items()}
    nowhere = {name for name, its in found.items() if np.isnan(its.value).all()}
    of_checks = {name for name in nowhere if PROGRAM_NAMES & set(CATALOGUE[name].quantities)}
    of_logs = {name for name in nowhere & OF_LOGS if CATALOGUE[name].quantities}
    assert nowhere - of_checks - of_logs == {
        "accuracy_unchanged_epochs"
    }  # it needs twenty accuracies
    for name, its in found.items():
        known = its.value[~np.isnan(its.value)]
        assert (known >= CATALOGUE[name].low).all(), name
        assert (known <= CATALOGUE[name].high).all(), name


def test_what_tables_were_computed_from_is_let_go_with_them() -> None:
    """A run that is looked at while it goes on is read again and again."""

    def sources() -> int:
        gc.collect()
        return sum(type(found) is Source for found in gc.get_objects())

    before = sources()
    series = {"gradient_norm": {"a": [1.0] * 8}, "weight_norm": {"a": [1.0] * 8}}
    for _ in range(3):
        feature_tables(made_recording({"a": ("other", "a", 10)}, series, [1.0] * 20))
    assert sources() == before
