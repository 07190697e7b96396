"""What counts as better: the difference of paired losses, its error, and the table of decisions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from made_recordings import made_recording

from diagnoser.features import CATALOGUE
from diagnoser.repair_loop.comparing import (
    FEWEST_STEPS,
    MOST_STEPS,
    Continuation,
    Judged,
    State,
    before,
    continuation,
    difference,
    judge,
    trial_steps,
)
from diagnoser.rules import load_rules, shipped_rules_directory
from diagnoser.table import Array
from diagnoser.types import Arm, Evidence, Finding

SOURCE = "rule:one"
losses_of = st.lists(st.floats(0.01, 100.0), min_size=8, max_size=60)


def came_to(
    losses: Sequence[float] | Array,
    state: State = "cured",
    *,
    firing: Sequence[str] = (),
    problem: str = "",
    observed: float | None = None,
    comparison: str = ">",
) -> Continuation:
    evidence = ()
    if observed is not None:
        evidence = (Evidence("update_ratio", observed, comparison, 1.0, (5, 5)),)
    values = np.asarray(losses, dtype=float)
    arm = Arm(len(values), 0.0, evidence, tuple(firing))
    return Continuation(arm, values, {SOURCE: state}, problem)


def paired(gain: float, noise: float = 1e-4, steps: int = 60) -> tuple[Array, Array]:
    """Losses of a repaired training and its twin that differ by a share of the latter."""
    twin = 2.0 + 0.3 * np.sin(np.arange(steps))
    wobble = noise * np.where(np.arange(steps) % 2, 1.0, -1.0)
    return twin + gain * twin[steps // 2 :].mean() + wobble, twin


# -- the difference ------------------------------------------------------------------------------


@given(losses_of)
def test_the_same_losses_differ_by_nothing_without_error(losses):
    found = difference(came_to(losses), came_to(losses))
    assert (found.value, found.std_error) == (0.0, 0.0)


def test_a_difference_is_a_share_of_the_loss_without_the_repair_on_the_last_half():
    twin = [9.0] * 10 + [4.0] * 10
    repaired = [1.0] * 10 + [3.0] * 10
    found = difference(came_to(repaired), came_to(twin))
    assert (found.value, found.std_error, found.samples) == (-0.25, 0.0, 10)


def test_the_error_of_independent_differences_is_that_of_their_mean():
    gaps = np.tile([1.0, -1.0], 20)  # neighbours of opposite sign carry nothing over
    found = difference(came_to(10 + gaps), came_to([10.0] * 40))
    assert found.value == pytest.approx(0.0, abs=1e-12)
    assert found.std_error == pytest.approx(np.std(gaps[20:], ddof=1) / math.sqrt(20) / 10)


@given(losses_of, losses_of, st.floats(0.001, 1000.0))
@settings(deadline=None)
def test_the_unit_of_the_loss_does_not_matter(a, b, unit):
    one = difference(came_to(a), came_to(b))
    other = difference(came_to(np.array(a) * unit), came_to(np.array(b) * unit))
    assert other.value == pytest.approx(one.value, rel=1e-6, abs=1e-9, nan_ok=True)
    assert other.std_error == pytest.approx(one.std_error, rel=1e-6, abs=1e-9, nan_ok=True)


@given(losses_of, losses_of, st.floats(-5.0, 5.0))
@settings(deadline=None)
def test_a_shift_of_both_moves_the_share_by_its_base_alone(a, b, shift):
    count = min(len(a), len(b))
    a, b = np.array(a[:count]), np.array(b[:count])
    half = b[count - math.ceil(count / 2) :]
    assume(abs(half.mean()) > 0.1 and abs(half.mean() + shift) > 0.1)
    one, other = (
        difference(came_to(a), came_to(b)),
        difference(came_to(a + shift), came_to(b + shift)),
    )
    ratio = abs(half.mean()) / abs(half.mean() + shift)
    assert other.value == pytest.approx(one.value * ratio, rel=1e-6, abs=1e-8)
    assert other.std_error == pytest.approx(one.std_error * ratio, rel=1e-4, abs=1e-8)


@given(losses_of, losses_of)
@settings(deadline=None)
def test_turned_around_it_has_the_other_sign(a, b):
    one, other = difference(came_to(a), came_to(b)), difference(came_to(b), came_to(a))
    assert one.value * other.value <= 0.0


def test_of_two_lengths_the_steps_that_both_made_are_compared():
    longer = [2.0] * 10 + [100.0] * 30
    found = difference(came_to(longer), came_to([4.0] * 10))
    assert (found.value, found.samples) == (-0.5, 5)


@pytest.mark.parametrize("count", [0, 1, 6])
def test_too_few_steps_are_no_number(count):
    found = difference(came_to([1.0] * count), came_to([2.0] * 40))
    assert math.isnan(found.value) and math.isnan(found.std_error or math.nan)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_loss_that_is_no_number_makes_no_number(wrong):
    losses = [1.0] * 30
    with np.errstate(invalid="ignore"):
        found = difference(came_to([*losses[:-1], wrong]), came_to(losses))
    assert not math.isfinite(found.value)


@pytest.mark.parametrize("carried", [0.0, 0.3, 0.6])
def test_intervals_hold_the_truth_as_often_as_they_say(carried):
    """AR(1) noise on the differences, steps as in a trial; 1.96 errors are to hold 95 %."""
    random = np.random.default_rng(7)
    true, held, runs = 0.05, 0, 600
    for _ in range(runs):
        noise = np.zeros(160)
        for i, shock in enumerate(random.normal(0, 0.1, 160)):
            noise[i] = carried * noise[i - 1] + shock if i else shock
        found = difference(came_to(1.0 + true + noise), came_to(np.ones(160)))
        assert found.std_error is not None
        held += abs(found.value - true) <= 1.96 * found.std_error
    assert 0.89 <= held / runs <= 0.99


@pytest.mark.parametrize(("carried", "most"), [(0.0, 0.015), (0.3, 0.015), (0.6, 0.05)])
def test_a_repair_that_does_nothing_is_hardly_ever_kept(carried, most):
    """2.6 errors are one in 200; of so few steps much correlation is known badly."""
    random = np.random.default_rng(11)
    kept, runs = 0, 400
    for _ in range(runs):
        noise = np.zeros(FEWEST_STEPS)
        for i, shock in enumerate(random.normal(0, 0.05, FEWEST_STEPS)):
            noise[i] = carried * noise[i - 1] + shock if i else shock
        kept += judge(came_to(1 + noise), came_to(np.ones(FEWEST_STEPS)), SOURCE, local=True).keep
    assert kept / runs <= most


# -- how long ------------------------------------------------------------------------------------


def line(share: float) -> Array:
    return 2.0 - 0.01 * np.arange(20) + 2.0 * share * np.tile([1.0, -1.0], 10)


@pytest.mark.parametrize("losses", [[], [1.0] * 4, [math.nan] * 20, [math.nan] * 16 + [1.0] * 4])
def test_without_losses_a_trial_is_as_short_as_it_may_be(losses):
    steps, why = trial_steps(np.array(losses))
    assert steps == FEWEST_STEPS
    assert why == f"{FEWEST_STEPS} steps: too few losses to tell their noise"


def test_losses_on_a_line_need_the_fewest_steps_however_steep():
    for slope in (0.0, -0.05, 0.05):
        steps, why = trial_steps(5.0 + slope * np.arange(20))
        assert steps == FEWEST_STEPS
        assert "scatter by 0%" in why


def test_more_noise_takes_more_steps_and_never_more_than_the_most():
    counts = [trial_steps(line(share))[0] for share in (0.0, 0.1, 0.2, 0.3, 1.0, 100.0)]
    assert counts == sorted(counts)
    assert counts[0] == FEWEST_STEPS and counts[-1] == MOST_STEPS
    assert FEWEST_STEPS < trial_steps(line(0.3))[0] < MOST_STEPS


def test_the_reason_tells_the_noise_and_what_is_to_be_told_from_it():
    steps, why = trial_steps(line(0.25))
    assert why.startswith(f"{steps} steps: losses scatter by ")
    assert why.endswith("from batch to batch, and a change of 10% is to be told from that")


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(math.inf), max_size=40))
@settings(deadline=None)
def test_any_losses_make_a_number_of_steps_within_bounds(losses):
    steps, why = trial_steps(np.array(losses, dtype=float))
    assert FEWEST_STEPS <= steps <= MOST_STEPS
    assert why.startswith(f"{steps} steps: ")


# -- the table of decisions ----------------------------------------------------------------------

# What the loss has to do at least, by what became of the finding: kept at the first, not at the
# second (shares of the loss, with next to no noise).
TABLE = {
    # state, latent, local: kept, not kept
    ("cured", False, False): (-0.04, -0.02),
    ("cured", False, True): (-0.007, -0.003),
    ("cured", True, False): (0.02, 0.04),
    ("cured", True, True): (0.02, 0.04),
    ("eased", False, False): (-0.04, -0.02),
    ("eased", False, True): (-0.04, -0.02),
    ("eased", True, False): (-0.04, -0.02),
    ("eased", True, True): (-0.04, -0.02),
    ("stands", False, False): (-0.16, -0.14),
    ("stands", False, True): (-0.16, -0.14),
    ("stands", True, False): (-0.16, -0.14),
    ("stands", True, True): (-0.16, -0.14),
    ("unknown", False, False): (-0.04, -0.02),
    ("unknown", False, True): (-0.007, -0.003),
    ("unknown", True, False): (-0.04, -0.02),
    ("unknown", True, True): (-0.007, -0.003),
}
SAYS = {
    "cured": "the finding is gone",
    "eased": "the finding has eased",
    "stands": "the finding stands as it did",
    "unknown": "the finding is not about the present state",
}


def judged(state: str, gain: float, **options: bool) -> Judged:
    repaired, twin = paired(gain)
    if state in ("cured", "unknown"):
        one = came_to(repaired, "cured" if state == "cured" else "unknown")
        return judge(one, came_to(twin, "stands"), SOURCE, **options)
    observed = 2.0 if state == "eased" else 4.0
    one = came_to(repaired, "stands", observed=observed)
    return judge(one, came_to(twin, "stands", observed=3.0), SOURCE, **options)


@pytest.mark.parametrize(("state", "latent", "local"), TABLE)
def test_what_the_loss_has_to_do(state, latent, local):
    assert set(TABLE) == set(itertools.product(SAYS, (False, True), (False, True)))
    enough, too_little = TABLE[state, latent, local]
    for gain, keep in ((enough, True), (too_little, False)):
        one = judged(state, gain, latent=latent, local=local)
        assert one.keep is keep, one
        assert one.reason.startswith(f"{SAYS[state]}; the loss is {abs(gain):.1%} ")
        assert ("lower" if gain < 0 else "higher") in one.reason
        assert one.reason.endswith(": no clear gain") is not keep
        assert one.difference is not None
        assert one.difference.value == pytest.approx(gain, abs=1e-4)


def test_a_gain_within_its_noise_is_none():
    random = np.random.default_rng(3)
    twin = np.full(60, 2.0)
    noisy = judge(came_to(2.0 * 0.95 + random.normal(0, 0.5, 60)), came_to(twin), SOURCE)
    quiet = judge(came_to(2.0 * 0.95 + random.normal(0, 0.01, 60)), came_to(twin), SOURCE)
    assert (noisy.keep, quiet.keep) == (False, True)


@pytest.mark.parametrize(
    ("comparison", "now", "then", "state"),
    [
        (">", 2.0, 3.0, "eased"),
        (">", 4.0, 3.0, "stands"),
        ("<", 4.0, 3.0, "eased"),
        ("<", 2.0, 3.0, "stands"),
        (">", 3.0, 3.0, "unknown"),  # nothing that was measured in both has moved
    ],
)
def test_a_finding_that_stands_has_eased_where_its_evidence_moved_the_right_way(
    comparison, now, then, state
):
    repaired, twin = paired(-0.01)
    one = came_to(repaired, "stands", observed=now, comparison=comparison)
    other = came_to(twin, "stands", observed=then, comparison=comparison)
    assert judge(one, other, SOURCE).reason.startswith(SAYS[state])


def test_a_finding_whose_evidence_was_not_measured_anew_says_nothing_of_now():
    repaired, twin = paired(-0.01)
    one, other = came_to(repaired, "stands"), came_to(twin, "stands")
    assert judge(one, other, SOURCE).reason.startswith(SAYS["unknown"])


@pytest.mark.parametrize("gain", [-0.5, 0.0])
def test_what_brings_a_new_finding_is_not_kept_whatever_the_loss_does(gain):
    repaired, twin = paired(gain)
    one = came_to(repaired, firing=["rule:new", "rule:old"])
    found = judge(one, came_to(twin, "stands", firing=["rule:old"]), SOURCE, local=True)
    assert not found.keep and math.isnan(found.expected)
    assert found.reason.startswith("it brought rule:new; the loss is ")


def test_what_the_twin_has_too_is_not_new():
    repaired, twin = paired(-0.5)
    one = came_to(repaired, firing=["rule:old"])
    assert judge(one, came_to(twin, "stands", firing=["rule:old"]), SOURCE).keep


def test_a_repair_that_ends_in_nan_is_not_kept_even_if_the_twin_does_too():
    broken = came_to([1.0, math.nan], problem="the loss became NaN or infinite")
    for twin in (came_to([1.0] * 40), broken):
        found = judge(broken, twin, SOURCE)
        assert (found.keep, found.reason) == (False, "the loss became NaN or infinite")
        assert found.difference is None


def test_what_outlives_a_twin_that_ends_in_nan_is_kept_without_a_number():
    broken = came_to([1.0, math.nan], problem="the loss became NaN or infinite")
    found = judge(came_to([1.0] * 40), broken, SOURCE)
    assert found.keep and found.difference is None
    assert found.reason == "without it, the loss became NaN or infinite"


def test_too_few_steps_are_not_compared():
    found = judge(came_to([1.0] * 4), came_to([2.0] * 4), SOURCE)
    assert not found.keep
    assert found.reason == "too few steps were made to compare losses"


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["repaired", "twin"])
def test_a_loss_that_is_no_number_is_never_a_gain(wrong, which):
    losses = np.ones(40)
    broken = np.where(np.arange(40) == 39, wrong, losses)
    pair = (broken, losses) if which == "repaired" else (losses, broken)
    with np.errstate(invalid="ignore"):
        found = judge(came_to(pair[0]), came_to(pair[1]), SOURCE, latent=True, local=True)
    assert not found.keep and "%" not in found.reason


def test_a_gain_that_grows_may_still_come_where_the_finding_does_not_stand():
    steps = np.arange(60)
    twin = np.full(60, 2.0)
    growing, fading = twin - 0.001 * steps, twin + 0.05 - 0.0005 * (60 - steps)
    assert judge(came_to(growing), came_to(twin), SOURCE).expected < 0
    assert judge(came_to(fading), came_to(twin), SOURCE).expected > 0
    standing = judge(
        came_to(growing, "stands", observed=4.0), came_to(twin, "stands", observed=3.0), SOURCE
    )
    assert not standing.keep and math.isnan(standing.expected)
    kept = judge(came_to(0.5 * growing), came_to(twin), SOURCE)
    assert kept.keep and math.isnan(kept.expected)


# -- what a continuation came to -----------------------------------------------------------------

COMPONENTS = {"head": ("linear", "head", 4), "body": ("linear", "body", 4)}
(RULE,) = [
    rule
    for rule in load_rules(shipped_rules_directory("diagnoser"), CATALOGUE)
    if rule.id == "missing-zero-grad"
]
FINDING = Finding(
    RULE.fault,
    "model",
    "high",
    0,
    RULE.source,
    "",
    (),
    (Evidence("carried_gradients", 1.0, ">", 0.5, (0, 5)),),
)


def carried(values: Sequence[float | None], losses: Sequence[float]) -> Continuation:
    series = {"carried_gradients": {"model": values}}
    recording = made_recording(COMPONENTS, series, losses)
    return continuation(recording, 10, [RULE], [FINDING])


@pytest.mark.parametrize(
    ("values", "state", "firing"),
    [
        ([1.0, 1.0, 1.0, 1.0], "stands", (RULE.source,)),
        ([1.0, 1.0, 1.0, 0.0], "cured", ()),  # the last measurement alone counts
        ([1.0, 1.0, 0.0, 1.0], "stands", (RULE.source,)),
        ([1.0, 1.0, None, None], "unknown", ()),
        ([1.0, 1.0, math.nan, math.nan], "unknown", ()),
    ],
)
def test_a_finding_is_judged_by_the_last_measurement_of_the_trial(values, state, firing):
    found = carried(values, [2.0] * 10 + [1.0] * 10)
    assert (found.states[RULE.source], found.arm.firing) == (state, firing)


def test_the_losses_of_the_trial_alone_are_compared():
    recording = made_recording(COMPONENTS, {}, [9.0] * 10 + [2.0] * 4 + [1.0] * 4)
    found = continuation(recording, 10, [], [])
    assert found.losses.tolist() == [2.0] * 4 + [1.0] * 4
    assert (found.arm.steps, found.arm.loss) == (8, 1.0)
    assert not found.problem and not found.diverged


def test_a_loss_that_is_not_finite_is_a_problem_and_stays_what_it_is():
    recording = made_recording(COMPONENTS, {}, [1.0] * 10 + [1.0, math.nan])
    found = continuation(recording, 10, [], [])
    assert found.diverged and found.problem == "the loss became NaN or infinite"
    assert math.isnan(found.arm.loss)


def test_no_step_at_all_has_no_loss():
    found = continuation(made_recording(COMPONENTS, {}, [1.0] * 5), 10, [], [], "it died")
    assert found.problem == "it died"
    assert found.arm.steps == 0 and math.isnan(found.arm.loss)


def test_how_the_training_stood_before():
    recording = made_recording(COMPONENTS, {}, [9.0] * 10 + [2.0] * 5)
    arm = before(recording, [FINDING], 10)
    assert (arm.steps, arm.loss) == (5, 2.0)
    assert arm.evidence == FINDING.evidence and arm.firing == (RULE.source,)
    nothing = before(made_recording(COMPONENTS, {}), [], 10)
    assert nothing.steps == 0 and math.isnan(nothing.loss)
