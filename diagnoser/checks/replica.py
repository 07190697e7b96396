"""A model run once more, beside the training, without leaving a trace in it (law 1).

The copy shares parameters with the model, which it only reads: a forward that writes to them, as
one that averages a teacher does, is held back. Everything else (buffers, counters, caches, lists)
it has for itself. It runs without gradients, in eval mode, without the user's hooks; what its
forward prints is dropped. What a forward changes outside of its own module (a global, a file)
cannot be held back: such models must not be replayed, and no check can see it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diagnoser.checks.calls import Call, changed, is_plain, tensors_of
from diagnoser.checks.trace import Trace, memory, written
from diagnoser.errors import MeasurementError

COMMUNICATING = frozenset({"c10d", "_c10d_functional", "c10d_functional"})  # operations of ranks


class Replica:
    """A copy of the module of a call that can be run on changed inputs.

    Args:
        call: The call to repeat.
        shared: Parameters that are not copied, beside the module's own: those of layers that it
            keeps in a plain list.

    Raises:
        MeasurementError: The module cannot be copied.
    """

    def __init__(self, call: Call, shared: Iterable[Tensor] = ()) -> None:
        self.call = call
        self.module, self._theirs = _copy(call.module, shared)
        self.given: set[int] = set()  # ids of the tensors that the last run was given

    def run(
        self,
        args: tuple[Any, ...] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        trace: Trace | None = None,
    ) -> list[Tensor]:
        """Runs the copy and returns the tensors of its output, detached.

        Args:
            args: Arguments in place of the recorded ones.
            kwargs: The same of those by name.
            trace: What notes the operations of this run.

        Raises:
            MeasurementError: The forward failed; the text says how.
        """
        args = self.call.args if args is None else args
        kwargs = self.call.kwargs if kwargs is None else kwargs
        # Cloned: a forward may write into its inputs.
        args, kwargs = changed(args, _clone), changed(dict(kwargs), _clone)
        self.given = {id(tensor) for tensor in tensors_of([args, kwargs])}
        try:
            with (
                _silently(),
                torch.no_grad(),
                _no_fast_path(),
                torch.random.fork_rng(devices=[]),
                _unchanged(self._theirs),
            ):
                # Dropout that is on in eval mode draws the same each time: only inputs differ.
                torch.default_generator.manual_seed(0)
                with trace or contextlib.nullcontext():
                    output = self.module(*args, **kwargs)
        except MeasurementError as error:  # in words already
            raise MeasurementError(f"the model cannot be run on its batch again: {error}") from None
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            raise MeasurementError(
                f"the model cannot be run on its batch again ({text})"
            ) from error
        # What was computed without gradients stays the tensor that the trace knows.
        return [t.detach() if t.requires_grad else t for t in tensors_of(output)]


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns the model inside of what spreads it over ranks or devices."""
    while type(module).__name__ in ("DistributedDataParallel", "DataParallel"):
        module = module.module  # type: ignore[assignment]
    return module


class Alone(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses collectives, before they begin: other ranks may run a copy more or less often."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation unless it communicates."""
        if func.namespace in COMMUNICATING:
            raise MeasurementError("its forward communicates with other ranks")
        return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


class _ReadOnly(Alone):  # type: ignore[no-untyped-call]
    """Also refuses operations that would write to some tensors, before they do."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._theirs = {memory(tensor) for tensor in tensors} - {0}

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if any(memory(tensor) in self._theirs for tensor in written(func, args, kwargs)):
            raise MeasurementError("its forward writes to its parameters")
        return func(*args, **kwargs)


@contextlib.contextmanager
def _unchanged(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Keeps tensors as they are, whatever a forward does to them (an average of weights, say).

    An assignment to ``data`` is no operation: it leaves the old storage alone, which is put back.
    """
    before = [(t, t.detach(), t.requires_grad, t.grad) for t in tensors]
    try:
        with _ReadOnly(tensors):
            yield
    finally:
        for tensor, old, requires_grad, grad in before:
            if memory(tensor) != memory(old) or tensor.shape != old.shape:
                tensor.data = old
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
            if tensor.grad is not grad:
                tensor.grad = grad


def _copy(module: nn.Module, shared: Iterable[Tensor]) -> tuple[nn.Module, list[Tensor]]:
    """Returns a copy, and the tensors that it has in common with the module."""
    theirs = [*shared, *module.parameters()]
    memo: dict[int, Any] = {id(p): p for p in theirs}
    for part in module.modules():
        for tensor in tensors_of([v for k, v in vars(part).items() if k != "_parameters"]):
            if tensor.grad_fn is not None:  # torch refuses to copy it
                memo[id(tensor)] = tensor.detach()
                theirs.append(tensor)
            elif not is_plain(tensor):
                raise MeasurementError(f"{type(part).__name__} holds a tensor that is not dense")
    try:
        replica = copy.deepcopy(module, memo)
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise MeasurementError(f"the model cannot be copied ({text})") from error
    # Layers in a plain list are no modules of their owner, but they are copied with it.
    copies = {id(m): m for m in (*replica.modules(), *memo.values()) if isinstance(m, nn.Module)}
    for part in copies.values():
        part.training = False
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            hooks: dict[int, Any] = vars(part).get(name) or {}
            for key, hook in list(hooks.items()):
                # Those of torch compute weights (weight_norm); those of the user only look.
                if not getattr(type(hook), "__module__", "").startswith("torch.") and not getattr(
                    hook, "__module__", ""
                ).startswith("torch."):
                    del hooks[key]
    return replica, list({id(tensor): tensor for tensor in theirs}.values())


@contextlib.contextmanager
def _silently() -> Iterator[None]:
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    """The fused encoder layer of eval mode hides its attention."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
