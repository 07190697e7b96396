"""From a recording, rules and a classifier to one diagnosis: verdict, causes, findings in order.

Ranks are an order of evidence, not probabilities: a probability is only printed where it was
measured. No torch here; the same recording and rules give the same diagnosis, byte for byte.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from diagnoser.diagnosis.attempts import attempts_of
from diagnoser.diagnosis.merging import Claim, is_grave, ranked, reasons, votes_of
from diagnoser.features import NOTED_NAMES, PROGRAM_NAMES, feature_tables
from diagnoser.rules import (
    CHECKS_FAMILY,
    Judgement,
    Precision,
    Rule,
    evaluate,
    precision_of,
    until,
)
from diagnoser.runlog import Recording
from diagnoser.table import Scope, Table
from diagnoser.types import (
    Attempt,
    Cause,
    Checked,
    Cost,
    Diagnosis,
    Finding,
    RankedCause,
    Unknown,
    Where,
)
from diagnoser.vocabulary import MODEL, UNKNOWN, severity_rank

if TYPE_CHECKING:  # by rules alone, nobody waits for it
    from diagnoser.classifier import Classifier, Vectors

ENOUGH_STEPS: Final = 20
ENOUGH_MEASUREMENTS: Final = 3
GUESSING: Final = 0.92  # of the loss of chance, as in the rule still-guessing
_OF_ATTENTION: Final = ("attention_", "initial_attention_", "empty_rows")
_PLACE_OF: Final = {  # which recorded place of the program a cause points at
    "learning_rate_too_high": "optimizer",
    "learning_rate_too_low": "optimizer",
    "optimizer_misconfigured": "optimizer",
    "component_not_optimized": "optimizer",
    "missing_zero_grad": "backward",
    "loss_function": "backward",
}


_NOT_LOGGED: Final = "the log does not hold what they ask for"
# What no log of a script's own holds, and what follows from that.
_NOT_IN_LOGS: Final = (
    Unknown(
        "components",
        MODEL,
        (),
        "a log of curves holds no weights, gradients or curvature of components, and no attention",
    ),
    Unknown("checks", MODEL, (), "the program's calls were not seen"),
    Unknown(
        "classifier", MODEL, (), "it learned from measurements: of curves alone it says nothing"
    ),
)


def diagnose(
    recording: Recording,
    rules: Sequence[Rule],
    classifier: Classifier | None = None,
    precision: Mapping[str, Precision] | None = None,
) -> Diagnosis:
    """Judges a recording by rules, and by a classifier if there is one.

    Symptoms that a firing rule says it explains are put under its cause when they lie in the same
    component, in a part of it, or anywhere if the cause is the whole model's. `merging` orders the
    causes. The classifier's finding is one of severity medium; where it knows no such runs, it has
    no say. So it has none of an imported log, which is never called healthy: most of what goes
    wrong shows in no curve.

    Args:
        recording: The run.
        rules: What is looked for.
        classifier: What has learned from other runs; None: rules alone.
        precision: How often the rules were right, by id; what ships if left out.
    """
    measured = precision_of(rules) if precision is None else precision
    tables = feature_tables(recording)
    judgement = evaluate(rules, tables)
    attempts = attempts_of(recording)
    judgement = _with_confirmed(judgement, attempts, rules, tables)
    explained = _by_rules(judgement, recording, rules)
    votes = votes_of(_claims(explained, recording), measured)
    unknown, checked = judgement.unknown, judgement.checked
    if recording.thinned.losses or recording.thinned.measurements:
        unknown += (_let_go(recording),)
    prediction, adds = None, False
    if recording.imported:
        unknown, checked = _of_a_log(unknown, checked, rules, tables["run"])
    elif classifier is not None:
        from diagnoser.classifier import say

        steps = tuple(tables["run"].steps.tolist())
        said = say(classifier, vectors_of(recording, tables), steps)
        unknown += (said.unknown,) if said.unknown is not None else ()
        checked += (said.checked,) if said.checked is not None else ()
        if said.finding is not None:
            adds, place = True, (said.finding.causes[0].cause, said.finding.component)
            explained.append(_Explained(said.finding, place))
        if said.unknown is None and any(is_grave(item.finding.severity) for item in explained):
            prediction = said.prediction
    since = int(tables["run"].steps[-1]) if len(tables["run"].steps) else 0
    causes = ranked(votes, prediction, since, adds=adds)
    of_checks = {rule.id for rule in rules if rule.family == CHECKS_FAMILY}
    because = reasons(votes, prediction)
    position = {key: i for i, key in enumerate(causes)}
    places = {rule.id: rule.where for rule in rules}
    findings = tuple(
        _placed(_measured(item.finding, measured), recording, places.get(rule_of(item.finding)))
        for item in sorted(
            explained,
            key=lambda item: (
                -severity_rank(item.finding.severity),
                position.get(item.cause, len(position)),
                item.is_symptom,
                item.finding.since_step,
                item.finding.source,
                item.finding.component,
                item.finding.other or "",
            ),
        )
    )
    verdict, reason = _verdict(findings, recording)
    if verdict == "healthy":
        reason += _guessing(tables["run"])
    ending = recording.ending
    return Diagnosis(
        run=recording.run,
        verdict=verdict,
        reason=reason,
        exit_code=ending.exit_code if ending else None,
        causes=tuple(
            RankedCause(cause, component, because=because.get((cause, component), ()))
            for cause, component in causes
        ),
        findings=findings,
        unknown=tuple(_worth_saying(unknown, recording, of_checks)),
        checked=checked,
        cost=_cost(recording),
        repairs=attempts,
    )


def _of_a_log(
    unknown: Sequence[Unknown], checked: Sequence[Checked], rules: Sequence[Rule], run: Table
) -> tuple[tuple[Unknown, ...], tuple[Checked, ...]]:
    """Says what no log holds, and takes back that a rule was checked on what this one lacks.

    What a rule is about stands first in it; a second condition that does not hold makes it false
    even where that is not known.
    """
    nowhere = {name for name, column in run.columns.items() if np.isnan(column.value).all()}
    blind = [rule for rule in rules if not rule.is_sequence and rule.names[0] in nowhere]
    told = {entry.rule for entry in unknown}
    unknown = (
        *(replace(entry, reason=_NOT_LOGGED) if entry.missing else entry for entry in unknown),
        *(Unknown(r.id, MODEL, r.names[:1], _NOT_LOGGED) for r in blind if r.id not in told),
        *_NOT_IN_LOGS,
    )
    ids = {rule.id for rule in blind}
    return unknown, tuple(entry for entry in checked if entry.rule not in ids)


def _with_confirmed(
    judgement: Judgement,
    attempts: Sequence[Attempt],
    rules: Sequence[Rule],
    tables: Mapping[Scope, Table],
) -> Judgement:
    """Adds what a repair was kept for: a trial confirmed it before its rule held often enough."""
    found = list(judgement.findings)
    known = {(finding.source, finding.component) for finding in found}
    for attempt in attempts:
        quick = [replace(r, hold=1) for r in rules if attempt.kept and r.source == attempt.source]
        for finding in evaluate(quick, until(tables, attempt.step)).findings if quick else ():
            if (finding.source, finding.component) not in known:
                known.add((finding.source, finding.component))
                found.append(finding)
    rules_of = {rule_of(finding) for finding in found}
    fine = tuple(entry for entry in judgement.checked if entry.rule not in rules_of)
    return replace(judgement, findings=tuple(found), checked=fine)


def vectors_of(recording: Recording, tables: Mapping[Scope, Table]) -> Vectors:
    """Returns what the classifier sees of a run, now and at earlier shares of it.

    Args:
        recording: The run.
        tables: Its feature tables.
    """
    from diagnoser.classifier import EARLIER, vectors

    parts = [feature_tables(recording.part(share)) for share in EARLIER]
    return replace(vectors(tables), earlier=tuple(map(vectors, parts)))


def claims(
    tables: Mapping[Scope, Table], recording: Recording, rules: Sequence[Rule]
) -> tuple[Claim, ...]:
    """Returns what the rules alone claim of a run, for whoever merges it with something else.

    Args:
        tables: The run's feature tables.
        recording: The run they were made of.
        rules: What is looked for.
    """
    return _claims(_by_rules(evaluate(rules, tables), recording, rules), recording)


def _by_rules(
    judgement: Judgement, recording: Recording, rules: Sequence[Rule]
) -> list[_Explained]:
    found = _whole_layers(judgement.findings, recording)
    return _explain(found, {rule.id: rule for rule in rules})


def _claims(explained: Sequence[_Explained], recording: Recording) -> tuple[Claim, ...]:
    order = {component.name: component.order for component in recording.components}
    last = len(recording.components)  # what has no place comes behind what has one
    return tuple(
        Claim(
            rule=rule_of(item.finding),
            severity=item.finding.severity,
            component=item.finding.component,
            since_step=item.finding.since_step,
            causes=tuple(cause.cause for cause in item.finding.causes),
            under=item.cause if item.is_symptom else None,
            order=order.get(item.finding.component, last),
            of_check=_of_check(item.finding),
        )
        for item in explained
    )


@dataclass(frozen=True, slots=True)
class _Explained:
    """A finding and the cause, at its place, that it is put under; a symptom is under another's."""

    finding: Finding
    cause: tuple[str, str]
    is_symptom: bool = False


