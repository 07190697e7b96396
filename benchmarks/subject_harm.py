"""Do the faults of the evidence subjects do harm? Twin runs, unmonitored, on paired seeds.

A healthy and a faulty run with the same seed start from the same weights and see the same batches;
the difference of their held-out accuracies is one pair. A fault's harm is

* ``proven`` when the exact sign-flip test, Holm-corrected over the faults of its subject, has
  p < 0.05, Cohen's d is at least 0.5 (DeepCrime, ISSTA 2021), and the mean loss of accuracy is at
  least the margin max(2 standard deviations of the healthy runs, 2 % of their mean);
* ``equivalent`` when the same test places it inside half that margin on both sides;
* ``ambiguous`` otherwise.

Finished runs are appended to ``results/subject_harm.jsonl`` and not repeated unless a source file
changed. Run it with ``python -m benchmarks.subject_harm``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from diagnoser.benchmark.harm import (
    EFFECT_SIZE,
    SIGNIFICANCE,
    cohen_d,
    equivalence_p,
    holm,
    sign_flip_p,
)

ROOT = Path(__file__).parents[1]
SUBJECTS = ROOT / "benchmarks" / "subjects" / "faults.yaml"
CASES = sorted((ROOT / "cases").glob("*/case.yaml"))
SHARED = ROOT / "cases" / "han"  # whose modules the subjects import
RUNS = ROOT / "benchmarks" / "results" / "subject_harm.jsonl"
SUMMARY = ROOT / "benchmarks" / "results" / "subject_harm.json"

HEALTHY = "none"
FIRST_SEED = 1000  # smaller seeds belong to the evidence table and are not looked at here


@dataclass(frozen=True)
class Subject:
    """A training script and the command-line arguments of each of its faults."""

    name: str
    script: Path
    faults: Mapping[str, Mapping[str, Any]]
    digest: str  # of the sources: runs of another version do not count


@dataclass(frozen=True)
class Run:
    """A finished run; ``accuracy`` is the held-out one that the script prints last."""

    subject: str
    fault: str
    seed: int
    digest: str
    accuracy: float
    cpu_s: float


def main() -> None:
    """Completes the runs of every subject and fault, then writes the summary."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--pairs", type=int, default=8, help="seeds of each fault")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    arguments = parser.parse_args()
    seeds = range(FIRST_SEED, FIRST_SEED + arguments.pairs)
    subjects = read_subjects()
    finished = read_runs(subjects, seeds)
    wanted = [
        (subject, fault, seed)
        for seed in seeds
        for subject in subjects
        for fault in subject.faults
        if (subject.name, fault, seed) not in finished
    ]
    RUNS.parent.mkdir(exist_ok=True)
    with RUNS.open("a", encoding="utf-8") as log:
        pool = ThreadPoolExecutor(arguments.workers)
        try:
            for future in as_completed([pool.submit(train, *job) for job in wanted]):
                log.write(json.dumps(asdict(future.result())) + "\n")
                log.flush()
        finally:
            pool.shutdown(cancel_futures=True)

    runs = read_runs(subjects, seeds).values()
    summary = {subject.name: summarise(subject, runs) for subject in subjects}
    SUMMARY.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def read_subjects() -> tuple[Subject, ...]:
    """Returns the subjects of the evidence table, and the shipped cases as more of them."""
    folder = SUBJECTS.parent
    entries = [(folder, SHARED, entry) for entry in yaml.safe_load(SUBJECTS.read_text("utf-8"))]
    for path in CASES:
        case = yaml.safe_load(path.read_text("utf-8"))
        entries.append((path.parent, path.parent, {**case, "name": f"case:{case['name']}"}))

    subjects = []
    for folder, modules, entry in entries:
        script = folder / entry["script"]
        faults = {fault["name"]: fault.get("arguments") for fault in entry["faults"]}
        arguments = {name: given or {"fault": name} for name, given in faults.items()}
        others = sorted(path for path in modules.glob("*.py") if path.name != "train.py")
        sources = b"".join(path.read_bytes() for path in (script, *others))
        digest = hashlib.sha256(sources).hexdigest()[:16]
        subjects.append(Subject(entry["name"], script, {HEALTHY: {}, **arguments}, digest))
    return tuple(subjects)


