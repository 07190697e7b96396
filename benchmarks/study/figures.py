"""The figures of ``docs/study.md``: the loss along random directions, as the paper's Fig. 2."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib.figure import Figure

from benchmarks.study.measure import ALPHAS
from benchmarks.study.settings import Setting, settings
from benchmarks.study.statistics import mean, rows

FOLDER: Final = Path(__file__).parents[2] / "docs" / "figures"
KINDS: Final = {"raw": "raw directions", "normalised": "as long as the weights, row by row"}
# Dark blue, vermilion and so on: told apart by all eyes (Okabe and Ito 2008), and by their dashes.
STYLES: Final = (
    ("#0072b2", "-"),
    ("#d55e00", "--"),
    ("#009e73", "-."),
    ("#56b4e9", "-"),
    ("#e69f00", "--"),
    ("#cc79a7", "-."),
)


def path_of(setting: Setting) -> Path:
    """Where the figure of a model stands."""
    return FOLDER / f"study_{setting.name}.svg"


def rise(row: Any, name: str, kind: str) -> list[float]:
    """Returns how far the loss is above that at alpha = 0, mean of the directions of one seed."""
    curves = [r["losses"] for r in row["landscape"] if (r["block"], r["kind"]) == (name, kind)]
    middle = ALPHAS.index(0.0)
    return [
        sum(float(curve[i]) - float(curve[middle]) for curve in curves) / len(curves)
        for i in range(len(ALPHAS))
    ]


def figure(setting: Setting) -> str:
    """Returns the figure of a model as SVG: a panel for each kind of direction.

    Lines are means over seeds of the mean over directions, bands their 95 % intervals.
    """
    found = rows("measured", setting.name)
    with matplotlib.rc_context({"svg.hashsalt": setting.name, "svg.fonttype": "none"}):
        drawing = Figure(figsize=(9.0, 3.4), layout="constrained")
        for axes, (kind, title) in zip(drawing.subplots(1, 2), KINDS.items(), strict=True):
            for name, (colour, dashes) in zip(setting.pictured, STYLES, strict=False):
                curves = [rise(row, name, kind) for row in found]
                means = [mean(values) for values in zip(*curves, strict=True)]
                axes.plot(ALPHAS, [m.value for m in means], dashes, color=colour, label=name)
                low, high = [m.low for m in means], [m.high for m in means]
                axes.fill_between(ALPHAS, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.set(title=f"{setting.title}: {title}", xlabel="alpha", ylabel="rise of the loss")
            axes.set_xticks([-1.0, -0.5, 0.0, 0.5, 1.0])
            axes.axhline(0.0, color="#888888", linewidth=0.6)
            axes.legend(frameon=False, fontsize="small")
        file = io.StringIO()
        drawing.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def main() -> None:
    """Writes all figures."""
    FOLDER.mkdir(exist_ok=True)
    for setting in settings():
        path_of(setting).write_text(figure(setting), encoding="utf-8")


if __name__ == "__main__":
    main()
