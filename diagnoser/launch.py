"""Runs somebody's unmodified training script under the monitor.

The script becomes ``__main__`` as plain Python would make it (argv, ``__file__``, ``sys.path[0]``,
pickling of its classes, spawned and forked workers), its stdout stays untouched, and a traceback
shows only its own frames.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import io
import os
import sys
import traceback
import types
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path

from diagnoser.errors import DiagnoserError, UsageError
from diagnoser.repair_loop import DIAGNOSER, Mode, Strategy
from diagnoser.session import Limit, Stopped, Watch, to_stderr
from diagnoser.types import Diagnosis, Finding

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a script ended, and what was found; ``diagnosis`` is None when watching is off.

    ``left`` is what still held at the last measurement where repairs were tried.
    """

    exit_code: int
    diagnosis: Diagnosis | None
    directory: Path | None
    problem: str | None = None  # why the diagnosis could not be made or written
    left: tuple[Finding, ...] = ()

    @property
    def repaired(self) -> bool:
        """Whether a repair was kept, and nothing is left that is grave."""
        tried = self.diagnosis.repairs if self.diagnosis is not None else ()
        return any(attempt.kept for attempt in tried) and not self.left


def run_script(
    script: Path | str,
    arguments: Sequence[str],
    *,
    out: Path | None = None,
    overhead: float = 0.10,
    every: int | None = None,
    rules: Path | str | None = None,
    classifier: Path | str | None = None,
    limit: Limit | None = None,
    repair: Mode = "off",
    strategy: Strategy = DIAGNOSER,
) -> Outcome:
    """Runs a script to its end and diagnoses what was seen, however it ended.

    Args:
        script: The Python file; ``sys.argv[0]`` is spelled as it is here.
        arguments: Its command line.
        out: Run directory; a new one under ``diagnoser-runs/`` if left out.
        overhead: See `session.watch`.
        every: See `session.watch`.
        rules: See `session.watch`.
        classifier: See `session.watch`.
        limit: When to stop the script, after some more checks; None lets it run to its end.
        repair: See `session.watch`.
        strategy: How repairs are chosen.

    Raises:
        UsageError: There is no such script, or it is not Python. Nothing has run then.
        RuleError, ClassifierError: A file that cannot be used.
        RunLogError: The run directory cannot be written.
    """
    path = Path(script)
    code = _compiled(path)
    header = {"script": str(script), "arguments": list(arguments), "python": sys.version.split()[0]}
    watch = Watch(
        out,
        overhead=overhead,
        every=every,
        rules=rules,
        classifier=classifier,
        name=path.stem or "run",
        header=header,
        announce=to_stderr(),
        limit=limit,
        repair=repair,
        strategy=strategy,
    )
    process = os.getpid()
    with watch:
        exit_code = _run_as_main(code, str(script), arguments)
        watch.end_trial(exit_code)
        if os.getpid() != process:  # a forked child that ran to the end of the script
            sys.exit(exit_code)
        watch.finish(exit_code)
    if watch.directory is None:
        return Outcome(exit_code, None, None)
    try:
        return Outcome(exit_code, watch.diagnose(), watch.directory, left=watch.left)
    except DiagnoserError as error:  # a full disk is no reason not to say what was found
        seen = watch.diagnose(write=False)
        return Outcome(exit_code, seen, watch.directory, str(error), watch.left)
    except Exception as error:  # a mistake of ours: the script's exit code still counts
        problem = f"{watch.directory}: no diagnosis could be made ({error!r}); the log is kept"
        return Outcome(exit_code, None, watch.directory, problem)


def _compiled(script: Path) -> types.CodeType:
    if not script.exists():
        raise UsageError(f"{script}: no such script; give the path of a Python file")
    if script.is_dir():
        raise UsageError(f"{script}: a directory; give the path of a Python file in it")
    try:
        with io.open_code(str(script.absolute())) as file:
            return compile(file.read(), str(script.absolute()), "exec", dont_inherit=True)
    except OSError as error:
        raise UsageError(f"{script}: cannot be read ({error.strerror})") from None
    except SyntaxError as error:
        place = f"{script}:{error.lineno}" if error.lineno else str(script)
        raise UsageError(f"{place}: not a Python script ({error.msg})") from None
    except ValueError as error:  # null bytes
        raise UsageError(f"{script}: not a Python script ({error})") from None


def _run_as_main(code: types.CodeType, script: str, arguments: Sequence[str]) -> int:
    """Executes code as ``__main__`` and returns the exit code plain Python would have given."""
    file = code.co_filename
    main = types.ModuleType("__main__")
    main.__dict__.update(
        __file__=file,
        __builtins__=builtins,
        __loader__=SourceFileLoader("__main__", file),
        __spec__=None,
        __cached__=None,
    )
    sys.modules["__main__"] = main
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(file).resolve().parent)
    try:
        exec(code, main.__dict__)
    except SystemExit as stop:
        return _exit_code(stop.code)
    except Stopped:
        return 0
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
    with contextlib.suppress(OSError, ValueError):  # a script may have closed its stderr
        print(code, file=sys.stderr)
    return 1


def _print_exception(error: BaseException) -> None:
    """Shows the traceback that plain Python would show: without frames of ours."""
    linked, seen = [error], set[int]()
    while linked:
        one = linked.pop()
        if id(one) not in seen:  # `raise error from error` is its own cause
            seen.add(id(one))
            one.__traceback__ = _without_ours(one.__traceback__)
            linked += [e for e in (one.__cause__, one.__context__) if e is not None]
    try:
        sys.excepthook(type(error), error, error.__traceback__)
    except Exception:  # a script's own excepthook that fails
        with contextlib.suppress(OSError, ValueError):
            traceback.print_exception(error)


def _without_ours(trace: types.TracebackType | None) -> types.TracebackType | None:
    """Returns a traceback but for the frames of this package."""
    links, kept = [], None
    while trace is not None:
        links.append(trace)
        trace = trace.tb_next
    for link in reversed(links):
        if link.tb_frame.f_globals.get("__name__", "").partition(".")[0] != "diagnoser":
            kept = types.TracebackType(kept, link.tb_frame, link.tb_lasti, link.tb_lineno)
    return kept


def _flush() -> None:
    """Writes what waits in the script's files, also in those that it never closes.

    Plain Python does so when it takes the script's globals apart, which come to no such end here.
    """
    left_open = (
        o for o in gc.get_objects() if issubclass(type(o), io.TextIOBase | io.BufferedIOBase)
    )
    for stream in (sys.stdout, sys.stderr, *left_open):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # None, full, closed
            stream.flush()
