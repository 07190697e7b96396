"""The tables of ``docs/study.md``, from the rows of `paper_study` (see `tables`).

``python -m benchmarks.study_document NAME`` prints one of them; without a name, their names.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from benchmarks import paper_cases
from benchmarks.ablation_document import table
from benchmarks.study.claims import LAST, STRONGEST, claims, contradicts
from benchmarks.study.parts import ARMS, CHECKPOINTS, LOOP, NOISE_OF_INTERVENTION, PARTS
from benchmarks.study.settings import DISTILBERT, HAN, Setting, settings
from benchmarks.study.statistics import (
    Mean,
    Row,
    arm,
    block,
    by_seed,
    clear_sign,
    correlations,
    mean,
    pair,
    percent,
    rows,
    share,
)

WIDTH: Final = 100  # of a line of text
DOCUMENT: Final = Path(__file__).parents[1] / "docs" / "study.md"

# What the paper prints: Table 1, by the group here that it can only mean.
TRACES: Final[Mapping[str, Mapping[str, float]]] = {
    "han": {"word attention": -5.72, "sentence attention": 2.86},
    "video": {"spatial attention": 1.92, "temporal attention": 4.37, "cross attention": -2.11},
    "distilbert": {"q": -2.24, "k": 3.12, "out": 1.75},
}
EIGENVALUES: Final[Mapping[str, Mapping[str, str]]] = {
    "han": {
        "word attention": "-0.4186, -0.0007, 0.4493",
        "sentence attention": "-0.0007, 0.0061, 0.0387",
    },
    "video": {
        "spatial attention": "-0.0004, 0.0103, 0.0228",
        "temporal attention": "0.0095, 0.0222, 0.0583",
        "cross attention": "-0.2016, -0.0005, 0.1274",
    },
    "distilbert": {
        "q": "-0.1473, -0.0023, 0.0611",
        "k": "0.0049, 0.0150, 0.0483",
        "out": "-0.0006, 0.0150, 0.0483",
    },
}
# Table 2.
COUPLINGS: Final[Mapping[tuple[str, str], float]] = {
    ("W1", "W2"): 0.14,
    ("W1", "S1"): -0.51,
    ("W1", "S2"): -0.09,
    ("W2", "S1"): -0.68,
    ("W2", "S2"): 0.04,
    ("S1", "S2"): 0.08,
}
GRADIENT_OF_W2: Final = 1.25

ENDS: Final = ("lambda_min", "lambda_max")

PREDICTORS: Final[Mapping[str, str]] = {
    "coupling": "coupling norm",
    "along_gradients": "coupling along the gradients",
    "gradient_norm": "gradient norm of b",
    "distance": "nearness in the graph",
}
EFFECTS: Final[Mapping[str, str]] = {
    "gradient": "change of the gradient of b",
    "relative_gradient": "the same over its norm",
    "output": "relative change of what b gives",
}


def of_paper(found: Mapping[str, Mapping[str, object]], model: str, name: str) -> str:
    """Returns what the paper prints of a group; of DistilBERT it does not say which layer's."""
    own = found[model]
    key = name.rsplit(maxsplit=1)[-1] if model == DISTILBERT.name else name
    return str(own.get(key, ""))


def curvature_of(setting: Setting) -> str:
    """Trace, ends and extreme eigenvalues of every group at the end of training."""
    lines = []
    for name in (*setting.layers, *setting.matrices):
        at = [block(row, LAST, "curvature", name) for row in rows("measured", setting.name)]
        signs = [clear_sign(entry["trace"]) for entry in at]
        trace, *ends, extreme = _curvature(at)
        lines.append(
            [
                name,
                of_paper(TRACES, setting.name, name),
                trace,
                f"{signs.count(-1)} / {signs.count(0)} / {signs.count(1)}",
                *ends,
                of_paper(EIGENVALUES, setting.name, name),
                extreme,
            ]
        )
    head = ["group", "paper: trace", "trace", "seeds - / ? / +", "lambda_min", "lambda_max"]
    return table([*head, "paper: eigenvalues", "three of largest magnitude"], lines)


