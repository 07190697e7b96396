r"""When may a Lanczos run for both ends of a block's spectrum stop, and how often is it wrong then?

Run it with ``python -m benchmarks.lanczos_stopping`` (one thread, a few minutes). The figures are
``benchmarks/results/lanczos_stopping.json``.

The stopping rule (`diagnoser.curvature.lanczos`) was chosen on the tiny models as
`curvature_models` trains them, with probe sets of 32 samples and seeds below 1000. Here stand other
blocks: the tiny models after further training with other batches, on 128 samples, and two models
that played no part in the choice. Seeds are 2000 and more (from 1000 on, an earlier choice was
looked at).

* **blocks**: every component of the tiny models, dense in float64; the truth is `eigvalsh`. Of the
  two larger models a long run (`LONG` steps, another seed) stands for the truth.
* **error**: of an end, over the largest magnitude of an eigenvalue of its block. An end is wrong
  when that is above 5 %. Wilson's interval is over starts, for these blocks.
* **floor**: ``tolerance=0.01``, not before 8 products. **lean**: ``min_steps=2``, so that the rule
  alone decides; **wide**: lean with twice the margin. **warm**: lean, from the ends found k
  optimizer steps earlier.
* **beyond**: how often an eigenvalue lay outside the bounds that hold but for a chance of 5 %.
* **power**: power iteration for the one end of largest magnitude, stopped as PyHessian does (two
  values in a row differ by less than a thousandth, at most 100 products).
* **new direction**: an eigenvalue of f times the largest magnitude is added along a random vector,
  and the block is measured from what was known before, each time from the last. How often is it
  not there at the first, second, third measurement?
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.curvature_models import SUBJECTS, WORDS, Subject, halves, loss_of, topics
from benchmarks.intervals import wilson
from diagnoser.components import parameters_of, split_components
from diagnoser.curvature import Ends, Hessian, extreme_eigenvalues
from diagnoser.curvature.lanczos import Product

RESULTS = Path(__file__).parent / "results" / "lanczos_stopping.json"

WRONG = 0.05
SEED = 2000
STARTS = 40  # a dense block
WARM_STARTS = 10
GAPS = (1, 3, 10)  # optimizer steps between two measurements
SETTLING = 20  # optimizer steps before the first, in which a fresh Adam finds its pace
SAMPLES = 128
FACTORS = (1.2, 1.5, 2.0, 4.0)
LARGE = {"han": (32, 6), "distilbert": (8, 3)}  # samples, starts
LONG = 40
FLOOR: dict[str, Any] = {"tolerance": 0.01, "min_steps": 8}
LEAN: dict[str, Any] = {"tolerance": 0.01, "min_steps": 2}
WIDE: dict[str, Any] = LEAN | {"margin": 0.1}


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A symmetric operator whose ends are known."""

    name: str
    size: int
    product: Product
    low: float
    high: float

    @property
    def scale(self) -> float:
        """What errors are related to."""
        return max(abs(self.low), abs(self.high))

    @classmethod
    def of(cls, name: str, matrix: Tensor) -> Block:
        """Makes a block of a dense matrix; products are taken in float32."""
        ends = torch.linalg.eigvalsh(matrix)
        return cls(name, len(matrix), matrix.float().mv, float(ends[0]), float(ends[-1]))


@dataclass(frozen=True, slots=True)
class Trial:
    """What one run cost, and the relative errors of its ends."""

    products: int
    errors: tuple[float, ...]
    beyond: int = 0  # ends outside their bounds


def trial(block: Block, ends: Ends) -> Trial:
    """Holds a run against the truth."""
    errors = (
        abs(ends.lambda_min.value - block.low) / block.scale,
        abs(ends.lambda_max.value - block.high) / block.scale,
    )
    slack = 1e-4 * block.scale  # products in float32, and the truth of a long run
    outside = (block.low < ends.lower - slack) + (block.high > ends.upper + slack)
    return Trial(ends.products, errors, outside)


def run(block: Block, seed: int, **arguments: Any) -> Ends:
    """Measures a block."""
    generator = torch.Generator().manual_seed(seed)
    return extreme_eigenvalues(block.product, block.size, generator, **arguments)


