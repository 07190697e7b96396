from __future__ import annotations

import gc
import math
import sys
import warnings
import weakref

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
)
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from diagnoser.curvature import (
    Hessian,
    finite_difference_defect,
    symmetry_defect,
    unreliable_nodes,
    unverified_nodes,
)
from diagnoser.curvature.pyhessian_backend import pyhessian_top_eigenvalues, pyhessian_trace
from diagnoser.errors import MeasurementError
from diagnoser.types import Part


class Cube(torch.autograd.Function):
    """x**3, right to every order."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class CubeOnce(Cube):
    """The same, with a backward that says it cannot be differentiated."""

    backward = staticmethod(once_differentiable(Cube.backward))


class CubeOnContext(torch.autograd.Function):
    """The same, with the slope kept where autograd does not look."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = 3 * x**2
        return x**3

    @staticmethod
    def backward(ctx, g):
        return ctx.slope * g


def mixing_loss(function):
    weight = nn.Parameter(torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).view(2, 3))
    bias = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))
    x = torch.tensor([[1.0, 0.5, -1.0], [0.2, -0.7, 0.4]], dtype=torch.float64)

    def loss():
        return function.apply(x @ weight.T + bias).sin().sum()

    return loss, {"weight": weight, "bias": bias}


@pytest.mark.parametrize("model_class", [TinyTransformer, TinyHAN])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_true_products_are_symmetric_and_agree_with_finite_differences(model_class, dtype):
    arguments = {"packed": True} if model_class is TinyHAN else {}
    model = build(model_class, dtype, **arguments)
    parameters = dict(model.named_parameters())
    before = {n: p.detach().clone() for n, p in parameters.items()}
    u, v = random_vector(parameters, 1), random_vector(parameters, 2)
    hessian = Hessian(loss_of(model), parameters)
    assert symmetry_defect(hessian, u, v) < (1e-12 if dtype == torch.float64 else 1e-5)
    defect = finite_difference_defect(lambda: loss_of(model), parameters, v, hessian.product(v))
    assert defect < (1e-5 if dtype == torch.float64 else 0.03)
    assert all(torch.equal(before[n], p) for n, p in parameters.items())
    hessian.product(v)  # the live graph has survived the copying back
    assert unreliable_nodes(loss_of(model)) == unverified_nodes(loss_of(model)) == []


def test_a_right_custom_function_is_unverified_and_verified_by_finite_differences():
    loss, parameters = mixing_loss(Cube)
    v = random_vector(parameters, 3)
    product = Hessian(loss(), parameters).product(v)
    assert unreliable_nodes(loss()) == []
    assert unverified_nodes(loss()) == [f"{__name__}.Cube"]
    assert finite_difference_defect(loss, parameters, v, product) < 1e-4


def test_a_once_differentiable_function_is_found_by_its_node():
    loss, parameters = mixing_loss(CubeOnce)
    v = random_vector(parameters, 3)
    product = Hessian(loss(), parameters).product(v)  # no error, and wrong
    assert finite_difference_defect(loss, parameters, v, product) > 0.1
    assert unreliable_nodes(loss()) == [f"{__name__}.CubeOnce"]
    assert unverified_nodes(loss()) == []


def test_tensors_kept_on_the_context_are_found_by_finite_differences_only():
    loss, parameters = mixing_loss(CubeOnContext)
    u, v = random_vector(parameters, 4), random_vector(parameters, 3)
    hessian = Hessian(loss(), parameters)
    assert symmetry_defect(hessian, u, v) < 1e-12  # symmetric, and wrong all the same
    assert finite_difference_defect(loss, parameters, v, hessian.product(v)) > 0.1
    assert unverified_nodes(loss()) == [f"{__name__}.CubeOnContext"]


def test_a_reentrant_checkpoint_hides_the_parameters_inside_it():
    a = torch.ones(2, requires_grad=True)
    loss = checkpoint(torch.sin, a, use_reentrant=True).sum()
    assert "CheckpointFunction" in loss.grad_fn.next_functions[0][0].name()
    assert unreliable_nodes(loss) == ["torch.utils.checkpoint.CheckpointFunction"]
    assert unverified_nodes(loss) == []


