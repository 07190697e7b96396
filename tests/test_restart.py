"""What no running training can be given: the case is started again with other arguments."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diagnoser.cases import Case, Metric, load_case, load_cases
from diagnoser.diagnosis import EVENT, diagnose, judges
from diagnoser.errors import RunLogError
from diagnoser.repair import ACTIONS
from diagnoser.repair_loop import Strategy
from diagnoser.report import diagnosis_to_json
from diagnoser.restart import judged, metric_of, repair_case
from diagnoser.runlog import add_event, read_run

ACCURACY = Metric(name="accuracy", better="higher", healthy=0.9, within=0.03)
LOSS = Metric(name="loss", better="lower", healthy=0.3, within=0.1)
PATIENT = Strategy("patient", lambda situation: ())  # tries nothing while the training runs

# Labels in the order of their classes, which one argument mends and another does not.
SCRIPT = """
import argparse, sys, torch
from torch import nn
parser = argparse.ArgumentParser()
for name in ("order", "fails", "seed"):
    parser.add_argument("--" + name, default="")
arguments = parser.parse_args()
if arguments.fails:
    sys.exit("out of cheese")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
y = torch.arange(4).repeat_interleave(320)
x = 3.0 * nn.functional.one_hot(y, 4) + torch.randn(1280, 4)
for epoch in range(2):
    order = torch.randperm(1280) if arguments.order == "random" else torch.arange(1280)
    for batch in order.split(32):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
print(f"accuracy {(model(x).argmax(-1) == y).float().mean():.4f}")
"""


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """A script that is run here leaves its mark on these."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])


@pytest.mark.parametrize(
    ("metric", "before", "after", "cured", "keep", "says"),
    [
        (ACCURACY, 0.4, 0.9, True, True, "the finding is gone; accuracy 0.9 instead of 0.4"),
        (ACCURACY, 0.9, 0.4, True, False, "no more than the margin"),
        (ACCURACY, 0.9, 0.92, True, False, "no more than the margin of 0.03"),
        (ACCURACY, 0.4, 0.9, False, False, "the finding is still there; accuracy 0.9"),
        (LOSS, 2.0, 0.3, True, True, "loss 0.3 instead of 2"),
        (LOSS, 0.3, 2.0, True, False, "no more than the margin"),
        (ACCURACY, math.nan, 0.9, True, False, "the run printed no accuracy"),
        (ACCURACY, 0.4, math.nan, True, False, "the new run printed no accuracy"),
    ],
)
def test_a_new_start_is_judged_by_the_metric_of_the_case(metric, before, after, cured, keep, says):
    kept, reason = judged(metric, before, after, cured=cured)
    assert kept == keep
    assert says in reason


@pytest.mark.parametrize(
    ("printed", "value"),
    [
        ("epoch 1 accuracy 0.2\naccuracy 0.75\n", 0.75),
        ("accuracy: 0.5\naccuracy = 0.25", 0.25),
        ("accuracy nan\n", math.nan),
        ("accuracy of nothing\n", math.nan),
        ("validation accuracy 0.9\n", math.nan),
        ("", math.nan),
    ],
)
def test_the_metric_is_what_the_script_printed_last(printed, value):
    found = metric_of(printed, ACCURACY)
    assert found == value or (math.isnan(found) and math.isnan(value))


def case(folder: Path, restarts: dict[str, dict[str, str]]) -> Case:
    (folder / "train.py").write_text(SCRIPT)
    return Case(
        name="sorted",
        script=folder / "train.py",
        arguments={"order": "by-class"},
        data=[],
        metric=ACCURACY,
        groups={},
        faults=[],
        restarts=restarts,
    )


