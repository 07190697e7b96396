r"""Is the product really the Hessian's? Checks against silently wrong derivatives.

Some graphs differentiate a second time without an error and give a wrong product: a custom
``torch.autograd.Function`` whose backward is marked ``once_differentiable``, one that keeps tensors
on its context outside ``save_for_backward``, a checkpoint that draws a new dropout mask each time.
Wrong products of the first and last kind are not symmetric; the second kind can be, and only a
finite difference finds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diagnoser.curvature.operator import Operator, Vector
from diagnoser.errors import MeasurementError


def symmetry_defect(hessian: Operator, u: Vector, v: Vector) -> float:
    r"""Returns :math:`|u^\top H v - v^\top H u| / (\|u\| \|H v\|)`, from two products.

    About 1e-7 in float32 when all is well, up to 1e-4 in bfloat16, 0.1 and more when a derivative
    is wrong. 0.0 when both products are zero; NaN when they are not finite.
    """
    Hu, Hv = hessian.product(u), hessian.product(v)
    names = list(hessian.parameters)
    zero = Hv[names[0]].new_zeros((), dtype=torch.float64)

    def inner(a: Vector, b: Vector) -> Tensor:
        terms = [(a[n] * b[n]).sum(dtype=torch.float64).to(zero.device) for n in names if n in a]
        return torch.stack([zero, *terms]).sum()

    defect, u_norm, Hv_norm = torch.stack(
        [(inner(u, Hv) - inner(v, Hu)).abs(), inner(u, u).sqrt(), inner(Hv, Hv).sqrt()]
    ).tolist()
    if defect == 0.0:
        return 0.0
    return math.inf if u_norm * Hv_norm == 0.0 else defect / (u_norm * Hv_norm)


def repetition_defect(hessian: Operator, v: Vector, product: Vector) -> float:
    r"""Returns how far a second product with ``v`` is from the first, as a share of its length.

    A recomputation that draws other random numbers shows here at once. 0.0 when both are zero; NaN
    when they are not finite.
    """
    again = hessian.product(v)
    size = _norm(list(product.values()))
    change = _norm([again[name] - product[name] for name in product])
    if change == 0.0:
        return 0.0
    return math.inf if size == 0.0 else change / size


def finite_difference_defect(
    loss: Callable[[], Tensor],
    parameters: Mapping[str, Tensor],
    v: Vector,
    product: Vector,
    *,
    steps: tuple[float, float] = (1e-3, 1e-4),
) -> float:
    r"""Returns the relative distance of ``product`` from the central difference of gradients.

    .. math:: H v \approx \frac{g(\theta + h v) - g(\theta - h v)}{2 h}

    Args:
        loss: Computes the loss again, always on the same samples and random numbers.
        parameters: Name to leaf tensor; changed while measuring and copied back, bit for bit.
        v: The direction.
        product: What `Hessian.product` (v) gave.
        steps: Two step lengths, as a share of the parameters' norm; the better one counts, since a
            single one can be far off in float32.
    """
    names = [name for name in parameters if name in product]
    tensors = [parameters[name] for name in names]
    saved = [p.detach().clone() for p in tensors]
    theta_norm, v_norm = _norm(saved), _norm([v[n] for n in names if n in v])
    if v_norm == 0.0:
        raise MeasurementError("a finite difference along zero says nothing; give a direction")

    def gradient_at(h: float) -> tuple[Tensor | None, ...]:
        # Through .data: version counters stay, so a live graph over these parameters survives.
        for name, p, start in zip(names, tensors, saved, strict=True):
            p.data.copy_(start)
            if name in v:
                p.data.add_(v[name].to(p), alpha=h)
        with torch.enable_grad():
            return torch.autograd.grad(loss(), tensors, allow_unused=True)

    defects = []
    try:
        for share in steps:
            h = share * max(theta_norm, 1.0) / v_norm
            pairs = zip(gradient_at(h), gradient_at(-h), strict=True)
            differences = [
                (up - down) / (2.0 * h) if up is not None and down is not None else None
                for up, down in pairs
            ]
            wrong = [
                product[name] - difference if difference is not None else product[name]
                for name, difference in zip(names, differences, strict=True)
            ]
            size = _norm([d for d in differences if d is not None])
            defects.append(_norm(wrong) / size if size > 0.0 else math.inf * _norm(wrong))
    finally:
        for p, start in zip(tensors, saved, strict=True):
            p.data.copy_(start)
    return min(defects)


def _norm(tensors: list[Tensor]) -> float:
    squares = [t.detach().to("cpu", torch.float64).square().sum() for t in tensors]
    return math.sqrt(sum(float(s) for s in squares))


def unreliable_nodes(loss: Tensor) -> list[str]:
    """Returns the custom functions in the graph whose second derivative is silently wrong.

    These are the ones marked ``once_differentiable``: autograd's guard against differentiating them
    twice does not fire when gradients are asked for particular inputs; and reentrant checkpoints,
    which hide the parameters inside from being asked for: they would count as not reached.
    """
    return sorted(
        {
            _name(f)
            for f in _custom_functions(loss)
            if _once_differentiable(f) or f.__name__ == "CheckpointFunction"
        }
    )


def unverified_nodes(loss: Tensor) -> list[str]:
    """Returns the other custom functions in the graph, written outside torch.

    Their second derivative may be right; `finite_difference_defect` can tell.
    """
    return sorted(
        {
            _name(f)
            for f in _custom_functions(loss)
            if not _once_differentiable(f) and f.__module__.partition(".")[0] != "torch"
        }
    )


def recomputes(loss: Tensor) -> bool:
    """Whether a backward pass runs code to get at saved tensors, as under checkpointing."""
    fields: dict[type, list[str]] = {}
    for node in _nodes(loss):
        kind = type(node)
        if kind not in fields:
            fields[kind] = [name for name in dir(node) if name.startswith("_raw_saved_")]
        for name in fields[kind]:
            saved = getattr(node, name)
            for one in saved if isinstance(saved, tuple) else (saved,):
                if getattr(one, "unpack_hook", None) is not None:
                    return True
    return False


def _custom_functions(loss: Tensor) -> Iterator[Any]:
    for node in _nodes(loss):
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            yield node._forward_cls  # type: ignore[attr-defined]


def _nodes(loss: Tensor) -> Iterator[Any]:
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(following for following, _ in node.next_functions)


def _once_differentiable(function: Any) -> bool:
    # The decorator wraps with functools.wraps, and nothing else leaves this mark on a backward.
    return hasattr(function.backward, "__wrapped__")


def _name(function: Any) -> str:
    return f"{function.__module__}.{function.__qualname__}"
