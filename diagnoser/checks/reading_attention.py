"""Finds the attentions of a traced forward, and says what they do.

An attention is a softmax (fused, torch's, or written with an exponential) whose result weights
other tensors; one whose result enters a loss is not. Everything else follows from that place in the
trace: forwards to the product with the values, backwards over masks and scales to the product of
queries and keys.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diagnoser.checks.trace import PRODUCTS, SHAPE_ONLY, Operation, Trace, scalar_of
from diagnoser.types import Where

FUSED = frozenset({
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
})  # fmt: skip
SOFTMAXES = frozenset({"_softmax", "_safe_softmax"})
NORMS = frozenset({
    "native_layer_norm", "_fused_rms_norm", "rsqrt", "linalg_vector_norm", "norm",
    "native_batch_norm", "native_group_norm",
})  # fmt: skip
TRANSPARENT = ("sub", "amax", "max", "exp", "leaky_relu", "relu")  # to masks and scales
HIDES = -1e3  # a logit that a mask sets is further below the others than any score of theirs
MOST = 1_048_576  # elements of weights that are looked at
MOST_HEADS = 64
MOST_SAMPLES = 16  # of a batch that weights are computed for again


@dataclass(slots=True, eq=False)
class Attention:
    """One attention of a forward.

    ``weights`` is what multiplies the values, (n, queries, keys), with the axis that is summed over
    last; ``logits`` the same before the softmax, and ``raw`` before any mask. ``scale`` is what all
    plain numbers between the queries' and keys' projections and the softmax multiply to, ``width``
    how many elements a product of query and key adds up. ``after`` names what came between softmax
    and values. ``first`` is how many samples of a larger batch the weights are of, the first ones;
    None: all. Elsewhere None and NaN: not seen.
    """

    index: int
    place: Where | None
    softmax: Operation
    product: Operation  # with the values
    weights: Tensor
    values: Tensor | None = None  # as they are weighted
    logits: Tensor | None = None
    raw: Tensor | None = None
    scores: Operation | None = None  # the product of queries and keys
    scale: float = math.nan
    width: int = 0
    learned_scale: bool = False
    normalised: bool = False  # queries or keys are normalised before their product
    hidden: Tensor | None = None  # what masks hide, like the weights
    first: int | None = None
    after: tuple[str, ...] = ()
    by_feature: bool = False  # every feature of the values has weights of its own
    transposed: bool = False  # keys are the left factor of `scores` (the other side's attention)
    parameters: list[Tensor] = field(default_factory=list)
    query_parameters: list[Tensor] = field(default_factory=list)
    key_parameters: list[Tensor] = field(default_factory=list)
    value_parameters: list[Tensor] = field(default_factory=list)

    @property
    def sides(self) -> tuple[int, int] | None:
        """Which inputs of `scores` are queries and keys; None where they were not seen."""
        if self.scores is None:
            return None
        first = first_factor(self.scores)
        return (first + 1, first) if self.transposed else (first, first + 1)

    @property
    def query(self) -> Tensor | None:
        """The queries, (..., queries, width)."""
        if self.scores is None or self.sides is None:
            return None
        query = self.scores.inputs[self.sides[0]]
        return query.transpose(-2, -1) if self.transposed and query.ndim > 1 else query

    @property
    def is_product(self) -> bool:
        """Whether its scores are products of queries and keys, not a linear map of one input."""
        scores, sides = self.scores, self.sides
        if scores is None or sides is None:
            return False
        if any(p.ndim == 2 and min(p.shape) == 1 for p in self.key_parameters):
            return False
        query, key = (scores.inputs[side] for side in sides)
        several = query.ndim > 2 or query.shape[0] > 1 < key.shape[-1]
        return several and all(scores.sources[side] >= 0 for side in sides)

    @property
    def is_self(self) -> bool:
        """Whether there are as many queries as keys, more than one."""
        return self.weights.shape[-1] == self.weights.shape[-2] > 1


def some(weights: Tensor) -> Tensor:
    """Returns as many of some weights (n, queries, keys) as are looked at, as float32."""
    keep = max(1, MOST // max(1, weights.shape[-1] * weights.shape[-2]))
    return weights[:keep].float()


def first_factor(product: Operation) -> int:
    """Returns which input of a matrix product is its left factor; sums come before it."""
    return 1 if product.name in ("addmm", "baddbmm", "addmv") else 0


def find_attentions(trace: Trace, parameters: list[Tensor]) -> list[Attention]:
    """Returns the attentions of a forward in the order in which they were computed.

    Args:
        trace: Its operations.
        parameters: Of the model, to name an attention by what made its queries, keys and values.
    """
    found = []
    for operation in trace.operations:
        if operation.name in FUSED:
            attention = _fused(trace, operation)
        elif operation.name in SOFTMAXES or _is_handmade(trace, operation):
            attention = _written(trace, operation)
        else:
            continue
        if attention is not None:
            _name(trace, attention, parameters)
            found.append(attention)
    return found


def _is_handmade(trace: Trace, operation: Operation) -> bool:
    """Whether an operation is the division of ``exp(x) / exp(x).sum(...)``."""
    if operation.name != "div" or len(operation.inputs) < 2:
        return False
    top, bottom = (trace.behind(operation, side) for side in (0, 1))
    if top is None or bottom is None or top.name != "exp":
        return False
    return any(
        step.name == "sum" and any(s.name == "exp" for s in trace.ancestors(step, 8))
        for step in trace.ancestors(bottom, 8)
    )


# -- forwards: from the softmax to the values ------------------------------------------------------


def _written(trace: Trace, softmax: Operation) -> Attention | None:
    for product, position, after in _value_products(trace, softmax):
        weights = _contracted(trace, product, position)
        if weights is None or weights.shape[-1] < 2:
            continue
        attention = Attention(
            softmax.index, softmax.place or product.place, softmax, product, weights,
            values=_other_factor(product, position), after=after,
            by_feature=_by_feature(product, position),
        )  # fmt: skip
        _read_logits(trace, attention)
        return attention
    return None


def _value_products(
    trace: Trace, start: Operation
) -> Iterator[tuple[Operation, int, tuple[str, ...]]]:
    """Yields where a softmax result weights something, and what happened to it on the way."""
    queue: list[tuple[Operation, tuple[str, ...]]] = [(start, ())]
    seen = {start.index}
    for operation, after in queue:
        for consumer in trace.consumers(operation):
            position = next(i for i, s in enumerate(consumer.sources) if s == operation.index)
            mixes = mixed_input(trace, consumer) == position or (
                consumer.name == "add" and "mix" in after  # its bias
            )
            if start.result.ndim > 3 and mixes:
                if consumer.index not in seen:
                    seen.add(consumer.index)
                    queue.append((consumer, (*after, "mix")))
                continue
            if consumer.name in PRODUCTS:
                yield consumer, position, after
                continue
            number = _number_beside(consumer)
            weighting = (
                consumer.name == "mul" and number is None and len(consumer.inputs) == 2
                and _sum_of(trace, consumer) is not None
            )  # fmt: skip
            if weighting:
                yield consumer, position, after
                continue
            if consumer.index in seen:
                continue
            if consumer.name in SHAPE_ONLY:
                step = after
            elif consumer.name == "native_dropout" or _is_dropped(trace, consumer, operation):
                step = (*after, "dropout")
            elif consumer.name in ("mul", "div") and number is not None:
                step = (*after, "scale")
            elif consumer.name in ("mul", "masked_fill", "where"):
                step = (*after, "mask")
            else:
                continue
            seen.add(consumer.index)
            queue.append((consumer, step))


def _is_dropped(trace: Trace, product: Operation, weights: Operation) -> bool:
    """Whether weights are multiplied by noise, as dropout does."""
    others = [s for s in product.sources if s >= 0 and s != weights.index]
    return product.name == "mul" and any(
        made.name == "bernoulli" for s in others for made in trace.ancestors(trace.operations[s], 4)
    )


def _number_beside(operation: Operation) -> float | None:
    """Returns the plain number that an operation multiplies or divides by."""
    return scalar_of(operation.args[1]) if len(operation.args) > 1 else None


def _sum_of(trace: Trace, product: Operation) -> Operation | None:
    """Returns the sum over one axis that follows a product of weights and values."""
    return next(
        (
            c
            for c in trace.consumers(product)
            if c.name == "sum" and len(c.args) > 1 and len(c.args[1] or ()) == 1
        ),
        None,
    )


def _by_feature(product: Operation, position: int) -> bool:
    values = _other_factor(product, position)
    if product.name != "mul" or values is None or values.ndim < 3:  # noqa: PLR2004
        return False
    weights = product.inputs[position]
    apart = weights.shape == values.shape and weights.shape[-1] > 1
    # Expanded weights say the same for every feature.
    return apart and not bool((weights == weights[..., :1]).all())


def _other_factor(product: Operation, position: int) -> Tensor | None:
    first = 0 if product.name == "mul" else first_factor(product)
    other = 2 * first + 1 - position
    return product.inputs[other] if other < len(product.inputs) else None


def _contracted(trace: Trace, product: Operation, position: int) -> Tensor | None:
    """Returns the weights (n, queries, keys), with the axis that the product adds up last."""
    weights = product.inputs[position]
    if product.name == "mul":
        total = _sum_of(trace, product)
        assert total is not None
        axis = total.args[1][0]
        rank = product.result.ndim
        axis = axis % rank - (rank - weights.ndim)
        if axis < 0:
            return None
        moved = weights.movedim(axis, -1)
        return moved.reshape(-1, 1, moved.shape[-1])
    left = position == first_factor(product)
    if weights.ndim == 1:
        return weights.reshape(1, 1, -1)
    weights = weights if left else weights.transpose(-2, -1)
    return weights if weights.ndim == 3 else weights.unsqueeze(0)


# -- backwards: from the softmax to queries and keys -----------------------------------------------


def _read_logits(trace: Trace, attention: Attention) -> None:
    """Follows the scores from the softmax back to their product, over masks and scales."""
    softmax = attention.softmax
    axis = softmax.args[1] if softmax.name in SOFTMAXES else -1
    if not isinstance(axis, int):
        return

    order = _order(softmax.result, axis, attention.weights)

    def like_weights(scores: Tensor) -> Tensor | None:
        """Scores (n, queries, keys), if the softmax is over the keys."""
        if scores.numel() != attention.weights.numel() or scores.ndim == 0:
            return None
        moved = scores.movedim(axis, -1) if scores.ndim > 1 else scores
        if moved.shape[-1] != attention.weights.shape[-1]:
            return None
        return moved.permute(*order, -1).reshape(attention.weights.shape)

    attention.logits = attention.raw = like_weights(softmax.inputs[0])
    scale, step = 1.0, trace.producer(softmax, 0)
    for _ in range(32):
        if step is None:
            return
        mixed = mixed_input(trace, step) if softmax.result.ndim > 3 else None
        if mixed is not None:  # heads, by talking-heads attention
            attention.learned_scale = True
            step = trace.producer(step, mixed)
            continue
        if step.name in PRODUCTS:
            _read_product(trace, attention, step, scale)
            return
        number, position = _number_beside(step), _bearing(step)
        before = trace.producer(step, position)
        if step.name in ("mul", "div") and number is not None:
            scale *= number if step.name == "mul" else 1.0 / number if number else math.nan
        elif step.name in ("mul", "div", "tanh", "clamp"):
            attention.learned_scale = True  # or a cap
        elif step.name in ("masked_fill", "where", "add"):
            hidden = like_weights(_hidden_by(step, position).expand_as(step.result))
            if hidden is not None and (step.name != "add" or bool(hidden.any())):
                known = attention.hidden
                if known is None:  # of exp(x - max) / sum, the softmax is given no scores
                    attention.logits = like_weights(step.result)
                attention.hidden = hidden if known is None else known | hidden
                if before is not None:
                    attention.raw = like_weights(before.result)
        elif step.name not in (*SHAPE_ONLY, *TRANSPARENT):
            return
        step = before


def mixed_input(trace: Trace, operation: Operation) -> int | None:
    """Returns which input a small parameter multiplies, as where heads are mixed, or None.

    Source: Shazeer et al. 2020, 2003.02436 (talking heads).
    """
    if operation.name == "convolution":
        weight = operation.inputs[1]
        return 0 if _is_small(weight) and weight[0, 0].numel() == 1 else None
    if operation.name not in PRODUCTS:
        return None
    first = first_factor(operation)
    for position in (first, first + 1):
        if position >= len(operation.inputs):
            return None
        tensor = trace.given_behind(operation, position)
        if tensor is None or not tensor.requires_grad or tensor.ndim != 2:
            continue
        if _is_small(tensor):
            return 2 * first + 1 - position
    return None


def _is_small(weight: Tensor) -> bool:
    return min(weight.shape[:2]) > 1 and max(weight.shape[:2]) <= MOST_HEADS


def _is_transposed(attention: Attention, product: Operation) -> bool:
    """Whether scores (queries, keys) are a product (keys, queries): rows attended to, too."""
    raw = attention.raw
    if raw is None or product.result.ndim < 2:
        return False
    made = product.result.reshape(-1, *product.result.shape[-2:]).float()
    queries, keys = raw.shape[-2:]
    if queries != keys or made.shape != raw.shape:
        return tuple(made.shape[-2:]) == (keys, queries) != (queries, keys)
    both = torch.isfinite(raw) & torch.isfinite(made) & torch.isfinite(made.transpose(-2, -1))
    if not bool(both.any()):
        return False
    own = raw.float()[both]
    along, across = (
        float(torch.nn.functional.cosine_similarity(own, other[both], dim=0))
        for other in (made, made.transpose(-2, -1))
    )
    return across > along + 0.05


def _order(result: Tensor, axis: int, weights: Tensor) -> tuple[int, ...]:
    """Returns the order that the other axes of a softmax have in the weights (n, queries, keys).

    Some write scores as (queries, keys, batch, heads). The numbers tell; where none fits (weights
    that were changed after the softmax), or any does, the order is the same.
    """
    moved = result.movedim(axis, -1) if result.ndim > 1 else result
    same = tuple(range(moved.ndim - 1))
    if moved.numel() != weights.numel() or moved.shape[-1] != weights.shape[-1]:
        return same
    for order in itertools.permutations(same):
        if torch.equal(moved.permute(*order, -1).reshape(weights.shape), weights):
            return order
    return same


def _bearing(step: Operation) -> int:
    """Returns which input of an operation carries the scores: the first of floats that is largest.

    Masks are smaller, no floats, or one value everywhere.
    """
    sizes = [x.numel() if x.is_floating_point() else -1 for x in step.inputs]
    largest = [i for i, size in enumerate(sizes) if size == max(sizes)]
    if len(largest) > 1:
        varied = [i for i in largest if bool((step.inputs[i] != step.inputs[i].flatten()[0]).any())]
        largest = varied or largest
    return largest[0]


def _hidden_by(step: Operation, position: int) -> Tensor:
    """Returns what a step takes out of sight, as far as it broadcasts to its result."""
    if step.name == "masked_fill":
        return step.inputs[1]
    if step.name == "where":
        condition = step.inputs[0]
        first = isinstance(step.args[1], Tensor) and step.args[1] is step.inputs[position]
        return ~condition if first else condition
    others = [x for i, x in enumerate(step.inputs) if i != position]
    return others[0] <= HIDES if others else torch.zeros((), dtype=torch.bool)


def _read_product(trace: Trace, attention: Attention, product: Operation, scale: float) -> None:
    """Reads the product of queries and keys, and what happened to either before it."""
    attention.scores = product
    first = first_factor(product)
    alpha = scalar_of(product.kwargs.get("alpha", 1.0)) or 1.0
    if product.name == "baddbmm" and attention.logits is not None:
        # Of nn.MultiheadAttention, whose mask goes into the product.
        hidden = (product.inputs[0] <= HIDES).expand_as(product.result)
        attention.hidden = hidden.reshape(attention.logits.shape) if bool(hidden.any()) else None
        bare = product.inputs[1] @ product.inputs[2] * alpha
        attention.raw = bare.reshape(attention.logits.shape)
    attention.width = product.inputs[first].shape[-1]
    attention.transposed = _is_transposed(attention, product)
    for side in (first, first + 1):
        factor, learned, normalised = _before_product(trace, product, side)
        scale *= factor
        attention.learned_scale |= learned
        attention.normalised |= normalised
    attention.scale = scale * alpha


def _before_product(trace: Trace, product: Operation, side: int) -> tuple[float, bool, bool]:
    """Returns the plain factor of one side, whether it is learned, and whether it is normalised."""
    scale, learned = 1.0, False
    step = trace.producer(product, side)
    for _ in range(24):
        if step is None or step.name in (*PRODUCTS, "embedding", "convolution"):
            break
        number = _number_beside(step)
        if step.name in ("mul", "div") and number is not None:
            scale *= number if step.name == "mul" else 1.0 / number if number else math.nan
        elif step.name in NORMS:
            return scale, learned, True
        elif step.name in ("mul", "div") and any(s < 0 and t.requires_grad for t, s in zip(
                step.inputs, step.sources, strict=True)):  # fmt: skip
            # A gain behind a norm, or a temperature: learned either way.
            learned = True
            if any(o.name in NORMS for o in trace.ancestors(step, 6)):
                return scale, learned, True
        elif step.name in ("mul", "div"):
            # A norm is the divisor, or near the product with its reciprocal.
            near = step if step.name == "mul" else trace.producer(step, 1)
            if any(o.name in NORMS for o in trace.ancestors(near, 6)):
                return scale, learned, True
            if step.name == "div":
                break
        elif step.name not in SHAPE_ONLY and step.name not in ("mul", "add", "neg", "sub"):
            break
        step = trace.producer(step, 0)
    return scale, learned, False


def _fused(trace: Trace, operation: Operation) -> Attention | None:
    query, key, value = operation.args[:3]
    if query.ndim != 4 or key.shape[-2] < 2:
        return None
    scale = operation.kwargs.get("scale")
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    keep = MOST_SAMPLES
    query, key = query[:keep].float(), key[:keep].float()
    if key.shape[1] != query.shape[1]:  # grouped-query attention
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    raw = query @ key.transpose(-2, -1) * scale
    given = operation.kwargs.get("attn_mask")
    causal = bool(operation.args[4]) if len(operation.args) > 4 else False
    if len(operation.args) > 4 and not isinstance(operation.args[4], bool):
        causal = False
    causal |= bool(operation.kwargs.get("is_causal", False))
    logits = raw
    if isinstance(given, Tensor):
        mask = given[:keep] if given.ndim == 4 and given.shape[0] > 1 else given
        logits = raw.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else raw + mask
    if causal:
        rows, columns = raw.shape[-2:]
        hidden = torch.ones(rows, columns, dtype=torch.bool, device=raw.device).triu(1)
        logits = logits.masked_fill(hidden, -math.inf)
    weights = logits.softmax(dim=-1)
    shape = (-1, *weights.shape[-2:])
    factors = [_before_product(trace, operation, side) for side in (0, 1)]
    return Attention(
        operation.index,
        operation.place,
        operation,
        operation,
        weights.reshape(shape),
        values=value,
        logits=logits.reshape(shape),
        raw=raw.reshape(shape),
        scores=operation,
        scale=scale * factors[0][0] * factors[1][0],
        width=query.shape[-1],
        learned_scale=factors[0][1] or factors[1][1],
        normalised=factors[0][2] or factors[1][2],
        hidden=None if given is None and not causal else (logits <= HIDES).reshape(shape),
        first=keep if operation.args[0].shape[0] > keep else None,
    )


def _name(trace: Trace, attention: Attention, parameters: list[Tensor]) -> None:
    """Notes which parameters made its queries, keys and values."""
    scores = attention.scores

    def nearest(operation: Operation | None, position: int) -> list[Tensor]:
        if operation is None or position >= len(operation.sources):
            return []
        source = operation.sources[position]
        if source < 0:
            tensor = operation.inputs[position]
            return [tensor] if any(tensor is p for p in parameters) else []
        return trace.nearest(trace.operations[source], parameters)

    if scores is not None:
        first = first_factor(scores)
        query, key = attention.sides or (first, first + 1)
        attention.query_parameters = nearest(scores, query)
        attention.key_parameters = nearest(scores, key)
        attention.parameters = [*attention.query_parameters, *attention.key_parameters]
    else:
        attention.parameters = trace.nearest(trace.producer(attention.softmax, 0), parameters)
    if attention.product is attention.softmax:  # fused
        attention.value_parameters = nearest(attention.product, 2)
        return
    heavy = [
        i for i, source in enumerate(attention.product.sources)
        if source < 0 or attention.softmax.index not in {
            o.index for o in trace.ancestors(trace.operations[source])}
    ]  # fmt: skip
    attention.value_parameters = nearest(attention.product, heavy[-1]) if heavy else []
