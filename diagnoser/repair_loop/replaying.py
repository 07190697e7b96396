"""Trials by snapshot and replay: the same batches, from the same state, once for every arm.

It needs a loop that hands over its step and its batches, and nothing of the system: it works on an
accelerator, with threads and on Windows, where no process can be forked. The first arm is the
training without a repair. It draws its batches one by one, between its steps, as the training
would; they wait, with where the random streams stood behind each, for the other arms and for the
training itself. So what is not kept leaves no trace even where drawing a batch and making a step
take turns on one random stream.
"""

from __future__ import annotations

import copy
import math
import pickle
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from diagnoser.checks.calls import tensors_of
from diagnoser.curvature import RandomStates
from diagnoser.curvature.memory import free_memory
from diagnoser.errors import DiagnoserError, RunLogError
from diagnoser.monitor import Monitor
from diagnoser.repair import Applied, Live, Snapshot, apply, schedules_of
from diagnoser.repair_loop.comparing import MEASURED_AT
from diagnoser.repair_loop.loop import Ran, Trial
from diagnoser.runlog import RunLogWriter
from diagnoser.stepping import settle

GUARANTEE: Final = (
    "paired: every arm starts from one snapshot and sees the same batches; what is not kept is put "
    "back bit for bit"
)
FEWEST: Final = 10  # steps of a trial that the end of the data has made shorter
ROOM: Final = 10  # batches that must fit into free memory for one more to wait there
MORE_BATCHES: Final = 4  # times as many as a step has taken on average, before a trial is given up


