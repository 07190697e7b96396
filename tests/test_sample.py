"""What one sample measures, against the dense Hessian and plain autograd at that very step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from curvature_subjects import TinyHAN, TinyTransformer, build, dense, loss_of, positions
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_

import diagnoser
from diagnoser.monitor.subject import Subject, coming_update, step_rules
from diagnoser.runlog import Recording

torch.set_num_threads(1)

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05),
    "momentum": lambda p: SGD(p, lr=0.05, momentum=0.9),
    "dampened": lambda p: SGD(p, lr=0.05, momentum=0.9, dampening=0.5, weight_decay=0.1),
    "nesterov": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: ADAM(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: ADAM(p, lr=0.01, amsgrad=True, betas=(0.5, 0.6)),
    "adamw": lambda p: ADAMW(p, lr=0.01, weight_decay=0.1),
    "adamw amsgrad": lambda p: ADAMW(p, lr=0.01, amsgrad=True, weight_decay=0.1),
}


def flat(vector: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in vector.values()])


def values(recording: Recording, quantity: str, component: str = "model") -> dict[int, float]:
    series = recording.series(quantity, component)
    return dict(zip(series.step.tolist(), series.value.tolist(), strict=True))


class Twin:
    """A training loop that keeps everything a dense calculation needs, beside the watch."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        out: Path,
        *,
        steps: int = 5,
        clip: float = 0.0,
        parts: int = 1,
    ) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.hessians: list[Tensor] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.before: list[dict[str, Tensor]] = []
        self.updates: list[dict[str, Tensor]] = []
        self.losses: list[float] = []
        self.moments: list[dict[str, Tensor]] = []
        with diagnoser.watch(model, optimizer, out=out, every=2, verbose=False) as watch:
            for step in range(steps):
                optimizer.zero_grad()
                with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
                    self.hessians.append(dense(loss_of(model, step), self.parameters))
                self.before.append({n: p.detach().clone() for n, p in self.parameters.items()})
                for _ in range(parts):
                    loss = loss_of(model, step)
                    (loss / parts).backward()
                self.losses.append(loss.item())
                self.gradients.append({n: p.grad.clone() for n, p in self.parameters.items()})
                if clip:
                    clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                now = {n: p.detach().clone() for n, p in self.parameters.items()}
                self.updates.append({n: now[n] - self.before[step][n] for n in now})
        self.recording = watch.log
        self.subject = Subject({"": model}, {})
        assert [e for e in self.recording.events if e.kind == "monitor_error"] == []

    def block(self, step: int, i: int, j: int | None = None) -> Tensor:
        components = self.subject.components
        rows = positions(components[i].parts, self.parameters)
        columns = positions(components[i if j is None else j].parts, self.parameters)
        return self.hessians[step][rows][:, columns]

    def part(self, vector: dict[str, Tensor], i: int) -> Tensor:
        return flat(vector)[positions(self.subject.components[i].parts, self.parameters)]


@pytest.fixture(params=["sgd", "adamw"])
def twin(request: pytest.FixtureRequest, tmp_path: Path) -> Twin:
    model = build(TinyTransformer)
    return Twin(model, OPTIMIZERS[request.param](list(model.parameters())), tmp_path / "run")


def test_norms_ratios_and_cosines_are_those_of_plain_autograd(twin: Twin) -> None:
    for i, name in enumerate(twin.subject.names):
        for step in (0, 2):
            g, following = (twin.part(twin.gradients[k], i) for k in (step, step + 1))
            w, d = twin.part(twin.before[step], i), twin.part(twin.updates[step], i)
            expected = {
                "gradient_norm": g.norm(),
                "weight_norm": w.norm(),
                "update_norm": d.norm(),
                "update_ratio": d.norm() / w.norm(),
                "zero_share": (g == 0).double().mean(),
                "gradient_cosine": g @ following / (g.norm() * following.norm()),
                "non_finite_gradient": 0.0,
                "non_finite_weight": 0.0,
                "reached": 1.0,
                "trainable": 1.0,
                "optimized": 1.0,
            }
            for quantity, value in expected.items():
                found = values(twin.recording, quantity, name)[step]
                assert found == pytest.approx(float(value), rel=1e-9, abs=1e-12), (quantity, name)


