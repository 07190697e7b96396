"""The diagnosis as one self-contained HTML page: no network, no fonts, no libraries.

Python works out words, numbers and geometry; `page.html.j2` places them. Every name, message and
label passes `wording.visible` and then Jinja's automatic escaping; nothing is ever marked as safe.
The same diagnosis and data give the same bytes.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.errors import UsageError
from diagnoser.report import wording
from diagnoser.report.data import NO_UNIT, QUANTITIES, ReportComponent, ReportData
from diagnoser.report.drawing import (
    EXTREME,
    SCALES,
    HeatMap,
    Scale,
    column_ticks,
    heat_map,
    line_path,
    scale_of,
    step_ticks,
)
from diagnoser.table import Array
from diagnoser.types import Arm, Attempt, Diagnosis, Evidence, Finding
from diagnoser.vocabulary import CAUSE_CATEGORY, FAULTS, SEVERITIES, severity_rank

CHART: Final = (1000, 260)  # units of a large chart
SPARK: Final = (120, 26)  # units of a curve in the table
ROWS: Final = 300  # components in the table; the heat maps show all
CURVES: Final = 48, 6  # components that have curves there, and quantities
COLUMNS: Final = 300  # columns of a heat map; longer runs show every second, third ...
IMAGES: Final = 170_000  # bytes of all heat maps: a page of any run is mailed and opens at once
OPEN: Final = 7  # heat maps that are seen without unfolding the others
NAMED: Final = 60  # rows that are named one by one; more are thinner and named by layer
NAME: Final = 13.0  # pixels that a name needs from top to bottom
NUMBER: Final = 26.0  # pixels that a number needs from left to right
PAIRS: Final = 6  # strongest couplings listed beside the matrix
SOURCES: Final = 4  # findings that still hold after a repair, by name


@dataclass(frozen=True, slots=True)
class Flag:
    """The mark of a finding or a repair on a drawing, and the entry of the page it leads to.

    Places in [0, 1] from the left and the top; ``tone`` is a severity, or ``kept``.
    """

    label: str
    entry: str
    tone: str
    left: float
    top: float
    title: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A curve over steps with its axes and flags; ``words`` say what it shows."""

    title: str
    note: str
    words: str
    path: str
    rows: list[tuple[float, str]]
    columns: list[tuple[float, str]]
    flags: list[Flag]


@dataclass(frozen=True, slots=True)
class Layers:
    """How the rows of a heat map are named and parted; places in [0, 1] from the top.

    Either ``names`` has every row, or ``places`` the layers that have room for a name. A line of
    the path ``edges`` (in rows) stands between two layers, one of ``firsts`` is the row below it.
    """

    height: float
    names: list[str]
    places: list[tuple[float, str]]
    edges: str
    firsts: frozenset[int]


@dataclass(frozen=True, slots=True)
class Panel:
    """A heat map with what stands around it; ``words`` say what it shows."""

    title: str
    unit: str
    note: str
    words: str
    map: HeatMap
    layers: Layers
    columns: list[tuple[float, str]]
    rows: str  # JSON list of positions among the components, to read values back; empty: all
    column_names: str  # JSON list of steps, for the same; empty where columns are the rows
    labels: str  # of the codes, with bars between them
    flags: list[Flag]


@dataclass(frozen=True, slots=True)
class Gauge:
    """An observed value with two standard errors against its threshold, places in [0, 1]."""

    low: float
    observed: float
    high: float
    threshold: float


