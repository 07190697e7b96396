r"""Is the product really the Hessian's? Checks against silently wrong derivatives.

Some graphs differentiate a second time without an error and give a wrong product: a custom
``torch.autograd.Function`` whose backward is marked ``once_differentiable``, one that keeps tensors
on its context outside ``save_for_backward``, a checkpoint that draws a new dropout mask each time.
Wrong products of the first and last kind are not symmetric; the second kind can be, and only a
finite difference finds it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from diagnoser.curvature.finite_difference import CentralDifference
from diagnoser.curvature.operator import Operator, Vector
from diagnoser.errors import MeasurementError

_COLLECTIVE: Final = re.compile(
    "all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|broadcast|wait_?tensor|c10d",
    re.IGNORECASE,
)


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
    loss: Callable[[], Tensor], parameters: Mapping[str, Tensor], v: Vector, product: Vector
) -> float:
    """Returns the distance of ``product`` from the difference of gradients, as a share of that.

    Args:
        loss: Computes the loss again, always on the same samples.
        parameters: Name to leaf tensor; changed while measuring and copied back, bit for bit.
        v: The direction.
        product: What `Hessian.product` (v) gave.

    Raises:
        MeasurementError: Where there is nothing to compare with: a direction of zeros, or
            differences that no two step lengths agree on (`CentralDifference`).
    """
    if _norm([v[name] for name in product if name in v]) == 0.0:
        raise MeasurementError("a finite difference along zero says nothing; give a direction")
    with CentralDifference(loss, parameters) as operator:
        difference = operator.product(v, list(product))
    size = _norm(list(difference.values()))
    wrong = _norm([product[name] - difference[name] for name in difference])
    if wrong == 0.0:
        return 0.0
    return wrong / size if size > 0.0 else math.inf


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


def communicating_nodes(loss: Tensor) -> list[str]:
    """Returns what in the graph may wait for other ranks when it is gone through again.

    Collectives that torch knows by name, and all functions written in Python (synchronised batch
    norm and tensor parallelism are), whatever they do, but for DDP's own, which does nothing here.
    """
    names = {_name(f) for f in _custom_functions(loss) if f.__name__ != "_DDPSink"}
    names |= {node.name() for node in _nodes(loss) if _COLLECTIVE.search(node.name())}
    return sorted(names)


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
