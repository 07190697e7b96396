from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diagnoser.curvature import second_derivative_of_fused_attention
from diagnoser.curvature.fused_attention import differentiable_backward
from diagnoser.errors import MeasurementError

B, H, L, S, E = 2, 4, 5, 5, 8


def tensors(dtype=torch.float64, key_heads=H):
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, H, L, E), (B, key_heads, S, E), (B, key_heads, S, E)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def bool_mask():
    mask = torch.ones(B, 1, L, S, dtype=torch.bool)
    mask[0, :, :, 3:] = False
    return mask


def blind_row_mask():
    mask = bool_mask()
    mask[1, :, 2, :] = False
    return mask


def float_mask(dtype=torch.float64):
    return torch.linspace(-1, 1, L * S, dtype=dtype).view(L, S)


VARIANTS: list[Any] = [
    pytest.param({}, H, id="plain"),
    pytest.param({"is_causal": True}, H, id="causal"),
    pytest.param({"scale": 0.7}, H, id="scale"),
    pytest.param({"attn_mask": bool_mask()}, H, id="bool-mask"),
    pytest.param({"attn_mask": blind_row_mask()}, H, id="blind-row"),
    pytest.param({"attn_mask": float_mask()}, H, id="float-mask"),
    pytest.param({"enable_gqa": True}, 2, id="grouped-heads"),
    pytest.param({"enable_gqa": True, "is_causal": True}, 2, id="grouped-heads-causal"),
]


def second(inputs, arguments, *, fused):
    """Returns output, gradients and a Hessian product; ``fused``: through the CPU flash kernel."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*inputs, **arguments)
    if fused:
        assert "FlashAttention" in out.grad_fn.name()
    loss = (out.float() if out.dtype == torch.bfloat16 else out).sin().sum()
    with second_derivative_of_fused_attention():
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    directions = [torch.cos(t.detach() * (k + 1)) for k, t in enumerate(inputs)]
    products = torch.autograd.grad(gradients, inputs, directions)
    return out.detach(), [g.detach() for g in gradients], products


@pytest.mark.parametrize(("arguments", "key_heads"), VARIANTS)
def test_gradients_and_products_equal_those_of_the_math_formulation(arguments, key_heads):
    inputs = tensors(key_heads=key_heads)
    _, fused_gradients, fused = second(inputs, arguments, fused=True)
    _, math_gradients, plain = second(inputs, arguments, fused=False)
    torch.testing.assert_close(fused_gradients, math_gradients)
    torch.testing.assert_close(fused, plain)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str
)
def test_lower_precision_is_accurate_to_its_rounding(dtype, tolerance):
    _, _, exact = second(tensors(), {"is_causal": True}, fused=False)
    _, _, found = second(tensors(dtype), {"is_causal": True}, fused=True)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < tolerance * b.norm()


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_a_row_that_sees_nothing_makes_no_nan_on_the_way():
    with torch.autograd.detect_anomaly():
        _, _, products = second(tensors(), {"attn_mask": blind_row_mask()}, fused=True)
    assert all(p.isfinite().all() for p in products)


@pytest.mark.parametrize(("arguments", "key_heads"), VARIANTS)
def test_a_users_backward_keeps_its_bits_inside_and_after(arguments, key_heads):
    def users_gradients():
        inputs = tensors(torch.float32, key_heads)
        mask = arguments.get("attn_mask")
        cast = {"attn_mask": mask.float()} if mask is not None and mask.dtype != torch.bool else {}
        out = F.scaled_dot_product_attention(*inputs, **(arguments | cast))
        out.sin().sum().backward()
        return [t.grad for t in inputs]

    before = users_gradients()
    with second_derivative_of_fused_attention():
        inside = users_gradients()
    after = users_gradients()
    for a, b, c in zip(before, inside, after, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_outside_the_context_there_is_no_second_derivative():
    inputs = tensors()

    def double():
        loss = F.scaled_dot_product_attention(*inputs).sin().sum()
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)
        return torch.autograd.grad([g.sum() for g in gradients], inputs)

    with pytest.raises(RuntimeError, match="is not implemented"):
        double()
    with second_derivative_of_fused_attention():
        with second_derivative_of_fused_attention():
            double()
        double()  # the inner block's end must not take the outer one's formula away
    with pytest.raises(RuntimeError, match="is not implemented"):
        double()


def test_removed_after_an_error_and_usable_from_several_threads():
    with pytest.raises(ValueError, match="user"), second_derivative_of_fused_attention():
        raise ValueError("user")
    failures: list[BaseException] = []

    def work():
        try:
            for _ in range(20):
                with second_derivative_of_fused_attention():
                    pass
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    inputs = tensors()
    gradients = torch.autograd.grad(
        F.scaled_dot_product_attention(*inputs).sin().sum(), inputs, create_graph=True
    )
    with pytest.raises(RuntimeError, match="is not implemented"):
        torch.autograd.grad([g.sum() for g in gradients], inputs)


# The schemas of the CUDA kernels, fed by name: the formula and the binding of arguments are the
# same, only the kernels themselves cannot run here.
OPERATIONS = [
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_cudnn_attention_backward",
]


def call(name, inputs, *, dropout=0.0, mask=None):
    operation = getattr(torch.ops.aten, name).default
    out = F.scaled_dot_product_attention(*inputs, is_causal=True).detach()
    given = {
        "grad_out": out.cos(),
        "grad_out_": out.cos(),
        **dict(zip(("query", "key", "value"), inputs, strict=True)),
        "dropout_p": dropout,
        "is_causal": True,
        "attn_mask": mask,
        "attn_bias": mask,
    }
    arguments = operation._schema.arguments
    positional = [given.get(a.name) for a in arguments if not a.kwarg_only]
    keywords = {a.name: given.get(a.name) for a in arguments if a.kwarg_only}
    return differentiable_backward(operation)(*positional, **keywords), operation


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_fused_operations_arguments_are_bound_by_their_schema(name):
    inputs = tensors()
    found, operation = call(name, inputs)
    assert len(found) == len(operation._schema.returns)
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*inputs, is_causal=True)
    wanted = torch.autograd.grad(out.sin().sum(), inputs)
    torch.testing.assert_close(found[:3], wanted)
    assert all(extra is None for extra in found[3:])


@pytest.mark.parametrize("name", OPERATIONS)
def test_dropout_is_refused_by_name(name):
    with pytest.raises(MeasurementError, match=f"aten::{name} with dropout 0.1"):
        call(name, tensors(), dropout=0.1)


def test_a_trained_mask_is_refused():
    mask = torch.full((L, S), 1.0 / math.e, dtype=torch.float64, requires_grad=True)
    with pytest.raises(MeasurementError, match="trained mask"):
        call(OPERATIONS[2], tensors(), mask=mask)
