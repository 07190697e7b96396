"""Runs that must not see one another, each made in a fork of its own, some at a time."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

Task = TypeVar("Task")


def answers(
    tasks: Sequence[Task],
    work: Callable[[Task], dict[str, Any]],
    jobs: int,
    deadline: float = math.inf,
) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Yields tasks with what became of them, as they are finished; none begins after ``deadline``.

    A row with ``problem`` is of a run that raised or died. What all need is best imported, and used
    once, before the call.
    """
    torch.set_num_threads(1)
    waiting, running = list(reversed(tasks)), dict[int, tuple[Task, Path]]()
    with tempfile.TemporaryDirectory(prefix="diagnoser-forks-") as folder:
        while waiting or running:
            while waiting and len(running) < jobs and time.monotonic() < deadline:
                task, answer = waiting.pop(), Path(folder) / f"{len(waiting)}.json"
                child = os.fork()
                if child == 0:
                    _answer(task, work, answer)
                running[child] = task, answer
            if not running:
                return
            child, status = os.wait()
            task, answer = running.pop(child)
            if answer.exists():
                yield task, json.loads(answer.read_text("utf-8"))
                answer.unlink()
            else:
                yield task, {"problem": f"ended with {status}"}


def _answer(task: Task, work: Callable[[Task], dict[str, Any]], answer: Path) -> NoReturn:
    try:
        try:
            row = work(task)
        except Exception as error:
            traceback.print_exc()
            row = {"problem": f"{type(error).__name__}: {error}"}
        part = answer.with_suffix(".part")
        part.write_text(json.dumps(row), "utf-8")
        part.replace(answer)
    finally:
        os._exit(0)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file with one JSON object a line; a line that was cut is none."""
    rows = []
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def undamaged(path: Path, is_whole: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Returns the rows of such a file; damaged lines are said and taken out, to be made anew.

    Args:
        path: The file; there may be none yet.
        is_whole: Whether a row has all that it should; KeyError and TypeError say no.
    """
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []
    good, bad = [], []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            whole = is_whole(row)
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if whole:
            good.append(row)
        else:
            bad.append(number)
    if bad:
        print(f"{path}: damaged, made anew: lines {', '.join(map(str, bad))}", file=sys.stderr)
        write_rows(path, good)
    return good


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a file with one JSON object a line, all of it or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)
