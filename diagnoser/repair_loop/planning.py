"""From findings to plans: which actions are tried, in which order, with which numbers.

A rule ranks the repairs of its findings by name. Here they become *plans*: an action with the
numbers that the measurements ask for, or a few that belong together, because a lower rate does not
bring back weights that a higher one has saturated. Every number comes with its derivation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from diagnoser.diagnosis import is_grave
from diagnoser.repair import ACTIONS
from diagnoser.runlog import Recording
from diagnoser.table import Scope, Table
from diagnoser.types import Finding, Repair
from diagnoser.vocabulary import MODEL

MOST_PLANS: Final = 6  # of one round of trials
# What goes before a learning rate is lowered: weights that it has carried away.
_FIRST: Final = ("roll_back", "reinitialize", "temper_attention", "reset_optimizer_state")
_UPDATE: Final = 0.003  # share of its weights that a healthy step changes, about (Karpathy, cs231n)
_LOGIT: Final = 8.0  # largest attention logit that leaves a softmax something to learn
_LEAST: Final = 1e-3  # factor of a learning rate
_MOST: Final = 100.0
_WIDER: Final = 3.0  # the same plan once more with this much less, or more
_STRONGER: Final = 0.1


@dataclass(frozen=True, slots=True)
class Plan:
    """Actions that are tried together; ``source`` is the finding's that asks for them."""

    actions: tuple[Repair, ...]
    derivation: str
    source: str
    component: str

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


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known when plans are made.

    Attributes:
        findings: All of severity medium or more that hold, the gravest and best explained first.
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

    The repairs of the first finding come first, combinations before their parts; those of later
    findings follow. What no running training can be given is left out: see `instructions`.
    """
    found: dict[object, Plan] = {}
    queues = [list(_of_finding(f, situation)) for f in situation.findings if is_grave(f.severity)]
    for place in range(max(map(len, queues), default=0)):
        for queue in queues:  # in turns, so that a wrong first finding does not use up all trials
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


def _of_finding(finding: Finding, situation: Situation) -> Iterator[Plan]:
    def plan(actions: Sequence[Repair], why: str) -> Plan:
        return Plan(tuple(actions), why, finding.source, finding.component)

    listed = [repair for repair in finding.repairs if repair.name in ACTIONS]
    names = {repair.name for repair in listed}
    place = finding.component
    rates = [r for r in listed if r.name == "scale_learning_rate"]
    if rates:
        where = rates[0].component
        first = [n for n in _FIRST if n in names or n == "roll_back"]
        if situation.healthy_step is None:
            first.remove("roll_back")
        factors = list(_factors(rates[0], situation))
        lowered = factors[0][0] < 1.0
        for factor, why in factors[:1]:
            rate = Repair("scale_learning_rate", where, {"factor": factor})
            if lowered:
                for name in first:
                    before, its = _made(Repair(name, where), situation)
                    yield plan([before, rate], f"{its}; {why}")
            yield plan([rate], why)
        for factor, why in factors[1:]:
            rate = Repair("scale_learning_rate", where, {"factor": factor})
            if lowered and first:
                before, its = _made(Repair(first[0], where), situation)
                yield plan([before, rate], f"{its}; {why}")
            else:
                yield plan([rate], why)
    for repair in listed:
        if repair.name == "scale_learning_rate":
            continue
        if repair.name == "roll_back" and situation.healthy_step is None:
            continue
        yield plan(*_one(repair, situation))
    if "temper_attention" in names:
        yield plan(*_one(Repair("temper_attention", place, {"factor": _STRONGER}), situation))


def _one(repair: Repair, situation: Situation) -> tuple[list[Repair], str]:
    made, why = _made(repair, situation)
    return [made], why


def _made(repair: Repair, situation: Situation) -> tuple[Repair, str]:
    """Returns an action with its numbers, and where they come from."""
    make = _NUMBERS.get(repair.name)
    if make is None or repair.parameters:
        why = _PLAIN.get(repair.name, "as the rule says")
        return repair, why.format(step=situation.healthy_step)
    parameters, why = make(repair.component, situation)
    return Repair(repair.name, repair.component, parameters), why


def _factors(rate: Repair, situation: Situation) -> Iterator[tuple[float, str]]:
    """Yields factors of a learning rate, the best founded first, with their derivations."""
    component = rate.component
    listed = float(rate.parameters.get("factor", 0.3))
    factor, why = _derived(component, listed, situation)
    if (factor < 1.0) != (listed < 1.0) or not math.isfinite(factor):
        factor, why = listed, "the rule's own factor"
    factor = _rounded(min(max(factor, _LEAST), _MOST))
    yield factor, why
    for other in (factor / _WIDER, factor * _WIDER):
        if (other < 1.0) == (listed < 1.0) and _LEAST <= other <= _MOST:
            yield _rounded(other), f"{other / factor:.2g} times that ({why})"


def _derived(component: str, listed: float, situation: Situation) -> tuple[float, str]:
    observed = situation.observed
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
    "reset_optimizer_state": "its averages are those of the faulty steps",
    "register_parameters": "it has a gradient and no optimizer",
    "unfreeze": "others of its kind are trained",
}