def _curvature(at: Sequence[Row]) -> list[str]:
    """Returns trace, lambda_min, lambda_max and the three of largest magnitude, over seeds."""
    extremes = zip(*(sorted(entry["extreme"]) for entry in at), strict=True)
    return [
        *(str(mean([e[name]["value"] for e in at])) for name in ("trace", *ENDS)),
        "; ".join(str(mean(values)) for values in extremes),
    ]


def checkpoints_of(setting: Setting) -> str:
    """The same at every checkpoint."""
    found = rows("measured", setting.name)
    lines = []
    for name in (*setting.layers, *setting.matrices):
        for at, done in enumerate(CHECKPOINTS):
            own = [block(row, at, "curvature", name) for row in found]
            lines.append([name, f"{done:.0%}", *_curvature(own)])
    head = ["group", "of training", "trace", "lambda_min", "lambda_max"]
    return table([*head, "three of largest magnitude"], lines)


def pyhessian_of(setting: Setting) -> str:
    """PyHessian's answers beside ours, on the same samples."""
    found = rows("measured", setting.name)
    lines = []
    for name in (*setting.layers, *setting.matrices):
        for at in range(len(CHECKPOINTS)):
            if not found[0]["checkpoints"][at]["pyhessian"]:
                continue  # it was not asked there
            ours = [block(row, at, "curvature", name) for row in found]
            theirs = [block(row, at, "pyhessian", name) for row in found]
            probes = sorted(entry["probes"] for entry in theirs)
            wrong = sum(contradicts(a["trace"], b) for a, b in zip(ours, theirs, strict=True))
            lines.append(
                [
                    name,
                    f"{CHECKPOINTS[at]:.0%}",
                    str(mean([entry["trace"]["value"] for entry in ours])),
                    str(mean([entry["trace"] for entry in theirs])),
                    f"{statistics.median(probes):g} ({probes[0]} to {probes[-1]})",
                    f"{wrong} of {len(found)}",
                    str(mean([max((e[x]["value"] for x in ENDS), key=abs) for e in ours])),
                    str(mean([entry["top"] for entry in theirs])),
                ]
            )
    head = ["group", "of training", "trace", "PyHessian's", "probes it took", "sign wrong"]
    return table([*head, "largest eigenvalue", "PyHessian's"], lines)


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


def traces() -> str:
    """How many of all traces have which sign, in words."""
    found = [
        clear_sign(entry["trace"])
        for setting in settings()
        for row in rows("measured", setting.name)
        for checkpoint in row["checkpoints"]
        for entry in checkpoint["curvature"]
    ]
    return _filled(
        f"Of {len(found)} traces of single seeds, at all checkpoints, {found.count(-1)} are "
        f"clearly negative, {found.count(1)} clearly positive, {found.count(0)} not told from zero."
    )


def pyhessian() -> str:
    """How many probes PyHessian takes where its first estimates are negative, in words."""
    probes: dict[bool, list[int]] = {True: [], False: []}
    wrong = of = 0
    for setting in settings():
        for row in rows("measured", setting.name):
            for at in range(len(CHECKPOINTS)):
                for theirs in row["checkpoints"][at]["pyhessian"]:
                    ours = block(row, at, "curvature", theirs["block"])["trace"]
                    probes[theirs["trace"] < 0].append(theirs["probes"])
                    wrong += contradicts(ours, theirs)
                    of += 1
    few = sum(count <= 3 for count in probes[True])
    return _filled(
        f"Of {of} traces that PyHessian 0.1 gave, {len(probes[True])} were negative, {few} of them "
        f"from two or three probes (median {statistics.median(probes[True]):g}; of the positive "
        f"ones {statistics.median(probes[False]):g}, of 100 at most). {wrong} have the wrong sign "
        "where ours is three errors of its probing from zero, on the same samples."
    )


def couplings(setting: Setting) -> str:
    """Norm, share and ratio of every pair at the end of training."""
    lines = []
    for names in setting.pairs:
        at = [
            pair(r["checkpoints"][LAST]["coupling"], names) for r in rows("measured", setting.name)
        ]
        ratios = [float(entry["ratio"]) for entry in at]
        beyond = sum(abs(value) > 1 for value in ratios)
        lines.append(
            [
                " x ".join(names),
                str(COUPLINGS.get(names, "")) if setting is HAN else "",
                str(mean([entry["norm"]["value"] for entry in at])),
                str(mean([entry["share"]["value"] for entry in at])),
                str(mean(ratios)),
                f"{beyond} of {len(ratios)}",
            ]
        )
    head = ["pair", "paper", "norm", "signed share", "ratio", "ratio beyond 1"]
    return table(head, lines)


