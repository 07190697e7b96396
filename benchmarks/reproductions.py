"""Faults that people really had (``cases/reproductions``): do they do harm, and are they found?

``python -m benchmarks.reproductions harm``
    trains every script with its mistake and with the thread's fix, twelve seeds each, unmonitored,
    and judges the pairs by the protocol of `diagnoser.benchmark.harm`; Holm's correction is over
    the scripts of a lot. Writes ``cases/reproductions/harm.json``.
``python -m benchmarks.reproductions watch --lot first``
    trains both forms under ``diagnoser run`` and keeps what it says, and whether the script printed
    what it prints by itself; with ``--once`` where no later run overwrites it, as the first look.
``python -m benchmarks.reproductions score --lot first``
    counts that (`reproductions_document`), prints it and writes ``docs/reproductions.md``.

Finished runs are kept and not made again unless the script changed or, of watched ones, the code
that judges (`reproductions_runs`). What was stopped goes on when it is given again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.reproductions_runs import (
    FOLDER,
    FORMS,
    RUNS,
    Row,
    check_first_look,
    complete,
    current,
    digest_of_code,
    read_rows,
    train,
    watch,
    watched_path,
)
from diagnoser.benchmark.harm import (
    OK,
    Harm,
    Judged,
    holm,
    is_proven,
    judge,
    worst_rank,
)
from diagnoser.benchmark.results import write_whole
from diagnoser.errors import DiagnoserError, RuleError
from diagnoser.rules.loading import CauseName, Text
from diagnoser.rules.strict_yaml import Document, read_document

HARM: Final = FOLDER / "harm.json"
Lot = Literal["first", "second", "third", "fourth"]
LOTS: Final[tuple[Lot, ...]] = get_args(Lot)
PAIRS: Final = 12
Model = TypeVar("Model", bound=BaseModel)
FLOOR: Final = (0.02, True)  # of the mean of the fixed runs: a smaller loss of score is no harm


class Reproduction(BaseModel):
    """What a right diagnosis of a script says; its name is that of both files."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    row: int
    title: Text
    reference: Text
    thread: Text
    lot: Lot
    causes: Annotated[list[CauseName], Field(min_length=1)]
    components: list[Text]
    defect: bool


def load(folder: Path = FOLDER) -> tuple[dict[str, Reproduction], list[str]]:
    """Returns all scripts with what is expected of them by name, and what is wrong, a line each."""
    names = {path.stem for path in folder.glob("r[0-9]*.py")}
    names |= {path.stem for path in folder.glob("*.yaml")}
    found: dict[str, Reproduction] = {}
    problems: list[str] = []
    drawn = read_draw(folder / "LOT")
    for name in sorted(names):
        try:
            found[name] = _read(folder, name, drawn)
        except RuleError as error:
            problems.append(str(error))
    return found, problems


def _read(folder: Path, name: str, drawn: Mapping[int, Lot]) -> Reproduction:
    document, read = read_as(folder / f"{name}.yaml", Reproduction)
    if not name.startswith(f"r{read.row:02d}_"):
        raise document.error(("row",), f"row: the file of row {read.row} is r{read.row:02d}_*.yaml")
    if drawn.get(read.row) != read.lot:
        raise document.error(("lot",), f"lot: LOT draws row {read.row} as {drawn.get(read.row)}")
    return read


