"""Runs somebody's unmodified training script under the monitor.

The script becomes ``__main__`` as plain Python would make it (argv, ``__file__``, ``sys.path[0]``,
pickling of its classes, spawned and forked workers), its stdout stays untouched, and a traceback
shows only its own frames.
"""

from __future__ import annotations

import builtins
import io
import os
import sys
import traceback
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diagnoser.errors import DiagnoserError, UsageError
from diagnoser.session import Watch, to_stderr
from diagnoser.types import Diagnosis

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a script ended, and what was found; ``diagnosis`` is None when watching is off."""

    exit_code: int
    diagnosis: Diagnosis | None
    directory: Path | None
    problem: str | None = None  # why no diagnosis could be written


def run_script(
    script: Path,
    arguments: Sequence[str],
    *,
    out: Path | None = None,
    overhead: float = 0.10,
    every: int | None = None,
    rules: Path | None = None,
) -> Outcome:
    """Runs a script to its end and diagnoses what was seen, however it ended.

    Args:
        script: The Python file.
        arguments: Its command line.
        out: Run directory; a new one under ``diagnoser-runs/`` if left out.
        overhead: See `session.watch`.
        every: See `session.watch`.
        rules: See `session.watch`.

    Raises:
        UsageError: There is no such script, or it is not Python. Nothing has run then.
        RuleError: A rule file that cannot be used.
        RunLogError: The run directory cannot be written.
    """
    code = _compiled(script)
    header = {"script": str(script), "arguments": list(arguments), "python": sys.version.split()[0]}
    watch = Watch(
        out,
        overhead=overhead,
        every=every,
        rules=rules,
        name=script.stem or "run",
        header=header,
        announce=to_stderr(),
    )
    process = os.getpid()
    with watch:
        exit_code = _run_as_main(code, script, arguments)
        if os.getpid() != process:  # a forked child that ran to the end of the script
            sys.exit(exit_code)
        watch.finish(exit_code)
    if watch.directory is None:
        return Outcome(exit_code, None, None)
    try:
        return Outcome(exit_code, watch.diagnose(), watch.directory)
    except DiagnoserError as error:
        return Outcome(exit_code, None, watch.directory, str(error))


def _compiled(script: Path) -> types.CodeType:
    if not script.exists():
        raise UsageError(f"{script}: no such script; give the path of a Python file")
    if script.is_dir():
        raise UsageError(f"{script}: a directory; give the path of a Python file in it")
    try:
        with io.open_code(str(script.absolute())) as file:
            return compile(file.read(), str(script), "exec", dont_inherit=True)
    except OSError as error:
        raise UsageError(f"{script}: cannot be read ({error.strerror})") from None
    except SyntaxError as error:
        place = f"{script}:{error.lineno}" if error.lineno else str(script)
        raise UsageError(f"{place}: not a Python script ({error.msg})") from None
    except ValueError as error:  # null bytes
        raise UsageError(f"{script}: not a Python script ({error})") from None


def _run_as_main(code: types.CodeType, script: Path, arguments: Sequence[str]) -> int:
    """Executes code as ``__main__`` and returns the exit code plain Python would have given."""
    main = types.ModuleType("__main__")
    main.__dict__.update(
        __file__=str(script), __builtins__=builtins, __spec__=None, __cached__=None
    )
    sys.modules["__main__"] = main
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.absolute().parent)
    try:
        exec(code, main.__dict__)
    except SystemExit as stop:
        return _exit_code(stop.code)
    except KeyboardInterrupt as interruption:
        _print_exception(interruption)
        return INTERRUPTED
    except BaseException as error:
        _print_exception(error)
        return 1
    finally:
        _flush()
    return 0


def _exit_code(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def _print_exception(error: BaseException) -> None:
    """Shows the traceback that plain Python would show: without our frame at its top."""
    trace = error.__traceback__.tb_next if error.__traceback__ is not None else None
    try:
        sys.excepthook(type(error), error, trace)
    except Exception:  # a script's own excepthook that fails
        traceback.print_exception(type(error), error, trace)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
