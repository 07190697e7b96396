"""Scores with known answers: who is right, how often, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score, roc_curve

from diagnoser.benchmark.dataset import Look, Seen, Truth
from diagnoser.benchmark.families import family_of
from diagnoser.benchmark.judges import by_rules, precisions
from diagnoser.benchmark.scoring import (
    STATISTICS,
    Verdict,
    by_fault,
    by_operator,
    difference,
    figures,
    reliability,
)
from diagnoser.classifier import Vectors
from diagnoser.diagnosis import Claim
from diagnoser.errors import BenchmarkError
from diagnoser.features import CATALOGUE, PROGRAM_NAMES
from diagnoser.rules import Precision

NOTHING = Vectors({}, {}, (), ())
CLEAN = Truth(
    hash="0", subject="s", track="test", recipe="a", role="clean", operators=(), severity="",
    harm="clean", trivial=False, defect=False, faults=(), causes=(), components=(), curvature="0",
)  # fmt: skip
HOT = replace(
    CLEAN, hash="1", role="fault", operators=("O1",), severity="high", harm="proven",
    causes=("learning_rate_too_high",), curvature="+",
)  # fmt: skip
FROZEN = replace(
    HOT, hash="2", operators=("O11b",), causes=("component_not_optimized",),
    components=("layers.0.attention",), defect=True,
)  # fmt: skip
MASKED = replace(HOT, hash="3", operators=("M1",), causes=("attention_mask",), defect=True)


def of(name, verdicts):
    statistic = STATISTICS[name]
    return statistic.of(statistic.numbers([v for v in verdicts if statistic.counts(v)]))


def value(found, name):
    (figure,) = [figure for figure in found if figure.name == name]
    return figure


# -- what counts as what ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("truth", "faulty", "control"),
    [
        (CLEAN, False, "HC1"),
        (HOT, True, ""),
        (replace(HOT, harm="ambiguous"), False, ""),
        (replace(HOT, harm="incomplete"), False, ""),
        (replace(HOT, harm="equivalent"), False, "HC5a"),
        (replace(MASKED, harm="equivalent"), False, "HC5b"),
        (replace(HOT, role="compound"), True, ""),
        (replace(CLEAN, role="HC3", operators=("G1",), harm="equivalent"), False, "HC3"),
        (replace(CLEAN, role="HC3", operators=("G1",), harm="ambiguous"), False, "HCx"),
        (replace(CLEAN, role="HC4", operators=("V1",), harm="no effect"), False, "HC4"),
        (replace(HOT, harm="not worse"), False, "HC5a"),
        (replace(MASKED, harm="no effect"), False, ""),
        (replace(CLEAN, role="HC2", operators=("R2",), harm="proven"), False, ""),
    ],
)
def test_only_proven_harm_is_faulty_and_a_harmful_control_is_none(truth, faulty, control):
    assert (truth.is_faulty, truth.control) == (faulty, control)


def test_a_mistake_does_not_show_before_it_is_made():
    late, short = replace(HOT, operators=("X2",)), replace(HOT, operators=("E1",))
    assert [late.shows(p) for p in (0.1, 0.5, 1.0)] == [False, False, True]
    assert [short.shows(p) for p in (0.1, 0.5, 1.0)] == [False, False, True]
    assert HOT.shows(0.1) and CLEAN.shows(0.1)


# -- figures ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=2, max_size=40))
def test_the_area_under_the_curve_is_that_of_scikit_learn(runs):
    verdicts = [Verdict(HOT if f else CLEAN, i, True, float(s)) for i, (f, s) in enumerate(runs)]
    ours = of("auroc", verdicts)
    if len({f for f, _ in runs}) < 2:
        assert math.isnan(ours)
    else:
        theirs = roc_auc_score([f for f, _ in runs], [s for _, s in runs])
        assert ours == pytest.approx(theirs, abs=1e-12)


def test_a_score_that_is_not_a_number_has_no_area():
    verdicts = [Verdict(HOT, 0, True, math.nan), Verdict(CLEAN, 1, False, 0.0)]
    assert math.isnan(of("auroc", verdicts))


CAUSES = ("learning_rate_too_high", "attention_mask", "initialization", "loss_function")


@given(st.lists(st.tuples(*2 * (st.sampled_from(CAUSES),)), min_size=1, max_size=30))
def test_macro_f1_is_that_of_scikit_learn_over_the_categories_that_are_true(pairs):
    from diagnoser.vocabulary import CAUSE_CATEGORY

    verdicts = [
        Verdict(replace(HOT, causes=(true,)), i, True, 1.0, causes=(said,))
        for i, (true, said) in enumerate(pairs)
    ]
    true, said = ([CAUSE_CATEGORY[c] for c in side] for side in zip(*pairs, strict=True))
    labels = sorted(set(true))
    expected = f1_score(true, said, labels=labels, average="macro", zero_division=0)
    assert of("macro_f1", verdicts) == pytest.approx(expected, abs=1e-12)


def test_a_compound_is_right_with_either_cause_and_a_judge_without_causes_is_wrong():
    both = replace(HOT, causes=("label_noise", "optimizer_misconfigured"))
    right = [Verdict(both, i, True, 1.0, (c,)) for i, c in enumerate(both.causes)]
    assert of("macro_f1", right) == 1.0
    assert of("macro_f1", [Verdict(both, 0, True, 1.0)]) == 0.0


def test_recall_false_alarms_causes_and_places():
    verdicts = [
        Verdict(HOT, 0, True, 0.9, ("learning_rate_too_high", "missing_warmup")),
        Verdict(HOT, 1, True, 0.8, ("label_noise", "residual", "learning_rate_too_high")),
        Verdict(FROZEN, 0, True, 0.9, FROZEN.causes, ("model", "layers.0.attention.q")),
        Verdict(FROZEN, 1, False, 0.1, (), ("head", "layers.0.attention")),
        *(Verdict(CLEAN, i, i == 0, 0.2) for i in range(4)),
        Verdict(replace(MASKED, harm="equivalent"), 0, True, 0.9),
    ]  # fmt: skip
    found = figures(verdicts)
    recall = value(found, "recall")
    assert (recall.value, recall.n) == (0.75, 4) and recall.low < 0.75 < recall.high
    assert value(found, "false alarms HC1").value == 0.25
    assert value(found, "false alarms HC5b").value == 1.0  # scored apart
    assert value(found, "auroc").n == 8
    assert value(found, "cause_top_1").value == 0.5
    assert value(found, "cause_top_3").value == 0.75
    assert value(found, "component_top_1").value == 0.5  # the whole model is no place
    assert value(found, "component_top_3").value == 1.0
    assert by_operator(verdicts) == {"O1": (2, 2), "O11b": (1, 2)}


def test_nothing_is_said_of_what_nothing_was_counted_on():
    found = figures([Verdict(CLEAN, 0, False, 0.0)])
    assert {figure.name for figure in found} == {"false alarms HC1", "false alarms HC1+HC2"}


def test_an_interval_over_configurations_is_wider_than_one_over_runs():
    alike = [Verdict(HOT, i, True, 1.0, ("learning_rate_too_high",)) for i in range(20)]
    alike += [Verdict(MASKED, i, True, 1.0, ("label_noise",)) for i in range(20)]
    figure = value(figures(alike), "cause_top_1")
    assert (figure.low, figure.value, figure.high) == (0.0, 0.5, 1.0)


def test_recall_at_five_percent_lets_no_more_than_that_of_ordinary_runs_pass():
    ordinary = [Verdict(CLEAN, i, False, i / 40) for i in range(40)]  # two of 40 may pass
    faulty = [Verdict(HOT, i, False, score) for i, score in enumerate((0.93, 0.925, 0.99, 2.0))]
    odd = [
        Verdict(replace(CLEAN, role="HC4", harm="no effect"), 0, True, 9.0)
    ]  # not ordinary: moves nothing
    figure = value(figures(ordinary + faulty + odd), "recall_at_5")
    assert figure.value == 0.75 and figure.n == 44  # above 0.925, the third highest


@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2).filter(
        lambda rows: len({faulty for _, faulty in rows}) == 2
    )
)
def test_recall_at_five_percent_is_a_point_of_the_roc_curve(rows):
    said = [Verdict(HOT if faulty else CLEAN, 0, False, score) for score, faulty in rows]
    wrong, found, _ = roc_curve([f for _, f in rows], [s for s, _ in rows], drop_intermediate=False)
    assert of("recall_at_5", said) == pytest.approx(found[wrong <= 0.05].max())


def test_judges_are_compared_on_the_same_runs_only():
    good = [Verdict(HOT, i, True, 1.0) for i in range(5)]
    good += [Verdict(CLEAN, i, False, 0.0) for i in range(5)]
    bad = [replace(verdict, score=0.5) for verdict in good]
    gap = difference("auroc", good, bad)
    assert gap.value == 0.5 and gap.low == gap.high == 0.5
    with pytest.raises(BenchmarkError, match="same runs"):
        difference("auroc", good, bad[::-1])


# -- rules as a judge ------------------------------------------------------------------------------


def seen(truth, fired=(), seed=0, prefix=1.0):
    claims = tuple(Claim(rule, severity, at, 5, CAUSED) for rule, severity, at in fired)
    return Seen(truth, Look("watched", seed, prefix, NOTHING, claims, {}, {}))


CAUSED = ("learning_rate_too_high", "residual")
NAMES = dict.fromkeys(("spike", "odd", "sure", "doubtful"), CAUSED)


def test_the_precision_of_a_rule_counts_whole_runs_once_and_only_those_whose_truth_is_known():
    twice = [("spike", "high", "a"), ("spike", "high", "b"), ("odd", "low", "a")]
    runs = [
        seen(HOT, twice),
        seen(HOT, twice, prefix=0.5),
        seen(CLEAN, twice),
        seen(CLEAN),
        seen(replace(HOT, harm="ambiguous"), twice),
        seen(replace(MASKED, harm="equivalent"), twice),
    ]
    assert [run.truth.is_scored for run in runs] == [True, True, True, True, False, False]
    counted = Precision(n=2, faulty=1, causes={"learning_rate_too_high": 1, "residual": 0})
    assert precisions(runs, NAMES) == {"odd": counted, "spike": counted}


def test_rules_are_as_sure_as_the_most_precise_that_fires():
    runs = [seen(HOT, [("sure", "high", "a")], seed=i) for i in range(20)]
    runs += [seen(CLEAN, [("doubtful", "medium", "a")], seed=i) for i in range(20)]
    known = precisions(runs, NAMES)
    scores = [
        by_rules(seen(HOT, fired), known).score
        for fired in (
            [],
            [("odd", "low", "a")],
            [("doubtful", "medium", "a")],
            [("sure", "high", "a")],
            [("sure", "high", "a"), ("doubtful", "medium", "a")],
        )
    ]
    assert scores[0] == scores[1] == 0.0
    assert all(a < b for a, b in pairwise(scores[1:]))


def test_rules_name_causes_once_and_components_without_the_whole_model():
    verdict = by_rules(seen(HOT, [("r", "high", "model"), ("r", "high", "head")]), {})
    assert verdict.faulty
    assert verdict.causes == CAUSED
    assert verdict.components == ("head",)


# -- families --------------------------------------------------------------------------------------

CURVATURE = {"update_curvature", "trace", "lambda_min", "lambda_max", "step_sharpness"}
CURVATURE |= {"step_lambda", "overshoot", "coupling_share", "coupling_norm"}
FORWARD = {"attention_entropy", "attention_logit", "empty_rows"}
FORWARD |= {"input_scale", "input_similarity", "input_zero_share"}


def test_every_feature_is_in_the_family_of_what_it_is_measured_from():
    for name, feature in CATALOGUE.items():
        of = set(feature.quantities)
        family = family_of(
            {"run": "", "component": "excess.", "pair": "excess.pair."}[feature.scope] + name
        )
        if family == "P":
            assert of <= PROGRAM_NAMES, name
            continue
        assert (family == "H") == bool(of & CURVATURE), name
        assert (family == "A") == bool(of & FORWARD), name


def test_a_row_of_numbers_is_told_apart_by_name_alone():
    assert {family_of(f"excess.{n}.latest") for n in ("trace_z", "step_lambda")} == {"H"}
    assert np.unique([family_of(n) for n in ("loss_rise.latest", "accuracy.highest")]) == ["L"]


# -- faults and probabilities ----------------------------------------------------------------------


def test_a_fault_is_right_where_it_is_expected_and_harm_was_proven():
    hot = replace(HOT, faults=("exploding_gradient",))
    harmless = replace(hot, harm="equivalent")
    runs = [
        (hot, {"exploding_gradient"}),
        (hot, {"oscillating_loss"}),
        (harmless, {"exploding_gradient"}),
        (CLEAN, {"exploding_gradient"}),
        (CLEAN, set()),
    ]
    assert by_fault(runs) == {
        "exploding_gradient": (3, 1, 1, 2),
        "oscillating_loss": (1, 1, 0, 0),
    }


def test_how_sure_is_held_against_how_often_right_and_what_is_not_known_is_left_out():
    unknown = replace(HOT, harm="ambiguous")
    said = [
        Verdict(truth, 0, faulty=True, score=score)
        for truth, score in [(HOT, 1.0), (HOT, 0.92), (CLEAN, 0.98), (CLEAN, 0.0), (unknown, 0.5)]
    ]
    assert reliability(said) == [(0.0, 0.0, 1, 0), (0.9, pytest.approx(2.9 / 3), 3, 2)]


def test_false_alarms_on_ordinary_runs_are_counted_together():
    other = replace(CLEAN, role="HC2", operators=("R2",), harm="equivalent")
    said = [Verdict(t, 0, faulty=f, score=f) for t, f in [(CLEAN, 1), (CLEAN, 0), (other, 0)]]
    assert value(figures(said), "false alarms HC1+HC2").value == pytest.approx(1 / 3)