class Stream:
    """A random generator of the user's own, as something with a state.

    Args:
        generator: A `torch.Generator`, one of numpy, or a `random.Random`.
    """

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    @staticmethod
    def is_one(thing: Any) -> bool:
        """Whether something is such a generator."""
        numpy = sys.modules.get("numpy")
        kinds: tuple[type, ...] = (torch.Generator, random.Random)
        if numpy is not None:
            kinds = (*kinds, numpy.random.Generator, numpy.random.RandomState)
        return isinstance(thing, kinds)

    def state_dict(self) -> dict[str, Any]:
        """Returns where it stands."""
        one = self.generator
        if isinstance(one, random.Random):
            return {"state": one.getstate()}
        if hasattr(one, "bit_generator"):
            return {"state": one.bit_generator.state}
        return {"state": one.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts it back to where it stood."""
        one = self.generator
        if isinstance(one, random.Random):
            one.setstate(state["state"])
        elif hasattr(one, "bit_generator"):
            one.bit_generator.state = state["state"]
        else:
            one.set_state(state["state"])


@dataclass(frozen=True, slots=True)
class _Moment:
    """Where all random streams stood."""

    general: RandomStates
    own: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class _Drawn:
    batch: Any
    after: _Moment | None  # where the streams stood behind it; None: drawing it left them alone


class Feed:
    """The batches of a training, which its trials may look ahead in; none is lost or seen twice.

    Args:
        batches: What the training goes through.
        streams: Random generators of the user's own.
    """

    def __init__(self, batches: Iterable[Any], streams: Sequence[Stream] = ()) -> None:
        self._iterator = iter(batches)
        self._streams = streams
        self._waiting: deque[_Drawn] = deque()
        self._failure: Exception | None = None
        self._after_the_last: _Moment | None = None
        self.ended = False
        self.why_ended = ""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self.ended:
            self.why_ended = ""
        if self._waiting:
            drawn = self._waiting.popleft()
            self._stand(drawn.after)
            return drawn.batch
        if self.ended:
            self._stand(self._after_the_last)
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure
            raise StopIteration
        return next(self._iterator)

    def ahead(self, place: int) -> tuple[Any] | None:
        """Returns a copy of a batch to come, the next one being 0; None: there is none."""
        while len(self._waiting) <= place:
            if self.ended or self.why_ended or not self._draw():
                return None
        drawn = self._waiting[place]
        self._stand(drawn.after)
        return (copied(drawn.batch),)

    def _draw(self) -> bool:
        before = self._moment()
        try:
            batch = next(self._iterator)
        except Exception as error:
            self.ended, self.why_ended = True, "the data end"
            self._after_the_last = self._moved(before)
            if not isinstance(error, StopIteration):  # the training itself will run into it
                self._failure = error
                self.why_ended = f"drawing a batch raised {_named(error)}"
            return False
        self._waiting.append(_Drawn(batch, self._moved(before)))
        if not _has_room(batch):  # this one can no longer be put back
            self.why_ended = "memory is too short for more batches"
        return True

    def _moment(self) -> _Moment:
        return _Moment(RandomStates.now(), tuple(s.state_dict() for s in self._streams))

    def _moved(self, before: _Moment) -> _Moment | None:
        now = self._moment()
        return None if pickle.dumps(now) == pickle.dumps(before) else now

    def _stand(self, moment: _Moment | None) -> None:
        if moment is not None:
            moment.general.restore()
            for stream, state in zip(self._streams, moment.own, strict=True):
                stream.load_state_dict(state)


class Replays:
    """Runs trials by snapshot and replay, between two steps of a training.

    Args:
        step: Makes one training step on a batch.
        feed: The training's batches.
        others: What else of the training has a state.
        monitor: The training's.
        log: Its log.
        directory: Of the run; each trial gets a run directory of its own in here.
        say: Prints a line.

    Attributes:
        failure: Why the training could not be put back; nothing may go on then.
    """

    guarantee = GUARANTEE
    how = "on the batches to come"

    def __init__(
        self,
        step: Callable[[Any], object],
        feed: Feed,
        others: Sequence[Any],
        monitor: Monitor,
        log: RunLogWriter,
        directory: Path,
        say: Callable[[str], None],
    ) -> None:
        self._step, self._feed, self._others = step, feed, others
        self._monitor, self._log, self._directory = monitor, log, directory
        self._say = say
        self._count = 0
        self._trained = 0  # batches
        self._most: int | None = None  # steps that the data still allow, once that is known
        self._whole: Live | None = None
        self._snapshot: Snapshot | None = None
        self.failure: Exception | None = None

    def trained(self) -> None:
        """Is told of every batch that the training was trained on."""
        self._trained += 1

    def why_not(self, live: Live) -> str:
        """Takes the snapshot of a round; returns why that cannot be done, empty: it was."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return "it is one of several processes that train together"
        self.end_round()
        self._whole = self._with_others(live)
        for optimizer in self._whole.optimizers:
            settle(optimizer)
        try:
            self._snapshot = Snapshot.take(self._whole, self._directory / "snapshots")
        except DiagnoserError as error:
            return str(error)
        except Exception as error:  # somebody's state_dict, or a disk that is full after all
            return f"its state cannot be held: {_named(error)}"
        return ""

    def end_round(self) -> None:
        """Throws the snapshot of a round away."""
        if self._snapshot is not None:
            self._snapshot.discard()
        self._snapshot, self._most = None, None

    def run(self, live: Live, trial: Trial) -> Ran:
        """Makes a trial, puts the training back, and returns what it came to."""
        self._count += 1
        steps = trial.steps if self._most is None else min(trial.steps, self._most)
        made, ran = self._arm(live, trial, steps)
        if trial.actions or ran.problem or made >= steps:
            return ran
        why, self._most = self._feed.why_ended, made
        if made < FEWEST:
            return Ran(None, f"{why}, and a trial takes {FEWEST} steps")
        message = f"{why}: trials take {made} steps instead of {trial.steps}"
        self._log.event(self._monitor.step, "repairs", message, {})
        self._say(f"diagnoser: step {self._monitor.step}: {message}")
        return self._arm(live, trial, made)[1]  # measured where the other arms will be

    def _arm(self, live: Live, trial: Trial, steps: int) -> tuple[int, Ran]:
        """Trains for some steps and puts everything back; returns how many were made."""
        first = self._monitor.step + 1
        try:
            log = self._log.branch(self._directory / "trials" / f"{self._count:02d}")
        except RunLogError as error:
            return 0, Ran(None, str(error))
        schedule = self._monitor.schedule.continued()
        schedule.measure_at(first + round(share * steps) for share in MEASURED_AT)
        applied: Applied | None = None
        problem = ""
        try:
            with self._monitor.branch(log, schedule) as branch:
                try:
                    applied = apply(live, trial.actions)
                    problem = self._train(branch, first + steps)
                except DiagnoserError as error:
                    problem = str(error)
                except (Exception, SystemExit) as error:
                    problem = f"the step raised {_named(error)}"
                if problem:
                    log.event(branch.step, "trial", problem, {})
                made = branch.steps_made - first
                branch.finish(1 if problem else 0)
        finally:
            self._put_back(applied)
            log.close()
        recording = log.recording()
        return made, Ran(recording if (recording.losses.step >= first).any() else None, problem)

    def _train(self, branch: Monitor, until: int) -> str:
        """Trains until so many steps were made or the data end; returns what went wrong."""
        usual = self._trained / max(self._monitor.steps_made, 1)
        most = math.ceil(MORE_BATCHES * max(usual, 1.0) * (until - branch.step))
        place = 0
        while branch.steps_made < until:
            if place >= most:
                return f"{place} batches made {branch.steps_made - branch.step} steps"
            batch = self._feed.ahead(place)
            if batch is None:
                return ""
            place += 1
            self._step(*batch)
        return ""

    def _put_back(self, applied: Applied | None) -> None:
        try:
            self._restore(applied)
        except KeyboardInterrupt:  # not half of it
            self._restore(applied)
            raise
        except Exception as error:
            self.failure = error
            raise

    def _restore(self, applied: Applied | None) -> None:
        assert self._snapshot is not None and self._whole is not None
        if applied is not None:
            applied.take_back()
        for optimizer in self._whole.optimizers:
            settle(optimizer)  # a step that raised left adjusted groups behind
        self._snapshot.restore()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()

    def _with_others(self, live: Live) -> Live:
        """Returns the training with all that has a state, also what nobody told us of."""
        given = {id(one): one for one in (*live.optimizers, *live.others, *self._others)}
        optimizers = [one for one in given.values() if isinstance(one, torch.optim.Optimizer)]
        for one in (*schedules_of(optimizers), *self._monitor.others):
            given.setdefault(id(one), one)
        others = [one for one in given.values() if not isinstance(one, torch.optim.Optimizer)]
        return replace(live, optimizers=optimizers, others=others)


def copied(batch: Any) -> Any:
    """Returns a batch with tensors and arrays of its own: a step may write to them."""
    if isinstance(batch, Tensor):
        if batch.grad_fn is not None:
            return batch
        return batch.detach().clone().requires_grad_(batch.requires_grad)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(copied, batch))
    if type(batch) in (tuple, list):
        return type(batch)(map(copied, batch))
    if isinstance(batch, Mapping) and hasattr(batch, "__setitem__"):
        same = copy.copy(batch)
        for key, value in batch.items():
            same[key] = copied(value)
        return same
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(batch, numpy.ndarray):
        return batch.copy()
    clone = getattr(batch, "clone", None)  # of a graph, say
    return clone() if callable(clone) and not isinstance(batch, type) else batch


def _has_room(batch: Any) -> bool:
    sizes: dict[torch.device, int] = {}
    for tensor in tensors_of(batch):
        size = tensor.numel() * tensor.element_size()
        sizes[tensor.device] = sizes.get(tensor.device, 0) + size
    free = {device: free_memory(device) for device in sizes}
    return all((there := free[d]) is None or there > ROOM * size for d, size in sizes.items())


def _named(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