def _whole_layers(findings: Sequence[Finding], recording: Recording) -> list[Finding]:
    """Makes one finding of those that a rule has on all of a layer, or on all of a model's layers.

    Of several models that is, whose names stand before a colon.
    """
    members: dict[str, list[str]] = {}
    roots: dict[str, list[str]] = {}
    for component in recording.components:
        if component.layer != component.name:
            members.setdefault(component.layer, []).append(component.name)
        root, _, rest = component.name.partition(":")
        if rest and component.name == component.layer:
            roots.setdefault(root, []).append(component.name)
    return _merged(_merged(findings, members), roots)


def _merged(findings: Sequence[Finding], members: Mapping[str, Sequence[str]]) -> list[Finding]:
    """Makes one finding, named after a group, of those that a rule has on all its members."""
    by_place = {(f.source, f.component): f for f in findings if f.other is None}
    merged: dict[tuple[str, str], Finding] = {}
    swallowed: set[tuple[str, str]] = set()
    for layer, names in members.items():
        if len(names) < 2:
            continue
        for source in dict.fromkeys(f.source for f in findings):
            here = [by_place.get((source, name)) for name in names]
            if any(f is None for f in here):
                continue
            own = [f for f in here if f is not None]
            first = min(own, key=lambda f: (-severity_rank(f.severity), f.since_step))
            swallowed |= {(source, f.component) for f in own}
            merged[source, first.component] = dataclasses.replace(
                first,
                component=layer,
                message=_renamed(first.message, first.component, layer),
                repairs=tuple(
                    dataclasses.replace(r, component=layer) if r.component == first.component else r
                    for r in first.repairs
                ),
            )
    result = []
    for finding in findings:
        key = (finding.source, finding.component)
        if finding.other is not None or key not in swallowed:
            result.append(finding)
        elif key in merged:
            result.append(merged[key])
    return result