def power_iteration(block: Block, seed: int) -> Trial:
    """Looks for the end of largest magnitude as PyHessian does."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(block.size, generator=generator)
    value, products = math.nan, 0
    while products < 100:
        v = v / torch.linalg.vector_norm(v)
        image = block.product(v)
        before, value, products = value, float(v @ image), products + 1
        if abs(before - value) < 1e-3 * (abs(before) + 1e-6):
            break
        v = image
    # PyHessian returns the value before the last one; a step further is no worse.
    extreme = max(block.low, block.high, key=abs)
    return Trial(products, (abs(value - extreme) / block.scale,))


def summary(trials: Sequence[Trial]) -> dict[str, Any]:
    """Returns products, share of wrong ends with its interval, and the errors' size."""
    errors = [e for each in trials for e in each.errors]
    wrong = sum(e > WRONG for e in errors)
    return {
        "products": statistics.fmean(each.products for each in trials),
        "ends": len(errors),
        "wrong": wrong,
        "wrong_share": wrong / len(errors),
        "wrong_interval": wilson(wrong, len(errors)),
        "beyond_share": sum(each.beyond for each in trials) / len(errors),
        "rms_error": math.sqrt(statistics.fmean(e * e for e in errors)),
        "worst_error": max(errors),
    }


def table(blocks: Sequence[Block], measure: Callable[[Block], list[Trial]]) -> dict[str, Any]:
    """Returns a summary over all blocks, and products and wrong ends of each."""
    found = {block.name: measure(block) for block in blocks}
    rows = {
        name: {
            "products": statistics.fmean(each.products for each in trials),
            "wrong": sum(e > WRONG for each in trials for e in each.errors),
            "worst_error": max(e for each in trials for e in each.errors),
        }
        for name, trials in found.items()
    }
    return summary([each for trials in found.values() for each in trials]) | {"blocks": rows}


def cold(blocks: Sequence[Block], starts: int) -> dict[str, Any]:
    """Measures from random starts, by each rule."""
    seeds = range(SEED, SEED + starts)
    return {
        "floor": table(blocks, lambda b: [trial(b, run(b, s, **FLOOR)) for s in seeds]),
        "lean": table(blocks, lambda b: [trial(b, run(b, s, **LEAN)) for s in seeds]),
        "wide": table(blocks, lambda b: [trial(b, run(b, s, **WIDE)) for s in seeds]),
        "power": table(blocks, lambda b: [power_iteration(b, s) for s in seeds]),
    }


def warm(before: Sequence[Block], after: Sequence[Block]) -> dict[str, Any]:
    """Measures the later blocks from what was found on the earlier ones."""
    earlier = {block.name: block for block in before}

    def measure(block: Block) -> list[Trial]:
        trials = []
        for seed in range(SEED, SEED + WARM_STARTS):
            start = run(earlier[block.name], seed, **LEAN).warm_start
            trials.append(trial(block, run(block, seed + 10_000, start=start, **LEAN)))
        return trials

    return table(after, measure)


def new_direction(matrices: dict[str, Tensor], factor: float) -> dict[str, Any]:
    """Returns how often an added eigenvalue is missed, by the number of measurements so far."""
    misses, products = [0, 0, 0], []
    trials = 0
    for name, matrix in matrices.items():
        old = Block.of(name, matrix)
        for seed in range(SEED, SEED + WARM_STARTS):
            generator = torch.Generator().manual_seed(seed + 20_000)
            u = torch.randn(old.size, generator=generator, dtype=torch.float64)
            u /= u.norm()
            new = Block.of(name, matrix + factor * old.scale * torch.outer(u, u))
            ends = run(old, seed, **LEAN)
            trials += 1
            for k in range(len(misses)):
                ends = run(new, seed + 30_000 + k, start=ends.warm_start, **LEAN)
                products.append(ends.products)
                if abs(ends.lambda_max.value - new.high) <= WRONG * new.scale:
                    break
                misses[k] += 1
    return {
        "factor": factor,
        "trials": trials,
        "products": statistics.fmean(products),
        "missed": misses,
        "missed_share": [m / trials for m in misses],
        "missed_interval": [wilson(m, trials) for m in misses],
    }


# --- the blocks ----------------------------------------------------------------------------------


