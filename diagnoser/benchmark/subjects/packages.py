"""Packages that a subject needs beyond those of the tool."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from diagnoser.errors import BenchmarkError


def folder_of(module: str, subject: str, install: str) -> Path:
    """Returns where a package is installed, without importing it.

    Args:
        module: Its name in an import.
        subject: Who needs it.
        install: The command that installs it.

    Raises:
        BenchmarkError: It is not installed.
    """
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise BenchmarkError(f"subject {subject} needs the package {module}; run: {install}")
    return Path(found.submodule_search_locations[0])
