"""Prints the diagnoses that ``docs/`` shows, as a user sees them.

``python -m benchmarks.first_fault`` runs ``examples/first_fault.py`` and the same script with
another mistake, and writes what diagnoser printed into ``benchmarks/results/``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCRIPT = ROOT / "examples" / "first_fault.py"
FIRST = RESULTS / "first_fault.txt"
RATE = RESULTS / "rate_too_high.txt"
WRONG = "torch.softmax(self.head(states.mean(1)), dim=-1)"
RIGHT = "self.head(states.mean(1))"


def printed(script: str, folder: Path, name: str) -> str:
    """Returns what diagnoser prints of a run of a script that is called so in a folder.

    Raises:
        CalledProcessError: The script failed.
    """
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(script, encoding="utf-8")
    command = [sys.executable, "-m", "diagnoser.cli", "run", name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stderr


def page(said: str) -> str:
    """Returns the diagnosis alone: from the verdict on, without the times that it took."""
    start = next(i for i, line in enumerate(said.splitlines()) if line.startswith("faulty"))
    lines = said.splitlines()[start:]
    return "\n".join(lines[: lines.index("cost")]).rstrip() + "\n"


def rate_too_high(script: str) -> str:
    """Returns the script without its mistake, with a learning rate 100 times too high."""
    assert WRONG in script and "lr=1e-3" in script
    return script.replace(WRONG, RIGHT).replace("lr=1e-3", "lr=1e-1")


def main() -> None:
    """Runs both, and writes what was printed."""
    script = SCRIPT.read_text(encoding="utf-8")
    for file, changed, name in (
        (FIRST, script, "examples/first_fault.py"),
        (RATE, rate_too_high(script), "train.py"),
    ):
        with tempfile.TemporaryDirectory() as folder:
            file.write_text(page(printed(changed, Path(folder), name)), encoding="utf-8")


if __name__ == "__main__":
    main()
