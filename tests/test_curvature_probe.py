from __future__ import annotations

import random
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from curvature_subjects import (
    TinyHAN,
    TinyTransformer,
    batch,
    build,
    dense,
    flat,
    random_vector,
    transformer_components,
)
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from diagnoser.curvature import Hessian, block_eigenvalues, row_curvature
from diagnoser.curvature import probe as probing
from diagnoser.curvature.finite_difference import CentralDifference
from diagnoser.curvature.memory import free_memory
from diagnoser.curvature.probe import ProbeSet, samples_of, split
from diagnoser.curvature.streamed import StreamedHessian
from diagnoser.errors import MeasurementError

PLENTY = 1 << 40


def cross_entropy(model, batch):
    tokens, labels = batch
    return F.cross_entropy(model(tokens), labels)


@pytest.fixture
def subject():
    model = build(TinyTransformer, need_weights=True)
    parameters = dict(model.named_parameters())
    data = batch(size=10)
    H = dense(cross_entropy(model, data), parameters)
    return model, parameters, data, H


def product(v):
    return lambda operator: flat(operator.product(v))


# --- chunks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 10, 99])
def test_uneven_chunks_make_up_the_whole(subject, chunk_size, streamed):
    model, parameters, data, H = subject
    v = random_vector(parameters, 1)
    probe = ProbeSet(cross_entropy, model, [data], chunk_size=chunk_size, streamed=streamed)
    torch.testing.assert_close(probe.measure(product(v)), H @ flat(v))
    found = probe.measure(
        lambda operator: torch.stack([flat(c.product(v)) for c in operator.chunks]).mean(0)
    )
    torch.testing.assert_close(found, H @ flat(v))
    gradient = torch.autograd.grad(cross_entropy(model, data), list(parameters.values()))
    torch.testing.assert_close(
        probe.measure(lambda operator: flat(operator.gradient)),
        flat(dict(zip(parameters, gradient, strict=True))),
    )
    assert probe.measure(lambda operator: operator.method) == "exact"
    assert probe.notes == []


def test_batches_of_different_size_count_by_their_samples(subject):
    model, parameters, data, H = subject
    tokens, labels = data
    batches = [(tokens[:7], labels[:7]), (tokens[7:], labels[7:])]
    v = random_vector(parameters, 2)
    for chunk_size in (None, 3):
        probe = ProbeSet(cross_entropy, model, batches, chunk_size=chunk_size)
        torch.testing.assert_close(probe.measure(product(v)), H @ flat(v))


def test_estimators_run_streamed(subject):
    model, parameters, data, _ = subject
    components = transformer_components()
    direction = random_vector(parameters, 3)

    def work(operator):
        rows = row_curvature(operator, direction, components)
        ends = block_eigenvalues(operator, components[6].parts, generator=torch.Generator())
        return [e.value for e in (*rows.components.values(), ends.lambda_min, ends.lambda_max)]

    streamed = ProbeSet(cross_entropy, model, [data], chunk_size=4, streamed=True)
    kept = ProbeSet(cross_entropy, model, [data], chunk_size=4)
    assert streamed.measure(work) == pytest.approx(kept.measure(work), rel=1e-9, abs=1e-12)


def test_one_graph_exists_at_a_time_and_a_chunk_in_a_row_shares_it(subject):
    model, parameters, data, _ = subject
    built, holder = [], []

    def loss(piece):
        assert not holder or holder[0]._slot.hessian is None  # the last one is gone
        built.append(piece)
        return cross_entropy(model, piece)

    losses = [lambda piece=piece: loss(piece) for piece in split(data, 3)]
    operator = StreamedHessian(losses, parameters)
    holder.append(operator)
    v = random_vector(parameters, 4)
    built.clear()
    for chunk in operator.chunks:
        for _ in range(5):
            chunk.product(v)
    assert len(built) <= 3
    operator.product(v)
    operator.product(v)
    assert 6 <= len(built) <= 9
    operator.release()
    with pytest.raises(MeasurementError, match="released"):
        operator.product(v)
    with pytest.raises(MeasurementError, match="at least one"):
        StreamedHessian([], parameters)


