"""Reproductions of real faults: the files, the proof of harm, what is kept of a run, the scores."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import reproductions_document, reproductions_runs, tables
from benchmarks.reproductions import (
    HARM,
    LOTS,
    PAIRS,
    Reproduction,
    judge_all,
    load,
    read_draw,
    summarised,
)
from benchmarks.reproductions_document import LOOKS, counted, is_placed, share, shares
from benchmarks.reproductions_runs import (
    FOLDER,
    FORMS,
    RUNS,
    complete,
    current,
    metric_of,
    read_rows,
    train,
    watch,
)

GOOD = """\
row: 17
title: attention weights that sum to one over the batch
reference: someone/something#2
thread: What it reports.
lot: first
causes: [softmax_axis]
components: [attention, attention.q]
defect: true
"""
NAME = "r17_softmax"


def expected(**changes) -> Reproduction:
    values = {
        "row": 17,
        "title": "a",
        "reference": "b#1",
        "thread": "c",
        "lot": "first",
        "causes": ["softmax_axis"],
        "components": ["attention"],
        "defect": False,
    }
    return Reproduction(**{**values, **changes})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """A folder with one good script, which is where everything looks."""
    monkeypatch.setattr(reproductions_runs, "FOLDER", tmp_path)
    (tmp_path / "LOT").write_text("by lot\nfirst: 17 1\nsecond: 3\n")
    (tmp_path / f"{NAME}.py").write_text("print('metric 0.5')\n")
    (tmp_path / f"{NAME}.yaml").write_text(GOOD)
    return tmp_path


# -- files -----------------------------------------------------------------------------------------


def test_every_script_has_its_file_and_the_lot_that_was_drawn():
    known, problems = load()
    assert problems == []
    assert {f"{name}.py" for name in known} == {path.name for path in FOLDER.glob("*.py")}
    assert {f"{name}.yaml" for name in known} == {path.name for path in FOLDER.glob("*.yaml")}
    drawn = read_draw(FOLDER / "LOT")
    rows = [script.row for script in known.values()]
    assert len(rows) == len(set(rows))
    assert all(script.lot == drawn[script.row] for script in known.values())


def test_every_row_is_of_one_lot():
    lots = list(read_draw(FOLDER / "LOT").values())
    assert [lots.count(lot) for lot in LOTS] == [20, 21, 14, 12]


def test_a_good_file_is_read(folder):
    known, problems = load(folder)
    assert problems == []
    assert known[NAME].causes == ["softmax_axis"]
    assert known[NAME].row == 17


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("row: 17", "row: '17'", "1:6: row: Input should be a valid integer"),
        ("row: 17", "row: 1", "1:6: row: the file of row 1 is r01_*.yaml"),
        ("lot: first", "lot: second", "5:6: lot: LOT draws row 17 as first"),
        ("lot: first", "lot: fifth", "5:6: lot: Input should be 'first', 'second', 'third' or"),
        (
            "softmax_axis",
            "softmax_axes",
            "unknown cause 'softmax_axes'; did you mean",
        ),
        ("[softmax_axis]", "[]", "causes: List should have at least 1 item"),
        ("defect: true", "defect: yes", "YAML readers disagree about 'yes'"),
        ("defect: true", "", "defect: Field required"),
        ("title: a", "titel: a", "title: Field required"),
        ("defect: true", "defect: true\nharm: proven", "harm: Extra inputs are not permitted"),
    ],
)
def test_a_bad_file_is_one_line_with_its_place_and_the_others_are_read(folder, old, new, complaint):
    (folder / "r01_other.py").write_text("")
    (folder / "r01_other.yaml").write_text(GOOD.replace("17", "1"))
    assert old in GOOD
    (folder / f"{NAME}.yaml").write_text(GOOD.replace(old, new))
    known, [problem] = load(folder)
    assert set(known) == {"r01_other"}
    assert problem.startswith(str(folder / f"{NAME}.yaml"))
    assert complaint in problem
    assert "\n" not in problem


@pytest.mark.parametrize("suffix", [".py", ".yaml"])
def test_a_script_and_its_file_go_together(folder, suffix):
    (folder / f"{NAME}{suffix}").unlink()
    known, [problem] = load(folder)
    assert known == {}
    assert problem == f"{folder / NAME}{suffix}: missing; a script and its .yaml go together"


# -- runs ------------------------------------------------------------------------------------------


def test_the_metric_is_the_last_line():
    assert metric_of(b"metric 0.1\nmetric -3.5e-1\n") == -0.35
    assert math.isnan(metric_of(b"metric nan\n"))
    for text in (b"", b"0.5\n", b"metric 0.5\nbye\n", b"metric\n", b"metric high\n", b"metric: 1"):
        with pytest.raises(ValueError, match="metric|float"):
            metric_of(text)


@pytest.mark.parametrize(
    ("code", "status", "exit_code", "metric", "error"),
    [
        ("print('x'); print('metric', 0.25)", "ok", 0, 0.25, ""),
        ("import sys; print('metric', float('--fixed' in sys.argv))", "ok", 0, 1.0, ""),
        ("import sys; print('metric', sys.argv[-1])", "ok", 0, 7.0, ""),
        ("print('metric nan')", "ok", 0, None, ""),
        ("print('metric -inf')", "ok", 0, None, ""),
        ("raise ValueError('no')", "ok", 1, None, "ValueError: no"),
        ("print('done')", "the last line is not `metric VALUE`", 0, None, ""),
    ],
)
def test_a_run_that_crashes_or_is_not_finite_has_no_metric(
    folder, code, status, exit_code, metric, error
):
    (folder / f"{NAME}.py").write_text(code)
    row = train(NAME, "fixed", 7)
    assert (row["status"], row["exit_code"], row["error"]) == (status, exit_code, error)
    assert row["metric"] == metric
    assert row["cpu_s"] > 0


def test_only_what_is_missing_or_of_another_script_or_code_is_run(folder):
    path, made = folder / "runs.json", []

    def make(name, form, seed):
        made.append((name, form, seed))
        return {"metric": len(made)}

    complete(path, [NAME], 2, make)
    assert sorted(made) == [(NAME, form, seed) for form in FORMS for seed in (0, 1)]
    first = path.read_bytes()
    complete(path, [NAME], 2, make)
    assert (len(made), path.read_bytes()) == (4, first)
    complete(path, [NAME], 3, make, jobs=2)
    assert len(made) == 6
    complete(path, [NAME], 1, make, code="a")
    assert len(made) == 8
    complete(path, [NAME], 1, make, code="a", again=True)
    assert len(made) == 10
    (folder / f"{NAME}.py").write_text("print('metric 0.6')\n")
    assert current(read_rows(path), [NAME]) == []
    complete(path, [NAME], 1, make, code="a")
    assert len(made) == 12
    assert {row["seed"] for row in current(read_rows(path), [NAME])} == {0}
    assert len(read_rows(path)) == 6


def test_a_run_that_was_made_is_kept_where_a_later_one_fails(folder):
    def make(name, form, seed):
        if form == "fixed":
            raise OSError("out of memory")
        return {}

    with pytest.raises(OSError, match="out of memory"):
        complete(folder / "runs.json", [NAME], 1, make)
    assert list(read_rows(folder / "runs.json")) == [(NAME, "faulty", 0)]


@pytest.mark.slow
def test_a_watched_run_is_kept_as_the_tool_judged_it(folder):
    (folder / f"{NAME}.py").write_text(
        "import sys, torch\n"
        "torch.manual_seed(int(sys.argv[-1]))\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), "
        "torch.nn.Linear(8, 2))\n"
        "fixed = '--fixed' in sys.argv\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "for step in range(150):\n"
        "    x = torch.randn(16, 4)\n"
        "    loss = torch.nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long())\n"
        "    if fixed: optimizer.zero_grad()\n"
        "    loss.backward()\n"
        "    optimizer.step()\n"
        "print('metric', -float(loss))\n"
    )
    row = watch(NAME, "faulty", 0)
    assert row["same_output"]
    assert row["verdict"] == "faulty"
    assert row["causes"][0] == ["missing_zero_grad", "model"]
    finding = row["findings"][0]
    assert finding["source"] == "rule:missing-zero-grad"
    assert finding["cause"] == "missing_zero_grad"
    assert finding["where"].startswith(f"{NAME}.py:")
    assert row["cpu_s"] > 0 and row["plain_cpu_s"] > 0
    assert (row["exit_code"], row["plain_exit_code"]) == (0, 0)
    json.dumps(row, allow_nan=False)


# -- harm ------------------------------------------------------------------------------------------


def pairs(name, faulty, fixed=None, **changes):
    """Runs of a script from the metric of each form by seed."""
    fixed = fixed or [0.9 + 0.001 * (seed % 3) for seed in range(len(faulty))]
    return [
        {
            "script": name,
            "form": form,
            "seed": seed,
            "status": "ok",
            "metric": metric,
            "exit_code": 0,
            "output": repr(metric),
            **changes,
        }
        for form, metrics in (("faulty", faulty), ("fixed", fixed))
        for seed, metric in enumerate(metrics)
    ]


FIXED = [0.9 + 0.001 * (seed % 3) for seed in range(PAIRS)]
KNOWN = {"a": expected(), "b": expected(lot="second")}


@pytest.mark.parametrize(
    ("faulty", "verdict"),
    [
        ([m - 0.2 for m in FIXED], "proven"),
        ([None] * PAIRS, "proven"),  # the range of the others is far below the margin
        ([*FIXED[:2], *[None] * 10], "proven"),
        (FIXED, "no effect"),
        ([m + 0.001 * (-1) ** s for s, m in enumerate(FIXED)], "equivalent"),
        ([m + 0.2 for m in FIXED], "not worse"),
        ([m - 0.3 * (s % 2) + 0.1 for s, m in enumerate(FIXED)], "ambiguous"),
        ([m - 0.2 for m in FIXED[:-1]], "incomplete"),
    ],
)
def test_verdicts_of_the_protocol(faulty, verdict):
    assert judge_all(KNOWN, pairs("a", faulty))["a"].harm == verdict


def test_a_run_without_a_metric_is_worse_than_any_other():
    found = judge_all(KNOWN, pairs("a", [*[m - 0.2 for m in FIXED[:-1]], None]))["a"]
    assert found.diverged == 1
    assert found.harm == "proven"
    assert found.score < sum(FIXED) / PAIRS - 0.2


def test_a_run_that_is_no_script_of_the_kind_is_no_diverged_one():
    found = judge_all(KNOWN, pairs("a", FIXED, status="the last line is not `metric VALUE`"))
    assert found["a"].harm == "incomplete"


def test_where_no_run_has_a_metric_nothing_can_be_said():
    found = judge_all(KNOWN, pairs("a", [None] * PAIRS, [None] * PAIRS))["a"]
    assert found.harm == "incomplete"
    summarised({"a": found})


def test_fixed_runs_that_crash_prove_no_harm():
    found = judge_all(KNOWN, pairs("a", FIXED, [None] * PAIRS))["a"]
    assert found.harm == "not worse"


def test_holm_is_over_the_scripts_of_a_half():
    uneven = [m - 0.1 for m in FIXED[:-4]] + [m + 0.01 for m in FIXED[-4:]]
    alone = judge_all(KNOWN, pairs("a", uneven))["a"]
    assert alone.harm == "proven"
    assert alone.p_holm == alone.p
    apart = judge_all(KNOWN, [*pairs("a", uneven), *pairs("b", uneven)])
    assert [h.p_holm for h in apart.values()] == [alone.p, alone.p]
    n = math.floor(0.05 / alone.p) + 1
    many = {f"s{i}": expected() for i in range(n)}
    rows = [row for name in many for row in pairs(name, uneven)]
    found = judge_all(many, rows)
    assert {h.harm for h in found.values()} == {"ambiguous"}
    assert found["s0"].p_holm == pytest.approx(n * alone.p)


def test_a_summary_is_sorted_valid_json_without_nan():
    known = {name: expected() for name in ("z", "a", "m")}
    rows = [*pairs("z", [0.5] * PAIRS, [0.9] * PAIRS), *pairs("m", FIXED[:2]), *pairs("a", FIXED)]
    found = summarised(judge_all(known, rows))
    assert list(found) == ["a", "m", "z"]
    assert found == summarised(judge_all(known, rows[::-1]))
    assert found["z"]["d"] == "inf"
    assert found["m"]["gap"] is None
    json.dumps(found, allow_nan=False)


def test_the_committed_harm_is_what_the_committed_runs_say():
    known, _ = load()
    committed = json.loads(HARM.read_text()) if HARM.exists() else {}
    assert summarised(judge_all(known, current(read_rows(RUNS), known))) == committed
    assert not [name for name, found in committed.items() if found["harm"] == "incomplete"]


# -- scores ----------------------------------------------------------------------------------------


def said(name, form, seed=0, *, verdict="healthy", causes=(), findings=()):
    """A watched run."""
    return {
        "script": name,
        "form": form,
        "seed": seed,
        "verdict": verdict,
        "code": "abc",
        "causes": [list(pair) for pair in causes],
        "same_output": True,
        "findings": [{"component": c} for c in findings],
        "cpu_s": 3.0,
        "plain_cpu_s": 2.0,
    }


RIGHT = [("softmax_axis", "attention.k")]
PROVEN = {"harm": "proven", "gap": 0.2}


@given(st.integers(1, 5), st.integers(1, 4))
def test_all_right_is_one_and_all_wrong_is_zero(scripts, seeds):
    known = {f"s{i}": expected() for i in range(scripts)}
    harms = dict.fromkeys(known, PROVEN)
    runs = [(name, form, seed) for name in known for form in FORMS for seed in range(seeds)]
    good = [
        said(*run, verdict="faulty", causes=RIGHT) if run[1] == "faulty" else said(*run)
        for run in runs
    ]
    found = shares(known, harms, good)
    alarms = found.pop("false alarms")
    assert {s.value for s in found.values()} == {1.0}
    assert {(s.scripts, s.runs) for s in found.values()} == {(scripts, scripts * seeds)}
    assert alarms.value == 0.0
    bad = [said(*run, verdict="faulty" if run[1] == "fixed" else "healthy") for run in runs]
    found = shares(known, harms, bad)
    assert found.pop("false alarms").value == 1.0
    assert {s.value for s in found.values()} == {0.0}


@given(st.dictionaries(st.text(max_size=3), st.lists(st.booleans(), max_size=4), max_size=6))
def test_seeds_of_a_script_are_one_observation(hits):
    found = share(hits)
    if found is None:
        assert not any(hits.values())
        return
    assert 0 <= found.low <= found.value + 1e-12 and found.value - 1e-12 <= found.high <= 1
    again = share({name: own * 10 for name, own in hits.items()})
    assert (again.scripts, again.runs) == (found.scripts, 10 * found.runs)
    for one, other in ((found.value, again.value), (found.low, again.low)):
        assert one == pytest.approx(other)


def test_only_scripts_with_proven_harm_or_a_defect_are_asked_for():
    known = {
        "harmful": expected(),
        "defect": expected(defect=True),
        "harmless": expected(),
        "unjudged": expected(),
    }
    harms = {
        "harmful": PROVEN,
        "defect": {"harm": "equivalent", "gap": 0.0},
        "harmless": {"harm": "equivalent", "gap": 0.0},
    }
    rows = [said(name, form, verdict="faulty") for name in known for form in FORMS]
    found = shares(known, harms, rows)
    assert found["called faulty"].scripts == 2
    assert found["false alarms"].scripts == 4
    assert "Of 2 (rows 17, 17) only the fixed runs count" in counted("first", known, harms, rows)


def test_a_cause_that_is_named_for_several_places_counts_once():
    wrong = [("residual", f"block.{i}") for i in range(5)]
    row = said("a", "faulty", causes=[*wrong, ("initialization", "model"), *RIGHT])
    found = shares({"a": expected()}, {"a": PROVEN}, [row])
    assert found["right cause first"].value == 0
    assert found["right cause in top 3"].value == 1
    row["causes"].insert(0, ["normalization", "model"])
    assert shares({"a": expected()}, {"a": PROVEN}, [row])["right cause in top 3"].value == 0


@pytest.mark.parametrize(
    ("causes", "findings", "right"),
    [
        ([("softmax_axis", "attention")], [], True),
        ([("softmax_axis", "attention.q")], [], True),
        ([("softmax_axis", "attention[query]")], [], True),
        ([("softmax_axis", "attention_norm")], [], False),
        ([("softmax_axis", "model")], ["attention"], False),
        ([("residual", "attention"), ("softmax_axis", "head")], [], False),
        ([("residual", "head"), ("softmax_axis", "attention")], [], True),
        ([("residual", "head")], ["attention.q", "head"], True),
        ([("residual", "attention")], ["head", "attention"], False),
        ([], [], False),
    ],
)
def test_the_place_is_that_of_the_first_right_cause_or_of_the_first_finding(
    causes, findings, right
):
    row = said("a", "faulty", causes=causes, findings=findings)
    assert is_placed(row, expected()) is right


def test_scripts_that_have_no_place_are_not_asked_for_one():
    known = {"a": expected(components=[]), "b": expected()}
    rows = [said(name, "faulty", verdict="faulty", causes=RIGHT) for name in known]
    assert shares(known, dict.fromkeys(known, PROVEN), rows)["right place"].scripts == 1
    del known["b"]
    assert shares(known, {"a": PROVEN}, rows[:1])["right place"] is None


def test_the_document_shows_what_was_kept(monkeypatch):
    known = {"a": expected(title="one | two", components=["attention"], defect=True)}
    rows = [
        said("a", "faulty", 0, verdict="faulty", causes=[("residual", "x_1"), *RIGHT]),
        *(said("a", "faulty", 1), said("a", "fixed", 0), said("a", "fixed", 1)),
    ]
    nothing = ({}, {}, [])
    kept = {"first": (known, {"a": PROVEN}, rows)}
    monkeypatch.setattr(reproductions_document, "read", lambda look: kept.get(look, nothing))
    line = reproductions_document.scripts("first").splitlines()[-1]
    assert line == (
        r"| 17 | one \| two | b#1 | proven (+0.2), defect | 1 faulty, 1 healthy | "
        r"residual in x\_1; **softmax\_axis in attention.k** | 1 of 2 | 1 of 2 | 2 healthy |"
    )
    assert reproductions_document.scripts("second") == reproductions_document.NOT_YET
    text = reproductions_document.figures()
    assert "| called faulty | 0.50 [0.05, 0.95], 1 |" in text
    assert "| false alarms | 0.00 [0.00, 0.79], 1 |" in text
    assert "4 runs of 1 scripts, judged by code `abc`. 4 runs printed" in text
    assert "The second lot, judged once: not there yet" in text


def test_the_document_is_one_that_is_held_against_the_results():
    blocks = tables.DOCUMENTS[reproductions_document.DOCUMENT]
    assert blocks is reproductions_document.BLOCKS
    looks = {f"{look} {what}" for look in LOOKS for what in ("judges", "scripts")}
    assert set(blocks) == {"figures", "healthy", "alarms", "odd", "defaultplusplus", *looks}
