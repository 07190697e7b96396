"""Carries out what is missing of a plan, in parallel, and keeps every result as it comes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky.process_executor import BrokenProcessPool, TerminatedWorkerError

from diagnoser.benchmark.harm import OK
from diagnoser.benchmark.jobs import Answer, Job, Mode, Row, carry_out
from diagnoser.errors import BenchmarkError

if TYPE_CHECKING:
    from diagnoser.benchmark.plan import Item
    from diagnoser.benchmark.results import Store

LIMIT_S = {"truth": 120.0, "watched": 900.0, "budget": 240.0}  # wall time of one run
LINE_EVERY_S = 30.0  # of progress where nobody watches a terminal
ATTEMPTS = 3  # at starting the pool again after one of its processes was killed
CONNECT_S = 30.0  # to a Dask scheduler


@dataclass(frozen=True, slots=True)
class Resources:
    """What may be used: processes on this machine, or a Dask cluster; no new work after a time."""

    jobs: int
    dask: str = ""
    minutes: float | None = None


@dataclass(frozen=True, slots=True)
class Progressed:
    """How many runs were asked for, were made now, and are still to be made.

    ``without`` of those made now gave no result; each was named.
    """

    asked: int
    made: int
    left: int
    without: int = 0


def execute(
    items: Sequence[Item],
    mode: Mode,
    store: Store,
    resources: Resources,
    *,
    catalogue: str = "",
    complain: Callable[[str], None],
    progress: TextIO | None = None,
) -> Progressed:
    """Makes the runs of a plan that are not there yet.

    Args:
        items: Configurations; of equal hashes the first is taken.
        mode: ``truth`` (unmonitored), ``watched`` or ``budget``.
        store: Where results are kept.
        resources: What may be used.
        catalogue: The catalogue's name, for the workers.
        complain: Told of each run that failed and each process that was killed.
        progress: Where progress is shown; None: nowhere.

    Raises:
        BenchmarkError: Results cannot be written, or processes are killed again and again.
    """
    unique = {item.hash: item for item in reversed(items)}
    ordered = [item for item in items if unique[item.hash] is item]
    missing = {i.hash: store.missing(mode, i.hash, i.seeds(mode)) for i in ordered}
    asked = sum(len(item.seeds(mode)) for item in ordered)
    waiting = {
        item.hash: Job(
            item.hash,
            item.configuration.to_json(),
            missing[item.hash],
            mode,
            LIMIT_S[mode],
            catalogue,
        )
        for item in ordered
        if missing[item.hash]
    }
    total = sum(len(job.seeds) for job in waiting.values())
    minutes = resources.minutes
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    line = _Progress(total, progress)
    made = without = 0
    for answer in _answers(waiting, resources, deadline, complain):
        item = unique[answer.job.hash]
        rows = [*answer.rows, *_unanswered(answer, item)]
        store.add(mode, item.hash, answer.job.configuration, rows)
        del waiting[item.hash]
        made += len(rows)
        without += sum(row["status"] != OK for row in rows)
        line.clear()
        for text in _complaints(item, rows):
            complain(text)
        line.show(made)
    line.clear()
    return Progressed(asked, made, total - made, without)


def _answers(
    waiting: dict[str, Job],
    resources: Resources,
    deadline: float | None,
    complain: Callable[[str], None],
) -> Iterator[Answer]:
    """Yields answers as they come; the caller takes each out of ``waiting``."""
    for attempt in range(ATTEMPTS):
        jobs = list(waiting.values())
        try:
            if resources.dask:
                yield from _on_cluster(jobs, resources.dask, deadline)
            else:
                yield from _here(jobs, resources.jobs, deadline)
            return
        except (BrokenProcessPool, TerminatedWorkerError) as error:
            left = len(waiting)
            text = f"a process of the pool was killed; {left} configurations are started again"
            complain(text)
            if attempt == ATTEMPTS - 1:
                raise BenchmarkError(
                    f"processes of the pool were killed {ATTEMPTS} times; is memory short? use "
                    "fewer --jobs and give the same command again, what is finished stays"
                ) from error


def _here(jobs: Iterable[Job], processes: int, deadline: float | None) -> Iterator[Answer]:
    # One job waits for each process and no more: what has not begun can still be left for later.
    pool = Parallel(
        n_jobs=processes,
        return_as="generator_unordered",
        batch_size=1,
        pre_dispatch=processes,
    )
    # The pool's processes are kept from call to call, with the environment of the first.
    environment = dict(os.environ)
    yield from pool(delayed(carry_out)(job, environment) for job in _in_time(jobs, deadline))


def _on_cluster(jobs: Iterable[Job], address: str, deadline: float | None) -> Iterator[Answer]:
    try:
        from dask.distributed import Client
    except ImportError as error:
        raise BenchmarkError(f"--dask: {error}; run: pip install 'diagnoser[cluster]'") from error

    with ExitStack() as stack:
        try:
            made: Any = Client(address, timeout=CONNECT_S)  # type: ignore[no-untyped-call]
            client = stack.enter_context(made)
        except (OSError, ValueError) as error:
            raise BenchmarkError(f"no Dask scheduler at {address}: {error}") from error
        threads = max(1, sum(client.nthreads().values()))
        stack.enter_context(parallel_config(backend="dask", client=client))
        pool = Parallel(
            n_jobs=threads, return_as="generator_unordered", batch_size=1, pre_dispatch=2 * threads
        )
        yield from pool(delayed(carry_out)(job) for job in _in_time(jobs, deadline))


def _in_time(jobs: Iterable[Job], deadline: float | None) -> Iterator[Job]:
    for job in jobs:
        if deadline is not None and time.monotonic() > deadline:
            return
        yield job


def _unanswered(answer: Answer, item: Item) -> Iterator[Row]:
    """Rows for the runs that a worker died before."""
    done = {row["seed"] for row in answer.rows}
    c = item.configuration
    for seed in answer.job.seeds:
        if seed not in done:
            yield {
                "hash": item.hash,
                "subject": c.subject,
                "recipe": c.recipe,
                "operator": c.operator,
                "severity": c.severity,
                "place": c.place,
                "remedy": c.remedy,
                "mode": answer.job.mode,
                "seed": seed,
                "status": "killed",
                "reason": answer.complaint or "the worker process gave no answer",
            }


def _complaints(item: Item, rows: Iterable[Row]) -> Iterator[str]:
    """One line for each thing that went wrong with a configuration."""
    c = item.configuration
    what = " ".join(
        w for w in (c.subject, c.recipe, c.operator, c.severity, c.place, c.remedy) if w
    )
    wrong: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if row["status"] != OK:
            wrong.setdefault((row["status"], row["reason"]), []).append(row["seed"])
    for (status, reason), seeds in wrong.items():
        numbers = ", ".join(map(str, seeds))
        yield f"{what} ({item.hash}), seed {numbers}: {status}: {reason}"


class _Progress:
    """Done of total, per cent and time left: one line on a terminal, else one now and then."""

    def __init__(self, total: int, file: TextIO | None) -> None:
        self.total, self.file = total, file
        self.began = self.said = time.monotonic()
        self.live = file is not None and file.isatty()

    def show(self, done: int) -> None:
        now = time.monotonic()
        if self.file is None or (not self.live and now - self.said < LINE_EVERY_S):
            return
        self.said = now
        left = (now - self.began) / max(done, 1) * (self.total - done)
        text = (
            f"{done} of {self.total} runs, {100 * done // max(self.total, 1)} %, {span(left)} left"
        )
        self.file.write(f"\r\x1b[K{text}" if self.live else f"{text}\n")
        self.file.flush()

    def clear(self) -> None:
        """Makes room for other lines on a terminal."""
        if self.live and self.file is not None:
            self.file.write("\r\x1b[K")
            self.file.flush()


def span(seconds: float) -> str:
    """Returns a time as people say it.

    >>> span(42), span(600), span(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def probe(
    items: Sequence[Item],
    mode: Mode,
    resources: Resources,
    *,
    catalogue: str = "",
    complain: Callable[[str], None],
) -> dict[str, float]:
    """Makes one clean run of each subject and returns its CPU time, in seconds, by subject."""
    first: dict[str, Item] = {}
    for item in items:
        if not item.configuration.injections:
            first.setdefault(item.configuration.subject, item)
    jobs: dict[str, Job] = {
        item.hash: Job(
            item.hash, item.configuration.to_json(), (0,), mode, LIMIT_S[mode], catalogue
        )
        for item in first.values()
    }
    found: dict[str, float] = {}
    for answer in _answers(jobs, resources, None, complain):
        del jobs[answer.job.hash]
        for row in answer.rows:
            if row["status"] == OK:
                found[row["subject"]] = row["cpu_s"]
    return found


def to_stderr(text: str) -> None:
    """Says one line on stderr."""
    print(f"diagnoser: {text}", file=sys.stderr, flush=True)
