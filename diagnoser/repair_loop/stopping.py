"""Ends a training in which something grave is found, and keeps the last state from before it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch

from diagnoser.diagnosis import is_grave
from diagnoser.errors import DiagnoserError
from diagnoser.monitor import Monitor
from diagnoser.repair_loop.states import HealthyStates, live_training, write_state
from diagnoser.report import wording
from diagnoser.runlog import Recording, RunLogWriter
from diagnoser.types import Diagnosis, Finding
from diagnoser.vocabulary import MODEL, STOPPED, severity_rank

FILE: Final = "healthy.pt"


class Stopping:
    """Says when a training is to be ended.

    Args:
        monitor: The training's.
        log: Its log.
        directory: Of the run; the healthy state goes there.
        severity: Of a finding that ends the training, or more.

    Attributes:
        finding: The one that the training is to be ended for; None: there is none yet.
    """

    def __init__(self, monitor: Monitor, log: RunLogWriter, directory: Path, severity: str) -> None:
        self.finding: Finding | None = None
        self._monitor, self._log, self._directory = monitor, log, directory
        self._severity = severity
        self._states = HealthyStates(monitor, log, directory / "snapshots")

    def begins(self) -> None:
        """Is called before the first step."""
        self._states.begins()

    def measured(self, recording: Recording, diagnosis: Diagnosis) -> None:
        """Is called with what is found after every measurement."""
        grave = [finding for finding in diagnosis.findings if is_grave(finding.severity)]
        self._states.measured(recording, grave)
        least = severity_rank(self._severity)
        enough = [finding for finding in grave if severity_rank(finding.severity) >= least]
        self.finding = enough[0] if enough else None

    def step_made(self, optimizer: torch.optim.Optimizer) -> None:
        """Is called behind a step that all optimizers have made."""
        self._states.step_made(optimizer)

    def stop(self) -> str:
        """Writes the healthy state and returns what there is to say; the training is to end now."""
        assert self.finding is not None
        step, finding = self._monitor.step, self.finding
        self._log.fact(step, STOPPED, MODEL, 1.0, {})
        what = f"{finding.fault} in {wording.subject(finding.component, finding.other)}"
        said = f"stopped, as was asked for at severity {self._severity}: {what}; "
        data = {"source": finding.source, "since_step": finding.since_step}
        state, path = self._states.before(finding.since_step), self._directory / FILE
        if state is None:
            said += "no state from before it was kept"
        else:
            try:
                write_state(state, live_training(self._monitor), path)
                data["healthy_step"] = state.step
                when = f"after step {state.step}" if state.step >= 0 else "before the first step"
                said += f"the state {when}, from before it, is {path}"
            except DiagnoserError as error:
                said += str(error)
        self._log.event(step, "stopped", said, data)
        return f"step {step}: {said}"
