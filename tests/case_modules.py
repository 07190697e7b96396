"""Loads a module of a case under a name of its own: others have modules of the same name."""

import importlib.util
import sys
from pathlib import Path

CASES = Path(__file__).parents[1] / "cases"


def load(case, name, monkeypatch):
    path = CASES / case / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"case_{case}_{name}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    return module
