from __future__ import annotations

import copy
import random
import shutil
import weakref

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from curvature_subjects import TinyTransformer, batch, build, dense, flat, loss_of, random_vector
from torch import nn

from diagnoser.curvature import Hessian, block_eigenvalues
from diagnoser.curvature.hessian import NoSecondDerivativeError
from diagnoser.curvature.replay import CompiledCalls, ReplayHessian, compiled_modules
from diagnoser.errors import MeasurementError
from diagnoser.types import Part

pytestmark = [  # what compiling itself warns of
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module, backend="aot_eager"):
    return torch.compile(module, backend=backend)


class Mixed(nn.Module):
    """Layers before, inside and after a compiled part, which is called twice; one is shared."""

    def __init__(self, wrap):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.body = nn.Sequential(
            nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.3), nn.LayerNorm(4), nn.Linear(4, 4)
        )
        self.head = nn.Linear(4, 3)
        object.__setattr__(self, "run", wrap(self.body))  # no second name for the parameters

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.run(x)  # a path beside the compiled part, from the same parameters
        x = self.run(x) + F.linear(x, self.body[0].weight)
        return self.head(x.mean(1))


class WithLoss(nn.Module):
    """Gives its scores and its loss, as language models do."""

    def __init__(self):
        super().__init__()
        self.model = build(TinyTransformer, need_weights=True)

    def forward(self, tokens, labels=None):
        scores = self.model(tokens)
        return {"scores": scores, "loss": F.cross_entropy(scores, labels)}


def noted(model, run, *modules):
    """Returns the loss that ``run`` gives and the Hessian of it by replay."""
    with CompiledCalls(modules or model.modules()) as calls:
        loss = run()
    return loss, ReplayHessian(loss, dict(model.named_parameters()), calls.calls)


def mixed_loss(model):
    tokens, labels = batch()
    torch.manual_seed(5)  # of dropout
    return F.cross_entropy(model(tokens), labels)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_parameters_before_inside_after_and_shared_have_their_exact_rows(dtype, bound):
    plain = build(Mixed, torch.float64, wrap=lambda module: module)
    H = dense(mixed_loss(plain), dict(plain.named_parameters()))
    model = build(Mixed, dtype, wrap=compiled)
    loss, hessian = noted(model, lambda: mixed_loss(model), model.run)
    parameters = hessian.parameters
    assert list(parameters) == list(dict(plain.named_parameters()))
    v = random_vector(parameters, 1)
    expected = H @ flat(v).double()
    for _ in range(2):  # the replay's graph stays
        assert (flat(hessian.product(v)).double() - expected).norm() < bound * expected.norm()
    at = 0
    for name, p in parameters.items():
        index = torch.arange(at, at + p.numel())
        at += p.numel()
        block = (Part(name),)
        vb = v[name].reshape(-1)
        column = flat(hessian.column(block, v)).double()
        assert (column - H[:, index] @ vb.double()).norm() < bound * expected.norm()
        found = hessian.block_product(block, vb).double()
        assert (found - H[index][:, index] @ vb.double()).norm() < bound * expected.norm()
    gradient = torch.autograd.grad(mixed_loss(plain), list(plain.parameters()))
    torch.testing.assert_close(
        flat(hessian.gradient).double(),
        flat(dict(zip(parameters, gradient, strict=True))),
        rtol=1e-4,
        atol=1e-5,
    )
    assert hessian.method == "eager replay"
    assert hessian.dtype == str(dtype).removeprefix("torch.")
    loss.backward()


@pytest.mark.parametrize("need_weights", [False, True], ids=["fused", "plain"])
def test_a_whole_model_compiled_with_the_loss_outside(need_weights):
    plain = build(TinyTransformer, need_weights=True)
    H = dense(loss_of(plain), dict(plain.named_parameters()))
    model = compiled(build(TinyTransformer, need_weights=need_weights))
    loss, hessian = noted(model, lambda: 8.0 * loss_of(model))
    v = random_vector(hessian.parameters, 2)
    torch.testing.assert_close(flat(hessian.product(v)), 8.0 * (H @ flat(v)))
    ends = block_eigenvalues(hessian, (Part("_orig_mod.head.weight"),), generator=torch.Generator())
    exact = block_eigenvalues(
        Hessian(loss_of(plain), dict(plain.named_parameters())),
        (Part("head.weight"),),
        generator=torch.Generator(),
    )
    assert ends.lambda_max.value == pytest.approx(8.0 * exact.lambda_max.value)


