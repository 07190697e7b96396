"""Learns a `Classifier` from runs whose truth is proven."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.classifier.predict import Classifier, Judge, component_rows, run_row
from diagnoser.classifier.reference import Reference, learn_reference
from diagnoser.classifier.vectors import Vectors
from diagnoser.errors import ClassifierError
from diagnoser.table import Array

FOLDS: Final = 5
FEWEST_GROUPS: Final = 3
FEWEST_OF_A_CAUSE: Final = 10  # runs
FALSE_ALARMS: Final = 0.05  # share of healthy runs that the threshold lets through
LIKELY: Final = 0.5  # the least probability of an alarm
UNFAMILIAR: Final = 0.99  # quantile of what the classifier abstains beyond
SEED: Final = 0


@dataclass(frozen=True, slots=True)
class Example:
    """A run and its truth.

    ``components`` are the names (or prefixes) that are right to blame; empty where the fault is the
    whole model's, or there is none. ``group`` keeps twins together in every split. ``alarmed``:
    the rules call it faulty, whatever the classifier says.
    """

    vectors: Vectors
    faulty: bool
    causes: tuple[str, ...]
    faults: tuple[str, ...]
    components: tuple[str, ...]
    group: str
    alarmed: bool = False


def fit(
    examples: Sequence[Example],
    run_columns: Sequence[str],
    component_columns: Sequence[str],
    about: Mapping[str, Any],
) -> Classifier:
    """Learns verdict, causes and location, each calibrated on runs that were held out by group.

    Args:
        examples: Runs with their truth; healthy ones among them.
        run_columns: Columns of `Vectors.run` to learn from.
        component_columns: Columns of `Vectors.components` to learn from.
        about: What is stored of how it was made.

    Raises:
        ClassifierError: Too few runs or groups to learn and calibrate from, a single cause, or no
            component to blame.
    """
    healthy = [example.vectors for example in examples if not example.faulty]
    groups = np.array([example.group for example in examples])
    if len(healthy) < FOLDS or len(set(groups.tolist())) < FEWEST_GROUPS:
        raise ClassifierError(
            f"a classifier needs {FOLDS} healthy runs and {FEWEST_GROUPS} groups of runs; there "
            f"are {len(healthy)} and {len(set(groups.tolist()))}"
        )
    reference = learn_reference(healthy, component_columns)
    columns = (*run_columns, *(f"excess.{name}" for name in component_columns))
    excess = [reference.excess(example.vectors) for example in examples]
    rows = np.array(
        [
            run_row(example.vectors, columns, reference, beyond)
            for example, beyond in zip(examples, excess, strict=True)
        ]
    )
    faulty = np.array([example.faulty for example in examples])
    verdict, held_out = _calibrated(rows, faulty, groups)
    return Classifier(
        run_columns=columns,
        reference=reference,
        middle=_nan_median(rows[~faulty]),
        range=np.stack([_reduce(rows, np.min), _reduce(rows, np.max)]),
        verdict=verdict,
        causes=_fit_causes(examples, rows, groups),
        location=_fit_location(examples, excess, groups),
        fault_of=_faults(examples),
        threshold=_threshold(
            held_out[~faulty], np.array([e.alarmed for e in examples if not e.faulty])
        ),
        **_familiarity(rows, groups),
        about=dict(about),
    )


def fitted_rows(classifier: Classifier, examples: Sequence[Example]) -> Array:
    """Returns examples as the rows that a classifier's verdict is fitted on, (runs, columns)."""
    reference = classifier.reference
    return np.array(
        [
            run_row(e.vectors, classifier.run_columns, reference, reference.excess(e.vectors))
            for e in examples
        ]
    )


def _threshold(held_out: Array, alarmed: NDArray[np.bool_]) -> float:
    """Returns the probability beyond which healthy runs are too few to matter.

    Together with those on which the rules alarm, at most `FALSE_ALARMS` of all are beyond it; where
    the rules use that up, none. What is less likely than not is no alarm, however few there are.
    """
    quiet = np.sort(held_out[~alarmed])[::-1]
    allowed = max(0, int(FALSE_ALARMS * len(held_out)) - int(alarmed.sum()))
    beyond = quiet[allowed] if allowed < len(quiet) else 0.0
    return max(LIKELY, float(np.nextafter(beyond, 1.0)))


def _estimator() -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(
        learning_rate=0.1,
        max_iter=80,
        max_leaf_nodes=8,
        min_samples_leaf=10,
        l2_regularization=1.0,
        max_features=0.3,
        early_stopping=False,
        random_state=SEED,
    )


def _folds(groups: NDArray[Any], truth: NDArray[Any]) -> list[tuple[Any, Any]]:
    from sklearn.model_selection import StratifiedGroupKFold

    count = min(FOLDS, len(set(groups.tolist())))
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=SEED)
    return list(splitter.split(truth[:, None], truth, groups))


