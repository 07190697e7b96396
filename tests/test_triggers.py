"""What brings a sample forward, and what does not: noise of many shapes, in any unit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from diagnoser.monitor import Plan, Schedule
from diagnoser.monitor import sample as sample_module
from diagnoser.monitor.sample import Sample
from diagnoser.monitor.training import SPECTRUM_COMPONENTS, SUSPECT_PRODUCTS, Monitor
from diagnoser.monitor.triggers import BAND, LEAST_LOSSES, LossBand, MomentRatios, Trigger
from diagnoser.session import Watch
from diagnoser.types import Estimate, Measurement
from diagnoser.vocabulary import MODEL

Losses = NDArray[np.float64]
STEPS = 1000
RUNS = 60


def triggers(losses: Losses) -> list[Trigger]:
    band = LossBand()
    found = (band.judge(step, float(loss)) for step, loss in enumerate(losses))
    return [trigger for trigger in found if trigger is not None]


def falling(rng: np.random.Generator) -> Losses:
    steps = np.arange(STEPS)
    return np.exp(-steps / 100) * np.exp(0.2 * rng.standard_normal(STEPS))


def correlated(rng: np.random.Generator) -> Losses:
    noise = rng.standard_normal(STEPS)
    for i in range(1, STEPS):
        noise[i] += 0.9 * noise[i - 1]
    return 2 + 0.1 * noise


NOISE: dict[str, tuple[Callable[[np.random.Generator], Losses], float]] = {
    # how losses look, and how many triggers in 1000 steps are still few
    "normal": (lambda rng: 2 + 0.2 * rng.standard_normal(STEPS), 0.1),
    "falling": (falling, 0.1),
    "correlated": (correlated, 0.1),
    "random walk": (lambda rng: 100 + rng.standard_normal(STEPS).cumsum(), 0.1),
    "negative": (lambda rng: -2 + 0.2 * rng.standard_normal(STEPS), 0.1),
    "around zero": (lambda rng: rng.standard_normal(STEPS), 0.1),
    "exponential": (lambda rng: rng.exponential(size=STEPS), 1.5),
    "log-normal": (lambda rng: np.exp(0.5 * rng.standard_normal(STEPS)), 1.5),
}


@pytest.mark.parametrize("name", NOISE)
def test_noise_is_silent(name: str) -> None:
    make, most = NOISE[name]
    rng = np.random.default_rng(0)
    assert sum(len(triggers(make(rng))) for _ in range(RUNS)) / RUNS <= most


@pytest.mark.parametrize("name", ["normal", "falling", "correlated", "negative", "around zero"])
def test_a_jump_far_above_the_band_is_a_spike_at_its_very_step(name: str) -> None:
    rng = np.random.default_rng(1)
    for at in (LEAST_LOSSES, 100, 700):
        losses = NOISE[name][0](rng)
        recent = losses[max(at - BAND, 0) : at]
        losses[at:] += 5 * (recent.max() - recent.min())
        (found, *_) = triggers(losses)
        assert (found.step, found.kind, found.component) == (at, "loss_spike", MODEL)
        assert found.value == losses[at]
        assert found.usual == pytest.approx(np.median(recent))
        assert found.times > 6


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), power=st.integers(-40, 40))
def test_the_unit_of_the_loss_does_not_matter(seed: int, power: int) -> None:
    rng = np.random.default_rng(seed)
    losses = 2 + 0.1 * rng.standard_t(2, 300)  # heavy tails: some spikes
    scaled = triggers(losses * 2.0**power)
    assert [t.step for t in scaled] == [t.step for t in triggers(losses)]


@pytest.mark.parametrize("value", [math.log(2), 0.0, -3.0])
def test_a_loss_that_does_not_move_has_no_spikes_of_rounding(value: float) -> None:
    rng = np.random.default_rng(0)
    assert not triggers(value * (1 + 1e-6 * rng.standard_normal(STEPS)))
    assert triggers(np.append(np.full(50, value), value + 1.0))


def test_only_the_first_of_a_row_of_non_finite_losses_is_a_trigger() -> None:
    losses = np.array([1.0, math.nan, math.nan, math.inf, 1.0, 1.0, math.inf, math.nan])
    assert [(t.step, t.kind) for t in triggers(losses)] == [
        (1, "non_finite_loss"),
        (6, "non_finite_loss"),
    ]
    band = LossBand()
    for step in range(40):
        band.judge(step, 1.0 + 0.01 * (step % 3))
    assert band.judge(40, math.nan) is not None
    assert band.judge(41, 3.0) is not None  # the band has not become NaN


def ratios(**values: float) -> list[Measurement]:
    return [
        Measurement(0, "moment_ratio", name, Estimate(value)) for name, value in values.items()
    ] + [Measurement(0, "gradient_norm", "a", Estimate(1e9))]


def test_a_moment_ratio_far_above_its_own_past_is_a_trigger_and_names_the_component() -> None:
    seen = MomentRatios()
    for step, value in enumerate([1.0, 1.2, 0.9, 1.6, 2.0]):
        assert seen.judge(step, ratios(a=value, b=10 * value, c=math.nan)) is None
    assert seen.judge(5, ratios(a=3.5, b=20.0)) is None  # not four times the median of either
    found = seen.judge(6, ratios(a=5.5, b=100.0, c=50.0))
    assert found is not None
    assert (found.kind, found.component, found.step) == ("moment_ratio", "b", 6)
    assert found.times == pytest.approx(100.0 / 14.0)


def test_a_ratio_that_rises_from_far_below_one_means_nothing() -> None:
    seen = MomentRatios()
    for step in range(6):
        assert seen.judge(step, ratios(a=0.1)) is None
    assert seen.judge(6, ratios(a=1.5)) is None


# -- in a training ------------------------------------------------------------------------------


class Training:
    """A small classifier on noisy points; ``labels`` says what is asked of it at a step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.truth = torch.randn(8, 4)

    def run(self, steps: int, spoil: Callable[[int, Training], None] | None = None) -> None:
        for step in range(steps):
            points = torch.randn(64, 8)
            labels = (points @ self.truth).argmax(1)
            if spoil is not None:
                spoil(step, self)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(points), labels).backward()
            self.optimizer.step()


