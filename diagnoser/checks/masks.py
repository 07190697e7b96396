"""Checks of what attention may look at: padding, the future, what a mask is worth."""

from __future__ import annotations

import torch
from torch import Tensor

from diagnoser.checks.attention import EXACT, HIDDEN
from diagnoser.checks.reading_attention import Attention, some
from diagnoser.checks.seen import Found, Seen
from diagnoser.checks.trace import Operation
from diagnoser.errors import MeasurementError

SUMS_TO_ONE = 0.03  # how far weights of a query may be from it


def _keys(seen: Seen, attention: Attention) -> tuple[Tensor, Tensor] | None:
    """Weights (batch, heads, queries, keys), and which keys are padding, (batch, keys)."""
    padding = seen.padding
    if attention.first is not None:
        if attention.softmax.args[0].shape[0] != len(padding):
            return None
        padding = padding[: attention.first]
    n, _, keys = attention.weights.shape
    if keys != padding.shape[1] or n % len(padding):
        return None
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
        known = torch.isfinite(total) & (total > HIDDEN)
        if not bool(known.any()) or float((total[known] - 1).abs().mean()) > SUMS_TO_ONE:
            continue  # they are not shares of a query's attention: another check says so
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
    found.components("padding_weight", even)
    found.components("content_weight", content, min)
    found.components("padded_query_hidden", queries)


def padding_index(seen: Seen, found: Found) -> None:
    """Finds an embedding that takes another token for padding than the batch has.

    ``padding_index_content``: share of the tokens that are none of the batch's padding and that the
    embedding has as its ``padding_idx``, whose vector never learns.

    Source: torch.nn.Embedding, PyTorch documentation.
    Cannot see: batches without padding that is recognised.
    Costs: a comparison of one batch.
    """
    tokens, padding = seen.tokens, seen.padding
    shares = []
    for operation in seen.trace.named("embedding"):
        index = operation.args[2] if len(operation.args) > 2 else -1  # noqa: PLR2004
        indices = operation.inputs[1]
        if not isinstance(index, int) or index < 0 or indices.numel() != tokens.numel():
            continue
        if torch.equal(indices.reshape(tokens.shape), tokens):
            shares.append(float((tokens[~padding] == index).float().mean()))
    if not shares:
        raise MeasurementError("no embedding of the tokens has a padding index")
    found.run("padding_index_content", max(shares))


def mask_value(seen: Seen, found: Found) -> None:
    """Finds masks that do not hide, and rows in which everything is hidden.

    ``masked_rows``: share of rows all of whose positions are hidden. ``mask_leak``: the largest
    weight on a hidden position of other rows: the value that should hide it is too small for the
    scores. ``mask_margin``: by how much scores are lowered, over the spread of the scores (from the
    highest to the lowest): where it is small, they can outgrow it.

    Source: karpathy/minGPT#75, pytorch/pytorch#41508.
    Cannot see: masks that are multiplied into the scores.
    Costs: nothing beyond the trace.
    """
    rows, leak, margin = [], [], []
    for name, attention in seen.attentions:
        logits, raw, hidden = attention.logits, attention.raw, attention.hidden
        if hidden is None or logits is None or raw is None or raw.shape != logits.shape:
            continue
        hidden = hidden[: len(some(raw))]
        rows.append((name, float(hidden.all(-1).float().mean())))
        elsewhere = hidden & ~hidden.all(-1, keepdim=True)
        if not bool(elsewhere.any()):
            continue
        leaked = some(attention.weights)[elsewhere]
        leaked = leaked[torch.isfinite(leaked)]
        if len(leaked):
            leak.append((name, float(leaked.max())))
        scores = some(raw)
        drop = (scores - some(logits))[elsewhere]
        drop = drop[torch.isfinite(drop)]
        if len(drop):
            spread = float(scores.max() - scores.min())
            margin.append((name, float(drop.min()) / max(spread, 1e-6)))
    found.components("masked_rows", rows)
    found.components("mask_leak", leak)
    found.components("mask_margin", margin, min)


