"""What the paper claims, one by one, and what becomes of it here.

A claim has parts: that a mean over seeds, or of differences between runs of the same seed, is on
the side that the paper says, with its whole interval; it may as well be on the other side, or on
both. A claim holds where all parts do, does not hold where none does, and holds in part else.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.study.figures import rise
from benchmarks.study.parts import CHECKPOINTS, NOISE_OF_INTERVENTION
from benchmarks.study.settings import DISTILBERT, HAN, VIDEO, Setting, settings
from benchmarks.study.statistics import (
    Mean,
    Row,
    arm,
    block,
    by_seed,
    correlations,
    mean,
    pair,
    percent,
    rows,
    share,
)

LAST: Final = len(CHECKPOINTS) - 1
FRAGILE: Final[Mapping[str, str]] = {
    HAN.name: "word attention",
    VIDEO.name: "cross attention",
    DISTILBERT.name: "last q",
}
RIVALS: Final[Mapping[str, tuple[str, ...]]] = {
    HAN.name: ("sentence attention",),
    VIDEO.name: ("spatial attention", "temporal attention"),
    DISTILBERT.name: ("last k", "last out"),
}
STRONGEST: Final = ("W2", "S1")
EFFECTS: Final = ("gradient", "relative_gradient", "output")
ERROR: Final = 0.01  # that the paper says PyHessian has at most
CERTAIN: Final = 3.0  # errors of probing between a trace and zero, for its sign to be certain
UNTOLD: Final = "cannot be tested"


@dataclass(frozen=True, slots=True)
class Claim:
    """What the paper says, what is found, and what becomes of each part; without: untestable.

    Of a part: 1 as the paper says, -1 the other way, 0 neither for certain.
    """

    said: str
    found: str
    parts: Sequence[int] = ()

    @property
    def verdict(self) -> str:
        """What becomes of it."""
        if not self.parts:
            return UNTOLD
        holding, against, open_ = (self.parts.count(side) for side in (1, -1, 0))
        if holding == len(self.parts):
            return f"holds ({holding} of {holding})"
        word = "holds in part" if holding else "does not hold"
        others = [
            f"{count} {told}"
            for count, told in ((against, "the other way"), (open_, "undecided"))
            if count
        ]
        return f"{word} ({holding} of {len(self.parts)}; {', '.join(others)})"


def claims() -> list[Claim]:
    """Returns all claims, in the order of the paper."""
    return [
        signs_of(HAN, {"word attention": -1, "sentence attention": 1}, "-5.72; 2.86"),
        signs_of(
            VIDEO,
            {"spatial attention": 1, "temporal attention": 1, "cross attention": -1},
            "1.92; 4.37; -2.11",
        ),
        signs_of(
            DISTILBERT,
            {f"{at} {part}": sign for at in ("first", "last") for part, sign in _PROJECTIONS},
            "-2.24; 3.12; 1.75",
        ),
        fragile("raw"),
        precise(),
        strongest(),
        large_gradient(),
        noise(
            HAN,
            "word attention",
            "noise in W1 and W2 changes more predictions (from 5 % to 30 %; no alpha is given)",
        ),
        remedy(),
        Claim(
            "DistilBERT: query and output projection are moderately coupled",
            "; ".join(_coupling(DISTILBERT, names) for names in DISTILBERT.pairs)
            + ". The paper gives no number, and no scale on which it would be moderate",
        ),
        noise(DISTILBERT, "last q", "faults in the query projection disrupt final predictions"),
        through_cross_attention(),
        spread("gradient_norm", "Coupling tells better than gradients how a fault spreads"),
        spread("distance", "(ours) It tells it better than nearness in the graph"),
        Claim(
            "Curvature finds faults that gradients miss, and warns early",
            "noise is the only fault here; on faulty and healthy runs of models that nothing was "
            "learned from, [the ablation](ablation.md) found no benefit",
        ),
    ]


_PROJECTIONS: Final = (("q", -1), ("k", 1), ("out", 1))


def signs_of(setting: Setting, sides: Mapping[str, int], printed: str) -> Claim:
    """Returns the claim that traces have signs."""
    means = {name: _trace(setting, name) for name in sides}
    said = ", ".join(
        f"{'positive' if s > 0 else 'negative'} for {name}" for name, s in sides.items()
    )
    if setting is DISTILBERT:
        said = "negative for the query, positive for key and output (of which layer is not said)"
    return Claim(
        f"{setting.title}: the trace is {said} ({printed})",
        "; ".join(f"{name} {found}" for name, found in means.items()),
        [means[name].sign * side for name, side in sides.items()],
    )


def _trace(setting: Setting, name: str) -> Mean:
    return mean(
        by_seed(
            "measured",
            setting.name,
            lambda row: block(row, LAST, "curvature", name)["trace"]["value"],
        )
    )


def fragile(kind: str) -> Claim:
    """Returns the claim that the loss rises most in the layers that the paper calls fragile."""
    told, signs = [], []
    for setting in settings():
        ends = {
            name: [_at_the_ends(rise(row, name, kind)) for row in rows("measured", setting.name)]
            for name in (FRAGILE[setting.name], *RIVALS[setting.name])
        }
        first = ends[FRAGILE[setting.name]]
        for name in RIVALS[setting.name]:
            gap = mean([a - b for a, b in zip(first, ends[name], strict=True)])
            signs.append(gap.sign)
            told.append(f"{FRAGILE[setting.name]} less {name} {gap}")
    return Claim(
        "The loss rises most along random directions in layers that are called fragile (Fig. 2)",
        "rise at alpha = 1 and -1: " + "; ".join(told),
        signs,
    )


def _at_the_ends(curve: Sequence[float]) -> float:
    return (curve[0] + curve[-1]) / 2.0


def precise() -> Claim:
    """Returns the claim that PyHessian's numbers are right within a percent.

    No estimate of either's can be larger in magnitude than the eigenvalue of largest magnitude, so
    the larger one shows how far the other is short at least.
    """
    short_by, ours_short, wrong = [], 0, 0
    for setting in settings():
        for row in rows("measured", setting.name):
            for at in range(len(CHECKPOINTS)):
                for theirs in row["checkpoints"][at]["pyhessian"]:
                    ours = block(row, at, "curvature", theirs["block"])
                    top = max(abs(ours[end]["value"]) for end in ("lambda_min", "lambda_max"))
                    if top > 0:
                        short_by.append(1.0 - abs(theirs["top"]) / top)
                        ours_short += abs(theirs["top"]) > top / (1.0 - ERROR)
                    wrong += contradicts(ours["trace"], theirs)
    beyond, of = sum(gap > ERROR for gap in short_by), len(short_by)
    return Claim(
        "PyHessian errs by 1 % at most",
        f"its largest eigenvalue is short of ours by more than that in {beyond} of {of} cases, by "
        f"{max(short_by):.0%} at most (ours of its in {ours_short}); its trace has the wrong sign "
        f"in {wrong}",
        [-1 if count else 1 for count in (beyond, wrong)],
    )


def contradicts(ours: Row, theirs: Row) -> bool:
    """Whether PyHessian's sign is another than one that is clear on the very same samples."""
    clear = abs(ours["value"]) > CERTAIN * ours["std_error"]
    return bool(clear and ours["value"] * theirs["trace"] < 0)


