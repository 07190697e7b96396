"""What a run is judged by unless told otherwise: the shipped rules and the shipped classifier."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from diagnoser.classifier import Classifier, load, shipped_classifier, verify
from diagnoser.errors import RuleError, UsageError
from diagnoser.features import CATALOGUE
from diagnoser.rules import Rule, load_rules, shipped_rules_directory

DEFAULT_FAMILIES: Final = ("diagnoser", "checks")
FAMILIES: Final = (*DEFAULT_FAMILIES, "autotrainer", "umlaut", "deeplocalize", "deepdiagnosis")
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
    if name in FAMILIES:
        return load_rules(shipped_rules_directory(name), CATALOGUE)
    if not Path(name).is_dir():
        shipped = ", ".join(FAMILIES)
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
    rules: Path | str | None = None, classifier: Path | str | None = None
) -> tuple[tuple[Rule, ...], Classifier | None]:
    """Returns the rules and the classifier, built; arguments and errors as `chosen`."""
    loaded, path = chosen(rules, classifier)
    return loaded, load(path) if path is not None else None


__all__ = ["DEFAULT_FAMILIES", "FAMILIES", "chosen", "default_rules", "judges"]
