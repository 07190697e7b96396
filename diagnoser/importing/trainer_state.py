"""``trainer_state.json`` of Hugging Face's Trainer: its ``log_history``.

Its losses are means over the steps since the last entry. By default the Trainer leaves losses that
are not finite out of them (`logging_nan_inf_filter`), so that such a log never shows one; the norm
of the gradient, where it was logged, does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from diagnoser.errors import LoggedFileError
from diagnoser.importing.cells import number, whole
from diagnoser.importing.curves import MOST_VALUES, LoggedCurve, LoggedFile, shown

NAME: Final = "trainer_state.json"
MOST_BYTES: Final = 128 * 2**20
FILTERED: Final = (
    "the Trainer leaves losses that are not finite out of its log, unless it is told "
    "logging_nan_inf_filter=False"
)
NOT_CURVES: Final = frozenset({"step", "epoch"})
OF_THE_WHOLE: Final = "train_runtime"  # in the entry that sums up the training, at its end


def open_trainer_state(path: Path) -> LoggedFile:
    """Reads the file.

    Raises:
        LoggedFileError: It is damaged, or of something else.
        OSError: It cannot be read.
    """
    if path.stat().st_size > MOST_BYTES:
        raise LoggedFileError(f"{path}: more than {MOST_BYTES >> 20} MiB; is it a {NAME}?")
    try:
        state = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise LoggedFileError(f"{path}: not JSON, or damaged; copy the file again") from None
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise LoggedFileError(f"{path}: no log_history in it, a list of entries; is it a {NAME}?")
    entries = [entry for entry in history if OF_THE_WHOLE not in entry]
    if not entries:
        raise LoggedFileError(f"{path}: its log_history is empty; did the training log anything?")
    if sum(map(len, entries)) > MOST_VALUES:
        raise LoggedFileError(f"{path}: more than {MOST_VALUES:,} values; is it a {NAME}?")
    names = dict.fromkeys(name for entry in entries for name in entry if name not in NOT_CURVES)

    def read(chosen: Mapping[str, str]) -> Mapping[str, LoggedCurve]:
        return {quantity: _curve(path, entries, name) for quantity, name in chosen.items()}

    return LoggedFile(path, "Trainer's log", "name", tuple(names), read, FILTERED)


def _curve(path: Path, entries: list[dict[str, Any]], name: str) -> LoggedCurve:
    curve = LoggedCurve([], [])
    for i, entry in enumerate(entries):
        if entry.get(name) is None:
            continue
        try:
            step, value = whole(_number(entry.get("step"))), _number(entry[name])
        except (TypeError, ValueError, OverflowError):
            raise LoggedFileError(
                f"{path}: entry {i} of log_history: {shown([name])} or its step is no number; "
                "mend or remove the entry"
            ) from None
        curve.step.append(step)
        curve.value.append(value)
    return curve


def _number(value: Any) -> float:
    if isinstance(value, str):
        value = number(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("not a number")
    return float(value)
