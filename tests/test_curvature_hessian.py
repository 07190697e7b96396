from __future__ import annotations

import gc
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
    in_proj,
    loss_of,
    positions,
    random_vector,
    transformer_components,
)
from torch import nn

from diagnoser.curvature import Hessian
from diagnoser.errors import MeasurementError
from diagnoser.types import Part

SUBJECTS = [
    pytest.param(TinyTransformer, {"need_weights": True}, id="attention-eager"),
    pytest.param(TinyTransformer, {"need_weights": False}, id="attention-fused"),
    pytest.param(TinyTransformer, {"causal": True}, id="attention-fused-mask"),
    pytest.param(TinyHAN, {"packed": True}, id="han-packed"),
    pytest.param(TinyHAN, {"packed": False}, id="han-padded"),
]


def reference(model_class, arguments, seeds=(0,)):
    """The dense Hessian without any fused kernel."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model = build(model_class, **arguments)
        parameters = dict(model.named_parameters())
        found = [dense(loss_of(model, seed), parameters) for seed in seeds]
    return model, parameters, torch.stack(found).mean(0)


@pytest.mark.parametrize(("model_class", "arguments"), SUBJECTS)
def test_products_are_those_of_the_dense_hessian(model_class, arguments):
    model, parameters, H = reference(model_class, arguments)
    v = random_vector(parameters, 1)
    with Hessian(loss_of(model), parameters) as hessian:
        torch.testing.assert_close(flat(hessian.product(v)), H @ flat(v))
        some = list(parameters)[1:3]
        restricted = hessian.product(v, rows=some)
        assert list(restricted) == some
        wanted = positions(tuple(Part(n) for n in some), parameters)
        torch.testing.assert_close(flat(restricted), (H @ flat(v))[wanted])
        for name in parameters:
            block = (Part(name),)
            at = positions(block, parameters)
            u = flat(v)[at]
            torch.testing.assert_close(hessian.block_product(block, u), H[at][:, at] @ u)
            torch.testing.assert_close(flat(hessian.column(block, v)), H[:, at] @ u)


def test_blocks_may_be_ranges_of_a_fused_projection_and_whole_parameters_together():
    model, parameters, H = reference(TinyTransformer, {})
    v = random_vector(parameters, 2)
    hessian = Hessian(loss_of(model), parameters)
    two_ranges_of_one = (*in_proj("attention", 0), *in_proj("attention", 2), Part("head.bias"))
    a_column_range = (Part("attention.out_proj.weight", 1, 2, 2),)
    blocks = [c.parts for c in transformer_components()] + [two_ranges_of_one, a_column_range]
    for block in blocks:
        at = positions(block, parameters)
        assert hessian.size(block) == len(at)
        torch.testing.assert_close(hessian.flatten(block, v), flat(v)[at])
        u = flat(v)[at]
        torch.testing.assert_close(hessian.block_product(block, u), H[at][:, at] @ u)
        torch.testing.assert_close(flat(hessian.column(block, v)), H[:, at] @ u)


def test_float32_products_are_accurate_to_rounding():
    _, parameters, H = reference(TinyTransformer, {})
    model = build(TinyTransformer, torch.float32)
    v = random_vector(parameters, 3)
    found = Hessian(loss_of(model), dict(model.named_parameters())).product(v)
    error = (flat(found).double() - H @ flat(v)).norm() / (H @ flat(v)).norm()
    assert error < 5e-6


def test_chunks_give_their_mean_and_each_their_own():
    model, parameters, H = reference(TinyTransformer, {}, seeds=(0, 1, 2))
    v = random_vector(parameters, 4)
    hessian = Hessian([loss_of(model, seed) for seed in (0, 1, 2)], parameters)
    torch.testing.assert_close(flat(hessian.product(v)), H @ flat(v))
    for seed, chunk in enumerate(hessian.chunks):
        alone = Hessian(loss_of(model, seed), parameters)
        torch.testing.assert_close(flat(chunk.product(v)), flat(alone.product(v)))
        torch.testing.assert_close(flat(chunk.gradient), flat(alone.gradient))


def test_the_gradient_scalers_factor_is_taken_out():
    model = build(TinyHAN, packed=False)
    parameters = dict(model.named_parameters())
    v = random_vector(parameters, 5)
    plain, scaled = (
        Hessian(loss_of(model), parameters),
        Hessian(loss_of(model) * 1024.0, parameters, scale=1024.0),
    )
    torch.testing.assert_close(flat(scaled.product(v)), flat(plain.product(v)))
    torch.testing.assert_close(flat(scaled.gradient), flat(plain.gradient))


def test_unused_frozen_and_linear_parameters_have_zero_rows():
    used = nn.Parameter(torch.tensor([1.0, 2.0]))
    unused = nn.Parameter(torch.ones(3))
    linear = nn.Parameter(torch.ones(2))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    parameters = {"used": used, "unused": unused, "linear": linear, "frozen": frozen}
    loss = (used**3).sum() + (3.0 * linear).sum() + frozen.sum()
    hessian = Hessian(loss, parameters)
    ones = {name: torch.ones_like(p) for name, p in parameters.items()}
    product = hessian.product(ones)
    assert {n: h.tolist() for n, h in product.items()} == {
        "used": [6.0, 12.0],
        "unused": [0.0, 0.0, 0.0],
        "linear": [0.0, 0.0],
    }
    assert hessian.gradient["unused"].tolist() == [0.0, 0.0, 0.0]
    assert hessian.gradient["linear"].tolist() == [3.0, 3.0]
    assert hessian.block_product((Part("linear"),), torch.ones(2)).tolist() == [0.0, 0.0]
    assert hessian.block_product((Part("unused"),), torch.ones(3)).tolist() == [0.0, 0.0, 0.0]
    assert hessian.known((Part("frozen"), Part("used"))) == (Part("used"),)
    with pytest.raises(MeasurementError, match="frozen: not among the measured parameters"):
        hessian.size((Part("frozen"),))


def test_a_loss_that_is_linear_in_everything_has_zero_curvature():
    weight = nn.Parameter(torch.ones(2))
    hessian = Hessian((2.0 * weight).sum(), {"weight": weight})
    assert hessian.product({"weight": torch.ones(2)})["weight"].tolist() == [0.0, 0.0]


def test_a_tied_tensor_counts_once_under_its_first_name():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)).double()
    model[1].weight = model[0].weight
    tokens = torch.tensor([0, 1, 2])
    twice = dict(model.named_parameters(remove_duplicate=False))
    assert len(twice) == 2
    once = dict(model.named_parameters())
    H = dense(F.cross_entropy(model(tokens), tokens), once)
    hessian = Hessian(F.cross_entropy(model(tokens), tokens), twice)
    assert list(hessian.parameters) == ["0.weight"]
    v = random_vector(once, 6)
    torch.testing.assert_close(flat(hessian.product(v)), H @ flat(v))


def test_the_key_bias_block_is_zero():
    model, parameters, H = reference(TinyTransformer, {})
    key_bias = (Part("attention.in_proj_bias", 0, 4, 4),)
    hessian = Hessian(loss_of(model), parameters)
    product = hessian.block_product(key_bias, torch.ones(4, dtype=torch.float64))
    assert product.abs().max() < 1e-12 * H.abs().max()


@pytest.mark.parametrize(("model_class", "arguments"), SUBJECTS)
def test_the_users_backward_is_bit_identical_after_measuring(model_class, arguments):
    def gradients(measure):
        model = build(model_class, torch.float32, **arguments)
        parameters = dict(model.named_parameters())
        loss = loss_of(model)
        state = torch.random.get_rng_state()
        if measure:
            hessian = Hessian(loss, parameters)
            hessian.product(random_vector(parameters, 7))
            name = next(iter(parameters))
            hessian.block_product((Part(name),), torch.ones(parameters[name].numel()))
            hessian.column((Part(name),), random_vector(parameters, 8))
            assert all(p.grad is None for p in parameters.values())
            hessian.release()
        assert torch.equal(torch.random.get_rng_state(), state)
        loss.backward()
        return {n: p.grad for n, p in parameters.items()}

    plain, measured = gradients(False), gradients(True)
    assert all(torch.equal(plain[n], measured[n]) for n in plain)


def test_the_graph_dies_on_release_without_garbage_collection():
    model = build(TinyTransformer)
    parameters = dict(model.named_parameters())
    gc.disable()
    try:
        loss = loss_of(model)
        hessian = Hessian(loss, parameters, sites=True)
        product = hessian.product(random_vector(parameters, 9))
        gradient_in_graph = weakref.ref(hessian.graphs[0].gradient["head.weight"])
        forward_graph = weakref.ref(loss)
        hessian.release()
        assert gradient_in_graph() is None
        del loss
        assert forward_graph() is None
    finally:
        gc.enable()
    assert not any(h.requires_grad for h in product.values())
    with pytest.raises(MeasurementError, match="released"):
        hessian.product(random_vector(parameters, 9))


def test_autocast_graphs_are_measured_and_say_their_precision():
    _, parameters, H = reference(TinyTransformer, {})
    model = build(TinyTransformer, torch.float32)
    tokens, labels = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hessian = Hessian(F.cross_entropy(model(tokens), labels), dict(model.named_parameters()))
        assert hessian.dtype == "bfloat16"
        v = random_vector(parameters, 10)
        found = flat(hessian.product(v)).double()
    assert (found - H @ flat(v)).norm() < 0.05 * (H @ flat(v)).norm()
    assert Hessian(loss_of(model), dict(model.named_parameters())).dtype == "float32"


def test_products_do_not_depend_on_an_autocast_they_are_taken_in():
    model = build(TinyTransformer, torch.float32)
    parameters = dict(model.named_parameters())
    v = random_vector(parameters, 11)
    outside = Hessian(loss_of(model), parameters).product(v)
    loss = loss_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Hessian(loss, parameters).product(v)
    assert all(torch.equal(outside[n], inside[n]) for n in parameters)


def test_the_gradient_is_the_users_own_and_detached():
    model = build(TinyTransformer)
    parameters = dict(model.named_parameters())
    found = Hessian(loss_of(model), parameters).gradient
    loss_of(model).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad)
        assert not found[name].requires_grad


def test_what_cannot_be_measured_is_said_in_one_line():
    weight = nn.Parameter(torch.ones(2))
    parameters = {"weight": weight}
    with pytest.raises(MeasurementError, match="scalar"):
        Hessian(weight**2, parameters)
    with pytest.raises(MeasurementError, match="no graph"):
        Hessian(torch.tensor(1.0), parameters)
    with pytest.raises(MeasurementError, match="at least one"):
        Hessian([], parameters)
    with pytest.raises(MeasurementError, match="no parameter"):
        Hessian((weight**2).sum(), {"frozen": torch.ones(2)})
    hessian = Hessian((weight**3).sum(), parameters)
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(MeasurementError, match="modified by an inplace operation") as caught:
        hessian.product({"weight": torch.ones(2)})
    assert "\n" not in str(caught.value)
