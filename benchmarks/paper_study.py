"""The paper's study, done again: ``python -m benchmarks.paper_study`` makes what is missing.

Each line of ``benchmarks/results/study.jsonl`` is one part (`benchmarks.study.parts`) for one model
and one seed. ``--fresh`` makes anew what is asked for; ``--quick`` makes a small form of it all,
somewhere else, in minutes; ``--only PART`` and ``--model NAME`` make less.
`benchmarks.study_document` prints the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.forked import answers, undamaged, write_rows
from benchmarks.study.parts import PARTS
from benchmarks.study.settings import settings
from benchmarks.study.statistics import RESULTS
from diagnoser.cases import load_case
from diagnoser.errors import UsageError

Task = tuple[str, str, int]  # part, model, seed
HOLDS: Final = {  # what a row of each part has
    "measured": {"checkpoints", "landscape", "changed_by_epoch"},
    "perturbed": {"arms"},
    "intervention": {"arms"},
    "propagation": {"pairs"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the rows that are missing; returns 1 if one could not be made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="make what is asked for anew")
    parser.add_argument("--quick", action="store_true", help="a small form of everything")
    parser.add_argument("--only", choices=tuple(PARTS), action="append", default=[])
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=None, help="at most so many")
    given = parser.parse_args(arguments)
    if given.out is None:
        given.out = Path(tempfile.mkdtemp()) / "study.jsonl" if given.quick else RESULTS
    models = {setting.name: setting for setting in settings(quick=given.quick)}
    unknown = [name for name in given.model if name not in models]
    if unknown:
        parser.error(f"no model '{unknown[0]}'; there is: {', '.join(models)}")
    try:
        for name in given.model or models:
            load_case(name)
    except UsageError as error:
        parser.error(str(error))
    asked = {(part, name) for part in given.only or PARTS for name in given.model or models}
    kept = undamaged(given.out, lambda row: row.keys() >= {"model", "seed"} | HOLDS[row["part"]])
    if given.fresh:
        kept = [row for row in kept if (row["part"], row["model"]) not in asked]
        write_rows(given.out, kept)
    done = {(row["part"], row["model"], row["seed"]) for row in kept}
    most = 1 if given.quick else given.seeds or max(s.seeds for s in models.values())
    wanted: list[Task] = [
        (part, name, seed)
        for seed in range(most)
        for part in given.only or PARTS
        for name in given.model or models
        if seed < models[name].seeds and (part, name, seed) not in done
    ]

    def work(task: Task) -> dict[str, Any]:
        part, name, seed = task
        row = PARTS[part](models[name], seed)
        return {**row, "seconds": round(sum(os.times()[:4]), 1)}  # with its forks

    failed = 0
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)  # imports at first use
    with given.out.open("a", encoding="utf-8") as file:
        for (part, name, seed), row in answers(wanted, work, given.jobs):
            if "problem" in row:
                failed += 1
                print(f"{part} of {name}, seed {seed}: {row['problem']}", file=sys.stderr)
                continue
            line = {"part": part, "model": name, "seed": seed, **row}
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            print(f"{part} of {name}, seed {seed}: {row['seconds']} s", flush=True)
    print(given.out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
