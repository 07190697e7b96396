"""How curvature is measured where a live graph does not simply give it: what stands on the numbers,
what is said, and that training goes on all the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diagnoser import watch
from diagnoser.curvature import Hessian
from diagnoser.curvature import probe as probing
from diagnoser.errors import UsageError
from diagnoser.monitor import Plan, Schedule
from diagnoser.runlog import Recording

STEPS = 8
X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 2, (12,), generator=torch.Generator().manual_seed(1))


class Square(torch.autograd.Function):
    """The square, differentiable once only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Kept(torch.autograd.Function):
    """A scaling by a number that its own gradient forgets to depend on: wrong, yet symmetric."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.x * g


class Skew(torch.autograd.Function):
    """The sine, whose gradient claims a derivative that depends on the other samples."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        rolled = x.roll(1, 0)
        return g * (x.detach().cos() + rolled - rolled.detach())


class Network(nn.Module):
    def __init__(self, inner: Any = None, wrap: Any = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)
        self.drop = nn.Dropout(0.5)
        self.inner = inner or torch.tanh
        self.wrap = wrap or (lambda function, x: function(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.wrap(lambda x: self.drop(self.inner(self.first(x))), x))


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    scores = model(x)
    return F.cross_entropy(scores, y)


def train(model: nn.Module, out: Any, **options: Any) -> tuple[Recording, bytes]:
    """Trains on X with a measurement every second step; returns the recording and the result."""
    torch.manual_seed(3)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, out=out, every=2, verbose=False, **options) as watched:
        for _ in range(STEPS):
            optimizer.zero_grad()
            cross_entropy(model, (X, Y)).backward()
            optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return watched.log, weights.numpy().tobytes() + torch.get_rng_state().numpy().tobytes()


def train_alone(model: nn.Module) -> bytes:
    """The result without a watch."""
    torch.manual_seed(3)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        cross_entropy(model, (X, Y)).backward()
        optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return weights.numpy().tobytes() + torch.get_rng_state().numpy().tobytes()


def built(*arguments: Any) -> Network:
    torch.manual_seed(0)
    return Network(*arguments)


def methods(recording: Recording, quantity: str) -> set[str]:
    rows = recording.measurements
    if quantity not in rows.quantities:
        return set()
    chosen = rows.quantity == rows.quantities.index(quantity)
    return {rows.methods[i] for i in rows.method[chosen]}


def said(recording: Recording) -> list[str]:
    return [e.message for e in recording.events if e.kind in ("unmeasurable", "curvature_method")]


def probed(**options: Any) -> dict[str, Any]:
    return {"loss_fn": cross_entropy, "probe": (X, Y), **options}


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def values(recording: Recording, quantity: str) -> dict[tuple[int, str], float]:
    """By step and component, spelt as without compiling."""
    rows = recording.measurements
    names = [name.replace("_orig_mod.", "") for name in rows.components]
    return {
        (int(rows.step[i]), names[rows.component[i]]): float(rows.value[i])
        for i in np.flatnonzero(rows.quantity == rows.quantities.index(quantity))
    }


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_module_is_replayed_and_gives_the_same_numbers(compiler, whole, tmp_path):
    def subject() -> Network:
        model = built()
        model.drop.p = 0.0  # compiled code draws other numbers
        return model

    def compiled() -> nn.Module:
        model = subject()
        if whole:
            return torch.compile(model, backend="aot_eager")
        model.first = torch.compile(model.first, backend="aot_eager")
        return model

    plain, _ = train(subject(), tmp_path / "plain")
    found, watched = train(compiled(), tmp_path / "compiled")
    torch._dynamo.reset()
    assert watched == train_alone(compiled())
    for quantity in ("update_curvature", "gradient_curvature", "lambda_max"):
        # The calls of the first step were not followed yet: its curvature is that of the second.
        mine, theirs = (
            {key: value for key, value in values(recording, quantity).items() if key[0] > 0}
            for recording in (found, plain)
        )
        assert mine
        # Another start, for eigenvalues; all else is the same but for rounding.
        close = {"rel": 0.02} if quantity == "lambda_max" else {"rel": 1e-3}
        assert mine == pytest.approx(theirs, **close)
        assert all(m.startswith("live, eager replay") for m in methods(found, quantity))
    assert not any("replay" in message for message in said(found))


def test_a_function_differentiable_once_is_named_and_a_probe_measures_it_by_differences(tmp_path):
    live, _ = train(built(Square.apply), tmp_path / "live")
    assert not methods(live, "update_curvature")
    (message,) = set(said(live))
    assert "Square" in message
    assert "probe=" in message

    def twice(x: Tensor) -> Tensor:
        return x * x

    found, watched = train(built(Square.apply), tmp_path / "probe", **probed())
    assert watched == train_alone(built(Square.apply))
    exact, _ = train(built(twice), tmp_path / "exact", **probed())
    assert methods(found, "update_curvature") == {"probe, central difference"}
    assert methods(exact, "update_curvature") == {"probe"}
    mine, theirs = values(found, "update_curvature"), values(exact, "update_curvature")
    assert mine.keys() == theirs.keys()
    assert mine == pytest.approx(theirs, rel=0.05, abs=0.05 * max(theirs.values()))
    rows = found.measurements
    differences = rows.quantity == rows.quantities.index("update_curvature")
    assert (rows.std_error[differences] > 0).all()
    assert any("central differences instead of exact products" in m for m in said(found))


