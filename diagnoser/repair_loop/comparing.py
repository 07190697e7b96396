"""How two continuations of one training are compared: what was to be cured, and the loss.

Both see the same batches from the same state, so that losses are compared step by step. A loss that
fell is no cure by itself: a lower learning rate lowers the loss of any training for a while. The
finding has to be gone as well, nothing new may have come, and the difference has to be larger than
its own noise and a margin.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from diagnoser.diagnosis import is_grave
from diagnoser.features import feature_tables
from diagnoser.rules import Rule, evaluate, since
from diagnoser.runlog import Recording
from diagnoser.table import Array, Scope, Table
from diagnoser.types import Arm, Estimate, Evidence, Finding

BETTER: Final = 0.03  # of the loss: what counts as better, and as not worse
A_LITTLE: Final = 0.005  # the same where only a part is repaired
MUCH_BETTER: Final = 0.15  # better although the finding stands as it did
SIGMAS: Final = 2.6  # standard errors; several plans are compared at a time
SIGMAS_OF_A_FACT: Final = 1.645
FEWEST_STEPS: Final = 40
MOST_STEPS: Final = 80
SHARE_COMPARED: Final = 0.5  # of a trial's steps, the last ones
TOLD: Final = 0.1  # of the loss, the change that a trial's length is chosen to tell
PAIRED: Final = 0.5  # what pairing leaves of the noise of a difference, about

# Shares of a trial at which it is measured, the last one early enough for its second step.
MEASURED_AT: Final = (0.1, 0.5, 0.8)
# What a finding came to: gone; there, but less; there as it was; or not measured anew, because it
# is about the start of the run, say.
State = Literal["cured", "eased", "stands", "unknown"]


@dataclass(frozen=True, slots=True)
class Continuation:
    """One continuation, as it was recorded: the run so far and the steps of the trial.

    ``problem`` says why it did not get to its end; a loss that is not finite is one.
    """

    arm: Arm
    losses: Array
    states: Mapping[str, State]  # by source of finding: cured, stands or unknown, by itself
    problem: str = ""

    @property
    def diverged(self) -> bool:
        """Whether a loss was not finite."""
        return bool(len(self.losses)) and not bool(np.isfinite(self.losses).all())


def trial_steps(losses: Array) -> tuple[int, str]:
    """Returns how many steps a trial takes, and why.

    Enough for a change of a tenth of the loss to be told from the noise of the last twenty losses
    around their line, on half of the steps, at `SIGMAS` standard errors.
    """
    share = _noise(losses[-20:])
    if math.isnan(share):
        return FEWEST_STEPS, f"{FEWEST_STEPS} steps: too few losses to tell their noise"
    needed = (SIGMAS * PAIRED * math.sqrt(2.0) * share / TOLD) ** 2 / SHARE_COMPARED
    steps = math.ceil(min(max(needed, FEWEST_STEPS), MOST_STEPS))
    return steps, (
        f"{steps} steps: losses scatter by {share:.0%} from batch to batch, and a change of "
        f"{TOLD:.0%} is to be told from that"
    )


def _noise(losses: Array) -> float:
    """Returns the scatter of losses around their line, as a share of their mean; NaN: too few."""
    known = losses[np.isfinite(losses)]
    if len(known) < 5:
        return math.nan
    at = np.arange(len(known))
    rest = known - np.polyval(np.polyfit(at, known, 1), at)
    return float(np.std(rest, ddof=2)) / max(abs(float(np.mean(known))), 1e-12)


def scatter(losses: Array) -> float:
    """Returns the standard error of a loss before against one after, as a share of it."""
    return _noise(losses) * math.sqrt(2.0 / max(SHARE_COMPARED * len(losses), 1.0))


def continuation(
    recording: Recording,
    first: int,
    rules: Sequence[Rule],
    findings: Sequence[Finding],
    problem: str = "",
) -> Continuation:
    """Reads what a continuation came to.

    Args:
        recording: The run so far and the steps of the trial.
        first: The first step of the trial.
        rules: What is looked for.
        findings: What was to be cured.
        problem: Why the trial did not get to its end.
    """
    steps = recording.losses.step
    losses = recording.losses.value[steps >= first]
    tables = feature_tables(recording)
    now = _latest(tables, first)
    judged = evaluate([dataclasses.replace(rule, hold=1) for rule in rules], now)
    firing = {f.source for f in judged.findings if is_grave(f.severity)}
    decided = {entry.rule for entry in judged.checked} | {s.partition(":")[2] for s in firing}
    if len(losses) and not np.isfinite(losses).all():
        problem = "the loss became NaN or infinite"
    states: dict[str, State] = {}
    for finding in findings:
        here = any(f.source == finding.source and _same(f, finding) for f in judged.findings)
        known = finding.source.partition(":")[2] in decided
        states[finding.source] = "stands" if here else "cured" if known else "unknown"
    compared = _compared(losses)
    arm = Arm(
        steps=len(losses),
        loss=float(np.mean(compared)) if len(compared) else math.nan,
        evidence=tuple(_evidence(findings[0], tables, first)) if findings else (),
        firing=tuple(sorted(firing)),
    )
    return Continuation(arm, losses, states, problem)


def before(recording: Recording, findings: Sequence[Finding], steps: int) -> Arm:
    """Returns how the training stood when the trial began."""
    losses = recording.losses.value[-max(steps // 2, 1) :]
    return Arm(
        steps=len(losses),
        loss=float(np.mean(losses)) if len(losses) else math.nan,
        evidence=findings[0].evidence if findings else (),
        firing=tuple(sorted({f.source for f in findings if is_grave(f.severity)})),
    )


def difference(repaired: Continuation, twin: Continuation) -> Estimate:
    """Returns the loss with a repair minus the loss without, as a share of the latter.

    Step by step on the same batches, over the last half of the steps that both made. Its standard
    error allows for the correlation of neighbouring steps (an AR(1) of the differences).
    """
    count = min(len(repaired.losses), len(twin.losses))
    a, b = _compared(repaired.losses[:count]), _compared(twin.losses[:count])
    if len(a) < 4:
        return Estimate(math.nan, math.nan, samples=len(a), method="paired")
    gaps = a - b
    scale = max(abs(float(np.mean(b))), 1e-12)
    centred = gaps - gaps.mean()
    power = float(centred @ centred)
    carried = float(centred[1:] @ centred[:-1]) / power if power > 0 else 0.0
    # In few steps it comes out too small (Marriott and Pope 1954).
    carried = min(max((carried * len(gaps) + 1.0) / (len(gaps) - 3.0), 0.0), 0.9)
    independent = max(len(gaps) * (1.0 - carried) / (1.0 + carried), 2.0)
    error = float(np.std(gaps, ddof=1)) / math.sqrt(independent)
    return Estimate(float(gaps.mean()) / scale, error / scale, samples=len(gaps), method="paired")


@dataclass(frozen=True, slots=True)
class Judged:
    """Whether a repair is worth keeping.

    ``expected``: what the difference would come to in a longer trial, at its present slope if that
    is downwards; NaN where a longer one would change nothing.
    """

    keep: bool
    reason: str
    difference: Estimate | None
    expected: float = math.nan


def judge(
    repaired: Continuation,
    twin: Continuation,
    source: str,
    *,
    latent: bool = False,
    local: bool = False,
    fact: bool = False,
) -> Judged:
    """Compares a repaired continuation with the one without the repair.

    Args:
        repaired: With the repair.
        twin: Without it.
        source: Of the finding that was to be cured.
        latent: The finding is a defect that the loss need not show: it is enough that it is gone
            and that the loss is not worse.
        local: The repair does not lower the learning rate of the whole model, which makes any loss
            lower for a while: any gain that is told from noise counts.
        fact: The finding is what a check of the program saw, and the repair undoes just that: a
            gain need be told from noise at 95 % alone.
    """
    if repaired.problem:
        return Judged(False, repaired.problem, None)
    if twin.problem:
        return Judged(True, f"without it, {twin.problem}", None)
    found = difference(repaired, twin)
    value, error = found.value, found.std_error or 0.0
    if not math.isfinite(value):
        return Judged(False, "too few steps were made to compare losses", found)
    told = f"the loss is {abs(value):.1%} {'lower' if value < 0 else 'higher'} (± {error:.1%})"
    new = sorted(set(repaired.arm.firing) - set(twin.arm.firing))
    if new:
        return Judged(False, f"it brought {', '.join(new)}; {told}", found)
    state = _state(repaired, twin, source)
    now = {
        "cured": "the finding is gone",
        "unknown": "the finding is not about the present state",
        "eased": "the finding has eased",
        "stands": "the finding stands as it did",
    }
    upper = value + (SIGMAS_OF_A_FACT if fact else SIGMAS) * error
    keep = upper < needed_gain(state, latent=latent, local=local)
    text = f"{now[state]}; {told}{'' if keep else ': no clear gain'}"
    hopeful = not keep and state != "stands"
    return Judged(keep, text, found, _later(repaired, twin) if hopeful else math.nan)


def needed_gain(state: State, *, latent: bool, local: bool) -> float:
    """Returns what the upper bound of a difference must lie below; see `judge`."""
    little = -A_LITTLE if local else -BETTER
    return {
        "cured": BETTER if latent else little,
        "unknown": little,
        "eased": -BETTER,
        "stands": -MUCH_BETTER,
    }[state]


def _state(repaired: Continuation, twin: Continuation, source: str) -> State:
    state = repaired.states.get(source, "unknown")
    if state != "stands":
        return state
    before = {(e.feature, e.comparison): e for e in twin.arm.evidence}
    pairs = [(e, before.get((e.feature, e.comparison))) for e in repaired.arm.evidence]
    if not pairs or all(old is not None and new.observed == old.observed for new, old in pairs):
        return "unknown"
    eased = any(
        old is not None
        and (
            new.observed < old.observed if new.comparison[0] == ">" else new.observed > old.observed
        )
        for new, old in pairs
    )
    return "eased" if eased else "stands"


def _later(repaired: Continuation, twin: Continuation) -> float:
    """Returns what a difference comes to in as many steps more, if it gets smaller at all."""
    count = min(len(repaired.losses), len(twin.losses))
    gaps = _compared(repaired.losses[:count] - twin.losses[:count])
    if len(gaps) < 4 or not np.isfinite(gaps).all():
        return math.nan
    slope, level = np.polyfit(np.arange(len(gaps)), gaps, 1)
    scale = max(abs(float(np.mean(_compared(twin.losses[:count])))), 1e-12)
    if not slope < 0:
        return float(gaps.mean()) / scale
    return float(level + slope * (len(gaps) + count)) / scale


def _compared(losses: Array) -> Array:
    return losses[len(losses) - math.ceil(SHARE_COMPARED * len(losses)) :]


def _latest(tables: Mapping[Scope, Table], first: int) -> Mapping[Scope, Table]:
    """Returns the last measurement of a trial alone."""
    steps = [int(t.steps[-1]) for t in tables.values() if len(t.steps) and t.steps[-1] >= first]
    return since(tables, max(steps) if steps else first)


def _same(one: Finding, other: Finding) -> bool:
    a, b = one.component, other.component
    return _within(a, b) or _within(b, a)


def _within(name: str, component: str) -> bool:
    return name == component or name.startswith((f"{component}.", f"{component}["))


def _evidence(finding: Finding, tables: Mapping[Scope, Table], first: int) -> Sequence[Evidence]:
    """Returns a finding's comparisons as they stood at the last measurement of a trial."""
    found = []
    for old in finding.evidence:
        for table in tables.values():
            if old.feature not in table.columns:
                continue
            rows = [
                i
                for i, (name, other) in enumerate(table.subjects)
                if table.scope == "run"
                or (_within(name, finding.component) and other == finding.other)
            ]
            column = table.columns[old.feature]
            measured = np.flatnonzero(table.steps >= first)
            if not rows or rows[0] >= len(column.value) or not len(measured):
                break
            row = min(rows[0], len(column.value) - 1)
            known = [i for i in measured if np.isfinite(column.value[row, i])]
            if known:
                at, step = known[-1], int(table.steps[known[-1]])
                error = float(column.upper[row, at] - column.lower[row, at]) / 4
                found.append(
                    dataclasses.replace(
                        old,
                        observed=float(column.value[row, at]),
                        std_error=error if math.isfinite(error) else None,
                        steps=(step, step),
                    )
                )
            break
    return found
