"""The operations of a forward, as torch dispatches them: what computed what, and where.

A dispatch mode sees every operation of every caller, also inside `nn.MultiheadAttention` and other
composites, under the same few names (``bmm``, ``_softmax``, ``masked_fill``). It is only ever
active around a replica, never around the user's own forward, whose bits it could change.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from diagnoser.checks.calls import is_plain
from diagnoser.errors import MeasurementError
from diagnoser.types import Where

MOST_BYTES = 512 * 2**20  # of results that are kept

SHAPE_ONLY = frozenset({
    "view", "_unsafe_view", "reshape", "expand", "squeeze", "unsqueeze", "transpose", "permute",
    "t", "clone", "contiguous", "alias", "detach", "_to_copy", "lift_fresh", "select", "slice",
    "split", "unbind", "_reshape_alias", "chunk", "split_with_sizes", "repeat", "cat", "stack",
    "index_select", "as_strided", "copy", "unfold", "movedim",
})  # fmt: skip
PRODUCTS = frozenset({"bmm", "mm", "mv", "addmm", "baddbmm", "addmv", "dot"})


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One operation: tensors in and out, all arguments as they were given, the user's line.

    ``sources`` are the positions of the operations that made the inputs, -1 for what the forward
    was given (inputs, parameters, buffers); ``writers`` those that since wrote to an input's memory
    through another view of it.
    """

    index: int
    name: str
    inputs: tuple[Tensor, ...]
    sources: tuple[int, ...]
    writers: tuple[int, ...]
    outputs: tuple[Tensor, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: Where | None

    @property
    def result(self) -> Tensor:
        """Its first output."""
        return self.outputs[0]


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation that is dispatched while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self._made_by: dict[int, int] = {}  # id of a tensor -> operation; outputs are kept alive
        self._kept: list[Tensor] = []
        self._bytes = 0
        self._consumers: dict[int, list[int]] = {}
        self._written: dict[int, list[tuple[int, Tensor]]] = {}  # memory -> who wrote, through what

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and notes it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        inputs = tuple(x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor))
        outputs = tuple(x for x in tree_iter(result) if isinstance(x, Tensor))
        if not outputs:
            return result
        sources = tuple(self._made_by.get(id(x), -1) for x in inputs)
        writers = {i for x in inputs for i in self._writers_since(x)}
        index = len(self.operations)
        for source in {*sources, *writers} - {-1}:
            self._consumers.setdefault(source, []).append(index)
        for tensor in written(func, args, kwargs):
            if memory(tensor):
                self._written.setdefault(memory(tensor), []).append((index, tensor))
        for output in outputs:
            self._made_by[id(output)] = index
            if output._base is None:
                self._bytes += output.numel() * output.element_size()
        self._kept += [*inputs, *outputs]  # identities are only good while the tensors live
        place = None if name in SHAPE_ONLY else user_line()
        self.operations.append(
            Operation(index, name.removesuffix("_") or name, inputs, sources, (*writers,),
                      outputs, args, kwargs, place)
        )  # fmt: skip
        if self._bytes > MOST_BYTES:
            raise MeasurementError("the forward is too large to be traced")
        return result

    def _writers_since(self, tensor: Tensor) -> list[int]:
        """Who wrote to a tensor's memory, through another view, since the tensor was made."""
        made = self._made_by.get(id(tensor), -1)
        wrote = self._written.get(memory(tensor), []) if self._written else []
        return [i for i, through in wrote if i > made and not _apart(tensor, through)]

    def makers(self, tensor: Tensor) -> list[Operation]:
        """Returns what made a tensor of the forward, and what wrote to it since."""
        made = self._made_by.get(id(tensor))
        by = [*([] if made is None else [made]), *self._writers_since(tensor)]
        return [self.operations[i] for i in by]

    def consumers(self, operation: Operation) -> list[Operation]:
        """Returns what takes an operation's result."""
        return [self.operations[i] for i in self._consumers.get(operation.index, [])]

    def producer(self, operation: Operation, position: int) -> Operation | None:
        """Returns what made an input; None for what the forward was given."""
        source = operation.sources[position]
        return self.operations[source] if source >= 0 else None

    def behind(self, operation: Operation, position: int) -> Operation | None:
        """Returns what made an input, behind changes of its shape; None for what was given."""
        made = self.producer(operation, position)
        while made is not None and made.name in SHAPE_ONLY:
            made = self.producer(made, 0) if made.sources else None
        return made

    def given_behind(self, operation: Operation, position: int) -> Tensor | None:
        """Returns the given tensor (a parameter, say) that an input is, up to its shape."""
        source = operation.sources[position]
        if source < 0:
            return operation.inputs[position]
        for _ in range(8):
            made = self.operations[source]
            if made.name not in SHAPE_ONLY or not made.sources:
                return None
            source = made.sources[0]
            if source < 0:
                return made.inputs[0]
        return None

    def given_into(self, operation: Operation) -> list[Tensor]:
        """Returns the given tensors that inputs of an operation are, up to their shape."""
        behind = (self.given_behind(operation, i) for i in range(len(operation.inputs)))
        return [tensor for tensor in behind if tensor is not None]

    def named(self, *names: str) -> Iterator[Operation]:
        """Yields the operations of some names, in order."""
        return (operation for operation in self.operations if operation.name in names)

    def ancestors(self, start: Operation | None, most: int = 100_000) -> Iterator[Operation]:
        """Yields an operation and all that it depends on, nearest first."""
        if start is None:
            return
        queue, seen = [start.index], {start.index}
        for index in queue:  # grows while it is read
            operation = self.operations[index]
            yield operation
            if len(queue) > most:
                return
            for source in (*operation.sources, *operation.writers):
                if source >= 0 and source not in seen:
                    seen.add(source)
                    queue.append(source)

    def descendants(self, start: Operation, most: int) -> list[Operation]:
        """Returns an operation and what depends on it, nearest first; about ``most`` of them."""
        queue, known = [start], {start.index}
        for operation in queue:  # grows while it is read
            if len(queue) > most:
                break
            for consumer in self.consumers(operation):
                if consumer.index not in known:
                    known.add(consumer.index)
                    queue.append(consumer)
        return queue

    def leaves(self, start: Operation | None) -> set[int]:
        """Returns the ids of all given tensors that an operation depends on."""
        return {
            id(tensor)
            for operation in self.ancestors(start)
            for tensor, source in zip(operation.inputs, operation.sources, strict=True)
            if source < 0
        }

    def nearest(self, start: Operation | None, wanted: Sequence[Tensor]) -> list[Tensor]:
        """Returns the first of some given tensors that an operation depends on.

        The search ends along each path where one is found.
        """
        ids = {id(tensor): tensor for tensor in wanted}
        found: dict[int, Tensor] = {}
        if start is None:
            return []
        queue, seen = [start.index], {start.index}
        for index in queue:
            operation = self.operations[index]
            through = [s for s in (*operation.sources, *operation.writers) if s >= 0]
            direct = [id(tensor) for tensor in self.given_into(operation) if id(tensor) in ids]
            if direct:
                found |= {key: ids[key] for key in direct}
                if operation.name not in ("add", "mul"):  # a bias; its matrix comes next
                    continue
            elif operation.name in PRODUCTS:
                made = self._computed_weight(operation, ids)
                if made:
                    found |= {key: ids[key] for key in made}
                    continue
            for source in through:
                if source not in seen:
                    seen.add(source)
                    queue.append(source)
        return list(found.values())

    def _computed_weight(self, product: Operation, wanted: Mapping[int, Tensor]) -> set[int]:
        """The parameters of which alone a factor of a product is computed (quantised, merged)."""
        for position in range(len(product.inputs)):
            made = self.producer(product, position)
            leaves = self.leaves(made) if made is not None else set()
            if leaves and leaves <= wanted.keys():
                return leaves
        return set()


