"""Healthy scripts: their files, that they learn, and what the document says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import controls, odd_controls, reproductions_document, reproductions_runs
from benchmarks.controls import is_learnt, load
from benchmarks.reproductions import LOTS, read_draw
from benchmarks.reproductions_runs import CONTROLS, complete, read_rows, words
from diagnoser.errors import RuleError

GOOD = """\
number: 4
title: slot attention
reference: Locatello et al. 2020
lot: first
baseline: 0.1
odd: nothing
"""
NAME = "c04_slots"
# What a first look betrayed: a forward that averages a teacher was repeated on its own parameters.
CHANGED = {"third lot, judged once": {"c92_moco_v3"}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """A folder with one good script, which is where everything looks."""
    monkeypatch.setattr(reproductions_runs, "CONTROLS", tmp_path)
    (tmp_path / "LOT").write_text("by lot\nfirst: 4 1\nsecond: 3\n")
    (tmp_path / f"{NAME}.py").write_text("print('metric 0.5')\n")
    (tmp_path / f"{NAME}.yaml").write_text(GOOD)
    return tmp_path


def test_every_script_has_its_file_and_the_lot_that_was_drawn():
    known = load()
    assert {f"{name}.py" for name in known} == {path.name for path in CONTROLS.glob("*.py")}
    numbers = [control.number for control in known.values()]
    assert len(numbers) == len(set(numbers))
    drawn = read_draw(CONTROLS / "LOT")
    assert sorted(drawn) == list(range(1, 127))
    assert [list(drawn.values()).count(lot) for lot in LOTS] == [36, 36, 30, 24]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("number: 4", "number: 3", "1:9: number: c04_slots is not of 3"),
        ("lot: first", "lot: second", "4:6: lot: LOT draws it as first"),
        ("baseline: 0.1", "baseline: low", "5:11: baseline: Input should be a valid number"),
        ("odd: nothing", "", "odd: Field required"),
    ],
)
def test_a_bad_file_is_one_line_with_its_place(folder, old, new, complaint):
    assert load(folder)[NAME].baseline == 0.1
    (folder / f"{NAME}.yaml").write_text(GOOD.replace(old, new))
    with pytest.raises(RuleError) as error:
        load(folder)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".py", ".yaml"])
def test_a_script_and_its_file_go_together(folder, suffix):
    (folder / f"{NAME}{suffix}").unlink()
    with pytest.raises(RuleError, match="go together"):
        load(folder)


def test_a_control_has_one_form_and_no_option_for_it(folder):
    assert words(NAME, "healthy", 2) == [str(folder / f"{NAME}.py"), "--seed", "2"]
    made = []
    complete(
        folder / "runs.json", [NAME], 2, lambda *run: made.append(run) or {}, forms=["healthy"]
    )
    assert made == [(NAME, "healthy", 0), (NAME, "healthy", 1)]
    assert len(read_rows(folder / "runs.json")) == 2


def said(script, seed, verdict, metric=0.9):
    judged = {"verdict": verdict, "findings": [{"source": "check:x", "component": "a_b"}]}
    others = dict.fromkeys(reproductions_runs.PUBLISHED, {"verdict": "healthy"})
    return {
        "script": script,
        "seed": seed,
        "code": "abc",
        "metric": metric,
        **judged,
        "others": others,
    }


def test_a_run_that_does_not_learn_is_no_control_and_alarms_are_counted_by_script(monkeypatch):
    known = {name: controls.Control(number=4, title="slots", reference="b", lot="first",
                                    baseline=0.1, odd="c") for name in ("a", "b")}  # fmt: skip
    rows = [said("a", 0, "faulty"), said("a", 1, "healthy"), said("b", 0, "healthy"),
            said("b", 1, "faulty", metric=0.1), said("b", 2, "faulty", metric=None)]  # fmt: skip
    assert [is_learnt(row, known[row["script"]]) for row in rows] == [True] * 3 + [False] * 2
    nothing = ({}, [])
    looks = {("first", False): (known, rows)}
    monkeypatch.setattr(controls, "read", lambda lot, once: looks.get((lot, once), nothing))
    [line] = reproductions_document.healthy().splitlines()[2:]
    assert line.startswith("| first lot | `abc` | 3 of 5 | 0.25 [")
    assert line.endswith("0.00 [0.00, 0.66], 2 |")
    last = reproductions_document.alarms().splitlines()[-1]
    assert last == r"| first lot | 4 | slots | 1 of 2 | check:x in a\_b |"


@pytest.mark.parametrize("look", reproductions_document.LOOKS.values(), ids=lambda look: look.title)
def test_all_kept_runs_learn_and_print_what_they_print_unwatched(look):
    known, rows = controls.read(look.lot, once=look.once)
    assert [row["script"] for row in rows if not is_learnt(row, known[row["script"]])] == []
    other = {row["script"] for row in rows if not row["same_output"]}
    assert other == CHANGED.get(look.title, set())


def test_odd_controls_are_those_that_do_no_harm_on_all_subjects():
    rows = json.loads(odd_controls.KEPT.read_text())
    assert {row["harm"] for row in rows} <= {"equivalent", "ambiguous", "not worse", "no effect"}
    assert {row["set"] for row in rows} == {"HC3", "HC4"}
    assert {row["status"] for row in rows} == {"ok"}
    assert len({row["subject"] for row in rows}) == 8
    assert len(rows) >= 100
