"""How the log of a run that lasts for weeks stays bounded: the older, the less of it is kept.

A recording of more than `MOST_ROWS` rows, `MOST_LOSSES` losses or `MOST_NOTES` facts and events is
thinned, in memory and on the disk; a shorter one is left as it is, to the byte. What is kept is a
part of what was measured, unchanged, and is what a sparser schedule would have recorded, so that
whatever reads it needs to know of nothing but gaps; `Recording.thinned` says how much is gone.

* Steps are parted into blocks, each as long as a fixed share of the steps before it, rounded down
  to a power of two; one measurement and one loss of each block stay. So the last tenth of the steps
  so far, which is the window that features look at, holds as many at step 10^5 as at step 10^9, and
  their number grows with the logarithm of the run. A window in which blocks become longer, or end,
  is brought to its longest (`evenly`): no part of it counts for more.
* Which one of a block stays is drawn by a hash of its step. The first of each block would always be
  of the same turn of a schedule, or the same batch of an epoch. Blocks lie inside one another, and
  the lowest lot of a long block is the lowest of a short one: thinning again thins further.
* Beside them stay: the first and the last measurements, those around the step at which something
  began that a diagnosis finds now, the last losses (repairs are judged on them), and the first that
  is not finite. Of the other measurements single rows stay: the first, the first that are not zero
  and the last of each series, which features compare with and which may be rare.
* Of facts and events go those that only repeat others, then those in the middle.

A log is thinned by its writer, into a second file that is renamed over the first: whoever reads, or
is killed, finds the one or the other, each with all that was recorded last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.runlog.recording import Floats, Integers, Measurements, Thinned

Mask = NDArray[np.bool_]

MOST_ROWS: Final = 2**19  # of measurements, each of which counts as one more
MOST_LOSSES: Final = 2**17
MOST_NOTES: Final = 2**12  # facts, events, and lists of components
LOSSES_AN_OCTAVE: Final = 2**11  # that stay of the steps from n to 2 n
LAST_LOSSES: Final = 2**14  # that stay whatever there is
WHOLE: Final = 32  # first, and last, measurements that stay with all their rows
AROUND: Final = 2, 10  # measurements before and from a beginning on: a rule asks for 9 in a row
ROOM: Final = 8  # each of these three may take the eighth part of the rows
OF_SERIES: Final = 3  # first, and last, known values: what features compare with is made of three


def blocks(step: Integers, an_octave: int) -> Integers:
    """Returns how long the block of each step is; ``an_octave`` blocks are between n and 2 n."""
    _, exponent = np.frexp(np.maximum(step // an_octave, 1))
    return np.left_shift(np.int64(1), exponent.astype(np.int64) - 1)


def loss_blocks(step: Integers) -> Integers:
    """Returns how long the block of each step is of which one loss stays."""
    return blocks(step, LOSSES_AN_OCTAVE)


def drawn(step: Integers, length: Integers | int) -> Mask:
    """Returns which stay if one step of each block stays, with all that is of it.

    It is the one with the lowest lot.
    """
    start = step - step % length
    order = np.argsort(start, kind="stable")
    first = np.flatnonzero(np.append(True, np.diff(start[order]) != 0)[: len(step)])
    result = np.zeros(len(step), dtype=bool)
    if len(step):
        lots = _lots(step[order])
        lowest = np.minimum.reduceat(lots, first)
        result[order] = lots == np.repeat(lowest, np.diff(first, append=len(step)))
    return result


def _lots(step: Integers) -> NDArray[np.uint64]:
    """A number for each step, no two the same (the finalizer of splitmix64; Steele et al. 2014)."""
    x = step.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def evenly(step: Integers, thinned: Thinned) -> Mask:
    """Returns a selection of losses that no part of their steps has more of than another."""
    if not len(step) or step[0] >= thinned.until:
        return np.ones(len(step), dtype=bool)
    return drawn(step, loss_blocks(step[-1:]))


def thin_losses(step: Integers, value: Floats) -> tuple[Mask, int]:
    """Returns which losses stay, and the step from which on all do."""
    if len(step) <= MOST_LOSSES // 2:
        return np.ones(len(step), dtype=bool), 0
    until = step[-LAST_LOSSES]
    old = step < until
    stays = ~old
    stays[old] = drawn(step[old], loss_blocks(step[old]))
    stays[np.flatnonzero(~np.isfinite(value))[:1]] = True
    return stays, int(until)


def thin_measurements(
    step: Integers, sizes: Integers, rows: Measurements, beginnings: Iterable[int]
) -> tuple[Mask, Mask]:
    """Returns which measurements stay, wholly or in part, and which rows.

    Args:
        step: Of each measurement.
        sizes: How many rows each has; one comes after the other.
        rows: All of them.
        beginnings: Steps at which something began, the most important first.
    """
    owner = np.repeat(np.arange(len(step)), sizes)
    if len(owner) + len(step) <= MOST_ROWS // 2:
        return np.ones(len(step), dtype=bool), np.ones(len(owner), dtype=bool)
    whole = _within_room(sizes[:WHOLE], len(step))
    whole |= _within_room(sizes[::-1][:WHOLE], len(step))[::-1]
    whole[_around(step, sizes, beginnings)] = True
    single = _ends_of_series(rows)
    an_octave = MOST_ROWS
    while True:
        stays = whole | drawn(step, blocks(step, an_octave))
        rows_stay = stays[owner] | single
        in_part = stays | (np.bincount(owner[rows_stay], minlength=len(step)) > 0)
        if rows_stay.sum() + in_part.sum() <= MOST_ROWS // 2 or an_octave == 1:
            return in_part, rows_stay
        an_octave //= 2


def _within_room(sizes: Integers, count: int) -> Mask:
    """Returns which of ``count`` measurements are the first and fit, of which the sizes are."""
    result = np.zeros(count, dtype=bool)
    result[: len(sizes)] = np.cumsum(sizes + 1) <= MOST_ROWS // ROOM
    return result


def _around(step: Integers, sizes: Integers, beginnings: Iterable[int]) -> list[int]:
    order = np.argsort(step, kind="stable")
    found: dict[int, None] = {}
    room = MOST_ROWS // ROOM
    for beginning in beginnings:
        at = int(np.searchsorted(step[order], beginning))
        own = order[max(at - AROUND[0], 0) : at + AROUND[1]].tolist()
        new = [position for position in own if position not in found]
        room -= int(sizes[new].sum()) + len(new)
        if room < 0:
            break
        found |= dict.fromkeys(new)
    return list(found)


def _ends_of_series(rows: Measurements) -> Mask:
    """Returns which rows are the first or last of a series, or its first that is not zero."""
    count = len(rows.components) + 1
    series = (rows.quantity.astype(np.int64) * count + rows.component) * count + rows.other + 1
    result = np.zeros(len(series), dtype=bool)
    known = np.flatnonzero(~np.isnan(rows.value))
    for chosen, first, last in (
        (known, OF_SERIES, OF_SERIES),
        (known[rows.value[known] != 0], 1, 0),
    ):
        order = chosen[np.argsort(series[chosen], kind="stable")]
        own = series[order]
        begun = np.arange(len(own)) - np.searchsorted(own, own, "left")
        left = np.searchsorted(own, own, "right") - np.arange(len(own))
        result[order[(begun < first) | (left <= last)]] = True
    return result


def thin_notes(keys: Sequence[str]) -> list[int]:
    """Returns the positions of the notes that stay, given what each says apart from its step."""
    first = sorted({key: position for position, key in reversed([*enumerate(keys)])}.values())
    half = MOST_NOTES // 8
    return first if len(first) <= 2 * half else [*first[:half], *first[-half:]]
