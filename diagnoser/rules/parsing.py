"""The language of a rule's ``when``: a small, closed part of Python's expressions.

    numbers      1.0e-3, feature names, + - * /, unary -, abs min max log sqrt,
                 healthy_low(x), healthy_high(x)
    conditions   < <= > >= == != (also chained), a flag feature by its name, known(x),
                 kind == 'query', kind in ('query', 'key'), and or not

Text is parsed by Python's own ``ast``, every node not listed above is refused, and what remains
becomes the tree of `expression`. Nothing of the text is ever executed.

``healthy_low(x)`` and ``healthy_high(x)`` are the ends of the range of the feature x in healthy
runs, for the kind of the subject: of a component its kind, of a pair the kinds of both in either
order, and one range for all runs. What stands in the brackets is the name of a feature that the
rule sees, and nothing else; of ``a.x`` and ``b.x`` it is the range of x for the kind of that
component. Where no range of this kind was learnt the end is unknown, and so is what is compared
with it; it has an interval like any measured value, so that ``x > healthy_high(x)`` is true only
where the lower bound of x is above the upper bound of the end. ``known(healthy_high(x))`` asks
whether there is a range. Where the numbers come from: `ranges`.

Names are checked when the rule is loaded: against the feature catalogue, the scope of the rule
(a rule sees features of its own scope and of the run; a pair rule sees those of its components as
``a.feature`` and ``b.feature``), and the range of values each feature can take.
"""

from __future__ import annotations

import ast
import difflib
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Literal

import numpy as np

from diagnoser.errors import RuleError
from diagnoser.rules import interval
from diagnoser.rules.expression import (
    Comparison,
    Condition,
    Connective,
    Expression,
    HealthyEnd,
    KindTest,
    Known,
    Name,
    Negation,
    Number,
    Numeric,
    Operation,
    evaluate_condition,
    evaluate_number,
    leaves_of,
    names_in,
)
from diagnoser.rules.interval import TRUE
from diagnoser.table import Catalogue, Column, Scope
from diagnoser.vocabulary import KINDS

LONGEST_TEXT: Final = 2000  # characters; the longest sensible rule has a tenth of it
DEEPEST_NESTING: Final = 32

_FOREIGN = re.compile(r"[^A-Za-z0-9_.,()<>=!+\-*/'\" \t\r\n]")

_ARITHMETIC: Final[Mapping[type[ast.operator], Callable[[Column, Column], Column]]] = {
    ast.Add: interval.add,
    ast.Sub: interval.subtract,
    ast.Mult: interval.multiply,
    ast.Div: interval.divide,
}
_COMPARISONS: Final[Mapping[type[ast.cmpop], str]] = {
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}
_ANY_NUMBER: Final = 100  # stands for «as many arguments as you like»
_FUNCTIONS: Final[Mapping[str, tuple[Callable[..., Column], int, int]]] = {
    "abs": (interval.absolute, 1, 1),
    "min": (interval.minimum, 2, _ANY_NUMBER),
    "max": (interval.maximum, 2, _ANY_NUMBER),
    "log": (interval.logarithm, 1, 1),
    "sqrt": (interval.square_root, 1, 1),
}
_ENDS: Final[Mapping[str, Literal["low", "high"]]] = {"healthy_low": "low", "healthy_high": "high"}


class Mistake(Exception):  # noqa: N818 - a finding about a text, turned into a RuleError by place
    """Something wrong at an offset of an expression."""

    def __init__(self, offset: int, text: str) -> None:
        super().__init__(text)
        self.offset = offset


