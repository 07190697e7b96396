"""``docs/rules.md``: every shipped rule and program check, from their files (see `tables`)."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import yaml

from diagnoser.checks import BEFORE, CHECKS, OFTEN, Check
from diagnoser.diagnosis import DEFAULT_FAMILIES, FAMILIES, LOGGED, SHIPPED, default_rules
from diagnoser.features import CATALOGUE
from diagnoser.rules import Rule
from diagnoser.vocabulary import CAUSE_CATEGORY, PLACES, REPAIRS

DOCUMENT = Path(__file__).parents[1] / "docs" / "rules.md"
LOOKALIKES = 4  # of a rule that are named
SCOPES = {"run": "the run", "component": "a component", "pair": "a pair of components"}
ABOUT = {
    "diagnoser": "Rules on what was measured: loss, gradients, updates, attention, curvature.",
    "checks": "Rules on what the program checks below measure. A finding of theirs is a check's.",
    LOGGED: "Rules on curves that a script logged itself; of imported logs (by default).",
    "autotrainer": "AutoTrainer's published conditions (ICSE 2021).",
    "umlaut": "UMLAUT's published heuristics (CHI 2021), as far as the log holds what they need.",
    "deeplocalize": "DeepLocalize's published conditions (ICSE 2021), the same.",
    "deepdiagnosis": "DeepDiagnosis's published conditions (ICSE 2022), the same.",
}


def index() -> str:
    """All rules, one a line, by family."""
    lines = []
    for family in SHIPPED:
        default = " (by default)" if family in DEFAULT_FAMILIES else ""
        lines += [f"**{family}**{default}: {ABOUT[family]}", ""]
        lines += ["| rule | finds | severity | causes |", "|---|---|---|---|"]
        lines += [
            f"| [{rule.id}](#{rule.id}) | {rule.title} | {rule.severity} | "
            f"{', '.join(rule.causes)} |"
            for rule in default_rules(family)
        ]
        lines += [""]
    return "\n".join(lines).rstrip()


def rules() -> str:
    """Every rule of the families that judge by default."""
    known = [rule for family in DEFAULT_FAMILIES for rule in default_rules(family)]
    return "\n".join(line for rule in known for line in _rule(rule, known)).rstrip()


def logged() -> str:
    """Every rule that judges imported logs."""
    known = default_rules(LOGGED)
    return "\n".join(line for rule in known for line in _rule(rule, known)).rstrip()


def published() -> str:
    """Every rule of the published families."""
    others = [family for family in FAMILIES if family not in DEFAULT_FAMILIES]
    lines: list[str] = []
    for family in others:
        own = default_rules(family)
        lines += [line for rule in own for line in _rule(rule, own)]
    return "\n".join(lines).rstrip()


def checks() -> str:
    """Every program check, from its docstring."""
    lines: list[str] = []
    for name, check in {**CHECKS, **OFTEN, **BEFORE}.items():
        lines += [f"### check: {name}", "", _docstring(check), ""]
    return "\n".join(lines).rstrip()


def _docstring(check: Check) -> str:
    text = inspect.getdoc(check.run) or ""
    return text.replace("``", "`")


def _rule(rule: Rule, among: Sequence[Rule]) -> Iterator[str]:
    data = yaml.safe_load(rule.path.read_text(encoding="utf-8"))
    yield from (f"### {rule.id}", "")
    yield from (f"**{rule.title}.** {rule.description.strip()}", "")
    yield f"- says: `{rule.fault}`, severity {rule.severity}, of {_scope(rule)}"
    for stage in rule.stages:
        on = f"{stage.on}: " if stage.on else ""
        yield f"- when: {on}`{' '.join(stage.when.text.split())}`{_hold(rule)}"
    for name in rule.names:
        feature = CATALOGUE[name.rpartition(".")[2]]
        yield f"    - `{name}`: {feature.description}"
    yield f"- causes: {', '.join(f'`{c}` ({CAUSE_CATEGORY[c]})' for c in rule.causes)}"
    alike = list(_lookalikes(rule, among))
    if alike:
        yield "- looks like, and is told apart by when it fires:"
        yield from (f"    - {line}" for line in alike)
    if rule.repairs:
        named = dict.fromkeys(repair.name for repair in rule.repairs)
        yield f"- repair: {'; '.join(f'`{name}` ({REPAIRS[name]})' for name in named)}"
    if rule.where:
        yield f"- place: {PLACES[rule.where]}"
    if rule.patch:
        yield from ("", textwrap.indent(f"```python\n{rule.patch.rstrip()}\n```", "  "), "")
    yield f"- false alarms: {'; '.join(rule.falsepositives)}"
    if data.get("references"):
        yield f"- from: {'; '.join(rule.references)}"
    yield ""


def _scope(rule: Rule) -> str:
    return SCOPES[rule.scope]


def _hold(rule: Rule) -> str:
    if rule.is_sequence:
        return ""
    return f" at {rule.hold} measurements in a row" if rule.hold > 1 else ""


def _lookalikes(rule: Rule, among: Sequence[Rule]) -> Iterator[str]:
    """Rules that show the same fault and blame something else, or blame the same elsewhere."""
    own = rule.causes[0]
    specific = rule.fault != "program_defect"
    alike = [
        other
        for other in among
        if other is not rule
        and (
            (specific and other.fault == rule.fault and other.causes[0] != own)
            or (rule.fault in other.explains and specific)
            or (not specific and other.causes[0] == own and other.scope == rule.scope)
        )
    ]
    for other in alike[:LOOKALIKES]:
        conditions = "; ".join(" ".join(stage.when.text.split()) for stage in other.stages)
        yield f"[{other.id}](#{other.id}) (`{other.causes[0]}`): `{conditions}`"


BLOCKS: dict[str, Callable[[], str]] = {
    "index": index,
    "rules": rules,
    "checks": checks,
    "logged": logged,
    "published": published,
}