@dataclass(frozen=True, slots=True)
class Cell:
    """One quantity of one component: its last value, and its curve (empty without one)."""

    last: str
    path: str = ""
    words: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A component in the table; ``first`` where it begins a layer."""

    name: str
    kind: str
    layer: str
    order: int
    first: bool
    severity: str
    rank: int
    findings: list[int]
    cells: list[Cell]


@dataclass(frozen=True, slots=True)
class Compared:
    """A row of the table of one repair: before it, with it and without it, each value in words."""

    name: str
    note: str
    values: tuple[str, ...]


def render_report(diagnosis: Diagnosis, data: ReportData) -> str:
    """Returns the page; ``data`` may be empty in part, what is missing is left out or said."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("diagnoser", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda place: f"{100 * place:.2f}%"
    environment.filters["visible"] = wording.visible
    environment.filters["number"] = wording.number
    quantities = _ordered(data.quantities)
    coupling = _coupling(data)
    left = IMAGES - (len(coupling.map.image) if coupling else 0)
    panels = _panels(diagnosis, data, quantities, left)
    groups = wording.findings_by_cause(diagnosis)
    likely, possible = wording.likely_and_possible(groups)
    return environment.get_template("page.html.j2").render(
        diagnosis=diagnosis,
        words=wording,
        faults=FAULTS,
        categories=CAUSE_CATEGORY,
        likely=likely,
        possible=possible,
        unexplained=[k for cause, found in groups if cause is None for k, _ in found],
        story=sorted(enumerate(diagnosis.findings, start=1), key=lambda pair: pair[1].since_step),
        worst=max((f.severity for f in diagnosis.findings), key=severity_rank, default=""),
        gauge=_gauge,
        tried=wording.kept_first(diagnosis.repairs),
        kept=sum(attempt.kept for attempt in diagnosis.repairs),
        arms=_arms,
        compared=_compared,
        chart_size=CHART,
        spark_size=SPARK,
        charts=list(_charts(diagnosis, data)),
        components=json.dumps([_shown(component.name) for component in data.components]),
        panels=panels[:OPEN],
        folded=panels[OPEN:],
        coupling=coupling,
        pairs=_pairs(data),
        coupling_step=data.coupling_step,
        titles=[_title(name)[:2] for name in quantities[: CURVES[1]]],
        rows=_rows(diagnosis, data, quantities[: CURVES[1]]),
        left_out=max(len(data.components) - ROWS, 0),
        curves=CURVES[0],
        severities=SEVERITIES[::-1],
    )


