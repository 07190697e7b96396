"""Repairs in a running script: when the loop is asked, by whom it is tried, what is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal, NoReturn
from weakref import WeakSet

import torch

from diagnoser.diagnosis import attempt_data, diagnose, is_grave
from diagnoser.errors import DiagnoserError, RepairError
from diagnoser.features import feature_tables
from diagnoser.monitor import Monitor
from diagnoser.repair import OF_OPTIMIZERS, Applied, Live, apply, schedules_of
from diagnoser.repair_loop.forks import Forks
from diagnoser.repair_loop.inplace import InPlace
from diagnoser.repair_loop.loop import (
    DIAGNOSER,
    LATENT,
    Decision,
    Runner,
    Strategy,
    kept_without_trial,
    not_tried,
    round_of_trials,
)
from diagnoser.repair_loop.planning import Situation, is_of_the_start
from diagnoser.repair_loop.states import HealthyStates, live_training
from diagnoser.report import wording
from diagnoser.rules import Rule, precision_of
from diagnoser.runlog import Recording, RunLogWriter
from diagnoser.stepping import settle
from diagnoser.types import Attempt, Finding, Repair

Mode = Literal["off", "suggest", "apply"]
MOST_ROUNDS: Final = 4  # of trials, in a run
MOST_IN_PLACE: Final = 8  # plans; each takes twice a trial's steps of the training
SETTLING: Final = 20  # steps after a round before the next
RECENT: Final = 3  # measurements, in one of which what is acted on must have held


class ScriptRepairs:
    """Tries and keeps repairs of the training that a monitor watches.

    Args:
        monitor: The training's.
        log: Its log; every attempt stands there.
        rules: What is looked for.
        directory: Of the run; trials and snapshots that do not fit into memory go there.
        say: Prints a line.
        strategy: How plans are found and judged.
        tries: Whether anything is tried; otherwise it is only said what would be.
        runner: Makes the trials; forks if left out.
    """

    def __init__(
        self,
        monitor: Monitor,
        log: RunLogWriter,
        rules: Sequence[Rule],
        directory: Path,
        say: Callable[[str], None],
        strategy: Strategy = DIAGNOSER,
        *,
        tries: bool = True,
        runner: Runner | None = None,
    ) -> None:
        self._tries = tries
        self._quick_rules = [replace(r, hold=1) if tries else r for r in rules]
        self._precision = precision_of(rules)
        self._monitor, self._log, self._rules = monitor, log, rules
        self._directory, self._say, self._strategy = directory, say, strategy
        self._forks = Forks(monitor, log, directory / "trials", lambda: monitor.schedule.step_s)
        self._runner: Runner = runner or self._forks
        self._healthy = HealthyStates(monitor, log, directory / "snapshots")
        self._tried: list[tuple[Repair, ...]] = []
        self._suggested: set[str] = set()
        self._applied: list[Applied] = []
        self._in_force: list[Repair] = []
        self._known: WeakSet[torch.optim.Optimizer] = WeakSet()
        self._stepped: set[int] = set()  # identities of parameters
        self._findings: tuple[Finding, ...] = ()
        self._at_repair: dict[tuple[str, str], tuple[float, ...]] = {}
        self._rounds = 0
        self._not_before = self._repaired = 0
        self._problem = ""
        self._in_place: InPlace | None = None

    @property
    def left(self) -> tuple[Finding, ...]:
        """What of severity medium or more held at the last measurement."""
        return tuple(f for f in self._findings if is_grave(f.severity))

    @property
    def is_child(self) -> bool:
        """Whether this process is a trial that goes on with the script for some steps."""
        return self._forks.is_child

    def end_child(self, exit_code: int | None) -> NoReturn:
        """Ends a trial whose script has ended."""
        self._forks.end(exit_code)

    def measured(self, recording: Recording) -> None:
        """Is called after every measurement: looks for what can be acted on.

        A rule that wants to be true several times in a row is taken at its first word, because
        trials are to confirm it, and a check of low severity is acted on, because it saw a fact.
        What no longer holds is left alone, and so is what was there when a repair was kept and has
        not moved since: it is about the start of the run, say.
        """
        diagnosis = diagnose(recording, self._quick_rules, precision=self._precision)
        since = max(_recently(recording), self._repaired)
        self._findings = tuple(
            f
            for f in diagnosis.findings
            if (is_grave(f.severity) or f.source.startswith("check:"))
            and self._at_repair.get((f.source, f.component)) != _observed(f)
            and not (self._repaired and is_of_the_start(f))
            and (not f.evidence or max(e.steps[1] for e in f.evidence) >= since)
        )
        self._healthy.measured(recording, self._findings)

    def begins(self) -> None:
        """Is called before the first step: the first state of all is kept."""
        self._healthy.begins()

    def step_made(self, optimizer: torch.optim.Optimizer) -> None:
        """Is called after every step of an optimizer."""
        if self._is_new(optimizer):
            with self._monitor.aside("repair"):
                settle(optimizer)
                self._take_over(optimizer)
        if not self._monitor.is_complete:
            return
        if self._forks.is_child:
            self._forks.step_made()
            return
        step = self._monitor.step
        if self._in_place is not None:
            with self._monitor.aside("repair"):
                settle(optimizer)
                self._go_on_in_place(self._in_place)
            return
        self._healthy.step_made(optimizer)
        if not self._findings:
            return
        if self._rounds >= MOST_ROUNDS or step < self._not_before:
            return
        with self._monitor.aside("repair"):
            settle(optimizer)
            self._round(step)

    # -- an optimizer that is built anew ---------------------------------------------------------

    def _remember(self, live: Live, actions: Sequence[Repair]) -> None:
        """Remembers what an optimizer that is built anew would not know of."""
        self._in_force += [action for action in actions if action.name in OF_OPTIMIZERS]
        for optimizer in live.optimizers:
            self._known.add(optimizer)
            self._stepped.update(id(p) for g in optimizer.param_groups for p in g["params"])

    def _is_new(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer has just taken over parameters of another."""
        if optimizer in self._known:
            return False
        self._known.add(optimizer)
        return any(id(p) in self._stepped for g in optimizer.param_groups for p in g["params"])

    def _take_over(self, optimizer: torch.optim.Optimizer) -> None:
        if self._in_place is not None:
            why = "the script built its optimizer anew during the trial"
            self._go_on_in_place(self._in_place, why)
        live = replace(live_training(self._monitor), optimizers=[optimizer])
        told = []
        for action in self._in_force:
            with suppress(RepairError):  # what it is about, this optimizer does not step
                self._applied.append(apply(live, [action]))
                told.append(_spelled(action))
        step = self._monitor.step
        message = f"the optimizer was built anew; what was kept goes on: {', '.join(told)}"
        if told and not self._forks.is_child:
            self._log.event(step, "repairs", message, {})
            self._say(f"diagnoser: step {step}: {message}")

    # -- one round -------------------------------------------------------------------------------

    def _round(self, step: int) -> None:
        live = live_training(self._monitor)
        since = min(f.since_step for f in self._findings)
        healthy, first = self._healthy.before(since), self._healthy.first
        live.healthy = healthy.snapshot if healthy is not None else None
        live.start = first.snapshot if first is not None else None
        recording = self._log.recording()
        situation = Situation(
            self._findings,
            recording,
            feature_tables(recording),
            step,
            healthy.step + 1 if healthy is not None else None,
        )
        if not self._tries:
            self._suggest(situation)
            return
        if self._strategy.judge is None:
            self._without_trial(live, situation)
            self._rounds = MOST_ROUNDS
            return
        refusal = self._runner.why_not(live)
        if refusal:
            if self._runner is self._forks:
                self._begin_in_place(live, situation, refusal)
            else:
                self._refuse(refusal)
            return
        decision = self._decide(live, situation)
        if decision is None:
            return  # a child, which goes on with the script
        self._rounds += bool(decision.attempts)
        self._not_before = step + SETTLING
        self._findings = ()
        if decision.problem and decision.problem != self._problem:
            self._problem = decision.problem
            self._log.event(step, "repairs", decision.problem, {})
            self._say(f"diagnoser: step {step}: {decision.problem}")
        for attempt in decision.attempts:
            self._note(attempt)
        if decision.plan is not None:
            self._applied.append(apply(live, decision.plan.actions))
            self._remember(live, decision.plan.actions)
            self._settle(situation)

    def _suggest(self, situation: Situation) -> None:
        """Says, once for each finding, what would be tried first."""
        for plan in self._strategy.plans(situation):
            if plan.source not in self._suggested:
                self._suggested.add(plan.source)
                what = " and ".join(_spelled(action) for action in plan.actions)
                self._say(
                    f"diagnoser: step {situation.step}: --repair apply would try {what} first "
                    f"({plan.derivation})"
                )

    def _decide(self, live: Live, situation: Situation) -> Decision | None:
        trials = round_of_trials(
            situation, self._rules, self._tried, self._runner.guarantee, self._strategy
        )
        try:
            trial = next(trials)
            self._say(f"{self._suspicion(situation)}; trying repairs {self._runner.how}")
            while True:
                ran = self._runner.run(live, trial)
                if ran is None:
                    self._remember(live, trial.actions)
                    return None
                trial = trials.send(ran)
        except StopIteration as stop:
            decision: Decision = stop.value
        self._tried += [attempt.actions for attempt in decision.attempts]
        return decision

    def _without_trial(self, live: Live, situation: Situation) -> None:
        for plan in self._strategy.plans(situation):
            try:
                self._applied.append(apply(live, plan.actions))
            except RepairError:
                continue
            self._remember(live, plan.actions)
            self._note(kept_without_trial(plan, situation))
            return

    def _note(self, attempt: Attempt) -> None:
        self._log.event(attempt.step, "repair", attempt.reason, attempt_data(attempt))
        what = " and ".join(map(_spelled, attempt.actions))
        came = "kept" if attempt.kept else "not kept"
        self._say(f"diagnoser: step {attempt.step}: {came}: {what}: {attempt.reason}")

    @staticmethod
    def _suspicion(situation: Situation) -> str:
        first = situation.findings[0]
        where = wording.subject(first.component, first.other)
        return f"diagnoser: step {situation.step}: {first.fault} in {where}"

    def _refuse(self, why: str) -> None:
        if why != self._problem:
            self._problem = why
            self._log.event(self._monitor.step, "repairs", f"no repair is tried: {why}", {})
            self._say(f"diagnoser: no repair is tried: {why}")
        self._rounds = MOST_ROUNDS

    def _begin_in_place(self, live: Live, situation: Situation, why: str) -> None:
        """Begins a trial in the training itself, of the first plan that is left."""
        left = not_tried(self._strategy.plans(situation), self._tried)
        if not left or len(self._tried) >= MOST_IN_PLACE:
            self._not_before = situation.step + SETTLING
            return
        plan = left[0]
        self._tried.append(plan.actions)
        self._remember(live, ())
        live.others = [*live.others, *schedules_of(live.optimizers)]
        latent = any(f.fault in LATENT for f in situation.findings if f.source == plan.source)
        self._in_place = InPlace(
            self._monitor, self._log, self._rules, live, situation, plan, why,
            self._directory / "snapshots", latent=latent,
        )  # fmt: skip
        what = " and ".join(map(_spelled, plan.actions))
        self._say(
            f"{self._suspicion(situation)}; trying {what} in the training itself, because {why}"
        )

    def _go_on_in_place(self, trial: InPlace, why: str = "") -> None:
        """Goes on with a trial, or ends it before its time because of ``why``."""
        try:
            attempt = trial.stop(why) if why else trial.step_made()
        except DiagnoserError as error:
            self._in_place, attempt = None, None
            self._log.event(self._monitor.step, "repairs", str(error), {})
            self._say(f"diagnoser: step {self._monitor.step}: not tried: {error}")
        if attempt is None:
            self._in_place = None if why else self._in_place
            return
        self._in_place = None
        self._note(attempt)
        if attempt.kept and trial.applied is not None:
            self._applied.append(trial.applied)
            self._remember(live_training(self._monitor), trial.plan.actions)
            self._settle(trial.situation)
        self._not_before = self._monitor.step + SETTLING

    def finish(self) -> None:
        """Is called when the training has ended: a trial that still goes on is taken back."""
        if self._in_place is not None:
            self._go_on_in_place(self._in_place, "the training ended during the trial")

    def _settle(self, situation: Situation) -> None:
        """Remembers what was there when a repair was kept."""
        self._repaired = self._monitor.step + 1
        self._at_repair = {(f.source, f.component): _observed(f) for f in situation.findings}
        self._findings = ()
        self._healthy.forget()


def _spelled(action: Repair) -> str:
    numbers = ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in action.parameters.items()
    )
    return f"{action.name} in {action.component}{f' ({numbers})' if numbers else ''}"


def _observed(finding: Finding) -> tuple[float, ...]:
    return tuple(evidence.observed for evidence in finding.evidence)


def _recently(recording: Recording) -> int:
    """Returns the step of the third last measurement: curvature is not in every one."""
    steps = sorted({int(step) for step in recording.measured.step})
    return steps[-RECENT] if len(steps) >= RECENT else 0