def gradients() -> str:
    """Gradient norms of the four matrices of HAN at the checkpoints."""
    lines = []
    for name in HAN.matrices:
        cells = [name, str(GRADIENT_OF_W2) if name == "W2" else ""]
        for at in range(len(CHECKPOINTS)):
            cells.append(str(mean(_norms(name, at))))
        lines.append(cells)
    return table(["matrix", "paper", *(f"at {share:.0%}" for share in CHECKPOINTS)], lines)


def _norms(name: str, at: int) -> list[float]:
    return by_seed("measured", "han", lambda r: float(r["checkpoints"][at]["gradient_norms"][name]))


def perturbation(setting: Setting, when: str) -> str:
    """What noise in one layer changes, ``right_after`` it or ``at_the_end``, against the twin."""
    lines = []
    for layer, alpha in _arms_of(setting):
        if layer not in setting.disturbed:
            continue
        own, usual = _twins(setting, layer, alpha)
        states = [(a[when], b[when]) for a, b in zip(own, usual, strict=True)]

        def of_block(state: Row, what: str, layer: str = layer) -> float:
            entry = next(e for e in state["curvature"] if e["block"] == layer)
            return float(entry[what]["value"])

        def gradient(state: Row, layer: str = layer) -> float:
            return float(state["gradient_norms"][layer])

        pairs = [names for names in setting.pairs if layer in names]
        lines.append(
            [
                layer,
                f"{alpha:g}",
                str(mean([float(a["loss"]) - float(b["loss"]) for a, b in states])),
                _times([(gradient(a), gradient(b)) for a, b in states]),
                str(mean([of_block(a, "trace") - of_block(b, "trace") for a, b in states])),
                _times([(of_block(a, "lambda_max"), of_block(b, "lambda_max")) for a, b in states]),
                _times(
                    [(-of_block(a, "lambda_min"), -of_block(b, "lambda_min")) for a, b in states]
                ),
                "; ".join(
                    _times([(_norm(a, names), _norm(b, names)) for a, b in states])
                    for names in pairs
                ),
            ]
        )
    head = ["noise in", "alpha", "loss, +", "gradient norm, times", "trace, +"]
    return table([*head, "lambda_max, times", "-lambda_min, times", "coupling norm, times"], lines)


def _arms_of(setting: Setting) -> list[tuple[str, float]]:
    return [(a["layer"], a["alpha"]) for a in rows("perturbed", setting.name)[0]["arms"]]


def _twins(setting: Setting, layer: str, alpha: float) -> tuple[list[Row], list[Row]]:
    found = rows("perturbed", setting.name)
    own = [arm(row, layer=layer, alpha=alpha) for row in found]
    return own, [arm(row, layer="none") for row in found]


def _norm(state: Row, names: Sequence[str]) -> float:
    return float(pair(state["coupling"], names)["norm"]["value"])


def _times(pairs: Sequence[tuple[float, float]]) -> str:
    """Returns the geometric mean of ratios with its interval; empty where one has no ratio."""
    if any(a <= 0 or b <= 0 for a, b in pairs):
        return ""
    logs = mean([math.log(a / b) for a, b in pairs])
    return str(Mean(*(math.exp(v) for v in (logs.value, logs.low, logs.high)), logs.n))


def signs_after_noise() -> str:
    """How many seeds have a trace below, not told from, and above zero in the disturbed layer."""
    lines = []
    for setting in settings():
        for layer in setting.disturbed:
            for alpha in (0.0, *(a for name, a in _arms_of(setting) if name == layer)):
                arms = _twins(setting, layer if alpha else "none", alpha)[0]
                lines.append(
                    [
                        setting.title,
                        layer,
                        f"{alpha:g}",
                        *(_signs(arms, when, layer) for when in ("right_after", "at_the_end")),
                    ]
                )
    return table(
        ["model", "layer", "alpha", "right after - / ? / +", "at the end - / ? / +"], lines
    )


