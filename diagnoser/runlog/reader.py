"""Reads a run's directory into a `Recording`, and says plainly why when it cannot."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

from diagnoser.errors import DamagedRunError, NewerRunError, NotARunError, RunLogError
from diagnoser.runlog.builder import RecordingBuilder
from diagnoser.runlog.ranks import merged
from diagnoser.runlog.recording import LOG_FILE, Recording
from diagnoser.runlog.records import SCHEMA, SCHEMA_VERSION, Record

# What a damaged line can raise on its way through `json.loads` and `RecordingBuilder.add`.
_DAMAGE = (ValueError, TypeError, LookupError, OverflowError, RecursionError)


def rank_directory(directory: Path, rank: int) -> Path:
    """Returns where in a run's directory a rank has a log of its own."""
    return directory / f"rank-{rank}"


def read_run(directory: Path, live: Recording | None = None) -> Recording:
    """Reads the log in a run's directory, together with those of single ranks that lie in it.

    A cut last line (the process was killed while writing it) is dropped; damaged lines in the
    middle are skipped and counted in ``Recording.damaged_lines``. A rank's log that cannot be read
    counts as missing.

    Args:
        directory: The run's.
        live: What its own log holds, where that is known already.

    Raises:
        NotARunError: There is no log here.
        NewerRunError: The log was written by a newer version.
        DamagedRunError: Not even the header of the log can be read.
        RunLogError: The log cannot be opened.
    """
    logs = [_read(directory) if live is None else live]
    for one in sorted(directory.glob("rank-*"), key=lambda d: (len(d.name), d.name)):
        with suppress(RunLogError):
            logs.append(_read(one))
    return merged(logs)


def _read(directory: Path) -> Recording:
    """Reads one log; raises as `read_run` does."""
    if not directory.is_dir():
        what = "a file" if directory.exists() else "missing"
        raise NotARunError(f"{directory}: {what}; give a run's directory, with {LOG_FILE} in it")
    path = directory / LOG_FILE
    damaged = 0
    try:
        with path.open("rb") as lines:
            builder = _begin(path, lines.readline())
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                try:
                    builder.add(json.loads(line))
                except _DAMAGE:
                    damaged += 1
    except FileNotFoundError:
        raise NotARunError(
            f"{directory}: no {LOG_FILE} in this directory; give the directory of a run"
        ) from None
    except OSError as error:
        raise RunLogError(
            f"{path}: cannot read the run log ({error.strerror}); check the file"
        ) from error
    return builder.recording(damaged)


def _begin(path: Path, line: bytes) -> RecordingBuilder:
    """Returns a builder made of the header, the first line."""
    try:
        header: Record = json.loads(line)
        schema = re.fullmatch(rf"{re.escape(SCHEMA)}([0-9]+)", header["schema"])
        if schema is None or int(schema[1]) < 1 or not line.endswith(b"\n"):
            raise ValueError("not a header")
        if int(schema[1]) > SCHEMA_VERSION:
            raise NewerRunError(
                f"{path}: written by a newer version ({schema[0]}); upgrade diagnoser"
            )
        return RecordingBuilder(header)
    except _DAMAGE:
        raise DamagedRunError(
            f"{path}: the first line is not the header of a run log; record the run again"
        ) from None
