"""One batch of a training, held so that its loss can be taken again later, with other weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import Tensor

from diagnoser.checks.calls import LossCall, changed, tensors_of
from diagnoser.checks.replica import Replica
from diagnoser.checks.seen import Seen
from diagnoser.errors import MeasurementError

LossOf = Callable[[list[Tensor]], Tensor]


class HeldBatch:
    """The batch of a step whose calls were recorded.

    Args:
        seen: The step.

    Raises:
        MeasurementError: Its loss is not one call of a loss function on an output of the model.
    """

    def __init__(self, seen: Seen) -> None:
        call = seen.main
        self._loss_of = loss_of_outputs(seen)
        self._call = dataclasses.replace(
            call,
            args=changed(call.args, _kept),
            kwargs=changed(dict(call.kwargs), _kept),
            output=None,
        )

    def loss(self, shared: Iterable[Tensor] = ()) -> float:
        """Returns its loss with the present weights, in eval mode, without a trace.

        Args:
            shared: See `Replica`.

        Raises:
            MeasurementError: The model cannot be run on it again.
        """
        outputs = Replica(self._call, shared).run()
        with torch.no_grad():
            return float(self._loss_of(outputs))


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def loss_of_outputs(seen: Seen) -> LossOf:
    """Returns how the loss follows from the tensors that the model returns."""
    outputs = list(tensors_of(seen.main.output))
    for i, output in enumerate(outputs):
        if output is seen.loss:
            return lambda tensors: tensors[i]
    call = seen.loss_call()
    if call is None:
        raise MeasurementError("the loss is no single call of a loss function of torch")
    for i, output in enumerate(outputs):
        if output.numel() == call.scores.numel() and torch.equal(
            output.detach().reshape(-1), call.scores.detach().reshape(-1)
        ):
            return _again(call, i)
    raise MeasurementError("what the loss is given is no output of the model, or a part of one")


def _again(call: LossCall, position: int) -> LossOf:
    function = getattr(F, call.name)
    target = call.target.detach()

    def loss_of(tensors: list[Tensor]) -> Tensor:
        scores = tensors[position].reshape(call.scores.shape)
        loss: Tensor = function(scores, target, **call.options)
        return loss.mean()

    return loss_of
