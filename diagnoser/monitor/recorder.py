"""Records what a step calls, on the steps that are checked and at a few evaluations.

While it is on, ``nn.Module.__call__`` and the loss functions of `torch.nn.functional` are replaced
by wrappers that note their arguments and pass on. It is off on all other steps, and goes off for
good before anything is compiled: a compiler would take the wrappers into its graphs.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import Tensor, nn

from diagnoser.checks import Call, Calls, LossCall, scored_in_training, unwrapped, user_line
from diagnoser.types import Where

LOSSES = (
    "cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div",
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "cosine_embedding_loss",
)  # fmt: skip
MOST_CALLS = 64  # of one step
MOST_EVALUATIONS = 8  # of a run that are looked at
NO_EVALUATION = ("torch.nn.utils", "torch.optim", "diagnoser")  # where gradients are off, too
COMPILED = "a compiled model: its calls are not seen"


def _is_compiled(module: nn.Module) -> bool:
    kind = type(module).__name__
    return kind == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def _is_shell(module: nn.Module) -> bool:
    """Whether the model that is called is inside: of DDP, and of a module that Lightning lends DDP.

    It gives it its training step for a forward meanwhile.
    """
    names = {kind.__name__ for kind in type(module).__mro__}
    lent = "LightningModule" in names and "forward" in vars(module)
    return lent or "DistributedDataParallel" in names


class CallRecorder:
    """Keeps the outermost calls of the running step while it is on.

    Attributes:
        evaluations: Of those looked at, the step, whether it ran in train mode, and its place.
        step: The running one, as the monitor counts.
        ended: Why nothing more is recorded; None while it may be.
        paused: Whether the monitor itself is at work, whose calls are no evaluations.

    Args:
        is_watched: Whether the running thread is.
    """

    def __init__(self, is_watched: Callable[[], bool]) -> None:
        self.evaluations: list[tuple[int, bool, Where | None]] = []
        self.step = 0
        self.ended: str | None = None
        self._is_watched = is_watched
        self._calls = Calls()
        self._depth = 0
        self._undo: list[Callable[[], None]] = []
        self._evaluating = False
        self.paused = False

    @property
    def is_on(self) -> bool:
        """Whether the calls of a step are being recorded."""
        return bool(self._undo) and not self._evaluating

    def start(self) -> None:
        """Begins to record the calls of a step."""
        self.leave_no_grad()
        self._calls, self._depth = Calls(reason=self.ended), 0
        if self.ended is None and not self._undo:
            self._install(self._note)
            for name in LOSSES:
                self._replace(F, name, self._loss_function(name, getattr(F, name)))

    def take(self) -> Calls:
        """Ends recording, and returns what was called."""
        self.stop()
        calls, self._calls = self._calls, Calls(reason=self.ended)
        return calls

    def stop(self) -> None:
        """Ends recording, until it is started again."""
        while self._undo:
            self._undo.pop()()

    def end(self, reason: str) -> None:
        """Ends recording for good."""
        self.stop()
        self.ended = self.ended or reason
        self._calls = Calls(reason=self.ended)

    def enter_no_grad(self) -> None:
        """Looks at the first model that is called from here on without gradients."""
        if self._undo or self.paused or self.ended is not None:
            return
        if len(self.evaluations) >= MOST_EVALUATIONS or not self._is_watched():
            return
        if sys._getframe(2).f_globals.get("__name__", "").startswith(NO_EVALUATION):
            return
        self._depth, self._evaluating = 0, True
        self._install(self._note_evaluation)

    def leave_no_grad(self) -> None:
        """Ends what `enter_no_grad` began."""
        if self._evaluating:
            self._evaluating = False
            self.stop()

    # -- wrappers ---------------------------------------------------------------------------------

    def _install(self, note: Callable[..., None]) -> None:
        original = nn.Module.__call__
        recorder, is_watched = self, self._is_watched

        @functools.wraps(original)
        def call(module: Any, /, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not is_watched():
                return original(module, *args, **kwargs)
            if _is_compiled(module):  # before the watch began
                recorder.end(COMPILED)
                return original(module, *args, **kwargs)
            if _is_shell(module):
                return original(module, *args, **kwargs)
            recorder._depth += 1
            try:
                output = original(module, *args, **kwargs)
            finally:
                recorder._depth -= 1
            if recorder._depth == 0:
                note(module, args, kwargs, output)
            return output

        self._replace(nn.Module, "__call__", call)

    def _note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            self._note_evaluation(module, args, kwargs, output)
        elif len(self._calls.modules) < MOST_CALLS and torch._C._get_tracing_state() is None:
            model = unwrapped(module)  # what spreads it over ranks is not what is checked
            self._calls.modules.append(
                Call(model, args, kwargs, output, model.training, torch.is_grad_enabled(),
                     user_line())
            )  # fmt: skip

    def _note_evaluation(self, module: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
        if torch.is_grad_enabled() or len(self.evaluations) >= MOST_EVALUATIONS:
            return
        place, model = user_line(), unwrapped(module)
        said = scored_in_training(Call(model, args, kwargs, None, model.training, False, place))
        if said is not None:
            self.evaluations.append((self.step, said, place))
            self.leave_no_grad()

    def _loss_function(self, name: str, original: Any) -> Any:
        names = tuple(inspect.signature(original).parameters)

        @functools.wraps(original)
        def loss(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            both = [*args, *(kwargs.get(k) for k in ("input", "target") if k in kwargs)][:2]
            if len(both) == 2 and all(isinstance(x, Tensor) for x in both):  # noqa: PLR2004
                given = dict(zip(names, args, strict=False)) | kwargs
                options = {k: v for k, v in given.items() if k not in ("input", "target")}
                scores, target = both
                self._calls.losses.append(
                    LossCall(name, scores, target, options, output, user_line())
                )
            return output

        return loss

    def _replace(self, owner: Any, name: str, new: Any) -> None:
        original = vars(owner)[name]
        setattr(owner, name, new)

        def undo() -> None:
            if vars(owner).get(name) is new:
                setattr(owner, name, original)

        self._undo.append(undo)
