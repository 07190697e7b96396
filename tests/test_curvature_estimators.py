from __future__ import annotations

import math
import statistics

import pytest
import torch
from curvature_subjects import (
    TinyHAN,
    TinyTransformer,
    build,
    dense,
    loss_of,
    positions,
    transformer_components,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diagnoser.curvature import (
    Hessian,
    Question,
    answer,
    block_eigenvalues,
    block_trace,
    extreme_eigenvalues,
    largest_eigenvalues,
    precondition,
)
from diagnoser.errors import MeasurementError
from diagnoser.types import Part

BLOCK = (Part("theta"),)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def symmetric(n: int, seed: int, trace: float | None = None) -> Tensor:
    A = torch.randn(n, n, generator=seeded(seed), dtype=torch.float64)
    A = (A + A.T) / 2
    if trace is not None:
        A += torch.eye(n, dtype=torch.float64) * (trace - A.trace()) / n
    return A


def quadratic(*matrices: Tensor) -> Hessian:
    theta = nn.Parameter(torch.ones(len(matrices[0]), dtype=torch.float64))
    return Hessian([0.5 * theta @ A @ theta for A in matrices], {"theta": theta})


def rotated(spectrum: list[float], seed: int) -> Tensor:
    n = len(spectrum)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=seeded(seed), dtype=torch.float64))
    return Q @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ Q.T


# --- trace ---------------------------------------------------------------------------------------


def test_small_blocks_are_summed_exactly():
    model = build(TinyTransformer)
    parameters = dict(model.named_parameters())
    H = dense_math(model, parameters)
    hessian = Hessian(loss_of(model), parameters)
    for c in transformer_components():
        found = block_trace(hessian, c.parts, seeded(0), max_products=100)
        at = positions(c.parts, parameters)
        assert found.value == pytest.approx(float(H[at, at].sum()), rel=1e-9, abs=1e-12)
        assert (found.std_error, found.method) == (0.0, "exact")
        assert found.samples == len(at)


def dense_math(model, parameters, seed=0):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return dense(loss_of(model, seed), parameters)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    A = symmetric(120, seed=1)
    hessian, truth = quadratic(A), float(A.trace())
    found = [
        block_trace(hessian, BLOCK, seeded(seed), max_products=50, question=Question.within(0.0))
        for seed in range(200)
    ]
    distances = [abs(e.value - truth) / e.std_error for e in found]
    assert max(distances) < 4.5
    covered = sum(d <= 2.0 for d in distances) / len(distances)
    assert 0.91 <= covered <= 0.985  # 95 % +- 2.5 binomial standard errors
    # The error falls as one over the root of the number of random vectors.
    spread = statistics.stdev(e.value for e in found)
    assert spread == pytest.approx(statistics.fmean(e.std_error for e in found), rel=0.2)
    assert all((e.samples, e.method) == (50, "hutchinson") for e in found)


def test_a_negative_trace_is_right_or_undecided_and_never_two_probes():
    # A stop rule relative to the signed mean ends here after 2 random vectors.
    A = symmetric(200, seed=2, trace=-5.72)
    A = A / 14.0  # as in the example: a single random vector's deviation is about 7
    A += torch.eye(200, dtype=torch.float64) * (-5.72 - A.trace()) / 200
    hessian = quadratic(A)
    found = [
        block_trace(hessian, BLOCK, seeded(s), question=Question("sign"), max_products=100)
        for s in range(50)
    ]
    said = {e: answer(e.value, e.std_error, math.inf, Question("sign")) for e in found}
    decided = [e for e in found if said[e] != "undecided"]
    assert all(e.samples >= 8 for e in found)
    assert all(e.samples == 100 for e in found if e not in decided)
    assert len(decided) >= 25
    assert sum(e.value > 0 for e in decided) <= 1
    long = block_trace(hessian, BLOCK, seeded(0), max_products=199, question=Question.within(0.0))
    assert abs(long.value + 5.72) < 4 * long.std_error


