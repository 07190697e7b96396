"""The run log: all that a run was seen to do, one JSON record a line, in ``log.jsonl``.

`RunLogWriter` writes it beside a training run; `read_run` reads it anywhere, without torch. Both
hand the same decoded lines to the same `RecordingBuilder`, so a diagnosis made while the run goes
on equals the one made from its log (law 6).

Why lines of JSON and not SQLite (WAL mode), by ``benchmarks/runlog_format.py``: SQLite stores NaN
as NULL, and a NaN is never turned into something else here (law 3); its write-ahead log does not
work on network file systems, where runs of clusters are kept (sqlite.org/wal.html), and a
connection must not be carried through a fork, which data loaders do
(sqlite.org/howtocorrupt.html, 2.6). Neither lost a finished append in 20 `kill -9`. SQLite is
faster to append to and smaller: a measurement of 200 rows takes 0.9 ms here, the live recording
included, against 0.2 ms, little beside what measuring takes, and 80 bytes a row against 48. Reading
10^6 rows takes 1.6 s and 146 MiB against 2.4 s and 400 MiB. A killed process loses nothing that was
written; after a power failure the last seconds may be missing, since nothing waits for the disk.
"""

from diagnoser.runlog.builder import RecordingBuilder
from diagnoser.runlog.ranks import RANK, SHARD, merged
from diagnoser.runlog.reader import rank_directory, read_run
from diagnoser.runlog.recording import (
    IMPORTED,
    LOG_FILE,
    Curve,
    Ending,
    Event,
    Fact,
    Measurements,
    Recording,
    Series,
    Thinned,
)
from diagnoser.runlog.records import plain
from diagnoser.runlog.thinning import drawn, evenly, loss_blocks
from diagnoser.runlog.writer import RunLogWriter, add_event, new_run_directory

__all__ = [
    "IMPORTED",
    "LOG_FILE",
    "RANK",
    "SHARD",
    "Curve",
    "Ending",
    "Event",
    "Fact",
    "Measurements",
    "Recording",
    "RecordingBuilder",
    "RunLogWriter",
    "Series",
    "Thinned",
    "add_event",
    "drawn",
    "evenly",
    "loss_blocks",
    "merged",
    "new_run_directory",
    "plain",
    "rank_directory",
    "read_run",
]
