"""The tables of ``docs/curvature.md``, from the committed results (see `tables`)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import monitor_overhead

RESULTS = Path(__file__).parent / "results"
CHEAPER = 3.0  # how many times, summed over the components of a model, at N = 256
MANY = "256"
BOTH_ENDS = 3.0  # the same of both ends against one of PyHessian's


def load(name: str) -> Any:
    """Returns a committed result."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def cost() -> str:
    """How many times cheaper than PyHessian, all components of a model together."""
    lines = [
        "| model, N | trace alone | trace after ends (worst, median, best component) | "
        "trace and ends | both ends / its one | best kind | worst kind | "
        "memory: ours, PyHessian |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, section in load("curvature_cost.json")["sections"].items():
        groups = section["by_group"]
        total = groups["all"]
        kinds = {g: row["after_ends"]["fixed"] for g, row in groups.items() if g != "all"}
        best, worst = max(kinds, key=kinds.__getitem__), min(kinds, key=kinds.__getitem__)
        memory = section["memory"]
        lines.append(
            f"| {label(name)} | {total['alone']['fixed']:.1f} | "
            f"{total['after_ends']['fixed']:.1f} ({spread(total['after_ends'])}) | "
            f"{total['spectrum_ratio']:.1f} | "
            f"{total['ends']['ratio']:.2f} | {word(best)} {kinds[best]:.1f} | "
            f"{word(worst)} {kinds[worst]:.1f} | {over(memory, 'ours')}, "
            f"{over(memory, 'pyhessian')} |"
        )
    return "\n".join(lines)


def kinds() -> str:
    """The same for every kind of component."""
    sections = load("curvature_cost.json")["sections"]
    groups = sorted({g for s in sections.values() for g in s["by_group"]} - {"all"})
    lines = [
        "| model, N | " + " | ".join(word(g) for g in groups) + " |",
        "|---|" + "---|" * len(groups),
    ]
    for name, section in sections.items():
        cells = []
        for group in groups:
            row = section["by_group"].get(group)
            cells.append(
                ""
                if row is None
                else f"{row['alone']['fixed']:.1f}, {row['after_ends']['fixed']:.1f}, "
                f"{row['spectrum_ratio']:.1f}"
            )
        lines.append(f"| {label(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def products() -> str:
    """The cost of a product beside its floor, in gradients: medians over components of a kind."""
    lines = [
        "| model, N | kind | product | with a vector a sample | floor |",
        "|---|---|---|---|---|",
    ]
    for name, section in load("curvature_cost.json")["sections"].items():
        rows: dict[str, list[dict[str, Any]]] = {}
        for row in section["by_component"].values():
            rows.setdefault(row["group"], []).append(row["product_gradients"])
        for group, found in sorted(rows.items()):
            cells = [middle([row.get(key) for row in found])
                     for key in ("measured", "per_sample", "floor")]  # fmt: skip
            lines.append(f"| {label(name)} | {word(group)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def coupling() -> str:
    """Coupling norms of all pairs at eight columns a component."""
    lines = [
        "| model, N | pairs | gradients a column | rms error | stated error |",
        "|---|---|---|---|---|",
    ]
    for name, section in load("curvature_cost.json")["sections"].items():
        row = section["coupling"]
        error = row["relative_rms_error"]
        known = "not known" if error is None else f"{error:.1%}"
        lines.append(
            f"| {label(name)} | {row['pairs']} | {row['gradients_a_column']:.2f} | {known} | "
            f"{row['relative_std_error']:.1%} |"
        )
    return "\n".join(lines)


def scaling() -> str:
    """How a whole measurement grows."""
    lines = [
        "| layers | samples | words | components | gradients a component | of it shared |",
        "|---|---|---|---|---|---|",
    ]
    for row in load("curvature_cost.json")["scaling"]:
        shared = row["shared_gradients"] / row["components"]
        lines.append(
            f"| {row['layers']} | {row['samples']} | {row['length']} | {row['components']} | "
            f"{row['gradients_a_component']:.1f} | {shared:.1f} |"
        )
    return "\n".join(lines)


def base() -> str:
    """The largest model that was measured, in words."""
    row = load("curvature_cost.json")["distilbert_base"]
    return (
        f"DistilBERT-base ({row['parameters'] / 1e6:.0f} M parameters, {row['components']} "
        "components, 8 samples of 64 tokens): a trace and both ends of every component take "
        f"{row['traces_gradients'] + row['ends_gradients']:.0f} gradients of "
        f"{row['gradient_seconds']:.1f} s, at a peak of {row['peak_mb'] / 1024:.1f} GiB of memory "
        f"({row['gradient_peak_mb'] / 1024:.1f} for gradients alone)."
    )


def coverage() -> str:
    """Right and wrong signs, and how often intervals contain the truth."""
    lines = [
        "| kind, N | sign wrong | clear, undecided | probe set covered | population covered |",
        "|---|---|---|---|---|",
    ]
    for kind, sizes in load("trace_coverage.json")["kinds"].items():
        for samples, figures in sizes.items():
            sign = figures["settings"]["chosen, sign"]
            value = figures["settings"]["chosen, value"]
            cells = [
                share(sign["wrong"]),
                share(sign["undecided_clear"]),
                share(value["covers_probe_set"]),
                share(value["covers_population"]),
            ]
            lines.append(f"| {word(kind)}, {samples} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ends() -> str:
    """Products and errors of both ends, from random and from warm starts."""
    lines = [
        "| model | both ends: products, wrong | power iteration, one end | 1, 3, 10 steps later |",
        "|---|---|---|---|",
    ]
    for name, subject in load("lanczos_stopping.json")["subjects"].items():
        cold = subject["cold"]
        warm = ", ".join(f"{row['products']:.1f}" for row in subject.get("warm", {}).values())
        lines.append(
            f"| {word(name)} | {ends_of(cold['lean'])} | {ends_of(cold['power'])} | {warm} |"
        )
    return "\n".join(lines)


def ends_of(row: dict[str, Any]) -> str:
    """Returns products and the share of wrong ends."""
    wrong = f"{row['wrong_share']:.1%} {interval(row['wrong_interval'])}"
    return f"{row['products']:.1f}, {wrong}"


def outside() -> str:
    """How many cells of the coverage lie outside of what was aimed at, in words."""
    found = load("trace_coverage.json")
    settings = next(iter(next(iter(found["kinds"].values())).values()))["settings"]
    cells = len(found["kinds"]) * sum(
        1 + bool(row["covers_population"]["n"]) for row in settings.values()
    )
    said = []
    for samples, missed in found["misses"].items():
        shares = sorted(float(text.split()[-1]) for text in missed["coverage"])
        said.append(
            f"with {samples} samples {len(shares)} of {cells} lie outside, between "
            f"{shares[0]:.1%} and {shares[-1]:.1%}"
        )
    return f"Of all cells (every kind, setting and error), {'; '.join(said)}."


def tiers() -> str:
    """Training time and memory, watched over plain."""
    return monitor_overhead.table(load("monitor_overhead.json")["models"])


def missed() -> str:
    """What was aimed at and not reached, from the figures."""
    found = [*cost_misses(load("curvature_cost.json")), *load("monitor_overhead.json")["missed"]]
    return "\n".join(f"* {line}" for line in found) or "Nothing."


def cost_misses(found: dict[str, Any]) -> list[str]:
    """Returns the targets of cost that were missed, each with its figure."""
    lines = []
    for name, section in found["sections"].items():
        groups = section["by_group"]
        ratio = groups["all"]["after_ends"]["fixed"]
        if name.endswith(f"/{MANY}") and ratio < CHEAPER:
            lines.append(f"{label(name)}: traces are {ratio:.1f} times cheaper, not {CHEAPER:g}")
        for group, row in groups.items():
            for way, said in (("alone", "alone"), ("after_ends", "after its ends")):
                if group != "all" and row[way]["fixed"] < 1.0:
                    lines.append(
                        f"{label(name)}: the trace of {word(group)} components, {said}, is "
                        f"{1 / row[way]['fixed']:.2f} times as dear as PyHessian's; counting "
                        f"products only, {1 / row[way]['fixed_products_only']:.2f} times"
                    )
        ends = groups["all"]["ends"]["ratio"]
        if ends < BOTH_ENDS:
            lines.append(
                f"{label(name)}: both ends cost {1 / ends:.1f} times its one, not 1/{BOTH_ENDS:g}"
            )
    return lines


def spread(row: dict[str, Any]) -> str:
    """Returns the ratios of single components: the worst, the median, the best."""
    found = row["fixed_by_component"]
    return ", ".join(f"{found[key]:.1f}" for key in ("worst", "median", "best"))


def label(name: str) -> str:
    """Returns model and number of samples as they stand in a table."""
    return word(name).replace("/", ", ")


def word(name: str) -> str:
    """Returns a key in words."""
    return name.replace("_", " ")


def share(rate: dict[str, Any]) -> str:
    """Returns a share in percent with its interval, or that there is nothing to be one of."""
    if not rate["n"]:
        return "none"
    return f"{rate['share']:.1%} {interval(rate['interval'])}"


def interval(bounds: list[float]) -> str:
    """Returns a 95 % Wilson interval of a share, in percent."""
    return f"[{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


def over(memory: dict[str, Any], who: str) -> str:
    """Returns memory over that of a gradient."""
    value = memory.get(who, {}).get("over_gradient")
    return "not known" if value is None else f"{value:.1f}"


def middle(values: list[float | None]) -> str:
    """Returns the median of what is known."""
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.3g}" if known else ""


BLOCKS: dict[str, Callable[[], str]] = {
    "cost": cost,
    "kinds": kinds,
    "products": products,
    "coupling": coupling,
    "scaling": scaling,
    "base": base,
    "coverage": coverage,
    "outside": outside,
    "ends": ends,
    "tiers": tiers,
    "missed": missed,
}