def test_the_requested_relative_error_is_reached_or_the_cap():
    A = rotated([5.0] * 60 + [1.0] * 60, seed=3)
    found = block_trace(
        quadratic(A), BLOCK, seeded(0), max_products=119, question=Question.within(0.02)
    )
    assert found.samples < 119
    assert found.std_error <= 0.02 * found.value
    # Where the trace is zero, its share of the Frobenius norm decides, not its share of itself.
    zero = block_trace(
        quadratic(symmetric(120, 4, trace=0.0)), BLOCK, seeded(0), question=Question.within(0.5)
    )
    assert zero.samples < 20
    capped = block_trace(
        quadratic(symmetric(120, 4, trace=0.0)),
        BLOCK,
        seeded(0),
        max_products=20,
        question=Question.within(1e-6),
    )
    assert capped.samples == 20


def test_chunks_give_the_error_that_other_samples_would_make():
    matrices = [symmetric(30, seed=s, trace=10.0 * s) for s in range(4)]
    traces = [float(A.trace()) for A in matrices]
    exact = block_trace(quadratic(*matrices), BLOCK, seeded(0))
    assert exact.value == pytest.approx(statistics.fmean(traces))
    assert exact.batch_std_error == pytest.approx(statistics.stdev(traces) / 2)
    sampled = block_trace(
        quadratic(*matrices), BLOCK, seeded(0), max_products=29, question=Question.within(0.0)
    )
    assert abs(sampled.value - exact.value) < 4 * sampled.std_error
    # The sampled one is widened by Student's distribution, since it rests on four chunks.
    assert 1.0 < sampled.batch_std_error / exact.batch_std_error < 2.2
    assert block_trace(quadratic(matrices[0]), BLOCK, seeded(0)).batch_std_error is None


def test_the_same_seed_gives_the_same_trace_and_touches_no_other_stream():
    hessian = quadratic(symmetric(150, seed=5))
    state = torch.random.get_rng_state()
    first, again = (block_trace(hessian, BLOCK, seeded(1), max_products=20) for _ in range(2))
    assert first == again
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_single_random_vector_has_an_unknown_error():
    found = block_trace(quadratic(symmetric(5, seed=6)), BLOCK, seeded(0), max_products=1)
    assert math.isnan(found.std_error)


# --- eigenvalues ---------------------------------------------------------------------------------


# Squares of smaller numbers underflow to zero.
eigenvalues = st.floats(-100, 100).map(lambda x: x if abs(x) > 1e-100 else 0.0)


@settings(max_examples=60, deadline=None)
@given(
    spectrum=st.lists(eigenvalues, min_size=1, max_size=12),
    seed=st.integers(0, 2**31),
    steps=st.integers(1, 14),
)
def test_some_eigenvalue_lies_within_the_reported_error_of_each_end(spectrum, seed, steps):
    A = rotated(spectrum, seed)
    ends = extreme_eigenvalues(
        lambda v: A @ v,
        len(spectrum),
        seeded(seed),
        max_steps=steps,
        tolerance=0.0,
        dtype=torch.float64,
    )
    slack = 1e-9 * max(abs(x) for x in spectrum) + 1e-300
    low, high = min(spectrum), max(spectrum)
    for estimate in (ends.lambda_min, ends.lambda_max):
        assert low - slack <= estimate.value <= high + slack
        assert min(abs(x - estimate.value) for x in spectrum) <= estimate.std_error + slack
    if ends.lambda_max.method == "exact":
        assert ends.lambda_max.value == pytest.approx(high, abs=slack)
        assert ends.lambda_min.value == pytest.approx(low, abs=slack)
        assert ends.lambda_max.std_error == ends.lambda_min.std_error == 0.0


def test_both_ends_of_every_block_of_a_transformer_and_a_han():
    for model in (build(TinyTransformer), build(TinyHAN, packed=True)):
        parameters = dict(model.named_parameters())
        H = dense_math(model, parameters)
        hessian = Hessian(loss_of(model), parameters)
        blocks = [(Part(name),) for name in parameters]
        if isinstance(model, TinyTransformer):
            blocks += [c.parts for c in transformer_components()]
        for block in blocks:
            at = positions(block, parameters)
            exact = torch.linalg.eigvalsh(H[at][:, at])
            size = max(abs(float(exact[0])), abs(float(exact[-1])), 1e-12)
            ends = block_eigenvalues(hessian, block, seeded(0), tolerance=0.01)
            for estimate, truth in ((ends.lambda_min, exact[0]), (ends.lambda_max, exact[-1])):
                assert abs(estimate.value - float(truth)) <= estimate.std_error + 1e-9 * size
                assert abs(estimate.value - float(truth)) <= 0.05 * size
            assert ends.products <= 16


