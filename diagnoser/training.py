"""A training whose loop is handed over: trained on all batches, watched, and mended on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diagnoser.errors import UsageError
from diagnoser.monitor import Monitor
from diagnoser.repair_loop import Feed, Replays, Runner, Stream
from diagnoser.runlog import RunLogWriter
from diagnoser.session import Watch, probe_set, strategy_named, switched_off, to_stderr
from diagnoser.types import Diagnosis


def train_with_repairs(
    step: Callable[[Any], object],
    batches: Iterable[Any],
    *,
    model: nn.Module | Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    others: Iterable[Any] = (),
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    probe: Any = None,
    out: Path | str | None = None,
    overhead: float = 0.10,
    every: int | None = None,
    rules: Path | str | None = None,
    classifier: Path | str | None = None,
    strategy: str = "diagnoser",
    verbose: bool = True,
) -> Diagnosis:
    """Trains on all batches, tries repairs of what is found, and keeps one only if it helped.

    A trial takes the batches that come next: with a repair and without, each time from the same
    state, which is put back bit for bit. Then the training goes on with these batches, repaired if
    that helped. It works on any device and system. Trials call ``step``, too: what it prints, or
    notes outside of what is named here, is of trials as well.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> def step(batch):
    ...     optimizer.zero_grad()
    ...     (model(batch) - 1).square().mean().backward()
    ...     optimizer.step()
    >>> directory = getfixture("tmp_path") / "run"
    >>> batches = [torch.ones(4, 2)] * 30
    >>> train_with_repairs(step, batches, model=model, optimizer=optimizer, out=directory).verdict
    'healthy'

    Args:
        step: Makes one training step on a batch: gradients, clipping, optimizer, scheduler.
        batches: All batches of the training, of all epochs; a generator will do.
        model: The module that is trained, or several by name.
        optimizer: Its optimizer.
        others: All else that steps change and that has ``state_dict`` and ``load_state_dict``:
            schedulers, gradient scalers, averages of weights, further optimizers; and random
            generators of your own. What is kept elsewhere, such as a counter of accumulated
            batches, is not put back.
        loss_fn: See `watch`.
        probe: See `watch`; trials are measured on it, too.
        out: The run directory; trials are in its ``trials/``, each as a run of its own.
        overhead: See `watch`. Trials come on top of it.
        every: See `watch`.
        rules: See `watch`.
        classifier: See `watch`.
        strategy: See `watch`.
        verbose: Print findings and what was tried to stderr as they appear.

    Returns:
        The diagnosis, which is written beside the run's log as well; inconclusive where
        ``DIAGNOSER_OFF`` is set, which trains and does nothing else.

    Raises:
        UsageError: Arguments that do not fit together.
        RuleError, ClassifierError: A file that cannot be used.
        RunLogError: The run directory cannot be written.
    """
    models = {"model": model} if isinstance(model, nn.Module) else model
    stateful = _stateful(others)
    several = any(isinstance(one, torch.optim.Optimizer) for one in stateful)
    say = to_stderr() if verbose else _silent
    made: list[Replays] = []
    feed = Feed(batches, [one for one in stateful if isinstance(one, Stream)])

    def replays(monitor: Monitor, log: RunLogWriter, directory: Path) -> Runner:
        made.append(Replays(step, feed, stateful, monitor, log, directory, say))
        return made[0]

    watching = Watch(
        out,
        models=models,
        optimizer=None if several else optimizer,
        probe=None if switched_off() else probe_set(models, loss_fn, probe),
        overhead=overhead,
        every=every,
        rules=rules,
        classifier=classifier,
        announce=say if verbose else None,
        repair="apply",
        strategy=strategy_named(strategy),
        runner=replays,
    )
    with watching:
        for batch in feed:
            step(batch)
            for runner in made:
                runner.trained()
                watching.between_steps()
                runner.end_round()
                if runner.failure is not None:
                    raise runner.failure
    return watching.diagnose()


def _stateful(others: Iterable[Any]) -> Sequence[Any]:
    """Returns what has a state as something that can be put back.

    Raises:
        UsageError: Something cannot.
    """
    found = []
    for other in others:
        one = Stream(other) if Stream.is_one(other) else other
        if not (hasattr(one, "state_dict") and hasattr(one, "load_state_dict")):
            raise UsageError(
                f"others=: a {type(other).__name__} has no state_dict and load_state_dict"
            )
        found.append(one)
    return found


def _silent(_: str) -> None:
    return
