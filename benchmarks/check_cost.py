"""What program checks cost: ``python -m benchmarks.check_cost``.

Two equal models are trained in turn in one process, one thread, step by step on the same batches
(`overhead.lockstep`); one is watched by a schedule that measures nothing and either checks as usual
or never. The difference is what checks add: those of the first steps, which every run gets, and
those that are sampled afterwards, for which there is a target. Figures:
``benchmarks/results/check_cost.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.monitor_overhead import LOOPS, SMALL_STEP_MS, AlwaysOn, machine
from benchmarks.overhead import Lockstep, Loop, lockstep
from diagnoser.monitor import Schedule
from diagnoser.monitor.schedule import GUARANTEED_CHECKS

RESULTS = Path(__file__).parent / "results" / "check_cost.json"
STEPS, REPEATS = 1000, 3
SMALL_STEPS = 3000  # of a model whose steps are so small that a check is worth many of them
SMALL = frozenset({"transformer"})
MOST_SHARE, MOST_US = 0.03, 150.0  # of training time, of a step under 30 ms


class ChecksAlone(AlwaysOn):
    """Measures nothing, and checks as usual."""

    __slots__ = ()

    def wants_checks(self, step: int) -> bool:
        """See `Schedule.wants_checks`."""
        return Schedule.wants_checks(self, step)


def added(found: Lockstep, steps: slice) -> float:
    """CPU seconds that watching adds to some steps."""
    return float(found.first[steps].sum() - found.second[steps].sum())


def measure(make: Callable[[], Loop], repeats: int) -> dict[str, Any]:
    """Returns what the first checks and the sampled ones add to a training, and their number."""
    lockstep(lambda: replace(make(), steps=12), watched=True)  # what is only loaded once
    beginning, rest = slice(0, GUARANTEED_CHECKS[-1] + 1), slice(GUARANTEED_CHECKS[-1] + 1, None)
    rows = []
    for _ in range(repeats):
        without = lockstep(make, watched=True, schedule=AlwaysOn())
        checked = lockstep(make, watched=True, schedule=ChecksAlone())
        first, sampled = (added(checked, s) - added(without, s) for s in (beginning, rest))
        plain = checked.second
        rows.append(
            {
                "checked_steps": len(checked.observer.log.measured.step) if checked.observer else 0,
                "plain_ms_a_step": float(plain.mean()) * 1e3,
                "first_checks_ms": first * 1e3,
                "sampled_share": sampled / float(plain[rest].sum()),
                "sampled_us_a_step": sampled / len(plain[rest]) * 1e6,
                "share": (first + sampled) / float(plain.sum()),
            }
        )
    middle = {key: round(statistics.median(row[key] for row in rows), 4) for key in rows[0]}
    return (
        {"steps": make().steps, "repeats": repeats}
        | middle
        | {"sampled_us_a_step_of_each": sorted(round(row["sampled_us_a_step"], 1) for row in rows)}
    )


def misses(models: dict[str, Any]) -> list[str]:
    """Returns the targets that are missed, each with its figure."""
    found = []
    for name, row in models.items():
        small = row["plain_ms_a_step"] < SMALL_STEP_MS
        value, most = (
            (row["sampled_us_a_step"], MOST_US) if small else (row["sampled_share"], MOST_SHARE)
        )
        if not value <= most:
            found.append(
                f"{name}: sampled checks add {value:g}{' us a step' if small else ''}, not {most}"
            )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all models, or those named, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="model", help=", ".join(LOOPS))
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}, or {SMALL_STEPS} small ones")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    known = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    models: dict[str, Any] = known.get("models", {})
    for name in given.models or LOOPS:
        make = LOOPS[name]
        steps = given.steps or (SMALL_STEPS if name in SMALL else STEPS)
        models[name] = measure(lambda make=make, n=steps: replace(make(), steps=n), given.repeats)
        print(json.dumps({name: models[name]}, indent=1), flush=True)
        given.out.write_text(
            json.dumps({"models": models} | machine(), indent=1) + "\n", encoding="utf-8"
        )
    for line in misses(models):
        print(line)


if __name__ == "__main__":
    main()
