"""Interventional probes: change something in a copy of the batch, and see what that changes.

Each probe runs the replica once (`sample_leak` up to twice), in eval mode and without gradients.
A change is what the outputs differ by, relative to their spread over the batch; differences below
`NOISE` are rounding.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from diagnoser.checks.calls import changed
from diagnoser.checks.masks import next_inputs
from diagnoser.checks.reading_attention import Attention, find_attentions
from diagnoser.checks.seen import Found, Seen, first_float
from diagnoser.checks.trace import PRODUCTS, Trace
from diagnoser.errors import MeasurementError

POSITIONS = re.compile(
    r"(^|[._])(position|pos(_?(emb|enc|table|code))|pos\b|pe\b|wpe|rope|rotary|alibi)",
    re.IGNORECASE,
)
NOISE = 1e-4  # of the outputs' spread
SCATTERS = frozenset({"scatter_add", "scatter_reduce", "index_add", "index_put", "segment_reduce"})
SPARSE = frozenset({"_sparse_mm", "_sparse_addmm"})


def _spread(output: Tensor) -> float:
    """Root mean square difference of the outputs from their mean."""
    value = output.float()
    return float((value - value.mean()).square().mean().sqrt())


def _swapped(seen: Seen, axis: int, trace: Trace | None = None) -> Tensor:
    """Runs the model with the first slice along an axis of its inputs replaced by the last."""
    size = next(t.shape[axis] for t in seen.main.inputs if t.ndim > axis)

    def change(tensor: Tensor) -> Tensor:
        if tensor.ndim <= axis or tensor.shape[axis] != size:
            return tensor
        new = tensor.detach().clone()
        new.select(axis, 0).copy_(tensor.select(axis, size - 1))
        return new

    args, kwargs = changed(seen.main.args, change), changed(dict(seen.main.kwargs), change)
    return first_float(seen.replica.run(args, kwargs, trace=trace))


def _changes_along(before: Tensor, after: Tensor, axis: int) -> tuple[float, float]:
    """Root mean square change of the first slice along an axis, and of the mean other one."""
    if after.shape != before.shape:
        raise MeasurementError("the shape of the output depends on the input")
    if not bool(torch.isfinite(after).all() and torch.isfinite(before).all()):
        raise MeasurementError("the output is not finite")
    change = (after - before).float().movedim(axis, 0)
    change = change.reshape(change.shape[0], -1).square().mean(1).sqrt()
    return float(change[0]), float(change[1:].mean())


def sample_leak(seen: Seen, found: Found) -> None:
    """Finds samples that depend on each other, and outputs that do not depend on the input.

    ``sample_leak_begins``: the same as the next, of the attention behind which it is first seen.
    ``sample_leak``: how much the outputs of other samples change when the first sample is replaced
    by the last, over how much its own changes. ``input_influence``: how much its own output
    changes, over the spread of the outputs (0: the same answer to every input).

    Source: DEFault++ (cross-example leak), TheDeepChecker (input dependency).
    Cannot see: a batch axis that is not the first (it says so), leaks in train mode alone (batch
    norm, contrastive losses); what is given as one set, such as the nodes of a graph (n, features),
    whose members are to attend to each other, along edges or all to all.
    Costs: one forward, two where it finds a leak.
    """
    base = first_float(seen.outputs)
    size = seen.batch
    if base.shape[0] != size:
        raise MeasurementError("the first axis of the output is not that of the input")
    if base.shape[:2] == (size, size) and base.ndim == 2:
        raise MeasurementError("the output compares each sample with each")
    after = _swapped(seen, 0)
    own, others = _changes_along(base, after, 0)
    spread = _spread(base)
    leaks = own > NOISE * spread > 0 and others > NOISE * spread
    other_axis = leaks and base.ndim > 2
    if other_axis and any(t.shape[1:2] == base.shape[1:2] for t in seen.main.inputs):
        alone, beside = _changes_along(base, _swapped(seen, 1), 1)
        if alone > NOISE * spread and beside <= NOISE * spread:
            raise MeasurementError("the samples may lie along the second axis of the input")
    if leaks and base.shape[:2] == (size, size):
        alone, beside = _changes_along(base, after, 1)
        if alone > NOISE * spread and beside <= NOISE * spread:
            raise MeasurementError("the samples lie along the second axis of the output")
    found.run("input_influence", own / spread if spread > 0 else 0.0)
    if leaks and _is_one_set(seen):
        raise MeasurementError("what is given is one set, whose members attend to each other")
    if own > NOISE * spread > 0:
        found.run("sample_leak", others / own if leaks else 0.0)
        found.place("model", seen.main.place)
    if leaks and not other_axis:  # two forwards are enough
        trace = Trace()
        _swapped(seen, 0, trace)
        place = _where_it_begins(seen, trace, size)
        if place is not None:
            found.component("sample_leak_begins", place, others / own)


def _is_one_set(seen: Seen) -> bool:
    """Whether the first axis of the inputs holds what belongs together, such as nodes of a graph.

    Either attention runs along it and there is no other axis, or a matrix that was given combines
    its entries (an adjacency), or they are added up where an index says (edges).
    """
    size = seen.batch
    if not seen.token_inputs and all(t.ndim < 3 for t in seen.main.inputs):
        with suppress(MeasurementError):
            if any(a.weights.shape[-2:] == (size, size) for _, a in seen.attentions):
                return True
    try:
        trace = seen.trace
    except MeasurementError:
        return False
    return any(
        operation.name in SCATTERS and operation.result.shape[:1] == (size,)
        for operation in trace.operations
    ) or any(
        not given.requires_grad and tuple(given.shape) == (size, size)
        for operation in trace.named(*PRODUCTS, *SPARSE)
        for given in trace.given_into(operation)
    )


def _where_it_begins(seen: Seen, changed_run: Trace, size: int) -> str | None:
    """Returns the attention behind which the other samples of two runs first differ."""
    for one, other in zip(seen.trace.operations, changed_run.operations, strict=False):
        before, after = one.result, other.result
        if one.name != other.name or before.shape != after.shape:
            return None
        if not before.is_floating_point() or not before.ndim or before.shape[0] != size:
            continue
        change = (after - before)[1:].abs()
        if bool((change > NOISE * before.abs().amax()).any()):
            behind = [name for name, a in seen.attentions if a.scores and a.index <= one.index]
            return (
                behind[-1]
                if behind
                else seen.layer_of(seen.trace.nearest(one, list(seen.parameters.values())))
            )
    return None


def order_blind(seen: Seen, found: Found) -> None:
    """Finds attention that cannot tell positions apart.

    ``position_share``: how much the inputs of the first self-attention differ between positions
    when every position holds the same content, over how much they differ between positions of the
    real batch. 0: nothing says which position is which. ``positions_unused``: 1 where that is so
    although the model has something that is named after positions.

    Source: Lightning-AI/pytorch-lightning#20099, DEFault++ POE, DiffPoseTalk#20.
    Cannot see: whether order matters for the task; positions that enter behind the first attention
    (relative biases, rotations): where there are any, it is not measured.
    Costs: one forward.
    """
    attention, causal = _with_positions(seen)
    assert attention.query is not None
    real = attention.query.float()

    def constant(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bool or tensor.ndim < 2:
            return tensor
        if tensor.is_floating_point():
            return torch.full_like(tensor, 0.5)
        if any(tensor is t for t in seen.token_inputs):
            values = tensor.reshape(-1)
            middle = values.sort().values[len(values) // 2]
            return torch.full_like(tensor, int(middle))
        return tensor

    trace = Trace()
    args, kwargs = changed(seen.main.args, constant), changed(dict(seen.main.kwargs), constant)
    seen.replica.run(args, kwargs, trace=trace)
    again = find_attentions(trace, list(seen.parameters.values()))
    same = next((a for a in again if a.is_self and a.query is not None), None)
    flat = None if same is None else same.query
    if same is None or flat is None:
        raise MeasurementError("no self-attention on constant content")
    flat = flat.float()
    if flat.shape != real.shape:
        raise MeasurementError("the shape of attention depends on the content")
    axis = -2
    differs = (flat - flat.mean(axis, keepdim=True)).square().mean().sqrt()
    usual = (real - real.mean(axis, keepdim=True)).square().mean().sqrt()
    if not bool(torch.isfinite(differs) and torch.isfinite(usual)):
        raise MeasurementError("the inputs of attention are not finite")
    if not float(usual) > 0:
        raise MeasurementError("all positions of the batch are the same")
    ratio = float(differs / usual)
    logits, raw = same.logits, same.raw
    if ratio < NOISE and logits is not None and raw is not None:
        # A bias that depends on the distance (ALiBi, T5) is added to the scores.
        scores = logits[torch.isfinite(logits).all(-1)]
        varies = scores - scores.mean(-1, keepdim=True)
        unmasked = varies[varies.abs().amax(-1) < 1e3] if len(varies) else varies
        if unmasked.numel() and float(unmasked.abs().max()) > 1e-3:
            raise MeasurementError("positions enter through the scores of attention")
    share = ratio if ratio > NOISE else 0.0
    if share == 0.0:
        _refuse_unseen_positions(seen)
    if not causal:
        found.run("position_share", share)
    found.run("positions_unused", share == 0.0 and _has_positions(seen.main.module))
    found.place("model", seen.main.place)


def _has_positions(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_modules()]
    names += [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    return any(POSITIONS.search(name) for name in names)


def _with_positions(seen: Seen) -> tuple[Attention, bool]:
    """Returns the first attention that is to tell positions apart, and whether it is causal."""
    attention = next((a for _, a in seen.attentions if a.is_self and a.query is not None), None)
    if attention is None:
        raise MeasurementError("no self-attention in the model's forward")
    if attention.weights.shape[-1] < 3:
        raise MeasurementError("self-attention over two positions")
    if _is_one_set(seen):
        raise MeasurementError("what is given is one set: its members have no positions")
    causal = attention.hidden is not None and _sees_no_later(attention.weights)
    if causal and not _has_positions(seen.main.module):
        raise MeasurementError("a causal mask tells positions apart by itself")
    return attention, causal


def _refuse_unseen_positions(seen: Seen) -> None:
    """Raises where positions have no effect yet, or are multiplied out of an input (of a graph)."""
    trace = seen.trace
    named = [tensor for name, tensor in seen.parameters.items() if POSITIONS.search(name)]
    if any(not bool(tensor.any()) for tensor in named):
        raise MeasurementError("positions are learned, and still zero")
    own = set(map(id, named))
    others = set(map(id, seen.parameters.values())) - own
    for operation in trace.named(*PRODUCTS):
        if own.isdisjoint(map(id, trace.given_into(operation))):
            continue
        leaves = trace.leaves(operation)
        if leaves & seen.given and not leaves & others:
            raise MeasurementError("positions are among the inputs, which were made alike")


def _sees_no_later(weights: Tensor) -> bool:
    above = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).triu(1)
    later = weights[:64][:, above]
    later = later[torch.isfinite(later)]
    return len(later) > 0 and float(later.max()) < 1e-6


def padding_content(seen: Seen, found: Found) -> None:
    """Finds outputs that depend on what the padding holds.

    ``padding_influence``: how much the outputs change (of positions that are no padding) when the
    embedding of the padding is replaced by random vectors of usual size, over their spread.

    Source: DEFault++ (pad mass); yg211/bert_nli#3, jina-ai/clip-as-service#76 (pooling).
    Cannot see: padding that is not embedded, or that is not recognised; models with recurrent or
    convolutional layers, which run over it and learn to pass it.
    Costs: one forward.
    """
    if any(isinstance(m, nn.RNNBase | _ConvNd) for m in seen.replica.module.modules()):
        raise MeasurementError("recurrent and convolutional layers run over padding")
    padding, tokens = seen.padding, seen.tokens
    base = first_float(seen.outputs)
    generator = torch.Generator().manual_seed(0)
    handles = []

    def replace(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        indices = args[0]
        if indices.numel() != tokens.numel() or not torch.equal(
            indices.reshape(tokens.shape), tokens
        ):
            return None
        size = output[~padding.reshape(indices.shape)].square().mean().sqrt()
        noise = torch.randn(output.shape, generator=generator).to(output) * size
        return torch.where(padding.reshape(indices.shape).unsqueeze(-1), noise, output)

    for module in seen.replica.module.modules():
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(replace))
    try:
        if not handles:
            raise MeasurementError("no module embeds the input")
        after = first_float(seen.replica.run())
    finally:
        for handle in handles:
            handle.remove()
    if after.shape != base.shape:
        raise MeasurementError("the shape of the output depends on the input")
    change = (after - base).float()
    if change.shape[:2] == padding.shape:
        change = change[~padding]  # what is said of padding is nobody's concern
    if not bool(torch.isfinite(change).all()):
        raise MeasurementError("the output is not finite")
    spread = _spread(base)
    if not 0 < spread < math.inf:
        raise MeasurementError("the outputs of the batch are all the same, or not finite")
    size = float(change.square().mean().sqrt())
    found.run("padding_influence", size / spread if size > NOISE * spread else 0.0)


def future(seen: Seen, found: Found) -> None:
    """Finds outputs that change with later inputs although they are to predict them.

    ``future_influence``: how much the outputs of the first half of positions change when the second
    half of the input is replaced by another sample's, over how much those of the second half do.

    Source: huggingface/transformers#48745, unsloth-zoo#963.
    Cannot see: models whose targets are not recognised as next inputs.
    Costs: one forward.
    """
    targets = next_inputs(seen)
    if not targets:
        raise MeasurementError("the loss does not compare with next inputs")
    tokens = next((t for t, length in targets if t.ndim == 2 and t.shape[-1] == length), None)
    if tokens is None:
        raise MeasurementError("time is not the last axis of the input")
    base = first_float(seen.outputs)
    length = tokens.shape[1]
    axis = next((i for i, n in enumerate(base.shape) if n == length and i), None)
    if axis is None:
        raise MeasurementError("no axis of the output has the input's length")
    half = length // 2
    new = tokens.clone()
    new[:, half:] = tokens.roll(1, 0)[:, half:]
    args, kwargs = seen.changed_inputs(tokens, new)
    after = first_float(seen.replica.run(args, kwargs))
    if after.shape != base.shape:
        raise MeasurementError("the shape of the output depends on the input")
    change = (after - base).float()
    if not bool(torch.isfinite(change).all()):
        raise MeasurementError("the output is not finite")
    early = float(change.narrow(axis, 0, half).square().mean().sqrt())
    late = float(change.narrow(axis, half, length - half).square().mean().sqrt())
    if not late > 0:
        raise MeasurementError("the outputs do not depend on the input")
    found.run("future_influence", early / late if early > NOISE * late else 0.0)
