"""Damaged and hostile files are read or refused, never more: a few here, `benchmarks.fuzz` many."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz
from diagnoser.errors import ClassifierError, RuleError, UsageError

fuzz.watch_for_code()


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in fuzz.KINDS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.KINDS)
@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(draw=st.randoms(use_true_random=False))
def test_a_file_is_read_or_refused(kinds: dict[str, Any], name: str, draw: random.Random) -> None:
    seen = fuzz.Seen()
    fuzz.try_one(kinds[name], draw, seen)
    assert seen.wrong == []


def test_a_hundred_thousand_were() -> None:
    found = json.loads(fuzz.RESULT.read_text())["kinds"]
    assert set(found) == set(fuzz.KINDS)
    assert sum(kind["inputs"] for kind in found.values()) >= 100_000
    for kind in found.values():
        assert kind["wrong"] == []
        assert kind["slowest_s"] < fuzz.LONGEST_S
        assert kind["read"] + kind["refused"] == kind["inputs"]
        # Files that are nearly right tell the most: some are read, most are not.
        assert min(kind["read"], kind["refused"]) > 0.05 * kind["inputs"]


# -- what would be noticed -------------------------------------------------------------------------


class Made:
    """A kind of files that does what it is told to."""

    refusal = RuleError

    def __init__(self, act: Callable[[], Any]) -> None:
        self._act = act

    def make(self, _: random.Random) -> None:
        pass

    def read(self, _: random.Random) -> None:
        self._act()


def raises(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def takes_long() -> None:
    end = fuzz.time.process_time() + 1.1
    while fuzz.time.process_time() < end:
        pass


@pytest.mark.parametrize(
    ("act", "wrong"),
    [
        (lambda: None, ""),
        (raises(RuleError("a.yaml:1:1: no such fault")), ""),
        (raises(KeyError("x")), "KeyError"),
        (raises(RecursionError()), "RecursionError"),
        (raises(UsageError("a.yaml: no")), "UsageError, which is not its error"),
        (raises(RuleError("a.yaml: \x1b[31m")), "not printable"),
        (raises(RuleError("a" * 3000)), "empty or endless"),
        (lambda: exec("1 + 1"), "a file brought about exec"),
        (lambda: fuzz.warnings.warn("overflow", RuntimeWarning, stacklevel=1), "RuntimeWarning"),
        (takes_long, "it took 1."),
    ],
)
def test_what_must_not_happen_is_noticed(act: Callable[[], Any], wrong: str) -> None:
    seen = fuzz.Seen()
    fuzz.try_one(Made(act), random.Random(0), seen)
    assert [wrong in said for said in seen.wrong] == [True] * bool(wrong)


@pytest.mark.parametrize("name", fuzz.KINDS)
def test_the_files_that_mutations_begin_with_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(fuzz, "several", lambda content, _: content)
    monkeypatch.setattr(fuzz, "mutated_value", lambda value, _: value)
    monkeypatch.setattr(fuzz.Classifiers, "_others", lambda *_: {})
    monkeypatch.setattr(fuzz.Logs, "_damaged", lambda _, log, __: log)
    kind, seen = fuzz.KINDS[name](tmp_path), fuzz.Seen()
    for i in range(12):
        fuzz.try_one(kind, random.Random(i), seen)
    assert (seen.wrong, seen.refused) == ([], 0)


def test_a_pickle_in_a_classifier_and_a_tag_in_a_file_run_nothing(tmp_path: Path) -> None:
    kind = fuzz.Classifiers(tmp_path)
    arrays = {**kind._arrays, "usual": np.array([fuzz.Bomb()], dtype=object)}
    kind._write(fuzz._npz(arrays), kind._description)
    with pytest.raises(ClassifierError, match="allow_pickle=False"):
        kind.read(random.Random(0))
    tag = b"!!python/object/apply:builtins.exec ['raise SystemExit']\n"
    for made in (fuzz.Rules, fuzz.Cases):
        folder = tmp_path / made.__name__
        folder.mkdir()
        reader = made(folder)
        reader._path.write_bytes(b"title: " + tag)
        with pytest.raises((RuleError, UsageError), match="tag"):
            reader.read(random.Random(0))
