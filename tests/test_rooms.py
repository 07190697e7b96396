"""Who may import whom: a module may import only from rows below its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import diagnoser

ROOT = Path(diagnoser.__file__).parent

ROWS = (
    {"vocabulary", "types", "table", "errors"},
    {"runlog", "components", "cases", "stepping"},
    {"features", "rules", "classifier", "importing", "curvature", "statistics"},
    {"checks", "difference"},
    {"diagnosis", "report", "monitor", "ranks", "repair", "injection"},
    {"repair_loop", "trackers"},
    {"session"},
    {"launch", "integrations", "benchmark", "training"},
    {"restart"},
    {"cli"},
)
ROW = {room: row for row, rooms in enumerate(ROWS) for room in rooms}

# What is right of the run log works on a laptop without torch.
WITHOUT_TORCH = {"vocabulary", "types", "table", "errors", "features", "runlog"}
WITHOUT_TORCH |= {"rules", "classifier", "difference", "diagnosis", "report", "cases"}
WITHOUT_TORCH |= {"importing"}
HEAVY = {"torch", "transformers"}
NOT_FOR_A_DIAGNOSIS = HEAVY | {"pandas", "sklearn"}

ENTRANCES = {"__init__", "__main__"}  # lazy doors, not rooms: they may lead anywhere


def room_of(path: Path, root: Path) -> str:
    """Returns the module or package right under ``root`` that a file belongs to."""
    return path.relative_to(root).parts[0].removesuffix(".py")


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Yields line and dotted name of all that is imported, at any depth of the code.

    ``package`` is where relative imports start from. Of ``from a import b`` the name is ``a.b``.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            for alias in node.names:
                yield node.lineno, ".".join(filter(None, (*base, node.module, alias.name)))


def violations(root: Path) -> list[str]:
    """Returns one line for each import that the table of rooms forbids."""
    found = []
    for path in sorted(root.rglob("*.py")):
        room = room_of(path, root)
        if room in ENTRANCES or room.startswith("_"):
            continue
        where = path.relative_to(root).as_posix()
        if room not in ROW:
            found.append(f"{where}: {room} is in no row of the table")
            continue
        package = ("diagnoser", *path.relative_to(root).parent.parts)
        for line, name in imports(ast.parse(path.read_text("utf-8")), package):
            top, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if top in HEAVY and room in WITHOUT_TORCH:
                found.append(f"{where}:{line}: {room} imports {top}")
            if top == "diagnoser" and target in ROW and target != room and ROW[target] >= ROW[room]:
                found.append(f"{where}:{line}: {room} imports {target}")
    return list(dict.fromkeys(found))  # `from a import b, c` is one violation, not two


def test_every_import_leads_to_a_row_below():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        ("types.py", "import torch.nn", "types.py:1: types imports torch"),
        (
            "features.py",
            "def f():\n    from torch import nn",
            "features.py:2: features imports torch",
        ),
        ("rules/load.py", "from ..cli import main", "rules/load.py:1: rules imports cli"),
        ("runlog.py", "from diagnoser import features", "runlog.py:1: runlog imports features"),
        ("monitor.py", "import diagnoser.report.html", "monitor.py:1: monitor imports report"),
        ("helpers.py", "", "helpers.py: helpers is in no row of the table"),
        ("rules/load.py", "from . import lexer\nfrom ..types import Finding", None),
        ("cli.py", "import torch\nfrom diagnoser.launch import launch", None),
        ("curvature/lanczos.py", "from diagnoser.curvature.hvp import product", None),
        ("__init__.py", "from diagnoser import cli", None),
    ],
)
def test_the_check_itself(tmp_path, file, code, complaint):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(code, "utf-8")
    assert violations(tmp_path) == ([complaint] if complaint else [])


@pytest.mark.parametrize(
    "room", sorted({room_of(path, ROOT) for path in ROOT.rglob("*.py")} & WITHOUT_TORCH)
)
def test_a_fresh_interpreter_imports_it_without_torch(room):
    code = (
        f"import sys, diagnoser.{room}\nprint(*sorted({NOT_FOR_A_DIAGNOSIS!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