def _renamed(message: str, component: str, layer: str) -> str:
    """Names the layer instead; modules of a list are called 0.0, which numbers may look like."""
    return re.sub(
        rf"(?<![\w.]){re.escape(component)}(?![\w.]*\w)", lambda _: layer, message, count=1
    )


def rule_of(finding: Finding) -> str:
    """Returns the id of the rule that a finding comes from."""
    return finding.source.partition(":")[2]


def _explain(findings: Sequence[Finding], rules: Mapping[str, Rule]) -> list[_Explained]:
    """Puts every finding under its own first cause, or under that of a finding that explains it.

    It explains findings of the faults its rule names, in its own place (a part, the whole), and
    later, less grave ones anywhere: disturbances spread. An explaining finding must not be less
    grave than its symptom, unless a program check saw the mistake itself, nor itself be explained.
    Where several explain one symptom a check does, then the gravest, then the earliest.
    """
    by_gravity = sorted(
        (f for f in findings if rules[rule_of(f)].explains),
        key=lambda f: (
            _nameless(f),  # what was replaced is known by what stands in its place
            not (_of_check(f) and is_grave(f.severity)),
            _of_check(f) and f.component == MODEL,  # a place explains what a probe saw, not reverse
            -severity_rank(f.severity),
            f.since_step,
            f.source,
            f.component,
        ),
    )
    by_place = sorted(
        filter(_of_check, findings),
        key=lambda f: (-severity_rank(f.severity), f.since_step, f.source, f.component),
    )
    symptoms: dict[int, Finding] = {}
    explaining: set[int] = set()
    for cause in by_gravity:
        if id(cause) in symptoms:
            continue
        faults = rules[rule_of(cause)].explains
        own = [
            symptom
            for symptom in findings
            if symptom.source != cause.source
            and symptom.fault in faults
            and (
                _of_check(cause) or severity_rank(symptom.severity) <= severity_rank(cause.severity)
            )
            and (is_grave(cause.severity) or not is_grave(symptom.severity))
            and (_related(cause, symptom) or _spread(cause, symptom))
            and id(symptom) not in symptoms
            and id(symptom) not in explaining
        ]
        symptoms |= {id(symptom): cause for symptom in own}
        explaining |= {id(cause)} if own else set()
    result = []
    named = {
        f.causes[0].cause: f.component
        for f in reversed(by_place)
        if f.component != MODEL and id(f) not in symptoms
    }
    for finding in findings:
        its_cause = symptoms.get(id(finding))
        first = finding.causes[0].cause
        if (
            its_cause is None
            and finding.component == MODEL
            and first in named
            and _of_check(finding)
        ):
            # A probe sees in the whole model what a check has found the place of.
            result.append(_Explained(finding, (first, named[first]), is_symptom=True))
        elif its_cause is None:
            result.append(_Explained(finding, (finding.causes[0].cause, finding.component)))
        else:
            first = its_cause.causes[0].cause
            rest = (c for c in finding.causes if c.cause != first)
            symptom = dataclasses.replace(finding, causes=(Cause(first), *rest))
            result.append(_Explained(symptom, (first, its_cause.component), is_symptom=True))
    return result