class Skewed(torch.autograd.Function):
    """A second derivative that is not symmetric: a mask drawn anew in every backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g + (x.roll(1, -1) - x.roll(1, -1).detach()) * g


def test_an_asymmetric_product_shows():
    loss, parameters = mixing_loss(Skewed)
    hessian = Hessian(loss(), parameters)
    assert (
        symmetry_defect(hessian, random_vector(parameters, 1), random_vector(parameters, 2)) > 0.01
    )


def test_zero_curvature_is_symmetric_and_nan_stays_nan():
    a = nn.Parameter(torch.ones(2))
    u, v = {"a": torch.tensor([1.0, 0.0])}, {"a": torch.tensor([0.0, 1.0])}
    assert symmetry_defect(Hessian(a.sum(), {"a": a}), u, v) == 0.0
    assert math.isnan(symmetry_defect(Hessian((a**2 * math.nan).sum(), {"a": a}), u, v))
    with pytest.raises(MeasurementError, match="direction"):
        finite_difference_defect((a**2).sum, {"a": a}, {"a": torch.zeros(2)}, v)


# --- PyHessian -----------------------------------------------------------------------------------


def probe_loss(model, data):
    tokens, labels = data
    return F.cross_entropy(model(tokens), labels)


def test_pyhessian_agrees_with_the_dense_hessian_and_leaves_the_model_alone():
    model = build(TinyTransformer)
    model.extra = nn.Linear(2, 2).double()  # never used: PyHessian alone fails on it
    model.train()
    parameters = dict(model.named_parameters())
    loss_of(model).backward()
    grads = {n: p.grad for n, p in parameters.items()}
    bits = {n: p.detach().clone() for n, p in parameters.items()}
    state = torch.random.get_rng_state()
    names = ["feed_forward.weight", "feed_forward.bias"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace = pyhessian_trace(
            model, probe_loss, batch(), parameters=names, max_probes=200, tolerance=None
        )
        whole = pyhessian_trace(model, probe_loss, batch())
        top = pyhessian_top_eigenvalues(
            model, probe_loss, batch(), {"ff": names, "head": ["head.weight"]}
        )
    assert not caught
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is grads[n] and torch.equal(p, bits[n]) for n, p in parameters.items())
    assert all(p.requires_grad for p in parameters.values())

    with sdpa_kernel(SDPBackend.MATH):
        H = dense(loss_of(model), parameters)
    at = positions(tuple(Part(n) for n in names), parameters)
    assert trace.samples == 200
    assert abs(trace.value - float(H[at, at].sum())) < 4 * trace.std_error
    assert 2 <= whole.samples <= 100
    eigenvalues = torch.linalg.eigvalsh(H[at][:, at])
    extreme = float(eigenvalues[eigenvalues.abs().argmax()])
    assert top["ff"].value == pytest.approx(extreme, rel=0.05)
    assert top["ff"].std_error is None


class Quadratic(nn.Module):
    def __init__(self, A):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(len(A)))
        self.register_buffer("A", A)

    def forward(self):
        return 0.5 * self.theta @ self.A @ self.theta


def test_pyhessians_own_stop_rule_ends_a_negative_trace_after_two_probes():
    generator = torch.Generator().manual_seed(2)
    A = torch.randn(200, 200, generator=generator)
    A = (A + A.T) / 2 / 14
    A += torch.eye(200) * (-5.72 - A.trace()) / 200
    model = Quadratic(A)
    counts = sorted(
        pyhessian_trace(model, lambda m, _: m(), None, seed=s).samples for s in range(20)
    )
    assert counts[10] == 2
    fixed = pyhessian_trace(model, lambda m, _: m(), None, max_probes=100, tolerance=None)
    assert fixed.samples == 100
    assert abs(fixed.value + 5.72) < 4 * fixed.std_error


def test_pyhessians_copy_of_the_model_dies_without_garbage_collection():
    copies = []

    def loss(model, data):
        copies.extend(weakref.ref(p) for p in model.parameters())
        return probe_loss(model, data)

    gc.disable()
    try:
        pyhessian_trace(build(TinyTransformer), loss, batch(), max_probes=3)
        assert copies
        assert all(copy() is None for copy in copies)
    finally:
        gc.enable()


def test_pyhessian_refusals_are_one_line(monkeypatch):
    model = build(TinyTransformer)
    with pytest.raises(MeasurementError, match="nonsense: no such parameter"):
        pyhessian_trace(model, probe_loss, batch(), parameters=["nonsense"])
    with pytest.raises(MeasurementError, match="nothing to measure"):
        pyhessian_trace(model, probe_loss, batch(), parameters=[])
    monkeypatch.setitem(sys.modules, "pyhessian", None)
    with pytest.raises(MeasurementError, match="not installed"):
        pyhessian_trace(model, probe_loss, batch())


def test_products_equal_pyhessians_on_the_whole_model():
    model = build(TinyHAN, packed=False)
    parameters = dict(model.named_parameters())
    hessian = Hessian(loss_of(model), parameters)
    top = pyhessian_top_eigenvalues(
        model, probe_loss, batch(), {"all": list(parameters)}, tolerance=1e-6, max_iterations=400
    )["all"].value
    H = torch.stack(
        [
            hessian.block_product(hessian.everything, unit)
            for unit in torch.eye(hessian.size(hessian.everything), dtype=torch.float64)
        ]
    )
    eigenvalues = torch.linalg.eigvalsh(H)
    assert top == pytest.approx(float(eigenvalues[eigenvalues.abs().argmax()]), rel=1e-3)
    assert flat(hessian.gradient).norm() > 0
