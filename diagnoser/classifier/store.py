"""A classifier as a file: no pickle, a fixed list of types, a digest, a schema, a self-check.

``NAME.skops`` holds the estimators and numbers (https://skops.readthedocs.io: a zip of JSON and
arrays, built only from types that are allowed here), ``NAME.json`` beside it what it is: schema,
digest, versions, and the probabilities that a few rows must get, so that another version of
scikit-learn that reads the file differently is noticed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from diagnoser.classifier.predict import Classifier, Judge, one_thread
from diagnoser.classifier.reference import Reference
from diagnoser.errors import ClassifierError

SCHEMA: Final = "diagnoser.classifier/1"
PLAIN: Final = ("bool", "dict", "float", "int", "list", "str", "tuple")
ALLOWED: Final = frozenset(
    {
        "numpy.random.PCG64",
        "numpy.uint64",
        "sklearn._loss.link.Interval",
        "sklearn._loss.link.LogitLink",
        "sklearn._loss.loss.HalfBinomialLoss",
        "sklearn.ensemble._hist_gradient_boosting.binning._BinMapper",
        "sklearn.ensemble._hist_gradient_boosting.gradient_boosting.HistGradientBoostingClassifier",
        "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
        "sklearn.preprocessing._label.LabelEncoder",
    }
)
CHECK_ROWS: Final = 8
SHIPPED: Final = "shipped.skops"
REBUILD: Final = "learn it again from the benchmark's runs"


def save(classifier: Classifier, path: Path, rows: np.ndarray[Any, Any]) -> None:
    """Writes ``path`` (.skops) and the description beside it.

    Args:
        classifier: What to write.
        path: Where to; both files are replaced as a whole.
        rows: Some rows that it was fitted on, (rows, run columns): the first ones are what a reader
            checks itself with.
    """
    io = _skops_io()
    from sklearn import __version__ as sklearn_version

    _store_once([classifier.verdict, classifier.location, *classifier.causes.values()])
    content = {
        "run_columns": list(classifier.run_columns),
        "reference_columns": list(classifier.reference.columns),
        "reference_middle": dict(classifier.reference.middle),
        "reference_spread": dict(classifier.reference.spread),
        "middle": classifier.middle,
        "range": classifier.range,
        "verdict": _of_judge(classifier.verdict),
        "causes": {name: _of_judge(judge) for name, judge in classifier.causes.items()},
        "location": _of_judge(classifier.location),
        "fault_of": dict(classifier.fault_of),
        "threshold": classifier.threshold,
        "most_unfamiliar": classifier.most_unfamiliar,
        "least_known": classifier.least_known,
        "usual": classifier.usual,
        "check_rows": np.ascontiguousarray(rows[:CHECK_ROWS]),
    }
    data = io.dumps(content, compression=zipfile.ZIP_DEFLATED, compresslevel=9)
    expected = classifier.verdict.probability(rows[:CHECK_ROWS])
    description = {
        "schema": SCHEMA,
        "sha256": hashlib.sha256(data).hexdigest(),
        "scikit_learn": sklearn_version,
        "check": expected.tolist(),
        "about": dict(classifier.about),
    }
    _replace(path, data)
    _replace(_description_of(path), (json.dumps(description, indent=1) + "\n").encode())


def _store_once(judges: Iterable[Judge]) -> None:
    """Makes trees share what is the same in all: two empty tables of categories a tree.

    An array that many share is one entry of the file; without that half of its entries would be
    empty, and a third of the time of reading it.
    """
    known: dict[tuple[Any, ...], np.ndarray[Any, Any]] = {}
    for judge in judges:
        for (tree,) in judge.estimator._predictors:
            for name in ("binned_left_cat_bitsets", "raw_left_cat_bitsets"):
                own = getattr(tree, name)
                key = (own.shape, own.dtype.str, own.tobytes())
                setattr(tree, name, known.setdefault(key, own))


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
        ClassifierError: No such file, another schema, a digest that does not fit, a type that is
            not allowed, numbers that the installed scikit-learn reads differently, or none at all.
    """
    data, description = _read(path)
    try:
        io = _skops_io()
    except ImportError as error:
        raise ClassifierError(
            f"{path}: needs scikit-learn and skops, and they cannot be imported ({error}); install "
            "them, or judge by rules alone (--classifier off)"
        ) from error
    try:
        content = io.loads(data, trusted=sorted(ALLOWED))
        classifier = _classifier(content, description["about"])
        with one_thread():
            found = classifier.verdict.probability(content["check_rows"])
    except Exception as error:  # a damaged archive, or an estimator of another version: many ways
        _refuse(io, data, path)
        made_with = description.get("scikit_learn")
        raise ClassifierError(
            f"{path}: made with scikit-learn {made_with}, it does not work with the installed one "
            f"({type(error).__name__}: {error}); {REBUILD}"
        ) from error
    if not np.allclose(found, description["check"], rtol=0, atol=1e-9):
        raise ClassifierError(
            f"{path}: made with scikit-learn {description.get('scikit_learn')}, it predicts "
            f"otherwise with the installed one; {REBUILD}"
        )
    return classifier


