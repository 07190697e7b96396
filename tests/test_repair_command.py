"""`diagnoser repair CASE`: the shipped case is found, repaired, and its exit code says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diagnoser.cases import load_case
from diagnoser.repair import ACTIONS
from diagnoser.vocabulary import REPAIRS

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def diagnoser(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "diagnoser.cli", *words]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def accuracy(done: subprocess.CompletedProcess[str]) -> float:
    return float(done.stdout.splitlines()[-1].split()[-1])


def test_every_action_has_a_word_of_the_vocabulary():
    assert set(ACTIONS) <= set(REPAIRS)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("repair", "hann"), "no case 'hann'; did you mean han"),
        (("repair", "han", "--fault", "none-such"), "case han has no fault 'none-such'"),
        (("repair", "han", "--strategy", "luck"), "invalid choice: 'luck'"),
        (("run", "--repair", "perhaps", "x.py"), "invalid choice: 'perhaps'"),
    ],
)
def test_a_mistake_is_told_and_ends_with_2(words, says):
    done = diagnoser(*words)
    assert done.returncode == 2
    assert says in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_papers_case_is_repaired(tmp_path: Path):
    done = diagnoser("repair", "han", "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads((tmp_path / "run" / "diagnosis.json").read_text("utf-8"))
    assert told["causes"][0]["cause"] == "learning_rate_too_high"
    assert told["causes"][0]["component"] == "word_attention"
    kept = [repair for repair in told["repairs"] if repair["verdict"] == "kept"]
    names = {action["name"] for action in kept[0]["step"]["actions"]}
    assert "scale_learning_rate" in names  # which alone is the paper's remedy
    assert names & {"roll_back", "reinitialize"}
    metric = load_case("han").metric
    assert accuracy(done) > metric.healthy - 2 * metric.within
    assert "repairs that were tried" in done.stderr
    assert "every arm is a fork of this process" in " ".join(done.stderr.split())


@pytest.mark.slow
def test_nothing_is_tried_on_its_healthy_form(tmp_path: Path):
    done = diagnoser("repair", "han", "--fault", "none", "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads((tmp_path / "run" / "diagnosis.json").read_text("utf-8"))
    assert (told["verdict"], told["repairs"]) == ("healthy", [])
