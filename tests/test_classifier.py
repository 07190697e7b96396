"""The learned judge: learns what it is shown, knows what it does not know, is kept safely."""

from __future__ import annotations

import io
import json
import math
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from diagnoser.classifier import Classifier, Example, Vectors, fit, load, save, to_blame
from diagnoser.classifier.fitting import _threshold
from diagnoser.classifier.predict import TASK, component_rows
from diagnoser.classifier.reference import learn_reference
from diagnoser.classifier.saying import say
from diagnoser.classifier.trees import trees_of
from diagnoser.errors import ClassifierError

RUN_COLUMNS = ("loss_fall.latest", "sharpness.highest", "never_measured.latest")
COMPONENT_COLUMNS = ("update_ratio.latest", "weight_growth.highest")
NAMES = ("layers.0.query", "layers.0.key", "layers.1.query", "layers.1.key", "head")
FAULT_OF = {
    "learning_rate_too_high": "sharpness_instability",
    "component_not_optimized": "dead_component",
}
KINDS = ("query", "key", "query", "key", "head")


def made_run(rng: np.random.Generator, cause: str, blamed: int | None) -> Vectors:
    """A run: a high learning rate is sharp, a frozen component does not move, nothing else is."""
    fall = rng.normal(0.9, 0.05) - (0.5 if cause else 0.0) * rng.random()
    sharp = rng.normal(0.1, 0.05) + (2.0 if cause == "learning_rate_too_high" else 0.0)
    usual = np.array([3.0 if kind == "query" else 1.0 for kind in KINDS])
    ratio, growth = usual * rng.normal(1, 0.1, 5), rng.normal(1.2, 0.1, 5)
    if cause == "component_not_optimized" and blamed is not None:
        ratio[blamed], growth[blamed] = 0.0, 1.0
    if cause == "learning_rate_too_high" and blamed is not None:
        ratio[blamed] *= 30
    run = {"loss_fall.latest": fall, "sharpness.highest": sharp}
    components = {"update_ratio.latest": ratio, "weight_growth.highest": growth}
    return Vectors(run, components, NAMES, KINDS)


def examples(seed: int = 0, each: int = 60) -> list[Example]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(each):
        made.append(Example(made_run(rng, "", None), False, (), (), (), f"healthy-{i % 7}"))
        made.append(Example(made_run(rng, "", None), False, (), (), (), f"healthy-{i % 7}"))
        for cause in ("learning_rate_too_high", "component_not_optimized"):
            blamed = int(rng.integers(5))
            run = made_run(rng, cause, blamed)
            fault = FAULT_OF[cause]
            made.append(
                Example(run, True, (cause,), (fault,), (NAMES[blamed],), f"{cause}-{i % 6}")
            )
    return made


@pytest.fixture(scope="module")
def learned() -> Classifier:
    return fit(examples(), RUN_COLUMNS, COMPONENT_COLUMNS, {"made_for": "a test"})


@pytest.fixture(scope="module")
def unseen() -> list[Example]:
    return examples(seed=1, each=25)


def test_verdict_cause_and_place_of_unseen_runs(learned, unseen):
    healthy = [learned.predict(e.vectors) for e in unseen if not e.faulty]
    faulty = [(learned.predict(e.vectors), e) for e in unseen if e.faulty]
    assert np.mean([p.faulty >= learned.threshold for p in healthy]) <= 0.12
    assert np.mean([p.faulty >= learned.threshold for p, _ in faulty]) >= 0.9
    assert np.mean([p.causes[0][0] == e.causes[0] for p, e in faulty]) >= 0.9
    assert np.mean([p.components[0][0] == e.components[0] for p, e in faulty]) >= 0.8


def test_probabilities_are_calibrated(learned, unseen):
    probability = np.array([learned.predict(e.vectors).faulty for e in unseen])
    truth = np.array([e.faulty for e in unseen])
    assert abs(probability.mean() - truth.mean()) < 0.1
    assert np.mean((probability - truth) ** 2) < 0.1


