"""Learns a `Classifier` from runs whose truth is proven."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.classifier.predict import Classifier, Judge, component_rows, run_row
from diagnoser.classifier.reference import Reference, learn_reference
from diagnoser.classifier.vectors import EXCESS, Vectors
from diagnoser.errors import ClassifierError
from diagnoser.table import Array

FOLDS: Final = 5
FEWEST_GROUPS: Final = 3
FEWEST_ORIGINS: Final = 3  # from which on one at a time is held out
OF_ORIGIN: Final = 0.15  # most of a column's healthy rank variance that may be between origins
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
    the rules call it faulty, whatever the classifier says. ``origin`` is the model and its data:
    what is to be judged will be of another one.
    """

    vectors: Vectors
    faulty: bool
    causes: tuple[str, ...]
    faults: tuple[str, ...]
    components: tuple[str, ...]
    group: str
    alarmed: bool = False
    origin: str = ""


def fit(
    examples: Sequence[Example],
    run_columns: Sequence[str],
    component_columns: Sequence[str],
    about: Mapping[str, Any],
) -> Classifier:
    """Learns verdict, causes and location, each calibrated on runs that were held out.

    Held out is one origin at a time, so that an answer is as sure as it is right about models never
    seen; where there are fewer than three, by group. Columns that mostly tell healthy runs of one
    origin from those of another are left out: beyond their origin they mislead.

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
    origins = np.array([example.origin for example in examples])
    if len(healthy) < FOLDS or len(set(groups.tolist())) < FEWEST_GROUPS:
        raise ClassifierError(
            f"a classifier needs {FOLDS} healthy runs and {FEWEST_GROUPS} groups of runs; there "
            f"are {len(healthy)} and {len(set(groups.tolist()))}"
        )
    columns = (*run_columns, *(f"{EXCESS}{name}" for name in component_columns))
    reference = learn_reference(healthy, component_columns)
    rows, components = _numbers(examples, columns, reference)
    faulty = np.array([example.faulty for example in examples])
    steady = ~_tell_origins(rows[~faulty], origins[~faulty])
    tables = {"": _Table(rows[:, steady], components)}
    names = sorted(set(origins.tolist()))
    for origin in names if len(names) >= FEWEST_ORIGINS else ():
        others = [e.vectors for e in examples if not e.faulty and e.origin != origin]
        seen = _numbers(examples, columns, learn_reference(others, component_columns))
        tables[origin] = _Table(seen[0][:, steady], seen[1])
    source = _Source(groups, origins, tables)
    verdict, held_out = _calibrated(source, lambda table: table.rows, faulty)
    rows = tables[""].rows
    return Classifier(
        run_columns=tuple(name for name, kept in zip(columns, steady, strict=True) if kept),
        reference=reference,
        middle=_nan_median(rows[~faulty]),
        range=np.stack([_reduce(rows, np.min), _reduce(rows, np.max)]),
        verdict=verdict,
        causes=_fit_causes(examples, source),
        location=_fit_location(examples, source),
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


def _tell_origins(rows: Array, origins: NDArray[Any]) -> NDArray[np.bool_]:
    """Which columns of healthy rows mostly tell their origins apart, (columns,).

    The share of the variance of a column's ranks that is between the origins' means.
    """
    from scipy.stats import rankdata

    ranks = np.atleast_2d(rankdata(rows, axis=0, nan_policy="omit"))
    known = ~np.isnan(ranks)
    count = np.maximum(known.sum(axis=0), 1)
    centred = np.where(known, ranks - np.nansum(ranks, axis=0) / count, 0.0)
    between = np.zeros(rows.shape[1])
    for origin in set(origins.tolist()):
        own = origins == origin
        between += centred[own].sum(axis=0) ** 2 / np.maximum(known[own].sum(axis=0), 1)
    return np.asarray(between > OF_ORIGIN * (centred**2).sum(axis=0))


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Runs as numbers: ``rows`` (runs, columns), and (components, numbers) of each run."""

    rows: Array
    components: Sequence[Array]


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """Where runs come from, and what they look like.

    ``groups`` and ``origins`` are arrays (runs,) of names. ``tables`` holds the runs as all of them
    make them look (``""``), and as they look beside the healthy runs of all origins but one: what
    is held out must not have a part in what is usual.
    """

    groups: NDArray[Any]
    origins: NDArray[Any]
    tables: Mapping[str, _Table]

    def folds(self, runs: NDArray[Any], truth: NDArray[Any]) -> Iterator[tuple[Any, Any, _Table]]:
        """Yields what is learned from, what is held out, and the table of both.

        Args:
            runs: (rows,) the run of each row.
            truth: (rows,) what is learned.
        """
        from sklearn.model_selection import LeaveOneGroupOut, StratifiedGroupKFold

        origins, groups = self.origins[runs], self.groups[runs]
        if len(self.tables) > 1:
            splits = list(LeaveOneGroupOut().split(runs[:, None], truth, origins))
            if all(len(set(truth[learn].tolist())) > 1 for learn, _ in splits):
                for learn, test in splits:
                    yield learn, test, self.tables[origins[test[0]]]
                return
        count = min(FOLDS, len(set(groups.tolist())))
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=SEED)
        for learn, test in splitter.split(runs[:, None], truth, groups):
            yield learn, test, self.tables[""]


