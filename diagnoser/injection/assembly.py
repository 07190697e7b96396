"""From a subject, settings and a list of mistakes to a training that has them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from diagnoser.errors import InjectionError
from diagnoser.injection.checking import apply_checked
from diagnoser.injection.operator import Change, FaultRecord, Operator, Place, Remedy, Values
from diagnoser.injection.training import MOMENTS, Settings, Subject, Training


@dataclass(frozen=True, slots=True)
class Injection:
    """An operator at a severity and a place; ``remedy`` is done on top of it, to repair it."""

    operator: Operator
    severity: str
    place: str
    remedy: Remedy | None = None


def places(operator: Operator, subject: Subject, settings: Settings) -> tuple[Place, ...]:
    """Returns where an operator can be applied to a subject; empty where it does not apply."""
    blueprint = Training(subject, settings, seed=0)
    blueprint.reach("model")
    return operator.places(blueprint)


def assemble(
    subject: Subject, settings: Settings, seed: int, injections: Iterable[Injection] = ()
) -> tuple[Training, tuple[FaultRecord, ...]]:
    """Makes a training with mistakes in it, and the truth about each.

    Without injections it is the healthy training; with the same seed both draw the same initial
    weights and batches.

    Raises:
        InjectionError: A place or severity that does not exist, or a change other than declared.
    """
    made = [_Made(injection, subject, settings, seed) for injection in injections]
    training = Training(subject, settings, seed)
    for moment in MOMENTS:
        training.reach(moment)
        for mistake in made:
            mistake.act(training, moment)
    return training, tuple(mistake.record() for mistake in made)


class _Made:
    """An injection that is being carried out: its place found, its own random numbers."""

    def __init__(
        self, injection: Injection, subject: Subject, settings: Settings, seed: int
    ) -> None:
        operator = injection.operator
        self.injection = injection
        self.values = _values(operator, injection.severity)
        self.place = _place(operator, injection.place, subject, settings)
        digest = hashlib.sha256(f"{operator.id} {injection.place} {seed}".encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        self.changed: list[str] = []

    def act(self, training: Training, moment: str) -> None:
        operator, remedy = self.injection.operator, self.injection.remedy
        changes: list[Change] = [operator.change]
        if remedy is not None:
            changes.append(remedy.change)
        for change in changes:
            if change.moment == moment:
                self.changed += apply_checked(
                    training, change, self.place, self.values, self.generator
                )

    def record(self) -> FaultRecord:
        operator = self.injection.operator
        return FaultRecord(
            operator.id,
            self.injection.severity,
            self.place.name,
            self.place.components,
            operator.faults,
            operator.causes,
            tuple(remedy.name for remedy in operator.remedies),
            tuple(dict.fromkeys(self.changed)),
        )


def _values(operator: Operator, severity: str) -> Values:
    if severity not in operator.severities:
        known = ", ".join(operator.severities)
        raise InjectionError(f"{operator.id} has no severity {severity}; it has {known}")
    return operator.severities[severity]


def _place(operator: Operator, name: str, subject: Subject, settings: Settings) -> Place:
    found = {place.name: place for place in places(operator, subject, settings)}
    if name not in found:
        known = ", ".join(found) or "none: it does not apply"
        raise InjectionError(f"{operator.id} on {subject.name} has no place {name}; it has {known}")
    return found[name]
