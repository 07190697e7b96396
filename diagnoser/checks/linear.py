"""Checks of layers of weights with nothing between them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from diagnoser.checks.reading_attention import first_factor
from diagnoser.checks.seen import Found, Seen
from diagnoser.checks.trace import PRODUCTS, SHAPE_ONLY, Operation, Trace, scalar_of

# The last axis stays what it is; a transpose before a product makes it one along another axis.
SAME_FEATURES = SHAPE_ONLY - {"transpose", "permute", "t", "movedim", "cat", "stack", "slice"}


def linear_pairs(seen: Seen, found: Found) -> None:
    """Finds layers that are one: nothing but biases between two products with weights.

    ``widened_in_vain``: 1 where a layer of weights makes its input wider and the next, which alone
    takes that, makes it narrower, with no activation between: both together are one smaller matrix.
    A narrow middle is a factorisation, as in LoRA and ALBERT, and does not count.

    Source: Goodfellow, Bengio and Courville 2016, Deep Learning, section 6.1.
    Cannot see: convolutions; an activation that is forgotten where nothing is widened.
    Costs: nothing beyond the trace.
    """
    told = []
    for operation in seen.trace.named(*PRODUCTS):
        own = _layer(seen.trace, operation)
        following = list(_takers(seen.trace, operation)) if own is not None else []
        if own is None or not following:
            continue
        weight, data = own
        middle = operation.result.shape[-1]
        name = seen.layer_of([weight])
        vain = all(
            after is not None
            and (layer := _layer(seen.trace, after)) is not None
            and layer[1].shape[-1] == middle > max(data.shape[-1], after.result.shape[-1])
            for after in following
        )
        if name is not None:
            told.append((name, float(vain)))
    found.components("widened_in_vain", told)


def _layer(trace: Trace, product: Operation) -> tuple[Tensor, Tensor] | None:
    """Returns the weight of a product, a matrix that is learned, and what it multiplies."""
    first = first_factor(product)
    for position in (first, first + 1):
        if position < len(product.inputs):
            weight = trace.given_behind(product, position)
            if weight is not None and weight.requires_grad and weight.ndim > 1:
                return weight, product.inputs[2 * first + 1 - position]
    return None


def _takers(trace: Trace, product: Operation) -> Iterator[Operation | None]:
    """Yields the products that take a result as it is; None for whatever else takes it."""
    queue, known = [product], {product.index}
    for operation in queue:  # grows while it is read
        for consumer in trace.consumers(operation):
            if consumer.index in known:
                continue
            known.add(consumer.index)
            given = [s for s in consumer.sources if s >= 0]
            if consumer.name in PRODUCTS:
                yield consumer
            elif (
                consumer.name in SAME_FEATURES
                or (consumer.name == "add" and len(given) == 1 and len(consumer.inputs) > 1)
                or (consumer.name == "mul" and scalar_of(consumer.args[1]) is not None)
            ):
                queue.append(consumer)
            else:
                yield None
