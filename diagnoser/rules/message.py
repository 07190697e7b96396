"""A finding's message: text with ``{feature}``, ``{feature:.2g}``, ``{component}``, ``{other}``.

A closed part of Python's format strings: no attributes or indices of values, no conversions, and
only a precision with ``e``, ``f``, ``g`` or ``%`` as format. What is not known reads «unknown».
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Final

_FORMAT = re.compile(r"(\.[0-9])?[efg%]?")
_DEFAULT_FORMAT: Final = ".3g"
SUBJECTS: Final = ("component", "other")


@dataclass(frozen=True, slots=True)
class Message:
    """A checked template: text, then a name and its format, and so on."""

    fields: tuple[tuple[str, str, str], ...]  # literal text, name ('' at the end), format

    @property
    def features(self) -> tuple[str, ...]:
        """The features it shows."""
        return tuple(name for _, name, _ in self.fields if name and name not in SUBJECTS)

    def render(self, subject: Mapping[str, str], number: Callable[[str], float]) -> str:
        """Returns the text for one finding.

        Args:
            subject: what ``component`` and ``other`` are.
            number: gives the value of a feature by its name.
        """
        text = []
        for literal, name, form in self.fields:
            text.append(literal)
            if name in SUBJECTS:
                text.append(subject[name])
            elif name:
                value = number(name)
                text.append("unknown" if math.isnan(value) else format(value, form))
        return "".join(text)


def parse_message(text: str, resolve: Callable[[str], str]) -> Message:
    """Parses and checks a template.

    Args:
        text: the template.
        resolve: returns the full name of a feature or subject as the rule sees it.

    Raises:
        ValueError: not such a template; the text says why.
        LookupError: from ``resolve``.
    """
    fields = []
    for literal, name, form, conversion in Formatter().parse(text):
        if name is None:
            fields.append((literal, "", ""))
            continue
        if conversion or not _FORMAT.fullmatch(form or ""):
            raise ValueError(f"'{{{name}}}' can have a format such as .2g, nothing else")
        if not name:
            raise ValueError("'{}' names nothing; write {feature}, or {{ for a brace")
        if name in SUBJECTS and form:
            raise ValueError(f"'{{{name}}}' is a name and takes no format")
        fields.append((literal, resolve(name), form or _DEFAULT_FORMAT))
    return Message(tuple(fields))
