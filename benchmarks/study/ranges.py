"""What the study teaches about healthy ranges: ``python -m benchmarks.study.ranges``.

Its trainings are healthy, on models that the ranges were not learnt from. Where the negative
curvature of a projection goes further than the range of its kind, the range of
``rules/healthy-ranges.json`` is widened to it: the runs are too few to learn a quantile from, but
enough to know that a healthy one gets there. Nothing is narrowed; twice is as good as once.
What was counted of a rule with other ranges than these goes out of ``rules/precision.json``, until
`benchmarks.teach` counts it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from benchmarks.study.settings import DISTILBERT, VIDEO
from benchmarks.study.statistics import rows
from diagnoser.diagnosis import default_rules
from diagnoser.rules import precision, precision_of, save_precision
from diagnoser.rules.loading import shipped_rules_directory
from diagnoser.rules.ranges import FILE, Bounds, Range, Ranges, save_ranges, shipped_ranges

FEATURE: Final = "negative_curvature_ratio"
KIND_OF: Final[Mapping[str, str]] = {
    "q": "query",
    "k": "key",
    "v": "value",
    "out": "attention_output",
}


def reached() -> dict[str, tuple[float, float]]:
    """Returns the lowest and highest ratio by the key of its range, over all seeds and steps."""
    found: dict[str, list[float]] = {}
    for kind, ratio in _ratios():
        found.setdefault(f"component.{kind}", []).append(ratio)
    return {key: (min(values), max(values)) for key, values in found.items()}


def _ratios() -> Iterator[tuple[str, float]]:
    for setting in (VIDEO, DISTILBERT):
        for row in rows("measured", setting.name):
            for checkpoint in row["checkpoints"]:
                for entry in checkpoint["curvature"]:
                    if entry["block"] not in setting.matrices:
                        continue
                    highest = abs(entry["lambda_max"]["value"])
                    if highest > 0:
                        kind = KIND_OF[entry["block"].rpartition(" ")[2]]
                        yield kind, -entry["lambda_min"]["value"] / highest


def widened(ranges: Ranges) -> Ranges:
    """Returns ranges that hold all that the study reached; a kind without a range gets none."""
    kinds = dict(ranges.features.get(FEATURE, {}))
    for key, (lowest, highest) in reached().items():
        if key in kinds:
            kinds[key] = _wide(kinds[key], lowest, highest)
    return replace(ranges, features={**ranges.features, FEATURE: kinds})


def _wide(known: Range, lowest: float, highest: float) -> Range:
    (low, *low_interval), (high, *high_interval) = known.low, known.high
    return Range(
        known.n,
        _around(min(low, lowest), *low_interval),
        _around(max(high, highest), *high_interval),
    )


def _around(value: float, lower: float, upper: float) -> Bounds:
    return value, min(lower, value), max(upper, value)


def forget_void_counts(path: Path) -> list[str]:
    """Takes out of a file of counts those that hold no longer; returns the ids of their rules."""
    counted = json.loads(path.read_text(encoding="utf-8"))
    rules = default_rules()
    valid = precision_of(rules, path)
    save_precision(path, rules, valid, counted["runs"])
    return sorted(set(counted["rules"]) - set(valid))


def main() -> None:
    """Widens what ships, and says which ranges it widened and which counts are void by that."""
    before = shipped_ranges()
    after = widened(before)
    directory = shipped_rules_directory("diagnoser").parent
    save_ranges(directory / FILE, after)
    shipped_ranges.cache_clear()
    for rule in forget_void_counts(directory / precision.FILE):
        print(f"{rule}: its count was made with other ranges, and is forgotten")
    for key, known in after.features[FEATURE].items():
        old = before.features[FEATURE][key]
        if known != old:
            print(
                f"{FEATURE} of {key}: [{old.low[0]:.3g}, {old.high[0]:.3g}] is now "
                f"[{known.low[0]:.3g}, {known.high[0]:.3g}]"
            )


if __name__ == "__main__":
    main()
