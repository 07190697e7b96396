"""The few places of torch that a watched process is intercepted at, and nothing else.

One function is replaced (`torch.autograd.backward`, which `Tensor.backward`, Lightning, Hugging
Face and accelerate all look up when they are called), one global optimizer post-hook is the clock,
and some constructors keep books: which modules and optimizers exist, which tensors retain a
gradient or have a hook, by what a `GradScaler` multiplied a loss, which steps it skips. Clipping
and schedules leave notes. The forward is touched on the few steps that are checked alone, where
calls are recorded.

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

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer's step begins; a closure may run whole backwards inside it."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has made a real step."""

    def step_skipped(self, optimizer: torch.optim.Optimizer, scale: float) -> None:
        """A gradient scaler left a step out: gradients times ``scale`` are not finite."""


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


class TrainingThread:
    """The thread that is watched: the first that trains, and when it has ended the next.

    Not the next where both trained at once: half of its losses would follow those of the first.

    Attributes:
        shared: Whether another one was seen to train while this one lived.
    """

    def __init__(self) -> None:
        self.shared = False
        self._ident: int | None = None
        self._thread: threading.Thread | None = None

    def may_be_this(self) -> bool:
        """Whether the running thread is watched, or may yet be."""
        return self._ident is None or threading.get_ident() == self._ident

    def is_this(self) -> bool:
        """Whether the running thread, which trains, is the one that is watched."""
        if threading.get_ident() == self._ident:
            return True
        if self._thread is None or not (self.shared or self._thread.is_alive()):
            self._thread, self._ident = threading.current_thread(), threading.get_ident()
            return True
        self.shared = True
        return False


class Interception:
    """Installs the patches on entry, takes every one of them back on exit."""

    _installed = False

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
        self.thread = TrainingThread()
        self.recorder = CallRecorder(self.thread.may_be_this)
        self._listener = listener
        self._undo: list[Callable[[], None]] = []
        self._backward: Callable[..., None] | None = None
        self._was_replaced = False

    def __enter__(self) -> Interception:
        if Interception._installed:
            raise UsageError("training is watched already: leave the first watch before a second")
        Interception._installed = True
        books, notes, thread = self.books, self.notes, self.thread
        original = torch.autograd.backward

        @functools.wraps(original)
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            nested = torch._C._current_graph_task_id() != -1  # reentrant checkpointing
            # Somebody who patched on top of us may call this when the watch is over.
            if nested or not self._undo or not thread.is_this():
                original(tensors, *args, **kwargs)
                return
            self._listener.before_backward(tensors)
            original(tensors, *args, **kwargs)
            notes.stepped = False
            self._listener.after_backward()

        self._backward = backward
        self._replace(torch.autograd, "backward", backward)

        def stepped(optimizer: torch.optim.Optimizer, *_: object) -> None:
            if not thread.may_be_this():
                return
            notes.stepped = True
            if _found_inf(optimizer):
                self._listener.step_skipped(optimizer, self._scale())
            else:
                self._listener.after_step(optimizer)

        def begins(optimizer: torch.optim.Optimizer, *_: object) -> None:
            if thread.may_be_this():
                self._listener.before_step(optimizer)

        self._undo.append(register_optimizer_step_post_hook(stepped).remove)
        self._undo.append(register_optimizer_step_pre_hook(begins).remove)

        self._after(nn.Module, "__init__", lambda module, *_: books.modules.add(module))
        self._after(nn.Module, "__setstate__", lambda module, *_: books.modules.add(module))
        self._after(torch.optim.Optimizer, "__init__", self._note_optimizer)
        self._after(Tensor, "retain_grad", lambda tensor, *_: books.retaining.add(tensor))
        self._after(Tensor, "register_hook", self._note_tensor_hook)
        self._after(BackwardHook, "__init__", lambda hook, *_: books.backward_hooks.add(hook))
        self._note_scaled_losses()
        self._note_skipped_steps()
        self._note_clips()
        schedule = torch.optim.lr_scheduler.LRScheduler
        self._after(schedule, "__init__", lambda made, *_: books.schedulers.add(made))
        self._after(schedule, "step", self._note_schedule)
        self._note_calls()
        return self

    def __exit__(self, *_: object) -> None:
        self.recorder.end("the watch is over")
        self._was_replaced = not self.is_in_place
        while self._undo:
            self._undo.pop()()
        Interception._installed = False

    @property
    def is_in_place(self) -> bool:
        """Whether `torch.autograd.backward` is, or was to the end, the one that was put there."""
        if not self._undo:
            return not self._was_replaced
        return torch.autograd.backward is self._backward

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

    def _note_skipped_steps(self) -> None:
        scaler, notes = torch.amp.grad_scaler.GradScaler, self.notes
        original = scaler.step

        @functools.wraps(original)
        def step(instance: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            before, notes.stepped = notes.stepped, False
            result = original(instance, optimizer, *args, **kwargs)
            if not notes.stepped:
                notes.stepped = before
                found = instance._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
                if any(bool(infinite) for infinite in found.values()):  # as torch has read it, too
                    self._listener.step_skipped(optimizer, instance.get_scale())
            return result

        self._replace(scaler, "step", step)

    def _scale(self) -> float:
        return max((scaler.get_scale() for scaler in self.books.scalers), default=1.0)


def _found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused step, which skips by itself, found gradients that are not finite.

    On another device that stays unknown, since reading it would wait for the device.
    """
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and found.device.type == "cpu" and bool(found)
