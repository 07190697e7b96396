from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from curvature_subjects import (
    TinyHAN,
    TinyTransformer,
    batch,
    build,
    dense,
    flat,
    loss_of,
    positions,
    random_vector,
    transformer_components,
)
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from diagnoser.curvature import (
    Hessian,
    block_curvature,
    block_eigenvalues,
    block_trace,
    row_curvature,
)
from diagnoser.curvature.finite_difference import TOLERANCE, CentralDifference
from diagnoser.errors import MeasurementError
from diagnoser.types import Part

SUBJECTS = [(TinyTransformer, {}), (TinyHAN, {"packed": False})]


def difference_and_truth(model_class, arguments, dtype):
    model = build(model_class, dtype, **arguments)
    parameters = dict(model.named_parameters())
    exact = build(model_class, **arguments)
    with sdpa_kernel(SDPBackend.MATH):
        H = dense(loss_of(exact), dict(exact.named_parameters()))
    return CentralDifference(lambda: loss_of(model), parameters), parameters, H


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("model_class", "arguments"), SUBJECTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-7), (torch.float32, 5e-3)])
def test_products_columns_and_blocks_are_the_dense_hessians(model_class, arguments, dtype, bound):
    difference, parameters, H = difference_and_truth(model_class, arguments, dtype)
    v = random_vector(parameters, 1)
    flat_v = flat(v).double()
    assert relative(flat(difference.product(v)), H @ flat_v) < bound
    for name in ("embedding.weight", "head.weight"):
        block = (Part(name),)
        index = positions(block, parameters)
        column = flat(difference.column(block, v))
        assert relative(column, H[:, index] @ flat_v[index]) < bound
        product = difference.block_product(block, difference.flatten(block, v))
        assert relative(product, H[index][:, index] @ flat_v[index]) < bound
    assert 0.0 < difference.relative_error < TOLERANCE


def test_a_part_of_a_fused_parameter_moves_alone():
    difference, parameters, H = difference_and_truth(TinyTransformer, {}, torch.float64)
    query = transformer_components()[1].parts
    index = positions(query, parameters)
    v = torch.linspace(-1.0, 1.0, difference.size(query), dtype=torch.float64)
    assert relative(difference.block_product(query, v), H[index][:, index] @ v) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_stated_error_is_at_least_the_real_one(dtype):
    for seed in range(10):
        difference, parameters, H = difference_and_truth(TinyTransformer, {}, dtype)
        v = random_vector(parameters, seed)
        error = relative(flat(difference.product(v)), H @ flat(v).double())
        assert error <= difference.relative_error + 1e-9


def test_a_step_that_is_far_off_is_left_for_a_shorter_one():
    x = nn.Parameter(torch.full((4,), 10.0, dtype=torch.float64))
    difference = CentralDifference(lambda: (1e3 * x).sin().sum(), {"x": x})
    # A thousandth of |x| is 20 radians here, a 250-thousandth a twelfth of one.
    product = difference.product({"x": torch.ones_like(x)})["x"]
    torch.testing.assert_close(product, -1e6 * (1e3 * x.detach()).sin(), rtol=0.01, atol=0.0)
    assert difference.relative_error < TOLERANCE


def test_disagreeing_steps_give_no_product():
    x = nn.Parameter(torch.ones(3))
    before = x.detach().clone()
    difference = CentralDifference(lambda: (1e8 * x).sin().sum(), {"x": x})  # finer than float32
    with pytest.raises(MeasurementError, match="central differences along x disagree by"):
        difference.product({"x": torch.ones(3)})
    assert torch.equal(x, before)
    assert difference.relative_error == 0.0  # nothing was let pass


def test_kinks_are_refused_in_float32_and_stepped_between_in_float64():
    torch.manual_seed(0)
    x, y = torch.randn(64, 16), torch.randn(64, 1)
    model = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    model.append(nn.Linear(256, 1))

    def loss():
        p = next(model.parameters())
        return (model(x.to(p)) - y.to(p)).square().mean()

    parameters = dict(model.named_parameters())
    v = random_vector(parameters, 5)
    with pytest.raises(MeasurementError, match=r"0.weight and 5 more .* kinks as of ReLU"):
        CentralDifference(loss, parameters, tolerance=0.002).product(v)
    model.double()
    parameters = dict(model.named_parameters())
    v = random_vector(parameters, 5)
    difference = CentralDifference(loss, parameters, tolerance=0.002)
    exact = Hessian(loss(), parameters).product(v)
    assert relative(flat(difference.product(v)), flat(exact)) < 0.002


