from __future__ import annotations

import math
import statistics

import pytest
import torch
from curvature_subjects import (
    TinyHAN,
    TinyTransformer,
    build,
    component,
    dense,
    loss_of,
    positions,
    transformer_components,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diagnoser.components import split_components
from diagnoser.curvature import Hessian, extreme_eigenvalues
from diagnoser.curvature.coupling import coupling_norm, coupling_norms
from diagnoser.errors import MeasurementError
from diagnoser.types import Part


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Stack(nn.Module):
    """Two pre-LN layers with separate projections: 17 components, 765 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 6)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(6),
                    "query": nn.Linear(6, 6),
                    "key": nn.Linear(6, 6),
                    "value": nn.Linear(6, 6),
                    "out": nn.Linear(6, 6),
                    "up": nn.Linear(6, 12),
                    "down": nn.Linear(12, 6),
                }
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            y = layer["norm"](x)
            scores = layer["query"](y) @ layer["key"](y).transpose(1, 2) * 6**-0.5
            x = x + layer["out"](scores.softmax(-1) @ layer["value"](y))
            x = x + layer["down"](F.gelu(layer["up"](x)))
        return self.head(self.norm(x).mean(1))


def trained() -> tuple[nn.Module, Tensor]:
    """Returns a model that has learnt which third of the words is most frequent, and its loss."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Stack().double()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for step in range(41):
            tokens = torch.randint(0, 8, (24, 6))
            targets = F.one_hot(tokens % 3, 3).sum(1).argmax(1)
            loss = F.cross_entropy(model(tokens), targets)
            optimizer.zero_grad()
            loss.backward(retain_graph=True)
            if step < 40:
                optimizer.step()
    return model, loss


class Subject:
    """A Hessian operator, its components, and the exact norms of their pairs."""

    def __init__(self, model, loss, components) -> None:
        parameters = dict(model.named_parameters())
        self.components = components
        self.hessian = Hessian(loss, parameters)
        H = dense(loss, parameters)
        at = {c.name: positions(c.parts, parameters) for c in components}
        self.blocks = {c.name: H[at[c.name]][:, at[c.name]] for c in components}
        self.exact = {
            (a.name, b.name): float(H[at[a.name]][:, at[b.name]].norm())
            for i, a in enumerate(components)
            for b in components[i + 1 :]
        }

    def runs(self, count, **arguments):
        return [
            coupling_norms(self.hessian, self.components, seeded(seed), **arguments)
            for seed in range(count)
        ]

    def relative_errors(self, runs):
        """Of the pairs of at least 5 % of the largest."""
        largest = max(self.exact.values())
        return [
            found[pair].value / truth - 1.0
            for found in runs
            for pair, truth in self.exact.items()
            if truth >= 0.05 * largest
        ]


@pytest.fixture(scope="module")
def transformer():
    model = build(TinyTransformer)
    with sdpa_kernel(SDPBackend.MATH):
        return Subject(model, loss_of(model), transformer_components())


@pytest.fixture(scope="module")
def han():
    model = build(TinyHAN, packed=False)
    return Subject(model, loss_of(model), list(split_components({"": model})))


@pytest.fixture(scope="module")
def stack():
    model, loss = trained()
    return Subject(model, loss, list(split_components({"": model})))


@pytest.fixture(scope="module")
def bases(stack):
    return {
        name: extreme_eigenvalues(
            block.__matmul__, len(block), seeded(0), max_steps=8, dtype=torch.float64
        ).dominant(4)
        for name, block in stack.blocks.items()
    }


@pytest.fixture(scope="module")
def stack_runs(stack, bases):
    return stack.runs(4, bases=bases)


def rms(errors):
    return math.sqrt(statistics.fmean(e * e for e in errors))


def test_a_component_of_no_more_elements_than_columns_is_exact(transformer):
    found = coupling_norms(transformer.hessian, transformer.components, seeded(0), columns=28)
    assert list(found) == list(transformer.exact)
    for pair, truth in transformer.exact.items():
        assert found[pair].value == pytest.approx(truth, rel=1e-9, abs=1e-15)
        assert (found[pair].std_error, found[pair].method) == (0.0, "exact")
    # One side is enough: the norm has eight elements.
    some = coupling_norms(transformer.hessian, transformer.components, seeded(0))
    for pair, estimate in some.items():
        assert (estimate.method == "exact") == ("norm" in pair)
        assert estimate.samples == (None if "norm" in pair else 8)
        if "norm" in pair:
            assert estimate.value == pytest.approx(transformer.exact[pair], rel=1e-9)


def test_eight_columns_a_component_give_five_percent(transformer, han, stack, stack_runs):
    for subject, runs in (
        (transformer, transformer.runs(4)),
        (han, han.runs(4)),
        (stack, stack_runs),
    ):
        errors = subject.relative_errors(runs)
        assert statistics.median(abs(e) for e in errors) <= 0.02
        assert rms(errors) <= 0.035


def test_the_interval_covers_the_truth_as_often_as_it_says(stack, stack_runs):
    distances = [
        abs(found[pair].value - truth) / found[pair].std_error
        for found in stack_runs
        for pair, truth in stack.exact.items()
        if found[pair].std_error
    ]
    assert len(distances) > 400
    covered = statistics.fmean(d <= 1.96 for d in distances)
    assert 0.9 <= covered <= 0.99


def test_columns_of_both_blocks_tell_more_than_those_of_one(stack, stack_runs, bases):
    one_sided = []
    largest = max(stack.exact.values())
    for i, b in enumerate(stack.components):
        others = stack.components[:i]
        found = coupling_norm(stack.hessian, b.parts, others, seeded(i), basis=bases[b.name])
        assert list(found) == [a.name for a in others]
        one_sided += [
            found[a.name].value / stack.exact[a.name, b.name] - 1.0
            for a in others
            if stack.exact[a.name, b.name] >= 0.05 * largest
        ]
    assert rms(stack.relative_errors(stack_runs)) < 0.7 * rms(one_sided)
    assert rms(one_sided) < 0.1


def test_the_square_is_unbiased_and_a_frame_is_a_sample_without_replacement():
    H = torch.randn(24, 24, generator=seeded(1), dtype=torch.float64)
    hessian, halves = two_blocks(H + H.T)
    truth = float((H + H.T)[:12, 12:].norm())
    bases = {c.name: torch.eye(12, dtype=torch.float64)[:3] for c in halves}
    found = [
        coupling_norms(hessian, halves, seeded(seed), bases=bases, columns=6)["a", "b"]
        for seed in range(300)
    ]
    squares = [e.value**2 for e in found]
    error = statistics.stdev(squares) / math.sqrt(len(squares))
    assert abs(statistics.fmean(squares) - truth**2) < 4 * error
    # Without Student's factor (4 degrees of freedom) the variance is what the errors claim.
    claimed = statistics.fmean((e.std_error * 1.96 / 2.776) ** 2 for e in found)
    assert statistics.variance(e.value for e in found) == pytest.approx(claimed, rel=0.25)


def two_blocks(*matrices: Tensor):
    size = len(matrices[0])
    theta = nn.Parameter(torch.ones(size, dtype=torch.float64))
    hessian = Hessian([0.5 * theta @ A @ theta for A in matrices], {"theta": theta})
    half = size // 2
    return hessian, [
        component("a", Part("theta", 0, 0, half)),
        component("b", Part("theta", 0, half, half)),
    ]


def test_bases_given_cost_no_product_beside_the_columns(stack, bases, monkeypatch):
    taken = {"column": 0, "block_product": 0}
    for name in taken:
        whole = getattr(Hessian, name)

        def counting(*arguments, name=name, whole=whole):
            taken[name] += 1
            return whole(*arguments)

        monkeypatch.setattr(Hessian, name, counting)
    found = coupling_norms(stack.hessian, stack.components, seeded(0), bases=bases)
    assert taken == {"column": 8 * len(stack.components), "block_product": 0}
    assert rms(stack.relative_errors([found])) < 0.035
    # A basis need not be orthonormal.
    skew = {name: 3.0 * basis + basis.roll(1, 0) for name, basis in bases.items()}
    again = coupling_norms(stack.hessian, stack.components, seeded(0), bases=skew)
    assert rms(stack.relative_errors([again])) < 0.035


def test_what_is_not_coupled_has_zero_norm_without_doubt():
    a, b, c = (nn.Parameter(torch.ones(12, dtype=torch.float64)) for _ in range(3))
    frozen = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
    loss = (a**3).sum() + (b**3).sum() + (b * frozen.sum()).sum()
    hessian = Hessian(loss, {"a": a, "b": b, "c": c, "frozen": frozen})
    parts = [component(name, Part(name)) for name in ("a", "b", "c", "frozen")]
    for estimate in coupling_norms(hessian, parts, seeded(0)).values():
        assert (estimate.value, estimate.std_error) == (0.0, 0.0)
    one = coupling_norm(hessian, (Part("a"),), parts[1:], seeded(0))
    assert [e.value for e in one.values()] == [0.0] * 3
    assert coupling_norms(hessian, parts[:1], seeded(0)) == {}


def test_chunks_give_the_error_that_other_samples_would_make():
    matrices = [torch.randn(12, 12, generator=seeded(s), dtype=torch.float64) for s in range(5)]
    matrices = [3.0 + A + A.T for A in matrices]
    blocks = torch.stack([A[:6, 6:] for A in matrices])
    mean = blocks.mean(0)
    parts = [float((mean * block).sum() / mean.norm()) for block in blocks]
    hessian, halves = two_blocks(*matrices)
    exact = coupling_norms(hessian, halves, seeded(0))["a", "b"]
    assert exact.value == pytest.approx(float(mean.norm()))
    assert exact.batch_std_error == pytest.approx(statistics.stdev(parts) / math.sqrt(5))
    sampled = coupling_norms(hessian, halves, seeded(0), columns=4)["a", "b"]
    assert abs(sampled.value - exact.value) < 4 * sampled.std_error
    assert sampled.batch_std_error == pytest.approx(exact.batch_std_error, rel=0.5)
    hessian, halves = two_blocks(matrices[0])
    assert coupling_norms(hessian, halves, seeded(0))["a", "b"].batch_std_error is None


def test_single_precision_is_enough():
    model = build(TinyTransformer)
    small = build(TinyTransformer, dtype=torch.float32)
    found, coarse = (
        coupling_norms(
            Hessian(loss_of(m), dict(m.named_parameters())), transformer_components(), seeded(0)
        )
        for m in (model, small)
    )
    for pair, estimate in found.items():
        assert coarse[pair].value == pytest.approx(estimate.value, rel=1e-3)
        assert (estimate.dtype, coarse[pair].dtype) == ("float64", "float32")


def test_the_same_seed_gives_the_same_norms_and_touches_no_other_stream(transformer):
    state = torch.random.get_rng_state()
    first, again, other = (
        coupling_norms(transformer.hessian, transformer.components, seeded(seed))
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_failure_says_what_to_do():
    hessian, halves = two_blocks(torch.eye(24, dtype=torch.float64))
    with pytest.raises(MeasurementError, match="need 3"):
        coupling_norms(hessian, halves, seeded(0), columns=2)
    with pytest.raises(MeasurementError, match="same name"):
        coupling_norms(hessian, [halves[0], halves[0]], seeded(0))
    with pytest.raises(MeasurementError, match="one vector a row"):
        coupling_norms(hessian, halves, seeded(0), bases={"a": torch.eye(5)})
    hessian, halves = two_blocks(torch.full((24, 24), math.nan, dtype=torch.float64))
    eye = torch.eye(12, dtype=torch.float64)
    for arguments in ({}, {"bases": {"a": eye, "b": eye}}, {"columns": 12}):
        with pytest.raises(MeasurementError, match="not finite"):
            coupling_norms(hessian, halves, seeded(0), **arguments)
