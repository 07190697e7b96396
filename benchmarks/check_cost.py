"""What program checks cost: ``python -m benchmarks.check_cost``.

Two equal models are trained in turn in one process, one thread, step by step on the same batches
(`overhead.lockstep`); one is watched by a schedule that measures nothing and either checks as usual
or never. The difference is what checks add. Figures: ``benchmarks/results/check_cost.json``.
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

from benchmarks.monitor_overhead import LOOPS, SMALL_STEP_MS, AlwaysOn, machine, ratio
from benchmarks.overhead import Lockstep, Loop, lockstep
from diagnoser.monitor import Schedule

RESULTS = Path(__file__).parent / "results" / "check_cost.json"
STEPS, REPEATS = 1000, 3
MOST_SHARE, MOST_US = 0.03, 150.0  # of training time, of a step under 30 ms


class ChecksAlone(AlwaysOn):
    """Measures nothing, and checks as usual."""

    __slots__ = ()

    def wants_checks(self, step: int) -> bool:
        """See `Schedule.wants_checks`."""
        return Schedule.wants_checks(self, step)


def microseconds(found: Lockstep) -> float:
    """CPU time that watching adds to a step."""
    return float((found.first.sum() - found.second.sum()) / len(found.second)) * 1e6


def measure(make: Callable[[], Loop], repeats: int) -> dict[str, Any]:
    """Returns what checks add to a training, and how many there were."""
    lockstep(lambda: replace(make(), steps=12), watched=True)  # what is only loaded once
    shares, added, plain, checks = [], [], [], []
    for _ in range(repeats):
        without = lockstep(make, watched=True, schedule=AlwaysOn())
        checked = lockstep(make, watched=True, schedule=ChecksAlone())
        shares.append(ratio(checked) - ratio(without))
        added.append(microseconds(checked) - microseconds(without))
        plain.append(float(checked.second.mean()) * 1e3)
        checks.append(len(checked.observer.log.measured.step) if checked.observer else 0)
    return {
        "steps": make().steps,
        "checked_steps": statistics.median(checks),
        "plain_ms_a_step": round(statistics.median(plain), 2),
        "share": [round(value, 4) for value in sorted(shares)],
        "share_median": round(statistics.median(shares), 4),
        "us_a_step": [round(value, 1) for value in sorted(added)],
        "us_a_step_median": round(statistics.median(added), 1),
    }


def misses(models: dict[str, Any]) -> list[str]:
    """Returns the targets that are missed, each with its figure."""
    found = []
    for name, row in models.items():
        small = row["plain_ms_a_step"] < SMALL_STEP_MS
        value, most = (
            (row["us_a_step_median"], MOST_US) if small else (row["share_median"], MOST_SHARE)
        )
        if not value <= most:
            found.append(f"{name}: checks add {value:g}{' us a step' if small else ''}, not {most}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all models, or those named, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="model", help=", ".join(LOOPS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    known = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    models: dict[str, Any] = known.get("models", {})
    for name in given.models or LOOPS:
        make = LOOPS[name]
        models[name] = measure(lambda make=make: replace(make(), steps=given.steps), given.repeats)
        print(json.dumps({name: models[name]}, indent=1), flush=True)
        given.out.write_text(
            json.dumps({"models": models} | machine(), indent=1) + "\n", encoding="utf-8"
        )
    for line in misses(models):
        print(line)


if __name__ == "__main__":
    main()
