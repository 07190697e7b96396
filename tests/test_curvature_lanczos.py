"""When a Lanczos run stops, what its bounds promise, and what a warm start is worth."""

import json
import math
import re

import pytest
import torch
from curvature_subjects import (
    TinyTransformer,
    build,
    dense,
    loss_of,
    positions,
    transformer_components,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

import diagnoser.curvature.lanczos
from benchmarks.intervals import wilson
from benchmarks.lanczos_stopping import (
    FACTORS,
    GAPS,
    LARGE,
    RESULTS,
    TINY,
    Block,
    power_iteration,
    run,
    trial,
)
from diagnoser.curvature import extreme_eigenvalues
from diagnoser.errors import MeasurementError

LEAN = {"tolerance": 0.01, "min_steps": 2, "dtype": torch.float64}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def rotated(spectrum, seed=0):
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    n = len(spectrum)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=seeded(seed), dtype=torch.float64))
    A = Q * torch.tensor(spectrum, dtype=torch.float64) @ Q.T
    return (A + A.T) / 2


def bulk(size, scale=1.0):
    return [scale * math.sin(k) for k in range(size)]


# A second eigenvalue close by is what an early stop takes for the end.
CLOSE = rotated([1.0, 0.9, 0.85, -0.7, -0.6, *bulk(95, 0.4)])


@pytest.fixture(scope="module")
def blocks():
    model = build(TinyTransformer)
    parameters = dict(model.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):
        H = dense(loss_of(model), parameters)
    found = {}
    for c in transformer_components():
        at = positions(c.parts, parameters)
        found[c.name] = H[at][:, at]
    return found


@pytest.mark.parametrize("risk", [0.05, 0.2])
def test_the_spectrum_leaves_its_bounds_no_more_often_than_the_risk(risk):
    exact = torch.linalg.eigvalsh(CLOSE)
    outside = 0
    for seed in range(400):
        ends = extreme_eigenvalues(CLOSE.mv, 100, seeded(seed), risk=risk, **LEAN)
        assert ends.lower <= ends.lambda_min.value <= ends.lambda_max.value <= ends.upper
        outside += (float(exact[0]) < ends.lower) + (float(exact[-1]) > ends.upper)
    assert wilson(outside, 800)[0] <= risk


def test_the_bounds_hold_at_every_step_and_not_only_at_a_chosen_one():
    # Looking after every step and taking the tightest bounds costs no further risk.
    exact = torch.linalg.eigvalsh(CLOSE)
    outside = 0
    for seed in range(200):
        runs = [
            extreme_eigenvalues(
                CLOSE.mv, 100, seeded(seed), max_steps=k, tolerance=0.0, dtype=torch.float64
            )
            for k in range(2, 11)
        ]
        outside += float(exact[0]) < max(ends.lower for ends in runs) - 1e-9
        outside += float(exact[-1]) > min(ends.upper for ends in runs) + 1e-9
    assert wilson(outside, 400)[0] <= 0.05


def test_the_bounds_are_where_the_chance_of_an_unseen_eigenvalue_is_the_risk():
    # After one step p_1(x) = (x - alpha) / beta, by hand.
    A = torch.diag(torch.tensor([3.0, 1.0, -2.0], dtype=torch.float64))
    ends = extreme_eigenvalues(A.mv, 3, seeded(0), max_steps=1, dtype=torch.float64)
    q = ends.basis[0]
    alpha = float(q @ A @ q)
    beta = float((A @ q - alpha * q).norm())
    chance = math.sqrt(6 / math.pi / (1 + ((ends.upper - alpha) / beta) ** 2))
    assert chance == pytest.approx(0.05, rel=1e-4)
    assert ends.upper - alpha == pytest.approx(alpha - ends.lower)


def test_a_smaller_risk_and_margin_cost_products_and_save_errors():
    exact = torch.linalg.eigvalsh(CLOSE)

    def measure(**arguments):
        runs = [
            extreme_eigenvalues(CLOSE.mv, 100, seeded(s), **LEAN, **arguments) for s in range(200)
        ]
        wrong = sum(abs(e.lambda_max.value - float(exact[-1])) > 0.05 for e in runs)
        return sum(e.products for e in runs), wrong

    careless, usual, careful = measure(margin=1.0), measure(), measure(risk=0.005)
    assert careless[0] < usual[0] < careful[0]
    assert careless[1] > usual[1] >= careful[1]
    assert usual[1] <= 0.05 * 200


