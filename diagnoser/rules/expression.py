"""What a rule's ``when`` is after parsing: a tree, evaluated on whole columns at once.

Numbers follow the interval arithmetic and conditions the three-valued logic of `interval`. The
language itself, and how its text becomes such a tree, is in `parsing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from diagnoser.rules import interval
from diagnoser.rules.interval import FALSE, TRUE, Trilean
from diagnoser.table import Array, Column, Scope


class Columns(Protocol):
    """What an expression is evaluated on; see `view.View`."""

    @property
    def shape(self) -> tuple[int, int]:
        """(subjects, steps)."""

    def column(self, name: str) -> Column:
        """Returns the column of a feature; its arrays broadcast to `shape`."""

    def kinds(self, name: str) -> Sequence[str | None]:
        """Returns the component kind of each subject for ``kind``, ``a.kind`` or ``b.kind``."""

    def healthy(self, end: HealthyEnd) -> Column:
        """Returns an end of a healthy range for each subject; broadcasts to `shape`."""


# The tree. A condition carries an index, by which `evaluate_expression` can be told to force it.


@dataclass(frozen=True, slots=True)
class Number:
    """A number written in the rule."""

    column: Column


@dataclass(frozen=True, slots=True)
class Name:
    """A feature."""

    name: str


@dataclass(frozen=True, slots=True)
class HealthyEnd:
    """``healthy_low(x)`` or ``healthy_high(x)``; ``scope`` is the feature's own."""

    name: str
    scope: Scope
    end: Literal["low", "high"]


