"""A classifier as a file: arrays and names, nothing that runs; a digest, a schema, a self-check.

``NAME.npz`` holds trees and numbers (NumPy's archive of arrays, read without pickle), ``NAME.json``
beside it what it is: schema, digest, what made it, and the probabilities that a few rows must get.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.classifier.predict import Classifier, Judge
from diagnoser.classifier.reference import Reference
from diagnoser.classifier.trees import Trees
from diagnoser.errors import ClassifierError

SCHEMA: Final = "diagnoser.classifier/2"
CHECK_ROWS: Final = 8
SHIPPED: Final = "shipped.npz"
REBUILD: Final = "learn it again from the benchmark's runs"
LARGEST_FILE: Final = 16 * 2**20  # bytes, packed or not
LONGEST_REASON: Final = 300

Arrays = Mapping[str, NDArray[Any]]


def save(classifier: Classifier, path: Path, rows: NDArray[Any]) -> None:
    """Writes ``path`` (.npz) and the description beside it.

    Args:
        classifier: What to write.
        path: Where to; both files are replaced as a whole.
        rows: Some rows that it was fitted on, (rows, run columns): the first ones are what a reader
            checks itself with.
    """
    from importlib.metadata import version  # who only reads does without

    reference = classifier.reference
    judges = {"verdict": classifier.verdict, "location": classifier.location}
    judges |= {f"cause.{name}": judge for name, judge in classifier.causes.items()}
    names = {
        "run_columns": classifier.run_columns,
        "reference_columns": reference.columns,
        "kinds": list(reference.middle),
        "causes": list(classifier.causes),
        "fault_of": dict(classifier.fault_of),
        "numbers": {
            "threshold": classifier.threshold,
            "most_unfamiliar": classifier.most_unfamiliar,
            "least_known": classifier.least_known,
        },
    }
    arrays: dict[str, NDArray[Any]] = {
        "names": np.frombuffer(json.dumps(names).encode(), dtype=np.uint8),
        "reference_middle": np.array(list(reference.middle.values())),
        "reference_spread": np.array([reference.spread[kind] for kind in reference.middle]),
        "middle": classifier.middle,
        "range": classifier.range,
        "usual": classifier.usual,
        "check_rows": rows[:CHECK_ROWS],
    }
    for name, judge in judges.items():
        arrays |= {f"{name}.{part}": array for part, array in _of_judge(judge).items()}
    data = io.BytesIO()
    np.savez_compressed(data, allow_pickle=False, **arrays)
    description = {
        "schema": SCHEMA,
        "sha256": hashlib.sha256(data.getvalue()).hexdigest(),
        "scikit_learn": version("scikit-learn"),
        "check": classifier.verdict.probability(rows[:CHECK_ROWS]).tolist(),
        "about": dict(classifier.about),
    }
    _replace(path, data.getvalue())
    _replace(_description_of(path), (json.dumps(description, indent=1) + "\n").encode())


def shipped_classifier() -> Path | None:
    """Returns the file of the classifier that the package brings; None where it brings none."""
    path = Path(__file__).with_name(SHIPPED)
    return path if path.exists() else None


def verify(path: Path) -> None:
    """Checks a file against its description, without building anything of it.

    Raises:
        ClassifierError: No such file, another schema, or a digest that does not fit.
    """
    _read(path)


def load(path: Path) -> Classifier:
    """Reads a classifier.

    Raises:
        ClassifierError: No such file, another schema, a digest that does not fit, an archive that
            is damaged, holds anything but arrays, or lacks one; or it predicts otherwise here.
    """
    data, description = _read(path)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(part.file_size for part in archive.infolist()) > LARGEST_FILE:
                raise ValueError("its arrays are too large")
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        classifier = _classifier(arrays, description["about"])
        found = classifier.verdict.probability(arrays["check_rows"])
        expected = np.asarray(description["check"], dtype=np.float64)
    except Exception as error:  # a damaged archive fails in many ways
        raise _refusal(path, f"cannot be read ({type(error).__name__}: {error}") from error
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=0, atol=1e-9):
        raise ClassifierError(
            f"{path}: it predicts otherwise here than where it was made; {REBUILD}"
        )
    return classifier


def _read(path: Path) -> tuple[bytes, dict[str, Any]]:
    beside = _description_of(path)
    try:
        if max(path.stat().st_size, beside.stat().st_size) > LARGEST_FILE:
            raise ValueError("it is too large")
        data = path.read_bytes()
        description = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(path, f"cannot be read ({error}") from None
    if not isinstance(description, dict) or description.get("schema") != SCHEMA:
        found = description.get("schema") if isinstance(description, dict) else None
        raise _refusal(beside, f"this version reads {SCHEMA} (this is {found}")
    if hashlib.sha256(data).hexdigest() != description.get("sha256"):
        raise ClassifierError(f"{path}: is not the file that {beside.name} describes; {REBUILD}")
    return data, description


def _refusal(path: Path, reason: str) -> ClassifierError:
    """Returns an error of one printable line; the reason, left open, may quote the file."""
    shown = "".join(c if c.isprintable() else " " for c in reason)[:LONGEST_REASON]
    return ClassifierError(f"{path}: {shown}); {REBUILD}")


def _classifier(arrays: Arrays, about: Mapping[str, Any]) -> Classifier:
    """Builds a classifier of what a file holds; any error says that it does not fit together."""
    names = json.loads(arrays["names"].tobytes())
    columns, own = _texts(names["run_columns"]), _texts(names["reference_columns"])
    kinds, causes, fault_of = _texts(names["kinds"]), _texts(names["causes"]), names["fault_of"]
    _texts([*fault_of, *fault_of.values()])
    shape = (len(kinds), len(own))
    for name, expected in (
        ("reference_middle", shape),
        ("reference_spread", shape),
        ("middle", (len(columns),)),
        ("range", (2, len(columns))),
    ):
        if arrays[name].shape != expected or arrays[name].dtype.kind != "f":
            raise ValueError(f"{name} is {arrays[name].shape}, not {expected} numbers")
    _check_places(arrays, "usual", len(columns))
    return Classifier(
        run_columns=columns,
        reference=Reference(
            own,
            dict(zip(kinds, arrays["reference_middle"], strict=True)),
            dict(zip(kinds, arrays["reference_spread"], strict=True)),
        ),
        middle=arrays["middle"],
        range=arrays["range"],
        verdict=_judge(arrays, "verdict", len(columns)),
        causes={name: _judge(arrays, f"cause.{name}", len(columns)) for name in causes},
        location=_judge(arrays, "location", 2 * len(own)),  # see `component_rows`
        fault_of=fault_of,
        usual=arrays["usual"],
        about=about,
        **{name: float(number) for name, number in names["numbers"].items()},
    )


def _of_judge(judge: Judge) -> dict[str, NDArray[Any]]:
    return {
        "nodes": judge.trees.nodes,
        "roots": judge.trees.roots,
        "columns": judge.columns,
        "numbers": np.array([judge.trees.base, judge.slope, judge.intercept]),
    }


def _judge(arrays: Arrays, name: str, columns: int) -> Judge:
    chosen = _check_places(arrays, f"{name}.columns", columns)
    numbers = arrays[f"{name}.numbers"]
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name}.numbers are no numbers")
    base, slope, intercept = numbers.tolist()
    trees = Trees(arrays[f"{name}.nodes"], arrays[f"{name}.roots"], base)
    trees.check(len(chosen))
    return Judge(trees, chosen, slope, intercept)


def _texts(values: Any) -> tuple[str, ...]:
    """Returns a list of names, if it is one."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("names that are no texts")
    return tuple(values)


def _check_places(arrays: Arrays, name: str, columns: int) -> NDArray[Any]:
    """Returns an array of positions of columns, if it is one."""
    places = arrays[name]
    if places.dtype.kind != "i" or places.ndim != 1:
        raise ValueError(f"{name} are no positions of columns")
    if len(places) and not (places.min() >= 0 and places.max() < columns):
        raise ValueError(f"{name}: there is no such column")
    return places


def _description_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)
