"""What program checks measure, as features: the last that was seen of each.

A check looks at few steps, and what a program does seldom changes, so each feature keeps its value
until it is measured again. `diagnoser.checks` says how each is computed and what it cannot see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from diagnoser.table import Scope


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number of a check, and the range it lies in."""

    name: str
    scope: Scope
    description: str
    high: float = np.inf
    low: float = 0.0


PROGRAM: Final[tuple[Quantity, ...]] = (
    # attention
    Quantity("attention_sum_error", "component",
             "how far the attention weights of a query are from summing to one, on average"),
    Quantity("attention_other_axis", "component",
             "1 where attention weights are summed over an axis that their softmax is not over", 1),
    Quantity("attention_after_softmax", "component",
             "1 where attention weights are scaled after their softmax", 1),
    Quantity("attention_mask_after", "component",
             "1 where a mask is applied after the softmax", 1),
    Quantity("attention_by_feature", "component",
             "1 where every feature of the values has attention weights of its own", 1),
    Quantity("attention_scale", "component",
             "scale of the scores times the root of the width of a query: 1 as it should be"),
    Quantity("attention_scale_normalised", "component",
             "the same where queries or keys are normalised before their product"),
    Quantity("attention_scores", "component",
             "root mean square of the scores before the softmax, less their mean over the keys"),
    Quantity("attention_excess", "component",
             "the same over the mean square of the keys: 1 where queries are as large as keys and "
             "scores are scaled"),
    Quantity("padding_weight", "component",
             "share of attention on padded keys over their share of all keys: 0 where a mask "
             "hides them, 1 where nothing does"),
    Quantity("content_weight", "component",
             "share of attention on keys that are no padding: 0 where a mask is inverted", 1.001,
             -0.001),
    Quantity("padded_query_hidden", "component",
             "1 where a mask hides padded queries and not padded keys", 1),
    Quantity("masked_rows", "component",
             "share of queries all of whose keys are masked", 1),
    Quantity("mask_leak", "component",
             "largest attention weight on a position that a mask should hide", 1.001),
    Quantity("mask_margin", "component",
             "how far a mask lowers scores, over the spread of the scores"),
    Quantity("future_weight", "component",
             "share of attention on later positions, where the loss compares with the next inputs",
             1.001),
    Quantity("needless_causal", "component",
             "1 where no later position is seen although a sample has one target, which is read "
             "from all positions", 1),
    Quantity("first_sees_itself", "component",
             "1 where no later position is seen although a sample has one target, which is read "
             "from the first", 1),
    Quantity("same_query_key", "component", "1 where queries and keys are the same numbers", 1),
    Quantity("key_value_apart", "component",
             "1 where keys depend on other inputs of the model than values do", 1),
    Quantity("head_similarity", "component",
             "1 less the mean difference between the weights of the two heads most alike", 1.001),
    Quantity("scrambled_heads", "component",
             "1 where heads are cut or joined without a transpose, which mixes positions", 1),
    Quantity("half_scores", "component",
             "1 where the softmax is taken of half-precision scores in a model of another type", 1),
    Quantity("zero_scores", "component", "1 where queries and keys are both exactly zero", 1),
    # structure
    Quantity("norm_missing", "component",
             "1 where this layer has fewer norms than the others of its list", 1),
    Quantity("norms_absent", "component",
             "1 where nothing is normalised between any attention and the next", 1),
    Quantity("residual_missing", "component",
             "1 where the input of an attention does not go around it, as others' do", 1),
    Quantity("added_to_itself", "component",
             "1 where the result of an attention is added to itself", 1),
    Quantity("attention_unused", "component",
             "1 where nothing that the model gives depends on an attention", 1),
    Quantity("widened_in_vain", "component",
             "1 where a layer widens what the next one narrows, with nothing but sums between", 1),
    Quantity("residuals_absent", "component",
             "1 where the input of no attention goes around it", 1),
    Quantity("residual_normalised", "component",
             "1 where residuals come out of norms although the last sum is not normalised", 1),
    Quantity("updated_stream", "component",
             "1 where keys come out of an attention with the same weights that queries do not", 1),
    Quantity("tied_elsewhere", "component",
             "1 where a matrix is also that of another module, embeddings apart", 1),
    Quantity("twin_units", "component",
             "share of a matrix's rows that equal another of its rows at the first step", 1),
    Quantity("activation_growth", "run",
             "size of what the last of three and more equal blocks gives over the first's, at the "
             "first step"),
    Quantity("saturated_share", "run",
             "share of the results of the most saturated sigmoid or tanh near its ends", 1),
    Quantity("output_normalised", "run", "1 where the model ends in a softmax or a sigmoid", 1),
    # probes
    Quantity("sample_leak", "run",
             "change of other samples' outputs when one sample is replaced, over its own"),
    Quantity("sample_leak_begins", "component",
             "the same, of the attention behind which other samples are first seen to change"),
    Quantity("input_influence", "run",
             "change of a sample's output when it is replaced, over the spread of all outputs"),
    Quantity("position_share", "run",
             "spread of self-attention's inputs over positions when all hold the same content, "
             "over their usual spread: 0 where nothing tells positions apart"),
    Quantity("positions_unused", "run",
             "1 where nothing tells positions apart although the model has something named after "
             "them", 1),
    Quantity("padding_influence", "run",
             "change of the outputs when the content of the padding is replaced, over their "
             "spread"),
    Quantity("future_influence", "run",
             "change of early outputs when later inputs are replaced, over that of late ones"),
    Quantity("overfit_fall", "run",
             "share of the loss of one batch that a copy loses when it is trained on it alone", 1,
             -np.inf),
    # objective and data
    Quantity("not_log_probabilities", "run",
             "share of rows given to a negative log-likelihood that are no log-probabilities", 1),
    Quantity("target_gradient", "run", "1 where gradients flow into the target of a loss", 1),
    Quantity("label_classes", "run", "number of different labels seen so far"),
    Quantity("batch_label_entropy", "run",
             "entropy of the labels of a batch over that of all labels seen: about 1 where "
             "batches are drawn at random"),
    Quantity("target_shift", "run",
             "by how many positions the targets are ahead of the inputs that they are", low=-2),
    Quantity("labels_in_input", "run",
             "share of the targets that equal the input of the same position", 1),
    Quantity("padded_target_share", "run",
             "share of the counted targets that lie on padding of the input", 1),
    Quantity("targets_outside", "run",
             "share of the targets of a binary cross-entropy outside 0 to 1", 1),
    Quantity("smoothed_padding", "run",
             "mean probability that target distributions give to the padding", 1),
    Quantity("target_scale", "run",
             "larger of absolute mean and standard deviation of the targets of a regression"),
    Quantity("loss_broadcast", "run",
             "1 where a regression compares each prediction with several targets", 1),
    Quantity("target_constant", "run", "1 where all targets of a regression are the same", 1),
    Quantity("input_largest", "run", "largest absolute value of the model's float inputs"),
    Quantity("weighed_input_largest", "run",
             "largest absolute value of a float input that weights multiply as it is"),
    Quantity("input_non_finite", "run", "share of the float inputs that are NaN or infinite", 1),
    Quantity("same_samples", "run", "share of a batch's samples that equal the first one", 1),
    Quantity("same_batches", "run", "share of the checked batches that were seen before", 1),
    Quantity("label_smoothing", "run", "largest label smoothing of a classification loss", 1),
    Quantity("ignored_classes", "run",
             "share of the samples whose label is a class that the loss ignores", 1),
    Quantity("weighted_imbalance", "run",
             "largest share of the labels that a class has with its weight, less the largest "
             "without", 1, -1),
    Quantity("classes_scrambled", "run",
             "1 where scores came into the shape of a loss by a view instead of a transpose", 1),
    Quantity("scores_cut", "run",
             "share of the scores of a cross-entropy that are exactly zero where none is below", 1),
    Quantity("loss_climbed", "run",
             "1 where the optimizer goes up a loss that is to be made smaller", 1),
    Quantity("padding_index_content", "run",
             "share of the tokens that an embedding takes for padding and that are none", 1),
    # modes
    Quantity("dropout_in_eval", "run", "how many dropouts a forward makes in eval mode"),
    Quantity("trained_in_eval", "run", "1 where the model is trained in eval mode", 1),
    Quantity("scored_in_training", "run", "share of evaluations that ran in train mode", 1),
    Quantity("recomputed_otherwise", "run",
             "1 where what checkpoints compute again has other random numbers", 1),
    Quantity("dropout_largest", "run", "largest probability of a dropout", 1),
    Quantity("batch_norm_momentum", "run",
             "largest momentum of a batch norm: 1 where its statistics follow one batch"),
    # optimisation
    Quantity("times_optimized", "component",
             "how many places of how many optimizers hold a component's parameters"),
    Quantity("decay_to_step", "component",
             "how far weight decay moves weights in a step, over the optimizer's largest usual "
             "step"),
    Quantity("averaging_steps", "run",
             "steps that the longest first average of an optimizer goes back"),
    Quantity("decayed_vectors", "run",
             "share of norms' and biases' elements that decay by 0.1 and more", 1),
    Quantity("clip_ratio", "run", "median total gradient norm over the limit it is clipped to"),
    Quantity("clipped_share", "run", "share of clippings that had an effect", 1),
    Quantity("clipped_late", "run",
             "share of clippings with no backward between the last step and them", 1),
    Quantity("clipped_scaled", "run",
             "share of clippings of gradients that a scaler had not unscaled", 1),
    Quantity("skipped_for_good", "run",
             "1 where a gradient scaler skips a step although its scale is at most 1", 1),
    Quantity("cleared_gradients", "run",
             "1 where all gradients of a backward are gone or zero when the optimizer steps", 1),
    Quantity("lost_updates", "component",
             "share of half-precision elements with a gradient that a step leaves as they were", 1),
    Quantity("schedule_length", "run",
             "how often the length of a cosine schedule was gone through"),
    Quantity("scheduler_first", "run",
             "1 where a schedule was advanced before the optimizer had made a step", 1),
)  # fmt: skip
NAMES: Final = frozenset(quantity.name for quantity in PROGRAM)
# Of these, what is measured on every sample and not on checked steps alone.
NOTED: Final = frozenset({
    "clip_ratio", "clipped_share", "clipped_scaled", "clipped_late", "cleared_gradients",
    "skipped_for_good", "scheduler_first", "schedule_length", "lost_updates", "scored_in_training",
    "label_classes", "batch_label_entropy",
})  # fmt: skip
