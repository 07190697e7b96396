"""Recordings made by hand: the features and the diagnosis are tested on what they must say of them.

Measurements are made at every fifth step; a None is not measured there, a NaN is recorded as such.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from diagnoser.runlog import Recording, RecordingBuilder

EVERY = 5

Values = Sequence[float | None]
Series = Mapping[str, Mapping[str, Values]]  # quantity, component ("a - b": a pair), its values
Components = Mapping[str, tuple[str, str, int]]  # name: kind, layer, elements; in the model's order


def made_recording(
    components: Components,
    series: Series,
    losses: Sequence[float] = (),
    accuracies: Sequence[float] = (),
    *,
    std_error: float | None = 0.0,
    batch_std_error: float | None = None,
    facts: Sequence[tuple[str, str, int]] = (),
    ended: bool = False,
) -> Recording:
    """Returns a recording; ``facts`` are (name, file, line)."""
    builder = RecordingBuilder({"run": "made", "header": {}})
    listed = [
        {
            "name": name,
            "kind": kind,
            "layer": layer,
            "order": order,
            "elements": elements,
            "parts": [{"parameter": f"{name}.weight", "dim": None, "start": 0, "length": 0}],
        }
        for order, (name, (kind, layer, elements)) in enumerate(components.items())
    ]
    builder.add({"record": "components", "components": listed})
    for name, file, line in facts:
        place = {"file": file, "line": line}
        fact = {"step": 0, "name": name, "component": "model", "value": 1.0, "data": place}
        builder.add({"record": "fact", **fact})
    builder.add(
        {
            "record": "loss",
            "step": list(range(len(losses))),
            "value": list(losses),
            "accuracy": list(accuracies) or [math.nan] * len(losses),
        }
    )
    length = max((len(v) for of in series.values() for v in of.values()), default=0)
    for k in range(length):
        rows = [
            (quantity, *(*place.split(" - "), None)[:2], values[k])
            for quantity, of in series.items()
            for place, values in of.items()
            if k < len(values) and values[k] is not None
        ]
        names = list(dict.fromkeys(n for _, a, b, _ in rows for n in (a, b) if n is not None))
        quantities = list(dict.fromkeys(row[0] for row in rows))
        columns = {
            "step": [EVERY * k] * len(rows),
            "quantity": [quantities.index(row[0]) for row in rows],
            "component": [names.index(row[1]) for row in rows],
            "other": [-1 if row[2] is None else names.index(row[2]) for row in rows],
            "value": [row[3] for row in rows],
            "std_error": [std_error] * len(rows),
            "batch_std_error": [batch_std_error] * len(rows),
            "samples": [-1] * len(rows),
            "method": [0] * len(rows),
            "dtype": [0] * len(rows),
        }
        tables = {"quantities": quantities, "components": names}
        tables |= {"methods": ["exact"], "dtypes": ["float64"]}
        record = {"record": "measurement", "step": EVERY * k, "seconds": 0.001}
        builder.add({**record, **tables, "rows": columns})
    if ended:
        builder.add({"record": "end", "exit_code": 0, "cost": None, "lost_records": 0})
    return builder.recording()
