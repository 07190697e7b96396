"""The tables of ``docs/reproductions.md``, from the kept runs and ``harm.json`` (see `tables`).

As long as nothing of a lot was watched there are none, and every block says so.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks import controls, odd_controls
from benchmarks.ablation_document import table
from benchmarks.reproductions import HARM, Lot, Reproduction, load
from benchmarks.reproductions_runs import (
    DEFAULTPLUSPLUS,
    PUBLISHED,
    ROOT,
    Row,
    current,
    read_rows,
    watched_path,
)
from diagnoser.benchmark.harm import OK
from diagnoser.benchmark.intervals import wilson
from diagnoser.classifier import to_blame

DOCUMENT: Final = ROOT / "docs" / "reproductions.md"
NOT_YET: Final = "Not there yet: nothing of this lot has been watched."
TOP: Final = 3


@dataclass(frozen=True, slots=True)
class Look:
    """Watched runs of a lot: of the code now, or of the first look at it."""

    title: str
    lot: Lot
    once: bool


LOOKS: Final[Mapping[str, Look]] = {
    "first": Look("first lot", "first", once=False),
    "second": Look("second lot, judged once", "second", once=True),
    "mended": Look("second lot, mended since", "second", once=False),
    "third": Look("third lot, judged once", "third", once=True),
    "third-mended": Look("third lot, mended since", "third", once=False),
    "fourth": Look("fourth lot, judged once", "fourth", once=True),
}


@dataclass(frozen=True, slots=True)
class Share:
    """A share of runs: the mean of the scripts' shares, with a 95 % interval over scripts."""

    value: float
    low: float
    high: float
    scripts: int
    runs: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}], {self.scripts}"


def share(hits: Mapping[str, Sequence[bool]]) -> Share | None:
    """Returns the share of hits in the runs of each script; None without a run.

    Seeds of a script resemble each other, so a script is one observation: Wilson's interval for as
    many observations as there are scripts.
    """
    means = [statistics.fmean(own) for own in hits.values() if own]
    if not means:
        return None
    low, high = wilson(sum(means), len(means))
    runs = sum(map(len, hits.values()))
    return Share(statistics.fmean(means), low, high, len(means), runs)


def causes_of(row: Row) -> list[str]:
    """Returns the causes that a run is said to have, each once, likeliest first."""
    return list(dict.fromkeys(cause for cause, _ in row["causes"]))


def is_caused(row: Row, causes: Collection[str], top: int) -> bool:
    """Whether a right cause is among the first."""
    return any(cause in causes for cause in causes_of(row)[:top])


def is_placed(row: Row, expected: Reproduction) -> bool:
    """Whether the place is right.

    The place is the component of the first cause that is right or, without one, of the first
    finding; it is right where it is an accepted one or a part of one.
    """
    named = [component for cause, component in row["causes"] if cause in expected.causes]
    named += [finding["component"] for finding in row["findings"][:1]]
    return bool(named) and to_blame(named[0], expected.components)


def is_faulty(expected: Reproduction, harm: Mapping[str, Any] | None) -> bool:
    """Whether a script's faulty form ought to be called faulty: proven harm, or a defect."""
    return expected.defect or (harm is not None and harm["harm"] == "proven")


def shares(
    known: Mapping[str, Reproduction], harms: Mapping[str, Row], rows: Iterable[Row]
) -> dict[str, Share | None]:
    """Returns all figures by name; those of causes and places whatever the verdict was."""
    kept = list(rows)
    asked = {name for name, expected in known.items() if is_faulty(expected, harms.get(name))}
    placed = {name for name in asked if known[name].components}

    def of(names: Collection[str], form: str, hit: Callable[[Row], bool]) -> Share | None:
        found: dict[str, list[bool]] = {}
        for row in kept:
            if row["form"] == form and row["script"] in names:
                found.setdefault(row["script"], []).append(hit(row))
        return share(found)

    def caused(row: Row, top: int) -> bool:
        return is_caused(row, known[row["script"]].causes, top)

    return {
        "called faulty": of(asked, "faulty", _is_alarm),
        "right cause first": of(asked, "faulty", functools.partial(caused, top=1)),
        f"right cause in top {TOP}": of(asked, "faulty", functools.partial(caused, top=TOP)),
        "right place": of(placed, "faulty", lambda row: is_placed(row, known[row["script"]])),
        "false alarms": of(known, "fixed", _is_alarm),
    }


