"""Loops that people train with, each over a model, its batches and its loss (`popular_models`).

A loop is given a context to train in, which watches or does not, and notes what it saw itself: the
loss of each step and the norm of its gradient, for what is recorded to be held against.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from popular_models import Batch, Subject
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, Adam, AdamW
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from traces import Trace

STEPS = 30  # a verdict needs 20 of them, and five measurements
RATE = 1e-3


@dataclass
class Training(Trace):
    """What a loop leaves behind, and by step: its loss, and the norm of its gradient.

    ``norms`` stays empty where a step has more than one gradient.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def step(self, loss: Tensor | float, parameters: Iterator[nn.Parameter] | None = None) -> None:
        """Notes a step whose gradients stand, before anything clips or clears them."""
        self.losses.append(loss.item() if isinstance(loss, Tensor) else loss)
        if parameters is not None:
            self.norms.append(norm([p.grad for p in parameters if p.grad is not None]))


Watching = AbstractContextManager[Any]
Loop = Callable[[Subject, Training, Watching], None]
Body = Callable[[Subject, Training], None]


def norm(gradients: list[Tensor]) -> float:
    return nn.utils.get_total_norm([g.detach() for g in gradients]).item()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adamw(subject: Subject, training: Training, **options: Any) -> AdamW:
    optimizer = AdamW(trained(subject.model), lr=RATE, **options)
    training.built(subject.model, optimizer)
    return optimizer


def within(body: Body) -> Loop:
    """Trains inside of the context, all that is built included."""

    def loop(subject: Subject, training: Training, watching: Watching) -> None:
        with watching:
            body(subject, training)

    return loop


# -- own models -------------------------------------------------------------------------------


class Network(nn.Module):
    """Blocks one after another between two layers; each may be checkpointed."""

    def __init__(self, first: nn.Module, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.first, self.blocks, self.head = first, nn.ModuleList(blocks), head
        self.checkpointing: dict[str, Any] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.first(inputs)
        for block in self.blocks:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, **self.checkpointing)
        return self.head(x)