def test_a_token_mean_is_right_with_its_terms_and_noted_without(subject):
    model, parameters, data, _ = subject
    tokens, labels = data
    labels = labels.clone()
    labels[1:5] = -100  # most of the first chunk is not counted
    data = (tokens, labels)
    H = dense(cross_entropy(model, data), parameters)
    v = random_vector(parameters, 5)
    right = ProbeSet(
        cross_entropy,
        model,
        [data],
        chunk_size=5,
        terms=lambda piece: float((piece[1] != -100).sum()),
    )
    torch.testing.assert_close(right.measure(product(v)), H @ flat(v))
    assert right.notes == []
    wrong = ProbeSet(cross_entropy, model, [data], chunk_size=5)
    assert not torch.allclose(wrong.measure(product(v)), H @ flat(v), rtol=0.01)
    assert len(wrong.notes) == 1
    assert "a mean over something else (see `terms`)" in wrong.notes[0]


def test_a_chunk_without_terms_is_left_out(subject):
    model, parameters, data, _ = subject
    tokens, labels = data
    labels = labels.clone()
    labels[:5] = -100
    H = dense(cross_entropy(model, (tokens, labels)), parameters)
    v = random_vector(parameters, 6)
    count = lambda piece: float((piece[1] != -100).sum())  # noqa: E731
    probe = ProbeSet(cross_entropy, model, [(tokens, labels)], chunk_size=5, terms=count)
    torch.testing.assert_close(probe.measure(product(v)), H @ flat(v))
    none = ProbeSet(cross_entropy, model, [data], terms=lambda piece: 0.0)
    with pytest.raises(MeasurementError, match="no terms"):
        none.measure(product(v))


def test_coupled_samples_are_noted(subject):
    model, parameters, data, _ = subject

    def contrastive(model, batch):
        scores = model(batch[0])
        return F.cross_entropy(scores @ scores.T, torch.arange(len(scores)))

    probe = ProbeSet(contrastive, model, [data], chunk_size=5)
    probe.measure(product(random_vector(parameters, 7)))
    assert "the samples are coupled" in probe.notes[0]


# --- batches -------------------------------------------------------------------------------------


def test_every_kind_of_batch_is_split():
    x = torch.arange(5)
    Pair = namedtuple("Pair", "a b")
    assert [t.tolist() for t in split(x, 2)] == [[0, 1, 2], [3, 4]]
    first, second = split({"x": x, "more": [x, (x, "name")], "scale": torch.tensor(2.0)}, 2)
    assert first["more"][1][0].tolist() == [0, 1, 2]
    assert second["more"][0].tolist() == [3, 4]
    assert second["more"][1][1] == "name"
    assert second["scale"].item() == 2.0
    assert split(Pair(x, x + 1), 5)[4].b.tolist() == [5]
    sizes = [samples_of(piece) for piece in split(torch.zeros(11), 4)]
    assert sorted(sizes) == [2, 3, 3, 3]


@pytest.mark.parametrize(
    "bad", [torch.zeros(0, 3), (torch.zeros(3), torch.zeros(4)), {}, [torch.tensor(1.0)], "text"]
)
def test_what_is_no_batch_is_refused(bad):
    with pytest.raises(MeasurementError, match="the same number of samples"):
        samples_of(bad)


def test_no_batch_and_one_sample(subject):
    model, parameters, data, _ = subject
    with pytest.raises(MeasurementError, match="without batches"):
        ProbeSet(cross_entropy, model, [])
    one = (data[0][:1], data[1][:1])
    v = random_vector(parameters, 8)
    H = dense(cross_entropy(model, one), parameters)
    found = ProbeSet(cross_entropy, model, [one]).measure(product(v))
    torch.testing.assert_close(found, H @ flat(v))


# --- memory --------------------------------------------------------------------------------------


class Exhausting(torch.autograd.Function):
    """The identity, until the error that is kept here is raised in the backward's backward."""

    error = None

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        if Exhausting.error is not None and not torch.is_grad_enabled():
            raise Exhausting.error
        return g.clone()


CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), CPU]
)
@pytest.mark.parametrize("where", ["forward", "product"])
def test_chunks_are_halved_until_they_fit_and_the_result_is_the_same(
    subject, error, where, monkeypatch
):
    model, parameters, data, H = subject
    monkeypatch.setattr(Exhausting, "error", None)

    def hungry(model, batch):
        too_large = len(batch[0]) > 2 and torch.is_grad_enabled()
        if too_large and where == "forward":
            raise error
        Exhausting.error = error if too_large else None
        return F.cross_entropy(Exhausting.apply(model(batch[0])), batch[1])

    told = []
    v = random_vector(parameters, 9)
    monkeypatch.setattr(probing, "free_memory", lambda device: None)
    monkeypatch.setattr(probing, "unverified_nodes", lambda loss: [])
    probe = ProbeSet(hungry, model, [data], on_note=told.append)
    torch.testing.assert_close(probe.measure(product(v)), H @ flat(v))
    assert told == probe.notes
    assert told == [
        "out of memory with 10 samples: halved to 5",
        "out of memory with 5 samples: halved to 2",
    ]
    assert probe.chunk_size == 2
    torch.testing.assert_close(probe.measure(product(v)), H @ flat(v))  # and stays so
    assert len(told) == 2