def _numbers(
    examples: Sequence[Example], columns: tuple[str, ...], reference: Reference
) -> tuple[Array, list[Array]]:
    excess = [reference.excess(example.vectors) for example in examples]
    rows = [
        run_row(example.vectors, columns, reference, beyond)
        for example, beyond in zip(examples, excess, strict=True)
    ]
    return np.array(rows), [component_rows(beyond) for beyond in excess]


def _calibrated(
    source: _Source,
    rows_of: Callable[[_Table], Array],
    truth: NDArray[np.bool_],
    runs: NDArray[Any] | None = None,
) -> tuple[Judge, Array]:
    """Fits an estimator on all rows, and a sigmoid on what it says of rows held out.

    Args:
        source: Where the runs come from.
        rows_of: Takes what is learned from out of a table, (rows, numbers).
        truth: (rows,) what is learned.
        runs: (rows,) the run of each row; each row is one if left out.

    Returns:
        The judge, and the calibrated probability of each row while it was held out.
    """
    from sklearn.linear_model import LogisticRegression

    score = np.full(len(truth), np.nan)
    runs = np.arange(len(truth)) if runs is None else runs
    for learn, test, table in source.folds(runs, truth):
        rows = rows_of(table)
        estimator, columns = _fitted(rows[learn], truth[learn])
        score[test] = estimator.decision_function(rows[test][:, columns])
    sigmoid = LogisticRegression(C=1.0).fit(score[:, None], truth)
    estimator, columns = _fitted(rows_of(source.tables[""]), truth)
    judge = Judge(estimator, columns, float(sigmoid.coef_[0, 0]), float(sigmoid.intercept_[0]))
    return judge, np.asarray(sigmoid.predict_proba(score[:, None])[:, 1])


def _fitted(rows: Array, truth: NDArray[np.bool_]) -> tuple[Any, NDArray[np.int64]]:
    """Fits on the columns that are known of at least two rows."""
    columns = np.flatnonzero((~np.isnan(rows)).sum(axis=0) >= 2)
    return _estimator().fit(rows[:, columns], truth), columns


def _fit_causes(examples: Sequence[Example], source: _Source) -> dict[str, Judge]:
    """One estimator a cause, among faulty runs: several can hold at once."""
    faulty = [i for i, example in enumerate(examples) if example.faulty]
    found = sorted({cause for example in examples for cause in example.causes})
    fitted = {}
    for cause in found:
        truth = np.array([cause in examples[i].causes for i in faulty])
        if truth.all():
            raise ClassifierError(f"all faulty runs have {cause}: there is no cause to tell apart")
        groups = set(source.groups[faulty][truth].tolist())
        if truth.sum() >= FEWEST_OF_A_CAUSE and len(groups) > 1:
            fitted[cause], _ = _calibrated(
                source, lambda t: t.rows[faulty], truth, np.array(faulty)
            )
    return fitted


def _faults(examples: Sequence[Example]) -> dict[str, str]:
    """Returns the fault that is expected first, most often, of runs with each cause."""
    counts: dict[str, Counter[str]] = {}
    for example in examples:
        for cause in example.causes:
            counts.setdefault(cause, Counter()).update(example.faults[:1])
    return {cause: of.most_common(1)[0][0] for cause, of in sorted(counts.items()) if of}


def _fit_location(examples: Sequence[Example], source: _Source) -> Judge:
    """One estimator over components: is it one of those to blame?"""
    # Of a fault of the whole model no component is to blame, and none is acquitted.
    asked = [i for i, e in enumerate(examples) if not e.faulty or e.components]
    blamed = [
        [to_blame(name, examples[i].components) for name in examples[i].vectors.names]
        for i in asked
    ]
    truth = np.array([right for of_run in blamed for right in of_run], dtype=bool)
    if not truth.any():
        raise ClassifierError("no faulty run says which component is to blame: none can be found")
    runs = np.repeat(asked, [len(of_run) for of_run in blamed])
    judge, _ = _calibrated(
        source, lambda t: np.concatenate([t.components[i] for i in asked]), truth, runs
    )
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
