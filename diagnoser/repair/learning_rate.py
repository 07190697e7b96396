"""Repairs of the step: learning rates, warmup, averaging factors, gradient norms.

They change nothing that the script owns: see `diagnoser.stepping`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diagnoser.errors import RepairError
from diagnoser.repair.live import Live
from diagnoser.stepping import Adjustment, Options, adjust
from diagnoser.vocabulary import MODEL

Undo = Callable[[], None]


def scale_learning_rate(live: Live, component: str, factor: float) -> Undo:
    """Multiplies the learning rate of a component by ``factor`` in every step from now on.

    A part of a fused parameter cannot have a rate of its own: the whole parameter gets it.

    Raises:
        RepairError: No optimizer steps it, or the factor is no positive number.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise RepairError(f"scale_learning_rate: factor {factor} is no positive number")

    def options(group: Options) -> Options:
        return {"lr": group["lr"] * factor} if "lr" in group else {}

    return _adjust(live, component, lambda which: Adjustment(which, options))


def add_warmup(live: Live, component: str, steps: float) -> Undo:
    """Lets the learning rate rise from near zero to what it is over the next ``steps`` steps.

    Raises:
        RepairError: No optimizer steps the component, or there are less than two steps.
    """
    if not steps >= 2:
        raise RepairError(f"add_warmup: {steps} steps; give 2 or more")

    def make(which: set[int] | None) -> Adjustment:
        made = [0]

        def options(group: Options) -> Options:
            share = (made[0] + 1) / (steps + 1)
            return {"lr": group["lr"] * share} if "lr" in group and share < 1 else {}

        def after() -> None:
            made[0] += 1

        return Adjustment(which, options, after=after)

    return _adjust(live, component, make)


def change_betas(
    live: Live, component: str, beta1: float | None = None, beta2: float | None = None
) -> Undo:
    """Gives Adam and its kin other averaging factors in every step from now on.

    Raises:
        RepairError: Its optimizer has none, or one of them is not in [0, 1).
    """
    for beta in (beta1, beta2):
        if beta is not None and not 0.0 <= beta < 1.0:
            raise RepairError(f"change_betas: {beta} is not in [0, 1)")
    optimizers = live.with_optimizers_of(live.tensors(component))
    if not any("betas" in group for o in optimizers for group in o.param_groups):
        raise RepairError(f"change_betas: {type(optimizers[0]).__name__} has no betas")

    def options(group: Options) -> Options:
        if "betas" not in group:
            return {}
        first, second, *more = group["betas"]
        changed = (first if beta1 is None else beta1, second if beta2 is None else beta2, *more)
        return {"betas": changed}

    return _adjust(live, component, lambda which: Adjustment(which, options))


def clip_gradient(live: Live, component: str, norm: float) -> Undo:
    """Scales the gradient of a component down to ``norm`` right before every step that exceeds it.

    A gradient that is not finite is left alone, so that what looks for such still finds it.

    Raises:
        RepairError: No optimizer steps it, or the norm is no positive number.
    """
    if not (math.isfinite(norm) and norm > 0):
        raise RepairError(f"clip_gradient: norm {norm} is no positive number")
    tensors = live.tensors(component)

    def before(optimizer: torch.optim.Optimizer) -> None:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        gradients = [p.grad for p in tensors if p.grad is not None and id(p) in own]
        dense = [g for g in gradients if g.layout == torch.strided]
        if not dense:
            return
        total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in dense]))
        scale = float(norm / total) if bool(total.isfinite()) and float(total) > norm else 1.0
        if scale < 1.0:
            for gradient in dense:
                gradient.mul_(scale)

    return _adjust(live, component, lambda which: Adjustment(which, before=before))


def _adjust(live: Live, component: str, make: Callable[[set[int] | None], Adjustment]) -> Undo:
    tensors: Sequence[Tensor] = live.tensors(component)
    which = None if component == MODEL else {id(tensor) for tensor in tensors}
    undo = [adjust(o, make(which)) for o in live.with_optimizers_of(tensors)]

    def take_back() -> None:
        for one in undo:
            one()

    return take_back
