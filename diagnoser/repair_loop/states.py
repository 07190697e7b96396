"""States of a training from before anything was wrong: what a repair, or its user, goes back to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from diagnoser.errors import DiagnoserError, RepairError
from diagnoser.monitor import Monitor
from diagnoser.repair import Live, Snapshot
from diagnoser.runlog import Recording, RunLogWriter
from diagnoser.stepping import settle
from diagnoser.types import Finding

KEPT: Final = 3  # last states from before any finding, beside the first of all
APART: Final = 10  # steps between two of them
RECENT_LOSSES: Final = 10  # whose mean says whether a state is worth going back to:
NEAR_LOWEST: Final = 1.1  # it is, up to this times the lowest such mean so far
SCHEMA: Final = "diagnoser.state/1"


@dataclass(frozen=True, slots=True)
class State:
    """A snapshot, and the step that had just been made; -1: none."""

    step: int
    snapshot: Snapshot


class HealthyStates:
    """Keeps the first state of a training and the last from before anything was found.

    Args:
        monitor: The training's.
        log: Its log, which is told where no more can be kept.
        directory: Where snapshots go that do not fit into memory.
    """

    def __init__(self, monitor: Monitor, log: RunLogWriter, directory: Path) -> None:
        self._monitor, self._log, self._directory = monitor, log, directory
        self._states: list[State] = []
        self._problem = ""
        self._lowest, self._is_due = math.inf, False

    @property
    def first(self) -> State | None:
        """The state before the first step; None: it was not kept."""
        return self._states[0] if self._states else None

    def before(self, step: int) -> State | None:
        """Returns the last state from before a step; None: none was kept."""
        found = [state for state in self._states if state.step < max(step, 0)]
        return found[-1] if found else None

    def begins(self) -> None:
        """Is called before the first step: the first state of all is kept."""
        if not self._states and self._monitor.subject is not None:
            self._keep(-1)

    def measured(self, recording: Recording, findings: Sequence[Finding]) -> None:
        """Is called after every measurement, with what was found: is the state worth keeping?"""
        losses = recording.losses.value[-RECENT_LOSSES:]
        level = float(losses.mean()) if len(losses) else math.nan
        self._lowest = min(self._lowest, level) if math.isfinite(level) else self._lowest
        self._is_due = not findings and level <= NEAR_LOWEST * self._lowest

    def step_made(self, optimizer: torch.optim.Optimizer) -> None:
        """Is called behind a step that all optimizers have made."""
        if not self._is_due:  # it was measured in this step or the one before
            return
        self._is_due = False
        step = self._monitor.step
        if self._states and step - self._states[-1].step >= APART:
            settle(optimizer)
            self._keep(step)

    def forget(self) -> None:
        """Keeps the first state alone: what comes is another training than what was."""
        del self._states[1:]

    def _keep(self, step: int) -> None:
        if self._problem:
            return
        with self._monitor.guard("snapshot"):
            try:
                snapshot = Snapshot.take(live_training(self._monitor), self._directory)
            except DiagnoserError as error:
                self._problem = str(error)
                self._log.event(max(step, 0), "repairs", str(error), {})
                return
            self._states.append(State(step, snapshot))
            if len(self._states) > KEPT + 1:
                self._states.pop(1).snapshot.discard()


def live_training(monitor: Monitor) -> Live:
    """Returns the training that a monitor has found."""
    subject = monitor.subject
    assert subject is not None
    named = {id(p) for model in subject.models.values() for p in model.parameters()}
    return Live(
        subject.models,
        monitor.optimizers,
        monitor.others,
        free={n: p for n, p in subject.parameters.items() if id(p) not in named},
        components=(*subject.components, *subject.layers),
    )


def write_state(state: State, live: Live, path: Path) -> None:
    """Writes an earlier state of a training as a file that a script can go on from.

    ``torch.load(path, weights_only=True)`` gives a mapping: ``schema``, ``step`` (made before it),
    ``models`` and ``optimizers`` with their ``state_dict``, models by name and optimizers in their
    order, and ``parameters`` that no model has, by name. The training is as it was afterwards.

    Raises:
        RepairError: It cannot be written.
    """
    waiting = path.with_name(f".{path.name}-unfinished")
    now = Snapshot.take(live, path.parent / "snapshots")
    try:
        state.snapshot.restore()
        content = {
            "schema": SCHEMA,
            "step": state.step,
            "models": {name: model.state_dict() for name, model in live.models.items()},
            "optimizers": [optimizer.state_dict() for optimizer in live.optimizers],
            "parameters": {name: tensor.detach() for name, tensor in live.free.items()},
        }
        try:
            torch.save(content, waiting)
            waiting.replace(path)
        except (OSError, RuntimeError) as error:  # torch's own writer raises the second
            waiting.unlink(missing_ok=True)
            raise RepairError(f"{path}: the healthy state cannot be written ({error})") from error
    finally:
        now.restore()
        now.discard()
