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
        RepairError: No optimizer steps it with a rate of its own, or the factor is no positive
            number.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise RepairError(f"scale_learning_rate: factor {factor} is no positive number")
    optimizers = _stepping(live, component, "scale_learning_rate", "lr")

    def options(group: Options) -> Options:
        return {"lr": group["lr"] * factor} if group.get("lr") is not None else {}

    return _adjust(live, component, optimizers, lambda which: Adjustment(which, options))


def step_along(live: Live, tensors: Sequence[Tensor], factor: float) -> Undo:
    """Has parameters that were multiplied by ``factor`` go on as what they were would have.

    With W' = factor W and the same loss of both, a step of W by ``-rate g`` is one of W' by
    ``-factor**2 rate g'``; an optimizer that divides gradients by their own size, as all with an
    epsilon do, needs the factor once.
    """
    wanted = {id(tensor) for tensor in tensors}

    def options(group: Options) -> Options:
        power = 1 if "eps" in group else 2
        return {"lr": group["lr"] * factor**power} if group.get("lr") is not None else {}

    optimizers = {id(o): o for t in tensors if (o := live.optimizer_of(t)) is not None}
    undo = [
        adjust(optimizer, Adjustment(wanted, options))
        for optimizer in optimizers.values()
        if not isinstance(optimizer, torch.optim.LBFGS)  # its step has one rate for all
    ]
    return _all_of(undo)


def add_warmup(live: Live, component: str, steps: float) -> Undo:
    """Lets the learning rate rise from near zero to what it is over the next ``steps`` steps.

    Raises:
        RepairError: No optimizer steps the component with a rate of its own, or there are less
            than two steps.
    """
    if not (math.isfinite(steps) and steps >= 2):
        raise RepairError(f"add_warmup: {steps} steps; give 2 or more")
    optimizers = _stepping(live, component, "add_warmup", "lr")

    def make(which: set[int] | None) -> Adjustment:
        made = [0]

        def options(group: Options) -> Options:
            share = (made[0] + 1) / (steps + 1)
            return {"lr": group["lr"] * share} if group.get("lr") is not None and share < 1 else {}

        def after() -> None:
            made[0] += 1

        return Adjustment(which, options, after=after, counts=made)

    return _adjust(live, component, optimizers, make)


def change_betas(
    live: Live, component: str, beta1: float | None = None, beta2: float | None = None
) -> Undo:
    """Gives Adam and its kin other averaging factors in every step from now on.

    Raises:
        RepairError: Its optimizer has none, one of them is not in [0, 1), or none is given.
    """
    if beta1 is None and beta2 is None:
        raise RepairError("change_betas: give beta1, beta2 or both")
    for beta in (beta1, beta2):
        if beta is not None and not 0.0 <= beta < 1.0:
            raise RepairError(f"change_betas: {beta} is not in [0, 1)")
    optimizers = _stepping(live, component, "change_betas", "betas")

    def options(group: Options) -> Options:
        if group.get("betas") is None:
            return {}
        first, second, *more = group["betas"]
        changed = (first if beta1 is None else beta1, second if beta2 is None else beta2, *more)
        return {"betas": changed}

    return _adjust(live, component, optimizers, lambda which: Adjustment(which, options))


def clip_gradient(live: Live, component: str, norm: float) -> Undo:
    """Scales the gradient of a component down to ``norm`` right before every step that exceeds it.

    A gradient that is not finite is left alone, so that what looks for such still finds it. Where
    several optimizers share a component, each clips what it steps.

    Raises:
        RepairError: No optimizer steps it, or the norm is no positive number.
    """
    if not (math.isfinite(norm) and norm > 0):
        raise RepairError(f"clip_gradient: norm {norm} is no positive number")
    parts = live.parts(component)

    @torch.no_grad()
    def before(optimizer: torch.optim.Optimizer) -> None:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        gradients = [
            part.view(tensor.grad)
            for tensor, part in parts
            if tensor.grad is not None and id(tensor) in own
        ]
        if not gradients:
            return
        norms = [_norm(gradient) for gradient in gradients]
        total = torch.linalg.vector_norm(torch.stack([one.to(norms[0].device) for one in norms]))
        scaled_by = getattr(optimizer, "grad_scale", None)  # by a GradScaler; fused steps undo it
        most = norm if scaled_by is None else norm * float(scaled_by)
        if bool(total.isfinite()) and float(total) > most:
            for gradient in gradients:
                gradient.mul_(most / float(total))

    optimizers = live.with_optimizers_of([tensor for tensor, _ in parts])
    return _adjust(live, component, optimizers, lambda which: Adjustment(which, before=before))


def _norm(gradient: Tensor) -> Tensor:
    """Returns the norm of a gradient, of one with few rows as well, and of half precision."""
    values: Tensor = gradient.coalesce().values() if gradient.is_sparse else gradient
    precision = torch.promote_types(values.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(values, dtype=precision)
    return norm


def _stepping(live: Live, component: str, action: str, option: str) -> list[torch.optim.Optimizer]:
    """Returns the optimizers that step a component and have an option for it.

    Raises:
        RepairError: There is none.
    """
    tensors = live.tensors(component)
    wanted = {id(tensor) for tensor in tensors}
    optimizers = live.with_optimizers_of(tensors)
    able = [
        optimizer
        for optimizer in optimizers
        if any(
            group.get(option) is not None and any(id(p) in wanted for p in group["params"])
            for group in optimizer.param_groups
        )
    ]
    if not able:
        raise RepairError(f"{action}: {type(optimizers[0]).__name__} has no {option}")
    for optimizer in able if component != MODEL else ():
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        if isinstance(optimizer, torch.optim.LBFGS) and not {id(p) for p in stepped} <= wanted:
            raise RepairError(f"{action}: LBFGS steps all parameters as one; give {MODEL}")
    return able


def _adjust(
    live: Live,
    component: str,
    optimizers: Sequence[torch.optim.Optimizer],
    make: Callable[[set[int] | None], Adjustment],
) -> Undo:
    which = None if component == MODEL else {id(tensor) for tensor in live.tensors(component)}
    return _all_of([adjust(optimizer, make(which)) for optimizer in optimizers])


def _all_of(undo: Sequence[Undo]) -> Undo:
    def take_back() -> None:
        for one in undo:
            one()

    return take_back
