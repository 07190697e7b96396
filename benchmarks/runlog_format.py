"""SQLite in WAL mode against JSON Lines, for the load of a run log.

Measures, for measurements of 50, 200 and 500 rows: the time of one append; the bytes a row; the
time and memory of reading 10^5 and 10^6 rows into columns; what survives `kill -9` at random
moments; and whether a NaN comes back as it was. JSON Lines is the shipped writer, with all that it
does besides (it keeps a live recording and opens the file for each record); SQLite is a bare table
of codes with the names in a table of their own, one transaction a measurement.

    python benchmarks/runlog_format.py        writes benchmarks/results/runlog_format.json
"""

from __future__ import annotations

import json
import platform
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diagnoser.runlog import RunLogWriter, read_run
from diagnoser.types import Estimate, Measurement

RESULT = Path(__file__).parent / "results" / "runlog_format.json"
SIZES = (50, 200, 500)
APPENDS = 200
READ_ROWS = (100_000, 1_000_000)
KILLS = 20

SQLITE_SCHEMA = """
CREATE TABLE name (code INTEGER PRIMARY KEY, text TEXT UNIQUE);
CREATE TABLE measured (step INTEGER, seconds REAL);
CREATE TABLE row (step INTEGER, quantity INTEGER, component INTEGER, other INTEGER, value REAL,
    std_error REAL, batch_std_error REAL, samples INTEGER, method INTEGER, dtype INTEGER);
"""


class SqliteWriter:
    """The same interface as `RunLogWriter`, as far as it is compared."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        # isolation_level=None: transactions are begun and ended by hand.
        self.connection = sqlite3.connect(directory / "log.sqlite", isolation_level=None)
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute("PRAGMA synchronous=NORMAL")
        self.connection.executescript(SQLITE_SCHEMA)
        self.codes: dict[str | None, int] = {None: -1}

    def measurement(self, step: int, measurements: list[Measurement], seconds: float) -> None:
        """Appends one measurement in one transaction."""
        self.connection.execute("BEGIN")
        rows = [
            (
                row.step,
                self._code(row.quantity),
                self._code(row.component),
                self._code(row.other),
                row.estimate.value,
                row.estimate.std_error,
                row.estimate.batch_std_error,
                row.estimate.samples,
                self._code(row.estimate.method),
                self._code(row.estimate.dtype),
            )
            for row in measurements
        ]
        self.connection.executemany("INSERT INTO row VALUES (?,?,?,?,?,?,?,?,?,?)", rows)
        self.connection.execute("INSERT INTO measured VALUES (?,?)", (step, seconds))
        self.connection.execute("COMMIT")

    def close(self) -> None:
        """Closes the database; SQLite then folds its write-ahead log into the main file."""
        self.connection.close()

    def _code(self, text: str | None) -> int:
        if text not in self.codes:
            self.codes[text] = len(self.codes)
            self.connection.execute("INSERT INTO name VALUES (?,?)", (self.codes[text], text))
        return self.codes[text]


def read_sqlite(directory: Path) -> tuple[int, list[np.ndarray]]:
    """Returns how many measurements there are, and the columns of their rows."""
    connection = sqlite3.connect(directory / "log.sqlite")
    measured = connection.execute("SELECT count(*) FROM measured").fetchone()[0]
    rows = connection.execute("SELECT * FROM row").fetchall()
    columns = [
        np.array(column, dtype=np.float64 if 4 <= i <= 6 else np.int64)
        for i, column in enumerate(zip(*rows, strict=True))
    ]
    connection.close()
    return measured, columns


def read_json_lines(directory: Path) -> tuple[int, list[np.ndarray]]:
    """Returns how many measurements there are, and two columns of their rows."""
    recording = read_run(directory)
    return len(recording.measured.step), [recording.measurements.step, recording.measurements.value]


FORMATS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], tuple[int, list[np.ndarray]]]]] = {
    "json_lines": (lambda directory: RunLogWriter(directory, "benchmark", {}), read_json_lines),
    "sqlite_wal": (SqliteWriter, read_sqlite),
}


def example(step: int, rows: int) -> list[Measurement]:
    """Returns rows as a transformer's measurement has them."""
    values = np.random.default_rng(step).standard_normal(rows)
    return [
        Measurement(
            step,
            f"quantity_{i % 20}",
            f"distilbert.transformer.layer.{i // 20 % 6}.attention.q_lin",
            Estimate(float(v), abs(float(v)) / 9, abs(float(v)) / 3, 32, "hutchinson"),
        )
        for i, v in enumerate(values)
    ]


