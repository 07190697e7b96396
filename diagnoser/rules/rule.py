"""A rule in memory: checked, compiled, immutable. `loading` makes them of files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diagnoser.rules.expression import Expression, HealthyEnd
from diagnoser.rules.message import Message
from diagnoser.table import Column, Scope

CHECKS_FAMILY = "checks"  # the rules on what program checks measure


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a sequence: ``on`` is ``a``, ``b``, or ``a,b`` for the pair of them.

    A plain rule is a single stage, on nothing in particular (``""``).
    """

    on: str
    when: Expression


@dataclass(frozen=True, slots=True)
class SuggestedRepair:
    """A repair; ``component`` is ``component`` or ``other`` of the finding, or ``model``."""

    name: str
    component: str
    parameters: Mapping[str, float | str]


@dataclass(frozen=True, slots=True)
class Example:
    """One subject's series, (1, steps) a column, and whether the rule must fire on it.

    Columns have the names the rule uses; ``kinds`` gives the kinds of ``a`` and ``b`` of a pair,
    the only component being ``a``. ``healthy`` gives the healthy range of features, low and high,
    for the kinds of this subject; of others nothing is known.
    """

    name: str
    columns: Mapping[str, Column]
    kinds: Mapping[str, str]
    healthy: Mapping[str, tuple[float, float]]
    fires: bool
    line: int  # in the rule's file


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule; the fields are the keys of its file.

    A plain rule has one stage and ``hold`` (the file's ``for``): it fires where its expression is
    true at that many consecutive measured steps. A sequence (``is_sequence``) has several stages,
    which must become true in order within ``within`` measured steps. ``where`` names the place of
    the user's program that has to be changed, and ``patch`` is what to write there.
    """

    id: str
    family: str
    path: Path
    title: str
    status: str
    description: str
    references: tuple[str, ...]
    fault: str
    scope: Scope
    stages: tuple[Stage, ...]
    hold: int
    within: int
    severity: str
    message: Message
    causes: tuple[str, ...]
    repairs: tuple[SuggestedRepair, ...]
    explains: tuple[str, ...]
    ends_run: bool
    falsepositives: tuple[str, ...]
    tests: tuple[Example, ...]
    where: str | None = None
    patch: str | None = None

    @property
    def source(self) -> str:
        """What a finding of it is said to come from: a rule on a program check is that check."""
        return f"{'check' if self.family == CHECKS_FAMILY else 'rule'}:{self.id}"

    @property
    def is_sequence(self) -> bool:
        """Whether the rule correlates stages over time."""
        return len(self.stages) > 1

    @property
    def names(self) -> tuple[str, ...]:
        """The features that decide whether it fires."""
        return tuple(dict.fromkeys(name for stage in self.stages for name in stage.when.names))

    @property
    def ranges(self) -> tuple[HealthyEnd, ...]:
        """The ends of healthy ranges that it compares with."""
        return tuple(dict.fromkeys(end for stage in self.stages for end in stage.when.ranges))
