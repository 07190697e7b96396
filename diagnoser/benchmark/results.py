"""Results on disk: one Parquet file a configuration and mode, whole or not there at all.

``DIR/truth/<hash>.parquet``, ``DIR/runs/<hash>.parquet`` (watched by the benchmark's schedule) and
``DIR/budget/<hash>.parquet`` (watched at the default budget) hold one row a run, and
``DIR/runs/<hash>/<seed>.jsonl.gz`` the run log of a watched one. A file is written under another
name in the same folder, forced to the disk, and then renamed. What cannot be read, or is not what
its name says, is moved aside to ``*.corrupt``, named, and made again.
"""

from __future__ import annotations

import base64
import dataclasses
import errno
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from diagnoser.benchmark.harm import OK, Calibration, Harm
from diagnoser.benchmark.jobs import Mode, Row
from diagnoser.errors import BenchmarkError

SCHEMA_VERSION: Final = "1"
FOLDERS: Final[Mapping[str, str]] = {"truth": "truth", "watched": "runs", "budget": "budget"}
# What may come out otherwise at another time; a run that failed by itself fails again.
ANOTHER_TIME: Final = frozenset({"killed", "late", "refused"})
LOG: Final = "log"  # of a row on its way: the run log, gzip in base64

SCHEMA: Final = pa.schema(
    [
        ("hash", pa.string()),
        ("subject", pa.string()),
        ("recipe", pa.string()),
        ("operator", pa.string()),
        ("severity", pa.string()),
        ("place", pa.string()),
        ("remedy", pa.string()),
        ("mode", pa.string()),
        ("seed", pa.int64()),
        ("status", pa.string()),  # ok, failed, killed, late or refused
        ("reason", pa.string()),
        ("score", pa.float64()),  # null where not ok, NaN where the outputs were not finite
        ("loss", pa.float64()),
        ("area", pa.float64()),  # mean of the training losses
        ("first_loss", pa.float64()),
        ("last_loss", pa.float64()),
        ("steps", pa.int64()),
        ("diverged", pa.bool_()),
        ("loss_alarm", pa.string()),
        ("cpu_s", pa.float64()),
        ("log_sha256", pa.string()),  # of the compressed log of a watched run
    ]
)