def test_curvature_along_the_step_is_that_of_the_dense_hessian(twin: Twin) -> None:
    for step in (0, 2):
        hessian, d = twin.hessians[step], flat(twin.updates[step])
        product, slope = hessian @ d, flat(twin.gradients[step]) @ d
        found = values(twin.recording, "update_curvature")[step]
        assert found == pytest.approx(float(d @ product), rel=1e-9)
        share = values(twin.recording, "update_curvature_share")[step]
        assert share == pytest.approx(float(d @ product) / 2 / twin.losses[step], rel=1e-9)
        overshoot = values(twin.recording, "overshoot")[step]
        assert overshoot == pytest.approx(float(d @ product / 2 / slope.abs()), rel=1e-9)
        for i, component in enumerate(twin.subject.components):
            at = positions(component.parts, twin.parameters)
            row = values(twin.recording, "update_curvature", component.name)[step]
            assert row == pytest.approx(float(d[at] @ product[at]), rel=1e-9, abs=1e-12)
            g, block = twin.part(twin.gradients[step], i), twin.block(step, i)
            own = values(twin.recording, "block_curvature", component.name)[step]
            assert own == pytest.approx(float(d[at] @ block @ d[at]), rel=1e-9, abs=1e-12)
            along = values(twin.recording, "gradient_curvature", component.name)[step]
            product_g = (hessian @ flat(twin.gradients[step]))[at]
            assert along == pytest.approx(float(g @ product_g / (g @ g)), rel=1e-9)


