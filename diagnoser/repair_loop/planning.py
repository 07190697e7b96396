"""From findings to plans: which actions are tried, in which order, with which numbers.

A rule ranks the repairs of its findings by name. Here they become *plans*: an action with the
numbers that the measurements ask for, or a few that belong together, because a lower rate does not
bring back weights that a higher one has saturated. Every number comes with its derivation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from diagnoser.repair import ACTIONS
from diagnoser.runlog import Recording
from diagnoser.table import Scope, Table
from diagnoser.types import Finding, Repair
from diagnoser.vocabulary import MODEL

MOST_PLANS: Final = 6  # of one round of trials
FIRST_TURN: Final = 2  # of these are for the first finding, before all others have a turn
EARLY: Final = 20  # steps that are little to make again
LARGE: Final = 3.0  # times the median matrix: weights that were drawn too large
# What goes before a learning rate is lowered: weights that it has carried away.
_FIRST: Final = ("roll_back", "reinitialize", "temper_attention", "reset_optimizer_state")
_UPDATE: Final = 0.003  # share of its weights that a healthy step changes, about (Karpathy, cs231n)
_SCALE_HIGH: Final = 1.3  # times the usual scale of scores: what is worth undoing exactly
_LOGIT: Final = 8.0  # largest attention logit that leaves a softmax something to learn
_LEAST: Final = 1e-3  # factor of a learning rate
_MOST: Final = 1000.0
_WIDER: Final = 3.0  # the same plan once more with this much less, or more
_STRONGER: Final = 0.1
_SMALLER: Final = 0.1
_TO_THE_START: Final = Repair("roll_back", MODEL, {"to": "start"})
_ALIKE: Final = 1.5  # times: numbers that are less apart make the same action
_OF_THE_PROGRAM: Final = ("dead_component", "program_defect")  # no smaller step mends these
_OF_CAUSE: Final[Mapping[str, tuple[str, ...]]] = {
    "learning_rate_too_high": ("scale_learning_rate",),
    "learning_rate_too_low": ("scale_learning_rate",),
    "missing_warmup": ("add_warmup",),
    "optimizer_misconfigured": ("change_betas",),
    "initialization": ("reinitialize",),
    "perturbed_parameters": ("roll_back", "reinitialize"),
    "attention_scale": ("temper_attention",),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Actions that are tried together; ``source`` is the finding's that asks for them.

    ``spare``: kept only where no other plan is worth it. In a trial of some steps other learning
    rates than are needed win too easily (the short-horizon bias of Wu et al. 2018, 1803.02021).
    """

    actions: tuple[Repair, ...]
    derivation: str
    source: str
    component: str
    spare: bool = False

    @property
    def key(self) -> tuple[tuple[str, str, tuple[tuple[str, object], ...]], ...]:
        """What makes two plans the same."""
        return tuple(
            (a.name, a.component, tuple(sorted(a.parameters.items()))) for a in self.actions
        )

    @property
    def redraws(self) -> bool:
        """Whether weights have to be learned again, which takes more steps."""
        return any(a.name in ("reinitialize", "roll_back") for a in self.actions)

    @property
    def is_local(self) -> bool:
        """Whether it leaves the learning rate of the whole model alone."""
        rates = ("scale_learning_rate", "add_warmup")
        return not any(a.name in rates and a.component == MODEL for a in self.actions)


def are_alike(one: Sequence[Repair], other: Sequence[Repair]) -> bool:
    """Whether two plans' actions are the same, but for numbers that a later step derives anew.

    >>> def times(x): return [Repair("scale_learning_rate", "model", {"factor": x})]
    >>> are_alike(times(0.09), times(0.1)), are_alike(times(0.1), times(0.3))
    (True, False)
    """
    return len(one) == len(other) and all(map(_is_alike, one, other))


def _is_alike(one: Repair, other: Repair) -> bool:
    names = one.parameters.keys()
    if (one.name, one.component, names) != (other.name, other.component, other.parameters.keys()):
        return False
    return all(_is_near(one.parameters[name], other.parameters[name]) for name in names)