def _signs(arms: Sequence[Row], when: str, layer: str) -> str:
    blocks = (next(b for b in a[when]["curvature"] if b["block"] == layer) for a in arms)
    found = [clear_sign(entry["trace"]) for entry in blocks]
    return f"{found.count(-1)} / {found.count(0)} / {found.count(1)}"


def printed() -> str:
    """Returns the numbers that stand in the paper's text, beside ours."""
    noisy = {
        alpha: share([a["variability"] for a in _twins(HAN, layer, alpha)[0]])
        for layer, alpha in _arms_of(HAN)
        if layer == "word attention"
    }
    by_chance = share([a["variability"] for a in _twins(HAN, "another order", 0.0)[0]])
    lowered = share([arm(r, arm="group")["variability"] for r in rows("intervention", "han")])

    def ratio(name: str) -> str:
        own = (arm(row, arm=name) for row in rows("intervention", "han"))
        return str(mean([float(pair(a["coupling"], STRONGEST)["ratio"]) for a in own]))

    return table(
        ["number in the text", "paper", "here"],
        [
            ["gradient norm of W2", str(GRADIENT_OF_W2), str(mean(_norms("W2", LAST)))],
            ["predictions changed without noise", "5 %", f"{by_chance} % (another order)"],
            [
                "with noise in W1 and W2",
                "30 %",
                "; ".join(f"{told} % at alpha {alpha:g}" for alpha, told in noisy.items()),
            ],
            [f"with noise of {NOISE_OF_INTERVENTION:g} and a lower rate", "10 %", f"{lowered} %"],
            ["coupling of W2 and S1 after noise", "-0.68", f"{ratio('nothing')} (ratio)"],
            ["the same with a lower rate", "-0.41", f"{ratio('group')} (ratio)"],
        ],
    )


def variability() -> str:
    """How many predictions noise changes by the end, beside what changes without any."""
    lines = []
    for setting in settings():
        for layer, alpha in _arms_of(setting):
            own, usual = _twins(setting, layer, alpha)
            lost = [b["accuracy"] - a["accuracy"] for a, b in zip(own, usual, strict=True)]
            last = [a["changed_by_epoch"][-1] for a in own]
            lines.append(
                [
                    setting.title,
                    layer,
                    f"{alpha:g}" if layer in setting.disturbed else "",
                    share([a["variability"] for a in own]),
                    share(last),
                    percent(mean(lost)),
                ]
            )
    head = ["model", "noise in", "alpha", "predictions changed, %", "by the last epoch, %"]
    return table([*head, "accuracy lost, points"], lines)


def intervention(setting: Setting) -> str:
    """What a lower rate does after noise: on the group, on others, on all; and the repair loop."""
    found = rows("intervention", setting.name)
    names = STRONGEST if setting is HAN else setting.pairs[-1]
    lines = []
    for name in ARMS:
        own, nothing = ([arm(row, arm=a) for row in found] for a in (name, "nothing"))
        changed = [a["variability"] - b["variability"] for a, b in zip(own, nothing, strict=True)]
        coupled = [(abs(float(pair(a["coupling"], names)["ratio"])), _norm(a, names)) for a in own]
        lines.append(
            [
                name,
                share([a["variability"] for a in own]),
                "" if name == "nothing" else percent(mean(changed)),
                share([a["accuracy"] for a in own]),
                str(mean([ratio for ratio, _ in coupled])),
                str(mean([norm for _, norm in coupled])),
            ]
        )
    title = " x ".join(names)
    head = ["after noise", "predictions changed, %", "less nothing, points", "accuracy, %"]
    return table([*head, f"ratio of {title}, absolute", f"norm of {title}"], lines)


def loop() -> str:
    """What the repair loop found and did, in words."""
    lines = []
    for setting in settings():
        own = [arm(row, arm=LOOP) for row in rows("intervention", setting.name)]
        kept = [tuple(names) for a in own for names in a["kept"]]
        told = ", ".join(
            f"{' and '.join(names)} ({kept.count(names)})" for names in dict.fromkeys(kept)
        )
        faulty = sum(a["verdict"] == "faulty" for a in own)
        lines.append(
            f"* {setting.title}: called faulty in {faulty} of {len(own)} runs; tried "
            f"{sum(a['tried'] for a in own)} repairs, kept {len(kept)}{': ' if told else ''}{told}."
        )
    return "\n".join(lines)