def test_learning_twice_gives_the_same_numbers(learned, unseen):
    again = fit(examples(), RUN_COLUMNS, COMPONENT_COLUMNS, {})
    for example in unseen[:20]:
        ours, theirs = learned.predict(example.vectors), again.predict(example.vectors)
        assert repr(ours) == repr(theirs)


def test_a_run_unlike_any_it_learned_from_is_not_judged(learned, unseen):
    strange = {name: np.full(5, 1e9) for name in COMPONENT_COLUMNS}
    run = Vectors({"loss_fall.latest": -1e6, "sharpness.highest": 1e6}, strange, NAMES, KINDS)
    assert learned.predict(run).abstains
    assert np.mean([learned.predict(e.vectors).abstains for e in unseen]) < 0.1


def test_a_model_without_what_all_others_had_is_not_judged(learned, unseen):
    one, *_ = unseen
    assert not learned.predict(one.vectors).abstains
    other = dict(one.vectors.components)
    other["update_ratio.latest"] = np.full(5, np.nan)
    said = learned.predict(replace(one.vectors, components=other))
    assert said.abstains and set(said.lacking) == {"excess.update_ratio.latest"}


def test_a_task_unlike_those_of_all_others_is_not_judged():
    """A loss that cannot be compared with guessing is of another task, such as a reconstruction."""
    columns = (*RUN_COLUMNS, f"{TASK}.latest")
    classified = [
        replace(e, vectors=replace(e.vectors, run={**e.vectors.run, f"{TASK}.latest": 0.5}))
        for e in examples()
    ]
    judge = fit(classified, columns, COMPONENT_COLUMNS, {"made_for": "a test"})
    one = classified[0].vectors
    assert not judge.predict(one).abstains
    other = judge.predict(replace(one, run={n: v for n, v in one.run.items() if TASK not in n}))
    assert other.abstains and other.lacking[0] == f"{TASK}.latest"


def test_a_run_of_which_nothing_is_known_is_not_judged(learned):
    absent = {name: np.full(5, np.nan) for name in COMPONENT_COLUMNS}
    assert learned.predict(Vectors({}, absent, NAMES, KINDS)).abstains
    assert learned.predict(Vectors({}, {}, (), ())).abstains


def test_a_run_is_judged_by_all_that_was_to_be_seen_of_it(learned):
    rng = np.random.default_rng(8)
    sharp, calm = (made_run(rng, cause, 1) for cause in ("learning_rate_too_high", ""))
    first, last = learned.predict(sharp), learned.predict(calm)
    both = learned.predict(replace(calm, earlier=(sharp,)))
    assert last.faulty < both.faulty < first.faulty

    def log_odds(p: float) -> float:
        return float(np.log(p / (1.0 - p)))

    assert log_odds(both.faulty) == pytest.approx(
        (log_odds(first.faulty) + log_odds(last.faulty)) / 2, abs=1e-6
    )
    place = dict(both.components)[NAMES[1]]
    assert dict(last.components)[NAMES[1]] < place < dict(first.components)[NAMES[1]]
    assert sum(reason.moved for reason in both.reasons) != 0.0


def test_what_was_hardly_known_earlier_or_of_other_components_has_no_say(learned):
    calm = made_run(np.random.default_rng(8), "", None)
    nothing = Vectors({}, {name: np.full(5, np.nan) for name in COMPONENT_COLUMNS}, NAMES, KINDS)
    for earlier in (nothing, Vectors({}, {}, (), ())):
        said = learned.predict(replace(calm, earlier=(earlier,)))
        assert said.faulty == learned.predict(calm).faulty


def test_calibration_is_that_of_runs_seen_at_several_times():
    made = []
    for example in examples():
        earlier = (example.vectors, example.vectors)
        made.append(replace(example, vectors=replace(example.vectors, earlier=earlier)))
    learned = fit(made, RUN_COLUMNS, COMPONENT_COLUMNS, {})
    once = fit(examples(), RUN_COLUMNS, COMPONENT_COLUMNS, {})
    for example in examples(seed=1, each=5):
        # The same thing seen three times is no more sure than seen once.
        thrice = replace(example.vectors, earlier=(example.vectors, example.vectors))
        assert learned.predict(thrice).faulty == pytest.approx(
            once.predict(example.vectors).faulty, abs=1e-6
        )


