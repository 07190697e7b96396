"""Losses and scores that several subjects share."""

from __future__ import annotations

import functools

from torch import Tensor
from torch.nn import functional as F

from diagnoser.injection.training import Criterion, Settings

IGNORED = -100  # a target that is not asked for


def cross_entropy(outputs: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy in nats over the targets that are asked for.

    Args:
        outputs: Logits, (samples, classes) or (samples, length, classes).
        targets: Classes or `IGNORED`, (samples,) or (samples, length).
        label_smoothing: Share of the probability that is spread over all classes.
    """
    return F.cross_entropy(
        outputs.flatten(0, -2),
        targets.flatten(),
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
    )


def smoothed_cross_entropy(settings: Settings) -> Criterion:
    """Returns the cross-entropy that the settings ask for."""
    return functools.partial(cross_entropy, label_smoothing=settings.label_smoothing)


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Share of right answers among the targets that are asked for; logits as `cross_entropy`."""
    asked = targets != IGNORED
    return float((outputs.argmax(-1) == targets)[asked].double().mean())
