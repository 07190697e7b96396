"""The feature catalogue: what rules may ask about, and how it is computed.

Features are scale-free (ratios to theory, to the component's own early window, to other components
of the run, to chance) and windowed, so that one number at one measured step says something about a
model of any size. Raw curvature and raw coupling are not among them on purpose: they are often
lower in a faulty run than in a healthy one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from diagnoser.features import functions as f
from diagnoser.features.logged import LOGGED
from diagnoser.features.program import PROGRAM
from diagnoser.features.published import PUBLISHED
from diagnoser.features.source import Source
from diagnoser.table import Column, Feature, Scope

Entry = tuple[Feature, Callable[[Source], Column]]


def entry(
    name: str,
    scope: Scope,
    function: Callable[[Source], Column],
    quantities: tuple[str, ...],
    description: str,
    *,
    low: float = 0.0,
    high: float = np.inf,
) -> Entry:
    """Returns a feature and the function that computes it."""
    return Feature(name, scope, description, "", low, high, quantities), function


FEATURES: Final[Mapping[str, Entry]] = {
    feature.name: (feature, function)
    for feature, function in (
        # the run
        entry(
            "loss_fall",
            "run",
            f.loss_fall,
            (),
            "share of the initial loss that is gone (windowed mean loss against the first three)",
            low=-np.inf,
            high=1.0,
        ),
        entry(
            "loss_rise",
            "run",
            f.loss_rise,
            (),
            "how far the windowed loss is above its best, in initial losses",
        ),
        entry(
            "loss_spread",
            "run",
            f.loss_spread,
            (),
            "standard deviation over absolute mean of the loss in its window",
        ),
        entry(
            "loss_trend",
            "run",
            f.loss_trend,
            (),
            "share of its loss at half of the steps so far that the run has lost since",
            low=-np.inf,
        ),
        entry(
            "loss_to_chance",
            "run",
            f.loss_to_chance,
            ("classes",),
            "windowed loss over ln(number of classes): 1 is guessing",
        ),
        entry(
            "initial_loss_to_chance",
            "run",
            f.initial_loss_to_chance,
            ("classes",),
            "mean of the first three losses over ln(number of classes): 1 where nothing is "
            "preferred yet",
        ),
        entry(
            "loss_half_time",
            "run",
            f.loss_half_time,
            (),
            "share of the steps so far after which half of the loss's fall was made",
            low=0,
            high=1,
        ),
        entry(
            "loss_persistence",
            "run",
            f.loss_persistence,
            (),
            "correlation of neighbouring losses in the window, around its line: 0 where batches "
            "are drawn at random",
            low=-1,
            high=1,
        ),
        entry(
            "loss_spike",
            "run",
            f.loss_spike,
            (),
            "highest loss of the window over its median",
        ),
        entry(
            "non_finite_loss",
            "run",
            f.non_finite_loss,
            (),
            "1 from the first loss on that is NaN or infinite",
            low=0,
            high=1,
        ),
        entry(
            "accuracy",
            "run",
            lambda s: Column.exact(s.accuracy),
            (),
            "windowed training accuracy of a classification loss",
            low=0,
            high=1,
        ),
        entry(
            "carried_gradients",
            "run",
            f.own_run("carried_gradients"),
            ("carried_gradients",),
            "share of parameters whose gradient of the last step still stands when "
            "the next backward begins",
            low=0,
            high=1,
        ),
        entry(
            "probabilities_into_loss",
            "run",
            f.own_run("probabilities_into_loss"),
            ("probabilities_into_loss",),
            "1 where a softmax or sigmoid result enters a loss that applies its own",
            low=0,
            high=1,
        ),
        entry(
            "trained_share",
            "run",
            f.trained_share,
            ("trainable",),
            "share of all elements that are trainable",
            low=0,
            high=1,
        ),
        entry(
            "median_weight_growth",
            "run",
            f.median_weight_growth,
            ("weight_norm", "gradient_norm"),
            "median over components that are trained of weight norm over its first value",
        ),
        entry(
            "median_update_ratio",
            "run",
            f.median_update_ratio,
            ("update_ratio",),
            "median over components of update norm over weight norm (moving median of 3)",
        ),
        entry(
            "median_adaptive_step",
            "run",
            f.median_adaptive_step,
            ("update_norm", "learning_rate", "moment_ratio"),
            "median over components of their adaptive step",
        ),
        entry(
            "highest_adaptive_step",
            "run",
            f.highest_adaptive_step,
            ("update_norm", "learning_rate", "moment_ratio"),
            "highest median adaptive step so far: 0.23 is what noise alone makes with a first "
            "average of 0.9",
        ),
        entry(
            "learning_rate_to_peak",
            "run",
            f.learning_rate_to_peak,
            ("learning_rate",),
            "learning rate over its highest so far, median over components",
            low=-np.inf,
            high=1,
        ),
        entry(
            "resting_share",
            "run",
            f.resting_share,
            ("learning_rate",),
            "share of the steps so far with less than a twentieth of the highest learning rate",
            low=0,
            high=1,
        ),
        entry(
            "since_peak_share",
            "run",
            f.since_peak_share,
            ("learning_rate",),
            "share of the steps so far since the learning rate last rose: 0 during a warmup",
            low=0,
            high=1,
        ),
        entry(
            "model_step_sharpness",
            "run",
            f.smoothed_run("step_sharpness"),
            ("step_sharpness",),
            "learning rate times curvature along the update, over what the "
            "optimizer's stability allows (Cohen et al. 2021, 2022); moving median of"
            " 3",
            low=-np.inf,
        ),
        entry(
            "update_curvature_share",
            "run",
            f.update_curvature_share,
            ("update_curvature",),
            "what curvature adds to the loss in one step, d'Hd / 2, over the loss "
            "(second order of Taylor's formula along the step d)",
            low=-np.inf,
        ),
        entry(
            "overshoot",
            "run",
            f.own_run("overshoot"),
            ("overshoot",),
            "second over first order of the loss along the step, d'Hd / 2 over |g'd|:"
            " above 1 the quadratic model rises where the gradient says it falls",
            low=-np.inf,
        ),
        entry(
            "rate_growth",
            "run",
            f.rate_growth,
            ("learning_rate",),
            "learning rate over its first, median over components",
        ),
        entry(
            "averaging_to_run",
            "run",
            f.averaging_to_run,
            ("averaging_steps",),
            "steps that the longest average of gradients goes back, over the steps so far",
            low=0,
        ),
        entry(
            "at_the_end",
            "run",
            f.at_the_end,
            (),
            "1 at the last measurement of a run that has ended",
            low=0,
            high=1,
        ),
        # AutoTrainer's quantities (ICSE 2021); an epoch is a twentieth of the run
        entry(
            "first_gradient_norm",
            "run",
            f.first_gradient_norm,
            ("gradient_norm",),
            "gradient norm of the first kernel",
        ),
        entry(
            "first_gradient_ratio",
            "run",
            f.first_gradient_ratio,
            ("gradient_norm",),
            "gradient norm of the first kernel over that of the last",
        ),
        entry(
            "zero_gradient_share",
            "run",
            f.zero_gradient_share,
            ("zero_share",),
            "share of gradient entries that are exactly zero",
            low=0,
            high=1,
        ),
        entry(
            "accuracy_best",
            "run",
            f.accuracy_best,
            (),
            "best training accuracy of an epoch of the whole run",
            low=0,
            high=1,
        ),
        entry(
            "accuracy_best_gain",
            "run",
            f.accuracy_best_gain,
            (),
            "largest gain of training accuracy from one epoch to the next",
            low=-1,
            high=1,
        ),
        entry(
            "accuracy_swings",
            "run",
            f.accuracy_swings,
            (),
            "pairs of a local maximum and minimum of training accuracy at least 0.03 "
            "apart, per epoch",
            low=0,
            high=1,
        ),
        # components: what the program does with them
        entry(
            "trainable",
            "component",
            f.own("trainable"),
            ("trainable",),
            "share of elements that require a gradient",
            low=0,
            high=1,
        ),
        entry(
            "optimized",
            "component",
            f.own("optimized"),
            ("optimized",),
            "share of elements that an optimizer was given",
            low=0,
            high=1,
        ),
        entry(
            "ever_reached",
            "component",
            f.ever_reached,
            ("gradient_norm", "reached", "non_finite_gradient"),
            "1 once a gradient that is not zero was seen",
            low=0,
            high=1,
        ),
        entry(
            "in_graph",
            "component",
            f.in_graph,
            ("reached",),
            "1 once there was a gradient, be it zero: 0 where the loss does not depend on it",
            low=0,
            high=1,
        ),
        entry(
            "layer_in_graph",
            "component",
            f.layer_in_graph,
            ("reached",),
            "the same of any component of the layer that this one belongs to",
            low=0,
            high=1,
        ),
        entry(
            "had_rate",
            "component",
            f.had_rate,
            ("learning_rate",),
            "1 once the learning rate was above zero",
            low=0,
            high=1,
        ),
        entry(
            "moved",
            "component",
            f.moved,
            ("update_norm",),
            "1 once the parameters were seen to change",
            low=0,
            high=1,
        ),
        entry(
            "siblings_trainable",
            "component",
            f.siblings_of("trainable"),
            ("trainable",),
            "the same of the most trainable other component of this kind",
            low=0,
            high=1,
        ),
        entry(
            "frozen_prefix",
            "component",
            f.frozen_prefix,
            ("trainable",),
            "1 where this component and all before it in the model are frozen",
            low=0,
            high=1,
        ),
        entry(
            "learning_rate_to_quartile",
            "component",
            f.learning_rate_to_quartile,
            ("learning_rate",),
            "learning rate over the lower quartile of the components'",
        ),
        # components: gradients, weights, updates
        entry(
            "gradient_to_start",
            "component",
            f.gradient_to_start,
            ("gradient_norm",),
            "gradient norm (moving median of 3) over the median of its first three measurements",
        ),
        entry(
            "gradient_to_median",
            "component",
            f.gradient_to_median,
            ("gradient_norm",),
            "root mean square gradient (moving median of 3) over the median component's",
        ),
        entry(
            "gradient_cosine",
            "component",
            f.smoothed("gradient_cosine"),
            ("gradient_cosine",),
            "cosine between the gradients of neighbouring steps (moving median of 3)",
            low=-1,
            high=1,
        ),
        entry(
            "zero_share",
            "component",
            f.own("zero_share"),
            ("zero_share",),
            "share of gradient entries that are exactly zero",
            low=0,
            high=1,
        ),
        entry(
            "non_finite_gradient",
            "component",
            f.own("non_finite_gradient"),
            ("non_finite_gradient",),
            "number of gradient entries that are NaN or infinite",
        ),
        entry(
            "non_finite_weight",
            "component",
            f.own("non_finite_weight"),
            ("non_finite_weight",),
            "number of weights that are NaN or infinite",
        ),
        entry(
            "update_ratio",
            "component",
            f.update_ratio,
            ("update_ratio",),
            "update norm over weight norm (moving median of 3)",
        ),
        entry(
            "update_ratio_to_median",
            "component",
            f.update_ratio_to_median,
            ("update_ratio",),
            "update ratio over the median component's",
        ),
        entry(
            "adaptive_step",
            "component",
            f.adaptive_step,
            ("update_norm", "learning_rate", "moment_ratio"),
            "root mean square update over learning rate under an optimizer that divides by a "
            "second moment: 1 where all gradients agree; far below, epsilon is the denominator",
        ),
        entry(
            "weight_growth",
            "component",
            f.weight_growth,
            ("weight_norm",),
            "weight norm over its first value",
        ),
        entry(
            "initial_weight_scale",
            "component",
            f.initial("weight_scale"),
            ("weight_scale",),
            "root mean square weight times sqrt(fan-in) at the first measurement: "
            "0.58 for torch's Linear, 1 for LeCun, 1.4 for He",
        ),
        entry(
            "initial_weight_scale_to_median",
            "component",
            f.initial_weight_scale_to_median,
            ("weight_scale",),
            "the same over the median component's",
        ),
        entry(
            "moment_ratio",
            "component",
            f.own("moment_ratio"),
            ("moment_ratio",),
            "sqrt(mean(g^2/v)) under Adam: above 2.3 the second moment lags behind "
            "(Wortsman et al. 2023)",
        ),
        # components: curvature
        entry(
            "step_sharpness",
            "component",
            f.own("step_sharpness"),
            ("step_sharpness",),
            "learning rate times curvature along the component's update, over what "
            "stability allows",
            low=-np.inf,
        ),
        entry(
            "curvature_part",
            "component",
            f.curvature_part,
            ("update_curvature",),
            "the component's part of curvature along the step, |d_i'(Hd)_i| over the sum of all",
            low=0,
            high=1,
        ),
        entry(
            "component_curvature_share",
            "component",
            f.component_curvature_share,
            ("update_curvature",),
            "|d_i'(Hd)_i| / 2 over the loss",
        ),
        entry(
            "step_lambda",
            "component",
            f.own("step_lambda"),
            ("step_lambda",),
            "learning rate times the largest (preconditioned) eigenvalue, over what "
            "stability allows",
            low=-np.inf,
        ),
        entry(
            "negative_curvature_ratio",
            "component",
            f.negative_curvature_ratio,
            ("lambda_min", "lambda_max"),
            "-lambda_min over |lambda_max|",
            low=-np.inf,
        ),
        entry(
            "trace_z",
            "component",
            f.trace_z,
            ("trace",),
            "trace over its standard error",
            low=-np.inf,
        ),
        # components: what their weights multiply
        entry(
            "input_scale",
            "component",
            f.own("input_scale"),
            ("input_scale",),
            "root mean square of the activations that go in: 1 behind a norm",
        ),
        entry(
            "input_scale_to_start",
            "component",
            f.to_start("input_scale"),
            ("input_scale",),
            "the same over its first value",
        ),
        entry(
            "input_similarity",
            "component",
            f.own("input_similarity"),
            ("input_similarity",),
            "mean cosine of two rows that go in: 1 where all say the same (Dong et al. 2021)",
            low=-1,
            high=1.001,
        ),
        entry(
            "input_similarity_change",
            "component",
            f.change("input_similarity"),
            ("input_similarity",),
            "the same less its first value",
            low=-2.001,
            high=2.001,
        ),
        entry(
            "input_zero_share",
            "component",
            f.own("input_zero_share"),
            ("input_zero_share",),
            "share of exact zeros in what goes in",
            low=0,
            high=1,
        ),
        # attention layers
        entry(
            "attention_entropy",
            "component",
            f.own("attention_entropy"),
            ("attention_entropy",),
            "row entropy over the logarithm of the visible positions: 0 one-hot, 1 uniform",
            low=0,
            high=1.001,
        ),
        entry(
            "initial_attention_entropy",
            "component",
            f.initial("attention_entropy"),
            ("attention_entropy",),
            "the same at the first measurement",
            low=0,
            high=1.001,
        ),
        entry(
            "attention_entropy_change",
            "component",
            f.change("attention_entropy"),
            ("attention_entropy",),
            "attention entropy less its first value",
            low=-1.001,
            high=1.001,
        ),
        entry(
            "entropy_of_layer",
            "component",
            f.entropy_of_layer,
            ("attention_entropy",),
            "attention entropy of the layer that the component belongs to",
            low=0,
            high=1.001,
        ),
        entry(
            "attention_logit",
            "component",
            f.own("attention_logit"),
            ("attention_logit",),
            "largest absolute attention logit before the mask",
        ),
        entry(
            "attention_logit_growth",
            "component",
            f.to_start("attention_logit"),
            ("attention_logit",),
            "largest logit over its first value",
        ),
        entry(
            "empty_rows",
            "component",
            f.own("empty_rows"),
            ("empty_rows",),
            "share of attention rows that are NaN although their logits are finite: "
            "every position is masked",
            low=0,
            high=1,
        ),
        # pairs
        entry(
            "coupling_share",
            "pair",
            lambda s: s.pair("coupling_share"),
            ("coupling_share",),
            "d_i'H_ij d_j along the update over the sum of all |d_k'H_kl d_l|",
            low=-1,
            high=1,
        ),
        entry(
            "coupling_to_curvature",
            "pair",
            f.coupling_to_curvature,
            ("coupling_norm", "lambda_min", "lambda_max"),
            "Frobenius norm of the cross block over the geometric mean of both blocks' largest "
            "absolute eigenvalues",
        ),
        # what the program does, by checks
        entry(
            "initial_attention_scores",
            "component",
            f.initial("attention_scores"),
            ("attention_scores",),
            "root mean square of the scores, less their mean, at the first check",
        ),
        entry(
            "initial_attention_excess",
            "component",
            f.initial("attention_excess"),
            ("attention_excess",),
            "the same over what scaled scores of queries as large as the keys have",
        ),
        entry(
            "initial_head_similarity",
            "component",
            f.initial("head_similarity"),
            ("head_similarity",),
            "1 less the mean difference between the weights of the two heads most alike, at the "
            "first check",
        ),
        *(
            entry(
                quantity.name,
                quantity.scope,
                f.last_seen(quantity.name)
                if quantity.scope == "component"
                else f.last_seen_run(quantity.name),
                (quantity.name,),
                quantity.description,
                low=quantity.low,
                high=quantity.high,
            )
            for quantity in PROGRAM
        ),
        *PUBLISHED,
        *LOGGED,
    )
}
"""Name to feature and the function that computes it. A new feature is a new entry."""

CATALOGUE: Final[Mapping[str, Feature]] = {name: entry[0] for name, entry in FEATURES.items()}