def test_a_row_for_padding_is_moved_by_no_product():
    table = nn.Embedding(4, 2, padding_idx=0).double()
    tied = nn.Linear(2, 4, bias=False).double()
    tied.weight = table.weight
    table.weight.data.fill_(0.5)
    tokens = torch.tensor([0, 1, 2])
    v = {"weight": torch.ones(4, 2, dtype=torch.float64)}
    parameters = dict(table.named_parameters())

    def loss():
        return table(tokens).prod(0).sum()

    exact = Hessian(loss(), parameters).product(v)["weight"]
    assert exact.abs().max() > 0.0
    product = CentralDifference(loss, parameters).product(v)["weight"]
    torch.testing.assert_close(product, exact)
    rows = CentralDifference(lambda: tied(table(tokens)).pow(2).sum(), parameters)._padding
    assert rows == {}  # its other use trains that row


def test_a_block_without_curvature_is_zero_within_the_stated_error():
    difference, parameters, H = difference_and_truth(TinyTransformer, {}, torch.float32)
    key_bias = (Part("attention.in_proj_bias", 0, 4, 4),)
    v = torch.ones(4)
    product = difference.block_product(key_bias, v)
    assert product.norm() < TOLERANCE * torch.linalg.matrix_norm(H, 2) * v.norm()
    nothing = difference.product({n: torch.zeros_like(p) for n, p in parameters.items()})
    assert flat(nothing).abs().max() == 0.0


def test_the_gradient_and_chunks():
    model = build(TinyTransformer)
    parameters = dict(model.named_parameters())
    losses = [lambda seed=seed: loss_of(model, seed) for seed in (0, 1, 2)]
    difference = CentralDifference(losses, parameters)
    hessian = Hessian([loss() for loss in losses], parameters)
    v = random_vector(parameters, 2)
    torch.testing.assert_close(flat(difference.gradient), flat(hessian.gradient))
    torch.testing.assert_close(
        flat(difference.product(v)), flat(hessian.product(v)), rtol=1e-6, atol=1e-8
    )
    for ours, exact in zip(difference.chunks, hessian.chunks, strict=True):
        torch.testing.assert_close(
            flat(ours.product(v)), flat(exact.product(v)), rtol=1e-6, atol=1e-8
        )
    (chunk,) = difference.chunks[0].chunks
    torch.testing.assert_close(
        flat(chunk.product(v)), flat(hessian.chunks[0].product(v)), rtol=1e-6, atol=1e-8
    )
    assert difference.relative_error > 0.0  # the chunks' errors are the operator's


def test_estimators_take_it_for_a_hessian():
    model = build(TinyTransformer)
    parameters = dict(model.named_parameters())
    components = transformer_components()
    direction = random_vector(parameters, 3)
    block = components[6].parts
    generator = torch.Generator()
    found = []
    for operator in (
        CentralDifference(lambda: loss_of(model), parameters),
        Hessian(loss_of(model), parameters),
    ):
        with operator:
            rows = row_curvature(operator, direction, components)
            blocks = block_curvature(operator, direction, components)
            ends = block_eigenvalues(operator, block, generator=generator.manual_seed(0))
            trace = block_trace(operator, block, generator.manual_seed(0))
        estimates = [*rows.components.values(), rows.total, *blocks.values(), trace]
        estimates += [ends.lambda_min, ends.lambda_max]
        found.append([estimate.value for estimate in estimates])
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-8)


