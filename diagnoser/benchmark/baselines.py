"""Simple judges and those of others: what a learned judge has to be better than.

Each sees a `Recording`, whole or cut with `Recording.until`, and never the truth. Of other tools
the formulas and thresholds are taken as published, on what the log holds; what it does not hold is
named where it is left out. A number that is not known is NaN and is never made up, except inside
`DeepFD`, whose estimators cannot do without.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.benchmark.harm import loss_alarm
from diagnoser.classifier import to_blame
from diagnoser.diagnosis import default_rules, diagnose
from diagnoser.errors import BenchmarkError
from diagnoser.features import functions
from diagnoser.features.source import EPOCHS, Source
from diagnoser.rules import Rule
from diagnoser.runlog import Recording
from diagnoser.table import Array
from diagnoser.vocabulary import MODEL

NEIGHBOURS, TREE_DEPTH, TREES, FOREST_DEPTH, FOREST_FEATURES = 5, 5, 32, 10, 60
SEED: Final = 0
EARLY: Final = 3  # measurements that a component's latest one is held against
# AutoTrainer's thresholds, which DeepFD takes over; accuracy, gain, swing, share of swings,
SATISFIED, GAIN, SWING, SWINGS = 0.7, 0.01, 0.03, 0.2
JUDGED_FROM: Final = 0.3  # share of the run before which accuracy and loss are not judged,
VANISHED_RATIO, VANISHED, EXPLODED, DEAD = 1e-3, 1e-4, 70.0, 0.7  # and gradients
LARGE_LOSS, LARGE_WEIGHT = 1e5, 5.0  # DeepFD's own


@dataclass(frozen=True, slots=True)
class Opinion:
    """What a baseline says of a run.

    ``score`` grows with how surely the run is faulty, ``faulty`` is the baseline's own decision.
    ``causes`` and ``components`` are best first; either may be empty.
    """

    faulty: bool
    score: float
    causes: tuple[str, ...] = ()
    components: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Chance:
    """How often the first, or one of the first three, of a random order is right."""

    top_1: float
    top_3: float


# -- detection without learning --------------------------------------------------------------------


def loss_only(recording: Recording) -> float:
    """Says from the training loss alone how surely a run is faulty; 0 or more is an alarm.

    The alarm is `harm.loss_alarm`, and this is its margin: with L the first loss and windows of 5 %
    of the steps,

    * infinity where a loss is not finite, or there is none;
    * (W - L) / |L| where it alarms, W the highest window after 20 % of the steps, the last 5 %
      among them: 0 or more;
    * (E - L) / |L| where it does not, E the mean of the last 5 %: below 0, -1 where all is gone.

    Left out: everything that is not the training loss, and any comparison with other runs.
    """
    losses = recording.losses.value.tolist()
    alarm = loss_alarm(losses)
    if alarm == "not finite":
        return math.inf
    first, window = losses[0], max(1, len(losses) // 20)
    last = statistics.fmean(losses[-window:])
    if not alarm:
        return _relative(last, first)
    late = [
        statistics.fmean(losses[i : i + window])
        for i in range(len(losses) // 5, len(losses) - window + 1, window)
    ]
    return max(0.0, _relative(max([*late, last]), first))


def autotrainer(recording: Recording) -> Opinion:
    """AutoTrainer (Zhang et al., ICSE 2021): its shipped rules, through `diagnose`.

    The score is the share of its rules that fire. Its rules are about the run, so that it names no
    component. Left out: validation accuracy, which the log does not hold (training accuracy stands
    for it), its repairs, and the checks of its extension (TDSC 2024).
    """
    rules = _autotrainer_rules()
    said = diagnose(recording, rules)
    fired = {finding.source for finding in said.findings}
    causes = dict.fromkeys(cause.cause for cause in said.causes)
    components = dict.fromkeys(c.component for c in said.causes if c.component != MODEL)
    faulty = said.verdict == "faulty"
    return Opinion(faulty, len(fired) / len(rules), tuple(causes), tuple(components))


@functools.cache
def _autotrainer_rules() -> tuple[Rule, ...]:
    return default_rules(Path("autotrainer"))


def _relative(loss: float, first: float) -> float:
    """Returns (loss - first) / |first|, and its limit where the first loss is 0."""
    gap = loss - first
    if first:
        return gap / abs(first)
    return math.copysign(math.inf, gap) if gap else 0.0


# -- DeepFD ----------------------------------------------------------------------------------------


def deepfd_features(recording: Recording) -> dict[str, float]:
    """DeepFD's runtime features (Cao et al., ICSE 2022): 15 series, 8 operators each.

    Series of twenty equal parts of the run, which stand for epochs (as many as there are losses in
    a run shorter than that):

    * ``loss``, ``accuracy``: their mean; of a part with a loss that is not finite it is not known;
    * ``nan_loss``: 1 where a loss is not finite or 1e5 or more;
    * from 30 % of the run on ``increase_loss``, ``decrease_accuracy``: 1 where the mean rose, or
      fell, since the part before; ``not_converge``: best accuracy so far below 0.7;
      ``slow_convergence``: best gain so far below 0.01; ``unstable``: pairs of a local maximum and
      minimum of accuracy 0.03 apart, at least a fifth of the parts so far.

    And of measured steps:

    * ``vanish_gradient``: first kernel's gradient below 1e-3 of the last one's and below 1e-4;
      ``explode_gradient``: above 70 of the last one's;
    * ``died_relu``: 70 % of gradient entries exactly 0;
    * ``nan_gradient``, ``nan_weight``: any entry that is not finite;
    * ``large_weight``: a component whose root mean square weight is above 5. DeepFD asks after the
      largest weight, which the log does not hold: this is a part of its cases;
    * ``constant_weight``: share of components whose weight norm is that of the measurement before,
      for its two, of mean and of standard deviation.

    The operators are mean, std, skew, median, var, sem, max and min over the known values. They are
    of the population, so that they do not change with the number of values; sem is std over the
    root of twenty always, and therefore says nothing beyond std. The skew of a constant series is
    0, as in pandas, which DeepFD uses. DeepFD counts symptoms from the start of the run; a count
    grows with the number of steps, so a symptom is 0 or 1 at each place of its series here.

    Left out, as the log does not hold it: validation loss and accuracy and what rests on them
    (``val_loss``, ``val_acc``, ``test_not_well``, ``test_turn_bad``) and ``nan_acc``, since an
    accuracy that is NaN in the log was not seen. Left out, as DeepFD never fills it:
    ``weight_change_little``. Its published files are shifted by four columns; this is what their
    header says.

    Returns:
        ``series_operator``, always the same names; NaN where nothing of a series is known.
    """
    with np.errstate(all="ignore"):  # what overflows or is 0 / 0 is not known
        series = _of_parts(recording) | _of_measurements(recording)
    return {
        f"{name}_{operator}": number
        for name, values in series.items()
        for operator, number in _operators(values).items()
    }


def _of_parts(recording: Recording) -> dict[str, Array]:
    losses, accuracies = recording.losses.value, recording.accuracies.value
    count = min(EPOCHS, len(losses))
    pieces = np.array_split(losses, count) if count else []
    seen = [part[~np.isnan(part)] for part in np.array_split(accuracies, count)] if count else []
    loss = np.array([p.mean() if np.isfinite(p).all() else np.nan for p in pieces])
    accuracy = np.array([p.mean() if len(p) else np.nan for p in seen])
    large = [bool((~np.isfinite(p) | (p >= LARGE_LOSS)).any()) for p in pieces]
    judged = np.arange(1, count + 1) >= JUDGED_FROM * count
    so_far = [accuracy[: i + 1][~np.isnan(accuracy[: i + 1])] for i in range(count)]
    best = np.array([known.max(initial=-np.inf) for known in so_far])
    gain = np.array([np.diff(known).max(initial=-np.inf) for known in so_far])
    enough = np.array([len(known) > 2 for known in so_far], dtype=bool)
    swinging = [_swings(known) >= SWINGS * len(known) for known in so_far]
    rose, fell = np.diff(loss, prepend=np.nan), np.diff(accuracy, prepend=np.nan)
    return {
        "loss": loss,
        "accuracy": accuracy,
        "nan_loss": np.array(large, dtype=float),
        "increase_loss": _symptom(rose > 0, judged & ~np.isnan(rose)),
        "decrease_accuracy": _symptom(fell < 0, judged & ~np.isnan(fell)),
        "not_converge": _symptom(best < SATISFIED, judged & np.isfinite(best)),
        "slow_convergence": _symptom(gain < GAIN, judged & np.isfinite(gain)),
        "unstable": _symptom(swinging, judged & enough),
    }


def _swings(values: Array) -> int:
    """AutoTrainer: the i-th local maximum with the i-th local minimum, apart by `SWING` or more."""
    middle, before, after = values[1:-1], values[:-2], values[2:]
    highs = middle[(middle > before) & (middle >= after)]
    lows = middle[(middle < before) & (middle <= after)]
    pairs = min(len(highs), len(lows))
    return int((highs[:pairs] - lows[:pairs] >= SWING).sum())


def _of_measurements(recording: Recording) -> dict[str, Array]:
    source = Source(recording)
    first = functions.first_gradient_norm(source).value[0]
    ratio = functions.first_gradient_ratio(source).value[0]
    dead = functions.zero_gradient_share(source).value[0]
    norm = source.component("weight_norm").value
    elements = {component.name: component.elements for component in recording.components}
    size = np.array([[elements[name]] for name in source.names], dtype=float)
    size = size.reshape(len(source.names), 1)
    both = ~np.isnan(norm[:, 1:]) & ~np.isnan(norm[:, :-1])
    same = (norm[:, 1:] == norm[:, :-1]) & both
    known = both.sum(axis=0)
    return {
        "vanish_gradient": _symptom(
            (ratio < VANISHED_RATIO) & (first < VANISHED), ~np.isnan(ratio)
        ),
        "explode_gradient": _symptom(ratio > EXPLODED, ~np.isnan(ratio)),
        "died_relu": _symptom(dead >= DEAD, ~np.isnan(dead)),
        "nan_gradient": _any(source.component("non_finite_gradient").value, 0.0),
        "nan_weight": _any(source.component("non_finite_weight").value, 0.0),
        "large_weight": _any(norm / np.sqrt(np.maximum(size, 1.0)), LARGE_WEIGHT),
        "constant_weight": np.where(known > 0, same.sum(axis=0) / np.maximum(known, 1), np.nan),
    }


def _any(values: Array, limit: float) -> Array:
    """Whether any component (components, steps) is above a limit at a step; NaN: none is known."""
    return _symptom((values > limit).any(axis=0), ~np.isnan(values).all(axis=0))


def _symptom(condition: Any, known: Any) -> Array:
    return np.where(known, np.asarray(condition, dtype=float), np.nan)


def _operators(values: Array) -> dict[str, float]:
    known = values[np.isfinite(values)]
    names = ("mean", "std", "skew", "median", "var", "sem", "max", "min")
    if not len(known):
        return dict.fromkeys(names, math.nan)
    scale = float(np.abs(known).max()) or 1.0  # so that no power overflows
    deviations = known / scale - np.mean(known / scale)
    spread = float(np.sqrt(np.mean(deviations**2)))
    even = spread <= 1e-12
    std = 0.0 if even else spread * scale
    numbers = (
        float(np.mean(known / scale)) * scale,
        std,
        0.0 if even else float(np.mean((deviations / spread) ** 3)),
        float(np.median(known)),
        std * std,
        std / math.sqrt(EPOCHS),
        float(known.max()),
        float(known.min()),
    )
    finite = [number if math.isfinite(number) else math.nan for number in numbers]
    return dict(zip(names, finite, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class DeepFD:
    """DeepFD's three estimators, and what they need to read features.

    ``columns`` are the features that are known of some training run; ``median``, ``low`` and
    ``high`` (columns,) are theirs over the training runs.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    median: Array
    low: Array
    high: Array
    estimators: tuple[Any, ...]

    def predict(self, features: Mapping[str, float]) -> Opinion:
        """Judges a run by its `deepfd_features`.

        ``causes`` are the labels that at least one estimator predicts, the most probable first by
        the mean of the three; the run is faulty where there is one. For the score each estimator
        says how probable some label is, the sum of its labels' probabilities and at most 1 (exact
        where labels exclude each other); the score is the mean of the three.
        """
        row = self.scaled([features])
        said = np.array([_probabilities(estimator, row)[0] for estimator in self.estimators])
        mean = said.mean(axis=0)
        predicted = [i for i in range(len(self.labels)) if (said[:, i] > 0.5).any()]
        predicted.sort(key=lambda i: (-mean[i], self.labels[i]))
        score = float(np.minimum(said.sum(axis=1), 1.0).mean())
        return Opinion(bool(predicted), score, tuple(self.labels[i] for i in predicted))

    def scaled(self, features: Sequence[Mapping[str, float]]) -> Array:
        """Returns features in [0, 1], (runs, columns), unknown ones by the training median.

        What lies beyond the training runs is cut to their range.
        """
        rows = _matrix(features, self.columns)
        rows = np.where(np.isnan(rows), self.median, rows)
        width = np.where(self.high > self.low, self.high - self.low, 1.0)
        return np.clip((np.clip(rows, self.low, self.high) - self.low) / width, 0.0, 1.0)


