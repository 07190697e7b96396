"""What watching costs at the default budget, on both subjects and on a very small network.

Two equal models are trained in turn in one process, one thread, step by step on the same batches,
one of them watched; the ratio is that of their CPU times, and the control is the same with neither
watched. For steps under 30 ms also: what watching adds to a step besides the guaranteed
measurements. Run it with ``python -m benchmarks.overhead``; the figures are
``benchmarks/results/overhead.json``.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import optimizer

from diagnoser.monitor import Schedule
from diagnoser.monitor.schedule import GUARANTEED_STATISTICS
from diagnoser.session import Watch, watch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks" / "subjects"), str(ROOT / "cases" / "han")]
RESULTS = ROOT / "benchmarks" / "results" / "overhead.json"
REPEATS = 3


@dataclass(frozen=True)
class Loop:
    """A model, an endless supply of batches, and how many steps are timed."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Iterator[tuple[Tensor, Tensor]]
    steps: int


def han_short() -> Loop:
    """The hierarchical attention network of the case, on its own data, for the case's five epochs.

    Too short for its budget: the guaranteed measurements alone take more.
    """
    return han(235)


def han(steps: int = 400) -> Loop:
    """The same for longer."""
    import bbc_news
    import model as han_model

    data = bbc_news.load()
    network = han_model.HAN(data.vocabulary_size, len(bbc_news.CLASSES))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for batch in torch.randperm(len(data.train)).split(32):
                if len(batch) == 32:
                    yield data.train.documents[batch], data.train.labels[batch]

    return Loop(network, torch.optim.Adam(network.parameters(), 3e-3), batches(), steps)


def transformer() -> Loop:
    """The small pre-LN transformer on associative recall."""
    import transformer as subject

    network = subject.Transformer()
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield subject.draw(64, generator)

    return Loop(network, torch.optim.AdamW(network.parameters(), 3e-3), batches(), 400)


def tiny() -> Loop:
    """A network so small that a step is mostly Python."""
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    batch = torch.randn(32, 64), torch.randint(10, (32,))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield batch

    return Loop(network, torch.optim.AdamW(network.parameters(), 1e-3), batches(), 2000)


@dataclass(frozen=True)
class Lockstep:
    """CPU seconds of every step (S,) of two trainings, and the watch over the first."""

    first: NDArray[np.float64]
    second: NDArray[np.float64]
    observer: Watch | None


def lockstep(make: Callable[[], Loop], watched: bool, schedule: Schedule | None = None) -> Lockstep:
    """Trains two equal models in turn, step by step on the same batches.

    So the speed of the machine, which drifts by more than what is measured, is the same for both.
    Who goes first alternates. The second is never watched; the first is, if asked for, by the
    default schedule or by ``schedule``, which must be new.
    """
    loops = []
    for _ in range(2):
        torch.manual_seed(0)
        loops.append(make())
    took = np.zeros((2, loops[0].steps))
    with tempfile.TemporaryDirectory() as directory:
        observer = None
        if watched:
            out = Path(directory) / "run"
            observer = watch(loops[0].model, loops[0].optimizer, out=out, verbose=False)
            if schedule is not None:
                observer._schedule = observer._monitor.schedule = schedule
            observer.__enter__()
        for step in range(loops[0].steps):
            batch = next(loops[0].batches)
            for which in ((0, 1), (1, 0))[step % 2]:
                with unseen(observer) if observer and which == 1 else nullcontext():
                    took[which, step] = seconds(loops[which], batch)
        if observer is not None:
            observer.__exit__(None, None, None)
    return Lockstep(took[0], took[1], observer)


@contextmanager
def unseen(observer: Watch) -> Iterator[None]:
    """Takes a step past the watch: the parts of it that a step runs through are set aside.

    The patched constructors stay, as exchanging methods of classes slows both loops down. The time
    is taken off the watch's clock, as its budget is a share of the watched training's own.
    """
    start = time.perf_counter()
    watched = torch.autograd.backward
    hooks = (optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks)
    kept = [dict(each) for each in hooks]
    torch.autograd.backward = watched.__wrapped__
    for each in hooks:
        each.clear()
    try:
        yield
    finally:
        torch.autograd.backward = watched
        for each, content in zip(hooks, kept, strict=True):
            each.update(content)
        if observer._monitor._started is not None:
            observer._monitor._started += time.perf_counter() - start


def seconds(loop: Loop, batch: tuple[Tensor, Tensor]) -> float:
    """Takes one step and returns its CPU seconds."""
    inputs, targets = batch
    start = time.process_time()
    loop.optimizer.zero_grad()
    F.cross_entropy(loop.model(inputs), targets).backward()
    loop.optimizer.step()
    return time.process_time() - start


def microseconds_unguaranteed(found: Lockstep) -> float:
    """What watching adds to a step, without the steps of the guaranteed measurements.

    Of steps that measure nothing the median difference counts, of samples that the budget paid for
    the whole difference. A sample lies in its own step and the next, and is written in the third.
    """
    assert found.observer is not None
    extra = found.first - found.second
    samples = found.observer.log.measured.step.tolist()
    bought = {s + k for s in samples if s not in GUARANTEED_STATISTICS for k in range(3)}
    measured = bought | {s + k for s in GUARANTEED_STATISTICS for k in range(3)}
    rest = [i for i in range(len(extra)) if i not in measured]
    paid = sum(extra[i] for i in bought if i < len(extra))
    return float(np.median(extra[rest]) + paid / len(extra)) * 1e6


def measure(make: Callable[[], Loop]) -> dict[str, Any]:
    """Measures a loop several times; the control is the same without any watching."""
    lockstep(make, watched=True)  # a first time, for everything that is only loaded once
    ratios, control, rest, plain_ms, curvature = [], [], [], [], []
    for _ in range(REPEATS):
        found, nothing = lockstep(make, watched=True), lockstep(make, watched=False)
        assert found.observer is not None
        ratios.append(found.first.sum() / found.second.sum())
        control.append(nothing.first.sum() / nothing.second.sum())
        rest.append(microseconds_unguaranteed(found))
        plain_ms.append(found.second.mean() * 1e3)
        curvature.append(found.observer.account.curvature_measurements)
    return {
        "steps": len(found.first),
        "repeats": REPEATS,
        "plain_ms_a_step": round(float(statistics.median(plain_ms)), 2),
        "ratio": [round(float(value), 4) for value in sorted(ratios)],
        "ratio_median": round(float(statistics.median(ratios)), 4),
        "control_ratio": [round(float(value), 4) for value in sorted(control)],
        "us_a_step_unguaranteed": [round(value, 1) for value in sorted(rest)],
        "us_a_step_unguaranteed_median": round(statistics.median(rest), 1),
        "curvature_measurements": min(curvature),
    }


def main() -> None:
    """Measures all loops, or those named on the command line, and writes the figures."""
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for make in (han, han_short, transformer, tiny):
        if not sys.argv[1:] or make.__name__ in sys.argv[1:]:
            found[make.__name__] = measure(make)
            print(make.__name__, found[make.__name__])
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
