"""Runs of the scripts in ``cases``, plain and watched, and the files that keep them.

Those of ``reproductions`` have two forms, those of ``controls`` are as they should be.

Finished runs are kept, a line each, and not made again unless the script changed or, of watched
ones, the code that judges. One process at a time may write to a file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from diagnoser.benchmark.configuration import code_digest
from diagnoser.benchmark.harm import OK
from diagnoser.benchmark.results import write_whole
from diagnoser.diagnosis import DEFAULT_FAMILIES, FAMILIES, default_rules, diagnose
from diagnoser.runlog import read_run

ROOT: Final = Path(__file__).parents[1]
FOLDER: Final = ROOT / "cases" / "reproductions"
CONTROLS: Final = ROOT / "cases" / "controls"
RESULTS: Final = ROOT / "benchmarks" / "results"
# What was said when a lot was first opened, which no later run may overwrite.
JUDGED_ONCE: Final = RESULTS / "judged-once"
RUNS: Final = RESULTS / "reproductions-runs.json"
DEFAULTPLUSPLUS: Final = RESULTS / "defaultplusplus-scripts.json"
PUBLISHED: Final = tuple(family for family in FAMILIES if family not in DEFAULT_FAMILIES)
FORMS: Final = ("faulty", "fixed")
HEALTHY: Final = ("healthy",)
NOT_JUDGING: Final = ("benchmark", "injection")  # rooms that no watched run passes through

Row = dict[str, Any]  # one run
Key = tuple[str, str, int]  # script, form, seed


@dataclass(frozen=True, slots=True)
class Done:
    """A process that has ended; ``error`` is the last line of its stderr where it failed."""

    exit_code: int
    stdout: bytes
    error: str
    cpu_s: float


def execute(arguments: Sequence[str]) -> Done:
    """Runs Python from the root of the repository, with one thread, to its end."""
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        with process:
            assert process.stdout is not None
            stdout = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        stderr.seek(0)
        said = stderr.read().decode(errors="replace").strip().splitlines()
    error = said[-1][:200] if process.returncode and said else ""
    cpu_s = round(usage.ru_utime + usage.ru_stime, 2)
    return Done(process.returncode, stdout, error, cpu_s)


def script_of(name: str) -> Path:
    """Returns the file of a script; names of controls begin with ``c``."""
    return (CONTROLS if name.startswith("c") else FOLDER) / f"{name}.py"


def words(name: str, form: str, seed: int) -> list[str]:
    """Returns the command line of a script, without Python."""
    return [
        str(script_of(name)),
        *(["--fixed"] if form == "fixed" else []),
        "--seed",
        str(seed),
    ]


def metric_of(stdout: bytes) -> float:
    r"""Returns the value of the last line, which is ``metric VALUE``.

    >>> metric_of(b"epoch 1\nmetric 0.93\n")
    0.93

    Raises:
        ValueError: It is not.
    """
    lines = stdout.decode(errors="replace").splitlines()
    name, _, value = lines[-1].partition(" ") if lines else ("", "", "")
    if name != "metric":
        raise ValueError("the last line is not `metric VALUE`")
    return float(value)


def train(name: str, form: str, seed: int) -> Row:
    """Trains one form of a script; ``metric`` is None where it crashed or is not finite."""
    done = execute(words(name, form, seed))
    status, metric = _metric(done)
    return {
        "status": status,
        "exit_code": done.exit_code,
        "error": done.error,
        "metric": metric,
        "output": hashlib.sha256(done.stdout).hexdigest()[:16],
        "cpu_s": done.cpu_s,
    }


def _metric(done: Done) -> tuple[str, float | None]:
    if done.exit_code:
        return OK, None
    try:
        metric = metric_of(done.stdout)
    except ValueError as error:
        return str(error), None
    return OK, metric if math.isfinite(metric) else None


def watch(name: str, form: str, seed: int) -> Row:
    """Trains one form of a script by itself and under the tool, and returns what the tool says."""
    script = words(name, form, seed)
    plain = execute(script)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        done = execute(["-m", "diagnoser.cli", "run", "--out", str(path), *script])
        file = path / "diagnosis.json"
        said = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        others = {family: _by_family(path, family) for family in PUBLISHED} if said else {}
    return {
        "exit_code": done.exit_code,
        "plain_exit_code": plain.exit_code,
        "error": done.error,
        "metric": _metric(plain)[1],
        "same_output": (done.stdout, done.exit_code) == (plain.stdout, plain.exit_code),
        "cpu_s": done.cpu_s,
        "plain_cpu_s": plain.cpu_s,
        "verdict": said["verdict"] if said else "none",
        "causes": [[c["cause"], c["component"]] for c in said["causes"]] if said else [],
        "findings": [_finding(f) for f in said["findings"]] if said else [],
        "others": others,
    }


def _by_family(run: Path, family: str) -> Row:
    """Returns what a family of published rules says of the same log."""
    diagnosis = diagnose(read_run(run), default_rules(family))
    return {
        "verdict": diagnosis.verdict,
        "causes": [[c.cause, c.component] for c in diagnosis.causes],
        "findings": [{"component": f.component} for f in diagnosis.findings],
    }


def _finding(finding: Mapping[str, Any]) -> Row:
    kept = {name: finding[name] for name in ("source", "fault", "component", "severity")}
    where, causes = finding["where"], finding["causes"]
    kept["cause"] = causes[0]["cause"] if causes else None
    kept["where"] = f"{Path(where['file']).name}:{where['line']}" if where else None
    return kept


def digest_of_script(name: str) -> str:
    """Returns a digest of a script."""
    return hashlib.sha256(script_of(name).read_bytes()).hexdigest()[:16]


@functools.cache
def digest_of_code() -> str:
    """Returns a digest of all that a diagnosis rests on: code without docstrings, rules, data."""
    paths = [
        path
        for top in (ROOT / "diagnoser", ROOT / "rules")
        for path in sorted(top.rglob("*"))
        if path.is_file() and path.suffix != ".pyc"
        if path.relative_to(top).parts[0] not in NOT_JUDGING
    ]
    parts = [
        code_digest(path.read_text(encoding="utf-8"))
        if path.suffix == ".py"
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    ]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def watched_path(lot: str, kind: str = "reproductions", *, once: bool = False) -> Path:
    """Returns where the watched runs of a lot are kept, of the code now or of the first look."""
    return (JUDGED_ONCE if once else RESULTS) / f"{kind}-watched-{lot}.json"


def check_first_look(path: Path, code: str) -> None:
    """Sees to it that what a lot was judged as at first is the work of one code.

    Raises:
        SystemExit: Other code has judged it before.
    """
    if any(row["code"] != code for row in read_rows(path).values()):
        raise SystemExit(f"{path}: was judged by other code before; a first look is taken once")
    path.parent.mkdir(parents=True, exist_ok=True)


def read_rows(path: Path) -> dict[Key, Row]:
    """Returns the runs that a file keeps; none where there is no file."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return {(row["script"], row["form"], row["seed"]): row for row in rows}


