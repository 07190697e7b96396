"""What the published checks of UMLAUT, DeepLocalize and DeepDiagnosis compare.

Their formulas were read in their sources (`umlaut/heuristics.py`; `Our Callback/callbacks.py`;
`callback/callbacks.py`); the thresholds stand in the rules of `rules/umlaut`, `rules/deeplocalize`
and `rules/deepdiagnosis`. An epoch is a twentieth of the run, as in AutoTrainer's. Many of these
are absolute, as what was published is: no classifier learns from them (`benchmark.families`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.features import functions as f
from diagnoser.features.source import EPOCHS, Source
from diagnoser.table import Array, Column, Feature

BLOCK: Final = 5  # N of both: batches, or epochs, at which something must be the same
ROUNDING: Final = 1e-12  # of a mean of equal numbers, relative; «mean == max» is what was published


def steps_of(s: Source) -> int:
    """How many steps were made so far."""
    losses = s.recording.losses.step
    last = [int(steps[-1]) for steps in (losses, s.steps) if len(steps)]
    return max(last, default=0) + 1


def same(blocks: Array) -> NDArray[np.bool_]:
    """Whether all numbers of a row are the same; one that is not finite is like no other."""
    low, high = blocks.min(axis=1), blocks.max(axis=1)
    close = high - low <= ROUNDING * np.maximum(np.abs(low), np.abs(high))
    return np.asarray(close & np.isfinite(high - low))


def in_blocks(values: Array) -> Array:
    """Values in blocks of five, one after the other; what is left over is no block."""
    return values[: len(values) // BLOCK * BLOCK].reshape(-1, BLOCK)


def since_unchanged(values: Array, step: NDArray[np.int64], steps: NDArray[np.int64]) -> Array:
    """1 from the end of the first block of equal values on; NaN before any block has ended.

    Args:
        values: Known values in order.
        step: (values,) when each was.
        steps: Where the answer is wanted.
    """
    blocks = in_blocks(values)
    ends = step[BLOCK - 1 :: BLOCK][: len(blocks)]
    result = np.full(len(steps), np.nan)
    if len(blocks):
        result[steps >= ends[0]] = 0.0
        stalled = same(blocks)
        if stalled.any():
            result[steps >= ends[stalled.argmax()]] = 1.0
    return result


def ever_unchanged(values: Array) -> float:
    """1 if any block of known values is of equal ones; NaN if there is no block."""
    blocks = in_blocks(values)
    return float(same(blocks).any()) if len(blocks) else float("nan")


def means_of_epochs(values: Array) -> Array:
    """Means of twenty equal parts; none of fewer values than that."""
    parts = np.array_split(values, EPOCHS) if len(values) >= EPOCHS else []
    return np.array([part.mean() for part in parts])


# -- the run ---------------------------------------------------------------------------------------


def epochs_seen(s: Source) -> Column:
    """Unknown before the end of the first, so that nothing is decided by it alone."""
    seen = EPOCHS * (s.steps + 1.0) / steps_of(s)
    return Column.exact(np.where(seen >= 1, seen, np.nan)[np.newaxis])


def learning_rate_highest(s: Source) -> Column:
    rate = s.component("learning_rate").value
    return Column.exact(np.fmax.reduce(rate, axis=0, keepdims=True, initial=np.nan))


def learning_rate_lowest(s: Source) -> Column:
    rate = s.component("learning_rate").value
    return Column.exact(np.fmin.reduce(rate, axis=0, keepdims=True, initial=np.nan))


def loss_from_logits(s: Source) -> Column:
    """The graph was read where it is known whether probabilities enter the loss.

    That a cross-entropy was found there is known by its number of classes.
    """
    read = ~np.isnan(s.run("probabilities_into_loss").value)
    found = ~np.isnan(s.run("classes").value)
    return Column.exact(np.where(read, found.astype(float), np.nan))


def loss_unchanged(s: Source) -> Column:
    losses = s.recording.losses
    return Column.exact(since_unchanged(losses.value, losses.step, s.steps)[np.newaxis])


def accuracy_unchanged(s: Source) -> Column:
    curve = s.accuracies
    return Column.exact(since_unchanged(curve.value, curve.step, s.steps)[np.newaxis])


def loss_unchanged_epochs(s: Source) -> Column:
    return f.of_the_run(ever_unchanged(means_of_epochs(s.even(s.recording.losses))), s)


def accuracy_unchanged_epochs(s: Source) -> Column:
    """It is asked for in a block of twenty epochs, which is the whole run."""
    means = means_of_epochs(s.even(s.accuracies))
    return f.of_the_run(float(same(means[np.newaxis])[0]) if len(means) else float("nan"), s)


def accuracy_worst(s: Source) -> Column:
    epochs = s.epoch_accuracies
    return f.of_the_run(float(epochs.min()) if len(epochs) else float("nan"), s)


# -- components ------------------------------------------------------------------------------------


def gradient_rms(s: Source) -> Column:
    return Column.exact(f.root_mean_squares(s, "gradient_norm"))


def times(found: NDArray[np.bool_], known: NDArray[np.bool_]) -> Column:
    """Share of the measurements so far at which something was found, where one was made."""
    share = f.quotient(np.cumsum(found & known, axis=1), np.cumsum(known, axis=1))
    return Column.exact(np.where(known, share, np.nan))


def weight_zero(s: Source) -> Column:
    norm = s.component("weight_norm").value
    return Column.exact(np.where(np.isnan(norm), np.nan, (norm == 0).astype(float)))


def weight_zero_times(s: Source) -> Column:
    norm = s.component("weight_norm").value
    return times(norm == 0, ~np.isnan(norm))


def gradient_zero_times(s: Source) -> Column:
    share = s.component("zero_share").value
    return times(share == 1, ~np.isnan(share))


def input_zero_times(s: Source) -> Column:
    share = s.component("input_zero_share").value
    return times(share == 1, ~np.isnan(share))


def unchanged(quantity: str) -> Callable[[Source], Column]:
    """In blocks of measured steps."""

    def function(s: Source) -> Column:
        values = s.component(quantity).value
        result = np.full_like(values, np.nan)
        for r, row in enumerate(values):
            known = ~np.isnan(row)
            result[r] = since_unchanged(row[known], s.steps[known], s.steps)
        return Column.exact(result)

    return function


def unchanged_epochs(quantity: str) -> Callable[[Source], Column]:
    """In blocks of epochs, each with the last value that is known of it."""

    def function(s: Source) -> Column:
        values = s.component(quantity).value
        # A damaged log may hold the largest step there is.
        epoch = EPOCHS * s.steps // min(steps_of(s), int(np.iinfo(np.int64).max))
        result = np.full_like(values, np.nan)
        for r, row in enumerate(values):
            known = ~np.isnan(row)
            last = np.diff(epoch[known], append=EPOCHS) > 0
            result[r] = ever_unchanged(row[known][last])
        return Column.exact(result)

    return function


def input_zero_share_at_end(s: Source) -> Column:
    share = s.component("input_zero_share").value
    last = f.first_known(share[:, ::-1])
    return Column.exact(np.broadcast_to(last, share.shape).copy())


Entries = tuple[tuple[Feature, Callable[[Source], Column]], ...]

PUBLISHED: Final[Entries] = (
    # UMLAUT (CHI 2021)
    (
        Feature(
            "epochs_seen",
            "run",
            "how many twentieths of the run, which stand for epochs, were made: 1 or more",
            low=0,
            high=EPOCHS,
        ),
        epochs_seen,
    ),
    (
        Feature(
            "learning_rate_highest",
            "run",
            "highest learning rate of a component",
            low=0,
            quantities=("learning_rate",),
        ),
        learning_rate_highest,
    ),
    (
        Feature(
            "learning_rate_lowest",
            "run",
            "lowest learning rate of a component",
            low=0,
            quantities=("learning_rate",),
        ),
        learning_rate_lowest,
    ),
    (
        Feature(
            "loss_from_logits",
            "run",
            "1 where the loss is a cross-entropy that applies its own softmax or sigmoid",
            low=0,
            high=1,
            quantities=("probabilities_into_loss", "classes"),
        ),
        loss_from_logits,
    ),
    # DeepLocalize (ICSE 2021): blocks of five steps
    (
        Feature(
            "loss_unchanged",
            "run",
            "1 from the first block of five steps on whose losses are all the same",
            low=0,
            high=1,
        ),
        loss_unchanged,
    ),
    (
        Feature(
            "accuracy_unchanged",
            "run",
            "1 from the first block of five steps on whose training accuracies are all the same",
            low=0,
            high=1,
        ),
        accuracy_unchanged,
    ),
    (
        Feature(
            "weight_unchanged",
            "component",
            "1 from the first block of five measurements on with the same weight norm",
            low=0,
            high=1,
            quantities=("weight_norm",),
        ),
        unchanged("weight_norm"),
    ),
    (
        Feature(
            "gradient_unchanged",
            "component",
            "1 from the first block of five measurements on with the same gradient norm",
            low=0,
            high=1,
            quantities=("gradient_norm",),
        ),
        unchanged("gradient_norm"),
    ),
    (
        Feature(
            "weight_zero_times",
            "component",
            "share of the measurements so far at which all weights are zero",
            low=0,
            high=1,
            quantities=("weight_norm",),
        ),
        weight_zero_times,
    ),
    (
        Feature(
            "gradient_zero_times",
            "component",
            "share of the measurements so far at which the whole gradient is zero",
            low=0,
            high=1,
            quantities=("zero_share",),
        ),
        gradient_zero_times,
    ),
    (
        Feature(
            "input_zero_times",
            "component",
            "share of the measurements so far at which all that goes in is zero",
            low=0,
            high=1,
            quantities=("input_zero_share",),
        ),
        input_zero_times,
    ),
    # DeepDiagnosis (ICSE 2022): blocks of five epochs
    (
        Feature(
            "weight_zero",
            "component",
            "1 where all weights are zero",
            low=0,
            high=1,
            quantities=("weight_norm",),
        ),
        weight_zero,
    ),
    (
        Feature(
            "loss_unchanged_epochs",
            "run",
            "1 where the mean losses of a block of five epochs are all the same",
            low=0,
            high=1,
        ),
        loss_unchanged_epochs,
    ),
    (
        Feature(
            "accuracy_unchanged_epochs",
            "run",
            "1 where the training accuracies of all twenty epochs are the same",
            low=0,
            high=1,
        ),
        accuracy_unchanged_epochs,
    ),
    (
        Feature(
            "accuracy_worst",
            "run",
            "worst training accuracy of an epoch of the whole run",
            low=0,
            high=1,
        ),
        accuracy_worst,
    ),
    (
        Feature(
            "weight_unchanged_epochs",
            "component",
            "1 where the weight norm is the same in a block of five epochs",
            low=0,
            high=1,
            quantities=("weight_norm",),
        ),
        unchanged_epochs("weight_norm"),
    ),
    (
        Feature(
            "gradient_unchanged_epochs",
            "component",
            "1 where the gradient norm is the same in a block of five epochs",
            low=0,
            high=1,
            quantities=("gradient_norm",),
        ),
        unchanged_epochs("gradient_norm"),
    ),
    (
        Feature(
            "gradient_rms",
            "component",
            "root mean square gradient",
            low=0,
            quantities=("gradient_norm",),
        ),
        gradient_rms,
    ),
    (
        Feature(
            "input_zero_share_at_end",
            "component",
            "share of exact zeros in what goes in, at the last measurement",
            low=0,
            high=1,
            quantities=("input_zero_share",),
        ),
        input_zero_share_at_end,
    ),
)
"""Features, each with the function that computes it; they are a part of the catalogue."""

OF_PUBLISHED: Final = frozenset(feature.name for feature, _ in PUBLISHED)
"""The names of these features."""
