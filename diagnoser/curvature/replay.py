r"""Exact products for code whose backward cannot be differentiated: it is run again, uncompiled.

A compiled forward *o = M(x, P)* is one node of the autograd graph, with a compiled backward that
has no derivative. The live step is not touched. Instead the module is called once more, uncompiled,
on detached copies of the inputs it was given, and while a Hessian's products are taken the node
gives the gradient of that replay, which is differentiable in *x*, *P* and the incoming gradient.
Around it stays the live graph, so parameters before, inside and after compiled parts, shared ones
too, get their full rows. Outside of our own products the node is what it was.

Where the loss can be computed again (a probe set), `eager_code` does the same more simply: compiled
code runs uncompiled in it, and reentrant checkpoints, which hide parameters from autograd, are
replaced by the other kind.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map

from diagnoser.curvature.hessian import ON_A_PROBE, Hessian, NoSecondDerivativeError
from diagnoser.curvature.random_states import RandomStates

SAME = 1e-3  # relative difference between a compiled and an uncompiled output, or 8 roundings
REMEDY = f"{ON_A_PROBE}, which runs the model uncompiled"

Node = Any  # torch.autograd.graph.Node


@contextmanager
def eager_code() -> Iterator[None]:
    """Inside, compiled code runs uncompiled, and no checkpoint is reentrant.

    Not for the training step itself: random numbers and rounding of compiled code are others.
    """
    with ExitStack() as undo:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and loading it takes long
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        module: Any = torch.utils.checkpoint
        undo.callback(setattr, module, "CheckpointFunction", module.CheckpointFunction)
        module.CheckpointFunction = _NonReentrant
        yield


class _NonReentrant:
    """Stands in for `torch.utils.checkpoint.CheckpointFunction`."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )


def compiled_modules(model: nn.Module) -> list[str]:
    """Returns the names of the parts of a model that ``torch.compile`` was applied to."""
    return [
        name
        for name, module in model.named_modules()
        if _is_compiled(module) or _is_compiled_in_place(module)
    ]


