"""What a script's own log tells of a run: its evaluations, and numbers of the whole model.

These are known where a log was imported (`diagnoser.importing`), and judged by the rules of
`rules/logged`. No classifier learns from them: no watched run has them.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.features.functions import of_the_run, quotient
from diagnoser.features.source import Source
from diagnoser.table import Array, Column, Feature
from diagnoser.vocabulary import UNKNOWN

ENOUGH_LOSSES: Final = 20  # of which the best says how far a run came


def broken_losses(s: Source, feature: str) -> NDArray[np.bool_] | None:
    """Which losses are not finite; None: a log that leaves those out shows none."""
    bad = ~np.isfinite(s.recording.losses.value)
    told = any(f.name == UNKNOWN and f.component == feature for f in s.recording.facts)
    return None if not len(bad) or (told and not bad.any()) else bad


def loss_lost(s: Source) -> Column:
    bad = broken_losses(s, "logged_loss_lost")
    if bad is None:
        return of_the_run(float("nan"), s)
    return Column.exact(since_lost(bad, s.recording.losses.step, s.steps))


def loss_gaps(s: Source) -> Column:
    bad = broken_losses(s, "logged_loss_gaps")
    if bad is None or bad.all():
        return of_the_run(float("nan"), s)
    until_last = bad[: int(np.flatnonzero(~bad)[-1]) + 1]
    return of_the_run(float(until_last.mean()), s)


def loss_rise(s: Source) -> Column:
    """By the median: windows overlap, so that a spike would raise the mean of several."""
    middle = s.windows(s.recording.losses, lambda w: float(np.median(w)))
    rise = middle - np.fmin.accumulate(middle, axis=1)
    return Column.exact(quotient(rise, np.full_like(rise, s.initial_loss)))


def loss_gain(s: Source) -> Column:
    known = s.loss[~np.isnan(s.loss)]
    enough = len(s.recording.losses.step) >= ENOUGH_LOSSES and len(known)
    best = float(known.min()) if enough else float("nan")
    gain = 1.0 - best / s.initial_loss
    return of_the_run(gain if np.isfinite(gain) else float("nan"), s)


def gradient_lost(s: Source) -> Column:
    return lost(s, "non_finite_gradient", "gradient_norm")


def gradient_zero(s: Source) -> Column:
    norm = s.run("gradient_norm").value
    return Column.exact(np.where(np.isnan(norm), np.nan, (norm == 0.0).astype(float)))


def evaluation_lost(s: Source) -> Column:
    return lost(s, "non_finite_evaluation", "evaluation_loss")


def lost(s: Source, broken: str, quantity: str) -> Column:
    """1 from where on a quantity was seen to be not finite, and never finite again."""
    count, value = s.run(broken).value[0], s.run(quantity).value[0]
    known = ~np.isnan(count)
    bad = (count > 0) & np.isnan(value)
    result = np.full((1, len(s.steps)), np.nan)
    result[0, known] = since_lost(bad[known], s.steps[known], s.steps[known])
    return Column.exact(result)


def since_lost(bad: NDArray[np.bool_], step: NDArray[np.int64], steps: NDArray[np.int64]) -> Array:
    """1 at the steps from which all that follow are bad, 0 before; (1, steps)."""
    good = np.flatnonzero(~bad)
    first = int(good[-1]) + 1 if len(good) else 0
    if first == len(bad):
        return np.zeros((1, len(steps)))
    return np.where(steps >= step[first], 1.0, 0.0)[np.newaxis]


def evaluation_rise(s: Source) -> Column:
    loss = s.run("evaluation_loss").value
    best = np.fmin.accumulate(loss, axis=1)
    return Column.exact(quotient(loss - best, np.where(best > 0, best, np.nan)))


def loss_since_best_evaluation(s: Source) -> Column:
    evaluation, result = s.run("evaluation_loss").value[0], np.full((1, len(s.steps)), np.nan)
    best = -1
    for i, loss in enumerate(evaluation):
        if np.isnan(loss):
            continue
        if best < 0 or loss < evaluation[best]:
            best = i
        result[0, i] = s.loss[0, i] / s.loss[0, best] if s.loss[0, best] > 0 else np.nan
    return Column.exact(np.where(np.isfinite(result), result, np.nan))


def evaluation_accuracy_fall(s: Source) -> Column:
    accuracy = s.run("evaluation_accuracy").value
    return Column.exact(np.fmax.accumulate(accuracy, axis=1) - accuracy)


LOGGED: Final = (
    (
        Feature(
            "logged_loss_lost",
            "run",
            "1 from the first loss on after which none is finite",
            low=0,
            high=1,
        ),
        loss_lost,
    ),
    (
        Feature(
            "logged_loss_gaps",
            "run",
            "share of the losses up to the last finite one that are NaN or infinite",
            low=0,
            high=1,
        ),
        loss_gaps,
    ),
    (
        Feature(
            "logged_loss_rise",
            "run",
            "how far the windowed median loss is above its lowest, in initial losses",
            low=0,
        ),
        loss_rise,
    ),
    (
        Feature(
            "logged_loss_gain",
            "run",
            "largest share of the initial loss that was gone at any time; of twenty losses or more",
        ),
        loss_gain,
    ),
    (
        Feature(
            "logged_gradient_lost",
            "run",
            "1 from the first gradient norm of the whole model on after which none is finite",
            low=0,
            high=1,
            quantities=("non_finite_gradient", "gradient_norm"),
        ),
        gradient_lost,
    ),
    (
        Feature(
            "logged_gradient_zero",
            "run",
            "1 where the gradient norm of the whole model is exactly zero",
            low=0,
            high=1,
            quantities=("gradient_norm",),
        ),
        gradient_zero,
    ),
    (
        Feature(
            "evaluation_lost",
            "run",
            "1 from the first evaluation loss on after which none is finite",
            low=0,
            high=1,
            quantities=("non_finite_evaluation", "evaluation_loss"),
        ),
        evaluation_lost,
    ),
    (
        Feature(
            "evaluation_rise",
            "run",
            "evaluation loss over its lowest so far, less 1",
            low=0,
            quantities=("evaluation_loss",),
        ),
        evaluation_rise,
    ),
    (
        Feature(
            "loss_since_best_evaluation",
            "run",
            "windowed training loss over that at the lowest evaluation loss so far",
            quantities=("evaluation_loss",),
        ),
        loss_since_best_evaluation,
    ),
    (
        Feature(
            "evaluation_accuracy_fall",
            "run",
            "how far the evaluation accuracy is below its best so far",
            low=0,
            quantities=("evaluation_accuracy",),
        ),
        evaluation_accuracy_fall,
    ),
)
"""Features, each with the function that computes it; they are a part of the catalogue."""

OF_LOGS: Final = frozenset(feature.name for feature, _ in LOGGED)
"""The names of these features."""