def _calibrated(rows: Array, truth: NDArray[np.bool_], groups: NDArray[Any]) -> tuple[Judge, Array]:
    """Fits an estimator on all rows, and a sigmoid on what it says of held-out groups.

    Returns:
        The judge, and the calibrated probability of each row while its group was held out.
    """
    from sklearn.linear_model import LogisticRegression

    score = np.full(len(rows), np.nan)
    for learn, test in _folds(groups, truth):
        estimator, columns = _fitted(rows[learn], truth[learn])
        score[test] = estimator.decision_function(rows[test][:, columns])
    sigmoid = LogisticRegression(C=1.0).fit(score[:, None], truth)
    estimator, columns = _fitted(rows, truth)
    judge = Judge(estimator, columns, float(sigmoid.coef_[0, 0]), float(sigmoid.intercept_[0]))
    return judge, np.asarray(sigmoid.predict_proba(score[:, None])[:, 1])


def _fitted(rows: Array, truth: NDArray[np.bool_]) -> tuple[Any, NDArray[np.int64]]:
    """Fits on the columns that are known of at least two rows."""
    columns = np.flatnonzero((~np.isnan(rows)).sum(axis=0) >= 2)
    return _estimator().fit(rows[:, columns], truth), columns


def _fit_causes(examples: Sequence[Example], rows: Array, groups: NDArray[Any]) -> dict[str, Judge]:
    """One estimator a cause, among faulty runs: several can hold at once."""
    faulty = np.array([example.faulty for example in examples])
    found = sorted({cause for example in examples for cause in example.causes})
    fitted = {}
    for cause in found:
        truth = np.array([cause in example.causes for example in examples])
        if truth[faulty].all():
            raise ClassifierError(f"all faulty runs have {cause}: there is no cause to tell apart")
        if truth.sum() >= FEWEST_OF_A_CAUSE and len(set(groups[truth].tolist())) > 1:
            fitted[cause], _ = _calibrated(rows[faulty], truth[faulty], groups[faulty])
    return fitted


def _faults(examples: Sequence[Example]) -> dict[str, str]:
    """Returns the fault that is expected first, most often, of runs with each cause."""
    counts: dict[str, Counter[str]] = {}
    for example in examples:
        for cause in example.causes:
            counts.setdefault(cause, Counter()).update(example.faults[:1])
    return {cause: of.most_common(1)[0][0] for cause, of in sorted(counts.items()) if of}


def _fit_location(
    examples: Sequence[Example], excess: Sequence[Array], groups: NDArray[Any]
) -> Judge:
    """One estimator over components: is it one of those to blame?"""
    rows, truth, group = [], [], []
    for example, beyond, key in zip(examples, excess, groups, strict=True):
        if example.faulty and not example.components:
            continue  # the whole model's: no component is to blame, and none is acquitted
        rows.append(component_rows(beyond))
        right = [to_blame(name, example.components) for name in example.vectors.names]
        truth += right
        group += [key] * len(right)
    if not any(truth):
        raise ClassifierError("no faulty run says which component is to blame: none can be found")
    judge, _ = _calibrated(np.concatenate(rows), np.array(truth), np.array(group))
    return judge


def to_blame(name: str, components: Sequence[str]) -> bool:
    """Whether a component is one of those named, or a part of one."""
    return any(
        name == blamed or name.startswith((f"{blamed}.", f"{blamed}[")) for blamed in components
    )


def _familiarity(rows: Array, groups: NDArray[Any]) -> dict[str, float]:
    """Returns what share outside the learned range, and what share of known numbers, is usual."""
    outside = []
    for group in sorted(set(groups.tolist())):
        own, others = rows[groups == group], rows[groups != group]
        low, high = _reduce(others, np.min), _reduce(others, np.max)
        known = ~np.isnan(own)
        beyond = known & ((own < low) | (own > high))
        outside += (beyond.sum(axis=1) / np.maximum(known.sum(axis=1), 1)).tolist()
    return {
        "most_unfamiliar": float(np.quantile(outside, UNFAMILIAR)),
        "least_known": float(np.quantile((~np.isnan(rows)).mean(axis=1), 1.0 - UNFAMILIAR)) / 2.0,
    }


def _nan_median(rows: Array) -> Array:
    return _reduce(rows, np.median)


def _reduce(rows: Array, function: Any) -> Array:
    """Applies a function to the known numbers of each column; NaN where there are none."""
    known = [column[~np.isnan(column)] for column in rows.T]
    return np.array([float(function(column)) if len(column) else np.nan for column in known])


__all__ = ["Example", "Reference", "fit", "to_blame"]
