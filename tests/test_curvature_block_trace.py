"""The trace of a block by the estimator that suits it, against the dense Hessian in float64."""

from __future__ import annotations

import math

import pytest
import torch
from curvature_subjects import TinyTransformer, build, dense, loss_of, positions
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diagnoser.components import layers_of, split_components
from diagnoser.curvature import Hessian, block_eigenvalues, forms_of
from diagnoser.curvature.block_trace import block_trace
from diagnoser.curvature.decision import Question
from diagnoser.curvature.per_sample import SampleForms
from diagnoser.types import Part

BLOCK = (Part("0.weight"), Part("0.bias"))


def network(samples: int = 64) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(samples, 6, generator=generator, dtype=torch.float64)
    return model.double(), x, torch.randint(0, 3, (samples,), generator=generator)


def block_of(hessian: Hessian, block: tuple[Part, ...]) -> torch.Tensor:
    size = hessian.size(block)
    return torch.stack([hessian.block_product(block, e) for e in torch.eye(size).double()])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("method", ["per_sample", "plain"])
def test_repeated_estimates_scatter_as_their_standard_error_says(method: str) -> None:
    model, x, labels = network()
    loss = F.cross_entropy(model(x), labels)
    with Hessian(loss, dict(model.named_parameters()), sites=True) as hessian:
        exact = float(block_of(hessian, BLOCK).trace())
        forms = SampleForms.of(hessian, generator())
        assert forms is not None
        found = [
            block_trace(
                hessian,
                BLOCK,
                generator(seed),
                forms=[forms],
                method=method,
                question=Question.within(0.0),
                max_products=12,
            )
            for seed in range(120)
        ]
    values = torch.tensor([e.value for e in found])
    errors = torch.tensor([e.std_error for e in found])
    assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / math.sqrt(120)
    assert 0.8 < float(errors.square().mean().sqrt() / values.std()) < 1.25
    assert {e.method for e in found} == {"per-sample" if method == "per_sample" else "hutchinson"}


def test_deflation_by_a_ritz_basis_is_unbiased_and_sharper() -> None:
    model, x, labels = network()
    loss = F.cross_entropy(model(x), labels)
    with Hessian(loss, dict(model.named_parameters()), sites=True) as hessian:
        H = block_of(hessian, BLOCK)
        values, vectors = torch.linalg.eigh(H)
        top = values.abs().argsort(descending=True)[:24]
        basis, inside = vectors[:, top].T, float(values[top].sum())
        effort = {"question": Question.within(0.0), "max_products": 10}
        plain, deflated = (
            torch.tensor(
                [
                    block_trace(hessian, BLOCK, generator(s), basis=b, inside=i, **effort).value
                    for s in range(80)
                ]
            )
            for b, i in ((None, None), (basis, inside))
        )
        one = block_trace(hessian, BLOCK, generator(0), basis=basis, **effort)
        same = block_trace(hessian, BLOCK, generator(0), basis=basis, inside=inside, **effort)
    assert one.value == pytest.approx(same.value)
    assert one.method == "deflated hutchinson"
    exact = float(H.trace())
    assert abs(float(deflated.mean()) - exact) < 4 * float(deflated.std()) / math.sqrt(80)
    assert float(deflated.std()) < 0.5 * float(plain.std())


def test_the_pilot_chooses_vectors_per_sample_where_they_are_sharper() -> None:
    model, x, labels = network(128)
    block = (Part("4.weight"), Part("4.bias"))
    loss = F.cross_entropy(model(x), labels)
    with Hessian(loss, dict(model.named_parameters()), sites=True) as hessian:
        forms = SampleForms.of(hessian, generator())
        assert forms is not None
        effort = {"question": Question.within(0.01), "max_products": 16}
        found = block_trace(hessian, block, generator(), forms=[forms], **effort)
    assert found.method == "per-sample"
    assert found.samples == 128
    assert found.batch_std_error is not None and found.batch_std_error > 0


def test_several_chunks_add_their_samples() -> None:
    model, x, labels = network(64)
    losses = [
        F.cross_entropy(model(a), b) for a, b in zip(x.chunk(2), labels.chunk(2), strict=True)
    ]
    with Hessian(losses, dict(model.named_parameters()), sites=True) as hessian:
        exact = float(block_of(hessian, BLOCK).trace())
        forms = [SampleForms.of(chunk, generator()) for chunk in hessian.chunks]
        effort = {"question": Question.within(0.0), "max_products": 40}
        found = block_trace(hessian, BLOCK, generator(), forms=forms, **effort, method="per_sample")
    assert found.samples == 64
    assert abs(found.value - exact) < 4 * found.std_error


