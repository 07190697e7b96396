"""Runs at the edge and odd but valid ones (HC3, HC4) under the tool.

``python -m benchmarks.odd_controls`` trains the controls of the fault benchmark
(`diagnoser.benchmark.plan`) on all subjects, two seeds each, at the default budget, and judges them
by all default rules with their checks. Those that unmonitored pairs proved to do harm are no
controls and left out. Finished runs are kept in ``diagnoser-bench/odd-controls`` and not made again
unless the code that a run rests on changed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from benchmarks.reproductions_runs import RESULTS, ROOT, digest_of_code
from diagnoser.benchmark.configuration import catalogue
from diagnoser.benchmark.dataset import recording_of
from diagnoser.benchmark.execute import Resources, execute
from diagnoser.benchmark.plan import Item, make_plan
from diagnoser.benchmark.results import Store, write_whole
from diagnoser.diagnosis import default_rules, diagnose

SETS: Final = ("HC3", "HC4")
SEEDS: Final = (0, 1)
KEPT: Final = RESULTS / "odd-controls.json"
PROCESSES: Final = 2


def main() -> None:
    """Makes what is missing, judges all, and writes ``odd-controls.json``."""
    code = digest_of_code()
    store = Store(ROOT / "diagnoser-bench" / "odd-controls" / code, _complain)
    known = catalogue()
    harms = {harm.hash: harm.harm for harm in Store(RESULTS / "bench", _complain).read_harm()}
    items = [
        replace(item, budgeted=SEEDS)
        for item in make_plan(known, "small").items
        if item.role in SETS and harms[item.hash] != "proven"
    ]
    execute(
        items,
        "budget",
        store,
        Resources(PROCESSES),
        catalogue=known.name,
        complain=_complain,
        progress=sys.stderr,
    )
    rows = [row for item in items for row in _judged(item, store, harms[item.hash], code)]
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    write_whole(KEPT, f"[\n{lines}\n]\n".encode())
    for row in rows:
        if row["verdict"] == "faulty":
            print(*(row[name] for name in ("subject", "control", "set", "seed", "harm")))
            print("   ", "; ".join(row["findings"]))


def _judged(item: Item, store: Store, harm: str, code: str) -> list[dict[str, Any]]:
    found = []
    for run in store.rows("budget", item.hash):
        log = store.log_path("budget", item.hash, run["seed"])
        row = {
            "subject": item.configuration.subject,
            "control": item.configuration.operator,
            "set": item.role,
            "track": item.track,
            "seed": run["seed"],
            "harm": harm,
            "status": run["status"],
            "code": code,
            "verdict": "none",
            "findings": [],
        }
        if log.exists():
            with tempfile.TemporaryDirectory() as folder:
                recording = recording_of(log.read_bytes(), Path(folder))
            said = diagnose(recording, default_rules())
            row["verdict"] = said.verdict
            row["findings"] = [f"{f.source} in {f.component}" for f in said.findings]
        found.append(row)
    return found


def _complain(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
