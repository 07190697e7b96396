"""Arithmetic on columns with bounds, and three-valued comparison of them.

Each operation returns bounds that hold for every pair of true values inside the bounds of its
operands (Moore, Interval Analysis, 1966), so a comparison is true only if it is true wherever the
numbers really lie. What is not known, or not defined (``0/0``, ``log(-1)``), is NaN in value and
bounds, and a comparison with it is unknown.

The three truth values are ordered, FALSE < UNKNOWN < TRUE, which makes Kleene's strong logic plain
arithmetic: *and* is the minimum, *or* the maximum, *not* the negation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.table import Array, Column

Trilean = NDArray[np.int8]

TRUE: Final = 1
UNKNOWN: Final = 0
FALSE: Final = -1


def is_exact(column: Column) -> bool:
    """Returns whether the column was built without uncertainty (`Column.exact`)."""
    return column.lower is column.value and column.upper is column.value


def constant(value: float) -> Column:
    """Returns an exact (1, 1) column, which broadcasts against every other."""
    return Column.exact(np.array([[value]]))


def _bounded(value: Array, lower: Array, upper: Array) -> Column:
    """Returns a column whose bounds are NaN where its value is not defined."""
    undefined = np.isnan(value)
    if undefined.any():
        lower = np.where(undefined, np.nan, lower)
        upper = np.where(undefined, np.nan, upper)
    return Column(value, lower, upper)


def add(x: Column, y: Column) -> Column:
    """Returns x + y."""
    if is_exact(x) and is_exact(y):
        return Column.exact(x.value + y.value)
    return _bounded(x.value + y.value, x.lower + y.lower, x.upper + y.upper)


def negate(x: Column) -> Column:
    """Returns -x."""
    if is_exact(x):
        return Column.exact(-x.value)
    return Column(-x.value, -x.upper, -x.lower)


def subtract(x: Column, y: Column) -> Column:
    """Returns x - y."""
    return add(x, negate(y))


def multiply(x: Column, y: Column) -> Column:
    """Returns x * y."""
    if is_exact(x) and is_exact(y):
        return Column.exact(x.value * y.value)
    lower, upper = _extremes(np.multiply, (x.lower, x.upper), (y.lower, y.upper))
    return _bounded(x.value * y.value, lower, upper)


def divide(x: Column, y: Column) -> Column:
    """Returns x / y; not defined where y is zero, without bounds where y may have either sign."""
    value = np.where(y.value == 0.0, np.nan, x.value / y.value)
    if is_exact(x) and is_exact(y):
        return Column.exact(value)
    # A bound of exactly zero is approached from inside, which the sign of the zero says.
    above = np.where(y.lower == 0.0, 0.0, y.lower)
    below = np.where(y.upper == 0.0, -0.0, y.upper)
    lower, upper = _extremes(np.divide, (x.lower, x.upper), (above, below))
    crosses = (y.lower < 0.0) & (y.upper > 0.0)
    return _bounded(value, np.where(crosses, -np.inf, lower), np.where(crosses, np.inf, upper))


def _extremes(
    operation: np.ufunc, x_bounds: tuple[Array, Array], y_bounds: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Returns the bounds of an operation that is monotone in each operand: those of its corners."""
    corners = []
    for x in x_bounds:
        for y in y_bounds:
            corner = operation(x, y)
            # 0 * inf, 0 / 0, inf / inf of two bounds: a limit that the other corners enclose.
            limit = np.isnan(corner) & ~np.isnan(x) & ~np.isnan(y)
            corners.append(np.where(limit, 0.0, corner))
    return np.minimum.reduce(corners), np.maximum.reduce(corners)


def absolute(x: Column) -> Column:
    """Returns abs(x)."""
    if is_exact(x):
        return Column.exact(np.abs(x.value))
    low, high = np.abs(x.lower), np.abs(x.upper)
    crosses = (x.lower < 0.0) & (x.upper > 0.0)
    return _bounded(
        np.abs(x.value), np.where(crosses, 0.0, np.minimum(low, high)), np.maximum(low, high)
    )


def minimum(*columns: Column) -> Column:
    """Returns the smallest of the columns, unknown where any of them is."""
    return _fold(np.minimum, columns)


def maximum(*columns: Column) -> Column:
    """Returns the largest of the columns, unknown where any of them is."""
    return _fold(np.maximum, columns)


def _fold(function: np.ufunc, columns: tuple[Column, ...]) -> Column:
    total = columns[0]
    for x in columns[1:]:
        if is_exact(total) and is_exact(x):
            total = Column.exact(function(total.value, x.value))
        else:
            total = _bounded(
                function(total.value, x.value),
                function(total.lower, x.lower),
                function(total.upper, x.upper),
            )
    return total


def logarithm(x: Column) -> Column:
    """Returns the natural logarithm of x; not defined where x is negative."""
    if is_exact(x):
        return Column.exact(np.log(x.value))
    # A quantity with a logarithm is not negative, whatever its estimate's lower bound says.
    return _bounded(np.log(x.value), np.log(_nonnegative(x.lower)), np.log(x.upper))


def square_root(x: Column) -> Column:
    """Returns the square root of x; not defined where x is negative."""
    if is_exact(x):
        return Column.exact(np.sqrt(x.value))
    return _bounded(np.sqrt(x.value), np.sqrt(_nonnegative(x.lower)), np.sqrt(x.upper))


def _nonnegative(bound: Array) -> Array:
    return np.maximum(bound, 0.0)  # keeps NaN


def is_known(x: Column) -> Trilean:
    """Returns TRUE where value and bounds are known, FALSE elsewhere; never UNKNOWN."""
    missing = np.isnan(x.value) | np.isnan(x.lower) | np.isnan(x.upper)
    return _trilean(~missing, missing)


def _trilean(holds: NDArray[np.bool_], fails: NDArray[np.bool_]) -> Trilean:
    return holds.view(np.int8) - fails.view(np.int8)


def greater(x: Column, y: Column) -> Trilean:
    """Returns x > y: TRUE if every x is above every y, FALSE if none is, else UNKNOWN."""
    return _trilean(x.lower > y.upper, x.upper <= y.lower)


def greater_equal(x: Column, y: Column) -> Trilean:
    """Returns x >= y."""
    return _trilean(x.lower >= y.upper, x.upper < y.lower)


def equal(x: Column, y: Column) -> Trilean:
    """Returns x == y: TRUE only for equal exact numbers, FALSE where the bounds do not meet."""
    same = (x.lower == y.upper) & (x.upper == y.lower)
    return _trilean(same, (x.lower > y.upper) | (x.upper < y.lower))


COMPARISONS: Final[Mapping[str, Callable[[Column, Column], Trilean]]] = {
    ">": greater,
    ">=": greater_equal,
    "<": lambda x, y: greater(y, x),
    "<=": lambda x, y: greater_equal(y, x),
    "==": equal,
    "!=": lambda x, y: -equal(x, y),
}
MIRRORED: Final = {">": "<", ">=": "<=", "<": ">", "<=": ">=", "==": "==", "!=": "!="}
OPPOSITE: Final = {">": "<=", ">=": "<", "<": ">=", "<=": ">", "==": "!=", "!=": "=="}