def read_as(path: Path, kind: type[Model]) -> tuple[Document, Model]:
    """Returns the file beside a script, and what is in it.

    Raises:
        RuleError: One of both is missing, or something else is in it; the text says where.
    """
    for absent in (path, path.with_suffix(".py")):
        if not absent.exists():
            raise RuleError(f"{absent}: missing; a script and its .yaml go together")
    document = read_document(path)
    try:
        found = kind.model_validate(document.data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise document.error(first["loc"], f"{place}: {first['msg']}") from None
    return document, found


def read_draw(path: Path) -> dict[int, Lot]:
    """Returns the lot that each row is of."""
    lines = [line.partition(":") for line in path.read_text(encoding="utf-8").splitlines()]
    parts = {head: rest.split() for head, _, rest in lines}
    return {int(row): lot for lot in LOTS for row in parts.get(lot, ())}


# -- harm ------------------------------------------------------------------------------------------


def judge_all(known: Mapping[str, Reproduction], rows: Iterable[Row]) -> dict[str, Harm]:
    """Returns the harm of every script of which there are runs, by name.

    A script is judged like a subject with one mistake, since the metrics of two scripts have no
    common scale; p values are then corrected over all scripts of the lot.
    """
    runs: dict[str, list[Row]] = {}
    for row in rows:
        if row["seed"] < PAIRS:
            runs.setdefault(row["script"], []).append(row)
    found: dict[str, Harm] = {}
    for lot in LOTS:
        raw: dict[str, Harm] = {}
        for name in sorted(name for name in runs if known[name].lot == lot):
            entry = Judged(*FORMS, name, "", "fault", "", "", "", "", tuple(range(PAIRS)))
            [harm] = judge([entry], _as_judged(runs[name]), {name: FLOOR})
            lost = [row for row in runs[name] if row["form"] == "faulty" and row["metric"] is None]
            raw[name] = dataclasses.replace(harm, diverged=len(lost))
        adjusted = holm({name: h.p for name, h in raw.items() if not math.isnan(h.p)})
        for name, h in raw.items():
            p = adjusted.get(name, math.nan)
            proven = is_proven(p, h.cohen_d, h.gap, h.margin)
            # What is proven alone and not among the others is neither equivalent nor not worse.
            verdict = "ambiguous" if h.harm == "proven" and not proven else h.harm
            found[name] = dataclasses.replace(h, harm=verdict, p_holm=p)
    return dict(sorted(found.items()))


def _as_judged(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Returns the runs of a script by form, as `judge` reads them.

    A run without a metric gets the worst rank, as far below the others as where they are all the
    same: within one script they may be so near each other that their range would be no harm. For
    the losses stands all that the script printed.
    """
    known = [row["metric"] for row in rows if row["metric"] is not None]
    worst = min(worst_rank(known), worst_rank([min(known)])) if known else math.nan
    found: dict[str, list[Row]] = {form: [] for form in FORMS}
    for row in rows:
        found[row["form"]].append(
            {
                "seed": row["seed"],
                "status": row["status"] if known else "no run has a metric",
                "score": worst if row["metric"] is None else row["metric"],
                "diverged": False,
                "loss_alarm": False,
                **dict.fromkeys(("loss", "area", "last_loss"), row["output"]),
            }
        )
    return found


def summarised(found: Mapping[str, Harm]) -> dict[str, Row]:
    """Returns verdicts as ``harm.json`` has them."""
    return {
        name: {
            "harm": h.harm,
            "pairs": h.pairs,
            "diverged": h.diverged,
            "fixed_mean": _number(h.clean_score),
            "faulty_mean": _number(h.score),
            "gap": _number(h.gap),
            "margin": _number(h.margin),
            "p": _number(h.p),
            "p_holm": _number(h.p_holm),
            "d": _number(h.cohen_d),
        }
        for name, h in found.items()
    }


def _number(value: float) -> float | str | None:
    if math.isfinite(value):
        return float(f"{value:.5g}")
    return None if math.isnan(value) else str(value)


# -- commands --------------------------------------------------------------------------------------


def main() -> None:
    """Carries out a command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    harm = commands.add_parser("harm", help="prove which faults do harm")
    watching = commands.add_parser("watch", help="run all scripts under the tool")
    scoring = commands.add_parser("score", help="count how often it is right")
    for command in (watching, scoring):
        command.add_argument("--lot", choices=(*LOTS, "all"), required=True)
    for command, seeds, jobs in ((harm, PAIRS, 2), (watching, 3, 1)):
        command.add_argument("--only", metavar="NAME", help="this script alone, such as r17")
        command.add_argument("--seeds", type=int, default=seeds, help=f"default {seeds}")
        command.add_argument("--jobs", type=int, default=jobs, help="runs at a time")
    watching.add_argument("--again", action="store_true", help="also the runs that are kept")
    watching.add_argument("--once", action="store_true", help="keep them as the first look")
    harm.set_defaults(command=_harm)
    watching.set_defaults(command=_watch)
    scoring.set_defaults(command=_score)
    arguments = parser.parse_args()
    known, problems = load()
    for problem in problems:
        print(problem, file=sys.stderr)
    try:
        arguments.command(arguments, known)
    except DiagnoserError as error:
        raise SystemExit(str(error)) from None


def _chosen(known: Mapping[str, Reproduction], only: str | None) -> list[str]:
    names = [n for n in known if only is None or n == only or n.startswith(f"{only}_")]
    if only is not None and not names:
        raise SystemExit(f"no script {only} here; there are {', '.join(known) or 'none'}")
    return names


def _lots(lot: str) -> tuple[str, ...]:
    return LOTS if lot == "all" else (lot,)


def _harm(arguments: argparse.Namespace, known: Mapping[str, Reproduction]) -> None:
    names = _chosen(known, arguments.only)
    complete(RUNS, names, arguments.seeds, train, jobs=arguments.jobs)
    rows = current(read_rows(RUNS), known)
    for row in rows:
        if row["script"] in names and (row["status"] != OK or row["exit_code"]):
            what = row["error"] or f"exit code {row['exit_code']}, {row['status']}"
            print(f"{row['script']} {row['form']} seed {row['seed']}: {what}", file=sys.stderr)
    found = summarised(judge_all(known, rows))
    for name in names:
        print(name, *(f"{key} {value}" for key, value in found[name].items()), sep="  ")
    write_whole(HARM, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())


def _watch(arguments: argparse.Namespace, known: Mapping[str, Reproduction]) -> None:
    lots = _lots(arguments.lot)
    names = _chosen({n: r for n, r in known.items() if r.lot in lots}, arguments.only)
    for lot in lots:
        own = [name for name in names if known[name].lot == lot]
        path, code = watched_path(lot, once=arguments.once), digest_of_code()
        if arguments.once:
            check_first_look(path, code)
        complete(
            path, own, arguments.seeds, watch, jobs=arguments.jobs, code=code, again=arguments.again
        )
        for row in current(read_rows(path), own):
            said = ", ".join(f"{cause} in {component}" for cause, component in row["causes"][:3])
            other = "" if row["same_output"] else "WATCHING CHANGED THE OUTPUT"
            print(row["script"], row["form"], row["seed"], row["verdict"], said, other, sep="  ")


def _score(arguments: argparse.Namespace, _: Mapping[str, Reproduction]) -> None:
    from benchmarks import reproductions_document, tables

    for name, look in reproductions_document.LOOKS.items():
        if look.lot in _lots(arguments.lot):
            print(reproductions_document.figures([name]))
            print(f"\n{reproductions_document.scripts(name)}\n")
    path = reproductions_document.DOCUMENT
    text = tables.rendered(path.read_text(encoding="utf-8"), reproductions_document.BLOCKS)
    write_whole(path, text.encode())


if __name__ == "__main__":
    main()