def test_memory_running_out_in_the_estimator_first_gives_up_the_kept_graphs(subject):
    model, parameters, data, H = subject
    v = random_vector(parameters, 10)
    attempts = []

    def work(operator):
        attempts.append(type(operator))
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("in the middle")
        return flat(operator.product(v))

    probe = ProbeSet(cross_entropy, model, [data], chunk_size=5)
    torch.testing.assert_close(probe.measure(work), H @ flat(v))
    assert attempts == [Hessian, StreamedHessian]
    assert probe.notes == ["out of memory: one chunk of 5 samples at a time"]


def test_one_sample_that_does_not_fit_is_given_up_with_a_reason(subject):
    model, _, data, _ = subject

    def work(operator):
        raise torch.OutOfMemoryError("always")

    model.train()
    state = torch.get_rng_state()
    probe = ProbeSet(cross_entropy, model, [data])
    with pytest.raises(MeasurementError, match="out of memory with a single sample"):
        probe.measure(work)
    assert probe.notes[-1] == "out of memory with 2 samples: halved to 1"
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_other_errors_are_the_callers(subject):
    model, _, data, _ = subject

    def work(operator):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ProbeSet(cross_entropy, model, [data]).measure(work)


def test_little_free_memory_is_planned_for(subject, monkeypatch):
    model, parameters, data, H = subject
    v = random_vector(parameters, 11)
    one = (data[0][:1], data[1][:1])
    kept = probing.kept_bytes(lambda: cross_entropy(model, one), parameters)
    twice = probing.kept_bytes(lambda: cross_entropy(model, data), parameters)
    assert 5 * kept < twice < 15 * kept
    room = probing.GRAPH * kept / probing.SHARE_OF_FREE
    for free, chunk_size in ((3.5 * room, 3), (0.1 * room, 1)):
        monkeypatch.setattr(probing, "free_memory", lambda device, free=free: int(free))
        probe = ProbeSet(cross_entropy, model, [data])
        torch.testing.assert_close(probe.measure(product(v)), H @ flat(v))
        assert (probe.streamed, probe.chunk_size) == (True, chunk_size)
        assert f"at most {chunk_size} at a time" in probe.notes[0]
    monkeypatch.setattr(probing, "free_memory", lambda device: PLENTY)
    probe = ProbeSet(cross_entropy, model, [data])
    probe.measure(product(v))
    assert not probe.streamed


def test_free_memory_is_known_here_and_unknown_elsewhere():
    free = free_memory(torch.device("cpu"))
    if sys.platform == "linux":
        assert free is not None
        assert 0 < free < PLENTY
    assert free_memory(torch.device("meta")) is None


