"""What is run: clean recipes, mistakes and controls on every subject, and their repairs.

The plan of a size is the same everywhere and always: recipes and places rotate over subjects and
operators by fixed rules, nothing is drawn.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from diagnoser.benchmark.configuration import (
    Catalogue,
    Configuration,
    content_hash,
    missing_packages,
)
from diagnoser.benchmark.harm import Judged
from diagnoser.benchmark.jobs import Mode
from diagnoser.errors import UsageError
from diagnoser.injection import Operator, Place, Subject, Training, assemble, snapshot

HIGH = "high"
NEEDED = ("dropout",)  # settings that a mistake needs and that are no part of it
CLEAN, TWIN, FAULT, COMPOUND, REMEDY = "clean", "twin", "fault", "compound", "remedy"


@dataclass(frozen=True, slots=True)
class Size:
    """How much of the catalogue is run; an empty selection is all of it."""

    name: str
    subjects: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    graded: tuple[str, ...] = ()  # operators that are run at every severity
    without: tuple[str, ...] = ()  # controls that are left out
    steps: int | None = None  # of every run; None: as the recipe says
    recipes: int | None = None  # of each subject; None: all
    controls: bool = True
    compounds: bool = True
    remedied: int = 2  # subjects on which each remedy is tried
    pairs: int = 12
    clean_seeds: int = 20
    watched: int = 3  # of the pairs
    watched_clean: int = 12
    budgeted: int = 1  # of the watched runs, also at the default budget
    budgeted_clean: int = 10


SIZES: Mapping[str, Size] = {
    size.name: size
    for size in (
        Size(
            "smoke",
            subjects=("vit", "series"),
            operators=("O1", "Q2", "D1"),
            steps=100,
            recipes=1,
            controls=False,
            compounds=False,
            remedied=1,
            pairs=3,
            clean_seeds=3,
            watched=1,
            watched_clean=1,
            budgeted_clean=1,
        ),
        Size(
            "small",
            operators=(
                *("O1", "O2", "O3", "O4", "O5a", "O5b", "O6a", "O7", "O8a", "O9", "O10"),
                *("O11b", "O12", "O14", "E1"),
                *("S1", "S3", "S5", "S6a", "Q1", "Q2", "Q3", "Q4", "Q8"),
                *("M1", "M2", "M3", "M5", "P1", "P3"),
                *("N1", "N2a", "N3a", "F1a", "F2a"),
                *("L1", "L2", "L3a", "D1", "D2", "D3", "X1b", "X2", "X3a"),
            ),
            graded=("O1", "Q1", "N2a", "D1"),
            without=("V8",),  # eight times as long as any other run
        ),
        Size("full", graded=("O1", "O3", "S5", "Q1", "N2a", "L2", "D1", "X2")),
    )
}


@dataclass(frozen=True, slots=True)
class Item:
    """A configuration in the plan, what it is for, and the seeds of both kinds of runs."""

    configuration: Configuration
    hash: str
    clean: str  # hash of the clean twin
    role: str  # clean, twin, fault, compound, remedy, or the set of a control: HC2, HC3, HC4
    track: str  # the subject's split: train, dev or test
    truth: tuple[int, ...]
    watched: tuple[int, ...]
    budgeted: tuple[int, ...]
    identical: bool = False  # a remedy that gives the clean training; it need not be run

    def seeds(self, mode: Mode) -> tuple[int, ...]:
        """Returns the seeds of one kind of runs."""
        return {"truth": self.truth, "watched": self.watched, "budget": self.budgeted}[mode]

    def judged(self) -> Judged:
        """Returns what the proof of harm needs to know."""
        c = self.configuration
        return Judged(
            self.hash,
            self.clean,
            c.subject,
            c.recipe,
            self.role,
            c.operator,
            c.severity,
            c.place,
            c.remedy,
            self.truth,
            self.identical,
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run, in order; ``left_out`` says of each subject that cannot be run why."""

    size: Size
    items: tuple[Item, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)


