"""Checks of attention: what is summed over, how it is scaled, in which precision."""

from __future__ import annotations

import math

import torch

from diagnoser.checks.reading_attention import SOFTMAXES, Attention, some
from diagnoser.checks.seen import Found, Seen

EXACT = 1e-3
HIDDEN = 1e-6  # weight of a position that a mask hides


def softmax_axis(seen: Seen, found: Found) -> None:
    """Finds attention weights that sum to one over another axis than the one they are summed over.

    ``attention_sum_error``: how far the weights of a query are from summing to one, on average.
    ``attention_other_axis``: 1 where they do so over another axis (the queries, the heads, the
    batch). ``attention_after_softmax``: 1 where all rows sum to one and the same other number: a
    scale behind the softmax. ``attention_by_feature``: 1 where every feature of the values has
    weights of its own. ``attention_mask_after``: 1 where a mask is applied behind it, so that
    rows with hidden positions sum to less.

    Source: NeuraLint's and DEFault++'s operators; PetrochukM/PyTorch-NLP#2.
    Cannot see: a softmax without a product with values behind it; linear attention has no softmax.
    Costs: nothing beyond the trace.
    """
    error, axis, scaled, mask = [], [], [], []
    by_feature = []
    for name, attention in seen.attentions:
        weights = some(attention.weights)
        found.place("attention", attention.place or seen.main.place, name)
        by_feature.append((name, float(attention.by_feature)))
        if {"mix", "dropout"} & {*attention.after}:
            continue  # learned mixtures of heads sum to what was learned, noise to anything
        if "mask" in attention.after and bool(torch.isneginf(weights).any()):
            mask.append((name, 1.0))  # a fill of minus infinity belongs before the softmax
            continue
        total = weights.sum(-1)
        known = torch.isfinite(total) & (total > HIDDEN)
        if not bool(known.any()):
            continue
        off = (total[known] - 1).abs()
        error.append((name, float(off.mean())))
        spread = float(total[known].max() - total[known].min())
        is_scaled = float(off.mean()) > EXACT and "scale" in attention.after
        scaled.append((name, float(is_scaled)))
        masks = "mask" in attention.after and float(off.mean()) > EXACT and not is_scaled
        mask.append((name, float(masks)))
        elsewhere = (
            float(off.mean()) > 10 * EXACT and not is_scaled and not masks and spread > 10 * EXACT
        ) and _is_whole(attention)
        axis.append((name, float(elsewhere)))
    found.components("attention_sum_error", error)
    found.components("attention_other_axis", axis)
    found.components("attention_after_softmax", scaled)
    found.components("attention_mask_after", mask)
    found.components("attention_by_feature", by_feature)


def _is_whole(attention: Attention) -> bool:
    """Whether a softmax is of all that is weighted, and of nothing else.

    An extra logit takes a share of a row on purpose, within the softmax (softmax-off-by-one) or as
    a column that is cut off behind it (attention sinks).
    """
    softmax = attention.softmax
    if softmax.result.numel() != attention.weights.numel():
        return False
    result = softmax.result.float()
    return softmax.name in SOFTMAXES or any(
        bool(((result.sum(axis) - 1).abs() < EXACT).all()) for axis in range(result.ndim)
    )


def attention_scale(seen: Seen, found: Found) -> None:
    """Finds scores that are scaled by another number than one over the root of their width.

    ``attention_scale``: the plain numbers between projections and softmax, times the root of the
    width of a query: 1 as Vaswani et al. 2017 have it. Not measured where queries or keys are
    normalised, the scale is learned, or keys are the values themselves (Luong et al. 2015 do not
    scale). ``attention_scale_normalised``: the same where they are
    normalised. ``attention_scores``: root mean square of the scores before the softmax, less their
    mean over the keys. ``attention_excess``: the same over what it is where queries are as large as
    keys, independent of them, and scaled: their mean square. It is 1 where smaller queries make up
    for a scale that is missing (T5).

    Source: cases of a forgotten, doubled or wrong scale (mlc-llm#3426, maxtext#1349).
    Cannot see: a scale folded into weights at initialisation, except by `attention_scores`.
    Costs: nothing beyond the trace.
    """
    plain: list[tuple[str, float]] = []
    excess: list[tuple[str, float]] = []
    normalised: list[tuple[str, float]] = []
    scores: list[tuple[str, float]] = []
    for name, attention in seen.attentions:
        if attention.scores is None:
            continue
        raw = attention.raw if attention.raw is not None else attention.logits
        if raw is not None:
            part = some(raw)
            part = part[torch.isfinite(part).all(-1)]
            if len(part):
                centred = part - part.mean(-1, keepdim=True)
                scores.append((name, float(centred.square().mean().sqrt())))
                excess.append((name, scores[-1][1] / _size_of_keys(attention) ** 2))
        if attention.width < 2 or attention.learned_scale or _keys_are_values(attention):
            continue
        if not attention.key_parameters or not attention.is_product:
            continue
        ratio = attention.scale * math.sqrt(attention.width)
        (normalised if attention.normalised else plain).append((name, ratio))
    found.components("attention_scale", plain, _farther)
    found.components("attention_scale_normalised", normalised, _farther)
    found.components("attention_scores", scores, _farther)
    found.components("attention_excess", excess, _farther)


def _farther(one: float, other: float) -> float:
    """Returns which of two factors is farther from 1, up or down."""
    return max(one, other, key=lambda value: abs(math.log(max(value, 1e-9))))


def score_precision(seen: Seen, found: Found) -> None:
    """Finds a softmax of scores in half precision, in a model of another type.

    ``half_scores``: 1 where scores are float16 although the attention's parameters are not: they
    overflow at 65,504, and lose what tells close scores apart.

    Source: lucidrains/imagen-pytorch#69, NVIDIA/apex#1105.
    Cannot see: autocast, whose replay is not in half precision; models that are half as a whole.
    Costs: nothing beyond the trace.
    """
    for name, attention in seen.attentions:
        scores = attention.softmax.inputs[0].dtype
        own = {p.dtype for p in (*attention.parameters, *attention.value_parameters)}
        if own:
            found.component("half_scores", name, scores == torch.float16 and scores not in own)


def _size_of_keys(attention: Attention) -> float:
    """Root mean square of the keys' elements; NaN where they were not seen or are zero."""
    scores, sides = attention.scores, attention.sides
    if scores is None or sides is None:
        return math.nan
    size = float(scores.inputs[sides[1]].detach().float().square().mean().sqrt())
    return size if size > 0 else math.nan


def _keys_are_values(attention: Attention) -> bool:
    scores, sides, values = attention.scores, attention.sides, attention.values
    if scores is None or sides is None or values is None:
        return False
    keys = scores.inputs[sides[1]]
    if keys.numel() != values.numel() or scores is attention.softmax:
        return False
    return any(
        form.shape == values.shape and torch.equal(form, values)
        for form in (keys, keys.transpose(-2, -1) if keys.ndim > 1 else keys)
    )