def _is_alarm(row: Row) -> bool:
    return bool(row["verdict"] == "faulty")


def read(look: str) -> tuple[dict[str, Reproduction], dict[str, Row], list[Row]]:
    """Returns the scripts of a lot, the harm of all, and the watched runs of these scripts."""
    lot, once = LOOKS[look].lot, LOOKS[look].once
    known = {name: expected for name, expected in load()[0].items() if expected.lot == lot}
    harms = json.loads(HARM.read_text(encoding="utf-8")) if HARM.exists() else {}
    return known, harms, current(read_rows(watched_path(lot, once=once)), known)


def figures(looks: Iterable[str] = LOOKS) -> str:
    """How often the diagnosis is right, a column a look at a lot, and what it was counted on."""
    columns: dict[str, dict[str, Share | None]] = {}
    notes = []
    for look in looks:
        known, harms, rows = read(look)
        title = LOOKS[look].title
        if not rows:
            notes.append(f"The {title}: {NOT_YET[0].lower()}{NOT_YET[1:]}")
            continue
        columns[title] = shares(known, harms, rows)
        notes.append(counted(title, known, harms, rows))
    lines = []
    if columns:
        names = next(iter(columns.values()))
        cells = [[name, *(str(own[name] or "") for own in columns.values())] for name in names]
        lines = [table(["", *columns], cells), ""]
    return "\n".join([*lines, *(f"* {note}" for note in notes)])


def judges(look: str) -> str:
    """The same figures for every judge of the same logs, in the same order of names."""
    known, harms, rows = read(look)
    if not rows:
        return NOT_YET
    by_judge = {"diagnoser": rows}
    for family in PUBLISHED:
        own = [{**row, **row["others"][family]} for row in rows if family in row["others"]]
        by_judge[family] = own
    lines = []
    for name, own in by_judge.items():
        found = shares(known, harms, own)
        lines.append([name, *(str(figure or "") for figure in found.values())])
    return table(["judge", *shares(known, harms, rows)], lines)


def defaultplusplus() -> str:
    """What DEFault++ says of the scripts that it accepts, and the diagnosis of the same ones."""
    rows = read_rows(DEFAULTPLUSPLUS)
    if not rows:
        return NOT_YET
    known: dict[str, Reproduction] = {}
    harms: dict[str, Row] = {}
    ours: list[Row] = []
    for look in ("first", "second", "third", "fourth"):
        lot, harms, watched = read(look)
        known |= lot
        ours += watched
    theirs = current(rows, known)
    broken = {row["script"] for row in theirs if row["status"] != OK}
    accepted = {row["script"] for row in theirs} - broken
    chosen = {name: known[name] for name in sorted(accepted)}
    judged = {"DEFault++ 0.4.1": theirs, "diagnoser": ours}
    found = {
        judge: shares(chosen, harms, [row for row in own if row["script"] in accepted])
        for judge, own in judged.items()
    }
    head = [name for name in next(iter(found.values())) if name != "right place"]  # it names none
    lines = [[judge, *(str(own[name] or "") for name in head)] for judge, own in found.items()]
    numbers = ", ".join(str(known[name].row) for name in sorted(accepted))
    text = f"It accepts {len(accepted)} scripts, rows {numbers}"
    reasons = {row["script"]: row["reason"] for row in theirs if row["script"] in broken}
    if reasons:
        text += "; not " + "; ".join(
            f"{known[name].row} ({_plain(reason)})" for name, reason in sorted(reasons.items())
        )
    return f"{text}.\n\n{table(['judge', *head], lines)}"


