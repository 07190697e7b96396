"""The tables of ``docs/benchmark.md``, from the committed outcomes (see `tables`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.outcomes import BENCH
from diagnoser.benchmark.harm import Calibration, Harm
from diagnoser.benchmark.subjects import SUBJECTS
from diagnoser.injection import CONTROLS, INJECTIONS, Operator

MARKS = {
    "proven": "**harm**",
    "equivalent": "same",
    "not worse": "not worse",
    "no effect": "identical",
    "ambiguous": "?",
    "incomplete": "incomplete",
}
RESTORED = ("restored", "identical")


def harms(path: Path = BENCH / "harm.parquet") -> list[Harm]:
    """Returns the verdict of every configuration."""
    return [Harm(**row) for row in pq.read_table(path).to_pylist()]


def calibrations(path: Path = BENCH / "calibration.parquet") -> list[Calibration]:
    """Returns how often clean runs were «proven» harmful."""
    return [Calibration(**row) for row in pq.read_table(path).to_pylist()]


def subjects() -> str:
    """What is trained."""
    lines = ["| | subject | trained on | split | recipes |", "|---|---|---|---|---|"]
    for subject in SUBJECTS.values():
        what, data = re.split(r",? on ", subject.summary, maxsplit=1)
        recipes = ", ".join(
            f"{settings.steps} steps of {settings.batch_size}"
            for settings in subject.recipes.values()
        )
        lines.append(
            f"| {subject.id} | `{subject.name}`: {what} | {data} | {subject.split} | {recipes} |"
        )
    return "\n".join(lines)


def summary() -> str:
    """Verdicts counted by what a configuration is for."""
    found = [h for h in harms() if h.role not in {"clean", "twin", "remedy"}]
    roles = {"mistakes": "fault", "compounds": "compound", "HC2": "HC2", "HC3": "HC3", "HC4": "HC4"}
    lines = [
        "| | " + " | ".join(MARKS) + " | betrayed by the loss |",
        "|---" * (len(MARKS) + 2) + "|",
    ]
    for name, role in roles.items():
        own = [h for h in found if h.role == role]
        counts = Counter(h.harm for h in own)
        proven = [h for h in own if h.harm == "proven"]
        loud = f"{sum(h.trivial for h in proven)} of {len(proven)}" if proven else ""
        lines.append(f"| {name} | " + " | ".join(str(counts[m]) for m in MARKS) + f" | {loud} |")
    near = sum(h.is_at_the_margin for h in found)
    lines += [
        "",
        f"Of these {len(found)} verdicts {near} rest on a gap within a tenth of the margin: there "
        "the rounding of another processor may turn *harm* into *?*, or the reverse.",
    ]
    return "\n".join(lines)


def outcomes() -> str:
    """The verdict of every mistake on every subject."""
    return _matrix((h for h in harms() if h.role in {"fault", "compound"}), INJECTIONS)


def controls() -> str:
    """The verdict of every control on every subject."""
    return _matrix((h for h in harms() if h.role.startswith("HC")), CONTROLS)


def _matrix(chosen: Iterable[Harm], operators: dict[str, Operator]) -> str:
    lines = [
        "| | mistake | severity | " + " | ".join(SUBJECTS) + " |",
        "|---" * (len(SUBJECTS) + 3) + "|",
    ]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for h in chosen:
        cells.setdefault((h.operator, h.severity), {})[h.subject] = MARKS[h.harm]
    order = {name: i for i, name in enumerate(operators)}
    for (name, severity), row in sorted(
        cells.items(), key=lambda item: order.get(item[0][0], len(order))
    ):
        operator = operators.get(name)
        what = operator.name.replace("-", " ") if operator is not None else "both at once"
        verdicts = " | ".join(row.get(subject, "") for subject in SUBJECTS)
        lines.append(f"| {name} | {what} | {severity} | {verdicts} |")
    return "\n".join(lines)


def remedies() -> str:
    """Which known repairs give the clean result again."""
    lines = ["| mistake | remedy | gives the clean result | on |", "|---|---|---|---|"]
    tried: dict[tuple[str, str], list[Harm]] = {}
    for h in harms():
        if h.role == "remedy":
            tried.setdefault((h.operator, h.remedy), []).append(h)
    for (operator, remedy), own in tried.items():
        good = sum(h.harm in RESTORED for h in own)
        where = ", ".join(f"{h.subject} ({h.harm})" for h in own)
        lines.append(
            f"| {operator} | {remedy.replace('_', ' ')} | {good} of {len(own)} | {where} |"
        )
    return "\n".join(lines)


def calibration() -> str:
    """How often the proof of harm errs."""
    lines = ["| subject | splits | «proven» | 95 % |", "|---|---|---|---|"]
    for c in calibrations():
        lines.append(f"| {c.subject} | {c.splits} | {c.kills} | {c.low:.3f} to {c.high:.3f} |")
    return "\n".join(lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "subjects": subjects,
    "summary": summary,
    "outcomes": outcomes,
    "controls": controls,
    "remedies": remedies,
    "calibration": calibration,
}
