"""Scores of all judges as tables, and the log of when the test subjects were opened."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from diagnoser import __version__
from diagnoser.benchmark.dataset import Seen
from diagnoser.benchmark.evaluate import Learned, judges
from diagnoser.benchmark.results import write_whole
from diagnoser.benchmark.scoring import (
    Figure,
    Verdict,
    by_fault,
    by_operator,
    difference,
    figures,
    reliability,
)
from diagnoser.diagnosis import default_rules
from diagnoser.errors import BenchmarkError

OPENINGS: Final = "openings.jsonl"
TOGETHER: Final = "together"
COMPARED: Final = ("auroc", "macro_f1", "component_top_1")
RIVALS: Final = ("rules", "classifier")  # that both together are held against
PROBABLE: Final = ("classifier", "together")  # whose score is a probability


@dataclass(frozen=True, slots=True)
class Score:
    """One figure of one judge. ``judge`` is ``a - b`` where two are compared on the same runs."""

    split: str
    mode: str  # watched or budget
    prefix: float
    judge: str
    figure: str
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Recall:
    """How many faulty runs of an operator a judge calls faulty, of whole runs."""

    split: str
    mode: str
    judge: str
    operator: str
    found: int
    runs: int


@dataclass(frozen=True, slots=True)
class Named:
    """How often the rules say a fault of whole runs, and how often they are right.

    ``said`` counts runs of which they say it: ``faulty`` of these are faulty, and ``right`` are of
    an operator of which it is expected. ``expected`` counts all faulty runs of such operators.
    """

    split: str
    mode: str
    fault: str
    said: int
    faulty: int
    right: int
    expected: int


@dataclass(frozen=True, slots=True)
class Sureness:
    """Of whole runs whose score is in one tenth from ``low``: the mean, and how many are faulty."""

    split: str
    mode: str
    judge: str
    low: float
    score: float
    runs: int
    faulty: int


@dataclass(frozen=True, slots=True)
class Scores:
    """Everything that is counted of judges on runs."""

    scores: tuple[Score, ...]
    recalls: tuple[Recall, ...]
    named: tuple[Named, ...]
    sureness: tuple[Sureness, ...]


def score_all(learned: Learned, seen: Sequence[Seen], split: str, mode: str) -> Scores:
    """Scores every judge on runs of one split, at every prefix."""
    scores: list[Score] = []
    recalls: list[Recall] = []
    sureness: list[Sureness] = []
    known = judges(learned)
    fault_of = {rule.id: rule.fault for rule in default_rules()}
    for prefix in sorted({run.look.prefix for run in seen}):
        runs = [run for run in seen if run.look.prefix == prefix]
        verdicts = {name: [judge(run) for run in runs] for name, judge in known.items()}
        for name, said in verdicts.items():
            scores += _scores(figures(said), split, mode, prefix, name)
            if prefix == 1.0:
                recalls += [
                    Recall(split, mode, name, operator, found, count)
                    for operator, (found, count) in by_operator(said).items()
                ]
            if prefix == 1.0 and name in PROBABLE:
                sureness += [Sureness(split, mode, name, *bin_) for bin_ in reliability(said)]
        for rival in RIVALS:
            compared = _compare(verdicts[TOGETHER], verdicts[rival])
            scores += _scores(compared, split, mode, prefix, f"{TOGETHER} - {rival}")
    said_of = [
        (run.truth, {fault_of[claim.rule] for claim in run.look.claims})
        for run in seen
        if run.look.prefix == 1.0 and run.truth.is_scored
    ]
    named = [Named(split, mode, fault, *counts) for fault, counts in by_fault(said_of).items()]
    return Scores(tuple(scores), tuple(recalls), tuple(named), tuple(sureness))


def write_scores(directory: Path, split: str, found: Sequence[Scores]) -> None:
    """Writes ``scores-<split>.parquet``, and so for ``recalls``, ``named`` and ``sureness``.

    Raises:
        BenchmarkError: They cannot be written.
    """
    for name in (field.name for field in dataclasses.fields(Scores)):
        rows = [dataclasses.asdict(row) for scores in found for row in getattr(scores, name)]
        content = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), content, compression="zstd")
        write_whole(directory / f"{name}-{split}.parquet", content.getvalue())


def read_scores(directory: Path) -> list[Score]:
    """Reads the scores of all splits that are there.

    Raises:
        BenchmarkError: There is none, or a file cannot be read.
    """
    paths = sorted(directory.glob("scores-*.parquet"))
    if not paths:
        raise BenchmarkError(f"{directory}: no scores; `diagnoser bench score` makes them")
    try:
        return [Score(**row) for path in paths for row in pq.read_table(path).to_pylist()]
    except (pa.ArrowException, OSError, TypeError) as error:
        raise BenchmarkError(
            f"{directory}: scores cannot be read ({error}); `diagnoser bench score` makes them anew"
        ) from error


def table_lines(scores: Iterable[Score]) -> list[list[str]]:
    """Returns the scores as lines of a table: a figure a line, whole runs first."""
    ordered = sorted(scores, key=lambda s: (s.split, s.mode, -s.prefix, s.figure, s.judge))
    lines = [["split", "mode", "part", "figure", "judge", "value", "95 %", "n"]]
    for _, group in groupby(ordered, key=lambda s: (s.split, s.mode, s.prefix, s.figure)):
        lines += [
            [
                *(s.split, s.mode, f"{100 * s.prefix:.0f} %", s.figure, s.judge),
                *(f"{s.value:.3f}", f"{s.low:.3f} to {s.high:.3f}", str(s.n)),
            ]
            for s in group
        ]
    return lines


def open_test(directory: Path, code: str, again: str) -> None:
    """Logs that the test subjects are opened, before they are.

    Raises:
        BenchmarkError: This version has opened them already, and no reason is given.
    """
    path = directory / OPENINGS
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    openings = [json.loads(line) for line in text.splitlines()]
    earlier = [opening for opening in openings if opening["version"] == __version__]
    if earlier and not again:
        raise BenchmarkError(
            f"{path}: version {__version__} opened the test subjects on {earlier[0]['date']}; "
            "scores are there. To open them again, say why: --again REASON"
        )
    opening = {
        "date": datetime.now(tz=UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "code": code,
        "reason": again or "first opening",
    }
    write_whole(path, (text + json.dumps(opening) + "\n").encode())


def _scores(
    found: Iterable[Figure], split: str, mode: str, prefix: float, judge: str
) -> list[Score]:
    return [Score(split, mode, prefix, judge, f.name, f.value, f.low, f.high, f.n) for f in found]


def _compare(ours: Sequence[Verdict], theirs: Sequence[Verdict]) -> list[Figure]:
    """Returns the differences that have a value."""
    found = [difference(name, ours, theirs) for name in COMPARED]
    return [figure for figure in found if figure is not None]
