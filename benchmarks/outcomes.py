"""Keeps what the benchmark found as data: ``python -m benchmarks.outcomes [--bench DIR]``.

From a directory in which ``diagnoser bench truth --size small`` has finished, writes to
``benchmarks/results/bench/``

* ``truth.parquet``: every unmonitored run, its score, losses and how it ended;
* ``harm.parquet``: the verdict of every configuration, with its test;
* ``calibration.parquet``: clean runs against clean runs;
* ``watched/`` and ``budget/``: the logs of all watched runs that are scored, a file a subject
  (`diagnoser.benchmark.archive`), where a subject has them all;

and, where they are there, what ``diagnoser bench score`` counted, the log of when the test subjects
were opened, and the answers of DEFault++ (`defaultplusplus`). No unmonitored run may be missing.

``--restore`` goes the other way: it fills a directory with the runs that are kept, so that nothing
of them has to be run again. What is judged is judged on runs that were kept and restored, so that
it can be judged again from what is in the repository.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import io
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diagnoser.benchmark.archive import pack, unpack
from diagnoser.benchmark.configuration import Catalogue, catalogue
from diagnoser.benchmark.dataset import truths
from diagnoser.benchmark.harm import OK, Harm, Row
from diagnoser.benchmark.jobs import Mode
from diagnoser.benchmark.plan import Item, Plan, make_plan
from diagnoser.benchmark.results import LOG, SCHEMA, Store, write_whole
from diagnoser.benchmark.scores import OPENINGS, Scores
from diagnoser.errors import BenchmarkError

SIZE = "small"
BENCH = Path(__file__).parent / "results" / "bench"
RUNS = BENCH / "truth.parquet"
WATCHED: tuple[Mode, ...] = ("watched", "budget")
# Times are a machine's, not the benchmark's; the mode is always the same; nothing is logged.
LEFT_OUT = ("cpu_s", "mode", "log_sha256")

SCORED = (
    *(f"{field.name}-*.parquet" for field in dataclasses.fields(Scores)),
    *(OPENINGS, "defaultplusplus.parquet"),
)


def collect(store: Store, plan: Plan) -> list[Row]:
    """Returns all unmonitored runs of a plan.

    Raises:
        SystemExit: Some are missing.
    """
    rows: dict[str, list[Row]] = {}
    missing = 0
    for item in plan.items:
        missing += len(store.missing("truth", item.hash, item.truth))
        rows[item.hash] = store.rows("truth", item.hash)
    if missing:
        raise SystemExit(
            f"{store.directory}: {missing} runs are missing; "
            f"`diagnoser bench truth --size {SIZE}` makes them"
        )
    return [row for own in rows.values() for row in own]


def write_runs(path: Path, rows: list[Row]) -> None:
    """Writes runs as one table, in the order given."""
    kept = pa.schema([field for field in SCHEMA if field.name not in LEFT_OUT])
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=kept)
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    write_whole(path, content.getvalue())


def read_runs(path: Path = RUNS) -> dict[str, list[Row]]:
    """Returns the runs of `write_runs`, by the hash of their configuration."""
    found: dict[str, list[Row]] = {}
    for row in pq.read_table(path).to_pylist():
        found.setdefault(row["hash"], []).append(row)
    return found


def scored_items(plan: Plan, harms: Iterable[Harm], known: Catalogue) -> dict[str, list[Item]]:
    """Returns the configurations of which it is known whether they are faulty, by subject."""
    true = truths(plan.items, harms, known)
    found: dict[str, list[Item]] = {}
    for item in plan.items:
        if item.hash in true and true[item.hash].is_scored:
            found.setdefault(item.configuration.subject, []).append(item)
    return found


def archive_of(mode: Mode, subject: str) -> Path:
    """Returns where the watched runs of a subject are kept."""
    return BENCH / mode / f"{subject}.parquet"


def keep_watched(store: Store, mode: Mode, subject: str, items: Iterable[Item]) -> None:
    """Keeps the watched runs of a subject, unless some are missing."""
    runs, missing = [], 0
    for item in items:
        missing += len(store.missing(mode, item.hash, item.seeds(mode)))
        for row in store.rows(mode, item.hash):
            if row["status"] == OK and row["seed"] in item.seeds(mode):
                log = store.log_path(mode, item.hash, row["seed"])
                runs.append((row, log.read_bytes()))
    if missing:
        print(f"{mode}, {subject}: {missing} runs are missing; not kept")
        return
    path = archive_of(mode, subject)
    write_whole(path, pack(runs))
    print(f"{mode}, {subject}: {len(runs)} runs, {path.stat().st_size / 1e6:.1f} MB")


def restore(store: Store, plan: Plan) -> None:
    """Fills a directory of results with the runs that are kept and that this code would make."""
    items = {item.hash: item for item in plan.items}
    kept: dict[Mode, dict[str, list[Row]]] = {"truth": read_runs(RUNS), "watched": {}, "budget": {}}
    for mode in WATCHED:
        for path in sorted((BENCH / mode).glob("*.parquet")):
            try:
                runs = list(unpack(path.read_bytes()))
            except BenchmarkError as error:
                raise SystemExit(f"{path}: {error}; take the file from the repository") from None
            for row, log in runs:
                entry = {**row, LOG: base64.b64encode(log).decode()}
                kept[mode].setdefault(row["hash"], []).append(entry)
    for mode, found in kept.items():
        count = _put_back(store, mode, found, items)
        others = sum(map(len, found.values())) - count
        print(f"{mode}: {count} runs put back, {others} are of another version")
    for name in ("harm.parquet", "calibration.parquet"):
        write_whole(store.directory / name, (BENCH / name).read_bytes())


def _put_back(
    store: Store, mode: Mode, runs: Mapping[str, list[Row]], items: Mapping[str, Item]
) -> int:
    count = 0
    for digest, rows in runs.items():
        if digest in items:
            configuration = items[digest].configuration.to_json()
            absent = {"mode": mode, "cpu_s": None, "log_sha256": None}
            store.add(mode, digest, configuration, [{**absent, **row} for row in rows])
            count += len(rows)
    return count


def main() -> None:
    """Reads a directory of results and writes what is kept of it, or the other way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bench", type=Path, default=Path("diagnoser-bench"), metavar="DIR")
    parser.add_argument("--restore", action="store_true", help="fill DIR with what is kept")
    arguments = parser.parse_args()
    directory = arguments.bench
    store = Store(directory, lambda text: print(text, file=sys.stderr))
    known = catalogue()
    plan = make_plan(known, SIZE)
    if arguments.restore:
        restore(store, plan)
        return
    rows = collect(store, plan)
    write_runs(RUNS, rows)
    for name in ("harm.parquet", "calibration.parquet"):
        write_whole(BENCH / name, (directory / name).read_bytes())
    for subject, items in scored_items(plan, store.read_harm(), known).items():
        for mode in WATCHED:
            keep_watched(store, mode, subject, items)
    for name in SCORED:
        for path in directory.glob(name):
            write_whole(BENCH / path.name, path.read_bytes())
    print(f"{len(rows)} unmonitored runs: {BENCH}")


if __name__ == "__main__":
    main()
