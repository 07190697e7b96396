"""The few places of torch that a watched process is intercepted at, and nothing else.

One function is replaced (`torch.autograd.backward`, which `Tensor.backward`, Lightning, Hugging
Face and accelerate all look up when they are called), one global optimizer post-hook is the clock,
and some constructors keep books: which modules and optimizers exist, which tensors retain a
gradient or have a hook, by what a `GradScaler` multiplied a loss. Clipping and schedules leave
notes. The forward is touched on the few steps that are checked alone, where calls are recorded.

On unmeasured steps this costs a few Python calls a step (benchmarks/overhead.py).
"""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import BackwardHook
from torch.utils.weak import WeakTensorKeyDictionary

from diagnoser.checks import user_line
from diagnoser.errors import UsageError
from diagnoser.monitor.recorder import COMPILED, CallRecorder
from diagnoser.types import Where

FIRST_OWN_STEP = 2  # of a schedule: the first is its constructor's
MOST_CLIPS = 256  # whose norms are kept until they are read


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
    scalers: References[Any]  # that have scaled a loss
    schedulers: References[Any]
    optimizer_places: dict[int, Where]  # id of an optimizer -> where it was made

    def note_living_modules(self) -> None:
        """Adds the modules that are older than the watch: 0.1 s and more, so only on need."""
        for thing in gc.get_objects():
            if issubclass(type(thing), nn.Module):  # isinstance asks proxies, which may be dead
                self.modules.add(thing)


@dataclass(slots=True)
class Notes:
    """What the program did between backward and step, and with its schedule.

    ``clips`` counts calls of ``clip_grad_norm_``; ``clip_ratios`` are the last total norms over
    their limit, still on their device. ``clips_scaled`` counts those of gradients that a scaler had
    not unscaled, ``clips_late`` those behind a step and before the next backward.
    ``scheduler_first`` says whether a schedule was advanced before any optimizer had stepped,
    ``schedule_length`` how often the longest cosine was gone through.
    """

    clips: int = 0
    clips_scaled: int = 0
    clips_late: int = 0
    stepped: bool = False  # since the last backward
    clip_ratios: list[Any] = field(default_factory=list)
    clip_place: Where | None = None
    scheduler_steps: int = 0
    scheduler_first: bool = False
    schedule_length: float = 0.0
    scheduler_place: Where | None = None


