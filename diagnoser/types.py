"""The values that flow through the house: plain frozen dataclasses, no behaviour, no torch.

Left to right: a model is split into `Component` values, measurements of them are `Estimate` values
in `Measurement` rows, rules make `Finding` values of them, and these merge into one `Diagnosis`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


class Narrowable(Protocol):
    """What `Part.view` needs of a tensor."""

    def narrow(self, dim: int, start: int, length: int) -> Any:
        """Returns a view of a range along one dimension."""


@dataclass(frozen=True, slots=True)
class Part:
    """A parameter, or a range of it along one dimension (fused query/key/value projections)."""

    parameter: str
    dim: int | None = None  # None: the whole parameter
    start: int = 0
    length: int = 0

    def view(self, tensor: Any) -> Any:
        """Returns the view of ``tensor`` (shaped like the parameter) that this part covers."""
        return tensor if self.dim is None else tensor.narrow(self.dim, self.start, self.length)


@dataclass(frozen=True, slots=True)
class Component:
    """A named piece of a model: what is diagnosed.

    ``name`` is the module path, with the part of a fused tensor in brackets
    (``h.0.attn.c_attn[query]``). ``layer`` is the enclosing block that reports aggregate to
    (``h.0.attn``). ``order`` is the position in the model's own order of definition.
    """

    name: str
    kind: str
    layer: str
    order: int
    parts: tuple[Part, ...]
    elements: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured number with its two errors.

    ``std_error`` is what the estimator does not know about the samples it saw (0.0: exact);
    ``batch_std_error`` what other samples would have given (None: not known). One standard error
    each, in the unit of ``value``.
    """

    value: float
    std_error: float | None = 0.0
    batch_std_error: float | None = None
    samples: int | None = None  # random vectors or data samples that the errors rest on
    method: str = "exact"
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One quantity of one component (or pair, or ``model``) at one optimizer step."""

    step: int
    quantity: str
    component: str
    estimate: Estimate
    other: str | None = None


@dataclass(frozen=True, slots=True)
class Cause:
    """A possible cause of a finding; ``probability`` is None until it is measured."""

    cause: str
    probability: float | None = None


@dataclass(frozen=True, slots=True)
class RankedCause:
    """A cause in the diagnosis, with the component it is about (``model``: all of it).

    ``because`` names who votes for it, the strongest first (``check:mask-leaks``, ``classifier``).
    """

    cause: str
    component: str
    probability: float | None = None
    n: int | None = None
    because: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """One comparison that made a rule fire: a feature, what was observed, the threshold."""

    feature: str
    observed: float
    comparison: str
    threshold: float
    steps: tuple[int, int]
    std_error: float | None = None
    batch_std_error: float | None = None
    method: str = "exact"


@dataclass(frozen=True, slots=True)
class Where:
    """A place in the user's program."""

    file: str
    line: int


@dataclass(frozen=True, slots=True)
class Repair:
    """A suggested repair: a name of `vocabulary.REPAIRS`, on a component, with parameters."""

    name: str
    component: str
    parameters: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """What one rule (or later the classifier) says."""

    fault: str
    component: str
    severity: str
    since_step: int
    source: str
    message: str
    causes: tuple[Cause, ...]
    evidence: tuple[Evidence, ...]
    repairs: tuple[Repair, ...] = ()
    other: str | None = None
    probability: float | None = None
    n: int | None = None
    where: Where | None = None
    patch: str | None = None  # what to write there


@dataclass(frozen=True, slots=True)
class Unknown:
    """A rule that could not be judged, and why."""

    rule: str
    component: str
    missing: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Checked:
    """A rule that was judged and is fine: on how many components, over how many measurements."""

    rule: str
    title: str
    components: int
    measurements: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What watching took: optimizer steps, measurements, seconds of training and of monitoring.

    ``repairing_s`` are the seconds that trials of repairs took, which are in neither.
    """

    steps: int
    measurements: int
    training_s: float
    monitoring_s: float
    repairing_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Arm:
    """How a training went on for some steps: with a repair, without one, or before it.

    ``loss`` is the mean training loss of the steps that are compared, ``evidence`` the comparisons
    of the finding that was to be cured, as last measured, and ``firing`` the sources of all
    findings of severity medium or more that held at the end (``rule:learning-rate-too-high``).
    """

    steps: int
    loss: float
    evidence: tuple[Evidence, ...] = ()
    firing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Attempt:
    """A repair that was tried, what came of it, and whether it was kept.

    ``actions`` are one or a few that belong together; ``derivation`` says where their numbers come
    from and ``guarantee`` how arms were compared. ``difference`` is the loss with the repair minus
    the loss without it, as a share of the latter: below zero is better. ``batches`` counts the
    training's batches that the trial used up. ``after`` and ``twin`` are None where there were
    none.
    """

    step: int
    source: str  # of the finding
    component: str
    actions: tuple[Repair, ...]
    derivation: str
    guarantee: str
    kept: bool
    reason: str
    before: Arm
    after: Arm | None = None
    twin: Arm | None = None
    difference: Estimate | None = None
    batches: int = 0


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The merged answer. ``reason`` says in one sentence why the verdict is what it is."""

    run: str
    verdict: str
    reason: str
    exit_code: int | None
    causes: tuple[RankedCause, ...]
    findings: tuple[Finding, ...]
    unknown: tuple[Unknown, ...]
    checked: tuple[Checked, ...]
    cost: Cost
    repairs: tuple[Attempt, ...] = ()