def _is_near(one: float | str, other: float | str) -> bool:
    if isinstance(one, str) or isinstance(other, str) or min(one, other) <= 0:
        return one == other
    return max(one, other) < _ALIKE * min(one, other)


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known when plans are made.

    Attributes:
        findings: All that are acted on, the gravest and best explained first.
        recording: The run so far.
        tables: Its feature tables.
        step: The step that was just made.
        healthy_step: Of the last state from before the first finding; None: none was kept.
    """

    findings: Sequence[Finding]
    recording: Recording
    tables: Mapping[Scope, Table]
    step: int
    healthy_step: int | None

    def observed(self, feature: str, component: str) -> float:
        """Returns the last known value of a feature of a component, or of the run; else NaN."""
        for table in self.tables.values():
            if table.scope == "pair" or feature not in table.columns:
                continue
            wanted = MODEL if table.scope == "run" else component
            names = [name for name, _ in table.subjects]
            rows = [i for i, name in enumerate(names) if _is_in(name, wanted)]
            if not rows or not len(table.steps):
                return math.nan
            values = table.columns[feature].value
            values = values[[r for r in rows if r < len(values)]]
            known = values[:, -3:][np.isfinite(values[:, -3:])]
            return float(known.max()) if len(known) else math.nan
        return math.nan


def plans(situation: Situation) -> tuple[Plan, ...]:
    """Returns what is to be tried, the most promising first.

    Findings of one rule on several components are mended together. Of each rule the plans come in
    its own order, combinations before their parts; rules take turns, so that a wrong first finding
    does not use up all trials. What no running training can be given is left out: see
    `instructions`.
    """
    by_rule: dict[str, list[Finding]] = {}
    for finding in situation.findings:
        by_rule.setdefault(finding.source, []).append(finding)
    queues = [list(_of_rule(findings, situation)) for findings in by_rule.values()]
    if not queues:
        return ()
    first, *others = queues
    likely, rest = first[:FIRST_TURN], first[FIRST_TURN:]
    first_finding = next(iter(by_rule.values()))[0]
    large = _drawn_too_large(first_finding, situation)
    program = first_finding.fault in _OF_THE_PROGRAM
    general = [] if program else [_in_general(first_finding, situation)]
    is_early = situation.step < EARLY and (
        is_of_the_start(first_finding) or first_finding.source.startswith("check:")
    )
    anew = _from_the_start(likely[:1], situation) if is_early else []
    found = {plan.key: plan for plan in (*anew, *likely, *large)}
    for place in range(max(map(len, queues))):
        for queue in (*others, general, rest):
            if place < len(queue):
                found.setdefault(queue[place].key, queue[place])
    return tuple(found.values())


def instructions(findings: Iterable[Finding]) -> tuple[tuple[Finding, Repair], ...]:
    """Returns the repairs that need the program changed and the training started again."""
    return tuple(
        (finding, repair)
        for finding in findings
        for repair in finding.repairs
        if repair.name not in ACTIONS
    )


def _of_rule(findings: Sequence[Finding], situation: Situation) -> Iterator[Plan]:
    """Yields the plans for what one rule found, on all components that it found it in."""
    first = findings[0]

    def plan(*steps: Iterable[tuple[Repair, str]], spare: bool = False) -> Plan:
        made = [pair for step in steps for pair in step]
        why = "; ".join(dict.fromkeys(why for _, why in made))
        place = first.component if len(findings) == 1 else MODEL
        return Plan(tuple(action for action, _ in made), why, first.source, place, spare)

    def everywhere(repair: Repair) -> list[tuple[Repair, str]]:
        """The repair in each of the components that are concerned."""
        local = repair.component == first.component
        places = [f.component for f in findings] if local else [repair.component]
        return [
            with_numbers(Repair(repair.name, place, repair.parameters), situation)
            for place in dict.fromkeys(places)
            if not any(place != other and _is_in(place, other) for other in places)
        ]

    def scaled(rate: Repair, times: float = 1.0) -> list[tuple[Repair, str]]:
        local = rate.component == first.component
        places = [f.component for f in findings] if local else [rate.component]
        return [_rate(rate, place, times, situation) for place in dict.fromkeys(places)]

    of_rule = [r for r in first.repairs if r.name in ACTIONS]
    by_cause = [r for r in _by_cause(first) if r.name not in {other.name for other in of_rule}]
    listed = of_rule + by_cause
    if situation.healthy_step is None:
        listed = [r for r in listed if r.name != "roll_back"]
    names = {repair.name for repair in listed}
    rate = next((r for r in listed if r.name == "scale_learning_rate"), None)
    if rate is not None:
        before = [n for n in _FIRST if n in names]
        if situation.healthy_step is not None and "roll_back" not in before:
            before.insert(0, "roll_back")
        lowers = float(scaled(rate)[0][0].parameters["factor"]) < 1.0
        before = before if lowers else []
        instead = bool(of_rule) and rate in by_cause and not lowers
        for repair in of_rule if instead else ():  # it undoes what the rule has measured
            yield plan(everywhere(repair))
        # Steps that were too long from the first one on leave no healthy state but that before it.
        to = {"roll_back": {"to": "start"}} if rate.component == MODEL else {}
        for name in before:
            yield plan(everywhere(Repair(name, rate.component, to.get(name, {}))), scaled(rate))
        yield plan(scaled(rate), spare=instead)
        others = (_WIDER, 1.0 / _WIDER) if before else (_WIDER, _WIDER**2, 1.0 / _WIDER)
        for times in others if not _is_counted(rate.component, situation) else ():
            spare = instead or (lowers and times < 1.0)
            if before:
                first_of_all = Repair(before[0], rate.component, to.get(before[0], {}))
                yield plan(everywhere(first_of_all), scaled(rate, times), spare=spare)
            else:
                yield plan(scaled(rate, times), spare=spare)
    for repair in listed:
        if repair.name == "temper_attention":
            # Averages of the old gradients would hold back for long what got smaller ones.
            forgotten = with_numbers(Repair("reset_optimizer_state", MODEL), situation)
            yield plan(everywhere(repair), [forgotten])
        if repair.name != "scale_learning_rate":
            yield plan(everywhere(repair))
    known = math.isfinite(situation.observed("attention_scale", first.component))
    if "temper_attention" in names and not known:
        derived = everywhere(Repair("temper_attention", first.component))
        stronger = [
            (Repair(action.name, action.component, {"factor": _STRONGER}), "a tenth of its logits")
            for action, _ in derived
        ]
        if [action for action, _ in stronger] != [action for action, _ in derived]:
            yield plan(stronger)


def _by_cause(finding: Finding) -> Iterator[Repair]:
    """Yields what mends a finding's causes where its rule does not say."""
    for cause in finding.causes:
        for name in _OF_CAUSE.get(cause.cause, ()):
            parameters = {"factor": 10.0} if cause.cause == "learning_rate_too_low" else {}
            yield Repair(name, finding.component, parameters)


