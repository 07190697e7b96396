"""The three cases of the paper under ``diagnoser run``: silent when healthy, right when not.

Each row of ``results/paper_cases.jsonl`` is one run of a case's small form, healthy or with a
fault. The first `TWINS` seeds are run without the tool, too, and both must print the same: from a
copy of the case that prints losses and accuracies with all their digits. Seeds are none that the
study or the rules were made with. ``python -m benchmarks.paper_cases`` makes the rows that are
missing, in minutes; ``results/paper_cases.json`` is their summary.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.forked import answers, rows_of, undamaged
from benchmarks.intervals import wilson

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = Path(__file__).parent / "results"
ROWS: Final = RESULTS / "paper_cases.jsonl"
SUMMARY: Final = RESULTS / "paper_cases.json"

HEALTHY: Final = "healthy"
LATE: Final = "late-cross-attention"
# The small forms: case, form and the arguments of its script.
FORMS: Final = {
    ("han", HEALTHY): ("--epochs", "2"),
    ("video", HEALTHY): ("--epochs", "3"),
    ("distilbert", HEALTHY): ("--size", "small"),
    ("video", LATE): ("--epochs", "3", "--cross-attention", "lazy"),
}
FIRST_SEED: Final = 100
TWINS: Final = 20  # seeds of each form that are run without the tool as well
LATE_SEEDS: Final = 20
HOLDS: Final = {"case", "form", "seed", "verdict", "findings", "accuracy", "identical"}  # of a row

Task = tuple[str, str, int]


def exact_copy(case: str, folder: Path) -> Path:
    """Copies a case to where its script prints every number with all its digits."""
    shutil.copytree(ROOT / "cases" / case, folder, ignore=shutil.ignore_patterns("__pycache__"))
    script = folder / "train.py"
    text = script.read_text(encoding="utf-8")
    if ":.4f}" not in text:
        raise ValueError(f"{script} prints no number that could be compared")
    script.write_text(text.replace(":.4f}", ":.17g}"), encoding="utf-8")
    return script


def run(case: str, form: str, seed: int, *, twin: bool) -> dict[str, Any]:
    """Runs a form under the tool, and without it where a twin is asked for.

    Raises:
        RuntimeError: One of them failed; the message is the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = exact_copy(case, Path(folder) / "case")
        words = [str(script), *FORMS[case, form], "--seed", str(seed)]
        out = Path(folder) / "run"
        watched = _printed(["-m", "diagnoser.cli", "run", "--out", str(out), *words])
        diagnosis = json.loads((out / "diagnosis.json").read_text("utf-8"))
        same = _printed(words) == watched if twin else None
    found = [
        {
            "fault": finding["fault"],
            "component": finding["component"],
            "since_step": finding["since_step"],
            "severity": finding["severity"],
            "cause": finding["causes"][0]["cause"] if finding["causes"] else None,
        }
        for finding in diagnosis["findings"]
    ]
    return {
        "verdict": diagnosis["verdict"],
        "findings": found,
        "accuracy": round(float(watched.rpartition(" ")[2]), 4),
        "identical": same,
        "cost": diagnosis["cost"],
    }


def _printed(words: Sequence[str]) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"ended with {done.returncode}: {done.stderr[-500:]}")
    return done.stdout


def located(row: dict[str, Any]) -> bool:
    """Whether the cross attention that no optimizer has was found, as what and where it is."""
    return any(
        found["fault"] == "dead_component"
        and found["cause"] == "component_not_optimized"
        and found["component"].partition(".")[0] == "cross_attention"
        for found in row["findings"]
    )


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns, for each form, how many runs were called what, with Wilson's interval (95 %)."""
    told: dict[str, Any] = {}
    for case, form in FORMS:
        own = [row for row in rows if (row["case"], row["form"]) == (case, form)]
        twins = [row["identical"] for row in own if row["identical"] is not None]
        right = [row["verdict"] == HEALTHY if form == HEALTHY else located(row) for row in own]
        told[f"{case}: {form}"] = {
            **_rate(right),
            "identical": sum(twins),
            "twins": len(twins),
            "accuracy": [min(r["accuracy"] for r in own), max(r["accuracy"] for r in own)]
            if own
            else None,
        }
    healthy = [row["verdict"] == HEALTHY for row in rows if row["form"] == HEALTHY]
    return {"all healthy": _rate(healthy), **told}


def _rate(right: Sequence[bool]) -> dict[str, Any]:
    low, high = wilson(sum(right), len(right)) if right else (0.0, 1.0)
    return {"right": sum(right), "of": len(right), "low": round(low, 4), "high": round(high, 4)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the rows that are missing; returns 1 if one could not be made."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="healthy runs of each case")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="forget what was made before")
    given = parser.parse_args(arguments)
    if given.fresh:
        ROWS.unlink(missing_ok=True)
    kept = undamaged(ROWS, lambda row: row.keys() >= HOLDS)
    done = {(row["case"], row["form"], row["seed"]) for row in kept}
    wanted: list[Task] = [
        (case, form, FIRST_SEED + i)
        for i in range(given.seeds)
        for case, form in FORMS
        if form == HEALTHY or i < LATE_SEEDS
    ]

    def work(task: Task) -> dict[str, Any]:
        return run(*task, twin=task[2] < FIRST_SEED + TWINS)

    failed = 0
    with ROWS.open("a", encoding="utf-8") as file:
        for task, row in answers([t for t in wanted if t not in done], work, given.jobs):
            line = dict(zip(("case", "form", "seed"), task, strict=True)) | row
            if "problem" in row:
                failed += 1
                print(line, file=sys.stderr)
                continue
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(*task, row["verdict"], row["accuracy"], row["identical"], flush=True)
    rows = sorted(rows_of(ROWS), key=lambda row: (row["case"], row["form"], row["seed"]))
    SUMMARY.write_text(json.dumps(summary(rows), indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