def make_plan(
    known: Catalogue,
    size: str,
    *,
    only: Collection[str] = (),
    operators: Collection[str] = (),
) -> Plan:
    """Makes the plan of a size.

    Args:
        known: Subjects and operators.
        size: A name of `SIZES`.
        only: Subjects; all of the size if empty.
        operators: Operators, controls and compounds by id; all of the size if empty.

    Raises:
        UsageError: No such size.
        BenchmarkError: No such subject or operator.
    """
    if size not in SIZES:
        raise UsageError(f"no size {size}; there are {', '.join(SIZES)}")
    for name in only:
        known.subject(name)
    for name in operators:
        if name not in known.compounds:
            known.operator(name)
    chosen = SIZES[size]
    # A catalogue without the names of a small size gives its first ones.
    subjects = [s for s in known.subjects if s in chosen.subjects]
    subjects = subjects or list(known.subjects)[: len(chosen.subjects) or None]
    left_out, items = {}, []
    tried: dict[tuple[str, str], int] = {}
    for position, name in enumerate(subjects):
        subject = known.subjects[name]
        if only and name not in only:
            continue
        if absent := missing_packages(subject):
            left_out[name] = f"needs {', '.join(absent)}; run: pip install {' '.join(absent)}"
            continue
        builder = _Planner(known, chosen, subject, position, tried)
        items += builder.items(operators)
    if only and not items and not left_out:
        raise UsageError(f"size {size} has no {', '.join(only)}; it has {', '.join(subjects)}")
    return Plan(chosen, tuple(items), left_out)


