"""The schedule against simulated clocks: what is guaranteed, and what the budget buys."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diagnoser.monitor import EVERYTHING, Plan, Schedule
from diagnoser.monitor.schedule import MOST_TRIGGERED, TRIGGER_GAP


def simulate(
    schedule: Schedule,
    steps: int,
    step_s: float,
    costs: dict[str, float],
    *,
    ask: Callable[[int], bool] = lambda step: False,
    noise: float = 0.0,
) -> list[Plan]:
    """Runs a training of ``step_s`` a step; measuring takes ``costs`` a sample, by its kind.

    ``ask``: whether something asks for a sample at the end of a step. ``noise``: by which share
    steps and costs vary.
    """
    chance = random.Random(1)
    plans = []
    trained = 0.0
    for step in range(steps):
        schedule.steps, schedule.training_s = step, trained
        plan = schedule.plan(step)
        plans.append(plan)
        if plan.follow:
            cost = costs[plan.turn] * (1 + noise * chance.uniform(-1, 1))
            schedule.account(plan, cost)
            schedule.learn(plan, cost)
        if ask(step):
            schedule.ask(step)
        trained += step_s * (1 + noise * chance.uniform(-1, 1))
    return plans


KINDS = ("statistics", "sample", "spectrum", "interaction")


def relative(step_s: float) -> dict[str, float]:
    return {name: times * step_s for name, times in zip(KINDS, (2, 4, 40, 30), strict=True)}


def always(step: int) -> bool:
    return True


@settings(max_examples=30, deadline=None)
@example(overhead=1.0, step_s=0.0001, relative=37.0)  # one bought right before a guaranteed one
@given(
    overhead=st.sampled_from([0.0, 0.01, 0.1, 1.0]),
    step_s=st.floats(1e-4, 2.0),
    relative=st.floats(0.5, 50.0),
)
def test_eight_curvature_measurements_in_200_steps_whatever_they_cost(
    overhead: float, step_s: float, relative: float
) -> None:
    cost = relative * step_s
    plans = simulate(Schedule(overhead), 200, step_s, dict.fromkeys(KINDS, cost))
    assert sum(plan.curvature and plan.statistics for plan in plans) >= 8


@pytest.mark.parametrize("step_s", [0.05, 0.5])
@pytest.mark.parametrize("overhead", [0.05, 0.10])
def test_after_an_alarm_the_budget_is_kept_within_a_quarter(step_s: float, overhead: float) -> None:
    costs = relative(step_s)
    schedule = Schedule(overhead, alarmed=True)
    plans = simulate(schedule, 2000, step_s, costs)
    spent = schedule.guaranteed_s + schedule.bought_s
    assert 0.75 * overhead <= spent / (2000 * step_s) <= 1.25 * overhead
    assert any(p.spectrum for p in plans)
    assert any(p.interaction for p in plans) == (overhead == 0.10)


@pytest.mark.parametrize("step_s", [0.05, 0.5])
@pytest.mark.parametrize("overhead", [0.05, 0.10])
def test_before_an_alarm_half_of_the_budget_buys_statistics_alone(
    step_s: float, overhead: float
) -> None:
    schedule = Schedule(overhead)
    plans = simulate(schedule, 3000, step_s, relative(step_s))
    spent = schedule.guaranteed_s + schedule.bought_s
    assert 0.75 * overhead / 2 <= spent / (3000 * step_s) <= 1.25 * overhead / 2
    bought = [plan for plan in plans if plan and not plan.guaranteed]
    assert bought and not any(plan.curvature for plan in bought)


@pytest.mark.parametrize("step_s", [0.001, 0.05])
def test_an_alarm_is_followed_by_what_was_saved_for_it(step_s: float) -> None:
    """All of it within the steps that the samples need: nothing has to be earned first."""
    schedule = Schedule(0.10)

    def alarm(step: int) -> bool:
        schedule.alarmed |= step == 3999
        return False

    costs = {name: cost / (40 if step_s < 0.01 else 1) for name, cost in relative(step_s).items()}
    plans = simulate(schedule, 4060, step_s, costs, ask=alarm)
    after = [plan.turn for plan in plans[4000:] if plan.follow]
    assert {"sample", "spectrum", "interaction"} <= set(after)


@pytest.mark.parametrize("step_s", [0.001, 0.02])
def test_small_steps_buy_at_most_100_microseconds_each(step_s: float) -> None:
    costs = relative(step_s)
    schedule = Schedule(0.10)
    simulate(schedule, 5000, step_s, costs)
    assert 0 < schedule.bought_s <= 100e-6 * 5000


def test_without_a_budget_only_the_guaranteed_measurements_are_made() -> None:
    schedule = Schedule(0.0)
    simulate(schedule, 1000, 0.05, dict.fromkeys(KINDS, 0.2))
    assert schedule.bought_s == 0.0 and schedule.guaranteed_s > 0.0


@given(every=st.integers(2, 50))
def test_every_measures_everything_over_two_steps(every: int) -> None:
    schedule = Schedule(0.0, every)
    costs = dict.fromkeys(KINDS, 1.0)
    for step, plan in enumerate(simulate(schedule, 101, 0.05, costs)):
        assert plan.statistics == (step % every == 0)
        assert plan.follow == (step % every == 1)
        full = plan.curvature and plan.spectrum and plan.interaction and plan.norms
        assert full == bool(plan) == (step % every in (0, 1))


@given(
    st.dictionaries(st.integers(0, 50).map(lambda i: 2 * i), st.sets(st.sampled_from(EVERYTHING)))
)
def test_forced_steps_measure_what_each_names_and_nothing_else_is_measured(at) -> None:
    schedule = Schedule(0.10, at=at)
    costs = dict.fromkeys(KINDS, 0.0)
    for step, plan in enumerate(simulate(schedule, 101, 0.05, costs)):
        turns = at.get(step - step % 2) if at else None
        if at:
            assert bool(plan) == (turns is not None)
        if turns is not None:
            assert plan.statistics == (step in at) and plan.curvature
            found = (plan.spectrum, plan.interaction, plan.norms)
            assert found == tuple(turn in turns for turn in EVERYTHING)


@pytest.mark.parametrize("alarmed", [False, True])
def test_a_sample_is_two_neighbouring_steps_with_one_plan(alarmed: bool) -> None:
    plans = simulate(Schedule(0.10, alarmed=alarmed), 2000, 0.05, relative(0.05))
    for first, second in zip(plans, plans[1:], strict=False):
        assert not (first.statistics and first.follow)
        assert first.statistics == second.follow
        if first.statistics:
            assert first.curvature == second.curvature and first.guaranteed == second.guaranteed


# -- triggers -----------------------------------------------------------------------------------


def sampled_at(plans: list[Plan]) -> list[int]:
    return [step for step, plan in enumerate(plans) if plan.triggered and plan.statistics]


@pytest.mark.parametrize("asked", [14, 19, 30, 33, 60, 400])
def test_a_trigger_brings_a_sample_with_curvature_at_the_next_free_step(asked: int) -> None:
    plans = simulate(Schedule(0.10), 500, 0.05, relative(0.05), ask=lambda step: step == asked)
    taken = next(step for step in range(asked + 1, 500) if plans[step].statistics)
    assert plans[taken].curvature
    assert taken == asked + 1 or (taken == asked + 2 and plans[asked + 1].follow)


def test_triggers_are_few_and_apart_however_often_they_ask() -> None:
    steps = sampled_at(simulate(Schedule(0.10), 3000, 0.05, relative(0.05), ask=always))
    # Two of them fell on guaranteed samples.
    assert MOST_TRIGGERED - 2 <= len(steps) <= MOST_TRIGGERED
    assert min(b - a for a, b in pairwise(steps)) >= TRIGGER_GAP


@pytest.mark.parametrize(("overhead", "every"), [(0.0, None), (0.10, 50)])
def test_no_trigger_where_there_is_no_budget_or_measuring_is_forced(
    overhead: float, every: int | None
) -> None:
    schedule = Schedule(overhead, every)
    assert not sampled_at(simulate(schedule, 1000, 0.05, relative(0.05), ask=always))
    assert schedule.triggered_s == 0.0


@settings(max_examples=30, deadline=None)
@given(
    step_s=st.floats(1e-3, 1.0),
    overhead=st.sampled_from([0.01, 0.05, 0.10]),
    cost=st.floats(1.0, 60.0),
)
def test_triggers_spend_at_most_what_400_steps_bring_in_advance(
    step_s: float, overhead: float, cost: float
) -> None:
    """But for one sample that turns out dearer than the guess, before any was made."""
    costs = dict.fromkeys(KINDS, cost * step_s)
    for steps in (50, 300, 1500):
        schedule = Schedule(overhead)
        simulate(schedule, steps, step_s, costs, ask=always)
        allowance = overhead * step_s
        if step_s < 0.030:
            allowance = min(allowance, 100e-6)
        # relative slack: sums of floats
        assert schedule.triggered_s <= allowance * (steps + 400) * (1 + 1e-9)


@pytest.mark.parametrize("step_s", [0.05, 0.5])
@pytest.mark.parametrize("overhead", [0.05, 0.10, 0.20])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_with_triggers_the_budget_is_kept_within_a_quarter_too(
    step_s: float, overhead: float, noise: float
) -> None:
    """From the step on at which the dearest turn, 40 to 60 steps, is a quarter of what was earned.

    The guaranteed and triggered samples have been earned long before.
    """
    chance = random.Random(0)
    schedule = Schedule(overhead)
    shares = []
    warm = int(4 * 40 * (1 + noise) / overhead)

    def ask(step: int) -> bool:
        if step > warm:
            spent = schedule.guaranteed_s + schedule.bought_s + schedule.triggered_s
            shares.append(spent / schedule.training_s)
        return chance.random() < 0.02

    simulate(schedule, 2 * warm, step_s, relative(step_s), ask=ask, noise=noise)
    assert schedule.triggered_s > 0
    assert 0.75 * overhead <= min(shares) and max(shares) <= 1.25 * overhead


@pytest.mark.parametrize("step_s", [0.001, 0.02])
def test_small_steps_with_triggers_stay_within_their_microseconds(step_s: float) -> None:
    schedule = Schedule(0.10)
    simulate(schedule, 5000, step_s, relative(step_s), ask=always)
    assert schedule.triggered_s > 0
    assert schedule.bought_s + schedule.triggered_s <= 100e-6 * 5000