def spoil_at(at: int, value: float) -> Callable[[int, Training], None]:
    def spoil(step: int, training: Training) -> None:
        if step == at:
            with torch.no_grad():
                training.model[2].weight.mul_(value)

    return spoil


def watched(tmp_path: Path, steps: int, spoil: Any = None, **options: Any) -> Any:
    """Steps of 50 ms by the schedule's clock, however fast the machine is."""
    training = Training()
    with Watch(tmp_path / "run", **options) as watch:
        watch._monitor.schedule.__class__ = Fifty
        training.run(steps, spoil)
    return watch.log


class Fifty(Schedule):
    """Every step takes 50 ms and every sample 0.2 s."""

    __slots__ = ()

    def plan(self, step: int) -> Plan:
        self.training_s = 0.05 * step
        return super().plan(step)

    def account(self, plan: Plan, seconds: float) -> None:
        super().account(plan, 0.0)

    def learn(self, plan: Plan, seconds: float) -> None:
        super().account(plan, 0.2)
        super().learn(plan, 0.2)


def of_kind(log: Any, kind: str) -> list[Any]:
    return [event for event in log.events if event.kind == kind]


def test_a_healthy_run_triggers_nothing(tmp_path: Path) -> None:
    log = watched(tmp_path, 300)
    assert not of_kind(log, "trigger")
    assert not of_kind(log, "monitor_error")


def test_a_loss_spike_is_measured_at_the_next_step_with_curvature(tmp_path: Path) -> None:
    log = watched(tmp_path, 120, spoil_at(85, -30.0))
    (event, *_) = of_kind(log, "trigger")
    assert (event.step, event.data["seen_at"]) == (86, 85)
    assert event.data["trigger"] == "loss_spike" and event.data["times"] > 6
    assert event.data["value"] == pytest.approx(float(log.losses.value[85]))
    assert f"{event.data['value']:.3g}" in event.message
    assert 86 in log.series("gradient_norm", "0").step
    assert 86 in log.series("update_curvature", MODEL).step
    assert not of_kind(log, "monitor_error")


def test_without_a_budget_the_same_spike_brings_nothing(tmp_path: Path) -> None:
    log = watched(tmp_path, 120, spoil_at(85, -30.0), overhead=0.0)
    assert not of_kind(log, "trigger")
    assert 86 not in log.series("gradient_norm", "0").step


def test_a_loss_that_becomes_non_finite_triggers_once(tmp_path: Path) -> None:
    log = watched(tmp_path, 120, spoil_at(85, math.inf))
    (event,) = of_kind(log, "trigger")
    assert (event.step, event.data["trigger"]) == (86, "non_finite_loss")
    assert not of_kind(log, "monitor_error")


