"""Watching as a context manager: around a loop in code, or around a whole script."""

from __future__ import annotations

import html
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args

import torch
from torch import Tensor, nn

from diagnoser.checks import unwrapped
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
from diagnoser.ranks import Team, present, restarted
from diagnoser.repair_loop import (
    DIAGNOSER,
    STRATEGIES,
    Mode,
    Runner,
    ScriptRepairs,
    Stopping,
    Strategy,
)
from diagnoser.report import finding_line, framed, render_report, report_data, write_run
from diagnoser.report.wording import visible
from diagnoser.rules import Rule
from diagnoser.runlog import (
    Recording,
    RecordingBuilder,
    RunLogWriter,
    new_run_directory,
    read_run,
)
from diagnoser.trackers import Tracking
from diagnoser.types import Diagnosis, Finding, Measurement, Unknown
from diagnoser.vocabulary import MODEL, SEVERITIES, STOPPED

SAID_AT_THE_END = 3  # events of the monitor
OVER_BUDGET = "over_budget"
SAID_KINDS = (
    "monitor_error", "unmeasurable", "curvature_method", OVER_BUDGET, "not_tracked", "ranks",
)  # fmt: skip
ANNOUNCING_SHARE = 0.005  # of training time that looking for new findings may take
LONGEST_LINE = 1000  # characters of what is said on the way
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

    In a notebook it shows itself as its report. Cells that follow one another can be watched by
    ``w.__enter__()`` before and ``w.end(None)`` after them.

    In a distributed training every rank has one (see `diagnoser.ranks`); that of rank 0 speaks.

    Attributes:
        directory: The run directory, or None while watching is switched off and as long as rank 0
            has not said where it is.
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
        stop_on: str | None = None,
        heads: bool = False,
        runner: Callable[[Monitor, RunLogWriter, Path], Runner] | None = None,
        track: bool = False,
        team: Team | None = None,
    ) -> None:
        if not 0.0 <= overhead <= 100.0:
            raise UsageError(f"overhead={overhead}: a share of training time, 0.10 for 10 %")
        if every is not None and every < 2:
            raise UsageError(f"every={every}: a measurement takes two steps; give 2 or more")
        if repair not in get_args(Mode):
            raise UsageError(f"repair={repair!r}: give off, suggest or apply")
        if stop_on not in (None, *filter(is_grave, SEVERITIES)):
            raise UsageError(f"stop_on={stop_on!r}: give medium, high or critical")
        if stop_on is not None and repair == "apply":
            raise UsageError("stop_on= and repair='apply' exclude each other: give one of them")
        if heads and repair != "off":
            raise UsageError(
                "heads= is for looking: repairs act on whole projections; leave one out"
            )
        _check_at(at, every)
        if present() is not None and (repair == "apply" or stop_on is not None):
            raise UsageError(
                "stop_on= and repair='apply' are for a training of one process, and this is one of "
                f"{present().ranks} ranks: leave them out"  # type: ignore[union-attr]
            )
        self.directory: Path | None = None
        self._between = runner is not None  # repairs wait for `between_steps`
        self._stepped: torch.optim.Optimizer | None = None
        self._off = switched_off()
        self._finished = self._diagnoses = self._has_met = False
        self._exit_code: int | None = None
        self._known: set[tuple[str, str, str | None]] = set()
        self._looked_s, self._looks = 0.0, 0
        self._process = os.getpid()
        self._limit = limit
        self._is_check = limit is not None  # which has no budget to speak of
        self._repairs: ScriptRepairs | None = None
        self._stopping: Stopping | None = None
        self._tracking: Tracking | None = None
        self._rules: tuple[Rule, ...] = ()
        self._classifier: Path | None = None
        self._team = team or Team()
        self._announce = announce if self._team.is_first else None
        if self._off:
            return
        self._rules, self._classifier = chosen(rules, classifier)
        if not self._team.waits:
            new = restarted(Path(out)) if out is not None else new_run_directory(name)
            self.directory = new.absolute()
            name = self.directory.name
        self._log = RunLogWriter(self.directory, name, dict(header or {}))
        self._log.beginnings = self._beginnings
        self._schedule = Schedule(overhead=overhead, every=every, at=dict(at or {}))
        self._interception = Interception(self)
        self._monitor = Monitor(
            self._log,
            self._interception,
            self._schedule,
            models=models,
            optimizer=optimizer,
            probe=probe,
            on_measured=self._measured,
            record_all=limit is not None,
            heads=heads,
        )
        if repair != "off" and self.directory is not None:
            self._repairs = ScriptRepairs(
                self._monitor, self._log, self._rules, self.directory, self._say, strategy,
                tries=repair == "apply",
                runner=runner and runner(self._monitor, self._log, self.directory),
            )  # fmt: skip
        if track and self._team.is_first:
            self._tracking = Tracking(self._log, lambda: self.diagnose(write=False))
        if stop_on is not None and self.directory is not None:
            self._stopping = Stopping(self._monitor, self._log, self.directory, stop_on)

    # The interception talks to the watch, which passes on only what its own process does.

    def before_backward(self, root: Any) -> None:
        """See `interception.Listener`."""
        if os.getpid() == self._process:
            if not self._has_met:
                self._meet()
            self._monitor.before_backward(root)
            if self._repairs is not None and self._monitor.step == 0:
                self._repairs.begins()
            if self._stopping is not None:
                self._stop_if_asked(self._stopping)
            if self._limit is not None and self._is_over(self._limit):
                self._limit = None  # a script that catches everything goes on unchecked
                self._monitor.check_finally(root)
                self._log.fact(self._monitor.step, STOPPED, MODEL, 1.0, {})
                raise Stopped

    def _meet(self) -> None:
        """Finds out, before a step, which rank this is and where rank 0 logs; never waits."""
        team = self._team
        with self._monitor.guard("ranks"):
            if team.join(self._log):
                self._monitor.distributed = self._schedule.agreed = True
                if self.directory is not None:
                    team.tell(self.directory, self._log)
                if self._repairs is not None or self._stopping is not None:
                    self._repairs = self._stopping = None
                    message = "a distributed training is neither repaired nor stopped: only watched"
                    self._log.event(0, "unmeasurable", message, {})
            self._has_met = not team.waits
            if team.waits and (team.joined or team.inside is not None):
                self.directory = team.look()
                self._has_met = self.directory is not None or team.has_looked
                if self.directory is not None:
                    self._log.place(team.own(self.directory))

    def _stop_if_asked(self, stopping: Stopping) -> None:
        if self._monitor.step == 0:
            stopping.begins()
        if stopping.finding is not None:
            self._stopping = None  # a script that catches everything goes on unchecked
            self._say(f"diagnoser: {stopping.stop()}")
            raise Stopped

    def _is_over(self, limit: Limit) -> bool:
        # Ranks end at the same step, or one of them waits for the others in a collective.
        late = not self._team.joined and self._schedule.training_s >= limit.seconds
        return late or self._monitor.step >= limit.steps

    def after_backward(self) -> None:
        """See `interception.Listener`."""
        if os.getpid() == self._process:
            self._monitor.after_backward()

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """See `interception.Listener`."""
        if os.getpid() == self._process:
            self._monitor.before_step(optimizer)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """See `interception.Listener`."""
        if os.getpid() == self._process:
            self._monitor.after_step(optimizer)
            self._stepped = optimizer
            if self._stopping is not None and self._monitor.is_complete:
                self._stopping.step_made(optimizer)
            if self._repairs is not None and not self._between:
                self._repairs.step_made(optimizer)
                if self._repairs.is_child:  # a trial: this process goes on, and says nothing
                    self._process, self._announce = os.getpid(), None
                    self._tracking = None

    def step_skipped(self, optimizer: torch.optim.Optimizer, scale: float) -> None:
        """See `interception.Listener`."""
        if os.getpid() == self._process:
            self._monitor.step_skipped(optimizer, scale)

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
    ) -> bool | None:
        stopped = isinstance(error, Stopped)  # was asked for, and ends the block as its end would
        self.end(None if kind is None or stopped else 1)
        return stopped

    def leave(self) -> None:
        """Undoes in a fork what watching has changed there; the training goes on elsewhere."""
        if not self._off:
            self._interception.__exit__()

    def end(self, exit_code: int | None) -> None:
        """Ends the watch where no ``with`` can stand around the training."""
        if self._off or os.getpid() != self._process:
            return
        self.end_trial(exit_code)
        self._interception.__exit__()
        self.finish(exit_code)

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
        if self._tracking is not None:
            self._tracking.end()
        self._exit_code = exit_code
        self._diagnoses = self._team.diagnoses(self.directory, exit_code)
        if self._diagnoses:
            self._await_others()
        for message in self._worth_saying() if self._diagnoses else ():
            self._say(f"diagnoser: {message}")
        self._log.close()
        if self._log.trouble is not None:
            self._say(f"diagnoser: {self._log.trouble}")

    def _await_others(self) -> None:
        if self.directory is not None:
            self._team.await_others(self.directory, self._log.path, self._exit_code)

    @property
    def has_ended(self) -> bool:
        """Whether nothing is recorded any more; false while watching is switched off."""
        return self._finished

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
        events = self.log.events
        messages = dict.fromkeys(
            f"{event.message} (a failure of the monitor, not of your training)"
            if event.kind == "monitor_error"
            else event.message
            for event in events
            if event.kind in SAID_KINDS and not (self._is_check and event.kind == OVER_BUDGET)
        )
        return list(messages)[:SAID_AT_THE_END]

    def _why_nothing(self) -> str:
        if not self._interception.is_in_place:
            return "no training step was seen: the program replaces torch.autograd.backward"
        if self._monitor.steps_made:
            return (
                "no training step was seen: an optimizer stepped, but torch.autograd.backward was "
                "never called; call loss.backward(), as gradients of torch.autograd.grad go unseen"
            )
        if any(True for _ in self._interception.books.modules):
            return "no training step was seen: torch.autograd.backward was never called to the end"
        return "no training step was seen: the program built no model"

    @property
    def account(self) -> Schedule:
        """What measuring has cost so far, and what the budget still allows."""
        return self._schedule

    @property
    def diagnoses(self) -> bool:
        """Whether this is the process that diagnoses: one rank does, when its script has ended."""
        return self._diagnoses and not self._off

    @property
    def log(self) -> Recording:
        """What was recorded so far, by all ranks; empty while watching is switched off."""
        if self._off:
            return _nothing()
        own = self._log.recording()
        if self.directory is None or self._log.path.parent == self.directory:
            return own if self.directory is None else read_run(self.directory, own)
        try:
            return read_run(self.directory)
        except RunLogError:
            return own

    def diagnose(self, *, write: bool = True) -> Diagnosis:
        """Diagnoses what was recorded so far, and writes diagnosis and report beside the log.

        While watching is switched off it is inconclusive, and nothing is written.

        Raises:
            DiagnoserError: The run directory cannot be written.
        """
        if self._finished:
            self._await_others()
        recording = self.log
        try:
            learned = load(self._classifier) if self._classifier is not None else None
            diagnosis = diagnose(recording, self._rules, learned)
        except ClassifierError as error:  # it was checked, but not built, before the training
            self._say(f"diagnoser: {error}; judged by the rules alone")
            said = Unknown("classifier", MODEL, (), str(error))
            diagnosis = diagnose(recording, self._rules)
            diagnosis = replace(diagnosis, unknown=(*diagnosis.unknown, said))
        ours = self._diagnoses if self._finished else self._team.is_first
        if write and ours and self.directory is not None:
            write_run(diagnosis, recording, self.directory)
        return diagnosis

    def __repr__(self) -> str:
        if self.directory is None:
            return "<diagnoser: watching is switched off, DIAGNOSER_OFF is set>"
        steps, place = self._monitor.step, self.directory
        if self._finished:
            return f"<diagnoser: {steps} steps watched; diagnose() writes a report into {place}>"
        return f"<diagnoser: {steps} steps so far, log in {place}; the report comes at the end>"

    def _repr_html_(self) -> str:
        """Returns the report for a notebook to show; one line while there is none."""
        if self.directory is None or not self._finished:
            return f"<p>{html.escape(repr(self).strip('<>'))}</p>"
        diagnosis = self.diagnose(write=False)
        return framed(render_report(diagnosis, report_data(self.log, diagnosis.cost)))

    def _measured(self, rows: Sequence[Measurement]) -> None:
        if self._tracking is not None and rows:
            self._tracking.measured(rows[0].step, rows)
        self._look_for_findings()

    def _look_for_findings(self) -> None:
        """Prints findings that are new, as often as a two-hundredth of training time allows.

        The monitor is told what is suspected, and its schedule that something is.
        """
        allowed = ANNOUNCING_SHARE * self._schedule.training_s
        if self._repairs is not None or self._stopping is not None:
            # Every measurement may be the one to act on.
            if self._repairs is not None and self._repairs.is_child:
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
        if self._stopping is not None:
            self._stopping.measured(recording, diagnosis)
        self._monitor.suspect(
            finding.component for finding in diagnosis.findings if finding.component != MODEL
        )
        grave = [finding for finding in diagnosis.findings if is_grave(finding.severity)]
        self._schedule.alarmed |= bool(grave)
        if self._tracking is not None and any(
            _key(finding) not in self._known for finding in grave
        ):
            self._tracking.found(diagnosis)
        for finding in grave:
            self._print_once(finding)
        self._looked_s += max(time.perf_counter() - start, 0.0)
        self._looks += 1

    def _beginnings(self, recording: Recording) -> Iterator[int]:
        """Yields the steps at which what is found began, the gravest first: the log keeps them."""
        for finding in diagnose(recording, self._rules).findings:
            yield from dict.fromkeys(evidence.steps[0] for evidence in finding.evidence)

    def _print_once(self, finding: Finding) -> None:
        key = _key(finding)
        if key not in self._known:
            self._known.add(key)
            self._say(finding_line(finding))

    def _say(self, line: str) -> None:
        if self._announce is not None:
            self._announce(line)


def _key(finding: Finding) -> tuple[str, str, str | None]:
    return finding.source, finding.component, finding.other


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


def to_stderr() -> Callable[[str], None]:
    """Returns a function that prints a line to the present stderr, whatever replaces it later."""
    stream = sys.stderr

    def announce(line: str) -> None:
        try:
            print(visible(line, limit=LONGEST_LINE), file=stream, flush=True)
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
    stop_on: str | None = None,
    heads: bool = False,
    track: bool = False,
    verbose: bool = True,
) -> Watch:
    """Watches a training loop that does not change; on every rank of it, where there are several.

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
        stop_on: A severity, such as ``critical``: what is found of it or graver ends the block, and
            the last healthy state is written to ``healthy.pt`` in the run directory.
        heads: Look at each attention head by itself: query, key and value are components by head
            (``q_proj[head=3]``), and the entropy of each head's attention is recorded.
        track: Write what is measured and found into the trackers that the program itself uses: an
            open ``SummaryWriter`` of TensorBoard, the active run of MLflow, the present one of W&B.
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
        stop_on=stop_on,
        heads=heads,
        track=track,
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
        return ProbeSet(loss_fn, unwrapped(only), batches, sites=True, dtype=dtype)
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
