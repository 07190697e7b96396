"""A context in which measuring leaves no trace (law 1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diagnoser.curvature import RandomStates
from diagnoser.monitor.interception import Books


@contextmanager
def quiet(
    books: Books, modules: Iterable[nn.Module], parameters: Iterable[Tensor]
) -> Iterator[None]:
    """Holds everything a measurement could disturb and puts it back, also after an exception.

    Held: random states (torch CPU and CUDA, numpy, random), buffers and plain numbers of modules
    (recomputation under checkpointing runs batch norm and counters again), the user's gradient
    hooks (they count, draw random numbers, change gradients), gradients retained on activations
    (they would double), the delayed all-reduce of DDP's static graph. Autocast and anomaly
    detection are off inside, gradient mode is on.

    Args:
        books: Notes of the interception: who retains gradients, which module hooks wait.
        modules: All modules whose state a recomputation may change.
        parameters: Parameters whose hooks are kept still.
    """
    with ExitStack() as undo:
        undo.callback(RandomStates.now().restore)
        _hold_modules(undo, modules)
        for parameter in parameters:
            _empty(undo, parameter._backward_hooks)
        for hooks in books.tensor_hooks:
            _empty(undo, hooks)
        for hook in books.backward_hooks:
            undo.callback(setattr, hook, "user_hooks", hook.user_hooks)
            undo.callback(setattr, hook, "user_pre_hooks", hook.user_pre_hooks)
            hook.user_hooks, hook.user_pre_hooks = [], []
        for tensor in books.retaining:
            undo.callback(setattr, tensor, "grad", tensor.grad)
        undo.enter_context(torch.autograd.set_detect_anomaly(False))
        undo.enter_context(torch.enable_grad())
        for device in {"cpu", *(p.device.type for p in parameters)}:
            if torch.amp.is_autocast_available(device):
                undo.enter_context(torch.autocast(device, enabled=False))
        yield


def _hold_modules(undo: ExitStack, modules: Iterable[nn.Module]) -> None:
    held: dict[int, tuple[Tensor, Tensor]] = {}
    for module in modules:
        state = vars(module)
        undo.callback(state.update, {k: v for k, v in state.items() if isinstance(v, int | float)})
        if isinstance(module._buffers, dict):  # a scripted module has none of its own
            undo.callback(module._buffers.update, dict(module._buffers))
        if module.__class__.__name__ == "DistributedDataParallel":
            flag = "_static_graph_delay_allreduce_enqueued"
            if hasattr(module, flag):
                undo.callback(setattr, module, flag, getattr(module, flag))
                setattr(module, flag, True)
        for buffer in module.buffers(recurse=False):
            if id(buffer) not in held:
                held[id(buffer)] = (buffer, buffer.detach().clone())

    def restore() -> None:
        # All of them: batch norm changes its statistics without raising their version. Through
        # .data: the user's graph may have saved them.
        for buffer, saved in held.values():
            buffer.data.copy_(saved)

    undo.callback(restore)


def _empty(undo: ExitStack, hooks: Any) -> None:
    """Empties a dictionary of hooks in place (autograd holds the dictionary itself)."""
    if hooks:
        saved = dict(hooks)
        hooks.clear()
        undo.callback(hooks.update, saved)