def _is_compiled(module: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _is_compiled_in_place(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called, which leaves no wrapper around it."""
    return vars(module).get("_compiled_call_impl") is not None


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """What a compiled call gave: not the tensor itself, which would keep its graph alive.

    Attributes:
        value: It, detached.
        node: Gives the compiled node that it came from while that lives; None: it has none.
        number: Which of the node's outputs it is.
    """

    value: Tensor
    node: Callable[[], Node | None] | None
    number: int

    @classmethod
    def of(cls, tensor: Tensor) -> Output:
        """Notes an output."""
        node = tensor.grad_fn
        compiled = node is not None and _is_compiled_node(node)
        return cls(tensor.detach(), weakref.ref(node) if compiled else None, tensor.output_nr)


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a compiled module, with all that it takes to make it again."""

    module: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    versions: tuple[int, ...]
    random: RandomStates
    autocast: Mapping[str, tuple[bool, torch.dtype]]
    outputs: tuple[Output, ...]

    @property
    def nodes(self) -> set[Node]:
        """The compiled nodes of its outputs that are alive."""
        found = {output.node() for output in self.outputs if output.node is not None}
        return found - {None}

    @property
    def original(self) -> nn.Module:
        """The module that was compiled."""
        found: nn.Module = getattr(self.module, "_orig_mod", self.module)
        return found

    def again(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the original, which must run uncompiled (`eager_code`)."""
        in_place = self.original is self.module
        return (self.module._call_impl if in_place else self.original)(*args, **kwargs)


class CompiledCalls:
    """Notes the calls of compiled modules while it is entered.

    Only hooks on the wrappers that ``torch.compile`` returns are used, and a function around what
    ``module.compile()`` left in its module; both run outside of compiled code: nothing is compiled
    again, no random number drawn, no output replaced. Inputs are kept alive until `clear`, or until
    the graph they were used in is gone and another call is made.

    Args:
        modules: Where to look for compiled ones, such as ``model.modules()``.

    Attributes:
        calls: What was noted, oldest first.
        modules: The compiled ones, without those inside another.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.calls: list[Call] = []
        compiled: list[Any] = [
            module for module in modules if _is_compiled(module) or _is_compiled_in_place(module)
        ]
        # One inside another is part of that one's code: a hook there would be compiled into it.
        inner = {id(part) for module in compiled for part in module.modules() if part is not module}
        self.modules = [module for module in compiled if id(module) not in inner]
        self._begun: list[tuple[Any, ...]] = []
        self._undo = ExitStack()

    def __enter__(self) -> CompiledCalls:
        for module in self.modules:
            if not _is_compiled(module):
                self._wrap(module)
                continue
            begin = module.register_forward_pre_hook(self._begin, with_kwargs=True)
            self._undo.callback(begin.remove)
            end = module.register_forward_hook(self._end, with_kwargs=True)
            self._undo.callback(end.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()
        self._begun.clear()

    def _wrap(self, module: Any) -> None:
        original = module._compiled_call_impl

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._begin(module, args, kwargs)
            output = original(*args, **kwargs)
            self._end(module, args, kwargs, output)
            return output

        def unwrap() -> None:
            if module._compiled_call_impl is call:  # else it was compiled once more
                module._compiled_call_impl = original

        module._compiled_call_impl = call
        self._undo.callback(unwrap)

    def clear(self) -> None:
        """Forgets all calls."""
        self.calls.clear()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forget_the_dead()
        versions = tuple(tensor._version for tensor in _tensors((args, kwargs)))
        autocast = {
            device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in {"cpu", *(tensor.device.type for tensor in _tensors((args, kwargs)))}
            if torch.amp.is_autocast_available(device)
        }
        self._begun.append((module, versions, RandomStates.now(), autocast))

    def _end(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        while self._begun:  # a call that failed has begun and never ended
            begun, versions, random, autocast = self._begun.pop()
            if begun is module:
                outputs = tuple(Output.of(tensor) for tensor in _tensors(output))
                kept = Call(module, args, dict(kwargs), versions, random, autocast, outputs)
                if kept.nodes:
                    self.calls.append(kept)
                return

    def _forget_the_dead(self) -> None:
        """Forgets calls whose graph is gone; their inputs may have kept others' alive."""
        known = len(self.calls) + 1
        while len(self.calls) < known:
            known = len(self.calls)
            self.calls[:] = [call for call in self.calls if call.nodes]


class ReplayHessian(Hessian):
    """The Hessian of a loss whose live graph holds compiled calls, exact by replay.

    The user's graph, buffers and random streams are left as they were; the replay's own graph lives
    as long as this object. Arguments otherwise as of `Hessian`.

    Args:
        loss: The scalar loss with a live graph, or several.
        parameters: Name to leaf tensor.
        calls: What `CompiledCalls` noted in the forward pass of that loss.
        scale: What the loss was multiplied by.

    Raises:
        NoSecondDerivativeError: When a compiled node of the graph is not the whole of a noted call
            (a compiled function, a graph break), or the replay would not be the same: other random
            numbers, forward hooks of the user inside.
        MeasurementError: As `Hessian`.
    """

    method = "eager replay"

    def __init__(
        self,
        loss: Tensor | Sequence[Tensor],
        parameters: Mapping[str, Tensor],
        calls: Iterable[Call],
        *,
        scale: float = 1.0,
    ) -> None:
        losses = (loss,) if isinstance(loss, Tensor) else tuple(loss)
        made = {node: call for call in calls for node in call.nodes}
        self._replays: dict[Node, _Replay] = {}
        for node in compiled_nodes(losses):
            if node not in made:
                raise NoSecondDerivativeError(
                    "compiled code that is not the whole of a noted module call (a graph break, a "
                    f"compiled function) has no replay; {REMEDY}"
                )
            self._replays[node] = _Replay.of(node, made[node])
        super().__init__(losses, parameters, scale=scale)

    def release(self) -> None:
        """Drops the gradient graphs and those of the replay."""
        super().release()
        self._replays = {}

    def _differentiable(self) -> AbstractContextManager[None]:
        return _replaced_backward(self._replays)


def _is_compiled_node(node: Node) -> bool:
    return hasattr(getattr(node, "_forward_cls", None), "compiled_bw")


def compiled_nodes(losses: Sequence[Tensor]) -> list[Node]:
    """Returns the nodes of the losses' graphs that run compiled code."""
    seen: set[Node] = set()
    waiting: list[Node] = [loss.grad_fn for loss in losses]
    found: list[Node] = []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if _is_compiled_node(node):
            found.append(node)
        waiting.extend(following for following, _ in node.next_functions)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Replay:
    """A compiled call made again, and how its tensors belong to those of the live graph.

    Attributes:
        outputs: Number of an output of the compiled node to the replay's.
        live: What the node differentiates by, in its order, as it stands in the live graph.
        leaves: The same as the replay uses them: parameters themselves, copies of inputs.
    """

    outputs: Mapping[int, Tensor]
    live: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]

    @classmethod
    def of(cls, node: Node, call: Call) -> _Replay:
        name = type(call.original).__name__
        hooked = [
            type(module).__name__
            for module in call.original.modules()
            if module._forward_hooks or module._forward_pre_hooks
        ]
        if hooked:
            raise NoSecondDerivativeError(
                f"{name}: {hooked[0]} has forward hooks that a replay would call again; {REMEDY}"
            )
        if call.versions != tuple(t._version for t in _tensors((call.args, call.kwargs))):
            raise NoSecondDerivativeError(
                f"{name}: an input was changed in place after the call; {REMEDY}"
            )
        copies: dict[int, tuple[Tensor, Tensor]] = {}

        def copy(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            copies.setdefault(id(value), (value, value.detach().requires_grad_()))
            return copies[id(value)][1]

        args, kwargs = tree_map(copy, (call.args, dict(call.kwargs)))
        outputs = _run(call, args, kwargs)
        _check_same(name, call.outputs, outputs)  # and that there are as many
        known: dict[Any, tuple[Tensor, Tensor]] = {
            id(p): (p, p) for p in call.original.parameters() if p.requires_grad
        }
        for value, own in copies.values():
            edge = get_gradient_edge(value)
            known[_key(edge.node, edge.output_nr)] = (value, own)
        edges = [edge for edge in node.next_functions if edge[0] is not None]
        if not all(_key(*edge) in known for edge in edges):
            raise NoSecondDerivativeError(
                f"{name}: the compiled code uses a tensor with a gradient that is neither an input "
                f"nor a parameter of the module (after a graph break, say); {REMEDY}"
            )
        pairs = [known[_key(*edge)] for edge in edges]
        return cls(
            {
                live.number: own
                for live, own in zip(call.outputs, outputs, strict=True)
                if live.node is not None and live.node() is node
            },
            tuple(live for live, _ in pairs),
            tuple(leaf for _, leaf in pairs),
        )

    def backward(self, node: Node, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """What the node returns: a gradient an argument of its forward, None where none is due."""
        given = {k: g for k, g in enumerate(gradients) if g is not None}
        if not given.keys() <= self.outputs.keys():
            raise RuntimeError("a compiled call has a gradient at something that is no output")
        outputs = [self.outputs[k] for k in given]
        found: Sequence[Tensor | None]
        if not given:
            found = [None] * len(self.leaves)
        elif torch.is_grad_enabled():
            found = _Gradient.apply(outputs, self.leaves, *given.values(), *self.live)  # type: ignore[no-untyped-call]
        else:
            found = torch.autograd.grad(
                outputs, self.leaves, list(given.values()), retain_graph=True, allow_unused=True
            )
        rest = iter(found)
        return tuple(next(rest) if needed else None for needed in node.needs_input_grad)


class _Gradient(torch.autograd.Function):
    """The gradient of a replay's outputs, itself differentiable once.

    A function of the gradients at the outputs and of the live tensors behind the leaves: the live
    ones only say whom the second derivative belongs to.
    """

    @staticmethod
    def forward(ctx: Any, outputs: Any, leaves: Any, *tensors: Tensor) -> Any:
        """Computes it, with a graph of its own."""
        weights = [w.detach().requires_grad_() for w in tensors[: len(outputs)]]
        with torch.enable_grad():
            found = torch.autograd.grad(
                outputs, leaves, weights, create_graph=True, allow_unused=True
            )
        ctx.set_materialize_grads(False)
        ctx.found, ctx.inputs = found, [*weights, *leaves]
        return tuple(None if g is None else g.detach() for g in found)

    @staticmethod
    def backward(ctx: Any, *vectors: Any) -> Any:
        """Differentiates that graph."""
        pairs = [
            (g, v)
            for g, v in zip(ctx.found, vectors, strict=True)
            if g is not None and v is not None and g.requires_grad
        ]
        if not pairs:
            return (None,) * (2 + len(ctx.inputs))
        outputs, weights = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            outputs, ctx.inputs, weights, retain_graph=True, allow_unused=True
        )
        return None, None, *found


@contextmanager
def _replaced_backward(replays: Mapping[Node, _Replay]) -> Iterator[None]:
    """While entered, the nodes give the gradient of their replay."""
    with ExitStack() as undo:
        for owner in {node._forward_cls for node in replays}:
            original = vars(owner)["backward"]
            undo.callback(setattr, owner, "backward", original)
            owner.backward = staticmethod(_backward(replays, original.__func__))
        yield


def _backward(
    replays: Mapping[Node, _Replay], original: Callable[..., Any]
) -> Callable[..., tuple[Any, ...]]:
    def backward(node: Node, *gradients: Any) -> Any:
        replay = replays.get(node)
        if replay is None:
            return original(node, *gradients)
        boxed = len(gradients) == 1 and isinstance(gradients[0], list)
        return replay.backward(node, gradients[0] if boxed else gradients)

    return backward


def _run(call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Calls the module uncompiled, on the same random numbers; buffers and streams are put back."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in call.original.buffers()]
    with ExitStack() as undo:
        undo.enter_context(call.random.replayed())
        undo.enter_context(eager_code())
        undo.enter_context(torch.enable_grad())
        for device, (enabled, dtype) in call.autocast.items():
            undo.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=False))
        try:
            return tuple(_tensors(call.again(*args, **kwargs)))
        finally:
            for buffer, saved in buffers:
                buffer.data.copy_(saved)


def _check_same(name: str, live: Sequence[Output], replayed: Sequence[Tensor]) -> None:
    if [o.value.shape for o in live] != [t.shape for t in replayed]:
        raise NoSecondDerivativeError(f"{name}: uncompiled, the outputs differ in shape; {REMEDY}")
    for output, b in zip(live, replayed, strict=True):
        if output.node is None:
            continue
        a = output.value
        size, defect = (
            float(torch.linalg.vector_norm(t.detach().to(torch.float32))) for t in (a, a - b)
        )
        if not defect <= max(SAME, 8.0 * torch.finfo(a.dtype).eps) * size:
            raise NoSecondDerivativeError(
                f"{name}: uncompiled, the output differs by {defect / size if size else defect:.1g}"
                f" (other random numbers, or values that are not finite); {REMEDY}"
            )


def _key(node: Node, output: int) -> Any:
    """Identifies where a gradient goes: a leaf, or an output of an operation."""
    variable = getattr(node, "variable", None)
    return id(variable) if variable is not None else (node, output)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
