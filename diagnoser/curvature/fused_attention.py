r"""A second derivative for fused attention kernels, only while it is needed.

The backward operations of PyTorch's fused attention kernels have no derivative of their own, so the
gradient of a loss that passed through ``F.scaled_dot_product_attention`` cannot be differentiated
again. Inside `second_derivative_of_fused_attention` these operations compute, whenever their result
must be differentiable, the same gradient in plain tensor operations. With
:math:`S = s\,Q K^\top + M`, :math:`P = \operatorname{softmax}(S)`, :math:`O = P V` and the incoming
gradient :math:`\bar O`

.. math::
    \bar V = P^\top \bar O, \quad \bar P = \bar O V^\top, \quad
    \bar S = P \odot (\bar P - (P \odot \bar P) 1 1^\top), \quad
    \bar Q = s\,\bar S K, \quad \bar K = s\,\bar S^\top Q

(Dao et al. 2022, FlashAttention, appendix B.2). The forward pass was made by the untouched kernel,
and a backward pass that is not differentiated still runs it: a user's results keep their bits.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diagnoser.errors import MeasurementError

_ON_CPU = ("_scaled_dot_product_flash_attention_for_cpu_backward",)
_ON_CUDA = (
    "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_cudnn_attention_backward",
)

_lock = threading.Lock()
_users = 0
_libraries: list[torch.library.Library] = []


@contextmanager
def second_derivative_of_fused_attention() -> Iterator[None]:
    """Makes gradients through fused attention differentiable inside the ``with`` block.

    Only building the gradient's graph (``create_graph=True``) needs to happen inside; products with
    that graph may come later. May be nested and used by several threads: the first one in
    registers, the last one out removes. Registered for the CPU kernel and, where CUDA is present,
    for its flash, memory-efficient and cuDNN kernels.

    Raises:
        MeasurementError: From the differentiation inside, when the attention uses dropout (its
            mask is known to the kernel alone) or a mask that is itself trained.
    """
    global _users  # noqa: PLW0603 - a registration is process-wide, and so is its count
    with _lock:
        if _users == 0:
            _libraries.append(_register(_ON_CPU, "AutogradCPU"))
            if torch.cuda.is_available():
                _libraries.append(_register(_ON_CUDA, "AutogradCUDA"))
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                while _libraries:
                    _libraries.pop()._destroy()  # type: ignore[no-untyped-call]


def _register(names: tuple[str, ...], key: str) -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for name in names:
        stand_in = differentiable_backward(getattr(torch.ops.aten, name).default)
        library.impl(name, stand_in, key)  # type: ignore[no-untyped-call]
    return library


def differentiable_backward(operation: Any) -> Callable[..., Any]:
    """Returns a stand-in for a fused attention's backward ``operation``.

    Its arguments and the number of its results are those of ``operation``'s schema.
    """
    schema = operation._schema
    names = [argument.name for argument in schema.arguments]

    def backward(*args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        given = dict(zip(names, args, strict=False)) | kwargs
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            with torch._C._AutoDispatchBelowAutograd():
                result: tuple[Tensor | None, ...] = operation(*args, **kwargs)
            return result
        if given["dropout_p"] != 0.0:
            raise MeasurementError(
                f"{schema.name} with dropout {given['dropout_p']} has no second derivative: only "
                "the kernel knows its dropout mask; measure with attention dropout 0"
            )
        mask = given.get("attn_mask", given.get("attn_bias"))
        if mask is not None and mask.requires_grad:
            raise MeasurementError(
                f"{schema.name} with a trained mask has no second derivative here; "
                "run the forward pass under sdpa_kernel(SDPBackend.MATH)"
            )
        gradients = _attention_gradient(
            given.get("grad_out", given.get("grad_out_")),
            given["query"],
            given["key"],
            given["value"],
            mask,
            causal=given.get("is_causal", False),
            scale=given.get("scale"),
        )
        return *gradients, *[None] * (len(schema.returns) - len(gradients))

    return backward


def _attention_gradient(
    grad_out: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query (B, H, L, E), key and value (B, G, S, E), H a multiple of G.

    Half precision is widened to float32, as the kernels themselves do.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    Q, dO = query.to(dtype), grad_out.to(dtype)
    heads = query.shape[-3] // key.shape[-3]  # query heads that share one key and value head
    K, V = (_repeat_heads(t.to(dtype), heads) for t in (key, value))
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale

    S = scale * (Q @ K.transpose(-2, -1))
    visible = _visible(mask, causal, S)
    if mask is not None and mask.dtype != torch.bool:
        S = S + mask.to(dtype)
    if visible is None:
        P = S.softmax(-1)
    else:
        # A row that sees nothing has output zero in the kernels: give it any softmax, then 0.
        blind = ~visible.any(-1, keepdim=True)
        P = S.masked_fill(~visible, -math.inf).masked_fill(blind, 0.0).softmax(-1)
        P = P.masked_fill(blind, 0.0)

    dP = dO @ V.transpose(-2, -1)
    dS = P * (dP - (P * dP).sum(-1, keepdim=True))
    dQ = scale * (dS @ K)
    dK = _sum_heads(scale * (dS.transpose(-2, -1) @ Q), heads)
    dV = _sum_heads(P.transpose(-2, -1) @ dO, heads)
    return dQ.to(query.dtype), dK.to(key.dtype), dV.to(value.dtype)


def _visible(mask: Tensor | None, causal: bool, S: Tensor) -> Tensor | None:
    """Returns which logits (..., L, S) count, or None when all do."""
    visible = None
    if mask is not None:
        visible = mask if mask.dtype == torch.bool else mask != -math.inf
        visible = visible.expand(S.shape)
    if causal:
        past = torch.ones(S.shape[-2:], dtype=torch.bool, device=S.device).tril()
        visible = past if visible is None else visible & past
    return visible


def _repeat_heads(t: Tensor, times: int) -> Tensor:
    return t if times == 1 else t.repeat_interleave(times, dim=-3)


def _sum_heads(t: Tensor, times: int) -> Tensor:
    return t if times == 1 else torch.unflatten(t, -3, (-1, times)).sum(-3)
