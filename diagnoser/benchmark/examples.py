"""What a classifier learns from as two small files: one row a look at a run, one a component.

Only the columns that matter are kept, and of every number eleven bits: enough to learn from, and a
tenth of the size. What is kept is what is learned from, so that learning again gives the same.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
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
TRUTH: Final = ("faulty", "causes", "faults", "blamed", "group", "alarmed", "origin")
OF_A_COMPONENT: Final = ("example", "name", "kind")


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
    example: Example, run_columns: Iterable[str], component_columns: Iterable[str]
) -> Example:
    """Returns an example with these columns alone, each number to `BITS` bits."""
    of = example.vectors
    absent = np.full(len(of.names), np.nan)
    run = np.array([of.run.get(name, np.nan) for name in run_columns])
    vectors = Vectors(
        dict(zip(run_columns, _rounded(run).tolist(), strict=True)),
        {name: _rounded(of.components.get(name, absent)) for name in component_columns},
        of.names,
        of.kinds,
    )
    return replace(example, vectors=vectors)


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
    runs: dict[str, Any] = {
        "faulty": [e.faulty for e in examples],
        "causes": [list(e.causes) for e in examples],
        "faults": [list(e.faults) for e in examples],
        "blamed": [list(e.components) for e in examples],
        "group": [e.group for e in examples],
        "origin": [e.origin for e in examples],
        "alarmed": [e.alarmed for e in examples],
    }
    for name in run_columns:
        runs[name] = np.array([e.vectors.run[name] for e in examples], dtype=np.float32)
    sizes = [len(e.vectors.names) for e in examples]
    components: dict[str, Any] = {
        "example": np.repeat(np.arange(len(examples), dtype=np.int32), sizes),
        "name": pa.array([n for e in examples for n in e.vectors.names]).dictionary_encode(),
        "kind": pa.array([k for e in examples for k in e.vectors.kinds]).dictionary_encode(),
    }
    for name in component_columns:
        values = [e.vectors.components[name] for e in examples]
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
    ends = np.searchsorted(components["example"].to_numpy(), np.arange(runs.num_rows + 1))
    of_runs = {name: _numbers(runs[name]) for name in run_columns}
    examples = []
    for i, row in enumerate(runs.select(TRUTH).to_pylist()):
        own = slice(int(ends[i]), int(ends[i + 1]))
        vectors = Vectors(
            {name: float(values[i]) for name, values in of_runs.items()},
            {name: values[own] for name, values in numbers.items()},
            tuple(names[own]),
            tuple(kinds[own]),
        )
        examples.append(
            Example(
                vectors,
                row["faulty"],
                tuple(row["causes"]),
                tuple(row["faults"]),
                tuple(row["blamed"]),
                row["group"],
                alarmed=row["alarmed"],
                origin=row["origin"],
            )
        )
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
