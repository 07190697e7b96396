"""From the curves of a log to a run directory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from diagnoser.errors import LoggedFileError
from diagnoser.importing.csv_file import open_csv
from diagnoser.importing.curves import LOSS, QUANTITIES, STEP, LoggedFile, choose, in_order, normal
from diagnoser.importing.tensorboard import is_event_file, open_events
from diagnoser.importing.trainer_state import NAME, open_trainer_state
from diagnoser.runlog import (
    IMPORTED,
    LOG_FILE,
    Curve,
    Recording,
    RunLogWriter,
    new_run_directory,
)
from diagnoser.types import Estimate, Measurement
from diagnoser.vocabulary import MODEL, UNKNOWN

# A log may have a value at each of a million steps, a watched run is measured some dozens of times,
# and rules ask for so many measurements in a row. So values of neighbouring steps are put together.
MEASUREMENTS: Final = 64
ELSEWHERE: Final = 2.0  # times as long as the loss, or as short: another clock, such as epochs
BROKEN: Final = {  # what counts the values of a quantity that are not finite
    "gradient_norm": "non_finite_gradient",
    "evaluation_loss": "non_finite_evaluation",
}
LAST: Final = frozenset({"learning_rate"})  # is set, and not measured: no median of it


@dataclass(frozen=True, slots=True, eq=False)
class Imported:
    """A run that was made of a log.

    Attributes:
        directory: Where it is.
        recording: What it holds.
        summary: What was in the log and what was not, in one line.
    """

    directory: Path
    recording: Recording
    summary: str


def import_log(
    path: Path, out: Path | None = None, columns: Mapping[str, str] | None = None
) -> Imported:
    """Makes a run directory of a log. Nothing is written before all of it was read.

    Args:
        path: A ``trainer_state.json`` (or a directory with one), an event file of TensorBoard or a
            directory of them, or a CSV file.
        out: The run directory; a new one under ``diagnoser-runs/`` if left out.
        columns: Names of columns or tags by quantity, where they are not found by themselves; an
            empty name leaves a quantity out.

    Raises:
        LoggedFileError: The log cannot be read, or does not hold a training loss.
        UsageError: What ``columns`` names is not there; or a package is missing.
        RunLogError: The run directory cannot be written.
    """
    try:
        log = _opened(path)
        chosen = choose(log, columns or {})
        logged = log.read(chosen)
    except OSError as error:
        raise LoggedFileError(f"{path}: cannot be read ({error.strerror})") from None
    notes = list(log.notes)
    curves: dict[str, Curve] = {}
    for quantity in QUANTITIES:
        if quantity in logged:
            ordered = in_order(logged[quantity], restarts=quantity != LOSS)
            if ordered is None:
                raise LoggedFileError(_started_again(log))
            curves[quantity] = ordered.curve
            if ordered.resumed:
                notes.append(f"the steps of {quantity} go back {ordered.resumed} times")
            if ordered.replaced:
                notes.append(f"{ordered.replaced} of its values were logged again and left out")
    if not len(curves[LOSS].step):
        raise LoggedFileError(f"{path}: {chosen[LOSS]} holds no value; was anything logged?")
    curves = _usable(curves, notes)
    if not log.counts_itself:
        clock = normal(chosen.get(STEP, "rows"))
        notes += [f"steps are its {clock}"] if clock in ("rows", "epoch") else []
    summary = _summary(log, curves, notes)
    return _written(log, chosen, curves, summary, out)


def _opened(path: Path) -> LoggedFile:
    if path.is_dir():
        if (path / LOG_FILE).exists():
            raise LoggedFileError(f"{path}: a run already; `diagnoser diagnose {path}` judges it")
        if (path / NAME).exists():
            return open_trainer_state(path / NAME)
        return open_events(path)
    if not path.is_file():
        what = "no file of curves" if path.exists() else "missing"
        raise LoggedFileError(f"{path}: {what}; give a {NAME}, an event file or a CSV")
    if is_event_file(path):
        return open_events(path)
    if path.suffix.lower() == ".json":
        return open_trainer_state(path)
    return open_csv(path)


def _started_again(log: LoggedFile) -> str:
    remedy = "give the log of one"
    if not log.counts_itself:
        remedy += ", or --column step=NAME of a column that counts through (step= numbers the rows)"
    return (
        f"{log.path}: the steps of the loss start again: several runs in one log, or steps within "
        f"an epoch; {remedy}"
    )


def _usable(curves: Mapping[str, Curve], notes: list[str]) -> dict[str, Curve]:
    """Leaves out what is on another clock than the loss, or not in its unit."""
    last = int(curves[LOSS].step[-1]) + 1
    kept = {}
    for quantity, curve in curves.items():
        if not len(curve.step):
            continue
        ratio = (int(curve.step[-1]) + 1) / last
        if not 1 / ELSEWHERE <= ratio <= ELSEWHERE:
            notes.append(
                f"{quantity} ends at step {curve.step[-1]} and the loss at {last - 1}: it is "
                "counted otherwise and left out"
            )
            continue
        if quantity.endswith("accuracy"):
            finite = curve.value[np.isfinite(curve.value)]
            highest, lowest = finite.max(initial=0.0), finite.min(initial=0.0)
            if lowest < 0.0 or highest > 100.0:
                notes.append(f"{quantity} is no share: it goes from {lowest:g} to {highest:g}")
                continue
            if highest > 1.0:
                notes.append(f"{quantity} is taken for a percentage: it goes up to {highest:g}")
                kept[quantity] = Curve(curve.step, curve.value / 100.0)
                continue
        kept[quantity] = curve
    return kept


def _summary(log: LoggedFile, curves: Mapping[str, Curve], notes: Sequence[str]) -> str:
    loss = curves[LOSS].step
    held = [f"loss ({len(loss)} values, steps {loss[0]} to {loss[-1]})"]
    held += [f"{name} ({len(c.step)})" for name, c in curves.items() if name != LOSS]
    missing = [name for name in QUANTITIES if name not in curves]
    absent = f"; not: {', '.join(missing)}, and nothing of components" if missing else ""
    told = "".join(f"; {note}" for note in notes)
    text = f"{log.path.name}, a {log.kind}, holds {', '.join(held)}{absent}{told}"
    return "".join(c if c.isprintable() else "?" for c in text)


def _written(
    log: LoggedFile,
    chosen: Mapping[str, str],
    curves: Mapping[str, Curve],
    summary: str,
    out: Path | None,
) -> Imported:
    directory = (out or new_run_directory(log.path.stem or "log")).absolute()
    header = {IMPORTED: {"file": log.path.name, "kind": log.kind, "columns": dict(chosen)}}
    with RunLogWriter(directory, directory.name, header) as writer:
        writer.event(0, IMPORTED, summary, {})
        if log.filtered is not None:
            data = {"reason": log.filtered}
            for feature in ("logged_loss_lost", "logged_loss_gaps"):
                writer.fact(0, UNKNOWN, feature, 1.0, data)
        accuracy = dict(_pairs(curves["accuracy"])) if "accuracy" in curves else {}
        for step, value in _pairs(curves[LOSS]):
            writer.loss(step, value, accuracy.get(step, math.nan))
        for step, rows in _measurements(curves):
            writer.measurement(step, rows, 0.0)
        recording = writer.recording()
    return Imported(directory, recording, summary)


def _pairs(curve: Curve) -> zip[tuple[int, float]]:
    return zip(curve.step.tolist(), curve.value.tolist(), strict=True)


def _measurements(curves: Mapping[str, Curve]) -> list[tuple[int, list[Measurement]]]:
    """Returns what was logged in each of some parts of the run, with the last step of a part."""
    steps = curves[LOSS].step
    parts = np.array_split(np.arange(len(steps)), min(len(steps), MEASUREMENTS))
    ends = np.array([steps[part[-1]] for part in parts])
    rows: list[list[Measurement]] = [
        [_row(int(end), "logged_losses", float(len(part)), len(part))]
        for end, part in zip(ends, parts, strict=True)
    ]
    for quantity, curve in curves.items():
        if quantity in (LOSS, "accuracy"):
            continue
        of = np.minimum(np.searchsorted(ends, curve.step), len(ends) - 1)
        for i in np.unique(of):
            values = curve.value[of == i]
            finite = values[np.isfinite(values)]
            if quantity in BROKEN:
                count = float(len(values) - len(finite))
                rows[i].append(_row(int(ends[i]), BROKEN[quantity], count, len(values)))
            if len(finite):
                value = finite[-1] if quantity in LAST else np.median(finite)
                rows[i].append(_row(int(ends[i]), quantity, float(value), len(finite)))
    return [(int(end), of) for end, of in zip(ends, rows, strict=True)]


def _row(step: int, quantity: str, value: float, samples: int) -> Measurement:
    estimate = Estimate(value, 0.0, None, samples, "logged", "float64")
    return Measurement(step, quantity, MODEL, estimate)
