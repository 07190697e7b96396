"""Checks of where queries, keys and values come from, and how heads are cut."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diagnoser.checks.reading_attention import Attention
from diagnoser.checks.seen import Found, Seen
from diagnoser.checks.trace import Operation

DECIDED = 1e-6  # that a head leaves to other keys than the first


def sources(seen: Seen, found: Found) -> None:
    """Finds queries that are keys, keys and values of different origin, and heads that are alike.

    ``same_query_key``: 1 where queries and keys are the same numbers. ``key_value_apart``: 1 where
    the model's inputs that keys depend on are none of those that values depend on.
    ``head_similarity``: 1 less the total variation between the weights of the two most similar
    heads, a mean over rows of which not all heads see one key alone: 1 for heads that are the same.

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
        plain = attention.softmax.result.ndim < 5  # else an axis beside batch and heads
        if plain and 1 < count <= 64 and attention.weights.shape[-1] > 2:
            weights = attention.weights.reshape(-1, count, *attention.weights.shape[1:])[:8].float()
            similarity = _most_similar(weights)
            if similarity is not None:
                heads.append((name, similarity))
    found.components("same_query_key", same)
    found.components("key_value_apart", apart)
    found.components("head_similarity", heads, min)  # of a module that is called more than once


def _most_similar(weights: Tensor) -> float | None:
    """Returns how similar the weights (n, heads, queries, keys) of the two most similar heads are.

    Rows of which all heads give everything to one key do not tell: there may be no other to see.
    """
    rows = weights.transpose(1, 2).flatten(0, 1)  # (rows, heads, keys)
    rows = rows[~(rows.amax(-1) > 1 - DECIDED).all(-1)]
    if not len(rows):
        return None
    by_head = rows.transpose(0, 1).flatten(1)
    distance = torch.cdist(by_head, by_head, p=1) / (2 * len(rows))
    distance.fill_diagonal_(math.inf)
    return 1.0 - float(distance.min())


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
        near += seen.trace.descendants(attention.product, 12)
        cuts = [_mixes_positions(o) for o in near if o.name in ("view", "_unsafe_view", "reshape")]
        scrambled.append((name, float(any(cuts))))
    found.components("scrambled_heads", scrambled)


def _mixes_positions(operation: Operation) -> bool:
    before, after = operation.inputs[0].shape, operation.result.shape
    if len(before) == 4 and len(after) == 3:
        before, after = after, before  # joined again: the same, backwards
    if len(before) != 3 or len(after) != 4:
        return False
    heads, length = after[1], after[2]
    is_cut = after[0] == before[0] and length == before[1] and heads * after[3] == before[2]
    return bool(is_cut and 1 < heads != length > 1)