def fit_deepfd(
    features: Sequence[Mapping[str, float]], labels: Sequence[Collection[str]]
) -> DeepFD:
    """Learns DeepFD (Cao et al., ICSE 2022) from runs and what is wrong with them.

    Three multi-label estimators, whose labels are united: k nearest neighbours (k = 5), a decision
    tree (Gini, depth 5) and a random forest (32 trees, depth 10, 60 features a split, or all if
    there are fewer). Features are min-max scaled by the training runs alone; DeepFD's published
    program scales by the runs it is tested on. None of the three can have a NaN (DeepFD has none,
    its features being counts): what is not known is imputed by the median of the training runs, and
    a feature that none of them knows is left out. The order of runs and features has no effect.

    Left out: the nine runs that DeepFD makes of a program and the numbers it takes off their votes,
    set by hand for its own training set; and its way from labels to lines of source code, so that
    it names no component.

    Args:
        features: `deepfd_features` of the training runs.
        labels: What is wrong with each; healthy runs have no label.

    Raises:
        BenchmarkError: There are too few runs, none has a label, or nothing is known of any.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.tree import DecisionTreeClassifier

    if len(features) != len(labels):
        raise BenchmarkError(
            f"DeepFD: {len(features)} runs and {len(labels)} sets of labels; give one for each run"
        )
    names = tuple(sorted({label for of_run in labels for label in of_run}))
    if len(features) < NEIGHBOURS or not names:
        raise BenchmarkError(
            f"DeepFD learns from {NEIGHBOURS} runs or more, some with a label; there are "
            f"{len(features)} runs and {len(names)} labels"
        )
    listed = tuple(sorted({name for row in features for name in row}))
    rows = _matrix(features, listed)
    some: NDArray[np.bool_] = np.logical_not(np.isnan(rows).all(axis=0))
    columns = tuple(name for name, known in zip(listed, some.tolist(), strict=True) if known)
    if not columns:
        raise BenchmarkError("DeepFD: no feature is known of any run; were the runs recorded?")
    rows = rows[:, some]
    prepared = DeepFD(
        columns,
        names,
        np.nanmedian(rows, axis=0),
        np.nanmin(rows, axis=0),
        np.nanmax(rows, axis=0),
        (
            KNeighborsClassifier(NEIGHBOURS, algorithm="brute"),
            DecisionTreeClassifier(criterion="gini", max_depth=TREE_DEPTH, random_state=SEED),
            RandomForestClassifier(
                TREES,
                max_depth=FOREST_DEPTH,
                max_features=min(FOREST_FEATURES, len(columns)),
                random_state=SEED,
            ),
        ),
    )
    inputs = prepared.scaled(features)
    truth = np.array([[name in of_run for name in names] for of_run in labels], dtype=int)
    order = np.lexsort(np.hstack([inputs, truth]).T)  # ties and draws depend on the order of rows
    for estimator in prepared.estimators:
        estimator.fit(inputs[order], truth[order] if len(names) > 1 else truth[order, 0])
    return prepared


def _probabilities(estimator: Any, rows: Array) -> Array:
    """Returns the probability of each label, (runs, labels)."""
    said, classes = estimator.predict_proba(rows), estimator.classes_
    if not isinstance(said, list):  # of a single label
        said = [said]
    if not isinstance(classes, list):
        classes = [classes]
    return np.column_stack(
        [(of * (known == 1)).sum(axis=1) for of, known in zip(said, classes, strict=True)]
    )


def _matrix(features: Sequence[Mapping[str, float]], columns: Sequence[str]) -> Array:
    """Returns features as (runs, columns); what is missing or infinite is NaN: not known."""
    rows = np.array([[row.get(name, np.nan) for name in columns] for row in features], dtype=float)
    return np.where(np.isfinite(rows), rows, np.nan)


# -- localisation ----------------------------------------------------------------------------------


def gradient_norm_argmax(recording: Recording) -> tuple[str, ...]:
    """Ranks components by how far their gradient norm has gone, other than the others' has.

    c is the logarithm of the latest known value over the median of the component's first three (of
    all before the latest, where there are fewer), and z = (c - median of c) / MAD of c over the
    components of the run. Ranks are by |z|; the MAD is the same for all and can be left out. A norm
    that became 0, or was 0, has gone infinitely far. Ties are in the order of the model.

    The plain rival of localisation by curvature. Left out: layers, which have no weights of their
    own, and components of which fewer than two values are known, or only zeros.
    """
    values = Source(recording).component("gradient_norm").value
    return _furthest(recording, values, _ratio)


def update_ratio_argmax(recording: Recording) -> tuple[str, ...]:
    """Ranks components by the update norm over the weight norm, as `gradient_norm_argmax` does."""
    values = Source(recording).component("update_ratio").value
    return _furthest(recording, values, _ratio)


def entropy_argmax(recording: Recording) -> tuple[str, ...]:
    """Ranks components by the attention entropy of their layer, as `gradient_norm_argmax` does.

    Entropy is a share of the largest possible already, so that c is a difference. The components
    of a layer share it and are tied. Left out: components outside attention.
    """
    values = functions.entropy_of_layer(Source(recording)).value
    return _furthest(recording, values, lambda latest, early: latest - early)


def chance(recording: Recording, accepted: Sequence[str]) -> Chance:
    """Returns how often a random order of the components is right.

    With k of n components right it is k / n for the first, and 1 - C(n - k, 3) / C(n, 3) for one of
    the first three (hypergeometric); NaN where there are no components.

    Args:
        recording: Whose components with weights of their own are put in order.
        accepted: Names, or prefixes of names, that are right to blame.
    """
    names = _with_weights(recording)
    right = sum(to_blame(name, accepted) for name in names)
    return Chance(_hit(len(names), right, 1), _hit(len(names), right, 3))


def _hit(n: int, right: int, top: int) -> float:
    if not n:
        return math.nan
    drawn = min(top, n)
    return 1.0 - math.comb(n - right, drawn) / math.comb(n, drawn)


def _with_weights(recording: Recording) -> list[str]:
    """Names of the components that are no layer of others, in the order of the model."""
    layers = {c.layer for c in recording.components if c.layer != c.name}
    own = [c for c in recording.components if c.kind != "other" or c.name not in layers]
    return [c.name for c in sorted(own, key=lambda c: (c.order, c.name))]


def _ratio(latest: float, early: float) -> float:
    with np.errstate(all="ignore"):
        return float(np.log(latest) - np.log(early))


def _furthest(
    recording: Recording, values: Array, change: Callable[[float, float], float]
) -> tuple[str, ...]:
    """Ranks components by how far their change is from the median one; (components, steps)."""
    rows = dict(zip((c.name for c in recording.components), values, strict=True))
    changes: dict[str, float] = {}
    for name in _with_weights(recording):
        known = rows[name][~np.isnan(rows[name])]
        if len(known) > 1:
            changed = change(float(known[-1]), float(np.median(known[:-1][:EARLY])))
            if not math.isnan(changed):
                changes[name] = changed
    finite = [changed for changed in changes.values() if math.isfinite(changed)]
    middle = statistics.median(finite) if finite else 0.0
    return tuple(sorted(changes, key=lambda name: -abs(changes[name] - middle)))
