"""What a classifier learns from as two small files: one row a moment of a run, one a component.

Only the columns that matter are kept, and of every number eleven bits: enough to learn from, and a
tenth of the size. What is kept is what is learned from, so that learning again gives the same.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diagnoser.benchmark.results import write_whole
from diagnoser.classifier import EXCESS, Classifier, Example, Vectors
from diagnoser.errors import BenchmarkError
from diagnoser.table import Array

RUNS_FILE: Final = "examples.parquet"
COMPONENTS_FILE: Final = "components.parquet"
BITS: Final = 11  # of a number's digits
NOTE: Final = b"diagnoser.about"
TRUTH: Final = ("last", "faulty", "causes", "faults", "blamed", "group", "alarmed", "origin")
OF_A_COMPONENT: Final = ("moment", "name", "kind")


def influential(
    classifier: Classifier, run_columns: int, component_columns: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the columns on which a classifier rests most, of runs and of components.

    A column counts by the gain of all splits on it, each estimator's total being one. A component's
    column counts for what the location makes of it, and for what a run's row has of it.
    """
    of_runs: dict[str, float] = {}
    of_components: dict[str, float] = {}
    judges = [classifier.verdict, *classifier.causes.values()]
    for judge in judges:
        for index, gain in judge.gains().items():
            name = classifier.run_columns[index]
            of = of_components if name.startswith(EXCESS) else of_runs
            key = name.removeprefix(EXCESS)
            of[key] = of.get(key, 0.0) + gain
    names = classifier.reference.columns
    for index, gain in classifier.location.gains().items():
        key = names[index % len(names)]  # beyond the healthy, then beyond the run's others
        of_components[key] = of_components.get(key, 0.0) + len(judges) * gain
    return _first(of_runs, run_columns), _first(of_components, component_columns)


def _first(gains: Mapping[str, float], count: int) -> tuple[str, ...]:
    order = sorted(gains, key=lambda name: (-gains[name], name))
    return tuple(sorted(order[:count]))


def rounded(
    example: Example, run_columns: Sequence[str], component_columns: Sequence[str]
) -> Example:
    """Returns an example with these columns alone, each number to `BITS` bits."""

    def of(vectors: Vectors) -> Vectors:
        absent = np.full(len(vectors.names), np.nan)
        run = np.array([vectors.run.get(name, np.nan) for name in run_columns])
        return Vectors(
            dict(zip(run_columns, _rounded(run).tolist(), strict=True)),
            {n: _rounded(vectors.components.get(n, absent)) for n in component_columns},
            vectors.names,
            vectors.kinds,
            tuple(map(of, vectors.earlier)),
        )

    return replace(example, vectors=of(example.vectors))


def columns_of(examples: Sequence[Example]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the columns of runs and of components that examples have."""
    first = examples[0].vectors
    return tuple(first.run), tuple(first.components)


def write_examples(directory: Path, examples: Sequence[Example], about: Mapping[str, Any]) -> None:
    """Writes both files.

    Raises:
        BenchmarkError: They cannot be written.
    """
    run_columns, component_columns = columns_of(examples)
    moments = [(e, of) for e in examples for of in (*e.vectors.earlier, e.vectors)]
    runs: dict[str, Any] = {
        "last": [of is e.vectors for e, of in moments],
        "faulty": [e.faulty for e, _ in moments],
        "causes": [list(e.causes) for e, _ in moments],
        "faults": [list(e.faults) for e, _ in moments],
        "blamed": [list(e.components) for e, _ in moments],
        "group": [e.group for e, _ in moments],
        "origin": [e.origin for e, _ in moments],
        "alarmed": [e.alarmed for e, _ in moments],
    }
    for name in run_columns:
        runs[name] = np.array([of.run[name] for _, of in moments], dtype=np.float32)
    sizes = [len(of.names) for _, of in moments]
    components: dict[str, Any] = {
        "moment": np.repeat(np.arange(len(moments), dtype=np.int32), sizes),
        "name": pa.array([n for _, of in moments for n in of.names]).dictionary_encode(),
        "kind": pa.array([k for _, of in moments for k in of.kinds]).dictionary_encode(),
    }
    for name in component_columns:
        values = [of.components[name] for _, of in moments]
        components[name] = np.concatenate(values).astype(np.float32)
    for file, columns, numbers in (
        (RUNS_FILE, runs, run_columns),
        (COMPONENTS_FILE, components, component_columns),
    ):
        table = pa.table(columns)
        note = {NOTE: json.dumps(dict(about)).encode()}
        content = io.BytesIO()
        pq.write_table(
            table.replace_schema_metadata(note),
            content,
            compression="zstd",
            compression_level=19,
            use_dictionary=[
                "name",
                "kind",
                "causes.list.element",
                "faults.list.element",
                "group",
                "origin",
            ],
            use_byte_stream_split=list(numbers),
        )
        write_whole(directory / file, content.getvalue())


def read_examples(directory: Path) -> tuple[list[Example], dict[str, Any]]:
    """Returns what `write_examples` wrote.

    Raises:
        BenchmarkError: A file is not there, or cannot be read.
    """
    try:
        runs, components = (
            pq.read_table(io.BytesIO((directory / name).read_bytes()))
            for name in (RUNS_FILE, COMPONENTS_FILE)
        )
        about = json.loads(runs.schema.metadata[NOTE])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise BenchmarkError(
            f"{directory}: no examples to learn from ({error}); "
            "`python -m benchmarks.teach --bench DIR` makes them from the benchmark's runs"
        ) from error
    run_columns = [name for name in runs.column_names if name not in TRUTH]
    component_columns = [name for name in components.column_names if name not in OF_A_COMPONENT]
    numbers = {name: _numbers(components[name]) for name in component_columns}
    names, kinds = components["name"].to_pylist(), components["kind"].to_pylist()
    ends = np.searchsorted(components["moment"].to_numpy(), np.arange(runs.num_rows + 1))
    of_runs = {name: _numbers(runs[name]) for name in run_columns}
    examples = []
    earlier: list[Vectors] = []
    for i, row in enumerate(runs.select(TRUTH).to_pylist()):
        own = slice(int(ends[i]), int(ends[i + 1]))
        vectors = Vectors(
            {name: float(values[i]) for name, values in of_runs.items()},
            {name: values[own] for name, values in numbers.items()},
            tuple(names[own]),
            tuple(kinds[own]),
        )
        if not row["last"]:
            earlier.append(vectors)
            continue
        examples.append(
            Example(
                replace(vectors, earlier=tuple(earlier)),
                row["faulty"],
                tuple(row["causes"]),
                tuple(row["faults"]),
                tuple(row["blamed"]),
                row["group"],
                alarmed=row["alarmed"],
                origin=row["origin"],
            )
        )
        earlier = []
    return examples, about


def _numbers(column: pa.ChunkedArray) -> Array:
    return np.asarray(column.to_numpy(), dtype=float)


def _rounded(values: Array) -> Array:
    """Rounds to `BITS` bits and to what single precision holds; NaN and infinity stay."""
    fraction, exponent = np.frexp(values)
    near = np.ldexp(np.round(fraction * 2**BITS) / 2**BITS, exponent)
    with np.errstate(over="ignore"):
        single = near.astype(np.float32).astype(float)
    return np.where(np.isfinite(values), single, values)
