"""Reads the autograd graph of a training loss: parameters, loss, attention. Nothing is patched.

The graph that ``loss.backward()`` is about to walk keeps what the forward saved: the result of
every softmax, the query and key of every fused attention, the log-probabilities and targets of a
cross-entropy. Reading them there needs no hook in the forward, sees every caller (hand-written
attention, `nn.MultiheadAttention`, Hugging Face), costs nothing on unmeasured steps, and cannot
change a bit of training.

What it cannot see: modules compiled by `torch.compile` (one opaque node), and attention whose
graph was cut by ``no_grad``. Under activation checkpointing saved tensors are recomputed when they
are read, so the caller must hold the random state and buffers (`monitor.quiet`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Node = Any  # torch.autograd.graph.Node; its saved tensors are attributes by operation

_SHAPE_ONLY = (
    "View", "UnsafeView", "ReshapeAlias", "Expand", "Squeeze", "Unsqueeze", "Transpose", "Permute",
    "T", "Clone", "Contiguous", "Select", "Slice", "Alias", "ToCopy", "Split", "Unbind",
)  # fmt: skip
_SOFTMAX = ("SoftmaxBackward", "SafeSoftmaxBackward")
_MATMUL = ("Bmm", "Mm", "Mv", "Addmm", "Baddbmm")
_PARAMETER_OPS = (*_MATMUL, "Convolution", "Embedding", "Linear", "Dot")
_MAX_ROWS = 65_536  # rows of an attention matrix that are looked at
_MAX_ELEMENTS = 1_048_576


@dataclass(frozen=True, slots=True)
class LossReading:
    """What a classification loss shows: how often it is right, over how many classes."""

    accuracy: float
    classes: int
    samples: int


@dataclass(frozen=True, slots=True)
class AttentionStatistics:
    """One attention operation of the forward.

    ``parameters`` are the nearest parameters that its logits come from (query and key weights, or
    the context vector). ``entropy`` is the mean row entropy divided by the logarithm of the number
    of visible positions (0 one-hot, 1 uniform), ``largest_logit`` the largest absolute logit before
    the mask, ``empty_rows`` the share of rows that are NaN although their logits are finite (every
    position masked). NaN where it cannot be read.
    """

    parameters: tuple[Tensor, ...]
    entropy: float
    largest_logit: float
    empty_rows: float


@dataclass(slots=True)
class GraphReading:
    """All that one walk over the graph found.

    ``probabilities_into_loss`` says that a softmax or sigmoid result enters a loss that applies
    its own; ``opaque`` names operations that hide what is behind them (compiled modules).
    """

    parameters: list[Tensor] = field(default_factory=list)
    loss: LossReading | None = None
    attention: list[AttentionStatistics] = field(default_factory=list)
    probabilities_into_loss: str | None = None
    opaque: list[str] = field(default_factory=list)


def read_graph(root: Tensor, *, values: bool = True) -> GraphReading:
    """Walks the graph behind ``root`` once.

    Args:
        root: A tensor with a live graph; nothing of it is changed or freed.
        values: Also read saved tensors (loss and attention); otherwise only the parameters.
    """
    reading = GraphReading()
    consumers: dict[Node, list[Node]] = {}
    softmaxes: list[Node] = []
    fused: list[Node] = []
    losses: list[Node] = []
    for node in _walk(root.grad_fn, consumers):
        name = node.name()
        if name == "torch::autograd::AccumulateGrad":
            reading.parameters.append(node.variable)
        elif name.startswith(_SOFTMAX):
            softmaxes.append(node)
        elif name.startswith("ScaledDotProduct"):
            fused.append(node)
        elif name.startswith(("NllLoss", "BinaryCrossEntropyWithLogits")):
            losses.append(node)
        elif name.startswith("CompiledFunction"):
            reading.opaque.append(name)
    if not values:
        return reading
    with torch.no_grad():
        for node in losses:
            reading.loss = reading.loss or _read_loss(node)
            reading.probabilities_into_loss = (
                reading.probabilities_into_loss or _squashed_before_loss(node)
            )
        for node in reversed(softmaxes):  # forward order, as the walk starts at the loss
            if _multiplies_values(node, consumers):
                reading.attention.append(_read_softmax(node))
        for node in reversed(fused):
            reading.attention.append(_read_fused(node))
    return reading


def _walk(start: Node | None, consumers: dict[Node, list[Node]]) -> Iterator[Node]:
    """Yields every node once, breadth first from the loss, and notes who consumes whom."""
    if start is None:
        return
    queue: deque[Node] = deque([start])
    seen: set[Node] = {start}
    while queue:
        node = queue.popleft()
        yield node
        for following, _ in node.next_functions:
            if following is None:
                continue
            consumers.setdefault(following, []).append(node)
            if following not in seen:
                seen.add(following)
                queue.append(following)


def _inputs(node: Node) -> list[Node]:
    return [following for following, _ in node.next_functions if following is not None]


def _is_shape_only(node: Node) -> bool:
    return bool(node.name().split("Backward")[0] in _SHAPE_ONLY)


def _operation(node: Node) -> str:
    return str(node.name().split("Backward")[0])


def _skip_shapes(node: Node) -> Node:
    while _is_shape_only(node) and _inputs(node):
        node = _inputs(node)[0]
    return node


def signed(saved: int) -> int:
    """Returns an integer as it was given; nodes show negative ones as unsigned 64-bit numbers.

    >>> signed(2**64 - 100), signed(3)
    (-100, 3)
    """
    return saved - 2**64 if saved >= 2**63 else saved


def _read_loss(node: Node) -> LossReading | None:
    target = node._saved_target
    if node.name().startswith("NllLoss"):
        scores = node._saved_self
        if scores.ndim == 1:
            scores, target = scores.unsqueeze(0), target.reshape(1)
        counted = target != signed(node._saved_ignore_index)
        right, classes = scores.argmax(dim=1) == target, scores.shape[1]
    else:
        scores = node._saved_self
        if not bool(((target == 0) | (target == 1)).all()):
            return None
        counted = torch.ones_like(target, dtype=torch.bool)
        right, classes = (scores > 0) == (target > 0.5), 2
    samples = int(counted.sum())
    if samples == 0 or not bool(torch.isfinite(scores).all()):
        return None
    return LossReading(float((right & counted).sum()) / samples, classes, samples)


def _squashed_before_loss(node: Node) -> str | None:
    """Finds a softmax or sigmoid whose result enters a loss that normalises by itself."""
    name = node.name()
    inputs = _inputs(node)
    if not inputs:
        return None
    source = _skip_shapes(inputs[0])
    if name.startswith("NllLoss"):
        if source.name().startswith(_SOFTMAX):
            return "softmax result, without a logarithm, into a negative log-likelihood"
        if not source.name().startswith("LogSoftmax") or not _inputs(source):
            return None
        source = _skip_shapes(_inputs(source)[0])
        if source.name().startswith(_SOFTMAX):
            return "softmax result into cross-entropy, which applies its own softmax"
        if source.name().startswith("SigmoidBackward"):
            return "sigmoid result into cross-entropy, which applies its own softmax"
        return None
    if source.name().startswith("SigmoidBackward"):
        return "sigmoid result into a binary cross-entropy that applies its own sigmoid"
    return None


def _multiplies_values(node: Node, consumers: dict[Node, list[Node]]) -> bool:
    """Whether a softmax result weights other tensors, as attention does (and a loss does not)."""
    for consumer in consumers.get(node, []):
        operation = _operation(consumer)
        if operation in _MATMUL:
            return True
        if operation == "Mul":
            if sum(following is not None for following, _ in consumer.next_functions) > 1:
                return True  # weights * values; a dropout mask is no differentiable input
            if _multiplies_values(consumer, consumers):
                return True
        elif (_is_shape_only(consumer) or operation == "NativeDropout") and _multiplies_values(
            consumer, consumers
        ):
            return True
    return False


def _nearest_parameters(*starts: Node) -> tuple[Tensor, ...]:
    """The parameters of the first operations with weights that ``starts`` depend on."""
    found: dict[int, Tensor] = {}
    queue, seen = deque(starts), set(starts)
    while queue:
        node = queue.popleft()
        own = [
            source.variable
            for source in map(_skip_shapes, _inputs(node))
            if source.name() == "torch::autograd::AccumulateGrad"
        ]
        if own and _operation(node) in _PARAMETER_OPS:
            found.update({id(parameter): parameter for parameter in own})
            continue
        for following in _inputs(node):
            if following not in seen:
                seen.add(following)
                queue.append(following)
    return tuple(found.values())


def _read_softmax(node: Node) -> AttentionStatistics:
    weights = node._saved_result
    dim = signed(node._saved_dim)
    visible = _visible(node, weights)
    visible = visible if visible is None else visible.movedim(dim, -1)
    logits = _largest_logit(_inputs(node)[0], 1.0) if _inputs(node) else math.nan
    return _statistics(weights.movedim(dim, -1), visible, logits, _nearest_parameters(node))


def _visible(softmax: Node, weights: Tensor) -> Tensor | None:
    """Which positions no mask hides, shaped like ``weights``; None where a mask is not saved.

    Weights alone do not tell a hidden position from one whose weight is rounded to zero.
    """
    visible = torch.ones_like(weights, dtype=torch.bool)
    node, reshaped = softmax, False
    for _ in range(32):
        if not _inputs(node):
            return None
        node = _inputs(node)[0]
        operation = _operation(node)
        if operation in _MATMUL:  # a fill that does not hide shows in the weights
            return None if operation == "Baddbmm" else visible | (weights > 0)
        if operation == "MaskedFill" and not reshaped:
            visible = visible & ~node._saved_mask
        elif _is_shape_only(node):
            reshaped = True
        elif operation not in ("Mul", "Div"):
            return None
    return None


def _read_fused(node: Node) -> AttentionStatistics:
    query, key = node._saved_query, node._saved_key
    keep = max(1, _MAX_ELEMENTS // max(1, query.shape[1] * query.shape[2] * key.shape[2]))
    query, key = query[:keep], key[:keep]
    scale = getattr(node, "_saved_scale", None)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    if key.shape[1] != query.shape[1]:  # grouped-query attention
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = (query @ key.transpose(-2, -1)).float() * scale
    largest = float(logits.abs().max())
    mask = getattr(node, "_saved_attn_mask", None)
    if mask is None:
        mask = getattr(node, "_saved_attn_bias", None)
    if mask is not None:
        mask = mask[:keep] if mask.ndim == 4 and mask.shape[0] > 1 else mask
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    if getattr(node, "_saved_is_causal", False):
        rows, columns = logits.shape[-2:]
        hidden = torch.ones(rows, columns, dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(hidden, -math.inf)
    visible = logits > torch.finfo(query.dtype).min
    weights = logits.softmax(dim=-1)
    weights = weights.where(visible.any(dim=-1, keepdim=True), 0.0)  # as the operation has it
    return _statistics(weights, visible, largest, _nearest_parameters(*_inputs(node)[:2]))


def _statistics(
    weights: Tensor, seen: Tensor | None, largest_logit: float, parameters: tuple[Tensor, ...]
) -> AttentionStatistics:
    """Entropy and empty rows of attention weights (..., positions)."""
    length = weights.shape[-1]
    keep = min(_MAX_ROWS, max(1, _MAX_ELEMENTS // length))
    rows = weights.reshape(-1, length)[:keep].float()
    if seen is not None:
        visible = seen.reshape(-1, length)[:keep].sum(dim=-1)
    elif _is_causal(weights):
        visible = torch.arange(rows.shape[0], device=rows.device) % weights.shape[-2] + 1
    else:  # nothing of the mask was kept
        visible = (rows > 0).sum(dim=-1).clamp(min=2)
    # A row that can only see one position has no entropy to speak of.
    judged = ~torch.isnan(rows).any(dim=-1) & (visible > 1)
    entropy = torch.special.entr(rows).sum(dim=-1) / visible.clamp(min=2).float().log()
    share = torch.where(judged, entropy, 0.0).sum() / judged.sum()
    # Everything is NaN after the first NaN; only a saved mask still tells an empty row then.
    empty = torch.isnan(rows).all(dim=-1)
    if seen is not None:
        empty &= visible == 0
    known = seen is not None or math.isfinite(largest_logit)
    empty_share = float(empty.float().mean()) if known else math.nan
    return AttentionStatistics(parameters, float(share), largest_logit, empty_share)


def _is_causal(weights: Tensor) -> bool:
    """Whether no row of a square attention matrix sees a later position."""
    rows, columns = weights.shape[-2:] if weights.ndim > 1 else (0, 1)
    if rows != columns or rows < 2:
        return False
    first = weights.reshape(-1, rows, columns)[:8]
    return bool((first.triu(1) == 0).all())


def _largest_logit(node: Node, factor: float) -> float:
    """Largest absolute logit, computed again from the product it came from.

    Follows the graph from the softmax backwards over masks, shape changes and multiplications by a
    number, to the matrix product that made the logits. The maximum does not depend on shapes.
    """
    for _ in range(32):
        operation = _operation(node)
        if operation in _MATMUL:
            return factor * _largest_product(node)
        inputs = _inputs(node)
        if not inputs:
            return math.nan
        if operation in ("Mul", "Div"):
            other = getattr(node, "_saved_other", None)
            if other is None or (isinstance(other, Tensor) and other.numel() != 1):
                return math.nan
            factor = (
                factor * abs(float(other)) if operation == "Mul" else factor / abs(float(other))
            )
        elif not (_is_shape_only(node) or operation in ("MaskedFill", "Add", "Where", "Sub")):
            return math.nan
        node = inputs[0]
    return math.nan


def _largest_product(node: Node) -> float:
    operation = _operation(node)
    names = {
        "Bmm": ("_saved_self", "_saved_mat2"),
        "Mm": ("_saved_self", "_saved_mat2"),
        "Mv": ("_saved_self", "_saved_vec"),
        "Addmm": ("_saved_mat1", "_saved_mat2"),
        "Baddbmm": ("_saved_batch1", "_saved_batch2"),
    }
    left, right = (getattr(node, name, None) for name in names[operation])
    if left is None or right is None:  # an operand that needs no gradient is not saved
        return math.nan
    if left.ndim == 3:
        keep = max(1, _MAX_ELEMENTS // (left.shape[1] * right.shape[2]))
        left, right = left[:keep], right[:keep]
    else:
        left = left[:_MAX_ROWS]
    return float((left.float() @ right.float()).abs().max())