def _drawn_too_large(finding: Finding, situation: Situation) -> list[Plan]:
    """Returns the plan to draw anew what started far larger than the rest, wherever it shows."""
    table = situation.tables.get("component")
    if table is None or "initial_weight_scale_to_median" not in table.columns:
        return []
    values = table.columns["initial_weight_scale_to_median"].value
    names = [
        name
        for (name, _), row in zip(table.subjects, values, strict=True)
        if np.isfinite(row).any() and row[np.isfinite(row)][-1] > LARGE
    ]
    if not names:
        return []
    why = f"they started more than {LARGE:g} times as large as the median matrix"
    actions = tuple(Repair("reinitialize", name) for name in names)
    return [Plan(actions, why, finding.source, names[0] if len(names) == 1 else MODEL)]


def _in_general(finding: Finding, situation: Situation) -> Plan:
    """Returns what helps against much that goes wrong: an earlier state, and smaller steps."""
    smaller = Repair("scale_learning_rate", MODEL, {"factor": _SMALLER})
    rate, why = _rate(smaller, MODEL, 1.0, situation)
    return Plan(
        (_TO_THE_START, rate),
        f"whatever the cause, from the start with smaller steps: {why}",
        finding.source,
        MODEL,
    )


def _from_the_start(likely: Iterable[Plan], situation: Situation) -> list[Plan]:
    """Returns plans with all that was learned so far undone before them."""
    why = f"so it was from the first step, and {situation.step + 1} steps are little to make again"
    return [
        replace(
            plan,
            actions=(_TO_THE_START, *plan.actions),
            derivation=f"{plan.derivation}; {why}",
        )
        for plan in likely
        if all(action.name != "roll_back" for action in plan.actions)
    ]


def is_of_the_start(finding: Finding) -> bool:
    """Whether all that speaks for a finding was measured at the start of the run."""
    names = [evidence.feature for evidence in finding.evidence]
    return bool(names) and all(name.startswith("initial_") for name in names)


def with_numbers(repair: Repair, situation: Situation) -> tuple[Repair, str]:
    """Returns an action with its numbers, and where they come from."""
    make = _NUMBERS.get(repair.name)
    if repair.parameters.get("to") == "start":
        return repair, "steps that are too long leave no healthy state but the first"
    if make is None or repair.parameters:
        why = _PLAIN.get(repair.name, "as the rule says")
        return repair, why.format(step=situation.healthy_step)
    parameters, why = make(repair.component, situation)
    return Repair(repair.name, repair.component, parameters), why


