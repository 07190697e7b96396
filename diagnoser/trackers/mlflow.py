"""MLflow: the run that is active in the script; it takes what is said after its end, too."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Final

from diagnoser.trackers.tracker import PREFIX, Said, Tracker

MODULES: Final = ("mlflow",)
MOST_METRICS: Final = 1000  # of one request, by the REST API
TAG_LENGTH: Final = 5000  # characters of a tag's value, the same


def _mlflow() -> Any:
    return sys.modules["mlflow"]


def find() -> Any:
    """Returns a client and the id of the active run."""
    run = _mlflow().active_run()
    return None if run is None else (_mlflow().MlflowClient(), run.info.run_id)


def is_open(place: Any) -> bool:
    """Whether it is still the active run."""
    run = _mlflow().active_run()
    return run is not None and run.info.run_id == place[1]


def scalars(place: Any, step: int, values: Mapping[str, float]) -> None:
    """Adds one point a metric."""
    client, run = place
    metric = _mlflow().entities.Metric
    now = int(time.time() * 1000)
    rows = [metric(name, value, now, step) for name, value in values.items()]
    for first in range(0, len(rows), MOST_METRICS):
        client.log_batch(run, metrics=rows[first : first + MOST_METRICS])


def findings(place: Any, step: int, said: Said) -> None:
    """Sets tags that runs can be searched by, and keeps the text as an artifact."""
    del step
    client, run = place
    tags = {
        "verdict": said.verdict,
        "faults": ", ".join(dict.fromkeys(f"{row[1]} in {row[2]}" for row in said.rows)),
        "causes": ", ".join(dict.fromkeys(row[4].partition(", ")[0] for row in said.rows)),
    }
    for name, text in tags.items():
        client.set_tag(run, f"{PREFIX}.{name}", text[:TAG_LENGTH])
    client.log_text(run, said.markdown(), f"{PREFIX}/findings.md")


TRACKER: Final = Tracker("MLflow", MODULES, find, is_open, scalars, findings)
