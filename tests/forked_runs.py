"""Runs scripts alone and under `diagnoser run`, each in a fork of one process that has torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from diagnoser.runlog import Recording, read_run

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

WARM = """
import torch
torch.set_num_threads(1)
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
torch.nn.functional.cross_entropy(model(torch.ones(2, 2)), torch.tensor([0, 1])).backward()
optimizer.step()
"""
HARNESS = """
import contextlib, gc, json, os, runpy, sys
import diagnoser.report.html, diagnoser.diagnosis.defaults, jinja2, rich.console
from diagnoser.cli import main
exec(sys.argv[1])  # so that all that torch imports is there
gc.collect()
gc.freeze()

def act(script, run, before):
    exec(before, {})
    if run is not None:
        sys.argv = ["diagnoser"]
        return main(["run", "--out", run, script])
    sys.argv = [script]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0

def begin(name, **job):
    child = os.fork()
    if child:
        return name, child
    for descriptor in (1, 2):
        file = os.open(f"{name}.{descriptor}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    code = 99
    try:
        code = act(**job)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)

for jobs in json.load(sys.stdin):
    for name, child in [begin(**job) for job in jobs]:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([name, code]), flush=True)
"""


@dataclass(frozen=True)
class Job:
    """A script, its run directory (None: it runs alone), and code that is executed before it."""

    name: str
    script: str
    run: str | None
    before: str = ""


@dataclass(frozen=True)
class Ran:
    """What came of a job."""

    folder: Path
    job: Job
    code: int

    @property
    def stdout(self) -> str:
        return (self.folder / f"{self.job.name}.1").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / f"{self.job.name}.2").read_text()

    @property
    def run(self) -> Path:
        assert self.job.run is not None
        return self.folder / self.job.run

    @property
    def recording(self) -> Recording:
        return read_run(self.run)

    def lines(self, words: str) -> list[str]:
        """Returns the lines of stderr with some words in them."""
        return [line for line in self.stderr.splitlines() if words in line]


def run_jobs(folder: Path, jobs: Sequence[Job | Sequence[Job]]) -> dict[str, Ran]:
    """Runs jobs one after another; those in a list at the same time."""
    together = [[job] if isinstance(job, Job) else list(job) for job in jobs]
    by_name = {job.name: job for own in together for job in own}
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, WARM],
        cwd=folder,
        env=ENVIRONMENT,
        input=json.dumps([[asdict(job) for job in own] for own in together]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    codes = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    return {name: Ran(folder, job, codes[name]) for name, job in by_name.items()}