class Interception:
    """Installs the patches on entry, takes every one of them back on exit."""

    def __init__(self, listener: Listener) -> None:
        self.books = Books(
            modules=References(),
            optimizers=References(),
            retaining=References(),
            tensor_hooks=References(),
            backward_hooks=References(),
            scalers=References(),
            schedulers=References(),
            optimizer_places={},
        )
        self.notes = Notes()
        self.recorder = CallRecorder()
        self._listener = listener
        self._thread = threading.get_ident()
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Interception:
        if getattr(torch.autograd.backward, "_diagnoser", False):
            raise UsageError("training is watched already: leave the first watch before a second")
        books, notes, thread = self.books, self.notes, self._thread
        original = torch.autograd.backward

        @functools.wraps(original)
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            nested = torch._C._current_graph_task_id() != -1  # reentrant checkpointing
            if nested or threading.get_ident() != thread:
                original(tensors, *args, **kwargs)
                return
            self._listener.before_backward(tensors)
            original(tensors, *args, **kwargs)
            notes.stepped = False
            self._listener.after_backward()

        backward._diagnoser = True  # type: ignore[attr-defined]
        self._replace(torch.autograd, "backward", backward)

        def stepped(optimizer: torch.optim.Optimizer, *_: object) -> None:
            notes.stepped = True
            self._listener.after_step(optimizer)

        handle = register_optimizer_step_post_hook(stepped)
        self._undo.append(handle.remove)
        begin = register_optimizer_step_pre_hook(lambda *_: self._listener.before_step())
        self._undo.append(begin.remove)

        self._after(nn.Module, "__init__", lambda module, *_: books.modules.add(module))
        self._after(nn.Module, "__setstate__", lambda module, *_: books.modules.add(module))
        self._after(torch.optim.Optimizer, "__init__", self._note_optimizer)
        self._after(Tensor, "retain_grad", lambda tensor, *_: books.retaining.add(tensor))
        self._after(Tensor, "register_hook", self._note_tensor_hook)
        self._after(BackwardHook, "__init__", lambda hook, *_: books.backward_hooks.add(hook))
        self._note_scaled_losses()
        self._note_clips()
        schedule = torch.optim.lr_scheduler.LRScheduler
        self._after(schedule, "__init__", lambda made, *_: books.schedulers.add(made))
        self._after(schedule, "step", self._note_schedule)
        self._note_calls()
        return self

    def __exit__(self, *_: object) -> None:
        self.recorder.end("the watch is over")
        while self._undo:
            self._undo.pop()()

    @contextmanager
    def telling(self, listener: Listener) -> Iterator[None]:
        """Tells somebody else meanwhile; what is noted then is forgotten afterwards."""
        mine, notes, recorder = self._listener, self.notes, self.recorder
        earlier = replace(notes, clip_ratios=list(notes.clip_ratios))
        evaluations, step = list(recorder.evaluations), recorder.step
        was_on = recorder.is_on
        self._listener = listener
        try:
            yield
        finally:
            self._listener = mine
            for one in fields(notes):
                setattr(notes, one.name, getattr(earlier, one.name))
            recorder.leave_no_grad()
            recorder.take()
            recorder.evaluations[:], recorder.step = evaluations, step
            if was_on:
                recorder.start()

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

    def _note_clips(self) -> None:
        """Keeps what ``clip_grad_norm_`` was given and found, wherever it is looked up."""
        from torch.nn.utils import clip_grad  # noqa: PLC0415 - a module, beside its own function

        original, notes = clip_grad.clip_grad_norm_, self.notes

        @functools.wraps(original)
        def clip_grad_norm_(parameters: Any, max_norm: Any, *args: Any, **kwargs: Any) -> Any:
            total = original(parameters, max_norm, *args, **kwargs)
            notes.clips += 1
            notes.clips_scaled += self._is_scaled()
            notes.clips_late += notes.stepped
            notes.clip_place = notes.clip_place or user_line()
            if isinstance(total, Tensor) and isinstance(max_norm, int | float) and max_norm > 0:
                notes.clip_ratios.append(total.detach() / max_norm)
                del notes.clip_ratios[:-MOST_CLIPS]
            return total

        for owner in (torch.nn.utils, clip_grad):
            self._replace(owner, "clip_grad_norm_", clip_grad_norm_)

    def _is_scaled(self) -> bool:
        """Whether a scaler has scaled a loss and unscaled the gradients of no optimizer since."""
        return any(
            scaler.is_enabled()
            and not any(
                state["stage"].name == "UNSCALED" for state in scaler._per_optimizer_states.values()
            )
            for scaler in self.books.scalers
        )

    def _note_schedule(self, scheduler: Any, *_: object) -> None:
        if getattr(scheduler, "_step_count", 0) < FIRST_OWN_STEP:  # its constructor's
            return
        if self.notes.scheduler_steps == 0 and not getattr(
            scheduler.optimizer, "_opt_called", False
        ):
            self.notes.scheduler_first = True
            self.notes.scheduler_place = user_line()
        self.notes.scheduler_steps += 1
        if type(scheduler) is torch.optim.lr_scheduler.CosineAnnealingLR and scheduler.T_max:
            gone = scheduler.last_epoch / scheduler.T_max
            self.notes.schedule_length = max(self.notes.schedule_length, gone)
            if gone > 1:
                self.notes.scheduler_place = self.notes.scheduler_place or user_line()

    def _note_calls(self) -> None:
        """Has calls recorded, and no compiler see that."""
        recorder = self.recorder
        for context in (torch.no_grad, torch.inference_mode):
            self._before(context, "__enter__", recorder.enter_no_grad)
            self._before(context, "__exit__", recorder.leave_no_grad)

        def compiling() -> None:
            recorder.end(COMPILED)

        self._before(torch, "compile", compiling)
        self._before(nn.Module, "compile", compiling)
        for name in ("script", "trace"):
            self._before(torch.jit, name, recorder.stop)
        recorder.start()

    def _before(self, owner: Any, name: str, act: Callable[[], None]) -> None:
        """Calls ``act()`` before a function, whatever it is called with."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            act()
            return original(*args, **kwargs)

        self._replace(owner, name, function)

    def _note_optimizer(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.books.optimizers.add(optimizer)
        place = user_line()
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
                self.books.scalers.add(instance)
            return scaled

        self._replace(scaler, "scale", scale)
