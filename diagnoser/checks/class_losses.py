"""Checks of how a loss is put together: what it leaves out, what it favours, where it leads."""

from __future__ import annotations

import torch
from torch import Tensor

from diagnoser.checks.calls import LossCall, is_plain, tensors_of
from diagnoser.checks.seen import Found, Seen
from diagnoser.checks.trace import memory
from diagnoser.errors import MeasurementError

OF_CLASSES = ("cross_entropy", "nll_loss")
TO_BE_MINIMISED = (*OF_CLASSES, "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")


def class_loss(seen: Seen, found: Found) -> None:
    """Finds classes that a loss leaves out or favours, and scores that are cut off.

    ``label_smoothing``: the largest. ``ignored_classes``: share of the samples, each with one
    label, whose label is the index that the loss ignores, where that is one of the classes.
    ``weighted_imbalance``: largest share of the labels that a class has with its weight, less the
    largest that one has without: above zero where weights make classes less alike.
    ``classes_scrambled``: 1 where the scores are what the model gives, in another shape, and the
    classes came to the second axis by a view, not by a transpose.
    ``scores_cut``: share of the scores that are exactly zero where none is below: what a rectifier
    cuts off has no gradient.

    Source: torch.nn.CrossEntropyLoss, PyTorch documentation; UMLAUT (activation of the last layer).
    Cannot see: losses written by hand, or with targets that are probabilities; classes that no
    batch of those that are looked at holds.
    Costs: a count of one batch's labels.
    """
    calls = [
        c for c in seen.calls.losses
        if c.name in OF_CLASSES and not c.target.is_floating_point() and c.scores.ndim > 1
    ]  # fmt: skip
    if not calls:
        raise MeasurementError("no loss function of class labels was seen called")
    found.run("label_smoothing", max(float(c.options.get("label_smoothing") or 0) for c in calls))
    cut = [_cut(c.scores.detach()) for c in calls if c.name == "cross_entropy"]
    if cut:
        found.run("scores_cut", max(cut))
    for call in calls:
        found.place("loss", call.place)
    found.run("classes_scrambled", any(_is_scrambled(c.scores, seen) for c in calls))
    size = seen.batch
    alone = [c for c in calls if c.scores.ndim == 2 and tuple(c.target.shape) == (size,)]
    if alone:
        found.run("ignored_classes", max(map(_ignored, alone)))
    weighted = [c for c in calls if isinstance(c.options.get("weight"), Tensor)]
    if weighted:
        found.run("weighted_imbalance", max(map(_imbalance, weighted)))


def _is_scrambled(scores: Tensor, seen: Seen) -> bool:
    if scores.ndim <= 2 or not is_plain(scores):  # noqa: PLR2004
        return False
    return any(
        is_plain(output)
        and output.shape != scores.shape
        and output.ndim > 2  # noqa: PLR2004
        and output.shape[-1] == scores.shape[1]
        and memory(output) == memory(scores)
        and scores.stride(1) != output.stride(-1)
        for output in tensors_of(seen.main.output)
    )


def _cut(scores: Tensor) -> float:
    """All zeros are those of a last layer that begins so."""
    free = bool((scores < 0).any()) or not bool(scores.any())
    return 0.0 if free else float((scores == 0).float().mean())


def _counted(call: LossCall) -> Tensor:
    """The labels that count, flat."""
    return call.target[call.target != call.options.get("ignore_index", -100)]


def _ignored(call: LossCall) -> float:
    is_class = 0 <= int(call.options.get("ignore_index", -100)) < call.scores.shape[1]
    return 1.0 - len(_counted(call)) / max(call.target.numel(), 1) if is_class else 0.0


def _imbalance(call: LossCall) -> float:
    weight = call.options["weight"].detach().float()
    counts = torch.bincount(_counted(call).reshape(-1), minlength=len(weight)).to(weight)
    if not float((counts * weight).sum()) > 0:
        return 0.0
    with_weights, without = counts * weight, counts
    return float((with_weights / with_weights.sum()).max() - (without / without.sum()).max())


def direction(seen: Seen, found: Found) -> None:
    """Finds a loss that is made larger.

    ``loss_climbed``: 1 where the optimizer goes up a loss that is to be made smaller: a
    classification or regression is what it maximises, or the negative of one what it minimises.

    Source: torch.optim, PyTorch documentation (``maximize``).
    Cannot see: losses written by hand; binary losses, which one of two adversaries may maximise.
    Costs: one comparison.
    """
    calls = [c for c in seen.calls.losses if isinstance(c.output, Tensor)]
    if len(calls) != 1 or calls[0].name not in TO_BE_MINIMISED or calls[0].output.numel() != 1:
        raise MeasurementError("no single classification or regression loss was seen called")
    groups = [group for optimizer in seen.optimizers for group in optimizer.param_groups]
    if not groups:
        raise MeasurementError("no optimizer was seen")
    value, root = float(calls[0].output.detach()), float(seen.loss.detach())
    if abs(root) != abs(value) or value == 0:
        raise MeasurementError("the loss is not what one loss function gives")
    maximised = all(group.get("maximize", False) for group in groups)
    found.run("loss_climbed", (root == value) == maximised)
    found.place("loss", calls[0].place)