class _Planner:
    """The plan of one subject. ``tried`` counts on how many subjects a remedy is in the plan."""

    def __init__(
        self,
        known: Catalogue,
        size: Size,
        subject: Subject,
        position: int,
        tried: dict[tuple[str, str], int],
    ) -> None:
        self.known, self.size, self.subject = known, size, subject
        self.position, self.tried = position, tried
        steps = size.steps
        self.overrides: tuple[tuple[str, object], ...]
        self.overrides = () if steps is None else (("steps", steps),)
        self.twins: dict[str, Item] = {}  # clean but for what a mistake needs, by hash

    def items(self, wanted: Collection[str]) -> list[Item]:
        """Clean recipes first, so that what is judged against them is never without them."""
        faults = [item for name in self._names() for item in self._mistake(name, wanted)]
        recipes = dict.fromkeys(item.configuration.recipe for item in faults)
        if not recipes and not wanted:
            recipes = dict.fromkeys([min(self.subject.recipes)])
        clean = [self._clean(recipe) for recipe in sorted(recipes)]
        return [*clean, *self.twins.values(), *faults]

    def _names(self) -> Iterator[str]:
        mistakes = [name for name in self.known.operators if name in self.size.operators]
        yield from mistakes or list(self.known.operators)[: len(self.size.operators) or None]
        if self.size.controls:
            yield from (c for c in self.known.controls if c not in self.size.without)
        if self.size.compounds:
            yield from self.known.compounds

    def _mistake(self, name: str, wanted: Collection[str]) -> Iterator[Item]:
        if wanted and name not in wanted:
            return
        if name in self.known.compounds:
            injections = self.known.compounds[name]
            for recipe in self._recipes(name):
                if all(place in self._places(o, recipe) for o, _, place in injections):
                    yield self._item(COMPOUND, recipe, injections)
                    return
            return
        operator = self.known.operator(name)
        for recipe in self._recipes(name):
            places = list(self._places(name, recipe))
            if not places:
                continue
            place = places[(self.position + _number(name)) % len(places)]
            graded = name in self.size.graded
            for severity in operator.severities if graded else (HIGH,):
                injections = ((name, severity, place),)
                yield self._item(role_of(operator), recipe, injections)
                if severity == HIGH:
                    yield from self._remedies(operator, recipe, injections)
            return

    def _remedies(
        self, operator: Operator, recipe: str, injections: tuple[tuple[str, str, str], ...]
    ) -> Iterator[Item]:
        for remedy in operator.remedies:
            key = (operator.id, remedy.name)
            if self.tried.get(key, 0) < self.size.remedied:
                self.tried[key] = self.tried.get(key, 0) + 1
                yield self._item(REMEDY, recipe, injections, remedy.name)

    def _item(
        self,
        role: str,
        recipe: str,
        injections: tuple[tuple[str, str, str], ...],
        remedy: str = "",
    ) -> Item:
        made = Configuration(
            subject=self.subject.name,
            recipe=recipe,
            injections=injections,
            remedy=remedy,
            overrides=self.overrides,
        )
        identical = role == REMEDY and self._snapshot(made) == self._clean_snapshot(recipe)
        size = self.size
        return Item(
            made,
            content_hash(made, self.known),
            self._twin(recipe, injections).hash,
            role,
            self.subject.split,
            tuple(range(0 if identical else size.pairs)),
            tuple(range(0 if role == REMEDY else size.watched)),
            tuple(range(0 if role == REMEDY else size.budgeted)),
            identical,
        )

    @functools.cache  # noqa: B019 - a planner lives as long as its plan is made
    def _clean(self, recipe: str) -> Item:
        made = self._clean_configuration(recipe)
        digest = content_hash(made, self.known)
        size = self.size
        counts = (size.clean_seeds, size.watched_clean, size.budgeted_clean)
        seeds, watched, budgeted = (tuple(range(count)) for count in counts)
        return Item(made, digest, digest, CLEAN, self.subject.split, seeds, watched, budgeted)

    def _twin(self, recipe: str, injections: tuple[tuple[str, str, str], ...]) -> Item:
        """The clean training that a mistake is held against, with the dropout that it sets."""
        set_too = {
            name: value
            for operator, severity, _ in injections
            for name, value in self.known.operator(operator).severities[severity].items()
            if name in NEEDED
        }
        if not set_too:
            return self._clean(recipe)
        made = Configuration(
            subject=self.subject.name,
            recipe=recipe,
            overrides=(*self.overrides, *sorted(set_too.items())),
        )
        digest = content_hash(made, self.known)
        seeds = tuple(range(self.size.pairs))
        twin = Item(made, digest, digest, TWIN, self.subject.split, seeds, (), ())
        return self.twins.setdefault(digest, twin)

    @functools.cache  # noqa: B019
    def _clean_snapshot(self, recipe: str) -> Mapping[str, str]:
        return self._snapshot(self._clean_configuration(recipe))

    def _clean_configuration(self, recipe: str) -> Configuration:
        return Configuration(subject=self.subject.name, recipe=recipe, overrides=self.overrides)

    def _snapshot(self, made: Configuration) -> Mapping[str, str]:
        injected = made.injected(self.known)
        training, _ = assemble(self.subject, made.settings(self.subject), 0, injected)
        return {**snapshot(training), "corrections": str(len(training.corrections))}

    def _recipes(self, name: str) -> Sequence[str]:
        """All recipes, from the one whose turn it is."""
        recipes = sorted(self.subject.recipes)[: self.size.recipes]
        first = _number(f"{self.subject.name} {name}") % len(recipes)
        return [*recipes[first:], *recipes[:first]]

    @functools.cache  # noqa: B019
    def _places(self, operator: str, recipe: str) -> Mapping[str, Place]:
        found = self.known.operator(operator).places(self._blueprint(recipe))
        return {place.name: place for place in found}

    @functools.cache  # noqa: B019
    def _blueprint(self, recipe: str) -> Training:
        blueprint = Training(self.subject, self.subject.recipes[recipe], seed=0)
        blueprint.reach("model")
        return blueprint


def role_of(operator: Operator) -> str:
    """Returns what a configuration with one operator is for."""
    return operator.control_set or FAULT


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
