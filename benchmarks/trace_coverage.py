r"""Are signs and intervals of `diagnoser.curvature.block_trace` right? Thousands of trials say.

The Hessian blocks of 4,096 single samples are recorded once, for a component of every kind of two
small trained models. A trial draws a probe set of N of them (with replacement, so that what was
recorded acts as the population), and runs `block_trace` itself on a stand-in for the operator that
works on the recorded blocks. Known exactly, then: the trace of the probe set (the dense truth),
that of the population, and the sign.

* **sign**: the aim is the sign. Wrong: decided, and the other sign is true. Clear: the true trace
  is more than a tenth of the block's Frobenius norm.
* **errors**: ``value +- 1.96 std_error`` should contain the probe set's trace in 95 % of trials,
  ``value +- 1.96 hypot(std_error, batch_std_error)`` the population's. At fixed effort, and after
  stopping by the aim.
* **controls**: the stopping rule of PyHessian 0.1 (two means in a row differ by less than a
  thousandth of the signed mean) and the same with the magnitude, on the same probe sets, and on
  their negatives, since the published rule stops at once below zero.

Trained blocks mostly have positive traces. So there is a harder question, too: is the trace above a
threshold at a distance of up to one Frobenius norm on either side of it? It is the sign of a block
with a multiple of the identity taken away, which changes no error.

Run it with ``python -m benchmarks.trace_coverage`` (one thread; the recorded blocks are kept in
``benchmarks/.runs``); the figures are ``benchmarks/results/trace_coverage.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, hessian, vmap
from torch.nn import functional as F

from benchmarks.intervals import wilson
from diagnoser.curvature.block_trace import block_trace
from diagnoser.curvature.decision import MULTIPLE, Question, answer
from diagnoser.curvature.hessian import Hessian
from diagnoser.curvature.operator import Block
from diagnoser.curvature.per_sample import SampleForms
from diagnoser.curvature.sites import Vectors
from diagnoser.types import Estimate, Part

RESULTS = Path(__file__).parent / "results" / "trace_coverage.json"
CACHE = Path(__file__).parent / ".runs" / "trace_coverage"

POPULATION = 4096
TRIALS = 2000
PROBE_SETS = (32, 256)
CLEAR = 0.1  # of the Frobenius norm: a trace above this has a sign worth deciding
SEED = 0

WORDS, LENGTH, CLASSES = 8, 6, 6
WIDTH = 6


# Models, and the blocks of their single samples


class Transformer(nn.Module):
    """Pre-LN, two layers, attention written out; small enough for blocks of every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.position = nn.Parameter(0.3 * torch.randn(LENGTH, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm = Norm()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """(samples, tokens) to logits."""
        x = self.embedding(tokens) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class Norm(nn.Module):
    """Layer norm, written out: in torch 2.13 the fused one has wrong second derivatives in `vmap`.

    (Measured: `torch.func.hessian` by the gain is asymmetric by 15 %, `torch.autograd` is right.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same."""
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (self.weight)
            + self.bias
        )


class Layer(nn.Module):
    """Attention with two heads, then a feed-forward network of equal width."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(), Norm()
        self.query, self.key, self.value, self.out, self.up, self.down = (
            nn.Linear(WIDTH, WIDTH) for _ in range(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(samples, tokens, width) to the same."""
        a = self.norm1(x)
        q, k, v = (
            f(a).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class RecurrentAttention(nn.Module):
    """A recurrent layer with gates, then additive attention (Yang et al. 2016, equations 5 to 7).

    The recurrence is written out (Cho et al. 2014), because the fused one has no `vmap`.
    """

    def __init__(self, states: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 3)
        self.input = nn.Linear(3, 3 * states)
        self.recurrent = nn.Linear(states, 3 * states)
        self.projection = nn.Linear(states, hidden)
        self.context = nn.Linear(hidden, 1, bias=False)
        self.head = nn.Linear(states, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """(samples, tokens) to logits."""
        x = self.embedding(tokens)
        h = x.new_zeros(x.shape[0], self.head.in_features)
        states = []
        for t in range(x.shape[1]):
            reset_x, update_x, new_x = self.input(x[:, t]).chunk(3, -1)
            reset_h, update_h, new_h = self.recurrent(h).chunk(3, -1)
            new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
            update = torch.sigmoid(update_x + update_h)
            h = (1 - update) * new + update * h
            states.append(h)
        rows = torch.stack(states, 1)
        weights = self.context(torch.tanh(self.projection(rows))).softmax(1)
        return self.head((weights * rows).sum(1))


def texts(generator: torch.Generator, samples: int) -> tuple[Tensor, Tensor]:
    """Draws (samples, LENGTH) words and (samples,) classes; a class prefers words, and an order."""
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    noise = torch.randint(WORDS, (samples, LENGTH), generator=generator)
    own = (labels[:, None] + torch.arange(LENGTH) * (1 + labels[:, None] % 2)) % WORDS
    kept = torch.rand(noise.shape, generator=generator) < 0.5
    return torch.where(kept, own, noise), labels


@dataclass(frozen=True)
class Recorded:
    """A component whose blocks are recorded: of which model, and the parameters it has."""

    kind: str
    model: Callable[[], nn.Module]
    parameters: tuple[str, ...]


def _linear(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{part}" for name in names for part in ("weight", "bias"))


def _narrow() -> nn.Module:
    return RecurrentAttention(3, 10)


def _wide() -> nn.Module:
    return RecurrentAttention(3, 36)


NORMS = ("layers.0.norm1", "layers.0.norm2", "layers.1.norm1", "layers.1.norm2", "norm")
COMPONENTS = (
    Recorded("attention_query", Transformer, _linear("layers.0.query")),
    Recorded("attention_key", Transformer, _linear("layers.1.key")),
    Recorded("attention_value", Transformer, _linear("layers.0.value")),
    Recorded("attention_output", Transformer, _linear("layers.1.out")),
    Recorded("feed_forward", Transformer, _linear("layers.0.up")),
    Recorded("norm", Transformer, _linear(*NORMS)),
    Recorded("embedding", Transformer, ("embedding.weight",)),
    Recorded("head", Transformer, _linear("head")),
    Recorded("recurrent", _narrow, _linear("input", "recurrent")),
    Recorded("attention_projection", _narrow, _linear("projection")),
    Recorded("attention_context", _wide, ("context.weight",)),
)


def trained(make: Callable[[], nn.Module], steps: int = 150) -> tuple[nn.Module, float]:
    """Returns a model trained with Adam on fresh batches of 32, in float64, and its last loss."""
    with torch.random.fork_rng([]):
        torch.manual_seed(SEED)
        model = make().double()
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(steps):
        tokens, labels = texts(generator, 32)
        loss = F.cross_entropy(model(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), loss.item()


def sample_blocks(model: nn.Module, names: Sequence[str], tokens: Tensor, labels: Tensor) -> Tensor:
    """Returns the Hessian block of each sample's own loss, (samples, d, d) float32."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    shapes = [parameters[n].shape for n in names]
    start = torch.cat([parameters[n].reshape(-1) for n in names])

    def loss(flat: Tensor, text: Tensor, label: Tensor) -> Tensor:
        pieces = flat.split([s.numel() for s in shapes])
        own = {n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        logits = functional_call(model, parameters | own, (text[None],))
        return F.cross_entropy(logits, label[None])

    of_one = vmap(hessian(loss), in_dims=(None, 0, 0))
    groups = zip(tokens.split(128), labels.split(128), strict=True)
    return torch.cat([of_one(start, text, label).float() for text, label in groups])


def recorded_blocks(component: Recorded, samples: int = POPULATION) -> Tensor:
    """Returns a component's blocks, (samples, d, d); from the cache, or made and put there."""
    path = CACHE / f"{component.kind}.npy"
    if samples == POPULATION and path.exists():
        return torch.from_numpy(np.load(path))
    model, _ = trained(component.model)
    tokens, labels = texts(torch.Generator().manual_seed(SEED + 1), samples)
    blocks = sample_blocks(model, component.parameters, tokens, labels)
    if samples == POPULATION:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, blocks.numpy())
    return blocks


# The stand-in for the operator, on recorded blocks


class RecordedHessian:
    """What `block_trace` asks of a `Hessian`, on the recorded blocks of a probe set.

    Args:
        blocks: (samples, d, d) of the probe set.
        chunks: Number of equal chunks it is measured in.
    """

    dtype = "float32"
    scale = 1.0
    relative_error = 0.0

    def __init__(self, blocks: Tensor, chunks: int = 1) -> None:
        self.parameters = {"component": torch.zeros(blocks.shape[1])}
        self.taken: Counter[str] = Counter()
        self.mean = blocks.mean(0)
        self.chunks = (
            (self,) if chunks == 1 else tuple(RecordedHessian(c) for c in blocks.chunk(chunks))
        )

    def size(self, block: Block) -> int:  # noqa: ARG002 - there is one
        """Returns d."""
        return self.mean.shape[0]

    def like(self, block: Block) -> Tensor:  # noqa: ARG002
        """Returns a tensor of the type that vectors have."""
        return self.mean

    def block_product(self, block: Block, v: Tensor) -> Tensor:  # noqa: ARG002
        """Returns H v."""
        self.taken["products"] += 1
        return self.mean @ v


class RecordedForms:
    """What `block_trace` asks of `SampleForms`, on the recorded blocks of a probe set."""

    def __init__(self, blocks: Tensor, taken: Counter[str]) -> None:
        self.samples = len(blocks)
        self._blocks, self._taken = blocks, taken

    def forms(self, block: Block, vectors: Vectors) -> Tensor:  # noqa: ARG002
        """Returns v_n' H_n v_n / N of each sample, (samples,) float64."""
        self._taken["forms"] += 1
        v = vectors.batch("component", 0, self.samples).expand(self.samples, -1)
        products = torch.bmm(self._blocks, v.unsqueeze(2)).squeeze(2)
        return (products * v).sum(1, dtype=torch.float64) / self.samples


BLOCK = (Part("component"),)


def krylov_basis(H: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Returns the basis that a Lanczos run of so many steps spans, (steps, d) orthonormal rows."""
    basis = torch.empty(steps, H.shape[0])
    w = torch.randn(H.shape[0], generator=generator)
    for k in range(steps):
        for _ in range(2):
            w = w - (basis[:k] @ w) @ basis[:k]
        basis[k] = w / w.norm()
        w = H @ basis[k]
    return basis


# Trials


@dataclass(frozen=True)
class Setting:
    """One way to call `block_trace`; ``near``: with a threshold near the trace instead of 0."""

    name: str
    aim: tuple[Question, int]  # and the largest number of products
    method: Literal["per_sample", "plain"] | None = None
    forms: bool = True
    basis: bool = False
    chunks: int = 1
    near: bool = False


LANCZOS = 8
SIGN, VALUE = (Question("sign"), 32), (Question.within(0.05), 32)


def effort(products: int) -> tuple[Question, int]:
    """Returns the aim that stops at nothing but the number of products."""
    return Question.within(0.0), products


SETTINGS = (
    Setting("chosen, sign", SIGN, basis=True),
    Setting("chosen, near threshold", SIGN, basis=True, near=True),
    Setting("chosen, value", VALUE, basis=True),
    Setting("per sample, sign", SIGN, "per_sample"),
    Setting("per sample, 2 rounds", effort(2), "per_sample"),
    Setting("per sample, 8 rounds", effort(8), "per_sample"),
    Setting("plain, sign", SIGN, "plain", forms=False),
    Setting("plain, 16 products", effort(16), "plain", forms=False),
    Setting("plain, 16 products, 8 chunks", effort(16), "plain", forms=False, chunks=8),
    Setting("deflated, sign", SIGN, "plain", forms=False, basis=True),
    Setting("deflated, 8 products", effort(8), "plain", forms=False, basis=True),
)


@dataclass
class Tally:
    """What became of the trials of one setting."""

    trials: int = 0
    wrong: int = 0
    undecided: int = 0
    clear: int = 0  # trials whose true trace is clearly not zero
    undecided_clear: int = 0
    probe_set: int = 0  # intervals that contain the trace of the probe set
    population: int = 0
    of_population: int = 0  # trials with an error of the batch
    products: float = 0.0
    methods: Counter[str] = field(default_factory=Counter)

    def add(
        self,
        found: Estimate,
        truth: tuple[float, float],
        norm: float,
        taken: Counter[str],
        threshold: float = 0.0,
    ) -> None:
        """Adds a trial; ``truth`` is of the probe set and of the population."""
        own, population = truth
        assert found.std_error is not None
        self.trials += 1
        error = 1.959964 * found.std_error + 1e-5 * norm  # the second: of the arithmetic
        question = Question("threshold", threshold=threshold)
        side = answer(found.value, found.std_error, math.inf, question)
        decided = side != "undecided"
        clear = abs(own - threshold) > CLEAR * norm
        self.wrong += decided and (side == "above") != (own > threshold)
        self.undecided += not decided
        self.clear += clear
        self.undecided_clear += clear and not decided
        self.probe_set += abs(found.value - own) <= error
        if found.batch_std_error is not None:
            whole = 1.959964 * math.hypot(found.std_error, found.batch_std_error) + 1e-5 * norm
            self.of_population += 1
            self.population += abs(found.value - population) <= whole
        self.products += taken["forms"] + taken["products"]
        self.methods[found.method] += 1

    def figures(self) -> dict[str, Any]:
        """Returns shares with Wilson's intervals."""
        return {
            "trials": self.trials,
            "wrong": share(self.wrong, self.trials),
            "undecided": share(self.undecided, self.trials),
            "undecided_clear": share(self.undecided_clear, self.clear),
            "covers_probe_set": share(self.probe_set, self.trials),
            "covers_population": share(self.population, self.of_population),
            "products": round(self.products / self.trials, 2),
            "methods": dict(self.methods),
        }


def share(hits: int, n: int) -> dict[str, Any]:
    """Returns a proportion with its interval; None where there is nothing to divide by."""
    if n == 0:
        return {"hits": hits, "n": n, "share": None, "interval": None}
    return {
        "hits": hits,
        "n": n,
        "share": round(hits / n, 4),
        "interval": [round(bound, 4) for bound in wilson(hits, n)],
    }


def run_trial(
    setting: Setting, blocks: Tensor, basis: Tensor, generator: torch.Generator, threshold: float
) -> tuple[Estimate, Counter[str]]:
    """Runs `block_trace` on a probe set; returns its estimate and what it took."""
    question, products = setting.aim
    operator = RecordedHessian(blocks, setting.chunks)
    forms = RecordedForms(blocks, operator.taken)
    inside = float(((basis @ operator.mean) * basis).sum())
    found = block_trace(
        cast(Hessian, operator),
        BLOCK,
        generator,
        forms=[cast(SampleForms, forms)] if setting.forms else None,
        basis=basis if setting.basis else None,
        inside=inside if setting.basis else None,
        question=Question("threshold", threshold=threshold) if setting.near else question,
        max_products=products,
        method=setting.method,
    )
    if setting.chunks > 1:
        operator.taken["products"] = operator.chunks[0].taken["products"]
    return found, operator.taken


def stops(values: NDArray[np.float64], *, repaired: bool, tolerance: float = 1e-3) -> int:
    """Returns how many random vectors PyHessian's rule takes of a row of values z' H z.

    It stops at the first mean that differs from the one before (at first 0) by less than
    ``tolerance`` times that one; as published with its sign, repaired with its magnitude.
    """
    means = values.cumsum() / np.arange(1, len(values) + 1)
    before = np.concatenate([[0.0], means[:-1]])
    scale = (np.abs(before) if repaired else before) + 1e-6
    done = np.abs(means - before) / scale < tolerance
    return int(done.argmax()) + 1 if done.any() else len(values)


class Controls:
    """What PyHessian's stopping rules would have said on the same probe sets."""

    def __init__(self) -> None:
        self._wrong: Counter[str] = Counter()
        self._products: Counter[str] = Counter()
        self._trials = 0

    def add(self, H: Tensor, trace: float, generator: torch.Generator) -> None:
        """Draws 100 random vectors, on H and its negative, for both rules."""
        z = 2.0 * torch.randint(0, 2, (100, len(H)), generator=generator).to(H) - 1.0
        values = ((z @ H) * z).sum(1).double().numpy()
        self._trials += 1
        for block, sign in (("as recorded", 1.0), ("negated", -1.0)):
            for rule in ("published", "repaired"):
                count = stops(sign * values, repaired=rule == "repaired")
                name = f"{rule}, {block}"
                self._products[name] += count
                self._wrong[name] += bool(values[:count].mean() > 0) != (trace > 0)

    def figures(self) -> dict[str, Any]:
        """Returns the share of wrong signs (this rule knows no «undecided») and the products."""
        return {
            name: {
                "wrong": share(self._wrong[name], self._trials),
                "products": round(total / self._trials, 2),
            }
            for name, total in self._products.items()
        }


def trials(
    blocks: Tensor,
    samples: int,
    count: int,
    settings: Sequence[Setting] = SETTINGS,
    seed: int = SEED,
) -> dict[str, Any]:
    """Returns the figures of every setting over trials with probe sets of ``samples``."""
    generator = torch.Generator().manual_seed(seed)
    traces = blocks.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)
    population = float(traces.mean())
    tallies = {setting.name: Tally() for setting in settings}
    controls, ratios = Controls(), []
    for _ in range(count):
        drawn = torch.randint(len(blocks), (samples,), generator=generator)
        own, trace = blocks[drawn], float(traces[drawn].mean())
        mean = own.mean(0)
        norm = float(mean.norm())
        ratios.append(trace / norm)
        basis = krylov_basis(mean, LANCZOS, generator)
        near = trace + norm * (2.0 * float(torch.rand((), generator=generator)) - 1.0)
        controls.add(mean, trace, generator)
        for setting in settings:
            threshold = near if setting.near else 0.0
            found, taken = run_trial(setting, own, basis, generator, threshold)
            tallies[setting.name].add(found, (trace, population), norm, taken, threshold)
    return {
        "dimension": blocks.shape[1],
        "population_trace": population,
        "trace_over_norm": [round(float(q), 3) for q in np.quantile(ratios, (0.025, 0.5, 0.975))],
        "negative": share(sum(ratio < 0 for ratio in ratios), count),
        "settings": {name: tally.figures() for name, tally in tallies.items()},
        "pyhessian_rule": controls.figures(),
    }


# The whole


def misses(results: dict[str, Any], samples: int) -> dict[str, list[str]]:
    """Returns what is not as it should be at probe sets of this size, by target."""
    found: dict[str, list[str]] = {"wrong": [], "undecided_clear": [], "coverage": []}
    for kind, sizes in results.items():
        for name, figures in sizes[str(samples)]["settings"].items():
            place = f"{kind}: {name}"
            asks_sign = "sign" in name or "near" in name
            if asks_sign and figures["wrong"]["share"] > 0.01:
                found["wrong"].append(f"{place}: {figures['wrong']['share']:.3f}")
            undecided = figures["undecided_clear"]["share"] or 0.0
            if name == "chosen, sign" and undecided > 0.15:
                found["undecided_clear"].append(f"{place}: {undecided:.3f}")
            for truth in ("covers_probe_set", "covers_population"):
                covered = figures[truth]["share"]
                if covered is not None and not 0.93 <= covered <= 0.97:
                    found["coverage"].append(f"{place}: {truth} {covered:.3f}")
    return found


def table(results: dict[str, Any], samples: int) -> str:
    """Returns a short table: a row a kind, the worst of the settings where they are many."""
    head = ("kind", "wrong", "undecided", "near wrong", "products", "probe set", "population")
    rows = [head + ("PyHessian", "negated", "repaired")]
    for kind, sizes in results.items():
        figures = sizes[str(samples)]
        settings, rule = figures["settings"], figures["pyhessian_rule"]
        sign = settings["chosen, sign"]
        bands = []
        for truth in ("covers_probe_set", "covers_population"):
            shares = [s[truth]["share"] for s in settings.values() if s[truth]["n"]]
            bands.append(f"{100 * min(shares):.1f}-{100 * max(shares):.1f}")
        rows.append(
            (
                kind,
                percent(sign["wrong"]),
                percent(sign["undecided_clear"]),
                percent(settings["chosen, near threshold"]["wrong"]),
                f"{sign['products']:.1f}",
                *bands,
                percent(rule["published, as recorded"]["wrong"]),
                percent(rule["published, negated"]["wrong"]),
                percent(rule["repaired, negated"]["wrong"]),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) + 3)]
    lines = ["  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([f"N = {samples}, in per cent", *lines])


def percent(figure: dict[str, Any]) -> str:
    """Returns a share for the table; a dash where there is none."""
    return "-" if figure["share"] is None else f"{100 * figure['share']:.2f}"


def as_text(value: Any, depth: int = 0) -> str:
    """Returns JSON with a line a setting, so that it can be read and compared."""
    if not isinstance(value, dict) or depth > 4:
        return json.dumps(value)
    indent = " " * (depth + 1)
    lines = [f"{indent}{json.dumps(k)}: {as_text(v, depth + 1)}" for k, v in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{' ' * depth}}}"


def main() -> None:
    """Runs everything and writes the figures."""
    parser = argparse.ArgumentParser(description="Signs and intervals of block traces, in trials.")
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    results: dict[str, Any] = {}
    for component in COMPONENTS:
        blocks = recorded_blocks(component)
        results[component.kind] = {
            str(samples): trials(blocks, samples, arguments.trials) for samples in PROBE_SETS
        }
        print(component.kind, f"{time.process_time() - begun:.0f} s", flush=True)
    report = {
        "trials": arguments.trials,
        "population": POPULATION,
        "seed": SEED,
        "decision": MULTIPLE,
        "clear": CLEAR,
        "cpu_seconds": round(time.process_time() - begun, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "misses": {str(samples): misses(results, samples) for samples in PROBE_SETS},
        "kinds": results,
    }
    arguments.out.write_text(as_text(report) + "\n", encoding="utf-8")
    for samples in PROBE_SETS:
        print(table(results, samples), json.dumps(report["misses"][str(samples)], indent=1))


if __name__ == "__main__":
    main()
