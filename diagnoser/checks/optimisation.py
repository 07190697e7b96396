"""Checks of what the optimizers were given."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

from torch import Tensor

from diagnoser.checks.seen import Found, Seen
from diagnoser.errors import MeasurementError

DECOUPLED = ("AdamW",)
LARGE_DECAY = 0.1


def _groups(seen: Seen) -> list[tuple[str, Tensor, str, dict]]:  # type: ignore[type-arg]
    names = {id(p): n for n, p in seen.parameters.items()}
    found = [
        (names[id(p)], p, type(optimizer).__name__, group)
        for optimizer in seen.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) in names
    ]
    if not found:
        raise MeasurementError("no optimizer that holds parameters of the model was seen")
    return found


def shared_parameters(seen: Seen, found: Found) -> None:
    """Finds parameters that are stepped more than once.

    ``times_optimized``: how many places of how many optimizers hold the parameters of a component.

    Source: benchmark operator O14.
    Cannot see: an optimizer whose ``step`` is called twice.
    Costs: a look at each parameter.
    """
    count = Counter(name for name, *_ in _groups(seen))
    found.components("times_optimized", _by_layer(seen, count))


def weight_decay(seen: Seen, found: Found) -> None:
    """Finds weight decay that outruns the gradient, and decay of norms and biases.

    ``decay_to_step``: how far decay moves the weights of a component in a step, over how far the
    largest usual step of the optimizer does (all elements by the learning rate; for optimizers
    without a second moment, by the gradient). ``decayed_vectors``: share of the norms' and biases'
    elements that decay by 0.1 and more: nearly all scripts decay them a little, to no harm.

    Source: Loshchilov and Hutter 2019; benchmark operator O9.
    Cannot see: decay that is written into the loss.
    Costs: a norm of each parameter.
    """
    ratios: dict[str, float] = {}
    vectors = decayed = 0
    for name, parameter, kind, group in _groups(seen):
        decay = float(group.get("weight_decay", 0.0) or 0.0)
        if parameter.ndim < 2:
            vectors += parameter.numel()
            decayed += parameter.numel() * (decay >= LARGE_DECAY)
        size = float(parameter.detach().norm()) * decay
        adaptive = "betas" in group
        if adaptive and (kind in DECOUPLED or group.get("decoupled_weight_decay")):
            ratios[name] = size / math.sqrt(parameter.numel())
        elif parameter.grad is not None and not parameter.grad.is_sparse:
            gradient = float(parameter.grad.norm())
            if gradient > 0:
                ratios[name] = size / gradient
    found.components("decay_to_step", _by_layer(seen, ratios))
    if vectors:
        found.run("decayed_vectors", decayed / vectors)


def averages(seen: Seen, found: Found) -> None:
    """Finds averages of gradients that are longer than a run.

    ``averaging_steps``: how many steps the longest first average of an optimizer goes back,
    1 / (1 - momentum).

    Source: Kingma and Ba 2015, 1412.6980, section 2.
    Cannot see: an average that the script makes by itself.
    Costs: a look at each group.
    """
    longest = 0.0
    for *_, group in _groups(seen):
        betas = group.get("betas")
        first = betas[0] if betas else group.get("momentum", 0.0)
        if 0.0 <= float(first) < 1.0:
            longest = max(longest, 1.0 / (1.0 - float(first)))
    if not longest:
        raise MeasurementError("no optimizer has an average that ends")
    found.run("averaging_steps", longest)


def _by_layer(seen: Seen, values: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        layer = seen.layer_of([seen.parameters[name]])
        if layer is not None:
            yield layer, float(value)