class Store:
    """A directory of results; ``complain`` is told of each file that was moved aside."""

    def __init__(self, directory: Path, complain: Callable[[str], None]) -> None:
        self.directory = directory
        self.complain = complain

    def path(self, mode: Mode, digest: str) -> Path:
        """Returns where the rows of a configuration are kept."""
        return self.directory / FOLDERS[mode] / f"{digest}.parquet"

    def log_path(self, mode: Mode, digest: str, seed: int) -> Path:
        """Returns where the log of a watched run is kept."""
        return self.directory / FOLDERS[mode] / digest / f"{seed}.jsonl.gz"

    def rows(self, mode: Mode, digest: str) -> list[Row]:
        """Returns the finished runs of a configuration, by seed; none where nothing is there.

        A damaged file is moved aside and its runs are not finished.
        """
        path = self.path(mode, digest)
        if not path.exists():
            return []
        try:
            rows = _read(path, mode, digest)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            self._move_aside(path, " ".join(str(error).split())[:160])
            return []
        return [r for r in rows if mode == "truth" or r["status"] != OK or self._has_log(mode, r)]

    def missing(self, mode: Mode, digest: str, seeds: Iterable[int]) -> tuple[int, ...]:
        """Returns the seeds that are still to be run."""
        done = {r["seed"] for r in self.rows(mode, digest) if r["status"] not in ANOTHER_TIME}
        return tuple(seed for seed in seeds if seed not in done)

    def add(self, mode: Mode, digest: str, configuration: str, rows: Sequence[Row]) -> None:
        """Writes runs beside those that are there; new ones take the place of old ones.

        Raises:
            BenchmarkError: They cannot be written; what was there before stays.
        """
        kept = {row["seed"]: row for row in self.rows(mode, digest)}
        for row in rows:
            entry = dict(row)
            if log := entry.pop(LOG, ""):
                packed = base64.b64decode(log)
                entry["log_sha256"] = hashlib.sha256(packed).hexdigest()
                write_whole(self.log_path(mode, digest, row["seed"]), packed)
            kept[row["seed"]] = entry
        table = pa.Table.from_pylist([kept[seed] for seed in sorted(kept)], schema=SCHEMA)
        note = {
            "diagnoser.schema": SCHEMA_VERSION,
            "diagnoser.hash": digest,
            "diagnoser.mode": mode,
            "diagnoser.configuration": configuration,
        }
        _write_table(self.path(mode, digest), table.replace_schema_metadata(note))

    def write_harm(self, harms: Sequence[Harm], calibrations: Sequence[Calibration]) -> None:
        """Writes ``harm.parquet`` and ``calibration.parquet``.

        Raises:
            BenchmarkError: They cannot be written.
        """
        for name, values in (("harm", harms), ("calibration", calibrations)):
            rows = [dataclasses.asdict(value) for value in values]
            if rows:
                table = pa.Table.from_pylist(rows)
                note = {"diagnoser.schema": SCHEMA_VERSION}
                _write_table(
                    self.directory / f"{name}.parquet", table.replace_schema_metadata(note)
                )

    def has_harm(self) -> bool:
        """Whether there is anything for `read_harm` to read."""
        return self._harm_path.exists()

    def read_harm(self) -> list[Harm]:
        """Returns what `write_harm` wrote of harm.

        Raises:
            BenchmarkError: There is nothing, or it cannot be read.
        """
        path = self._harm_path
        again = "`diagnoser bench truth` makes it"
        if not path.exists():
            raise BenchmarkError(f"{path} is not there; {again}")
        try:
            rows = pq.read_table(io.BytesIO(path.read_bytes())).to_pylist()
            return [Harm(**row) for row in rows]
        except (pa.ArrowException, OSError, TypeError) as error:
            raise BenchmarkError(f"{path} cannot be read ({error}); {again} anew") from error

    @property
    def _harm_path(self) -> Path:
        return self.directory / "harm.parquet"

    def _has_log(self, mode: Mode, row: Row) -> bool:
        path = self.log_path(mode, row["hash"], row["seed"])
        if not path.exists():
            self.complain(f"{path} is missing; that run is made again")
            return False
        packed = path.read_bytes()
        try:
            whole = hashlib.sha256(packed).hexdigest() == str(row["log_sha256"])
            if whole:
                gzip.decompress(packed)
        except (OSError, EOFError, zlib.error):
            whole = False
        if not whole:
            self._move_aside(path, "not the log that was written")
        return whole

    def _move_aside(self, path: Path, reason: str) -> None:
        aside = path.with_name(f"{path.name}.corrupt")
        path.replace(aside)
        self.complain(f"{path} cannot be used ({reason}); moved to {aside.name} and made again")


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all.

    Raises:
        BenchmarkError: It cannot be written; a file of that name stays as it was.
    """
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise BenchmarkError(
                f"{path.parent}: the disk is full; make room and give the same command again, what "
                "is finished stays"
            ) from error
        raise BenchmarkError(f"{path} cannot be written: {error.strerror}") from error


def _write_table(path: Path, table: pa.Table) -> None:
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    write_whole(path, content.getvalue())


def _read(path: Path, mode: str, digest: str) -> list[Row]:
    # Read as bytes: a file that is mapped into memory dies with a signal when it is cut.
    table = pq.read_table(io.BytesIO(path.read_bytes()))
    note = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    expected = {
        "diagnoser.schema": SCHEMA_VERSION,
        "diagnoser.hash": digest,
        "diagnoser.mode": mode,
    }
    for name, value in expected.items():
        if note.get(name) != value:
            raise ValueError(f"its {name.partition('.')[2]} is {note.get(name)}, not {value}")
    if not table.schema.equals(SCHEMA):
        raise ValueError("it has other columns")
    rows: list[Row] = table.to_pylist()
    if any(row["hash"] != digest for row in rows):
        raise ValueError("it holds rows of another configuration")
    return rows
