"""Numbers as logs spell them. A NaN stays one; what was not logged is None."""

from __future__ import annotations

import math
from typing import Final

NOT_LOGGED: Final = frozenset({"", "none", "null", "na", "n/a", "-", "--"})
_NAN: Final = frozenset({"nan", "nan(ind)", "nan(snan)", "1.#qnan", "1.#ind", "1.#snan"})
_INF: Final = frozenset({"inf", "infinity", "1.#inf"})


def number(text: str) -> float | None:
    """Returns the number that a cell holds; None: nothing was logged here.

    >>> number(" 1e-3 "), number("-1.#INF"), number("N/A")
    (0.001, -inf, None)

    Raises:
        ValueError: It is no number.
    """
    word = text.strip().lower()
    if word in NOT_LOGGED:
        return None
    bare = word.lstrip("+-")
    if bare in _NAN:
        return math.nan
    if bare in _INF:
        return -math.inf if word.startswith("-") else math.inf
    if "_" in word:  # which Python alone takes for a number
        raise ValueError("not a number")
    return float(word)


def whole(value: float) -> int:
    """Returns a step.

    Raises:
        ValueError: It is no whole number, is negative, or is none that a log can hold.
    """
    if not (math.isfinite(value) and value == int(value) and 0 <= value < 2**62):
        raise ValueError("not a step")
    return int(value)
