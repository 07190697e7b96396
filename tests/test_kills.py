"""A watched run that is killed at any moment leaves a log with all that it had measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diagnoser.diagnosis import diagnose, judges
from diagnoser.runlog import LOG_FILE, read_run

KILLS = 100
SEED = 0

SCRIPT = """
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, y = torch.randn(32, 4), torch.randint(3, (32,))
for i in range(80):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
"""

# Imports torch once and forks the runs. Each tells of every finished measurement, by its step, and
# is killed: those with an odd number at a random moment from its first measurement on, the others
# in the middle of a random write to the log, of which a half is on the disk.
HARNESS = """
import gc, json, os, random, signal, struct, sys, time
from pathlib import Path
import diagnoser.report.html, diagnoser.diagnosis.defaults, jinja2, rich.console
from diagnoser.launch import run_script
from diagnoser.runlog import RunLogWriter
kills, seed = int(sys.argv[1]), int(sys.argv[2])
exec(Path("script.py").read_text())  # so that all that torch imports is there
gc.collect()
gc.freeze()
draw = random.Random(seed)
nowhere = os.open(os.devnull, os.O_WRONLY)

def run(name, told, dies_at):
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    measured, written, writes = RunLogWriter.measurement, os.write, 0

    def tell(log, step, *rest):
        measured(log, step, *rest)
        written(told, struct.pack("q", step))

    def write(descriptor, data):
        nonlocal writes
        writes += 1
        if writes == dies_at:
            written(descriptor, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return written(descriptor, data)

    RunLogWriter.measurement, os.write = tell, write
    run_script("script.py", [], out=Path(name), overhead=0.5)

def killed(name, wait=None, dies_at=0):
    read, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            run(name, told, dies_at)
        finally:
            os._exit(0)
    os.close(told)
    with os.fdopen(read, "rb", buffering=0) as pipe:
        steps = pipe.read(8)
        begun = time.monotonic()
        if wait is not None:
            time.sleep(wait)
            os.kill(child, signal.SIGKILL)
        while more := pipe.read(8):
            steps += more
        _, status = os.waitpid(child, 0)
    told = [step for step, in struct.iter_unpack("q", steps)]
    return told, os.WIFSIGNALED(status), time.monotonic() - begun

_, _, usual = killed("whole")
lines = len(Path("whole/log.jsonl").read_bytes().splitlines())
count = 0
for i in range(10 * kills):
    how = {"wait": draw.uniform(0.0, usual)} if i % 2 else {"dies_at": draw.randint(2, lines // 2)}
    steps, was_killed, _ = killed(str(i), **how)
    count += was_killed
    if was_killed:  # else it had come to its end
        print(json.dumps({"name": str(i), "steps": steps}), flush=True)
    if count == kills:
        break
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("killed")
    (folder / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, str(KILLS), str(SEED)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing_that_was_measured(killed) -> None:
    folder, runs = killed
    assert len(runs) == KILLS
    rules, cut, reporting = judges(None, "off")[0], 0, 0
    for run in runs:
        recording = read_run(folder / run["name"])
        # Every measurement that was finished is there, in its order, and at most one that was not.
        measured = recording.measured.step.tolist()
        told = run["steps"]
        assert measured[: len(told)] == told, run["name"]
        assert len(measured) <= len(told) + 1
        assert recording.damaged_lines == 0
        # Of the losses none is missing from before the last measurement.
        last = max(measured, default=-1)
        assert recording.losses.step.tolist()[: max(last, 0)] == list(range(last))
        cut += not (folder / run["name"] / LOG_FILE).read_bytes().endswith(b"\n")
        # And it can be diagnosed.
        assert diagnose(recording, rules).verdict in ("healthy", "inconclusive")
        reporting += recording.ending is not None
    assert cut > KILLS // 4
    assert reporting > 0


@pytest.mark.slow
def test_what_a_kill_left_is_diagnosed_on_the_command_line(killed) -> None:
    folder, runs = killed
    for run in runs[:2]:
        for command in ("diagnose", "report"):
            line = [sys.executable, "-m", "diagnoser.cli", command, run["name"]]
            done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
            assert done.returncode in (0, 3), done.stderr
            assert done.stderr == ""