def test_a_small_block_is_summed_exactly() -> None:
    model, x, labels = network()
    loss = F.cross_entropy(model(x), labels)
    with Hessian(loss, dict(model.named_parameters()), sites=True) as hessian:
        found = block_trace(hessian, (Part("4.bias"),), generator(), max_products=8)
        exact = float(block_of(hessian, (Part("4.bias"),)).trace())
    assert found.method == "exact"
    assert found.std_error == 0.0
    assert found.value == pytest.approx(exact)


def test_a_question_about_the_sign_costs_less_than_an_exact_value() -> None:
    model, x, labels = network()
    loss = F.cross_entropy(model(x), labels)
    component = next(c for c in split_components({"": model}) if c.name == "4")
    counts = []

    class Counting(Hessian):
        taken = 0

        def block_product(self, block: object, v: torch.Tensor) -> torch.Tensor:
            Counting.taken += 1
            return super().block_product(block, v)

    for question in (Question("sign"), Question.within(1e-6)):
        with Counting(loss, dict(model.named_parameters())) as hessian:
            Counting.taken = 0
            block_trace(hessian, component.parts, generator(), question=question, max_products=16)
            counts.append(Counting.taken)
    assert counts[0] < counts[1] == 16


def test_a_lanczos_run_on_the_block_makes_the_trace_sharper_at_no_further_cost() -> None:
    model, x, labels = network()
    loss = F.cross_entropy(model(x), labels)
    block = (Part("2.weight"), Part("2.bias"))
    with Hessian(loss, dict(model.named_parameters())) as hessian:
        exact = block_of(hessian, block)
        ends = block_eigenvalues(hessian, block, generator())
        assert ends.inside == pytest.approx(float((ends.basis @ exact @ ends.basis.T).trace()))
        values = torch.linalg.eigvalsh(exact)
        top = values[values.abs().argsort(descending=True)]
        for found, eigenvalue in zip(ends.extreme[:2], top, strict=False):
            assert abs(found.value - float(eigenvalue)) <= found.std_error + 1e-9
        effort = {"question": Question.within(0.0), "max_products": 8}
        errors = [
            block_trace(hessian, block, generator(3), **effort, **given).std_error
            for given in ({}, {"basis": ends.basis, "inside": ends.inside})
        ]
    assert errors[1] < 0.5 * errors[0]


HEAD = (  # the second of two, in a fused projection: rows of query, key and value, columns of out
    *(Part(f"attention.in_proj_{x}", 0, k + 2, 2) for x in ("weight", "bias") for k in (0, 4, 8)),
    Part("attention.out_proj.weight", 1, 2, 2),
)


@pytest.mark.parametrize("what", ["one head", "a whole layer"])
def test_a_head_or_a_layer_is_a_block_like_any_other(what: str) -> None:
    model = build(TinyTransformer)
    parameters = dict(model.named_parameters())
    layers = {layer.name: layer.parts for layer in layers_of(split_components({"": model}))}
    block = HEAD if what == "one head" else layers["attention"]
    at = positions(block, parameters)
    with sdpa_kernel(SDPBackend.MATH):
        exact = dense(loss_of(model), parameters)[at][:, at]
    values = torch.linalg.eigvalsh(exact)
    with Hessian(loss_of(model), parameters, sites=True) as hessian:
        forms = forms_of(hessian, generator())
        assert forms is not None and forms[0].covers(block, generator())
        question = Question.within(0.02)
        found = block_trace(hessian, block, generator(), forms=forms, question=question)
        enough = {"question": Question.within(0.0), "max_products": len(at) + 2}  # after a pilot
        whole = block_trace(hessian, block, generator(), forms=forms, **enough)
        ends = block_eigenvalues(hessian, block, generator(), max_steps=len(at), tolerance=1e-6)
    assert abs(found.value - float(exact.trace())) <= 3 * (found.std_error or 0.0) + 1e-9
    assert whole.value == pytest.approx(float(exact.trace()))
    assert whole.batch_std_error is not None
    assert ends.lambda_max.value == pytest.approx(float(values[-1]), rel=1e-4)
    assert ends.lambda_min.value == pytest.approx(float(values[0]), rel=1e-4)