def append(name: str, directory: Path, rows: int, count: int) -> list[float]:
    """Returns the seconds of each append."""
    writer = FORMATS[name][0](directory)
    examples = [example(step, rows) for step in range(8)]
    seconds = []
    for step in range(count):
        start = time.perf_counter()
        writer.measurement(step, examples[step % 8], 0.05)
        seconds.append(time.perf_counter() - start)
    writer.close()
    return seconds


def reading(name: str, directory: Path) -> dict[str, float]:
    """Returns seconds and peak memory of reading a log in a process of its own."""
    start_alone = (
        "import re, sys, time; from pathlib import Path; "
        "from benchmarks.runlog_format import FORMATS; start = time.perf_counter(); "
        f"measured, columns = FORMATS[{name!r}][1](Path(sys.argv[1])); "
        "seconds = time.perf_counter() - start; "
        "status = Path('/proc/self/status').read_text(); "
        "print(seconds, int(re.search(r'VmHWM:\\s+([0-9]+)', status)[1]) / 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", start_alone, str(directory)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, mebibytes = map(float, done.stdout.split())
    return {"seconds": round(seconds, 3), "peak_mib": round(mebibytes)}


def killed(name: str, directory: Path, wait: float) -> tuple[int, int]:
    """Kills a writing process after ``wait`` seconds.

    Returns:
        How many appends had returned in it, and how many measurements its log holds.
    """
    write_forever = (
        "import os, sys; from pathlib import Path; "
        "from benchmarks.runlog_format import FORMATS, example\n"
        f"writer = FORMATS[{name!r}][0](Path(sys.argv[1])); rows = example(0, 200); step = 0\n"
        "while True:\n"
        "    writer.measurement(step, rows, 0.05); os.write(1, b'.'); step += 1"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", write_forever, str(directory)],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    returned = 1 + len(process.stdout.read())
    process.wait()
    return returned, FORMATS[name][1](directory)[0]


def keeps_nan(name: str, directory: Path) -> bool:
    """Returns whether a value that is NaN is still a value, and NaN, in the log."""
    writer = FORMATS[name][0](directory)
    writer.measurement(0, [Measurement(0, "gradient_norm", "model", Estimate(np.nan))], 0.05)
    writer.close()
    if name == "sqlite_wal":
        connection = sqlite3.connect(directory / "log.sqlite")
        (value,) = connection.execute("SELECT value FROM row").fetchone()
        connection.close()
        return value is not None
    return bool(np.isnan(read_run(directory).measurements.value[0]))


def measure(name: str, scratch: Path) -> dict[str, Any]:
    """Returns all figures of one format."""
    result: dict[str, Any] = {"append": {}, "read": {}}
    result["keeps_nan"] = keeps_nan(name, scratch / f"{name}-nan")
    for rows in SIZES:
        directory = scratch / f"{name}-{rows}"
        seconds = sorted(append(name, directory, rows, APPENDS))
        size = sum(path.stat().st_size for path in directory.iterdir())
        result["append"][str(rows)] = {
            "median_ms": round(1e3 * statistics.median(seconds), 3),
            "p99_ms": round(1e3 * seconds[int(0.99 * len(seconds))], 3),
            "bytes_a_row": round(size / (rows * APPENDS), 1),
        }
    for rows in READ_ROWS:
        directory = scratch / f"{name}-read-{rows}"
        append(name, directory, 200, rows // 200)
        result["read"][str(rows)] = reading(name, directory)
        shutil.rmtree(directory)
    waits = random.Random(0)
    outcomes = [
        killed(name, scratch / f"{name}-kill-{i}", waits.uniform(0.0, 0.2)) for i in range(KILLS)
    ]
    result["kill_9"] = {
        "kills": KILLS,
        "appends_returned": sum(returned for returned, _ in outcomes),
        "most_lost_in_a_kill": max(max(0, returned - kept) for returned, kept in outcomes),
    }
    return result


def main() -> None:
    """Measures both formats and writes the result file."""
    with tempfile.TemporaryDirectory() as scratch:
        formats = {name: measure(name, Path(scratch)) for name in FORMATS}
    setting = {
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "system": platform.system(),
    }
    RESULT.write_text(json.dumps({"setting": setting, "formats": formats}, indent=2) + "\n")


if __name__ == "__main__":
    main()
