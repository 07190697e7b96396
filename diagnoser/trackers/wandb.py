"""Weights & Biases: the script's present run.

A run counts its own steps by what is logged to it. So ours is never committed: it goes into the row
that the script logs next, with the step as we count it beside it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

from diagnoser.trackers.tracker import COLUMNS, PREFIX, Said, Tracker

MODULES: Final = ("wandb",)
STEP: Final = f"{PREFIX}/step"


def find() -> Any:
    """Returns the run, which is told once what our numbers are drawn over."""
    run = sys.modules["wandb"].run
    if run is not None:
        run.define_metric(STEP, hidden=True)
        run.define_metric(f"{PREFIX}/*", step_metric=STEP)
    return run


def is_open(run: Any) -> bool:
    """Whether it is still the present run."""
    return sys.modules["wandb"].run is run


def scalars(run: Any, step: int, values: Mapping[str, float]) -> None:
    """Adds to the row that the script logs next."""
    run.log({STEP: step, **values}, commit=False)


def findings(run: Any, step: int, said: Said) -> None:
    """Adds a table, and sets what the list of runs shows."""
    del step
    table = sys.modules["wandb"].Table(columns=list(COLUMNS), data=[list(row) for row in said.rows])
    run.log({f"{PREFIX}/findings": table}, commit=False)
    run.summary[f"{PREFIX}/verdict"] = said.verdict
    run.summary[f"{PREFIX}/reason"] = said.reason


def before_end(run: Any, call: Callable[[], None]) -> Callable[[], None]:
    """A run that is finished takes nothing more, and scripts finish theirs before they end."""
    name = "_finish" if hasattr(run, "_finish") else "finish"  # the first serves `with`, too
    original = getattr(run, name)

    @functools.wraps(original)
    def finish(*args: Any, **kwargs: Any) -> Any:
        call()
        return original(*args, **kwargs)

    setattr(run, name, finish)

    def undo() -> None:
        if vars(run).get(name) is finish:
            delattr(run, name)

    return undo


TRACKER: Final = Tracker("W&B", MODULES, find, is_open, scalars, findings, before_end=before_end)
