"""Evaluates rules on feature tables: what fires, what could not be judged, what is fine.

For each subject (component, pair, run) a rule is, step by step, *inactive*, *pending* (true, but
not yet often enough), *firing*, or *unknown*. Unknown steps neither advance nor reset a pending
run: a step at which nothing was measured says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.rules.expression import (
    Expression,
    HealthyEnd,
    evaluate_expression,
    observations,
)
from diagnoser.rules.interval import FALSE, TRUE, UNKNOWN, Trilean
from diagnoser.rules.ranges import Ranges
from diagnoser.rules.rule import Rule
from diagnoser.rules.view import Tables, View, until
from diagnoser.table import Scope
from diagnoser.types import Cause, Checked, Evidence, Finding, Repair, Unknown
from diagnoser.vocabulary import MODEL

_MEASURED_OF: Final = {"run": "step", "component": "component", "pair": "pair of components"}
_KINDS_NAMED: Final = 2  # in a reason; more would fill the page

Forced = Mapping[tuple[int, int], int]  # (stage, condition): the truth value it is given

STATE_UNKNOWN: Final = -1
INACTIVE: Final = 0
PENDING: Final = 1
FIRING: Final = 2


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the rules say about a run, in the order of the rules and their subjects."""

    findings: tuple[Finding, ...]
    unknown: tuple[Unknown, ...]
    checked: tuple[Checked, ...]


@dataclass(frozen=True, slots=True)
class _Firing:
    """A subject on which a rule fires: at which positions of the view each stage was seen."""

    subject: int
    first: int
    stages: tuple[tuple[int, int], ...]  # (first, last) position of each stage


@dataclass(frozen=True, slots=True)
class _Outcome:
    """A rule on all subjects of its view."""

    firings: tuple[_Firing, ...]
    decided: NDArray[np.bool_]  # (subjects,)
    measurements: int  # steps at which anything was decided


def evaluate(rules: Sequence[Rule], tables: Tables, ranges: Ranges | None = None) -> Judgement:
    """Evaluates rules on the tables of a run.

    Rules that end a run come first: what was measured after the earliest of their findings is not
    shown to the other rules, because it could only be a consequence.

    Args:
        rules: the rules, in the order of the answer.
        tables: the feature columns by scope; a scope may be missing.
        ranges: the healthy ranges; the shipped ones if left out.
    """
    judged = {rule.id: _judge(rule, _view(rule, tables, ranges)) for rule in rules if rule.ends_run}
    ends = [finding.since_step for judgement in judged.values() for finding in judgement.findings]
    shown = until(tables, min(ends)) if ends else tables
    views: dict[tuple[Scope, bool], View] = {}
    for rule in rules:
        if not rule.ends_run:
            key = (rule.scope, rule.is_sequence)
            if key not in views:
                views[key] = _view(rule, shown, ranges)
            judged[rule.id] = _judge(rule, views[key])
    return Judgement(
        tuple(x for rule in rules for x in judged[rule.id].findings),
        tuple(x for rule in rules for x in judged[rule.id].unknown),
        tuple(x for rule in rules for x in judged[rule.id].checked),
    )


def fires(
    rule: Rule, tables: Tables, forced: Forced | None = None, ranges: Ranges | None = None
) -> bool:
    """Returns whether a rule fires on any subject, with single conditions forced if asked to."""
    return bool(_outcome(rule, _view(rule, tables, ranges), forced or {}).firings)


def _view(rule: Rule, tables: Tables, ranges: Ranges | None) -> View:
    return View(rule.scope, tables, ranges, both_ways=rule.is_sequence)


def _judge(rule: Rule, view: View) -> Judgement:
    outcome = _outcome(rule, view, {})
    findings = tuple(_finding(rule, view, firing) for firing in outcome.firings)
    components = int(outcome.decided.sum())
    checked = Checked(rule.id, rule.title, components, outcome.measurements)
    return Judgement(
        findings,
        tuple(_unknown(rule, view, outcome.decided)),
        (checked,) if components and not findings else (),
    )