def test_the_defaults_hardly_ever_stop_at_the_wrong_end():
    # With little of the end's vector in the start, an early stop takes the next one for the end.
    wrong = []
    model = build(TinyTransformer)
    parameters = dict(model.named_parameters())
    H = dense_math(model, parameters)
    for c in transformer_components():
        at = positions(c.parts, parameters)
        A = H[at][:, at]
        exact = torch.linalg.eigvalsh(A)
        for seed in range(20):
            ends = extreme_eigenvalues(A.__matmul__, len(A), seeded(seed), dtype=torch.float64)
            allowed = 0.05 * float(exact.abs().max()) + 1e-12
            wrong.append(abs(ends.lambda_max.value - float(exact[-1])) > allowed)
            wrong.append(abs(ends.lambda_min.value - float(exact[0])) > allowed)
    assert len(wrong) > 300
    assert sum(wrong) <= 0.01 * len(wrong)  # see benchmarks/lanczos_stopping.py


def test_the_ritz_vector_attains_its_value():
    A = symmetric(80, seed=7)
    ends = extreme_eigenvalues(
        lambda v: A @ v, 80, seeded(0), max_steps=40, tolerance=1e-3, dtype=torch.float64
    )
    for value, u in ((ends.lambda_min, ends.vector_min), (ends.lambda_max, ends.vector_max)):
        assert float(u @ A @ u) == pytest.approx(value.value)
        residual = float((A @ u - value.value * u).norm())
        assert residual == pytest.approx(value.std_error, rel=1e-6, abs=1e-10)


def test_close_ends_of_opposite_sign_are_told_apart():
    # Power iteration on the magnitude lands between the two, or on either by chance.
    A = rotated([0.4493, -0.4186] + [0.01 * k for k in range(-20, 20)], seed=8)
    for seed in range(20):
        ends = extreme_eigenvalues(
            lambda v: A @ v, 42, seeded(seed), max_steps=24, tolerance=0.01, dtype=torch.float64
        )
        assert ends.lambda_max.value == pytest.approx(0.4493, rel=0.01)
        assert ends.lambda_min.value == pytest.approx(-0.4186, rel=0.01)


def test_a_convex_head_has_its_smallest_eigenvalue_at_zero():
    model = build(TinyTransformer)
    parameters = dict(model.named_parameters())
    hessian = Hessian(loss_of(model), parameters)
    block = (Part("head.weight"), Part("head.bias"))
    ends = block_eigenvalues(hessian, block, seeded(0))
    assert ends.lambda_max.value > 0.01
    assert abs(ends.lambda_min.value) <= ends.lambda_min.std_error + 1e-9


def test_a_zero_block_has_zero_ends_after_two_products():
    ends = extreme_eigenvalues(torch.zeros_like, 50, seeded(0))
    assert (ends.lambda_min.value, ends.lambda_max.value, ends.products) == (0.0, 0.0, 2)
    assert ends.lambda_max.std_error == 0.0
    model = build(TinyTransformer)
    hessian = Hessian(loss_of(model), dict(model.named_parameters()))
    key_bias = block_eigenvalues(hessian, (Part("attention.in_proj_bias", 0, 4, 4),), seeded(0))
    assert abs(key_bias.lambda_max.value) < 1e-12
    assert abs(key_bias.lambda_min.value) < 1e-12


def test_a_block_of_one_element_is_exact():
    ends = extreme_eigenvalues(lambda v: -3.0 * v, 1, seeded(0))
    assert ends.lambda_min == ends.lambda_max
    assert (ends.lambda_max.value, ends.lambda_max.method) == (pytest.approx(-3.0), "exact")


def test_an_end_in_another_invariant_subspace_is_not_missed():
    # The start lies in the first subspace up to the random share of a warm start.
    D = torch.cat([torch.full((30,), 1.0), torch.tensor([-5.0, 7.0])]).double()
    start = torch.zeros(32, dtype=torch.float64)
    start[0] = 1.0
    ends = extreme_eigenvalues(
        lambda v: D * v, 32, seeded(0), tolerance=1e-6, start=start, dtype=torch.float64
    )
    assert (ends.lambda_min.value, ends.lambda_max.value) == (
        pytest.approx(-5.0),
        pytest.approx(7.0),
    )
    assert ends.products < 10


