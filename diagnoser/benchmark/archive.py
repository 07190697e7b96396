"""Watched runs of many configurations as one small file, from which their logs are made again.

A log is some 400 kB of text. Kept are its records as they are, but for the rows of measurements,
which stand in columns of their own, and for digits: of a measured number and of a loss `BITS` bits
are kept, of an error `ERROR_BITS`, cut towards zero so that what is less than one, or more than
zero, stays so. That is a few parts in ten thousand of a number whose own error is larger, and a
thirtieth of the size. Packing what was unpacked gives the same bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from diagnoser.benchmark.jobs import Row
from diagnoser.benchmark.results import SCHEMA
from diagnoser.errors import BenchmarkError

BITS: Final = 10
ERROR_BITS: Final = 5
# Columns of the rows of a measurement record, and how many bits are kept of each; 0: all.
ROWS: Final = {
    "step": 0,
    "quantity": 0,
    "component": 0,
    "other": 0,
    "samples": 0,
    "method": 0,
    "dtype": 0,
    "value": BITS,
    "std_error": ERROR_BITS,
    "batch_std_error": ERROR_BITS,
}
CURVES: Final = ("value", "accuracy")  # of a loss record
TIMES: Final = ("seconds", "training_s", "monitoring_s")
# Times are a machine's; the digest of a log is computed where it is written.
FIELDS: Final = tuple(field for field in SCHEMA if field.name not in {"cpu_s", "log_sha256"})
LEVEL: Final = 19  # of zstd
_NAMES: Final = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def pack(runs: Iterable[tuple[Row, bytes]]) -> bytes:
    """Returns runs, each a row of results and its compressed log, as the content of one file."""
    rows: list[dict[str, Any]] = []
    for row, log in runs:
        records, measured = _split(gzip.decompress(log))
        rows.append({**row, "records": records, **measured})
    integers = [name for name, bits in ROWS.items() if not bits]
    numbers = [name for name, bits in ROWS.items() if bits]
    schema = pa.schema(
        [
            *FIELDS,
            ("records", pa.string()),
            *((name, pa.list_(pa.int32())) for name in integers),
            *((name, pa.list_(pa.float32())) for name in numbers),
        ]
    )
    content = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist(rows, schema=schema),
        content,
        compression="zstd",
        compression_level=LEVEL,
        use_dictionary=[f"{name}.list.element" for name in integers],
        use_byte_stream_split=[f"{name}.list.element" for name in numbers],
        data_page_size=1 << 26,  # logs are alike: the more of them together, the smaller
        store_schema=False,
    )
    return content.getvalue()


def unpack(content: bytes) -> Iterator[tuple[Row, bytes]]:
    """Yields the rows and compressed logs that `pack` was given.

    Raises:
        BenchmarkError: The content is not what `pack` makes.
    """
    try:
        table = pq.read_table(io.BytesIO(content))
        names = [field.name for field in FIELDS]
        for row in table.to_batches(max_chunksize=1):
            of = {name: row.column(name)[0].as_py() for name in names}
            columns = {
                name: row.column(name)[0].values.to_numpy(zero_copy_only=False) for name in ROWS
            }
            yield of, gzip.compress(_joined(row.column("records")[0].as_py(), columns), mtime=0)
    except (pa.ArrowException, KeyError, ValueError, AttributeError, IndexError) as error:
        raise BenchmarkError(f"no archive of runs: {' '.join(str(error).split())}") from error


def _split(log: bytes) -> tuple[str, dict[str, NDArray[Any]]]:
    """Returns the records of a log, and the rows of all its measurements in columns."""
    lines: list[str] = []
    columns: dict[str, list[Any]] = {name: [] for name in ROWS}
    for line in log.splitlines():
        record = json.loads(line)
        match record["record"]:
            case "measurement":
                record["seconds"] = _time(record["seconds"])
                rows = record["rows"]
                record["rows"] = len(rows["step"])
                for name, values in rows.items():
                    columns[name] += values
            case "loss":
                for name in CURVES:
                    values = np.array(record[name], dtype=np.float64)
                    record[name] = _texts(cut_digits(values, BITS))
            case "end" if record["cost"] is not None:
                cost = record["cost"]
                record["cost"] = {k: _time(v) if k in TIMES else v for k, v in cost.items()}
            case "fact" if "file" in record["data"]:
                record["data"]["file"] = PurePath(record["data"]["file"]).name
        lines.append(json.dumps(record, separators=(",", ":")))
    found: dict[str, NDArray[Any]] = {}
    for name, bits in ROWS.items():
        values = columns[name]
        if bits:
            found[name] = cut_digits(np.array(values, dtype=np.float64), bits)  # null is NaN
        else:
            found[name] = np.array(values, dtype=np.int32)
    return "\n".join(lines), found


def _joined(records: str, columns: dict[str, NDArray[Any]]) -> bytes:
    """Returns the log that `_split` took apart."""
    texts = {
        name: _texts(columns[name]) if bits else columns[name].tolist()
        for name, bits in ROWS.items()
    }
    lines, at = [], 0
    for line in records.split("\n"):
        record = json.loads(line)
        if record["record"] == "measurement":
            count = record["rows"]
            record["rows"] = {name: values[at : at + count] for name, values in texts.items()}
            at += count
        lines.append(json.dumps(record, separators=(",", ":")) + "\n")
    return "".join(lines).encode("ascii")


def cut_digits(values: NDArray[np.float64], bits: int) -> NDArray[np.float32]:
    """Cuts numbers to so many bits, towards zero; NaN, infinities and zero stay.

    >>> cut_digits(np.array([0.99999, -3.0, 1e-12, np.nan]), 5).tolist()
    [0.96875, -3.0, 9.663381206337363e-13, nan]
    """
    single = np.finfo(np.float32)
    inside = np.clip(np.abs(values), single.smallest_subnormal, single.max)
    fraction, exponent = np.frexp(inside)
    cut = np.copysign(np.ldexp(np.trunc(fraction * 2.0**bits) / 2.0**bits, exponent), values)
    kept = np.where(np.isfinite(values) & (values != 0.0), cut, values)
    return kept.astype(np.float32)


def _texts(values: NDArray[np.float32]) -> list[float | str]:
    """Returns numbers as a log has them: JSON has no NaN."""
    return [v if math.isfinite(v) else _NAMES[str(v)] for v in values.tolist()]


def _time(seconds: float | str) -> float | str:
    return float(f"{seconds:.3g}") if isinstance(seconds, float) else seconds
