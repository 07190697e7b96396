"""Reads a YAML file of which every reader would make the same values, and remembers the places.

Much of YAML turns text silently into something else: ``no`` is false, ``1e-3`` is text in YAML 1.1
and a number in YAML 1.2, ``1:30`` is ninety, a key given twice keeps its last value. Here each of
these is an error with ``path:line:column``, and so are anchors and aliases (nine short lines of
them can expand to gigabytes), tags, directives and further documents. Left are mappings with text
keys, lists, text, whole and decimal numbers, ``.nan``, ``.inf``, ``true``, ``false``, ``null``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from diagnoser.errors import RuleError
from diagnoser.rules.parsing import excerpt

LARGEST_FILE: Final = 64 * 1024  # bytes
DEEPEST_NESTING: Final = 16
LONGEST_ERROR: Final = 1000  # characters

# The parser of libyaml is ten times faster; both give the same events.
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_WORDS: Final = {"true": True, "false": False, "null": None, "": None}
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_DECIMAL = re.compile(r"[-+]?[0-9]+\.[0-9]+([eE][-+][0-9]+)?|[-+]?\.inf|\.nan")
_AMBIGUOUS = re.compile(
    r"~|=|<<|y|n|yes|no|on|off|true|false|null"  # words of YAML 1.1 in any case
    r"|[-+]?\.?(nan|inf|infinity)"
    r"|[-+]?[0-9][0-9_]*(:[0-9_.]+)+"  # base sixty
    r"|[-+]?0[xob][0-9a-f_]+"
    r"|[-+]?[0-9_]*\.?[0-9_]*(?<=[0-9_.])(e[-+]?[0-9_]*)?"  # any other shape of a number
    r"|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}.*",  # a date
    re.IGNORECASE,
)

Location = tuple[str | int, ...]  # keys and list positions from the top of the document


@dataclass(frozen=True, slots=True)
class Document:
    """The data of one file, and where each piece of it stands (line and column from zero)."""

    path: Path
    lines: tuple[str, ...]
    data: dict[str, Any]
    keys: dict[Location, tuple[int, int]] = field(default_factory=dict)
    values: dict[Location, tuple[int, int, str]] = field(default_factory=dict)  # with the style

    def error(self, location: Location, text: str, *, at_key: bool = False) -> RuleError:
        """Returns an error about the value (or key) at a location, or what encloses it."""
        while location and location not in self.values:
            location = location[:-1]
        line, column, _ = self.values.get(location, (0, 0, ""))
        if at_key and location in self.keys:
            line, column = self.keys[location]
        return _error(self.path, self.lines, line, column, text)

    def error_in_text(self, location: Location, offset: int, text: str) -> RuleError:
        """Returns an error about one character of a text value.

        Folding and indentation change only the white space of a text, so its n-th other character
        is the n-th in the file too (in quoted text only as long as nothing is escaped).
        """
        line, column, style = self.values[location]
        value = self.data
        for step in location:
            value = value[step]  # type: ignore[index] # locations follow the data
        count = sum(not c.isspace() for c in str(value)[:offset])
        if style in ("|", ">"):
            line, column = line + 1, 0
        elif style:
            column += 1
        for row in range(line, len(self.lines)):
            for position in range(column if row == line else 0, len(self.lines[row])):
                if not self.lines[row][position].isspace():
                    if count == 0:
                        return _error(self.path, self.lines, row, position, text)
                    count -= 1
        return self.error(location, text)


def read_document(path: Path) -> Document:
    """Reads a YAML file whose top is a mapping.

    Raises:
        RuleError: the file cannot be read, or is not of the plain YAML described above.
    """
    try:
        if not path.is_file():
            raise RuleError(f"{path}: not a file")
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise RuleError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > LARGEST_FILE:
        raise RuleError(f"{path}: larger than {LARGEST_FILE // 1024} KiB; split it")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise RuleError(f"{path}:{line}:{column}: not UTF-8; save the file as UTF-8") from None
    return _Builder(path, text).document()


def _error(path: Path, lines: tuple[str, ...], line: int, column: int, text: str) -> RuleError:
    # The text may quote the file, and the file anything: an error stays one printable line.
    shown = "".join(c if c.isprintable() else " " for c in text[:LONGEST_ERROR])
    error = RuleError(f"{path}:{line + 1}:{column + 1}: {shown}")
    if line < len(lines):
        error.add_note(excerpt(lines[line], column))
    return error


class _Builder:
    """Builds plain values from the events of a YAML parser."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.lines = tuple(re.split(r"\r\n|\r|\n", text))
        self.text = text
        self.keys: dict[Location, tuple[int, int]] = {}
        self.values: dict[Location, tuple[int, int, str]] = {}

    def document(self) -> Document:
        try:
            events = yaml.parse(self.text, Loader=_LOADER)
            data = self._document(iter(events))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, column = (mark.line, mark.column) if mark else (0, 0)
            if "nesting depth" in str(error.problem):  # a limit of PyYAML's own, since 6.0.4
                raise self._at(line, column, "nested too deeply") from None
            raise self._at(line, column, f"not YAML: {error.problem}") from None
        except yaml.YAMLError as error:  # an unprintable character
            raise self._at(0, 0, f"not YAML: {str(error).splitlines()[0]}") from None
        return Document(self.path, self.lines, data, self.keys, self.values)

    def _document(self, events: Iterator[Any]) -> dict[str, Any]:
        data: Any = None
        seen = False
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if seen:
                    raise self._wrong(event, "a second document; one rule a file")
                if event.version or event.tags:
                    raise self._wrong(event, "a directive; remove it")
                seen = True
                first = next(events)
                data = self._value(events, first, (), 0)
                if not isinstance(data, dict):
                    raise self._wrong(first, "the top of the file must be keys with values")
        if not seen:
            raise self._at(0, 0, "the file is empty")
        assert isinstance(data, dict)
        return data

    def _value(self, events: Iterator[Any], event: Any, location: Location, depth: int) -> Any:
        if depth > DEEPEST_NESTING:
            raise self._wrong(event, "nested too deeply")
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            raise self._wrong(event, "anchors and aliases are not used here; write the value out")
        if event.tag:
            raise self._wrong(event, "tags are not used here; remove it")
        mark = event.start_mark
        if isinstance(event, yaml.ScalarEvent):
            self.values[location] = (mark.line, mark.column, event.style or "")
            return self._scalar(event)
        self.values[location] = (mark.line, mark.column, "")
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(event := next(events), yaml.SequenceEndEvent):
                items.append(self._value(events, event, (*location, len(items)), depth + 1))
            return items
        mapping: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            key = self._key(event)
            if key in mapping:
                raise self._wrong(event, f"key '{key}' is given twice; keep one")
            self.keys[*location, key] = (event.start_mark.line, event.start_mark.column)
            mapping[key] = None
            mapping[key] = self._value(events, next(events), (*location, key), depth + 1)
        return mapping

    def _key(self, event: Any) -> str:
        if not isinstance(event, yaml.ScalarEvent) or event.anchor or event.tag:
            raise self._wrong(event, "a key must be plain text")
        return str(event.value)[:200]

    def _scalar(self, event: Any) -> Any:
        text = str(event.value)
        if not event.implicit[0]:  # quoted or a block: text
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _WHOLE.fullmatch(text):
            return int(text)
        if _DECIMAL.fullmatch(text):
            return float(text.replace(".inf", "inf").replace(".nan", "nan"))
        if len(text) < 100 and _AMBIGUOUS.fullmatch(text):
            remedy = "write a number as 0.001 or 1.0e-3, yes and no as true and false, or quote it"
            raise self._wrong(event, f"YAML readers disagree about '{text}'; {remedy}")
        return text

    def _wrong(self, event: Any, text: str) -> RuleError:
        return self._at(event.start_mark.line, event.start_mark.column, text)

    def _at(self, line: int, column: int, text: str) -> RuleError:
        return _error(self.path, self.lines, line, column, text)