def strongest() -> Claim:
    """Returns the claim that W2 and S1 are coupled most of all, and negatively."""
    ratio = {names: _at_last(HAN, names, lambda e: float(e["ratio"])) for names in HAN.pairs[:6]}
    norms = {names: _at_last(HAN, names, lambda e: e["norm"]["value"]) for names in HAN.pairs[:6]}
    others = [names for names in ratio if names != STRONGEST]
    beaten = [
        mean([abs(a) - abs(b) for a, b in zip(ratio[STRONGEST], ratio[names], strict=True)]).sign
        for names in others
    ]
    rank = sorted(norms, key=lambda names: -statistics.fmean(norms[names])).index(STRONGEST) + 1
    own = mean(ratio[STRONGEST])
    return Claim(
        "HAN: W2 and S1 are coupled most of all pairs, and negatively (-0.68)",
        f"ratio {own}, larger than {sum(sign == 1 for sign in beaten)} of the other five; by its "
        f"norm ({mean(norms[STRONGEST])}) the pair is number {rank} of six",
        [-own.sign, *beaten],
    )


def _at_last(setting: Setting, names: Sequence[str], get: Callable[[Row], float]) -> list[float]:
    return by_seed(
        "measured", setting.name, lambda r: get(pair(r["checkpoints"][LAST]["coupling"], names))
    )


def _coupling(setting: Setting, names: Sequence[str]) -> str:
    share = mean(_at_last(setting, names, lambda e: e["share"]["value"]))
    norm = mean(_at_last(setting, names, lambda e: e["norm"]["value"]))
    return f"{' x '.join(names)}: share {share}, norm {norm}"


