"""The lines of a log as plain records, both ways: what `json` takes, and what it gives, checked.

Numbers are exact: a float is written as its shortest repr, NaN and the infinities as the strings
"NaN", "Infinity" and "-Infinity". A record brings the names that it uses.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np

from diagnoser.runlog.recording import (
    COLUMNS,
    TABLE_OF,
    TABLES,
    Data,
    Ending,
    Event,
    Fact,
    Thinned,
)
from diagnoser.types import Component, Cost, Measurement, Part

SCHEMA: Final = "diagnoser.log/"
SCHEMA_VERSION: Final = 2  # the latest that is read
FIRST_VERSION: Final = 1
THINNED_VERSION: Final = 2  # of a log that has been thinned; any other is of the first

Record = dict[str, Any]

# -- to records ------------------------------------------------------------------------------------


def header_record(run: str, header: Data, version: int = FIRST_VERSION) -> Record:
    """Returns the first line of a log."""
    return {"record": "header", "schema": f"{SCHEMA}{version}", "run": run, "header": plain(header)}


def components_record(step: int, components: Sequence[Component]) -> Record:
    """Returns the list of all components known at a step."""
    listed = [asdict(component) for component in components]
    return {"record": "components", "step": int(step), "components": listed}


def loss_record(losses: Sequence[tuple[int, float, float]]) -> Record:
    """Returns steps, losses and accuracies."""
    return {
        "record": "loss",
        "step": [step for step, _, _ in losses],
        "value": [number(value) for _, value, _ in losses],
        "accuracy": [number(accuracy) for _, _, accuracy in losses],
    }


def measurement_record(step: int, measurements: Sequence[Measurement], seconds: float) -> Record:
    """Returns the rows of a measurement as columns, and the names that they use."""
    names: dict[str, dict[str, int]] = {table: {} for table in TABLES}
    rows: dict[str, list[Any]] = {column: [] for column in COLUMNS}
    for row in measurements:
        estimate = row.estimate
        texts = (row.quantity, row.component, row.other, estimate.method, estimate.dtype)
        for (column, table), text in zip(TABLE_OF.items(), texts, strict=True):
            known = names[table]
            rows[column].append(-1 if text is None else known.setdefault(text, len(known)))
        rows["step"].append(int(row.step))
        rows["value"].append(number(estimate.value))
        rows["std_error"].append(_optional(estimate.std_error))
        rows["batch_std_error"].append(_optional(estimate.batch_std_error))
        rows["samples"].append(-1 if estimate.samples is None else int(estimate.samples))
    return {
        "record": "measurement",
        "step": int(step),
        "seconds": number(seconds),
        **{table: list(known) for table, known in names.items()},
        "rows": rows,
    }


def fact_record(fact: Fact) -> Record:
    """Returns a fact."""
    return {
        "record": "fact",
        "step": int(fact.step),
        "name": fact.name,
        "component": fact.component,
        "value": number(fact.value),
        "data": plain(fact.data),
    }


def event_record(event: Event) -> Record:
    """Returns an event."""
    data = plain(event.data)
    return {"record": "event", **asdict(event), "step": int(event.step), "data": data}


def end_record(exit_code: int | None, cost: Cost | None, lost_records: int) -> Record:
    """Returns how the run ended."""
    return {
        "record": "end",
        "exit_code": exit_code,
        "cost": None if cost is None else plain(asdict(cost)),
        "lost_records": lost_records,
    }


def thinned_record(thinned: Thinned) -> Record:
    """Returns what a long run has let go."""
    return {"record": "thinned", **plain(asdict(thinned))}


def number(value: float) -> float | str:
    """Returns a float, or the name of one that JSON does not have."""
    exact = float(value)
    if math.isfinite(exact):
        return exact
    return "NaN" if math.isnan(exact) else "Infinity" if exact > 0 else "-Infinity"


def _optional(value: float | None) -> float | str | None:
    return None if value is None else number(value)


def plain(value: Any) -> Any:
    """Returns what JSON can hold of ``value``; what it cannot hold (a device, a path), as text.

    NaN and the infinities become their names.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value)


