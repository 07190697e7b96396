r"""What curvature costs, against the libraries, at the same error.

Run it with ``python -m benchmarks.curvature_cost`` (``--quick`` for the small version that the
tests run, ``--large`` for DistilBERT-base as well). The figures are
``benchmarks/results/curvature_cost.json``; a pair of model and number of samples that is in there
already is kept, unless ``--fresh`` is given.

One process, one thread, CPU time of the process. Every cost is also given in *gradients* G: the
median CPU seconds of one forward and backward pass of the same model on the same samples.

**Truth.** On the tiny models the dense Hessian of each component on the probe set in float64, by
plain autograd. On the large ones a long run of ours, with seeds of its own, and all of PyHessian's
products, each weighted by its inverse variance; the error of this reference is recorded, and its
square is taken off the mean squares of errors against it.

**Rivals.** PyHessian 0.1 and curvlinops 3.0.1 have no components; each is restricted to the
parameters of one. PyHessian differentiates once a component (its constructor: forward, backward
with a graph), then one product a random vector. With *c* the standard deviation of a single
product's value, *k* products have the error c / sqrt(k). As published it stops after few products
wherever the running mean is negative; *repaired* is the same rule with abs(mean), as on its master
branch. What both rules do is computed on sequences drawn with replacement from all products taken,
which are independent and equally distributed. curvlinops has the same error law and its own cost a
product; it takes its products side by side.

**Cost at equal error.** For a component *b*, with e the rms error of ours over the seeds and s the
median seconds of ours, F the seconds that all B components share (forward, backward with a graph,
finding the sites of parameters):

.. math::
    \text{ours}_b = F / B + s_b, \qquad
    \text{fixed}_b = \text{constructor}_b + \min(n_b, \max(1, (c_b / e_b)^2))\, p_b, \qquad
    \text{rule}_b = t_b\, (\text{rms}_b / e_b)^2

with p the seconds of a product, n the number of elements (as many products give the trace exactly:
no rival is counted dearer than that), and t and rms the mean seconds and the rms error of a
stopping rule. This is done twice: for our trace *alone*, and for the trace *after ends*, as the
monitor measures it, which starts from what the Lanczos run for both ends has found. The *spectrum*
ratio is trace and one end by PyHessian over both ends and the trace after them.

Three things keep this from flattering us. No credit is given for being better than what was asked
for, or than the reference: e is at least 5 % of max(abs(trace), Frobenius norm), also where ours is
exact, and at least the error of the reference. Against chance in the error of few seeds, which
1 / e^2 magnifies, its square is taken m / (m - 2) times larger (m seeds; the mean of an inverse
chi-square). And a rival's *fixed* number of products is chosen by an oracle.

A kind's ratio is the sum of a rival's costs over the sum of ours, the model's that of all
components measured. «products only» leaves constructors and F out on both sides.

**Floor of a product.** A gradient is 3 units a matrix product of the forward pass (itself, and the
gradients by input and by weight); a product with a block needs 2 units for each from the block on
(the tangent forward, the tangent of the gradient backward), counted in order of execution.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.curvature_models import SUBJECTS, Subject, distilbert_base, loss_of
from benchmarks.curvature_models import tiny_transformer as make_tiny_transformer
from benchmarks.memory import forget_peak, resident_mb
from diagnoser.components import parameters_of, split_components
from diagnoser.curvature import (
    Ends,
    Hessian,
    Question,
    block_eigenvalues,
    block_trace,
    coupling_norms,
    extreme_eigenvalues,
)
from diagnoser.curvature.block_trace import FIVE_PERCENT
from diagnoser.curvature.per_sample import RandomSigns, SampleForms
from diagnoser.types import Component

RESULTS = Path(__file__).parent / "results" / "curvature_cost.json"
SIZES = (32, 256)
CREDIT = FIVE_PERCENT.relative_error  # the smallest error a rival has to match, over `Truth.scale`
RULE_TOLERANCE = 1e-3  # PyHessian's default
MOST_PROBES = 100  # PyHessian's default
WAYS = ("alone", "after_ends")  # of a trace of ours
MANY_PARAMETERS = 1_000_000
COLUMNS = 8  # a component, for its couplings
ROUNDING = 1e-5  # of a float32 trace, over `Truth.scale`
LARGE_PAIR = 0.05  # of the largest coupling norm: the pairs whose errors count
GROUPS = {
    "query": "attention",
    "key": "attention",
    "value": "attention",
    "feed_forward": "feed_forward",
    "embedding": "embedding",
    "head": "head",
    "recurrent": "recurrent",
    "norm": "norm",
}


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        seeds: Of our traces.
        rival_runs: Of `MOST_PROBES` products each of PyHessian's, a component.
        rival_probes: Products a run.
        eigen_seeds: Of both eigenvalue estimators.
        side_by_side: Products that curvlinops takes at once (its memory grows with them).
        reference_products: At most, where there is no dense Hessian.
        coupling_seeds: Of coupling norms.
        coupled: The last so many components are paired; None: all that are measured.
        sequences: Drawn to see what PyHessian's stopping rules do.
        repeats: Of a timing that has no seeds.
        left_out: Components with this in their name are not measured; None: all that the subject
            chose are.
    """

    seeds: int = 30
    rival_runs: int = 30
    rival_probes: int = MOST_PROBES
    eigen_seeds: int = 10
    side_by_side: int = 8
    reference_products: int = 0
    coupling_seeds: int = 3
    coupled: int | None = None
    sequences: int = 2000
    repeats: int = 5
    left_out: str | None = None


