"""UMLAUT, DeepLocalize and DeepDiagnosis as rules, on recordings made by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from made_recordings import Components, Series, made_recording

from diagnoser.benchmark import families, published
from diagnoser.benchmark.baselines import autotrainer
from diagnoser.benchmark.dataset import opinions
from diagnoser.benchmark.evaluate import OPINIONS
from diagnoser.diagnosis import DEFAULT_FAMILIES, FAMILIES, SHIPPED, default_rules, diagnose
from diagnoser.features import CATALOGUE, feature_tables
from diagnoser.features.logged import OF_LOGS
from diagnoser.features.published import OF_PUBLISHED
from diagnoser.rules import Rule, load_rules, shipped_rules_directory
from diagnoser.runlog import Recording

NAN = math.nan
STEPS = 200  # epochs of ten steps, of two measurements each
MEASURED = STEPS // 5
COMPONENTS: Components = {  # name: kind, layer, elements
    "first": ("feed_forward", "first", 100),
    "norm": ("norm", "norm", 10),
    "last": ("head", "last", 25),
}
FAMILY = {name: default_rules(Path(name)) for name in published.JUDGES}
RULES = {rule.id: rule for rules in FAMILY.values() for rule in rules}


def everywhere(value: float) -> dict[str, list[float]]:
    return {name: [value] * MEASURED for name in COMPONENTS}


def falling(start: float) -> list[float]:
    return [start * 0.99**k for k in range(MEASURED)]


HEALTHY: dict[str, dict[str, Sequence[float | None]]] = {
    "gradient_norm": {name: falling(1.0) for name in COMPONENTS},
    "weight_norm": {name: falling(3.0) for name in COMPONENTS},
    "zero_share": everywhere(0.1),
    "input_zero_share": everywhere(0.5),
    "non_finite_gradient": everywhere(0.0),
    "non_finite_weight": everywhere(0.0),
    "learning_rate": everywhere(0.001),
    "saturated_share": {"model": [0.1] * MEASURED},
    "probabilities_into_loss": {"model": [0.0] * MEASURED},
    "classes": {"model": [4.0] * MEASURED},
    "input_largest": {"model": [1.0] * MEASURED},
    "input_non_finite": {"model": [0.0] * MEASURED},
    "dropout_largest": {"model": [0.5] * MEASURED},
    "output_normalised": {"model": [0.0] * MEASURED},
}
LOSSES = [2.0 * 0.99**k for k in range(STEPS)]
ACCURACIES = [0.5 + 0.002 * k for k in range(STEPS)]


def recording(
    changed: Series | None = None,
    losses: Sequence[float] = LOSSES,
    accuracies: Sequence[float] = ACCURACIES,
) -> Recording:
    series = {q: {**HEALTHY.get(q, {}), **of} for q, of in {**HEALTHY, **(changed or {})}.items()}
    return made_recording(COMPONENTS, series, losses, accuracies)


def found(run: Recording) -> set[str]:
    """The rules of all three families that fire, each family by itself."""
    return {
        finding.source.removeprefix("rule:")
        for rules in FAMILY.values()
        for finding in diagnose(run, rules).findings
    }


def at(place: str, quantity: str, values: Sequence[float | None]) -> dict[str, Series]:
    return {"changed": {quantity: {place: values}}}


def from_step(step: int, value: float, before: float) -> list[float]:
    return [before if 5 * k < step else value for k in range(MEASURED)]


def replaced(curve: Sequence[float], start: int, values: Sequence[float]) -> list[float]:
    return [*curve[:start], *values, *curve[start + len(values) :]]


INVALID = {"deeplocalize-invalid-loss", "deepdiagnosis-invalid-loss"}
STUCK = {"deeplocalize-weights-stuck", "deepdiagnosis-unchanged-weights"}
IDLE = {"deeplocalize-gradient-stuck", "deepdiagnosis-unchanged-gradient"}
DEAD = {"deepdiagnosis-dead-node"}
ZERO_OUTPUT = {"deeplocalize-output-zero", "deepdiagnosis-output-zero"}
NO_LOSS: Series = {"classes": {"model": [None] * MEASURED}}
NORMALISED: Series = {"output_normalised": {"model": [1.0] * MEASURED}}

# What is changed of the healthy run, and the rules that then fire: these and no other.
CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    # UMLAUT
    "inputs beyond 1": (at("model", "input_largest", [1.01] * MEASURED), {"umlaut-input-range"}),
    "no softmax anywhere": ({"changed": NO_LOSS}, {"umlaut-missing-softmax"}),
    "softmax in the model": ({"changed": {**NO_LOSS, **NORMALISED}}, set()),
    "NaN in the input and in the loss": (
        {**at("model", "input_non_finite", [0.1] * MEASURED), "losses": [NAN] * STEPS},
        {"umlaut-nan-input", *INVALID},
    ),
    "NaN in the input alone": (at("model", "input_non_finite", [0.1] * MEASURED), set()),
    "dropout beyond a half": (
        at("model", "dropout_largest", [0.51] * MEASURED),
        {"umlaut-high-dropout"},
    ),
    "learning rate above 0.01": (
        at("last", "learning_rate", [0.011] * MEASURED),
        {"umlaut-learning-rate-high"},
    ),
    "learning rate of 0.01": (at("last", "learning_rate", [0.01] * MEASURED), set()),
    "learning rate below 1e-7": (
        at("last", "learning_rate", [0.9e-7] * MEASURED),
        {"umlaut-learning-rate-low"},
    ),
    "warmup within the first epoch": (
        at("last", "learning_rate", [0.0, *[0.001] * (MEASURED - 1)]),
        set(),
    ),
    # DeepLocalize and DeepDiagnosis
    "a loss that is NaN": ({"losses": replaced(LOSSES, 100, [NAN])}, INVALID),
    "a loss that is infinite": ({"losses": replaced(LOSSES, 100, [math.inf])}, INVALID),
    "five steps with one loss": (
        {"losses": replaced(LOSSES, 100, [0.3] * 5)},
        {"deeplocalize-loss-unchanged"},
    ),
    "five steps with one loss, in two blocks": (
        {"losses": replaced(LOSSES, 102, [0.3] * 5)},
        set(),
    ),
    "five epochs with one mean loss": (
        {"losses": replaced(LOSSES, 50, [0.3, 0.5] * 25)},
        {"deepdiagnosis-loss-unchanged"},
    ),
    "four epochs with one mean loss": ({"losses": replaced(LOSSES, 50, [0.3, 0.5] * 20)}, set()),
    "five steps with one accuracy": (
        {"accuracies": replaced(ACCURACIES, 100, [0.7] * 5)},
        {"deeplocalize-accuracy-unchanged"},
    ),
    "one accuracy in all epochs": (
        {"accuracies": [0.4, 0.6] * 100},
        {"deepdiagnosis-accuracy-unchanged"},
    ),
    "an epoch with no right answer": (
        {"accuracies": replaced(ACCURACIES, 0, [0.0] * 10)},
        {"deepdiagnosis-invalid-accuracy", "deeplocalize-accuracy-unchanged"},
    ),
    "weights that are NaN": (
        at("norm", "non_finite_weight", from_step(100, 2.0, 0.0)),
        {"deeplocalize-invalid-weights", "deepdiagnosis-numerical-weights"},
    ),
    "weights that are zero in half of the run": (
        at("norm", "weight_norm", [*[0.0] * 20, *falling(3.0)[20:]]),
        {"deeplocalize-weights-stuck", "deepdiagnosis-numerical-weights"},
    ),
    "weights that become zero late": (
        at("norm", "weight_norm", [*falling(3.0)[:30], *[0.0] * 10]),
        {"deepdiagnosis-numerical-weights"},
    ),
    "weights that are zero at the start alone": (
        at("norm", "weight_norm", [0.0, *falling(3.0)[1:]]),
        {"deeplocalize-weights-stuck"},  # all of the steps so far: it ends a run at the first
    ),
    "weights of a dense layer that are the same": (
        at("first", "weight_norm", [2.0] * MEASURED),
        STUCK,
    ),
    "weights of a norm that are the same": (at("norm", "weight_norm", [2.0] * MEASURED), set()),
    "weights that are the same in five measurements": (
        at("first", "weight_norm", replaced(falling(3.0), 10, [2.0] * 5)),
        {"deeplocalize-weights-stuck"},
    ),
    "a gradient that is NaN": (
        at("first", "non_finite_gradient", from_step(100, 2.0, 0.0)),
        {"deeplocalize-invalid-gradient", "deepdiagnosis-numerical-gradient"},
    ),
    "a gradient of a norm that is NaN": (
        at("norm", "non_finite_gradient", from_step(100, 2.0, 0.0)),
        set(),
    ),
    "a gradient that is zero": (
        {"changed": {"zero_share": {"first": [1.0] * 40}, "gradient_norm": {"first": [0.0] * 40}}},
        {*IDLE, "deepdiagnosis-numerical-gradient", "deepdiagnosis-vanishing-gradient"},
    ),
    "a gradient that is the same": (at("first", "gradient_norm", [0.5] * MEASURED), IDLE),
    "a gradient that vanishes": (
        at("first", "gradient_norm", [0.9e-6 * 0.99**k for k in range(MEASURED)]),
        {
            "deepdiagnosis-vanishing-gradient"
        },  # of a hundred entries: 0.9e-7 is the root mean square
    ),
    "a small gradient": (
        at("first", "gradient_norm", [2e-6 * 0.99**k for k in range(MEASURED)]),
        set(),
    ),
    "outputs that are zero": (
        at("last", "input_zero_share", [1.0] * MEASURED),
        {*ZERO_OUTPUT, *DEAD},
    ),
    "outputs that are zero now and then": (
        at("last", "input_zero_share", [0.5, 0.5, 1.0, *[0.5] * 37]),
        {"deepdiagnosis-output-zero"},
    ),
    "dead nodes": (at("last", "input_zero_share", from_step(195, 0.7, 0.5)), DEAD),
    "dead nodes that come back": (
        at("last", "input_zero_share", [0.5, *[0.9] * 38, 0.5]),
        set(),
    ),
    "saturated activations": (
        at("model", "saturated_share", from_step(100, 0.51, 0.1)),
        {"deepdiagnosis-saturated-activation"},
    ),
}


def test_a_healthy_run_is_silent_and_everything_was_judged() -> None:
    run = recording()
    for rules in FAMILY.values():
        diagnosis = diagnose(run, rules)
        assert diagnosis.verdict == "healthy"
        assert diagnosis.unknown == ()
        assert {checked.rule for checked in diagnosis.checked} == {rule.id for rule in rules}


@pytest.mark.parametrize("name", CASES)
def test_a_published_condition_fires_its_rules_and_no_other(name: str) -> None:
    changes, expected = CASES[name]
    assert found(recording(**changes)) == expected


def test_every_rule_fires_in_some_run() -> None:
    assert set().union(*(expected for _, expected in CASES.values())) == set(RULES)


@pytest.mark.parametrize(
    "quantity",
    [
        *("dropout_largest", "input_largest", "output_normalised"),
        *("saturated_share", "input_zero_share", "learning_rate", "zero_share"),
        "input_non_finite",
    ],
)
def test_what_the_log_does_not_hold_is_unknown_and_nothing_is_found(quantity: str) -> None:
    run = recording({quantity: {p: [None] * MEASURED for p in (*COMPONENTS, "model")}})
    about = {
        rule.id
        for rule in RULES.values()
        if any(quantity in CATALOGUE[name].quantities for name in rule.names)
    }
    unknown = {entry.rule for rules in FAMILY.values() for entry in diagnose(run, rules).unknown}
    assert about
    assert found(run) == set()
    # A condition that needs one of two is decided by the other.
    assert unknown <= about
    assert unknown or quantity in ("input_non_finite", "output_normalised", "zero_share")


# -- the numbers that were published ---------------------------------------------------------------

# UMLAUT: umlaut/heuristics.py (BerkeleyHCI/umlaut); DeepLocalize: Our Callback/callbacks.py, class
# DeepLocalize (Wardat-ISU/DeepLocalize); DeepDiagnosis: callback/callbacks.py, class
# mapFaluireToFix (DeepDiagnosis/ICSE2022). Without the 0.5 of what is 0 or 1.
NUMBERS = {
    "umlaut-input-range": {1.0},  # x_min < -1, x_max > 1
    "umlaut-nan-input": {0.5, 0.0},
    "umlaut-high-dropout": {0.5},
    "umlaut-learning-rate-high": {0.01, 1.0},  # from the end of the first epoch on
    "umlaut-learning-rate-low": {1e-7, 1.0},
    "deeplocalize-weights-stuck": {0.5},  # counter / 2
    "deeplocalize-gradient-stuck": {0.5},
    "deeplocalize-output-zero": {0.5},
    "deepdiagnosis-dead-node": {0.7},  # threshold_layer_1
    "deepdiagnosis-saturated-activation": {0.5, 1.0},  # threshold_layer
    "deepdiagnosis-vanishing-gradient": {1e-7, 1.0},  # threshold_VG
    "deepdiagnosis-invalid-accuracy": {0.0},
}


@pytest.mark.parametrize("name", NUMBERS)
def test_the_numbers_of_a_rule_are_those_that_were_published(name: str) -> None:
    (stage,) = RULES[name].stages
    words = re.findall(r"(?<![\w.])\d[\d.]*(?:e-?\d+)?", stage.when.text)
    flags = [n for n in RULES[name].names if n.endswith("_unchanged")]
    assert {float(word) for word in words} == NUMBERS[name] | ({0.5} if flags else set())


@pytest.mark.parametrize(("length", "fires"), [(4, False), (5, True)])
def test_a_block_is_of_five_as_published(length: int, fires: bool) -> None:
    """N = 5 in both callbacks."""
    losses = replaced(LOSSES, 100, [0.3] * length)
    assert ("deeplocalize-loss-unchanged" in found(recording(losses=losses))) is fires


# -- families --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", published.JUDGES)
def test_the_rules_of_a_family_bear_its_name(family: str) -> None:
    assert family in FAMILIES
    assert FAMILY[family]
    for rule in FAMILY[family]:
        assert rule.family == family
        assert rule.id.startswith(f"{family}-")


def test_all_families_load_together() -> None:
    """An id is one rule's alone."""
    loaded: tuple[Rule, ...] = load_rules(shipped_rules_directory("umlaut").parent, CATALOGUE)
    assert {rule.family for rule in loaded} == set(SHIPPED)