class Block(nn.Module):
    """A pre-norm block with fused attention that sees no future."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width), heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.dropout = nn.Linear(width, width), nn.Dropout(0.1)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.out(seen.transpose(1, 2).flatten(2)))
        return x + self.feed_forward(x)


def perceptron() -> Subject:
    def layer() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Dropout(0.1))

    model = Network(nn.Linear(6, 12), [layer(), layer()], nn.Linear(12, 3))

    def draw() -> Batch:
        points = torch.randn(16, 6)
        return {"inputs": points, "labels": points[:, :3].argmax(1)}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch["inputs"]), batch["labels"])

    return Subject(model, draw, loss)


def transformer() -> Subject:
    """Says after every word which of two it was."""
    blocks: list[nn.Module] = [Block(16, 2), Block(16, 2)]
    model = Network(nn.Embedding(11, 16), blocks, nn.Linear(16, 2))

    def draw() -> Batch:
        words = torch.randint(11, (8, 7))
        return {"inputs": words, "labels": words % 2}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch["inputs"]).flatten(0, 1), batch["labels"].flatten())

    return Subject(model, draw, loss)


OWN: dict[str, Callable[[], Subject]] = {"MLP": perceptron, "transformer": transformer}


# -- loops ------------------------------------------------------------------------------------


def plain(subject: Subject, training: Training) -> None:
    model, optimizer = subject.model, adamw(subject, training)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = subject.loss(model, subject.draw())
        loss.backward()
        training.step(loss, model.parameters())
        optimizer.step()


def in_cells(subject: Subject, training: Training, watching: Watching) -> None:
    """A notebook: one cell opens the watch, two train, one closes it."""
    model, optimizer = subject.model, adamw(subject, training)
    watching.__enter__()
    for _ in range(2):
        for _ in range(STEPS // 2):
            optimizer.zero_grad()
            loss = subject.loss(model, subject.draw())
            loss.backward()
            training.step(loss, model.parameters())
            optimizer.step()
    watching.__exit__(None, None, None)


def accumulated(subject: Subject, training: Training) -> None:
    model, optimizer = subject.model, adamw(subject, training)
    for _ in range(STEPS):
        total = 0.0
        for _ in range(3):
            loss = subject.loss(model, subject.draw()) / 3
            loss.backward()
            total += loss.item()
        training.step(total, model.parameters())
        optimizer.step()
        optimizer.zero_grad()


def clipped_and_scheduled(subject: Subject, training: Training) -> None:
    model, optimizer = subject.model, adamw(subject, training)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2 * RATE, total_steps=STEPS + 1)
    for _ in range(STEPS):
        loss = subject.loss(model, subject.draw())
        optimizer.zero_grad()
        loss.backward()
        training.step(loss, model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def in_groups(subject: Subject, training: Training) -> None:
    model = subject.model
    matrices = [p for p in trained(model) if p.ndim > 1]
    others = [p for p in trained(model) if p.ndim <= 1]
    optimizer = AdamW(
        [
            {"params": matrices, "weight_decay": 0.1},
            {"params": others, "weight_decay": 0.0, "lr": 2 * RATE},
        ],
        lr=RATE,
    )
    training.built(model, optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        loss = subject.loss(model, subject.draw())
        loss.backward()
        training.step(loss, model.parameters())
        optimizer.step()


def adversarial(subject: Subject, training: Training) -> None:
    """The subject's model is the critic, of what a generator makes of noise.

    Every optimizer's step ends one until both are known: the first step is recorded as two.
    """
    size = subject.draw()["inputs"].shape
    generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, size[1]))
    critic = subject.model
    for_generator = Adam(generator.parameters(), lr=RATE, betas=(0.5, 0.999))
    for_critic = Adam(critic.parameters(), lr=RATE, betas=(0.5, 0.999))
    training.built(generator, critic, for_generator, for_critic)
    for step in range(STEPS):
        real, fake = subject.draw()["inputs"], generator(torch.randn(size[0], 4))
        for_critic.zero_grad()
        right, wrong = critic(real)[:, 0], critic(fake.detach())[:, 0]
        loss = F.softplus(-right).mean() + F.softplus(wrong).mean()
        loss.backward()
        of_critic = norm([p.grad for p in critic.parameters() if p.grad is not None])
        for_critic.step()
        for_generator.zero_grad()
        other = F.softplus(-critic(fake)[:, 0]).mean()
        other.backward()
        of_generator = norm([p.grad for p in generator.parameters() if p.grad is not None])
        for_generator.step()
        if step == 0:
            training.losses += [loss.item(), other.item()]
            training.norms += [of_critic, of_generator]
        else:
            training.step(loss.item() + other.item())
            training.norms.append(math.hypot(of_critic, of_generator))


def scaled(scale: float, **options: Any) -> Body:
    """Float16 with a gradient scaler; from far too large a scale it skips steps until it fits."""

    def loop(subject: Subject, training: Training) -> None:
        model, optimizer = subject.model, adamw(subject, training, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=5)
        for _ in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = subject.loss(model, subject.draw())
            scaler.scale(loss).backward()
            training.step(loss, model.parameters())
            training.norms[-1] /= scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            training.values.append(scaler.get_scale())

    return loop


def in_bfloat16(subject: Subject, training: Training) -> None:
    model, optimizer = subject.model, adamw(subject, training)
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = subject.loss(model, subject.draw())
        loss.backward()
        training.step(loss, model.parameters())
        optimizer.step()


def with_closures(subject: Subject, training: Training) -> None:
    """Of the evaluations of a step the first is at its weights."""
    model = subject.model
    optimizer = torch.optim.LBFGS(trained(model), lr=0.1, max_iter=3)
    training.built(model, optimizer)
    for _ in range(STEPS):
        batch, first = subject.draw(), True

        def closure(batch: Batch = batch) -> Tensor:
            nonlocal first
            optimizer.zero_grad()
            loss = subject.loss(model, batch)
            loss.backward()
            if first:
                training.step(loss, model.parameters())
            first = False
            return loss

        optimizer.step(closure)


def several_losses(subject: Subject, training: Training) -> None:
    model, optimizer = subject.model, adamw(subject, training)
    for _ in range(STEPS):
        optimizer.zero_grad()
        first, second = (subject.loss(model, subject.draw()) for _ in range(2))
        first.backward()
        (0.5 * second).backward()
        penalty = 1e-3 * sum(p.square().sum() for p in trained(model))
        penalty.backward()
        training.step(first.item() + 0.5 * second.item() + penalty.item(), model.parameters())
        optimizer.step()


def graph_retained(subject: Subject, training: Training) -> None:
    model, optimizer = subject.model, adamw(subject, training)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = subject.loss(model, subject.draw())
        loss.backward(retain_graph=True)
        other = 0.5 * loss
        other.backward()
        training.step(loss.item() + other.item(), model.parameters())
        optimizer.step()


def compiled(backend: str, *, dropout: bool = True) -> Body:
    def loop(subject: Subject, training: Training) -> None:
        if not dropout:
            for module in subject.model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        model: Any = torch.compile(subject.model, backend=backend)
        optimizer = adamw(subject, training)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = subject.loss(model, subject.draw())
            loss.backward()
            training.step(loss, model.parameters())
            optimizer.step()

    return loop


def compiled_in_place(subject: Subject, training: Training) -> None:
    subject.model.compile(backend="aot_eager")
    plain(subject, training)


def checkpointed(*, use_reentrant: bool) -> Body:
    def loop(subject: Subject, training: Training) -> None:
        model: Any = subject.model
        if isinstance(model, Network):
            model.checkpointing = {"use_reentrant": use_reentrant}
        else:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            if use_reentrant:
                model.enable_input_require_grads()
        plain(subject, training)

    return loop


def averaged(subject: Subject, training: Training) -> None:
    model, optimizer = subject.model, adamw(subject, training)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    training.built(average)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = subject.loss(model, subject.draw())
        loss.backward()
        training.step(loss, model.parameters())
        optimizer.step()
        average.update_parameters(model)
        if step % 8 == 7:
            average.eval()
            with torch.no_grad():
                training.values.append(subject.loss(average, subject.draw()).item())
            average.train()


class Drawn(Dataset[Batch]):
    """Batches that were drawn before, to be taken in any order."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index]