@pytest.mark.slow
def test_what_the_case_has_arguments_for_is_tried_and_stands_in_the_diagnosis(tmp_path, capfd):
    made = case(tmp_path, {"shuffle_batches": {"order": "random"}})
    outcome = repair_case(made, None, out=tmp_path / "run", strategy=PATIENT)
    kept = [a for a in outcome.diagnosis.repairs if a.kept]
    assert [a.actions[0].name for a in kept] == ["shuffle_batches"]
    assert outcome.repaired
    attempt = kept[0]
    assert attempt.derivation == "the case has arguments for it: --order random"
    assert attempt.guarantee.startswith("started again: the whole script was run a second time")
    assert attempt.after.steps == attempt.twin.steps == 80
    assert attempt.source not in attempt.after.firing
    printed = capfd.readouterr().out
    first = float(printed.split()[-1])
    assert printed.count("accuracy") == 1  # stdout is the first run's alone
    assert f"instead of {first:.4g} on held-back data" in attempt.reason
    # what was written, and what the log gives when it is read again, is the same
    written = (tmp_path / "run" / "diagnosis.json").read_text("utf-8")
    assert [r["verdict"] for r in json.loads(written)["repairs"]].count("kept") == 1
    again = diagnose(read_run(tmp_path / "run"), *judges(None, None))
    assert diagnosis_to_json(again) == written
    assert read_run(tmp_path / "run" / "restarts" / "shuffle_batches").ending.exit_code == 0


@pytest.mark.slow
def test_a_new_start_that_fails_is_told_with_its_last_line(tmp_path):
    made = case(tmp_path, {"shuffle_batches": {"fails": "yes"}})
    outcome = repair_case(made, None, out=tmp_path / "run", strategy=PATIENT)
    attempt = next(a for a in outcome.diagnosis.repairs if a.actions[0].name == "shuffle_batches")
    assert not attempt.kept and attempt.after is None
    assert attempt.reason == "it ended with 1; what it printed is in restarts/shuffle_batches.txt"
    assert "out of cheese" in (tmp_path / "run/restarts/shuffle_batches.txt").read_text("utf-8")
    assert not outcome.repaired


def test_what_the_case_has_no_arguments_for_is_not_tried(tmp_path):
    outcome = repair_case(case(tmp_path, {}), None, out=tmp_path / "run", strategy=PATIENT)
    assert "program_defect" in {f.fault for f in outcome.diagnosis.findings}
    assert not (tmp_path / "run" / "restarts").exists()
    tried = {a.name for attempt in outcome.diagnosis.repairs for a in attempt.actions}
    assert "shuffle_batches" not in tried


def test_cases_start_again_for_what_no_running_training_can_be_given():
    cases = load_cases()
    assert any(c.restarts for c in cases)
    for c in cases:
        assert not set(c.restarts) & set(ACTIONS)


def test_a_log_that_is_missing_is_told(tmp_path):
    with pytest.raises(RunLogError, match="cannot add to the run log"):
        add_event(tmp_path, 3, EVENT, "what was to be said", {})


def test_what_the_first_run_came_to_is_told_though_a_new_start_cannot_be_written(tmp_path):
    made = case(tmp_path, {"shuffle_batches": {"order": "random"}})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "restarts").write_text("a file")
    outcome = repair_case(made, None, out=tmp_path / "run", strategy=PATIENT)
    assert outcome.diagnosis.verdict == "faulty" and not outcome.repaired
    assert "could not be started again for shuffle_batches" in outcome.problem


@pytest.mark.slow
def test_the_shipped_case_is_started_again(tmp_path):
    program = """
import sys
from pathlib import Path
from diagnoser.cases import load_case
from diagnoser.repair_loop import Strategy
from diagnoser.restart import repair_case
patient = Strategy("patient", lambda situation: ())  # no trials while it runs: they take minutes
out = Path(sys.argv[1])
outcome = repair_case(load_case("han"), "batches-by-class", out=out, strategy=patient)
sys.exit(0 if outcome.repaired else 1)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads((tmp_path / "run" / "diagnosis.json").read_text("utf-8"))
    wanted = next(f for f in load_case("han").faults if f.name == "batches-by-class")
    assert told["causes"][0]["cause"] == wanted.causes[0].cause
    kept = [r["step"]["actions"][0]["name"] for r in told["repairs"] if r["verdict"] == "kept"]
    assert kept == ["shuffle_batches"]
