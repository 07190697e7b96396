"""One round of trials, driven by hand: what is asked for, what is kept, what is written down."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from made_recordings import EVERY, made_recording

from diagnoser.diagnosis import attempt_data
from diagnoser.features import CATALOGUE, feature_tables
from diagnoser.repair_loop import AUTOTRAINER, DIAGNOSER, Plan, Situation, Strategy
from diagnoser.repair_loop.comparing import FEWEST_STEPS
from diagnoser.repair_loop.loop import (
    LONGER,
    Decision,
    Ran,
    Trial,
    kept_without_trial,
    round_of_trials,
)
from diagnoser.repair_loop.planning import MOST_PLANS
from diagnoser.rules import load_rules, shipped_rules_directory
from diagnoser.types import Attempt, Evidence, Finding, Repair

(RULE,) = [
    rule
    for rule in load_rules(shipped_rules_directory("diagnoser"), CATALOGUE)
    if rule.id == "missing-zero-grad"
]
SO_FAR = 20  # steps
EVIDENCE = Evidence("carried_gradients", 1.0, ">", 0.5, (0, 5))
FINDING = Finding(RULE.fault, "model", "high", 0, RULE.source, "", (), (EVIDENCE,))
COMPONENTS = {"head": ("linear", "head", 4)}
SHORT = FEWEST_STEPS

Losses = Callable[[int], Sequence[float]]  # of a number of steps


def plan(name: str, *, local: bool = True, source: str = RULE.source) -> Plan:
    component = "head" if local else "model"
    action = Repair("scale_learning_rate", component, {"factor": 0.5})
    made = {"scale": action, "reinitialize": Repair("reinitialize", "head")}
    actions = (made.get(name, Repair("clip_gradient", "head", {"norm": float(len(name))})),)
    return Plan(actions, f"for {name}", source, component)


def flat(loss: float, noise: float = 0.0) -> Losses:
    return lambda steps: loss + noise * np.where(np.arange(steps) % 2, 1.0, -1.0)


def recording_of(losses: Sequence[float], carried: float, *, first: int = 0):
    """A run so far with the finding, and a trial behind it in which it has the value given."""
    whole = [2.0] * SO_FAR + list(losses)
    measured = [1.0 if EVERY * k < SO_FAR else carried for k in range(len(whole) // EVERY)]
    return made_recording(COMPONENTS, {"carried_gradients": {"model": measured}}, whole)


def situation(step: int = SO_FAR - 1, finding: Finding = FINDING) -> Situation:
    recording = recording_of([], 1.0)
    return Situation([finding], recording, feature_tables(recording), step, None)


@dataclass
class Results:
    """What each continuation comes to; the key is the derivation of its plan."""

    plans: Sequence[Plan]
    losses: dict[str, Losses] = field(default_factory=dict)
    cures: Collection[str] = ()
    problems: dict[str, str] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, int]] = field(default_factory=list)

    def name(self, trial: Trial) -> str:
        if not trial.actions:
            return "twin"
        return next(p.derivation for p in self.plans if p.actions == trial.actions)

    def ran(self, trial: Trial) -> Ran:
        name = self.name(trial)
        self.asked.append((name, trial.steps))
        losses = self.losses.get(name, flat(2.0))(trial.steps)
        if name in self.problems and not len(losses):
            return Ran(None, self.problems[name])
        carried = 0.0 if name in self.cures else 1.0
        recording, problem = recording_of(losses, carried), self.problems.get(name, "")
        return Ran(recording, problem, batches=3, stopped=self.stopped.get(name, ""))

    def drive(
        self,
        of: Situation | None = None,
        strategy: Strategy = DIAGNOSER,
        tried: Collection[Sequence[Repair]] = (),
    ) -> Decision:
        fixed = replace(strategy, plans=lambda _: self.plans)
        trials = round_of_trials(of or situation(), [RULE], tried, "in pairs", fixed)
        try:
            trial = next(trials)
            while True:
                trial = trials.send(self.ran(trial))
        except StopIteration as stop:
            return stop.value


A, B, C = plan("a"), plan("bb"), plan("ccc")
ALL_CURE = ("for a", "for bb", "for ccc")


def test_the_twin_comes_first_and_all_take_the_same_steps():
    results = Results([A, B, C])
    results.drive()
    assert results.asked == [("twin", SHORT), *((name, SHORT) for name in ALL_CURE)]


def test_the_best_is_kept():
    losses = {"for a": flat(1.5, 0.01), "for bb": flat(1.0, 0.01), "for ccc": flat(1.7, 0.01)}
    results = Results([A, B, C], losses, ALL_CURE)
    decision = results.drive()
    assert decision.plan is B and decision.problem == ""
    assert [(a.actions, a.kept) for a in decision.attempts] == [
        (A.actions, False),
        (B.actions, True),
        (C.actions, False),
    ]
    for attempt in (decision.attempts[0], decision.attempts[2]):
        assert attempt.reason.endswith("; clip_gradient did better")


def test_of_what_is_equally_good_the_first_planned_is_kept():
    losses = {"for a": flat(1.01, 0.3), "for bb": flat(1.0, 0.3)}  # within one standard error
    assert Results([A, B], losses, ALL_CURE).drive().plan is A
    losses = {"for a": flat(1.2, 0.01), "for bb": flat(1.0, 0.01)}
    assert Results([A, B], losses, ALL_CURE).drive().plan is B


def test_nothing_is_kept_that_does_not_help():
    decision = Results([A, B], {}, ALL_CURE).drive()
    assert decision.plan is None
    assert [a.kept for a in decision.attempts] == [False, False]
    assert all("no clear gain" in a.reason for a in decision.attempts)


def test_what_was_tried_is_not_tried_again():
    results = Results([A, B, C], {"for a": flat(0.5)}, ALL_CURE)
    decision = results.drive(tried=[A.actions])
    assert [name for name, _ in results.asked] == ["twin", "for bb", "for ccc"]
    assert decision.plan is None


@pytest.mark.parametrize(
    ("factor", "is_tried"), [(0.5, False), (0.45, False), (0.6, False), (0.3, True), (0.9, True)]
)
def test_numbers_that_a_later_step_derives_anew_make_no_new_action(factor, is_tried):
    earlier = (Repair("scale_learning_rate", "head", {"factor": factor}),)
    results = Results([plan("scale")])
    results.drive(tried=[earlier])
    assert bool(results.asked) == is_tried


def test_where_all_was_tried_nothing_is_run():
    results = Results([A, B])
    decision = results.drive(tried=[A.actions, B.actions])
    assert results.asked == []
    assert decision == Decision((), None, "no repair is left to try")


@pytest.mark.parametrize(("step", "count"), [(19, 6), (0, 6), (500, 6)])
def test_a_round_has_at_most_so_many_plans(step, count):
    many = [plan("x" * (k + 1)) for k in range(10)]
    results = Results(many)
    results.drive(situation(step))
    assert len(results.asked) == 1 + count == 1 + MOST_PLANS


def test_a_dear_trial_leaves_fewer_plans():
    """Noisy losses take twice the steps; 400 and two for each made so far are for all arms."""
    noisy = made_recording(COMPONENTS, {}, 2.0 + np.tile([1.9, -1.9], 10))
    of = Situation([FINDING], noisy, feature_tables(noisy), SO_FAR - 1, None)
    results = Results([plan("x" * (k + 1)) for k in range(10)])
    results.drive(of)
    (steps,) = {steps for _, steps in results.asked}
    assert steps == 80
    assert len(results.asked) == (400 + 2 * (SO_FAR - 1)) // 80
    assert sum(s for _, s in results.asked) <= 400 + 2 * (SO_FAR - 1)


def sinking(steps: int) -> Sequence[float]:
    """Higher than the twin for some steps, and lower from then on."""
    return 2.1 - 0.004 * np.arange(steps)


def test_a_gain_that_may_still_come_gets_three_times_the_steps():
    results = Results([A, B], {"for a": sinking}, ALL_CURE)
    decision = results.drive()
    assert results.asked == [
        ("twin", SHORT),
        ("for a", SHORT),
        ("for bb", SHORT),
        ("twin", LONGER * SHORT),
        ("for a", LONGER * SHORT),
    ]
    assert decision.plan is A
    (of_b, of_a) = decision.attempts
    assert (of_a.actions, of_a.kept) == (A.actions, True)
    assert of_a.after is not None and of_a.after.steps == LONGER * SHORT
    assert of_a.twin is not None and of_a.twin.steps == LONGER * SHORT
    assert of_b.twin is not None and of_b.twin.steps == SHORT


def test_of_each_sort_the_most_promising_gets_them():
    losses = {
        "for a": lambda n: 2.5 - 0.004 * np.arange(n),
        "for bb": sinking,
        "for ccc": lambda n: 2.2 - 0.004 * np.arange(n),
    }
    results = Results([A, B, C], losses, ALL_CURE)
    results.drive()
    again = [name for name, steps in results.asked if steps == LONGER * SHORT]
    assert again == ["twin", "for bb"]  # none of the three learns weights anew


def test_they_do_not_where_something_is_kept_already():
    losses = {"for a": sinking, "for bb": flat(1.0, 0.01)}
    results = Results([A, B], losses, ALL_CURE)
    assert results.drive().plan is B
    assert len(results.asked) == 3


PATCH, ANEW = plan("scale"), plan("reinitialize")
BOTH_CURE = ("for scale", "for reinitialize")
AT_ONCE = {"for scale": flat(1.9, 0.01)}


def in_vain(steps: int) -> Sequence[float]:
    """Sinks for as long as a short trial takes."""
    return np.where(np.arange(steps) < SHORT, sinking(steps), 2.0)


def test_weights_on_their_way_past_what_is_worth_keeping_are_waited_for():
    results = Results([ANEW, PATCH], {**AT_ONCE, "for reinitialize": sinking}, BOTH_CURE)
    decision = results.drive()
    short = [("twin", SHORT), ("for reinitialize", SHORT), ("for scale", SHORT)]
    long = [("twin", LONGER * SHORT), ("for scale", LONGER * SHORT)]
    assert results.asked == [*short, *long, ("for reinitialize", LONGER * SHORT)]
    assert decision.plan is ANEW
    assert all(a.after and a.after.steps == LONGER * SHORT for a in decision.attempts)


def test_what_was_worth_keeping_is_kept_where_they_do_not_get_there():
    results = Results([ANEW, PATCH], {**AT_ONCE, "for reinitialize": in_vain}, BOTH_CURE)
    assert results.drive().plan is PATCH
    assert len(results.asked) == 6


def test_a_gain_that_does_not_last_beside_them_is_not_kept():
    fading: Losses = lambda n: flat(1.9 if n == SHORT else 2.0, 0.01)(n)  # noqa: E731
    results = Results([ANEW, PATCH], {"for scale": fading, "for reinitialize": sinking}, BOTH_CURE)
    assert results.drive().plan is ANEW


@pytest.mark.parametrize("anew", [flat(1.95, 0.3), lambda n: 2.5 - 0.004 * np.arange(n)])
def test_they_are_not_waited_for_where_they_would_not_get_past(anew):
    results = Results([ANEW, PATCH], {**AT_ONCE, "for reinitialize": anew}, BOTH_CURE)
    assert results.drive().plan is PATCH
    assert len(results.asked) == 3


def test_nor_where_what_is_kept_learns_anew_itself():
    also = Plan((Repair("roll_back", "head"),), "for roll_back", RULE.source, "head")
    losses = {"for roll_back": flat(1.9, 0.01), "for reinitialize": sinking}
    results = Results([ANEW, also], losses, (*BOTH_CURE, "for roll_back"))
    assert results.drive().plan is also
    assert len(results.asked) == 3


def test_of_a_longer_trial_only_those_are_kept_that_were_in_it():
    """What was worth keeping in a short trial is no match for the gain of a long one."""
    other = plan("bb")
    fading: Losses = lambda n: flat(1.8 if n == SHORT else 2.0, 0.01)(n)  # noqa: E731
    losses = {"for scale": fading, "for bb": flat(1.9, 0.01), "for reinitialize": sinking}
    cures = (*BOTH_CURE, "for bb")
    decision = Results([ANEW, PATCH, other], losses, cures).drive()
    assert decision.plan is ANEW
    losses["for reinitialize"] = in_vain
    assert Results([ANEW, PATCH, other], losses, cures).drive().plan is None


SPARE = replace(plan("ccc"), spare=True)


def test_a_spare_plan_is_kept_only_where_no_other_is_worth_it():
    losses = {"for a": flat(1.9, 0.01), "for ccc": flat(1.0, 0.01)}
    assert Results([SPARE, A], losses, ALL_CURE).drive().plan is A
    results = Results([SPARE, A], {**losses, "for a": flat(2.5, 0.01)}, ALL_CURE)
    assert results.drive().plan is SPARE
    assert len(results.asked) == 3


def test_it_has_to_prove_itself_beside_another_that_may_gain():
    losses = {"for a": sinking, "for ccc": flat(1.0, 0.01)}
    results = Results([SPARE, A], losses, ALL_CURE)
    assert results.drive().plan is A
    assert results.asked[3:] == [(n, LONGER * SHORT) for n in ("twin", "for ccc", "for a")]
    losses["for a"] = in_vain
    assert Results([SPARE, A], losses, ALL_CURE).drive().plan is SPARE


SAVED = "it would have saved a checkpoint"


@pytest.mark.parametrize("made", [0, 3, SHORT // 2 - 1])
@pytest.mark.parametrize("because", ["stopped", "problems"])
def test_where_the_training_cannot_be_continued_nothing_is_compared_and_it_is_said(made, because):
    results = Results([A, B], {"twin": lambda _: [2.0] * made}, ALL_CURE)
    setattr(results, because, {"twin": SAVED})
    decision = results.drive()
    assert [name for name, _ in results.asked] == ["twin"]
    assert decision.plan is None and decision.attempts == ()
    assert decision.problem == f"the training cannot be continued for a trial: {SAVED}"


@pytest.mark.parametrize(("loss", "kept"), [(1.0, True), (2.0, False)])
def test_what_was_stopped_behind_half_of_the_steps_is_compared_on_those(loss, kept):
    half = {"twin": lambda n: flat(2.0, 0.01)(n // 2), "for a": lambda n: flat(loss, 0.01)(n // 2)}
    results = Results([A], half, ALL_CURE, stopped={"twin": SAVED, "for a": SAVED})
    decision = results.drive()
    assert (decision.plan is A) is kept
    (attempt,) = decision.attempts
    assert attempt.difference is not None and attempt.difference.samples == SHORT // 4
    assert attempt.reason.startswith("the finding is gone; the loss is ")


def test_a_repair_that_was_stopped_early_is_not_kept():
    losses = {"for a": lambda n: flat(0.5, 0.01)(n // 2 - 1)}
    decision = Results([A], losses, ALL_CURE, stopped={"for a": SAVED}).drive()
    assert [(a.kept, a.reason) for a in decision.attempts] == [(False, SAVED)]


def test_a_repair_with_which_the_script_fails_is_not_kept_however_late():
    losses = {"for a": lambda n: flat(0.5, 0.01)(n - 1)}
    failed = "the script ended with exit code 1"
    decision = Results([A], losses, ALL_CURE, {"for a": failed}).drive()
    assert [(a.kept, a.reason) for a in decision.attempts] == [(False, failed)]


def test_a_repair_without_which_the_script_fails_is_kept():
    failed = "the script ended with exit code 1"
    losses = {"twin": lambda n: [2.0] * (n - 1), "for a": flat(2.0, 0.01)}
    decision = Results([A], losses, ALL_CURE, {"twin": failed}).drive()
    assert [(a.kept, a.reason) for a in decision.attempts] == [(True, f"without it, {failed}")]


def test_a_twin_that_ends_without_a_number_is_a_reason_to_repair():
    losses = {"twin": lambda n: [2.0, math.nan], "for a": flat(2.0, 0.01)}
    decision = Results([A], losses, ("for a",)).drive()
    assert decision.plan is A
    (attempt,) = decision.attempts
    assert attempt.reason == "without it, the loss became NaN or infinite"
    assert attempt.difference is None
    assert attempt.twin is not None and math.isnan(attempt.twin.loss)


def test_a_repair_that_ends_without_a_number_is_not_kept():
    losses = {"for a": lambda n: [1.0, math.nan], "for bb": lambda n: [math.inf] * n}
    decision = Results([A, B], losses, ALL_CURE).drive()
    assert decision.plan is None
    for attempt in decision.attempts:
        assert attempt.reason == "the loss became NaN or infinite"
        assert attempt.difference is None


@pytest.mark.parametrize("said", ["the repair cannot be applied", ""])
def test_a_trial_that_left_no_log_is_not_kept_and_takes_no_other_with_it(said):
    class Broken(Results):
        def ran(self, trial: Trial) -> Ran:
            return Ran(None, said) if self.name(trial) == "for a" else super().ran(trial)

    decision = Broken([A, B], {"for bb": flat(1.0, 0.01)}, ALL_CURE).drive()
    assert decision.plan is B
    assert decision.attempts[0].reason == (said or "it failed")
    assert decision.attempts[0].after is not None
    assert decision.attempts[0].after.steps == 0


def test_a_latent_defect_is_mended_though_the_loss_shows_nothing():
    dead = replace(FINDING, fault="dead_component")
    losses = {"for a": flat(2.0, 0.001)}
    assert Results([A], losses, ("for a",)).drive(situation(finding=dead)).plan is A
    assert Results([A], losses, ("for a",)).drive().plan is None
    assert Results([A], losses, ()).drive(situation(finding=dead)).plan is None


def test_lower_rates_of_the_whole_model_have_to_do_more_than_local_ones():
    losses = {"for scale": flat(1.97, 0.001)}  # 1.5 % lower
    for local, kept in ((True, True), (False, False)):
        one = plan("scale", local=local)
        assert (Results([one], losses, ("for scale",)).drive().plan is one) is kept


def test_every_attempt_is_written_down_with_numbers_and_reasons():
    losses = {"for a": flat(1.5, 0.01), "for bb": flat(3.0, 0.01)}
    decision = Results([A, B], losses, ALL_CURE).drive()
    for attempt, tried, loss in zip(decision.attempts, (A, B), (1.5, 3.0), strict=True):
        assert attempt.step == SO_FAR - 1
        assert (attempt.source, attempt.component) == (RULE.source, "head")
        assert (attempt.actions, attempt.derivation) == (tried.actions, tried.derivation)
        assert attempt.guarantee.startswith(f"in pairs; {SHORT} steps: losses scatter by 0%")
        assert attempt.batches == 3
        assert attempt.before.loss == 2.0 and attempt.before.evidence == (EVIDENCE,)
        assert attempt.before.firing == (RULE.source,)
        assert attempt.twin is not None and attempt.twin.firing == (RULE.source,)
        assert attempt.twin.loss == 2.0 and attempt.twin.steps == SHORT
        assert [e.observed for e in attempt.twin.evidence] == [1.0]
        assert attempt.after is not None and attempt.after.firing == ()
        assert attempt.after.loss == pytest.approx(loss)
        assert [e.observed for e in attempt.after.evidence] == [0.0]
        assert attempt.difference is not None
        assert attempt.difference.value == pytest.approx((loss - 2.0) / 2.0)
        assert attempt_data(attempt)["reason"] == attempt.reason
    kept, other = decision.attempts
    assert kept.reason.startswith("the finding is gone; the loss is 25.0% lower (± ")
    assert other.reason.startswith("the finding is gone; the loss is 50.0% higher (± ")


# -- AutoTrainer's way ---------------------------------------------------------------------------


def test_autotrainer_keeps_the_first_that_leaves_no_symptom_whatever_the_loss():
    losses = {"for bb": flat(3.0), "for ccc": flat(0.5)}
    results = Results([A, B, C], losses, ("for bb", "for ccc"))
    decision = results.drive(strategy=AUTOTRAINER)
    assert [name for name, _ in results.asked] == ["twin", "for a", "for bb"]
    assert decision.plan is B
    assert [a.reason for a in decision.attempts] == [
        f"symptoms left: {RULE.source}",
        "no symptom is left",
    ]
    assert [a.kept for a in decision.attempts] == [False, True]


def test_autotrainer_gives_nothing_more_steps():
    results = Results([A, B], {"for a": sinking}, ())
    decision = results.drive(strategy=AUTOTRAINER)
    assert decision.plan is None and len(results.asked) == 3


def test_autotrainer_does_not_keep_what_ends_without_a_number():
    decision = Results([A], {"for a": lambda n: [math.nan]}, ALL_CURE).drive(strategy=AUTOTRAINER)
    assert decision.plan is None


def test_a_plan_that_is_kept_without_a_trial_says_so():
    attempt = kept_without_trial(A, situation())
    assert isinstance(attempt, Attempt) and attempt.kept
    assert attempt.guarantee == "none: it was not compared with anything"
    assert attempt.reason == "the strategy keeps it without a trial"
    assert (attempt.after, attempt.twin, attempt.difference) == (None, None, None)