def _of_check(finding: Finding) -> bool:
    return finding.source.startswith("check:")


def _spread(cause: Finding, symptom: Finding) -> bool:
    later = symptom.since_step > cause.since_step
    return later and severity_rank(symptom.severity) < severity_rank(cause.severity)


def _related(cause: Finding, symptom: Finding) -> bool:
    a, b = cause.component, symptom.component
    # A module that was replaced after the optimizer was built: see monitor.subject.find_models.
    replaced = (":" in b and ":" not in a) or _nameless(symptom)
    return MODEL in (a, b) or a == b or _inside(a, b) or _inside(b, a) or replaced


def _nameless(finding: Finding) -> bool:
    """Whether it is about a parameter that an optimizer holds and no model."""
    return "param_groups[" in finding.component


def _inside(name: str, prefix: str) -> bool:
    return name.startswith((f"{prefix}.", f"{prefix}[", f"{prefix}:"))


def _measured(finding: Finding, measured: Mapping[str, Precision]) -> Finding:
    """Adds how often the rule was right, and right about each cause, where it was counted."""
    known = measured.get(rule_of(finding))
    if known is None or not known.n:
        return finding
    return dataclasses.replace(
        finding,
        probability=known.faulty / known.n,
        n=known.n,
        causes=tuple(
            dataclasses.replace(c, probability=known.causes[c.cause] / known.n)
            if c.cause in known.causes
            else c
            for c in finding.causes
        ),
    )


def _placed(finding: Finding, recording: Recording, where: str | None = None) -> Finding:
    """Adds the place in the user's program that has to be changed, if it was recorded.

    It is the one that the rule names, else the one that the first cause points at; of several of a
    kind the one of the finding's component.
    """
    wanted = where or _PLACE_OF.get(finding.causes[0].cause)
    known = [fact for fact in recording.facts if fact.name == wanted]
    known.sort(key=lambda fact: _distance(fact.component, finding.component))
    for fact in known:
        file, line = fact.data.get("file"), fact.data.get("line")
        if isinstance(file, str) and isinstance(line, int):
            return dataclasses.replace(finding, where=Where(file, line))
    return finding


def _distance(place: str, component: str) -> int:
    if place == component:
        return 0
    if _inside(place, component) or _inside(component, place):
        return 1
    return 2