def test_an_end_that_a_warm_start_knows_nothing_of_is_found():
    D = torch.cat([torch.linspace(-1.0, 1.0, 40), torch.tensor([7.0])]).double()
    start = torch.ones(41, dtype=torch.float64)
    start[40] = 0.0
    ends = extreme_eigenvalues(
        lambda v: D * v, 41, seeded(0), max_steps=30, start=start, dtype=torch.float64
    )
    assert ends.lambda_max.value == pytest.approx(7.0, rel=0.03)


def test_a_warm_start_saves_products():
    A = rotated([30.0, -20.0] + [math.sin(k) for k in range(98)], seed=9)
    B = A + 0.02 * symmetric(100, seed=10)
    arguments = {"max_steps": 30, "min_steps": 2, "tolerance": 0.02, "dtype": torch.float64}
    cold = [extreme_eigenvalues(lambda v: B @ v, 100, seeded(s), **arguments) for s in range(10)]
    before = extreme_eigenvalues(lambda v: A @ v, 100, seeded(99), **arguments)
    warm = [
        extreme_eigenvalues(lambda v: B @ v, 100, seeded(s), start=before.warm_start, **arguments)
        for s in range(10)
    ]
    assert sum(e.products for e in warm) < sum(e.products for e in cold)


def test_largest_magnitudes_come_first_with_their_sign():
    A = rotated([-9.0, 8.0, -6.0] + [0.01 * k for k in range(40)], seed=11)
    found = largest_eigenvalues(
        lambda v: A @ v, 43, seeded(0), count=3, tolerance=1e-4, dtype=torch.float64
    )
    assert [e.value for e in found] == pytest.approx([-9.0, 8.0, -6.0], rel=1e-4)
    many = largest_eigenvalues(
        lambda v: A @ v, 43, seeded(0), count=10, tolerance=1.0, dtype=torch.float64
    )
    assert len(many) == 10
    assert [abs(e.value) for e in many] == sorted((abs(e.value) for e in many), reverse=True)


def test_a_preconditioned_operator_has_the_spectrum_of_the_scaled_matrix():
    A = symmetric(12, seed=12)
    D = torch.linspace(0.5, 4.0, 12, dtype=torch.float64)
    D[3] = 0.0
    with pytest.raises(MeasurementError, match="leave them out"):
        precondition(lambda v: A @ v, D)
    left_out = D == 0.0
    product, dimension = precondition(lambda v: A @ v, D, left_out)
    ends = extreme_eigenvalues(product, dimension, seeded(0), tolerance=0.0, dtype=torch.float64)
    kept = ~left_out
    scaled = A[kept][:, kept] / torch.sqrt(D[kept].unsqueeze(0) * D[kept].unsqueeze(1))
    exact = torch.linalg.eigvalsh(scaled)
    assert dimension == 11
    assert ends.lambda_max.value == pytest.approx(float(exact[-1]))
    assert ends.lambda_min.value == pytest.approx(float(exact[0]))


def test_chunks_give_eigenvalues_their_batch_error():
    matrices = [rotated([k + 1.0, -1.0, 0.5, 0.2], seed=13) for k in range(4)]
    ends = block_eigenvalues(quadratic(*matrices), BLOCK, seeded(0))
    assert ends.lambda_max.value == pytest.approx(2.5)
    assert ends.lambda_max.batch_std_error == pytest.approx(statistics.stdev([1, 2, 3, 4]) / 2)
    assert ends.lambda_min.batch_std_error == pytest.approx(0.0, abs=1e-9)


def test_non_finite_products_are_an_error_and_not_a_number():
    with pytest.raises(MeasurementError, match="not finite"):
        extreme_eigenvalues(lambda v: v * math.nan, 5, seeded(0))
    with pytest.raises(MeasurementError, match="without trained parameters"):
        block_eigenvalues(quadratic(torch.eye(2, dtype=torch.float64)), (), seeded(0))
    with pytest.raises(MeasurementError, match="without trained parameters"):
        block_trace(quadratic(torch.eye(2, dtype=torch.float64)), (), seeded(0))
    with pytest.raises(MeasurementError, match="positive"):
        extreme_eigenvalues(lambda v: v, 0, seeded(0))
    assert math.isnan(
        block_trace(
            quadratic(torch.full((20, 20), math.nan, dtype=torch.float64)),
            BLOCK,
            seeded(0),
            max_products=10,
        ).value
    )
