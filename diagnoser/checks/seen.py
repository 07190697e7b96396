"""What a checked step shows: its calls, its loss, a trace of its forward, what its batch holds.

Everything dear is computed when a check first asks for it, once. What cannot be had raises
`MeasurementError`, whose text becomes the reason why the check that asked is unknown.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diagnoser.checks.calls import Call, Calls, LossCall, changed, distinct, is_plain, tensors_of
from diagnoser.checks.losses import Loss, find_losses
from diagnoser.checks.reading_attention import Attention, find_attentions
from diagnoser.checks.replica import Replica
from diagnoser.checks.trace import Trace
from diagnoser.errors import MeasurementError
from diagnoser.types import Estimate, Measurement, Where
from diagnoser.vocabulary import MODEL

LEAST_PADDED = 0.02  # of all positions: fewer say nothing about a mask
CHANCE = 1e-5  # that a word which is no padding stands only at the ends of rows


@dataclass(slots=True)
class Found:
    """What checks say: numbers, places in the program, and what could not be told."""

    step: int
    rows: list[Measurement] = field(default_factory=list)
    places: list[tuple[str, str, Where]] = field(default_factory=list)  # what, component, where
    unknown: dict[str, str] = field(default_factory=dict)  # quantity -> reason

    def run(self, quantity: str, value: float) -> None:
        """Adds a number of the whole run."""
        self.component(quantity, MODEL, value)

    def component(self, quantity: str, component: str, value: float) -> None:
        """Adds a number of a component; a NaN is not measured, so it is left out."""
        value = float(value)
        if not math.isnan(value):
            self.rows.append(Measurement(self.step, quantity, component, Estimate(value)))

    def components(
        self,
        quantity: str,
        values: Iterable[tuple[str, float]],
        worst: Callable[[float, float], float] = max,
    ) -> None:
        """Adds a number of each of several components, of those that come twice the worst."""
        merged: dict[str, float] = {}
        for name, value in values:
            if not math.isnan(value):
                merged[name] = worst(merged[name], value) if name in merged else value
        for name, value in merged.items():
            self.component(quantity, name, value)

    def place(self, what: str, where: Where | None, component: str = MODEL) -> None:
        """Adds where in the program something is."""
        if where is not None:
            self.places.append((what, component, where))


class Seen:
    """One checked step.

    Args:
        step: Its number.
        calls: What it called.
        loss: The root of its backward.
        parameters: Of the subject, by name.
        layer_of: The layer (or single component) that parameters belong to, if it is one.
        optimizers: All that are known.
        memory: Kept from one checked step to the next.
    """

    def __init__(
        self,
        step: int,
        calls: Calls,
        loss: Tensor,
        parameters: dict[str, Tensor],
        layer_of: Callable[[Iterable[Tensor]], str | None],
        optimizers: Sequence[torch.optim.Optimizer],
        memory: dict[str, Any],
    ) -> None:
        self.step = step
        self.calls = calls
        self.loss = loss
        self.parameters = parameters
        self.layer_of = layer_of
        self.optimizers = optimizers
        self.memory = memory

    @property
    def main(self) -> Call:
        """The call of the model that is trained.

        Raises:
            MeasurementError: No module was called, or none that is trained.
        """
        if self.calls.reason is not None:
            raise MeasurementError(self.calls.reason)
        call = self.calls.main
        if call is None:
            raise MeasurementError("no call of a module that is trained was seen")
        if not all(is_plain(tensor) for tensor in call.inputs):
            raise MeasurementError("an input is nested, sparse or quantized")
        return call

    @functools.cached_property
    def replica(self) -> Replica:
        """A copy of the model."""
        return Replica(self.main, self.parameters.values())

    @functools.cached_property
    def _traced(self) -> tuple[Trace, list[Tensor], set[int]]:
        trace = Trace()
        outputs = self.replica.run(trace=trace)
        return trace, outputs, self.replica.given

    @property
    def trace(self) -> Trace:
        """The operations of the forward, in eval mode."""
        return self._traced[0]

    @property
    def outputs(self) -> list[Tensor]:
        """What the forward gives in eval mode."""
        return self._traced[1]

    @property
    def given(self) -> set[int]:
        """The ids of the tensors that the traced forward was given."""
        return self._traced[2]

    @functools.cached_property
    def attentions(self) -> list[tuple[str, Attention]]:
        """The attentions of the forward, each with the component it belongs to.

        Raises:
            MeasurementError: There is none.
        """
        found = find_attentions(self.trace, list(self.parameters.values()))
        named = []
        for attention in found:
            for candidates in (attention.parameters, attention.key_parameters,
                               attention.query_parameters, attention.value_parameters):  # fmt: skip
                name = self.layer_of(candidates) if candidates else None
                if name is not None:
                    named.append((name, attention))
                    break
        if not named:
            raise MeasurementError("no attention in the model's forward")
        return named

    @functools.cached_property
    def losses(self) -> list[Loss]:
        """The losses that enter the backward, with scores and targets."""
        return find_losses(self.loss, self.calls.losses)

    def loss_call(self) -> LossCall | None:
        """The recorded loss function whose result the backward starts from, or the only one."""
        exact = [c for c in self.calls.losses if c.output is self.loss]
        return exact[0] if exact else self.calls.losses[0] if len(self.calls.losses) == 1 else None

    # -- what the batch holds ---------------------------------------------------------------------

    @functools.cached_property
    def token_inputs(self) -> list[Tensor]:
        """All integer inputs (batch, length) that are embedded, in the order of their embedding."""
        found: dict[int, Tensor] = {}
        for operation in self.trace.named("embedding"):
            indices = operation.inputs[1]
            for tensor in self.main.inputs:
                if (
                    tensor.ndim >= 2
                    and not tensor.is_floating_point()
                    and tensor.shape == indices.shape
                    and torch.equal(tensor, indices)
                ):
                    found[id(tensor)] = tensor
                    break
        return list(found.values())

    @property
    def tokens(self) -> Tensor:
        """The first integer input that is embedded, (batch, length).

        Raises:
            MeasurementError: No integers of two or more dimensions are embedded.
        """
        if not self.token_inputs:
            raise MeasurementError("no input of integers (batch, length) is embedded")
        tensor = self.token_inputs[0]
        return tensor.reshape(-1, tensor.shape[-1])

    @functools.cached_property
    def padding(self) -> Tensor:
        """Which positions of `tokens` are padding, (batch, length).

        The padding index of the embedding tells, or a token that fills the end (or the beginning)
        of rows to different lengths and is nowhere else, which no word does by chance.

        Raises:
            MeasurementError: There is none, or too little.
        """
        return self.padding_in(self.tokens)

    def padding_in(self, tokens: Tensor) -> Tensor:
        """Returns which positions of some tokens are padding; see `padding`."""
        candidates = [0, int(tokens[0, -1]), int(tokens[0, 0]), *self._ends(tokens)]
        declared = set()
        for operation in self.trace.named("embedding"):
            index = operation.args[2] if len(operation.args) > 2 else -1
            if isinstance(index, int) and index >= 0:
                candidates.insert(0, index)
                declared.add(index)
        for candidate in dict.fromkeys(candidates):
            where = tokens == candidate
            trailing = where.flip(1).cumprod(1).flip(1).bool()
            leading = where.cumprod(1).bool()
            for run in (trailing, leading):
                lengths = run.sum(1)
                if torch.equal(run, where) and len(distinct(lengths)) > 1:
                    share = float(where.float().mean())
                    in_part = (lengths > 0) & (lengths < tokens.shape[1])
                    certain = candidate in declared or by_chance(lengths, tokens.shape[1]) < CHANCE
                    if certain and share >= LEAST_PADDED and bool(in_part.any()):
                        return where
        raise MeasurementError("no padding was seen in the batch")

    @staticmethod
    def _ends(tokens: Tensor) -> list[int]:
        return [int(x) for x in distinct(torch.cat([tokens[:, -1], tokens[:, 0]]))[:4]]

    @functools.cached_property
    def batch(self) -> int:
        """Number of samples: the first dimension that all larger inputs share.

        Raises:
            MeasurementError: There is no such dimension.
        """
        inputs = [t for t in self.main.inputs if t.ndim]
        if not inputs:
            raise MeasurementError("the model is given no tensor")
        size = inputs[0].shape[0]
        if size < 2:
            raise MeasurementError("the batch holds a single sample")
        return size

    def changed_inputs(self, old: Tensor, new: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of the main call with one tensor replaced."""

        def change(tensor: Tensor) -> Tensor:
            return new if tensor is old else tensor

        return changed(self.main.args, change), changed(dict(self.main.kwargs), change)


def by_chance(lengths: Tensor, width: int) -> float:
    """Returns how likely a word is to stand in no row but in a run at its end.

    Each row may have its ``lengths`` places of that word in any of the ``width`` choose ``lengths``
    ways; only one of them is at the end.

    >>> round(by_chance(torch.tensor([0, 2, 1]), 7), 6)  # one in 21 times one in 7
    0.006803
    """
    ways = [math.comb(width, int(length)) for length in lengths]
    return math.exp(-sum(map(math.log, ways)))


def first_float(outputs: Sequence[Tensor]) -> Tensor:
    """Returns the first output of floating point with at least one dimension.

    Raises:
        MeasurementError: There is none.
    """
    for output in outputs:
        if output.is_floating_point() and output.ndim and output.numel() > 1:
            return output
    raise MeasurementError("the model returns no tensor of numbers")


__all__ = ["Found", "Seen", "first_float", "tensors_of"]