def _worth_saying(
    unknown: Sequence[Unknown], recording: Recording, checks: Collection[str]
) -> Iterator[Unknown]:
    """Leaves out rules on subjects they are not about: attention has no update ratio of its own.

    What a program check could not tell has the check's own reason, and one entry.
    """
    parameters = {c.name for c in recording.components if c.name != c.layer or c.kind != "other"}
    layers = {c.name for c in recording.components} - parameters
    reasons = {
        fact.component: str(fact.data.get("reason", ""))
        for fact in recording.facts
        if fact.name == UNKNOWN
    }
    of_checks = PROGRAM_NAMES - NOTED_NAMES
    checked = not of_checks.isdisjoint(recording.measurements.quantities)
    silent = checked or recording.imported  # of a log that was said already
    if not silent and any(entry.rule in checks for entry in unknown):
        told = (event.message for event in recording.events if event.kind == "unchecked")
        said = next(told, "no step was checked: the program's calls were not seen")
        yield Unknown("checks", MODEL, (), said)
    for entry in unknown:
        if entry.rule in checks:
            why = next((reasons[name] for name in entry.missing if name in reasons), None)
            if checked and entry.component == MODEL and why is not None:
                yield replace(entry, reason=why)
            continue
        if recording.imported:
            why = next((reasons[name] for name in entry.missing if name in reasons), None)
            yield entry if why is None else replace(entry, reason=why)
            continue
        of_attention = any(name.startswith(_OF_ATTENTION) for name in entry.missing)
        about = MODEL if entry.component == MODEL else ("layer" if of_attention else "component")
        if about == MODEL or (about == "component" and entry.component not in layers):
            yield entry


def _let_go(recording: Recording) -> Unknown:
    """What the log of a long run does not hold any more."""
    measurements = f"{len(recording.measured.step):,} of {recording.measurements_made:,}"
    losses = f"{len(recording.losses.step):,} of {recording.losses_seen:,}"
    return Unknown(
        "log",
        MODEL,
        (),
        f"of a long run it keeps {measurements} measurements and {losses} losses, the older the "
        "fewer; what lay between them is not judged",
    )


def _cost(recording: Recording) -> Cost:
    ending = recording.ending
    if ending is not None and ending.cost is not None:
        return ending.cost
    steps = int(recording.losses.step.max()) + 1 if len(recording.losses.step) else 0
    with np.errstate(over="ignore"):  # a sum beyond all numbers is Inf, and written so
        seconds = float(np.nansum(recording.measured.value))
    seconds += recording.thinned.seconds
    return Cost(steps, recording.measurements_made, float("nan"), seconds)


def _verdict(findings: Sequence[Finding], recording: Recording) -> tuple[str, str]:
    if findings and is_grave(findings[0].severity):
        worst = findings[0]
        return "faulty", f"{worst.fault} in {worst.component} since step {worst.since_step}"
    steps, samples = recording.losses_seen, recording.measurements_made
    if steps == 0:
        why = next((e.message for e in recording.events if e.kind == "nothing_seen"), None)
        return "inconclusive", why or "no training step was seen"
    if recording.imported:
        return (
            "inconclusive",
            f"no fault shows in {steps} logged losses and what was logged beside them; that a run "
            "is healthy cannot be told from curves: `diagnoser run` measures what they do not show",
        )
    if steps < ENOUGH_STEPS or samples < ENOUGH_MEASUREMENTS:
        return (
            "inconclusive",
            f"too little was seen: steps {steps}, measurements {samples}; "
            f"a verdict needs {ENOUGH_STEPS} and {ENOUGH_MEASUREMENTS}",
        )
    if not np.isfinite(recording.losses.value).any():
        return "inconclusive", "no finite loss was seen"
    return (
        "healthy",
        f"nothing of severity medium or more in {samples} measurements of {steps} steps",
    )


def _guessing(run: Table) -> str:
    """Adds to a healthy verdict what nobody would call healthy, though nothing says why."""
    last = run.columns["loss_to_chance"].value[0][-ENOUGH_MEASUREMENTS:]
    if len(last) < ENOUGH_MEASUREMENTS or not (last > GUESSING).all():  # NaN is not above it
        return ""
    return (
        f"; but at step {run.steps[-1]} the loss was still that of guessing, and why is not known"
    )
