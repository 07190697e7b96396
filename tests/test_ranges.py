"""Healthy ranges: what is learnt of healthy runs, and what becomes of it in a file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from diagnoser.benchmark.teaching import Extreme, extremes, learn_ranges
from diagnoser.diagnosis import FAMILIES, default_rules
from diagnoser.errors import BenchmarkError, RuleError
from diagnoser.features import CATALOGUE
from diagnoser.rules import Range, Ranges, evaluate, load_ranges, save_ranges, shipped_ranges
from diagnoser.rules.checking import example_tables
from diagnoser.rules.interval import FALSE, TRUE, UNKNOWN, greater
from diagnoser.rules.ranges import range_key
from diagnoser.table import Column, Table
from diagnoser.vocabulary import KINDS

NAN, INF = math.nan, math.inf

# The extremes of a run


def table(scope, subjects, kinds, **columns) -> Table:
    made = {name: Column.exact(np.array(values, float)) for name, values in columns.items()}
    steps = np.arange(next(iter(made.values())).value.shape[1])
    pairs = tuple(s if isinstance(s, tuple) else (s, None) for s in subjects)
    return Table(scope, steps, pairs, made, kinds)


def test_extremes_are_over_all_subjects_of_a_kind_and_all_steps():
    kinds = {"q0": "query", "q1": "query", "k": "key", "odd": ""}
    component = table(
        "component",
        ["q0", "k", "q1", "odd", "stranger"],
        kinds,
        ratio=[[1, NAN, 3], [7, 8, 9], [-2, 2, 2], [99, 99, 99], [99, 99, 99]],
        never=np.full((5, 3), NAN),
        mostly=[[NAN, INF, 1], [NAN] * 3, [NAN] * 3, [NAN] * 3, [NAN] * 3],
    )
    pair = table(
        "pair",
        [("q0", "k"), ("k", "q1"), ("q0", "q1"), ("q0", "stranger")],
        kinds,
        coupling=[[0.1, 0.2], [-0.3, 0.0], [0.5, NAN], [9, 9]],
    )
    run = table("run", ["model"], {}, loss=[[3.0, 1.0, NAN]])
    found = extremes({"component": component, "pair": pair, "run": run})
    assert sorted(found, key=lambda e: (e.key, e.feature)) == [
        Extreme("component", "component.key", "ratio", 7.0, 9.0),
        Extreme("component", "component.query", "mostly", 1.0, INF),
        Extreme("component", "component.query", "ratio", -2.0, 3.0),
        Extreme("pair", "pair.key|query", "coupling", -0.3, 0.2),
        Extreme("pair", "pair.query|query", "coupling", 0.5, 0.5),
        Extreme("run", "run", "loss", 1.0, 3.0),
    ]


def test_a_run_without_measurements_has_no_extremes():
    nothing = table("component", [], {}, ratio=np.zeros((0, 4)))
    never = table("run", ["model"], {}, loss=np.zeros((1, 0)))
    assert extremes({"component": nothing, "run": never}) == ()


# Learning from many runs


def runs_of(lowest, highest, clusters=None):
    """Runs with one extreme each, of feature x for query."""
    clusters = range(len(lowest)) if clusters is None else clusters
    return [
        (cluster, [Extreme("component", "component.query", "x", float(low), float(high))])
        for cluster, low, high in zip(clusters, lowest, highest, strict=True)
    ]


def learnt(lowest, highest, clusters=None, **options) -> Range | None:
    ranges = learn_ranges(runs_of(lowest, highest, clusters), **options)
    return ranges.features.get("x", {}).get("component.query")


numbers = st.floats(-1e6, 1e6, allow_subnormal=False)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(numbers, numbers).map(sorted), min_size=2, max_size=40),
    st.floats(0.51, 0.999),
)
def test_the_ends_are_numpy_s_quantiles_of_the_runs_extremes(reached, quantile):
    lowest, highest = np.array(reached).T
    found = learnt(lowest, highest, quantile=quantile, fewest=2)
    assert found is not None
    assert found.n == len(reached)
    close = {"rel": 1e-9, "abs": 1e-6}
    assert found.low[0] == pytest.approx(np.quantile(lowest, 1 - quantile), **close)
    assert found.high[0] == pytest.approx(np.quantile(highest, quantile), **close)
    for (value, lower, upper), seen in ((found.low, lowest), (found.high, highest)):
        assert seen.min() <= lower <= value <= upper <= seen.max()


def test_an_end_is_left_by_one_healthy_run_in_a_hundred():
    generator = np.random.default_rng(0)
    lowest, highest = -generator.exponential(size=2000), generator.gumbel(size=2000)
    found = learnt(lowest, highest, np.arange(2000) % 100)
    assert found is not None
    fresh = generator.gumbel(size=20_000)
    assert np.mean(fresh > found.high[0]) == pytest.approx(0.01, abs=0.005)
    assert np.mean(-generator.exponential(size=20_000) < found.low[0]) == pytest.approx(
        0.01, abs=0.005
    )
    # A rule fires on what is above the whole interval: on still fewer.
    assert np.mean(fresh > found.high[2]) < 0.01


def test_the_interval_holds_the_true_end_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    true = -math.log(-math.log(0.9))  # the 90 % quantile of a Gumbel distribution
    held = 0
    clusters = np.arange(300) % 50
    for _ in range(30):
        found = learnt(np.zeros(300), generator.gumbel(size=300), clusters, quantile=0.9)
        assert found is not None
        held += found.high[1] <= true <= found.high[2]
    assert held >= 24  # 28 expected; fewer has a chance below 1 in 100


def test_runs_that_resemble_each_other_make_a_wider_interval():
    generator = np.random.default_rng(2)
    highest = np.repeat(generator.gumbel(size=20), 20)
    clustered = learnt(np.zeros(400), highest, np.arange(400) // 20, quantile=0.9)
    as_if_alone = learnt(np.zeros(400), highest, quantile=0.9)
    assert clustered is not None
    assert as_if_alone is not None
    assert clustered.high[0] == as_if_alone.high[0]
    assert clustered.high[2] - clustered.high[1] > as_if_alone.high[2] - as_if_alone.high[1]


def test_a_range_needs_enough_runs_of_more_than_one_cluster():
    enough = np.arange(100.0)
    assert learnt(-enough, enough) is not None
    assert learnt(-enough[1:], enough[1:]) is None
    assert learnt(-enough[1:], enough[1:], fewest=99) is not None
    assert learnt(-enough, enough, ["one"] * 100) is None


def test_infinite_values_count_as_largest_and_no_end_is_infinite():
    clusters = np.arange(1000) % 100
    highest = np.arange(1000.0)
    highest[:3] = INF  # 3 of 1000: the 99 % quantile is finite, as are those of nearly all draws
    found = learnt(np.zeros(1000), highest, clusters)
    assert found is not None
    assert found.high[0] == pytest.approx(np.quantile(np.nan_to_num(highest, posinf=1e9), 0.99))
    highest[:30] = INF
    assert learnt(np.zeros(1000), highest, clusters) is None
    assert learnt(np.where(np.arange(1000) < 30, -INF, 0), np.ones(1000), clusters) is None
    highest[:30] = np.where(np.arange(30) < 9, INF, 1)  # finite, but not in many a draw
    assert learnt(np.zeros(1000), highest, clusters) is None


def test_features_and_kinds_are_learnt_apart():
    generator = np.random.default_rng(3)
    runs = [
        (
            i % 10,
            [
                Extreme("component", "component.query", "x", 0.0, 1.0),
                Extreme("component", "component.key", "x", 0.0, 2.0),
                Extreme("pair", "pair.key|query", "y", -3.0, 3.0 + generator.random()),
                *([Extreme("run", "run", "z", 0.0, 1.0)] if i < 99 else []),
            ],
        )
        for i in range(100)
    ]
    found = learn_ranges(runs)
    assert (found.quantile, found.runs) == (0.99, 100)
    assert {name: sorted(kinds) for name, kinds in found.features.items()} == {
        "x": ["component.key", "component.query"],
        "y": ["pair.key|query"],
    }
    assert found.features["x"]["component.key"].high == (2.0, 2.0, 2.0)
    assert found == learn_ranges(runs)  # the same runs, the same file


@pytest.mark.parametrize("quantile", [0.5, 1.0, NAN, 99])
def test_a_quantile_that_is_no_high_end_is_refused(quantile):
    with pytest.raises(BenchmarkError, match="between 0.5 and 1"):
        learn_ranges([], quantile)


def test_what_is_learnt_decides_beyond_and_inside_and_leaves_the_rest_open():
    generator = np.random.default_rng(4)
    found = learnt(np.zeros(500), generator.gumbel(size=500), np.arange(500) % 50)
    assert found is not None
    value, lower, upper = (np.array([[x]]) for x in found.high)
    end = Column(value, lower, upper)
    for seen, truth in ((upper + 0.01, TRUE), (value, UNKNOWN), (lower - 0.01, FALSE)):
        assert greater(Column.exact(seen), end).item() == truth


# The file


def bounds(inside):
    lower, value, upper = sorted(inside)
    return value, lower, upper


ends = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=3)
some_range = st.builds(
    Range,
    st.integers(1, 50),
    ends.map(bounds),
    ends.map(bounds),
).filter(lambda kept: kept.low[0] <= kept.high[0])
keys = st.one_of(
    st.just("run"),
    st.sampled_from(KINDS).map(lambda kind: range_key("component", [kind])),
    st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)).map(lambda k: range_key("pair", k)),
)
some_ranges = st.builds(
    Ranges,
    st.floats(0.5, 1.0, exclude_min=True, exclude_max=True),
    st.integers(50, 1000),
    st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_]{0,9}", fullmatch=True),
        st.dictionaries(keys, some_range, min_size=1, max_size=3),
        max_size=3,
    ),
)


@settings(max_examples=60, deadline=None)
@given(some_ranges)
def test_a_file_gives_back_what_was_written(tmp_path_factory, ranges):
    path = tmp_path_factory.getbasetemp() / "ranges.json"
    save_ranges(path, ranges)
    assert load_ranges(path) == ranges
    before = path.read_bytes()
    save_ranges(path, load_ranges(path))
    assert path.read_bytes() == before


GOOD = Ranges(
    runs=200,
    features={
        "x": {"component.query": Range(150, (0.0, -0.5, 0.5), (4.0, 3.0, 5.0))},
        "y": {"pair.key|query": Range(150, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))},
    },
)


def written(directory: Path, ranges: Ranges = GOOD) -> Path:
    path = directory / "healthy-ranges.json"
    save_ranges(path, ranges)
    return path


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("ranges/1", "ranges/2", "schema 'diagnoser.healthy-ranges/2', this version reads"),
        ('"schema"', '"schem"', "no schema"),
        ('"quantile": 0.99', '"quantile": 0.4', "quantile: must be greater than 0.5"),
        ('"quantile": 0.99', '"quantile": 1.0', "quantile: must be less than 1"),
        ('"runs": 200', '"runs": 149', "150 of 149 runs"),
        ('"runs": 200', '"runs": true', "runs: must be a valid integer"),
        ('"runs": 200', '"runs": 200, "runs": 300', "key 'runs' is given twice"),
        ('"runs": 200', '"runs": 200, "more": 1', "more: Extra inputs"),
        ('"runs": 200,', "", "runs: Field required"),
        ('"n": 150, "low"', '"n": 0, "low"', "n: must be greater than or equal to 1"),
        ("[4.0, 3.0, 5.0]", "[-4.0, -5.0, -3.0]", "low 0 is above high -4"),
        ("[4.0, 3.0, 5.0]", "[4.0, 4.5, 5.0]", "high: 4 is not inside its interval"),
        ("[0.0, -0.5, 0.5]", "[0.0, -0.5, -0.1]", "low: 0 is not inside its interval"),
        ("[4.0, 3.0, 5.0]", "[4.0, 3.0]", "at least 3 items"),
        ("[4.0, 3.0, 5.0]", "[4.0, 3.0, 5.0, 6.0]", "at most 3 items"),
        ("[4.0, 3.0, 5.0]", "[4.0, 3.0, Infinity]", "Infinity is no end"),
        ("[4.0, 3.0, 5.0]", "[4.0, NaN, 5.0]", "NaN is no end"),
        ("[4.0, 3.0, 5.0]", "[4.0, 3.0, 1e999]", "finite number"),
        ("[4.0, 3.0, 5.0]", "[4.0, null, 5.0]", "valid number"),
        ("[4.0, 3.0, 5.0]", '["4.0", 3.0, 5.0]', "valid number"),
        ("[4.0, 3.0, 5.0]", "[4.0, true, 5.0]", "valid number"),
        ("component.query", "component.qery", "filed under run, component.KIND"),
        ("component.query", "query", "filed under run, component.KIND"),
        ("component.query", "component.key|query", "filed under run, component.KIND"),
        ("component.query", "run.query", "filed under run, component.KIND"),
        ("component.query", "", "filed under run, component.KIND"),
        ("pair.key|query", "pair.query|key", "sorted: pair.key|query"),
        ("pair.key|query", "pair.key", "filed under run, component.KIND"),
        ('"x"', '"a.x"', "not the name of a feature"),
        ('"features": {', '"features": [', "cannot be read"),
        ("}\n}\n", "}\n", "cannot be read"),
    ],
)
def test_a_damaged_file_is_refused_with_its_place_and_a_remedy(tmp_path, old, new, says):
    path = written(tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(RuleError) as caught:
        load_ranges(path)
    assert all(line.startswith(f"{path}: ") for line in str(caught.value).splitlines())
    assert says in str(caught.value)
    assert "benchmarks.teach" in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 400), st.integers(0, 9), st.text(max_size=4))
def test_any_damage_is_ranges_or_a_rule_error(tmp_path_factory, start, length, piece):
    path = written(tmp_path_factory.getbasetemp())
    text = path.read_text()
    damaged = text[:start] + piece + text[start + length :]
    assume(damaged != text)
    path.write_text(damaged, encoding="utf-8")
    try:
        found = load_ranges(path)
    except RuleError as error:
        assert str(path) in str(error)
    else:
        for kept in (kept for kinds in found.features.values() for kept in kinds.values()):
            assert all(map(math.isfinite, (*kept.low, *kept.high)))
            assert kept.low[1] <= kept.low[0] <= kept.low[2]
            assert kept.high[1] <= kept.high[0] <= kept.high[2]
            assert kept.low[0] <= kept.high[0]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"null", b"\xff\xfe", b"[" * 100_000, b'{"schema": []}']
)
def test_what_is_no_such_file_is_refused(tmp_path, content):
    path = tmp_path / "ranges.json"
    path.write_bytes(content)
    with pytest.raises(RuleError, match="makes it anew"):
        load_ranges(path)


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(RuleError, match="cannot be read"):
            load_ranges(path)


def test_nan_is_never_written(tmp_path):
    damaged = Ranges(runs=1, features={"x": {"run": Range(1, (0.0, 0.0, 0.0), (NAN, 0.0, 1.0))}})
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_ranges(tmp_path / "ranges.json", damaged)
    assert not (tmp_path / "ranges.json").exists()


def test_an_end_that_is_not_known_is_nan():
    for feature, key in (("z", "component.query"), ("x", "component.key"), ("x", None), ("x", "")):
        assert all(map(math.isnan, GOOD.end(feature, key, "high")))
    assert GOOD.end("x", "component.query", "high") == (4.0, 3.0, 5.0)
    assert GOOD.end("x", "component.query", "low") == (0.0, -0.5, 0.5)


# What ships


def test_the_shipped_file_is_as_the_program_writes_it(tmp_path):
    ranges = shipped_ranges()
    shipped = Path(__file__).parents[1] / "rules" / "healthy-ranges.json"
    assert written(tmp_path, ranges).read_bytes() == shipped.read_bytes()
    assert json.loads(shipped.read_bytes())["schema"] == "diagnoser.healthy-ranges/1"


def test_the_shipped_ranges_are_of_known_features_in_their_scope():
    for feature, kinds in shipped_ranges().features.items():
        assert {key.partition(".")[0] for key in kinds} == {CATALOGUE[feature].scope}
        for kept in kinds.values():
            assert CATALOGUE[feature].low <= kept.low[0]
            assert kept.high[0] <= CATALOGUE[feature].high


def test_rules_that_ask_for_ranges_are_silent_and_unknown_without():
    asking = [r for family in FAMILIES for r in default_rules(Path(family)) if r.ranges]
    assert {rule.id for rule in asking} >= {
        "cascading-instability",
        "concave-region",
        "coupled-components",
    }
    for rule in asking:
        for example in rule.tests:
            if example.fires:
                tables = example_tables(rule, example, CATALOGUE)
                judged = evaluate([rule], tables, Ranges())
                assert judged.findings == judged.checked == ()
                (entry,) = judged.unknown
                assert (entry.component, entry.missing) == ("model", ())
                assert entry.reason.startswith("no healthy range of ")
