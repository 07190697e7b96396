"""What a log of any format is: named curves; which of them is which quantity; and their order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from diagnoser.errors import LoggedFileError, UsageError
from diagnoser.runlog import Curve

MOST_VALUES: Final = 2_000_000  # of all curves that are read of one log
NAMES_SHOWN: Final = 12
STEP: Final = "step"
LOSS: Final = "loss"

_TRAINING: Final = ("train", "training", "tr")
_EVALUATION: Final = ("eval", "evaluation", "val", "valid", "validation", "dev")
_TEST: Final = ("test",)


def _spelled(parts: Iterable[str], *words: str) -> frozenset[str]:
    """Returns ``train_loss`` and ``loss_train`` of every part and word."""
    both = [(part, word) for part in parts for word in words]
    return frozenset(name for a, b in both for name in (f"{a}_{b}", f"{b}_{a}"))


_ACCURACY: Final = ("accuracy", "acc")
_GRADIENT: Final = ("grad_norm", "gradient_norm", "total_grad_norm", "global_grad_norm")
_RATE: Final = ("lr", "learning_rate")
# Usual spellings as `normal` makes them; those of an earlier group are preferred.
SPELLINGS: Final[Mapping[str, tuple[frozenset[str], ...]]] = {
    STEP: (
        frozenset({"step", "steps", "global_step", "iteration", "iterations", "iter", "it"}),
        frozenset({"epoch"}),
    ),
    LOSS: (frozenset({"loss", "train_loss_step"}) | _spelled(_TRAINING, "loss"),),
    "evaluation_loss": (_spelled(_EVALUATION, "loss"), _spelled(_TEST, "loss")),
    "accuracy": (frozenset(_ACCURACY) | _spelled(_TRAINING, *_ACCURACY),),
    "evaluation_accuracy": (_spelled(_EVALUATION, *_ACCURACY), _spelled(_TEST, *_ACCURACY)),
    "gradient_norm": (
        frozenset({*_GRADIENT, "gradnorm", "grad_2_0_norm_total"})
        | _spelled(_TRAINING, *_GRADIENT),
    ),
    "learning_rate": (frozenset(_RATE) | _spelled(_TRAINING, *_RATE),),
}
QUANTITIES: Final = tuple(name for name in SPELLINGS if name != STEP)


@dataclass(frozen=True, slots=True)
class LoggedCurve:
    """Values of one name with their steps, in the order of the file."""

    step: list[int]
    value: list[float]


@dataclass(frozen=True, slots=True)
class LoggedFile:
    """A log that has been opened.

    Attributes:
        path: Where it is.
        kind: What it is, in words.
        noun: What its names are called: columns, tags.
        names: All of them, in its order.
        read: Reads those that were chosen, by quantity.
        filtered: Why losses that are not finite would not show in it; None: they would.
        counts_itself: It has steps of its own, and none can be chosen.
        notes: What else there is to say about it.
    """

    path: Path
    kind: str
    noun: str
    names: tuple[str, ...]
    read: Callable[[Mapping[str, str]], Mapping[str, LoggedCurve]]
    filtered: str | None = None
    counts_itself: bool = True
    notes: tuple[str, ...] = ()


def normal(name: str) -> str:
    """Returns a name in the spelling of the table.

    >>> normal("Loss/train"), normal("trainLoss"), normal(" eval-loss ")
    ('loss_train', 'train_loss', 'eval_loss')
    """
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"[^a-z0-9]+", "_", apart.lower()).strip("_")


def shown(names: Sequence[str]) -> str:
    """Returns names, which are untrusted, for a message of one line."""
    safe = [n[:60] if n.isprintable() else ascii(n[:60])[1:-1] for n in names[:NAMES_SHOWN]]
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{', '.join(safe)}{more}" if safe else "none"


def choose(log: LoggedFile, asked: Mapping[str, str]) -> dict[str, str]:
    """Returns which name of a log is which quantity.

    Args:
        log: The log.
        asked: Names by quantity that somebody gave; an empty one leaves the quantity out.

    Raises:
        UsageError: What was asked for is not there.
        LoggedFileError: There is no training loss, or a name that could be two things.
    """
    known = (*QUANTITIES, *(() if log.counts_itself else (STEP,)))
    spelled = [(normal(name), name) for name in log.names]
    chosen: dict[str, str] = {}
    for quantity, name in asked.items():
        if quantity not in known:
            raise UsageError(
                f"--column {quantity[:40]}=: no quantity of a {log.kind}; "
                f"there is {', '.join(known)}"
            )
        if name and name not in log.names:
            raise UsageError(
                f"--column {quantity}={shown([name])}: no such {log.noun}; there is "
                f"{shown(log.names)}"
            )
        if name:
            chosen[quantity] = name
    for quantity in known:
        if quantity not in asked:
            free = [(word, name) for word, name in spelled if name not in chosen.values()]
            found = _found(log, quantity, free)
            if found is not None:
                chosen[quantity] = found
    for name in chosen.values():
        if log.names.count(name) > 1:
            raise LoggedFileError(
                f"{log.path}: two {log.noun}s are called {shown([name])}; rename one of them"
            )
    if LOSS not in chosen:
        raise LoggedFileError(
            f"{log.path}: no training loss among its {log.noun}s ({shown(log.names)}); name it: "
            "--column loss=NAME"
        )
    return chosen


def _found(log: LoggedFile, quantity: str, spelled: Sequence[tuple[str, str]]) -> str | None:
    for spellings in SPELLINGS[quantity]:
        names = dict.fromkeys(name for word, name in spelled if word in spellings)
        if len(names) > 1:
            raise LoggedFileError(
                f"{log.path}: {shown(list(names))} could each be the {quantity}; say which: "
                f"--column {quantity}=NAME"
            )
        if names:
            return next(iter(names))
    return None


@dataclass(frozen=True, slots=True, eq=False)
class OrderedCurve:
    """A curve with ascending steps, how often they went back, and how many values were replaced."""

    curve: Curve
    resumed: int = 0
    replaced: int = 0


def in_order(logged: LoggedCurve, *, restarts: bool) -> OrderedCurve | None:
    """Returns a curve with ascending steps; what was logged later counts.

    Steps go back where a run is resumed from a checkpoint: what it had logged beyond that is of
    steps that were undone.

    Args:
        logged: The curve as it stands in the file.
        restarts: Whether it may go back to its first step; else that is None: two runs, or a step
            that counts within an epoch.
    """
    step: list[int] = []
    value: list[float] = []
    resumed = replaced = 0
    for at, number in zip(logged.step, logged.value, strict=True):
        if step and at < step[-1]:
            if at <= step[0] and not restarts:
                return None
            resumed += 1
            while step and step[-1] >= at:
                step.pop()
                value.pop()
                replaced += 1
        elif step and at == step[-1]:
            step.pop()
            value.pop()
            replaced += 1
        step.append(at)
        value.append(number)
    return OrderedCurve(Curve(np.array(step, np.int64), np.array(value)), resumed, replaced)
