"""What the classifier says of a run: is it faulty, why, where, and does it know such runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.classifier.reference import Reference
from diagnoser.classifier.trees import Trees
from diagnoser.classifier.vectors import EXCESS, Vectors, matrix
from diagnoser.table import Array
from diagnoser.vocabulary import MODEL

REASONS: Final = 5  # features that are said to have moved a prediction
# Shares of the usual columns that a run may be without: of its components', which are another
# kind of model's, and of all, of which a task or a script may have no use for some.
LACKING_OF_COMPONENTS: Final = 0.05
LACKING: Final = 0.15
TASK: Final = "loss_to_chance"  # what every run of its kind of task has: classification
SURE_OF_PLACE: Final = 0.5  # probability from which a component is named, and not the whole model


@dataclass(frozen=True, slots=True)
class Reason:
    """A column that moved the verdict: its value, and by how much (log-odds against the middle)."""

    column: str
    value: float
    moved: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the classifier says of a run.

    ``faulty`` is a calibrated probability; ``causes`` those given that the run is faulty, highest
    first; ``components`` a score for each, highest first. ``unfamiliar`` is the share of the run's
    known numbers that lie beyond everything it learned from, ``lacking`` the columns that the run
    is without and hardly any that it learned from was; where it ``abstains``, either is too much
    for an answer.
    """

    faulty: float
    causes: tuple[tuple[str, float], ...]
    components: tuple[tuple[str, float], ...]
    unfamiliar: float
    lacking: tuple[str, ...]
    abstains: bool
    reasons: tuple[Reason, ...]

    @property
    def place(self) -> str:
        """The component to blame, if one is more likely than not; else the whole model."""
        name, sure = self.components[0] if self.components else (MODEL, 0.0)
        return name if sure >= SURE_OF_PLACE else MODEL


@dataclass(frozen=True, slots=True)
class Judge:
    """Trees on some columns of its rows, and the sigmoid that calibrates them (Platt 1999)."""

    trees: Trees
    columns: NDArray[np.int64]
    slope: float
    intercept: float

    def score(self, rows: Array) -> Array:
        """Returns what the trees say of rows (rows, columns), (rows,); any number."""
        return self.trees.score(rows[:, self.columns])

    def calibrated(self, score: Array) -> Array:
        """Returns the probability that a score, or the mean of several, stands for."""
        with np.errstate(over="ignore"):  # far out it is 0 or 1
            return np.asarray(1.0 / (1.0 + np.exp(-(self.slope * score + self.intercept))))

    def probability(self, rows: Array) -> Array:
        """Returns calibrated probabilities of rows (rows, columns), (rows,)."""
        return self.calibrated(self.score(rows))

    def gains(self) -> dict[int, float]:
        """Returns, by column, the share of the gain of all splits that are on it."""
        return {int(self.columns[i]): gain for i, gain in self.trees.gains().items()}