def test_no_classifier_learns_from_what_was_published() -> None:
    for family in ("diagnoser", "autotrainer"):
        assert not OF_PUBLISHED & {name for rule in default_rules(family) for name in rule.names}
    columns = families._ordered(f"{name}.latest" for name in CATALOGUE)
    learned = {name.partition(".")[0] for name in columns}
    not_learned = OF_PUBLISHED | OF_LOGS | families.OF_CHECKS | families.OF_ACCURACY
    assert learned == CATALOGUE.keys() - not_learned


# -- judges ----------------------------------------------------------------------------------------


def test_a_family_judges_as_a_diagnosis_by_it_does() -> None:
    for changes, _ in CASES.values():
        run = recording(**changes)
        tables = feature_tables(run)
        assert published.by_family("autotrainer", tables, run) == autotrainer(run)
        for family, rules in FAMILY.items():
            said, by_itself = published.by_family(family, tables, run), diagnose(run, rules)
            assert said.faulty is (by_itself.verdict == "faulty")
            assert said.causes == tuple(dict.fromkeys(c.cause for c in by_itself.causes))
            fired = {finding.source for finding in by_itself.findings}
            assert said.score == len(fired) / len(rules)


def test_every_family_is_a_judge_of_the_benchmark() -> None:
    run = recording()
    assert set(opinions(run, feature_tables(run))) == set(OPINIONS)
    assert set(FAMILIES) - set(DEFAULT_FAMILIES) <= set(OPINIONS)
