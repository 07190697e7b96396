"""How often the diagnosis is right, and how often it cries wolf: two subjects, eight faults.

Every run is a real `diagnoser run` of an unmodified script at the default budget. Faulty twins
differ from the healthy runs in one switch of the script; that each does harm (or is a defect of
the program) is measured without the tool by `benchmarks.subject_harm`. Rules were written on seeds
from 1000 on; the table is about seeds 0 to 19.

Runs are kept under ``benchmarks/.runs`` and not repeated unless the code that measures, or a
subject, changed; diagnosing them again takes seconds. Run it with ``python -m
benchmarks.first_slice``; the table is ``benchmarks/results/first_slice.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.intervals import wilson
from diagnoser.diagnosis import default_rules, diagnose
from diagnoser.errors import DiagnoserError
from diagnoser.runlog import read_run
from diagnoser.vocabulary import severity_rank

ROOT = Path(__file__).parents[1]
SUBJECTS = ROOT / "benchmarks" / "subjects" / "faults.yaml"
RUNS = ROOT / "benchmarks" / ".runs"
RESULTS = ROOT / "benchmarks" / "results" / "first_slice.json"
MEASURING = ("components", "curvature", "monitor", "runlog", "statistics")
HEALTHY = "none"


@dataclass(frozen=True)
class Truth:
    """A fault of a subject, and what a right diagnosis of it says."""

    subject: str
    script: Path
    fault: str
    faults: tuple[str, ...] = ()
    cause: str = ""
    components: tuple[str, ...] = ()
    local: bool = False


@dataclass(frozen=True)
class Row:
    """One diagnosed run. ``cause_rank`` counts from 1; None: not among the causes."""

    subject: str
    fault: str
    seed: int
    verdict: str
    alarms: int  # findings of severity medium or more
    cause_rank: int | None
    component_first: bool | None  # of local faults only
    first: str
    autotrainer: str  # the verdict of AutoTrainer's five rules on the same log, as a baseline


def truths() -> list[Truth]:
    """Reads what is true of every subject and fault; the healthy form comes first."""
    found = []
    for subject in yaml.safe_load(SUBJECTS.read_text(encoding="utf-8")):
        script = SUBJECTS.parent / subject["script"]
        found.append(Truth(subject["name"], script, HEALTHY))
        for fault in subject["faults"]:
            found.append(
                Truth(
                    subject["name"],
                    script,
                    fault["name"],
                    tuple(fault["faults"]),
                    fault["cause"],
                    tuple(fault["components"]),
                    fault["local"],
                )
            )
    return found


def directory_of(truth: Truth, seed: int, digest: str) -> Path:
    """Returns where the run of a subject, fault and seed is recorded."""
    return RUNS / digest / f"{truth.subject}-{truth.fault}-{seed}"


def digest_of_sources() -> str:
    """Returns a digest of everything a recorded run depends on."""
    paths = [p for room in MEASURING for p in (ROOT / "diagnoser" / room).rglob("*.py")]
    paths += [*SUBJECTS.parent.glob("*.py"), *(ROOT / "cases" / "han").glob("*.py")]
    text = b"".join(path.read_bytes() for path in sorted(paths))
    return hashlib.sha256(text).hexdigest()[:12]


def watch(truth: Truth, seed: int, directory: Path) -> None:
    """Runs one script under the tool, unless its finished log is there already."""
    try:
        if read_run(directory).ending is not None:
            return
        raise RuntimeError(f"{directory}: an unfinished run; remove it")
    except DiagnoserError:
        pass
    part = directory.with_name(f"{directory.name}.part-{os.getpid()}")
    command = [sys.executable, "-m", "diagnoser.cli", "run", "--out", str(part)]
    command += [str(truth.script), "--seed", str(seed), "--fault", truth.fault]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.decode()[-2000:]}")
    part.rename(directory)


def judge(truth: Truth, seed: int, directory: Path) -> Row:
    """Diagnoses a recorded run and holds the answer against the truth."""
    recording = read_run(directory)
    diagnosis = diagnose(recording, default_rules())
    baseline = diagnose(recording, default_rules(Path("autotrainer")))
    alarms = [f for f in diagnosis.findings if severity_rank(f.severity) >= severity_rank("medium")]
    ranked = list(dict.fromkeys(cause.cause for cause in diagnosis.causes))
    first = diagnosis.causes[0] if diagnosis.causes else None
    return Row(
        truth.subject,
        truth.fault,
        seed,
        diagnosis.verdict,
        len(alarms),
        ranked.index(truth.cause) + 1 if truth.cause in ranked else None,
        first is not None and first.component in truth.components if truth.local else None,
        f"{first.cause} in {first.component}" if first is not None else "",
        baseline.verdict,
    )


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Counts with 95 % Wilson intervals, for every subject and fault and for all together."""
    kinds = {"healthy": [r for r in rows if r.fault == HEALTHY]}
    kinds["all faults"] = [r for r in rows if r.fault != HEALTHY]
    for row in rows:
        kinds.setdefault(f"{row.subject}: {row.fault}", []).append(row)
    return [_counts(name, group) for name, group in kinds.items() if group]


def _counts(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    if all(row.fault == HEALTHY for row in rows):
        return {
            "runs": name,
            "n": len(rows),
            "alarmed": _rate(row.alarms > 0 for row in rows),
            "autotrainer": _rate(row.autotrainer == "faulty" for row in rows),
        }
    return {
        "runs": name,
        "n": len(rows),
        "faulty": _rate(row.verdict == "faulty" for row in rows),
        "cause_in_top_3": _rate(row.cause_rank is not None and row.cause_rank <= 3 for row in rows),
        "cause_first": _rate(row.cause_rank == 1 for row in rows),
        "component_first": _rate(
            row.component_first for row in rows if row.component_first is not None
        ),
        "autotrainer": _rate(row.autotrainer == "faulty" for row in rows),
    }


def _rate(hits: Iterable[bool]) -> dict[str, Any] | None:
    found = list(hits)
    if not found:
        return None
    low, high = wilson(sum(found), len(found))
    return {"count": sum(found), "of": len(found), "low": round(low, 3), "high": round(high, 3)}


def main() -> None:
    """Completes the runs, diagnoses them, prints the counts and writes the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--healthy", type=int, default=20, help="seeds of each healthy subject")
    parser.add_argument("--faulty", type=int, default=5, help="seeds of each fault")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument("--digest", help="judge the recorded runs of another version of the code")
    parser.add_argument("--dry", action="store_true", help="print the counts, write nothing")
    arguments = parser.parse_args()
    digest = arguments.digest or digest_of_sources()
    (RUNS / digest).mkdir(parents=True, exist_ok=True)
    jobs = [
        (truth, seed)
        for truth in truths()
        for seed in range(
            arguments.first_seed,
            arguments.first_seed
            + (arguments.healthy if truth.fault == HEALTHY else arguments.faulty),
        )
    ]
    with ThreadPoolExecutor(arguments.workers) as pool:
        waiting = [pool.submit(watch, t, s, directory_of(t, s, digest)) for t, s in jobs]
        for i, done in enumerate(as_completed(waiting), start=1):
            done.result()
            print(f"{i} of {len(jobs)} runs", end="\r", file=sys.stderr, flush=True)
    rows = [judge(truth, seed, directory_of(truth, seed, digest)) for truth, seed in jobs]
    counts = summary(rows)
    for row in rows:
        print(*asdict(row).values(), sep="\t")
    for line in counts:
        print(line)
    if not arguments.dry:
        result = {"rows": [asdict(row) for row in rows], "summary": counts}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
