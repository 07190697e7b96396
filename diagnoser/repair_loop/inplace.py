"""Trials in the training itself, where its process cannot be forked: one repair, before and after.

First the training goes on as it is for some steps, then with the repair for as many; a state is
held in between. What the repair has to beat is the training's own progress: the loss that the
steps before would have led to had they gone on alike. Losses are those of one held batch, taken
again with the weights of each moment; where that cannot be done they are those of different
batches, and it says so. A repair that is not kept is taken back with all that the training was.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Final

import numpy as np

from diagnoser.errors import RepairError
from diagnoser.monitor import Monitor
from diagnoser.repair import Applied, Live, Snapshot, apply
from diagnoser.repair_loop.comparing import (
    MEASURED_AT,
    SIGMAS,
    Judged,
    before,
    continuation,
    needed_gain,
    scatter,
    trial_steps,
)
from diagnoser.repair_loop.planning import Plan, Situation
from diagnoser.rules import Rule
from diagnoser.runlog import RunLogWriter
from diagnoser.table import Array
from diagnoser.types import Attempt, Estimate

HELD: Final = "on one held batch"
DIFFERENT: Final = "different batches"


class InPlace:
    """One trial of one plan, step by step.

    Args:
        monitor: The training's.
        log: Its log.
        rules: What is looked for.
        live: The training.
        situation: What was found.
        plan: What is tried.
        why: Why there is no fork, hence no twin.
        latent: See `comparing.judge`.
        directory: Where a snapshot goes that does not fit into memory.

    Attributes:
        applied: What is in force once the trial is over; None: nothing.
    """

    def __init__(
        self,
        monitor: Monitor,
        log: RunLogWriter,
        rules: Sequence[Rule],
        live: Live,
        situation: Situation,
        plan: Plan,
        why: str,
        directory: Path,
        *,
        latent: bool = False,
    ) -> None:
        self._monitor, self._log, self._rules = monitor, log, rules
        self._live, self.situation, self.plan = live, situation, plan
        self._why, self._latent, self._directory = why, latent, directory
        self._steps, self._why_steps = trial_steps(situation.recording.losses.value)
        self._begun = situation.step
        self._at = [math.nan, math.nan]  # the loss of the held batch: at first, and in between
        self._snapshot: Snapshot | None = None
        self._schedule: tuple[int | None, Any] | None = None
        self._interrupt = _Interrupt(self._undo)
        self.applied: Applied | None = None
        monitor.hold_batch()

    def step_made(self) -> Attempt | None:
        """Is called after every step; returns what the trial came to once it is over.

        Raises:
            RepairError: There is no room for a snapshot, or the repair cannot be applied.
        """
        made = self._monitor.step - self._begun
        if self._snapshot is None:
            if math.isnan(self._at[0]):
                self._at[0] = self._monitor.held_loss()
            if made >= self._steps:
                self._begin()
            return None
        if self._interrupt.asked:
            return self._end("it was interrupted")
        if not math.isfinite(self._monitor.last_loss):
            return self._end("the loss became NaN or infinite")
        return self._end("") if made >= 2 * self._steps else None

    def stop(self, why: str) -> Attempt | None:
        """Ends the trial before its time; what was tried is taken back."""
        return self._end(why) if self._snapshot else None

    def _begin(self) -> None:
        self._at[1] = self._monitor.held_loss()
        self._snapshot = Snapshot.take(self._live, self._directory)
        schedule = self._monitor.schedule
        self._schedule = schedule.every, schedule.at
        first = self._monitor.step + 1
        schedule.measure_at(first + round(share * self._steps) for share in MEASURED_AT)
        self._interrupt.install()
        try:
            self.applied = apply(self._live, self.plan.actions)
        except RepairError:
            self._undo()
            raise

    def _end(self, problem: str) -> Attempt:
        assert self._snapshot is not None
        after = self._monitor.held_loss() if not problem else math.nan
        recording = self._log.recording()
        first = self._begun + self._steps + 1
        findings = sorted(self.situation.findings, key=lambda f: f.source != self.plan.source)
        came_to = continuation(recording, first, self._rules, findings, problem)
        losses = recording.losses
        earlier = losses.value[(losses.step > self._begun) & (losses.step < first)]
        held = all(map(math.isfinite, (*self._at, after)))
        found = (
            _against_progress(self._at[0], self._at[1], after, scatter(came_to.losses))
            if held
            else _against_progress(*_levels(earlier, came_to.losses), scatter(came_to.losses))
        )
        judged = self._judge(came_to.problem, came_to.states.get(self.plan.source, ""), found)
        if judged.keep:
            self._release()
        else:
            self._undo()
        made = max(self._monitor.step - self._begun - self._steps, 0)
        return Attempt(
            step=first - 1,
            source=self.plan.source,
            component=self.plan.component,
            actions=self.plan.actions,
            derivation=self.plan.derivation,
            guarantee=(
                f"before and after, {HELD if held else DIFFERENT}, without a twin because "
                f"{self._why}; {self._why_steps}"
            ),
            kept=judged.keep,
            reason=judged.reason,
            before=before(self.situation.recording, findings, self._steps),
            after=came_to.arm,
            difference=judged.difference,
            batches=made,
        )

    def _judge(self, problem: str, state: str, found: Estimate) -> Judged:
        if problem:
            return Judged(False, problem, None)
        value, error = found.value, found.std_error or 0.0
        if not math.isfinite(value):
            return Judged(False, "the losses before and after cannot be compared", None)
        told = (
            f"the loss is {abs(value):.1%} {'lower' if value < 0 else 'higher'} than it would have "
            f"come to at the pace before (± {error:.1%})"
        )
        if state != "cured":
            return Judged(False, f"the finding is not gone; {told}", found)
        needed = needed_gain("cured", latent=self._latent, local=self.plan.is_local)
        keep = value + SIGMAS * error < needed
        return Judged(
            keep, f"the finding is gone; {told}{'' if keep else ': no clear gain'}", found
        )

    def _undo(self) -> None:
        """Puts the training back to where the repair was applied; once."""
        if self._snapshot is None:
            return
        snapshot, applied = self._snapshot, self.applied
        self.applied = None
        if applied is not None:
            applied.take_back()
        snapshot.restore()
        self._release()

    def _release(self) -> None:
        self._interrupt.remove()
        if self._schedule is not None:
            self._monitor.schedule.every, self._monitor.schedule.at = self._schedule
        if self._snapshot is not None:
            self._snapshot.discard()
        self._snapshot = None


class _Interrupt:
    """Has Ctrl-C put the script's own state back before the script hears of it."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo = undo
        self._earlier: Any = None
        self._installed = False
        self.asked = False

    def install(self) -> None:
        """Takes the place of the script's handler."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._earlier = signal.getsignal(signal.SIGINT)
        if callable(self._earlier):
            signal.signal(signal.SIGINT, self._handle)
            self._installed = True

    def remove(self) -> None:
        """Puts the script's handler back."""
        if self._installed:
            self._installed = False
            with suppress(ValueError):  # in another thread by now
                signal.signal(signal.SIGINT, self._earlier)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        earlier = self._earlier
        if earlier is signal.default_int_handler:
            self._undo()  # it raises, and what the script catches sees its own state
        else:
            self.asked = True  # it may let the step go on: the state is put back behind it
        earlier(number, frame)


def _against_progress(first: float, middle: float, last: float, noise: float) -> Estimate:
    """Returns what a loss came to, minus what it would have come to at its pace before."""
    expected = middle * min(middle / first, 1.0) if first > 0 and middle > 0 else min(middle, first)
    scale = max(abs(expected), 1e-12)
    return Estimate((last - expected) / scale, noise, method="before and after")


def _levels(earlier: Array, losses: Array) -> tuple[float, float, float]:
    half = max(len(earlier) // 2, 1)
    parts = (earlier[:half], earlier[half:], losses[len(losses) // 2 :])
    first, middle, last = (float(np.mean(part)) if len(part) else math.nan for part in parts)
    return first, middle, last
