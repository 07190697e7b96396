"""The monitor: follows a training step by step, measures when the schedule says so, and logs.

It is told (`interception.Listener`) of backwards, before and after, and of optimizers' steps; what
of that makes a step says `steps`. A failure of its own is a recorded event, and training goes on
(law 4).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diagnoser.checks import (
    Calls,
    Found,
    HeldBatch,
    Seen,
    examine,
    examine_before,
    examine_often,
    user_line,
)
from diagnoser.curvature import (
    ON_A_PROBE,
    Operator,
    ProbeSet,
    communicating_nodes,
    out_of_memory,
    recomputes,
)
from diagnoser.errors import MeasurementError
from diagnoser.monitor.checking import Checking
from diagnoser.monitor.interception import Interception, loss_scale, unscaled
from diagnoser.monitor.live import LiveGraphs
from diagnoser.monitor.quiet import quiet
from diagnoser.monitor.sample import KnownEnds, Sample
from diagnoser.monitor.schedule import SMALL_STEP_S, Plan, Schedule
from diagnoser.monitor.shards import can_be_run, is_sharded, local
from diagnoser.monitor.steps import Steps
from diagnoser.monitor.subject import (
    StepRule,
    Subject,
    coming_update,
    find_models,
    is_rounded,
    step_rules,
)
from diagnoser.monitor.triggers import LossBand, MomentRatios, Trigger
from diagnoser.runlog import RunLogWriter
from diagnoser.statistics import GraphReading, cross_entropy_of, loss_factor, read_graph, signed
from diagnoser.types import Component, Cost, Measurement
from diagnoser.vocabulary import MODEL

LOOKS_AT_NON_FINITE = 10  # steps with a loss that is not finite, to catch where it is born
MAX_FAILURES = 5  # of one kind of measurement, after which it is not tried again
SPECTRUM_COMPONENTS = 2  # measured at a time, in turn
PRODUCTS = 12  # of each of their estimates, at most
SUSPECT_PRODUCTS = 48  # the same for a suspected component, which is then measured alone
MOST_WAITING = 4096  # losses on a device that wait for a sample to be read
FRESH = 5  # steps after which a loss that was read late is no reason for a sample at once
MOST_SKIPS_TOLD = 8  # steps that a gradient scaler skipped; at the end all are counted
ACCURACY_EVERY = 4  # steps, where a step takes less than SMALL_STEP_S
THREADS = (
    "several threads train at once: of the first the loss is followed, and nothing is measured, "
    "since that would disturb the others"
)
LARGE_SCORES = 65_536  # elements of a classification's scores beyond which accuracy is sampled


class Monitor:
    """Listens to one training, in one thread.

    Where another thread trains as well nothing is measured any more: what is put aside and back for
    a measurement would be the other's, too.

    Args:
        log: Where everything goes.
        interception: What it notes and records.
        schedule: When to measure what.
        models: Root modules by name, or None to find them behind the first loss.
        optimizer: The optimizer, or None to take all that were built.
        probe: Fixed samples that curvature is measured on, or None for the live graph.
        on_measured: Called with every measurement (findings that appear are printed there).
        record_all: Record the calls of every step, for `check_finally`.

    Attributes:
        distributed: Whether this is one rank of several. Then nothing is done that could wait for
            the others, who may be elsewhere.
    """

    def __init__(
        self,
        log: RunLogWriter,
        interception: Interception,
        schedule: Schedule,
        *,
        models: Mapping[str, nn.Module] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        probe: ProbeSet | None = None,
        on_measured: Callable[[Sequence[Measurement]], None] | None = None,
        record_all: bool = False,
        heads: bool = False,
    ) -> None:
        self.log = log
        self.schedule = schedule
        self.measurements = 0
        self.subject: Subject | None = None
        self.distributed = False
        self.held: HeldBatch | None = None
        self._interception, self._books = interception, interception.books
        self._checking = Checking(log, interception, record_all=record_all)
        self._models = models
        self._optimizer = optimizer
        self._probe = probe
        self._heads = heads
        self._live = LiveGraphs()
        self._on_measured = on_measured
        self._failures: dict[str, int] = {}
        self._started: float | None = None
        self._spent = self._since = self._aside = 0.0
        self._generator = torch.Generator().manual_seed(0)
        self._next_component = 0
        self._known_ends = KnownEnds()
        self._suspects: tuple[str, ...] = ()
        self._next_suspect = 0
        self._suspect_was_last = False
        self._band = LossBand()
        self._moment_ratios = MomentRatios()
        self._trigger: Trigger | None = None  # granted, and not yet answered by a sample
        self._steps = Steps()
        # the running step
        self._plan = Plan()
        self._sample: Sample | None = None
        self._measured_parts = 1  # of the gradient, as curvature was measured for
        self._loss: float | Tensor = math.nan
        self._waiting: list[tuple[int, float | Tensor, float]] = []
        self._right = self._counted = 0
        self._looks_at_non_finite = 0
        self._scale = 1.0  # what gradients are multiplied by, on a step with statistics
        self._skip: float | None = None  # the scale at which a scaler skipped the running step
        self._skips = 0

    # -- what the interception tells --------------------------------------------------------------

    def before_backward(self, root: Any) -> None:
        """See `interception.Listener`."""
        with self.guard("backward"):
            steps = self._steps
            if steps.is_over(self._optimizers()):
                self._end_step()
                self._book()  # under the plan of the step that ended
            if steps.backwards == 0:
                self._begin_step()
            steps.begin_backward()
            self._checking.take(first=steps.is_first)
            loss = root if isinstance(root, Tensor) else None
            if loss is None or loss.numel() != 1 or loss.grad_fn is None:
                return
            if not steps.again:
                self._note_loss(loss)
            if self._plan and steps.is_first:
                self._measure_before(loss)
            if self._plan.statistics and not steps.again:
                self._note_factor(loss)
            if self._checking.wanted and self._checking.calls is not None:
                self._hold(loss)
            if self._checking.is_due(self.step, self.schedule) and not self._is_shared:
                self._check(loss, examine)

    def hold_batch(self) -> None:
        """Asks for the batch of the coming step to be held; see `held`."""
        self.held, self._checking.wanted = None, True

    def held_loss(self) -> float:
        """Returns the loss of the held batch with the present weights; NaN where none is held."""
        if self.held is None or self.subject is None:
            return math.nan
        with self._quietly(self.subject):
            try:
                return self.held.loss(self.subject.parameters.values())
            except MeasurementError:
                self.held = None
                return math.nan

    def _hold(self, loss: Tensor) -> None:
        self._checking.wanted = False
        if self.subject is None:
            return
        with self._quietly(self.subject):
            try:
                self.held = HeldBatch(self._seen(loss, self._checking.calls))
            except MeasurementError:
                self.held = None

    def after_backward(self) -> None:
        """See `interception.Listener`."""
        self._live.forget()
        self._checking.prepare(self.step + 1, self.schedule, first=self._steps.is_first)
        follows = self._steps.follows_gradients
        if not follows and (self._sample is None or not self._plan):
            return
        with self.guard("gradients"):
            if follows:
                self._steps.end_backward(self._known_parameters())
            if self._sample is None or self._steps.again:
                return
            if self._plan.statistics:
                stepped = self._stepped_names(self._sample.subject) if self._steps.stepped else ()
                self._sample.read_gradients(keep=True, scale=self._scale, stepped=stepped)
                if self._sample.passing:  # and the steps were made inside of the backward
                    self._read_update(self._optimizers(), note_left=False)
            elif self._plan.follow:
                self._sample.read_cosine()
                if self._plan.curvature and self._sample.subject.sharded:
                    self._measure_sharded(self._sample)

    def _stepped_names(self, subject: Subject) -> set[str]:
        own = (o for o in self._optimizers() if id(o) in self._steps.stepped)
        parameters = (id(p) for o in own for group in o.param_groups for p in group["params"])
        return {subject.name_of[key] for key in parameters if key in subject.name_of}

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """See `interception.Listener`."""
        self._steps.begin()
        if self._sample is None or not self._plan or not self._steps.backwards:
            return
        with self.guard("gradients"):
            if _inside_a_backward():
                self._sample.read_passing(optimizer, keep=self._plan.statistics)
            elif self._plan.statistics:
                self._look_for_cleared(self._sample)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """See `interception.Listener`."""
        with self.guard("update"):
            self._count_step(optimizer)
            if self._sample is None or not self._plan.statistics or _inside_a_backward():
                return
            self._read_update(self._optimizers(), note_left=True)

    def step_skipped(self, optimizer: torch.optim.Optimizer, scale: float) -> None:
        """See `interception.Listener`.

        Gradients that are not finite although nothing was left to scale down are the program's own:
        there all that was measured stays.
        """
        with self.guard("update"):
            self._count_step(optimizer)
            self._skips += 1
            if self._skips <= MOST_SKIPS_TOLD:
                self.log.event(
                    self.step,
                    "skipped_step",
                    "the gradient scaler skipped this step: gradients are not finite at a scale "
                    f"of {scale:g}",
                    {"scale": scale},
                )
            self._skip = scale
            if self._sample is not None and self._plan.statistics:
                self._sample.run("skipped_for_good", float(scale <= 1.0))
                if scale > 1.0:
                    self._sample.skip_update()

    def _count_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._steps.made_by(optimizer)
        self._books.optimizers.add(optimizer)  # it may be older than the watch

    # -- steps -----------------------------------------------------------------------------------

    def _known_parameters(self) -> list[Tensor]:
        return list(self.subject.parameters.values()) if self.subject is not None else []

    def _begin_step(self) -> None:
        now = time.perf_counter()
        if self._started is None:
            self._started = now
        self.schedule.steps = self.step
        self.schedule.training_s = max(now - self._started - self._spent - self._aside, 0.0)
        self._plan = self.schedule.plan(self.step)
        if self._is_shared:
            self._plan, self._sample = Plan(), None
            self._once("threads", THREADS)
        if self._trigger is not None and self._plan.statistics:
            found, self._trigger = self._trigger, None
            data = {
                "trigger": found.kind,
                "component": found.component,
                "seen_at": found.step,
                "value": found.value,
                "usual": found.usual,
                "times": found.times,
            }
            self.log.event(self.step, "trigger", found.message, data)
        self._loss, self._right, self._counted = math.nan, 0, 0
        self._skip = None

    @property
    def _is_shared(self) -> bool:
        return self._interception.thread.shared

    def _end_step(self) -> None:
        sample = self._sample
        if sample is not None and self._plan.statistics:
            if not sample.update and self._skip is None:
                self._read_update((), note_left=False)  # parameters changed by hand
            expected = self._probe is not None or self._steps.parts == self._measured_parts
            sample.settle_update(as_expected=expected)
            if sample.factor:  # other than 1 where parts are added and not averaged
                sample.run("loss_factor", sample.factor)
        accuracy = self._right / self._counted if self._counted else math.nan
        if (self._skip or 0.0) <= 1.0 or math.isfinite(self._loss):  # else it has no consequence
            self._waiting.append((self.step, self._loss, accuracy))
        waited = len(self._waiting) >= MOST_WAITING  # without a budget there may be no sample
        if self._plan or isinstance(self._loss, float) or waited:
            self._write_losses()
        if sample is not None and self._plan.follow:
            self._write(sample)
        self._steps.end()

    def _write(self, sample: Sample) -> None:
        self._sample = None
        self.log.measurement(sample.step, sample.rows, sample.seconds)
        self.measurements += 1
        self.schedule.learn(self._plan, sample.seconds)
        self._notice(self._moment_ratios.judge(sample.step, sample.rows))
        if self._on_measured is not None:
            self._on_measured(sample.rows)

    def suspect(self, components: Iterable[str]) -> None:
        """Tells which components a diagnosis flags now, the gravest first.

        Every other time that spectra are measured one of them is, with up to `SUSPECT_PRODUCTS`
        products, and its coupling to every other component, instead of the components whose turn it
        is. The list replaces the last one; a layer stands for its components.
        """
        self._suspects = tuple(dict.fromkeys(components))

    def _notice(self, trigger: Trigger | None) -> None:
        """Asks for a sample because of ``trigger``; it is logged when that sample is taken."""
        if trigger is not None and self.schedule.ask(self.step):
            self._trigger = trigger

    def finish(self, exit_code: int | None) -> None:
        """Ends the log; what was measured of an unfinished sample is kept."""
        self._live.stop()
        with self.guard("finish"):
            if self._steps.backwards:
                self._end_step()
            self._write_losses()
            if self._sample is not None and self._sample.rows:
                sample, self._sample = self._sample, None
                self.log.measurement(sample.step, sample.rows, sample.seconds)
                self.measurements += 1
            if self._skips:
                text = f"the gradient scaler skipped {self._skips} of {self.step} steps"
                self.log.event(self.step, "skipped_steps", text, {"skipped": self._skips})
        now = time.perf_counter()
        other = self._spent + self._aside
        training = 0.0 if self._started is None else max(now - self._started - other, 0.0)
        cost = Cost(self.step, self.measurements, training, self._spent, self._aside)
        with self.guard("finish"):
            if self.step and self.subject is not None and self.schedule.guaranteed_s:
                self._say_what_the_budget_was(cost)
        self.log.end(exit_code, cost)

    def _say_what_the_budget_was(self, cost: Cost) -> None:
        budget, training, spent = self.schedule.overhead, cost.training_s, cost.monitoring_s
        if training > 0 and spent > budget * training and not self.schedule.forced:
            self.log.event(
                self.step,
                "over_budget",
                f"monitoring took {spent / training:.0%} of training time instead of "
                f"{budget:.0%}: {self.schedule.guaranteed_s:.2f} s went into the measurements that "
                "every run gets however short its steps are",
                {
                    "guaranteed_s": self.schedule.guaranteed_s,
                    "bought_s": self.schedule.bought_s,
                    "triggered_s": self.schedule.triggered_s,
                },
            )

    # -- measuring -------------------------------------------------------------------------------

    def _note_loss(self, loss: Tensor) -> None:
        """Adds this backward's loss to the step's; reading it on a device waits for a sample."""
        loss = unscaled(loss)
        earlier = self._loss
        value: float | Tensor
        if loss.device.type == "cpu":
            value = loss.item()
        elif self._steps.backwards > 1 and isinstance(earlier, Tensor):
            self._loss = earlier + loss.detach()
            return
        else:
            value = loss.detach().clone()  # it may be written to before it is read
        self._loss = value if self._steps.backwards == 1 else earlier + value
        if isinstance(value, float):
            self._count_right(loss)
            looks = self._looks_at_non_finite < LOOKS_AT_NON_FINITE and not self._is_shared
            if looks and not math.isfinite(value):
                self._looks_at_non_finite += 1
                self._look_at_non_finite(loss)

    def _note_factor(self, loss: Tensor) -> None:
        """Adds up what the parts of a step's loss are multiplied by, for what guessing costs."""
        sample, subject = self._sample, self.subject
        if sample is None or subject is None or sample.factor is None:
            return
        with self._quietly(subject):
            factor = loss_factor(unscaled(loss))
        sample.factor = None if factor is None else sample.factor + factor

    def _write_losses(self) -> None:
        waiting, self._waiting = self._waiting, []
        if any(isinstance(loss, Tensor) for _, loss, _ in waiting):
            values = torch.stack([torch.as_tensor(loss).double() for _, loss, _ in waiting])
            waiting = [
                (step, value, accuracy)
                for (step, _, accuracy), value in zip(waiting, values.tolist(), strict=True)
            ]
        for step, loss, accuracy in waiting:
            value = float(loss)
            self.log.loss(step, value, accuracy)
            trigger = self._band.judge(step, value)
            if self.step - step <= FRESH:
                self._notice(trigger)

    def _count_right(self, loss: Tensor) -> None:
        """Adds up the accuracy of a cross-entropy that is the loss, scaled or smoothed at most.

        Where steps are short it is looked at on every fourth.
        """
        if self.step % ACCURACY_EVERY and self.schedule.step_s < SMALL_STEP_S:
            return
        node = cross_entropy_of(loss)
        if node is None:
            return
        if getattr(node._raw_saved_self, "unpack_hook", None) is not None:
            return  # under checkpointing, looking would compute the forward again
        scores, target = node._saved_self, node._saved_target
        if scores.ndim != 2 or scores.numel() > LARGE_SCORES or scores.element_size() < 4:
            return  # numpy, which takes half the time on numbers this few, has no bfloat16
        labels = target.numpy()
        counted = labels != signed(node._saved_ignore_index)
        self._right += int(((scores.detach().numpy().argmax(axis=1) == labels) & counted).sum())
        self._counted += int(counted.sum())

    def _measure_before(self, loss: Tensor) -> None:
        plan = self._plan
        if plan.statistics:
            if self.subject is None:
                self._find_subject(read_graph(loss, values=False))
            assert self.subject is not None
            with self._quietly(self.subject):
                reading = self._read_graph(unscaled(loss))
            if not self.subject.knows(self._real(reading.parameters)):
                self._find_subject(reading)
            self._sample = sample = Sample(self.step, self.subject)
            self._scale = loss_scale(loss)
            sample.read_graph(reading)
            sample.read_weights()
            with self._trying("notes"):
                self._checking.read_notes(sample)
                sample.rows += examine_often(self._seen(loss)).rows
            if reading.opaque:
                hidden = "a compiled module hides its operations: no attention, no activations"
                self._once("opaque", f"{reading.opaque[0]}: {hidden}")
            if plan.curvature:
                self._measure_curvature(sample, loss)
            return
        if self._sample is None:
            return
        self._check_left_gradients(self._sample)
        if plan.curvature and not self._sample.curved and self._sample.update:
            self._measure_curvature(self._sample, loss)
            self._sample.add_curvature()

    def _is_readable(self, loss: Tensor) -> bool:
        """Whether looking at what the graph has saved computes nothing that could communicate."""
        if not self.distributed:
            return True
        parameters = read_graph(loss, values=False).parameters
        if any(is_sharded(parameter) for parameter in parameters):
            return False  # every operation on what is computed from them may be a collective
        return not recomputes(loss) or not self._communicates(loss)

    def _communicates(self, loss: Tensor) -> bool:
        """Whether going through the graph of a loss once more could wait for other ranks."""
        if self.subject is not None and self.subject.sharded:
            return True
        found = communicating_nodes(loss)
        if found:
            self._once(
                "communicates",
                f"{found[0]} in the graph may wait for other ranks: it is not gone through again, "
                "so there is no curvature",
            )
        return bool(found)

    def check_finally(self, loss: Any) -> None:
        """Runs all checks once more, and those that train a copy, on the step that has begun."""
        with self.guard("checks"):
            if isinstance(loss, Tensor) and self._checking.calls is not None:
                self._check(loss, examine)
                self._check(loss, examine_before)

    def _check(self, loss: Tensor, run: Callable[[Seen], Found]) -> None:
        """Runs program checks on a step whose calls were recorded, before its backward."""
        begun = time.perf_counter()
        if self.subject is None:
            self._find_subject(read_graph(loss, values=False))
        assert self.subject is not None
        if self.subject.sharded:
            message = "no step was checked: a model of sharded parameters cannot be copied"
            self._once("unchecked", message, kind="unchecked")
            self._checking.recorder.end(message)
            return
        with self._trying("checks"), self._quietly(self.subject):
            self._checking.run(run, self._seen(loss, self._checking.calls))
            self.measurements += 1
        self.schedule.account_checks(time.perf_counter() - begun)

    def _seen(self, loss: Tensor, calls: Calls | None = None) -> Seen:
        subject = self.subject
        assert subject is not None
        known = {id(o): o for o in (*self._optimizers(), *self._books.optimizers)}
        return Seen(
            self.step,
            calls or Calls(),
            unscaled(loss),
            subject.parameters,
            subject.layer_of,
            list(known.values()),
            self._checking.memory,
        )

    def _measure_curvature(self, sample: Sample, loss: Tensor) -> None:
        if self._failures.get("curvature", 0) >= MAX_FAILURES or not math.isfinite(self._loss):
            return
        subject = sample.subject
        if subject.sharded:  # after the backward, see `_measure_sharded`
            if self._probe is None:
                message = f"curvature: sharded parameters allow only differences; {ON_A_PROBE}"
                self._once("sharded", message)
            return
        if self.distributed and self._probe is None and self._communicates(loss):
            return
        wanted = {n: p for n, p in subject.parameters.items() if p.requires_grad}
        with self._trying("curvature"), self._quietly(subject):
            if self._probe is not None:
                self._measure_on_probe(self._probe, sample, wanted)
            elif self._live.ready(loss):
                self._measure_live(sample, loss, wanted)
        if self._live.repeats is not None:
            sample.run("recomputed_otherwise", float(not self._live.repeats))

    def _measure_sharded(self, sample: Sample) -> None:
        """Runs the model of all ranks on their probes, when their gradients have been reduced.

        What decides whether this is done is the same on all of them.
        """
        if self._probe is None or sample.curved or not sample.update:
            return
        if not can_be_run(sample.subject.modules):
            message = "gradients are kept back, or a backward steps: FSDP2 cannot be run in between"
            self._once("between", f"curvature: {message}")
            return
        with (
            self._trying("curvature"),
            self._quietly(sample.subject),
            self._probe.evaluations() as losses,
        ):
            sample.read_sharded_curvature(losses)

    def _measure_on_probe(
        self, probe: ProbeSet, sample: Sample, wanted: Mapping[str, Tensor]
    ) -> None:
        rows, generator = list(sample.rows), self._generator.get_state()
        read = sample.blocks_read
        turn = self._next_component, self._next_suspect, self._suspect_was_last

        def afresh(operator: Operator) -> None:  # it may be called again with less memory
            sample.rows, sample.along, sample.blocks_read = list(rows), None, read
            self._generator.set_state(generator)
            self._next_component, self._next_suspect, self._suspect_was_last = turn
            self._read_curvature(sample, operator, "probe")

        try:
            probe.measure(afresh, wanted)
        finally:
            self._tell(probe.notes)

    def _measure_live(self, sample: Sample, loss: Tensor, wanted: Mapping[str, Tensor]) -> None:
        parts = self._measured_parts = self._steps.parts_before
        place = "live" if parts == 1 else f"live, first of {parts} backwards"
        scale = loss_scale(loss) / parts
        sample.several = self._steps.backwards_before > 1
        # Vectors that differ from sample to sample.
        sites = self._plan.spectrum and not sample.blocks_read
        with self._live.operator(loss, wanted, scale=scale, sites=sites) as operator:
            self._tell(self._live.notes)
            self._read_curvature(sample, operator, place)

    def _read_curvature(self, sample: Sample, operator: Operator, place: str) -> None:
        direction = self._direction(sample, operator)
        if direction is None:
            return
        sample.place = place if operator.method == "exact" else f"{place}, {operator.method}"
        sample.read_curvature(operator, direction)
        bases: dict[str, Tensor] = {}
        plan = self._plan
        if sample.blocks_read:  # the step came out otherwise than was expected
            plan = replace(plan, spectrum=False, norms=False)
        elif plan.spectrum or plan.interaction:
            sample.read_gradient_curvature(operator)
        if plan.spectrum:
            if not sample.rules:  # as they stand before the first step
                for optimizer in self._optimizers():
                    sample.rules |= step_rules(optimizer, sample.subject.name_of)
            chosen, products = self._chosen(sample, operator)
            bases = sample.read_spectrum(
                operator, chosen, self._generator, products, self._known_ends
            )
            if self._suspect_was_last:
                sample.read_coupling_norms(operator, chosen[0], self._generator)
        if plan.interaction:
            sample.read_interaction(operator, direction)
        if plan.norms:
            sample.read_all_coupling_norms(operator, self._generator, bases)
        sample.blocks_read = True

    def _tell(self, notes: list[str]) -> None:
        """Logs what is said about how curvature is measured, each once."""
        for note in notes:
            self._once(note, f"curvature: {note}", kind="curvature_method")

    def _direction(self, sample: Sample, operator: Operator) -> dict[str, Tensor] | None:
        """The step that is coming; after a step that could not be told in advance, that step."""
        if sample.update:
            return {n: d for n, d in sample.update.items() if n in operator.parameters}
        if self.distributed:  # the gradient here is this rank's, the step will be that of all
            return None
        coming: dict[str, Tensor] = {}
        gradient = {n: g for n, g in operator.gradient.items() if n in sample.reached}
        for optimizer in self._optimizers():
            update = coming_update(optimizer, gradient, sample.subject.name_of)
            if update is None:
                return None
            coming |= update
        sample.curved = bool(coming)
        return coming or None

    def _chosen(self, sample: Sample, operator: Operator) -> tuple[list[Component], int]:
        """The components whose spectrum is measured, and with how many products at most.

        All of them when measuring is forced; else a suspected one, and those whose turn it is, in
        alternation.
        """
        components = sample.measurable(operator)
        self._suspect_was_last &= not self.schedule.forced and bool(components)
        if self.schedule.forced or not components:
            return components, PRODUCTS
        suspected = [
            component
            for name in self._suspects
            for component in components
            if name in (component.name, component.layer)
        ]
        self._suspect_was_last = bool(suspected) and not self._suspect_was_last
        if self._suspect_was_last:
            self._next_suspect += 1
            return [suspected[(self._next_suspect - 1) % len(suspected)]], SUSPECT_PRODUCTS
        first = self._next_component % len(components)
        self._next_component = first + SPECTRUM_COMPONENTS
        count = min(SPECTRUM_COMPONENTS, len(components))
        return (components + components)[first : first + count], PRODUCTS

    def _read_update(self, optimizers: Any, *, note_left: bool) -> None:
        sample = self._sample
        assert sample is not None
        subject = sample.subject
        rules: dict[str, StepRule] = {}
        optimized: dict[str, bool] = {}
        rounded: set[str] = set()
        count = 0
        for optimizer in optimizers:
            count += 1
            rules |= step_rules(optimizer, subject.name_of)
            for group in optimizer.param_groups:
                optimized |= {
                    subject.name_of[id(p)]: True
                    for p in group["params"]
                    if id(p) in subject.name_of
                }
                if group.get("lr", 1.0):
                    own = (p for p in group["params"] if is_rounded(optimizer, p))
                    rounded |= {subject.name_of[id(p)] for p in own if id(p) in subject.name_of}
        sample.read_update(rules, optimized if count else None)
        sample.read_lost_updates(rounded)
        if self._skips and self._skip is None:
            sample.run("skipped_for_good", 0.0)
        sample.run("optimizers", float(self._steps.optimizers))
        if self._steps.have_one_loss:
            sample.run("shared_loss", 1.0)
        if note_left and count == 1:  # with several, another one's loss may leave gradients here
            sample.left_gradients = {
                name: (id(p.grad), p.grad._version)
                for name, p in subject.parameters.items()
                if p.grad is not None and name in optimized
            }

    def _check_left_gradients(self, sample: Sample) -> None:
        """Whether gradients of the last step still stand when the next backward begins."""
        left, sample.left_gradients = sample.left_gradients, {}
        if not left:
            return
        still = [
            p.grad is not None and (id(p.grad), p.grad._version) == left[name]
            for name, p in sample.subject.parameters.items()
            if name in left
        ]
        sample.run("carried_gradients", sum(still) / len(still))

    def _look_for_cleared(self, sample: Sample) -> None:
        """Whether the gradients of the last backward are there when the optimizer steps."""
        told = any(row.quantity == "cleared_gradients" for row in sample.rows)
        if told or not sample.gradient:
            return
        stepped = [
            p for o in self._books.optimizers for group in o.param_groups for p in group["params"]
        ]
        known = (*sample.subject.parameters.values(), *stepped)
        there = (None if p.grad is None else local(p.grad) for p in known)
        if any(g is not None and (g.is_sparse or bool(g.any())) for g in there):
            sample.run("cleared_gradients", 0.0)
        elif any(bool(g.any()) for g in sample.gradient.values()):
            sample.run("cleared_gradients", 1.0)

    def _look_at_non_finite(self, loss: Tensor) -> None:
        """A loss that is not finite: its graph still shows where that was born."""
        if self._looks_at_non_finite == 1:
            self.log.event(self.step, "non_finite_loss", "the loss is not finite", {})
        if self.subject is None:
            self._find_subject(read_graph(loss, values=False))
        assert self.subject is not None
        sample = Sample(self.step, self.subject)
        sample.run("non_finite_loss", 1.0)
        with self._quietly(self.subject):
            sample.read_graph(self._read_graph(loss))
        sample.read_weights()
        self.log.measurement(self.step, sample.rows, 0.0)
        self.measurements += 1

    def _read_graph(self, loss: Tensor) -> GraphReading:
        subject = self.subject
        assert subject is not None
        heads_of = (lambda ps: len(subject.query_heads(ps))) if self._heads else None
        return read_graph(loss, values=self._is_readable(loss), heads_of=heads_of)

    # -- the subject -----------------------------------------------------------------------------

    def _real(self, leaves: list[Tensor]) -> list[Tensor]:
        """Without the inputs that require a gradient."""
        known = {id(p) for o in self._optimizers() for g in o.param_groups for p in g["params"]}
        return [leaf for leaf in leaves if isinstance(leaf, nn.Parameter) or id(leaf) in known]

    def _find_subject(self, reading: GraphReading) -> None:
        parameters = self._real(reading.parameters)
        if self._models is not None:
            models, free = dict(self._models), dict[str, Tensor]()
        else:
            optimizers = list(self._optimizers())
            models, free = find_models(self._books.modules, parameters, optimizers)
            if free:
                self._books.note_living_modules()
                models, free = find_models(self._books.modules, parameters, optimizers)
        self.subject = Subject(models, free, heads=self._heads)
        if not self._follow_compiled(self.subject) and reading.opaque:
            self._books.note_living_modules()  # what compiles it is older than the watch
            self._follow_compiled(self.subject)
        self.log.components(self.step, (*self.subject.components, *self.subject.layers), {})
        for optimizer in self._optimizers():
            place = self._books.optimizer_places.get(id(optimizer))
            data = {"class": type(optimizer).__name__, "groups": len(optimizer.param_groups)}
            if place is not None:
                data |= {"file": place.file, "line": place.line}
            self.log.fact(self.step, "optimizer", MODEL, 1.0, data)
        self._checking.place(self.step, "backward", MODEL, user_line())

    def _follow_compiled(self, subject: Subject) -> bool:
        """Follows the subject's modules, and what ``torch.compile`` returned of them."""
        modules = {id(module): module for module in subject.modules}
        for module in self._books.modules:
            parts = vars(module).get("_modules") or {}
            if id(parts.get("_orig_mod")) in modules:
                modules.setdefault(id(module), module)
        return self._live.follow(modules.values())

    @property
    def step(self) -> int:
        """The number of the running step."""
        return self._steps.number

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """All that step what is watched."""
        return tuple(self._optimizers())

    @property
    def others(self) -> tuple[Any, ...]:
        """Schedules and gradient scalers that were seen."""
        return (*self._books.schedulers, *self._books.scalers)

    @property
    def last_loss(self) -> float:
        """The loss of the running step; on a device it is waited for."""
        return float(self._loss)

    @property
    def steps_made(self) -> int:
        """How many steps an optimizer has made, the running one included."""
        return self._steps.made

    @contextmanager
    def branch(self, log: RunLogWriter, schedule: Schedule) -> Iterator[Monitor]:
        """Watches a continuation that is taken back afterwards; this monitor hears nothing of it.

        Args:
            log: Of the continuation.
            schedule: What it measures when.

        Returns:
            Its monitor, of which the next step is the first.
        """
        other = Monitor(
            log,
            self._interception,
            schedule,
            models=self._models,
            optimizer=self._optimizer,
            probe=self._probe,
        )
        other._steps.number = self.step + 1
        other.subject, other._live = self.subject, self._live
        other._failures = dict(self._failures)
        other._waiting = list(self._waiting)
        if self._steps.backwards:  # the step that was just made is not written yet
            accuracy = self._right / self._counted if self._counted else math.nan
            other._waiting.append((self.step, self._loss, accuracy))
        other._checking.memory = copy.deepcopy(self._checking.memory)
        other._spent, other._aside = self._spent, self._aside
        other._started = time.perf_counter() - schedule.training_s - self._spent - self._aside
        try:
            with self._interception.telling(other):
                yield other
        finally:
            if self.subject is not None:
                self._follow_compiled(self.subject)
                self._live.forget()

    @property
    def is_complete(self) -> bool:
        """Whether all optimizers that made the last step have made this one, too."""
        return self._steps.is_complete

    def _optimizers(self) -> Iterator[torch.optim.Optimizer]:
        if self._optimizer is not None:
            yield self._optimizer
            return
        yield from self._books.optimizers

    # -- keeping out of the way ------------------------------------------------------------------

    def _quietly(self, subject: Subject) -> Any:
        modules = {id(m): m for m in (*subject.modules, *self._books.modules)}
        return quiet(self._books, modules.values(), list(subject.parameters.values()))

    def guard(self, what: str) -> _Guard:
        """Times our own work and turns our own failures into events."""
        return _Guard(self, what)

    @contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """Like `guard`, for what is neither training nor monitoring: trials of repairs."""
        begun = time.perf_counter()
        self._checking.recorder.paused = True
        try:
            yield
        except Exception as error:
            self._failed(what, error)
        finally:
            self._aside += max(time.perf_counter() - begun, 0.0)
            self._checking.recorder.paused = False

    def _book(self) -> None:
        """Books the time since the last booking under the plan of the running step."""
        now = time.perf_counter()
        seconds, self._since = max(now - self._since, 0.0), now  # a script may set the clock
        self._spent += seconds
        self.schedule.account(self._plan, seconds)
        if self._sample is not None:
            self._sample.seconds += seconds

    @contextmanager
    def _trying(self, what: str) -> Iterator[None]:
        """Lets one kind of measurement fail without those that follow it in the same guard."""
        try:
            yield
        except Exception as error:
            self._failed(what, error)

    def _failed(self, what: str, error: Exception) -> None:
        self._failures[what] = count = self._failures.get(what, 0) + 1
        if what == "curvature" and out_of_memory(error):
            error = MeasurementError(f"out of memory; {ON_A_PROBE}, in pieces that fit")
        if count <= MAX_FAILURES:
            kind = "unmeasurable" if isinstance(error, MeasurementError) else "monitor_error"
            text = f"{what}: {error}" if kind == "unmeasurable" else f"{what}: {error!r}"
            self.log.event(self.step, kind, text, {"failures": count})

    def _once(self, key: str, message: str, kind: str = "unmeasurable") -> None:
        if self._failures.setdefault(f"once:{key}", 0) == 0:
            self._failures[f"once:{key}"] = 1
            self.log.event(self.step, kind, message, {})


def _inside_a_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


class _Guard:
    """See `Monitor.guard`; a class, as every step passes two of them and generators are slower."""

    __slots__ = ("_monitor", "_what")

    def __init__(self, monitor: Monitor, what: str) -> None:
        self._monitor = monitor
        self._what = what

    def __enter__(self) -> None:
        self._monitor._since = time.perf_counter()
        self._monitor._checking.recorder.paused = True

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, Exception):
            self._monitor._failed(self._what, error)
        self._monitor._book()
        self._monitor._checking.recorder.paused = False
        return isinstance(error, Exception)
