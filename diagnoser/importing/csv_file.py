"""A CSV file of curves, with a header: columns are curves, rows are steps."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from diagnoser.errors import LoggedFileError
from diagnoser.importing.cells import number, whole
from diagnoser.importing.curves import MOST_VALUES, STEP, LoggedCurve, LoggedFile, shown

MOST_BYTES: Final = 512 * 2**20
HEADER_BYTES: Final = 2**18  # far beyond any header
DELIMITERS: Final = ",;\t|"


def open_csv(path: Path) -> LoggedFile:
    """Reads the header.

    Raises:
        LoggedFileError: It is no CSV with a header.
        OSError: It cannot be read.
    """
    if path.stat().st_size > MOST_BYTES:
        raise LoggedFileError(
            f"{path}: more than {MOST_BYTES >> 20} MiB; import every tenth of its lines"
        )
    with path.open("rb") as file:
        start = file.readline(HEADER_BYTES)
    if len(start) == HEADER_BYTES:
        raise LoggedFileError(f"{path}: its first line does not end; is it a CSV of curves?")
    if not start.strip():
        raise LoggedFileError(f"{path}: no header in its first line; a CSV of curves needs one")
    with _readable(path):
        text = start.decode("utf-8-sig")
    delimiter = max(DELIMITERS, key=text.count) if any(d in text for d in DELIMITERS) else ","
    with _readable(path):
        header = [name.strip() for name in next(csv.reader([text], delimiter=delimiter))]
    header[0] = header[0].lstrip("# ")
    if all(_is_number(name) for name in header):
        raise LoggedFileError(
            f"{path}: its first line holds numbers; put the names of the columns there"
        )

    def read(chosen: Mapping[str, str]) -> Mapping[str, LoggedCurve]:
        return _curves(path, delimiter, {q: header.index(name) for q, name in chosen.items()})

    return LoggedFile(path, "CSV", "column", tuple(header), read, counts_itself=False)


def _curves(path: Path, delimiter: str, columns: Mapping[str, int]) -> dict[str, LoggedCurve]:
    """Reads columns; where none holds steps, rows are numbered."""
    curves = {quantity: LoggedCurve([], []) for quantity in columns if quantity != STEP}
    left = MOST_VALUES
    with _readable(path), path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter)
        next(rows)
        row = -1
        for cells in rows:
            if not any(cell.strip() for cell in cells):
                continue
            row += 1
            found = {
                quantity: _cell(path, rows.line_num, quantity, cells[at] if at < len(cells) else "")
                for quantity, at in columns.items()
            }
            step = found.pop(STEP, None) if STEP in columns else row
            known = {quantity: value for quantity, value in found.items() if value is not None}
            if not known:
                continue
            if step is None:
                raise LoggedFileError(f"{path}: line {rows.line_num}: no step; fill it in")
            left -= len(known)
            if left < 0:
                raise LoggedFileError(
                    f"{path}: more than {MOST_VALUES:,} values; import every tenth of its lines"
                )
            for quantity, value in known.items():
                curves[quantity].step.append(int(step))
                curves[quantity].value.append(value)
    return curves


def _cell(path: Path, line: int, quantity: str, text: str) -> float | None:
    try:
        value = number(text)
        return whole(value) if quantity == STEP and value is not None else value
    except (ValueError, OverflowError):
        what = "a whole number of steps" if quantity == STEP else "a number"
        raise LoggedFileError(
            f"{path}: line {line}: {quantity} is '{shown([text])}', which is not {what}; mend the "
            f"line, or take another column: --column {quantity}=NAME"
        ) from None


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (csv.Error, UnicodeError) as error:
        raise LoggedFileError(f"{path}: not a CSV in UTF-8 ({_first_line(error)})") from None


def _first_line(error: Any) -> str:
    return str(error).partition("\n")[0][:120]


def _is_number(text: str) -> bool:
    try:
        return number(text) is not None
    except ValueError:
        return False