QUICK = Effort(
    seeds=6, rival_runs=1, eigen_seeds=2, coupling_seeds=1, coupled=9, sequences=500, repeats=2
)


def effort_for(subject: Subject, samples: int) -> Effort:
    """Returns the effort that a model is worth; the large ones take hours otherwise."""
    if subject.dense:
        return Effort() if samples <= SIZES[0] else Effort(seeds=20, rival_runs=6, eigen_seeds=5)
    large = Effort(
        seeds=12,
        rival_runs=2,
        eigen_seeds=3,
        side_by_side=4,
        reference_products=96,
        coupling_seeds=1,
        repeats=3,
    )
    if samples > SIZES[0]:
        large = replace(
            large,
            seeds=8,
            rival_runs=1,
            rival_probes=40,
            eigen_seeds=2,
            side_by_side=2,
            reference_products=32,
            repeats=2,
        )
        if sum(p.numel() for p in subject.model.parameters()) > MANY_PARAMETERS:
            large = replace(
                large,
                seeds=6,
                rival_probes=24,
                eigen_seeds=1,
                reference_products=16,
                coupled=6,
                repeats=1,
                left_out="layer.0.",
            )
    return large


# --- ours ----------------------------------------------------------------------------------------


class CountingHessian(Hessian):
    """A Hessian that knows how many block products were taken."""

    products = 0

    def block_product(self, block: Any, v: Tensor) -> Tensor:
        """See `Hessian.block_product`."""
        self.products += 1
        return super().block_product(block, v)


class CountingForms:
    """`SampleForms` that know how often they were asked for; a time is one product."""

    def __init__(self, forms: SampleForms) -> None:
        self._forms = forms
        self.samples = forms.samples
        self.products = 0

    def forms(self, block: Any, vectors: Any) -> Tensor:
        """See `SampleForms.forms`."""
        self.products += 1
        return self._forms.forms(block, vectors)


@dataclass
class Ours:
    """One graph for all components, with the forms of its samples where they can be told apart."""

    hessian: CountingHessian
    forms: SampleForms | None

    @classmethod
    def of(cls, model: nn.Module, inputs: Tensor, targets: Tensor) -> Ours:
        """Builds everything that the components share."""
        parameters = parameters_of({"": model})
        hessian = CountingHessian(loss_of(model, inputs, targets), parameters, sites=True)
        generator = torch.Generator().manual_seed(0)
        return cls(hessian, SampleForms.of(hessian, generator, len(targets)))

    def covers(self, component: Component) -> bool:
        """Whether the component can have a random vector at every sample."""
        generator = torch.Generator().manual_seed(0)
        return self.forms is not None and self.forms.covers(component.parts, generator)


@dataclass(frozen=True)
class Traced:
    """What one estimate of ours gave and took."""

    value: float
    std_error: float | None
    products: int
    method: str


def ours_trace(
    ours: Ours,
    component: Component,
    covered: bool,
    generator: torch.Generator,
    ends: Ends | None = None,
    *,
    question: Question = FIVE_PERCENT,
    max_products: int = 32,
) -> Traced:
    """Estimates a component's trace, alone or (as a spectrum turn does) after both its ends."""
    forms = CountingForms(ours.forms) if covered and ours.forms is not None else None
    before = ours.hessian.products
    found = block_trace(
        ours.hessian,
        component.parts,
        generator,
        forms=[forms] if forms is not None else None,  # type: ignore[list-item]
        basis=None if ends is None else ends.basis,
        inside=None if ends is None else ends.inside,
        question=question,
        max_products=max_products,
    )
    products = ours.hessian.products - before + (forms.products if forms is not None else 0)
    return Traced(found.value, found.std_error, products, found.method)


