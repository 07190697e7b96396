"""Whether a model can learn one batch by heart: the oldest test of a training set-up.

Only before a run (`diagnoser check`): it trains a copy of the model for some seconds.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import time

import torch
from torch import nn

from diagnoser.checks.calls import changed, tensors_of
from diagnoser.checks.held import LossOf, loss_of_outputs
from diagnoser.checks.replica import Alone
from diagnoser.checks.seen import Found, Seen
from diagnoser.errors import MeasurementError

STEPS = 200  # at most, of each learning rate
RATES = (1e-3, 1e-2)
LEARNT = 0.9  # share of the loss that is gone: enough is known then


def overfit_one_batch(seen: Seen, found: Found, seconds: float = 15.0) -> None:
    """Finds a model that cannot learn the batch it is given.

    ``overfit_fall``: share of the loss of one batch that a copy loses in 200 steps of Adam, without
    dropout, with the better of two learning rates: near 1 for any set-up that works.

    Source: TheDeepChecker (Ben Braiek and Khomh 2022): overfit a single batch.
    Cannot see: losses that are not one call on a tensor of the output, or part of the output.
    Costs: as many steps of training as fit into ``seconds``.
    """
    call = seen.main
    loss_of = loss_of_outputs(seen)
    ends = time.perf_counter() + seconds
    falls = []
    for rate in RATES:
        fall = _fall(call.module, call.args, dict(call.kwargs), loss_of, rate, ends)
        falls.append(fall)
        if fall >= LEARNT or time.perf_counter() > ends:
            break
    known = [fall for fall in falls if not math.isnan(fall)]
    if not known:
        raise MeasurementError("the loss of one batch is not finite or not positive")
    found.run("overfit_fall", max(known))
    found.place("model", call.place)


def _fall(
    module: nn.Module, args: object, kwargs: object, loss_of: LossOf, rate: float, ends: float
) -> float:
    try:
        pupil = copy.deepcopy(module)
    except Exception as error:
        raise MeasurementError("the model cannot be copied") from error
    pupil.eval()
    parameters = [p for p in pupil.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    first = best = math.nan
    for _ in range(STEPS):
        own_args, own_kwargs = (
            changed(given, lambda t: t.detach().clone()) for given in (args, kwargs)
        )
        with contextlib.redirect_stdout(io.StringIO()), torch.enable_grad(), Alone():
            loss = loss_of(list(tensors_of(pupil(*own_args, **own_kwargs))))
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        value = float(loss.detach())
        if not math.isfinite(value):
            break
        first = value if math.isnan(first) else first
        best = value if math.isnan(best) else min(best, value)
        if first <= 0 or 1.0 - best / first >= LEARNT or time.perf_counter() > ends:
            break
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return 1.0 - best / first if first > 0 else math.nan
