"""Walks the newcomer's path in a fresh clone with an empty environment, and times it.

``python -m benchmarks.newcomer`` clones this repository as it is committed. There, with nothing in
the environment but a PATH, an empty HOME and how pip reaches its index, it does what README says:
``make demo``; then, in an environment that has torch as that of any training does,
``pip install .`` and ``diagnoser run`` on a script that lies elsewhere. It writes
``benchmarks/results/newcomer.json``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "newcomer.json"
SCRIPT = ROOT / "examples" / "first_fault.py"
OF_PIP = ("PIP_", "SSL_CERT_")  # variables by which a machine reaches its index of packages
VERDICTS = ("healthy: ", "faulty: ", "inconclusive: ")
OWN = "mine"  # the directory of the newcomer's own script


class Walk:
    """Commands, one after the other, as they are typed.

    Attributes:
        commands: What was run, and how many seconds each took.
        seconds: What all of them took.
    """

    def __init__(self, home: Path) -> None:
        self.commands: list[dict[str, Any]] = []
        self.seconds = 0.0
        kept = {name: value for name, value in os.environ.items() if name.startswith(OF_PIP)}
        path = "/usr/local/bin:/usr/bin:/bin"
        self._environment = {**kept, "HOME": str(home), "PATH": path, "LANG": "C.UTF-8"}

    def run(self, command: str, folder: Path) -> list[tuple[float, str]]:
        """Runs a command; returns its lines, each with the seconds of the walk until it came.

        Raises:
            CalledProcessError: It failed.
        """
        begun, lines = time.perf_counter(), []
        with subprocess.Popen(
            ["/bin/sh", "-c", command],
            cwd=folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append((self.seconds + time.perf_counter() - begun, line.rstrip("\n")))
        took = time.perf_counter() - begun
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, str(lines[-20:]))
        print(f"{took:8.1f} s  {command}", flush=True)
        self.seconds += took
        typed = command.replace(str(ROOT), "REPOSITORY")
        self.commands.append({"command": typed, "seconds": round(took, 1)})
        return lines


def verdicts(lines: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Returns the verdicts among lines, each with when it came."""
    said = [(at, line.partition(":")[0]) for at, line in lines if line.startswith(VERDICTS)]
    return [(round(at, 1), verdict) for at, verdict in said]


def demo(folder: Path) -> dict[str, Any]:
    """Clones, and runs the demonstration; returns when it printed which verdicts."""
    walk = Walk(_made(folder / "home"))
    walk.run(f"git clone --quiet {ROOT} diagnoser", folder)
    said = verdicts(walk.run("make demo", folder / "diagnoser"))
    return {"commands": walk.commands, "verdicts": said, "first_diagnosis_s": said[0][0]}


def own_script(folder: Path) -> dict[str, Any]:
    """Clones, installs, and runs a script that lies elsewhere; returns what was found, and when."""
    walk = Walk(_made(folder / "home"))
    shutil.copy(SCRIPT, _made(folder / OWN) / SCRIPT.name)
    walk.run(f"git clone --quiet {ROOT} diagnoser", folder)
    walk.run("python3 -m venv env", folder)
    walk.run("../env/bin/pip install -c constraints.txt torch", folder / "diagnoser")
    walk.run("../env/bin/pip install .", folder / "diagnoser")
    said = verdicts(walk.run(f"../env/bin/diagnoser run {SCRIPT.name}", folder / OWN))
    (diagnosis,) = (folder / OWN).glob("diagnoser-runs/*/diagnosis.json")
    first = json.loads(diagnosis.read_text(encoding="utf-8"))["causes"][0]
    return {
        "commands": walk.commands,
        "verdicts": said,
        "first_diagnosis_s": said[0][0],
        "cause": first["cause"],
        "component": first["component"],
    }


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def main() -> None:
    """Walks both ways, and writes the result."""
    found: dict[str, Any] = {"cores": os.cpu_count()}
    for way in (demo, own_script):
        with tempfile.TemporaryDirectory() as directory:
            found[way.__name__] = way(Path(directory))
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
