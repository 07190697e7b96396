"""The tables of ``docs/scores.md``, from the committed scores (see `tables`).

As long as a split has not been scored there are none, and every block says so.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq

from benchmarks import defaultplusplus
from benchmarks.ablation_document import gap, table, word
from benchmarks.benchmark_document import harms
from benchmarks.outcomes import BENCH, SIZE
from diagnoser.benchmark.configuration import catalogue
from diagnoser.benchmark.dataset import truths
from diagnoser.benchmark.plan import make_plan
from diagnoser.benchmark.scores import OPENINGS, TOGETHER, Score
from diagnoser.benchmark.scoring import figures
from diagnoser.injection import INJECTIONS

Row = Mapping[str, Any]

NOT_YET: Final = "Not there yet: the {} subjects have not been scored."
OURS: Final = (TOGETHER, "rules", "classifier")
TOOL: Final = f"DEFault++ {defaultplusplus.VERSION}"
# Those that the committed scores hold are shown.
BASELINES: Final = (
    *("deepfd", "autotrainer", "umlaut", "deeplocalize", "deepdiagnosis"),
    *("loss", "gradient norm", "update ratio", "entropy"),
)
ORDINARY: Final = "false alarms HC1+HC2"
# What was set as a target before anything was scored; a false alarm's is an upper bound.
TARGETS: Final[Mapping[str, float]] = {
    "auroc": 0.93,
    "recall": 0.80,
    ORDINARY: 0.05,
    "false alarms HC3": 0.10,
    "false alarms HC4": 0.10,
    "false alarms HC5a": 0.10,
    "macro_f1": 0.70,
    "cause_top_3": 0.80,
    "component_top_1": 0.60,
    "component_top_3": 0.80,
}
SHOWN: Final = (
    *("auroc", "recall_at_5", "recall", ORDINARY, "macro_f1", "cause_top_3"),
    *("component_top_1", "component_top_3"),
)


def named(name: str) -> str:
    """Returns a figure's name in words.

    >>> named("false alarms HC1+HC2"), named("cause_top_3"), named("recall_at_5")
    ('false alarms, HC1 and HC2', 'cause top 3', 'recall at 5 %')
    """
    if name == "recall_at_5":
        return "recall at 5 %"
    return word(name).replace("false alarms ", "false alarms, ").replace("+", " and ")


def rows_of(name: str, split: str, directory: Path = BENCH) -> list[Row]:
    """Returns the rows of a table of scores; none where the split was not scored."""
    path = directory / f"{name}-{split}.parquet"
    return pq.read_table(path).to_pylist() if path.exists() else []


def of_tool(split: str, directory: Path = BENCH) -> list[Row]:
    """Returns the scores of the published tool, on those runs that it does not refuse."""
    path = directory / "defaultplusplus.parquet"
    if not path.exists():
        return []
    known = catalogue()
    true = truths(make_plan(known, SIZE).items, harms(directory / "harm.parquet"), known)
    said = defaultplusplus.verdicts(defaultplusplus.read(path), true)
    found = figures([verdict for verdict in said if verdict.truth.track == split])
    return [
        dataclasses.asdict(Score(split, "watched", 1.0, TOOL, f.name, f.value, f.low, f.high, f.n))
        for f in found
    ]


def of_families(split: str, directory: Path = BENCH) -> list[Row]:
    """Returns the scores of families of published checks (`published_families`)."""
    path = directory / "published.parquet"
    rows = pq.read_table(path).to_pylist() if path.exists() else []
    return [row for row in rows if row["split"] == split]


def applies(judge: str, name: str, scores: Mapping[tuple[str, str], Row]) -> bool:
    """Whether a figure says anything of a judge: one that only says where decides nothing."""
    decision = name == "recall" or name.startswith("false alarms")
    return (judge, name) in scores and (not decision or (judge, "auroc") in scores)


def whole(rows: Iterable[Row], mode: str = "watched") -> dict[tuple[str, str], Row]:
    """Returns the scores of whole runs by judge and figure."""
    return {(r["judge"], r["figure"]): r for r in rows if r["mode"] == mode and r["prefix"] == 1.0}


def valued(row: Row | None) -> str:
    """Returns a value with its interval and what it was counted on."""
    if row is None:
        return ""
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}], {row['n']}"


def targets(split: str, directory: Path = BENCH) -> str:
    """What was asked for, what is reached, and what the best baseline on the same runs reaches."""
    scores = whole(rows_of("scores", split, directory))
    lines = []
    for name, bound in TARGETS.items():
        alarms = name.startswith("false alarms")
        best, better = (min, operator.le) if alarms else (max, operator.ge)
        own = scores.get((TOGETHER, name))
        rivals = [scores[judge, name] for judge in BASELINES if applies(judge, name, scores)]
        first = best(rivals, key=lambda row: row["value"]) if rivals else None
        lines.append(
            [
                named(name),
                f"{'≤' if alarms else '≥'} {bound:.2f}",
                valued(own),
                "" if own is None else "yes" if better(own["value"], bound) else "no",
                f"{first['judge']} {first['value']:.3f}" if first and not alarms else "",
            ]
        )
    return table(["", "asked for", "reached [95 %], runs", "met", "best baseline"], lines)


def all_judges(split: str, directory: Path = BENCH) -> str:
    """Every judge on the same whole runs, and the published tool on those that it takes."""
    of_others = (*of_families(split, directory), *of_tool(split, directory))
    scores = whole([*rows_of("scores", split, directory), *of_others])
    lines = [
        [judge, *(valued(scores[judge, n]) if applies(judge, n, scores) else "" for n in SHOWN)]
        for judge in (*OURS, *BASELINES, TOOL)
        if any(key[0] == judge for key in scores)
    ]
    return table(["", *map(named, SHOWN)], lines)


def parts(split: str, directory: Path = BENCH) -> str:
    """Rules and classifier together by how much of a run was seen, and how it was measured."""
    rows = [r for r in rows_of("scores", split, directory) if r["judge"] == TOGETHER]
    lines = []
    for mode in ("watched", "budget"):
        for prefix in sorted({r["prefix"] for r in rows if r["mode"] == mode}):
            own = {r["figure"]: r for r in rows if (r["mode"], r["prefix"]) == (mode, prefix)}
            lines.append(
                [mode, f"{100 * prefix:.0f} %", *(valued(own.get(name)) for name in SHOWN)]
            )
    return table(["measured", "of the run", *map(named, SHOWN)], lines)


def merged(split: str, directory: Path = BENCH) -> str:
    """Both together less either."""
    scores = whole(rows_of("scores", split, directory))
    compared = ("auroc", "macro_f1", "component_top_1")
    lines = []
    for rival in OURS[1:]:
        name = f"{TOGETHER} - {rival}"
        own = [scores.get((name, figure)) for figure in compared]
        lines.append([name, *("" if row is None else gap(row) for row in own)])
    return table(["", *map(named, compared)], lines)


def missed(split: str, directory: Path = BENCH) -> str:
    """Recall by operator, the worst first."""
    counts: dict[str, dict[str, Row]] = {}
    for row in rows_of("recalls", split, directory):
        if row["mode"] == "watched" and row["judge"] in OURS:
            counts.setdefault(row["operator"], {})[row["judge"]] = row
    order = sorted(
        counts.items(), key=lambda item: item[1][TOGETHER]["found"] / item[1][TOGETHER]["runs"]
    )
    lines = []
    for name, own in order:
        known = INJECTIONS.get(name)
        what = known.name.replace("-", " ") if known is not None else "both at once"
        cells = [f"{own[judge]['found']} of {own[judge]['runs']}" for judge in OURS]
        lines.append([name, what, *cells])
    return table(["", "mistake", *OURS], lines)


def faults(split: str, directory: Path = BENCH) -> str:
    """How often the rules say a fault, and are right."""
    lines = []
    for row in rows_of("named", split, directory):
        if row["mode"] == "watched":
            said, expected = row["said"], row["expected"]
            lines.append(
                [
                    row["fault"].replace("_", " "),
                    str(said),
                    f"{row['faulty']} ({row['faulty'] / said:.2f})" if said else "",
                    f"{row['right']} ({row['right'] / said:.2f})" if said else "",
                    f"{row['right']} of {expected} ({row['right'] / expected:.2f})"
                    if expected
                    else "",
                ]
            )
    head = ["fault", "said of", "of these faulty", "of these expected", "recall"]
    return table(head, lines)


def sureness(split: str, directory: Path = BENCH) -> str:
    """How sure against how often right."""
    rows = [r for r in rows_of("sureness", split, directory) if r["mode"] == "watched"]
    lines = []
    for low in sorted({r["low"] for r in rows}):
        cells = []
        for judge in ("classifier", TOGETHER):
            own = [r for r in rows if (r["judge"], r["low"]) == (judge, low)]
            cells += [
                f"{own[0]['score']:.2f}" if own else "",
                f"{own[0]['faulty']} of {own[0]['runs']}" if own else "",
            ]
        lines.append([f"{low:.1f} to {low + 0.1:.1f}", *cells])
    return table(["said", "classifier, mean", "faulty", "together, mean", "faulty"], lines)


def summary(directory: Path = BENCH) -> str:
    """What came of the test subjects, in words."""
    rows = rows_of("scores", "test", directory)
    if not rows:
        return NOT_YET.format("test")
    scores, budget = whole(rows), whole(rows, "budget")

    def rate(name: str, of: Mapping[tuple[str, str], Row] = scores) -> str:
        row = of[TOGETHER, name]
        return f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"

    def counted(name: str) -> str:
        row = scores[TOGETHER, name]
        return f"{round(row['value'] * row['n'])} of {row['n']}"

    text = (
        f"On {scores[TOGETHER, 'auroc']['n']} runs of three small models that nothing was learned "
        "from and nothing chosen on, with sixteen measurements each: "
        f"{counted('recall')} faulty runs are called faulty, {rate('recall')}, and "
        f"{counted(ORDINARY)} healthy ones with another seed or recipe, {rate(ORDINARY)}; of odd "
        f"but valid ones {counted('false alarms HC4')}. The true cause is among the first three in "
        f"{rate('cause_top_3')}, the component is the first in {rate('component_top_1')}. At the "
        f"default budget {rate('recall', budget)} are called faulty. What is missed, and every "
        "other judge on the same runs: [docs/scores.md](docs/scores.md)."
    )
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def openings(directory: Path = BENCH) -> str:
    """When the test subjects were opened, and why."""
    path = directory / OPENINGS
    if not path.exists():
        return NOT_YET.format("test")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return table(
        ["on", "version", "code", "why"],
        [[row["date"], row["version"], f"`{row['code']}`", row["reason"]] for row in rows],
    )


def block(make: Callable[[str, Path], str], split: str, directory: Path = BENCH) -> str:
    """Returns a block of a split that was scored, or says that it was not."""
    if not rows_of("scores", split, directory):
        return NOT_YET.format(split)
    return make(split, directory)


PARTS: Final[Mapping[str, Callable[[str, Path], str]]] = {
    "targets": targets,
    "judges": all_judges,
    "parts": parts,
    "merged": merged,
    "missed": missed,
    "faults": faults,
    "sureness": sureness,
}
SPLITS: Final[Sequence[str]] = ("test", "dev")
BLOCKS: Final[Mapping[str, Callable[[], str]]] = {
    **{
        f"{split} {name}": functools.partial(block, make, split)
        for split in SPLITS
        for name, make in PARTS.items()
    },
    "openings": openings,
}