def counted(
    title: str, known: Mapping[str, Reproduction], harms: Mapping[str, Row], rows: Sequence[Row]
) -> str:
    """Says what the figures of a look were counted on, in words."""
    watched = {row["script"] for row in rows}
    neither = [name for name in sorted(watched) if not is_faulty(known[name], harms.get(name))]
    same = sum(row["same_output"] for row in rows)
    cost = statistics.median(row["cpu_s"] / row["plain_cpu_s"] for row in rows)
    text = (
        f"The {title}: {len(rows)} runs of {len(watched)} scripts, judged by code {_codes(rows)}. "
    )
    if neither:
        rows_left = ", ".join(str(known[name].row) for name in neither)
        text += (
            f"Of {len(neither)} (rows {rows_left}) only the fixed runs count: the mistake is "
            "neither proven to do harm nor a defect. "
        )
    return text + (
        f"{same} runs printed what they print unwatched; watched, a run takes {cost:.2f} times the "
        "CPU seconds (median, with the start of Python)."
    )


def _codes(rows: Iterable[Row]) -> str:
    return ", ".join(f"`{code}`" for code in sorted({row["code"] for row in rows}))


def scripts(look: str) -> str:
    """What is said of every script of a lot."""
    known, harms, rows = read(look)
    if not rows:
        return NOT_YET
    lines = []
    for name, expected in sorted(known.items(), key=lambda item: item[1].row):
        own = sorted((row for row in rows if row["script"] == name), key=lambda row: row["seed"])
        faulty = [row for row in own if row["form"] == "faulty"]
        fixed = [row for row in own if row["form"] == "fixed"]
        placed = [is_placed(row, expected) for row in faulty] if expected.components else []
        lines.append(
            [
                str(expected.row),
                _plain(expected.title),
                _plain(expected.reference),
                _harm_of(expected, harms.get(name)),
                _verdicts(faulty),
                _first_causes(faulty[0], expected) if faulty else "",
                _count([is_caused(row, expected.causes, TOP) for row in faulty]),
                _count(placed),
                _verdicts(fixed),
            ]
        )
    head = ["row", "mistake", "reference", "harm", "faulty runs", "causes of the first seed"]
    return table([*head, f"cause in top {TOP}", "place", "fixed runs"], lines)


def _harm_of(expected: Reproduction, harm: Mapping[str, Any] | None) -> str:
    said = harm["harm"] if harm is not None else "not judged"
    gap = harm["gap"] if harm is not None else None
    return said + (f" ({gap:+.2g})" if gap is not None else "") + ", defect" * expected.defect


def _verdicts(rows: Sequence[Row]) -> str:
    return ", ".join(f"{n} {verdict}" for verdict, n in Counter(r["verdict"] for r in rows).items())


def _first_causes(row: Row, expected: Reproduction) -> str:
    """The first causes, those that are right in bold."""
    components = dict(reversed(row["causes"]))
    said = [f"{cause} in {components[cause]}" for cause in causes_of(row)[:TOP]]
    right = [cause in expected.causes for cause in causes_of(row)[:TOP]]
    words = map(_plain, said)
    return "; ".join(f"**{w}**" if ok else w for w, ok in zip(words, right, strict=True))