def test_coupling_of_every_pair_is_that_of_the_dense_hessian(twin: Twin) -> None:
    names = twin.subject.names
    step, d = 2, flat(twin.updates[2])
    table = torch.tensor(
        [
            [
                float(twin.part(twin.updates[step], i) @ twin.block(step, i, j)
                      @ twin.part(twin.updates[step], j))
                for j in range(len(names))
            ]
            for i in range(len(names))
        ],
        dtype=torch.float64,
    )  # fmt: skip
    assert float(table.sum()) == pytest.approx(float(d @ twin.hessians[step] @ d), rel=1e-9)
    for i, a in enumerate(names):
        for j in range(i + 1, len(names)):
            for quantity, scale in (("coupling", 1.0), ("coupling_share", table.abs().sum())):
                series = twin.recording.series(quantity, a, names[j])
                found = dict(zip(series.step.tolist(), series.value.tolist(), strict=True))[step]
                assert found == pytest.approx(float(table[i, j] / scale), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("model", [TinyTransformer, TinyHAN])
def test_trace_and_spectrum_ends_within_their_errors(
    model: type[nn.Module], tmp_path: Path
) -> None:
    made = build(model, packed=False) if model is TinyHAN else build(model)
    twin = Twin(made, OPTIMIZERS["sgd"](list(made.parameters())), tmp_path / "run")
    step = 2
    for i, name in enumerate(twin.subject.names):
        block = twin.block(step, i)
        eigenvalues = torch.linalg.eigvalsh(block)
        size = float(eigenvalues.abs().max())
        for quantity, exact in (
            ("lambda_max", eigenvalues[-1]),
            ("lambda_min", eigenvalues[0]),
            ("trace", block.trace()),
        ):
            series = twin.recording.series(quantity, name)
            at = series.step.tolist().index(step)
            slack = 5 * series.std_error[at] + 1e-9 * size
            assert abs(series.value[at] - float(exact)) <= slack, (name, quantity)
        ratio = values(twin.recording, "step_lambda", name)[step]
        own = values(twin.recording, "lambda_max", name)[step]
        assert ratio == pytest.approx(0.05 * own / 2, rel=1e-9)  # gradient descent: 2 / rate


@pytest.mark.parametrize("kind", ["momentum", "nesterov", "adamw", "amsgrad"])
def test_step_sharpness_is_curvature_over_what_stability_allows(kind: str, tmp_path: Path) -> None:
    model = build(TinyTransformer)
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    # The second moment as it stood at step 2 comes from a run of the same loop that ends there.
    twin = Twin(model, optimizer, tmp_path / "run", steps=3)
    step, d, rate = 2, flat(twin.updates[2]), optimizer.param_groups[0]["lr"]
    if kind in ("adamw", "amsgrad"):
        beta1, beta2 = optimizer.param_groups[0]["betas"]
        key = "max_exp_avg_sq" if kind == "amsgrad" else "exp_avg_sq"
        second = torch.cat([optimizer.state[p][key].reshape(-1) for p in model.parameters()])
        metric = (second / (1 - beta2**3)).sqrt() + 1e-8
        allowed = (2 + 2 * beta1) / (1 - beta1) / rate
    else:
        metric = torch.ones_like(d)
        allowed = (2 + 2 * 0.9) / (1 + 2 * 0.9 if kind == "nesterov" else 1) / rate
    expected = float(d @ twin.hessians[step] @ d / (d @ (metric * d)) / allowed)
    assert values(twin.recording, "step_sharpness")[step] == pytest.approx(expected, rel=1e-8)
    if kind == "adamw":
        for i, name in enumerate(twin.subject.names):
            v = second[positions(twin.subject.components[i].parts, twin.parameters)]
            g = twin.part(twin.gradients[step], i)
            known = v / (1 - beta2**3) > 1e-16
            ratio = (g**2 / (v / (1 - beta2**3)))[known].mean().sqrt()
            found = values(twin.recording, "moment_ratio", name)[step]
            assert found == pytest.approx(float(ratio), rel=1e-6)


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
def test_clipping_rescales_or_waits_for_the_next_step(kind: str, tmp_path: Path) -> None:
    model = build(TinyTransformer)
    made = OPTIMIZERS[kind](list(model.parameters()))
    twin = Twin(model, made, tmp_path / "run", steps=5, clip=0.05)
    found = values(twin.recording, "update_curvature")
    predicted = values(twin.recording, "predicted_update_cosine")
    assert found.keys() >= {0, 2}
    for step in (0, 2):
        value = found[step]
        d, at = flat(twin.updates[step]), step if step in predicted else step + 1
        assert value == pytest.approx(float(d @ twin.hessians[at] @ d), rel=0.15)
    # What no step changes is measured once, whether or not the step came out as expected.
    rows = twin.recording.measurements
    names = ("step", "quantity", "component", "other")
    keys = list(zip(*(getattr(rows, name).tolist() for name in names), strict=True))
    assert len(keys) == len(set(keys))
    assert {"trace", "coupling", "coupling_norm", "gradient_curvature"} <= set(rows.quantities)
    if kind == "sgd":
        assert predicted == pytest.approx({0: 1.0, 2: 1.0, 4: 1.0})
        d = flat(twin.updates[2])
        assert found[2] == pytest.approx(float(d @ twin.hessians[2] @ d), rel=1e-8)


def test_accumulated_backwards_count_as_one_loss(tmp_path: Path) -> None:
    model = build(TinyTransformer)
    made = OPTIMIZERS["sgd"](list(model.parameters()))
    twin = Twin(model, made, tmp_path / "run", steps=5, parts=3)
    d = flat(twin.updates[2])
    found = values(twin.recording, "update_curvature")[2]
    assert found == pytest.approx(float(d @ twin.hessians[2] @ d), rel=1e-8)
    share = values(twin.recording, "update_curvature_share")[2]
    assert share == pytest.approx(found / 2 / twin.losses[2], rel=1e-8)
    for i, name in enumerate(twin.subject.names):
        norm = float(twin.part(twin.gradients[2], i).norm())
        assert values(twin.recording, "gradient_norm", name)[2] == pytest.approx(norm, rel=1e-9)


def test_two_optimizers_of_one_loss_both_move_their_components(tmp_path: Path) -> None:
    model = build(TinyTransformer)
    slow, fast = list(model.parameters())[:-2], list(model.parameters())[-2:]
    norms: dict[int, Tensor] = {}
    with diagnoser.watch(model, out=tmp_path / "run", every=2, verbose=False) as watch:
        optimizers = [SGD(slow, lr=0.01), SGD(fast, lr=0.1)]
        for step in range(5):
            before = [p.detach().clone() for p in model.parameters()]
            loss_of(model, step).backward()
            for optimizer in optimizers:
                optimizer.step()
            norms[step] = torch.stack(
                [(p - b).norm() for p, b in zip(model.parameters(), before, strict=True)]
            ).detach()
            for optimizer in optimizers:
                optimizer.zero_grad()
    embedding, head = float(norms[2][0]), float(norms[2][-2:].norm())
    assert values(watch.log, "update_norm", "embedding")[2] == pytest.approx(embedding, rel=1e-9)
    assert values(watch.log, "update_norm", "head")[2] == pytest.approx(head, rel=1e-9)
    assert values(watch.log, "learning_rate", "head")[2] == 0.1
    assert values(watch.log, "optimizers")[2] == 2.0
    assert values(watch.log, "predicted_update_cosine")[2] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("clear", ["none", "zero", "never"])
def test_coming_update_is_the_step_the_optimizer_makes(kind: str, clear: str) -> None:
    model = build(TinyTransformer)
    idle = nn.Parameter(torch.ones(3, dtype=torch.float64))  # never reached by the loss
    parameters = {**dict(model.named_parameters()), "idle": idle}
    optimizer = OPTIMIZERS[kind](list(parameters.values()))
    name_of = {id(p): n for n, p in parameters.items()}
    for step in range(6):
        if clear != "never":
            optimizer.zero_grad(set_to_none=clear == "none")
        loss = loss_of(model, step)
        own = dict(model.named_parameters())
        gradient = dict(zip(own, torch.autograd.grad(loss, list(own.values()), retain_graph=True),
                            strict=True))  # fmt: skip
        predicted = coming_update(optimizer, gradient, name_of)
        assert predicted is not None
        before = {n: p.detach().clone() for n, p in parameters.items()}
        loss.backward()
        optimizer.step()
        assert predicted.keys() == own.keys()
        for name in own:
            made = parameters[name].detach() - before[name]
            torch.testing.assert_close(predicted[name], made, rtol=1e-9, atol=1e-14)


def test_an_update_that_cannot_be_told_in_advance_is_none() -> None:
    p = nn.Parameter(torch.ones(2))
    for optimizer in (torch.optim.RMSprop([p]), SGD([p], lr=0.1, maximize=True)):
        assert coming_update(optimizer, {"p": torch.ones(2)}, {id(p): "p"}) is None


def test_entries_without_a_second_moment_do_not_count(tmp_path: Path) -> None:
    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x))

    torch.manual_seed(0)
    model = Picked().double()
    optimizer = ADAM(model.parameters(), lr=0.01)
    with diagnoser.watch(model, optimizer, out=tmp_path / "run", every=2, verbose=False) as watch:
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.tensor([1, 2, 3])).square().mean().backward()
            optimizer.step()
    g, v = model.table.weight.grad, optimizer.state[model.table.weight]["exp_avg_sq"]
    assert int((v == 0).sum()) == 47 * 4
    for quantity in ("moment_ratio", "step_lambda", "step_sharpness"):
        found = values(watch.log, quantity, "table")
        assert found and all(math.isfinite(x) and abs(x) < 1e3 for x in found.values()), quantity
    # On a constant gradient the ratio is near 1; 188 silent entries must not drag it down.
    assert g is not None
    assert values(watch.log, "moment_ratio", "table")[0] == pytest.approx(1.0, rel=1e-6)


