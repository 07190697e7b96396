"""How often each rule was right on the calibration runs: ``rules/precision.json``.

A count belongs to what a rule said when it was counted. A rule whose conditions, causes or healthy
ranges were changed since has another digest, and no precision until it is measured again.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from diagnoser.errors import RuleError
from diagnoser.rules.loading import shipped_rules_directory
from diagnoser.rules.ranges import shipped_ranges
from diagnoser.rules.rule import Rule

SCHEMA: Final = "diagnoser.precision/1"
FILE: Final = "precision.json"
REMAKE: Final = "`python -m benchmarks.teach` makes it anew"


@dataclass(frozen=True, slots=True)
class Precision:
    """On how many runs a rule fired, on how many of them harm was proven, and its causes right.

    ``causes`` counts, for each cause that the rule names, the runs of which it is true.
    """

    n: int
    faulty: int
    causes: Mapping[str, int]


def rule_digest(rule: Rule) -> str:
    """Returns a digest of what decides whether a rule fires and what it then says is wrong.

    The shipped healthy ranges that it asks for are part of that.
    """
    known = shipped_ranges().features
    features = sorted({end.name.rpartition(".")[2] for end in rule.ranges})
    ranges = [(name, repr(sorted(known.get(name, {}).items()))) for name in features]
    stages = [(stage.on, stage.when.text) for stage in rule.stages]
    of_rule = (rule.id, rule.scope, rule.hold, rule.within, rule.ends_run, rule.causes)
    parts = (of_rule, stages, ranges)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def save_precision(
    path: Path, rules: Iterable[Rule], counted: Mapping[str, Precision], runs: int
) -> None:
    """Writes the counts of rules by id; ``runs`` is how many were looked at."""
    entries = {
        rule.id: {
            "digest": rule_digest(rule),
            "n": counted[rule.id].n,
            "faulty": counted[rule.id].faulty,
            "causes": dict(counted[rule.id].causes),
        }
        for rule in rules
        if rule.id in counted
    }
    content = {"schema": SCHEMA, "runs": runs, "rules": entries}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def precision_of(rules: Iterable[Rule], path: Path | None = None) -> dict[str, Precision]:
    """Returns what was measured of rules, by id; nothing of those that were changed since.

    Args:
        rules: The rules.
        path: A file of `save_precision`; the shipped one if left out.

    Raises:
        RuleError: The file cannot be read, or is another schema's.
    """
    table = _read(path or shipped_rules_directory("diagnoser").parent / FILE)
    found = {}
    for rule in rules:
        entry = table.get(rule.id)
        if entry is not None and entry["digest"] == rule_digest(rule):
            found[rule.id] = Precision(entry["n"], entry["faulty"], entry["causes"])
    return found


@functools.cache
def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise RuleError(
                f"{path}: schema {content['schema']}, this version reads {SCHEMA}; {REMAKE}"
            )
        entries: Mapping[str, Any] = content["rules"]
        for name, entry in entries.items():
            counts = [entry["faulty"], *entry["causes"].values()]
            if not all(0 <= count <= entry["n"] for count in counts):
                raise RuleError(f"{path}: {name} was right more often than it fired; {REMAKE}")
        return entries
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RuleError(f"{path}: cannot be read ({error!r}); {REMAKE}") from error
