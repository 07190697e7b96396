"""AutoTrainer's way (Zhang et al., ICSE 2021): its repairs in its order, and its criterion.

Of the problems that are found its own program keeps one, and tries what its catalogue has for that,
one repair after the other, each on the weights as they are. Its numbers stand here as it has them:
no measurement is asked. Left out is what changes the program (activation, batch normalisation,
another optimizer, batch size, noise; see `instructions`), and weights drawn anew are drawn once,
not three times. It trains anew for all epochs after each repair; here a trial takes some steps, and
its rules judge the run with these.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from diagnoser.features.functions import scheduled_rate
from diagnoser.features.source import Source
from diagnoser.repair import ACTIONS
from diagnoser.repair_loop.comparing import Continuation, Judged
from diagnoser.repair_loop.loop import Strategy
from diagnoser.repair_loop.planning import Plan, Situation, with_numbers
from diagnoser.types import Finding, Repair
from diagnoser.vocabulary import MODEL

RATE: Final = 1e-3  # that its first try sets,
RATE_SGD: Final = 1e-2  # and of plain SGD
TRIES: Final = 3
FARTHER: Final = 10.0  # times, from a try to the next
CLIP: Final = 10.0  # by value, between 9 and 10, there; of the norm here
OF_GRADIENTS: Final = ("vanishing_gradient", "exploding_gradient", "dying_relu")


def published_order(situation: Situation) -> tuple[Plan, ...]:
    """Returns the repairs of one problem; those of gradients go before those of accuracy."""
    problems = sorted(situation.findings, key=lambda finding: finding.fault not in OF_GRADIENTS)
    found: dict[object, Plan] = {}
    for finding in problems[:1]:
        for plan in _of(finding, situation):
            found.setdefault(plan.key, plan)
    return tuple(found.values())


def _of(finding: Finding, situation: Situation) -> Iterator[Plan]:
    for repair in finding.repairs:
        if repair.name == "scale_learning_rate":
            rises = float(repair.parameters.get("factor", 1.0)) > 1.0
            for rate in _rates(situation, rises=rises):
                actions = _setting(rate, situation)
                if actions:
                    why = f"AutoTrainer sets the learning rate to {rate:g}"
                    yield Plan(actions, why, finding.source, MODEL)
        elif repair.name == "clip_gradient":
            clip = Repair(repair.name, repair.component, {"norm": CLIP})
            yield Plan((clip,), "as AutoTrainer does it", finding.source, repair.component)
        elif repair.name in ACTIONS:
            action, why = with_numbers(repair, situation)
            yield Plan((action,), why, finding.source, repair.component)


def _rates(situation: Situation, *, rises: bool) -> list[float]:
    adaptive = np.isfinite(Source(situation.recording).component("moment_ratio").value).any()
    first = RATE if adaptive else RATE_SGD
    return [float(f"{first * FARTHER ** (i if rises else -i):.6g}") for i in range(TRIES)]


def _setting(rate: float, situation: Situation) -> tuple[Repair, ...]:
    """Returns what brings all learning rates, at their highest, to one; empty: they are there."""
    source = Source(situation.recording)
    own = {c.name for c in situation.recording.components} - {
        c.layer for c in situation.recording.components if c.layer != c.name
    }
    factor = source.component("rate_factor").value
    now = {}
    for name, script, ours in zip(source.names, scheduled_rate(source), factor, strict=True):
        known, changed = script[np.isfinite(script)], ours[np.isfinite(ours)]
        if name in own and len(known) and known.max() > 0:
            now[name] = float(known.max()) * float(changed[-1] if len(changed) else 1.0)
    if not now:
        return ()
    usual = float(np.median(list(now.values())))
    settings = [(MODEL, rate / usual), *((name, usual / of) for name, of in now.items())]
    return tuple(
        Repair("scale_learning_rate", name, {"factor": float(f"{factor:.6g}")})
        for name, factor in settings
        if not np.isclose(factor, 1.0, rtol=1e-3)
    )


def without_symptoms(repaired: Continuation, twin: Continuation, source: str, **_: bool) -> Judged:
    """AutoTrainer's criterion: no symptom is left at the end of a retraining."""
    del twin, source
    if repaired.problem:
        return Judged(False, repaired.problem, None)
    left = ", ".join(repaired.arm.firing)
    return Judged(not left, f"symptoms left: {left}" if left else "no symptom is left", None)


AUTOTRAINER: Final = Strategy("autotrainer", published_order, without_symptoms, best=False)