def test_without_a_floor_a_dominant_end_takes_few_products():
    A = rotated([30.0, -20.0, *bulk(98)])
    runs = [extreme_eigenvalues(A.mv, 100, seeded(s), **LEAN) for s in range(20)]
    assert max(ends.products for ends in runs) < 8
    assert all(ends.lambda_max.value == pytest.approx(30.0, rel=0.03) for ends in runs)
    assert all(ends.lambda_min.value == pytest.approx(-20.0, abs=0.03 * 30) for ends in runs)
    floor = extreme_eigenvalues(A.mv, 100, seeded(0), min_steps=8, dtype=torch.float64)
    assert floor.products == 8


def test_exact_runs_have_their_ends_as_bounds():
    A = rotated([2.0, -1.0, 0.5])
    whole = extreme_eigenvalues(A.mv, 3, seeded(0), tolerance=0.0, dtype=torch.float64)
    assert (whole.lower, whole.upper) == (pytest.approx(-1.0), pytest.approx(2.0))
    zero = extreme_eigenvalues(torch.zeros_like, 50, seeded(0))
    assert (zero.lower, zero.upper) == (0.0, 0.0)


def test_bounds_scale_with_the_operator():
    one = extreme_eigenvalues(CLOSE.mv, 100, seeded(3), **LEAN)
    tiny = extreme_eigenvalues(lambda v: 1e-30 * (CLOSE @ v), 100, seeded(3), **LEAN)
    assert tiny.products == one.products
    assert tiny.upper == pytest.approx(1e-30 * one.upper, rel=1e-5)
    assert tiny.lower == pytest.approx(1e-30 * one.lower, rel=1e-5)


# --- warm starts ---------------------------------------------------------------------------------


def test_a_warm_start_takes_at_most_five_products_where_little_has_changed():
    later = CLOSE + 0.02 * rotated(bulk(100), seed=1)
    exact = torch.linalg.eigvalsh(later)
    products = []
    for seed in range(30):
        before = extreme_eigenvalues(CLOSE.mv, 100, seeded(seed), risk=0.005, **LEAN)
        ends = extreme_eigenvalues(
            later.mv, 100, seeded(1000 + seed), start=before.warm_start, **LEAN
        )
        products.append(ends.products)
        assert ends.lambda_max.value == pytest.approx(float(exact[-1]), abs=0.05)
        assert ends.lambda_min.value == pytest.approx(float(exact[0]), abs=0.05)
    assert sum(products) / len(products) <= 5


def test_several_vectors_are_a_start_like_their_sum():
    before = extreme_eigenvalues(CLOSE.mv, 100, seeded(0), **LEAN)
    rows = torch.stack([before.vector_min, before.vector_max])
    many = extreme_eigenvalues(CLOSE.mv, 100, seeded(1), start=rows, **LEAN)
    one = extreme_eigenvalues(CLOSE.mv, 100, seeded(1), start=before.warm_start, **LEAN)
    assert many.lambda_max == one.lambda_max
    assert many.products == one.products
    assert extreme_eigenvalues(CLOSE.mv, 100, seeded(1), start=before.dominant(3), **LEAN).products


@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_a_direction_that_outgrew_all_others_is_seen_at_once(factor):
    missed = 0
    for seed in range(40):
        u = torch.randn(100, generator=seeded(500 + seed), dtype=torch.float64)
        u /= u.norm()
        later = CLOSE + factor * torch.outer(u, u)
        truth = float(torch.linalg.eigvalsh(later)[-1])
        before = extreme_eigenvalues(CLOSE.mv, 100, seeded(seed), **LEAN)
        ends = extreme_eigenvalues(
            later.mv, 100, seeded(1000 + seed), start=before.warm_start, **LEAN
        )
        missed += ends.lambda_max.value < 0.95 * truth
    assert wilson(missed, 40)[0] <= 0.05


def test_bounds_from_a_warm_start_are_those_of_its_random_share():
    # The start is the next eigenvector: all that is known of the end comes from the random share.
    exact, U = torch.linalg.eigh(CLOSE)
    outside = 0
    for seed in range(300):
        ends = extreme_eigenvalues(CLOSE.mv, 100, seeded(seed), start=U[:, -2] + U[:, 1], **LEAN)
        outside += (float(exact[0]) < ends.lower) + (float(exact[-1]) > ends.upper)
    assert wilson(outside, 600)[0] <= 0.05


