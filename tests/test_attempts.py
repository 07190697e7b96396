"""Repairs that were tried: what the log holds of them is read back whole, or left out."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_examples import LOWERED, TEMPERED, attempts, repaired_diagnosis

from diagnoser.cli import main
from diagnoser.diagnosis import attempt_data, attempts_of, diagnose
from diagnoser.report import diagnosis_to_json
from diagnoser.runlog import Recording, RecordingBuilder, RunLogWriter, read_run
from diagnoser.types import Attempt, Repair


def logged(directory: Path, tried: Sequence[Attempt]) -> Recording:
    """Writes a log, and returns what was known while it was written."""
    with RunLogWriter(directory, "run", {}) as writer:
        for attempt in tried:
            writer.event(attempt.step, "repair", "a repair was tried", attempt_data(attempt))
        writer.event(0, "trigger", "the loss jumped", {})
        writer.end(0, None)
        return writer.recording()


def recorded(data: Any) -> Recording:
    builder = RecordingBuilder({"run": "made", "header": {}})
    event = {"step": 1, "kind": "repair", "message": "", "data": data}
    builder.add({"record": "event", **event})
    return builder.recording()


@given(st.lists(attempts, max_size=3))
@settings(max_examples=80, deadline=None)
def test_what_is_written_is_read(tried: list[Attempt]) -> None:
    with tempfile.TemporaryDirectory() as name:
        live = logged(Path(name), tried)
        read = read_run(Path(name))
    # By repr: NaN is not equal to itself, and 0.0 is equal to -0.0. A mapping has no order.
    expected = repr([ordered(attempt) for attempt in tried])
    for recording in (live, read):
        assert repr([ordered(attempt) for attempt in attempts_of(recording)]) == expected


def ordered(attempt: Attempt) -> Attempt:
    actions = (replace(a, parameters=dict(sorted(a.parameters.items()))) for a in attempt.actions)
    return replace(attempt, actions=tuple(actions))


@given(attempts)
@settings(max_examples=40, deadline=None)
def test_the_data_of_an_event_are_strict_json(attempt: Attempt) -> None:
    data = attempt_data(attempt)
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_a_text_that_reads_like_a_number_stays_a_text() -> None:
    action = Repair("change_optimizer", "model", {"to": "NaN", "size": math.inf})
    (read,) = attempts_of(recorded(attempt_data(replace(LOWERED, actions=(action,)))))
    assert read.actions == (action,)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the way to every value inside ``value``, from the outside in."""
    inner: Any = ()
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def changed(data: dict[str, Any], path: tuple[Any, ...], change: Callable[[Any, Any], Any]) -> Any:
    data = json.loads(json.dumps(data))
    *parents, last = path
    inner = data
    for key in parents:
        inner = inner[key]
    change(inner, last)
    return data


DATA = attempt_data(LOWERED)
NEVER = {"odd": [["thing"]]}  # of no form that any field has


def put(value: Any) -> Callable[[Any, Any], Any]:
    return lambda inner, key: inner.__setitem__(key, value)


@pytest.mark.parametrize("path", places(DATA)[1:], ids=str)
def test_an_event_that_was_damaged_by_hand_is_left_out(path: tuple[Any, ...]) -> None:
    assert attempts_of(recorded(DATA)) == (LOWERED,)
    assert attempts_of(recorded(changed(DATA, path, put(NEVER)))) == ()
    if isinstance(path[-1], str) and path[-1] != "factor":
        assert attempts_of(recorded(changed(DATA, path, lambda inner, key: inner.pop(key)))) == ()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("step",), -1),
        (("step",), 2**63),
        (("step",), True),
        (("batches",), 1.5),
        (("kept",), 1),
        (("before",), None),
        (("before", "loss"), True),
        (("before", "loss"), "nan"),
        (("before", "loss"), 10**400),
        (("before", "evidence", 0, "steps"), [1, 2, 3]),
        (("before", "evidence", 0, "comparison"), "=>"),
        (("actions", 0, "name"), "pray"),
        (("actions", 1, "numbers"), [0.01]),
    ],
)
def test_values_that_no_attempt_has_are_damage(path: tuple[Any, ...], value: Any) -> None:
    assert attempts_of(recorded(changed(DATA, path, put(value)))) == ()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@given(st.sampled_from(places(DATA)[1:]), json_values)
@settings(max_examples=200, deadline=None)
def test_whatever_stands_there_a_diagnosis_can_be_made(path: tuple[Any, ...], value: Any) -> None:
    recording = recorded(changed(DATA, path, put(value)))
    assert diagnosis_to_json(diagnose(recording, ()))


def test_a_damaged_event_takes_no_other_with_it(tmp_path: Path) -> None:
    with RunLogWriter(tmp_path, "run", {}) as writer:
        for data in (attempt_data(LOWERED), {}, attempt_data(TEMPERED)):
            writer.event(1, "repair", "", data)
        assert attempts_of(writer.recording()) == (LOWERED, TEMPERED)


def test_a_diagnosis_tells_the_repairs_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = repaired_diagnosis().repairs
    live = diagnose(logged(tmp_path, tried), ())
    assert repr(live.repairs) == repr(tried)
    assert diagnosis_to_json(live) == diagnosis_to_json(diagnose(read_run(tmp_path), ()))
    assert main(["diagnose", str(tmp_path)]) == 3
    assert "1. kept at step 160 in word_attention.projection" in capsys.readouterr().out
    assert main(["diagnose", str(tmp_path), "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert [step["verdict"] for step in document["repairs"]] == ["rolled_back"] * 2 + ["kept"]
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 0
    assert "Repairs that were tried" in (tmp_path / "page.html").read_text("utf-8")
