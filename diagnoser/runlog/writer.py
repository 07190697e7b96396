"""Writes the log of a run from inside the training process, and never stands in its way.

Text is untrusted (names come from somebody's program) and escaped to ASCII, so a record never spans
lines. Each record brings the names that it uses, so a damaged line costs itself and nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from diagnoser.errors import RunLogError
from diagnoser.runlog.builder import RecordingBuilder
from diagnoser.runlog.recording import LOG_FILE, Data, Event, Fact, Recording
from diagnoser.runlog.records import (
    Record,
    components_record,
    end_record,
    event_record,
    fact_record,
    header_record,
    loss_record,
    measurement_record,
)
from diagnoser.types import Component, Cost, Measurement

LOSSES_A_RECORD: Final = 64
SECONDS_A_RECORD: Final = 1.0  # the most of the loss curve that `kill -9` can take
UNWRITTEN_BYTES: Final = 64 * 2**20  # what may wait in memory while the disk takes nothing


class RunLogWriter:
    """Writes the log of one run, and keeps the recording of it; a context manager.

    Only the process that made it writes: calls in a fork do nothing. The file is opened anew for
    each record, by absolute path, so that a script that changes its directory or closes all open
    files (daemons do) neither stops the log nor gets it into a file of its own.

    While the run goes on no trouble with the disk raises. ``failure`` then says in one line what
    happened first; records wait in memory and are tried again with the next one; beyond
    `UNWRITTEN_BYTES` new ones are dropped and counted in ``lost_records``.

    A long log is thinned (see `thinning`). ``beginnings`` is then asked at what steps of a
    recording something began, the most important first, so that this stays.

    Args:
        directory: Made if it is missing; must not hold a log yet. None: all waits in memory until
            `place` says where it goes.
        run: The run's name.
        header: What is known at the start, JSON-like.

    Raises:
        RunLogError: The log cannot be created here, or there is one already.
    """

    def __init__(self, directory: Path | None, run: str, header: Data) -> None:
        self._waits = directory is None
        self.path = (directory or Path()).absolute() / LOG_FILE
        self.failure: str | None = None
        self.lost_records = 0
        self._process: int | None = os.getpid()
        self._losses: list[tuple[int, float, float]] = []
        self._last_write = time.monotonic()
        self.beginnings: Callable[[Recording], Iterable[int]] = lambda _: ()
        line = _encode(header_record(run, header))
        self._builder = RecordingBuilder(json.loads(line))
        self._unwritten = bytearray(line)
        if directory is not None:
            self.place(directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def place(self, directory: Path) -> None:
        """Makes the log, and writes what has waited for it.

        Raises:
            RunLogError: It cannot be created here, or there is one already.
        """
        self.path = directory.absolute() / LOG_FILE
        self._create()
        self._waits = False
        self._send()
        if self.failure is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            raise RunLogError(self.failure)

    def components(
        self, step: int, components: Sequence[Component], facts: Iterable[Fact] = ()
    ) -> None:
        """Records all components known at ``step`` (the last call counts), and facts of them."""
        self._write(components_record(step, components), *map(fact_record, facts))

    def loss(self, step: int, value: float, accuracy: float = math.nan) -> None:
        """Records a loss, and the accuracy on the same batch where it shows (else NaN).

        It is written within 64 losses, a second, or with another record.
        """
        if self._process != os.getpid():
            return
        self._losses.append((int(step), float(value), float(accuracy)))
        waited = time.monotonic() - self._last_write
        # A script may set the clock, also back.
        if len(self._losses) >= LOSSES_A_RECORD or not 0.0 <= waited <= SECONDS_A_RECORD:
            self._write()

    def measurement(self, step: int, measurements: Sequence[Measurement], seconds: float) -> None:
        """Records what was measured at ``step``, and how many seconds measuring took."""
        self._write(measurement_record(step, measurements, seconds))

    def event(self, step: int, kind: str, message: str, data: Data) -> None:
        """Records something that happened to the monitor (see `Event`)."""
        self._write(event_record(Event(step, kind, message, data)))

    def fact(self, step: int, name: str, component: str, value: float, data: Data) -> None:
        """Records something the program does (see `Fact`)."""
        self._write(fact_record(Fact(step, name, component, value, data)))

    def end(self, exit_code: int | None, cost: Cost | None) -> None:
        """Records that the run ended; a log without this is of a process that died."""
        self._write(end_record(exit_code, cost, self.lost_records))

    def recording(self) -> Recording:
        """Returns the recording so far: what `read_run` would read from the log now."""
        self._write()
        return self._builder.recording()

    def continue_in(self, directory: Path) -> None:
        """Goes on in another directory, in a fork: what was recorded so far is copied there.

        Raises:
            RunLogError: It cannot be written.
        """
        self._process = os.getpid()
        earlier = self.path
        self.path = directory.absolute() / LOG_FILE
        try:
            directory.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(earlier, self.path)
        except OSError as error:
            raise RunLogError(self._trouble(error)) from error

    def branch(self, directory: Path) -> RunLogWriter:
        """Returns the writer of another log, which begins with all that was recorded so far.

        Raises:
            RunLogError: It cannot be written.
        """
        self._write()
        other = copy.copy(self)
        other.path = directory.absolute() / LOG_FILE
        other._losses, other._unwritten = [], bytearray(self._unwritten)
        other._builder = copy.deepcopy(self._builder)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.path, other.path)
        except OSError as error:
            raise RunLogError(other._trouble(error)) from error
        return other

    def close(self) -> None:
        """Writes what waits; later calls do nothing."""
        self._write()
        self._process = None

    @property
    def trouble(self) -> str | None:
        """What the disk did not take, in one line; None if it took everything at once."""
        if self.failure is None:
            return None
        missing = self.lost_records + self._unwritten.count(b"\n")
        what = f"{missing} records are missing in it" if missing else "nothing is missing in it"
        return f"{self.failure}; {what}"

    def _create(self) -> None:
        directory = self.path.parent
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunLogError(
                f"{directory}: cannot make this directory ({error.strerror}); choose another"
            ) from error
        try:
            os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            raise RunLogError(
                f"{self.path}: a run is recorded here already; choose another directory"
            ) from None
        except OSError as error:
            raise RunLogError(self._trouble(error)) from error

    def _write(self, *records: Record) -> None:
        """Writes the losses that wait, then ``records``."""
        if self._process != os.getpid():
            return
        self._last_write = time.monotonic()
        if self._losses:
            records = (loss_record(self._losses), *records)
            self._losses = []
        for record in records:
            line = _encode(record)
            self._builder.add(json.loads(line))
            if self._unwritten and len(self._unwritten) + len(line) > UNWRITTEN_BYTES:
                self.lost_records += 1
            else:
                self._unwritten += line
        self._send()
        if self._builder.is_long:
            self._thin()

    def _send(self) -> None:
        """Gives the file what waits; what it does not take (a full disk takes a part) stays."""
        if self._waits:
            return
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                while self._unwritten:
                    del self._unwritten[: os.write(descriptor, self._unwritten)]
            finally:
                os.close(descriptor)
        except OSError as error:
            self.failure = self.failure or self._trouble(error)

    def _thin(self) -> None:
        """Lets go of some of what is old, and writes what is left in place of the log."""
        beginnings: list[int] = []
        try:
            beginnings = list(self.beginnings(self._builder.recording()))
        except Exception as error:
            message = f"what began when: {error!r}; thinned without it"
            self._builder.add(event_record(Event(0, "monitor_error", message, {})))
        self._builder = self._builder.thinned(beginnings)
        if self._waits:
            self._unwritten = bytearray(b"".join(map(_encode, self._builder.records())))
            return
        part = self.path.with_name(f"{LOG_FILE}.part")
        try:
            with part.open("wb") as file:
                file.writelines(map(_encode, self._builder.records()))
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)
        except OSError as error:  # the long log stays, and goes on
            self.failure = self.failure or self._trouble(error)
            with contextlib.suppress(OSError):
                part.unlink()
        else:
            self._unwritten.clear()
            self.lost_records = 0

    def _trouble(self, error: OSError) -> str:
        return (
            f"{self.path}: cannot write the run log ({error.strerror}); "
            "free some space or choose another directory"
        )


def new_run_directory(name: str) -> Path:
    """Makes a directory for a run under ``diagnoser-runs/``; no two runs get the same one."""
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
    first = Path("diagnoser-runs") / f"{name}-{stamp}"
    path, count = first, 2
    while True:
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            path, count = first.with_name(f"{first.name}-{count}"), count + 1
        except OSError:  # the run log, which is about to be made there, says why
            return path
        else:
            return path


def add_event(directory: Path, step: int, kind: str, message: str, data: Data) -> None:
    """Adds to the log of a run that has ended (see `Event`).

    Raises:
        RunLogError: There is no log, or it cannot be written.
    """
    path = directory / LOG_FILE
    event = event_record(Event(step, kind, message, data))
    try:
        with path.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(_encode(event))
    except OSError as error:
        raise RunLogError(
            f"{path}: cannot add to the run log ({error.strerror}); what was to be added: {message}"
        ) from error


def _encode(record: Record) -> bytes:
    return json.dumps(record, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"