def current(rows: Mapping[Key, Row], names: Iterable[str]) -> list[Row]:
    """Returns the runs of these scripts as they are now."""
    digests = {name: digest_of_script(name) for name in names}
    return [row for row in rows.values() if row["digest"] == digests.get(row["script"])]


_WRITING = threading.Lock()


def keep(path: Path, row: Row) -> None:
    """Adds a run to a file, a line a run, in the place of an older one."""
    with _WRITING:
        rows = read_rows(path)
        rows[row["script"], row["form"], row["seed"]] = row
        lines = [json.dumps(rows[key], allow_nan=False) for key in sorted(rows)]
        write_whole(path, ("[\n" + ",\n".join(lines) + "\n]\n").encode())


def complete(
    path: Path,
    names: Iterable[str],
    seeds: int,
    make: Callable[[str, str, int], Row],
    *,
    forms: Sequence[str] = FORMS,
    jobs: int = 1,
    code: str | None = None,
    again: bool = False,
) -> None:
    """Makes the runs that are not kept yet, or all of them.

    Args:
        path: Where they are kept.
        names: Of the scripts.
        seeds: How many, from 0 on.
        make: Makes one run.
        forms: In which each is run.
        jobs: How many at a time.
        code: Digest of code that a run rests on besides its script.
        again: Whether also those that are kept.
    """
    kept = {} if again else read_rows(path)
    stamps = {name: {"digest": digest_of_script(name), "code": code} for name in names}
    missing = [
        (name, form, seed)
        for seed in range(seeds)
        for name, stamp in stamps.items()
        for form in forms
        if {k: kept.get((name, form, seed), {}).get(k) for k in stamp} != stamp
    ]

    def one(name: str, form: str, seed: int) -> None:
        made = make(name, form, seed)
        stamp = {key: value for key, value in stamps[name].items() if value is not None}
        keep(path, {"script": name, "form": form, "seed": seed, **stamp, **made})

    pool = ThreadPoolExecutor(jobs)
    try:
        waiting = [pool.submit(one, *key) for key in missing]
        for i, future in enumerate(as_completed(waiting), start=1):
            future.result()
            print(f"{i} of {len(missing)} runs", end="\r", file=sys.stderr, flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
