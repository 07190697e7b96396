"""Reads the autograd graph of a training loss: parameters, loss, attention, activations.

Nothing is patched. The graph that ``loss.backward()`` is about to walk keeps what the forward
saved: the result of every softmax, the query and key of every fused attention, what each weight
multiplies, the log-probabilities and targets of a cross-entropy. Reading them there needs no hook
in the forward, sees every caller (hand-written attention, `nn.MultiheadAttention`, Hugging Face),
costs nothing on unmeasured steps, and cannot change a bit of training.

What it cannot see: modules compiled by `torch.compile` (one opaque node), and attention whose
graph was cut by ``no_grad``. Under activation checkpointing saved tensors are recomputed when they
are read, so the caller must hold the random state and buffers (`monitor.quiet`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from diagnoser.statistics.activations import SAVED_INPUT, InputStatistics, read_inputs, saved_input
from diagnoser.statistics.attention import (
    AttentionStatistics,
    HeadsOf,
    multiplies_values,
    read_fused,
    read_softmax,
)
from diagnoser.statistics.nodes import (
    LIKELIHOOD,
    SOFTMAX,
    Node,
    inputs_of,
    operation_of,
    own_parameters,
    signed,
    skip_scaling,
    skip_shapes,
    source_of,
)

MEAN: Final = 1  # torch's number for a loss that is a mean
SHORT: Final = 8  # operations; label smoothing has five at most between loss and probabilities


@dataclass(frozen=True, slots=True)
class LossReading:
    """What a classification loss shows: how often it is right, over how many classes.

    ``is_whole`` says that it is what is trained, up to a factor or small additions: then
    ln(classes) is what guessing costs. Of a sum of losses it is not.
    """

    accuracy: float
    classes: int
    samples: int
    is_whole: bool


@dataclass(slots=True)
class GraphReading:
    """All that one walk over the graph found.

    ``probabilities_into_loss`` says that a softmax or sigmoid result enters a loss that applies
    its own; ``opaque`` names operations that hide what is behind them (compiled modules).
    """

    parameters: list[Tensor] = field(default_factory=list)
    loss: LossReading | None = None
    attention: list[AttentionStatistics] = field(default_factory=list)
    inputs: list[InputStatistics] = field(default_factory=list)
    probabilities_into_loss: str | None = None
    opaque: list[str] = field(default_factory=list)


def read_graph(
    root: Tensor, *, values: bool = True, heads_of: HeadsOf | None = None
) -> GraphReading:
    """Walks the graph behind ``root`` once.

    Args:
        root: A tensor with a live graph; nothing of it is changed or freed.
        values: Also read saved tensors (loss and attention); otherwise only the parameters.
        heads_of: The number of heads of an attention, by the parameters of its logits; where it is
            given, entropies are read by head too.
    """
    reading = GraphReading()
    consumers: dict[Node, list[Node]] = {}
    softmaxes: list[Node] = []
    fused: list[Node] = []
    losses: list[Node] = []
    products: dict[
        int, tuple[Tensor, Node]
    ] = {}  # by the parameter that goes into it, the nearest to the loss
    for node in _walk(source_of(root), consumers):
        operation = operation_of(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            reading.parameters.append(node.variable)
        elif operation in SOFTMAX:
            softmaxes.append(node)
        elif operation.startswith("ScaledDotProduct"):
            fused.append(node)
        elif operation in LIKELIHOOD or operation == "BinaryCrossEntropyWithLogits":
            losses.append(node)
        elif operation == "CompiledFunction":
            reading.opaque.append(node.name())
        elif values and operation in SAVED_INPUT:
            for parameter in own_parameters(node):
                if parameter.ndim > 1:
                    products.setdefault(id(parameter), (parameter, node))
    if not values:
        return reading
    with torch.no_grad():
        for node in losses:
            reading.loss = reading.loss or _read_loss(node, root)
            reading.probabilities_into_loss = (
                reading.probabilities_into_loss or _squashed_before_loss(node)
            )
        for node in reversed(softmaxes):  # forward order, as the walk starts at the loss
            if multiplies_values(node, consumers):
                reading.attention.append(read_softmax(node, heads_of))
        for node in reversed(fused):
            reading.attention.append(read_fused(node, heads_of))
        saved = [(parameter, saved_input(node)) for parameter, node in products.values()]
        reading.inputs = read_inputs([(p, rows) for p, rows in saved if rows is not None])
    return reading


def cross_entropy_of(loss: Tensor) -> Node | None:
    """Returns the negative log-likelihood that a loss is; None where it is something else.

    Numbers may have been multiplied and added (gradient accumulation, a sum that begins at 0), and
    labels smoothed: then the other addend goes back to the same log-probabilities. A sum of two
    losses is something else. A few operations are looked at, so that every step can afford it.
    """
    node = source_of(loss)
    while node is not None:
        node = skip_scaling(node)
        behind = inputs_of(node)
        if operation_of(node) in LIKELIHOOD:
            return node
        if operation_of(node) != "Add":
            return None
        if len(behind) == 2:
            first = skip_scaling(behind[0])
            smoothed = operation_of(first) in LIKELIHOOD and _goes_back_to(
                behind[1], inputs_of(first)
            )
            return first if smoothed else None
        node = behind[0] if behind else None
    return None


def loss_factor(root: Tensor) -> float | None:
    """Returns what a mean classification loss was multiplied by; None where it is something else.

    What guessing costs is the logarithm of the number of classes times this.
    """
    node = skip_scaling(source_of(root))
    likelihood = operation_of(node) in LIKELIHOOD
    if not likelihood and operation_of(node) != "BinaryCrossEntropyWithLogits":
        return None
    if node._saved_reduction != MEAN:
        return None
    with torch.no_grad():
        scores, target, weight = node._saved_self, node._saved_target, node._saved_weight
        if likelihood:
            ignored = signed(node._saved_ignore_index)
            own = F.nll_loss(scores, target, weight, ignore_index=ignored)
        else:
            own = F.binary_cross_entropy_with_logits(
                scores, target, weight, pos_weight=node._saved_pos_weight
            )
    factor = root.item() / own.item() if own.item() else math.nan
    return factor if math.isfinite(factor) else None


def _goes_back_to(node: Node, sources: list[Node]) -> bool:
    """Whether a short line of operations on one value each leads to the only source."""
    for _ in range(SHORT):
        behind = inputs_of(node)
        if len(behind) != 1:
            return False
        if behind == sources:
            return True
        node = behind[0]
    return False


def _walk(start: Node | None, consumers: dict[Node, list[Node]]) -> Iterator[Node]:
    """Yields every node once, breadth first from the loss, and notes who consumes whom."""
    if start is None:
        return
    queue: deque[Node] = deque([start])
    seen: set[Node] = {start}
    while queue:
        node = queue.popleft()
        yield node
        for following in inputs_of(node):
            consumers.setdefault(following, []).append(node)
            if following not in seen:
                seen.add(following)
                queue.append(following)


def _read_loss(node: Node, root: Tensor) -> LossReading | None:
    target = node._saved_target
    if operation_of(node) in LIKELIHOOD:
        scores = node._saved_self
        if scores.ndim == 1:
            scores, target = scores.unsqueeze(0), target.reshape(1)
        counted = target != signed(node._saved_ignore_index)
        right, classes = scores.argmax(dim=1) == target, scores.shape[1]
        each = -scores.gather(1, torch.where(counted, target, 0).unsqueeze(1)).squeeze(1)
    else:
        scores = node._saved_self
        if not bool(((target == 0) | (target == 1)).all()):
            return None
        counted = torch.ones_like(target, dtype=torch.bool)
        right, classes = (scores > 0) == (target > 0.5), 2
        each = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
    samples = int(counted.sum())
    if samples == 0 or not bool(torch.isfinite(scores).all()):
        return None
    whole = _is_scaled(node, root) or _is_near(float(each[counted].mean()), root)
    return LossReading(float((right & counted).sum()) / samples, classes, samples, whole)


def _is_scaled(node: Node, root: Tensor) -> bool:
    """Whether the root is a mean loss, multiplied by numbers at most (gradient accumulation)."""
    if skip_scaling(source_of(root)) is not node:
        return False
    return bool(node._saved_reduction == MEAN)


def _is_near(mean: float, root: Tensor) -> bool:
    """Whether the root is about the mean loss: smoothed, weighted, with a small penalty."""
    value = float(root) if root.numel() == 1 else float("nan")
    return mean / 2 <= value <= 2 * mean


def _squashed_before_loss(node: Node) -> str | None:
    """Finds a softmax or sigmoid whose result enters a loss that normalises by itself."""
    inputs = inputs_of(node)
    if not inputs:
        return None
    source = skip_shapes(inputs[0])
    if operation_of(node) in LIKELIHOOD:
        if operation_of(source) in SOFTMAX:
            return "softmax result, without a logarithm, into a negative log-likelihood"
        if operation_of(source) != "LogSoftmax" or not inputs_of(source):
            return None
        source = skip_shapes(inputs_of(source)[0])
        if operation_of(source) in SOFTMAX:
            return "softmax result into cross-entropy, which applies its own softmax"
        if operation_of(source) == "Sigmoid":
            return "sigmoid result into cross-entropy, which applies its own softmax"
        return None
    if operation_of(source) == "Sigmoid":
        return "sigmoid result into a binary cross-entropy that applies its own sigmoid"
    return None