@pytest.mark.parametrize(
    "start",
    [
        torch.zeros(100),
        torch.full((100,), math.nan),
        torch.stack([torch.ones(100), -torch.ones(100)]),
    ],
)
def test_a_start_that_is_none_is_an_error(start):
    with pytest.raises(MeasurementError, match="zero or not finite"):
        extreme_eigenvalues(CLOSE.mv, 100, seeded(0), start=start, **LEAN)


def test_a_start_of_another_size_is_an_error():
    with pytest.raises(MeasurementError, match=r"\(3, 7\) for 100 rows"):
        extreme_eigenvalues(CLOSE.mv, 100, seeded(0), start=torch.ones(3, 7), **LEAN)


# --- the benchmark -------------------------------------------------------------------------------


def test_a_trial_counts_what_is_wrong_and_what_is_outside(blocks):
    for name, matrix in blocks.items():
        block = Block.of(name, matrix)
        if block.scale < 1e-9:
            continue
        exact = torch.linalg.eigvalsh(matrix)
        ends = run(block, 0, tolerance=0.0)
        found = trial(block, ends)
        assert found.products == ends.products
        assert found.beyond == 0
        assert found.errors[1] == pytest.approx(
            abs(ends.lambda_max.value - float(exact[-1])) / float(exact.abs().max()), abs=1e-12
        )
        assert trial(Block(name, 1, matrix.mv, -1e3, 1e3), ends).beyond == 2


def test_power_iteration_finds_one_end_and_falls_between_two():
    alone = Block.of("alone", rotated([3.0, -1.0, *bulk(40, 0.5)]))
    assert all(power_iteration(alone, seed).errors[0] < 0.01 for seed in range(10))
    torn = Block.of("torn", rotated([0.4493, -0.449, *bulk(40, 0.02)]))
    assert max(power_iteration(torn, seed).errors[0] for seed in range(10)) > 0.05


@pytest.fixture(scope="module")
def stored():
    return json.loads(RESULTS.read_text(encoding="utf-8"))["subjects"]


def pooled(tables):
    """Products, and the share of wrong ends in percent, over all blocks of both tiny models."""
    tables = list(tables)
    ends = sum(t["ends"] for t in tables)
    products = sum(t["products"] * t["ends"] for t in tables) / ends
    return f"{products:.1f}", f"{100 * sum(t['wrong'] for t in tables) / ends:.1f} %"


def test_the_docstring_says_what_was_measured(stored):
    text = re.sub(r"\s+", " ", diagnoser.curvature.lanczos.__doc__)
    tiny = [stored[name] for name in TINY]
    for rule in ("floor", "lean", "wide"):
        products, wrong = pooled(s["cold"][rule] for s in tiny)
        assert f"{products} products, {wrong} of the ends wrong" in text
    products, _ = pooled(s["cold"]["power"] for s in tiny)
    assert f"power iteration {products} for one end" in text
    found = [pooled(s["warm"][str(gap)] for s in tiny) for gap in GAPS]
    assert "{}, {} and {} products".format(*(products for products, _ in found)) in text
    assert "{}, {} and {} of the ends wrong".format(*(wrong for _, wrong in found)) in text


def test_ends_are_outside_their_bounds_no_more_often_than_the_risk(stored):
    assert set(stored) == {*TINY, *LARGE}
    for subject in stored.values():
        for rule in ("floor", "lean", "wide"):
            assert subject["cold"][rule]["beyond_share"] <= 0.05
            assert subject["cold"][rule]["wrong_share"] <= 0.05
        for rows in subject.get("warm", {}).values():
            assert rows["beyond_share"] <= 0.05


def test_no_rule_is_much_cheaper_than_one_end_by_power_iteration_from_a_random_start(stored):
    # What bounds it: to know that nothing is further out costs more than to have the end.
    for subject in stored.values():
        products = {rule: rows["products"] for rule, rows in subject["cold"].items()}
        assert products["wide"] < products["lean"] < products["floor"]
        assert products["power"] < 3 * products["wide"]


def test_a_direction_of_twice_the_magnitude_is_hardly_ever_missed_and_never_for_long(stored):
    for name in TINY:
        rows = {row["factor"]: row for row in stored[name]["new_direction"]}
        assert list(rows) == list(FACTORS)
        for row in rows.values():
            assert row["missed_share"][0] <= 0.05
            assert row["missed_share"][2] <= 0.01
        assert rows[2.0]["missed_share"][1] == rows[4.0]["missed_share"][0] == 0.0
