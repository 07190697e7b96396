"""Follows where a script logs, and writes there; its failures never end the training (law 4)."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from diagnoser.curvature import RandomStates
from diagnoser.runlog import RunLogWriter
from diagnoser.trackers import mlflow, tensorboard, wandb
from diagnoser.trackers.tracker import Tracker, said, tag
from diagnoser.types import Diagnosis, Measurement

TRACKERS: Final = (tensorboard.TRACKER, mlflow.TRACKER, wandb.TRACKER)
# A small set that can be read: of each component, at every measured step.
TRACKED: Final = ("gradient_norm", "update_ratio", "step_sharpness", "attention_entropy")
ERROR: Final = 300  # characters of what a tracker says went wrong


@dataclass(slots=True)
class _Followed:
    """A tracker in this run.

    ``place`` is where the script writes, or wrote last; before measurement ``next_look`` it is not
    looked for again. ``undo`` takes back what was done to the place.
    """

    tracker: Tracker
    place: Any = None
    next_look: int = 1
    failed: bool = False
    undo: Callable[[], None] | None = None


class Tracking:
    """Writes into the trackers that a script uses.

    Args:
        log: Where failures are recorded.
        diagnose: Makes a diagnosis of what was recorded so far.
    """

    def __init__(self, log: RunLogWriter, diagnose: Callable[[], Diagnosis]) -> None:
        self._log, self._diagnose = log, diagnose
        self._followed = [_Followed(tracker) for tracker in TRACKERS]
        self._process = os.getpid()
        self._measured = self._step = 0

    def measured(self, step: int, rows: Sequence[Measurement]) -> None:
        """Writes what was measured at a step."""
        self._measured, self._step = self._measured + 1, step
        # Not every tracker keeps an infinity as one; a number that is not finite is a finding.
        values = {
            tag(row.quantity, row.component): row.estimate.value
            for row in rows
            if row.quantity in TRACKED and row.other is None and math.isfinite(row.estimate.value)
        }
        for one in self._followed:
            self._try(one, lambda one: self._write(one, values))

    def found(self, diagnosis: Diagnosis) -> None:
        """Writes what was found so far."""
        for one in self._followed:
            self._try(one, lambda one: self._say(one, diagnosis))

    def end(self) -> None:
        """Writes the diagnosis, also where the script has ended its log, and lets go of all."""
        if not any(one.failed or one.place is not None for one in self._followed):
            self._log.event(
                self._step,
                "not_tracked",
                "tracking: no open SummaryWriter, active MLflow run or W&B run was seen while it "
                "trained",
                {},
            )
        for one in self._followed:
            self._try(one, self._conclude)
            self._try(one, self._let_go)

    def _write(self, one: _Followed, values: dict[str, float]) -> None:
        tracker = one.tracker
        if not self._is_open(one):
            # What takes long is done ever more seldom.
            if self._measured < one.next_look or not any(m in sys.modules for m in tracker.modules):
                return
            one.next_look = 2 * self._measured if tracker.costly else self._measured + 1
            place = tracker.find()
            if place is None:
                return
            self._let_go(one)
            one.place = place
            if tracker.before_end is not None:
                one.undo = tracker.before_end(place, lambda: self._try(one, self._conclude))
        if values:
            tracker.scalars(one.place, self._step, values)

    def _say(self, one: _Followed, diagnosis: Diagnosis) -> None:
        if self._is_open(one):
            one.tracker.findings(one.place, self._step, said(diagnosis))

    def _conclude(self, one: _Followed) -> None:
        """Writes the diagnosis, unless that was done before the place was ended."""
        if self._is_open(one) or (one.place is not None and one.tracker.before_end is None):
            one.tracker.findings(one.place, self._step, said(self._diagnose()))

    def _is_open(self, one: _Followed) -> bool:
        return one.place is not None and one.tracker.is_open(one.place)

    def _let_go(self, one: _Followed) -> None:
        undo, one.place, one.undo = one.undo, None, None
        if undo is not None:
            undo()

    def _try(self, one: _Followed, action: Callable[[_Followed], None]) -> None:
        """Does something that draws no random number of the training's, and may fail once."""
        if one.failed or os.getpid() != self._process:
            return
        states = RandomStates.now()
        try:
            action(one)
        except Exception as error:
            one.failed = True
            text = f"tracking: {one.tracker.name}: {error!r}"[:ERROR]
            self._log.event(self._step, "monitor_error", f"{text}; no more is written there", {})
        finally:
            states.restore()