def test_rules_of_stability_follow_the_optimizer() -> None:
    p = nn.Parameter(torch.ones(2))
    for make, factor in (
        (SGD([p], lr=0.1), 1 / 2),
        (SGD([p], lr=0.1, momentum=0.9), 1 / 3.8),
        (SGD([p], lr=0.1, momentum=0.9, nesterov=True), 2.8 / 3.8),
    ):
        assert step_rules(make, {id(p): "p"})["p"].factor == pytest.approx(factor)
    adam = ADAM([p], lr=0.1)
    p.grad = torch.ones(2)
    adam.step()
    rule = step_rules(adam, {id(p): "p"})["p"]
    assert rule.factor == pytest.approx(0.1 / 3.8)
    torch.testing.assert_close(rule.second_moment, torch.ones(2))
    rectified = torch.optim.RAdam([p], lr=0.1)
    rectified.step()
    rule = step_rules(rectified, {id(p): "p"})["p"]
    assert rule.second_moment is None  # its steps are shorter than Adam's, by a factor of its own
    assert math.isnan(rule.factor)


@pytest.mark.parametrize(
    ("clear", "carried"),
    [("start", 0.0), ("end", 0.0), ("to zero", 0.0), ("never", 1.0), ("accumulate", 0.0)],
)
def test_carried_gradients(clear: str, carried: float, tmp_path: Path) -> None:
    model = build(TinyTransformer)
    optimizer = SGD(model.parameters(), lr=0.01)
    with diagnoser.watch(model, optimizer, out=tmp_path / "run", every=2, verbose=False) as watch:
        for step in range(5):
            if clear in ("start", "accumulate"):
                optimizer.zero_grad()
            for k in range(3 if clear == "accumulate" else 1):
                loss_of(model, step + k).backward()
            optimizer.step()
            if clear in ("end", "to zero"):
                optimizer.zero_grad(set_to_none=clear == "end")
    found = set(values(watch.log, "carried_gradients").values())
    if clear in ("start", "end", "accumulate"):  # a cleared gradient may also leave nothing to say
        assert found <= {0.0}
    else:
        assert found == {carried}