@dataclass(frozen=True, slots=True)
class Operation:
    """An arithmetic operation or function on numbers."""

    function: Callable[..., Column]
    operands: tuple[Numeric, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison of two numbers; ``feature`` is the text of ``left``."""

    index: int
    feature: str
    operator: str
    left: Numeric
    right: Numeric


@dataclass(frozen=True, slots=True)
class Known:
    """``known(x)``."""

    index: int
    operand: Numeric


@dataclass(frozen=True, slots=True)
class KindTest:
    """``kind in (...)``; ``name`` is ``kind``, ``a.kind`` or ``b.kind``."""

    index: int
    name: str
    kinds: frozenset[str]


@dataclass(frozen=True, slots=True)
class Connective:
    """And (``np.minimum``) or or (``np.maximum``)."""

    function: np.ufunc
    operands: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Negation:
    """Not."""

    operand: Condition


Numeric = Number | Name | HealthyEnd | Operation
Condition = Comparison | Known | KindTest | Connective | Negation


@dataclass(frozen=True, slots=True)
class Expression:
    """A compiled ``when``.

    ``names`` are the features it reads, as written (``a.update_ratio``); ``ranges`` the ends of
    healthy ranges; ``conditions`` the texts of its single conditions, by index.
    """

    text: str
    root: Condition
    names: tuple[str, ...]
    ranges: tuple[HealthyEnd, ...]
    conditions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Observation:
    """A comparison that holds at one place: what was observed there, and the threshold."""

    feature: str
    value: float
    lower: float
    upper: float
    comparison: str
    threshold: float


def leaves_of(node: Numeric | Condition) -> Iterator[Name | HealthyEnd]:
    """Yields what a tree reads, features and ends of their ranges, from left to right."""
    match node:
        case Name() | HealthyEnd():
            yield node
        case Operation(operands=operands) | Connective(operands=operands):
            for operand in operands:
                yield from leaves_of(operand)
        case Comparison(left=left, right=right):
            yield from leaves_of(left)
            yield from leaves_of(right)
        case Known(operand=operand) | Negation(operand=operand):
            yield from leaves_of(operand)


def names_in(node: Numeric | Condition) -> Iterator[str]:
    """Yields the names of the features whose values a tree reads."""
    return (leaf.name for leaf in leaves_of(node) if isinstance(leaf, Name))


@dataclass(frozen=True, slots=True)
class _Cell:
    """One place of other columns."""

    columns: Columns
    subject: int
    step: int
    shape = (1, 1)

    def column(self, name: str) -> Column:
        return self._at_this_place(self.columns.column(name))

    def healthy(self, end: HealthyEnd) -> Column:
        return self._at_this_place(self.columns.healthy(end))

    def _at_this_place(self, whole: Column) -> Column:
        def pick(x: Array) -> Array:
            full = np.broadcast_to(x, self.columns.shape)
            return full[self.subject : self.subject + 1, self.step : self.step + 1]

        return Column(pick(whole.value), pick(whole.lower), pick(whole.upper))

    def kinds(self, name: str) -> Sequence[str | None]:
        return (self.columns.kinds(name)[self.subject],)


def evaluate_expression(
    expression: Expression, columns: Columns, forced: Mapping[int, int] | None = None
) -> Trilean:
    """Evaluates an expression on all subjects and steps.

    Args:
        expression: the compiled expression.
        columns: the features it names.
        forced: truth values for single conditions, by index, whatever the columns say.

    Returns:
        TRUE, FALSE or UNKNOWN, shape (subjects, steps).
    """
    return np.broadcast_to(evaluate_condition(expression.root, columns, forced), columns.shape)


def evaluate_condition(
    condition: Condition, columns: Columns, forced: Mapping[int, int] | None = None
) -> Trilean:
    """Evaluates one node; the result broadcasts to the shape of the columns."""
    with np.errstate(all="ignore"):
        return _truth(condition, columns, forced or {})


def _truth(node: Condition, columns: Columns, forced: Mapping[int, int]) -> Trilean:
    match node:
        case Connective(function=function, operands=operands):
            total = _truth(operands[0], columns, forced)
            for operand in operands[1:]:
                total = function(total, _truth(operand, columns, forced))
            return total
        case Negation(operand=operand):
            return -_truth(operand, columns, forced)
        case Comparison(index=index) | Known(index=index) | KindTest(index=index) if (
            index in forced
        ):
            return np.array([[forced[index]]], np.int8)
        case Comparison(operator=operator, left=left, right=right):
            return interval.COMPARISONS[operator](_number(left, columns), _number(right, columns))
        case Known(operand=numeric):
            return interval.is_known(_number(numeric, columns))
        case KindTest(name=name, kinds=kinds):
            truth = [
                0 if k is None else (TRUE if k in kinds else FALSE) for k in columns.kinds(name)
            ]
            return np.array(truth, np.int8)[:, np.newaxis]


def _number(node: Numeric, columns: Columns) -> Column:
    match node:
        case Number(column=column):
            return column
        case Name(name=name):
            return columns.column(name)
        case HealthyEnd():
            return columns.healthy(node)
        case Operation(function=function, operands=operands):
            return function(*(_number(operand, columns) for operand in operands))


def evaluate_number(node: Numeric, columns: Columns) -> Column:
    """Evaluates a number; its arrays broadcast to the shape of the columns."""
    with np.errstate(all="ignore"):
        return _number(node, columns)


def observations(
    expression: Expression, columns: Columns, subject: int, step: int
) -> tuple[Observation, ...]:
    """Returns the comparisons that make the expression true at one subject and step.

    A comparison under ``not`` is reported turned round, as what holds. Tests of kind and of
    knowledge measure nothing and are left out.
    """
    with np.errstate(all="ignore"):
        return tuple(_support(expression.root, _Cell(columns, subject, step), TRUE))


def _support(node: Condition, cell: _Cell, wanted: int) -> Iterator[Observation]:
    match node:
        case Connective(operands=operands):
            for operand in operands:
                if _truth(operand, cell, {}).item() == wanted:
                    yield from _support(operand, cell, wanted)
        case Negation(operand=operand):
            yield from _support(operand, cell, -wanted)
        case Comparison(feature=feature, operator=operator, left=left, right=right):
            x, y = _number(left, cell), _number(right, cell)
            yield Observation(
                feature=feature,
                value=x.value.item(),
                lower=x.lower.item(),
                upper=x.upper.item(),
                comparison=operator if wanted == TRUE else interval.OPPOSITE[operator],
                threshold=y.value.item(),
            )
