"""Renders the tables of all documents from the committed results: ``python -m benchmarks.tables``.

Each block of a document between ``<!-- name -->`` and ``<!-- /name -->`` is made here (or in
the module of the document) and nowhere else; a test holds the files against the results.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import (
    ablation_document,
    benchmark_document,
    curvature_document,
    difference_document,
    first_fault,
    repair_document,
    reproductions_document,
    rules_document,
    scores_document,
    study_document,
)

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
WIDTH = 100  # of a line of text
SMALL_MS = 30  # of a step; below it the budget is a time a step
RESULTS = ROOT / "benchmarks" / "results"


def _json(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _rate(rate: dict[str, Any] | None) -> str:
    if rate is None:
        return ""
    return f"{rate['count']}/{rate['of']} [{rate['low']:.2f}, {rate['high']:.2f}]"


MEASURED = ("called faulty", "cause in top 3", "component first", "AutoTrainer")


def evidence() -> str:
    """Right and wrong diagnoses on two scripts, of healthy and of faulty runs, as a table."""
    summary = _summary()
    healthy, faulty = summary["healthy"], summary["all faults"]
    rows = [
        ["healthy", _rate(healthy["alarmed"]), "", "", _rate(healthy["autotrainer"])],
        ["faulty", *_rates(faulty)],
    ]
    return ablation_document.table(["runs", *MEASURED], rows)


def by_fault() -> str:
    """The same fault by fault, with its harm, measured apart."""
    harm = _json("subject_harm.json")
    rows = []
    for name, line in _summary().items():
        subject, _, fault = name.partition(": ")
        if fault and "faulty" in line:
            found = harm[subject]["faults"][fault]
            lost = f"{found['mean_loss']:+.2f} ({found['harm']})"
            rows.append([name.replace("_", " "), *_rates(line), lost])
    return ablation_document.table(["runs", *MEASURED, "accuracy lost"], rows)


def _summary() -> dict[str, Any]:
    return {line["runs"]: line for line in _json("first_slice.json")["summary"]}


def _rates(line: Mapping[str, Any]) -> list[str]:
    names = ("faulty", "cause_in_top_3", "component_first", "autotrainer")
    return [_rate(line[name]) for name in names]


def overhead() -> str:
    """What watching costs, as a table."""
    lines = [
        "| loop | ms a step | watched / plain (range) | control | us a step unguaranteed |",
        "|---|---|---|---|---|",
    ]
    for name, row in _json("overhead.json").items():
        ratio = f"{row['ratio_median']:.3f} ({row['ratio'][0]:.3f} to {row['ratio'][-1]:.3f})"
        small = row["plain_ms_a_step"] < SMALL_MS
        rest = f"{row['us_a_step_unguaranteed_median']:.0f}" if small else ""
        control = row["control_ratio"]
        between = f"{control[0]:.2f} to {control[-1]:.2f}"
        ms = f"{row['plain_ms_a_step']:.1f}"
        label = f"{name.replace('_', ' ')}, {row['steps']} steps"
        lines.append(f"| {label} | {ms} | {ratio} | {between} | {rest} |")
    return "\n".join(lines)


def example() -> str:
    """A diagnosis as it was printed."""
    return _printed((RESULTS / "example_diagnosis.txt").read_text(encoding="utf-8"))


def first() -> str:
    """What is printed of the first script with a fault, as far as a newcomer needs it."""
    page = first_fault.FIRST.read_text(encoding="utf-8")
    return _printed(page[: page.index("\nchecked and fine")])


def rate() -> str:
    """The whole page on a learning rate that is too high."""
    return _printed(first_fault.RATE.read_text(encoding="utf-8"))


def _printed(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


def newcomer() -> str:
    """How long the first diagnosis takes who has nothing yet, in words."""
    found = _json("newcomer.json")
    demo, own = (found[way]["first_diagnosis_s"] / 60 for way in ("demo", "own_script"))
    return textwrap.fill(
        f"On {found['cores']} cores it takes {own:.1f} minutes from nothing to this diagnosis, "
        f"with the clone, a new environment and torch, and {demo:.1f} to the first one of "
        "`make demo` (`python -m benchmarks.newcomer`).",
        WIDTH,
    )


DOCUMENTS: dict[Path, Mapping[str, Callable[[], str]]] = {
    README: {
        "example": example,
        "held out": scores_document.summary,
        "repairs": repair_document.in_short,
        "real faults": reproductions_document.summary,
        "overhead": overhead,
    },
    ROOT / "docs" / "start.md": {"first fault": first, "newcomer": newcomer},
    ROOT / "docs" / "reading.md": {"rate too high": rate},
    ROOT / "docs" / "measuring.md": {"overhead": overhead},
    ROOT / "docs" / "curvature.md": curvature_document.BLOCKS,
    ROOT / "docs" / "ablation.md": ablation_document.BLOCKS,
    ROOT / "docs" / "benchmark.md": benchmark_document.BLOCKS,
    difference_document.DOCUMENT: difference_document.BLOCKS,
    reproductions_document.DOCUMENT: reproductions_document.BLOCKS,
    repair_document.DOCUMENT: repair_document.BLOCKS,
    rules_document.DOCUMENT: rules_document.BLOCKS,
    study_document.DOCUMENT: study_document.BLOCKS,
    ROOT / "docs" / "scores.md": {
        **scores_document.BLOCKS,
        "evidence": evidence,
        "two scripts": by_fault,
    },
}


def rendered(text: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """Returns a document with every block made anew."""
    for name, make in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text)
    return text


def main() -> None:
    """Writes the documents anew."""
    for path, blocks in DOCUMENTS.items():
        path.write_text(rendered(path.read_text(encoding="utf-8"), blocks), encoding="utf-8")


if __name__ == "__main__":
    main()
