"""Watching as a context manager: around a loop in code, or around a whole script."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args

import torch
from torch import Tensor, nn

from diagnoser.classifier import load
from diagnoser.curvature import ProbeSet
from diagnoser.diagnosis import chosen, diagnose, is_grave
from diagnoser.errors import (
    ClassifierError,
    DiagnoserError,
    MeasurementError,
    RunLogError,
    UsageError,
)
from diagnoser.monitor import EVERYTHING, Interception, Monitor, Schedule
from diagnoser.repair_loop import (
    DIAGNOSER,
    STRATEGIES,
    Mode,
    Runner,
    ScriptRepairs,
    Strategy,
)
from diagnoser.report import finding_line, write_run
from diagnoser.rules import Rule
from diagnoser.runlog import Recording, RecordingBuilder, RunLogWriter
from diagnoser.types import Diagnosis, Finding, Unknown
from diagnoser.vocabulary import MODEL, STOPPED

SAID_AT_THE_END = 3  # events of the monitor
SAID_KINDS = ("monitor_error", "unmeasurable", "curvature_method", "over_budget")
ANNOUNCING_SHARE = 0.005  # of training time that looking for new findings may take
LOOK_S = 0.02  # what the first look takes, about


def switched_off() -> bool:
    """Whether ``DIAGNOSER_OFF`` asks for no watching at all."""
    return os.environ.get("DIAGNOSER_OFF", "") not in ("", "0")


class Stopped(BaseException):  # noqa: N818 - no error: what was to be seen was seen
    """Ends a script from inside its backward; what it opens is closed as at any exception."""


@dataclass(frozen=True, slots=True)
class Limit:
    """After how many steps, or seconds of training, a script is stopped."""

    steps: int
    seconds: float


class Watch:
    """A watch over one training; use it as ``with watch(model, optimizer) as w:``.

    Attributes:
        directory: The run directory, or None while watching is switched off.
    """

    def __init__(
        self,
        out: Path | str | None = None,
        *,
        models: Mapping[str, nn.Module] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        probe: ProbeSet | None = None,
        overhead: float = 0.10,
        every: int | None = None,
        at: Mapping[int, Collection[str]] | None = None,
        rules: Path | str | None = None,
        classifier: Path | str | None = None,
        name: str = "run",
        header: Mapping[str, Any] | None = None,
        announce: Callable[[str], None] | None = None,
        limit: Limit | None = None,
        repair: Mode = "off",
        strategy: Strategy = DIAGNOSER,
        runner: Callable[[Monitor, RunLogWriter, Path], Runner] | None = None,
    ) -> None:
        if not 0.0 <= overhead <= 100.0:
            raise UsageError(f"overhead={overhead}: a share of training time, 0.10 for 10 %")
        if every is not None and every < 2:
            raise UsageError(f"every={every}: a measurement takes two steps; give 2 or more")
        if repair not in get_args(Mode):
            raise UsageError(f"repair={repair!r}: give off, suggest or apply")
        _check_at(at, every)
        self.directory: Path | None = None
        self._between = runner is not None  # repairs wait for `between_steps`
        self._stepped: torch.optim.Optimizer | None = None
        self._off = switched_off()
        self._finished = False
        self._announce = announce
        self._known: set[tuple[str, str, str | None]] = set()
        self._looked_s, self._looks = 0.0, 0
        self._process = os.getpid()
        self._limit = limit
        self._repairs: ScriptRepairs | None = None
        self._rules: tuple[Rule, ...] = ()
        self._classifier: Path | None = None
        if self._off:
            return
        self._rules, self._classifier = chosen(rules, classifier)
        self.directory = (Path(out) if out is not None else new_run_directory(name)).absolute()
        self._log = RunLogWriter(self.directory, self.directory.name, dict(header or {}))
        self._schedule = Schedule(overhead=overhead, every=every, at=dict(at or {}))
        self._interception = Interception(self)
        self._monitor = Monitor(
            self._log,
            self._interception,
            self._schedule,
            models=models,
            optimizer=optimizer,
            probe=probe,
            on_measured=self._look_for_findings,
            record_all=limit is not None,
        )
        if repair != "off":
            self._repairs = ScriptRepairs(
                self._monitor, self._log, self._rules, self.directory, self._say, strategy,
                tries=repair == "apply",
                runner=runner and runner(self._monitor, self._log, self.directory),
            )  # fmt: skip

    # The interception talks to the watch, which passes on only what its own process does.

    def before_backward(self, root: Any) -> None:
        """See `interception.Listener`."""
        if os.getpid() == self._process:
            self._monitor.before_backward(root)
            if self._repairs is not None and self._monitor.step == 0:
                self._repairs.begins()
            if self._limit is not None and self._is_over(self._limit):
                self._limit = None  # a script that catches everything goes on unchecked
                self._monitor.check_finally(root)
                self._log.fact(self._monitor.step, STOPPED, MODEL, 1.0, {})
                raise Stopped

    def _is_over(self, limit: Limit) -> bool:
        return self._monitor.step >= limit.steps or self._schedule.training_s >= limit.seconds

    def after_backward(self) -> None:
        """See `interception.Listener`."""
        if os.getpid() == self._process:
            self._monitor.after_backward()

    def before_step(self) -> None:
        """See `interception.Listener`."""
        if os.getpid() == self._process:
            self._monitor.before_step()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """See `interception.Listener`."""
        if os.getpid() == self._process:
            self._monitor.after_step(optimizer)
            self._stepped = optimizer
            if self._repairs is not None and not self._between:
                self._repairs.step_made(optimizer)
                if self._repairs.is_child:  # a trial: this process goes on, and says nothing
                    self._process, self._announce = os.getpid(), None

    def between_steps(self) -> None:
        """Is called between two steps of a loop whose trials are made there."""
        optimizer, self._stepped = self._stepped, None
        if optimizer is not None and self._repairs is not None:
            self._repairs.step_made(optimizer)

    def __enter__(self) -> Self:
        if not self._off:
            self._interception.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._off or os.getpid() != self._process:
            return
        self.end_trial(None if kind is None else 1)
        self._interception.__exit__()
        self.finish(None if kind is None else 1)

    def finish(self, exit_code: int | None) -> None:
        """Ends the log, once; nothing is recorded afterwards."""
        if self._off or self._finished:
            return
        self.end_trial(exit_code)
        self._finished = True
        if self._repairs is not None:
            self._repairs.finish()
        if self._monitor.subject is None and self._monitor.step == 0:
            self._log.event(0, "nothing_seen", self._why_nothing(), {})
        self._monitor.finish(exit_code)
        for message in self._worth_saying():
            self._say(f"diagnoser: {message}")
        self._log.close()
        if self._log.failure is not None:
            self._say(f"diagnoser: {self._log.failure}")

    @property
    def left(self) -> tuple[Finding, ...]:
        """With ``repair=``: what held at the last measurement, of severity medium or more."""
        return self._repairs.left if self._repairs is not None else ()

    def end_trial(self, exit_code: int | None) -> None:
        """Ends this process where it is a trial: what follows a training is no business of it."""
        if self._repairs is not None and self._repairs.is_child:
            self._repairs.end_child(exit_code)

    def _worth_saying(self) -> list[str]:
        """What the monitor could not do, or did beyond its budget; each once, the first three."""
        events = self._log.recording().events
        messages = dict.fromkeys(
            f"{event.message} (a failure of the monitor, not of your training)"
            if event.kind == "monitor_error"
            else event.message
            for event in events
            if event.kind in SAID_KINDS
        )
        return list(messages)[:SAID_AT_THE_END]

    def _why_nothing(self) -> str:
        if any(True for _ in self._interception.books.modules):
            return "no training step was seen: torch.autograd.backward was never called to the end"
        return "no training step was seen: the program built no model"

    @property
    def account(self) -> Schedule:
        """What measuring has cost so far, and what the budget still allows."""
        return self._schedule

    @property
    def log(self) -> Recording:
        """What was recorded so far; empty while watching is switched off."""
        if self._off:
            return _nothing()
        return self._log.recording()

    def diagnose(self, *, write: bool = True) -> Diagnosis:
        """Diagnoses what was recorded so far, and writes diagnosis and report beside the log.

        While watching is switched off it is inconclusive, and nothing is written.

        Raises:
            DiagnoserError: The run directory cannot be written.
        """
        recording = self.log
        try:
            learned = load(self._classifier) if self._classifier is not None else None
            diagnosis = diagnose(recording, self._rules, learned)
        except ClassifierError as error:  # it was checked, but not built, before the training
            self._say(f"diagnoser: {error}; judged by the rules alone")
            said = Unknown("classifier", MODEL, (), str(error))
            diagnosis = diagnose(recording, self._rules)
            diagnosis = replace(diagnosis, unknown=(*diagnosis.unknown, said))
        if write and self.directory is not None:
            write_run(diagnosis, recording, self.directory)
        return diagnosis

    def _look_for_findings(self) -> None:
        """Prints findings that are new, as often as a two-hundredth of training time allows.

        The monitor is told what is suspected, and its schedule that something is.
        """
        allowed = ANNOUNCING_SHARE * self._schedule.training_s
        if self._repairs is not None:  # every measurement may be the one to act on
            if self._repairs.is_child:
                return
        elif self._announce is None:  # nobody waits for the first ones
            if max(self._looked_s, LOOK_S) > allowed:
                return
        elif self._looks > 1 and self._looked_s > allowed:
            return
        start = time.perf_counter()
        recording = self._log.recording()
        diagnosis = diagnose(recording, self._rules)
        if self._repairs is not None:
            self._repairs.measured(recording)
        self._monitor.suspect(
            finding.component for finding in diagnosis.findings if finding.component != MODEL
        )
        grave = [finding for finding in diagnosis.findings if is_grave(finding.severity)]
        self._schedule.alarmed |= bool(grave)
        for finding in grave:
            self._print_once(finding)
        self._looked_s += time.perf_counter() - start
        self._looks += 1

    def _print_once(self, finding: Finding) -> None:
        key = (finding.source, finding.component, finding.other)
        if key not in self._known:
            self._known.add(key)
            self._say(finding_line(finding))

    def _say(self, line: str) -> None:
        if self._announce is not None:
            self._announce(line)


def _check_at(at: Mapping[int, Collection[str]] | None, every: int | None) -> None:
    if at is None:
        return
    if every is not None:
        raise UsageError("every= and at= exclude each other: give one of them")
    for step, turns in at.items():
        if step < 0 or step - 1 in at:
            raise UsageError(f"at=: step {step}: a measurement takes two steps, the first is 0")
        if isinstance(turns, str) or not set(turns) <= set(EVERYTHING):
            raise UsageError(f"at=: step {step}: {turns!r} is none of {', '.join(EVERYTHING)}")


def _nothing() -> Recording:
    builder = RecordingBuilder({"run": "off", "header": {}})
    message = "watching is switched off: DIAGNOSER_OFF is set"
    event = {"record": "event", "step": 0, "kind": "nothing_seen", "message": message, "data": {}}
    builder.add(event)
    return builder.recording()


def new_run_directory(name: str) -> Path:
    """Makes a directory for a run under ``diagnoser-runs/``; no two runs get the same one."""
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
    first = Path("diagnoser-runs") / f"{name}-{stamp}"
    path, count = first, 2
    while True:
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            path, count = first.with_name(f"{first.name}-{count}"), count + 1
        except OSError:  # the run log, which is about to be made there, says why
            return path
        else:
            return path


def to_stderr() -> Callable[[str], None]:
    """Returns a function that prints a line to the present stderr, whatever replaces it later."""
    stream = sys.stderr

    def announce(line: str) -> None:
        try:
            print(line, file=stream, flush=True)
        except (OSError, ValueError):  # a closed stream is no reason to stop
            return

    return announce


def watch(
    model: nn.Module | Mapping[str, nn.Module] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    probe: Any = None,
    dtype: torch.dtype | None = None,
    out: Path | str | None = None,
    overhead: float = 0.10,
    every: int | None = None,
    at: Mapping[int, Collection[str]] | None = None,
    rules: Path | str | None = None,
    classifier: Path | str | None = None,
    repair: Mode = "off",
    strategy: str = "diagnoser",
    verbose: bool = True,
) -> Watch:
    """Watches a training loop that does not change.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> directory = getfixture("tmp_path") / "run"
    >>> with watch(model, optimizer, out=directory) as w:
    ...     for _ in range(30):
    ...         optimizer.zero_grad()
    ...         loss = (model(torch.ones(4, 2)) - 1).square().mean()
    ...         loss.backward()
    ...         optimizer.step()
    >>> w.diagnose().verdict
    'healthy'

    Args:
        model: The module that is trained, or several by name; found by itself if left out.
        optimizer: Its optimizer; found by itself if left out.
        loss_fn: With ``probe``: ``loss_fn(model, batch)`` gives the scalar loss of a batch.
        probe: A fixed batch that curvature is measured on (modules in eval mode) instead of the
            training's own; a list of batches gives ``batch_std_error``, too. Tensors, and tuples,
            lists and mappings of them, are measured in pieces where memory is short.
        dtype: With ``probe``: the type that curvature is measured in, such as ``torch.float64``.
        out: The run directory; a new one under ``diagnoser-runs/`` if left out.
        overhead: Share of training time that measuring may take; half of it until there is an
            alarm, of which curvature beyond the first, spectra and coupling wait. Eight curvature
            measurements are made in any run of 200 steps even where that exceeds it; the log then
            says so.
        every: Measure everything each that many steps, whatever it costs.
        at: Measure at these steps instead, whatever it costs; beside what every measurement holds,
            each names what else it measures: ``{10: ("spectrum",), 40: ("interaction",), 70: ()}``.
            A measurement takes its step and the next.
        rules: A directory of rules, or the name of a shipped family; ``off`` for none.
        classifier: A file that `classifier.save` wrote instead of the shipped one; ``off`` for
            none. Findings that are printed on the way are those of the rules.
        repair: ``apply`` tries repairs of what is found, beside the training as it is, and keeps
            one only if it helped; ``suggest`` says what would be tried. ``off`` leaves the training
            alone.
        strategy: How repairs are chosen: ``diagnoser``, or ``autotrainer`` for its published order
            and criterion.
        verbose: Print findings to stderr as they appear.

    Raises:
        UsageError: Arguments that do not fit together.
        RuleError, ClassifierError: A file that cannot be used.
        RunLogError: The run directory cannot be written.
    """
    models = {"model": model} if isinstance(model, nn.Module) else model
    return Watch(
        out,
        models=models,
        optimizer=optimizer,
        probe=probe_set(models, loss_fn, probe, dtype),
        overhead=overhead,
        every=every,
        at=at,
        rules=rules,
        classifier=classifier,
        announce=to_stderr() if verbose else None,
        repair=repair,
        strategy=strategy_named(strategy),
    )


def probe_set(
    models: Mapping[str, nn.Module] | None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None,
    probe: Any,
    dtype: torch.dtype | None = None,
) -> ProbeSet | None:
    """Returns the fixed samples that curvature is measured on; None: none are given.

    Raises:
        UsageError: Arguments that do not fit together.
    """
    if (loss_fn is None) != (probe is None):
        raise UsageError("loss_fn= and probe= go together: loss_fn(model, batch) on a fixed batch")
    if dtype is not None and probe is None:
        raise UsageError("dtype= needs probe=: a live graph is in the type that it was computed in")
    if loss_fn is None:
        return None
    if models is None or len(models) != 1:
        raise UsageError("probe= needs exactly one model: pass it as the first argument")
    (only,) = models.values()
    batches = probe if isinstance(probe, list) else [probe]
    try:
        return ProbeSet(loss_fn, only, batches, sites=True, dtype=dtype)
    except MeasurementError as error:
        raise UsageError(f"probe=: {error}") from error


def strategy_named(name: str) -> Strategy:
    """Returns how repairs are chosen, by its name.

    Raises:
        UsageError: There is no such strategy.
    """
    if name not in STRATEGIES:
        raise UsageError(f"no strategy '{name[:40]}'; there is {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


__all__ = ["DiagnoserError", "RunLogError", "Watch", "switched_off", "to_stderr", "watch"]
