"""Jobs: runs of one configuration that a worker process carries out.

Nothing here imports torch, so that a process that only waits for workers stays small.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from diagnoser.errors import BenchmarkError

Mode = Literal["truth", "watched", "budget"]  # unmonitored, forced, as by default
Row = dict[str, Any]

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class Job:
    """Runs of one configuration. ``hash`` is what the sender takes the configuration's to be."""

    hash: str
    configuration: str  # as `Configuration.to_json` writes it
    seeds: tuple[int, ...]
    mode: Mode
    limit_s: float  # wall time of one run
    catalogue: str = ""

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads a job.

        Raises:
            BenchmarkError: The text is no job.
        """
        try:
            found = json.loads(text)
            return cls(**{**found, "seeds": tuple(found["seeds"])})
        except (ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(f"no job on stdin: {error}") from error

    def to_json(self) -> str:
        """Writes the job for a worker's stdin."""
        return json.dumps({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})


@dataclass(frozen=True, slots=True)
class Answer:
    """Rows of a job; ``complaint`` says why there are fewer than it has seeds."""

    job: Job
    rows: tuple[Row, ...]
    complaint: str = ""


def carry_out(job: Job, environment: Mapping[str, str] | None = None) -> Answer:
    """Carries out a job in a worker process and waits for it.

    Args:
        job: What to carry out.
        environment: Variables of the worker process; None: those of this process.
    """
    variables = os.environ if environment is None else environment
    process = subprocess.Popen(
        [sys.executable, "-m", "diagnoser.benchmark.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**variables, **ONE_THREAD},
    )
    try:
        out, said = process.communicate(job.to_json())
    except BaseException:
        process.terminate()
        raise
    # The last line of a worker that was killed may be cut.
    rows = tuple(json.loads(line) for line in out.splitlines(keepends=True) if line[-1] == "\n")
    code = process.returncode
    if code == 0:
        return Answer(job, rows)
    ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    last = (said.strip().splitlines() or ["and said nothing"])[-1]
    return Answer(job, rows, f"the worker process {ending} ({last})")
