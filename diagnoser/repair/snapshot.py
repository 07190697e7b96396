"""All that a training consists of between two steps, held so that it can be put back exactly.

Held are weights and gradients, buffers, optimizer state and groups, what schedules and scalers hold
of themselves, random streams, and of modules their modes, numbers and which parameters are trained.
What cannot be held is what a training script keeps elsewhere: its place in the data, its own
variables.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from diagnoser.curvature import RandomStates
from diagnoser.curvature.memory import free_memory
from diagnoser.errors import RepairError
from diagnoser.repair.live import Live
from diagnoser.stepping import hold
from diagnoser.types import Part

SPARE = 2.0  # times its own size that must be free where a snapshot is put
UNITS = ("B", "KB", "MB", "GB", "TB")


class Snapshot:
    """The state of a training at one moment; `take` makes it.

    Attributes:
        path: The file that holds its tensors; None: they are in memory.
    """

    def __init__(self, live: Live, path: Path | None) -> None:
        self.path = path
        self._live = live
        self._random = RandomStates.now()
        self._tensors: list[Tensor] = []  # the training's own
        self._place: dict[int, int] = {}
        self._states: dict[tuple[int, int], dict[str, Any]] = {}  # of an optimizer and a parameter
        self._structure: list[Callable[[], None]] = []
        self._note_modules()
        for other in live.others:
            self._note_other(other)
        for optimizer in live.optimizers:
            self._note_optimizer(optimizer)
        self._saved: list[Tensor] | None = None
        with torch.no_grad():
            if path is None:
                self._saved = [tensor.detach().clone() for tensor in self._tensors]
            else:
                torch.save([tensor.detach() for tensor in self._tensors], path)

    @classmethod
    def take(cls, live: Live, directory: Path) -> Self:
        """Holds the present state, in memory or, where that is short, in a file in ``directory``.

        Raises:
            RepairError: There is room in neither.
        """
        size = size_of(live)
        free = [free_memory(device) for device in {t.device for t in live.parameters.values()}]
        if all(there is None or there > SPARE * size for there in free):
            return cls(live, None)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            room = shutil.disk_usage(directory).free
            if room > SPARE * size:
                number = 0
                while (path := directory / f"snapshot-{number}.pt").exists():
                    number += 1
                return cls(live, path)
        except OSError as error:
            raise RepairError(
                f"a snapshot takes {spelled(size)}; memory is short, and {directory} cannot be "
                f"written ({error.strerror}); nothing is tried"
            ) from error
        raise RepairError(
            f"a snapshot takes {spelled(size)}; neither memory nor {directory} has {SPARE:.0f} "
            "times that free; nothing is tried"
        )

    def restore(self) -> None:
        """Puts everything back, bit for bit."""
        for put_back in self._structure:
            put_back()
        for tensor, saved in zip(self._tensors, self._contents(), strict=True):
            _write(tensor, saved)
        self._random.restore()

    def roll_back(self, parts: Iterable[tuple[Tensor, Part]] | None = None) -> None:
        """Puts back weights, buffers and optimizer state alone, of some parts of parameters or all.

        Schedules, random streams and learning rates stay as they are: the training goes on from
        old weights with new batches.
        """
        saved = self._contents()
        chosen = [(tensor, Part("")) for tensor in self._live.parameters.values()]
        if parts is not None:
            chosen = list(parts)
        ids = {id(tensor) for tensor, _ in chosen}
        for module in self._live.modules:
            if parts is None or any(id(p) in ids for p in module._parameters.values()):
                for buffer in module.buffers(recurse=False):
                    if id(buffer) in self._place:
                        _write(buffer, saved[self._place[id(buffer)]])
        for tensor, part in chosen:
            if id(tensor) not in self._place:
                continue
            now, then = part.view(tensor.data), part.view(saved[self._place[id(tensor)]])
            now.copy_(then)
            for optimizer in self._live.optimizers:
                self._roll_back_state(optimizer, tensor, part, saved)

    def discard(self) -> None:
        """Deletes its file, if it has one."""
        self._saved = None
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    # -- making it -------------------------------------------------------------------------------

    def _hold(self, tensor: Tensor) -> None:
        if id(tensor) not in self._place:
            self._place[id(tensor)] = len(self._tensors)
            self._tensors.append(tensor)

    def _note_modules(self) -> None:
        for module in self._live.modules:
            state = vars(module)
            plain = {k: v for k, v in state.items() if _is_plain(v)}
            self._structure.append(partial(state.update, plain))
            if isinstance(module._buffers, dict):
                self._structure.append(partial(module._buffers.update, dict(module._buffers)))
            for buffer in module.buffers(recurse=False):
                self._hold(buffer)
        for parameter in self._live.parameters.values():
            self._note_parameter(parameter)

    def _note_parameter(self, parameter: Tensor) -> None:
        self._hold(parameter)
        gradient = parameter.grad
        if gradient is not None:
            self._hold(gradient)
        trained = parameter.requires_grad
        self._structure.append(partial(_put_back, parameter, gradient, trained))

    def _note_other(self, other: Any) -> None:
        state = copy.deepcopy(other.state_dict())
        self._structure.append(partial(_load, other, state))
        stages = getattr(other, "_per_optimizer_states", None)  # of a gradient scaler
        if stages is not None:
            held = {key: dict(stage) for key, stage in stages.items()}

            def put_back() -> None:
                stages.clear()
                stages.update({key: dict(stage) for key, stage in held.items()})
                other._per_optimizer_states = stages

            self._structure.append(put_back)

    def _note_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        groups = [(group, dict(group), list(group["params"])) for group in optimizer.param_groups]
        for group, _, _ in groups:
            for parameter in group["params"]:
                if id(parameter) not in self._place:  # one that no model has
                    self._note_parameter(parameter)
            for value in group.values():  # a learning rate on a device, say
                if isinstance(value, Tensor):
                    self._hold(value)
        self._structure.append(hold(optimizer))
        states = {parameter: (state, dict(state)) for parameter, state in optimizer.state.items()}
        for parameter, (_, content) in states.items():
            for key, value in content.items():
                if isinstance(value, Tensor):
                    self._hold(value)
                else:
                    content[key] = copy.deepcopy(value)
            self._states[id(optimizer), id(parameter)] = content

        def put_back() -> None:
            for group, content, parameters in groups:
                group.clear()
                group.update(content)
                group["params"][:] = parameters
            optimizer.param_groups[:] = [group for group, _, _ in groups]
            optimizer.state.clear()
            for parameter, (state, content) in states.items():
                state.clear()
                state.update(
                    {
                        k: v if isinstance(v, Tensor) else copy.deepcopy(v)
                        for k, v in content.items()
                    }
                )
                optimizer.state[parameter] = state

        self._structure.append(put_back)

    # -- putting it back -------------------------------------------------------------------------

    def _contents(self) -> Sequence[Tensor]:
        if self._saved is not None:
            return self._saved
        if self.path is None:
            raise RepairError("a snapshot was used after it was thrown away")
        try:
            saved: list[Tensor] = torch.load(self.path, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise RepairError(f"{self.path}: the snapshot cannot be read ({error})") from error
        return saved

    def _roll_back_state(
        self, optimizer: torch.optim.Optimizer, tensor: Tensor, part: Part, saved: Sequence[Tensor]
    ) -> None:
        held = self._states.get((id(optimizer), id(tensor)))
        if part.dim is None:
            if held is None:  # it was not there yet
                optimizer.state.pop(tensor, None)
                return
            state = optimizer.state[tensor]
            for key in set(state) - set(held):
                del state[key]
            for key, then in held.items():
                if not isinstance(then, Tensor):
                    state[key] = copy.deepcopy(then)
                    continue
                now, old = state.get(key), saved[self._place[id(then)]]
                if isinstance(now, Tensor) and now.shape == old.shape:
                    _write(now, old)
                else:
                    state[key] = old.clone()
            return
        for key, value in optimizer.state.get(tensor, {}).items():
            if not isinstance(value, Tensor) or value.shape != tensor.shape:
                continue
            then = held.get(key) if held is not None else None
            if isinstance(then, Tensor):
                part.view(value).copy_(part.view(saved[self._place[id(then)]]))
            else:
                part.view(value).zero_()


def size_of(live: Live) -> int:
    """Returns how many bytes a snapshot takes."""
    state = [
        value
        for optimizer in live.optimizers
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, Tensor)
    ]
    buffers = [buffer for module in live.modules for buffer in module.buffers(recurse=False)]
    parameters = list(live.parameters.values())
    gradients = [p.grad for p in parameters if p.grad is not None]
    everything = {id(t): t for t in (*state, *buffers, *parameters, *gradients)}
    return sum(t.numel() * t.element_size() for t in everything.values())


def spelled(size: float) -> str:
    """Returns a size as people write it.

    >>> spelled(512), spelled(3_400_000)
    ('512 B', '3.4 MB')
    """
    unit = 0
    while size >= 1000 and unit < len(UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.0f} {UNITS[unit]}" if unit == 0 or size >= 100 else f"{size:.1f} {UNITS[unit]}"


def _is_plain(value: object) -> bool:
    """Whether an attribute of a module is put back as it is: a hidden state carried along, say."""
    if isinstance(value, Tensor):
        return value.grad_fn is None  # others would keep the graph of a step alive
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _load(other: Any, state: Any) -> None:
    other.load_state_dict(copy.deepcopy(state))  # some keep what they are given


def _put_back(parameter: Tensor, gradient: Tensor | None, trained: bool) -> None:
    if parameter.requires_grad != trained:
        parameter.requires_grad_(trained)
    parameter.grad = gradient


def _write(tensor: Tensor, saved: Tensor) -> None:
    """Writes without telling autograd: what it held stands there again, as if nothing had been."""
    if tensor.layout == torch.strided:
        tensor.data.copy_(saved)
    else:
        tensor.data = saved.clone()