def test_parameters_random_streams_and_a_live_graph_survive():
    model = build(TinyTransformer, torch.float32)
    parameters = dict(model.named_parameters())
    tokens, labels = batch()

    def loss():
        return F.cross_entropy(F.dropout(model(tokens), 0.5), labels)

    torch.manual_seed(0)
    live = loss_of(model)
    before = {n: p.detach().clone() for n, p in parameters.items()}
    versions = {n: p._version for n, p in parameters.items()}
    state = torch.get_rng_state()
    difference = CentralDifference(loss, parameters)
    v = random_vector(parameters, 4)
    first, second = difference.product(v), difference.product(v)
    torch.testing.assert_close(flat(first), flat(second), rtol=0.0, atol=0.0)  # the same masks
    with torch.random.fork_rng([]):
        exact = Hessian(loss(), parameters).product(v)
    assert relative(flat(first), flat(exact).double()) < 5e-3
    assert all(torch.equal(before[n], p) for n, p in parameters.items())
    assert versions == {n: p._version for n, p in parameters.items()}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in parameters.values())
    live.backward()


def test_an_exception_in_the_loss_leaves_the_parameters_as_they_were():
    x = nn.Parameter(torch.full((3,), 1.0 / 3.0))
    calls = []

    def loss():
        calls.append(torch.rand(()))
        if len(calls) > 2:
            raise RuntimeError("in the middle")
        return x.square().sum()

    before, state = x.detach().clone(), torch.get_rng_state()
    difference = CentralDifference(loss, {"x": x})
    with pytest.raises(RuntimeError, match="in the middle"):
        difference.product({"x": torch.ones(3)})
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_differentiated_twice_is_measured():
    class CubeOnce(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return 3 * x**2 * g

    x = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    difference = CentralDifference(lambda: CubeOnce.apply(x).sum(), {"x": x})
    product = difference.product({"x": torch.ones_like(x)})["x"]
    torch.testing.assert_close(product, 6.0 * x.detach())
    assert difference.method == "central difference"
    assert Hessian((x**2).sum(), {"x": x}).method == "exact"
    assert Hessian((x**2).sum(), {"x": x}).relative_error == 0.0


def test_unused_frozen_tied_and_scaled():
    used = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    parameters = {"used": used, "again": used, "unused": unused, "frozen": frozen}
    difference = CentralDifference(lambda: 8.0 * (used**3).sum(), parameters, scale=8.0)
    assert list(difference.parameters) == ["used", "unused"]
    product = difference.product({n: torch.ones_like(p) for n, p in parameters.items()})
    torch.testing.assert_close(product["used"], 6.0 * used.detach())
    assert product["unused"].tolist() == [0.0, 0.0, 0.0]
    assert difference.gradient["used"].tolist() == [3.0, 12.0]
    assert difference.dtype == "float64"


def test_sparse_gradients_become_dense():
    table = nn.Embedding(5, 2, sparse=True).double()
    tokens = torch.tensor([1, 3])
    difference = CentralDifference(
        lambda: table(tokens).pow(3).sum(), dict(table.named_parameters())
    )
    product = difference.product({"weight": torch.ones(5, 2, dtype=torch.float64)})["weight"]
    expected = torch.zeros(5, 2, dtype=torch.float64)
    expected[tokens] = 6.0 * table.weight.detach()[tokens]
    torch.testing.assert_close(product, expected)


@pytest.mark.parametrize(
    ("loss", "complaint"),
    [
        (lambda x: x.square(), "needs a scalar"),
        (lambda x: x.detach().sum(), "the loss has no graph"),
    ],
)
def test_a_loss_that_is_none(loss, complaint):
    x = nn.Parameter(torch.ones(2))
    with pytest.raises(MeasurementError, match=complaint):
        CentralDifference(lambda: loss(x), {"x": x})


def test_no_loss_no_parameter_no_number_no_more():
    x = nn.Parameter(torch.ones(2))
    with pytest.raises(MeasurementError, match="give at least one"):
        CentralDifference([], {"x": x})
    with pytest.raises(MeasurementError, match="no parameter requires a gradient"):
        CentralDifference(x.sum, {})
    difference = CentralDifference(lambda: (x * math.nan).square().sum(), {"x": x})
    with pytest.raises(MeasurementError, match="not finite"):
        difference.product({"x": torch.ones(2)})
    difference.release()
    with pytest.raises(MeasurementError, match="released"):
        difference.product({"x": torch.ones(2)})