def written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Returns the tensors that a dispatched operation writes to."""
    names = _WRITES.get(func)
    if names is None:
        names = _WRITES[func] = tuple(
            (i, argument.name)
            for i, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
    given = [args[i] if i < len(args) else kwargs.get(name) for i, name in names]
    return [tensor for tensor in tree_iter(given) if isinstance(tensor, Tensor)]


_WRITES: dict[Any, tuple[tuple[int, str], ...]] = {}  # an operation's arguments that it writes to


def memory(tensor: Tensor) -> int:
    """Returns what tensors that are views of each other have in common; 0 if it has no memory."""
    return tensor.untyped_storage().data_ptr() if is_plain(tensor) else 0


def _apart(one: Tensor, other: Tensor) -> bool:
    """Whether two views of the same memory plainly have no element in common."""
    if one.storage_offset() > other.storage_offset():
        one, other = other, one
    distance = other.storage_offset() - one.storage_offset()
    if distance > _extent(one, math.inf):
        return True  # one ends before the other begins
    return one.stride() == other.stride() and any(  # parts that were split along an axis
        step > 0
        and distance % step == 0
        and size <= distance // step
        and max(_extent(one, step), _extent(other, step)) < step
        and all(
            distance + _extent(other, further) < further
            for further in one.stride()
            if further > step
        )
        for size, step in zip(one.shape, one.stride(), strict=True)
    )


def _extent(tensor: Tensor, below: float) -> int:
    """How far a tensor's last element is from its first, along axes of a stride below a bound."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return sum((size - 1) * step for size, step in steps if step < below)


_OURS = ("torch", "diagnoser", "contextlib", "functools", "runpy", "importlib")
_REPLAY = "diagnoser.checks.replica"


def user_line() -> Where | None:
    """The innermost running line that is neither torch's, nor ours, nor an installed library's.

    Inside a replica only its own forward is looked at: None where no line of the user's is in it.
    """
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name == _REPLAY:
            return None
        file = frame.f_code.co_filename
        if name.split(".")[0] not in _OURS and "site-packages" not in file:
            return Where(file, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def scalar_of(value: Any) -> float | None:
    """Returns a number, also from a tensor of one element that is no parameter; else None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad:
        return float(value)
    return None
