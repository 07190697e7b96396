"""Repairs that were tried, as events of the run log and back.

A run says what was tried on it in events of kind ``repair``, so that a diagnosis that is made again
from its log tells the same (law 6). What is read may have been changed by hand: an event that is
not whole and of known words is left out.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any, Final, TypeVar

from diagnoser.runlog import Recording, plain
from diagnoser.types import Arm, Attempt, Estimate, Evidence, Repair
from diagnoser.vocabulary import REPAIRS

EVENT: Final = "repair"  # the kind of the events

_COMPARISONS: Final = frozenset({">", ">=", "<", "<=", "==", "!="})
_NOT_FINITE: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

T = TypeVar("T")


def attempt_data(attempt: Attempt) -> dict[str, Any]:
    """Returns the data of the event that records ``attempt``, all of it plain JSON."""
    data: dict[str, Any] = plain(
        {
            "step": attempt.step,
            "source": attempt.source,
            "component": attempt.component,
            "actions": [_action_data(action) for action in attempt.actions],
            "derivation": attempt.derivation,
            "guarantee": attempt.guarantee,
            "kept": attempt.kept,
            "reason": attempt.reason,
            "before": asdict(attempt.before),
            "after": None if attempt.after is None else asdict(attempt.after),
            "twin": None if attempt.twin is None else asdict(attempt.twin),
            "difference": None if attempt.difference is None else asdict(attempt.difference),
            "batches": attempt.batches,
        }
    )
    return data


def attempts_of(recording: Recording) -> tuple[Attempt, ...]:
    """Returns the repairs that were tried, in the order in which they were recorded."""
    attempts = []
    for event in recording.events:
        if event.kind == EVENT:
            with contextlib.suppress(ValueError, TypeError, LookupError, OverflowError):
                attempts.append(_attempt(event.data))
    return tuple(attempts)


def _action_data(action: Repair) -> dict[str, Any]:
    """Keeps numbers and texts apart: a text may well read NaN."""
    numbers = {k: float(v) for k, v in action.parameters.items() if not isinstance(v, str)}
    texts = {k: v for k, v in action.parameters.items() if isinstance(v, str)}
    return {
        "name": action.name,
        "component": action.component,
        "numbers": numbers,
        "texts": texts,
    }


def _attempt(data: Any) -> Attempt:
    return Attempt(
        step=_count(data["step"]),
        source=_a(str, data["source"]),
        component=_a(str, data["component"]),
        actions=tuple(_action(item) for item in _a(list, data["actions"])),
        derivation=_a(str, data["derivation"]),
        guarantee=_a(str, data["guarantee"]),
        kept=_a(bool, data["kept"]),
        reason=_a(str, data["reason"]),
        before=_arm(data["before"]),
        after=_optional(_arm, data["after"]),
        twin=_optional(_arm, data["twin"]),
        difference=_optional(_estimate, data["difference"]),
        batches=_count(data["batches"]),
    )


def _action(item: Any) -> Repair:
    numbers = {name: _number(value) for name, value in _a(dict, item["numbers"]).items()}
    texts = {name: _a(str, value) for name, value in _a(dict, item["texts"]).items()}
    return Repair(_known(REPAIRS, item["name"]), _a(str, item["component"]), {**numbers, **texts})


def _arm(item: Any) -> Arm:
    return Arm(
        steps=_count(item["steps"]),
        loss=_number(item["loss"]),
        evidence=tuple(_evidence(evidence) for evidence in _a(list, item["evidence"])),
        firing=tuple(_a(str, source) for source in _a(list, item["firing"])),
    )


def _evidence(item: Any) -> Evidence:
    first, last = _a(list, item["steps"])
    return Evidence(
        feature=_a(str, item["feature"]),
        observed=_number(item["observed"]),
        comparison=_known(_COMPARISONS, item["comparison"]),
        threshold=_number(item["threshold"]),
        steps=(_count(first), _count(last)),
        std_error=_optional(_number, item["std_error"]),
        batch_std_error=_optional(_number, item["batch_std_error"]),
        method=_a(str, item["method"]),
    )


def _estimate(item: Any) -> Estimate:
    return Estimate(
        value=_number(item["value"]),
        std_error=_optional(_number, item["std_error"]),
        batch_std_error=_optional(_number, item["batch_std_error"]),
        samples=_optional(_count, item["samples"]),
        method=_a(str, item["method"]),
        dtype=_a(str, item["dtype"]),
    )


def _a(kind: type[T], value: Any) -> T:
    """Returns ``value`` if it is of exactly this kind: True is no number."""
    if type(value) is not kind:
        raise TypeError(f"not a {kind.__name__}")
    return value


def _count(value: Any) -> int:
    if not 0 <= _a(int, value) < 2**63:
        raise ValueError("not a count")
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, str):
        return _NOT_FINITE[value]
    return float(value if type(value) is int else _a(float, value))


def _optional(read: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else read(value)


def _known(words: Collection[str], value: Any) -> str:
    if _a(str, value) not in words:
        raise ValueError(f"not a word of the vocabulary: {value}")
    return str(value)
