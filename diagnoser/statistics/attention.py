"""Attention as the autograd graph keeps it: weights, visible positions, logits."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnoser.statistics.nodes import (
    MATMUL,
    MOST_ELEMENTS,
    MOST_ROWS,
    PARAMETER_OPS,
    Node,
    inputs_of,
    is_shape_only,
    is_there,
    operation_of,
    own_parameters,
    signed,
)


@dataclass(frozen=True, slots=True)
class AttentionStatistics:
    """One attention operation of the forward.

    ``parameters`` are the nearest parameters that its logits come from (query and key weights, or
    the context vector). ``entropy`` is the mean row entropy divided by the logarithm of the number
    of visible positions (0 one-hot, 1 uniform), ``largest_logit`` the largest absolute logit before
    the mask, ``empty_rows`` the share of rows that are NaN although their logits are finite (every
    position masked). NaN where it cannot be read. ``entropy_by_head`` is the same for each head,
    where their number was given and the weights are laid out by it; else empty.
    """

    parameters: tuple[Tensor, ...]
    entropy: float
    largest_logit: float
    empty_rows: float
    entropy_by_head: tuple[float, ...] = ()


HeadsOf = Callable[[tuple[Tensor, ...]], int]  # of the attention that parameters belong to


def multiplies_values(node: Node, consumers: dict[Node, list[Node]]) -> bool:
    """Whether a softmax result weights other tensors, as attention does (and a loss does not)."""
    for consumer in consumers.get(node, []):
        operation = operation_of(consumer)
        if operation in MATMUL:
            return True
        if operation == "Mul":
            if sum(following is not None for following, _ in consumer.next_functions) > 1:
                return True  # weights * values; a dropout mask is no differentiable input
            if multiplies_values(consumer, consumers):
                return True
        elif (is_shape_only(consumer) or operation == "NativeDropout") and multiplies_values(
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
        own = own_parameters(node)
        if own and operation_of(node) in PARAMETER_OPS:
            found.update({id(parameter): parameter for parameter in own})
            continue
        for following in inputs_of(node):
            if following not in seen:
                seen.add(following)
                queue.append(following)
    return tuple(found.values())


def read_softmax(node: Node, heads_of: HeadsOf | None = None) -> AttentionStatistics:
    """Reads an attention written with a softmax."""
    weights = node._saved_result
    dim = signed(node._saved_dim)
    visible = _visible(node, weights)
    visible = visible if visible is None else visible.movedim(dim, -1)
    logits = _largest_logit(inputs_of(node)[0], 1.0) if inputs_of(node) else math.nan
    parameters = _nearest_parameters(node)
    heads = heads_of(parameters) if heads_of is not None else 0
    return _statistics(weights.movedim(dim, -1), visible, logits, parameters, heads)


def _visible(softmax: Node, weights: Tensor) -> Tensor | None:
    """Which positions no mask hides, shaped like ``weights``; None where a mask is not saved.

    Weights alone do not tell a hidden position from one whose weight is rounded to zero.
    """
    visible = torch.ones_like(weights, dtype=torch.bool)
    node, reshaped = softmax, False
    for _ in range(32):
        if not inputs_of(node):
            return None
        node = inputs_of(node)[0]
        operation = operation_of(node)
        if operation in MATMUL:  # a fill that does not hide shows in the weights
            return None if operation == "Baddbmm" else visible | (weights > 0)
        if operation == "MaskedFill" and not reshaped:
            visible = visible & ~node._saved_mask
        elif is_shape_only(node):
            reshaped = True
        elif operation not in ("Mul", "Div"):
            return None
    return None


def read_fused(node: Node, heads_of: HeadsOf | None = None) -> AttentionStatistics:
    """Reads a fused attention, whose weights are computed again."""
    query, key = node._saved_query, node._saved_key
    if not is_there(query, key):
        parameters = _nearest_parameters(*inputs_of(node)[:2])
        return AttentionStatistics(parameters, math.nan, math.nan, math.nan)
    keep = max(1, MOST_ELEMENTS // max(1, query.shape[1] * query.shape[2] * key.shape[2]))
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
    parameters = _nearest_parameters(*inputs_of(node)[:2])
    heads = heads_of(parameters) if heads_of is not None else 0
    return _statistics(weights, visible, largest, parameters, heads)


def _statistics(
    weights: Tensor,
    seen: Tensor | None,
    largest_logit: float,
    parameters: tuple[Tensor, ...],
    heads: int,
) -> AttentionStatistics:
    """Entropy and empty rows of attention weights (..., positions)."""
    length = weights.shape[-1]
    keep = min(MOST_ROWS, max(1, MOST_ELEMENTS // length))
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
    own = _by_head(torch.where(judged, entropy, math.nan), weights.shape, heads)
    return AttentionStatistics(parameters, float(share), largest_logit, empty_share, own)


def _by_head(entropy: Tensor, shape: torch.Size, heads: int) -> tuple[float, ...]:
    """Mean entropy of each head, from that of the first rows of weights (..., rows, positions).

    Weights are laid out (batch, heads, ...) or (batch * heads, ...).
    """
    if heads < 2 or len(shape) < 3 or shape[-3] != heads and (len(shape) > 3 or shape[0] % heads):
        return ()
    rows = shape[-2]
    whole = len(entropy) // (heads * rows)  # samples of which every head was looked at
    means = entropy[: whole * heads * rows].reshape(whole, heads, rows).nanmean(dim=(0, 2))
    return tuple(means.tolist()) if whole else ()


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
        operation = operation_of(node)
        if operation in MATMUL:
            return factor * _largest_product(node)
        inputs = inputs_of(node)
        if not inputs:
            return math.nan
        if operation in ("Mul", "Div"):
            other = getattr(node, "_saved_other", None)
            if other is None or (isinstance(other, Tensor) and other.numel() != 1):
                return math.nan
            factor = (
                factor * abs(float(other)) if operation == "Mul" else factor / abs(float(other))
            )
        elif not (is_shape_only(node) or operation in ("MaskedFill", "Add", "Where", "Sub")):
            return math.nan
        node = inputs[0]
    return math.nan


def _largest_product(node: Node) -> float:
    operation = operation_of(node)
    names = {
        "Bmm": ("_saved_self", "_saved_mat2"),
        "Mm": ("_saved_self", "_saved_mat2"),
        "Mv": ("_saved_self", "_saved_vec"),
        "Addmm": ("_saved_mat1", "_saved_mat2"),
        "Baddbmm": ("_saved_batch1", "_saved_batch2"),
    }
    left, right = (getattr(node, name, None) for name in names[operation])
    # An operand that needs no gradient is not saved.
    if left is None or right is None or not is_there(left, right):
        return math.nan
    if left.ndim == 3:
        keep = max(1, MOST_ELEMENTS // (left.shape[1] * right.shape[2]))
        left, right = left[:keep], right[:keep]
    else:
        left = left[:MOST_ROWS]
    return float((left.float() @ right.float()).abs().max())
