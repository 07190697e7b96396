"""The closed vocabularies: faults, causes, severities, verdicts, component kinds, quantities.

Every rule, finding, report and test uses exactly these spellings. A *fault* says what the
measurements show; a *cause* says what somebody must change; they are never mixed in one list.
"""

from __future__ import annotations

from typing import Final

FAULTS: Final[dict[str, str]] = {
    "concave_region": "negative curvature beyond the healthy range while the loss does not fall",
    "coupled_components": "two components coupled beyond the healthy range of their kinds",
    "cascading_instability": "a disturbance that spreads along coupled components, in order",
    "sharpness_instability": "the step size is larger than the curvature allows",
    "vanishing_gradient": "gradients fade on their way to the first layers",
    "exploding_gradient": "gradients grow on their way to the first layers",
    "dying_relu": "most gradient entries are exactly zero",
    "oscillating_loss": "the training metric swings instead of settling",
    "slow_convergence": "training hardly moves and the result stays poor",
    "attention_entropy_collapse": "attention is too sharp to learn from",
    "attention_logit_growth": "attention logits are, or grow, out of bounds",
    "uniform_attention": "attention does not discriminate",
    "dead_component": "a component that is meant to learn never moves",
    "non_finite": "NaN or Inf in loss, gradients, activations or weights",
    "target_leak": "training loss better than the task allows; evaluation does not follow",
    "overfitting": "training improves while evaluation gets worse",
    "program_defect": "the program does something no author would want",
}

CAUSES: Final[dict[str, tuple[str, ...]]] = {
    "optimisation": (
        "learning_rate_too_high",
        "learning_rate_too_low",
        "missing_warmup",
        "optimizer_misconfigured",
        "missing_zero_grad",
        "gradient_clipping",
        "excessive_weight_decay",
        "component_not_optimized",
        "insufficient_training",
    ),
    "attention": (
        "attention_scale",
        "attention_mask",
        "softmax_axis",
        "positional_encoding",
        "attention_wiring",
    ),
    "model": (
        "initialization",
        "normalization",
        "residual",
        "activation_function",
        "perturbed_parameters",
    ),
    "objective": ("loss_function",),
    "data": ("label_noise", "input_scaling", "data_order"),
    "execution": ("train_eval_mode", "numeric_precision"),
}

CAUSE_CATEGORY: Final[dict[str, str]] = {
    cause: category for category, causes in CAUSES.items() for cause in causes
}

SEVERITIES: Final[tuple[str, ...]] = ("low", "medium", "high", "critical")
VERDICTS: Final[tuple[str, ...]] = ("healthy", "faulty", "inconclusive")
STATUSES: Final[tuple[str, ...]] = ("experimental", "test", "stable")
SCOPES: Final[tuple[str, ...]] = ("run", "component", "pair")

MODEL: Final = "model"  # the name of the whole model wherever a component is named

KINDS: Final[tuple[str, ...]] = (
    "query",
    "key",
    "value",
    "attention_output",
    "attention_projection",  # additive attention: the hidden projection (HAN)
    "attention_context",  # additive attention: the context vector (HAN)
    "recurrent",
    "feed_forward",
    "convolution",
    "embedding",
    "norm",
    "head",
    "other",
)

REPAIRS: Final[dict[str, str]] = {
    "scale_learning_rate": "multiply the learning rate",
    "clip_gradient": "clip the gradient norm",
    "add_warmup": "raise the learning rate gradually over the first steps",
    "change_betas": "change the optimizer's averaging factors or its epsilon",
    "reset_optimizer_state": "clear the optimizer's running averages",
    "reinitialize": "draw the component's weights anew",
    "temper_attention": "scale the attention logits down",
    "register_parameters": "give the parameters to the optimizer",
    "unfreeze": "let the parameters be trained",
    "roll_back": "go back to the last healthy state",
    "zero_gradients": "call optimizer.zero_grad() before every backward",
    "remove_softmax": "pass logits, not probabilities, to the loss",
    "fix_attention_mask": "leave at least one position visible in every row of the mask",
    "change_activation": "use another activation function",
    "add_normalization": "add normalisation layers",
    "change_optimizer": "use another optimizer",
    "change_batch_size": "use another batch size",
    "fix_softmax": "take the softmax over the keys",
    "fix_attention_scale": "divide the scores once by the root of the head's width",
    "fix_attention_wiring": "take queries, keys and values from where they belong",
    "add_positions": "add positions to what attention is given",
    "add_residual": "add the input of a block to its output",
    "set_mode": "call train() before training and eval() before evaluating",
    "fix_loss_inputs": "give the loss what it expects",
    "shift_labels": "compare with the next input",
    "ignore_padding": "leave padding out of the loss",
    "detach_target": "detach the target",
    "scale_inputs": "scale inputs or targets to unit variance",
    "shuffle_batches": "draw batches at random",
    "fix_schedule": "advance the schedule after the optimizer, over the steps of the run",
    "unscale_first": "unscale gradients before they are clipped",
    "untie": "give each module weights of its own",
}

PLACES: Final[dict[str, str]] = {
    "optimizer": "where the optimizer is built",
    "backward": "where backward is called",
    "loss": "where the loss is computed",
    "attention": "where attention weights are computed",
    "model": "where the model is called",
    "clip": "where gradients are clipped",
    "scheduler": "where the learning rate schedule is advanced",
    "evaluation": "where the model is evaluated",
    "dropout": "where elements are dropped",
}


STOPPED: Final = "stopped"  # a fact of a run that was ended before its time, by us
UNKNOWN: Final = "unknown"  # a fact that says why a feature, named as its component, is not known


def severity_rank(severity: str) -> int:
    """Returns the position of a severity, higher is worse.

    >>> severity_rank("critical") > severity_rank("medium") > severity_rank("low")
    True
    """
    return SEVERITIES.index(severity)
