"""The schedule against simulated clocks: what is guaranteed, and what the budget buys."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnoser.monitor import Plan, Schedule


def simulate(schedule: Schedule, steps: int, step_s: float, costs: dict[str, float]) -> list[Plan]:
    """Runs a training of ``step_s`` a step; measuring takes ``costs`` a sample, by its kind."""
    plans = []
    for step in range(steps):
        schedule.steps, schedule.training_s = step, step * step_s
        plan = schedule.plan(step)
        plans.append(plan)
        if plan.follow:
            kind = "spectrum" if plan.spectrum else "interaction" if plan.interaction else "sample"
            schedule.account(plan, costs[kind])
            schedule.learn(plan, costs[kind])
    return plans


@settings(max_examples=30, deadline=None)
@given(
    overhead=st.sampled_from([0.0, 0.01, 0.1, 1.0]),
    step_s=st.floats(1e-4, 2.0),
    relative=st.floats(0.5, 50.0),
)
def test_eight_curvature_measurements_in_200_steps_whatever_they_cost(
    overhead: float, step_s: float, relative: float
) -> None:
    cost = relative * step_s
    plans = simulate(
        Schedule(overhead), 200, step_s, {"sample": cost, "spectrum": cost, "interaction": cost}
    )
    assert sum(plan.curvature and plan.statistics for plan in plans) >= 8


@pytest.mark.parametrize("step_s", [0.05, 0.5])
@pytest.mark.parametrize("overhead", [0.05, 0.10])
def test_the_budget_is_kept_within_a_quarter(step_s: float, overhead: float) -> None:
    costs = {"sample": 4 * step_s, "spectrum": 40 * step_s, "interaction": 30 * step_s}
    schedule = Schedule(overhead)
    plans = simulate(schedule, 2000, step_s, costs)
    spent = schedule.guaranteed_s + schedule.bought_s
    assert 0.75 * overhead <= spent / (2000 * step_s) <= 1.25 * overhead
    assert any(p.spectrum for p in plans)
    assert any(p.interaction for p in plans) == (overhead == 0.10)


@pytest.mark.parametrize("step_s", [0.001, 0.02])
def test_small_steps_buy_at_most_100_microseconds_each(step_s: float) -> None:
    costs = {"sample": 4 * step_s, "spectrum": 40 * step_s, "interaction": 30 * step_s}
    schedule = Schedule(0.10)
    simulate(schedule, 5000, step_s, costs)
    assert 0 < schedule.bought_s <= 100e-6 * 5000


def test_without_a_budget_only_the_guaranteed_measurements_are_made() -> None:
    schedule = Schedule(0.0)
    simulate(schedule, 1000, 0.05, dict.fromkeys(("sample", "spectrum", "interaction"), 0.2))
    assert schedule.bought_s == 0.0 and schedule.guaranteed_s > 0.0


@given(every=st.integers(2, 50))
def test_every_measures_everything_over_two_steps(every: int) -> None:
    schedule = Schedule(0.0, every)
    costs = dict.fromkeys(("sample", "spectrum", "interaction"), 1.0)
    for step, plan in enumerate(simulate(schedule, 101, 0.05, costs)):
        assert plan.statistics == (step % every == 0)
        assert plan.follow == (step % every == 1)
        full = plan.curvature and plan.spectrum and plan.interaction
        assert full == bool(plan) == (step % every in (0, 1))


def test_a_sample_is_two_neighbouring_steps_with_one_plan() -> None:
    costs = {"sample": 0.2, "spectrum": 2.0, "interaction": 1.5}
    plans = simulate(Schedule(0.10), 2000, 0.05, costs)
    for first, second in zip(plans, plans[1:], strict=False):
        assert not (first.statistics and first.follow)
        assert first.statistics == second.follow
        if first.statistics:
            assert first.curvature == second.curvature and first.guaranteed == second.guaranteed
