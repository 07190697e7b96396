"""Trials in forks of the training process: the exact same training, twice, from one moment on.

A fork has everything: weights, optimizer, random streams, the place in the data, the script's own
variables. So the child goes on with the script as if nothing had happened, with a repair or
without, for some steps, and ends; the parent waits and was never touched. A child must leave no
trace outside of itself: what it prints is dropped, files that were open for writing are cut off,
those that are read are opened once more, and the first time that it would write to a new one, start
a process or save a checkpoint its trial is over.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NoReturn

import torch

from diagnoser.curvature.memory import free_memory
from diagnoser.errors import DiagnoserError, RunLogError
from diagnoser.monitor import Monitor
from diagnoser.repair import Live, apply
from diagnoser.repair.snapshot import size_of, spelled
from diagnoser.repair_loop.comparing import MEASURED_AT
from diagnoser.repair_loop.loop import Ran, Trial
from diagnoser.runlog import RunLogWriter, read_run

GUARANTEE: Final = (
    "paired: every arm is a fork of this process and sees the same batches; the training itself "
    "was not touched"
)
POLL_S: Final = 0.005
SLOWER: Final = 12.0  # times the usual time of a step that a trial may take, and
AT_LEAST_S: Final = 60.0
ROOM: Final = 3.0  # times weights and optimizer state that a child may write to
WRITES: Final = frozenset("wax+")
ACTS: Final = frozenset(
    {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink",
     "os.chmod", "os.chown", "os.utime", "os.setxattr", "os.removexattr", "sqlite3.connect",
     "subprocess.Popen", "os.system", "os.posix_spawn", "os.spawn", "os.exec", "os.fork",
     "os.forkpty", "os.kill", "os.killpg", "socket.connect", "socket.sendto", "socket.sendmsg",
     "shutil.rmtree", "shutil.move", "shutil.copyfile"}
)  # fmt: skip
# What writes files without Python knowing; the first argument is where to.
WRITERS: Final = (
    ("torch.serialization", "_open_zipfile_writer"),
    ("safetensors.torch", "serialize_file"),
    ("safetensors.numpy", "serialize_file"),
)


def why_not(live: Live) -> str:
    """Returns why this process cannot be forked for a trial, in a few words; empty: it can."""
    if not hasattr(os, "fork") or sys.platform == "darwin":
        return "this system cannot fork a process that computes"
    devices = {tensor.device.type for tensor in live.parameters.values()}
    if devices - {"cpu"} or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return "it uses an accelerator, whose context cannot be forked"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "it is one of several processes that train together"
    if threading.current_thread() is not threading.main_thread():
        return "it does not train in the main thread"
    others = [t for t in threading.enumerate() if t is not threading.main_thread()]
    busy = [t.name for t in others if type(t).__name__ != "TMonitor"]  # tqdm's only sleeps
    if busy:
        return f"it has other threads ({busy[0]}), which a fork would lose"
    if multiprocessing.active_children():
        return "it has worker processes, which a fork would share"
    if mapped := _mapped():
        return f"it has a file mapped into memory ({mapped}), which a fork would write to"
    free, needed = free_memory(torch.device("cpu")), ROOM * size_of(live)
    if free is not None and free < needed:
        return f"a fork may take {spelled(needed)}, and {spelled(free)} of memory are free"
    return ""


class Forks:
    """Runs trials in forks; one a training.

    Args:
        monitor: The training's.
        log: Its log.
        directory: Each trial gets a run directory of its own in here.
        step_s: Gives the usual seconds of a step.
    """

    guarantee = GUARANTEE
    how = "in copies of this process"

    def __init__(
        self, monitor: Monitor, log: RunLogWriter, directory: Path, step_s: Callable[[], float]
    ) -> None:
        self._monitor, self._log = monitor, log
        self._directory, self._step_s = directory, step_s
        self._count = 0
        self._left: int | None = None  # steps, in a child
        self._mine: Path | None = None

    @property
    def is_child(self) -> bool:
        """Whether this process is a trial."""
        return self._left is not None

    def why_not(self, live: Live) -> str:
        """See `why_not`."""
        return why_not(live)

    def run(self, live: Live, trial: Trial) -> Ran | None:
        """Makes a trial and returns what it came to; None in the child, which goes on training."""
        self._count += 1
        directory = self._directory / f"{self._count:02d}"
        self._log.recording()  # nothing waits in memory: the child would write it, too
        child = os.fork()
        if child == 0:
            self._become(directory, live, trial)
            return None
        problem = self._wait(child, trial.steps)
        return _read(directory, problem)

    def step_made(self) -> None:
        """Counts a step, in a child; the last one ends it, and so does one without a number."""
        if self._left is None:
            return
        self._left -= 1
        if self._left <= 0:
            self.end(0)

    def end(self, exit_code: int | None) -> NoReturn:
        """Ends this child."""
        try:
            self._monitor.finish(exit_code)
            self._log.close()
        finally:
            os._exit(0)

    # -- in the child ----------------------------------------------------------------------------

    def _become(self, directory: Path, live: Live, trial: Trial) -> None:
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
            gc.freeze()  # what the parent holds is not moved for us
            self._mine, self._left = directory, trial.steps
            _mute()
            sys.dont_write_bytecode = True
            if torch.get_num_threads() > 1:
                torch.set_num_threads(1)  # the others did not survive
            self._log.continue_in(directory)
            self._monitor.schedule.measure_at(
                self._monitor.step + 1 + round(share * trial.steps) for share in MEASURED_AT
            )
            apply(live, trial.actions)
            self._watch_for_traces()
        except DiagnoserError as error:
            self._give_up(str(error))
        except BaseException as error:
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, why: str) -> NoReturn:
        with suppress(Exception):
            self._log.event(self._monitor.step, "trial", why, {})
            self._log.close()
        os._exit(1)

    def _watch_for_traces(self) -> None:
        mine = str(self._mine.absolute()) if self._mine is not None else ""

        def over(what: str) -> None:
            with suppress(Exception):
                self._log.event(self._monitor.step, "trial", f"it would have {what}", {})
            self.end(None)

        def audit(event: str, details: tuple[Any, ...]) -> None:
            if event == "open":
                path, mode, flags = details
                writes = (isinstance(mode, str) and not WRITES.isdisjoint(mode)) or (
                    isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
                )
                if not writes or not isinstance(path, str | bytes | os.PathLike):
                    return
                name = os.fsdecode(path)
                if name.startswith(mine) or name == os.devnull:
                    return
                over("written a file")
            elif event in ACTS:
                if details and isinstance(details[0], str) and details[0].startswith(mine):
                    return
                over(f"called {event}")

        def saves(*_: Any, **__: Any) -> None:
            over("saved a checkpoint")

        for module, name in WRITERS:
            write = getattr(sys.modules.get(module), name, None)
            if write is not None:
                setattr(sys.modules[module], name, _only_into_memory(write, saves))
        torch.jit.RecursiveScriptModule.save = saves  # type: ignore[attr-defined, method-assign]
        sys.addaudithook(audit)

    # -- in the parent ---------------------------------------------------------------------------

    def _wait(self, child: int, steps: int) -> str:
        """Waits for a child; returns why it did not get to its end, empty if it did."""
        limit = max(AT_LEAST_S, SLOWER * steps * self._step_s())
        deadline = time.monotonic() + limit
        try:
            while True:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    break
                if time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    return f"the trial took longer than {limit:.0f} s"
                time.sleep(POLL_S)
        except BaseException:  # Ctrl-C: the script's own business, once the child is gone
            with suppress(OSError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            raise
        if os.WIFSIGNALED(status):
            return f"the trial was killed by {signal.Signals(os.WTERMSIG(status)).name}"
        return "" if os.waitstatus_to_exitcode(status) == 0 else "the repair cannot be applied"


def _only_into_memory(write: Callable[..., Any], saves: Callable[..., None]) -> Callable[..., Any]:
    def written(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, str | os.PathLike) for value in (*args, *kwargs.values())):
            saves()
        return write(*args, **kwargs)

    return written


def _read(directory: Path, problem: str) -> Ran:
    try:
        recording = read_run(directory)
    except RunLogError as error:
        return Ran(None, problem or str(error))
    said = [event.message for event in recording.events if event.kind == "trial"]
    if recording.ending is None:
        return Ran(None, said[-1] if said else problem or "the trial died")
    if recording.ending.exit_code:
        problem = problem or f"the script ended with exit code {recording.ending.exit_code}"
    return Ran(recording, problem, stopped=said[-1] if said else "")


def _mapped() -> str:
    """Returns a file that is mapped into memory so that writing there writes to it, or nothing."""
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
            _, access, *_, name = line.split(maxsplit=5) if line.count("/") else ("", "", "")
            system = name.startswith("/dev/") and not name.startswith("/dev/shm/")
            if access == "rw-s" and not system and not name.startswith("/dev/shm/sem."):
                return Path(name).name
    return ""


def _mute() -> None:
    """Cuts off all that could be written to or used up: the terminal, files, pipes, sockets.

    A file that is only read has its place in common with the parent's: it is opened once more.
    """
    import fcntl  # noqa: PLC0415 - where there is fork, there is this

    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        with suppress(OSError):
            os.dup2(nowhere, descriptor)
    for descriptor in _descriptors():
        if descriptor == nowhere:
            continue
        with suppress(OSError):  # it was closed meanwhile
            mode = os.fstat(descriptor).st_mode
            access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
            if stat.S_ISREG(mode) and access == os.O_RDONLY and _opened_again(descriptor):
                continue
            if stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
                os.dup2(nowhere, descriptor, os.get_inheritable(descriptor))


def _opened_again(descriptor: int) -> bool:
    """Opens a file that is read once more, at the same place; returns whether that was possible."""
    try:
        place = os.lseek(descriptor, 0, os.SEEK_CUR)
        other = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
    except OSError:
        return False
    os.lseek(other, place, os.SEEK_SET)
    os.dup2(other, descriptor, os.get_inheritable(descriptor))
    os.close(other)
    return True


def _descriptors() -> Sequence[int]:
    """Returns what is open beside the standard streams."""
    try:
        found = [int(name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208 - names alone
    except OSError:
        found = list(range(1024))
    return [descriptor for descriptor in found if descriptor > 2]
