"""Operators on the graph of a loss that the program has just computed, and whether to trust them.

A live graph cannot be computed again, so what it does not give exactly is made up for only where
that leaves no doubt: calls of compiled modules are made again uncompiled. Everything else that has
no second derivative, or a wrong one, is refused by name, with the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from diagnoser.curvature import (
    CompiledCalls,
    Hessian,
    ReplayHessian,
    compiled_nodes,
    symmetry_defect,
    unreliable_nodes,
    unverified_nodes,
)
from diagnoser.errors import MeasurementError

MOST_DEFECT = 1e-2  # of symmetry; right products have 1e-7 in float32
MOST_DEFECT_LOW = 5e-2  # in bfloat16 and float16
SIGN = "CheckpointFunction"  # of reentrant checkpoints
REMEDY = "give loss_fn= and probe= to watch(), which measures by central differences"


class LiveGraphs:
    """Makes operators of live losses.

    The first products on a graph with functions that were not seen before are checked for symmetry:
    wrong second derivatives, and recomputations that draw other random numbers each time, show
    there. What symmetry cannot show is noted.

    Attributes:
        notes: What is worth knowing about the numbers, each once.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._calls: CompiledCalls | None = None
        self._checked: set[tuple[str, ...]] = set()

    def follow(self, modules: Iterable[nn.Module]) -> None:
        """Notes calls of compiled modules from now on, in place of those followed before."""
        self.stop()
        calls = CompiledCalls(modules)
        if calls.modules:
            self._calls = calls.__enter__()

    def forget(self) -> None:
        """Lets go of the calls noted so far: their graph is gone."""
        if self._calls is not None:
            self._calls.clear()

    def stop(self) -> None:
        """Ends following."""
        if self._calls is not None:
            self._calls.__exit__()
            self._calls.clear()
            self._calls = None

    def operator(
        self, loss: Tensor, parameters: Mapping[str, Tensor], *, scale: float, sites: bool
    ) -> Hessian:
        """Returns the Hessian of a live loss; arguments as of `Hessian`.

        Raises:
            MeasurementError: When there is none that can be trusted.
        """
        for node in unreliable_nodes(loss):
            if node.endswith(SIGN):
                raise MeasurementError(
                    "a reentrant checkpoint hides the parameters inside it: call checkpoint(..., "
                    f"use_reentrant=False), or {REMEDY}"
                )
            raise MeasurementError(f"{node}: its second derivative would be wrong; {REMEDY}")
        if compiled_nodes([loss]):
            calls = [] if self._calls is None else self._calls.calls
            hessian: Hessian = ReplayHessian(loss, parameters, calls, scale=scale)
        else:
            hessian = Hessian(loss, parameters, scale=scale, sites=sites)
        try:
            self._check(hessian, unverified_nodes(loss))
        except BaseException:
            hessian.release()
            raise
        return hessian

    def _check(self, hessian: Hessian, unverified: list[str]) -> None:
        functions = tuple(unverified)
        if functions in self._checked:
            return
        generator = torch.Generator().manual_seed(0)
        u, v = (
            {
                name: torch.randn(p.shape, generator=generator).to(p)
                for name, p in hessian.parameters.items()
            }
            for _ in range(2)
        )
        defect = symmetry_defect(hessian, u, v)
        low = torch.finfo(getattr(torch, hessian.dtype)).eps > torch.finfo(torch.float32).eps
        if not defect <= (MOST_DEFECT_LOW if low else MOST_DEFECT):
            raise MeasurementError(
                f"products with the Hessian are not symmetric (by {defect:.2g}): "
                + (
                    f"{', '.join(functions)} may have a wrong second derivative; "
                    if functions
                    else "something is computed again with other random numbers, as by a "
                    "checkpoint with preserve_rng_state=False; "
                )
                + REMEDY
            )
        self._checked.add(functions)
        if functions:
            self.notes.append(
                f"{', '.join(functions)}: products with its second derivative are symmetric; that "
                "they are right shows only where the loss can be computed again (loss_fn=, probe=)"
            )
