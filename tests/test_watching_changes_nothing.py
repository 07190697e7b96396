"""Law 1: parameters, optimizer state, random streams, gradients and losses are the same bits
with and without a watch, on measured steps too and after failures inside it."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, parametrizations
from torch.optim import SGD, Adam, AdamW
from torch.optim import optimizer as torch_optimizer
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import BackwardHook
from traces import Trace

from diagnoser.curvature import Hessian
from diagnoser.monitor import sample, training
from diagnoser.runlog import Recording, read_run
from diagnoser.session import Watch

ROOT = Path(__file__).parent.parent
STEPS = 7


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


Situation = Callable[[Trace], None]


def run(situation: Situation, out: Path | None = None, **options: Any) -> tuple[str, Recording]:
    """Runs a training from fixed seeds, watched where there is a place for the log."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global stream is what must not move
    random.seed(0)
    trace = Trace()
    if out is None:
        situation(trace)
        return trace.digest(), None  # type: ignore[return-value]
    with Watch(out, **options) as watch:
        situation(trace)
    return trace.digest(), watch.log


def quantities(recording: Recording) -> set[str]:
    table = recording.measurements
    return {table.quantities[code] for code in set(table.quantity.tolist())}


def events(recording: Recording, kind: str) -> list[str]:
    return [event.message for event in recording.events if event.kind == kind]


# -- models -----------------------------------------------------------------------------------


class HAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4, padding_idx=0)
        self.gru = nn.GRU(4, 3, batch_first=True, bidirectional=True)
        self.projection = nn.Linear(6, 4)
        self.context = nn.Linear(4, 1, bias=False)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        visible = tokens != 0
        packed = nn.utils.rnn.pack_padded_sequence(
            self.dropout(self.embedding(tokens)),
            visible.sum(1),
            batch_first=True,
            enforce_sorted=False,
        )
        states, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], True, total_length=6)
        scores = self.context(torch.tanh(self.projection(states))).squeeze(-1)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return self.head((weights.unsqueeze(1) @ self.dropout(states)).squeeze(1))


class Transformer(nn.Module):
    """Pre-norm, one block, fused attention."""

    def __init__(self, attention_dropout: float = 0.0, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.norm = nn.LayerNorm(8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)
        self.attention_dropout = attention_dropout

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.embedding(tokens)
        normed = self.norm(states)
        q, k, v = (
            f(normed).unflatten(-1, (2, 4)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        p = self.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        states = states + self.dropout(attended.transpose(1, 2).flatten(2))
        return self.head(states.mean(1))


def convolutions(*, spectral: bool = False) -> nn.Sequential:
    first = nn.Conv2d(1, 4, 3)
    return nn.Sequential(
        parametrizations.spectral_norm(first) if spectral else first,
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64, 3),
    )


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def tokens() -> tuple[Tensor, Tensor]:
    words = torch.randint(1, 9, (8, 6))
    words[0, 3:] = 0
    return words, torch.randint(3, (8,))


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 1, 6, 6), torch.randint(3, (8,))


def points() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 5), torch.randint(3, (8,))


def adamw(model: nn.Module) -> AdamW:
    return AdamW(model.parameters(), lr=0.01)