def _count(hits: Sequence[bool]) -> str:
    return f"{sum(hits)} of {len(hits)}" if hits else ""


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{c}" if c in "\\|*_`<[" else c for c in " ".join(text.split()))


def healthy() -> str:
    """How often healthy scripts are called faulty, a line a look at a lot, a column a judge."""
    lines = []
    for look in LOOKS.values():
        known, rows = controls.read(look.lot, once=look.once)
        if not rows:
            continue
        learnt = sum(controls.is_learnt(row, known[row["script"]]) for row in rows)
        by_judge = [_alarms_by_script(known, rows, family) for family in ("", *PUBLISHED)]
        shown = [str(share(found) or "") for found in by_judge]
        lines.append([look.title, _codes(rows), f"{learnt} of {len(rows)}", *shown])
    head = ["healthy scripts", "code", "runs that learn", "diagnoser", *PUBLISHED]
    return table(head, lines) if lines else NOT_YET


def alarms() -> str:
    """Which healthy scripts are called faulty, and what is said of them."""
    lines = []
    for look in LOOKS.values():
        known, rows = controls.read(look.lot, once=look.once)
        for name, control in known.items():
            own = [r for r in rows if r["script"] == name and controls.is_learnt(r, control)]
            alarmed = [row for row in own if _is_alarm(row)]
            if alarmed:
                said = [f"{f['source']} in {f['component']}" for f in alarmed[0]["findings"]]
                lines.append(
                    [
                        look.title,
                        str(control.number),
                        _plain(control.title),
                        f"{len(alarmed)} of {len(own)}",
                        _plain("; ".join(said[:TOP])),
                    ]
                )
    head = ["healthy scripts", "number", "what it is", "called faulty", "first findings"]
    return table(head, lines) if lines else "None."


def odd() -> str:
    """How often controls of the fault benchmark are called faulty, a line a set."""
    if not odd_controls.KEPT.exists():
        return NOT_YET
    rows = json.loads(odd_controls.KEPT.read_text(encoding="utf-8"))
    lines = []
    for name in (*odd_controls.SETS, "both"):
        own = [row for row in rows if name in (row["set"], "both")]
        alarms: dict[str, list[bool]] = {}
        for row in own:
            alarms.setdefault(f"{row['subject']} {row['control']}", []).append(_is_alarm(row))
        said = Counter(
            source
            for row in own
            if _is_alarm(row)
            for source in {_source(f) for f in row["findings"]}
        )
        words = ", ".join(f"{source} in {n}" for source, n in sorted(said.items()))
        lines.append([name, str(len(own)), str(share(alarms)), words])
    return table(["controls", "runs", "called faulty", "alarms, by what raised them"], lines)


def _source(finding: str) -> str:
    return finding.partition(" in ")[0]


def summary() -> str:
    """What came of the lots that were judged once."""
    looks = {look: read(look) for look in ("second", "third", "fourth")}
    found = {look: shares(*of) for look, of in looks.items()}
    alarms = {look: _alarms_by_script(*controls.read(look, once=True)) for look in looks}
    if not all(rows for *_, rows in looks.values()) or not all(alarms.values()):
        return NOT_YET
    lines = [
        [words, *(str(own[name] or "") for own in found.values())]
        for words, name in {
            "faults called faulty": "called faulty",
            "right cause first": "right cause first",
            "repaired scripts called faulty": "false alarms",
        }.items()
    ]
    lines.append(["healthy scripts called faulty", *(str(share(own)) for own in alarms.values())])
    return table(["share [95 %], scripts", *(f"{look} lot" for look in looks)], lines)


def _alarms_by_script(
    known: Mapping[str, controls.Control], rows: Iterable[Row], family: str = ""
) -> dict[str, list[bool]]:
    """Whether each run that learns is called faulty, by script."""
    found: dict[str, list[bool]] = {}
    for row in rows:
        judged = row["others"].get(family) if family else row
        if judged is not None and controls.is_learnt(row, known[row["script"]]):
            found.setdefault(row["script"], []).append(_is_alarm(judged))
    return found


BLOCKS: Final[Mapping[str, Callable[[], str]]] = {
    "figures": figures,
    "healthy": healthy,
    "alarms": alarms,
    "odd": odd,
    "defaultplusplus": defaultplusplus,
    **{f"{look} judges": functools.partial(judges, look) for look in LOOKS},
    **{f"{look} scripts": functools.partial(scripts, look) for look in LOOKS},
}