@pytest.mark.parametrize("reentrant", [True, False])
def test_both_kinds_of_checkpoint(reentrant, tmp_path):
    def wrap(function: Any, x: Tensor) -> Tensor:
        return checkpoint(function, x.detach().requires_grad_(), use_reentrant=reentrant)

    def model() -> Network:
        return built(None, wrap)

    plain, _ = train(built(), tmp_path / "plain")
    live, watched = train(model(), tmp_path / "live")
    assert watched == train_alone(model())
    if reentrant:
        assert not methods(live, "trace")
        assert "use_reentrant=False" in said(live)[0]
    else:
        expected = values(plain, "update_curvature")
        assert values(live, "update_curvature") == pytest.approx(expected, rel=1e-4)
    on_plain, _ = train(built(), tmp_path / "plain probe", **probed())
    on_probe, _ = train(model(), tmp_path / "probe", **probed())
    expected = values(on_plain, "update_curvature")
    assert values(on_probe, "update_curvature") == pytest.approx(expected, rel=1e-4)


def test_what_is_computed_again_with_other_random_numbers_is_refused(tmp_path):
    def wrap(function: Any, x: Tensor) -> Tensor:
        return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)

    found, watched = train(built(None, wrap), tmp_path / "run")
    assert watched == train_alone(built(None, wrap))
    assert not methods(found, "update_curvature")
    assert "preserve_rng_state=False" in said(found)[0]


def test_a_wrong_second_derivative_is_found_by_symmetry_or_by_a_difference(tmp_path):
    skew, _ = train(built(Skew.apply), tmp_path / "skew")
    assert not methods(skew, "update_curvature")
    assert "Skew has a wrong second derivative" in said(skew)[0]
    # Symmetric and wrong: live, nobody can tell, and that is said; on a probe set it shows.
    live, _ = train(built(Kept.apply), tmp_path / "live")
    assert "Kept: products with its second derivative are symmetric" in said(live)[0]
    found, _ = train(built(Kept.apply), tmp_path / "probe", **probed())
    assert methods(found, "update_curvature") == {"probe, central difference"}


def test_a_probe_in_float64_tells_how_far_float32_is_off(tmp_path):
    single, _ = train(built(), tmp_path / "single", **probed())
    double, watched = train(built(), tmp_path / "double", **probed(dtype=torch.float64))
    assert watched == train_alone(built())
    mine, theirs = values(double, "lambda_max"), values(single, "lambda_max")
    assert mine == pytest.approx(theirs, rel=1e-3)
    assert mine != theirs
    rows = double.measurements
    chosen = rows.quantity == rows.quantities.index("lambda_max")
    assert {rows.dtypes[i] for i in rows.dtype[chosen]} == {"float64"}


def test_float64_holds_under_autocast(tmp_path):
    def autocast(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model, batch)

    options = probed(loss_fn=autocast)
    low, _ = train(built(), tmp_path / "low", **options)
    high, _ = train(built(), tmp_path / "high", **options, dtype=torch.float64)
    exact, _ = train(built(), tmp_path / "exact", **probed(dtype=torch.float64))
    assert values(high, "lambda_max") == pytest.approx(values(exact, "lambda_max"), rel=1e-6)
    assert values(low, "lambda_max") != pytest.approx(values(exact, "lambda_max"), rel=1e-4)


def test_float64_without_a_probe_is_refused_with_the_reason(tmp_path):
    with pytest.raises(UsageError, match="dtype= needs probe="):
        watch(built(), dtype=torch.float64, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_insists_on_its_own_type_is_named(tmp_path):
    def stubborn(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0].float()), batch[1])

    found, _ = train(built(), tmp_path / "run", **probed(loss_fn=stubborn, dtype=torch.float64))
    assert "let loss_fn follow the type" in said(found)[0]