# --- truth ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """The reference for one component; ``std_error`` is that of the trace, residual of the ends.

    ``deviation`` is the standard deviation of one Hutchinson product, known from the dense matrix:
    the root of twice the sum of squares off the diagonal.
    """

    trace: float
    std_error: float
    frobenius: float
    lambda_min: float
    lambda_max: float
    residual: float
    deviation: float | None
    source: str

    @property
    def scale(self) -> float:
        """What errors of the trace are related to."""
        return max(abs(self.trace), self.frobenius)


class DenseTruth:
    """Exact blocks of the Hessian in float64, by plain autograd on a copy of the model."""

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        twin = copy.deepcopy(model).double()
        self._parameters = parameters_of({"": twin})
        loss = loss_of(twin, inputs, targets)
        found = torch.autograd.grad(loss, list(self._parameters.values()), create_graph=True)
        self._gradient = dict(zip(self._parameters, found, strict=True))

    def __call__(self, component: Component) -> Truth:
        """Returns the truth about one component."""
        names = whole_parameters(component)
        inputs = [self._parameters[name] for name in names]
        rows = []
        for name in names:
            flat = self._gradient[name].reshape(-1)
            for k in range(flat.numel()):
                row = torch.autograd.grad(flat[k], inputs, retain_graph=True)
                rows.append(torch.cat([part.reshape(-1) for part in row]))
        matrix = torch.stack(rows)
        matrix = (matrix + matrix.T) / 2
        ends = torch.linalg.eigvalsh(matrix)
        off_diagonal = matrix - torch.diag(matrix.diagonal())
        return Truth(
            trace=float(matrix.trace()),
            std_error=0.0,
            frobenius=float(matrix.norm()),
            lambda_min=float(ends[0]),
            lambda_max=float(ends[-1]),
            residual=0.0,
            deviation=float(off_diagonal.norm()) * math.sqrt(2.0),
            source="dense float64",
        )

    def cross_norms(self, components: Sequence[Component]) -> dict[tuple[str, str], float]:
        """Returns the Frobenius norms of the cross blocks of all pairs, in the order given."""
        owners = [(c.name, name) for c in components for name in whole_parameters(c)]
        inputs = [self._parameters[name] for _, name in owners]
        squares: dict[tuple[str, str], float] = {}
        for a, name in owners:
            flat = self._gradient[name].reshape(-1)
            for k in range(flat.numel()):
                row = torch.autograd.grad(flat[k], inputs, retain_graph=True)
                for (b, _), part in zip(owners, row, strict=True):
                    squares[a, b] = squares.get((a, b), 0.0) + float(part.square().sum())
        order = [c.name for c in components]
        return {
            (a, b): math.sqrt(squares[a, b]) for i, a in enumerate(order) for b in order[i + 1 :]
        }


def long_run(ours: Ours, component: Component, covered: bool, products: int) -> Truth:
    """Returns a reference by long runs of ours, with seeds of its own."""
    generator = torch.Generator().manual_seed(10**6)
    size, parts = ours.hessian.size(component.parts), component.parts
    ends = extreme_eigenvalues(
        lambda v: ours.hessian.block_product(parts, v),
        size,
        generator,
        min_steps=min(24, size),
        max_steps=48,
        tolerance=1e-3,
    )
    traced = ours_trace(
        ours,
        component,
        covered,
        generator,
        ends,
        question=Question.within(0.0125),
        max_products=products,
    )
    squares = []
    for _ in range(8):
        z = torch.randint(2, (size,), generator=generator).float() * 2 - 1
        squares.append(float(ours.hessian.block_product(parts, z).double().square().sum()))
    residuals = [ends.lambda_min.std_error, ends.lambda_max.std_error]
    return Truth(
        trace=traced.value,
        std_error=math.nan if traced.std_error is None else traced.std_error,
        frobenius=math.sqrt(statistics.fmean(squares)),
        lambda_min=ends.lambda_min.value,
        lambda_max=ends.lambda_max.value,
        residual=max(math.nan if r is None else r for r in residuals),
        deviation=None,
        source=f"long run of {traced.products} products ({traced.method})",
    )


def with_rival(truth: Truth, probes: NDArray[np.float64]) -> Truth:
    """Returns the reference with a rival's products added, weighted by inverse variance."""
    error = float(probes.std(ddof=1)) / math.sqrt(probes.size)
    if not truth.std_error > 0.0 or error == 0.0:
        return truth
    ours, rival = truth.std_error**-2, error**-2
    return replace(
        truth,
        trace=(truth.trace * ours + float(probes.mean()) * rival) / (ours + rival),
        std_error=(ours + rival) ** -0.5,
        source=f"{truth.source} and {probes.size} of PyHessian",
    )


# --- rivals --------------------------------------------------------------------------------------


def whole_parameters(component: Component) -> list[str]:
    """Returns the parameters of a component; the rivals know no ranges of them."""
    assert all(part.dim is None for part in component.parts)
    return [part.parameter for part in component.parts]


@contextmanager
def pyhessian_of(
    model: nn.Module, inputs: Tensor, targets: Tensor, names: Sequence[str]
) -> Iterator[tuple[Any, float]]:
    """Yields PyHessian on a copy of the model in which only ``names`` require gradients.

    And the CPU seconds of its constructor.
    """
    from pyhessian import hessian

    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in names)
    with torch.random.fork_rng([]), warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        # It says that gradients with a graph make a reference cycle, which is broken below.
        warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
        yield timed(hessian, twin, F.cross_entropy, data=(inputs, targets), cuda=False)
    for parameter in twin.parameters():
        parameter.grad = None


def stops(probes: NDArray[np.float64], *, signed: bool) -> NDArray[np.int64]:
    """Returns after how many products PyHessian's rule stops, a row a sequence.

    The rule: two consecutive means differ by less than 0.1 % of the earlier one, plus 1e-6.

    Args:
        probes: (sequences, products) values of single products.
        signed: As published, where a negative mean always fulfils it; else of its magnitude.
    """
    means = np.cumsum(probes, 1) / np.arange(1, probes.shape[1] + 1)
    before = np.concatenate([np.zeros((len(probes), 1)), means[:, :-1]], 1)
    against = before if signed else np.abs(before)
    with np.errstate(divide="ignore", invalid="ignore"):
        met = np.abs(means - before) / (against + 1e-6) < RULE_TOLERANCE
    return np.where(met.any(1), met.argmax(1) + 1, probes.shape[1])


def rule(
    probes: NDArray[np.float64],
    truth: Truth,
    constructor: float,
    product: float,
    *,
    signed: bool,
    sequences: int,
) -> dict[str, Any]:
    """Returns what a stopping rule of PyHessian leads to, on drawn sequences of products."""
    drawn = np.random.default_rng(0).choice(probes.reshape(-1), (sequences, MOST_PROBES))
    counts = stops(drawn, signed=signed)
    values = np.cumsum(drawn, 1)[np.arange(sequences), counts - 1] / counts
    wrong = np.sign(values) != np.sign(truth.trace)
    return {
        "rms_error": rms(values, truth),
        "wrong_sign": float(wrong.mean()),
        "products_median": float(np.median(counts)),
        "products_mean": float(counts.mean()),
        "seconds": constructor + float(counts.mean()) * product,
    }