def test_the_loss_inside_the_compiled_model():
    model = WithLoss().double()
    tokens, labels = batch()
    H = dense(model(tokens, labels)["loss"], dict(model.named_parameters()))
    wrapped = compiled(model)
    _, hessian = noted(wrapped, lambda: wrapped(tokens, labels=labels)["loss"])
    v = random_vector(hessian.parameters, 3)
    torch.testing.assert_close(flat(hessian.product(v)), H @ flat(v))


def test_several_losses_and_a_scale():
    plain = build(TinyTransformer, need_weights=True)
    parameters = dict(plain.named_parameters())
    H = dense(loss_of(plain, 0) + loss_of(plain, 1), parameters) / 2
    model = compiled(build(TinyTransformer, need_weights=True))
    with CompiledCalls([model]) as calls:
        losses = [64.0 * loss_of(model, seed) for seed in (0, 1)]
    hessian = ReplayHessian(losses, dict(model.named_parameters()), calls.calls, scale=64.0)
    v = random_vector(hessian.parameters, 4)
    torch.testing.assert_close(flat(hessian.product(v)), H @ flat(v))
    chunks = torch.stack([flat(chunk.product(v)) for chunk in hessian.chunks])
    torch.testing.assert_close(chunks.mean(0), H @ flat(v))
    hessian.release()
    with pytest.raises(MeasurementError, match="released"):
        hessian.product(v)


def test_autocast_is_replayed():
    plain = build(TinyTransformer, torch.float32, need_weights=True)

    def run(model):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model)

    exact = Hessian(run(plain), dict(plain.named_parameters()))
    model = compiled(build(TinyTransformer, torch.float32, need_weights=True))
    _, hessian = noted(model, lambda: run(model))
    v = random_vector(hessian.parameters, 5)
    expected = flat(exact.product(dict(zip(exact.parameters, v.values(), strict=True))))
    assert (flat(hessian.product(v)) - expected).norm() < 0.03 * expected.norm()
    assert hessian.dtype == "bfloat16"


def test_no_compiled_call_is_an_ordinary_hessian():
    model = build(TinyTransformer, need_weights=True)
    parameters = dict(model.named_parameters())
    with CompiledCalls(model.modules()) as calls:
        loss = loss_of(model)
    v = random_vector(parameters, 6)
    found = ReplayHessian(loss, parameters, calls.calls).product(v)
    torch.testing.assert_close(flat(found), flat(Hessian(loss_of(model), parameters).product(v)))


# --- law 1 ---------------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)
        )

    def forward(self, x):
        return self.body(x)


