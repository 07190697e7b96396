"""One round of the loop: plans are tried beside the unrepaired training, the best one is kept.

Nothing here trains: `round_of_trials` is a generator that asks for continuations and is given what
they came to, so that the same decisions are made for a script whose process is forked, for a loop
in code that is put back to a snapshot, and in tests for recordings made by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from diagnoser.repair import Live
from diagnoser.repair_loop.comparing import (
    Continuation,
    Judged,
    before,
    continuation,
    judge,
    trial_steps,
)
from diagnoser.repair_loop.planning import MOST_PLANS, Plan, Situation, are_alike, plans
from diagnoser.rules import Rule
from diagnoser.runlog import Recording
from diagnoser.types import Attempt, Finding, Repair

BUDGET: Final = (400, 2)  # steps of a round's trials, and how many more for each step made so far
LONGER: Final = 3  # times as long, where the gain may still come
BEHIND: Final = 0.3  # of the loss, that weights which are learned anew may be behind at first
# What a loss need not show soon: parts of the program, or of the model, that do nothing.
LATENT: Final = ("dead_component", "concave_region")


@dataclass(frozen=True, slots=True)
class Trial:
    """Asks for a continuation of ``steps`` steps; without actions it is the unrepaired twin."""

    actions: tuple[Repair, ...]
    steps: int


@dataclass(frozen=True, slots=True)
class Ran:
    """What a trial came to: the run so far with its steps behind it.

    ``problem`` says why it did not get to its end, ``stopped`` why it was ended before although
    nothing went wrong in it, ``batches`` how many of the training's batches it used up.
    """

    recording: Recording | None
    problem: str = ""
    batches: int = 0
    stopped: str = ""


class Runner(Protocol):
    """Makes the trials of a training: in forks of its process, or by snapshot and replay.

    Attributes:
        guarantee: How continuations are compared, in one sentence.
        how: Where they are made, in a few words.
    """

    guarantee: str
    how: str

    def why_not(self, live: Live) -> str:
        """Prepares for a round; returns why there cannot be one, empty: there can."""

    def run(self, live: Live, trial: Trial) -> Ran | None:
        """Makes a trial and returns what it came to; None: this process has become the trial."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """How plans are found and judged.

    Attributes:
        name: As ``--strategy`` spells it.
        plans: From what is known to what is tried, in order.
        judge: Whether a repaired continuation is kept, given the twin, the source of the finding
            and whether its defect is latent; None: the first plan that can be applied is kept
            without a trial.
        best: The best of all plans is kept; otherwise the first that is worth keeping.
    """

    name: str
    plans: Callable[[Situation], Sequence[Plan]] = plans
    judge: Callable[..., Judged] | None = judge
    best: bool = True


DIAGNOSER: Final = Strategy("diagnoser")


@dataclass(frozen=True, slots=True)
class Decision:
    """What a round came to; ``plan`` is what is kept."""

    attempts: tuple[Attempt, ...]
    plan: Plan | None = None
    problem: str = ""  # why nothing could be compared


Trials = Generator[Trial, Ran, Decision]


def round_of_trials(
    situation: Situation,
    rules: Sequence[Rule],
    tried: Collection[Sequence[Repair]],
    guarantee: str,
    strategy: Strategy = DIAGNOSER,
) -> Trials:
    """Tries the plans of a situation and decides; see the module.

    Args:
        situation: What was found, and what is known.
        rules: What is looked for in every continuation.
        tried: Actions that were tried before, together; none are tried twice.
        guarantee: How continuations are compared here, in one sentence.
        strategy: How plans are found and judged.
    """
    left = not_tried(strategy.plans(situation), tried)
    if not left:
        return Decision((), None, "no repair is left to try")
    steps, why = trial_steps(situation.recording.losses.value)
    affordable = (BUDGET[0] + BUDGET[1] * situation.step) // steps - 1
    left = left[: max(min(MOST_PLANS, affordable), 1)]
    arms = _Arms(situation, rules, strategy, f"{guarantee}; {why}", left)
    yield from arms.run(steps)
    if arms.problem:
        return Decision((), None, arms.problem)
    undecided = arms.undecided if strategy.best else []
    if undecided:
        yield from arms.run(LONGER * steps, undecided)
    return arms.decision()


def not_tried(plans: Iterable[Plan], tried: Collection[Sequence[Repair]]) -> list[Plan]:
    """Returns the plans that are not like anything that was tried before."""
    return [plan for plan in plans if not any(are_alike(plan.actions, done) for done in tried)]


@dataclass(frozen=True, slots=True)
class _Result:
    plan: Plan
    came_to: Continuation
    judged: Judged
    twin: Continuation
    batches: int


class _Arms:
    """The continuations of a round."""

    def __init__(
        self,
        situation: Situation,
        rules: Sequence[Rule],
        strategy: Strategy,
        guarantee: str,
        left: Sequence[Plan],
    ) -> None:
        self._situation, self._rules, self._strategy = situation, rules, strategy
        self._guarantee, self._left = guarantee, left
        self._compared = left  # of these one is kept: those that had equally many steps
        self.results: list[_Result] = []
        self.problem = ""

    @property
    def kept(self) -> list[_Result]:
        """What is worth keeping, the best first.

        What lies within a standard error of the largest gain is as good as that; of these the
        first that was planned comes first (the one-standard-error rule of Breiman et al., CART).
        Spare plans are for where there is nothing else.
        """
        worth = [r for r in self.results if r.judged.keep and r.plan in self._compared]
        worth = [r for r in worth if not r.plan.spare] or worth
        if not worth or not self._strategy.best:
            return worth
        top = min(worth, key=lambda result: _gain(result)[0])
        limit = sum(_gain(top))
        return sorted(
            worth, key=lambda result: (_gain(result)[0] > limit, self._left.index(result.plan))
        )

    @property
    def undecided(self) -> list[Plan]:
        """The plans that a longer trial is to decide between; none where this one has.

        Where nothing is worth keeping yet, of each sort of plans whose gain may come later the one
        that is expected most of. The sorts are those that learn the whole model, or a part of it,
        anew, and those that go on from where the training is. Weights that are learned anew begin
        behind: where they are on their way past what is worth keeping, that has to prove itself
        beside them, and so has a spare plan beside any other that may gain.
        """
        kept = self.kept[0] if self.kept else None
        waiting = [r for r in self.results if not r.judged.keep and self._may_gain(r, kept)]
        waiting.sort(key=lambda result: result.judged.expected)
        first = {
            (r.plan.redraws, r.plan.redraws and r.plan.is_local): r.plan for r in waiting[::-1]
        }
        found = [result.plan for result in waiting if result.plan in first.values()]
        return [kept.plan, *found] if kept and found else found

    @staticmethod
    def _may_gain(result: _Result, kept: _Result | None) -> bool:
        """Whether more steps may make a repair worth keeping, or worth more than what is kept."""
        expected = result.judged.expected
        if kept is None:
            return expected < (BEHIND if result.plan.redraws else 0.0)
        if kept.plan.spare and not result.plan.spare:
            return expected < 0.0
        rivals = result.plan.redraws and not kept.plan.redraws
        return rivals and expected < _gain(kept)[0]

    def run(self, steps: int, left: Sequence[Plan] = ()) -> Generator[Trial, Ran, None]:
        """Makes the twin and the repaired continuations; the results replace earlier ones."""
        self._compared = left or self._left
        unrepaired = yield Trial((), steps)
        twins: dict[str, Continuation] = {}  # by the finding that is looked at
        for plan in self._compared:
            if plan.source not in twins:
                twins[plan.source] = self._read(unrepaired, plan, steps)
            twin = twins[plan.source]
            if twin.problem and len(twin.losses) < steps // 2 and not twin.diverged:
                self.problem = f"the training cannot be continued for a trial: {twin.problem}"
                return
            ran = yield Trial(plan.actions, steps)
            came_to = self._read(ran, plan, steps)
            assert self._strategy.judge is not None
            judged = self._strategy.judge(
                came_to,
                twin,
                plan.source,
                latent=self._is_latent(plan),
                local=plan.is_local,
                fact=plan.source.startswith("check:") and plan.is_local,
            )
            self.results = [r for r in self.results if r.plan is not plan]
            self.results.append(_Result(plan, came_to, judged, twin, ran.batches))
            if judged.keep and not self._strategy.best:
                return

    def _read(self, ran: Ran, plan: Plan, steps: int) -> Continuation:
        first = self._situation.step + 1
        findings = self._about(plan)
        if ran.recording is None:
            nothing = self._situation.recording
            return continuation(nothing, first, self._rules, findings, ran.problem or "it failed")
        made = int((ran.recording.losses.step >= first).sum())
        # Half of the steps are enough to compare: a checkpoint behind them spoils nothing.
        problem = ran.problem or (ran.stopped if made < steps // 2 else "")
        return continuation(ran.recording, first, self._rules, findings, problem)

    def _is_latent(self, plan: Plan) -> bool:
        return any(f.fault in LATENT for f in self._situation.findings if f.source == plan.source)

    def _about(self, plan: Plan) -> list[Finding]:
        """Returns all findings, those that a plan is for first."""
        return sorted(self._situation.findings, key=lambda f: f.source != plan.source)

    def decision(self) -> Decision:
        """Says what is kept, and writes every attempt down."""
        best = self.kept[0] if self.kept else None
        attempts = []
        for result in self.results:
            kept = result is best
            reason = result.judged.reason
            if result.judged.keep and not kept and best is not None:
                reason = f"{reason}; {_named(best.plan)} did better"
            plan = result.plan
            attempts.append(
                Attempt(
                    step=self._situation.step,
                    source=plan.source,
                    component=plan.component,
                    actions=plan.actions,
                    derivation=plan.derivation,
                    guarantee=self._guarantee,
                    kept=kept,
                    reason=reason,
                    before=before(
                        self._situation.recording,
                        self._about(plan),
                        result.twin.arm.steps,
                    ),
                    after=result.came_to.arm,
                    twin=result.twin.arm,
                    difference=result.judged.difference,
                    batches=result.batches,
                )
            )
        return Decision(tuple(attempts), best.plan if best is not None else None)


def _named(plan: Plan) -> str:
    return " and ".join(action.name for action in plan.actions)


def _gain(result: _Result) -> tuple[float, float]:
    """Returns the difference that a repair made, and its standard error."""
    found = result.judged.difference
    if found is None or not math.isfinite(found.value):
        return 0.0, 0.0
    return found.value, found.std_error or 0.0


def kept_without_trial(plan: Plan, situation: Situation) -> Attempt:
    """Returns what is written down of a plan that a strategy keeps without looking."""
    return Attempt(
        step=situation.step,
        source=plan.source,
        component=plan.component,
        actions=plan.actions,
        derivation=plan.derivation,
        guarantee="none: it was not compared with anything",
        kept=True,
        reason="the strategy keeps it without a trial",
        before=before(situation.recording, situation.findings, 2),
    )
