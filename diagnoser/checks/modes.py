"""Checks of modes and state: train and eval, batch statistics, dropout."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from diagnoser.checks.calls import Call
from diagnoser.checks.seen import Found, Seen
from diagnoser.errors import MeasurementError

DROPOUTS = frozenset({"native_dropout", "bernoulli", "_fused_dropout", "alpha_dropout"})


def _mode_matters(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that do something else in eval mode, in the train mode that they should be in."""
    return [
        m
        for m in modules
        if (isinstance(m, _DropoutNd) and m.p > 0)
        or isinstance(m, _BatchNorm)
        or (isinstance(m, nn.RNNBase) and m.dropout > 0 and m.num_layers > 1)
        or (isinstance(m, nn.MultiheadAttention) and m.dropout > 0)
        or (hasattr(m, "attention_dropout") and _positive(m.attention_dropout))
    ]


def _positive(value: object) -> bool:
    return isinstance(value, float) and value > 0


def training_mode(seen: Seen, found: Found) -> None:
    """Finds a model that trains in eval mode.

    ``trained_in_eval``: 1 where the model and every part of it whose mode matters are in eval mode
    while they are trained. ``dropout_largest``: the largest probability of a dropout.
    ``batch_norm_momentum``: largest momentum of a batch norm: 1 where its statistics are those of
    the last batch alone.

    Source: huggingface/transformers#1703, benchmark operator X3.
    Cannot see: functional dropout; parts in eval mode beside others (frozen norms are usual).
    Costs: one look at each module.
    """
    call = seen.main
    matters = _mode_matters(call.module.modules())
    dropouts = [m.p for m in matters if isinstance(m, _DropoutNd)]
    found.run("dropout_largest", max(dropouts, default=0.0))
    momenta = [m.momentum for m in matters if isinstance(m, _BatchNorm) and m.momentum is not None]
    if momenta:
        found.run("batch_norm_momentum", max(momenta))
    if not matters:
        raise MeasurementError("no part of the model depends on its mode")
    in_eval = not call.training and all(not m.training for m in matters)
    found.run("trained_in_eval", float(in_eval))
    found.place("model", call.place)


def dropout_in_eval(seen: Seen, found: Found) -> None:
    """Finds dropout that is on in eval mode.

    ``dropout_in_eval``: how many dropouts the forward makes in eval mode.

    Source: torch.nn.functional.dropout and scaled_dot_product_attention, PyTorch documentation:
    both drop whatever the mode of a module is, unless they are told.
    Cannot see: models that are told their mode by an argument; dropout that is made of uniform
    random numbers.
    Costs: nothing beyond the trace.
    """
    given = [*seen.main.args, *seen.main.kwargs.values()]
    if any(value is True for value in given):
        raise MeasurementError("an argument may tell the model to train")
    dropped = [o for o in seen.trace.operations if o.name in DROPOUTS]
    found.run("dropout_in_eval", float(len(dropped)))
    found.place("dropout", dropped[0].place if dropped else None)


def scored_in_training(call: Call) -> bool | None:
    """Whether a call without gradients ran in train mode; None where modes do not matter to it.

    Finds an evaluation in train mode: dropout is on, and batch norms learn from what they are
    scored on. ``scored_in_training``, a share of the evaluations that were seen.

    Source: TrainCheck (pytorch-forum-84911), benchmark operator X3a.
    Cannot see: evaluations with gradients on; a mode that is changed on purpose (dropout as a
    sample of models).
    Costs: a look at each module, on a few calls of a run.
    """
    matters = _mode_matters(call.module.modules())
    if not matters or not any(p.requires_grad for p in call.module.parameters()):
        return None
    return call.training and any(m.training for m in matters)
