"""Checks of attention: what is summed over, how it is scaled, what it may look at."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diagnoser.checks.reading_attention import Attention
from diagnoser.checks.seen import Found, Seen
from diagnoser.checks.trace import Operation
from diagnoser.errors import MeasurementError

MOST = 1_048_576  # elements of weights that are looked at
EXACT = 1e-3
HIDDEN = 1e-6  # weight of a position that a mask hides


def _merged(rows: list[tuple[str, float]], worst: object = max) -> dict[str, float]:
    """Returns one number a component; of several attentions in it the worst."""
    merged: dict[str, float] = {}
    for name, value in rows:
        if math.isnan(value):
            continue
        merged[name] = worst(merged[name], value) if name in merged else value  # type: ignore[operator]
    return merged


def _some(weights: Tensor) -> Tensor:
    keep = max(1, MOST // max(1, weights.shape[-1] * weights.shape[-2]))
    return weights[:keep].float()


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
        weights = _some(attention.weights)
        found.place("attention", attention.place or seen.main.place, name)
        by_feature.append((name, float(attention.by_feature)))
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
        )
        axis.append((name, float(elsewhere)))
    for quantity, rows in (
        ("attention_sum_error", error), ("attention_other_axis", axis),
        ("attention_after_softmax", scaled), ("attention_mask_after", mask),
        ("attention_by_feature", by_feature),
    ):  # fmt: skip
        for name, value in _merged(rows).items():
            found.component(quantity, name, value)


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
            part = _some(raw)
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
    for quantity, rows in (
        ("attention_scale", plain), ("attention_scale_normalised", normalised),
        ("attention_scores", scores), ("attention_excess", excess),
    ):  # fmt: skip
        far: dict[str, float] = {}
        for name, value in rows:
            if name not in far or abs(math.log(max(value, 1e-9))) > abs(
                math.log(max(far[name], 1e-9))
            ):
                far[name] = value
        for name, value in far.items():
            found.component(quantity, name, value)


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
    size = float(scores.inputs[sides[1]].float().square().mean().sqrt())
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


# -- masks -----------------------------------------------------------------------------------------


def _keys(seen: Seen, attention: Attention) -> tuple[Tensor, Tensor] | None:
    """Weights (batch, heads, queries, keys), and which keys are padding, (batch, keys)."""
    padding = seen.padding
    n, _, keys = attention.weights.shape
    if keys != padding.shape[1] or n % len(padding):
        fewer = min(len(padding), 16)  # of a fused attention only some samples are looked at
        if keys != padding.shape[1] or n % fewer or n // fewer > 64 or n >= len(padding):
            return None
        padding = padding[:fewer]
    return attention.weights.reshape(len(padding), -1, *attention.weights.shape[1:]), padding


def padding_mask(seen: Seen, found: Found) -> None:
    """Finds attention that looks at padding, at nothing else, or that hides padded queries instead.

    Over queries that are no padding: ``padding_weight``, the share of attention on padded keys
    over their share of the keys (1: nothing is hidden, 0: all is). ``content_weight``: the share on
    keys that are no padding, of rows that have both (0: the mask is inverted).
    ``padded_query_hidden``: 1 where the rows of padded queries are hidden as a whole, while padded
    keys are not. Only where the batch holds padding.

    Source: InseeFrLab/torchTextClassifiers#92, hyunwoongko/transformer#40, DEFault++ MIM and MMP.
    Cannot see: padding that is no token of its own, or is cut away before attention.
    Costs: nothing beyond the trace.
    """
    even, content, queries = [], [], []
    for name, attention in seen.attentions:
        both = _keys(seen, attention)
        if both is None:
            continue
        weights, padding = both
        total = weights.sum(-1, keepdim=True)
        weights = weights / total
        own = padding[:, None, None, :]
        on_padding = (weights * own).sum(-1)  # (batch, heads, queries)
        share = padding.float().mean(1)[:, None, None]
        rows = (share > 0) & (share < 1) & torch.isfinite(on_padding)
        if attention.weights.shape[-2] == padding.shape[1]:
            rows = rows & ~padding[:, None, :]
        rows = rows.expand_as(on_padding)
        if not bool(rows.any()):
            continue
        value = float(on_padding[rows].mean())
        expected = float(share.expand_as(on_padding)[rows].mean())
        even.append((name, value / expected))
        content.append((name, 1.0 - value))
        if attention.weights.shape[-2] == padding.shape[1] and attention.logits is not None:
            logits = attention.logits.reshape(weights.shape)
            low = (logits <= logits.amax() - 1e3).all(-1) | ~torch.isfinite(logits).any(-1)
            flat = (logits.amax(-1) - logits.amin(-1)) < EXACT
            hidden = low | (flat & (logits.amax(-1) < -1e3))
            padded = padding[:, None, :].expand_as(hidden)
            apart = float(hidden[padded].float().mean()) - float(hidden[~padded].float().mean())
            queries.append((name, float(apart > 0.5 and value > HIDDEN)))
    if not even:
        raise MeasurementError("no attention is over the positions of the padded input")
    for quantity, numbers in (
        ("padding_weight", even), ("content_weight", content), ("padded_query_hidden", queries),
    ):  # fmt: skip
        worst = min if quantity == "content_weight" else max
        for name, value in _merged(numbers, worst).items():
            found.component(quantity, name, value)


def mask_value(seen: Seen, found: Found) -> None:
    """Finds masks that do not hide, and rows in which everything is hidden.

    ``masked_rows``: share of rows all of whose positions are hidden. ``mask_leak``: the largest
    weight on a hidden position of other rows: the value that should hide it is too small for the
    scores. ``mask_margin``: by how much scores are lowered, over the spread
    of the scores (from the highest to the lowest): below 2 they can outgrow it.

    Source: karpathy/minGPT#75, pytorch/pytorch#41508.
    Cannot see: masks that are multiplied into the scores.
    Costs: nothing beyond the trace.
    """
    rows, leak, margin = [], [], []
    for name, attention in seen.attentions:
        logits, raw, hidden = attention.logits, attention.raw, attention.hidden
        if hidden is None or logits is None or raw is None or raw.shape != logits.shape:
            continue
        hidden = hidden[: len(_some(raw))]
        rows.append((name, float(hidden.all(-1).float().mean())))
        some = hidden & ~hidden.all(-1, keepdim=True)
        if not bool(some.any()):
            continue
        leak.append((name, float(torch.nan_to_num(_some(attention.weights))[some].max())))
        scores = _some(raw)
        drop = (scores - _some(logits))[some]
        drop = drop[torch.isfinite(drop)]
        if len(drop):
            spread = float(scores.max() - scores.min())
            margin.append((name, float(drop.min()) / max(spread, 1e-6)))
    for quantity, numbers, worst in (
        ("masked_rows", rows, max), ("mask_leak", leak, max), ("mask_margin", margin, min),
    ):  # fmt: skip
        for name, value in _merged(numbers, worst).items():
            found.component(quantity, name, value)


def causality(seen: Seen, found: Found) -> None:
    """Finds attention that sees the future of what it is to predict, or needlessly does not.

    ``future_weight``: share of attention on later positions, in self-attention over inputs that are
    the loss's next targets. ``needless_causal``: 1 where no later position is ever seen although a
    sample has a single target, which is read from a mean over positions or from the first of them.

    Source: huggingface/transformers#48745, xformers#103, DEFault++ VEC.
    Cannot see: targets that are not recognised as next inputs (integers of the input's length).
    Costs: nothing beyond the trace.
    """
    lengths = next_input_lengths(seen)
    one_each = any(
        loss.target is not None and loss.target.ndim and loss.target.shape[0] == seen.batch
        and (loss.target.ndim == 1 or loss.target.numel() == seen.batch)
        for loss in seen.losses
    )  # fmt: skip
    if not lengths and not one_each:
        raise MeasurementError("what the loss compares with has no order that is known")
    for name, attention in seen.attentions:
        if not attention.is_self:
            continue
        weights = torch.nan_to_num(_some(attention.weights))
        length = weights.shape[-1]
        later = weights.triu(1).sum(-1)[:, :-1]
        if length in lengths:
            found.component("future_weight", name, float(later.mean()))
        elif one_each and not lengths and length > 2:
            hidden = float(later.max()) < HIDDEN and _pools(seen, attention, length)
            found.component("needless_causal", name, float(hidden))


def _pools(seen: Seen, attention: Attention, length: int) -> bool:
    """Whether the mean over positions, or the first position, is what is made of an attention."""
    for operation in _descendants(seen, attention, 400):
        shape = operation.inputs[0].shape if operation.inputs else ()
        if operation.name in ("mean", "sum", "amax", "max") and length in shape[:-1]:
            return True
        if operation.name == "select" and len(operation.args) > 2:
            _, axis, index = operation.args[:3]
            if shape[axis] == length and index == 0:
                return True
    return False


def next_input_lengths(seen: Seen) -> set[int]:
    """Returns the lengths of the integer inputs whose next entries the loss compares with."""
    lengths: set[int] = set()
    for tensor in seen.token_inputs:
        for tokens in (
            tensor.reshape(-1, tensor.shape[-1]),
            tensor.reshape(-1, tensor.shape[-1]).t(),
        ):
            later = tokens[:, 1:]
            for loss in seen.losses:
                target = loss.target
                if target is None or target.is_floating_point():
                    continue
                flat = target.reshape(-1)
                if flat.numel() == tokens.numel():
                    flat = flat.reshape(tokens.shape)[:, :-1]
                if flat.numel() == later.numel() and _same(
                    flat.reshape(later.shape), later, loss.ignored
                ):
                    lengths.add(tokens.shape[1])
    return lengths


def _same(target: Tensor, later: Tensor, ignored: int | None) -> bool:
    counted = (
        target != ignored if ignored is not None else torch.ones_like(target, dtype=torch.bool)
    )
    if int(counted.sum()) < 8:
        return False
    return float((target == later)[counted].float().mean()) > 0.9


# -- wiring ----------------------------------------------------------------------------------------


def sources(seen: Seen, found: Found) -> None:
    """Finds queries that are keys, keys and values of different origin, and heads that are alike.

    ``same_query_key``: 1 where queries and keys are the same numbers. ``key_value_apart``: 1 where
    the model's inputs that keys depend on are none of those that values depend on.
    ``head_similarity``: 1 less the largest difference between the weights of the two most similar
    heads, averaged over rows: 1 for heads that are the same.

    Source: DEFault++ QTH and its wiring operators; gordonhu608/MQT-LLaVA#4.
    Cannot see: tied weights that are followed by different biases or norms.
    Costs: nothing beyond the trace.
    """
    same, apart, heads = [], [], []
    for name, attention in seen.attentions:
        scores, sides = attention.scores, attention.sides
        if scores and sides and attention.width > 1 and attention.is_product:
            query, key = (scores.inputs[side] for side in sides)
            if attention.softmax is not scores:
                key = key.transpose(-2, -1) if key.ndim > 1 else key
            same.append((name, float(_proportional(query, key))))
            keys, values = _origin(seen, attention)
            if keys and values:
                apart.append((name, float(not keys & values)))
        n = attention.weights.shape[0]
        count = n // seen.batch if n % seen.batch == 0 else 1
        if 1 < count <= 64 and attention.weights.shape[-1] > 2:
            weights = attention.weights.reshape(-1, count, *attention.weights.shape[1:])[:8].float()
            by_head = weights.transpose(0, 1).reshape(count, -1)
            rows = weights.shape[0] * weights.shape[2]
            distance = torch.cdist(by_head, by_head, p=1) / (2 * rows)
            distance.fill_diagonal_(math.inf)
            heads.append((name, 1.0 - float(distance.min())))
    for quantity, numbers in (
        ("same_query_key", same), ("key_value_apart", apart), ("head_similarity", heads),
    ):  # fmt: skip
        for name, value in _merged(numbers).items():
            found.component(quantity, name, value)


def _proportional(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.numel() < 4:
        return False
    a, b = a.float().reshape(-1), b.float().reshape(-1)
    size = float(a.norm() * b.norm())
    return size > 0 and float(a @ b) / size > 1 - 1e-5


def _origin(seen: Seen, attention: Attention) -> tuple[set[int], set[int]]:
    """The inputs of the model that keys and values depend on."""
    trace, scores, sides = seen.trace, attention.scores, attention.sides
    assert scores is not None
    assert sides is not None
    given = seen.given
    key = trace.leaves(trace.producer(scores, sides[1])) & given
    if attention.product is scores:
        return key, trace.leaves(trace.producer(scores, 2)) & given
    values: set[int] = set()
    for position in range(len(attention.product.inputs)):
        behind = trace.producer(attention.product, position)
        if behind is not None and all(
            o.index != attention.softmax.index for o in trace.ancestors(behind)
        ):
            values |= trace.leaves(behind) & given
    return key, values


def head_layout(seen: Seen, found: Found) -> None:
    """Finds heads that are cut out of rows by a change of shape alone, which mixes positions.

    ``scrambled_heads``: 1 where a change of shape between (batch, length, width) and
    (batch, heads, length, width / heads) before or after an attention would need a transpose.

    Source: jsbaan/transformer-from-scratch#6, hackiey/QAnet-pytorch#2.
    Cannot see: as many heads as positions (the shapes are the same then), or cuts behind a flatten.
    Costs: nothing beyond the trace.
    """
    scrambled = []
    for name, attention in seen.attentions:
        near: list[Operation] = list(seen.trace.ancestors(attention.scores, 60))
        near += _descendants(seen, attention, 12)
        cuts = [_mixes_positions(o) for o in near if o.name in ("view", "_unsafe_view", "reshape")]
        scrambled.append((name, float(any(cuts))))
    for name, value in _merged(scrambled).items():
        found.component("scrambled_heads", name, value)


def _mixes_positions(operation: Operation) -> bool:
    before, after = operation.inputs[0].shape, operation.result.shape
    if len(before) == 4 and len(after) == 3:
        before, after = after, before  # joined again: the same, backwards
    if len(before) != 3 or len(after) != 4:
        return False
    heads, length = after[1], after[2]
    is_cut = after[0] == before[0] and length == before[1] and heads * after[3] == before[2]
    return bool(is_cut and 1 < heads != length > 1)


def _descendants(seen: Seen, attention: Attention, most: int) -> list[Operation]:
    queue = [attention.product]
    known = {attention.product.index}
    for operation in queue:
        if len(queue) > most:
            break
        for consumer in seen.trace.consumers(operation):
            if consumer.index not in known:
                known.add(consumer.index)
                queue.append(consumer)
    return queue