def _rate(rate: Repair, component: str, times: float, situation: Situation) -> tuple[Repair, str]:
    """Returns a change of the learning rate by a derived factor, and where that comes from."""
    listed = float(rate.parameters.get("factor", 0.3))
    factor, why = _derived(component, listed, situation)
    if not math.isfinite(factor) or (factor < 1.0) != (listed < 1.0):
        factor, why = listed, "the rule's own factor"
    if times != 1.0:
        why = f"{times:.2g} times that factor ({why})"
    factor = _rounded(min(max(factor * times, _LEAST), _MOST))
    return Repair("scale_learning_rate", component, {"factor": factor}), why


def _is_counted(component: str, situation: Situation) -> bool:
    """Whether the factor is no estimate: its parameters are stepped twice or more often."""
    return situation.observed("times_optimized", component) > 1.5  # noqa: PLR2004


def _derived(component: str, listed: float, situation: Situation) -> tuple[float, str]:
    observed = situation.observed
    if _is_counted(component, situation):
        times = observed("times_optimized", component)
        return 1.0 / times, f"its parameters are in {times:.0f} places of optimizers"
    if component != MODEL:
        rate = observed("learning_rate_to_quartile", component)
        if rate > _WIDER:
            return 1.0 / rate, f"its learning rate is {rate:.3g} times that of other components"
        update = observed("update_ratio_to_median", component)
        if update > _WIDER:
            return 1.0 / update, f"a step changes it {update:.3g} times as much as the median one"
    elif listed < 1.0:
        overshoot = observed("overshoot", MODEL)
        if overshoot > 1.0:
            return (
                0.5 / overshoot,
                f"curvature takes back {overshoot:.3g} times what the gradient gains along a step; "
                "0.5 is where the quadratic model gains most",
            )
    update = observed("median_update_ratio", MODEL)
    if component == MODEL and update > 0:
        share = _UPDATE / update
        return share, f"a step changes {update:.2g} of the weights; {_UPDATE:g} is usual"
    return listed, "the rule's own factor"


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")


_Numbers = tuple[dict[str, float | str], str]


def _temper(component: str, situation: Situation) -> _Numbers:
    scale = situation.observed("attention_scale", component)
    if scale > _SCALE_HIGH or scale < 1 / _SCALE_HIGH:
        why = f"its scores are {scale:.3g} times as large as the width of its queries asks for"
        return {"factor": _rounded(1.0 / scale)}, why
    logit = situation.observed("attention_logit", component)
    if logit > 1.2 * _LOGIT:
        factor = _rounded(max(_LOGIT / logit, _LEAST))
        return {"factor": factor}, f"its largest logit is {logit:.3g}; {_LOGIT:g} is ample"
    return {"factor": 0.3}, "a third of its logits"


def _clip(component: str, situation: Situation) -> _Numbers:
    rows = situation.recording.measurements
    named = np.array(
        [component == MODEL or _is_in(name, component) for name in rows.components], dtype=bool
    )
    chosen = rows.quantity == _code(rows.quantities, "gradient_norm")
    chosen &= named[rows.component] if len(named) else False
    squares: dict[int, float] = {}
    for step, value in zip(rows.step[chosen], rows.value[chosen], strict=True):
        squares[int(step)] = squares.get(int(step), 0.0) + float(value) ** 2
    norms = [math.sqrt(square) for square in squares.values() if math.isfinite(square)]
    usual = float(np.median(norms)) if norms else 1.0
    return {"norm": _rounded(max(usual, 1e-6))}, "the median gradient norm so far"


def _is_in(name: str, component: str) -> bool:
    return name == component or name.startswith((f"{component}.", f"{component}["))


def _code(names: Sequence[str], name: str) -> int:
    return names.index(name) if name in names else -2


def _warmup(_: str, situation: Situation) -> _Numbers:
    steps = max(20, min(situation.step + 1, 200))
    return {"steps": steps}, "as many steps as were made so far, 20 to 200"


def _betas(component: str, situation: Situation) -> _Numbers:
    if situation.observed("adaptive_step", component) > 1.5:
        return {"beta2": 0.999}, "steps exceed the learning rate: the second average is too short"
    return {"beta2": 0.95}, "a second average that follows gradients within 20 steps"


_NUMBERS: Final[Mapping[str, Callable[[str, Situation], _Numbers]]] = {
    "temper_attention": _temper,
    "clip_gradient": _clip,
    "add_warmup": _warmup,
    "change_betas": _betas,
}
_PLAIN: Final[Mapping[str, str]] = {
    "roll_back": "the last state from before the finding is that of step {step}",
    "reinitialize": "its weights may be beyond what a lower rate brings back",
    "reset_optimizer_state": "averages are those of the faulty steps",
    "register_parameters": "it has a gradient and no optimizer",
    "unfreeze": "others of its kind are trained",
}
