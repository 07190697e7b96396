"""The results of ``docs/ablation.md``, from the committed result (see `tables`).

As long as the test subjects have not been opened there is none, and every block says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "ablation.json"
NOT_YET = "Not there yet: the test subjects have not been opened."
UNKNOWN = "not known"

Found = Mapping[str, Any]

CONFIGURATIONS = ("L", "LG", "LGA", "LGH", "LGAH", "H")
SHOWN = ("auroc", "recall", "macro_f1", "cause_top_1", "component_top_1", "component_top_3")
CONTRASTS = {
    "auroc": "detection (AUROC)",
    "macro_f1": "causes (macro-F1)",
    "component_top_1": "location (top 1)",
    "lead": "lead time (share of the run)",
}
# What the default budget hangs on.
DECISIVE = ("auroc", "macro_f1", "component_top_1")


def outcome(found: Found) -> str:
    """What came of the four questions, and what follows for the default, in words."""
    primary = found["primary"]
    lines = [f"* {CONTRASTS[name]}: {answer(primary.get(name))}" for name in CONTRASTS]
    if any(primary[name]["helps"] for name in DECISIVE if name in primary):
        follows = "Curvature stays in the default budget."
    else:
        follows = (
            "Curvature is measured only after an alarm of the other families (second stage): it "
            "helps neither detection nor causes nor location."
        )
    return "\n".join([counts(found["runs"]), "", *lines, "", follows])


def answer(contrast: Found | None) -> str:
    """Returns whether there is a benefit, with the interval either way."""
    if contrast is None:
        return "no answer, there is no run to tell by."
    said = "curvature helps" if contrast["helps"] else "no benefit found"
    return f"{said}, {gap(contrast['figure'])}, p {chance(contrast['p_holm'])} (Holm)."


def counts(runs: Found) -> str:
    """Returns how many runs were scored."""
    healthy = {name: count for name, count in runs.items() if name != "faulty"}
    sets = ", ".join(f"{count} of {name}" for name, count in healthy.items())
    return f"{runs.get('faulty', 0)} faulty runs and {sum(healthy.values())} healthy ones ({sets})."


def families(found: Found) -> str:
    """All configurations at whole runs."""
    rows = []
    for name in CONFIGURATIONS:
        figures = {figure["name"]: figure for figure in found["families"][name]["1.0"]}
        rows.append([name, *(valued(figures.get(shown)) for shown in SHOWN)])
    return table(["families", *(word(name) for name in SHOWN)], rows)


def prefixes(found: Found) -> str:
    """Detection by how much of a run was seen."""
    parts = sorted(found["families"]["LGAH"], key=float)
    rows = []
    for name in CONFIGURATIONS:
        by_part = found["families"][name]
        known = [{f["name"]: f for f in by_part.get(part, [])}.get("auroc") for part in parts]
        rows.append([name, *(valued(figure) for figure in known)])
    return table(["AUROC after", *(f"{100 * float(part):.0f} %" for part in parts)], rows)


def differences(found: Found) -> str:
    """Every contrast of families: on new subjects, new operators, new severities; by chance."""
    groups = {
        "LGAH - LGA, new subjects": found["primary"],
        "LGH - LG, new subjects": found["secondary"],
    }
    for split, parts in found["splits"].items():
        for pair in ("LGAH - LGA", "LGH - LG"):
            if pair in parts:
                groups[f"{pair}, {split}"] = parts[pair]
    groups["LGAH with H of other runs - LGA"] = found["permuted"]
    rows = [
        [name, *(cell(contrasts.get(column)) for column in CONTRASTS)]
        for name, contrasts in groups.items()
    ]
    return table(["contrast", *CONTRASTS.values()], rows)


def cell(contrast: Found | None) -> str:
    """Returns a difference as it stands in a table; bold where it is a benefit."""
    if contrast is None:
        return ""
    return f"**{gap(contrast['figure'])}**" if contrast["helps"] else gap(contrast["figure"])


def predicted(found: Found) -> str:
    """Whether curvature helps where it was predicted to, in words."""
    figure = found["prediction"]
    if figure is None:
        return "No operator of one of the two kinds was proven to do harm: there is no answer."
    held = "The prediction held" if figure["low"] > 0.0 else "The prediction was not confirmed"
    return (
        f"{held}: on operators for which curvature was predicted to help, the gain in AUROC is "
        f"{gap(figure)} larger than on those for which it was not."
    )


def claimed(found: Found) -> str:
    """The claim's own rules as classifiers, and the partner question."""
    rows = [[name, valued(f), str(f["n"]) if f else "0"] for name, f in found["claims"].items()]
    return table(["rule", "AUROC", "runs"], rows) + "\n\n" + partners(found["partners"])


def partners(found: Found) -> str:
    """How often coupling names the component that leaves next, in words."""
    if not found["n"]:
        return f"In none of {found['asked']} runs does another component leave its range later."
    return (
        f"Of {found['asked']} runs with a local fault, in {found['n']} another component leaves "
        f"its healthy range later. It is the one that is coupled most to the faulty one in "
        f"{rate(found['coupling'])}, the nearest one in {rate(found['order'])}, one at random in "
        f"{100 * found['chance']:.0f} %."
    )


def leaks(found: Found) -> str:
    """What must carry no information, with 99 % intervals."""
    rows = []
    for name, figure in found["leaks"].items():
        held = "" if figure is None else "yes" if figure["low"] <= 0.5 <= figure["high"] else "no"
        rows.append([name, valued(figure), held])
    return table(["control", "AUROC, 99 %", "holds 0.5"], rows)


def cost(found: Found) -> str:
    """What measuring took, medians over runs."""
    rows = [
        [name, UNKNOWN if seconds is None else f"{seconds:.3g}"]
        for name, seconds in found["cost"].items()
    ]
    return table(["median over runs", "seconds"], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Returns rows as a table."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def valued(figure: Found | None) -> str:
    """Returns a figure with its interval; nothing where there is none."""
    if figure is None:
        return ""
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def gap(figure: Found) -> str:
    """Returns a difference with its interval."""
    return f"{figure['value']:+.3f} [{figure['low']:+.3f}, {figure['high']:+.3f}]"


def rate(share: list[float]) -> str:
    """Returns a share and its interval, in percent."""
    value, low, high = (100 * number for number in share)
    return f"{value:.0f} % [{low:.0f}, {high:.0f}]"


def chance(p: float) -> str:
    """Returns a p value; one that is too small for its draws is said to be so."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def word(name: str) -> str:
    """Returns a figure's name in words.

    >>> word("component_top_1"), word("auroc")
    ('component top 1', 'AUROC')
    """
    return "AUROC" if name == "auroc" else name.replace("_", " ").replace("f1", "F1")


def block(make: Callable[[Found], str], path: Path = RESULT) -> Callable[[], str]:
    """Returns what makes a block of the result, or says that there is none yet."""

    def made() -> str:
        if not path.exists():
            return NOT_YET
        return make(json.loads(path.read_text(encoding="utf-8")))

    return made


PARTS: Mapping[str, Callable[[Found], str]] = {
    "outcome": outcome,
    "families": families,
    "prefixes": prefixes,
    "differences": differences,
    "predicted": predicted,
    "claimed": claimed,
    "leaks": leaks,
    "ablation cost": cost,
}
BLOCKS: Mapping[str, Callable[[], str]] = {name: block(make) for name, make in PARTS.items()}
