"""From recordings made by hand to verdicts: pure, repeatable, silent where too little is known."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from made_recordings import Components, Series, made_recording

from diagnoser.classifier import Classifier
from diagnoser.classifier.predict import Judge
from diagnoser.classifier.reference import Reference
from diagnoser.classifier.trees import NODE, Trees
from diagnoser.diagnosis import default_rules, diagnose
from diagnoser.features import CATALOGUE
from diagnoser.report import diagnosis_to_json
from diagnoser.rules import Precision, Rule, load_rules
from diagnoser.runlog import Recording
from diagnoser.types import Diagnosis, Finding, Where

RULES = default_rules()
COMPONENTS: Components = {  # name: kind, layer, elements
    "embed": ("embedding", "embed", 10),
    "a": ("other", "a", 20),  # an attention layer, and what it holds
    "a.query": ("query", "a", 10),
    "a.key": ("key", "a", 10),
    "ab": ("feed_forward", "ab", 10),
    "0.0": ("feed_forward", "0", 10),
    "0.1": ("feed_forward", "0", 10),
    "old:a": ("feed_forward", "old:a", 10),  # replaced: a module that is still in the optimizer
    "param_groups[0].3": ("other", "param_groups[0].3", 10),
}
FALLING = [1.0 / (1 + 0.1 * i) for i in range(40)]
FINE = {
    name: {"embed": [value] * 8}
    for name, value in (("gradient_norm", 1.0), ("update_norm", 0.01), ("optimized", 1.0))
}


# -- verdicts --------------------------------------------------------------------------------------


def judged(
    losses: Sequence[float], series: Series, rules: Sequence[Rule] = RULES
) -> tuple[str, str]:
    diagnosis = diagnose(made_recording(COMPONENTS, series, losses), rules)
    return diagnosis.verdict, diagnosis.reason


def test_a_verdict_says_why() -> None:
    assert judged(FALLING, FINE) == (
        "healthy",
        "nothing of severity medium or more in 8 measurements of 40 steps",
    )
    too_little = "a verdict needs 20 and 3"
    assert judged(FALLING[:19], FINE) == (
        "inconclusive",
        f"too little was seen: steps 19, measurements 8; {too_little}",
    )
    two = {name: {place: v[:2] for place, v in of.items()} for name, of in FINE.items()}
    assert judged(FALLING, two) == (
        "inconclusive",
        f"too little was seen: steps 40, measurements 2; {too_little}",
    )
    assert judged([], {}) == ("inconclusive", "no training step was seen")
    assert judged([*FALLING[:30], *[math.nan] * 10], FINE) == (
        "faulty",
        "non_finite in model since step 30",
    )


def test_without_a_finite_loss_nothing_is_healthy() -> None:
    rules = [rule for rule in RULES if rule.fault != "non_finite"]
    assert judged([math.nan] * 40, FINE, rules) == ("inconclusive", "no finite loss was seen")


def test_a_healthy_run_that_only_guesses_is_told_so() -> None:
    series = {**FINE, "classes": {"model": [10.0] * 8}}
    chance = math.log(10)
    for share, told in ((1.0, True), (0.93, True), (0.9, False), (0.1, False)):
        verdict, reason = judged([share * chance] * 40, series, [])
        assert verdict == "healthy"
        assert ("at step 35 the loss was still that of guessing" in reason) is told
    unknown = {**series, "classes": {"model": [math.nan] * 8}}
    assert "guessing" not in judged([chance] * 40, unknown, [])[1]


def test_a_defect_is_told_however_little_was_seen(tmp_path: Path) -> None:
    rules = family(tmp_path, rule("defect", "zero_share"))
    series = {"zero_share": {"embed": [1.0]}}
    assert judged([1.0], series, rules)[0] == "faulty"


def test_what_is_unusual_but_harmless_leaves_a_run_healthy(tmp_path: Path) -> None:
    rules = family(tmp_path, rule("unusual", "zero_share", severity="low"))
    series = {"zero_share": {"embed": [1.0] * 8}}
    diagnosis = diagnose(made_recording(COMPONENTS, series, FALLING), rules)
    assert (diagnosis.verdict, len(diagnosis.findings)) == ("healthy", 1)


# -- repeatability ---------------------------------------------------------------------------------


def everything(random: Random) -> tuple[dict[str, dict[str, list[float]]], list[float]]:
    quantities = sorted({q for feature in CATALOGUE.values() for q in feature.quantities})
    places = (*COMPONENTS, "model", "a.query - a.key", "embed - ab")
    series = {
        q: {place: [10.0 ** random.uniform(-3, 3) for _ in range(8)] for place in places}
        for q in quantities
    }
    return series, [10.0 ** random.uniform(-1, 1) for _ in range(40)]


def shuffled(series: Mapping[str, Mapping[str, Any]], random: Random) -> Series:
    def items(mapping: Mapping[str, Any]) -> list[tuple[str, Any]]:
        return random.sample(sorted(mapping.items()), len(mapping))

    return {name: dict(items(of)) for name, of in items(series)}


@pytest.mark.parametrize("seed", range(8))
def test_the_same_measurements_give_the_same_bytes_in_whatever_order_they_come(seed: int) -> None:
    random = Random(seed)
    series, losses = everything(random)
    recordings = [
        made_recording(COMPONENTS, told, losses)
        for told in (series, series, shuffled(series, random))
    ]
    first, again, other = (
        diagnosis_to_json(diagnose(recording, RULES)) for recording in recordings
    )
    assert json.loads(first)["findings"]
    assert first == again == other


# -- rules made for these tests --------------------------------------------------------------------


def rule(name: str, feature: str, **changes: Any) -> dict[str, Any]:
    """A rule that fires where a feature that is handed on as measured is above one half."""
    return {
        "name": name,
        "title": name,
        "status": "stable",
        "description": f"Detects {feature}.",
        "fault": "vanishing_gradient",
        "scope": CATALOGUE[feature].scope,
        "when": f"{feature} > 0.5",
        "severity": "medium",
        "message": f"{feature} is {{{feature}:.1f}}",
        "causes": ["initialization"],
        "falsepositives": ["none"],
        "tests": [
            {"name": "fires", "series": {feature: [1]}, "fires": True},
            {"name": "does not", "series": {feature: [0]}, "fires": False},
        ],
        **changes,
    }


def family(directory: Path, *rules: dict[str, Any]) -> tuple[Rule, ...]:
    for made in rules:
        rest = {key: value for key, value in made.items() if key != "name"}
        (directory / f"{made['name']}.yaml").write_text(json.dumps(rest))  # JSON is YAML
    return load_rules(directory, CATALOGUE)


def diagnosed(directory: Path, series: Series, *rules: dict[str, Any]) -> Diagnosis:
    return diagnose(made_recording(COMPONENTS, series, FALLING), family(directory, *rules))


def finding(diagnosis: Diagnosis, name: str) -> Finding:
    (found,) = (f for f in diagnosis.findings if f.source == f"rule:{name}")
    return found


def ranked(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    return [(cause.cause, cause.component) for cause in diagnosis.causes]


def since(k: int) -> list[float]:
    """Silent for k measurements, then not."""
    return [0.0] * k + [1.0] * (8 - k)


# -- symptoms under their cause --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cause", "symptom", "explained"),
    [
        (("a.query", 0), ("a.query", 0), True),
        (("a.query", 3), ("a.query", 0), True),  # the whole window may have to pass first
        (("a", 0), ("a.query", 0), True),
        (("a.query", 0), ("a", 0), True),
        (("a", 0), ("ab", 0), False),
        (("a.query", 0), ("a.key", 0), False),
        (("a.query", 0), ("embed", 3), False),  # later, but as grave
        (("a", 0), ("old:a", 0), True),
        (("old:a", 0), ("a", 0), False),
        (("a", 0), ("param_groups[0].3", 0), True),
    ],
)
def test_a_symptom_is_put_under_a_cause_in_its_place(
    tmp_path: Path, cause: tuple[str, int], symptom: tuple[str, int], explained: bool
) -> None:
    diagnosis = diagnosed(
        tmp_path,
        {
            "moment_ratio": {cause[0]: since(cause[1])},
            "zero_share": {symptom[0]: since(symptom[1])},
        },
        rule("cause", "moment_ratio", causes=["attention_scale"], explains=["dying_relu"]),
        rule("symptom", "zero_share", fault="dying_relu", causes=["normalization", "residual"]),
    )
    own = ["normalization", "residual"]
    causes = [c.cause for c in finding(diagnosis, "symptom").causes]
    assert causes == (["attention_scale", *own] if explained else own)
    assert (("normalization", symptom[0]) in ranked(diagnosis)) is not explained
    assert ("attention_scale", cause[0]) in ranked(diagnosis)


def test_what_was_replaced_is_known_by_what_stands_in_its_place(tmp_path: Path) -> None:
    old = "param_groups[0].3"
    diagnosis = diagnosed(
        tmp_path,
        {
            "zero_share": {old: since(0)},
            "moment_ratio": {old: since(0)},
            "step_lambda": {"a": since(1)},
        },
        rule("symptom", "zero_share", fault="dying_relu"),
        rule("grave", "moment_ratio", severity="high", explains=["dying_relu"], fault="dying_relu"),
        rule("new", "step_lambda", causes=["residual"], severity="high", explains=["dying_relu"]),
    )
    assert ranked(diagnosis)[0] == ("residual", "a")
    assert {f.causes[0].cause for f in diagnosis.findings} == {"residual"}


@pytest.mark.parametrize(
    ("changes", "at", "explained"),
    [
        ({"severity": "low"}, 3, True),  # later and less grave: a disturbance that spread
        ({"severity": "low"}, 0, False),
        ({"severity": "medium"}, 3, False),
    ],
)
def test_disturbances_spread_to_other_places(
    tmp_path: Path, changes: dict[str, Any], at: int, explained: bool
) -> None:
    diagnosis = diagnosed(
        tmp_path,
        {"moment_ratio": {"a": since(0)}, "zero_share": {"embed": since(at)}},
        rule("cause", "moment_ratio", causes=["attention_scale"], explains=["dying_relu"]),
        rule("symptom", "zero_share", fault="dying_relu", causes=["residual"], **changes),
    )
    first = finding(diagnosis, "symptom").causes[0].cause
    assert first == ("attention_scale" if explained else "residual")


@pytest.mark.parametrize(
    ("changes", "explained"),
    [({}, True), ({"fault": "overfitting"}, False), ({"severity": "high"}, False)],
)
def test_what_is_wrong_with_the_model_explains_its_components(
    tmp_path: Path, changes: dict[str, Any], explained: bool
) -> None:
    diagnosis = diagnosed(
        tmp_path,
        {"carried_gradients": {"model": since(2)}, "zero_share": {"embed": since(0)}},
        rule("cause", "carried_gradients", causes=["missing_zero_grad"], explains=["dying_relu"]),
        rule("symptom", "zero_share", **{"fault": "dying_relu", **changes}),
    )
    assert ("initialization" in dict(ranked(diagnosis))) is not explained
    assert ("missing_zero_grad", "model") in ranked(diagnosis)


def test_the_gravest_cause_explains_then_the_earliest(tmp_path: Path) -> None:
    late = rule("late", "moment_ratio", causes=["attention_scale"], explains=["dying_relu"])
    early = rule("early", "step_lambda", causes=["attention_mask"], explains=["dying_relu"])
    symptom = rule("symptom", "zero_share", fault="dying_relu")
    series = {
        "moment_ratio": {"a": since(2)},
        "step_lambda": {"a": since(1)},
        "zero_share": {"a": since(3)},
    }
    for severity, expected in (("medium", "attention_mask"), ("high", "attention_scale")):
        diagnosis = diagnosed(tmp_path, series, {**late, "severity": severity}, early, symptom)
        assert finding(diagnosis, "symptom").causes[0].cause == expected


def test_what_explains_another_is_not_explained_itself(tmp_path: Path) -> None:
    diagnosis = diagnosed(
        tmp_path,
        {name: {"a": since(k)} for k, name in enumerate(("moment_ratio", "step_lambda"))}
        | {"zero_share": {"a": since(2)}},
        rule("first", "moment_ratio", fault="overfitting", explains=["dying_relu"]),
        rule("second", "step_lambda", causes=["attention_mask"], explains=["overfitting"]),
        rule("symptom", "zero_share", fault="dying_relu", causes=["residual"]),
    )
    assert ranked(diagnosis) == [("initialization", "a"), ("attention_mask", "a")]
    assert [f.source for f in diagnosis.findings] == ["rule:first", "rule:symptom", "rule:second"]


def test_of_two_that_explain_each_other_the_earlier_does(tmp_path: Path) -> None:
    first = rule("first", "moment_ratio", fault="overfitting", explains=["dying_relu"])
    second = rule(
        *("second", "step_lambda"),
        fault="dying_relu",
        causes=["attention_mask"],
        explains=["overfitting"],
    )
    for times, expected in (((0, 1), "initialization"), ((1, 0), "attention_mask")):
        series = {
            "moment_ratio": {"a": since(times[0])},
            "step_lambda": {"embed": since(8), "a": since(times[1])},
        }
        assert ranked(diagnosed(tmp_path, series, first, second)) == [(expected, "a")]


# -- whole layers ----------------------------------------------------------------------------------

LAYER = rule(
    *("layer", "moment_ratio"),
    message="the weights of {component} are {moment_ratio:.1f} times too large",
    repairs=[{"name": "reinitialize"}, {"name": "roll_back", "component": "model"}],
)


def test_a_rule_on_every_component_of_a_layer_is_one_finding_of_the_layer(tmp_path: Path) -> None:
    series = {"moment_ratio": {"a.query": since(2), "a.key": since(1), "embed": since(0)}}
    diagnosis = diagnosed(tmp_path, series, LAYER)
    assert [(f.component, f.since_step) for f in diagnosis.findings] == [("embed", 0), ("a", 5)]
    layer = diagnosis.findings[1]
    assert layer.message == "the weights of a are 1.0 times too large"
    assert [(r.name, r.component) for r in layer.repairs] == [
        ("reinitialize", "a"),
        ("roll_back", "model"),
    ]
    assert ranked(diagnosis) == [("initialization", "embed"), ("initialization", "a")]


def test_a_part_of_a_layer_is_not_the_layer(tmp_path: Path) -> None:
    series = {"moment_ratio": {"a.query": since(2), "a.key": since(8), "embed": since(0)}}
    diagnosis = diagnosed(tmp_path, series, LAYER)
    assert [f.component for f in diagnosis.findings] == ["embed", "a.query"]


def test_different_rules_on_the_parts_are_not_one_finding(tmp_path: Path) -> None:
    series = {"moment_ratio": {"a.query": since(0)}, "zero_share": {"a.key": since(0)}}
    diagnosis = diagnosed(tmp_path, series, LAYER, rule("other", "zero_share"))
    assert {f.component for f in diagnosis.findings} == {"a.query", "a.key"}


@pytest.mark.parametrize("number", [10.0, 20.0, 0.6])
def test_renaming_a_component_leaves_numbers_alone(tmp_path: Path, number: float) -> None:
    series = {"moment_ratio": {"0.0": [number], "0.1": [number]}}
    (layer,) = diagnosed(tmp_path, series, LAYER).findings
    assert layer.message == f"the weights of 0 are {number:.1f} times too large"


# -- the order of causes and findings --------------------------------------------------------------


def test_causes_are_ordered_by_severity_rank_time_and_name(tmp_path: Path) -> None:
    diagnosis = diagnosed(
        tmp_path,
        {
            "zero_share": {"embed": since(0)},
            "moment_ratio": {"embed": since(5)},
            "step_lambda": {"ab": since(2), "embed": since(1), "a": since(2)},
            "carried_gradients": {"model": since(7)},
        },
        rule("low", "zero_share", severity="low", causes=["residual"]),
        rule("high", "moment_ratio", severity="high", causes=["attention_scale", "attention_mask"]),
        rule("medium", "step_lambda", causes=["normalization"]),
        rule("critical", "carried_gradients", severity="critical", causes=["label_noise"]),
    )
    assert ranked(diagnosis) == [
        ("label_noise", "model"),
        ("attention_scale", "embed"),
        ("normalization", "embed"),  # as strong as the second guess of the grave one, but earlier
        ("normalization", "a"),
        ("normalization", "ab"),
        ("attention_mask", "embed"),
        ("residual", "embed"),
    ]
    assert [(f.source, f.component) for f in diagnosis.findings] == [
        ("rule:critical", "model"),
        ("rule:high", "embed"),
        ("rule:medium", "embed"),
        ("rule:medium", "a"),
        ("rule:medium", "ab"),
        ("rule:low", "embed"),
    ]


def test_many_weak_hints_do_not_outvote_one_plain_defect(tmp_path: Path) -> None:
    hints = ("zero_share", "moment_ratio", "step_lambda", "attention_logit", "optimized")
    diagnosis = diagnosed(
        tmp_path,
        {**{name: {"embed": since(0)} for name in hints}, "empty_rows": {"a": since(7)}},
        *(rule(f"hint-{i}", name, causes=["residual"]) for i, name in enumerate(hints)),
        rule("defect", "empty_rows", severity="high", causes=["attention_mask"]),
    )
    assert ranked(diagnosis) == [("attention_mask", "a"), ("residual", "embed")]


def test_more_evidence_decides_between_equally_grave_causes(tmp_path: Path) -> None:
    diagnosis = diagnosed(
        tmp_path,
        {
            "zero_share": {"embed": since(0)},
            "moment_ratio": {"a": since(3)},
            "step_lambda": {"a": since(3)},
        },
        rule("once", "zero_share", causes=["residual"]),
        rule("one", "moment_ratio", causes=["attention_mask"]),
        rule("two", "step_lambda", causes=["attention_mask"]),
    )
    assert ranked(diagnosis) == [("attention_mask", "a"), ("residual", "embed")]


# -- places in the program -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cause", "where"),
    [
        ("learning_rate_too_high", Where("train.py", 12)),
        ("component_not_optimized", Where("train.py", 12)),
        ("missing_zero_grad", Where("loop.py", 30)),
        ("loss_function", Where("loop.py", 30)),
        ("initialization", None),
    ],
)
def test_a_finding_points_at_the_line_its_first_cause_is_about(
    tmp_path: Path, cause: str, where: Where | None
) -> None:
    rules = family(tmp_path, rule("a-rule", "zero_share", causes=[cause, "learning_rate_too_low"]))
    series = {"zero_share": {"embed": since(0)}}
    facts = [("backward", "loop.py", 30), ("optimizer", "train.py", 12), ("optimizer", "b.py", 1)]
    recording = made_recording(COMPONENTS, series, FALLING, facts=facts)
    (found,) = diagnose(recording, rules).findings
    assert found.where == where
    (found,) = diagnose(made_recording(COMPONENTS, series, FALLING), rules).findings
    assert found.where is None


# -- what could not be judged ----------------------------------------------------------------------


def unknown(directory: Path, series: Series, feature: str) -> list[tuple[str, tuple[str, ...]]]:
    diagnosis = diagnosed(directory, series, rule("a-rule", feature))
    return [(entry.component, entry.missing) for entry in diagnosis.unknown]


def test_what_could_be_judged_nowhere_is_said_once(tmp_path: Path) -> None:
    for feature in ("zero_share", "attention_entropy", "carried_gradients"):
        assert unknown(tmp_path, FINE, feature) == [("model", (feature,))]


def test_only_those_that_a_rule_is_about_are_said_to_be_unknown(tmp_path: Path) -> None:
    measured = {"zero_share": {name: since(8) for name in COMPONENTS if name not in ("a", "ab")}}
    assert unknown(tmp_path, measured, "zero_share") == [("ab", ("zero_share",))]  # a is a layer
    measured = {"attention_entropy": {"a": since(8)}}
    assert unknown(tmp_path, measured, "attention_entropy") == []  # others are no attention


# -- a learned judge beside the rules --------------------------------------------------------------


def learned(faulty: float, causes: Mapping[str, float], located: float = 0.1) -> Classifier:
    """A classifier that gives these probabilities whatever it sees."""

    def judge(probability: float) -> Judge:
        leaf = np.zeros(1, dtype=NODE)
        says = Trees(leaf, np.zeros(1, dtype=int), math.log(probability / (1 - probability)))
        return Judge(says, np.arange(1), 1.0, 0.0)

    columns = ("loss_fall.latest",)
    known = {"": np.zeros(1)}
    return Classifier(
        run_columns=columns,
        reference=Reference(("gradient_to_start.latest",), known, {"": np.ones(1)}),
        middle=np.zeros(1),
        range=np.array([[-1.0], [1.0]]),
        verdict=judge(faulty),
        causes={name: judge(probability) for name, probability in causes.items()},
        location=judge(located),
        fault_of=dict.fromkeys(causes, "program_defect"),
        threshold=0.5,
        most_unfamiliar=0.5,
        least_known=0.0,
        usual=np.arange(0),
        about={"runs": 7},
    )


def with_classifier(classifier: Classifier, rules: Sequence[Rule] = ()) -> Diagnosis:
    return diagnose(made_recording(COMPONENTS, FINE, FALLING), rules, classifier)


def test_a_classifier_alone_makes_a_run_faulty_with_its_probability() -> None:
    diagnosis = with_classifier(learned(0.9, {"attention_mask": 0.7, "residual": 0.2}))
    (finding,) = diagnosis.findings
    assert diagnosis.verdict == "faulty"
    assert finding.source == "classifier" and finding.n == 7
    assert finding.probability == pytest.approx(0.9)
    assert ranked(diagnosis) == [("attention_mask", "model"), ("residual", "model")]


def test_a_classifier_that_is_not_sure_leaves_a_run_healthy_and_is_listed_as_checked() -> None:
    diagnosis = with_classifier(learned(0.4, {"attention_mask": 0.7}))
    assert (diagnosis.verdict, diagnosis.findings) == ("healthy", ())
    assert [checked.rule for checked in diagnosis.checked] == ["classifier"]


def test_a_classifier_that_never_saw_such_a_run_says_so_and_nothing_else() -> None:
    lost = dataclasses.replace(learned(0.9, {"residual": 0.9}), range=np.array([[5.0], [6.0]]))
    diagnosis = with_classifier(lost)
    assert (diagnosis.verdict, diagnosis.findings) == ("healthy", ())
    assert [unknown.rule for unknown in diagnosis.unknown] == ["classifier"]


def plain(directory: Path) -> tuple[Sequence[Rule], Recording]:
    rules = family(directory, rule("plain", "zero_share", severity="high", causes=["data_order"]))
    series = {**FINE, "zero_share": {"embed": [1.0] * 8}}
    return rules, made_recording(COMPONENTS, series, FALLING)


@pytest.mark.parametrize(("right", "first"), [(90, "data_order"), (10, "residual")])
def test_a_rule_is_believed_as_often_as_it_was_right(
    tmp_path: Path, right: int, first: str
) -> None:
    rules, recording = plain(tmp_path)
    measured = {"plain": Precision(n=100, faulty=95, causes={"data_order": right})}
    diagnosis = diagnose(recording, rules, learned(0.9, {"residual": 0.6}), measured)
    assert ranked(diagnosis)[0][0] == first
    finding = diagnosis.findings[0]
    assert (finding.source, finding.probability, finding.n) == ("rule:plain", 0.95, 100)
    assert finding.causes[0].probability == right / 100


def test_the_gravest_finding_comes_first_and_a_rule_that_was_never_measured_has_no_number(
    tmp_path: Path,
) -> None:
    rules, recording = plain(tmp_path)
    diagnosis = diagnose(recording, rules, learned(0.9, {"residual": 0.9}))
    assert [finding.source for finding in diagnosis.findings] == ["rule:plain", "classifier"]
    assert diagnosis.findings[0].probability is None and diagnosis.findings[0].n is None
    alone = diagnose(recording, rules)
    assert alone.findings == diagnosis.findings[:1]


def test_a_classifier_that_is_not_sure_names_no_cause_of_its_own(tmp_path: Path) -> None:
    rules, recording = plain(tmp_path)
    diagnosis = diagnose(recording, rules, learned(0.4, {"residual": 0.9, "data_order": 0.1}))
    assert [cause for cause, _ in ranked(diagnosis)] == ["data_order"]


def test_what_rules_and_classifier_agree_on_comes_first(tmp_path: Path) -> None:
    one = rule("one", "zero_share", severity="medium", causes=["data_order"])
    other = rule("other", "zero_share", severity="medium", causes=["residual"])
    series = {**FINE, "zero_share": {"0.0": [1.0] * 8}}
    recording = made_recording(COMPONENTS, series, FALLING)
    judge = learned(0.9, {"residual": 0.9}, located=0.9)
    agreed = diagnose(recording, family(tmp_path, one, other), judge)
    assert ranked(agreed)[0] == ("residual", "0.0")


def test_the_same_classifier_gives_the_same_bytes() -> None:
    texts = {diagnosis_to_json(with_classifier(learned(0.9, {"residual": 0.6}))) for _ in range(3)}
    assert len(texts) == 1
