"""A training as its author wrote it: all that can be got wrong, in one place, and the loop.

A `Subject` says how to make one (data, model, objective); `Settings` is what its author chose.
`Training` comes into being in five `MOMENTS`, and operators act at one of them, as a developer's
mistake does: on the settings, the data, the model that was just built, the objective, or the
optimizer. `train` then runs the loop that the settings ask for and scores the result on held-out
samples. The same settings, operators and seed give the same numbers, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import torch
from torch import Tensor, nn

from diagnoser.components import parameters_of, split_components
from diagnoser.types import Component
from diagnoser.vocabulary import MODEL

Batch = Mapping[str, Tensor]  # tensors by name; the first dimension of each is the sample
Criterion = Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) to a scalar loss
Moment = Literal["settings", "data", "model", "objective", "optimizer"]

MOMENTS: Final[tuple[Moment, ...]] = ("settings", "data", "model", "objective", "optimizer")
TARGETS: Final = "targets"  # the name that every batch keeps its targets under
HALF: Final = torch.float16


@dataclass(frozen=True, slots=True)
class Perturbation:
    """The paper's disturbance: W + alpha * rms(W) * N(0, I), once, outside the optimizer (2.5)."""

    components: tuple[str, ...]
    alpha: float
    at: float  # share of the steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the author of a training script chooses, rightly or wrongly.

    Components are named as `diagnoser.components` names them; the empty tuple is none of them.
    """

    steps: int
    batch_size: int
    learning_rate: float
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    momentum: float = 0.9  # of sgd
    weight_decay: float = 0.01
    decay_everything: bool = False  # also norms, biases and embeddings
    warmup: float = 0.05  # share of the steps in which the learning rate rises
    schedule: Literal["constant", "cosine"] = "cosine"
    schedule_calls: int = 1  # how often the scheduler moves in a step
    clip: float | None = 1.0  # largest gradient norm
    zero_grad_every: int = 1  # steps; 0: never
    accumulation: int = 1  # batches a step
    accumulated: Literal["mean", "sum"] = "mean"
    learning_rate_factors: tuple[tuple[str, float], ...] = ()  # (component, factor)
    frozen: tuple[str, ...] = ()  # components that do not require a gradient
    left_out: tuple[str, ...] = ()  # components that the optimizer is not given
    stepped_twice: tuple[str, ...] = ()  # components that a second optimizer has, too
    shuffle: bool = True  # False: sorted by target
    train_mode: bool = True  # the model is in training mode while it is trained
    eval_mode: bool = True  # and in evaluation mode when it is scored
    half_gradients: bool = False  # gradients pass through float16
    loss_scale: float = 1.0  # what the loss is multiplied by before, and gradients divided after
    perturbation: Perturbation | None = None
    width: int = 32
    depth: int = 2
    heads: int = 4
    dropout: float = 0.0
    label_smoothing: float = 0.0


@dataclass(frozen=True, slots=True)
class Data:
    """Training and held-out samples; ``seed`` of a run never changes the held-out ones."""

    train: Batch
    held_out: Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """An architecture on a task. ``build`` is called with torch's own RNG seeded.

    ``predict(model, batch)`` gives outputs, ``criterion(settings)`` the loss function of outputs
    and targets, ``score(outputs, targets)`` a number where higher is better. ``floor`` is the
    smallest loss of score that anybody would mind, in the score's unit, or, where ``relative``, as
    a share of the healthy mean. ``packages`` are needed beyond those of the tool.
    """

    id: str
    name: str
    split: Literal["train", "dev", "test"]
    summary: str
    recipes: Mapping[str, Settings]
    data: Callable[[], Data]
    build: Callable[[Settings], nn.Module]
    predict: Callable[[nn.Module, Batch], Tensor]
    criterion: Callable[[Settings], Criterion]
    score: Callable[[Tensor, Tensor], float]
    score_name: str
    floor: float = 0.02
    relative: bool = True
    packages: tuple[str, ...] = ()


@dataclass(slots=True)
class Training:
    """A training while it comes into being; later moments fill later fields."""

    subject: Subject
    settings: Settings
    seed: int
    data: Data = field(init=False)
    model: nn.Module = field(init=False)
    criterion: Criterion = field(init=False)
    optimizers: list[torch.optim.Optimizer] = field(init=False)
    # What an operator undoes before scoring, so that a leak is scored as if it were not there.
    corrections: list[Callable[[], None]] = field(default_factory=list)

    def reach(self, moment: Moment) -> None:
        """Makes what exists from this moment on; called once each, in order."""
        match moment:
            case "settings":
                return
            case "data":
                self.data = self.subject.data()
            case "model":
                torch.manual_seed(self.seed)
                self.model = self.subject.build(self.settings)
                for component in self.settings.frozen:
                    for parameter in self.parameters(component):
                        parameter.requires_grad_(False)
            case "objective":
                self.criterion = self.subject.criterion(self.settings)
            case "optimizer":
                self.optimizers = make_optimizers(self)

    @property
    def components(self) -> tuple[Component, ...]:
        """The components of the model as it is now."""
        return split_components({MODEL: self.model})

    def parameters(self, component: str) -> list[nn.Parameter]:
        """Returns the parameters of a component, or of all whose name starts with it.

        Raises:
            LookupError: No such component.
        """
        named = parameters_of({MODEL: self.model})
        found = {
            part.parameter: named[part.parameter]
            for candidate in self.components
            if candidate.name == component or candidate.name.startswith(f"{component}.")
            for part in candidate.parts
        }
        if not found:
            raise LookupError(f"{self.subject.name}: no component {component}")
        return list(found.values())


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a training ended: held-out score and loss, and the training loss of every step.

    ``score`` and ``loss`` are NaN where the outputs were not finite.
    """

    score: float
    loss: float
    losses: tuple[float, ...]