def _outcome(rule: Rule, view: View, forced: Forced) -> _Outcome:
    truths = []
    for i, stage in enumerate(rule.stages):
        here = {condition: value for (j, condition), value in forced.items() if j == i}
        truths.append(evaluate_expression(stage.when, view, here))
    known = [truth != UNKNOWN for truth in truths]
    decided = np.logical_and.reduce([k.any(axis=1) for k in known])
    measurements = int(np.logical_or.reduce([k.any(axis=0) for k in known]).sum())
    firings = _sequences(rule, view, truths) if rule.is_sequence else _runs(truths[0], rule.hold)
    return _Outcome(tuple(firings), decided, measurements)


def states(truth: Trilean, hold: int) -> NDArray[np.int8]:
    """Returns the state of a rule at each step.

    Args:
        truth: whether its expression is true, (subjects, steps).
        hold: the number of consecutive known steps at which it must be true to fire.

    >>> states(np.array([[1, 0, 1, 1, -1, 1]], np.int8), hold=2)
    array([[ 1, -1,  2,  2,  0,  1]], dtype=int8)
    """
    state = np.where(_held(truth) >= hold, FIRING, PENDING)
    state = np.where(truth == TRUE, state, INACTIVE)
    return np.where(truth == UNKNOWN, STATE_UNKNOWN, state).astype(np.int8)


def _held(truth: Trilean) -> NDArray[np.int64]:
    """Returns how often the expression was true since it was last false."""
    count = np.cumsum(truth == TRUE, axis=1)
    return count - np.maximum.accumulate(np.where(truth == FALSE, count, 0), axis=1)


def _runs(truth: Trilean, hold: int) -> Iterator[_Firing]:
    """Yields the subjects on which the expression is true at ``hold`` consecutive known steps."""
    candidates = np.flatnonzero((truth == TRUE).sum(axis=1) >= hold)
    if not len(candidates):
        return
    held = _held(truth[candidates])
    firing = states(truth[candidates], hold) == FIRING
    for subject, counts, fired in zip(candidates, held, firing, strict=True):
        at = np.flatnonzero(fired)
        if len(at):
            # The run that first lasts long enough began where its count became one.
            starts = np.flatnonzero((counts == 1) & (truth[subject] == TRUE))
            first = int(starts[starts <= at[0]][-1])
            yield _Firing(int(subject), first, ((first, int(at[-1])),))


def _sequences(rule: Rule, view: View, truths: Sequence[Trilean]) -> Iterator[_Firing]:
    """Yields the pairs on which the stages become true in order.

    A stage on one component is taken where it is first true at all, and must be later there than
    the stage before it on the other component: a disturbance that was in b before it was in a did
    not come from a. A stage on the pair is taken where it is first true from the stage before on.
    """
    ever = np.logical_and.reduce([(truth == TRUE).any(axis=1) for truth in truths])
    for subject in np.flatnonzero(ever):
        if view.subjects[subject][0] == view.subjects[subject][1]:
            continue
        places = _in_order(rule, [np.flatnonzero(truth[subject] == TRUE) for truth in truths])
        if places and places[-1] - places[0] <= rule.within:
            stages = tuple((place, place) for place in places)
            yield _Firing(int(subject), places[0], stages)


def _in_order(rule: Rule, true_at: Sequence[NDArray[np.int64]]) -> list[int] | None:
    places: list[int] = []
    latest = {"a": -1, "b": -1}  # where the latest stage on each component was
    for stage, at in zip(rule.stages, true_at, strict=True):
        if stage.on == "a,b":
            later = at[at >= places[-1]]
            if not len(later):
                return None
            places.append(int(later[0]))
        else:
            onset = int(at[0])
            if onset <= latest["b" if stage.on == "a" else "a"]:
                return None
            if places and onset < places[-1]:
                return None
            places.append(onset)
            latest[stage.on] = onset
    return places


def _finding(rule: Rule, view: View, firing: _Firing) -> Finding:
    component, other = view.subjects[firing.subject]
    places = {"component": component, "other": other or "", MODEL: MODEL}
    evidence: list[Evidence] = []
    for stage, (first, last) in zip(rule.stages, firing.stages, strict=True):
        evidence += _evidence(stage.when, view, firing.subject, first, last)
    shown = firing.stages[-1][1]

    def number(name: str) -> float:
        value = np.broadcast_to(view.column(name).value, view.shape)
        return float(value[firing.subject, shown])

    return Finding(
        fault=rule.fault,
        component=component,
        other=other,
        severity=rule.severity,
        since_step=int(view.steps[firing.first]),
        source=rule.source,
        message=rule.message.render(places, number),
        causes=tuple(Cause(cause) for cause in rule.causes),
        evidence=tuple(evidence),
        repairs=tuple(
            Repair(repair.name, places[repair.component], repair.parameters)
            for repair in rule.repairs
        ),
        patch=rule.patch,
    )


