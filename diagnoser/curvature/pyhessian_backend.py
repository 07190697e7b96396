"""PyHessian (Yao et al. 2020) as a second opinion, always on a copy of the model.

Know what its numbers are before comparing them. Its trace stops when two consecutive means differ
by little *relative to the signed mean*: below zero that always holds, so a negative trace comes
from two random vectors. Its «top eigenvalue» is the one of largest magnitude, either sign, by power
iteration, and can lie between two ends of similar magnitude. The model is put into eval mode.

Licence: the metadata of version 0.1 says MIT, the headers of its files say GPL-3. It is therefore
optional, imported here only, when asked for; nothing of it is copied.
"""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diagnoser.errors import MeasurementError
from diagnoser.types import Estimate

LossFunction = Callable[[nn.Module, Any], Tensor]
"""Loss of a model on a batch, as for a probe batch: ``loss_fn(model, batch)``."""


def pyhessian_trace(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    *,
    parameters: Collection[str] | None = None,
    seed: int = 0,
    max_probes: int = 100,
    tolerance: float | None = 1e-3,
) -> Estimate:
    """Returns PyHessian's trace over some parameters; ``samples`` is its number of probes.

    Args:
        model: Left exactly as it is; a copy is measured, in eval mode.
        loss_fn: Called once, with the copy.
        batch: Handed through to ``loss_fn``.
        parameters: Names of the parameters of the block; None: all that require gradients.
        seed: Of PyHessian's random vectors; torch's own streams are put back.
        max_probes: The largest number of random vectors.
        tolerance: PyHessian's own stop rule (see above for what it does to negative traces); None
            switches it off, so that all of ``max_probes`` are used.

    Raises:
        MeasurementError: When PyHessian is not installed or cannot measure this model.
    """
    with _hessian(model, loss_fn, batch, parameters, seed) as hessian:
        probes = hessian.trace(
            maxIter=max_probes, tol=-math.inf if tolerance is None else tolerance
        )
        count = len(probes)
        error = statistics.stdev(probes) / math.sqrt(count) if count > 1 else math.nan
        return Estimate(
            value=float(statistics.fmean(probes)),
            std_error=error,
            samples=count,
            method="pyhessian",
            dtype=_dtype(model),
        )


def pyhessian_top_eigenvalues(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    groups: Mapping[str, Collection[str]],
    *,
    seed: int = 0,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
) -> dict[str, Estimate]:
    """Returns PyHessian's eigenvalue of largest magnitude of each group of parameters.

    Power iteration gives no error, so ``std_error`` is None. Arguments as for `pyhessian_trace`;
    ``groups`` maps a group's name to the names of its parameters.
    """
    found: dict[str, Estimate] = {}
    for group, parameters in groups.items():
        with _hessian(model, loss_fn, batch, parameters, seed) as hessian:
            values, _ = hessian.eigenvalues(maxIter=max_iterations, tol=tolerance, top_n=1)
            found[group] = Estimate(
                value=float(values[0]), std_error=None, method="pyhessian", dtype=_dtype(model)
            )
    return found


class _Loss(nn.Module):
    """A model whose output is its loss on one batch: PyHessian knows tensors only, not batches."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction, batch: Any) -> None:
        super().__init__()
        self.model = model
        self._loss_fn = loss_fn
        self._batch = batch

    def forward(self, _: Tensor) -> Tensor:
        return self._loss_fn(self.model, self._batch)


@contextmanager
def _hessian(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    parameters: Collection[str] | None,
    seed: int,
) -> Iterator[Any]:
    """Yields a PyHessian object on a copy of the model; restores the random streams after."""
    try:
        from pyhessian import hessian as pyhessian
    except ImportError as error:
        raise MeasurementError(
            "the curvature backend «pyhessian» is not installed; "
            "install it with «pip install diagnoser[pyhessian]», or use the built-in one"
        ) from error
    device = next(model.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    twin = _Loss(copy.deepcopy(model), loss_fn, batch).eval()
    with torch.random.fork_rng(cuda), torch.enable_grad(), warnings.catch_warnings():
        # A gradient with a graph makes a reference cycle, says torch; PyHessian clears it later.
        warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
        torch.manual_seed(seed)
        try:
            # Fused attention has no second derivative, and eval mode is what chooses it.
            with sdpa_kernel(SDPBackend.MATH):
                _restrict(twin, parameters)
                nothing = torch.zeros((), device=device)
                yield pyhessian(
                    twin, lambda loss, _: loss, data=(nothing, nothing), cuda=device.type == "cuda"
                )
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise MeasurementError(
                f"pyhessian cannot measure this model: {reason}; use the built-in backend"
            ) from error


def _restrict(twin: _Loss, names: Collection[str] | None) -> None:
    """Lets only the named parameters of the copy require gradients, and only where they have one.

    PyHessian puts the number 0.0 where a gradient is missing, and then fails.
    """
    own = dict(twin.model.named_parameters())
    if names is not None:
        unknown = sorted(set(names) - own.keys())
        if unknown:
            raise MeasurementError(
                f"{unknown[0]}: no such parameter; pyhessian measures whole parameters by name"
            )
        for name, parameter in own.items():
            parameter.requires_grad_(parameter.requires_grad and name in names)
    wanted = [p for p in own.values() if p.requires_grad]
    if not wanted:
        raise MeasurementError("no parameter of the group requires a gradient; nothing to measure")
    gradients = torch.autograd.grad(twin(torch.empty(0)), wanted, allow_unused=True)
    for parameter, gradient in zip(wanted, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def _dtype(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")