def test_a_gradient_far_above_its_second_moment_triggers_after_the_sample_that_saw_it(
    tmp_path: Path,
) -> None:
    def spoil(step: int, training: Training) -> None:
        if step == 125:  # a guaranteed sample; the loss stays, the gradient does not
            training.model[0].weight.register_hook(lambda g: 50 * g)

    log = watched(tmp_path, 140, spoil)
    (event, *_) = of_kind(log, "trigger")
    assert event.data["trigger"] == "moment_ratio" and event.data["component"] == "0"
    assert event.data["seen_at"] == 125 and event.step == 127
    assert 127 in log.series("update_curvature", MODEL).step


# -- suspicion ----------------------------------------------------------------------------------


class SpectraOnly(Schedule):
    """A spectrum every second sample of two steps."""

    __slots__ = ()

    def plan(self, step: int) -> Plan:
        second = step % 2 == 1
        return Plan(statistics=not second, follow=second, curvature=True, spectrum=True)


def test_a_suspected_component_is_measured_alone_with_more_products_every_other_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[tuple[str, ...], int]] = []
    original = Sample.read_spectrum

    def spy(
        self: Sample, hessian: Any, components: Any, generator: Any, products: int, known: Any
    ) -> None:
        asked.append((tuple(c.name for c in components), products))
        original(self, hessian, components, generator, products, known)

    monkeypatch.setattr(Sample, "read_spectrum", spy)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    with Watch(tmp_path / "run") as watch:
        watch._monitor.schedule.__class__ = SpectraOnly
        for step in range(16):
            if step == 4:
                watch._monitor.suspect(["3", "gone", "1", "3"])
            optimizer.zero_grad()
            model(torch.randn(16, 6)).square().mean().backward()
            optimizer.step()
        log = watch.log
    assert [names for names, _ in asked] == [
        ("0", "1"), ("2", "3"), ("3",), ("4", "0"), ("1",), ("1", "2"), ("3",), ("3", "4"),
    ]  # fmt: skip
    for names, products in asked:
        assert (len(names) == 1) == (products == SUSPECT_PRODUCTS)
        assert len(names) in (1, SPECTRUM_COMPONENTS)
    assert not of_kind(log, "monitor_error")
    # The block of 42 parameters is then known exactly.
    errors = log.series("trace", "3")
    suspected = errors.std_error[errors.step == 4]
    assert suspected.tolist() == [0.0]
    # And its coupling with every other one; exact, too, as none has more directions than columns.
    rows = log.measurements
    coupled = np.flatnonzero(rows.quantity == rows.quantities.index("coupling_norm"))
    pairs: dict[int, set[tuple[str, str]]] = {}
    for i in coupled:
        pair = (rows.components[rows.component[i]], rows.components[rows.other[i]])
        pairs.setdefault(int(rows.step[i]), set()).add(pair)
    of_3, of_1 = ({tuple(sorted((a, str(b)))) for b in range(5) if str(b) != a} for a in "31")
    assert pairs == {4: of_3, 8: of_1, 12: of_3}


@pytest.mark.parametrize("every", [2, 5])
def test_ends_are_sought_from_where_they_were_a_few_steps_ago(
    every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[bool] = []
    original = sample_module.extreme_eigenvalues

    def spy(*arguments: Any, start: torch.Tensor | None = None, **others: Any) -> Any:
        starts.append(start is not None)
        return original(*arguments, start=start, **others)

    monkeypatch.setattr(sample_module, "extreme_eigenvalues", spy)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Watch(tmp_path / "run", every=every) as watch:
        for _ in range(16):
            optimizer.zero_grad()
            model(torch.randn(16, 6)).square().mean().backward()
            optimizer.step()
        assert not of_kind(watch.log, "monitor_error")
    assert len(starts) == 2 * -(-16 // every)  # of two components
    assert starts == [False] * 2 + [every == 2] * (len(starts) - 2)


def test_what_the_findings_so_far_flag_is_suspected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, ...]] = []
    original = Monitor.suspect

    def spy(self: Monitor, components: Any) -> None:
        names = tuple(components)
        told.append(names)
        original(self, names)

    monkeypatch.setattr(Monitor, "suspect", spy)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model[2].parameters(), lr=0.01)  # the first layer is forgotten
    with Watch(tmp_path / "run", announce=lambda line: None) as watch:
        for _ in range(40):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(64, 8)), torch.randint(4, (64,))).backward()
            optimizer.step()
        flagged = {f.component for f in watch.diagnose(write=False).findings}
    assert "0" in flagged
    assert told and all(MODEL not in names for names in told)
    assert any("0" in names for names in told)