@given(arrays(float, array_shapes(min_dims=2, max_dims=2, min_side=0), elements=st.floats(-9, 9)))
def test_a_component_is_compared_with_the_median_of_those_that_are_known(excess):
    excess[excess > 5.0] = np.nan
    far = component_rows(excess)[:, excess.shape[1] :]
    for column, own in zip(excess.T, far.T, strict=True):
        known = column[~np.isnan(column)]
        middle = np.median(known) if len(known) else np.nan
        np.testing.assert_allclose(own, column - middle)


def test_what_moved_a_verdict_is_named(learned):
    rng = np.random.default_rng(5)
    hot = made_run(rng, "learning_rate_too_high", None)
    first = learned.predict(hot).reasons[0]
    assert first.column == "sharpness.highest" and first.moved > 0
    assert first.value == hot.run["sharpness.highest"]


def test_what_is_usual_depends_on_the_kind_and_is_pooled_for_others(learned):
    rng = np.random.default_rng(3)
    healthy = [made_run(rng, "", None) for _ in range(50)]
    reference = learn_reference(healthy, COMPONENT_COLUMNS)
    run = made_run(rng, "", None)
    assert np.abs(reference.excess(run)).max() < 6
    swapped = replace(run, kinds=("key", "query", "key", "query", "head"))
    assert np.abs(reference.excess(swapped)[:4, 0]).min() > 4
    unknown = replace(run, kinds=("convolution",) * 5)
    assert np.isfinite(reference.excess(unknown)).all()


def of_origins(seed: int = 0) -> list[Example]:
    """Runs of four models: a number tells what is wrong in one of them alone."""
    rng, made = np.random.default_rng(seed), []
    for origin, name in enumerate("abcd"):
        for example in examples(seed=10 * seed + origin, each=20):
            wrong = float(example.faulty) if origin == 0 else float(rng.random() < 0.5)
            more = {"of_a_alone.latest": wrong}
            vectors = replace(example.vectors, run={**example.vectors.run, **more})
            group = f"{name} {example.group}"
            made.append(replace(example, vectors=vectors, origin=name, group=group))
    return made


def test_it_is_as_sure_as_it_is_right_about_models_it_never_saw():
    alone = ("of_a_alone.latest",)
    only_a = [e for e in of_origins() if e.origin == "a"]
    within = fit(only_a, alone, COMPONENT_COLUMNS[:1], {})  # one model: groups are held out
    beyond = fit(of_origins(), alone, COMPONENT_COLUMNS[:1], {})
    faulty = [e for e in of_origins(seed=1) if e.faulty and e.origin != "a"]
    healthy = [e for e in of_origins(seed=1) if not e.faulty and e.origin != "a"]

    def brier(judge: Classifier) -> float:
        said = [(judge.predict(e.vectors).faulty, e.faulty) for e in (*faulty, *healthy)]
        return float(np.mean([(p - t) ** 2 for p, t in said]))

    assert brier(beyond) < brier(within)


# -- what it adds to a diagnosis -------------------------------------------------------------------


def test_a_run_like_faulty_ones_is_a_finding_in_the_words_of_the_vocabulary(learned):
    run = made_run(np.random.default_rng(5), "learning_rate_too_high", 2)
    said = say(learned, run, (10, 20, 30))
    finding = said.finding
    assert finding is not None and said.checked is None and said.unknown is None
    assert (finding.fault, finding.source) == ("sharpness_instability", "classifier")
    assert finding.causes[0].cause == "learning_rate_too_high"
    assert (finding.component, finding.since_step) == (NAMES[2], 30)
    assert finding.probability == said.prediction.faulty >= learned.threshold
    assert finding.evidence[0].feature == "sharpness.highest"
    assert "sharpness" in finding.message and "learning rate too high" in finding.message


def test_a_number_that_no_healthy_run_has_is_compared_with_nothing(learned):
    run = made_run(np.random.default_rng(5), "learning_rate_too_high", 2)
    unknown = replace(learned, middle=np.full(len(learned.run_columns), np.nan))
    finding = say(unknown, run, (10, 20)).finding
    assert finding is not None and finding.evidence == ()


