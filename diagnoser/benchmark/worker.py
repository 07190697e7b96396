"""Runs in processes of their own: ``python -m diagnoser.benchmark.worker`` with a job on stdin.

torch is imported and the data are made once; then each run is a fork, so that a run that crashes,
hangs or takes all memory ends itself and nothing else. A row of JSON a run goes to stdout, as soon
as the run is finished.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from diagnoser.benchmark.configuration import Catalogue, Configuration, catalogue, content_hash
from diagnoser.benchmark.harm import OK, loss_alarm
from diagnoser.benchmark.jobs import Job
from diagnoser.errors import DiagnoserError
from diagnoser.injection import Outcome, Training, assemble, train

POLL_S = 0.02
FIRST, MEASUREMENTS = 10, 16  # step of the first measurement of a watched run, and how many
WITH: Mapping[str, tuple[int, ...]] = {  # which of the sixteen
    "spectrum": (0, 7),
    "interaction": (0, 7, 15),
    "norms": (0,),
}
LOG_FILE = "log.jsonl"


def measuring(steps: int) -> Mapping[int, tuple[str, ...]]:
    """Returns at which steps a watched run is measured, and what beside the usual (`watch`).

    Sixteen measurements from step `FIRST` to the end, fewer in a run too short for them. The
    spectrum of all components takes longer than the whole training, so that two of the sixteen have
    it, the first and the middle one; the first also has the coupling norms of all pairs.
    """
    last = max(steps - 2, FIRST)
    wanted = [FIRST + round(k * (last - FIRST) / (MEASUREMENTS - 1)) for k in range(MEASUREMENTS)]
    found: dict[int, tuple[str, ...]] = {}
    for k, step in enumerate(wanted):
        if step - 1 not in found and step + 1 < steps:
            found[step] = tuple(turn for turn, of in WITH.items() if k in of)
    return found


def main() -> int:
    """Reads a job from stdin and prints a row for each of its runs."""
    try:
        for row in run_job(Job.from_json(sys.stdin.read())):
            print(json.dumps(row), flush=True)
    except DiagnoserError as error:
        print(f"diagnoser: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run_job(job: Job) -> Iterator[dict[str, Any]]:
    """Yields a row for each run of a job, in the order of its seeds.

    Raises:
        BenchmarkError: The configuration names something that does not exist.
    """
    torch.set_num_threads(1)
    known = catalogue(job.catalogue)
    configuration = Configuration.from_json(job.configuration)
    digest = content_hash(configuration, known)
    head = {
        "hash": job.hash,
        "subject": configuration.subject,
        "recipe": configuration.recipe,
        "operator": configuration.operator,
        "severity": configuration.severity,
        "place": configuration.place,
        "remedy": configuration.remedy,
        "mode": job.mode,
    }
    if digest != job.hash:
        reason = f"the code here gives {digest}: update the worker's diagnoser"
        yield from ({**head, "seed": s, "status": "refused", "reason": reason} for s in job.seeds)
        return
    unready = _prepare(known, configuration, job.mode)
    for seed in job.seeds:
        row = {"status": "failed", "reason": unready} if unready else {}
        yield {**head, "seed": seed, **(row or _in_a_fork(job, known, configuration, seed))}


def run(
    known: Catalogue, configuration: Configuration, seed: int, mode: str, directory: Path
) -> dict[str, Any]:
    """Carries out one run, here; the same arguments give the same numbers, bit for bit.

    A watched run leaves its log in ``directory``.
    """
    subject = known.subject(configuration.subject)
    training, _ = assemble(
        subject, configuration.settings(subject), seed, configuration.injected(known)
    )
    outcome = train(training) if mode == "truth" else _watched(training, mode, directory)
    losses = outcome.losses
    finite = all(map(math.isfinite, (*losses, outcome.loss, outcome.score)))
    row: dict[str, Any] = {
        "status": OK,
        "reason": "",
        "score": outcome.score,
        "loss": outcome.loss,
        "area": statistics.fmean(losses) if all(map(math.isfinite, losses)) else math.nan,
        "first_loss": losses[0] if losses else math.nan,
        "last_loss": losses[-1] if losses else math.nan,
        "steps": len(losses),
        "diverged": not finite,
        "loss_alarm": loss_alarm(losses),
    }
    if mode != "truth":
        # No time of packing in it: the same log gives the same bytes.
        packed = gzip.compress((directory / LOG_FILE).read_bytes(), mtime=0)
        row["log"] = base64.b64encode(packed).decode()
    return row


def _watched(training: Training, mode: str, directory: Path) -> Outcome:
    from diagnoser.session import watch

    at = measuring(training.settings.steps) if mode == "watched" else None
    with watch(
        training.model, training.optimizers[0], out=directory, verbose=False, at=at
    ):  # a second optimizer is a mistake of the script: the tool is not told of it
        return train(training)


def _prepare(known: Catalogue, configuration: Configuration, mode: str) -> str:
    """Does before any fork what every run needs; returns why it cannot be done.

    Data are made, and what is imported at first use is imported: with the first optimizer torch
    does so for a second. Nothing is differentiated here: torch's threads do not survive a fork.
    """
    subject = known.subject(configuration.subject)
    try:
        subject.data()
        subject.build(configuration.settings(subject))
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        if mode != "truth":
            import diagnoser.session  # noqa: F401
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return ""


def _in_a_fork(
    job: Job, known: Catalogue, configuration: Configuration, seed: int
) -> dict[str, Any]:
    """Carries out one run in a fork, and says how it ended where it did not."""
    with tempfile.TemporaryDirectory(prefix="diagnoser-bench-") as folder:
        answer = Path(folder) / "row.json"
        child = os.fork()
        if child == 0:
            _answer(job, known, configuration, seed, Path(folder), answer)
        status, cpu_s = _wait(child, job.limit_s)
        if status is None:
            ending = {"status": "late", "reason": f"stopped after {job.limit_s:.0f} s"}
        elif os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            ending = {"status": "killed", "reason": f"the process was killed by {name}"}
        elif not answer.exists():
            code = os.waitstatus_to_exitcode(status)
            ending = {"status": "failed", "reason": f"the process ended with exit code {code}"}
        else:
            ending = json.loads(answer.read_text("utf-8"))
        return {**ending, "cpu_s": cpu_s}


def _answer(
    job: Job,
    known: Catalogue,
    configuration: Configuration,
    seed: int,
    folder: Path,
    answer: Path,
) -> None:
    """What the fork does; it never returns."""
    code = 1
    try:
        os.dup2(2, 1)  # stdout is for rows alone, whatever a subject prints
        try:
            row = run(known, configuration, seed, job.mode, folder / "run")
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            row = {"status": "failed", "reason": text[:500]}
        part = folder / "part.json"
        part.write_text(json.dumps(row), "utf-8")
        part.replace(answer)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # no clean-up of what the parent still uses


def _wait(child: int, limit_s: float) -> tuple[int | None, float]:
    """Waits for a fork, and ends it at the limit or when whoever asked for it is gone.

    Returns:
        Its wait status, None where the limit was reached, and its CPU time in seconds.
    """
    parent, deadline = os.getppid(), time.monotonic() + limit_s
    try:
        while True:
            pid, status, usage = os.wait4(child, os.WNOHANG)
            if pid:
                return status, usage.ru_utime + usage.ru_stime
            late = time.monotonic() > deadline
            if late or os.getppid() != parent:
                os.kill(child, signal.SIGKILL)
                _, status, usage = os.wait4(child, 0)
                if not late:
                    sys.exit("diagnoser: whoever asked for these runs is gone")
                return None, usage.ru_utime + usage.ru_stime
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        os.kill(child, signal.SIGKILL)
        raise


if __name__ == "__main__":
    sys.exit(main())
