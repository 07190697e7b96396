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
    ON_A_PROBE,
    CompiledCalls,
    Hessian,
    ReplayHessian,
    compiled_nodes,
    recomputes,
    repetition_defect,
    symmetry_defect,
    unreliable_nodes,
    unverified_nodes,
)
from diagnoser.errors import MeasurementError

MOST_DEFECT = 1e-3  # of symmetry and repetition; right products have 1e-6 in float32
MOST_DEFECT_LOW = 5e-2  # in bfloat16 and float16
SIGN = "CheckpointFunction"  # of reentrant checkpoints


class LiveGraphs:
    """Makes operators of live losses.

    The first products on a graph with custom functions, or that computes things again (as under
    checkpointing), are checked: they must be symmetric and repeat. Wrong second derivatives and
    recomputations that draw other random numbers each time show there, and what failed once is not
    tried again, for a check can pass by chance. What symmetry cannot show is noted.

    Attributes:
        notes: What is worth knowing about the numbers, each once.
        repeats: Whether what is computed again gives the same numbers; None while not known.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.repeats: bool | None = None
        self._calls: CompiledCalls | None = None
        self._ready = True
        self._checked: dict[tuple[str, ...], str] = {}  # to what is wrong, if anything

    def follow(self, modules: Iterable[nn.Module]) -> bool:
        """Notes calls of compiled modules from now on, in place of those followed before.

        Returns:
            Whether there is one.
        """
        self.stop()
        calls = CompiledCalls(modules)
        if calls.modules:
            self._calls = calls.__enter__()
            self._ready = False
        return bool(calls.modules)

    def forget(self) -> None:
        """Lets go of the calls noted so far: their graph is gone."""
        self._ready = True
        if self._calls is not None:
            self._calls.clear()

    def stop(self) -> None:
        """Ends following."""
        if self._calls is not None:
            self._calls.__exit__()
            self._calls.clear()
            self._calls = None

    def ready(self, loss: Tensor) -> bool:
        """Whether a loss can be measured: not one of compiled calls made before following began."""
        return self._ready or not compiled_nodes([loss])

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
                    f"use_reentrant=False), or {ON_A_PROBE}"
                )
            raise MeasurementError(f"{node}: its second derivative would be wrong; {ON_A_PROBE}")
        functions = tuple(unverified_nodes(loss))
        doubtful = bool(functions) or recomputes(loss)
        if doubtful:
            self._refuse(functions)
        if compiled_nodes([loss]):
            calls = [] if self._calls is None else self._calls.calls
            hessian: Hessian = ReplayHessian(loss, parameters, calls, scale=scale)
        else:
            hessian = Hessian(loss, parameters, scale=scale, sites=sites)
        if doubtful and functions not in self._checked:
            try:
                self._checked[functions] = self._what_is_wrong(hessian, functions)
                self._refuse(functions)
            except BaseException:
                hessian.release()
                raise
        return hessian

    def _refuse(self, functions: tuple[str, ...]) -> None:
        wrong = self._checked.get(functions)
        if wrong:
            raise MeasurementError(f"{wrong}; {ON_A_PROBE}")

    def _what_is_wrong(self, hessian: Hessian, functions: tuple[str, ...]) -> str:
        low = torch.finfo(getattr(torch, hessian.dtype)).eps > torch.finfo(torch.float32).eps
        most = MOST_DEFECT_LOW if low else MOST_DEFECT
        generator = torch.Generator().manual_seed(0)
        v = {
            name: torch.randn(p.shape, generator=generator).to(p)
            for name, p in hessian.parameters.items()
        }
        Hv = hessian.product(v)
        self.repeats = bool(repetition_defect(hessian, v, Hv) <= most)
        if not self.repeats:
            return (
                "something is computed again with other random numbers, or is not finite: products "
                "with the Hessian do not repeat (look for preserve_rng_state=False in checkpoints)"
            )
        # Against Hv, not another random vector: those are all but orthogonal in high dimensions.
        defect = symmetry_defect(hessian, Hv, v)
        if not defect <= most:
            names = ", ".join(functions) or "a function"
            return (
                f"{names} has a wrong second derivative: products are not symmetric ({defect:.0%})"
            )
        if functions:
            self.notes.append(
                f"{', '.join(functions)}: products with its second derivative are symmetric; that "
                "they are right shows only where the loss can be computed again (loss_fn=, probe=)"
            )
        return ""
