"""Program checks: what a training step does that no author would want, in numbers.

A check looks at one step (`Seen`: its calls, its loss, a trace of its forward made beside the
training) and gives numbers (`Found`); whether they are a fault is for the rules in ``rules/checks``
to say, from the log. A check that does not apply gives a reason instead, and never a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from diagnoser.checks import (
    attention,
    class_losses,
    linear,
    masks,
    modes,
    objective,
    optimisation,
    overfit,
    probes,
    structure,
    wiring,
)
from diagnoser.checks.calls import Call, Calls, LossCall
from diagnoser.checks.held import HeldBatch
from diagnoser.checks.modes import scored_in_training
from diagnoser.checks.replica import unwrapped
from diagnoser.checks.seen import Found, Seen
from diagnoser.checks.trace import user_line
from diagnoser.errors import MeasurementError


@dataclass(frozen=True, slots=True)
class Check:
    """A check: its function, whose docstring says what it finds, and the quantities it gives."""

    run: Callable[[Seen, Found], None]
    quantities: tuple[str, ...]


CHECKS: Final[Mapping[str, Check]] = {
    "optimised-twice": Check(optimisation.shared_parameters, ("times_optimized",)),
    "weight-decay": Check(optimisation.weight_decay, ("decay_to_step", "decayed_vectors")),
    "averages": Check(optimisation.averages, ("averaging_steps",)),
    "training-mode": Check(
        modes.training_mode, ("trained_in_eval", "dropout_largest", "batch_norm_momentum")
    ),
    "eval-mode": Check(modes.dropout_in_eval, ("dropout_in_eval",)),
    "class-loss": Check(
        class_losses.class_loss,
        (
            "label_smoothing",
            "ignored_classes",
            "weighted_imbalance",
            "classes_scrambled",
            "scores_cut",
        ),
    ),
    "loss-direction": Check(class_losses.direction, ("loss_climbed",)),
    "scores-into-loss": Check(
        objective.scores_into_loss, ("not_log_probabilities", "target_gradient")
    ),
    "labels-in-input": Check(objective.labels_in_input, ("labels_in_input", "target_shift")),
    "padded-targets": Check(objective.padded_targets, ("padded_target_share",)),
    "target-values": Check(objective.target_values, ("targets_outside", "smoothed_padding")),
    "regression-targets": Check(
        objective.regression_targets, ("target_scale", "target_constant", "loss_broadcast")
    ),
    "inputs": Check(
        objective.inputs,
        (
            "input_largest",
            "weighed_input_largest",
            "input_non_finite",
            "same_samples",
            "same_batches",
        ),
    ),
    "softmax-axis": Check(
        attention.softmax_axis,
        (
            "attention_sum_error",
            "attention_other_axis",
            "attention_after_softmax",
            "attention_mask_after",
            "attention_by_feature",
        ),
    ),
    "attention-scale": Check(
        attention.attention_scale,
        ("attention_scale", "attention_scale_normalised", "attention_scores", "attention_excess"),
    ),
    "score-precision": Check(attention.score_precision, ("half_scores",)),
    "padding-mask": Check(
        masks.padding_mask, ("padding_weight", "content_weight", "padded_query_hidden")
    ),
    "padding-index": Check(masks.padding_index, ("padding_index_content",)),
    "mask-value": Check(masks.mask_value, ("masked_rows", "mask_leak", "mask_margin")),
    "causality": Check(masks.causality, ("future_weight", "needless_causal", "first_sees_itself")),
    "attention-sources": Check(
        wiring.sources, ("same_query_key", "key_value_apart", "head_similarity")
    ),
    "head-layout": Check(wiring.head_layout, ("scrambled_heads",)),
    "norms": Check(structure.norms, ("norm_missing", "norms_absent")),
    "residuals": Check(
        structure.residuals, ("residual_missing", "residuals_absent", "added_to_itself")
    ),
    "effect": Check(structure.effect, ("attention_unused",)),
    "residual-source": Check(structure.residual_source, ("residual_normalised",)),
    "linear-pairs": Check(linear.linear_pairs, ("widened_in_vain",)),
    "streams": Check(structure.streams, ("updated_stream",)),
    "growth": Check(structure.growth, ("activation_growth",)),
    "ties": Check(structure.ties, ("tied_elsewhere",)),
    "units": Check(structure.units, ("twin_units",)),
    "saddles": Check(structure.saddles, ("zero_scores",)),
    "saturation": Check(structure.saturation, ("saturated_share",)),
    "output-layer": Check(structure.output_layer, ("output_normalised",)),
    "sample-leak": Check(
        probes.sample_leak, ("sample_leak", "sample_leak_begins", "input_influence")
    ),
    "order-blind": Check(probes.order_blind, ("position_share", "positions_unused")),
    "padding-content": Check(probes.padding_content, ("padding_influence",)),
    "future": Check(probes.future, ("future_influence",)),
}


# Cheap ones that need neither calls nor a trace: on every sample.
OFTEN: Final[Mapping[str, Check]] = {
    "labels": Check(objective.labels, ("label_classes", "batch_label_entropy")),
}


# Dear ones, before a run alone.
BEFORE: Final[Mapping[str, Check]] = {
    "overfit": Check(overfit.overfit_one_batch, ("overfit_fall",)),
}


# Why a check that ran to its end gave no such number.
WHY: Final[Mapping[str, str]] = {
    "decay_to_step": "no weight decay that can be compared with a step",
    "decayed_vectors": "the model has neither norms nor biases",
    "batch_norm_momentum": "the model has no batch norm",
    "ignored_classes": "no loss compares one label of each sample",
    "weighted_imbalance": "no loss weighs classes",
    "scores_cut": "no cross-entropy is the loss",
    "widened_in_vain": "no layer of weights follows another with nothing between",
    "not_log_probabilities": "no negative log-likelihood is the loss",
    "target_gradient": "no regression or binary cross-entropy is the loss",
    "batch_label_entropy": "it takes two batches of eight labels, of more than one class",
    "input_largest": "the model is given no float tensor of two dimensions",
    "weighed_input_largest": "no float tensor is multiplied by weights as it is given",
    "input_non_finite": "the model is given no float tensor of two dimensions",
    "same_samples": "the batch holds fewer than three samples",
    "same_batches": "it takes two checked steps",
    "attention_sum_error": "no row of attention has finite weights, or heads are mixed",
    "attention_other_axis": "no row of attention has finite weights, or heads are mixed",
    "attention_after_softmax": "no row of attention has finite weights, or heads are mixed",
    "attention_mask_after": "no row of attention has finite weights, or heads are mixed",
    "attention_scale": "the scale is learned, or not both queries and keys are projected",
    "attention_scale_normalised": "neither queries nor keys are normalised",
    "attention_scores": "the scores of attention were not seen",
    "attention_excess": "the keys of attention were not seen, or are zero",
    "half_scores": "no parameters belong to attention",
    "padded_query_hidden": "no self-attention over padded positions",
    "masked_rows": "scores are not masked",
    "mask_leak": "scores are not masked",
    "mask_margin": "no mask has a finite value",
    "future_weight": "no self-attention is over inputs that are targets next",
    "needless_causal": "no self-attention is in a model of one target a sample",
    "first_sees_itself": "no self-attention is in a model of one target a sample",
    "same_query_key": "attention is not a product of queries and keys",
    "key_value_apart": "keys or values come from no input",
    "head_similarity": "attention has one head",
    "scrambled_heads": "the scores of attention were not seen",
    "tied_elsewhere": "no matrix belongs to the model",
    "target_shift": "targets are not the inputs of other positions",
    "loss_broadcast": "no regression is the loss",
    "targets_outside": "no binary cross-entropy is the loss",
    "smoothed_padding": "no loss compares with distributions over tokens",
    "twin_units": "units are compared at the first step alone",
    "zero_scores": "attention is not a product of queries and keys",
    "sample_leak": "the output does not depend on the input",
    "sample_leak_begins": "samples do not depend on each other",
}


def examine(seen: Seen) -> Found:
    """Runs all checks on a step; what one cannot tell, or fails at, is a reason, not an error."""
    return _run(CHECKS, seen)


def examine_often(seen: Seen) -> Found:
    """Runs the checks that need no more than the loss."""
    return _run(OFTEN, seen)


def examine_before(seen: Seen) -> Found:
    """Runs the checks that train a copy."""
    return _run(BEFORE, seen)


def _run(checks: Mapping[str, Check], seen: Seen) -> Found:
    found = Found(seen.step)
    for check in checks.values():
        before = len(found.rows)
        try:
            check.run(seen, found)
            reason = ""
        except MeasurementError as error:
            reason = str(error)
        except Exception as error:  # law 4: a mistake of ours must not end the others
            reason = f"the check failed ({error!r})"[:200]
        given = {row.quantity for row in found.rows[before:]}
        missing = (q for q in check.quantities if q not in given)
        found.unknown |= {q: reason or WHY.get(q, "nothing of the kind is there") for q in missing}
    return found


__all__ = [
    "BEFORE",
    "CHECKS",
    "OFTEN",
    "Call",
    "Calls",
    "Check",
    "Found",
    "HeldBatch",
    "LossCall",
    "Seen",
    "examine",
    "examine_before",
    "examine_often",
    "scored_in_training",
    "unwrapped",
    "user_line",
]
