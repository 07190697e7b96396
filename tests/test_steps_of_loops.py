"""What counts as a step, a loss and a gradient in loops that are no plain ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from popular_loops import LOOPS, OWN, Training
from torch import Tensor, nn
from torch.nn import functional as F

from diagnoser.diagnosis import is_grave
from diagnoser.runlog import Recording
from diagnoser.session import Watch

Spoil = Callable[[int, Tensor], Tensor]


def values(log: Recording, quantity: str, component: str = "model") -> list[float]:
    return log.series(quantity, component).value.tolist()


def everything(log: Recording) -> dict[tuple[int, str, str], float]:
    table = log.measurements
    return {
        (step, table.quantities[q], table.components[c]): value
        for step, q, c, value in zip(
            *(column.tolist() for column in (table.step, table.quantity, table.component)),
            table.value.tolist(),
            strict=True,
        )
    }


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def drawn() -> tuple[Tensor, Tensor]:
    points = torch.randn(16, 5)
    return points, points[:, :3].argmax(1)


def spoilt_gradient(step: int, loss: Tensor) -> Tensor:
    """The square root of zero has a value, and no derivative."""
    return loss + (loss * 0.0).abs().sqrt() if step % 7 == 3 else loss


def always_spoilt(step: int, loss: Tensor) -> Tensor:
    return loss + (loss * 0.0).abs().sqrt()


def spoilt_loss(step: int, loss: Tensor) -> Tensor:
    return loss * (math.inf if step % 7 == 3 else 1.0)


def scaled(out: Path, spoil: Spoil, steps: int = 40, scale: float = 64.0) -> Watch:
    with Watch(out) as watch:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        for step in range(steps):
            points, labels = drawn()
            optimizer.zero_grad()
            loss = spoil(step, F.cross_entropy(model(points), labels))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return watch


@pytest.mark.parametrize("spoil", [spoilt_gradient, spoilt_loss])
def test_a_step_that_a_scaler_skips_is_one_of_its_own_and_no_fault(spoil: Spoil, tmp_path):
    watch = scaled(tmp_path / "run", spoil)
    log, skipped = watch.log, [3, 10, 17, 24, 31, 38]
    finite = [s for s in range(40) if spoil is spoilt_gradient or s not in skipped]
    assert log.losses.step.tolist() == finite
    assert np.isfinite(log.losses.value).all()
    told = [event for event in log.events if event.kind == "skipped_step"]
    assert [event.step for event in told] == skipped
    assert all("not finite at a scale of" in event.message for event in told)
    (last,) = (event for event in log.events if event.kind == "skipped_steps")
    assert last.message == "the gradient scaler skipped 6 of 40 steps"
    # Step 10 has statistics: of its gradients and its update there is none.
    assert 10 in log.series("weight_norm", "0").step
    for quantity in ("gradient_norm", "update_ratio", "non_finite_gradient"):
        assert log.series(quantity, "0").step.tolist() == [0, 2, 5, 20, 35], quantity
    diagnosis = watch.diagnose(write=False)
    assert [f for f in diagnosis.findings if is_grave(f.severity)] == []
    assert diagnosis.verdict == "healthy"


def test_gradients_that_no_scale_saves_are_a_fault(tmp_path):
    watch = scaled(tmp_path / "run", always_spoilt)
    log = watch.log
    assert len(log.losses.step) == 40 and np.isfinite(log.losses.value).all()
    assert len([event for event in log.events if event.kind == "skipped_step"]) == 8
    assert values(log, "skipped_for_good") == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    diagnosis = watch.diagnose(write=False)
    (found,) = (f for f in diagnosis.findings if f.fault == "non_finite")
    assert (found.source, found.since_step) == ("check:steps-skipped-for-good", 10)
    assert diagnosis.causes[0].cause == "numeric_precision"


def test_losses_that_stay_infinite_are_recorded_when_nothing_is_left_to_scale(tmp_path):
    watch = scaled(tmp_path / "run", lambda _, loss: loss * math.inf)
    assert watch.log.losses.step.tolist() == list(range(6, 40))  # 64 is 1 after six halvings
    assert {f.source for f in watch.diagnose(write=False).findings} >= {"rule:non-finite-loss"}


def test_norms_do_not_depend_on_the_scale(tmp_path):
    logs = [scaled(tmp_path / str(s), lambda _, loss: loss, scale=s).log for s in (1.0, 2.0**12)]
    assert values(logs[0], "gradient_norm", "0") == pytest.approx(
        values(logs[1], "gradient_norm", "0"), rel=1e-4
    )
    # That of an infinite loss is the program's own where nothing is scaled.
    assert values(logs[0], "loss_factor") == pytest.approx([1.0] * 6)
    assert values(logs[1], "loss_factor") == pytest.approx([1.0] * 6)


def test_stepping_inside_of_the_backward_measures_what_stepping_after_it_does(tmp_path):
    found = []
    for name in ("plain", "an optimizer for each parameter, stepping in the backward"):
        torch.manual_seed(0)
        watch = Watch(tmp_path / name[:5])
        LOOPS[name](OWN["MLP"](), Training(), watch)
        found.append(everything(watch.log))
    plain, inside = found
    assert {key[1] for key in plain.keys() - inside.keys()} == {
        "cleared_gradients",  # which are read when one optimizer steps
        "carried_gradients",
        "clipped_late",
    } & {key[1] for key in plain}
    assert {key[1] for key in inside.keys() - plain.keys()} <= {"shared_loss"}
    for key in plain.keys() & inside.keys():
        if key[1] not in ("optimizers", "times_optimized"):
            assert inside[key] == pytest.approx(plain[key], rel=1e-6, nan_ok=True), key


def test_optimizers_that_share_a_loss_have_one_and_rivals_have_none(tmp_path):
    with Watch(tmp_path / "shared") as shared:
        model = network()
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[0], model[2])]
        for _ in range(24):
            points, labels = drawn()
            for optimizer in optimizers:
                optimizer.zero_grad()
            F.cross_entropy(model(points), labels).backward()
            for optimizer in optimizers:
                optimizer.step()
    rivals = Watch(tmp_path / "rivals")
    torch.manual_seed(0)
    LOOPS["GAN: two models, two optimizers"](OWN["MLP"](), Training(), rivals)
    for watch, judged in ((shared, True), (rivals, False)):
        checked = {entry.rule for entry in watch.diagnose(write=False).checked}
        assert ("loss-climbs-back" in checked) is judged


def test_a_rivals_gradient_is_that_which_its_own_step_was_made_with(tmp_path):
    torch.manual_seed(0)
    watch = Watch(tmp_path / "run")
    LOOPS["GAN: two models, two optimizers"](OWN["MLP"](), Training(), watch)
    log = watch.log
    curved = log.series("update_curvature", "critic:head").step.tolist()
    assert curved[-2:] == [10, 20]
    # The critic's loss, which is measured, does not reach the generator.
    assert log.series("update_curvature", "generator:0").step.tolist() in ([], [0])


@pytest.mark.parametrize("divided", [True, False])
def test_guessing_costs_what_the_parts_of_a_loss_are_multiplied_by(divided, tmp_path):
    with Watch(tmp_path / "run") as watch:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        for _ in range(24):
            for _ in range(4):
                points, labels = drawn()
                loss = F.cross_entropy(model(points), labels)
                (loss / 4 if divided else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert values(watch.log, "loss_factor") == pytest.approx([1.0 if divided else 4.0] * 5)
    diagnosis = watch.diagnose(write=False)
    assert "initial-loss-far-above-chance" not in {f.source[5:] for f in diagnosis.findings}


def test_what_else_is_in_a_loss_leaves_its_factor_unknown(tmp_path):
    with Watch(tmp_path / "run") as watch:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(6):
            points, labels = drawn()
            optimizer.zero_grad()
            F.cross_entropy(model(points), labels).backward()
            (1e-3 * model[0].weight.square().sum()).backward()
            optimizer.step()
    assert "loss_factor" not in watch.log.measurements.quantities


def test_a_closure_that_is_evaluated_again_is_one_loss_and_two_losses_in_it_are_two(tmp_path):
    def train(optimizer_class: type[torch.optim.Optimizer], out: Path) -> tuple[list[float], Watch]:
        expected = []
        with Watch(out) as watch:
            model = network()
            optimizer = optimizer_class(model.parameters(), lr=0.01)
            for _ in range(6):
                points, labels = drawn()
                sums: list[float] = []

                def closure(points=points, labels=labels, sums=sums) -> float:
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(points), labels)
                    penalty = 1e-2 * model[0].weight.square().sum()
                    loss.backward()
                    penalty.backward()
                    sums.append(loss.item() + penalty.item())
                    return sums[-1]

                optimizer.step(closure)
                expected.append(sums[0])
        return expected, watch

    for kind in (torch.optim.LBFGS, torch.optim.Adam):
        expected, watch = train(kind, tmp_path / kind.__name__)
        np.testing.assert_allclose(watch.log.losses.value, expected, rtol=1e-6)


def test_an_optimizer_that_steps_without_a_backward_is_said_to(tmp_path):
    for name in OWN:
        watch = Watch(tmp_path / name)
        LOOPS["`torch.autograd.grad` instead of a backward"](OWN[name](), Training(), watch)
        diagnosis = watch.diagnose(write=False)
        assert diagnosis.verdict == "inconclusive"
        assert diagnosis.reason.endswith(
            "call loss.backward(), as gradients of torch.autograd.grad go unseen"
        )
