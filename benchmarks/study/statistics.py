"""What the rows of the study say: numbers by seed, their means and intervals."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from scipy import stats

from benchmarks.forked import rows_of

RESULTS: Final = Path(__file__).parents[1] / "results" / "study.jsonl"
CONFIDENCE: Final = 0.95
CLEAR: Final = 1.96  # errors between a number of one seed and zero

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over seeds with Student's interval (95 %); without one where there is one seed."""

    value: float
    low: float
    high: float
    n: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of zero, else 0."""
        return (self.low > 0) - (self.high < 0)

    def __str__(self) -> str:
        return f"{short(self.value)} [{short(self.low)}, {short(self.high)}]"


def mean(values: Sequence[float]) -> Mean:
    """Returns the mean over seeds; what was not finite stands in rows as text, such as "nan".

    Raises:
        ValueError: There is none, or one that is not finite: it would make all others vanish.
    """
    values = [float(value) for value in values]
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"no mean of {list(values)}")
    middle, n = statistics.fmean(values), len(values)
    if n == 1:
        return Mean(middle, -math.inf, math.inf, 1)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Mean(middle, middle - half, middle + half, n)


def short(value: float) -> str:
    """Returns a number in three digits, without powers of ten where it can be read."""
    if value == 0 or 0.001 <= abs(value) < 1000 or math.isinf(value):
        return f"{value:.3g}"
    return f"{value:.1e}"


@functools.cache
def rows(part: str, model: str) -> tuple[Row, ...]:
    """Returns the rows of a part for a model, in the order of seeds.

    Raises:
        FileNotFoundError: There are none.
        ValueError: A line is damaged: tables would be made of fewer seeds, and not say so.
    """
    kept = rows_of(RESULTS)
    damaged = len(RESULTS.read_text("utf-8").splitlines()) - len(kept) if kept else 0
    if damaged:
        raise ValueError(
            f"{RESULTS}: damaged lines: {damaged}; `python -m benchmarks.paper_study` makes them "
            "anew"
        )
    found = [r for r in kept if (r["part"], r["model"]) == (part, model)]
    if not found:
        raise FileNotFoundError(
            f"{RESULTS}: no rows of {part} for {model}; "
            f"make them with `python -m benchmarks.paper_study --only {part} --model {model}`"
        )
    return tuple(sorted(found, key=lambda row: row["seed"]))


def by_seed(part: str, model: str, get: Callable[[Row], float]) -> list[float]:
    """Returns one number of every row of a part."""
    return [get(row) for row in rows(part, model)]


def block(row: Row, checkpoint: int, kind: str, name: str) -> Row:
    """Returns what a row says of a block (``curvature`` or ``pyhessian``) at a checkpoint."""
    found: Row = next(b for b in row["checkpoints"][checkpoint][kind] if b["block"] == name)
    return found


def pair(entries: Sequence[Row], names: Sequence[str]) -> Row:
    """Returns what is said of a pair of groups."""
    return next(entry for entry in entries if entry["pair"] == list(names))


def error(estimate: Row) -> float:
    """Returns the error of a number of one seed, of the estimator and of the samples together."""
    parts = [estimate["std_error"], estimate["batch_std_error"]]
    return math.hypot(*(part for part in parts if part is not None))


def clear_sign(estimate: Row) -> int:
    """Returns the sign of a number of one seed, or 0 where its errors do not tell it."""
    value, least = estimate["value"], CLEAR * error(estimate)
    return (value > least) - (value < -least)


def arm(row: Row, **which: Any) -> Row:
    """Returns an arm of a row."""
    return next(a for a in row["arms"] if all(a[key] == value for key, value in which.items()))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Returns Spearman's correlation; NaN where one of both does not vary."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return math.nan
    return float(stats.spearmanr(a, b).statistic)


def correlations(model: str, effect: str, predictor: str) -> list[float]:
    """Returns by seed how well something known before orders what is seen after.

    A mean, over the disturbed components for which there is one, of Spearman's correlation over all
    others; there is none where one of both does not vary or is not finite.
    """

    def of_row(row: Row) -> float:
        found = []
        for source in dict.fromkeys(entry["source"] for entry in row["pairs"]):
            known = [
                (float(e[predictor]), float(e[effect]))
                for e in row["pairs"]
                if e["source"] == source and e[effect] is not None
            ]
            before, after = zip(*known, strict=True)
            sign = -1.0 if predictor == "distance" else 1.0
            found.append(rank_correlation([sign * b for b in before], after))
        known_ones = [value for value in found if not math.isnan(value)]
        return statistics.fmean(known_ones)

    return by_seed("propagation", model, of_row)


def percent(of: Mean) -> str:
    """Returns a difference of shares with its interval, in percentage points."""
    return f"{100 * of.value:.1f} [{100 * of.low:.1f}, {100 * of.high:.1f}]"


def share(values: Sequence[float]) -> str:
    """Returns the mean of shares in percent; its interval ends where no share can lie beyond."""
    of = mean(values)
    return percent(Mean(of.value, max(of.low, 0.0), min(of.high, 1.0), of.n))
