from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diagnoser.curvature.decision import MULTIPLE, Question, answer, decided, student
from diagnoser.errors import MeasurementError

SIGN = Question("sign")
TRIALS = 2000
MOST = 100  # random vectors in a run
FAMILIES = {  # eigenvalues that are sampled; a flat rest gives the trace any mean, without variance
    "one": [1.0],
    "two": [1.0, 1.0],
    "ten": [1.0] * 10,
    "falling": [0.8**k for k in range(20)],
    "mixed signs": [3.0, -1.0, -1.0, 0.5],
    "normal": [],
}


def values(eigenvalues: list[float], seed: int) -> tuple[Tensor, Tensor]:
    """Returns z'Hz without its mean, and 2 |Hz|^2: (TRIALS, MOST), the former of deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    shape = (TRIALS, MOST, max(len(eigenvalues), 1))
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    if not eigenvalues:
        return z[..., 0], torch.ones(TRIALS, MOST, dtype=torch.float64)
    at = torch.tensor(eigenvalues, dtype=torch.float64)
    at = at / (2.0 * at.square().sum()).sqrt()
    return (z.square() - 1.0) @ at, 2.0 * z.square() @ at.square()


def shares(
    centred: Tensor, variances: Tensor, mean: float, *, question: Question = SIGN, every: int = 4
) -> tuple[float, float]:
    """Returns the shares of runs that end at the wrong sign and that end undecided.

    A run is looked at after 8 values and then after every few.
    """
    counts = torch.arange(1, MOST + 1)
    means = ((centred + mean).cumsum(1) / counts).tolist()
    errors = ((variances.cumsum(1) / counts) / counts).sqrt().tolist()
    wrong, undecided = 0, 0
    truth = "above" if mean > 0 else "below"
    for row, error in zip(means, errors, strict=True):
        for n in range(8, MOST + 1, every):
            found = answer(row[n - 1], error[n - 1], n - 1, question)
            if found != "undecided":
                wrong += found != truth
                break
        else:
            undecided += 1
    return wrong / TRIALS, undecided / TRIALS


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sign_is_wrong_in_at_most_one_percent_of_runs_whatever_the_mean(family):
    centred, variances = values(FAMILIES[family], seed=0)
    for mean in (0.001, -0.001, 0.1, -0.1, 0.3, -0.3, 1.0, -1.0, 10.0):
        wrong, undecided = shares(centred, variances, mean)
        assert wrong <= 0.01, (mean, wrong)
        # A mean of one deviation needs some 12 values; one of a third of that mostly more than 100.
        if abs(mean) >= 1.0:
            assert undecided == 0.0
        if abs(mean) <= 0.001:
            assert undecided >= 0.98


def test_normal_values_may_bring_the_spread_between_them_and_be_looked_at_always():
    centred, _ = values([], seed=1)
    counts = torch.arange(1, MOST + 1)
    spread = (centred.square().cumsum(1) - centred.cumsum(1).square() / counts) / (counts - 1)
    spread = spread.clamp(min=0.0).nan_to_num(0.0)
    # `shares` averages variances; give it what makes the average the spread so far.
    variances = torch.diff(spread * counts, dim=1, prepend=torch.zeros(TRIALS, 1).double())
    wrong, _ = shares(centred, variances, 0.001, every=1)
    assert wrong <= 0.01


def test_two_and_a_half_standard_errors_would_not_do(monkeypatch):
    # What the rule is there for, and that the simulation can fail.
    monkeypatch.setattr("diagnoser.curvature.decision.MULTIPLE", 2.5)
    for family in ("one", "normal"):
        centred, variances = values(FAMILIES[family], seed=0)
        assert max(shares(centred, variances, m)[0] for m in (0.001, -0.001)) > 0.015


def test_a_threshold_is_a_sign_after_subtraction():
    question = Question("threshold", threshold=5.0)
    for value in (-1.0, -0.2, 0.0, 0.2, 1.0):
        assert answer(5.0 + value, 0.1, 20, question) == answer(value, 0.1, 20, SIGN)
    assert answer(5.0 + 1.0, 0.1, 20, question) == "above"
    assert answer(5.0 - 1.0, 0.1, 20, question) == "below"
    assert answer(5.0 + 0.2, 0.1, 20, question) == "undecided"
    assert decided(6.0, 0.1, 20, question)
    assert not decided(5.2, 0.1, 20, question)


def test_what_rests_on_little_must_lie_further_away():
    distances = [
        min(k for k in range(1, 5000) if answer(k / 10, 1.0, dof, SIGN) == "above")
        for dof in (2, 4, 8, 32, 1024, math.inf)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] == math.floor(10 * MULTIPLE) + 1
    assert answer(1e9, 1.0, 0, SIGN) == "undecided"


def test_an_unknown_error_decides_nothing_and_an_exact_value_everything():
    nan = math.nan
    precise = Question("relative_error", relative_error=0.05)
    for value, error, dof in (
        (1e9, None, 9),
        (1e9, nan, 9),
        (nan, 1.0, 9),
        (nan, 0.0, 9),
        (1e9, 1.0, nan),
        (1e9, math.inf, 9),
    ):
        assert answer(value, error, dof, SIGN) == "undecided"
        assert not decided(value, error, dof, SIGN)
        assert not decided(value, error, dof, precise)
    for dof in (0, 5, math.inf):
        assert answer(1e-9, 0.0, dof, SIGN) == "above"
        assert answer(-1e-9, 0.0, dof, SIGN) == "below"
        assert decided(-1e-9, 0.0, dof, precise)
    assert answer(0.0, 0.0, 5, SIGN) == "undecided"  # on neither side


def test_a_relative_error_is_known_to_its_share_of_the_value_or_the_floor():
    question = Question("relative_error", relative_error=0.1)
    assert decided(-10.0, 0.99, math.inf, question)
    assert not decided(-10.0, 1.01, math.inf, question)
    assert not decided(-10.0, 0.99, 3, question)  # an error from four values may be larger
    assert not decided(0.0, 0.1, math.inf, question)
    with_floor = Question("relative_error", relative_error=0.1, floor=2.0)
    assert decided(0.0, 0.19, math.inf, with_floor)
    assert not decided(0.0, 0.21, math.inf, with_floor)


def test_student_is_as_rare_as_the_normal_deviation():
    # Quantiles of Student's distribution at 97.5 %.
    for dof, quantile in ((4, 2.776), (6, 2.447), (10, 2.228), (30, 2.042), (math.inf, 1.96)):
        assert student(1.959964, dof) == pytest.approx(quantile, rel=0.01)
    # And at the probability of 3.5 deviations, 0.99977.
    for dof, quantile in ((7, 6.155), (20, 4.177), (50, 3.746)):
        assert student(3.5, dof) == pytest.approx(quantile, rel=0.02)
    assert student(3.5, 1e-3) == math.inf
    assert student(3.5, 0) == student(3.5, math.nan) == math.inf


def test_a_question_that_makes_no_sense_is_refused():
    for arguments in (
        {"kind": "size"},
        {"kind": "relative_error"},
        {"kind": "sign", "relative_error": 0.1},
        {"kind": "sign", "threshold": 1.0},
        {"kind": "threshold", "threshold": math.nan},
    ):
        with pytest.raises(MeasurementError):
            Question(**arguments)
    with pytest.raises(MeasurementError, match="two sides"):
        answer(1.0, 0.1, 5, Question("relative_error", relative_error=0.1))