def test_a_place_is_named_only_where_it_is_more_likely_than_not(learned):
    run = made_run(np.random.default_rng(6), "learning_rate_too_high", None)
    finding = say(learned, run, (10,)).finding
    assert finding is not None and finding.component == "model"


def test_a_run_like_healthy_ones_was_checked(learned):
    said = say(learned, made_run(np.random.default_rng(7), "", None), (10, 20))
    assert said.finding is None and said.unknown is None
    assert (said.checked.rule, said.checked.components, said.checked.measurements) == (
        "classifier", 5, 2,
    )  # fmt: skip


def test_a_run_like_none_is_unknown_with_the_reason(learned):
    far = {name: np.full(5, 1e9) for name in COMPONENT_COLUMNS}
    run = {"loss_fall.latest": -1e6, "sharpness.highest": 1e6}
    said = say(learned, Vectors(run, far, NAMES, KINDS), (10,))
    assert said.finding is None and "lie beyond all of theirs" in said.unknown.reason
    nothing = say(learned, Vectors({}, {}, (), ()), ())
    assert nothing.finding is None
    assert "had what this one has not: loss fall" in nothing.unknown.reason


@pytest.mark.parametrize(
    ("name", "blamed", "right"),
    [
        ("layers.0.query", ("layers.0",), True),
        ("layers.0.qkv[query]", ("layers.0.qkv",), True),
        ("layers.0", ("layers.0",), True),
        ("layers.01", ("layers.0",), False),
        ("layers.0", ("layers.0.query",), False),
        ("layers.0", (), False),
    ],
)
def test_a_prefix_names_all_its_parts(name, blamed, right):
    assert to_blame(name, blamed) is right


def test_too_few_runs_are_refused_with_their_number():
    with pytest.raises(ClassifierError, match="healthy runs"):
        fit(examples(each=2)[:6], RUN_COLUMNS, COMPONENT_COLUMNS, {})


def test_runs_without_a_component_to_blame_are_refused():
    everywhere = [replace(example, components=()) for example in examples()]
    with pytest.raises(ClassifierError, match="which component is to blame"):
        fit(everywhere, RUN_COLUMNS, COMPONENT_COLUMNS, {})


@given(
    st.lists(
        st.tuples(st.floats(0, 0.999), st.booleans(), st.sampled_from("ab")),
        min_size=1,
        max_size=200,
    )
)
def test_healthy_runs_on_which_rules_or_classifier_alarm_are_few_of_every_origin(runs):
    said, alarmed, origins = (np.array(part) for part in zip(*runs, strict=True))
    threshold = _threshold(said, alarmed, origins)
    beyond = (said >= threshold) & ~alarmed
    assert threshold >= 0.5
    for origin in set(origins):
        own = origins == origin
        allowed = max(0, int(0.05 * own.sum()) - alarmed[own].sum())
        assert beyond[own].sum() <= allowed


# -- trees as arrays -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grown():
    from sklearn.ensemble import HistGradientBoostingClassifier

    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 4))
    rows[rng.random(rows.shape) < 0.2] = math.nan
    truth = np.nan_to_num(rows[:, 0] * rows[:, 1], nan=0.5) > 0.0
    return HistGradientBoostingClassifier(max_iter=20, max_leaf_nodes=8).fit(rows, truth), rows


@settings(deadline=None)
@given(arrays(np.float64, (5, 4), elements=st.floats(allow_nan=True, allow_infinity=True)))
def test_trees_say_what_the_library_says_that_grew_them(grown, rows):
    estimator, learned_from = grown
    trees = trees_of(estimator, learned_from)
    np.testing.assert_allclose(
        trees.score(rows), estimator.decision_function(rows), rtol=0, atol=1e-12
    )


def test_a_number_that_is_where_a_tree_splits_goes_where_the_library_sends_it(grown):
    estimator, learned_from = grown
    trees = trees_of(estimator, learned_from)
    for node in trees.nodes[trees.nodes["left"] != trees.nodes["right"]]:
        rows = np.full((3, 4), math.nan)
        at = node["threshold"]
        rows[:, node["column"]] = [np.nextafter(at, -math.inf), at, np.nextafter(at, math.inf)]
        np.testing.assert_allclose(
            trees.score(rows), estimator.decision_function(rows), rtol=0, atol=1e-12
        )


