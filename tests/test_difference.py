"""Where a run left a healthy one: what must be said of runs made by hand, and what must not."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_recordings import EVERY, made_recording
from rich.console import Console

from diagnoser.difference import CURVES, LOSS, SPREADS, Difference, compare, growth
from diagnoser.report.difference import difference_to_json, print_difference
from diagnoser.runlog import Recording

COMPONENTS = {
    "encoder": ("embedding", "encoder", 400),
    "hidden": ("feed_forward", "hidden", 200),
    "head": ("head", "head", 20),
}
MEASUREMENTS = 20
QUANTITIES = ("gradient_norm", "weight_norm", "update_ratio", "learning_rate")

Curves = dict[str, dict[str, list[float | None]]]


def curves(seed: int = 0) -> Curves:
    """Returns a training that goes well: gradients fall, weights grow, with noise on the first."""
    noise = np.random.default_rng(seed)
    time = np.arange(MEASUREMENTS)
    fall, grow = 2.0 * np.exp(-time / 10.0), np.sqrt(1.0 + time / 10.0)
    of: dict[str, Callable[[], np.ndarray]] = {
        "gradient_norm": lambda: fall * noise.lognormal(0.0, 0.2, MEASUREMENTS),
        "weight_norm": lambda: grow * noise.normal(1.0, 0.003, MEASUREMENTS),
        "update_ratio": lambda: 0.01 * noise.lognormal(0.0, 0.1, MEASUREMENTS),
        "learning_rate": lambda: np.full(MEASUREMENTS, 0.001),
    }
    return {q: {name: make().tolist() for name in COMPONENTS} for q, make in of.items()}


def losses(seed: int = 0) -> list[float]:
    steps = EVERY * MEASUREMENTS
    noise = np.random.default_rng(100 + seed).lognormal(0.0, 0.1, steps)
    return (2.0 * np.exp(-np.arange(steps) / 60.0) * noise).tolist()


def run(change: Callable[[Curves], None] = lambda _: None, seed: int = 0) -> Recording:
    """Returns a healthy recording, with a change to its curves."""
    made = curves(seed)
    change(made)
    return made_recording(COMPONENTS, made, losses(seed))


def times(factor: float, quantity: str, component: str, since: int = 0, until: int = 99):
    """Returns a change: a quantity is multiplied from one measurement to before another."""

    def change(made: Curves) -> None:
        of = made[quantity][component]
        of[since:until] = [None if v is None else v * factor for v in of[since:until]]

    return change


def names(difference: Difference) -> list[str]:
    return [departed.component for departed in difference.departed]


# -- what is the same ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(1, 9))
def test_another_seed_is_no_difference(seed):
    difference = compare(run(), run(seed=seed))
    assert (difference.verdict, difference.departed, difference.settings) == ("same", (), ())
    assert difference.compared == len(COMPONENTS) * len(QUANTITIES) + 1
    assert difference.steps is not None and difference.steps[0] == 0


NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
SERIES = st.lists(st.none() | NUMBERS, max_size=8)


@settings(deadline=None, max_examples=80)
@given(
    st.fixed_dictionaries(
        {q: st.fixed_dictionaries(dict.fromkeys(("a", "b"), SERIES)) for q in SPREADS}
    ),
    st.lists(NUMBERS, max_size=40),
)
def test_a_run_is_never_different_from_itself(series, of_loss):
    parts = {name: ("other", name, 5) for name in ("a", "b")}
    made = made_recording(parts, series, of_loss)
    difference = compare(made, made)
    assert difference.verdict in ("same", "inconclusive")
    assert difference.departed == difference.settings == ()


@settings(deadline=None, max_examples=40)
@given(st.integers(-40, 40), st.sampled_from(QUANTITIES), st.integers(0, 5), st.integers(0, 3))
def test_the_unit_of_a_quantity_changes_nothing_but_its_numbers(power, quantity, seed, since):
    def scaled(made: Curves) -> None:
        for name in COMPONENTS:
            times(2.0**power, quantity, name)(made)

    def faulty(made: Curves) -> None:
        times(30.0, "gradient_norm", "hidden", since)(made)
        times(0.1, "learning_rate", "head", 5)(made)

    def both(made: Curves) -> None:
        faulty(made)
        scaled(made)

    plain = compare(run(seed=seed), run(faulty, seed=seed + 1))
    other = compare(run(scaled, seed=seed), run(both, seed=seed + 1))
    assert [(d.component, d.step) for d in plain.departed] == [
        (d.component, d.step) for d in other.departed
    ]
    for one, two in zip(plain.departed, other.departed, strict=True):
        for a, b in zip(one.departures, two.departures, strict=True):
            assert (a.quantity, a.step, a.from_the_start) == (b.quantity, b.step, b.from_the_start)
            assert b.bounds == pytest.approx(a.bounds, rel=1e-9)


@settings(deadline=None, max_examples=20)
@given(st.permutations(("w", "x.y", "z[0]")), st.integers(0, 5))
def test_other_names_change_names_alone(given_names, seed):
    renamed = dict(zip(COMPONENTS, given_names, strict=True))

    def recording(change: Callable[[Curves], None], by: int, *, rename: bool) -> Recording:
        made = curves(by)
        change(made)
        if not rename:
            return made_recording(COMPONENTS, made, losses(by))
        parts = {
            renamed[name]: (kind, renamed[name], n) for name, (kind, _, n) in COMPONENTS.items()
        }
        series = {q: {renamed[name]: v for name, v in of.items()} for q, of in made.items()}
        return made_recording(parts, series, losses(by))

    change = times(20.0, "update_ratio", "hidden", 8)
    plain, other = (
        compare(recording(lambda _: None, seed, rename=r), recording(change, seed + 1, rename=r))
        for r in (False, True)
    )
    assert [renamed.get(name, name) for name in names(plain)] == names(other)
    assert [d.departures for d in plain.departed] == [d.departures for d in other.departed]
    assert plain.compared == other.compared


def test_the_same_logs_give_the_same_text():
    change = times(20.0, "update_ratio", "hidden", 8)
    first, second = (difference_to_json(compare(run(), run(change, seed=1))) for _ in range(2))
    assert first == second


# -- what left, when, and in what order ------------------------------------------------------------


def test_what_left_is_named_from_the_step_on_with_what_followed():
    def change(made: Curves) -> None:
        times(50.0, "gradient_norm", "hidden", 8)(made)
        times(3.0, "weight_norm", "hidden", 12)(made)
        times(1 / 40.0, "update_ratio", "encoder", 10)(made)

    difference = compare(run(), run(change, seed=1))
    assert difference.verdict == "different"
    assert [(d.component, d.step) for d in difference.departed] == [
        ("hidden", 8 * EVERY),
        ("encoder", 10 * EVERY),
    ]
    first, second = difference.departed[0].departures
    assert (first.quantity, second.quantity) == ("gradient_norm", "weight_norm")
    assert second.step == 12 * EVERY
    assert not first.from_the_start and first.bounds > 1.0
    assert first.bad > 5.0 * first.good > 0.0
    assert "hidden left first, from step 40, in gradient norm" in difference.reason


def test_what_is_so_from_the_start_is_said_to_be_and_the_furthest_comes_first():
    def change(made: Curves) -> None:
        times(100.0, "learning_rate", "head")(made)
        times(2.0, "learning_rate", "encoder")(made)

    difference = compare(run(), run(change, seed=1))
    assert names(difference) == ["head", "encoder"]
    assert all(departed.from_the_start for departed in difference.departed)
    rates = {c.component: (c.good, c.bad) for c in difference.settings}
    assert rates["head"] == pytest.approx((0.001, 0.1))
    assert rates["encoder"] == pytest.approx((0.001, 0.002))


@pytest.mark.parametrize(("length", "left"), [(1, False), (2, False), (3, True), (6, True)])
def test_two_measurements_prove_nothing_three_do(length, left):
    change = times(100.0, "weight_norm", "hidden", 8, 8 + length)
    assert names(compare(run(), run(change))) == (["hidden"] if left else [])


def test_at_the_end_fewer_do_where_they_are_further_away():
    last = MEASUREMENTS - 1
    assert names(compare(run(), run(times(1.4, "weight_norm", "hidden", last)))) == []
    assert names(compare(run(), run(times(99.0, "weight_norm", "hidden", last)))) == ["hidden"]


def test_a_faster_fall_is_no_departure_a_higher_end_is():
    def sooner(made: Curves) -> None:
        for name in COMPONENTS:
            made["gradient_norm"][name] = [
                2.0 * math.exp(-k * 1.15 / 10.0) for k in range(MEASUREMENTS)
            ]

    assert compare(run(), run(sooner)).verdict == "same"


def test_a_gradient_that_is_zero_has_left():
    difference = compare(run(), run(times(0.0, "gradient_norm", "hidden", 4)))
    assert names(difference) == ["hidden"]
    assert difference.departed[0].departures[0].bad == 0.0


def test_the_loss_leaves_too_and_is_never_named_before_a_component():
    stuck = made_recording(COMPONENTS, curves(1), [2.0] * (EVERY * MEASUREMENTS))
    difference = compare(run(), stuck)
    assert names(difference) == ["model"]
    assert difference.departed[0].departures[0].quantity == LOSS
    made = curves(1)
    times(100.0, "weight_norm", "head", 15)(made)
    difference = compare(run(), made_recording(COMPONENTS, made, [2.0] * (EVERY * MEASUREMENTS)))
    assert names(difference) == ["model", "head"]
    assert difference.first is not None and difference.first.component == "head"


# -- what is not known, and what is no number ------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_left_at_once(value):
    def change(made: Curves) -> None:
        made["gradient_norm"]["hidden"][7] = value

    difference = compare(run(), run(change))
    (left,) = difference.departed
    assert (left.component, left.step) == ("hidden", 7 * EVERY)
    assert left.departures[0].bounds == math.inf
    assert difference.verdict == "different"


def test_where_the_healthy_run_has_no_number_nothing_is_known():
    def change(made: Curves) -> None:
        for name in COMPONENTS:
            made["gradient_norm"][name] = [math.nan] * MEASUREMENTS

    unknown = run(change)
    assert compare(unknown, run(times(1e6, "gradient_norm", "hidden"))).verdict == "same"
    assert compare(unknown, unknown).verdict == "same"


def test_a_loss_that_is_not_finite_has_left_at_its_step():
    of = losses(1)
    of[43] = math.nan
    difference = compare(run(), made_recording(COMPONENTS, curves(1), of))
    (left,) = difference.departed
    assert (left.component, left.step, left.departures[0].quantity) == ("model", 43, LOSS)


def test_runs_that_were_measured_at_other_steps_are_compared_where_both_are():
    def thinned(made: Curves) -> None:
        for of in made.values():
            for values in of.values():
                values[:] = [v if k % 3 == 1 else None for k, v in enumerate(values)]

    assert compare(run(), run(thinned, seed=3)).verdict == "same"
    assert compare(run(thinned), run(seed=3)).verdict == "same"

    def both(made: Curves) -> None:
        times(100.0, "weight_norm", "hidden", 7)(made)
        thinned(made)

    assert names(compare(run(), run(both, seed=3))) == ["hidden"]


# -- what they have in common ----------------------------------------------------------------------


def test_a_run_that_died_after_three_steps_cannot_be_told():
    short = made_recording(
        COMPONENTS, {q: {n: v[:1] for n, v in of.items()} for q, of in curves(1).items()},
        losses(1)[:3],
    )  # fmt: skip
    difference = compare(run(), short)
    assert difference.verdict == "inconclusive"
    assert any("training loss" in reason for reason in difference.not_compared)
    assert [(c.what, c.good, c.bad) for c in difference.settings] == [("steps", 100, 3)]


def test_another_model_cannot_be_told_and_a_changed_one_is_different():
    parts = {"x": ("head", "x", 3)}
    series = {"gradient_norm": {"x": [1.0] * MEASUREMENTS}}
    assert compare(run(), made_recording(parts, series, losses())).verdict == "inconclusive"
    wider = {**COMPONENTS, "hidden": ("feed_forward", "hidden", 300), "extra": ("norm", "extra", 4)}
    difference = compare(run(), made_recording(wider, curves(), losses()))
    assert difference.verdict == "different" and difference.departed == ()
    told = {(c.what, c.component): (c.good, c.bad) for c in difference.settings}
    assert told == {("elements", "hidden"): (200, 300), ("component", "extra"): (None, "norm")}


def test_nothing_at_all_cannot_be_told():
    empty = made_recording({}, {})
    assert compare(empty, empty).verdict == "inconclusive"
    assert compare(run(), empty).verdict == "inconclusive"
    assert compare(empty, run()).verdict == "inconclusive"


def test_arguments_are_told_and_decide_nothing():
    def started(*arguments: str, seed: int) -> Recording:
        header = {"script": "train.py", "arguments": list(arguments), "python": "3.12.1"}
        return dataclasses.replace(run(seed=seed), header=header)

    difference = compare(
        started("data", "--lr", "-0.1", "--seed=1", "--quick", seed=0),
        started("data", "--lr", "0.3", "--seed=2", "--warmup", "5", seed=1),
    )
    assert difference.verdict == "same"
    assert [(c.what, c.good, c.bad) for c in difference.settings] == [
        ("argument --lr", "-0.1", "0.3"),
        ("argument --seed", "1", "2"),
        ("argument --quick", "", None),
        ("argument --warmup", None, "5"),
    ]
    assert "argument --quick: given -> none" in page(difference)


def test_what_the_program_does_is_told_where_it_is_a_yes_or_a_no():
    def checked(made: Curves, masked: float) -> None:
        made["masked_rows"] = {"hidden": [masked] * 2}
        made["mask_leak"] = {"hidden": [0.25 + masked / 8] * 2}
        made["trainable"] = {name: [1.0] * MEASUREMENTS for name in COMPONENTS}

    difference = compare(run(lambda m: checked(m, 0.0)), run(lambda m: checked(m, 1.0), seed=1))
    assert [(c.what, c.component, c.good, c.bad) for c in difference.settings] == [
        ("masked_rows", "hidden", 0.0, 1.0)
    ]

    def frozen(made: Curves) -> None:
        checked(made, 0.0)
        made["trainable"]["hidden"] = [0.0] * MEASUREMENTS

    difference = compare(run(lambda m: checked(m, 0.0)), run(frozen, seed=1))
    assert difference.first is not None and difference.first.component == "hidden"
    assert difference.first.departures[0].quantity == "trainable"


def test_bounds_grow_with_the_number_of_curves_and_never_shrink():
    grown = [growth(n) for n in (0, 1, CURVES, 2 * CURVES, 20 * CURVES)]
    assert grown[:3] == [1.0, 1.0, 1.0]
    assert 1.0 < grown[3] < grown[4] < 2.0


# -- how it is shown -------------------------------------------------------------------------------


def page(difference: Difference, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_difference(difference, console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_the_page_says_what_left_first_and_fits_eighty_columns():
    def change(made: Curves) -> None:
        times(50.0, "gradient_norm", "hidden", 8)(made)
        times(100.0, "learning_rate", "head", 12)(made)

    text = page(compare(run(), run(change, seed=1)))
    lines = text.splitlines()
    assert lines[0].startswith("different: ")
    assert max(map(len, lines)) <= 80
    assert " 1. hidden from step 40" in lines
    assert text.index(" 1. hidden") < text.index(" 2. head")
    assert "gradient norm" in text and "where the healthy" in text
    assert page(compare(run(), run(seed=1))).startswith("same: ")
    assert page(compare(run(), made_recording({}, {}))).startswith("inconclusive: ")


HOSTILE = "fc\x1b[31m[bold]\u202e\n" + "x" * 300


def test_names_do_nothing_to_a_terminal():
    parts = {HOSTILE: ("head", HOSTILE, 4), "0": ("other", "0", 4)}
    series = {"gradient_norm": {HOSTILE: [1.0, 1.1] * 8, "0": [1.0, 1.1] * 8}}
    good = dataclasses.replace(made_recording(parts, series), run=HOSTILE, header={HOSTILE: 1})
    series = {"gradient_norm": {HOSTILE: [100.0] * 16, "0": [1.0, 1.1] * 8}}
    bad = made_recording({**parts, HOSTILE + "2": ("head", "", 4)}, series)
    difference = compare(good, bad)
    text = page(difference)
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "\\x1b[31m[bold]" in text
    assert max(map(len, text.splitlines())) <= 80
    assert json.loads(difference_to_json(difference))["departed"][0]["component"] == HOSTILE


def test_json_has_no_numbers_that_json_has_not():
    def change(made: Curves) -> None:
        made["gradient_norm"]["hidden"][7:9] = [math.inf, math.nan]
        made["update_ratio"]["head"][3] = math.nan

    def refuse(name: str) -> float:
        raise AssertionError(name)

    document = json.loads(difference_to_json(compare(run(), run(change))), parse_constant=refuse)
    assert document["schema"] == "diagnoser.difference/1"
    assert document["verdict"] == "different"
    head, hidden = document["departed"]
    assert head["departures"][0]["bad"] == "NaN"
    assert hidden["departures"][0]["bad"] == "Infinity"
    assert hidden["departures"][0]["bounds"] == "Infinity"
    assert (head["since_step"], hidden["since_step"]) == (3 * EVERY, 7 * EVERY)


def test_the_norm_of_few_weights_may_differ_more_than_that_of_many():
    """Two draws of n normal numbers have norms whose logarithms differ by about 1 / sqrt(n)."""
    verdicts = {}
    for elements in (20, 20_000):
        parts = {name: ("feed_forward", name, elements) for name in ("a", "b")}
        series = {"weight_norm": {"a": [1.0] * 20, "b": [2.0] * 20}}
        other = {"weight_norm": {"a": [1.45] * 20, "b": [2.0] * 20}}
        runs = [made_recording(parts, of, [1.0] * 100) for of in (series, other)]
        verdicts[elements] = compare(*runs).verdict
    assert verdicts == {20: "same", 20_000: "different"}