def large_gradient() -> Claim:
    """Returns the claim that the gradient of W2 is large."""
    norms = {
        name: by_seed(
            "measured",
            HAN.name,
            lambda row, name=name: float(row["checkpoints"][LAST]["gradient_norms"][name]),
        )
        for name in HAN.matrices
    }
    others = [name for name in norms if name != "W2"]
    signs = [
        mean([a - b for a, b in zip(norms["W2"], norms[name], strict=True)]).sign for name in others
    ]
    told = ", ".join(f"{name} {mean(values)}" for name, values in norms.items())
    return Claim(
        "HAN: the gradient of W2 is large (1.25)",
        f"at the end {told}: it is larger than {signs.count(1)} of the others",
        signs,
    )


def noise(setting: Setting, layer: str, said: str) -> Claim:
    """Returns the claim that noise in a layer changes predictions, more than chance does."""
    found = rows("perturbed", setting.name)
    chance = [arm(row, layer="another order")["variability"] for row in found]
    told, signs = [], []
    for alpha in (a["alpha"] for a in found[0]["arms"] if a["layer"] == layer):
        own = [arm(row, layer=layer, alpha=alpha)["variability"] for row in found]
        signs.append(mean([a - b for a, b in zip(own, chance, strict=True)]).sign)
        told.append(f"{share(own)} % at alpha {alpha:g}")
    return Claim(
        f"{setting.title}: {said}",
        f"{'; '.join(told)}; another order of the batches, and no noise, changes "
        f"{share(chance)} %: more than that at {signs.count(1)} of {len(signs)} alphas",
        signs,
    )


def remedy() -> Claim:
    """Returns the claim that a lower rate for W1 and W2 loosens coupling and helps."""
    found = rows("intervention", HAN.name)

    def told(name: str, get: Callable[[Row], float]) -> list[float]:
        return [get(arm(row, arm=name)) for row in found]

    def changed(of: Row) -> float:
        return float(of["variability"])

    def ratio(of: Row) -> float:
        return abs(float(pair(of["coupling"], STRONGEST)["ratio"]))

    gaps = {
        "predictions changed, group less nothing": (changed, "nothing"),
        "coupling, group less nothing": (ratio, "nothing"),
        "predictions changed, group less random": (changed, "random"),
        "predictions changed, group less all": (changed, "all"),
    }
    means = {
        title: mean([a - b for a, b in zip(told("group", get), told(other, get), strict=True)])
        for title, (get, other) in gaps.items()
    }
    return Claim(
        "HAN: a lower rate for W1 and W2 loosens their coupling with S1 (-0.68 to -0.41) and "
        "steadies predictions (30 % to 10 %)",
        f"after noise of {NOISE_OF_INTERVENTION:g}: "
        + "; ".join(
            f"{title} {found if 'coupling' in title else percent(found) + ' points'}"
            for title, found in means.items()
        ),
        [-found.sign for found in means.values()],
    )


def through_cross_attention() -> Claim:
    """Returns the claim that cross attention is where noise in the video model is amplified."""
    norms = {
        names: _at_last(VIDEO, names, lambda entry: entry["norm"]["value"]) for names in VIDEO.pairs
    }
    direct = norms["spatial attention", "temporal attention"]
    told, signs = [], []
    for names in VIDEO.pairs[1:]:
        gap = mean([a - b for a, b in zip(norms[names], direct, strict=True)])
        signs.append(gap.sign)
        told.append(f"norm {' x '.join(names)} less spatial x temporal {gap}")
    found = rows("perturbed", VIDEO.name)
    changed = {
        layer: [arm(r, layer=layer, alpha=0.3)["variability"] for r in found]
        for layer in VIDEO.disturbed
    }
    for layer in ("spatial attention", "temporal attention"):
        gap = mean([a - b for a, b in zip(changed["cross attention"], changed[layer], strict=True)])
        signs.append(gap.sign)
        told.append(
            f"predictions changed by noise of 0.3 in it less in {layer} {percent(gap)} points"
        )
    return Claim(
        "3D-CNN: spatial and temporal attention interact through cross attention, which amplifies "
        "disturbances",
        "; ".join(told),
        signs,
    )


def spread(rival: str, said: str) -> Claim:
    """Returns the claim that coupling orders components by what reaches them better than a rival.

    Spearman's correlation with what is seen after, for each model and effect.
    """
    told, signs = [], []
    for setting in settings():
        for effect in EFFECTS:
            own, other = (correlations(setting.name, effect, p) for p in ("coupling", rival))
            gap = mean([a - b for a, b in zip(own, other, strict=True)])
            signs.append(gap.sign)
            told.append(f"{setting.title} {gap}")
    return Claim(
        said,
        "differences of Spearman's correlation, three effects in each model: " + "; ".join(told),
        signs,
    )