def test_no_rows_and_no_splits_are_no_error(grown):
    from sklearn.ensemble import HistGradientBoostingClassifier

    estimator, rows = grown
    assert trees_of(estimator, rows).score(np.empty((0, 4))).shape == (0,)
    alike = np.zeros((10, 2))
    none = trees_of(HistGradientBoostingClassifier().fit(alike, np.arange(10) % 2), alike)
    assert none.gains() == {}
    assert none.score(alike) == pytest.approx(np.zeros(10), abs=1e-12)


def test_a_library_that_keeps_its_trees_otherwise_is_noticed(grown):
    estimator, rows = grown

    class Another:
        _predictors = estimator._predictors
        _baseline_prediction = estimator._baseline_prediction + 0.1
        decision_function = estimator.decision_function

    with pytest.raises(ClassifierError, match="keeps its trees in another way"):
        trees_of(Another(), rows)


# -- the file --------------------------------------------------------------------------------------


@pytest.fixture
def stored(learned, tmp_path) -> Path:
    path = tmp_path / "classifier.npz"
    rows = np.random.default_rng(0).normal(size=(20, len(learned.run_columns)))
    save(learned, path, rows)
    return path


def test_a_file_gives_back_the_same_classifier(learned, stored, unseen):
    read = load(stored)
    assert read.about == {"made_for": "a test"}
    for example in unseen[:20]:
        assert repr(read.predict(example.vectors)) == repr(learned.predict(example.vectors))


def test_saving_twice_gives_the_same_predictions_and_leaves_no_part_behind(stored):
    assert sorted(path.name for path in stored.parent.iterdir()) == [
        "classifier.json",
        "classifier.npz",
    ]


def rewrite(path: Path, content: bytes) -> None:
    """Replaces the file and makes the description agree with it."""
    import hashlib

    path.write_bytes(content)
    beside = path.with_suffix(".json")
    description = json.loads(beside.read_text())
    description["sha256"] = hashlib.sha256(content).hexdigest()
    beside.write_text(json.dumps(description))


