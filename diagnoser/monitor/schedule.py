"""When to measure what: a guaranteed skeleton, and beyond it only what the budget pays for.

The run's length is not known in advance, so the guaranteed measurements lie densely at the start
and thin out. A *sample* takes two neighbouring steps (see `sample`). More are bought from the
budget, in two stages. Until something seems wrong they hold statistics alone and take at most half
of it: on models that nothing was learned from, curvature made diagnoses no better than the rest did
(``docs/ablation.md``). After an alarm, what was saved pays for curvature, spectrum and interaction
in turn. A trigger (see `triggers`) is an alarm, and brings a sample forward: it is taken at once,
on credit, and later ones wait until it is paid for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

GUARANTEED_STATISTICS = (0, 2, 5, 10, 20, 35, 50, 75, 100, 125, 150, 175, 198)
GUARANTEED_CHECKS = (0, 20)
GUARANTEED_CURVATURE = (0, 5, 10, 20, 50, 75, 125, 175)
SMALL_STEP_S = 0.030  # below this a step is small, and the budget is a fixed time a step
SMALL_STEP_BUDGET_S = 100e-6
MINIMUM_GAP = 5  # steps between two samples that the budget pays for
MOST_TRIGGERED = 8  # samples of a run
TRIGGER_GAP = 10  # steps between two of them
LATER = 0.25  # of the steps so far, between two samples that ranks agree on
STEPS_IN_ADVANCE = 400  # whose allowance triggered samples may spend before it is earned
CHECKS_GAP = 50  # steps between two checks, and half of the steps so far
CHECKS_BUDGET = 0.03  # of training time, for checks beyond the first
SMALL_STEP_CHECKS_S = 150e-6  # a step
FIRST_STAGE = 0.5  # of the budget, before the first alarm
TURNS = ("sample", "spectrum", "sample", "interaction")  # after it
FIRST_GUESS = {"statistics": 2.0, "sample": 4.0, "spectrum": 40.0, "interaction": 30.0}  # steps
STATISTICS_ALONE = "statistics"  # a forced sample without curvature
EVERYTHING = ("spectrum", "interaction", "norms")  # beside what every sample measures


@dataclass(frozen=True, slots=True)
class Plan:
    """What one step measures.

    ``guaranteed``: whatever the budget says. ``triggered``: at once, paid for afterwards.
    """

    statistics: bool = False
    follow: bool = False  # the step after one with statistics
    curvature: bool = False
    spectrum: bool = False
    interaction: bool = False
    norms: bool = False  # of the coupling of all pairs; only where it is forced
    guaranteed: bool = False
    triggered: bool = False

    def __bool__(self) -> bool:
        return self.statistics or self.follow

    @property
    def turn(self) -> str:
        """What its sample is called, by the dearest that it holds."""
        if not self.curvature:
            return "statistics"
        return "spectrum" if self.spectrum else "interaction" if self.interaction else "sample"


@dataclass(slots=True)
class Schedule:
    """Decides every step's `Plan` and keeps the account.

    ``overhead`` is the share of training time that measuring may take; guaranteed measurements are
    made even beyond it. At steps shorter than 30 ms a sample costs several steps whatever is done,
    so there the guaranteed ones are kept apart and the budget is at most 100 microseconds a step.
    ``every`` forces a full sample every that many steps instead of the budget; ``at`` forces
    samples at its steps, each with the turns it names beside them, whatever they cost. ``alarmed``
    is set from outside or by a trigger, and stays.

    ``agreed`` lets step numbers alone decide, as ranks that must measure at the same steps need it:
    beyond the guaranteed samples each comes a quarter later than the one before, every other with
    curvature, and neither the budget nor what a rank sees has a say.

    Triggered samples have an account of their own. It may never exceed what the budget allows for
    all steps so far and the next `STEPS_IN_ADVANCE`, so that they are there early in a run, when
    the guaranteed measurements have used everything up; and it is taken off what other samples may
    spend, so that over a run the budget stays what it is.
    """

    overhead: float = 0.10
    every: int | None = None
    at: Mapping[int, Collection[str]] = field(default_factory=dict)
    alarmed: bool = False
    agreed: bool = False
    training_s: float = 0.0
    guaranteed_s: float = 0.0
    bought_s: float = 0.0
    triggered_s: float = 0.0
    steps: int = 0
    curvature_measurements: int = 0
    checks_s: float = 0.0
    _last_check: int = 0
    _costs: dict[str, float] = field(default_factory=dict)
    _turn: int = 0
    _last_sample: int = -1
    _pending: Plan | None = None
    _asked: bool = False
    _triggered: int = 0
    _last_triggered: int = -TRIGGER_GAP  # step of the last one taken, or asked for

    def plan(self, step: int) -> Plan:
        """Returns what to measure at ``step``; called once a step, in order."""
        if self._pending is not None:  # the second step of a sample
            plan, self._pending = self._pending, None
            return plan
        if self.forced:
            turns = self._forced_at(step)
            if turns is None:
                return Plan()
            return self._sample(
                step,
                Plan(
                    follow=True,
                    curvature=STATISTICS_ALONE not in turns,
                    spectrum="spectrum" in turns,
                    interaction="interaction" in turns,
                    norms="norms" in turns,
                    guaranteed=True,
                ),
            )
        if step in GUARANTEED_STATISTICS:
            curvature = step in GUARANTEED_CURVATURE or self._asked
            return self._sample(step, Plan(follow=True, curvature=curvature, guaranteed=True))
        if self.agreed:
            return self._agreed_at(step)
        if self._asked:
            return self._sample(step, Plan(follow=True, curvature=True, triggered=True))
        if step < 5 or step - self._last_sample < MINIMUM_GAP:
            return Plan()
        if step + 1 in GUARANTEED_STATISTICS:  # its second step would take the place of that one
            return Plan()
        turn = TURNS[self._turn % len(TURNS)] if self.alarmed else "statistics"
        # Where a script has stopped the clock nothing is earned, and nothing seems to cost.
        if not self.training_s or self.credit < self.expected_cost(turn):
            return Plan()
        self._turn += self.alarmed
        return self._sample(
            step,
            Plan(
                follow=True,
                curvature=self.alarmed,
                spectrum=turn == "spectrum",
                interaction=turn == "interaction",
            ),  # fmt: skip
        )

    def _agreed_at(self, step: int) -> Plan:
        gap = max(round(LATER * self._last_sample), MINIMUM_GAP)
        if step < GUARANTEED_STATISTICS[-1] or step - self._last_sample < gap:
            return Plan()
        self._turn += 1
        curvature = self._turn % 2 == 0
        return self._sample(step, Plan(follow=True, curvature=curvature, guaranteed=True))

    def measure_at(self, steps: Iterable[int]) -> None:
        """From now on forces samples at these steps alone: statistics, the last with curvature."""
        *earlier, last = steps
        self.every = None
        self.at = {**dict.fromkeys(earlier, (STATISTICS_ALONE,)), last: ()}

    def continued(self) -> Schedule:
        """Returns the schedule of a continuation, which knows costs and owes no measurement."""
        return replace(self, _costs=dict(self._costs), _pending=None, _asked=False)

    def _forced_at(self, step: int) -> Collection[str] | None:
        if self.every is None:
            return self.at.get(step)
        return None if step % self.every else EVERYTHING

    def ask(self, step: int) -> bool:
        """Raises an alarm at ``step`` and asks for a sample at once; returns whether it is granted.

        It is not where every measurement is forced or there is no budget, within `TRIGGER_GAP`
        steps of the last one granted, after `MOST_TRIGGERED` of them, and beyond their account.
        """
        self.alarmed = True
        if (
            self.forced
            or self.agreed
            or self._triggered >= MOST_TRIGGERED
            or step + 1 - self._last_triggered < TRIGGER_GAP
            or self.triggered_s + self.expected_cost("sample")
            > self._allowance * (self.steps + STEPS_IN_ADVANCE)
        ):
            return False
        self._asked = True
        self._triggered += 1
        self._last_triggered = step
        return True

    def wants_checks(self, step: int) -> bool:
        """Returns whether a step is to be checked; asked before its forward, once a step."""
        wanted = step in GUARANTEED_CHECKS
        if not wanted and not self.agreed and step - self._last_check >= max(CHECKS_GAP, step // 2):
            small = self.step_s < SMALL_STEP_S
            allowance = SMALL_STEP_CHECKS_S if small else CHECKS_BUDGET * self.step_s
            wanted = self.checks_s + self._costs.get("checks", 0.0) <= allowance * self.steps
        if wanted:
            self._last_check = step
        return wanted

    def account_checks(self, seconds: float) -> None:
        """Books what a checked step took; checks have an account of their own."""
        self.checks_s += seconds
        self._costs["checks"] = seconds

    def _sample(self, step: int, second: Plan) -> Plan:
        if self._asked:
            self._asked, self._last_triggered = False, step
        self._pending, self._last_sample = second, step
        return replace(second, statistics=True, follow=False)

    @property
    def forced(self) -> bool:
        """Whether full samples are taken at given steps instead of what the budget allows."""
        return self.every is not None or bool(self.at)

    @property
    def step_s(self) -> float:
        """Seconds of training that a step has taken on average."""
        return self.training_s / max(self.steps, 1)

    @property
    def _allowance(self) -> float:
        """Seconds of measuring that a step brings."""
        allowance = self.overhead * self.step_s
        return min(allowance, SMALL_STEP_BUDGET_S) if self.step_s < SMALL_STEP_S else allowance

    @property
    def credit(self) -> float:
        """Seconds that may be spent on bought measurements now."""
        share = 1.0 if self.alarmed else FIRST_STAGE
        earned = share * self._allowance * self.steps - self.bought_s - self.triggered_s
        return earned if self.step_s < SMALL_STEP_S else earned - self.guaranteed_s

    def expected_cost(self, turn: str) -> float:
        """Seconds the next turn is expected to take: the last one's, else a multiple of a step."""
        return self._costs.get(turn, FIRST_GUESS[turn] * self.step_s)

    def account(self, plan: Plan, seconds: float) -> None:
        """Books ``seconds`` of monitoring; ``plan`` is the second step's where there are two."""
        if plan.guaranteed:
            self.guaranteed_s += seconds
        elif plan.triggered:
            self.triggered_s += seconds
        else:
            self.bought_s += seconds

    def learn(self, plan: Plan, seconds: float) -> None:
        """Remembers what a whole sample of this kind took."""
        self.curvature_measurements += plan.curvature
        self._costs[plan.turn] = seconds
