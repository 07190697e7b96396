"""``diagnoser bench``: what a command line asks for, and the tables that are printed."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diagnoser.benchmark.configuration import Catalogue, catalogue
from diagnoser.benchmark.dataset import digest_of_code, truths
from diagnoser.benchmark.evaluate import learn, read
from diagnoser.benchmark.execute import Progressed, Resources, execute, probe, span, to_stderr
from diagnoser.benchmark.harm import (
    OK,
    Calibration,
    Harm,
    Row,
    calibrate,
    judge,
    scores_of,
    worst_rank,
)
from diagnoser.benchmark.jobs import Mode
from diagnoser.benchmark.plan import CLEAN, FAULT, REMEDY, Item, Plan, make_plan
from diagnoser.benchmark.results import Store, write_whole
from diagnoser.benchmark.scores import (
    open_test,
    read_scores,
    score_all,
    table_lines,
    write_scores,
)
from diagnoser.errors import BenchmarkError, UsageError

MODES: tuple[Mode, ...] = ("truth", "budget", "watched")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a command line asks for."""

    size: str
    out: Path
    jobs: int | None = None  # None: the number of cores
    minutes: float | None = None
    dask: str = ""
    only: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    catalogue: str = ""

    def resources(self) -> Resources:
        """Returns what may be used.

        Raises:
            UsageError: Fewer than one process, or no time.
        """
        jobs = os.cpu_count() or 1 if self.jobs is None else self.jobs
        if jobs < 1:
            raise UsageError(f"--jobs {jobs}: it takes at least 1")
        if self.minutes is not None and not self.minutes > 0:
            raise UsageError(f"--minutes {self.minutes}: it takes more than 0")
        return Resources(jobs, self.dask, self.minutes)


def plan(request: Request) -> None:
    """Prints how many configurations and runs a size has, and how long they take."""
    resources = request.resources()
    known, made = _begin(request)
    store = Store(request.out, to_stderr)
    print(f"size {request.size}: {len(made.items)} configurations")
    lines = [["subject", "role", "configurations", "truth runs", "at budget", "watched"]]
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in made.items:
        groups.setdefault((item.configuration.subject, item.role), []).append(item)
    for (subject, role), group in groups.items():
        counts = [sum(len(item.seeds(mode)) for item in group) for mode in MODES]
        lines.append([subject, role, str(len(group)), *map(str, counts)])
    _print_table(lines)
    for mode in MODES:
        _print_cost(made.items, mode, store, resources, known)
    _print_left_out(made)


def truth(request: Request) -> None:
    """Makes the unmonitored runs, judges harm from those that are there, and prints it.

    Raises:
        BenchmarkError: Runs were made, and none gave a result.
    """
    resources = request.resources()
    known, made = _begin(request)
    store = Store(request.out, to_stderr)
    progressed = _execute(made, made.items, "truth", store, resources, known)
    rows = {h: store.rows("truth", h) for h in {i.hash for i in made.items}}
    floors = {name: (s.floor, s.relative) for name, s in known.subjects.items()}
    harms = judge([item.judged() for item in made.items], rows, floors)
    calibrations = _calibrations(made, rows, floors)
    store.write_harm(harms, calibrations)
    _print_harm(harms, calibrations)
    _print_progress(progressed, request.out / "harm.parquet")
    _print_left_out(made)
    _check([progressed])


def run(request: Request) -> None:
    """Makes the watched runs, at the default budget and by the benchmark's own schedule.

    Those come first that are scored: where it is known by now whether they are faulty or healthy.

    Raises:
        BenchmarkError: Runs were made, and none gave a result.
    """
    begin = time.monotonic()
    resources = request.resources()
    known, made = _begin(request)
    store = Store(request.out, to_stderr)
    finished = []
    for items in _scored_first(made, store, known):
        for mode in MODES[1:]:
            if request.minutes is not None:  # each kind of runs has what those before it left
                left = request.minutes - (time.monotonic() - begin) / 60
                resources = replace(resources, minutes=left)
            progressed = _execute(made, items, mode, store, resources, known)
            _print_progress(progressed, store.path(mode, "x").parent)
            finished.append(progressed)
    _print_left_out(made)
    _check(finished)


def _scored_first(made: Plan, store: Store, known: Catalogue) -> list[Sequence[Item]]:
    if not store.has_harm():
        return [made.items]
    true = truths(made.items, store.read_harm(), known)
    scored = {digest for digest, truth in true.items() if truth.is_scored}
    parts = [[i for i in made.items if (i.hash in scored) is wanted] for wanted in (True, False)]
    return [items for items in parts if items]


def score(request: Request, *, split: str, again: str) -> None:
    """Learns on the training subjects, and scores all judges on those of a split.

    Raises:
        BenchmarkError: Something is missing, or the test subjects were opened by this version.
    """
    resources = request.resources()
    known, made = _begin(request)
    store = Store(request.out, to_stderr)
    harms = store.read_harm()
    seen = {m: read(store, made, harms, known, m, resources.jobs) for m in MODES[1:]}
    learned = learn([run for runs in seen.values() for run in runs if run.truth.track == "train"])
    if split == "test":
        open_test(request.out, digest_of_code(), again)
    found = [
        score_all(learned, [run for run in runs if run.truth.track == split], split, mode)
        for mode, runs in seen.items()
    ]
    write_scores(request.out, split, found)
    _print_table(table_lines(score for scores in found for score in scores.scores))


def report(request: Request) -> None:
    """Prints the scores that are there."""
    _print_table(table_lines(read_scores(request.out)))


