"""What each tier of the monitor adds to training time, beside what others add.

Tiers: what is always on (losses, the clock); samples without curvature; with curvature along the
step; and what is bought after an alarm, which adds spectra and interactions, in turn. All at the
default budget of a tenth. Beside them, on the same models and measured in the same way, a histogram
of every parameter's gradient at each step (as loggers keep them: 64 bins, by torch and by numpy),
and the factors that Cockpit's authors publish for its curvature quantities at every step.

Two equal trainings run in lockstep (see `overhead`); a ratio is that of their CPU times, in one
process on one thread, and the control has neither watched. **Memory** is the peak of a process that
trains, above what it had before model and data were made, over that of a plain one: watched by
default, and with everything measured at every hundredth step.

Run it with ``python -m benchmarks.monitor_overhead``; the figures are
``benchmarks/results/monitor_overhead.json``. ``--quick`` shows in a minute that it works; its
figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.memory import forget_peak, resident_mb
from benchmarks.overhead import (
    Lockstep,
    Loop,
    han,
    lockstep,
    microseconds_unguaranteed,
    seconds,
    tiny,
    transformer,
)
from diagnoser.monitor import Plan, Schedule
from diagnoser.session import watch
from diagnoser.vocabulary import MODEL

RESULTS = Path(__file__).parent / "results" / "monitor_overhead.json"
REPEATS = 3
QUICK_STEPS = 24
BINS = 64
SEED = 0  # `lockstep` sets it before it makes a model
EVERYTHING_EVERY = 100  # steps, where all that there is is measured
FIRST_STEPS = 200  # in which curvature must have been measured often enough
TARGETS = {
    "ratio at the default budget, steps of 30 ms and more": 1.125,
    "ratio of the always-on tier, steps of 30 ms and more": 1.03,
    "us a step besides the guaranteed measurements, steps under 30 ms": 150.0,
    "curvature measurements in 200 steps": 8,
    "peak memory, watched over plain": 2.5,
}
SMALL_STEP_MS = 30.0
PUBLISHED = {
    "source": "Schneider, Dangel and Hennig 2021, Cockpit, 2102.06604",
    "training time, every step": {"HessTrace": 1.57, "HessMaxEV": 7.1},
}


# -- what is watched ----------------------------------------------------------------------------


def distilbert(steps: int = 400) -> Loop:
    """A DistilBERT of width 128 with 4 layers on 16 random texts of 64 tokens, with AdamW."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    class Classifier(DistilBertForSequenceClassification):
        """Takes tokens, returns logits: nothing else than tensors."""

        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(input_ids=tokens).logits

    config = DistilBertConfig(
        dim=128, n_layers=4, n_heads=4, hidden_dim=512, vocab_size=8000, max_position_embeddings=64
    )
    generator = torch.Generator().manual_seed(SEED)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:  # the class is whether the first word comes from the upper half
            tokens = torch.randint(8000, (16, 64), generator=generator)
            yield tokens, (tokens[:, 0] >= 4000).long()

    model = Classifier(config)
    return Loop(model, torch.optim.AdamW(model.parameters(), 5e-4), batches(), steps)


LOOPS: dict[str, Callable[[], Loop]] = {
    "han": han,
    "distilbert": distilbert,
    "transformer": transformer,
}


# -- tiers --------------------------------------------------------------------------------------


class AlwaysOn(Schedule):
    """Measures nothing: what is left is what every step pays."""

    __slots__ = ()

    def plan(self, step: int) -> Plan:  # noqa: ARG002 - the schedule's own signature
        """See `Schedule.plan`."""
        return Plan()

    def wants_checks(self, step: int) -> bool:  # noqa: ARG002
        """See `Schedule.wants_checks`."""
        return False


class WithCurvature(Schedule):
    """Samples with curvature along the step; never a spectrum or an interaction."""

    __slots__ = ()

    def plan(self, step: int) -> Plan:
        """See `Schedule.plan`."""
        self.alarmed, self._turn = True, 0
        return super().plan(step)


class Alarmed(Schedule):
    """What the budget buys after an alarm, from the first step on: the most that watching costs."""

    __slots__ = ()

    def plan(self, step: int) -> Plan:
        """See `Schedule.plan`."""
        self.alarmed = True
        return super().plan(step)


class Statistics(WithCurvature):
    """Samples without curvature."""

    __slots__ = ()

    def plan(self, step: int) -> Plan:
        """See `Schedule.plan`."""
        return replace(super().plan(step), curvature=False)

    def learn(self, plan: Plan, seconds: float) -> None:  # noqa: ARG002 - the same
        """See `Schedule.learn`."""
        self._costs["sample"] = seconds


TIERS: dict[str, type[Schedule]] = {
    "always on": AlwaysOn,
    "statistics": Statistics,
    "curvature": WithCurvature,
    "after an alarm": Alarmed,
}