def test_memory_running_out_in_the_middle_halves_the_chunk_says_so_and_keeps_the_numbers(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(probing, "free_memory", lambda device: None)
    expected, _ = train(built(), tmp_path / "whole", **probed())
    found, watched = train(built(), tmp_path / "halved", **probed(loss_fn=hungry))
    assert watched == train_alone(built())
    assert [m for m in said(found) if "halved" in m] == [
        "curvature: out of memory with 12 samples: halved to 6",
        "curvature: out of memory with 6 samples: halved to 3",
    ]
    for quantity in ("update_curvature", "lambda_max"):
        expected_values = values(expected, quantity)
        assert values(found, quantity) == pytest.approx(expected_values, rel=0.02, abs=1e-6)


def test_a_batch_of_a_users_own_class_is_measured_whole(tmp_path):
    class Batch:
        x, y = X, Y

    def own(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, (batch.x, batch.y))

    found, _ = train(built(), tmp_path / "run", loss_fn=own, probe=Batch())
    expected, _ = train(built(), tmp_path / "plain", **probed())
    assert values(found, "lambda_max") == pytest.approx(values(expected, "lambda_max"), rel=1e-5)
    assert not said(found)
    with pytest.raises(UsageError, match="probe="):
        watch(built(), loss_fn=own, probe=[], out=tmp_path / "none")


def test_a_probe_of_one_sample(tmp_path):
    found, watched = train(built(), tmp_path / "run", **probed(probe=(X[:1], Y[:1])))
    assert watched == train_alone(built())
    rows = found.measurements
    chosen = rows.quantity == rows.quantities.index("trace")
    assert chosen.any()
    assert np.isnan(rows.batch_std_error[chosen]).all()  # one sample tells nothing about others
    assert not said(found)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
def test_memory_running_out_on_the_live_graph_is_said_with_the_remedy(error, tmp_path, monkeypatch):
    original = Hessian.block_product
    left = [5]

    def product(self: Hessian, block: Any, v: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return original(self, block, v)

    monkeypatch.setattr(Hessian, "block_product", product)
    found, watched = train(built(), tmp_path / "run")
    assert watched == train_alone(built())
    assert methods(found, "update_curvature") == {"live"}  # what was measured before is kept
    assert "out of memory; measure on a probe set" in said(found)[0]
    assert not [e for e in found.events if e.kind == "monitor_error"]


def test_a_component_that_the_output_does_not_depend_on_has_no_curvature(tmp_path):
    def model() -> Network:
        network = built()
        network.spare = nn.Linear(2, 2)
        network.count = nn.Parameter(torch.tensor([3]), requires_grad=False)
        return network

    found, watched = train(model(), tmp_path / "run")
    assert watched == train_alone(model())
    assert {v for (_, name), v in values(found, "lambda_max").items() if name == "spare"} == {0.0}
    assert not said(found)


@pytest.mark.parametrize("probe", [True, False])
def test_a_loss_that_is_not_finite_gives_no_number(probe, tmp_path):
    def broken(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, (batch[0] / 0.0, batch[1]))

    torch.manual_seed(3)
    model = built()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"loss_fn": broken, "probe": (X, Y)} if probe else {}
    with watch(
        model, optimizer, out=tmp_path / "run", every=2, verbose=False, **options
    ) as watched:
        for _ in range(4):
            optimizer.zero_grad()
            (cross_entropy if probe else broken)(model, (X, Y)).backward()
            optimizer.step()
    rows = watched.log.measurements
    for quantity in ("update_curvature", "trace", "lambda_max", "coupling"):
        if quantity in rows.quantities:
            chosen = rows.quantity == rows.quantities.index(quantity)
            assert not chosen.any()


def hungry(model: nn.Module, batch: Any) -> Tensor:
    if len(batch[0]) > 4 and torch.is_grad_enabled():
        raise torch.OutOfMemoryError("CUDA out of memory")
    return cross_entropy(model, batch)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_what_was_learnt_of_memory_is_not_learnt_again(dtype, monkeypatch):
    monkeypatch.setattr(probing, "free_memory", lambda device: None)
    probe = probing.ProbeSet(hungry, built(), [(X, Y)], dtype=dtype)
    for _ in range(3):
        probe.measure(lambda operator: operator.gradient)
    assert len(probe.notes) == 2
    assert (probe.chunk_size, probe.streamed) == (3, True)


def test_what_led_to_giving_up_is_said_too(tmp_path, monkeypatch):
    def never(model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return cross_entropy(model, batch)

    monkeypatch.setattr(probing, "free_memory", lambda device: None)
    found, watched = train(built(), tmp_path / "run", **probed(loss_fn=never))
    assert watched == train_alone(built())
    assert any("halved to 6" in message for message in said(found))
    assert any("out of memory with a single sample" in message for message in said(found))


def test_a_measurement_that_starts_again_does_not_skip_a_components_turn(tmp_path, monkeypatch):
    class Spectra(Schedule):
        __slots__ = ()

        def plan(self, step: int) -> Plan:
            second = step % 2 == 1
            return Plan(statistics=not second, follow=second, curvature=True, spectrum=True)

    def measured(loss_fn: Any, out: Any) -> list[tuple[int, str]]:
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)), nn.Linear(3, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watch(
            model, optimizer, out=out, verbose=False, loss_fn=loss_fn, probe=(X, Y)
        ) as watched:
            watched._monitor.schedule.__class__ = Spectra
            for _ in range(6):
                optimizer.zero_grad()
                cross_entropy(model, (X, Y)).backward()
                optimizer.step()
        return list(values(watched.log, "lambda_max"))

    monkeypatch.setattr(probing, "free_memory", lambda device: None)
    expected = measured(cross_entropy, tmp_path / "plain")
    assert measured(hungry, tmp_path / "hungry") == expected
    assert len(expected) == 6
