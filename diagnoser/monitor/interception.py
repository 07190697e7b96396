"""The few places of torch that a watched process is intercepted at, and nothing else.

One function is replaced (`torch.autograd.backward`, which `Tensor.backward`, Lightning, Hugging
Face and accelerate all look up when they are called), one global optimizer post-hook is the clock,
and some constructors keep books: which modules and optimizers exist, which tensors retain a
gradient or have a hook, by what a `GradScaler` multiplied a loss. The forward is not touched.

On unmeasured steps this costs a few Python calls a step (benchmarks/overhead.py).
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import BackwardHook
from torch.utils.weak import WeakTensorKeyDictionary

from diagnoser.errors import UsageError
from diagnoser.types import Where


class Listener(Protocol):
    """Who is told what the training does. None of the calls may raise (law 4)."""

    def before_backward(self, root: Any) -> None:
        """A backward pass is about to start from ``root`` (a tensor or several)."""

    def after_backward(self) -> None:
        """The backward pass has returned."""

    def before_step(self) -> None:
        """An optimizer's step begins; a closure may run whole backwards inside it."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has made a real step."""


T = TypeVar("T")


class References(Generic[T]):
    """Live objects in order of appearance, by identity: user classes may be unhashable."""

    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[T]] = {}

    def add(self, item: T) -> None:
        """Remembers ``item`` until it dies."""
        key = id(item)
        if key in self._references:  # it goes when its object does, so this is the same one
            return
        try:
            self._references[key] = weakref.ref(item, lambda _: self._references.pop(key, None))
        except TypeError:  # a class with __slots__ and no __weakref__
            return

    def __iter__(self) -> Iterator[T]:
        for reference in list(self._references.values()):
            item = reference()
            if item is not None:
                yield item


# Loss by what a gradient scaler made of it, and the scaler. Not on the tensor, which may be saved.
_UNSCALED: MutableMapping[Tensor, tuple[Tensor, Any]] = WeakTensorKeyDictionary()


def unscaled(loss: Tensor) -> Tensor:
    """Returns the loss that a gradient scaler has multiplied, or ``loss`` itself."""
    before = _UNSCALED.get(loss)
    return loss if before is None else before[0]


def loss_scale(loss: Tensor) -> float:
    """What a gradient scaler has multiplied ``loss`` by; reads it from its device."""
    before = _UNSCALED.get(loss)
    return 1.0 if before is None else float(before[1].get_scale())


@dataclass(frozen=True, slots=True)
class Books:
    """What the constructors noted."""

    modules: References[nn.Module]
    optimizers: References[torch.optim.Optimizer]
    retaining: References[Tensor]
    tensor_hooks: References[OrderedDict[int, Any]]  # autograd holds the dictionaries themselves
    backward_hooks: References[BackwardHook]
    optimizer_places: dict[int, Where]  # id of an optimizer -> where it was made

    def note_living_modules(self) -> None:
        """Adds the modules that are older than the watch: 0.1 s and more, so only on need."""
        for thing in gc.get_objects():
            if issubclass(type(thing), nn.Module):  # isinstance asks proxies, which may be dead
                self.modules.add(thing)


class Interception:
    """Installs the patches on entry, takes every one of them back on exit."""

    def __init__(self, listener: Listener) -> None:
        self.books = Books(References(), References(), References(), References(), References(), {})
        self._listener = listener
        self._thread = threading.get_ident()
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Interception:
        if getattr(torch.autograd.backward, "_diagnoser", False):
            raise UsageError("training is watched already: leave the first watch before a second")
        listener, books, thread = self._listener, self.books, self._thread
        original = torch.autograd.backward

        @functools.wraps(original)
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            nested = torch._C._current_graph_task_id() != -1  # reentrant checkpointing
            if nested or threading.get_ident() != thread:
                original(tensors, *args, **kwargs)
                return
            listener.before_backward(tensors)
            original(tensors, *args, **kwargs)
            listener.after_backward()

        backward._diagnoser = True  # type: ignore[attr-defined]
        self._replace(torch.autograd, "backward", backward)
        handle = register_optimizer_step_post_hook(
            lambda optimizer, *_: listener.after_step(optimizer)
        )
        self._undo.append(handle.remove)
        begin = register_optimizer_step_pre_hook(lambda *_: listener.before_step())
        self._undo.append(begin.remove)

        self._after(nn.Module, "__init__", lambda module, *_: books.modules.add(module))
        self._after(nn.Module, "__setstate__", lambda module, *_: books.modules.add(module))
        self._after(torch.optim.Optimizer, "__init__", self._note_optimizer)
        self._after(Tensor, "retain_grad", lambda tensor, *_: books.retaining.add(tensor))
        self._after(Tensor, "register_hook", self._note_tensor_hook)
        self._after(BackwardHook, "__init__", lambda hook, *_: books.backward_hooks.add(hook))
        self._note_scaled_losses()
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _replace(self, owner: Any, name: str, new: Any) -> None:
        own = name in vars(owner)
        original = getattr(owner, name)
        setattr(owner, name, new)

        def undo() -> None:
            if getattr(owner, name) is not new:
                return  # somebody patched on top of us; taking ours out would break theirs
            if own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)

        self._undo.append(undo)

    def _after(self, owner: type, name: str, note: Callable[..., None]) -> None:
        """Calls ``note(self, *args)`` after a method, whatever it is called with."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def method(instance: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(instance, *args, **kwargs)
            note(instance, *args)
            return result

        self._replace(owner, name, method)

    def _note_optimizer(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.books.optimizers.add(optimizer)
        place = user_place()
        if place is not None:
            self.books.optimizer_places[id(optimizer)] = place

    def _note_tensor_hook(self, tensor: Tensor, *_: object) -> None:
        if isinstance(tensor._backward_hooks, OrderedDict):
            self.books.tensor_hooks.add(tensor._backward_hooks)

    def _note_scaled_losses(self) -> None:
        scaler = torch.amp.grad_scaler.GradScaler
        original = scaler.scale

        @functools.wraps(original)
        def scale(instance: Any, outputs: Any) -> Any:
            scaled = original(instance, outputs)
            if isinstance(scaled, Tensor) and instance.is_enabled():
                # The scale itself is on the device: it is read where it is needed.
                _UNSCALED[scaled] = (outputs, instance)
            return scaled

        self._replace(scaler, "scale", scale)


def user_place(
    skip: tuple[str, ...] = ("torch", "diagnoser", "contextlib", "functools"),
) -> Where | None:
    """The innermost frame of the running call that belongs to the user's own program."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.split(".")[0] not in skip:
            return Where(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return None