def curvlinops_trace(
    model: nn.Module, inputs: Tensor, targets: Tensor, names: Sequence[str], products: int
) -> dict[str, Any]:
    """Returns curvlinops's Hutchinson trace with its costs; what it said if it cannot."""
    try:
        import curvlinops
    except ImportError:
        return {"error": "curvlinops is not installed; pip install curvlinops-for-pytorch==3.0.1"}
    twin = copy.deepcopy(model)  # a failure in the middle leaves a recurrent layer without weights
    parameters = dict(twin.named_parameters())
    with torch.random.fork_rng([]), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(0)
        try:
            operator, constructor = timed(
                lambda: curvlinops.HessianLinearOperator(
                    twin,
                    nn.CrossEntropyLoss(),
                    [parameters[name] for name in names],
                    [(inputs, targets)],
                    check_deterministic=False,
                )
            )
            count = min(products, operator.shape[0] - 1)
            value, seconds = timed(curvlinops.hutchinson_trace, operator, count)
        except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
            return {"error": str(error).strip().partition("\n")[0][:200]}
    return {
        "value": float(value),
        "products": count,
        "constructor_seconds": constructor,
        "product_seconds": seconds / count,
    }


# --- one model and one number of samples ---------------------------------------------------------


def timed(work: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[Any, float]:
    """Returns what a call returns, and its CPU seconds."""
    start = time.process_time()
    found = work(*arguments, **named)
    return found, time.process_time() - start


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Returns the median CPU seconds of several goes."""
    return statistics.median(timed(work)[1] for _ in range(repeats))


def gradient_seconds(model: nn.Module, inputs: Tensor, targets: Tensor, repeats: int) -> float:
    """Returns the median CPU seconds of a forward and backward pass: one G."""
    wanted = list(model.parameters())
    work = lambda: torch.autograd.grad(loss_of(model, inputs, targets), wanted)  # noqa: E731
    work()
    return median_seconds(work, max(5, repeats))


def rms(values: Sequence[float] | NDArray[np.float64], truth: Truth) -> float:
    """Returns the root mean square error, without the part that the reference's own error has."""
    square = float(np.mean((np.asarray(values) - truth.trace) ** 2))
    return math.sqrt(max(square - truth.std_error**2, 0.0))


def floors(model: nn.Module, inputs: Tensor, components: Sequence[Component]) -> dict[str, float]:
    """Returns the least cost of a product with each component's block, in gradients."""
    before: dict[str, float] = {}
    handles = []
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:

        def note(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                before.setdefault(name, counter.get_total_flops())

            return hook

        modules = dict(model.named_modules())
        for component in components:
            owner = component.parts[0].parameter.rpartition(".")[0]
            handles.append(modules[owner].register_forward_pre_hook(note(component.name)))
        model(inputs)
        total = counter.get_total_flops()
    for handle in handles:
        handle.remove()
    return {name: 2.0 * (total - start) / (3.0 * total) for name, start in before.items()}


def measure_ours(
    ours: Ours, component: Component, covered: bool, truth: Truth, effort: Effort
) -> dict[str, dict[str, Any]]:
    """Returns error and cost of the trace alone, of both ends, and of the trace after them."""
    alone: list[Traced] = []
    after: list[Traced] = []
    wrong, products = [], []
    seconds: dict[str, list[float]] = {"alone": [], "ends": [], "after_ends": []}
    for seed in range(effort.seeds):
        generator = torch.Generator().manual_seed(seed)
        traced, took = timed(ours_trace, ours, component, covered, generator)
        alone.append(traced)
        seconds["alone"].append(took)
        ends, took = timed(block_eigenvalues, ours.hessian, component.parts, generator)
        wrong.append(
            max(
                abs(ends.lambda_min.value - truth.lambda_min),
                abs(ends.lambda_max.value - truth.lambda_max),
            )
        )
        products.append(ends.products)
        seconds["ends"].append(took)
        traced, took = timed(ours_trace, ours, component, covered, generator, ends)
        after.append(traced)
        seconds["after_ends"].append(took)
    return {
        "alone": trace_row(alone, seconds["alone"], truth),
        "after_ends": trace_row(after, seconds["after_ends"], truth),
        "ends": ends_row(wrong, seconds["ends"], truth) | {"products": statistics.median(products)},
    }


def trace_row(found: Sequence[Traced], seconds: Sequence[float], truth: Truth) -> dict[str, Any]:
    """Returns error and cost of one way to estimate a trace, over its seeds."""
    values = [traced.value for traced in found]
    errors = [math.nan if t.std_error is None else t.std_error for t in found]
    variance = float(np.var(values, ddof=1)) / len(values) + truth.std_error**2
    mean_error = math.sqrt(variance + (ROUNDING * truth.scale) ** 2)
    bias = statistics.fmean(values) - truth.trace
    return {
        "value": statistics.fmean(values),
        "rms_error": rms(values, truth),
        "std_error": math.sqrt(statistics.fmean(e * e for e in errors)),
        "bias_in_std_errors": bias / mean_error if mean_error > 0.0 else 0.0,
        "products": statistics.median(traced.products for traced in found),
        "methods": {m: [t.method for t in found].count(m) for m in {t.method for t in found}},
        "seconds": statistics.median(seconds),
    }


def ends_row(wrong: Sequence[float], seconds: Sequence[float], truth: Truth) -> dict[str, Any]:
    """Returns error, relative to the largest magnitude of an eigenvalue, and cost of ends."""
    largest = max(abs(truth.lambda_min), abs(truth.lambda_max))
    return {
        "error_median": statistics.median(wrong) / largest if largest else None,
        "error_worst": max(wrong) / largest if largest else None,
        "seconds": statistics.median(seconds),
    }


def measure_pyhessian_end(rival: Any, truth: Truth, effort: Effort) -> dict[str, Any]:
    """Returns error and cost of the one end that PyHessian has: that of largest magnitude."""
    extreme = max(truth.lambda_min, truth.lambda_max, key=abs)
    wrong, seconds = [], []
    for seed in range(effort.eigen_seeds):
        torch.manual_seed(seed)
        (values, _), took = timed(rival.eigenvalues)
        wrong.append(abs(float(values[0]) - extreme))
        seconds.append(took)
    return ends_row(wrong, seconds, truth)


def measure(subject: Subject, samples: int, effort: Effort) -> dict[str, Any]:
    """Measures one model on one number of samples."""
    inputs, targets = subject.probe_set(samples)
    model = subject.model
    every = split_components({"": model})
    components = [c for c in every if subject.chosen is None or subject.chosen(c.name)]
    if effort.left_out is not None:
        components = [c for c in components if effort.left_out not in c.name]
    G = gradient_seconds(model, inputs, targets, effort.repeats)
    shared = median_seconds(lambda: Ours.of(model, inputs, targets), effort.repeats)
    floor = floors(model, inputs, every)
    ours = Ours.of(model, inputs, targets)
    dense = DenseTruth(model, inputs, targets) if subject.dense else None
    rows: dict[str, Any] = {}
    for component in components:
        say(f"  {component.name}")
        covered, check = timed(ours.covers, component)
        truth = (
            dense(component)
            if dense is not None
            else long_run(ours, component, covered, effort.reference_products)
        )
        names = whole_parameters(component)
        with pyhessian_of(model, inputs, targets, names):
            pass  # a first time, which is always slower
        with pyhessian_of(model, inputs, targets, names) as (rival, constructor):
            runs, took = [], []
            for seed in range(effort.rival_runs):
                torch.manual_seed(1000 + seed)
                values, seconds = timed(rival.trace, maxIter=effort.rival_probes, tol=-math.inf)
                runs.append(values)
                took.append(seconds / effort.rival_probes)
            probes, product = np.array(runs), statistics.median(took)
            if dense is None:
                truth = with_rival(truth, probes)
            end = measure_pyhessian_end(rival, truth, effort)
        del rival
        gc.collect()
        own = measure_ours(ours, component, covered, truth, effort)
        rows[component.name] = {
            "kind": component.kind,
            "group": group_of(component),
            "elements": component.elements,
            "truth": {**asdict(truth), "scale": truth.scale},
            "ours": {"check_seconds": check, **own},
            "pyhessian": {
                "constructor_seconds": constructor,
                "product_seconds": product,
                "deviation": float(probes.std(ddof=1)),
                "mean": float(probes.mean()),
                "products_taken": int(probes.size),
                **{
                    name: rule(
                        probes,
                        truth,
                        constructor,
                        product,
                        signed=signed,
                        sequences=effort.sequences,
                    )
                    for name, signed in (("published", True), ("repaired", False))
                },
                "end": end,
            },
            "curvlinops": curvlinops_trace(model, inputs, targets, names, effort.side_by_side),
            "product_gradients": product_costs(ours, component, covered, effort, G)
            | {"floor": floor[component.name]},
        }
    for row in rows.values():
        row["equal_error"] = {
            which: equal_error(row, which, shared / len(every), effort.seeds) for which in WAYS
        }
    coupling = measure_coupling(ours, components, dense, effort, G)
    return {
        "model": subject.name,
        "samples": samples,
        "parameters": sum(p.numel() for p in model.parameters()),
        "components": len(every),
        "components_measured": len(components),
        "training_steps": subject.steps,
        "training_losses": list(subject.losses),
        "effort": asdict(effort),
        "gradient_seconds": G,
        "shared_seconds": shared,
        "by_component": rows,
        "by_group": summarise(rows, G),
        "coupling": coupling,
    }


def product_costs(
    ours: Ours, component: Component, covered: bool, effort: Effort, G: float
) -> dict[str, float | None]:
    """Returns what a product costs with a vector for all samples, and with one a sample."""
    size, like = ours.hessian.size(component.parts), ours.hessian.like(component.parts)
    v = torch.ones(size, dtype=like.dtype)
    generator = torch.Generator().manual_seed(0)
    shared = median_seconds(
        lambda: ours.hessian.block_product(component.parts, v), max(3, effort.repeats)
    )
    if not covered or ours.forms is None:
        return {"measured": shared / G, "per_sample": None}
    forms = ours.forms
    own = median_seconds(
        lambda: forms.forms(component.parts, RandomSigns(ours.hessian, component.parts, generator)),
        max(3, effort.repeats),
    )
    return {"measured": shared / G, "per_sample": own / G}


def group_of(component: Component) -> str:
    """Returns the group of kinds that a component is summed up in."""
    if component.kind.startswith("attention_"):
        return "attention"
    return GROUPS.get(component.kind, "other")


def equal_error(
    row: dict[str, Any], which: str, share: float, seeds: int
) -> dict[str, float | None]:
    """Returns the seconds of everybody at our error; the formulas stand at the top of the file.

    Args:
        row: All that was measured of the component.
        which: Way of ours: a key of `WAYS`.
        share: What all components share, divided by their number.
        seeds: Behind our error.
    """
    ours, rival, other = row["ours"][which], row["pyhessian"], row["curvlinops"]
    truth = row["truth"]
    error = max(
        ours["rms_error"] * math.sqrt(seeds / (seeds - 2)),
        CREDIT * truth["scale"],
        truth["std_error"],
    )
    count, scaled = 1.0, {name: rival[name]["seconds"] for name in ("published", "repaired")}
    if error > 0.0:  # else a block that is zero, as the first product says
        count = min(float(row["elements"]), max(1.0, (rival["deviation"] / error) ** 2))
        exact = rival["constructor_seconds"] + row["elements"] * rival["product_seconds"]
        scaled = {
            name: min(exact, seconds * (rival[name]["rms_error"] / error) ** 2)
            for name, seconds in scaled.items()
        }
    own = row["ours"]["check_seconds"] + ours["seconds"]
    return {
        "error": error,
        "ours": share + own,
        "ours_products_only": own,
        "fixed": rival["constructor_seconds"] + count * rival["product_seconds"],
        "fixed_products_only": count * rival["product_seconds"],
        "fixed_products": count,
        **scaled,
        "curvlinops": None
        if "error" in other
        else other["constructor_seconds"] + count * other["product_seconds"],
    }


def summarise(rows: dict[str, Any], G: float) -> dict[str, Any]:
    """Sums costs up by group of kinds and over all components measured."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows.values():
        groups.setdefault(row["group"], []).append(row)
        groups.setdefault("all", []).append(row)
    return {
        name: {"components": len(members)}
        | {which: ratios([row["equal_error"][which] for row in members], G) for which in WAYS}
        | {"ends": ends_ratio(members, G), "spectrum_ratio": spectrum_ratio(members)}
        for name, members in groups.items()
    }


def ratios(costs: Sequence[dict[str, Any]], G: float) -> dict[str, Any]:
    """Returns the rivals' costs of traces over ours, each summed over components."""

    def total(key: str, among: Sequence[dict[str, Any]] = costs) -> float:
        return math.fsum(cost[key] for cost in among)

    able = [cost for cost in costs if cost["curvlinops"] is not None]
    each = np.quantile([cost["fixed"] / cost["ours"] for cost in costs], (0, 0.5, 1))
    return {
        "ours_gradients": total("ours") / G,
        "pyhessian_fixed_gradients": total("fixed") / G,
        "fixed": total("fixed") / total("ours"),
        "fixed_products_only": total("fixed_products_only") / total("ours_products_only"),
        "published": total("published") / total("ours"),
        "repaired": total("repaired") / total("ours"),
        "curvlinops": total("curvlinops", able) / total("ours", able) if able else None,
        "fixed_by_component": dict(zip(("worst", "median", "best"), each.tolist(), strict=True)),
    }


def ends_ratio(members: Sequence[dict[str, Any]], G: float) -> dict[str, float]:
    """Returns what PyHessian's one end costs over both of ours."""
    ours = math.fsum(row["ours"]["ends"]["seconds"] for row in members)
    rival = math.fsum(row["pyhessian"]["end"]["seconds"] for row in members)
    return {"ours_gradients": ours / G, "pyhessian_gradients": rival / G, "ratio": rival / ours}


def spectrum_ratio(members: Sequence[dict[str, Any]]) -> float:
    """Returns PyHessian's trace at equal error and one end, over our ends and trace after them."""
    costs = [(row, row["equal_error"]["after_ends"]) for row in members]
    ours = math.fsum(cost["ours"] + row["ours"]["ends"]["seconds"] for row, cost in costs)
    rival = math.fsum(cost["fixed"] + row["pyhessian"]["end"]["seconds"] for row, cost in costs)
    return rival / ours


# --- coupling ------------------------------------------------------------------------------------


def measure_coupling(
    ours: Ours, components: Sequence[Component], dense: DenseTruth | None, effort: Effort, G: float
) -> dict[str, Any]:
    """Returns error and cost of the norms of all cross blocks, which no rival has.

    Bases come from the runs that both ends need; they are timed apart. Errors are those of pairs
    that have at least `LARGE_PAIR` of the largest norm. Without a dense Hessian there is only the
    error that the estimator reports.
    """
    say("  coupling")
    chosen = list(components)
    if effort.coupled is not None:
        chosen = chosen[-effort.coupled :]
    exact = None if dense is None else dense.cross_norms(chosen)
    errors: list[float] = []
    reported: list[float] = []
    covered: list[bool] = []
    seconds, base_seconds = [], []
    for seed in range(effort.coupling_seeds):
        generator = torch.Generator().manual_seed(seed)
        start = time.process_time()
        bases = {
            c.name: block_eigenvalues(ours.hessian, c.parts, generator).dominant(COLUMNS // 2)
            for c in chosen
        }
        base_seconds.append(time.process_time() - start)
        found, took = timed(
            coupling_norms, ours.hessian, chosen, generator, bases=bases, columns=COLUMNS
        )
        seconds.append(took)
        largest = max(estimate.value for estimate in found.values())
        for pair, estimate in found.items():
            error = math.nan if estimate.std_error is None else estimate.std_error
            truth = exact[pair] if exact is not None else estimate.value
            if truth < LARGE_PAIR * largest:
                continue
            reported.append(error / truth)
            if exact is not None:
                errors.append((estimate.value - truth) / truth)
                covered.append(abs(estimate.value - truth) <= 1.96 * error + 1e-5 * truth)
    took = statistics.median(seconds)
    return {
        "components": len(chosen),
        "columns_a_component": COLUMNS,
        "pairs": len(reported) // effort.coupling_seeds,
        "relative_rms_error": math.sqrt(statistics.fmean(e * e for e in errors))
        if errors
        else None,
        "relative_std_error": math.sqrt(statistics.fmean(e * e for e in reported)),
        "coverage": statistics.fmean(covered) if covered else None,
        "gradients": took / G,
        "gradients_a_component": took / G / len(chosen),
        "gradients_a_column": took / G / len(chosen) / COLUMNS,
        "bases_gradients": statistics.median(base_seconds) / G,
    }


# --- memory, in processes of their own -----------------------------------------------------------


def memory_of(who: str, name: str, samples: int) -> dict[str, float | None]:
    """Runs one gradient, or one trace and both ends of the costliest component, and nothing else.

    Meant for a fresh process. The component is the one with most elements, and the first.
    """
    subject = SUBJECTS[name]()
    inputs, targets = subject.probe_set(samples)
    model = subject.model
    components = split_components({"": model})
    chosen = (components[0], max(components, key=lambda c: c.elements))
    forget_peak()
    start = resident_mb(peak=False)
    if who == "gradient":
        for _ in range(2):
            loss_of(model, inputs, targets).backward()
    elif who == "ours":
        ours = Ours.of(model, inputs, targets)
        for component in chosen:
            generator = torch.Generator().manual_seed(0)
            ours_trace(ours, component, ours.covers(component), generator, max_products=8)
            block_eigenvalues(ours.hessian, component.parts, generator)
    elif who == "pyhessian":
        for component in chosen:
            names = whole_parameters(component)
            with pyhessian_of(model, inputs, targets, names) as (rival, _):
                rival.trace(maxIter=8, tol=-math.inf)
                rival.eigenvalues()
    elif who == "curvlinops":
        for component in chosen:
            names = whole_parameters(component)
            said = curvlinops_trace(model, inputs, targets, names, 2)
            if "error" in said:
                raise SystemExit(said["error"])
    peak = resident_mb(peak=True)
    extra = None if peak is None or start is None else peak - start
    return {"start_mb": start, "extra_mb": extra}


def measure_memory(name: str, samples: int, quick: bool) -> dict[str, Any]:
    """Returns the extra memory of each, in megabytes, and over that of a plain gradient."""
    found: dict[str, Any] = {}
    for who in ("gradient", "ours") + (() if quick else ("pyhessian", "curvlinops")):
        say(f"  memory of {who}")
        arguments = [sys.executable, "-m", "benchmarks.curvature_cost", "--memory", who]
        done = subprocess.run(
            [*arguments, name, str(samples)],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[1],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
        if done.returncode != 0:
            found[who] = {"error": (done.stderr.strip().splitlines() or ["it died"])[-1][:200]}
        else:
            found[who] = json.loads(done.stdout.splitlines()[-1])
    plain = found["gradient"].get("extra_mb")
    for who, row in found.items():
        if who != "gradient" and plain and row.get("extra_mb") is not None:
            row["over_gradient"] = row["extra_mb"] / plain
    return found


# --- how cost grows ------------------------------------------------------------------------------


def full_measurement(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Returns the CPU seconds of traces and both ends of all components, and of one gradient."""
    G = gradient_seconds(model, inputs, targets, 3)
    components = split_components({"": model})
    generator = torch.Generator().manual_seed(0)
    ours, shared = timed(Ours.of, model, inputs, targets)
    traces = ends = 0.0
    for component in components:
        covered, check = timed(ours.covers, component)
        found, took = timed(block_eigenvalues, ours.hessian, component.parts, generator)
        ends += took
        _, took = timed(ours_trace, ours, component, covered, generator, found)
        traces += check + took
    total = shared + traces + ends
    return {
        "components": len(components),
        "gradient_seconds": G,
        "seconds": total,
        "gradients": total / G,
        "gradients_a_component": total / G / len(components),
        "shared_gradients": shared / G,
        "traces_gradients": traces / G,
        "ends_gradients": ends / G,
    }


def measure_scaling(quick: bool) -> list[dict[str, Any]]:
    """Returns a row a point: what a full measurement costs by components, batch and length."""
    axes = {
        "layers": (0, 1) if quick else (0, 1, 2, 4, 6, 8),  # 4 to 68 components
        "samples": (8, 32) if quick else (8, 16, 32, 64, 128, 256),
        "length": (16, 32) if quick else (16, 32, 64, 128, 256),
    }
    rows = []
    for axis, values in axes.items():
        for value in values:
            say(f"  scaling: {axis} {value}")
            point = {"layers": 2, "samples": 32, "length": 12} | {axis: value}
            subject = make_tiny_transformer(point["length"], point["layers"])
            row = full_measurement(subject.model, *subject.probe_set(point["samples"]))
            rows.append({"axis": axis, **point, **row})
    return rows


def scaling_plot(rows: Sequence[dict[str, Any]]) -> str:
    """Returns an SVG image: gradients-worth of a full measurement, one panel an axis."""
    labels = {"layers": "components", "samples": "samples", "length": "tokens a sample"}
    top = max(row["gradients"] for row in rows) * 1.2
    low = min(row["gradients"] for row in rows) / 1.2
    panels = []
    for k, (axis, label) in enumerate(labels.items()):
        own = [row for row in rows if row["axis"] == axis]
        values = [row["components"] if axis == "layers" else row[axis] for row in own]
        span = math.log(max(values) / min(values))
        points = [
            (
                60 + 250 * k + 190 * math.log(value / min(values)) / span,
                170 - 140 * math.log(row["gradients"] / low) / math.log(top / low),
            )
            for value, row in zip(values, own, strict=True)
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        panels.append(f'<polyline points="{path}" fill="none" stroke="#3b528b" stroke-width="2"/>')
        for (x, y), value, row in zip(points, values, own, strict=True):
            panels.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#3b528b"/>')
            panels.append(f'<text x="{x:.1f}" y="{y - 8:.1f}">{row["gradients"]:.0f}</text>')
            panels.append(f'<text x="{x:.1f}" y="190">{value}</text>')
        panels.append(f'<text x="{155 + 250 * k}" y="208" font-weight="bold">{label}</text>')
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 220" font-family="sans-serif" '
        'font-size="10" text-anchor="middle">\n<rect width="780" height="220" fill="#fff"/>\n'
        '<text x="390" y="14" font-size="12">Traces and both ends of every component of a small '
        "transformer, in gradients (both axes logarithmic)</text>\n"
        + "\n".join(panels)
        + "\n</svg>\n"
    )


def measure_base() -> dict[str, Any]:
    """Returns time and memory of a measurement on DistilBERT-base (66 M), 8 samples of 64 tokens.

    A trace of at most 8 products and both ends of every component; meant for a fresh process.
    """
    model = distilbert_base()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(30000, (8, 64), generator=generator)
    targets = torch.randint(4, (8,), generator=generator)
    forget_peak()
    start = resident_mb(peak=False)
    G = gradient_seconds(model, inputs, targets, 3)
    plain = resident_mb(peak=True)
    ours, shared = timed(Ours.of, model, inputs, targets)
    traces = ends = 0.0
    components = split_components({"": model})
    for component in components:
        say(f"  {component.name}")
        covered, check = timed(ours.covers, component)
        found, took = timed(block_eigenvalues, ours.hessian, component.parts, generator)
        ends += took
        _, took = timed(ours_trace, ours, component, covered, generator, found, max_products=8)
        traces += check + took
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "components": len(components),
        "gradient_seconds": G,
        "shared_gradients": shared / G,
        "traces_gradients": traces / G,
        "ends_gradients": ends / G,
        "start_mb": start,
        "gradient_peak_mb": plain,
        "peak_mb": resident_mb(peak=True),
    }


# --- all of it -----------------------------------------------------------------------------------


def say(text: str) -> None:
    """Tells how far it is."""
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """Returns what the figures were measured on, and with."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "pyhessian", "curvlinops-for-pytorch", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "machine": {
            "architecture": platform.machine(),
            "system": platform.system(),
            "cpus": os.cpu_count(),
            "threads_used": torch.get_num_threads(),
        },
        "versions": versions,
        "seeds": "training 0, probe set 1, ours 0.., PyHessian 1000.., reference 1000000",
    }


def rounded(value: Any) -> Any:
    """Returns the same with every number at four significant digits; not finite becomes null."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def run(
    out: Path,
    *,
    models: Sequence[str] = tuple(SUBJECTS),
    sizes: Sequence[int] = SIZES,
    quick: bool = False,
    large: bool = False,
    fresh: bool = False,
) -> dict[str, Any]:
    """Measures what is not in the file yet, and writes the file after each part."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if out.exists() and not fresh:
        found = json.loads(out.read_text(encoding="utf-8"))
    found |= machine()

    def keep(*path: str, value: Any) -> None:
        place = found
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = rounded(value)
        out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    for name in models:
        missing = [n for n in sizes if f"{name}/{n}" not in found.get("sections", {})]
        if not missing:
            continue
        say(f"{name}: training")
        subject = SUBJECTS[name]()
        for samples in missing:
            say(f"{name}, {samples} samples")
            effort = QUICK if quick else effort_for(subject, samples)
            section, took = timed(measure, subject, samples, effort)
            section["memory"] = measure_memory(name, samples, quick)
            section["took_seconds"] = took
            keep("sections", f"{name}/{samples}", value=section)
    if "scaling" not in found:
        keep("scaling", value=measure_scaling(quick))
    out.with_name("curvature_scaling.svg").write_text(
        scaling_plot(found["scaling"]), encoding="utf-8"
    )
    if large and "distilbert_base" not in found:
        keep("distilbert_base", value=measure_base())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", default=list(SUBJECTS), help="which; all by default")
    parser.add_argument("--samples", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a small version, under a minute")
    parser.add_argument("--large", action="store_true", help="DistilBERT-base too")
    parser.add_argument("--fresh", action="store_true", help="forget the results there are")
    parser.add_argument("--memory", nargs=1, metavar="WHO", help="for its own child processes")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.quick and given.out == RESULTS:
        parser.error("--quick needs --out: its figures are not for the results")
    if given.memory:
        name, samples = given.models
        print(json.dumps(memory_of(given.memory[0], name, int(samples))))
        return
    models, sizes = (["tiny_transformer"], [32]) if given.quick else (given.models, given.samples)
    run(
        given.out,
        models=models,
        sizes=sizes,
        quick=given.quick,
        large=given.large,
        fresh=given.fresh,
    )


if __name__ == "__main__":
    main()
