"""What a tracker is to us, and what is said in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from diagnoser.report import wording
from diagnoser.types import Diagnosis

PREFIX: Final = "diagnoser"
COLUMNS: Final = ("severity", "fault", "where", "since step", "causes", "what")


@dataclass(frozen=True, slots=True)
class Said:
    """A diagnosis for people who look at a tracker: a verdict, a reason, a row a finding."""

    verdict: str
    reason: str
    rows: tuple[tuple[str, str, str, int, str, str], ...]

    def markdown(self) -> str:
        """Returns all of it as a paragraph and a table."""
        text = f"**{self.verdict}**: {_cell(self.reason)}"
        if not self.rows:
            return text
        lines = [COLUMNS, ("---",) * len(COLUMNS), *self.rows]
        table = "\n".join(f"| {' | '.join(_cell(str(c)) for c in row)} |" for row in lines)
        return f"{text}\n\n{table}"


def said(diagnosis: Diagnosis) -> Said:
    """Returns what a tracker is told of a diagnosis; names in it are untrusted."""
    rows = tuple(
        (
            f.severity,
            f.fault,
            wording.subject(f.component, f.other),
            f.since_step,
            ", ".join(cause.cause for cause in f.causes),
            wording.visible(f.message, limit=400),
        )
        for f in diagnosis.findings
    )
    return Said(diagnosis.verdict, wording.visible(diagnosis.reason, limit=400), rows)


def _cell(text: str) -> str:
    return re.sub(r"([|<>`*\[\]\\])", r"\\\1", text)


def tag(quantity: str, component: str) -> str:
    """Returns the name of a curve, in letters that every tracker takes.

    >>> tag("gradient_norm", "generator:h.0.c_attn[query]")
    'diagnoser/gradient_norm/generator/h.0.c_attn.query'
    """
    plain = component.replace("]", "").replace(":", "/")
    plain = re.sub(r"[^\w./ -]", "_", re.sub(r"[\[=]", ".", plain), flags=re.ASCII)
    parts = [part for part in plain.split("/") if part.strip(". ")]
    return "/".join((PREFIX, quantity, *parts))


@dataclass(frozen=True, slots=True)
class Tracker:
    """One tracker, as functions; a *place* is where a script writes: a writer, a run.

    Attributes:
        name: For messages.
        modules: Of which the script must have imported one.
        find: Returns the place where the script writes now, or None.
        is_open: Whether it still does.
        scalars: Writes numbers by tag, at a step.
        findings: Writes what is said, as of a step.
        costly: Whether `find` takes long.
        before_end: Has something called before the script ends a place, and returns what undoes
            that. None: a place takes what is written after its end.
    """

    name: str
    modules: tuple[str, ...]
    find: Callable[[], Any]
    is_open: Callable[[Any], bool]
    scalars: Callable[[Any, int, Mapping[str, float]], None]
    findings: Callable[[Any, int, Said], None]
    costly: bool = False
    before_end: Callable[[Any, Callable[[], None]], Callable[[], None]] | None = None