def momentum(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


def amsgrad(model: nn.Module) -> Adam:
    return Adam(model.parameters(), lr=0.01, amsgrad=True)


def plain(
    build: Callable[[], nn.Module],
    draw: Callable[[], tuple[Tensor, Tensor]],
    make: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None,
    prepare: Callable[[nn.Module, Trace], None] = lambda model, trace: None,
) -> Situation:
    """A usual loop: forward, zero_grad, backward, clip, step."""

    def situation(trace: Trace) -> None:
        model = build()
        optimizer = make(model)
        trace.built(model, optimizer)
        prepare(model, trace)
        for _ in range(STEPS):
            inputs, labels = draw()
            output = model(inputs) if forward is None else forward(model, inputs)
            loss = F.cross_entropy(output, labels)
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            trace.values.append(loss.item())

    return situation


# -- other loops ------------------------------------------------------------------------------


def accumulation(trace: Trace) -> None:
    model = Transformer()
    optimizer = adamw(model)
    trace.built(model, optimizer)
    for _ in range(STEPS):
        for _ in range(3):
            inputs, labels = tokens()
            loss = F.cross_entropy(model(inputs), labels) / 3
            loss.backward()
            trace.values.append(loss.item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def lbfgs(trace: Trace) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    trace.built(model, optimizer)
    for _ in range(STEPS):
        inputs, labels = points()

        def closure(inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            return loss

        trace.values.append(optimizer.step(closure).item())


def scaled(trace: Trace) -> None:
    model = perceptron()
    optimizer = momentum(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    trace.built(model, optimizer)
    for step in range(STEPS):
        inputs, labels = points()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        scaler.scale(loss * (torch.inf if step == 3 else 1.0)).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        trace.values += [loss.item(), scaler.get_scale()]


def by_hand(trace: Trace) -> None:
    model = convolutions()
    trace.built(model)
    for _ in range(STEPS):
        inputs, labels = images()
        model.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        for p in model.parameters():
            p.data.add_(p.grad, alpha=-0.1)
        trace.values.append(loss.item())


def loose_tensors(trace: Trace) -> None:
    weight = torch.randn(5, 3, requires_grad=True)
    bias = torch.zeros(3, requires_grad=True)
    optimizer = SGD([weight, bias], lr=0.1)
    trace.built(optimizer)
    trace.tensors += [weight, bias]
    for _ in range(STEPS):
        inputs, labels = points()
        loss = F.cross_entropy(inputs @ weight + bias, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trace.values.append(loss.item())


def adversarial(trace: Trace) -> None:
    generator = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.ReLU(True), nn.Linear(6, 5))
    critic = nn.Sequential(nn.Linear(5, 6), nn.LeakyReLU(0.2, True), nn.Linear(6, 1))
    for_generator, for_critic = Adam(generator.parameters(), 0.01), Adam(critic.parameters(), 0.01)
    trace.built(generator, critic, for_generator, for_critic)
    for _ in range(STEPS):
        real, fake = torch.randn(8, 5), generator(torch.randn(8, 2))
        for_critic.zero_grad()
        loss = F.softplus(critic(fake.detach())).mean() + F.softplus(-critic(real)).mean()
        loss.backward()
        for_critic.step()
        for_generator.zero_grad()
        other = F.softplus(-critic(fake)).mean()
        other.backward()
        for_generator.step()
        trace.values += [loss.item(), other.item()]


def gradient_penalty(trace: Trace) -> None:
    critic = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))
    optimizer = amsgrad(critic)
    trace.built(critic, optimizer)
    for _ in range(STEPS):
        inputs = torch.randn(8, 5, requires_grad=True)
        score = critic(inputs)
        (slope,) = torch.autograd.grad(score.sum(), inputs, create_graph=True)
        loss = score.mean() + (slope.norm(dim=1) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trace.values += [loss.item(), inputs.grad.clone()]


def twice_backward(trace: Trace) -> None:
    model = HAN()
    optimizer = adamw(model)
    trace.built(model, optimizer)
    for _ in range(STEPS):
        inputs, labels = tokens()
        output = model(inputs)
        first, second = F.cross_entropy(output, labels), output.square().mean()
        optimizer.zero_grad()
        first.backward(retain_graph=True)
        first.backward(retain_graph=True)
        torch.autograd.backward([first, second])
        optimizer.step()
        trace.values += [first.item(), second.item()]


def retained(trace: Trace) -> None:
    model = perceptron()
    optimizer = momentum(model)
    trace.built(model, optimizer)
    for _ in range(STEPS):
        inputs, labels = points()
        hidden = model[0](inputs)
        hidden.retain_grad()
        loss = F.cross_entropy(model[1:](hidden), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trace.values += [loss.item(), hidden.grad.clone()]


def averaged(trace: Trace) -> None:
    model = convolutions()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = momentum(model)
    trace.built(model, average, optimizer)
    for _ in range(STEPS):
        inputs, labels = images()
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(average.parameters(), model.parameters(), strict=True):
                old.lerp_(new, 0.1)
        model.eval()
        trace.values += [loss.item(), F.cross_entropy(model(inputs), labels).item()]
        model.train()


def sparse(trace: Trace) -> None:
    table, head = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3)
    optimizers = [torch.optim.SparseAdam(table.parameters()), SGD(head.parameters(), lr=0.1)]
    trace.built(table, head, *optimizers)
    for _ in range(STEPS):
        inputs, labels = tokens()
        loss = F.cross_entropy(head(table(inputs).mean(1)), labels)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        trace.values.append(loss.item())


def lazy(trace: Trace) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that lazy modules are new
        model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(3))
    model(points()[0])
    plain(lambda: model, points)(trace)


def sharing_a_generator(trace: Trace) -> None:
    """numpy and random drive the data; their streams must go on where they were."""
    model = perceptron()
    optimizer = adamw(model)
    trace.built(model, optimizer)
    for _ in range(STEPS):
        inputs = torch.tensor(np.random.randn(8, 5) * random.random()).float()  # noqa: NPY002
        loss = F.cross_entropy(model(inputs), torch.tensor([random.randrange(3) for _ in range(8)]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trace.values.append(loss.item())


def counting_hooks(model: nn.Module, trace: Trace) -> None:
    """Hooks of every sort that count, draw random numbers and change gradients."""

    def noisy(gradient: Tensor) -> Tensor:
        trace.values.append("parameter")
        return 2 * gradient + 0.01 * torch.rand_like(gradient)

    def activation(gradient: Tensor) -> Tensor:
        trace.values.append("activation")
        return gradient * (1 + 0.1 * torch.rand(()))

    def note(*_: object) -> None:
        trace.values.append(random.random())

    def watch_output(module: nn.Module, inputs: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(activation)

    for parameter in model.parameters():
        parameter.register_hook(noisy)
        parameter.register_post_accumulate_grad_hook(note)
    model[0].register_forward_hook(watch_output)
    model[3].register_full_backward_hook(note)
    model[3].register_full_backward_pre_hook(note)


def through_checkpoint(**options: Any) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(model: nn.Module, inputs: Tensor) -> Tensor:
        reentrant = options["use_reentrant"]
        hidden = checkpoint(model[:-1], inputs.requires_grad_(reentrant), **options)
        return model[-1](hidden)

    return forward


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embedding(words).mean(1))


class CountingNorm(nn.Module):
    """Replaces a buffer and counts its calls: recomputation must not be seen in either."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return (x - self.mean) / self.calls**0.5


def counted() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), CountingNorm(), nn.Dropout(0.2), nn.Linear(6, 3))


class Keeping(nn.Module):
    """Its forward keeps what it computed, counts, draws, and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.2)
        self.head = nn.Linear(5, 3)
        self.kept: list[Tensor] = []
        self.count = 0
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, inputs: Tensor) -> Tensor:
        inputs.mul_(1.5)
        hidden = self.drop(self.norm(self.layer(inputs)))
        hidden = hidden + 0.1 * torch.randn(hidden.shape, generator=self.generator)
        self.kept.append(hidden)
        self.last, self.count = hidden, self.count + 1
        return self.head(hidden)


@torch.no_grad()
def evaluated(model: nn.Module) -> float:
    inputs, labels = points()
    return F.cross_entropy(model(inputs), labels).item()


def scripted(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.softmax(scores, dim=1), labels)


def keeping(trace: Trace) -> None:
    """Past a second check: state in the forward, evaluations, clipping, a schedule, a script."""
    model = Keeping()
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    trace.built(model, optimizer)
    for step in range(23):
        inputs, labels = points()
        loss = nn.CrossEntropyLoss()(model(inputs), labels)
        if step == 4:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss = loss + torch.jit.script(scripted)(model(inputs.clone()), labels)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        trace.values += [loss.item(), norm.item(), model.count, len(model.kept)]
        trace.values += [model.last.sum().item(), inputs.sum().item()]
        trace.values.append(model.generator.get_state().sum().item())
        if step % 5 == 0:
            trace.values.append(evaluated(model))
            with torch.inference_mode():
                trace.values.append(model(points()[0]).sum().item())


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.Embedding(9, 8), layer, nn.Flatten(), nn.Linear(48, 3))


SITUATIONS: dict[str, Situation] = {
    "han_adamw": plain(HAN, tokens),
    "han_sgd": plain(HAN, tokens, momentum),
    "fused_attention": plain(Transformer, tokens),
    "fused_attention_sgd": plain(Transformer, tokens, momentum),
    "fused_attention_dropout": plain(lambda: Transformer(attention_dropout=0.1), tokens),
    "encoder_layer": plain(encoder, tokens),
    "batch_norm": plain(convolutions, images),
    "adam_amsgrad": plain(perceptron, points, amsgrad),
    "spectral_norm": plain(lambda: convolutions(spectral=True), images, momentum),
    "tied_weights": plain(Tied, tokens),
    "hooks": plain(perceptron, points, prepare=counting_hooks),
    "checkpoint": plain(convolutions, images, forward=through_checkpoint(use_reentrant=False)),
    "checkpoint_counting": plain(counted, points, forward=through_checkpoint(use_reentrant=False)),
    "checkpoint_random": plain(
        convolutions,
        images,
        forward=through_checkpoint(use_reentrant=False, preserve_rng_state=False),
    ),
    "checkpoint_reentrant": plain(
        convolutions, images, forward=through_checkpoint(use_reentrant=True)
    ),
    "accumulation": accumulation,
    "lbfgs": lbfgs,
    "scaled_bfloat16": scaled,
    "no_optimizer": by_hand,
    "loose_tensors": loose_tensors,
    "adversarial": adversarial,
    "gradient_penalty": gradient_penalty,
    "several_backwards": twice_backward,
    "retained_gradients": retained,
    "averaged_copy": averaged,
    "sparse_embedding": sparse,
    "lazy_modules": lazy,
    "numpy_and_random": sharing_a_generator,
    "keeping_state": keeping,
}
# What these situations hide from a second derivative is refused, not measured wrongly.
WITHOUT_CURVATURE = {"checkpoint_reentrant", "checkpoint_random"}


@pytest.mark.parametrize("every", [2, None])
@pytest.mark.parametrize("name", SITUATIONS)
def test_same_bits_with_and_without(name: str, every: int | None, tmp_path: Path) -> None:
    situation = SITUATIONS[name]
    expected, _ = run(situation)
    watched, recording = run(situation, tmp_path / "run", every=every)
    assert watched == expected
    assert not events(recording, "monitor_error")
    seen = quantities(recording)
    assert {"gradient_norm", "weight_norm", "update_norm"} <= seen
    assert ("update_curvature" in seen) == (name not in WITHOUT_CURVATURE)
    if every and name not in WITHOUT_CURVATURE:
        assert {"trace", "lambda_max", "gradient_curvature"} <= seen


def test_the_digest_notices_a_single_random_number(tmp_path: Path) -> None:
    expected, _ = run(SITUATIONS["batch_norm"])

    def disturbed(trace: Trace) -> None:
        SITUATIONS["batch_norm"](trace)
        random.random()

    assert run(SITUATIONS["batch_norm"])[0] == expected
    assert run(disturbed)[0] != expected


# -- failures ---------------------------------------------------------------------------------


def failing(original: Callable[..., Any], chance: random.Random, kind: type[Exception]) -> Any:
    def function(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if chance.random() < 0.4:
            raise kind("injected")
        return result

    return function


def failing_product(kind: type[BaseException]) -> Callable[..., Any]:
    def product(*_: Any) -> Any:
        torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
        raise kind("injected")

    return product


BREAKABLE = (
    (training, "read_graph"),
    (training, "coming_update"),
    (training, "step_rules"),
    (training, "find_models"),
    (training, "user_line"),
    (training, "examine_often"),
    (sample, "norms"),
    (sample, "inner_products"),
    (sample, "row_curvature"),
    (sample, "block_trace"),
    (sample, "extreme_eigenvalues"),
    (sample, "coupling_matrix"),
)


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError])
@pytest.mark.parametrize(("module", "name"), BREAKABLE)
def test_same_bits_when_the_monitor_fails(
    module: Any, name: str, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = run(SITUATIONS["fused_attention"])
    broken = failing(getattr(module, name), random.Random(1), kind)
    monkeypatch.setattr(module, name, broken)
    watched, recording = run(SITUATIONS["fused_attention"], tmp_path / "run", every=2)
    assert watched == expected
    told = events(recording, "monitor_error")
    if kind is MemoryError:  # in curvature, for which there is a remedy
        told += [m for m in events(recording, "unmeasurable") if "curvature: out of memory" in m]
    assert any("injected" in message or "out of memory" in message for message in told)


def test_same_bits_when_a_check_fails_half_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
        raise RuntimeError("injected")

    expected, _ = run(SITUATIONS["keeping_state"])
    monkeypatch.setattr(training, "examine", broken)
    watched, recording = run(SITUATIONS["keeping_state"], tmp_path / "run", every=2)
    assert watched == expected
    assert len(events(recording, "monitor_error")) == 2


@pytest.mark.parametrize("name", ["fused_attention", "checkpoint", "hooks", "retained_gradients"])
def test_same_bits_when_a_product_fails_half_way(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = run(SITUATIONS[name])
    monkeypatch.setattr(Hessian, "product", failing_product(MemoryError))
    watched, recording = run(SITUATIONS[name], tmp_path / "run", every=2)
    assert watched == expected
    assert any("out of memory" in message for message in events(recording, "unmeasurable"))
    assert "gradient_norm" in quantities(recording)


def test_a_keyboard_interrupt_inside_a_measurement_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = convolutions()
    monkeypatch.setattr(Hessian, "product", failing_product(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), Watch(tmp_path / "run", every=2):
        inputs, labels = images()
        loss = F.cross_entropy(checkpoint(model, inputs, use_reentrant=False), labels)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        random_state = torch.get_rng_state()
        optimizer = SGD(model.parameters(), lr=0.1)
        loss.backward()
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# -- taking everything back -------------------------------------------------------------------

PATCHED = (
    (torch.autograd, "backward"),
    (nn.Module, "__init__"),
    (nn.Module, "__setstate__"),
    (torch.optim.Optimizer, "__init__"),
    (Tensor, "retain_grad"),
    (Tensor, "register_hook"),
    (BackwardHook, "__init__"),
    (torch.amp.grad_scaler.GradScaler, "scale"),
    (nn.Module, "__call__"),
    (nn.Module, "compile"),
    (F, "cross_entropy"),
    (torch.no_grad, "__enter__"),
    (nn.utils, "clip_grad_norm_"),
    (torch.optim.lr_scheduler.LRScheduler, "step"),
    (torch, "compile"),
)


def patched() -> list[Any]:
    hooks = dict(torch_optimizer._global_optimizer_post_hooks)
    return [*(vars(owner).get(name) for owner, name in PATCHED), hooks]


def interrupted(trace: Trace) -> None:
    SITUATIONS["hooks"](trace)
    raise ZeroDivisionError


@pytest.mark.parametrize("name", ["fused_attention", "hooks", "scaled_bfloat16"])
def test_every_patch_is_taken_back(name: str, tmp_path: Path) -> None:
    original = patched()
    with Watch(tmp_path / "run", every=2):
        assert all(now is not old for now, old in zip(patched(), original, strict=True))
        SITUATIONS[name](Trace())
    assert patched() == original


def test_every_patch_is_taken_back_when_the_loop_fails(tmp_path: Path) -> None:
    original = patched()
    with pytest.raises(ZeroDivisionError):
        run(interrupted, tmp_path / "run", every=2)
    assert patched() == original


def test_switched_off_nothing_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIAGNOSER_OFF", "1")
    original, out = patched(), tmp_path / "run"
    with Watch(out, every=2) as watch:
        assert patched() == original
        SITUATIONS["han_adamw"](Trace())
    assert watch.directory is None
    assert not out.exists()


# -- what counts as a step --------------------------------------------------------------------


def losses_of(recording: Recording) -> int:
    return len(recording.losses.step)


def test_one_training_after_another_keeps_counting(tmp_path: Path) -> None:
    def folds(trace: Trace) -> None:
        for _ in range(3):
            SITUATIONS["adam_amsgrad"](trace)

    _, recording = run(folds, tmp_path / "run", every=2)
    assert losses_of(recording) == 3 * STEPS


def test_an_optimizer_that_comes_back_keeps_counting(tmp_path: Path) -> None:
    def phases(trace: Trace) -> None:
        model = perceptron()
        first, second = momentum(model), adamw(model)
        trace.built(model, first, second)
        for optimizer in (first, second, first):
            for _ in range(STEPS):
                inputs, labels = points()
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), labels).backward()
                optimizer.step()

    _, recording = run(phases, tmp_path / "run", every=2)
    assert 3 * STEPS - 1 <= losses_of(recording) <= 3 * STEPS  # one may be lost at the return


def test_accumulated_backwards_are_one_step(tmp_path: Path) -> None:
    _, recording = run(accumulation, tmp_path / "run", every=2)
    assert losses_of(recording) == STEPS


def test_a_loss_inside_a_checkpoint_is_not_computed_again_on_unmeasured_steps(
    tmp_path: Path,
) -> None:
    calls: list[int] = []

    def situation(trace: Trace) -> None:
        model = convolutions()
        optimizer = adamw(model)
        trace.built(model, optimizer)

        def loss_of(inputs: Tensor, labels: Tensor) -> Tensor:
            calls.append(len(trace.values))
            return F.cross_entropy(model(inputs), labels)

        for _ in range(STEPS):
            loss = checkpoint(loss_of, *images(), use_reentrant=False)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            trace.values.append(loss.item())

    expected, _ = run(situation)
    calls.clear()
    watched, _ = run(situation, tmp_path / "run", every=4)
    assert watched == expected
    assert calls.count(0) > 2  # measured
    assert calls.count(2) == calls.count(3) == 2  # the forward, and again in the backward


# -- across processes -------------------------------------------------------------------------

TRAINS_AND_SAVES = """
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
for p in model.parameters():
    p.register_hook(lambda g: g)
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(8):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(torch.randn(6, 3)), torch.arange(6) % 2).backward()
    optimizer.step()
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "states.pt")
torch.save(torch.nn.Sequential(model[0], model[1]), "whole.pt")
"""
LOADS_WITHOUT_US = """
import sys
sys.modules["diagnoser"] = None
import torch
states = torch.load("states.pt", weights_only=True)
print(sum(float(v.double().sum()) for v in states["model"].values()), states["optimizer"])
print(torch.load("whole.pt", weights_only=False))
"""


def python(*arguments: str, where: Path) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=where, env=environment, capture_output=True, check=False
    )


