"""What watching costs at the default budget, on both subjects and on a very small network.

The same training loop runs watched and unwatched in turn, in one process, one thread; its CPU time
is taken, the ratio pair by pair, and the median quoted. For steps under 30 ms the rest beside the
guaranteed measurements is given in microseconds a step: by the monitor's own clock, and by
difference, which only resolves it on the smallest network (see the control, plain against plain).
Run it on an idle machine with ``python -m benchmarks.overhead``; the figures are
``benchmarks/results/overhead.json``.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diagnoser.session import Watch, watch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks" / "subjects"), str(ROOT / "cases" / "han")]
RESULTS = ROOT / "benchmarks" / "results" / "overhead.json"
PAIRS = {"han": 5, "han_short": 5, "transformer": 15, "tiny": 9}  # short loops are noisier


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


def seconds(make: Callable[[], Loop], watched: bool) -> tuple[float, Watch | None]:
    """Returns what one training takes, and the watch over it."""
    torch.manual_seed(0)
    loop = make()
    with tempfile.TemporaryDirectory() as directory:
        observer = None
        if watched:
            observer = watch(loop.model, loop.optimizer, out=Path(directory) / "run")
            observer.__enter__()
        start = time.process_time()
        for _ in range(loop.steps):
            inputs, targets = next(loop.batches)
            loop.optimizer.zero_grad()
            F.cross_entropy(loop.model(inputs), targets).backward()
            loop.optimizer.step()
        took = time.process_time() - start
        if observer is not None:
            observer.__exit__(None, None, None)
    return took, observer


def measure(make: Callable[[], Loop]) -> dict[str, Any]:
    """Times a loop watched and unwatched, in pairs; the control is unwatched against unwatched."""
    seconds(make, watched=True)  # a first time, for everything that is only loaded once
    steps = make().steps
    pairs = PAIRS[make.__name__]
    ratios, rest, own, plain_ms, measured, control = [], [], [], [], [], []
    before = None
    for _ in range(pairs):
        plain, _ = seconds(make, watched=False)
        watched, observer = seconds(make, watched=True)
        assert observer is not None
        account = observer.account
        ratios.append(watched / plain)
        rest.append((watched - plain - account.guaranteed_s) / steps * 1e6)
        own.append(account.bought_s / steps * 1e6)
        plain_ms.append(plain / steps * 1e3)
        measured.append(account.curvature_measurements)
        if before is not None:
            control.append(plain / before)
        before = plain
    return {
        "steps": steps,
        "pairs": pairs,
        "plain_ms_a_step": round(statistics.median(plain_ms), 2),
        "ratio": [round(value, 4) for value in sorted(ratios)],
        "ratio_median": round(statistics.median(ratios), 4),
        "control_ratio": [round(value, 4) for value in sorted(control)],
        "us_a_step_besides_guaranteed": {
            "own_clock": round(statistics.median(own), 1),
            "by_difference": round(statistics.median(rest), 1),
        },
        "curvature_measurements": min(measured),
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
