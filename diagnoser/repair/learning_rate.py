"""Repairs of the step: learning rates, warmup, averaging factors, gradient norms.

They change nothing that the script owns: see `diagnoser.stepping`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

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

    With W' = factor W and the same loss of both, the gradient of W is factor times that of W': the
    script sees that one, so that what clips or logs gradients, and what averages them, is not out
    of proportion; a step of W is one of W' times factor, and decay does not change with it. What is
    measured along steps from then on has a part of these weights that is factor times too small.
    """
    wanted = {id(tensor) for tensor in tensors}

    def options(group: Options) -> Options:
        if group.get("lr") is None:
            return {}
        decay = group.get("weight_decay")
        slower = {"weight_decay": decay / factor} if decay else {}
        return {"lr": group["lr"] * factor, **slower}

    steppers = [(tensor, live.optimizer_of(tensor)) for tensor in tensors]
    # The step of LBFGS has one rate for all, and a gradient that fits its loss.
    stepped = [(t, o) for t, o in steppers if not (o is None or isinstance(o, torch.optim.LBFGS))]
    hooks = [
        tensor.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]
        for tensor, _ in stepped
        if tensor.requires_grad
    ]
    optimizers = {id(optimizer): optimizer for _, optimizer in stepped}
    undo = [adjust(optimizer, Adjustment(wanted, options)) for optimizer in optimizers.values()]
    return _all_of([*undo, *(hook.remove for hook in hooks)])


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
    live: Live,
    component: str,
    beta1: float | None = None,
    beta2: float | None = None,
    eps: float | None = None,
) -> Undo:
    """Gives Adam and its kin other averaging factors, or another epsilon, from now on.

    Raises:
        RepairError: Its optimizer has none, one of them is not in [0, 1), epsilon is no positive
            number, or none is given.
    """
    if beta1 is None and beta2 is None and eps is None:
        raise RepairError("change_betas: give beta1, beta2 or both, or eps")
    betas = [beta for beta in (beta1, beta2) if beta is not None]
    for beta in betas:
        if not 0.0 <= beta < 1.0:
            raise RepairError(f"change_betas: {beta} is not in [0, 1)")
    if eps is not None and not (math.isfinite(eps) and eps > 0):
        raise RepairError(f"change_betas: eps {eps} is no positive number")
    asked = [name for name, any_given in (("betas", betas), ("eps", eps)) if any_given]
    able = [o for name in asked for o in _stepping(live, component, "change_betas", name)]
    optimizers = list({id(optimizer): optimizer for optimizer in able}.values())

    def options(group: Options) -> Options:
        changed: dict[str, Any] = {}
        if group.get("betas") is not None:
            first, second, *more = group["betas"]
            given = (first if beta1 is None else beta1, second if beta2 is None else beta2)
            changed["betas"] = (*given, *more)
        if eps is not None and group.get("eps") is not None:
            changed["eps"] = eps
        return changed

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
