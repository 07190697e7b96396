"""Prints the diagnosis that README opens with: the HAN case with its fault, as a user sees it.

``python -m benchmarks.example`` writes ``benchmarks/results/example_diagnosis.txt``; absolute paths
are cut down to the file's own name.
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
    """Runs the case and keeps the likely cause with its first finding and what to try."""
    with tempfile.TemporaryDirectory() as directory:
        out = str(Path(directory) / "train")
        command = [sys.executable, "-m", "diagnoser.cli", "case", "run", "han", "--fault", FAULT]
        done = subprocess.run([*command, "--out", out], capture_output=True, text=True, check=True)
    lines = [
        re.sub(r"(?<!\w)(/[\w.-]+)+/([\w.-]+)", r"\2", line) for line in done.stderr.splitlines()
    ]
    start = next(i for i, line in enumerate(lines) if line.startswith("faulty"))
    end = next(i for i, line in enumerate(lines) if line in LAST_SECTIONS)
    kept = _first_finding(_first_cause(lines[start:end]))
    RESULTS.write_text("\n".join(kept).rstrip() + "\n", encoding="utf-8")


def _first_cause(page: list[str]) -> list[str]:
    """Leaves out what is said of the second cause and further ones."""
    return page[: next((i for i, line in enumerate(page) if line.startswith(" 2. ")), len(page))]


def _first_finding(page: list[str]) -> list[str]:
    """Replaces all findings of the first cause but one by dots; README has no room for a page."""
    findings = [
        i for i, line in enumerate(page) if re.match(r" {4}(critical|high|medium|low) ", line)
    ]
    advice = page.index("    what to try")
    if len(findings) > 1 and findings[1] < advice:
        return [*page[: findings[1]], "    ...", *page[advice:]]
    return page


if __name__ == "__main__":
    main()