def _refuse(io: Any, data: bytes, path: Path) -> None:
    """Says what is wrong with a file as a file, if anything is.

    `io.loads` refuses the same; asking it first would take as long as reading the file.
    """
    try:
        untrusted = io.get_untrusted_types(data=data)
    except Exception as error:  # a damaged archive fails in many ways
        raise ClassifierError(f"{path}: cannot be read ({error}); {REBUILD}") from error
    forbidden = sorted(set(untrusted) - ALLOWED)
    if forbidden:
        raise ClassifierError(
            f"{path}: holds {forbidden[0]}, which is not allowed there; {REBUILD}"
        )


@functools.cache
def _skops_io() -> Any:
    """Imports a skops of our own, that trusts plain values and what is in ``ALLOWED``, no more.

    It would trust all estimators, losses and functions of three libraries, and import most of them,
    wrappers of torch and pytest to list them. Of pandas scikit-learn asks the version when it reads
    a kind of data file; until then a stand-in will do. Whoever else uses skops gets theirs.
    """
    theirs = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_skops(name)}
    sys.modules["skops.io._trusted_types"] = _Trusted("skops.io._trusted_types")
    if stand_in := "pandas" not in sys.modules:
        sys.modules["pandas"] = _Later("pandas")
    try:
        return importlib.import_module("skops.io")
    finally:
        if stand_in:
            del sys.modules["pandas"]
        for name in [name for name in sys.modules if _is_skops(name)]:
            del sys.modules[name]
        sys.modules.update(theirs)


def _is_skops(name: str) -> bool:
    return name == "skops" or name.startswith("skops.")


class _Trusted(ModuleType):
    """The lists of types that skops trusts by itself: plain values, and none of any library."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        plain = name in ("PRIMITIVE_TYPE_NAMES", "CONTAINER_TYPE_NAMES")
        return [f"builtins.{each}" for each in PLAIN] if plain else []


class _Later(ModuleType):
    """A module that has nothing while it stands in for another; later it has what that one has."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)


def _read(path: Path) -> tuple[bytes, dict[str, Any]]:
    beside = _description_of(path)
    try:
        data = path.read_bytes()
        description = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ClassifierError(f"{path}: cannot be read ({error}); {REBUILD}") from None
    if not isinstance(description, dict) or description.get("schema") != SCHEMA:
        found = description.get("schema") if isinstance(description, dict) else None
        raise ClassifierError(f"{beside}: schema {found}, this version reads {SCHEMA}; {REBUILD}")
    if hashlib.sha256(data).hexdigest() != description.get("sha256"):
        raise ClassifierError(f"{path}: is not the file that {beside.name} describes; {REBUILD}")
    return data, description


def _classifier(content: dict[str, Any], about: dict[str, Any]) -> Classifier:
    return Classifier(
        run_columns=tuple(content["run_columns"]),
        reference=Reference(
            tuple(content["reference_columns"]),
            content["reference_middle"],
            content["reference_spread"],
        ),
        middle=content["middle"],
        range=content["range"],
        verdict=Judge(**content["verdict"]),
        causes={name: Judge(**judge) for name, judge in content["causes"].items()},
        location=Judge(**content["location"]),
        fault_of=content["fault_of"],
        threshold=content["threshold"],
        most_unfamiliar=content["most_unfamiliar"],
        least_known=content["least_known"],
        usual=content["usual"],
        about=about,
    )


def _of_judge(judge: Judge) -> dict[str, Any]:
    return {
        "estimator": judge.estimator,
        "columns": judge.columns,
        "slope": judge.slope,
        "intercept": judge.intercept,
    }


def _description_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)