# -- histograms of gradients --------------------------------------------------------------------


class HistogramsFirst:
    """An optimizer that makes a histogram of each gradient before it steps."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        histogram: Callable[[Tensor], list[float]],
    ) -> None:
        self.log: list[list[float]] = []
        self._optimizer = optimizer
        self._histogram = histogram
        self.zero_grad = optimizer.zero_grad

    def step(self) -> None:
        """Makes the histograms, then the step."""
        self.log = [
            self._histogram(parameter.grad)
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        self._optimizer.step()


def by_torch(gradient: Tensor) -> list[float]:
    """Counts of `BINS` bins from the smallest to the largest element."""
    return torch.histc(gradient, BINS).tolist()


def by_numpy(gradient: Tensor) -> list[float]:
    """The same with numpy."""
    return np.histogram(gradient.numpy(), BINS)[0].tolist()


HISTOGRAMS: dict[str, Callable[[Tensor], list[float]]] = {
    "gradient histograms, torch": by_torch,
    "gradient histograms, numpy": by_numpy,
}


def first_with_histograms(
    make: Callable[[], Loop], histogram: Callable[[Tensor], list[float]]
) -> Callable[[], Loop]:
    """Returns a maker whose first loop keeps histograms and whose second does not."""
    made = 0

    def of_two() -> Loop:
        nonlocal made
        loop, made = make(), made + 1
        if made == 2:
            return loop
        return replace(loop, optimizer=HistogramsFirst(loop.optimizer, histogram))

    return of_two


# -- measuring ----------------------------------------------------------------------------------


def ratio(found: Lockstep) -> float:
    """CPU time of the first training over the second's."""
    return float(found.first.sum() / found.second.sum())


def tier_figures(runs: Sequence[Lockstep]) -> dict[str, Any]:
    """Returns the figures of one tier from its repeats."""
    logs = [run.observer.log for run in runs if run.observer is not None]
    curvature = [log.series("update_curvature", MODEL).step for log in logs]
    return {
        **spread("ratio", [ratio(run) for run in runs]),
        **spread("us_a_step_unguaranteed", [microseconds_unguaranteed(run) for run in runs]),
        "samples": min(len(log.measured.step) for log in logs),
        "curvature_measurements_in_200_steps": min(
            int((steps < FIRST_STEPS).sum()) for steps in curvature
        ),
        "triggers": max(sum(e.kind == "trigger" for e in log.events) for log in logs),
    }


def spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Returns all values and their median."""
    return {
        name: [round(value, 4) for value in sorted(values)],
        f"{name}_median": round(statistics.median(values), 4),
    }


def measure(make: Callable[[], Loop], repeats: int) -> dict[str, Any]:
    """Measures all tiers, the histograms and the control; each repeat makes all of them."""
    lockstep(lambda: replace(make(), steps=12), watched=True)  # what is only loaded once
    tiers: dict[str, list[Lockstep]] = {name: [] for name in TIERS}
    others: dict[str, list[float]] = {name: [] for name in (*HISTOGRAMS, "control")}
    plain: list[float] = []
    for _ in range(repeats):
        for name, schedule in TIERS.items():
            found = lockstep(make, watched=True, schedule=schedule())
            tiers[name].append(found)
            plain.append(float(found.second.mean()) * 1e3)
        for name, histogram in HISTOGRAMS.items():
            found = lockstep(first_with_histograms(make, histogram), watched=False)
            others[name].append(ratio(found))
        others["control"].append(ratio(lockstep(make, watched=False)))
    return {
        "steps": make().steps,
        "repeats": repeats,
        "plain_ms_a_step": round(statistics.median(plain), 2),
        "tiers": {name: tier_figures(runs) for name, runs in tiers.items()},
        "others": {name: spread("ratio", values) for name, values in others.items()},
    }


def memory_of(name: str, steps: int, who: str) -> float | None:
    """Trains and returns its peak of memory in megabytes; meant for a fresh process."""
    import transformers  # noqa: F401 - some models need it: code is no part of a training's memory

    forget_peak()
    start = resident_mb(peak=False)
    loop = (LOOPS | {"tiny": tiny})[name]()
    with tempfile.TemporaryDirectory() as out:
        scope: AbstractContextManager[object] = nullcontext()
        if who != "plain":
            every = EVERYTHING_EVERY if who == "everything" else None
            scope = watch(out=Path(out) / "run", verbose=False, every=every)
        with scope:
            for _ in range(steps):
                seconds(loop, next(loop.batches))
    peak = resident_mb(peak=True)
    return None if peak is None or start is None else peak - start


def measure_memory(name: str, steps: int) -> dict[str, Any]:
    """Returns the peaks of memory of a plain training and of watched ones, and their ratios."""
    found: dict[str, Any] = {"steps": steps}
    for who in ("plain", "watched", "everything"):
        command = [sys.executable, "-m", "benchmarks.monitor_overhead", name]
        done = subprocess.run(
            [*command, "--memory", who, str(steps)],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[1],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
        )
        found[f"{who}_mb"] = json.loads(done.stdout.splitlines()[-1])
    if found["plain_mb"]:  # else the system does not tell
        found["ratio"] = round(found["watched_mb"] / found["plain_mb"], 3)
        found["everything_ratio"] = round(found["everything_mb"] / found["plain_mb"], 3)
    return found


def misses(models: dict[str, Any]) -> list[str]:
    """Returns the targets that are missed, each with its figure."""
    default_limit, always_limit, us_limit, measurements, memory_limit = TARGETS.values()
    found = []
    for name, row in models.items():
        default, always = row["tiers"]["after an alarm"], row["tiers"]["always on"]
        checks = [("curvature measurements", -default["curvature_measurements_in_200_steps"],
                   -measurements)]  # fmt: skip
        if "ratio" in row["memory"]:
            most = max(row["memory"]["ratio"], row["memory"]["everything_ratio"])
            checks.append(("peak memory", most, memory_limit))
        if row["plain_ms_a_step"] >= SMALL_STEP_MS:
            checks += [
                ("default budget, ratio", default["ratio_median"], default_limit),
                ("always on, ratio", always["ratio_median"], always_limit),
            ]
        else:
            us = default["us_a_step_unguaranteed_median"]
            checks.append(("us a step besides the guaranteed", us, us_limit))
        found += [
            f"{name}: {what} is {abs(value):g}, not {abs(limit):g}"
            for what, value, limit in checks
            if not value <= limit
        ]
    return found


def table(models: dict[str, Any]) -> str:
    """Returns the ratios as a Markdown table, the published factors below."""
    names = list(models)
    lines = [
        "| training time, watched / plain | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
        "| ms a step, plain | "
        + " | ".join(f"{models[name]['plain_ms_a_step']:.1f}" for name in names)
        + " |",
    ]
    for group in ("tiers", "others"):
        for what in next(iter(models.values()))[group]:
            cells = (with_range(models[name][group][what]) for name in names)
            lines.append(f"| {what} | " + " | ".join(cells) + " |")
    for key, what in (("ratio", "default"), ("everything_ratio", "everything measured")):
        cells = (f"{models[name]['memory'].get(key, math.nan):.2f}" for name in names)
        lines.append(f"| peak memory, {what} | " + " | ".join(cells) + " |")
    for quantity, factor in PUBLISHED["training time, every step"].items():
        lines.append(f"| Cockpit, {quantity}, published | " + f"{factor} | " * len(names))
    return "\n".join(line.rstrip() for line in lines)


def with_range(row: dict[str, Any]) -> str:
    """Returns the median of the repeats' ratios, and the least and the largest of them."""
    return f"{row['ratio_median']:.3f} ({row['ratio'][0]:.3f} to {row['ratio'][-1]:.3f})"


def machine() -> dict[str, Any]:
    """Returns what the figures were measured on, and with."""
    packages = ("torch", "numpy", "transformers")
    return {
        "machine": {
            "architecture": platform.machine(),
            "system": platform.system(),
            "cpus": os.cpu_count(),
            "threads_used": torch.get_num_threads(),
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "seed": SEED,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all models, or those named, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="model", help=", ".join(LOOPS))
    parser.add_argument("--quick", action="store_true", help="few steps, once; prints only")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument(
        "--memory", nargs=2, metavar="WHO STEPS", help="for its own child processes"
    )
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.name}")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.memory:
        who, steps = given.memory
        print(json.dumps(memory_of(given.models[0], int(steps), who)))
        return
    for name in given.models:
        if name not in LOOPS:
            parser.error(f"{name}: no such model; there are {', '.join(LOOPS)}")
    out = given.out or (None if given.quick else RESULTS)
    known = json.loads(out.read_text(encoding="utf-8")) if out and out.exists() else {}
    models: dict[str, Any] = known.get("models", {})
    for name in given.models or LOOPS:
        make = LOOPS[name]
        if given.quick:
            models[name] = measure(lambda make=make: replace(make(), steps=QUICK_STEPS), 1)
        else:
            models[name] = measure(make, given.repeats)
        models[name]["memory"] = measure_memory(name, QUICK_STEPS if given.quick else FIRST_STEPS)
        found = {**machine(), "targets": TARGETS, "published": PUBLISHED, "models": models}
        if not given.quick:
            found["missed"] = misses(models)
        if out is not None:
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(models))
    if not given.quick:
        print("\n".join(misses(models)) or "every target is met", file=sys.stderr)


if __name__ == "__main__":
    main()
