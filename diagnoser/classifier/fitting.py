"""Learns a `Classifier` from runs whose truth is proven."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.classifier.predict import (
    Classifier,
    Judge,
    component_rows,
    enough_known,
    run_row,
)
from diagnoser.classifier.reference import Reference, learn_reference
from diagnoser.classifier.trees import Trees, trees_of
from diagnoser.classifier.vectors import EXCESS, Vectors
from diagnoser.errors import ClassifierError
from diagnoser.table import Array

FOLDS: Final = 5
FEWEST_GROUPS: Final = 3
FEWEST_ORIGINS: Final = 3  # from which on one at a time is held out
FEWEST_OF_A_CAUSE: Final = 10  # runs
FALSE_ALARMS: Final = 0.05  # share of healthy runs that the threshold lets through
LIKELY: Final = 0.5  # the least probability of an alarm
BINS: Final = 63  # that a column is cut into
OF_ALL, OF_THE_BEST = 0.1, 0.3  # share of the columns that a split is chosen from
LEAF: Final = (5, 40)  # rows, the fewest of a leaf
FEWEST_LEAVES: Final = 10  # that a tree can have
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
    seen; where there are fewer than three, by group.

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
    faulty = np.array([example.faulty for example in examples])
    whole = _rows([example.vectors for example in examples], columns, reference)
    least_known = float(np.quantile((~np.isnan(whole)).mean(axis=1), 1.0 - UNFAMILIAR)) / 2.0

    moments = _moments(examples, columns, reference, least_known)
    tables = {"": _table(moments, columns, reference)}
    names = sorted(set(origins.tolist()))
    for origin in names if len(names) >= FEWEST_ORIGINS else ():
        others = [e.vectors for e in examples if not e.faulty and e.origin != origin]
        tables[origin] = _table(moments, columns, learn_reference(others, component_columns))
    source = _Source(groups, origins, tables)
    verdict, held_out = _fit_verdict(moments, source, faulty)
    return Classifier(
        run_columns=columns,
        reference=reference,
        middle=_nan_median(whole[~faulty]),
        range=np.stack([_reduce(whole, np.min), _reduce(whole, np.max)]),
        verdict=verdict,
        causes=_fit_causes(examples, moments, source),
        location=_fit_location(examples, moments, source),
        fault_of=_faults(examples),
        threshold=_threshold(
            held_out[~faulty],
            np.array([e.alarmed for e in examples if not e.faulty]),
            source.held_out_together[~faulty],
        ),
        most_unfamiliar=_most_unfamiliar(whole, groups if len(tables) == 1 else origins),
        least_known=least_known,
        usual=np.flatnonzero((~np.isnan(whole)).mean(axis=0) >= UNFAMILIAR),
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


def _threshold(held_out: Array, alarmed: NDArray[np.bool_], origins: NDArray[Any]) -> float:
    """Returns the probability beyond which healthy runs are too few to matter, of every origin.

    Together with those on which the rules alarm, at most `FALSE_ALARMS` of an origin's are beyond
    it; where the rules use that up, none. How high healthy runs reach differs more from origin to
    origin than within one, and what is to be judged is of a new one: the highest decides. What is
    less likely than not is no alarm, however few there are.
    """
    beyond = LIKELY
    for origin in sorted(set(origins.tolist())):
        own = origins == origin
        quiet = np.sort(held_out[own & ~alarmed])[::-1]
        allowed = max(0, int(FALSE_ALARMS * own.sum()) - int(alarmed[own].sum()))
        if allowed < len(quiet):
            beyond = max(beyond, float(np.nextafter(quiet[allowed], 1.0)))
    return beyond


@dataclass(frozen=True, slots=True)
class _Growth:
    """How many trees a judge has, how far each goes, and on how many columns it rests.

    ``columns`` None: on all that are known.
    """

    trees: int
    rate: float
    columns: int | None = None


OF_VERDICT: Final = _Growth(40, 0.15)
OF_LOCATION: Final = _Growth(40, 0.15)
# There is one for every cause, and each tree and column takes time to read when a run is judged.
OF_A_CAUSE: Final = _Growth(25, 0.2, 24)


def _grown(rows: Array, truth: NDArray[np.bool_], growth: _Growth, share: float) -> Trees:
    """Returns trees that learned from rows, each split from a share of the columns.

    A leaf is never the oddities of one configuration.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    estimator = HistGradientBoostingClassifier(
        learning_rate=growth.rate,
        max_iter=growth.trees,
        max_leaf_nodes=8,
        min_samples_leaf=max(LEAF[0], min(len(rows) // FEWEST_LEAVES, LEAF[1])),
        l2_regularization=1.0,
        max_features=share,
        max_bins=BINS,
        early_stopping=False,
        random_state=SEED,
    )
    return trees_of(estimator.fit(rows, truth), rows)


@dataclass(frozen=True, slots=True, eq=False)
class _Moment:
    """What was to be seen of an example at one time; learned from is the ``last`` one alone."""

    run: int  # position among the examples
    of: Vectors
    last: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Moments as numbers: ``rows`` (moments, columns), and the excess of each one's components.

    That is (components, columns); there are many components, so it is in single precision.
    """

    rows: Array
    components: Sequence[NDArray[np.float32]]


def _moments(
    examples: Sequence[Example], columns: tuple[str, ...], reference: Reference, least: float
) -> list[_Moment]:
    """Returns the moments of examples that `Classifier.predict` would judge them by."""
    found = []
    for i, example in enumerate(examples):
        of = (*example.vectors.earlier, example.vectors)
        enough = enough_known(_rows(of, columns, reference), least)
        found += [
            _Moment(i, moment, moment is example.vectors)
            for moment, kept in zip(of, enough, strict=True)
            if kept
        ]
    return found


def _rows(of: Sequence[Vectors], columns: tuple[str, ...], reference: Reference) -> Array:
    return np.array([run_row(each, columns, reference, reference.excess(each)) for each in of])


def _table(moments: Sequence[_Moment], columns: tuple[str, ...], reference: Reference) -> _Table:
    excess = [reference.excess(moment.of) for moment in moments]
    rows = [
        run_row(moment.of, columns, reference, beyond)
        for moment, beyond in zip(moments, excess, strict=True)
    ]
    return _Table(np.array(rows), [beyond.astype(np.float32) for beyond in excess])


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """Where runs come from, and what they look like.

    ``groups`` and ``origins`` are arrays (runs,) of names. ``tables`` holds the moments as all runs
    make them look (``""``), and as they look beside the healthy runs of all origins but one: what
    is held out must not have a part in what is usual.
    """

    groups: NDArray[Any]
    origins: NDArray[Any]
    tables: Mapping[str, _Table]

    @property
    def held_out_together(self) -> NDArray[Any]:
        """Whose runs are held out together, (runs,): an origin's, or all that there are."""
        return self.origins if len(self.tables) > 1 else np.zeros(len(self.origins))

    def folds(self, runs: NDArray[Any], truth: NDArray[Any]) -> Iterator[tuple[Any, Any, _Table]]:
        """Yields which units are learned from, which are held out, and the table of both.

        Args:
            runs: (units,) the run of each.
            truth: (units,) what is learned.
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


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """What is learned: of units (runs, or components of them) whether something is true.

    A unit has a row at each moment; ``unit`` (rows,) is which one's, ``learned`` (rows,) whether it
    is learned from. ``truth`` and ``runs`` are arrays (units,).
    """

    rows_of: Callable[[_Table], Array]
    unit: NDArray[np.int64]
    learned: NDArray[np.bool_]
    truth: NDArray[np.bool_]
    runs: NDArray[np.int64]
    growth: _Growth


def _calibrated(task: _Task, source: _Source) -> tuple[Judge, Array]:
    """Grows trees on all rows, and fits a sigmoid on what they say of units held out.

    Returns:
        The judge, and the calibrated probability of each unit while it was held out.
    """
    from sklearn.linear_model import LogisticRegression

    score = np.zeros(len(task.truth))
    for learn, test, table in source.folds(task.runs, task.truth):
        rows = task.rows_of(table)
        trees, columns = _fitted(rows, task, np.isin(task.unit, learn))
        held_out = np.isin(task.unit, test)
        said = trees.score(rows[held_out][:, columns])
        score += np.bincount(task.unit[held_out], said, len(score))
    score /= np.bincount(task.unit, minlength=len(score))
    # Newton's method, to the end: where a search stops early the rounding of a processor shows.
    sigmoid = LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-10)
    sigmoid.fit(score[:, None], task.truth)
    everything = np.ones(len(task.unit), dtype=bool)
    trees, columns = _fitted(task.rows_of(source.tables[""]), task, everything)
    judge = Judge(trees, columns, float(sigmoid.coef_[0, 0]), float(sigmoid.intercept_[0]))
    return judge, np.asarray(sigmoid.predict_proba(score[:, None])[:, 1])


def _fitted(rows: Array, task: _Task, chosen: NDArray[np.bool_]) -> tuple[Trees, NDArray[np.int64]]:
    """Fits on the columns that are known of at least two rows; on the best, if no more may be."""
    learned = chosen & task.learned
    own, truth = rows[learned], task.truth[task.unit[learned]]
    columns = np.flatnonzero((~np.isnan(own)).sum(axis=0) >= 2)
    trees = _grown(own[:, columns], truth, task.growth, OF_ALL)
    most, gains = task.growth.columns, trees.gains()
    if most is not None and most < len(columns) and gains:
        best = sorted(gains, key=lambda i: (-gains[i], i))[:most]
        columns = columns[np.sort(np.array(best, dtype=int))]
        trees = _grown(own[:, columns], truth, task.growth, OF_THE_BEST)
    return trees, columns


def _fit_verdict(
    moments: Sequence[_Moment], source: _Source, faulty: NDArray[np.bool_]
) -> tuple[Judge, Array]:
    run = np.array([moment.run for moment in moments])
    last = np.array([moment.last for moment in moments])
    everyone = np.arange(len(faulty))
    task = _Task(lambda table: table.rows, run, last, faulty, everyone, OF_VERDICT)
    return _calibrated(task, source)


def _fit_causes(
    examples: Sequence[Example], moments: Sequence[_Moment], source: _Source
) -> dict[str, Judge]:
    """One judge a cause, among faulty runs: several can hold at once."""
    runs = [i for i, example in enumerate(examples) if example.faulty]
    rows = [k for k, moment in enumerate(moments) if examples[moment.run].faulty]
    unit = np.searchsorted(runs, [moments[k].run for k in rows])
    last = np.array([moments[k].last for k in rows])
    found = sorted({cause for example in examples for cause in example.causes})
    fitted = {}
    for cause in found:
        truth = np.array([cause in examples[run].causes for run in runs])
        if truth.all():
            raise ClassifierError(f"all faulty runs have {cause}: there is no cause to tell apart")
        groups = set(source.groups[runs][truth].tolist())
        if truth.sum() >= FEWEST_OF_A_CAUSE and len(groups) > 1:
            task = _Task(
                lambda table: table.rows[rows], unit, last, truth, np.array(runs), OF_A_CAUSE
            )
            fitted[cause], _ = _calibrated(task, source)
    return fitted


def _fit_location(
    examples: Sequence[Example], moments: Sequence[_Moment], source: _Source
) -> Judge:
    """One judge over components: is it one of those to blame?"""
    # Of a fault of the whole model no component is to blame, and none is acquitted.
    asked = [i for i, e in enumerate(examples) if not e.faulty or e.components]
    names = {i: examples[i].vectors.names for i in asked}
    sizes = [len(names[i]) for i in asked]
    begin = dict(zip(asked, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
    truth = np.array([to_blame(n, examples[i].components) for i in asked for n in names[i]])
    if not truth.any():
        raise ClassifierError("no faulty run says which component is to blame: none can be found")
    seen = [k for k, m in enumerate(moments) if names.get(m.run) == m.of.names and m.of.names]
    unit = [begin[moments[k].run] + j for k in seen for j in range(len(moments[k].of.names))]
    last = np.repeat([moments[k].last for k in seen], [len(moments[k].of.names) for k in seen])
    task = _Task(
        lambda table: np.concatenate([component_rows(table.components[k]) for k in seen]),
        np.array(unit),
        last,
        truth,
        np.repeat(asked, sizes),
        OF_LOCATION,
    )
    judge, _ = _calibrated(task, source)
    return judge


def _faults(examples: Sequence[Example]) -> dict[str, str]:
    """Returns the fault that is expected first, most often, of runs with each cause."""
    counts: dict[str, Counter[str]] = {}
    for example in examples:
        for cause in example.causes:
            counts.setdefault(cause, Counter()).update(example.faults[:1])
    return {cause: of.most_common(1)[0][0] for cause, of in sorted(counts.items()) if of}


def to_blame(name: str, components: Sequence[str]) -> bool:
    """Whether a component is one of those named, or a part of one."""
    return any(
        name == blamed or name.startswith((f"{blamed}.", f"{blamed}[")) for blamed in components
    )


def _most_unfamiliar(rows: Array, groups: NDArray[Any]) -> float:
    """Returns what share of a run's known numbers may lie beyond all that others have."""
    outside = []
    for group in sorted(set(groups.tolist())):
        own, others = rows[groups == group], rows[groups != group]
        low, high = _reduce(others, np.min), _reduce(others, np.max)
        known = ~np.isnan(own)
        beyond = known & ((own < low) | (own > high))
        outside += (beyond.sum(axis=1) / np.maximum(known.sum(axis=1), 1)).tolist()
    return float(np.quantile(outside, UNFAMILIAR))


def _nan_median(rows: Array) -> Array:
    return _reduce(rows, np.median)


def _reduce(rows: Array, function: Any) -> Array:
    """Applies a function to the known numbers of each column; NaN where there are none."""
    known = [column[~np.isnan(column)] for column in rows.T]
    return np.array([float(function(column)) if len(column) else np.nan for column in known])


__all__ = ["Example", "Reference", "fit", "to_blame"]
