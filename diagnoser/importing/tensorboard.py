"""Event files of TensorBoard, also as ``tensorboardX`` and others write them: their scalars.

A directory is read with all below it; the folder stands before the tag then, so that ``loss`` of
the folders ``train`` and ``val`` is ``train/loss`` and ``val/loss``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from diagnoser.errors import LoggedFileError, UsageError
from diagnoser.importing.cells import whole
from diagnoser.importing.curves import MOST_VALUES, LoggedCurve, LoggedFile
from diagnoser.importing.trainer_state import FILTERED

MARK: Final = "tfevents"
MOST_BYTES: Final = 4 * 2**30
OF_A_TRAINER: Final = frozenset({"train/loss", "train/epoch"})  # tags that it writes


def open_events(path: Path) -> LoggedFile:
    """Reads all scalars of an event file, or of a directory of them.

    Raises:
        UsageError: tensorboard is not installed.
        LoggedFileError: There are no event files, or no scalars in them.
        OSError: One cannot be read.
    """
    files = _files(path) if path.is_dir() else [path]
    if not files:
        raise LoggedFileError(f"{path}: no event file (*{MARK}*) in this directory or below it")
    if sum(file.stat().st_size for file in files) > MOST_BYTES:
        raise LoggedFileError(
            f"{path}: more than {MOST_BYTES >> 30} GiB of event files; give those of one run"
        )
    curves: dict[str, LoggedCurve] = {}
    notes = []
    for file in files:
        folder = file.parent.relative_to(path).as_posix() if path.is_dir() else "."
        there = _records(file)
        read = _read(file, "" if folder == "." else f"{folder}/", curves)
        if read < there:
            notes.append(f"{file.name} is damaged after {read} of {there} records")
    if not curves:
        raise LoggedFileError(f"{path}: no scalars in it; was anything logged?")

    def chosen_ones(chosen: Mapping[str, str]) -> Mapping[str, LoggedCurve]:
        return {quantity: curves[name] for quantity, name in chosen.items()}

    return LoggedFile(
        path,
        "TensorBoard log",
        "tag",
        tuple(curves),
        chosen_ones,
        filtered=FILTERED if curves.keys() >= OF_A_TRAINER else None,
        notes=tuple(notes),
    )


def is_event_file(path: Path) -> bool:
    """Whether a file is one, by its name."""
    return MARK in path.name


def _files(directory: Path) -> list[Path]:
    """Returns event files by folder, in the order in which they were begun."""

    def begun(file: Path) -> tuple[Path, int, str]:
        found = re.search(rf"{MARK}\.([0-9]{{1,18}})", file.name)
        return file.parent, int(found[1]) if found else 0, file.name

    return sorted((f for f in directory.rglob(f"*{MARK}*") if f.is_file()), key=begun)


def _read(file: Path, prefix: str, curves: dict[str, LoggedCurve]) -> int:
    """Adds the scalars of a file to ``curves``; returns after how many records it ends."""
    try:
        from google.protobuf.message import DecodeError
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:
        raise UsageError(
            f"{file}: reading event files needs tensorboard; pip install 'diagnoser[tensorboard]'"
        ) from None
    read = 0
    left = MOST_VALUES - sum(len(curve.step) for curve in curves.values())
    try:
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    step, number = whole(event.step), float(make_ndarray(value.tensor).item())
                    curve = curves.setdefault(f"{prefix}{value.tag}", LoggedCurve([], []))
                    curve.step.append(step)
                    curve.value.append(number)
                    left -= 1
            if left < 0:
                raise LoggedFileError(
                    f"{file}: more than {MOST_VALUES:,} values; give the files of one run"
                )
            read += 1
    except (DecodeError, ValueError, TypeError, OverflowError):
        pass  # a whole record with nonsense in it: the caller counts
    return read


def _records(file: Path) -> int:
    """Counts whole records: a length of 8 bytes, its checksum, so many bytes, their checksum.

    The last may be cut: the program was killed, or is writing it now.

    Raises:
        LoggedFileError: There is none.
    """
    size, at, count = file.stat().st_size, 0, 0
    with file.open("rb") as stream:
        while len(head := stream.read(12)) == 12:
            (length,) = struct.unpack("<Q", head[:8])
            at += 12 + length + 4
            if at > size:
                break
            stream.seek(at)
            count += 1
    if count == 0:
        raise LoggedFileError(f"{file}: no event file of TensorBoard, or an empty one")
    return count
