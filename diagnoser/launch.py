"""Runs somebody's unmodified training script, or module, under the monitor.

It becomes ``__main__`` as plain Python would make it (argv, ``__file__``, ``sys.path[0]``, pickling
of its classes, spawned and forked workers), its stdout stays untouched, and a traceback shows only
its own frames.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import gc
import importlib
import importlib.util
import io
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from typing import Any

from diagnoser.errors import DiagnoserError, UsageError
from diagnoser.ranks import Team, end_undisturbed, present
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


@dataclass(frozen=True, slots=True)
class Program:
    """What is run as ``__main__``.

    Attributes:
        name: What its run directory is called after.
        called: ``sys.argv[0]``.
        folder: ``sys.path[0]``.
        code: What is executed.
        spec: Where it was found as a module; None: it is a file.
    """

    name: str
    called: str
    folder: str
    code: types.CodeType
    spec: ModuleSpec | None = None


def run_script(
    script: Path | str,
    arguments: Sequence[str],
    *,
    module: bool = False,
    out: Path | None = None,
    overhead: float = 0.10,
    every: int | None = None,
    rules: Path | str | None = None,
    classifier: Path | str | None = None,
    limit: Limit | None = None,
    repair: Mode = "off",
    strategy: Strategy = DIAGNOSER,
    stop_on: str | None = None,
    heads: bool = False,
    track: bool = False,
) -> Outcome:
    """Runs a script to its end and diagnoses what was seen, however it ended.

    Args:
        script: The Python file; ``sys.argv[0]`` is spelled as it is here.
        arguments: Its command line.
        module: ``script`` is the name of a module or package, as ``python -m`` takes it.
        out: Run directory; a new one under ``diagnoser-runs/`` if left out.
        overhead: See `session.watch`.
        every: See `session.watch`.
        rules: See `session.watch`.
        classifier: See `session.watch`.
        limit: When to stop the script, after some more checks; None lets it run to its end.
        repair: See `session.watch`.
        strategy: How repairs are chosen.
        stop_on: See `session.watch`.
        heads: See `session.watch`.
        track: See `session.watch`.

    Raises:
        UsageError: There is no such script, or it is not Python. Nothing of it has run then.
        RuleError, ClassifierError: A file that cannot be used.
        RunLogError: The run directory cannot be written.
    """
    program = _module(str(script)) if module else _file(Path(script), str(script))
    header = {"script": str(script), "arguments": list(arguments), "python": sys.version.split()[0]}
    everywhere: dict[str, Any] = {
        "overhead": overhead,
        "every": every,
        "rules": rules,
        "classifier": classifier,
        "name": program.name,
        "header": header,
        "limit": limit,
        "heads": heads,
    }
    watch = Watch(
        out,
        **everywhere,
        announce=to_stderr(),
        repair=repair,
        strategy=strategy,
        stop_on=stop_on,
        track=track,
    )
    process = os.getpid()
    with watch, _watching_processes(watch, everywhere):
        exit_code = _run_as_main(program, arguments)
        watch.end_trial(exit_code)
        if os.getpid() != process:  # a forked child that ran to the end of the script
            sys.exit(exit_code)
        watch.finish(exit_code)
    if watch.directory is None or not watch.diagnoses:  # off, or another rank does
        return Outcome(exit_code, None, None)
    try:
        return Outcome(exit_code, watch.diagnose(), watch.directory, left=watch.left)
    except DiagnoserError as error:  # a full disk is no reason not to say what was found
        seen = watch.diagnose(write=False)
        return Outcome(exit_code, seen, watch.directory, str(error), watch.left)
    except Exception as error:  # a mistake of ours: the script's exit code still counts
        problem = f"{watch.directory}: no diagnosis could be made ({error!r}); the log is kept"
        return Outcome(exit_code, None, watch.directory, problem)


@dataclass(frozen=True, slots=True)
class _Watched:
    """What a process that a script starts runs, under a watch of its own.

    ``options`` are those of the watch, ``directory`` that of the run.
    """

    function: Callable[..., Any]
    directory: Path
    options: Mapping[str, Any]

    def __call__(self, index: int, *arguments: Any) -> Any:
        if _present:
            _present.pop().leave()  # this process is a fork
        team = Team(self.directory, index)
        try:
            watch = Watch(team=team, announce=to_stderr(), **self.options).__enter__()
        except DiagnoserError:  # the training counts
            return self.function(index, *arguments)
        exit_code = 1
        try:
            result = self.function(index, *arguments)
            exit_code = 0
        except Stopped:
            exit_code = 0
        except SystemExit as stop:
            exit_code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            raise
        else:
            return result
        finally:
            watch.end(exit_code)


_present: list[Watch] = []  # of the script that runs


@contextlib.contextmanager
def _watching_processes(watch: Watch, options: Mapping[str, Any]) -> Iterator[None]:
    """Has the processes watched that a script trains in: those of ``torch.multiprocessing.spawn``.

    Each logs into the directory of this run, which diagnoses them together when the script ends.
    """
    module = importlib.import_module("torch.multiprocessing.spawn")  # and not the function
    package = importlib.import_module("torch.multiprocessing")
    original, directory = module.start_processes, watch.directory
    if directory is None:
        yield
        return

    @functools.wraps(original)
    def start_processes(fn: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        return original(_Watched(fn, directory, options), *arguments, **named)

    _present.append(watch)
    module.start_processes = package.start_processes = start_processes  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.start_processes = package.start_processes = original  # type: ignore[attr-defined]
        _present.clear()


def _file(script: Path, called: str) -> Program:
    """Returns a file as a program; ``called`` is how it is spelled."""
    if not script.exists():
        raise UsageError(f"{script}: no such script; give the path of a Python file")
    if script.is_dir():
        raise UsageError(f"{script}: a directory; give the path of a Python file in it")
    try:
        with io.open_code(str(script.absolute())) as file:
            code = compile(file.read(), str(script.absolute()), "exec", dont_inherit=True)
    except OSError as error:
        raise UsageError(f"{script}: cannot be read ({error.strerror})") from None
    except SyntaxError as error:
        place = f"{script}:{error.lineno}" if error.lineno else str(script)
        raise UsageError(f"{place}: not a Python script ({error.msg})") from None
    except ValueError as error:  # null bytes
        raise UsageError(f"{script}: not a Python script ({error})") from None
    folder = str(Path(code.co_filename).resolve().parent)
    return Program(script.stem or "run", called, folder, code)


def _module(name: str) -> Program:
    """Returns a module, or what is run of a package, as a program; imports neither.

    Where it is found is what ``python -m`` would find from here.
    """
    if name.endswith(".py"):
        raise UsageError(f"-m {name}: a file; give it without -m, or the module without .py")
    folder = str(Path.cwd())
    sys.path[0] = folder
    spec = _spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        name, spec = f"{name}.__main__", _spec(f"{name}.__main__")
        if spec is None:
            raise UsageError(f"-m {name.removesuffix('.__main__')}: a package without __main__")
    if spec is None:
        raise UsageError(f"-m {name}: no such module; is it installed, or a file in {folder}?")
    try:
        code = spec.loader.get_code(name)  # type: ignore[union-attr]
    except (ImportError, AttributeError):  # of a loader that has none
        code = None
    except SyntaxError as error:
        raise UsageError(f"{error.filename}:{error.lineno}: not Python ({error.msg})") from None
    if code is None:
        raise UsageError(f"-m {name}: not written in Python; it cannot be run as a script")
    return Program(name.removesuffix(".__main__"), spec.origin or name, folder, code, spec)


def _spec(name: str) -> ModuleSpec | None:
    """Returns where a module would be found; packages around it are looked into, not imported."""
    first, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):  # an empty name, a module that hides where it is from
        return None
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    return spec


def _run_as_main(program: Program, arguments: Sequence[str]) -> int:
    """Executes a program as ``__main__``; returns the exit code plain Python would have given."""
    file, spec = program.code.co_filename, program.spec
    main = types.ModuleType("__main__")
    main.__dict__.update(
        __file__=file if spec is None else spec.origin,
        __builtins__=builtins,
        __loader__=SourceFileLoader("__main__", file) if spec is None else spec.loader,
        __spec__=spec,
        __cached__=None if spec is None else spec.cached,
    )
    if spec is not None:
        main.__package__ = spec.parent
    sys.argv = ["-m" if spec is not None else program.called, *arguments]
    sys.path[0] = program.folder
    try:
        if spec is not None and spec.parent:
            importlib.import_module(spec.parent)
        sys.argv[0] = program.called
        sys.modules["__main__"] = main
        try:
            exec(program.code, main.__dict__)
        finally:
            if present() is not None:
                end_undisturbed()
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