def by_workers(subject: Subject, training: Training) -> None:
    model, optimizer = subject.model, adamw(subject, training)
    data = Drawn([subject.draw() for _ in range(STEPS)])
    for batch in DataLoader(data, batch_size=None, shuffle=True, num_workers=2):
        optimizer.zero_grad()
        loss = subject.loss(model, batch)
        loss.backward()
        training.step(loss, model.parameters())
        optimizer.step()


def stepping_in_backward(subject: Subject, training: Training) -> None:
    """Each parameter is stepped as soon as its gradient is there, which is then let go."""
    model = subject.model
    optimizers = {p: AdamW([p], lr=RATE) for p in trained(model)}
    training.built(model, *optimizers.values())
    squares: list[float] = []

    def act(parameter: Tensor) -> None:
        squares.append(float(parameter.grad.square().sum()))  # type: ignore[union-attr]
        optimizer = optimizers[parameter]  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(act)
    for _ in range(STEPS):
        loss = subject.loss(model, subject.draw())
        loss.backward()
        training.step(loss)
        training.norms.append(sum(squares) ** 0.5)
        squares.clear()


def without_backward(subject: Subject, training: Training) -> None:
    model, optimizer = subject.model, adamw(subject, training)
    parameters = trained(model)
    for _ in range(STEPS):
        loss = subject.loss(model, subject.draw())
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad = gradient
        training.step(loss, model.parameters())
        optimizer.step()


def by_hand(subject: Subject, training: Training) -> None:
    model = subject.model
    training.built(model)
    for _ in range(STEPS):
        model.zero_grad()
        loss = subject.loss(model, subject.draw())
        loss.backward()
        training.step(loss, model.parameters())
        for parameter in trained(model):
            parameter.data.add_(parameter.grad, alpha=-0.05)  # type: ignore[arg-type]


def penalised(subject: Subject, training: Training) -> None:
    """The gradient at the first layer's output is held down, by a derivative of it."""
    model: Any = subject.model
    optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9)
    training.built(model, optimizer)
    kept: list[Tensor] = []
    handle = model.first.register_forward_hook(lambda *args: kept.append(args[-1]))
    for _ in range(STEPS):
        optimizer.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative of its own
            loss = subject.loss(model, subject.draw())
            (slope,) = torch.autograd.grad(loss, kept.pop(), create_graph=True)
            loss = loss + slope.square().sum()
            loss.backward()
        training.step(loss, model.parameters())
        optimizer.step()
    handle.remove()


FITTING, TOO_LARGE = 2.0**8, 2.0**25  # scales of a gradient scaler

LOOPS: dict[str, Loop] = {
    "plain": within(plain),
    "cells of a notebook": in_cells,
    "gradient accumulation": within(accumulated),
    "clipping and a schedule": within(clipped_and_scheduled),
    "parameter groups": within(in_groups),
    "several losses and backwards a step": within(several_losses),
    "`retain_graph=True`, two backwards": within(graph_retained),
    "gradient penalty": within(penalised),
    "GAN: two models, two optimizers": within(adversarial),
    "LBFGS with a closure": within(with_closures),
    "no optimizer, parameters changed by hand": within(by_hand),
    "an optimizer for each parameter, stepping in the backward": within(stepping_in_backward),
    "`torch.autograd.grad` instead of a backward": within(without_backward),
    "bfloat16 autocast": within(in_bfloat16),
    "float16 and `GradScaler`": within(scaled(FITTING)),
    "float16 and `GradScaler` that skips steps": within(scaled(TOO_LARGE)),
    "the same with a fused optimizer": within(scaled(TOO_LARGE, fused=True)),
    "`checkpoint(use_reentrant=False)`": within(checkpointed(use_reentrant=False)),
    "`checkpoint(use_reentrant=True)`": within(checkpointed(use_reentrant=True)),
    '`torch.compile`, "aot_eager"': within(compiled("aot_eager")),
    '`torch.compile`, "inductor"': within(compiled("inductor", dropout=False)),
    '`torch.compile`, "inductor", with dropout': within(compiled("inductor")),
    '`model.compile()`, "aot_eager"': within(compiled_in_place),
    "`AveragedModel` (EMA)": within(averaged),
    "`DataLoader` with two workers": within(by_workers),
}