def suggestion(word: str, known: Iterable[str]) -> str:
    """Returns ``; did you mean 'x'?``, or nothing where no known word is close.

    >>> suggestion("lerning_rate", ["learning_rate", "loss"])
    "; did you mean 'learning_rate'?"
    """
    close = difflib.get_close_matches(word[:100], list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def resolve_feature(
    prefix: str, name: str, catalogue: Catalogue, scope: Scope, on: str = ""
) -> str:
    """Returns the full name (``feature`` or ``a.feature``) of a feature as a rule sees it.

    Args:
        prefix: what was written before the dot, or nothing.
        name: the feature.
        catalogue: all features.
        scope: the scope of the rule.
        on: the component (``a`` or ``b``) that a bare component feature of a pair rule belongs to.

    Raises:
        LookupError: the feature does not exist, or cannot be seen from this scope; the text says
            which.
    """
    if prefix not in ("", "a", "b") or (prefix and scope != "pair"):
        raise LookupError(
            f"'{prefix[:60]}.{name[:60]}': the only prefixes are a. and b., in a pair rule"
        )
    if name not in catalogue:
        raise LookupError(f"unknown feature '{name[:60]}'{suggestion(name, catalogue)}")
    own = catalogue[name].scope
    if on and prefix not in ("", on):
        raise LookupError(f"this stage is on '{on}' and cannot see '{prefix}.{name}'")
    if scope == "pair" and own == "component":
        prefix = prefix or on
        if not prefix:
            raise LookupError(f"'{name}' belongs to a component: write a.{name} or b.{name}")
        return f"{prefix}.{name}"
    if prefix:
        raise LookupError(f"'{name}' is a {own} feature and takes no prefix")
    if own not in (scope, "run") or (on and own == "pair"):
        seen_from = f"a stage on '{on}'" if on else f"a {scope} rule"
        raise LookupError(f"'{name}' is a {own} feature and cannot be seen from {seen_from}")
    return name


def parse_expression(text: str, catalogue: Catalogue, scope: Scope, on: str = "") -> Expression:
    """Parses and checks an expression.

    Raises:
        Mistake: the text is not an expression of this language, with the offset in ``text``.
    """
    if len(text) > LONGEST_TEXT:
        raise Mistake(0, f"longer than {LONGEST_TEXT} characters; split the rule")
    if foreign := _FOREIGN.search(text):
        character = foreign.group()
        shown = ascii(character) if not character.isascii() else f"'{character}'"
        raise Mistake(foreign.start(), f"{shown} has no meaning in a rule; remove it")
    # One line, of ASCII: the parser's column is the offset in the text.
    line = re.sub(r"[\t\r\n]", " ", text)
    indent = len(line) - len(line.lstrip())
    line = line.strip()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as «1and x»: an error, not a line on stderr
            tree = ast.parse(line, mode="eval").body
    except SyntaxError as error:
        offset = min(max((error.offset or 1) - 1, 0), len(line))
        raise Mistake(indent + offset, f"not an expression: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError):
        raise Mistake(indent, "nested too deeply; split the rule") from None
    parser = _Parser(line, catalogue, scope, on)
    try:
        root = parser.condition(tree, 0)
    except Mistake as mistake:
        raise Mistake(indent + mistake.offset, str(mistake)) from None
    names = tuple(dict.fromkeys(names_in(root)))
    if not names:
        raise Mistake(indent, "compares no feature; a rule needs at least one")
    ends = (leaf for leaf in leaves_of(root) if isinstance(leaf, HealthyEnd))
    ranges = tuple(dict.fromkeys(ends))
    return Expression(" ".join(line.split()), root, names, ranges, tuple(parser.conditions))


def compile_expression(text: str, catalogue: Catalogue, scope: Scope, on: str = "") -> Expression:
    """Compiles an expression that stands alone (for one in a file see `loading`).

    Raises:
        RuleError: ``when:line:column`` and what is wrong; a note holds the line with a caret.
    """
    try:
        return parse_expression(text, catalogue, scope, on)
    except Mistake as mistake:
        before = text[: mistake.offset].split("\n")
        row, column = len(before) - 1, len(before[-1])
        error = RuleError(f"when:{row + 1}:{column + 1}: {mistake}")
        error.add_note(excerpt(text.split("\n")[row], column))
        raise error from None


def excerpt(line: str, column: int) -> str:
    """Returns the neighbourhood of a place in a line, with a caret under it."""
    start = max(0, column - 60)
    shown = "".join(c if c.isprintable() else " " for c in line[start : start + 100])
    return f"    {shown}\n    {' ' * (column - start)}^"


class _Parser:
    """Turns a Python syntax tree into ours; raises `Mistake` with the offset of what is wrong."""

    def __init__(self, line: str, catalogue: Catalogue, scope: Scope, on: str) -> None:
        self.line = line
        self.catalogue = catalogue
        self.scope: Scope = scope
        self.on = on
        self.conditions: list[str] = []

    def condition(self, node: ast.expr, depth: int) -> Condition:
        self._check_depth(node, depth)
        match node:
            case ast.BoolOp(op=op, values=values):
                function = np.minimum if isinstance(op, ast.And) else np.maximum
                return Connective(function, tuple(self.condition(v, depth + 1) for v in values))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return Negation(self.condition(operand, depth + 1))
            case ast.Compare():
                return self._compare(node, depth)
            case ast.Call(func=ast.Name(id="known"), args=[operand], keywords=[]):
                number = self.number(operand, depth + 1)
                if not any(leaves_of(number)):
                    raise Mistake(operand.col_offset, "known() needs a feature")
                return Known(self._index(node), number)
            case ast.Name() | ast.Attribute():
                return self._flag(node, depth)
        raise Mistake(
            node.col_offset, f"'{self._source(node)}' is no condition; compare it with a threshold"
        )

    def number(self, node: ast.expr, depth: int) -> Numeric:
        self._check_depth(node, depth)
        match node:
            case ast.Constant(value=bool() | str() | bytes() | complex() | None):
                raise Mistake(node.col_offset, f"{self._source(node)} is not a number")
            case ast.Constant(value=int() | float() as value):
                try:
                    number = float(value)
                except OverflowError:
                    number = math.inf
                if not math.isfinite(number):
                    raise Mistake(node.col_offset, "this number is too large")
                return Number(interval.constant(number))
            case ast.Name() | ast.Attribute():
                return Name(self._feature(node))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._operation(node, interval.negate, [operand], depth)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return self._operation(node, _ARITHMETIC[type(op)], [left, right], depth)
            case ast.Call(func=ast.Name(id=function), args=args, keywords=[]) if function in _ENDS:
                return self._healthy_end(node, function, args)
            case ast.Call(func=ast.Name(id=function), args=args, keywords=[]):
                if function not in _FUNCTIONS:
                    hint = suggestion(function, [*_FUNCTIONS, *_ENDS, "known"])
                    raise Mistake(node.col_offset, f"unknown function '{function[:60]}'{hint}")
                operation, fewest, most = _FUNCTIONS[function]
                if not fewest <= len(args) <= most:
                    count = str(fewest) if fewest == most else f"at least {fewest}"
                    raise Mistake(node.col_offset, f"{function}() takes {count} argument(s)")
                return self._operation(node, operation, args, depth)
        raise Mistake(node.col_offset, f"'{self._source(node)}' is no number of this language")

    def _healthy_end(self, node: ast.expr, function: str, args: Sequence[ast.expr]) -> HealthyEnd:
        match args:
            case [ast.Name() | ast.Attribute() as operand]:
                name = self._feature(operand)
                feature = self.catalogue[name.rpartition(".")[2]]
                return HealthyEnd(name, feature.scope, _ENDS[function])
        given = f", not '{self._source(args[0])}'" if len(args) == 1 else ""
        text = f"{function}() takes the name of one feature{given}: only features have ranges"
        raise Mistake(node.col_offset, text)

    def _operation(
        self,
        node: ast.expr,
        function: Callable[..., Column],
        operands: Sequence[ast.expr],
        depth: int,
    ) -> Numeric:
        result = Operation(function, tuple(self.number(x, depth + 1) for x in operands))
        if any(leaves_of(result)):
            return result
        folded = evaluate_number(result, _Ranges(self.catalogue))
        if not np.isfinite(folded.value).all():
            raise Mistake(node.col_offset, f"'{self._source(node)}' is not a finite number")
        return Number(folded)

    def _compare(self, node: ast.Compare, depth: int) -> Condition:
        terms = [node.left, *node.comparators]
        parts: list[Condition] = []
        for op, left, right in zip(node.ops, terms, terms[1:], strict=False):
            if kind := self._kind_name(left):
                parts.append(self._kind_test(kind, op, left, right))
            elif type(op) in _COMPARISONS:
                parts.append(self._numbers(_COMPARISONS[type(op)], left, right, depth))
            else:
                raise Mistake(right.col_offset, "only a kind can be tested with 'in' or 'is'")
        return parts[0] if len(parts) == 1 else Connective(np.minimum, tuple(parts))

    def _numbers(self, operator: str, left: ast.expr, right: ast.expr, depth: int) -> Condition:
        x, y = self.number(left, depth + 1), self.number(right, depth + 1)
        text = f"{ast.unparse(left)} {operator} {ast.unparse(right)}"
        if not any(names_in(x)):  # evidence reads «feature, comparison, threshold»
            left, right, x, y, operator = right, left, y, x, interval.MIRRORED[operator]
        comparison = Comparison(self._append(text), ast.unparse(left), operator, x, y)
        self._check_decidable(comparison, text, left.col_offset)
        return comparison

    def _flag(self, node: ast.Name | ast.Attribute, depth: int) -> Condition:
        """A feature that can only be 0 or 1 is a condition by its name: slow means slow != 0."""
        name = self.number(node, depth + 1)
        assert isinstance(name, Name)
        feature = self.catalogue[name.name.rpartition(".")[2]]
        if (feature.low, feature.high) != (0.0, 1.0):
            text = f"'{name.name}' is a number, no condition; compare it with a threshold"
            raise Mistake(node.col_offset, text)
        return Comparison(
            self._append(name.name), name.name, "!=", name, Number(interval.constant(0.0))
        )

    def _check_decidable(self, comparison: Comparison, text: str, offset: int) -> None:
        always = evaluate_condition(comparison, _Ranges(self.catalogue))
        if not always.any():
            return
        names = dict.fromkeys(leaf.name for leaf in leaves_of(comparison))
        features = [self.catalogue[name.rpartition(".")[2]] for name in names]
        ranges = ", ".join(f"{f.name} lies in [{f.low:g}, {f.high:g}]" for f in features)
        outcome = "always" if (always == TRUE).all() else "never"
        raise Mistake(offset, f"'{text}' is {outcome} true: {ranges or 'it compares two numbers'}")

    def _kind_name(self, node: ast.expr) -> str:
        """Returns ``kind``, ``a.kind`` or ``b.kind`` where the node is one of these, else ''."""
        match node:
            case ast.Name(id="kind"):
                prefix = self.on if self.scope == "pair" else ""
            case ast.Attribute(value=ast.Name(id=("a" | "b") as prefix), attr="kind"):
                pass
            case _:
                return ""
        if self.scope == "run":
            raise Mistake(node.col_offset, "a run has no kind; use scope: component")
        if (self.scope == "pair") != bool(prefix):
            right = "a.kind or b.kind" if self.scope == "pair" else "kind"
            raise Mistake(node.col_offset, f"a {self.scope} rule writes {right}")
        if self.on and prefix != self.on:
            raise Mistake(node.col_offset, f"this stage is on '{self.on}'")
        return f"{prefix}.kind" if prefix else "kind"

    def _kind_test(self, name: str, op: ast.cmpop, left: ast.expr, right: ast.expr) -> Condition:
        match op, right:
            case ((ast.Eq() | ast.NotEq()), ast.Constant()):
                members: Sequence[ast.expr] = [right]
            case ((ast.In() | ast.NotIn()), ast.Tuple(elts=members)):
                pass
            case _:
                text = "a kind is tested as kind == 'query' or kind in ('query', 'key')"
                raise Mistake(left.col_offset, text)
        kinds = set()
        for member in members:
            kind = member.value if isinstance(member, ast.Constant) else None
            if not isinstance(kind, str) or kind not in KINDS:
                hint = suggestion(str(kind), KINDS) or f"; one of {', '.join(KINDS)}"
                text = f"unknown component kind {self._source(member)}{hint}"
                raise Mistake(member.col_offset, text)
            kinds.add(kind)
        test = KindTest(
            self._append(f"{name} in ({', '.join(sorted(kinds))})"), name, frozenset(kinds)
        )
        return Negation(test) if isinstance(op, ast.NotEq | ast.NotIn) else test

    def _feature(self, node: ast.Name | ast.Attribute) -> str:
        match node:
            case ast.Name(id=name):
                prefix = ""
            case ast.Attribute(value=ast.Name(id=("a" | "b") as prefix), attr=name):
                pass
            case _:
                raise Mistake(node.col_offset, f"'{self._source(node)}' is no feature")
        try:
            full = resolve_feature(prefix, name, self.catalogue, self.scope, self.on)
        except LookupError as error:
            raise Mistake(node.col_offset, str(error.args[0])) from None
        if isinstance(node, ast.Name):
            node.id = full  # so that ast.unparse shows whose feature it is
        return full

    def _index(self, node: ast.expr) -> int:
        return self._append(ast.unparse(node))

    def _append(self, text: str) -> int:
        self.conditions.append(text)
        return len(self.conditions) - 1

    def _check_depth(self, node: ast.expr, depth: int) -> None:
        if depth > DEEPEST_NESTING:
            raise Mistake(node.col_offset, "nested too deeply; split the rule")

    def _source(self, node: ast.expr) -> str:
        text = self.line[node.col_offset : node.end_col_offset]
        return text if len(text) <= 40 else f"{text[:37]}..."


class _Ranges:
    """Each feature as the range of values it can take at all: what is true here is always true."""

    shape = (1, 1)

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue

    def column(self, name: str) -> Column:
        feature = self.catalogue[name.rpartition(".")[2]]
        inside = [x for x in (feature.low, feature.high) if math.isfinite(x)] or [0.0]
        value = np.array([[sum(inside) / len(inside)]])
        return Column(value, np.array([[feature.low]]), np.array([[feature.high]]))

    def kinds(self, name: str) -> Sequence[str | None]:  # noqa: ARG002 - part of Columns
        return (None,)

    def healthy(self, end: HealthyEnd) -> Column:
        return self.column(end.name)  # a healthy value is one the feature can take
