"""The tables of ``docs/difference.md``, from the kept comparisons (see `difference`, `tables`)."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from benchmarks.ablation_document import table
from benchmarks.difference import CHANGED, FAULTY, MODES, RESEEDED, RESULTS, SAME
from diagnoser.benchmark.intervals import wilson
from diagnoser.difference import SPREADS

DOCUMENT: Final = RESULTS.parents[2] / "docs" / "difference.md"
KINDS: Final[Mapping[str, str]] = {
    SAME: "healthy, another seed",
    CHANGED: "healthy, set up otherwise, another seed",
    FAULTY: "faulty, the same seed",
    RESEEDED: "faulty, another seed",
}
SCHEDULES: Final[Mapping[str, str]] = {
    "watched": "sixteen measurements",
    "budget": "default budget",
}
assert set(SCHEDULES) == set(MODES)

Rows = Sequence[Mapping[str, Any]]


@functools.cache
def rows() -> Rows:
    """Returns what was said of every pair."""
    found: Rows = json.loads(RESULTS.read_text("utf-8"))
    return found


def share(hits: float, n: int) -> str:
    """Returns a share with Wilson's interval; empty where there is nothing to have a share of."""
    if not n:
        return ""
    low, high = wilson(hits, n)
    return f"{hits / n:.2f} [{low:.2f}, {high:.2f}]"


def verdicts() -> str:
    """How many pairs of each kind are called different."""
    lines = []
    for mode, schedule in SCHEDULES.items():
        for kind, title in KINDS.items():
            own = [row for row in rows() if (row["mode"], row["kind"]) == (mode, kind)]
            measured = sum(row["measured"] for row in own)
            different = sum(row["verdict"] == "different" for row in own)
            untold = sum(row["verdict"] == "inconclusive" for row in own)
            lines.append(
                [
                    title,
                    schedule,
                    str(len(own)),
                    share(different, len(own)),
                    share(measured, len(own)),
                    str(untold),
                ]
            )
    head = ["second run", "measured at", "pairs", "different", "by measurements alone", "untold"]
    return table(head, lines)


def places() -> str:
    """How often the first component named is one to blame, where the fault has a place."""
    lines = []
    for mode, schedule in SCHEDULES.items():
        for kind in (FAULTY, RESEEDED):
            own = [
                row
                for row in rows()
                if (row["mode"], row["kind"]) == (mode, kind) and row["right"] is not None
            ]
            known = [row["by_chance"] for row in own]
            lines.append(
                [
                    KINDS[kind],
                    schedule,
                    str(len(own)),
                    share(sum(row["right"] for row in own), len(own)),
                    share(sum(row["by_gradient"] for row in own), len(own)),
                    f"{statistics.fmean(known):.2f}" if known else "",
                ]
            )
    head = [
        "second run", "measured at", "runs", "left first", "gradient norm at the end", "chance",
    ]  # fmt: skip
    return table(head, lines)


def by_mistake() -> str:
    """What is called different, and by what, mistake by mistake."""
    own = [row for row in rows() if row["mode"] == "watched" and row["kind"] in (FAULTY, RESEEDED)]
    lines = []
    for mistake in dict.fromkeys("+".join(row["operators"]) for row in own):
        of = [row for row in own if "+".join(row["operators"]) == mistake]
        cells = [mistake]
        for kind in (FAULTY, RESEEDED):
            runs = [row for row in of if row["kind"] == kind]
            cells.append(f"{sum(row['measured'] for row in runs)}/{len(runs)}")
        placed = [row["right"] for row in of if row["right"] is not None]
        cells.append(f"{sum(placed):.0f}/{len(placed)}" if placed else "")
        by = dict.fromkeys(row["quantity"].replace("_", " ") for row in of if row["quantity"])
        cells.append(", ".join(by))
        lines.append(cells)
    head = ["mistake", KINDS[FAULTY], KINDS[RESEEDED], "place right", "left first in"]
    return table(head, lines)


def bounds() -> str:
    """The floor and the bound of each quantity."""
    return table(
        ["quantity", "floor", "bound"],
        [
            [name.replace("_", " "), f"{spread.floor:.3f}", f"{spread.bound:.2f}"]
            for name, spread in SPREADS.items()
        ],
    )


BLOCKS: Final[Mapping[str, Callable[[], str]]] = {
    "verdicts": verdicts,
    "places": places,
    "by-mistake": by_mistake,
    "bounds": bounds,
}
