"""The ranks of a distributed training: which one this process is, and where their logs meet.

Every rank measures what it sees and writes a log of its own; nothing of ours is a collective. For a
collective that one rank enters and another does not is a hang, and no rank can promise to come: it
may be killed, its measurement may fail, its program may be elsewhere. Nothing is lost by that. What
the program reduces (gradients, under DDP) is the same on every rank already; what it does not (the
loss, attention, curvature) can be averaged later, for all ranks measure at the same steps: in a
distributed training the schedule depends on step numbers alone (`monitor.schedule`). So the logs
lie beside each other, rank 0's as that of any run, the others' in ``rank-1`` and so on in the same
directory, and whoever reads the run makes one of them (`runlog.ranks`).

All that a rank has to be told is where that directory is. Rank 0 leaves it in the store that the
process group was built with; the others look there before each step until they see it, and never
wait. Until then their log is kept in memory. A rank that does not find the directory on its own
host, since there is no file system in common, leaves no log, and the diagnosis says so.

At the end one rank diagnoses: rank 0, once the others have ended or a few seconds later; if the
training failed, the first rank that did, since the others may hang in a collective for long.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist

from diagnoser.runlog import LOG_FILE, RANK, RunLogWriter, rank_directory
from diagnoser.vocabulary import MODEL

LOOKS: Final = 50  # steps before which rank 0 must have said where it logs
PATIENCE_S: Final = 10.0  # how long the others may take to end,
PATIENCE_AFTER_FAILURE_S: Final = 1.0  # since they may hang then
POLL_S: Final = 0.05
HEAD_BYTES: Final = 1 << 20  # of a log, among which its first facts are
TAIL_BYTES: Final = 4096
FIRST_FAILURE: Final = "first-failure"  # a file that names the rank that failed first


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of a distributed training: its number, and how many there are."""

    number: int
    ranks: int


def of_group() -> Rank | None:
    """Returns which rank this process is of its process group; None: there is none, or no other."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    size = dist.get_world_size()
    return Rank(dist.get_rank(), size) if size > 1 else None


def present() -> Rank | None:
    """Returns the same, before there is a group by what a launcher put into the environment."""
    group = of_group()
    if group is not None:
        return group
    try:
        number, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None
    return Rank(number, size) if 0 <= number < size and size > 1 else None


def restarted(directory: Path) -> Path:
    """Returns where to log when an elastic launcher has started the training again."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if present() is None or not count.isdigit() or int(count) == 0:
        return directory
    return directory.with_name(f"{directory.name}-restart-{count}")


class Team:
    """What one watch knows of the ranks it belongs to.

    Args:
        inside: The run's directory, where it is of the process that started this one.
        index: Of this process among those that were started.

    Attributes:
        rank: Which one this process is, as far as is known; None: it is alone.
        joined: Whether it is of a process group of several.
    """

    _watches = 0  # made in this process, which the ranks of a group make in the same order

    def __init__(self, inside: Path | None = None, index: int = 0) -> None:
        self.rank = present()
        self.joined = False
        self.inside = inside
        self.index = index
        self._key = f"diagnoser/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}/{Team._watches}"
        Team._watches += 1
        self._looks = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks while the training goes on."""
        if self.inside is not None:
            return self.index == 0
        return self.rank is None or self.rank.number == 0

    @property
    def waits(self) -> bool:
        """Whether the log of this process waits in memory until training begins."""
        return self.inside is not None or not self.is_first

    def join(self, log: RunLogWriter) -> bool:
        """Notes in the log which rank of which group this is, once; returns whether it did."""
        group = of_group()
        if self.joined or group is None:
            return False
        self.joined, self.rank = True, group
        data = {"ranks": group.ranks, "host": socket.gethostname(), "process": os.getpid()}
        log.fact(0, RANK, MODEL, float(group.number), data | {"run": uuid.uuid4().hex})
        return True

    def tell(self, directory: Path, log: RunLogWriter) -> None:
        """Leaves word where rank 0 logs."""
        mark = next(f.data["run"] for f in log.recording().facts if f.name == RANK)
        word = json.dumps({"directory": str(directory), "run": mark})
        _store().set(self._key, word)

    def look(self) -> Path | None:
        """Returns the run's directory, if it is here and rank 0 has left word where it is."""
        self._looks += 1
        if self.inside is not None:
            return self.inside
        store = _store()
        if self.rank is None or not store.check([self._key]):
            return None
        word = json.loads(store.get(self._key))
        directory, self._looks = Path(word["directory"]), LOOKS
        with suppress(OSError), (directory / LOG_FILE).open("rb") as file:
            if str(word["run"]).encode() in file.read(HEAD_BYTES):
                return directory
        return None

    @property
    def has_looked(self) -> bool:
        """Whether it is no use to look for word of rank 0 any longer."""
        return self._looks >= LOOKS

    def own(self, directory: Path) -> Path:
        """Returns where in the run's directory this process logs."""
        return rank_directory(directory, self.index if self.rank is None else self.rank.number)

    def diagnoses(self, directory: Path | None, exit_code: int | None) -> bool:
        """Returns whether this process is the one that diagnoses; asked when its script has ended.

        True for one rank: of those that failed the first, or rank 0.
        """
        if self.inside is not None:
            return False  # the process that started all of them does
        if self.rank is None or not self.joined:
            return self.is_first
        if not exit_code:
            return self.is_first
        if directory is None:
            return False
        try:
            with (directory / FIRST_FAILURE).open("x") as file:
                file.write(f"rank {self.rank.number}\n")
        except FileExistsError:
            return False
        except OSError:  # where nothing can be written, nobody else could say it either
            return self.is_first
        return True

    def await_others(self, directory: Path, own: Path, exit_code: int | None) -> None:
        """Waits until the logs of all other ranks have an end, or will have none; not for long."""
        if not self.joined:
            return
        logs = [d / LOG_FILE for d in (directory, *directory.glob("rank-*"))]
        logs = [log for log in logs if log != own]
        until = time.monotonic() + (PATIENCE_AFTER_FAILURE_S if exit_code else PATIENCE_S)
        while logs and time.monotonic() < until:
            logs = [log for log in logs if not _has_ended(log)]
            if logs:
                time.sleep(POLL_S)


def end_undisturbed() -> None:
    """Keeps a launcher, which ends all ranks when one has failed, from cutting a diagnosis short.

    The script is over and this process about to end; launchers that mean it send SIGKILL later.
    """
    with suppress(ValueError, OSError):  # not in the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _store() -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def _has_ended(log: Path) -> bool:
    """Returns whether a log has its last record, or its process is gone."""
    try:
        with log.open("rb") as file:
            head = file.read(HEAD_BYTES)
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - TAIL_BYTES, 0))
            if b'"record":"end"' in file.read():
                return True
    except OSError:
        return True
    for line in head.splitlines():
        if b'"name":"rank"' in line:
            with suppress(ValueError, LookupError, TypeError):
                data = json.loads(line)["data"]
                return data["host"] == socket.gethostname() and not _lives(int(data["process"]))
    return False


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