def rewritten(path: Path, **changed: object) -> None:
    """Writes the file anew with some of its arrays changed, or left out (None)."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files} | changed
    data = io.BytesIO()
    np.savez(data, **{name: array for name, array in arrays.items() if array is not None})
    rewrite(path, data.getvalue())


class Harmful:
    def __reduce__(self):
        return open, ("harm", "w")


def test_what_would_run_code_is_refused_and_does_not_run(stored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    harm = np.array([Harmful()], dtype=object)
    rewritten(stored, middle=harm)
    with pytest.raises(ClassifierError, match="cannot be read.*Object arrays cannot be loaded"):
        load(stored)
    data = io.BytesIO()
    np.save(data, harm)
    for content in (pickle.dumps(Harmful()), data.getvalue()):
        rewrite(stored, content)
        with pytest.raises(ClassifierError, match="cannot be read"):
            load(stored)
    assert not (tmp_path / "harm").exists()


def test_one_array_alone_is_no_archive(stored):
    data = io.BytesIO()
    np.save(data, np.zeros(3))
    rewrite(stored, data.getvalue())
    with pytest.raises(ClassifierError, match="cannot be read"):
        load(stored)


@pytest.mark.parametrize("name", ["names", "middle", "verdict.nodes", "location.numbers", "usual"])
def test_an_array_that_is_missing_is_named(stored, name):
    rewritten(stored, **{name: None})
    with pytest.raises(ClassifierError, match=f"cannot be read.*{name}"):
        load(stored)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("left", 0, "leads backwards or nowhere"),
        ("right", 10**6, "leads backwards or nowhere"),
        ("left", -1, "leads backwards or nowhere"),
        ("column", 10**6, "asks for a column that is not there"),
        ("column", -1, "asks for a column that is not there"),
        ("value", math.nan, "says what is no number"),
    ],
)
def test_trees_that_are_none_are_refused_before_they_are_asked(stored, field, value, says):
    with np.load(stored) as archive:
        nodes = archive["verdict.nodes"].copy()
    nodes[field][1] = value
    rewritten(stored, **{"verdict.nodes": nodes})
    with pytest.raises(ClassifierError, match=says):
        load(stored)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"verdict.roots": np.array([-1])}, "a tree begins nowhere"),
        ({"verdict.roots": np.array([[0]])}, "of another type"),
        ({"verdict.nodes": np.zeros(3)}, "of another type"),
        ({"location.roots": np.zeros(1)}, "of another type"),
        ({"verdict.columns": np.array([10**6])}, "verdict.columns: there is no such column"),
        ({"verdict.columns": np.zeros(1)}, "verdict.columns are no positions"),
        ({"usual": np.array([-1])}, "usual: there is no such column"),
        ({"verdict.numbers": np.array([math.inf, 1.0, 0.0])}, "verdict.numbers are no numbers"),
        ({"location.numbers": np.array([0.0, 1.0, math.nan])}, "location.numbers are no numbers"),
        ({"middle": np.zeros(1)}, "middle is"),
        ({"reference_spread": np.zeros((2, 2))}, "reference_spread is"),
    ],
)
def test_what_does_not_fit_together_is_refused(stored, changed, says):
    rewritten(stored, **changed)
    with pytest.raises(ClassifierError, match=f"cannot be read.*{says}"):
        load(stored)


def test_a_file_that_was_changed_is_refused(stored):
    content = bytearray(stored.read_bytes())
    content[len(content) // 2] ^= 1
    stored.write_bytes(bytes(content))
    with pytest.raises(ClassifierError, match="is not the file that classifier.json describes"):
        load(stored)


def test_a_damaged_archive_is_refused(stored):
    rewrite(stored, stored.read_bytes()[:-400])
    with pytest.raises(ClassifierError, match="cannot be read"):
        load(stored)


@pytest.mark.parametrize("schema", ["diagnoser.classifier/1", "diagnoser.classifier/3", None])
def test_another_schema_is_refused(stored, schema):
    beside = stored.with_suffix(".json")
    beside.write_text(json.dumps({**json.loads(beside.read_text()), "schema": schema}))
    with pytest.raises(ClassifierError, match="this version reads diagnoser.classifier/2"):
        load(stored)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ClassifierError, match="nothing.npz"):
        load(tmp_path / "nothing.npz")


def test_a_library_that_reads_the_numbers_otherwise_is_noticed(stored):
    beside = stored.with_suffix(".json")
    description = json.loads(beside.read_text())
    description["check"][0] += 0.01
    beside.write_text(json.dumps(description))
    with pytest.raises(ClassifierError, match="predicts otherwise"):
        load(stored)


def test_to_read_and_to_judge_takes_no_learning_library(stored):
    code = f"""
import sys
from pathlib import Path
from diagnoser.classifier import Vectors, load
classifier = load(Path({str(stored)!r}))
print(classifier.predict(Vectors({{}}, {{}}, (), ())).faulty >= 0.0)
print(*sorted({{"sklearn", "scipy", "pandas", "torch", "joblib"}} & {{*sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True", ""]


def test_importing_the_room_imports_no_learning_library():
    code = "import diagnoser.classifier, sys; print(*{'sklearn', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_last_digit_of_a_processor_moves_nobody_beyond_the_usual():
    """Vector units and libraries round an inverse hyperbolic sine to one neighbour or the other."""
    rng = np.random.default_rng(0)
    columns = ("a", "b")
    numbers = rng.standard_normal((200, 2)).round(2)
    names, kinds = tuple(map(str, range(200))), ("norm",) * 200
    of = Vectors({}, dict(zip(columns, numbers.T, strict=True)), names, kinds)
    usual = learn_reference([of], columns)
    shaken = Vectors(
        {},
        {
            name: values * (1 + 2e-16 * rng.choice([-1, 1], 200))
            for name, values in of.components.items()
        },
        names,
        kinds,
    )
    assert np.array_equal(usual.excess(of), usual.excess(shaken))
    assert len(np.unique(usual.excess(of))) > 100
