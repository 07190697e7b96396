"""What a run is judged by unless told otherwise: the shipped rules and the shipped classifier.

An imported log of curves has rules of its own: it holds nothing that the others ask for, and is
sampled otherwise than what their thresholds were learned on.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from diagnoser.errors import RuleError, UsageError
from diagnoser.features import CATALOGUE
from diagnoser.rules import Rule, load_rules, shipped_rules_directory

if TYPE_CHECKING:
    from diagnoser.classifier import Classifier

DEFAULT_FAMILIES: Final = ("diagnoser", "checks")
FAMILIES: Final = (*DEFAULT_FAMILIES, "autotrainer", "umlaut", "deeplocalize", "deepdiagnosis")
LOGGED: Final = "logged"  # the family that judges imported logs
SHIPPED: Final = (*FAMILIES, LOGGED)
OFF: Final = "off"  # a file or directory of that name is meant by ./off


def default_rules(directory: Path | str | None = None) -> tuple[Rule, ...]:
    """Loads the rules of a directory or a shipped family, none (``off``), or the shipped ones.

    Raises:
        RuleError: A rule cannot be used; the text names file, line and column.
    """
    if directory is None:
        return tuple(rule for family in DEFAULT_FAMILIES for rule in default_rules(family))
    name = os.fspath(directory)
    if name == OFF:
        return ()
    if name in SHIPPED:
        return load_rules(shipped_rules_directory(name), CATALOGUE)
    if not Path(name).is_dir():
        shipped = ", ".join(SHIPPED)
        raise RuleError(f"{name}: no directory of rule files; shipped families: {shipped}")
    return load_rules(Path(name), CATALOGUE)


def classifier_file(file: Path | str | None = None) -> Path | None:
    """Returns the file of a classifier; None for none (``off``). It is checked, not built.

    No library that learns is imported.

    Raises:
        ClassifierError: No such file, or not what its description says.
    """
    if file is not None and os.fspath(file) == OFF:
        return None
    from diagnoser.classifier import shipped_classifier, verify

    path = shipped_classifier() if file is None else Path(file)
    if path is not None:
        verify(path)
    return path


def chosen(
    rules: Path | str | None = None, classifier: Path | str | None = None
) -> tuple[tuple[Rule, ...], Path | None]:
    """Returns the rules and the classifier's file; see `default_rules` and `classifier_file`.

    Raises:
        UsageError: Both are off.
        RuleError, ClassifierError: One of them cannot be used.
    """
    loaded, path = default_rules(rules), classifier_file(classifier)
    if not loaded and path is None:
        raise UsageError("no rules and no classifier: there is nothing to judge a run by")
    return loaded, path


def judges(
    rules: Path | str | None = None,
    classifier: Path | str | None = None,
    *,
    imported: bool = False,
) -> tuple[tuple[Rule, ...], Classifier | None]:
    """Returns the rules and the classifier, built; arguments and errors as `chosen`.

    Where the run was ``imported`` these are the rules for logs, and no classifier: it has learned
    from measurements.
    """
    if imported:
        return chosen(LOGGED if rules is None else rules, OFF)[0], None
    loaded, path = chosen(rules, classifier)
    if path is None:
        return loaded, None
    from diagnoser.classifier import load  # by rules alone, nobody waits for it

    return loaded, load(path)


__all__ = [
    "DEFAULT_FAMILIES",
    "FAMILIES",
    "LOGGED",
    "SHIPPED",
    "chosen",
    "default_rules",
    "judges",
]
