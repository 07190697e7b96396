"""Writes the log of a run from inside the training process, and never stands in its way.

Numbers are exact: a float is written as its shortest repr, NaN and the infinities as the strings
"NaN", "Infinity" and "-Infinity". Text is untrusted (names come from somebody's program) and
escaped to ASCII, so a record never spans lines. Each record brings the names that it uses, so a
damaged line costs itself and nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from diagnoser.errors import RunLogError
from diagnoser.runlog.recording import (
    COLUMNS,
    LOG_FILE,
    SCHEMA_VERSION,
    TABLE_OF,
    TABLES,
    Data,
    Event,
    Fact,
    Record,
    Recording,
    RecordingBuilder,
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

    Args:
        directory: Made if it is missing; must not hold a log yet.
        run: The run's name.
        header: What is known at the start, JSON-like.

    Raises:
        RunLogError: The log cannot be created here, or there is one already.
    """

    def __init__(self, directory: Path, run: str, header: Data) -> None:
        self.path = directory.absolute() / LOG_FILE
        self.failure: str | None = None
        self.lost_records = 0
        self._process: int | None = os.getpid()
        self._losses: list[tuple[int, float, float]] = []
        self._last_write = time.monotonic()
        line = _encode(
            {
                "record": "header",
                "schema": f"diagnoser.log/{SCHEMA_VERSION}",
                "run": run,
                "header": plain(header),
            }
        )
        self._builder = RecordingBuilder(json.loads(line))
        self._unwritten = bytearray(line)
        self._create()
        self._send()
        if self.failure is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            raise RunLogError(self.failure)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def components(
        self, step: int, components: Sequence[Component], facts: Iterable[Fact] = ()
    ) -> None:
        """Records all components known at ``step`` (the last call counts), and facts of them."""
        listed = [asdict(component) for component in components]
        self._write(
            {"record": "components", "step": int(step), "components": listed},
            *(_fact_record(fact) for fact in facts),
        )

    def loss(self, step: int, value: float, accuracy: float = math.nan) -> None:
        """Records a loss, and the accuracy on the same batch where it shows (else NaN).

        It is written within 64 losses, a second, or with another record.
        """
        if self._process != os.getpid():
            return
        self._losses.append((int(step), float(value), float(accuracy)))
        waited = time.monotonic() - self._last_write
        if len(self._losses) >= LOSSES_A_RECORD or waited > SECONDS_A_RECORD:
            self._write()

    def measurement(self, step: int, measurements: Sequence[Measurement], seconds: float) -> None:
        """Records what was measured at ``step``, and how many seconds measuring took."""
        self._write(_measurement_record(step, measurements, seconds))

    def event(self, step: int, kind: str, message: str, data: Data) -> None:
        """Records something that happened to the monitor (see `Event`)."""
        event = Event(int(step), kind, message, plain(data))
        self._write({"record": "event", **asdict(event)})

    def fact(self, step: int, name: str, component: str, value: float, data: Data) -> None:
        """Records something the program does (see `Fact`)."""
        self._write(_fact_record(Fact(step, name, component, value, data)))

    def end(self, exit_code: int | None, cost: Cost | None) -> None:
        """Records that the run ended; a log without this is of a process that died."""
        self._write(
            {
                "record": "end",
                "exit_code": exit_code,
                "cost": None if cost is None else plain(asdict(cost)),
                "lost_records": self.lost_records,
            }
        )

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
            records = (_loss_record(self._losses), *records)
            self._losses = []
        for record in records:
            line = _encode(record)
            self._builder.add(json.loads(line))
            if self._unwritten and len(self._unwritten) + len(line) > UNWRITTEN_BYTES:
                self.lost_records += 1
            else:
                self._unwritten += line
        self._send()

    def _send(self) -> None:
        """Gives the file what waits; what it does not take (a full disk takes a part) stays."""
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                while self._unwritten:
                    del self._unwritten[: os.write(descriptor, self._unwritten)]
            finally:
                os.close(descriptor)
        except OSError as error:
            self.failure = self.failure or self._trouble(error)

    def _trouble(self, error: OSError) -> str:
        return (
            f"{self.path}: cannot write the run log ({error.strerror}); "
            "free some space or choose another directory"
        )


def _measurement_record(step: int, measurements: Sequence[Measurement], seconds: float) -> Record:
    names: dict[str, dict[str, int]] = {table: {} for table in TABLES}
    rows: dict[str, list[Any]] = {column: [] for column in COLUMNS}
    for row in measurements:
        estimate = row.estimate
        texts = (row.quantity, row.component, row.other, estimate.method, estimate.dtype)
        for (column, table), text in zip(TABLE_OF.items(), texts, strict=True):
            known = names[table]
            rows[column].append(-1 if text is None else known.setdefault(text, len(known)))
        rows["step"].append(int(row.step))
        rows["value"].append(_number(estimate.value))
        rows["std_error"].append(_optional(estimate.std_error))
        rows["batch_std_error"].append(_optional(estimate.batch_std_error))
        rows["samples"].append(-1 if estimate.samples is None else int(estimate.samples))
    return {
        "record": "measurement",
        "step": int(step),
        "seconds": _number(seconds),
        **{table: list(known) for table, known in names.items()},
        "rows": rows,
    }


def _loss_record(losses: Sequence[tuple[int, float, float]]) -> Record:
    return {
        "record": "loss",
        "step": [step for step, _, _ in losses],
        "value": [_number(value) for _, value, _ in losses],
        "accuracy": [_number(accuracy) for _, _, accuracy in losses],
    }


def _fact_record(fact: Fact) -> Record:
    return {
        "record": "fact",
        "step": int(fact.step),
        "name": fact.name,
        "component": fact.component,
        "value": _number(fact.value),
        "data": plain(fact.data),
    }


def add_event(directory: Path, step: int, kind: str, message: str, data: Data) -> None:
    """Adds to the log of a run that has ended (see `Event`).

    Raises:
        RunLogError: There is no log, or it cannot be written.
    """
    path = directory / LOG_FILE
    event = Event(int(step), kind, message, plain(data))
    try:
        with path.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(_encode({"record": "event", **asdict(event)}))
    except OSError as error:
        raise RunLogError(
            f"{path}: cannot add to the run log ({error.strerror}); what was to be added: {message}"
        ) from error


def _encode(record: Record) -> bytes:
    return json.dumps(record, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def _number(value: float) -> float | str:
    """Returns a float, or the name of one that JSON does not have."""
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _optional(value: float | None) -> float | str | None:
    return None if value is None else _number(value)


def plain(value: Any) -> Any:
    """Returns what JSON can hold of ``value``; what it cannot hold (a device, a path), as text.

    NaN and the infinities become their names.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value)