def propagation() -> str:
    """How well each predictor orders the components by what reaches them."""
    lines = []
    for setting in settings():
        for effect, title in EFFECTS.items():
            own = {p: correlations(setting.name, effect, p) for p in PREDICTORS}
            cells = [str(mean(own[p])) for p in PREDICTORS]
            for rival in ("gradient_norm", "distance"):
                gaps = [a - b for a, b in zip(own["coupling"], own[rival], strict=True)]
                cells.append(str(mean(gaps)))
            lines.append([setting.title, title, *cells])
    head = ["model", "what is seen in b", *PREDICTORS.values()]
    return table([*head, "coupling - gradient norm", "coupling - nearness"], lines)


def trained() -> str:
    """How many runs there are, and how good they are."""
    lines = []
    for setting in settings():
        at = [row["checkpoints"][LAST] for row in rows("measured", setting.name)]
        steps = at[0]["step"]
        lines.append(
            [
                setting.title,
                str(len(at)),
                str(steps),
                share([c["accuracy"] for c in at]),
                str(setting.products),
                f"{sum(_minutes(setting.name, part) for part in PARTS):.0f}",
            ]
        )
    head = ["model", "seeds", "steps", "accuracy, %", "products for each number"]
    return table([*head, "CPU minutes a seed"], lines)


def _minutes(model: str, part: str) -> float:
    """Returns how long a part of a seed takes, in the middle."""
    return statistics.median(by_seed(part, model, lambda row: float(row["seconds"]))) / 60


def cost() -> str:
    """What it takes to make all of it again, in words."""
    seconds = sum(
        row["seconds"] for s in settings() for part in PARTS for row in rows(part, s.name)
    )
    return _filled(
        f"All of it is {seconds / 3600:.1f} CPU-hours, half of that on two cores "
        "(`python -m benchmarks.paper_study --fresh`); without `--fresh` only what is missing is "
        "made."
    )


def under_the_tool() -> str:
    """The cases' small forms under ``diagnoser run``."""
    told = json.loads(paper_cases.SUMMARY.read_text("utf-8"))
    lines = []
    for name, line in told.items():
        twins = f"{line['identical']} of {line['twins']}" if "twins" in line else ""
        right = f"{line['right']} of {line['of']} [{line['low']:.3f}, {line['high']:.3f}]"
        spread = line.get("accuracy")
        lines.append([name, right, twins, f"{spread[0]:.2f} to {spread[1]:.2f}" if spread else ""])
    return table(["form", "as it should be", "bit-identical", "accuracy"], lines)


def claimed() -> str:
    """What becomes of every claim."""
    lines = [[c.said, c.verdict, c.found] for c in claims()]
    return table(["the paper says", "here it", "what is found"], lines)


def _for(setting: Setting, make: Callable[[Setting], str]) -> Callable[[], str]:
    return lambda: make(setting)


BLOCKS: Final[Mapping[str, Callable[[], str]]] = {
    "claims": claimed,
    "study runs": trained,
    "study cost": cost,
    "traces in short": traces,
    "pyhessian in short": pyhessian,
    "printed": printed,
    "gradients": gradients,
    "signs after noise": signs_after_noise,
    "variability": variability,
    "repair loop": loop,
    "propagation": propagation,
    "under the tool": under_the_tool,
    **{f"curvature {s.name}": _for(s, curvature_of) for s in settings()},
    **{f"checkpoints {s.name}": _for(s, checkpoints_of) for s in settings()},
    **{f"pyhessian {s.name}": _for(s, pyhessian_of) for s in settings()},
    **{f"coupling {s.name}": _for(s, couplings) for s in settings()},
    **{
        f"noise {when} {s.name}".replace("_", " "): _for(
            s, lambda setting, when=when: perturbation(setting, when)
        )
        for s in settings()
        for when in ("right_after", "at_the_end")
    },
    **{f"intervention {s.name}": _for(s, intervention) for s in settings()},
}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", nargs="?", choices=BLOCKS)
    name = parser.parse_args().name
    print("\n".join(BLOCKS) if name is None else BLOCKS[name]())


if __name__ == "__main__":
    main()
