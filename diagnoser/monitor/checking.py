"""Program checks of a training: whose calls are recorded, and what is logged of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from diagnoser.checks import Calls, Found, Seen
from diagnoser.monitor.interception import Interception
from diagnoser.monitor.sample import Sample
from diagnoser.monitor.schedule import Schedule
from diagnoser.runlog import RunLogWriter
from diagnoser.types import Where
from diagnoser.vocabulary import MODEL, UNKNOWN


class Checking:
    """Records the calls of the steps that are checked, and logs what checks found.

    Args:
        log: Where it goes.
        interception: What records calls, and has notes of clipping and schedules.
        record_all: Record the calls of every step, not of those alone that are due.

    Attributes:
        calls: Of the running step, if they were recorded.
        memory: What checks keep from one step to the next.
        wanted: The calls of the coming steps are wanted for something else, too.
    """

    def __init__(
        self, log: RunLogWriter, interception: Interception, *, record_all: bool = False
    ) -> None:
        self.recorder = interception.recorder
        self.calls: Calls | None = None
        self.memory: dict[str, Any] = {}
        self._log = log
        self._notes = interception.notes
        self._optimizers = interception.books.optimizers
        self.wanted = False
        self._record_all = record_all
        self._due: bool | None = None  # in the running step; asked before its forward
        self._placed: set[tuple[str, str]] = set()
        self._told: dict[str, str] = {}  # what checks could not tell, and why

    def take(self, *, first: bool) -> None:
        """Ends recording before a backward, and takes the calls if it is a step's first."""
        if first:
            self.calls = self.recorder.take() if self.recorder.is_on else None
        self.recorder.stop()

    def is_due(self, step: int, schedule: Schedule) -> bool:
        """Whether this step is to be checked now; true once."""
        if self.calls is None:
            return False
        if self._due is None:  # the first step, which is always recorded
            self._due = schedule.wants_checks(step)
        due, self._due = self._due, False
        return due

    def prepare(self, step: int, schedule: Schedule, *, first: bool) -> None:
        """Begins to record, after a backward, where the coming ``step`` is to be checked."""
        self.calls = None
        self.recorder.step = step
        if first:
            self._due = schedule.wants_checks(step)
        if (
            self._due or self._record_all or self.wanted
        ):  # again after each of several backwards of a step
            self.recorder.start()

    def run(self, checks: Callable[[Seen], Found], seen: Seen) -> None:
        """Runs checks on a step and logs numbers, places, and what could not be told."""
        begun = time.perf_counter()
        found = checks(seen)
        for what, component, where in found.places:
            self.place(seen.step, what, component, where)
        for quantity, reason in found.unknown.items():
            if self._told.get(quantity) != reason:
                self._told[quantity] = reason
                self._log.fact(seen.step, UNKNOWN, quantity, 1.0, {"reason": reason})
        self._log.measurement(seen.step, found.rows, max(time.perf_counter() - begun, 0.0))

    def place(self, step: int, what: str, component: str, where: Where | None) -> None:
        """Logs where in the program something is, once."""
        if where is not None and (what, component) not in self._placed:
            self._placed.add((what, component))
            data = {"file": where.file, "line": where.line}
            self._log.fact(step, what, component, 1.0, data)

    def _one_optimizer(self) -> bool:
        return sum(1 for _ in self._optimizers) == 1

    def read_notes(self, sample: Sample) -> None:
        """Adds to a sample what the program did between backward and step, and to evaluate."""
        notes = self._notes
        evaluations = evaluations_in(self.recorder.evaluations, sample.step)
        if notes.clips:
            ratios, notes.clip_ratios = notes.clip_ratios, []
            if ratios:
                values = torch.stack([ratio.double().cpu() for ratio in ratios]).numpy()
                values = values[np.isfinite(values)]
                if len(values):
                    sample.run("clip_ratio", float(np.median(values)))
                    sample.run("clipped_share", float((values > 1.0).mean()))
            sample.run("clipped_scaled", notes.clips_scaled / notes.clips)
            if self._one_optimizer():  # of several, one steps before another's are clipped
                sample.run("clipped_late", notes.clips_late / notes.clips)
            self.place(sample.step, "clip", MODEL, notes.clip_place)
        if notes.scheduler_steps:
            sample.run("scheduler_first", float(notes.scheduler_first))
            if notes.schedule_length:
                sample.run("schedule_length", notes.schedule_length)
            self.place(sample.step, "scheduler", MODEL, notes.scheduler_place)
        if evaluations:
            wrong = [where for _, in_training, where in evaluations if in_training]
            sample.run("scored_in_training", len(wrong) / len(evaluations))
            self.place(sample.step, "evaluation", MODEL, wrong[0] if wrong else None)


def evaluations_in(
    seen: Sequence[tuple[int, bool, Where | None]], step: int
) -> list[tuple[int, bool, Where | None]]:
    """Returns the calls without gradients that are evaluations and no part of every step.

    A generator whose samples train a discriminator, or a teacher, is called on each or, where two
    optimizers take turns, on every other; whether that is so is known two steps later.
    """
    places = {(at, where) for at, _, where in seen}
    return [
        (at, in_training, where)
        for at, in_training, where in seen
        if at + 1 < step and not {(at + by, where) for by in (-2, -1, 1, 2)} & places
    ]