def read_runs(
    subjects: Iterable[Subject], seeds: Container[int]
) -> dict[tuple[str, str, int], Run]:
    """Returns the finished runs of these seeds and of the sources as they are now."""
    current = {(subject.name, subject.digest) for subject in subjects}
    lines = RUNS.read_text("utf-8").splitlines() if RUNS.exists() else []
    runs = (Run(**json.loads(line)) for line in lines)
    return {
        (run.subject, run.fault, run.seed): run
        for run in runs
        if (run.subject, run.digest) in current and run.seed in seeds
    }


def train(subject: Subject, fault: str, seed: int) -> Run:
    """Runs a subject alone in a process of its own, with one thread.

    Raises:
        RuntimeError: The script failed; the message holds the end of what it said.
    """
    options = {**subject.faults[fault], "seed": seed}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    process = subprocess.Popen(
        [sys.executable, str(subject.script), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with process:
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not lines or not lines[-1].startswith("accuracy "):
        raise RuntimeError(f"{subject.name} {fault} seed {seed} failed: {' | '.join(lines[-3:])}")
    accuracy = float(lines[-1].removeprefix("accuracy "))
    cpu_s = round(usage.ru_utime + usage.ru_stime, 2)
    return Run(subject.name, fault, seed, subject.digest, accuracy, cpu_s)


def summarise(subject: Subject, runs: Iterable[Run]) -> dict[str, Any]:
    """Returns the healthy accuracies of a subject and the harm of each of its faults."""
    table: dict[str, dict[int, Run]] = {fault: {} for fault in subject.faults}
    for run in runs:
        if run.subject == subject.name:
            table[run.fault][run.seed] = run
    healthy = table.pop(HEALTHY)
    score = [run.accuracy for run in healthy.values()]
    margin = max(2 * statistics.stdev(score), 0.02 * statistics.fmean(score))

    losses = {
        fault: np.array([healthy[seed].accuracy - run.accuracy for seed, run in twins.items()])
        for fault, twins in table.items()
    }
    adjusted = holm({fault: sign_flip_p(loss) for fault, loss in losses.items()})
    faults = {}
    for fault, twins in table.items():
        faulty = [run.accuracy for run in twins.values()]
        same = equivalence_p(losses[fault], margin / 2)
        loss, effect = float(losses[fault].mean()), cohen_d(score, faulty)
        if adjusted[fault] < SIGNIFICANCE and effect >= EFFECT_SIZE and loss >= margin:
            harm = "proven"
        else:
            harm = "equivalent" if same < SIGNIFICANCE else "ambiguous"
        faults[fault] = {
            "harm": harm,
            **spread(faulty),
            "mean_loss": round(loss, 4),
            "p": round(sign_flip_p(losses[fault]), 5),
            "p_holm": round(adjusted[fault], 5),
            "p_equivalent": round(same, 5),
            "cohen_d": round(effect, 2) if math.isfinite(effect) else str(effect),
        }
    cpu_s = [run.cpu_s for run in healthy.values()]
    return {
        "healthy": {**spread(score), "cpu_s": round(statistics.fmean(cpu_s), 1)},
        "margin": round(margin, 4),
        "faults": faults,
    }


def spread(accuracies: Sequence[float]) -> dict[str, float]:
    """Returns how many, their mean and their range."""
    return {
        "runs": len(accuracies),
        "mean": round(statistics.fmean(accuracies), 4),
        "min": min(accuracies),
        "max": max(accuracies),
    }


if __name__ == "__main__":
    main()
