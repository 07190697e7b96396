"""Families of published checks on the benchmark's archived runs.

``python -m benchmarks.published_families`` judges whole runs of the held-out subjects by the rules
of UMLAUT, DeepLocalize and DeepDiagnosis, and counts as `diagnoser.benchmark.scoring` does. They
learn and tune nothing, so that no opening of a split is spent. Writes
``benchmarks/results/bench/published.parquet``, which ``docs/scores.md`` shows beside the others.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.outcomes import BENCH, SIZE
from diagnoser.benchmark.archive import unpack
from diagnoser.benchmark.configuration import catalogue
from diagnoser.benchmark.dataset import recording_of, truths
from diagnoser.benchmark.harm import OK
from diagnoser.benchmark.plan import make_plan
from diagnoser.benchmark.published import JUDGES, by_family
from diagnoser.benchmark.results import Store
from diagnoser.benchmark.scores import Score
from diagnoser.benchmark.scoring import Verdict, figures
from diagnoser.features import feature_tables

KEPT: Final = BENCH / "published.parquet"
MODE: Final = "watched"
SPLITS: Final = ("dev", "test")


def main() -> None:
    """Judges all runs, and writes the figures."""
    said: dict[tuple[str, str], list[Verdict]] = {}
    for family, verdict in _verdicts():
        said.setdefault((verdict.truth.track, family), []).append(verdict)
    scores = [
        dataclasses.asdict(Score(split, MODE, 1.0, family, f.name, f.value, f.low, f.high, f.n))
        for (split, family), own in sorted(said.items())
        for f in figures(own)
    ]
    pq.write_table(pa.Table.from_pylist(scores), KEPT, compression="zstd")
    print(f"{KEPT}: {len(scores)} figures of {len(said)} judges and splits")


def _verdicts() -> Iterator[tuple[str, Verdict]]:
    known = catalogue()
    harms = Store(BENCH, lambda text: print(text, file=sys.stderr)).read_harm()
    true = truths(make_plan(known, SIZE).items, harms, known)
    for subject in sorted({truth.subject for truth in true.values() if truth.track in SPLITS}):
        for row, log in unpack((BENCH / MODE / f"{subject}.parquet").read_bytes()):
            if row["status"] != OK or row["hash"] not in true:
                continue
            with tempfile.TemporaryDirectory() as folder:
                recording = recording_of(log, Path(folder))
            tables = feature_tables(recording)
            for family in JUDGES:
                said = by_family(family, tables, recording)
                decided = (said.faulty, said.score, said.causes, said.components)
                yield family, Verdict(true[row["hash"]], row["seed"], *decided)
        print(subject, file=sys.stderr)


if __name__ == "__main__":
    main()
