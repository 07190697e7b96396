"""Baselines on recordings made by hand whose answers are known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnoser.benchmark.baselines import (
    Chance,
    autotrainer,
    chance,
    deepfd_features,
    entropy_argmax,
    fit_deepfd,
    gradient_norm_argmax,
    loss_only,
    update_ratio_argmax,
)
from diagnoser.benchmark.harm import loss_alarm
from diagnoser.errors import BenchmarkError
from tests.made_recordings import EVERY, made_recording

MODEL = {
    "a.query": ("query", "a", 100),
    "a.key": ("key", "a", 100),
    "b.query": ("query", "b", 100),
    "b.key": ("key", "b", 100),
    "head": ("head", "head", 100),
    "a": ("other", "a", 200),
    "b": ("other", "b", 200),
}
OWN = ["a.query", "a.key", "b.query", "b.key", "head"]
OPERATORS = ["mean", "std", "skew", "median", "var", "sem", "max", "min"]
FALLING = [2.0 / (1 + 0.1 * i) for i in range(100)]
EMPTY = made_recording({}, {})


def of_loss(losses, accuracies=()):
    return made_recording(MODEL, {}, losses, accuracies)


def without_order(recording):
    """The same recording with its components and its rows of measurements in another order."""
    rows = recording.measurements
    order = np.random.default_rng(0).permutation(len(rows.step))
    order = order[np.argsort(rows.step[order], kind="stable")]
    columns = {
        name: value[order]
        for name in rows.__slots__
        if isinstance(value := getattr(rows, name), np.ndarray)
    }
    return replace(
        recording,
        components=recording.components[::-1],
        measurements=replace(rows, **columns),
    )


# -- loss only -------------------------------------------------------------------------------------


@given(
    st.lists(
        st.one_of(st.floats(-1e6, 1e6), st.sampled_from([0.0, 1.0, math.nan, math.inf])),
        max_size=60,
    )
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_loss_only_alarms_exactly_where_the_loss_alarm_does(losses):
    assert (loss_only(of_loss(losses)) >= 0.0) == bool(loss_alarm(losses))


def test_loss_only_is_graded():
    steps = np.linspace(0.0, 1.0, 100)
    left = [loss_only(of_loss((2.0 - 2.0 * share * steps).tolist())) for share in (0.9, 0.5, 0.1)]
    risen = [loss_only(of_loss((2.0 + rise * steps).tolist())) for rise in (0.0, 1.0, 8.0)]
    assert left == sorted(left) and left[-1] < 0.0
    assert risen[0] == 0.0 and risen == sorted(risen)
    assert loss_only(of_loss([1.0, *[2.0] * 99])) == 1.0
    assert loss_only(of_loss([1.0, *[0.25] * 99])) == -0.75


def test_a_rise_in_between_counts_as_high_as_it_was():
    losses = [1.0] * 40 + [3.0] * 20 + [0.1] * 40
    assert loss_only(of_loss(losses)) == pytest.approx(2.0)


def test_the_end_counts_where_the_windows_leave_it_out():
    losses = [1.0] * 42 + [3.0]  # windows of two from step 8 end at 41
    assert loss_only(of_loss(losses)) == 1.0


def test_losses_below_zero_that_fall_are_no_alarm():
    assert loss_only(of_loss([-1.0 - 0.1 * i for i in range(50)])) < 0.0
    assert loss_only(of_loss([0.0, *[-1.0] * 50])) == -math.inf


def test_loss_only_of_a_loss_that_is_not_finite_is_infinite_and_of_the_part_before_is_not():
    recording = of_loss([*FALLING, math.nan])
    assert loss_only(recording) == math.inf
    assert loss_only(recording.until(99)) < 0.0


def test_a_run_without_losses_is_called_as_the_loss_alarm_calls_it():
    assert loss_alarm([]) and loss_only(EMPTY) == math.inf


# -- AutoTrainer -----------------------------------------------------------------------------------


def gradients(first, last, **more):
    return {"gradient_norm": {"a.query": first, "head": last}, **more}


def test_autotrainer_names_what_vanishes():
    recording = made_recording(
        MODEL, gradients([1e-6] * 20, [1.0] * 20), FALLING, np.linspace(0.1, 0.5, 100)
    )
    said = autotrainer(recording)
    assert said.faulty and said.score == 0.2
    assert said.causes == ("activation_function", "initialization", "normalization")
    assert said.components == ()


def test_autotrainer_is_silent_where_training_converges():
    recording = made_recording(
        MODEL, gradients([1e-6] * 20, [1.0] * 20), FALLING, np.linspace(0.1, 0.95, 100)
    )
    assert autotrainer(recording) == replace(autotrainer(EMPTY), score=0.0)
    assert not autotrainer(recording).faulty


def test_autotrainer_calls_a_loss_that_is_not_finite_an_explosion():
    said = autotrainer(
        made_recording(MODEL, gradients([1.0] * 20, [1.0] * 20), [*FALLING[:50], *[math.nan] * 50])
    )
    assert said.faulty and said.causes[0] == "activation_function"


# -- DeepFD's features -----------------------------------------------------------------------------


def test_operators_are_those_of_the_population():
    losses = np.repeat(np.random.default_rng(1).uniform(1, 3, 20), 5)
    parts = losses[::5]
    found = deepfd_features(of_loss(losses.tolist()))
    centred = parts - parts.mean()
    expected = {
        "mean": parts.mean(),
        "std": parts.std(),
        "skew": (centred**3).mean() / parts.std() ** 3,
        "median": np.median(parts),
        "var": parts.var(),
        "sem": parts.std() / math.sqrt(20),
        "max": parts.max(),
        "min": parts.min(),
    }
    assert list(expected) == OPERATORS
    for name, value in expected.items():
        assert found[f"loss_{name}"] == pytest.approx(value)


def test_every_run_has_the_same_features_and_an_empty_one_knows_none():
    found, empty = deepfd_features(of_loss(FALLING)), deepfd_features(EMPTY)
    assert list(found) == list(empty) and len(found) == 15 * 8
    assert all(math.isnan(value) for value in empty.values())
    assert all(math.isnan(found[f"accuracy_{name}"]) for name in OPERATORS)
    assert all(math.isnan(found[f"vanish_gradient_{name}"]) for name in OPERATORS)


def test_the_number_of_steps_is_not_in_the_features():
    rng = np.random.default_rng(2)
    losses, accuracies = rng.uniform(1, 2, 40), rng.uniform(0.2, 0.9, 40)
    norms = gradients([1e-6, 1.0], [1.0, 1.0], weight_norm={"head": [1.0, 1.0]})
    short = made_recording(MODEL, norms, losses, accuracies)
    repeated = made_recording(MODEL, norms, np.repeat(losses, 7), np.repeat(accuracies, 7))
    assert deepfd_features(repeated) == pytest.approx(deepfd_features(short), nan_ok=True)


def test_a_measurement_more_that_says_the_same_changes_no_operator():
    once = made_recording(MODEL, gradients([1e-6, 1.0], [1.0, 1.0]))
    twice = made_recording(MODEL, gradients([1e-6, 1e-6, 1.0, 1.0], [1.0] * 4))
    assert deepfd_features(twice) == pytest.approx(deepfd_features(once), nan_ok=True)


def test_symptoms_are_shares_of_where_they_hold():
    series = {
        "gradient_norm": {"a.query": [1e-5, 1e-5, 1.0, 90.0], "head": [1.0] * 4},
        "zero_share": {"a.query": [0.9, 0.9, 0.9, 0.1]},
        "non_finite_gradient": {"a.query": [0, 0, 0, 2], "head": [0, 0, 0, 0]},
        "non_finite_weight": {"head": [0, 0, 0, 0]},
        "weight_norm": {"a.query": [10.0, 10.0, 60.0, 60.0], "head": [1.0, 2.0, 3.0, 4.0]},
    }
    found = deepfd_features(made_recording(MODEL, series))
    assert found["vanish_gradient_mean"] == 0.5
    assert found["explode_gradient_mean"] == 0.25
    assert found["died_relu_mean"] == 0.75
    assert (found["nan_gradient_mean"], found["nan_gradient_max"]) == (0.25, 1.0)
    assert (found["nan_weight_mean"], found["nan_weight_skew"]) == (0.0, 0.0)
    assert found["large_weight_mean"] == 0.5  # root mean square 6 of 100 weights
    assert found["constant_weight_mean"] == pytest.approx(1 / 3)  # one of two, none, one of two


def test_a_gradient_that_is_small_only_against_the_last_has_not_vanished():
    found = deepfd_features(made_recording(MODEL, gradients([1.0] * 3, [1e6] * 3)))
    assert found["vanish_gradient_max"] == found["explode_gradient_max"] == 0.0


def test_symptoms_of_loss_and_accuracy():
    stuck = deepfd_features(of_loss([1.0 + 0.1 * i for i in range(20)], [0.1] * 20))
    assert stuck["increase_loss_mean"] == stuck["not_converge_mean"] == 1.0
    assert stuck["slow_convergence_mean"] == 1.0
    assert stuck["decrease_accuracy_mean"] == stuck["unstable_mean"] == 0.0
    swinging = deepfd_features(of_loss(FALLING[:20], [0.8, 0.9] * 10))
    assert swinging["unstable_mean"] == 1.0
    assert swinging["not_converge_mean"] == swinging["slow_convergence_mean"] == 0.0
    assert swinging["decrease_accuracy_mean"] == pytest.approx(7 / 15)  # from 30 % of the run on


def test_what_comes_before_the_point_of_judgement_is_no_symptom():
    found = deepfd_features(of_loss([3.0, 4.0, 5.0, *FALLING[:17]], [0.5, 0.3, *[0.9] * 18]))
    assert found["increase_loss_max"] == found["decrease_accuracy_max"] == 0.0


def test_a_loss_that_is_not_finite_is_a_symptom_and_no_number():
    found = deepfd_features(of_loss([2.0] * 10 + [math.nan] * 5 + [math.inf] * 5))
    assert found["nan_loss_mean"] == 0.5
    assert found["loss_max"] == found["loss_mean"] == 2.0
    never = deepfd_features(of_loss([math.nan] * 20))
    assert math.isnan(never["loss_mean"]) and never["nan_loss_min"] == 1.0
    assert math.isnan(never["increase_loss_mean"])


def test_numbers_too_large_are_not_known_and_warn_of_nothing():
    found = deepfd_features(of_loss([1e200] * 10 + [2e200] * 10))
    assert found["loss_std"] == pytest.approx(0.5e200)
    assert math.isnan(found["loss_var"])
    assert found["nan_loss_mean"] == 1.0


def test_features_do_not_depend_on_the_order_of_rows():
    recording = many_components()
    assert deepfd_features(without_order(recording)) == pytest.approx(
        deepfd_features(recording), nan_ok=True
    )


# -- DeepFD's estimators ---------------------------------------------------------------------------


def training_runs(each=15, seed=0):
    """Two faults, each with a feature of its own, runs with both, and healthy runs."""
    rng = np.random.default_rng(seed)
    features, labels = [], []
    for truth in ((), ("learning_rate_too_high",), ("loss_function",)) * each + (
        ("learning_rate_too_high", "loss_function"),
    ) * each:
        features.append(
            {
                "loss_std": rng.normal(9.0 * ("learning_rate_too_high" in truth), 1.0),
                "accuracy_max": rng.normal(-9.0 * ("loss_function" in truth), 1.0),
                "loss_mean": rng.normal(),
                "accuracy_skew": math.nan,
            }
        )
        labels.append(truth)
    return features, labels


@pytest.fixture(scope="module")
def learned():
    return fit_deepfd(*training_runs())


def test_deepfd_finds_one_fault_both_and_none(learned):
    features, labels = training_runs(seed=1)
    said = [learned.predict(row) for row in features]
    assert [set(of.causes) for of in said] == [set(truth) for truth in labels]
    assert [of.faulty for of in said] == [bool(truth) for truth in labels]
    healthy = [of.score for of in said if not of.faulty]
    assert max(healthy) < min(of.score for of in said if of.faulty)
    assert all(0.0 <= of.score <= 1.0 and of.components == () for of in said)


def test_labels_are_the_union_of_what_the_three_predict():
    rng = np.random.default_rng(3)
    features = [{"a": rng.normal(), "b": rng.normal()} for _ in range(60)]
    labels = [("x",) * (rng.random() < 0.4) + ("y",) * (row["a"] > 0.3) for row in features]
    judge = fit_deepfd(features, labels)
    apart = 0
    for _ in range(40):
        row = {"a": rng.normal(), "b": rng.normal()}
        votes = np.array([e.predict(judge.scaled([row]))[0] for e in judge.estimators])
        apart += bool((votes.any(axis=0) != votes.all(axis=0)).any())
        united = {name for name, any_of in zip("xy", votes.any(axis=0), strict=True) if any_of}
        said = judge.predict(row)
        assert set(said.causes) == united
        shares = [e.predict_proba(judge.scaled([row])) for e in judge.estimators]
        some = [min(1.0, x[0, 1] + y[0, 1]) for x, y in shares]
        assert said.score == pytest.approx(np.mean(some))
    assert apart > 5


def test_the_score_is_the_mean_of_three_probabilities_that_something_is_wrong():
    features = [{"a": float(i)} for i in range(5)]
    judge = fit_deepfd(features, [(), (), (), ("x",), ("x",)])
    row = judge.scaled([{"a": 4.0}])
    three = [estimator.predict_proba(row)[0, 1] for estimator in judge.estimators]
    assert three[:2] == [0.4, 1.0]  # two of five neighbours; a pure leaf
    assert judge.predict({"a": 4.0}).score == pytest.approx(np.mean(three))


def test_a_label_that_every_run_has_is_certain():
    judge = fit_deepfd([{"a": float(i)} for i in range(6)], [("x",)] * 6)
    said = judge.predict({"a": 2.0})
    assert (said.causes, said.score) == (("x",), 1.0)


def test_what_is_not_known_is_the_training_median_and_the_scale_is_of_the_training_runs(learned):
    features, _ = training_runs()
    assert learned.columns == ("accuracy_max", "loss_mean", "loss_std")
    medians = {name: np.median([row[name] for row in features]) for name in learned.columns}
    known = learned.predict(medians)
    assert learned.predict({}) == known
    assert learned.predict(dict.fromkeys(medians, math.nan)) == known
    assert learned.predict(dict.fromkeys(medians, math.inf)) == known
    scaled = learned.scaled(features)
    assert scaled.min(axis=0).tolist() == [0.0] * 3 and scaled.max(axis=0).tolist() == [1.0] * 3
    assert learned.scaled([dict.fromkeys(medians, 1e300)]).tolist() == [[1.0] * 3]


def test_deepfd_does_not_depend_on_the_order_of_runs_or_features(learned):
    features, labels = training_runs()
    order = np.random.default_rng(4).permutation(len(features))
    shuffled = fit_deepfd(
        [dict(reversed(features[i].items())) for i in order], [labels[i] for i in order]
    )
    rng = np.random.default_rng(5)
    for _ in range(40):
        row = {name: rng.uniform(-9, 9) for name in learned.columns}
        assert shuffled.predict(row) == learned.predict(row)


def test_deepfd_learns_from_features_of_recordings():
    healthy = [of_loss([x / (1 + 0.02 * k) for x in FALLING]) for k in range(6)]
    rising = [of_loss([1.0 + 0.01 * k * i for i in range(100)]) for k in range(1, 7)]
    lost = [of_loss([*FALLING[:10], *[math.nan] * (90 - k)]) for k in range(6)]
    labels = [()] * 6 + [("learning_rate_too_low",)] * 6 + [("numeric_precision",)] * 6
    judge = fit_deepfd([deepfd_features(r) for r in (*healthy, *rising, *lost)], labels)
    assert not judge.predict(deepfd_features(of_loss(FALLING))).faulty
    broken = judge.predict(deepfd_features(of_loss([*FALLING[:20], *[math.nan] * 80])))
    assert broken.causes == ("numeric_precision",)
    assert 0.0 <= judge.predict(deepfd_features(EMPTY)).score <= 1.0


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        ([{"a": 1.0}] * 4, [("x",)] * 4, "5 runs or more"),
        ([{"a": 1.0}] * 9, [()] * 9, "0 labels"),
        ([{"a": math.nan}] * 9, [("x",)] * 9, "no feature is known"),
        ([{"a": 1.0}] * 9, [("x",)] * 8, "one for each run"),
    ],
)
def test_deepfd_refuses_what_it_cannot_learn_from(features, labels, message):
    with pytest.raises(BenchmarkError, match=message):
        fit_deepfd(features, labels)


# -- localisation ----------------------------------------------------------------------------------


def many_components():
    drifts = {"a.query": 0.9, "a.key": 1.0, "b.query": 1.1, "b.key": 1.05, "head": 20.0}
    scales = {"a.query": 1e-3, "a.key": 1e3, "b.query": 1.0, "b.key": 1.0, "head": 1e-2}
    series = {
        quantity: {
            name: [scales[name] * x for x in (1.0, 1.0, 1.0, 1.0, drift)]
            for name, drift in drifts.items()
        }
        for quantity in ("gradient_norm", "update_ratio")
    }
    entropy = {"a": [0.9, 0.9, 0.9, 0.88], "b": [0.7, 0.7, 0.7, 0.1]}
    return made_recording(MODEL, series | {"attention_entropy": entropy}, FALLING)


@pytest.mark.parametrize("ranking", [gradient_norm_argmax, update_ratio_argmax])
def test_the_component_that_went_furthest_from_its_own_start_is_first(ranking):
    # changes 0.9, 1, 1.1, 1.05, 20 against their median 1.05
    assert ranking(many_components()) == ("head", "a.query", "a.key", "b.query", "b.key")


@pytest.mark.parametrize("drift", [10.0, 0.1])
def test_what_all_components_do_points_at_none_of_them(drift):
    series = {name: [1.0, 1.0, 1.0, drift] for name in OWN} | {"b.key": [1.0] * 4}
    assert gradient_norm_argmax(made_recording(MODEL, {"gradient_norm": series}))[0] == "b.key"


def test_a_gradient_that_became_zero_has_gone_infinitely_far():
    series = {name: [1.0, 1.0, 1.0, 1e6 if name == "head" else 1.0] for name in OWN}
    series["b.query"] = [1.0, 1.0, 1.0, 0.0]
    recording = made_recording(MODEL, {"gradient_norm": series})
    assert gradient_norm_argmax(recording)[:2] == ("b.query", "head")


def test_where_every_gradient_became_zero_none_is_further_than_another():
    series = {name: [1.0, 1.0, 1.0, 0.0] for name in OWN}
    assert gradient_norm_argmax(made_recording(MODEL, {"gradient_norm": series})) == tuple(OWN)


def test_what_is_not_known_is_not_ranked():
    series = {
        "a.query": [1.0, math.nan, None, 1.1],
        "a.key": [0.0, 0.0, 0.0],  # never reached
        "b.query": [None, None, 1.0],  # once
        "b.key": [math.nan] * 4,
        "a": [1.0, 9.0, 9.0, 9.0],  # a layer has no weights of its own
    }
    recording = made_recording(MODEL, {"gradient_norm": series})
    assert gradient_norm_argmax(recording) == ("a.query",)
    assert update_ratio_argmax(recording) == entropy_argmax(recording) == ()


def test_the_start_is_the_median_of_three_and_never_the_latest():
    series = {
        "a.query": [1.0, 50.0, 1.0, 1.0],  # one of the first three does not count
        "a.key": [1.0, 2.0],  # of two, one is the start
        "b.query": [1.0, 1.0, 1.0, 1.0],
        "b.key": [1.0, 1.0, 1.0, 1.6],
        "head": [1.0, 1.0, 1.0, 8.0, 8.0, 8.0, 8.0],  # nor do later ones
        "c.query": [1.0, 1.0, 1.0, 1.0],
        "c.key": [1.0, 1.0, 1.0, 1.0],
    }
    model = MODEL | {"c.query": ("query", "c", 1), "c.key": ("key", "c", 1)}
    ranked = gradient_norm_argmax(made_recording(model, {"gradient_norm": series}))
    assert ranked == ("head", "a.key", "b.key", "a.query", "b.query", "c.query", "c.key")


def test_a_ranking_knows_nothing_of_what_comes_after_the_cut():
    recording = many_components()
    assert gradient_norm_argmax(recording.until(3 * EVERY)) == tuple(OWN)  # all the same so far
    assert gradient_norm_argmax(recording.until(0)) == ()


def test_entropy_points_at_the_components_of_a_layer():
    # differences -0.02, -0.02, -0.6, -0.6 are as far from their median: the order of the model
    assert entropy_argmax(many_components()) == ("a.query", "a.key", "b.query", "b.key")
    three = MODEL | {
        "c.query": ("query", "c", 9),
        "c.key": ("key", "c", 9),
        "c": ("other", "c", 18),
    }
    entropy = {"a": [0.9, 0.9, 0.88], "b": [0.7, 0.7, 0.1], "c": [0.5, 0.5, 0.47]}
    ranked = entropy_argmax(made_recording(three, {"attention_entropy": entropy}))
    assert ranked[:2] == ("b.query", "b.key") and len(ranked) == 6


@pytest.mark.parametrize("ranking", [gradient_norm_argmax, update_ratio_argmax, entropy_argmax])
def test_rankings_do_not_depend_on_the_order_of_components_and_rows(ranking):
    recording = many_components()
    assert len(ranking(recording)) >= 4
    assert ranking(without_order(recording)) == ranking(recording)


@pytest.mark.parametrize("ranking", [gradient_norm_argmax, update_ratio_argmax, entropy_argmax])
def test_an_empty_run_has_no_ranking(ranking):
    assert ranking(EMPTY) == ranking(of_loss([math.nan] * 30)) == ()


@pytest.mark.parametrize(
    ("accepted", "first", "third"),
    [
        ((), 0.0, 0.0),
        (("model",), 0.0, 0.0),
        (("head",), 1 / 5, 3 / 5),
        (("a",), 2 / 5, 9 / 10),  # both parts of the layer: 1 - 1 / 10
        (("a", "b"), 4 / 5, 1.0),
        (("a", "b", "head"), 1.0, 1.0),
    ],
)
def test_chance_is_that_of_drawing_components_at_random(accepted, first, third):
    found = chance(many_components(), accepted)
    assert (found.top_1, found.top_3) == pytest.approx((first, third))
    rng = np.random.default_rng(0)
    orders = [rng.permutation(OWN)[:3] for _ in range(2000)]
    right = [any(n == a or n.startswith(f"{a}.") for n in o for a in accepted) for o in orders]
    assert np.mean(right) == pytest.approx(third, abs=0.05)


def test_chance_where_there_are_few_components_or_none():
    two = made_recording({"x": ("head", "x", 1), "y": ("norm", "y", 1)}, {})
    assert chance(two, ("x",)) == Chance(0.5, 1.0)
    assert all(
        math.isnan(value) for value in (chance(EMPTY, ("x",)).top_1, chance(EMPTY, ()).top_3)
    )