def dense_blocks(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Returns the diagonal Hessian blocks of all components in float64, by plain autograd."""
    twin = copy.deepcopy(model).double().eval()
    parameters = parameters_of({"": twin})
    loss = loss_of(twin, inputs, targets)
    found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    gradient = dict(zip(parameters, found, strict=True))
    blocks = {}
    for component in split_components({"": model}):
        names = [part.parameter for part in component.parts]
        own = [parameters[name] for name in names]
        rows = []
        for name in names:
            flat = gradient[name].reshape(-1)
            for units in torch.eye(flat.numel(), dtype=torch.float64).split(64):
                parts = torch.autograd.grad(
                    flat, own, units, retain_graph=True, is_grads_batched=True
                )
                rows.append(torch.cat([part.reshape(len(units), -1) for part in parts], 1))
        matrix = torch.cat(rows)
        blocks[component.name] = (matrix + matrix.T) / 2
    return blocks


def trajectory(
    subject: Subject, draw: Callable[[torch.Generator, int], tuple[Tensor, Tensor]], rate: float
) -> dict[int, dict[str, Tensor]]:
    """Trains on, and returns the blocks at the first measurement and `GAPS` steps after it."""
    model = copy.deepcopy(subject.model)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    generator = torch.Generator().manual_seed(SEED)
    found = {}
    for step in range(-SETTLING, max(GAPS) + 1):
        if step in (0, *GAPS):
            found[step] = dense_blocks(model, *subject.probe_set(SAMPLES))
        optimizer.zero_grad()
        loss_of(model.train(), *draw(generator, 32)).backward()
        optimizer.step()
    return found


TINY: dict[str, tuple[Callable[[torch.Generator, int], tuple[Tensor, Tensor]], float]] = {
    "tiny_transformer": (lambda g, n: halves(g, n, 12, WORDS), 1e-2),
    "tiny_han": (lambda g, n: topics(g, n, (4, 6), WORDS), 5e-3),
}


def measure_tiny(name: str) -> dict[str, Any]:
    """Returns all tables of a tiny model."""
    path = trajectory(SUBJECTS[name](), *TINY[name])
    blocks = {
        step: [Block.of(component, matrix) for component, matrix in matrices.items()]
        for step, matrices in path.items()
    }
    return {
        "samples": SAMPLES,
        "truth": "dense float64",
        "cold": cold(blocks[0], STARTS),
        "warm": {str(gap): warm(blocks[0], blocks[gap]) for gap in GAPS},
        "new_direction": [new_direction(path[0], factor) for factor in FACTORS],
    }


def measure_large(name: str) -> dict[str, Any]:
    """Returns the tables of random starts of a larger model, as it is trained."""
    samples, starts = LARGE[name]
    subject = SUBJECTS[name]()
    parameters = parameters_of({"": subject.model})
    hessian = Hessian(loss_of(subject.model, *subject.probe_set(samples)), parameters)
    blocks = []
    for component in split_components({"": subject.model}):
        if subject.chosen is not None and not subject.chosen(component.name):
            continue
        size = hessian.size(component.parts)

        def product(v: Tensor, parts: Any = component.parts) -> Tensor:
            return hessian.block_product(parts, v)

        generator = torch.Generator().manual_seed(SEED - 1)
        known = extreme_eigenvalues(product, size, generator, max_steps=LONG, tolerance=0.0)
        low, high = known.lambda_min.value, known.lambda_max.value
        blocks.append(Block(component.name, size, product, low, high))
    return {"samples": samples, "truth": f"{LONG} steps", "cold": cold(blocks, starts)}


def rounded(value: Any) -> Any:
    """Returns the same with numbers at four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", default=[*TINY, *LARGE])
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "versions": {
            "python": platform.python_version(),
            "torch": importlib.metadata.version("torch"),
        },
        "seeds": f"{SEED} and more; the rule was chosen with seeds below 1000",
        "wrong_above": WRONG,
        "subjects": {},
    }
    for name in given.models:
        begun = time.process_time()
        measure = measure_tiny if name in TINY else measure_large
        found["subjects"][name] = measure(name)
        print(f"{name}: {time.process_time() - begun:.0f} s", file=sys.stderr, flush=True)
        given.out.write_text(
            json.dumps(rounded(found), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