# -- from records; what is damaged raises ValueError, TypeError, LookupError or OverflowError ------


def component_of(item: Record) -> Component:
    """Reads a component."""
    return Component(
        name=text(item["name"]),
        kind=text(item["kind"]),
        layer=text(item["layer"]),
        order=integer(item["order"]),
        parts=tuple(
            Part(
                parameter=text(part["parameter"]),
                dim=None if part["dim"] is None else integer(part["dim"]),
                start=integer(part["start"]),
                length=integer(part["length"]),
            )
            for part in item["parts"]
        ),
        elements=integer(item["elements"]),
    )


def fact_of(record: Record) -> Fact:
    """Reads a fact."""
    return Fact(
        step=integer(record["step"]),
        name=text(record["name"]),
        component=text(record["component"]),
        value=float(record["value"]),
        data=mapping(record["data"]),
    )


def event_of(record: Record) -> Event:
    """Reads an event."""
    return Event(
        step=integer(record["step"]),
        kind=text(record["kind"]),
        message=text(record["message"]),
        data=mapping(record["data"]),
    )


def ending_of(record: Record) -> Ending:
    """Reads how the run ended."""
    code, cost = record["exit_code"], record["cost"]
    return Ending(
        exit_code=None if code is None else integer(code),
        cost=None
        if cost is None
        else Cost(
            steps=integer(cost["steps"]),
            measurements=integer(cost["measurements"]),
            training_s=float(cost["training_s"]),
            monitoring_s=float(cost["monitoring_s"]),
            repairing_s=float(cost.get("repairing_s", 0.0)),
        ),
        lost_records=integer(record["lost_records"]),
    )


def thinned_of(record: Record) -> Thinned:
    """Reads what a long run has let go."""
    return Thinned(
        losses=integer(record["losses"]),
        measurements=integer(record["measurements"]),
        rows=integer(record["rows"]),
        seconds=float(record["seconds"]),
        notes=integer(record["notes"]),
        until=integer(record["until"]),
    )


def losses_of(record: Record) -> tuple[array[Any], ...]:
    """Reads steps, losses and accuracies."""
    columns = array("q", record["step"]), floats(record["value"]), floats(record["accuracy"])
    check_lengths(*columns)
    return columns


def rows_of(record: Record) -> tuple[dict[str, array[Any]], dict[str, list[str]]]:
    """Reads the rows of a measurement as columns, and the names that their codes point at."""
    names = {table: [text(name) for name in record[table]] for table in TABLES}
    rows: dict[str, array[Any]] = {
        column: floats(record["rows"][column])
        if code == "d"
        else array(code, record["rows"][column])
        for column, code in COLUMNS.items()
    }
    check_lengths(*rows.values())
    for column, table in TABLE_OF.items():
        lowest = -1 if column == "other" else 0
        if rows["step"] and not (
            lowest <= min(rows[column]) and max(rows[column]) < len(names[table])
        ):
            raise IndexError("a row points at a name that is not there")
    return rows, names


def floats(values: Any) -> array[float]:
    """Reads a column of floats; null and "NaN" are NaN."""
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1:
        raise ValueError("not a list of numbers")
    return array("d", column.tobytes())


def check_lengths(*columns: array[Any]) -> None:
    """Raises if columns are not of one length."""
    if len({len(column) for column in columns}) > 1:
        raise ValueError("columns of different lengths")


def integer(value: Any) -> int:
    """Reads a whole number of 64 bits."""
    if type(value) is not int:
        raise TypeError("not a whole number")
    if not -(2**63) <= value < 2**63:
        raise OverflowError("a whole number of more than 64 bits")
    return value


def text(value: Any) -> str:
    """Reads a text."""
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def mapping(value: Any) -> Data:
    """Reads a mapping."""
    if not isinstance(value, dict):
        raise TypeError("not a mapping")
    return value
