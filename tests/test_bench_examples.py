"""What a classifier is learned from, kept in two files: nothing of it is lost that it rests on."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_classifier import COMPONENT_COLUMNS, RUN_COLUMNS
from test_classifier import examples as made_examples

from diagnoser.benchmark.examples import (
    BITS,
    columns_of,
    influential,
    read_examples,
    rounded,
    write_examples,
)
from diagnoser.classifier import fit
from diagnoser.errors import BenchmarkError


@pytest.fixture(scope="module")
def kept():
    made = made_examples()
    for i in range(0, len(made), 2):  # of every second run something earlier was to be seen
        vectors = replace(made[i].vectors, earlier=(made[i].vectors, made[i - 1].vectors))
        made[i] = replace(made[i], vectors=vectors, origin=f"model {i % 3}")
    return [rounded(e, RUN_COLUMNS, COMPONENT_COLUMNS) for e in made]


@pytest.fixture(scope="module")
def learned(kept):
    return fit(kept, RUN_COLUMNS, COMPONENT_COLUMNS, {})


def test_what_is_learned_again_from_the_files_says_the_same(tmp_path, kept, learned):
    write_examples(tmp_path, kept, {"runs": 7})
    read, about = read_examples(tmp_path)
    assert about == {"runs": 7}
    assert columns_of(read) == (RUN_COLUMNS, COMPONENT_COLUMNS)
    assert [e.origin for e in read] == [e.origin for e in kept]
    assert [len(e.vectors.earlier) for e in read] == [2, 0] * (len(kept) // 2)
    again = fit(read, *columns_of(read), about)
    for example in kept:
        assert again.predict(example.vectors) == learned.predict(example.vectors)


@given(st.floats(allow_nan=True, allow_infinity=True, width=32))
def test_eleven_bits_of_a_number_are_kept(value):
    (example, *_) = made_examples(each=1)
    example.vectors.components["x"] = np.full(len(example.vectors.names), value)
    (found, *_) = rounded(example, (), ("x",)).vectors.components["x"]
    if not math.isfinite(value):
        assert repr(float(found)) == repr(value)
    elif abs(value) > 1e-30:
        assert math.isinf(found) or abs(found - value) <= abs(value) * 2.0**-BITS


def test_columns_are_kept_by_what_splits_on_them_gain(learned):
    run_columns, component_columns = influential(learned, 1, 1)
    assert run_columns == ("sharpness.highest",)
    assert component_columns == ("update_ratio.latest",)
    for judge in (learned.verdict, learned.location, *learned.causes.values()):
        assert sum(judge.gains().values()) == pytest.approx(1.0)


def test_without_the_files_it_is_said_what_makes_them(tmp_path):
    with pytest.raises(BenchmarkError, match="benchmarks.teach"):
        read_examples(tmp_path)
    (tmp_path / "examples.parquet").write_bytes(b"PAR1")
    with pytest.raises(BenchmarkError, match="benchmarks.teach"):
        read_examples(tmp_path)