def test_a_checkpoint_saved_under_watch_loads_without_the_tool(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAINS_AND_SAVES)
    (tmp_path / "load.py").write_text(LOADS_WITHOUT_US)
    assert python("train.py", where=tmp_path).returncode == 0
    expected = python("load.py", where=tmp_path)
    (tmp_path / "states.pt").unlink()
    (tmp_path / "whole.pt").unlink()
    command = ("-m", "diagnoser.cli", "run", "--out", "run", "--every", "2", "train.py")
    assert python(*command, where=tmp_path).returncode == 0
    assert expected.returncode == 0
    assert python("load.py", where=tmp_path).stdout == expected.stdout


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [("--every", "3"), ()])
def test_a_script_prints_the_same_bytes(schedule: tuple[str, ...], tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "subjects" / "transformer.py")
    arguments = (script, "--epochs", "1", "--steps", "30")
    plain_run = python(*arguments, where=tmp_path)
    watched = python(
        "-m", "diagnoser.cli", "run", "--out", "run", *schedule, *arguments, where=tmp_path
    )
    assert plain_run.returncode == watched.returncode == 0
    assert plain_run.stdout == watched.stdout
    assert b"accuracy" in watched.stdout
    assert "update_curvature" in quantities(read_run(tmp_path / "run"))
