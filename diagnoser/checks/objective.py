"""Checks of what the loss is given: scores, targets, and the batch they come from."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diagnoser.checks.calls import LossCall, distinct
from diagnoser.checks.losses import Loss
from diagnoser.checks.seen import Found, Seen
from diagnoser.checks.trace import PRODUCTS, SHAPE_ONLY
from diagnoser.errors import MeasurementError

KEEPS_SIZE = frozenset({"constant_pad_nd", "native_dropout", "masked_fill", "where"})
CONVOLUTIONS = frozenset({"convolution", "mkldnn_convolution", "mkldnn_rnn_layer"})
MOST_LABELS = 4096
LEAST_LABELS = 8
MOST_SHIFT = 2
REGRESSION = ("mse", "l1", "smooth_l1", "huber")


def _loss_with_target(seen: Seen, *kinds: str) -> Loss:
    for loss in seen.losses:
        if loss.target is not None and (not kinds or loss.kind in kinds):
            return loss
    wanted = f" ({', '.join(kinds)})" if kinds else ""
    raise MeasurementError(f"no loss function with a target{wanted} was seen")


def scores_into_loss(seen: Seen, found: Found) -> None:
    """Finds scores that are not what their loss expects.

    ``not_log_probabilities``: share of rows that a negative log-likelihood is given whose
    exponentials do not sum to one. ``target_gradient``: 1 where gradients flow into both sides of a
    regression or a binary cross-entropy: the target misses a ``detach``.

    Source: UMLAUT (missing softmax); ariecattan/SciCo#2.
    Cannot see: losses written by hand; divergences, both sides of which are often drawn to each
    other (R-Drop). Probabilities into cross-entropy are
    `probabilities_into_loss` of the graph.
    Costs: the sum of exponentials of one batch of scores.
    """
    seen_any = False
    for loss in seen.losses:
        if loss.kind == "nll" and loss.scores is not None:
            rows = loss.scores.detach().float()
            rows = rows.movedim(1, -1) if rows.ndim > 1 else rows
            total = rows.exp().sum(-1)
            found.run("not_log_probabilities", float(((total - 1).abs() > 0.01).float().mean()))
            seen_any = True
        if loss.kind in (*REGRESSION, "bce_logits", "bce"):
            both = loss.target_has_gradient and loss.scores_have_gradient
            found.run("target_gradient", float(both))
            seen_any = True
        found.place("loss", loss.place)
    if not seen_any:
        raise MeasurementError("no loss function of torch was seen near the root")


def labels(seen: Seen, found: Found) -> None:
    """Finds labels of one class, and batches of one class.

    ``label_classes``: different labels seen so far. ``batch_label_entropy``: mean entropy of the
    labels of a batch over that of all labels seen: 0 where each batch holds one class, about 1
    where batches are drawn at random.

    Source: UMLAUT, benchmark operator D2.
    Cannot see: labels of multi-label tasks; an order that is not one of classes.
    Costs: a count of one batch's labels.
    """
    loss = _loss_with_target(seen, "nll")
    target = loss.target
    assert target is not None
    every = target.reshape(-1)
    flat = every[every != loss.ignored][:MOST_LABELS] if loss.ignored is not None else every
    if flat.is_floating_point() or not len(flat):
        raise MeasurementError("the loss is given no class labels")
    counts = Counter(flat.tolist())
    others = (-1 if loss.ignored is None else loss.ignored) >= 0 and len(flat) < len(every)
    if len(counts) == 1 and others and len(every) <= MOST_LABELS:
        raise MeasurementError("the loss ignores all labels but those of one class")
    pooled: dict[int, int] = seen.memory.setdefault("labels", {})
    for value, count in counts.items():
        pooled[value] = pooled.get(value, 0) + count
    if len(pooled) == 1 and loss.scores is not None and not _has_head(seen, loss.scores):
        raise MeasurementError("the classes are candidates: no layer of the model is as wide")
    batches, entropies = seen.memory.get("label_entropies", (0, 0.0))
    batches, entropies = batches + 1, entropies + _entropy(list(counts.values()))
    seen.memory["label_entropies"] = batches, entropies
    found.run("label_classes", float(len(pooled)))
    whole = _entropy(list(pooled.values()))
    if whole > 0 and len(flat) >= LEAST_LABELS and batches >= 2:
        expected = whole - (len(pooled) - 1) / (2 * len(flat))  # of a small sample (Miller 1955)
        if expected > 0.1 * whole:
            found.run("batch_label_entropy", entropies / batches / expected)


def _has_head(seen: Seen, scores: Tensor) -> bool:
    """Whether any parameter has as many rows as there are classes; sampled candidates have none."""
    return scores.ndim > 1 and any(
        scores.shape[1] in (p.shape[0], p.shape[-1]) for p in seen.parameters.values() if p.ndim
    )


def labels_in_input(seen: Seen, found: Found) -> None:
    """Finds labels that are part of the input.

    ``labels_in_input``: share of counted targets that equal the input of the same position: 1 where
    the labels of a language model were not shifted. ``target_shift``: by how many positions targets
    are ahead of inputs, where nearly all of them are: 2 where labels were shifted twice, by the
    script and by a model that does so itself, below 0 where they were shifted the wrong way.

    Source: TransformerLens#1607, benchmark operator L3.
    Cannot see: leaks through anything but the integers that are embedded.
    Costs: a comparison of one batch.
    """
    loss = _loss_with_target(seen, "nll")
    target = loss.target
    assert target is not None
    shifts = [_shift(tokens, own) for own in seen.losses for tokens in seen.token_inputs]
    if any(shift is not None for shift in shifts):
        found.run("target_shift", min(shift for shift in shifts if shift is not None))
    for tokens in seen.token_inputs:
        if tokens.numel() == target.numel() and tokens.shape[-1] > 1 and len(distinct(tokens)) > 2:
            same = tokens.reshape(-1) == target.reshape(-1)
            if loss.ignored is not None:
                same = same[target.reshape(-1) != loss.ignored]
            if same.numel() >= LEAST_LABELS:
                found.run("labels_in_input", float(same.float().mean()))
                return
    raise MeasurementError("no integer input has a label at each position")


def _shift(tokens: Tensor, loss: Loss) -> int | None:
    """Returns by how many positions the targets of a loss are ahead of some tokens, if they are."""
    target = loss.target
    if target is None or target.is_floating_point() or loss.kind != "nll":
        return None
    rows = tokens.reshape(-1, tokens.shape[-1])
    n, length = rows.shape
    if target.numel() % n or not length - MOST_SHIFT <= target.numel() // n <= length:
        return None
    wanted = target.reshape(n, -1)
    shares: dict[int, float] = {}
    for shift in range(-MOST_SHIFT, MOST_SHIFT + 1):
        start, begin = max(shift, 0), max(-shift, 0)
        known = min(length - start, wanted.shape[1] - begin)
        own, ahead = wanted[:, begin : begin + known], rows[:, start : start + known]
        same = (own == ahead)[own != loss.ignored] if loss.ignored is not None else own == ahead
        if same.numel() >= LEAST_LABELS:
            shares[shift] = float(same.float().mean())
    best = max(shares, key=lambda shift: shares[shift], default=None)
    others = [share for shift, share in shares.items() if shift != best]
    if best is None or shares[best] < 0.95 or max(others, default=0.0) > 0.8:
        return None  # repeated tokens look alike at every shift
    return best


def _entropy(counts: list[int]) -> float:
    total = sum(counts)
    return -sum(c / total * math.log(c / total) for c in counts if c)


def padded_targets(seen: Seen, found: Found) -> None:
    """Finds a loss that counts the padding.

    ``padded_target_share``: share of the counted targets that lie on padding of the input.

    Source: benchmark operator L3; loss over padding.
    Cannot see: padding that is not recognised, targets of another length than the input.
    Costs: one comparison.
    """
    loss = _loss_with_target(seen, "nll")
    target = loss.target
    assert target is not None
    on_padding = _padding_at(seen, target)
    counted = target.reshape(-1) != loss.ignored if loss.ignored is not None else None
    where = on_padding.reshape(-1)
    share = where if counted is None else where[counted]
    # A target that is padding, too, teaches nothing but to repeat it.
    if not share.numel():
        raise MeasurementError("the loss counts no target of this batch")
    found.run("padded_target_share", float(share.float().mean()))


def _padding_at(seen: Seen, target: Tensor) -> Tensor:
    """Which targets lie on padding of the first input that has as many positions."""
    sized = [t.reshape(-1, t.shape[-1]) for t in seen.token_inputs]
    for tokens in sized:
        for kept in (tokens, tokens[:, 1:]):
            if kept.numel() == target.numel():
                return seen.padding_in(tokens)[:, -kept.shape[1] :]
    if not sized:
        raise MeasurementError("no input of integers (batch, length) is embedded")
    raise MeasurementError("targets are not of the input's positions")


def target_values(seen: Seen, found: Found) -> None:
    """Finds targets of probabilities that are none, and smoothing that favours the padding.

    ``targets_outside``: share of the targets of a binary cross-entropy outside 0 to 1.
    ``smoothed_padding``: mean probability that a target distribution gives to the padding, where a
    divergence or a cross-entropy is given distributions over the tokens of the input.

    Source: issue threads on binary losses of scaled targets; label smoothing in translation models.
    Cannot see: losses written by hand.
    Costs: one comparison.
    """
    for loss in seen.losses:
        if loss.kind in ("bce", "bce_logits") and loss.target is not None:
            outside = (loss.target < 0) | (loss.target > 1)
            found.run("targets_outside", float(outside.float().mean()))
            return
    for call in seen.calls.losses:
        if call.name in ("kl_div", "cross_entropy") and call.target.is_floating_point():
            padding, tokens = seen.padding, seen.tokens
            column = int(tokens[padding][0])
            target = call.target.detach()
            target = target.exp() if call.options.get("log_target") else target
            if target.ndim > 1 and column < target.shape[-1]:
                rows = target.reshape(-1, target.shape[-1])
                rows = rows[rows.sum(-1) > 0]  # of padded places there is nothing to learn
                found.run("smoothed_padding", float(rows[:, column].mean()))
                return
    raise MeasurementError("no loss compares with probabilities")


def regression_targets(seen: Seen, found: Found) -> None:
    """Finds regression targets out of scale, or constant.

    ``target_scale``: the larger of absolute mean and standard deviation of the targets of a
    regression; ``target_constant``: 1 where all targets seen are the same. ``loss_broadcast``: 1
    where predictions and targets differ in shape such that each is compared with several, as
    (n, 1) and (n,) are.

    Source: benchmark operator D3; DeepDiagnosis (output range); torch's warning of target sizes.
    Cannot see: targets that are scaled inside a loss of one's own.
    Costs: two sums.
    """
    regressions = [c for c in seen.calls.losses if c.name.removesuffix("_loss") in REGRESSION]
    if regressions:
        wrong = [call for call in regressions if _is_broadcast(call)]
        found.run("loss_broadcast", bool(wrong))
        found.place("loss", (wrong or regressions)[0].place)
    loss = _loss_with_target(seen, *REGRESSION)
    assert loss.target is not None
    target = loss.target.detach().float().reshape(-1)[:MOST_LABELS]
    if len(target) < 2 or bool(target.isnan().any()):
        raise MeasurementError("the loss is given a single target, or targets that are NaN")
    if bool(target.isinf().any()):
        found.run("target_scale", math.inf)
        return
    found.run("target_scale", max(abs(float(target.mean())), float(target.std())))
    found.run("target_constant", float(float(target.std()) == 0.0))


def _is_broadcast(call: LossCall) -> bool:
    """Whether a loss function compares more numbers than either of its sides has."""
    shapes = tuple(call.scores.shape), tuple(call.target.shape)
    return math.prod(np.broadcast_shapes(*shapes)) > max(map(math.prod, shapes))


def inputs(seen: Seen, found: Found) -> None:
    """Finds inputs that are not finite, out of scale, the same for all samples, or repeated.

    ``input_largest``: largest absolute finite value of the float inputs; ``weighed_input_largest``:
    the same where weights multiply them as they are: others are normalised in the model (RevIN), or
    embedded (times, angles). ``input_non_finite``:
    share of their values that are NaN or infinite. ``same_samples``: share of samples of a batch
    that equal the first one. ``same_batches``: share of the steps looked at whose batch was seen
    before.

    Source: UMLAUT (input range), TheDeepChecker, TensorFlow data validation manners.
    Cannot see: inputs that are computed inside of the model.
    Costs: a few sums over the batch.
    """
    given = [t for t in seen.main.inputs if t.ndim and t.numel()]
    floats = [t.detach() for t in given if t.is_floating_point() and t.ndim > 1]
    for tensor in floats[:1]:
        finite = torch.isfinite(tensor)
        if bool(finite.any()):
            largest = float(tensor[finite].abs().max())
            found.run("input_largest", largest)
            if _meets_weights(seen, tensor):
                found.run("weighed_input_largest", largest)
        found.run("input_non_finite", float((~finite).float().mean()))
    if not given:
        raise MeasurementError("the model is given no tensor")
    data = max(given, key=lambda t: t.numel())
    size = data.shape[0]
    if size > 2:
        # A decoder's first tokens are all the same, but what it is given beside them is not.
        same = [(t[1:] == t[:1]).reshape(size - 1, -1).all(1) for t in given if t.shape[0] == size]
        found.run("same_samples", float(torch.stack(same).all(0).float().mean()))
    key = _fingerprint(data)
    batches: dict[Any, int] = seen.memory.setdefault("batches", {})
    batches[key] = batches.get(key, 0) + 1
    count = sum(batches.values())
    if count > 1:
        found.run("same_batches", 1.0 - (len(batches) - 1) / (count - 1))


def _meets_weights(seen: Seen, tensor: Tensor) -> bool:
    """Whether the first thing that the model does with an input is to multiply it by weights."""
    try:
        trace = seen.trace
    except MeasurementError:
        return False
    taken = [
        (operation, position)
        for operation in trace.operations
        for position, given in enumerate(operation.inputs)
        if operation.sources[position] < 0
        and given.shape == tensor.shape
        and torch.equal(given, tensor)
    ]
    for operation, position in taken:  # grows while it is read
        if operation.name in (*SHAPE_ONLY, *KEEPS_SIZE):
            taken += [
                (consumer, consumer.sources.index(operation.index))
                for consumer in trace.consumers(operation)
            ]
        elif operation.name in (*PRODUCTS, *CONVOLUTIONS):
            return any(
                other.requires_grad and other.ndim > 1
                for i in range(len(operation.inputs))
                if i != position and (other := trace.given_behind(operation, i)) is not None
            )
    return False


def _fingerprint(data: Tensor) -> tuple[Any, ...]:
    part = data.detach().reshape(-1)[:: max(1, data.numel() // 4096)].double()
    weight = torch.arange(1, len(part) + 1, dtype=torch.float64, device=part.device)
    return tuple(data.shape), float(part.sum()), float((part * weight).sum())