def causality(seen: Seen, found: Found) -> None:
    """Finds attention that sees the future of what it is to predict, or needlessly does not.

    ``future_weight``: share of attention on later positions, in self-attention whose queries and
    keys are made of inputs that are the loss's next targets (a decoder's, not its encoder's).
    Where a sample has a single target and no later position is ever seen: ``needless_causal``, 1
    where it is read from a mean over positions, most of which know little; ``first_sees_itself``,
    1 where it is read from the first position, which knows nothing but itself.

    Source: huggingface/transformers#48745, xformers#103, DEFault++ VEC.
    Cannot see: targets that are not recognised as next inputs (integers of the input's length).
    Costs: nothing beyond the trace.
    """
    targets = next_inputs(seen)
    one_each = any(
        loss.target is not None and loss.target.ndim and loss.target.shape[0] == seen.batch
        and (loss.target.ndim == 1 or loss.target.numel() == seen.batch)
        for loss in seen.losses
    )  # fmt: skip
    if not targets and not one_each:
        raise MeasurementError("what the loss compares with has no order that is known")
    for name, attention in seen.attentions:
        if not attention.is_self:
            continue
        weights = some(attention.weights)
        length = weights.shape[-1]
        later = weights.triu(1).sum(-1)
        if attention.hidden is not None:  # a row that sees nothing is spread over everything
            later = later.masked_fill(attention.hidden[: len(later)].all(-1), torch.nan)
        later = later[:, :-1]
        later = later[torch.isfinite(later)]  # a row that is not finite shows nothing
        if not len(later):
            continue
        if any(length == n and _is_made_of(seen, attention, tokens) for tokens, n in targets):
            found.component("future_weight", name, float(later.mean()))
        elif one_each and not targets and length > 2:
            read = _read_from(seen, attention, length) if float(later.max()) < HIDDEN else ""
            found.component("needless_causal", name, read == "mean")
            found.component("first_sees_itself", name, read == "first")


def _read_from(seen: Seen, attention: Attention, length: int) -> str:
    """What of an attention's positions goes on to the target: their ``mean``, the ``first``."""
    for operation in seen.trace.descendants(attention.product, 400):
        shape = operation.inputs[0].shape if operation.inputs else ()
        if operation.name in ("mean", "sum", "amax", "max") and any(
            shape[axis] == length for axis in _reduced(operation)
        ):
            return "mean"
        if operation.name == "select" and len(operation.args) > 2:
            _, axis, index = operation.args[:3]
            if shape[axis] == length and index == 0:
                return "first"
    return ""


def _reduced(operation: Operation) -> list[int]:
    """The axes that a reduction is over: not those of an RMS norm, which are features."""
    if len(operation.args) < 2:
        return []
    axes = operation.args[1]
    several = axes if isinstance(axes, list | tuple) else [axes]
    return [axis for axis in several if isinstance(axis, int)]


def _is_made_of(seen: Seen, attention: Attention, tokens: Tensor) -> bool:
    """Whether both queries and keys depend on an input."""
    trace, scores, sides = seen.trace, attention.scores, attention.sides
    if scores is None or sides is None:
        return False
    places = {
        operation.index
        for operation in trace.named("embedding")
        if operation.inputs[1].shape == tokens.shape and torch.equal(operation.inputs[1], tokens)
    }
    return all(
        any(o.index in places for o in trace.ancestors(trace.producer(scores, side)))
        for side in sides
    )


def next_inputs(seen: Seen) -> list[tuple[Tensor, int]]:
    """Returns the integer inputs whose next entries the loss compares with, and their length."""
    found: list[tuple[Tensor, int]] = []
    for tensor in seen.token_inputs:
        rows = tensor.reshape(-1, tensor.shape[-1])
        for tokens in (rows, rows.t()):
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
                    found.append((tensor, tokens.shape[1]))
    return found


def _same(target: Tensor, later: Tensor, ignored: int | None) -> bool:
    counted = (
        target != ignored if ignored is not None else torch.ones_like(target, dtype=torch.bool)
    )
    if int(counted.sum()) < 8:
        return False
    return float((target == later)[counted].float().mean()) > 0.9