def _evidence(
    expression: Expression, view: View, subject: int, first: int, last: int
) -> Iterator[Evidence]:
    """Yields what was observed at the last firing step.

    A column's bounds are two standard errors wide on each side and hold both errors together, so
    a quarter of their width is reported as one standard error, not split in two.
    """
    for seen in observations(expression, view, subject, last):
        std_error = (seen.upper - seen.lower) / 4 if seen.lower < seen.upper else 0.0
        yield Evidence(
            feature=seen.feature,
            observed=seen.value,
            comparison=seen.comparison,
            threshold=seen.threshold,
            steps=(int(view.steps[first]), int(view.steps[last])),
            std_error=std_error if math.isfinite(std_error) else None,
            method="exact" if std_error == 0.0 else "bounds",
        )


def _unknown(rule: Rule, view: View, decided: NDArray[np.bool_]) -> Iterator[Unknown]:
    """Yields what could not be judged.

    One entry for all subjects, or one for each of some; but one for all of those that were measured
    and whose kinds have no healthy range, because more measuring would not help them.
    """
    if not view.subjects or not len(view.steps):
        reason = f"no {_MEASURED_OF[rule.scope]} was measured"
        yield Unknown(rule.id, MODEL, rule.names, reason)
        return
    undecided = np.flatnonzero(~decided)
    if not len(undecided):
        return
    missing = {
        name: np.broadcast_to(np.isnan(view.column(name).value).all(axis=1), len(view.subjects))
        for name in rule.names
    }
    lacking = _without_range(rule, view, ~decided & ~np.logical_or.reduce([*missing.values()]))
    unlearnt = np.logical_or.reduce([np.zeros(len(view.subjects), bool), *lacking.values()])
    if len(undecided) == len(view.subjects):
        names = tuple(name for name in rule.names if missing[name].all())
        if names or not unlearnt.any():
            yield Unknown(rule.id, MODEL, names, _reason(rule, names))
        else:
            yield Unknown(rule.id, MODEL, (), _range_reason(view, lacking))
        return
    if unlearnt.any():
        yield Unknown(rule.id, MODEL, (), _range_reason(view, lacking))
    for subject in np.flatnonzero(~decided & ~unlearnt):
        names = tuple(name for name in rule.names if missing[name][subject])
        component = " - ".join(name for name in view.subjects[subject] if name)
        yield Unknown(rule.id, component, names, _reason(rule, names))


def _reason(rule: Rule, missing: Sequence[str]) -> str:
    if missing:
        return f"never measured: {', '.join(missing)}"
    return f"at no step known closely enough together: {', '.join(rule.names)}"


def _without_range(
    rule: Rule, view: View, among: NDArray[np.bool_]
) -> dict[HealthyEnd, NDArray[np.bool_]]:
    """Returns for each end of a range that the rule asks for which subjects have none."""
    ends = {end: among & np.isnan(view.healthy(end).value[:, 0]) for end in rule.ranges}
    return {end: subjects for end, subjects in ends.items() if subjects.any()}


def _range_reason(view: View, lacking: Mapping[HealthyEnd, NDArray[np.bool_]]) -> str:
    names = dict.fromkeys(end.name.rpartition(".")[2] for end in lacking)
    keys = {
        key or "an unknown kind"
        for end, subjects in lacking.items()
        for key, lacks in zip(view.range_keys(end), subjects, strict=True)
        if lacks
    }
    kinds = sorted(key.rpartition(".")[2] for key in keys)
    more = f" and {len(kinds) - _KINDS_NAMED} more" if len(kinds) > _KINDS_NAMED else ""
    return f"no healthy range of {', '.join(names)} for {', '.join(kinds[:_KINDS_NAMED])}{more}"
