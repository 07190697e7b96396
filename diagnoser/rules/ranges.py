"""Healthy ranges: how far a feature reaches in healthy runs, for each kind of component.

A rule that asks for ``healthy_high(x)`` gets the upper end of the range of x for the kind of its
subject. The ends were learnt from runs (`diagnoser.benchmark.teaching`) and have an interval. They
stand in ``rules/healthy-ranges.json``; where that file knows nothing of a kind, nothing stands in
for it and the end is unknown.

A range is filed under the scope and the kinds of what it is about: ``component.query``,
``pair.key|query`` (in alphabetical order: a pair has no first and second), ``run``.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from diagnoser.errors import RuleError
from diagnoser.rules.loading import shipped_rules_directory
from diagnoser.table import Scope
from diagnoser.vocabulary import KINDS

SCHEMA: Final = "diagnoser.healthy-ranges/1"
FILE: Final = "healthy-ranges.json"
REMAKE: Final = "`python -m benchmarks.teach` makes it anew"

_FEATURE = re.compile(r"[a-z][a-z0-9_]*")
_COMPONENTS_OF: Final[Mapping[str, int]] = {"run": 0, "component": 1, "pair": 2}

End = Literal["low", "high"]
Bounds = tuple[float, float, float]  # value, lower, upper

UNKNOWN_END: Final[Bounds] = (math.nan, math.nan, math.nan)


@dataclass(frozen=True, slots=True)
class Range:
    """Both ends of a healthy range, each with its interval, and the number of runs behind them."""

    n: int
    low: Bounds
    high: Bounds


@dataclass(frozen=True, slots=True)
class Ranges:
    """The healthy ranges of features, by feature and by `range_key`.

    Attributes:
        quantile: The share of healthy runs that the high end is not exceeded in; as many stay above
            the low end.
        runs: How many healthy runs they were learnt from.
        features: The ranges.
    """

    quantile: float = 0.99
    runs: int = 0
    features: Mapping[str, Mapping[str, Range]] = field(default_factory=dict)

    def end(self, feature: str, key: str | None, end: End) -> Bounds:
        """Returns one end of a range; NaN in all three where it is not known."""
        found = self.features.get(feature, {}).get(key or "")
        if found is None:
            return UNKNOWN_END
        return found.low if end == "low" else found.high


def range_key(scope: Scope, kinds: Sequence[str | None]) -> str | None:
    """Returns what a range is filed under; None where a kind is not known.

    >>> range_key("pair", ("query", "key")), range_key("component", ("norm",)), range_key("run", ())
    ('pair.key|query', 'component.norm', 'run')
    """
    known = sorted(kind for kind in kinds if kind)
    if len(known) < len(kinds):
        return None
    return f"{scope}.{'|'.join(known)}" if known else scope


@functools.cache
def shipped_ranges() -> Ranges:
    """Returns the ranges that ship with the package.

    Raises:
        RuleError: As `load_ranges`.
    """
    return load_ranges(shipped_rules_directory("diagnoser").parent / FILE)


def load_ranges(path: Path) -> Ranges:
    """Reads a file of healthy ranges.

    Raises:
        RuleError: It cannot be read, is another schema's, or holds what is no range; one line a
            problem.
    """
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"),
            parse_constant=_no_number,
            object_pairs_hook=_without_duplicates,
        )
    except (OSError, ValueError, RecursionError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise RuleError(f"{path}: cannot be read ({what}); {REMAKE}") from None
    found = content.get("schema") if isinstance(content, dict) else None
    if found != SCHEMA:
        shown = f"schema {found!r:.60}" if found is not None else "no schema"
        raise RuleError(f"{path}: {shown}, this version reads {SCHEMA}; {REMAKE}")
    try:
        file = _RangesFile.model_validate(content)
    except ValidationError as error:
        raise RuleError("\n".join(_complaints(path, error))) from None
    features = {
        feature: {key: entry.range() for key, entry in kinds.items()}
        for feature, kinds in file.features.items()
    }
    return Ranges(file.quantile, file.runs, features)


def save_ranges(path: Path, ranges: Ranges) -> None:
    """Writes healthy ranges, a line each, in alphabetical order."""
    features = ",\n".join(
        f"  {json.dumps(feature)}: {{\n"
        + ",\n".join(
            f"   {json.dumps(key)}: "
            + json.dumps({"n": kept.n, "low": kept.low, "high": kept.high}, allow_nan=False)
            for key, kept in sorted(kinds.items())
        )
        + "\n  }"
        for feature, kinds in sorted(ranges.features.items())
    )
    text = (
        f'{{\n "schema": "{SCHEMA}",\n "quantile": {json.dumps(ranges.quantile)},\n'
        f' "runs": {ranges.runs},\n "features": {{' + (f"\n{features}\n }}" if features else "}")
    )
    path.write_text(text + "\n}\n", encoding="utf-8")


# The file


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no end of a range")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r:.60} is given twice")
    return data


def _complaints(path: Path, error: ValidationError) -> Iterable[str]:
    for detail in error.errors(include_url=False, include_context=False):
        place = ", ".join(str(step)[:60] for step in detail["loc"] if step != "[key]")
        text = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        yield f"{path}: {place}: {text}; {REMAKE}"


def _feature(name: str) -> str:
    if not _FEATURE.fullmatch(name):
        raise ValueError("not the name of a feature")
    return name


def _key(key: str) -> str:
    scope, _, rest = key.partition(".")
    kinds = rest.split("|") if rest else []
    if any(kind not in KINDS for kind in kinds) or len(kinds) != _COMPONENTS_OF.get(scope):
        raise ValueError("a range is filed under run, component.KIND or pair.KIND|KIND")
    if kinds != sorted(kinds):
        raise ValueError(f"the kinds of a pair are sorted: {scope}.{'|'.join(sorted(kinds))}")
    return key


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


_ThreeNumbers = Annotated[
    list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=3, max_length=3)
]


class _RangeFile(_Strict):
    n: Annotated[int, Field(ge=1)]
    low: _ThreeNumbers
    high: _ThreeNumbers

    @model_validator(mode="after")
    def _in_order(self) -> _RangeFile:
        for name, (value, lower, upper) in (("low", self.low), ("high", self.high)):
            if not lower <= value <= upper:
                raise ValueError(f"{name}: {value:g} is not inside its interval")
        if self.low[0] > self.high[0]:
            raise ValueError(f"low {self.low[0]:g} is above high {self.high[0]:g}")
        return self

    def range(self) -> Range:
        low, high = ((float(v), float(a), float(b)) for v, a, b in (self.low, self.high))
        return Range(self.n, low, high)


class _RangesFile(_Strict):
    form: Annotated[str, Field(alias="schema")]
    quantile: Annotated[float, Field(gt=0.5, lt=1.0)]
    runs: Annotated[int, Field(ge=0)]
    features: dict[
        Annotated[str, AfterValidator(_feature)],
        dict[Annotated[str, AfterValidator(_key)], _RangeFile],
    ]

    @model_validator(mode="after")
    def _no_more_than_all(self) -> _RangesFile:
        for feature, kinds in self.features.items():
            for key, entry in kinds.items():
                if entry.n > self.runs:
                    raise ValueError(f"{feature}, {key}: {entry.n} of {self.runs} runs")
        return self