@pytest.mark.slow
def test_memory_that_really_runs_out_is_met_with_smaller_chunks():
    script = """
import resource, torch
from pathlib import Path
from torch import nn
from diagnoser.curvature import probe as probing
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 1024), *(nn.Tanh() for _ in range(8)), nn.Linear(1024, 1))
data = torch.randn(16384, 8)
loss_fn = lambda model, x: model(x).square().mean()
v = {n: torch.ones_like(p) for n, p in model.named_parameters()}
probing.free_memory = lambda device: None
probing.ProbeSet(loss_fn, model, [data[:8]]).measure(lambda operator: operator.product(v))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20),) * 2)
probe = probing.ProbeSet(loss_fn, model, [data])
norm = probe.measure(lambda operator: float(operator.product(v)["0.weight"].norm()))
assert norm > 0.0 and probe.notes and probe.chunk_size < 16384, (norm, probe.notes)
print(probe.notes)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "out of memory with 16384 samples: halved to 8192" in done.stdout


# --- methods -------------------------------------------------------------------------------------


class CubeOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class CubeOnContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.slope = 3 * x**2
        return x**3

    @staticmethod
    def backward(ctx, g):
        return ctx.slope * g


class CubeWithoutSecond(CubeOnContext):
    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            raise RuntimeError("derivative of cube_backward is not implemented")
        return ctx.slope * g


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (CubeOnce, "CubeOnce has no trustworthy second derivative"),
        (CubeOnContext, "CubeOnContext: its second derivative is wrong"),
        (CubeWithoutSecond, "no second derivative here: derivative of cube_backward is not"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_central_differences_step_in_where_products_fail_or_would_be_wrong(
    function, said, streamed
):
    class Cubic(nn.Linear):
        cube = function.apply

        def forward(self, x):
            return type(self).cube(super().forward(x))

    torch.manual_seed(0)
    model = Cubic(3, 2).double()
    parameters = dict(model.named_parameters())
    x = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).view(4, 3)

    def loss(model, x):
        return model(x).square().mean()

    v = random_vector(parameters, 12)
    H = dense((x @ model.weight.T + model.bias).pow(6).mean(), parameters)
    probe = ProbeSet(loss, model, [x], chunk_size=2, streamed=streamed)
    method, found = probe.measure(lambda operator: (operator.method, flat(operator.product(v))))
    assert method == "central difference"
    torch.testing.assert_close(found, H @ flat(v), rtol=1e-5, atol=1e-7)
    assert probe.notes[0].startswith("central differences instead of exact products: ")
    assert said in probe.notes[0]
    assert probe.measure(type) is CentralDifference  # not tried again


def test_a_right_custom_function_keeps_the_exact_method():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return 2 * x * g

    model = nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    probe = ProbeSet(lambda model, x: Square.apply(model(x)).mean(), model, [x])
    assert probe.measure(lambda operator: operator.method) == "exact"


@pytest.mark.parametrize("reentrant", [False, True])
def test_both_kinds_of_checkpoints_are_measured_exactly(subject, reentrant):
    model, parameters, data, H = subject

    def loss(model, batch):
        tokens, labels = batch
        x = model.embedding(tokens)
        attended = checkpoint(lambda x: model.attention(x, x, x)[0], x, use_reentrant=reentrant)
        x = checkpoint(model.norm, x + attended, use_reentrant=reentrant)
        x = model.head((x + F.gelu(model.feed_forward(x))).mean(1))
        return F.cross_entropy(x, labels)

    v = random_vector(parameters, 13)
    probe = ProbeSet(loss, model, [data], chunk_size=4)
    torch.testing.assert_close(probe.measure(product(v)), H @ flat(v))
    assert probe.measure(lambda operator: operator.method) == "exact"
    loss(model, data).backward()  # the user's own checkpoints are what they were
    with pytest.raises(RuntimeError) if reentrant else torch.enable_grad():
        torch.autograd.grad(loss(model, data), list(parameters.values()))


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models_are_measured_uncompiled(subject, in_place):
    model, parameters, data, H = subject
    if in_place:
        model.compile(backend="aot_eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="aot_eager")
    v = random_vector(parameters, 14)
    probe = ProbeSet(cross_entropy, compiled, [data], parameters=parameters, chunk_size=4)
    method, found = probe.measure(lambda operator: (operator.method, flat(operator.product(v))))
    torch.testing.assert_close(found, H @ flat(v))
    assert method == "eager replay"


# --- leaving no trace ----------------------------------------------------------------------------


def test_modes_buffers_random_streams_and_gradients_are_left_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    model[1].eval()
    model.register_buffer("calls", torch.zeros(()))
    x, y = torch.randn(8, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    live = F.cross_entropy(model(x), y)

    def noisy(model, batch):
        noise = torch.randn(batch[0].shape) * random.random() * np.random.rand()
        model.calls += 1.0
        return F.cross_entropy(model(batch[0] + noise), batch[1])

    def state():
        return (
            [m.training for m in model.modules()],
            [b.tolist() for b in model.buffers()],
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
            [p.grad for p in model.parameters()],
        )

    before = state()
    v = random_vector(dict(model.named_parameters()), 15)
    probe = ProbeSet(noisy, model, [(x, y)], chunk_size=4)
    seen = []
    probe.measure(lambda operator: seen.append(model.training) or operator.product(v))
    assert seen == [False]
    assert state() == before
    with pytest.raises(ZeroDivisionError):
        probe.measure(lambda operator: operator.product(v) and 1 / 0)
    assert state() == before
    live.backward()


def test_every_evaluation_draws_the_same_random_numbers():
    model = build(TinyHAN, packed=False)

    def noisy(model, batch):
        return F.cross_entropy(F.dropout(model(batch[0]), 0.5), batch[1])

    parameters = dict(model.named_parameters())
    v = random_vector(parameters, 16)
    kept, streamed = (
        ProbeSet(noisy, model, [batch()], chunk_size=2, streamed=streamed)
        for streamed in (False, True)
    )
    found = kept.measure(product(v))
    torch.testing.assert_close(kept.measure(product(v)), found)
    torch.testing.assert_close(streamed.measure(product(v)), found)