def training(backend, measure, dropout, in_place):
    """Trains for some steps; returns all that measuring could have changed."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = Normed(dropout)
    if in_place:
        model.compile(backend=backend)
    wrapped = model if in_place else torch.compile(model, backend=backend)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for step in range(6):
        x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
        optimizer.zero_grad()
        if measure and step % 2:
            plain, state = copy.deepcopy(model), torch.get_rng_state()
            call = wrapped._compiled_call_impl
            with CompiledCalls(wrapped.modules()) as calls:
                loss = F.cross_entropy(wrapped(x), y)
            after = torch.get_rng_state()
            with ReplayHessian(loss, dict(model.named_parameters()), calls.calls) as hessian:
                v = random_vector(hessian.parameters, step)
                product = flat(hessian.product(v))
            assert wrapped._compiled_call_impl is call
            assert not wrapped._forward_hooks
            assert not wrapped._forward_pre_hooks
            assert torch.equal(torch.get_rng_state(), after)
            torch.set_rng_state(state)
            exact = Hessian(F.cross_entropy(plain(x), y), dict(plain.named_parameters())).product(v)
            torch.set_rng_state(after)
            assert (product - flat(exact)).norm() < 1e-5 * flat(exact).norm()
        else:
            loss = F.cross_entropy(wrapped(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    state = [t.tolist() for t in model.state_dict().values()]
    streams = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    return losses, state, streams, dict(torch._dynamo.utils.counters["stats"])


@pytest.mark.parametrize(
    ("backend", "dropout", "in_place"),
    [
        ("aot_eager", 0.5, False),
        ("aot_eager", 0.5, True),
        pytest.param(
            "inductor",
            0.0,
            False,
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
            ],
        ),
    ],
)
def test_training_is_bit_identical_products_exact_and_nothing_compiled_again(
    backend, dropout, in_place
):
    plain = training(backend, False, dropout, in_place)
    assert training(backend, True, dropout, in_place) == plain


def test_an_error_in_a_product_leaves_the_users_backward_as_it_was():
    model = compiled(build(TinyTransformer, need_weights=True))
    with CompiledCalls([model]) as calls:
        loss = loss_of(model)
    (call,) = calls.calls
    (node,) = call.nodes
    function = node._forward_cls
    own = vars(function)["backward"]
    hessian = ReplayHessian(loss, dict(model.named_parameters()), calls.calls)
    plain = build(TinyTransformer, need_weights=True)
    loss_of(plain).backward()
    with pytest.raises(MeasurementError):
        hessian.product({"_orig_mod.head.weight": torch.ones(17)})  # of no such shape
    assert vars(function)["backward"] is own
    loss.backward()
    ours = [p.grad for p in model.parameters()]
    assert all(torch.allclose(a, p.grad) for a, p in zip(ours, plain.parameters(), strict=True))


# --- what has no replay --------------------------------------------------------------------------


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x.tanh())


def refusal(model, run, *modules):
    with pytest.raises(NoSecondDerivativeError) as caught:
        noted(model, run, *modules)
    assert str(caught.value).endswith(
        "measure on a probe set, by watch(..., loss_fn=, probe=), which runs the model uncompiled"
    )
    return str(caught.value)


def test_compiled_code_that_is_no_noted_call_is_refused():
    x = torch.ones(2, 3)
    broken = compiled(Broken())
    assert "graph break" in refusal(broken, lambda: broken(x).sum())
    model = nn.Linear(3, 1)
    function = torch.compile(lambda x: model(x).square().sum(), backend="aot_eager")
    assert "compiled function" in refusal(model, lambda: function(x))
    in_place = nn.Sequential(Normed(0.0))
    in_place[0].compile(backend="aot_eager")
    points = torch.rand(8, 4)
    assert "compiled function" in refusal(in_place, lambda: in_place(points).sum(), nn.Identity())
    assert compiled_modules(in_place) == ["0"]
    assert compiled_modules(nn.Sequential(compiled(nn.Linear(3, 3)))) == ["0"]
    assert compiled_modules(nn.Linear(3, 3)) == []


def test_a_replay_that_would_not_be_the_same_is_refused():
    x = torch.ones(2, 3)
    hooked = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    hooked[1].register_forward_hook(lambda *_: None)
    wrapped = compiled(hooked)
    assert "Tanh has forward hooks" in refusal(wrapped, lambda: wrapped(x).sum())

    model = compiled(nn.Linear(3, 3))

    def changing():
        y = torch.ones(2, 3)
        loss = model(y.add(0.0)).sum()
        with torch.no_grad():
            y.mul_(2.0)
        return loss

    noted(model, changing)  # not its input

    def changing_input():
        y = torch.ones(2, 3)
        loss = model(y).square().sum()
        with torch.no_grad():
            y.data = y.data * 1.0
            y.mul_(2.0)
        return loss

    assert "changed in place" in refusal(model, changing_input)

    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            return super().forward(x) * (1.0 if torch.compiler.is_compiling() else 1.1)

    counting = compiled(Counting(3, 3))
    assert "the output differs by 0.1" in refusal(counting, lambda: counting(x).sum())


def test_graphs_that_are_never_differentiated_are_not_kept_alive():
    # As of an evaluation without no_grad: each call's graph must go when the loss does.
    first, second = (compiled(nn.Sequential(nn.Linear(4, 4), nn.Tanh())) for _ in range(2))
    with CompiledCalls([first, second]) as calls:
        graphs = []
        for _ in range(4):
            loss = second(first(torch.randn(3, 4))).sum()
            assert len(calls.calls) == 2
            graphs.append(weakref.ref(loss.grad_fn.next_functions[0][0]))
            del loss
        first(torch.randn(3, 4))
        assert len(calls.calls) <= 1
        assert [graph() for graph in graphs] == [None] * 4


def test_a_compiled_module_inside_another_is_left_alone():
    inner = compiled(nn.Linear(4, 4))
    outer = compiled(nn.Sequential(inner, nn.Tanh(), nn.Linear(4, 3)))
    with CompiledCalls(outer.modules()) as calls:
        assert calls.modules == [outer]
        assert not inner._forward_hooks and not inner._forward_pre_hooks
        loss = outer(torch.randn(5, 4)).square().mean()
    parameters = dict(outer.named_parameters())
    v = random_vector(parameters, 1)
    found = ReplayHessian(loss, parameters, calls.calls).product(v)
    assert all(rows.isfinite().all() for rows in found.values())