def make_optimizers(training: Training) -> list[torch.optim.Optimizer]:
    """Makes the optimizer that the settings describe, and the second one of a doubled component."""
    settings, model = training.settings, training.model
    factor = {
        id(parameter): value
        for component, value in settings.learning_rate_factors
        for parameter in training.parameters(component)
    }
    absent = {
        id(parameter) for name in settings.left_out for parameter in training.parameters(name)
    }
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in absent:
            decays = settings.decay_everything or parameter.ndim > 1
            groups.setdefault((factor.get(id(parameter), 1.0), decays), []).append(parameter)
    described = [
        {
            "params": parameters,
            "lr": settings.learning_rate * scale,
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        for (scale, decays), parameters in groups.items()
    ]
    made = [_optimizer(settings, described)]
    again = [p for name in settings.stepped_twice for p in training.parameters(name)]
    if again:
        made.append(_optimizer(settings, [{"params": again, "lr": settings.learning_rate}]))
    return made


def _optimizer(settings: Settings, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(
        groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )  # fmt: skip


def learning_rate_factor(settings: Settings, step: int) -> float:
    """Returns what the scheduler multiplies the learning rate by at a step."""
    at = min(step * settings.schedule_calls, settings.steps)
    warm = settings.warmup * settings.steps
    if at < warm:
        return (at + 1) / (warm + 1)
    if settings.schedule == "constant":
        return 1.0
    done = (at - warm) / max(settings.steps - warm, 1)
    return 0.5 * (1.0 + math.cos(math.pi * done))


def batches(training: Training) -> Iterator[Batch]:
    """Yields training batches without end, each epoch in a new order (or sorted by target)."""
    settings, train = training.settings, training.data.train
    count = len(train[TARGETS])
    size = min(settings.batch_size, count)
    generator = torch.Generator().manual_seed(training.seed + 1)
    while True:
        order = torch.randperm(count, generator=generator)
        if not settings.shuffle:
            keys = train[TARGETS].flatten(1)[:, 0] if train[TARGETS].ndim > 1 else train[TARGETS]
            order = order[keys[order].argsort(stable=True)]
        for first in range(0, count - size + 1, size):
            chosen = order[first : first + size]
            yield {name: tensor[chosen] for name, tensor in train.items()}


def train(training: Training) -> Outcome:
    """Runs the training loop and scores the model on the held-out samples."""
    settings, model = training.settings, training.model
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: learning_rate_factor(settings, step))
        for o in training.optimizers
    ]
    disturbed_at = -1
    if settings.perturbation is not None:
        disturbed_at = int(settings.perturbation.at * settings.steps)
    model.train(settings.train_mode)
    supply, losses = batches(training), []
    for step in range(settings.steps):
        if step == disturbed_at:
            _perturb(training)
        if settings.zero_grad_every and step % settings.zero_grad_every == 0:
            for optimizer in training.optimizers:
                optimizer.zero_grad()
        share = 1.0 if settings.accumulated == "sum" else 1.0 / settings.accumulation
        for _ in range(settings.accumulation):
            batch = next(supply)
            loss = training.criterion(training.subject.predict(model, batch), batch[TARGETS])
            torch.autograd.backward(loss * (share * settings.loss_scale))
        losses.append(float(loss.detach()))
        _finish_gradients(model, settings)
        for optimizer in training.optimizers:
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return score(training, tuple(losses))


def score(training: Training, losses: tuple[float, ...]) -> Outcome:
    """Scores the model on the held-out samples, as if a leak were not there."""
    for correct in training.corrections:
        correct()
    subject, held_out = training.subject, training.data.held_out
    training.model.train(not training.settings.eval_mode)
    with torch.no_grad():
        outputs = subject.predict(training.model, held_out)
        right = subject.criterion(training.settings)
        loss = float(right(outputs, held_out[TARGETS]))
        finite = bool(outputs.isfinite().all())
        value = subject.score(outputs, held_out[TARGETS]) if finite else math.nan
    return Outcome(value, loss if finite else math.nan, losses)


def _finish_gradients(model: nn.Module, settings: Settings) -> None:
    """What stands between backward and step: half precision, unscaling, clipping."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if settings.half_gradients:
        for gradient in gradients:
            gradient.copy_(gradient.to(HALF))
    if settings.loss_scale != 1.0:
        for gradient in gradients:
            gradient.div_(settings.loss_scale)
    if settings.clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)


def _perturb(training: Training) -> None:
    disturbance = training.settings.perturbation
    assert disturbance is not None
    generator = torch.Generator().manual_seed(training.seed + 2)
    with torch.no_grad():
        for component in disturbance.components:
            for weight in training.parameters(component):
                scale = disturbance.alpha * weight.square().mean().sqrt()
                weight.add_(scale * torch.randn(weight.shape, generator=generator))