def _begin(request: Request) -> tuple[Catalogue, Plan]:
    known = catalogue(request.catalogue)
    made = make_plan(known, request.size, only=request.only, operators=request.operators)
    return known, made


def _execute(
    made: Plan,
    items: Sequence[Item],
    mode: Mode,
    store: Store,
    resources: Resources,
    known: Catalogue,
) -> Progressed:
    content = json.dumps([_described(item) for item in made.items], indent=1) + "\n"
    write_whole(store.directory / f"plan-{made.size.name}.json", content.encode())
    return execute(
        items,
        mode,
        store,
        resources,
        catalogue=known.name,
        complain=to_stderr,
        progress=sys.stderr,
    )


def _described(item: Item) -> dict[str, object]:
    return {
        "hash": item.hash,
        "clean": item.clean,
        "role": item.role,
        "track": item.track,
        "identical": item.identical,
        "truth": item.truth,
        "watched": item.watched,
        "budgeted": item.budgeted,
        "configuration": json.loads(item.configuration.to_json()),
    }


def _calibrations(
    made: Plan, rows: Mapping[str, Sequence[Row]], floors: Mapping[str, tuple[float, bool]]
) -> list[Calibration]:
    clean: dict[str, list[dict[int, float]]] = {}
    for item in made.items:
        if item.role == CLEAN:
            known = rows[item.hash]
            worst = worst_rank([r["score"] for r in known if r["status"] == OK])
            scores = scores_of(known, worst)
            clean.setdefault(item.configuration.subject, []).append(scores)
    found = [
        calibrate(subject, recipes, floors[subject], pairs=made.size.pairs)
        for subject, recipes in clean.items()
    ]
    return [calibration for calibration in found if calibration is not None]


def _print_cost(
    items: Sequence[Item], mode: Mode, store: Store, resources: Resources, known: Catalogue
) -> None:
    measured: dict[str, list[float]] = {}
    missing: dict[str, int] = {}
    for item in {item.hash: item for item in items}.values():
        subject = item.configuration.subject
        for row in store.rows(mode, item.hash):
            if row["status"] == OK and row["cpu_s"] is not None:
                measured.setdefault(subject, []).append(row["cpu_s"])
        left = store.missing(mode, item.hash, item.seeds(mode))
        missing[subject] = missing.get(subject, 0) + len(left)
    cpu_s = {subject: statistics.fmean(times) for subject, times in measured.items()}
    unknown = [i for i in items if i.configuration.subject not in cpu_s]
    if unknown:
        cpu_s |= probe(unknown, mode, resources, catalogue=known.name, complain=to_stderr)
    total = sum(count * cpu_s[subject] for subject, count in missing.items() if subject in cpu_s)
    each = ", ".join(f"{subject} {seconds:.1f} s" for subject, seconds in cpu_s.items())
    print(
        f"{mode}: {sum(missing.values())} runs to make, {span(total)} of CPU time, "
        f"{span(total / resources.jobs)} with {resources.jobs} jobs; a run: {each}"
    )
    for subject in missing.keys() - cpu_s.keys():
        print(f"{mode}: no run of {subject} succeeded, its time is not counted")


def _print_harm(harms: Sequence[Harm], calibrations: Sequence[Calibration]) -> None:
    head = ["subject", "recipe", "role", "operator", "severity", "place", "remedy", "harm"]
    lines = [[*head, "pairs", "clean", "score", "gap", "margin", "p (Holm)", "d", "loss alone"]]
    for h in harms:
        words = [h.subject, h.recipe, h.role, h.operator, h.severity, h.place, h.remedy, h.harm]
        numbers = [h.clean_score, h.score, h.gap, h.margin, h.p_holm, h.cohen_d, h.loss_alarms]
        lines.append([*words, str(h.pairs), *(f"{number:.3g}" for number in numbers)])
    _print_table(lines)
    for kind, group in {
        "mistakes": [h for h in harms if h.role == FAULT],
        "remedies": [h for h in harms if h.role == REMEDY],
        "controls and compounds": [h for h in harms if h.role not in {FAULT, REMEDY, CLEAN}],
    }.items():
        counts: dict[str, int] = {}
        for harm in group:
            counts[harm.harm] = counts.get(harm.harm, 0) + 1
        if counts:
            print(f"{kind}: {', '.join(f'{n} {verdict}' for verdict, n in counts.items())}")
    proven = [h for h in harms if h.role == FAULT and h.harm == "proven"]
    if proven:
        trivial = sum(h.trivial for h in proven)
        print(f"of {len(proven)} proven mistakes the loss alone betrays {trivial}")
    if any(h.diverged for h in harms):
        print("a diverged run counts as the subject's worst finite score less its range")
    for c in calibrations:
        print(
            f"{c.subject}: clean against clean, {c.kills} of {c.splits} splits «proven» "
            f"({c.low:.3f} to {c.high:.3f})"
        )


def _print_progress(progressed: Progressed, written: Path) -> None:
    print(f"{progressed.made} runs made, {progressed.left} left of {progressed.asked}: {written}")
    if progressed.left:
        print("give the same command again to go on")


def _check(finished: Sequence[Progressed]) -> None:
    made = sum(progressed.made for progressed in finished)
    if made and all(progressed.without == progressed.made for progressed in finished):
        raise BenchmarkError(
            f"none of the {made} runs made now gave a result; each is named above with its reason"
        )


def _print_left_out(made: Plan) -> None:
    for subject, reason in made.left_out.items():
        to_stderr(f"left out: {subject} {reason}")


def _print_table(lines: Iterable[Sequence[str]]) -> None:
    rows = list(lines)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, strict=True)
        print("  ".join(cell.ljust(width) for cell, width in cells).rstrip())