@dataclass(frozen=True, slots=True)
class Classifier:
    """Learned judges and what they need to read a run.

    ``run_columns`` are of `Vectors.run` and then of the reference's excess over components,
    ``middle`` (columns,) their healthy medians, ``range`` (2, columns) the lowest and highest that
    were learned from. ``threshold`` is the probability from which a run counts as faulty.
    """

    run_columns: tuple[str, ...]
    reference: Reference
    middle: Array
    range: Array
    verdict: Judge
    causes: Mapping[str, Judge]
    location: Judge
    fault_of: Mapping[str, str]  # what runs with a cause show first, most often
    threshold: float
    most_unfamiliar: float
    least_known: float  # share of a moment's numbers without which it has no say
    usual: NDArray[np.int64]  # columns that hardly a run was without
    about: Mapping[str, Any]  # how it was made: versions, digests, sizes

    def predict(self, of: Vectors, *, explain: bool = True) -> Prediction:
        """Judges a run by the mean of what is said of it at all moments of which enough is known.

        What moved the verdict takes most of the time, and can be left out.
        """
        moments = (*of.earlier, of)
        excess = [self.reference.excess(moment) for moment in moments]
        rows = np.array(
            [
                run_row(moment, self.run_columns, self.reference, beyond)
                for moment, beyond in zip(moments, excess, strict=True)
            ]
        )
        last, known = rows[-1], ~np.isnan(rows[-1])
        outside = known & ((last < self.range[0]) | (last > self.range[1]))
        unfamiliar = float(outside.sum() / known.sum()) if known.any() else 0.0
        lacking = [self.run_columns[i] for i in self.usual if not known[i]]
        lacking.sort(key=_is_of_task, reverse=True)  # what says most, first
        rows = rows[enough_known(rows, self.least_known)]
        faulty = float(self.verdict.calibrated(self.verdict.score(rows).mean()))
        causes = [
            (name, float(judge.calibrated(judge.score(rows).mean())))
            for name, judge in self.causes.items()
        ]
        parts = [
            self.location.score(component_rows(beyond))
            for moment, beyond in zip(moments, excess, strict=True)
            if moment.names == of.names
        ]
        scores = self.location.calibrated(np.mean(parts, axis=0))
        placed = zip(of.names, scores.tolist(), strict=True)
        return Prediction(
            faulty,
            tuple(sorted(causes, key=lambda pair: (-pair[1], pair[0]))),
            tuple(sorted(placed, key=lambda pair: (-pair[1], pair[0]))),
            unfamiliar,
            tuple(lacking),
            unfamiliar > self.most_unfamiliar or self._lacks_too_much(lacking),
            self._reasons(rows, faulty) if explain else (),
        )

    def _lacks_too_much(self, lacking: Sequence[str]) -> bool:
        usual = [self.run_columns[i] for i in self.usual]
        ours, theirs = _of_components(lacking), _of_components(usual)
        task = [name for name in usual if _is_of_task(name)]
        other_task = bool(task) and set(task) <= set(lacking)
        return (
            other_task
            or ours > LACKING_OF_COMPONENTS * theirs
            or len(lacking) > LACKING * len(usual)
        )

    def _reasons(self, rows: Array, faulty: float) -> tuple[Reason, ...]:
        """What the verdict would be with a column at its healthy middle, one at a time."""
        row = rows[-1]
        score = np.zeros(len(row))
        for moment in rows:
            changed = np.tile(moment, (len(row), 1))
            np.fill_diagonal(changed, self.middle)
            score += self.verdict.score(changed) / len(rows)
        moved = _log_odds(faulty) - _log_odds(self.verdict.calibrated(score))
        moved[np.isnan(row)] = 0.0
        order = np.argsort(-moved if faulty >= self.threshold else moved, kind="stable")[:REASONS]
        return tuple(
            Reason(self.run_columns[i], float(row[i]), float(moved[i])) for i in order if moved[i]
        )


def _is_of_task(column: str) -> bool:
    return column.startswith(TASK)


def _of_components(columns: Sequence[str]) -> int:
    return sum(name.startswith(EXCESS) for name in columns)


def enough_known(rows: Array, least: float) -> NDArray[np.bool_]:
    """Which moments (rows, columns) of a run to judge it by: those known well, and the last."""
    enough = (~np.isnan(rows)).mean(axis=1) >= least
    enough[-1] = True
    return np.asarray(enough)


def run_row(of: Vectors, columns: tuple[str, ...], reference: Reference, excess: Array) -> Array:
    """Returns a run's numbers in the order of ``columns``, (columns,); NaN where there is none."""
    furthest = {
        f"{EXCESS}{name}": value
        for name, value in zip(reference.columns, _furthest(excess), strict=True)
    }
    return np.asarray(matrix([{**of.run, **furthest}], columns)[0])


def component_rows(excess: NDArray[np.floating[Any]]) -> Array:
    """Returns what the location is learned from, (components, numbers).

    Of each column how far beyond the healthy it is, and how far beyond the run's other components.
    """
    return np.hstack([excess, excess - _medians(excess)])


def _furthest(excess: Array) -> Array:
    """Returns, of each column, the excess that is largest either way."""
    if not len(excess):
        return np.full(excess.shape[1], np.nan)
    size = np.where(np.isnan(excess), -1.0, np.abs(excess))
    return np.asarray(excess[size.argmax(axis=0), np.arange(excess.shape[1])])


def _medians(rows: NDArray[np.floating[Any]]) -> Array:
    """Returns the median of the known numbers of each column, (columns,); NaN where none is."""
    if not len(rows):
        return np.full(rows.shape[1], np.nan)
    ordered = np.sort(rows, axis=0)  # NaN comes last
    count = (~np.isnan(rows)).sum(axis=0)
    column = np.arange(rows.shape[1])
    low = ordered[np.maximum(count - 1, 0) // 2, column]
    high = ordered[np.minimum(count // 2, np.maximum(count - 1, 0)), column]
    return np.asarray((low + high) / 2.0)


def _log_odds(probability: Any) -> Any:
    clipped = np.clip(probability, 1e-6, 1.0 - 1e-6)
    return np.log(clipped / (1.0 - clipped))
