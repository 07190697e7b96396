"""Prints the diagnosis that README opens with: the HAN case with its fault, as a user sees it.

``python -m benchmarks.example`` writes ``benchmarks/results/example_diagnosis.txt``; places of the
file system are cut down to the file's own name.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "example_diagnosis.txt"
FAULT = "word-attention-learning-rate"
LAST_SECTIONS = ("also possible", "checked and fine", "could not be judged")


def main() -> None:
    """Runs the case and keeps the head of what it prints, up to what to try."""
    with tempfile.TemporaryDirectory() as directory:
        out = str(Path(directory) / "train")
        command = [sys.executable, "-m", "diagnoser.cli", "case", "run", "han", "--fault", FAULT]
        done = subprocess.run([*command, "--out", out], capture_output=True, text=True, check=True)
    lines = [re.sub(r"(/[\w.-]+)+/([\w.-]+)", r"\2", line) for line in done.stderr.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("faulty"))
    end = next(i for i, line in enumerate(lines) if line in LAST_SECTIONS)
    RESULTS.write_text("\n".join(lines[start:end]).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
