"""An injection operator: one mistake, where it can be made, and what is true of it then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from diagnoser.injection.training import Moment, Training

Values = Mapping[str, Any]  # what a severity sets, by name
Correction = Callable[[], None]
Apply = Callable[[Training, "Place", Values, torch.Generator], None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a mistake is made.

    ``name`` is ``model``, ``head``, ``first``, ``middle``, ``last`` or ``all``; ``modules``
    are the module paths an operator alters, ``components`` what a diagnosis may name and be right.
    """

    name: str
    components: tuple[str, ...]
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """Something done to a training at one moment.

    ``touches`` gives, before the change, the patterns (`fnmatch`) of all that it may alter, as
    `checking.snapshot` names it; each pattern must match something that was altered.
    """

    moment: Moment
    apply: Apply
    touches: Callable[[Training, Place], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Remedy:
    """A known repair: a name of `vocabulary.REPAIRS`, done to the training that has the mistake."""

    name: str
    change: Change


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One mistake a developer makes.

    ``severities`` name what is set (``low``, ``mid``, ``high``, ``extreme``; at least ``high``).
    ``places`` gives the places in a training whose model is built; none where the operator does not
    apply. ``faults`` and ``causes`` are what a right diagnosis says, the first cause is the cause.
    ``defect``: no author would want it, even where no metric suffers; else it is a number, harmless
    unless harm is proven. ``control_set`` is empty for a mistake; else the operator makes a healthy
    run that looks strange: ``HC2`` (another recipe), ``HC3`` (at the edge of what is healthy) or
    ``HC4`` (odd, but valid).

    ``gradients``, ``attention`` and ``curvature`` are what was predicted before anything was
    measured: can the loss, gradients and updates alone reveal it (Y, P partly, N); do statistics of
    attention (Y, P, N, - none); should curvature help (+, P, 0).
    """

    id: str
    name: str
    summary: str
    change: Change
    places: Callable[[Training], tuple[Place, ...]]
    severities: Mapping[str, Values]
    faults: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    defect: bool = True
    control_set: Literal["", "HC2", "HC3", "HC4"] = ""
    gradients: Literal["Y", "P", "N"] = "N"
    attention: Literal["Y", "P", "N", "-"] = "-"
    curvature: Literal["+", "P", "0"] = "0"


@dataclass(frozen=True, slots=True)
class FaultRecord:
    """What was injected: the truth of a run."""

    operator: str
    severity: str
    place: str
    components: tuple[str, ...]
    faults: tuple[str, ...]
    causes: tuple[str, ...]
    remedies: tuple[str, ...]
    changed: tuple[str, ...]  # what `checking` saw change, by name
