"""Keeps what the benchmark proved as data: ``python -m benchmarks.outcomes [--bench DIR]``.

From a directory in which ``diagnoser bench truth --size small`` has finished, writes to
``benchmarks/results/bench/``

* ``truth.parquet``: every unmonitored run, its score, losses and how it ended;
* ``harm.parquet``: the verdict of every configuration, with its test;
* ``calibration.parquet``: clean runs against clean runs;

and, where they are there, what ``diagnoser bench score`` counted, the log of when the test subjects
were opened, and the answers of DEFault++ (`defaultplusplus`).

Nothing is written while runs are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diagnoser.benchmark.configuration import catalogue
from diagnoser.benchmark.harm import Row
from diagnoser.benchmark.plan import Plan, make_plan
from diagnoser.benchmark.results import SCHEMA, Store, write_whole
from diagnoser.benchmark.scores import OPENINGS, Scores

SIZE = "small"
BENCH = Path(__file__).parent / "results" / "bench"
RUNS = BENCH / "truth.parquet"
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


def main() -> None:
    """Reads a directory of results and writes what is kept of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bench", type=Path, default=Path("diagnoser-bench"), metavar="DIR")
    directory = parser.parse_args().bench
    store = Store(directory, lambda text: print(text, file=sys.stderr))
    rows = collect(store, make_plan(catalogue(), SIZE))
    write_runs(RUNS, rows)
    for name in ("harm.parquet", "calibration.parquet"):
        write_whole(BENCH / name, (directory / name).read_bytes())
    for name in SCORED:
        for path in directory.glob(name):
            write_whole(BENCH / path.name, path.read_bytes())
    print(f"{len(rows)} runs: {BENCH}")


if __name__ == "__main__":
    main()