def write_report(diagnosis: Diagnosis, data: ReportData, path: Path) -> None:
    """Writes the page to ``path``, which holds either the old page or the whole new one.

    Raises:
        UsageError: the place cannot be written.
    """
    page = render_report(diagnosis, data)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(page)
            Path(name).chmod(0o666 & ~_umask())  # mkstemp makes files that only the owner reads
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(
            f"cannot write the report to {wording.visible(str(path), limit=200)}: "
            f"{error.strerror or error}; choose another file with -o"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _shown(name: str) -> str:
    return wording.visible(name, limit=80)


def _title(quantity: str) -> tuple[str, str, str]:
    return QUANTITIES.get(quantity, (wording.visible(quantity).replace("_", " "), "", ""))


def _ordered(quantities: Mapping[str, Array]) -> list[str]:
    known = list(QUANTITIES)
    measured = [name for name, values in quantities.items() if np.isfinite(values).any()]
    return sorted(measured, key=lambda name: (known.index(name) if name in known else 99, name))


def _charts(diagnosis: Diagnosis, data: ReportData) -> Iterator[Chart]:
    """Yields the curves of the whole run, all of them over the same steps."""
    ends = [
        int(steps[k])
        for steps in (data.loss_steps, data.accuracy_steps)
        if len(steps)
        for k in (0, -1)
    ]
    if not ends:
        return
    span = min(ends), max(ends)
    flags = list(_step_flags(diagnosis, span))
    losses = data.loss_steps, data.loss_values
    if chart := _chart("training loss", "in units of the loss", *losses, span, flags):
        yield chart
    accuracies = data.accuracy_steps, data.accuracy_values
    if chart := _chart("accuracy", "share of what is judged", *accuracies, span, []):
        yield chart


def _chart(
    title: str,
    unit: str,
    steps: NDArray[np.int64],
    values: Array,
    span: tuple[int, int],
    flags: list[Flag],
) -> Chart | None:
    scale = scale_of(values)
    if scale is None:
        return None
    finite = np.isfinite(values)
    broken = steps[~finite]
    notes = [unit] if scale.kind == "linear" else [unit, SCALES[scale.kind]]
    if broken.size:
        where = f"{wording.count(len(broken), 'step')}, first at step {broken[0]}"
        notes.append(f"not finite at {where}")
    path = line_path(steps, values, scale, span=span, size=CHART, bins=500)
    words = _course(steps[finite], values[finite])
    return Chart(title, "; ".join(notes), words, path, scale.ticks(), step_ticks(span), flags)


def _course(steps: NDArray[np.int64], values: Array) -> str:
    """Returns in words what a curve of finite values shows."""
    places = {"From": 0, "to": -1, "lowest": int(values.argmin()), "highest": int(values.argmax())}
    start, end, low, high = (
        f"{word} {wording.number(float(values[k]))} at step {steps[k]}"
        for word, k in places.items()
    )
    return f"{start} {end}; {low}, {high}."


def _step_flags(diagnosis: Diagnosis, span: tuple[int, int]) -> Iterator[Flag]:
    """Yields a flag for each finding and kept repair; those that would cover others are stacked."""
    marks = [
        (finding.since_step, _flag(position, finding))
        for position, finding in enumerate(diagnosis.findings, start=1)
    ]
    for position, attempt in wording.kept_first(diagnosis.repairs):
        if attempt.kept:
            place = wording.subject(attempt.component)
            title = f"repair {position}: kept in {place}, at step {attempt.step}"
            flag = Flag(f"\N{CHECK MARK}{position}", f"repair-{position}", "kept", 0.0, 0.0, title)
            marks.append((attempt.step, flag))
    taken: list[float] = []
    for step, flag in marks:
        left = min(max((step - span[0]) / max(span[1] - span[0], 1), 0.0), 1.0)
        level = sum(abs(other - left) < 0.06 for other in taken)
        taken.append(left)
        yield replace(flag, left=left, top=min(0.13 * level, 0.9))


def _flag(position: int, finding: Finding, left: float = 0.0, top: float = 0.0) -> Flag:
    place = wording.subject(finding.component, finding.other)
    title = f"finding {position}: {finding.fault} in {place}, from step {finding.since_step}"
    return Flag(str(position), f"finding-{position}", finding.severity, left, top, title)


def _panels(
    diagnosis: Diagnosis, data: ReportData, quantities: list[str], size: int
) -> list[Panel]:
    """Draws all heat maps, with so many columns that their images take ``size`` bytes together."""
    columns = COLUMNS
    while True:
        panels = [_panel(diagnosis, data, name, columns) for name in quantities]
        taken = sum(len(panel.map.image) for panel in panels)
        if taken <= max(size, 0) or columns == 1:
            return panels
        columns = max(min(columns * size // taken, columns - 1), 1)


def _panel(diagnosis: Diagnosis, data: ReportData, quantity: str, most: int) -> Panel:
    """Draws the components that have the quantity at the steps at which any of them has."""
    measured = ~np.isnan(data.quantities[quantity])
    kept, columns = np.flatnonzero(measured.any(axis=1)), np.flatnonzero(measured.any(axis=0))
    values = data.quantities[quantity][np.ix_(kept, columns)]
    stride = -(-len(columns) // most)
    starts = np.arange(0, len(columns), stride)
    steps = data.steps[columns[starts]]
    infinite = np.logical_or.reduceat(np.isinf(values), starts, axis=1)
    drawn = heat_map(np.where(infinite, np.inf, values[:, starts]))
    title, unit, note = _title(quantity)
    notes = [note] if note else []
    if len(kept) < len(data.components):
        notes.append(f"{len(kept)} of {len(data.components)} components")
    if stride > 1:  # what is infinite must not fall between two that are shown
        any_of_them = ", infinite where any of them is" if infinite.any() else ""
        notes.append(f"1 of {stride} measurements{any_of_them}")
    names = [data.components[k].name for k in kept]
    where = [f"at step {step}" for step in data.steps[columns]]
    return Panel(
        title=title,
        unit=unit,
        note="; ".join([*notes, drawn.scale]),
        words=_extremes(values, names, where),
        map=drawn,
        layers=_layers([data.components[k] for k in kept], 22.0),
        columns=column_ticks(steps),
        rows=_positions(kept, data),
        column_names=json.dumps(steps.tolist(), separators=(",", ":")),
        labels="|".join(drawn.labels),
        flags=list(_cell_flags(diagnosis, steps, names)),
    )


def _positions(kept: NDArray[np.int64], data: ReportData) -> str:
    return "" if len(kept) == len(data.components) else json.dumps(kept.tolist())


def _layers(components: Sequence[ReportComponent], height: float) -> Layers:
    """Names rows of at most ``height`` pixels one by one, or layer by layer if they are many."""
    size = len(components)
    firsts = [k for k in range(size) if k == 0 or components[k].layer != components[k - 1].layer]
    grouped = 1 < len(firsts) < size
    edges = "".join(f"M0 {k}h1" for k in firsts[1:]) if grouped else ""
    below = frozenset(firsts[1:] if grouped else ())
    if size <= NAMED:
        named = [_shown(component.name) for component in components]
        return Layers(height if size <= 16 else 15.0, named, [], edges, below)
    row = max(3.0, 800 // size)
    if not grouped:
        firsts = list(range(size))
    places: list[tuple[float, str]] = []
    bottom = 0.0
    for first, last in itertools.pairwise([*firsts, size]):
        middle = row * (first + last) / 2
        if middle - NAME / 2 >= bottom:
            component = components[first]
            places.append((middle / (row * size), _shown(component.layer or component.name)))
            bottom = middle + NAME / 2
    return Layers(row, [], places, edges, below)


def _extremes(values: Array, rows: Sequence[str], columns: Sequence[str]) -> str:
    """Returns in words where a matrix is largest, smallest and infinite."""
    sentences = []
    finite = np.isfinite(values)
    if finite.any():
        for word, at in (
            ("Largest", np.where(finite, values, -np.inf).argmax()),
            ("smallest", np.where(finite, values, np.inf).argmin()),
        ):
            row, column = divmod(int(at), values.shape[1])
            value = wording.number(float(values[row, column]))
            sentences.append(f"{word} {value}: {_shown(rows[row])} {columns[column]}")
    infinite = np.argwhere(np.isinf(values))
    if len(infinite):
        row, column = infinite[infinite[:, 1].argmin()]
        cells = wording.count(len(infinite), "cell")
        sentences.append(f"infinite in {cells}, first {_shown(rows[row])} {columns[column]}")
    return f"{'; '.join(sentences)}."


def _cell_flags(diagnosis: Diagnosis, steps: NDArray[np.int64], names: list[str]) -> Iterator[Flag]:
    for position, finding in enumerate(diagnosis.findings, start=1):
        if finding.component in names:
            column = min(int(np.searchsorted(steps, finding.since_step)), len(steps) - 1)
            row = names.index(finding.component)
            left, top = (column + 0.5) / len(steps), (row + 0.5) / len(names)
            yield _flag(position, finding, left, top)


def _coupling(data: ReportData) -> Panel | None:
    if data.coupling is None:
        return None
    apart = np.where(np.eye(len(data.components), dtype=bool), np.nan, data.coupling)
    kept = np.flatnonzero(np.isfinite(apart).any(axis=1))
    if not kept.size:
        return None
    drawn = heat_map(data.coupling[np.ix_(kept, kept)], own_diagonal=True)
    names = [data.components[k].name for k in kept]
    missing = len(data.components) - len(kept)
    layers = _layers([data.components[k] for k in kept], 28.0)
    stride = math.ceil(NUMBER / layers.height)
    return Panel(
        title="coupling",
        unit=NO_UNIT,
        note="row with column, between -1 and 1" + (f"; {missing} not measured" if missing else ""),
        words=_extremes(apart[np.ix_(kept, kept)], names, [f"with {_shown(n)}" for n in names]),
        map=drawn,
        layers=layers,
        columns=[((k + 0.5) / len(names), str(k + 1)) for k in range(0, len(names), stride)],
        rows=_positions(kept, data),
        column_names="",
        labels="|".join(drawn.labels),
        flags=[],
    )


def _pairs(data: ReportData) -> list[tuple[str, str, float]]:
    """Returns the pairs with the largest absolute coupling, strongest first."""
    if data.coupling is None:
        return []
    rows, columns = np.triu_indices(len(data.components), k=1)
    values = data.coupling[rows, columns]
    ranked = [k for k in np.argsort(-np.abs(values), kind="stable") if np.isfinite(values[k])]
    return [
        (
            wording.visible(data.components[rows[k]].name),
            wording.visible(data.components[columns[k]].name),
            float(values[k]),
        )
        for k in ranked[:PAIRS]
    ]


def _rows(diagnosis: Diagnosis, data: ReportData, quantities: list[str]) -> list[Row]:
    """Returns the table of components in the model's order; those with findings are all in it."""
    found: dict[str, list[int]] = {}
    for position, finding in enumerate(diagnosis.findings, start=1):
        for name in {finding.component, finding.other} - {None}:
            found.setdefault(str(name), []).append(position)
    ranked = sorted(
        range(len(data.components)), key=lambda k: (data.components[k].name not in found, k)
    )
    drawn = set(ranked[: CURVES[0]])
    columns = {name: ~np.isnan(data.quantities[name]).all(axis=0) for name in quantities}
    rows: list[Row] = []
    for k in sorted(ranked[:ROWS]):
        component = data.components[k]
        positions = found.get(component.name, [])
        severities = [diagnosis.findings[position - 1].severity for position in positions]
        severity = max(severities, key=severity_rank, default="")
        cells = [
            _cell(data.steps[columns[name]], data.quantities[name][k, columns[name]], k in drawn)
            for name in quantities
        ]
        rows.append(
            Row(
                name=_shown(component.name),
                kind=component.kind,
                layer=_shown(component.layer),
                order=k,
                first=bool(rows) and component.layer != data.components[k - 1].layer,
                severity=severity,
                rank=severity_rank(severity) if severity else -1,
                findings=positions,
                cells=cells,
            )
        )
    return rows


def _cell(steps: NDArray[np.int64], values: Array, drawn: bool) -> Cell:
    """Returns the last value and, if it is to be drawn, the small curve that leads to it."""
    known = values[~np.isnan(values)]
    if not known.size:
        return Cell("")
    last = wording.number(float(known[-1]))
    scale = scale_of(values)
    if scale is None or not drawn:
        return Cell(last)
    span = int(steps[0]), int(steps[-1])
    path = line_path(steps, values, scale, span=span, size=SPARK, bins=20)
    start, low, high = (wording.number(float(v)) for v in (known[0], known.min(), known.max()))
    return Cell(last, path, f"from {start}, lowest {low}, highest {high}, last")


def _gauge(evidence: Evidence) -> Gauge | None:
    """Returns the drawing of one comparison, None where it would show nothing."""
    observed, threshold = evidence.observed, evidence.threshold
    error = 2 * (wording.total_error(evidence) or 0.0)
    ends = np.array([observed - error, observed, observed + error, threshold])
    low, high = float(ends.min()), float(ends.max())
    if not (np.abs(ends) < EXTREME).all() or high - low < 1 / EXTREME:
        return None
    if low > 1 / EXTREME and high / low > 10:
        scale = Scale("logarithmic", low / 1.5, high * 1.5)
    else:
        margin = 0.2 * (high - low)
        scale = Scale("linear", low - margin, high + margin)
    return Gauge(*(float(place) for place in scale.forward(ends)))


def _arms(attempt: Attempt) -> list[tuple[str, Arm | None]]:
    return [
        ("before", attempt.before),
        ("with the repair", attempt.after),
        ("without it", attempt.twin),
    ]


def _compared(attempt: Attempt) -> Iterator[Compared]:
    """Yields what was compared: the loss, the evidence of the finding, and what was found."""
    arms = [arm for _, arm in _arms(attempt)]
    losses = tuple("" if arm is None else wording.number(arm.loss) for arm in arms)
    yield Compared("loss", "mean over the steps", losses)
    measured = [
        {(e.feature, e.comparison, e.threshold): e for e in arm.evidence} if arm else {}
        for arm in arms
    ]
    for key in dict.fromkeys(key for by_key in measured for key in by_key):
        feature, comparison, threshold = key
        yield Compared(
            wording.visible(feature),
            f"fires if {comparison} {wording.number(threshold)}",
            tuple(_observed(by_key.get(key)) for by_key in measured),
        )
    yield Compared(
        "findings at the end",
        "medium or more severe",
        tuple("" if arm is None else _sources(arm.firing) for arm in arms),
    )


def _observed(evidence: Evidence | None) -> str:
    if evidence is None:
        return ""
    error = wording.total_error(evidence)
    spread = f" ± {wording.number(error, digits=2)}" if error else ""
    return f"{wording.number(evidence.observed)}{spread}"


def _sources(firing: Sequence[str]) -> str:
    named = [wording.visible(source) for source in firing[:SOURCES]]
    more = f" and {len(firing) - SOURCES} more" if len(firing) > SOURCES else ""
    return f"{', '.join(named)}{more}" if named else "none"
