"""Healthy scripts of many architectures (``cases/controls``): is anything said to be wrong?

``python -m benchmarks.controls watch --lot first``
    trains each under ``diagnoser run``, keeps what it says and prints the alarms. With ``--once``
    the runs are kept where no later run overwrites them, as the first look at a lot.

Finished runs are kept, see `reproductions_runs`; ``docs/reproductions.md`` counts them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict

from benchmarks.reproductions import LOTS, Lot, read_as, read_draw
from benchmarks.reproductions_runs import (
    CONTROLS,
    HEALTHY,
    Row,
    check_first_look,
    complete,
    current,
    digest_of_code,
    read_rows,
    watch,
    watched_path,
)
from diagnoser.rules.loading import Text

KIND: Final = "controls"
SEEDS: Final = 3


class Control(BaseModel):
    """What is known of a healthy script; its name is that of both files."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    number: int
    title: Text
    reference: Text
    lot: Lot
    baseline: float
    odd: Text


def load(folder: Path = CONTROLS) -> dict[str, Control]:
    """Returns all scripts by name.

    Raises:
        RuleError: A file is missing, or holds something else; the text says which and where.
    """
    drawn = read_draw(folder / "LOT")
    found = {}
    for name in sorted({path.stem for path in folder.glob("c[0-9]*")}):
        document, control = read_as(folder / f"{name}.yaml", Control)
        if not name.startswith(f"c{control.number:02d}_"):
            raise document.error(("number",), f"number: {name} is not of {control.number}")
        if drawn.get(control.number) != control.lot:
            raise document.error(("lot",), f"lot: LOT draws it as {drawn.get(control.number)}")
        found[name] = control
    return found


def read(lot: str, *, once: bool = False) -> tuple[dict[str, Control], list[Row]]:
    """Returns the scripts of a lot and their watched runs, of the code now or the first look."""
    known = {name: control for name, control in load().items() if control.lot == lot}
    return known, current(read_rows(watched_path(lot, KIND, once=once)), known)


def main() -> None:
    """Carries out a command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    watching = commands.add_parser("watch", help="run all scripts under the tool")
    watching.add_argument("--lot", choices=LOTS, required=True)
    watching.add_argument("--only", metavar="NAME", help="this script alone, such as c17")
    watching.add_argument("--seeds", type=int, default=SEEDS, help=f"default {SEEDS}")
    watching.add_argument("--jobs", type=int, default=1, help="runs at a time")
    watching.add_argument("--once", action="store_true", help="keep them as the first look")
    arguments = parser.parse_args()
    lot, once = arguments.lot, arguments.once
    known = {name: control for name, control in load().items() if control.lot == lot}
    names = [n for n in known if arguments.only is None or n.startswith(arguments.only)]
    path, code = watched_path(lot, KIND, once=once), digest_of_code()
    if once:
        check_first_look(path, code)
    complete(path, names, arguments.seeds, watch, forms=HEALTHY, jobs=arguments.jobs, code=code)
    for row in current(read_rows(path), names):
        said = ", ".join(f"{f['source']} in {f['component']}" for f in row["findings"])
        other = "" if row["same_output"] else "WATCHING CHANGED THE OUTPUT"
        learnt = "" if is_learnt(row, known[row["script"]]) else "DOES NOT LEARN"
        print(row["script"], row["seed"], row["verdict"], said, other, learnt, sep="  ")


def is_learnt(row: Row, control: Control) -> bool:
    """Whether a run is better than the best constant answer."""
    return row["metric"] is not None and row["metric"] > control.baseline


if __name__ == "__main__":
    main()
