"""The feature catalogue: what rules may ask about, computed from a recording.

Features are scale-free (ratios to theory, to the component's own early window, to other components
of the run, to chance) and windowed, so that one number at one measured step says something about a
model of any size. Raw curvature and raw coupling are not among them on purpose: they are often
lower in a faulty run than in a healthy one.

Adding a feature is one entry of `FEATURES`: a `Feature` and a function of a `Source`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.runlog import Recording
from diagnoser.table import Array, Column, Feature, Scope, Table
from diagnoser.vocabulary import MODEL

LOSS_WINDOW: Final = 10  # steps, or a tenth of the run so far if that is more
EARLY_SAMPLES: Final = 3  # measurements that make a component's own early window
SMOOTHED: Final = 3  # measurements of a moving median
EPOCHS: Final = 20  # equal parts of the run that stand for epochs in AutoTrainer's formulas


class Source:
    """A recording as matrices: one row a subject, one column a measured step, NaN = not known."""

    def __init__(self, recording: Recording) -> None:
        rows = recording.measurements
        self.recording = recording
        self.steps: NDArray[np.int64] = np.unique(rows.step)
        listed = [component.name for component in recording.components]
        self.names: list[str] = listed
        self.kinds: dict[str, str] = {c.name: c.kind for c in recording.components}
        self.layers: dict[str, str] = {c.name: c.layer for c in recording.components}
        self._column_of = np.searchsorted(self.steps, rows.step)
        self._quantity = {name: i for i, name in enumerate(rows.quantities)}
        position = {name: i for i, name in enumerate(listed)}
        self._row_of = np.array([position.get(name, -1) for name in rows.components], dtype=int)
        self._model = rows.components.index(MODEL) if MODEL in rows.components else -2

    def _chosen(self, quantity: str) -> NDArray[np.bool_]:
        rows = self.recording.measurements
        chosen: NDArray[np.bool_] = rows.quantity == self._quantity.get(quantity, -1)
        return chosen

    def _fill(self, shape: int, row: NDArray[np.int64], chosen: NDArray[np.bool_]) -> Column:
        rows = self.recording.measurements
        value = np.full((shape, len(self.steps)), np.nan)
        error = np.zeros_like(value)
        at = (row, self._column_of[chosen])
        value[at] = rows.value[chosen]
        own, batch = rows.std_error[chosen], rows.batch_std_error[chosen]
        error[at] = np.sqrt(np.nan_to_num(own) ** 2 + np.nan_to_num(batch) ** 2)
        if not error.any():
            return Column.exact(value)
        return Column(value, value - 2.0 * error, value + 2.0 * error)

    @functools.lru_cache(maxsize=None)  # noqa: B019 - a source lives as long as its tables
    def component(self, quantity: str) -> Column:
        """A quantity of every component; (components, steps)."""
        rows = self.recording.measurements
        row = self._row_of[rows.component]
        chosen = self._chosen(quantity) & (row >= 0) & (rows.other < 0)
        return self._fill(len(self.names), row[chosen], chosen)

    @functools.lru_cache(maxsize=None)  # noqa: B019
    def run(self, quantity: str) -> Column:
        """A quantity of the whole model; (1, steps)."""
        rows = self.recording.measurements
        chosen = self._chosen(quantity) & (rows.component == self._model) & (rows.other < 0)
        return self._fill(1, np.zeros(int(chosen.sum()), dtype=int), chosen)

    @functools.cached_property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """All pairs of components that a coupling was measured of, in order of appearance."""
        rows = self.recording.measurements
        chosen = rows.other >= 0
        codes = dict.fromkeys(zip(rows.component[chosen], rows.other[chosen], strict=True))
        names = rows.components
        return tuple((names[a], names[b]) for a, b in codes)

    def pair(self, quantity: str) -> Column:
        """A quantity of every pair; (pairs, steps)."""
        rows = self.recording.measurements
        names = rows.components
        position = {pair: i for i, pair in enumerate(self.pairs)}
        chosen = self._chosen(quantity) & (rows.other >= 0)
        row = np.array(
            [
                position[names[a], names[b]]
                for a, b in zip(rows.component[chosen], rows.other[chosen], strict=True)
            ],
            dtype=int,
        )
        return self._fill(len(self.pairs), row, chosen)

    # -- the loss curve at measured steps ---------------------------------------------------------

    def _windows(
        self, curve: Array, step: NDArray[np.int64], function: Callable[[Array], float]
    ) -> Array:
        result = np.full((1, len(self.steps)), np.nan)
        for i, at in enumerate(self.steps):
            width = max(LOSS_WINDOW, int(at) // 10)
            first, last = np.searchsorted(step, [at - width + 1, at + 1])
            if last > first:
                result[0, i] = function(curve[first:last])
        return result

    @functools.cached_property
    def loss(self) -> Array:
        """Mean loss of the window that ends at each measured step; NaN with a NaN in it."""
        losses = self.recording.losses
        return self._windows(losses.value, losses.step, lambda w: float(np.mean(w)))

    @functools.cached_property
    def initial_loss(self) -> float:
        """Mean of the first three losses; NaN if there is none or they are not positive."""
        first = self.recording.losses.value[:3]
        return float(first.mean()) if len(first) and (first > 0).all() else float("nan")

    @functools.cached_property
    def accuracy(self) -> Array:
        """Mean training accuracy of the window that ends at each measured step."""
        curve = self.recording.accuracies
        known = ~np.isnan(curve.value)
        return self._windows(curve.value[known], curve.step[known], lambda w: float(np.mean(w)))

    @functools.cached_property
    def epoch_accuracies(self) -> Array:
        """Mean training accuracy of twenty equal parts of the run, of ten steps or more each."""
        curve = self.recording.accuracies
        values = curve.value[~np.isnan(curve.value)]
        parts = min(EPOCHS, len(values) // LOSS_WINDOW)
        if parts < 2:
            return np.empty(0)
        return np.array([part.mean() for part in np.array_split(values, parts)])


def _last(value: float, source: Source) -> Column:
    """A number that is only known at the end of what was recorded."""
    result = np.full((1, len(source.steps)), np.nan)
    if len(source.steps):
        result[0, -1] = value
    return Column.exact(result)


def _ratio(a: Array, b: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Array = a / b
    return np.where(np.isfinite(result), result, np.nan)


def _scaled(column: Column, factor: Array) -> Column:
    """A column times a known, non-negative factor."""
    if column.lower is column.value:
        return Column.exact(column.value * factor)
    return Column(column.value * factor, column.lower * factor, column.upper * factor)


def _moving_median(values: Array) -> Array:
    """Median of the last three known values of each row; NaN where none of them is known."""
    result = np.full_like(values, np.nan)
    for r, row in enumerate(values):
        known = np.flatnonzero(~np.isnan(row))
        for i, at in enumerate(known):
            result[r, at] = np.median(row[known[max(0, i - SMOOTHED + 1) : i + 1]])
    return result


def _early(values: Array) -> Array:
    """Median of each row's first three known values; (rows, 1)."""
    result = np.full((len(values), 1), np.nan)
    for r, row in enumerate(values):
        known = row[~np.isnan(row)][:EARLY_SAMPLES]
        if len(known) == EARLY_SAMPLES:
            result[r] = np.median(known)
    return result


def _first(values: Array) -> Array:
    """Each row's first known value; (rows, 1)."""
    result = np.full((len(values), 1), np.nan)
    for r, row in enumerate(values):
        known = row[~np.isnan(row)][:1]
        if len(known):
            result[r] = known[0]
    return result


def _median_over_components(values: Array) -> Array:
    """Median over the components that are known at a step; (1, steps)."""
    result = np.full((1, values.shape[1]), np.nan)
    for i, column in enumerate(values.T):
        known = column[~np.isnan(column)]
        if len(known):
            result[0, i] = np.median(known)
    return result


def _broadcast(row: Array, source: Source) -> Array:
    return np.broadcast_to(row, (len(source.names), row.shape[1]))


def _siblings(source: Source, values: Array) -> Array:
    """Largest value among the other components of the same kind; NaN where there is none."""
    result = np.full_like(values, np.nan)
    kinds = [source.kinds[name] for name in source.names]
    layers = [source.layers[name] for name in source.names]
    for i in range(len(kinds)):
        others = [j for j in range(len(kinds)) if kinds[j] == kinds[i] and layers[j] != layers[i]]
        if others:
            known = np.where(np.isnan(values[others]), -np.inf, values[others]).max(axis=0)
            result[i] = np.where(np.isfinite(known), known, np.nan)
    return result


def _matrix_rows(source: Source) -> list[int]:
    """Components with a kernel, in the order of the model, that have a gradient."""
    names = [
        (component.order, source.names.index(component.name))
        for component in source.recording.components
        if component.kind != "norm" and component.name in source.names
    ]
    norms = source.component("gradient_norm").value
    return [row for _, row in sorted(names) if not np.isnan(norms[row]).all()]


# -- the functions behind the catalogue ------------------------------------------------------------


def _loss_fall(s: Source) -> Column:
    return Column.exact(1.0 - s.loss / s.initial_loss)


def _loss_rise(s: Source) -> Column:
    best = np.fmin.accumulate(s.loss, axis=1)
    return Column.exact(_ratio(s.loss - best, np.full_like(best, s.initial_loss)))


def _loss_spread(s: Source) -> Column:
    losses = s.recording.losses
    spread = s._windows(losses.value, losses.step, lambda w: float(np.std(w)))
    return Column.exact(_ratio(spread, s.loss))


def _loss_to_chance(s: Source) -> Column:
    classes = s.run("classes").value
    known = classes[~np.isnan(classes)]
    if not len(known):
        return Column.exact(np.full((1, len(s.steps)), np.nan))
    return Column.exact(s.loss / np.log(known.max()))


def _non_finite_loss(s: Source) -> Column:
    losses = s.recording.losses
    bad = losses.step[~np.isfinite(losses.value)]
    result = np.zeros((1, len(s.steps)))
    if len(bad):
        result[0, s.steps >= bad[0]] = 1.0
    return Column.exact(result)


def _median_update_ratio(s: Source) -> Column:
    return Column.exact(_median_over_components(_moving_median(s.component("update_ratio").value)))


def _update_ratio(s: Source) -> Column:
    return Column.exact(_moving_median(s.component("update_ratio").value))


def _update_ratio_to_median(s: Source) -> Column:
    own = _moving_median(s.component("update_ratio").value)
    median = _median_over_components(np.where(own > 0, own, np.nan))
    return Column.exact(_ratio(own, _broadcast(median, s)))


def _learning_rate_to_median(s: Source) -> Column:
    rate = s.component("learning_rate").value
    return Column.exact(_ratio(rate, _broadcast(_median_over_components(rate), s)))


def _gradient_to_start(s: Source) -> Column:
    norm = s.component("gradient_norm").value
    return Column.exact(_ratio(_moving_median(norm), np.broadcast_to(_early(norm), norm.shape)))


def _weight_growth(s: Source) -> Column:
    norm = s.component("weight_norm").value
    return Column.exact(_ratio(norm, np.broadcast_to(_first(norm), norm.shape)))


def _initial_weight_scale_to_median(s: Source) -> Column:
    first = _first(s.component("weight_scale").value)
    known = first[~np.isnan(first)]
    median = np.median(known) if len(known) > 2 else np.nan
    ratio = _ratio(first, np.full_like(first, median))
    return Column.exact(np.broadcast_to(ratio, (len(s.names), len(s.steps))).copy())


def _moved(s: Source) -> Column:
    size = s.component("update_norm").value
    known = ~np.isnan(size)
    ever = np.maximum.accumulate(np.where(known, size, 0.0) > 0, axis=1).astype(float)
    return Column.exact(np.where(np.maximum.accumulate(known, axis=1), ever, np.nan))


def _ever_reached(s: Source) -> Column:
    norm, reached = s.component("gradient_norm").value, s.component("reached").value
    known = ~np.isnan(reached)
    ever = np.maximum.accumulate(np.where(np.isnan(norm), 0.0, norm) > 0, axis=1).astype(float)
    return Column.exact(np.where(np.maximum.accumulate(known, axis=1), ever, np.nan))


def _frozen_prefix(s: Source) -> Column:
    """1 where this component and every one before it in the model's order are frozen."""
    trainable = s.component("trainable").value
    order = {c.name: c.order for c in s.recording.components}
    ranked = sorted(range(len(s.names)), key=lambda i: order[s.names[i]])
    result = np.full_like(trainable, np.nan)
    frozen_so_far = np.ones(len(s.steps), dtype=bool)
    for i in ranked:
        known = ~np.isnan(trainable[i])
        frozen_so_far &= ~known | (trainable[i] == 0)
        result[i] = np.where(known, frozen_so_far.astype(float), np.nan)
    return Column.exact(result)


def _trained_components(s: Source) -> Column:
    trainable = s.component("trainable").value
    with np.errstate(invalid="ignore", divide="ignore"):
        known = ~np.isnan(trainable)
        share = (np.nan_to_num(trainable) > 0).sum(axis=0) / known.sum(axis=0)
    return Column.exact(np.where(known.any(axis=0), share, np.nan)[None, :])


def _negative_curvature_ratio(s: Source) -> Column:
    low, high = s.component("lambda_min"), s.component("lambda_max")
    scale = np.maximum(np.abs(high.value), 1e-30)
    return Column(-low.value / scale, -low.upper / scale, -low.lower / scale)


def _trace_z(s: Source) -> Column:
    trace = s.component("trace")
    error = (trace.upper - trace.lower) / 4.0
    return Column.exact(_ratio(trace.value, np.where(error > 0, error, np.nan)))


def _own(quantity: str) -> Callable[[Source], Column]:
    return lambda s: s.component(quantity)


def _own_run(quantity: str) -> Callable[[Source], Column]:
    return lambda s: s.run(quantity)


def _siblings_of(quantity: str) -> Callable[[Source], Column]:
    return lambda s: Column.exact(_siblings(s, s.component(quantity).value))


def _to_start(quantity: str) -> Callable[[Source], Column]:
    def function(s: Source) -> Column:
        value = s.component(quantity).value
        return Column.exact(_ratio(value, np.broadcast_to(_first(value), value.shape)))

    return function


def _smoothed(quantity: str) -> Callable[[Source], Column]:
    return lambda s: Column.exact(_moving_median(s.component(quantity).value))


def _smoothed_run(quantity: str) -> Callable[[Source], Column]:
    return lambda s: Column.exact(_moving_median(s.run(quantity).value))


def _first_gradient_norm(s: Source) -> Column:
    rows = _matrix_rows(s)
    norm = s.component("gradient_norm").value
    return Column.exact(norm[rows[:1]] if rows else np.full((1, len(s.steps)), np.nan))


def _first_gradient_ratio(s: Source) -> Column:
    rows = _matrix_rows(s)
    norm = s.component("gradient_norm").value
    if len(rows) < 2:
        return Column.exact(np.full((1, len(s.steps)), np.nan))
    return Column.exact(_ratio(norm[rows[:1]], norm[rows[-1:]]))


def _zero_gradient_share(s: Source) -> Column:
    zero = s.component("zero_share").value
    sizes = {c.name: c.elements for c in s.recording.components}
    weight = np.array([[sizes[name]] for name in s.names], dtype=float) * ~np.isnan(zero)
    total = weight.sum(axis=0, keepdims=True)
    return Column.exact(_ratio((np.nan_to_num(zero) * weight).sum(axis=0, keepdims=True), total))


def _accuracy_best(s: Source) -> Column:
    epochs = s.epoch_accuracies
    return _last(float(epochs.max()) if len(epochs) else float("nan"), s)


def _accuracy_best_gain(s: Source) -> Column:
    epochs = s.epoch_accuracies
    return _last(float(np.diff(epochs).max()) if len(epochs) > 1 else float("nan"), s)


def _accuracy_swings(s: Source) -> Column:
    """AutoTrainer: the i-th local maximum with the i-th local minimum, apart by 0.03 or more."""
    epochs = s.epoch_accuracies
    if len(epochs) < 3:
        return _last(float("nan"), s)
    middle, before, after = epochs[1:-1], epochs[:-2], epochs[2:]
    highs = middle[(middle > before) & (middle >= after)]
    lows = middle[(middle < before) & (middle <= after)]
    pairs = min(len(highs), len(lows))
    swings = int((highs[:pairs] - lows[:pairs] >= 0.03).sum())
    return _last(swings / len(epochs), s)


Entry = tuple[Feature, Callable[[Source], Column]]


def _entry(
    name: str,
    scope: Scope,
    function: Callable[[Source], Column],
    quantities: tuple[str, ...],
    description: str,
    low: float = 0.0,
    high: float = np.inf,
    unit: str = "",
) -> tuple[str, Entry]:
    return name, (Feature(name, scope, description, unit, low, high, quantities), function)


FEATURES: Final[Mapping[str, Entry]] = dict(
    [
        # the run
        _entry("loss_fall", "run", _loss_fall, (), "share of the initial loss that is gone (windowed mean loss against the first three)", -np.inf, 1.0),
        _entry("loss_rise", "run", _loss_rise, (), "how far the windowed loss is above its best, in initial losses"),
        _entry("loss_spread", "run", _loss_spread, (), "standard deviation over mean of the loss in its window"),
        _entry("loss_to_chance", "run", _loss_to_chance, ("classes",), "windowed loss over ln(number of classes): 1 is guessing"),
        _entry("non_finite_loss", "run", _non_finite_loss, (), "1 from the first loss on that is NaN or infinite", 0, 1),
        _entry("accuracy", "run", lambda s: Column.exact(s.accuracy), (), "windowed training accuracy of a classification loss", 0, 1),
        _entry("carried_gradients", "run", _own_run("carried_gradients"), ("carried_gradients",), "share of parameters whose gradient of the last step still stands when the next backward begins", 0, 1),
        _entry("probabilities_into_loss", "run", _own_run("probabilities_into_loss"), ("probabilities_into_loss",), "1 where a softmax or sigmoid result enters a loss that applies its own", 0, 1),
        _entry("trained_components", "run", _trained_components, ("trainable",), "share of components that are trainable", 0, 1),
        _entry("median_update_ratio", "run", _median_update_ratio, ("update_ratio",), "median over components of update norm over weight norm (moving median of 3)"),
        _entry("model_step_sharpness", "run", _smoothed_run("step_sharpness"), ("step_sharpness",), "learning rate times curvature along the update, over what the optimizer's stability allows (Cohen et al. 2021, 2022); moving median of 3", -np.inf),
        _entry("update_curvature_share", "run", _smoothed_run("update_curvature_share"), ("update_curvature_share",), "loss that curvature adds in one step, d'Hd / 2, over the loss; moving median of 3", -np.inf),
        # AutoTrainer's quantities (ICSE 2021); an epoch is a twentieth of the run
        _entry("first_gradient_norm", "run", _first_gradient_norm, ("gradient_norm",), "gradient norm of the first kernel"),
        _entry("first_gradient_ratio", "run", _first_gradient_ratio, ("gradient_norm",), "gradient norm of the first kernel over that of the last"),
        _entry("zero_gradient_share", "run", _zero_gradient_share, ("zero_share",), "share of gradient entries that are exactly zero", 0, 1),
        _entry("accuracy_best", "run", _accuracy_best, (), "best training accuracy of an epoch, known at the end", 0, 1),
        _entry("accuracy_best_gain", "run", _accuracy_best_gain, (), "largest gain of training accuracy from one epoch to the next", -1, 1),
        _entry("accuracy_swings", "run", _accuracy_swings, (), "pairs of a local maximum and minimum of training accuracy at least 0.03 apart, per epoch", 0, 1),
        # components: what the program does with them
        _entry("trainable", "component", _own("trainable"), ("trainable",), "share of elements that require a gradient", 0, 1),
        _entry("optimized", "component", _own("optimized"), ("optimized",), "share of elements that an optimizer was given", 0, 1),
        _entry("ever_reached", "component", _ever_reached, ("gradient_norm", "reached"), "1 once a gradient that is not zero was seen", 0, 1),
        _entry("moved", "component", _moved, ("update_norm",), "1 once the parameters were seen to change", 0, 1),
        _entry("siblings_trainable", "component", _siblings_of("trainable"), ("trainable",), "the same of the most trainable other component of this kind", 0, 1),
        _entry("frozen_prefix", "component", _frozen_prefix, ("trainable",), "1 where this component and all before it in the model are frozen", 0, 1),
        _entry("learning_rate_to_median", "component", _learning_rate_to_median, ("learning_rate",), "learning rate over the median component's"),
        # components: gradients, weights, updates
        _entry("gradient_to_start", "component", _gradient_to_start, ("gradient_norm",), "gradient norm (moving median of 3) over the median of its first three measurements"),
        _entry("gradient_cosine", "component", _smoothed("gradient_cosine"), ("gradient_cosine",), "cosine between the gradients of neighbouring steps (moving median of 3)", -1, 1),
        _entry("zero_share", "component", _own("zero_share"), ("zero_share",), "share of gradient entries that are exactly zero", 0, 1),
        _entry("non_finite_gradient", "component", _own("non_finite_gradient"), ("non_finite_gradient",), "1 where the gradient holds NaN or Inf", 0, 1),
        _entry("non_finite_weight", "component", _own("non_finite_weight"), ("non_finite_weight",), "1 where a weight is NaN or Inf", 0, 1),
        _entry("update_ratio", "component", _update_ratio, ("update_ratio",), "update norm over weight norm (moving median of 3)"),
        _entry("update_ratio_to_median", "component", _update_ratio_to_median, ("update_ratio",), "update ratio over the median component's"),
        _entry("weight_growth", "component", _weight_growth, ("weight_norm",), "weight norm over its first value"),
        _entry("initial_weight_scale", "component", lambda s: Column.exact(np.broadcast_to(_first(s.component("weight_scale").value), (len(s.names), len(s.steps))).copy()), ("weight_scale",), "root mean square weight times sqrt(fan-in) at the first measurement: 0.58 for torch's Linear, 1 for LeCun, 1.4 for He"),
        _entry("initial_weight_scale_to_median", "component", _initial_weight_scale_to_median, ("weight_scale",), "the same over the median component's"),
        _entry("moment_ratio", "component", _own("moment_ratio"), ("moment_ratio",), "sqrt(mean(g^2/v)) under Adam: above 2.3 the second moment lags behind (Wortsman et al. 2023)"),
        # components: curvature
        _entry("step_sharpness", "component", _own("step_sharpness"), ("step_sharpness",), "learning rate times curvature along the component's update, over what stability allows", -np.inf),
        _entry("step_lambda", "component", _own("step_lambda"), ("step_lambda",), "learning rate times the largest (preconditioned) eigenvalue, over what stability allows", -np.inf),
        _entry("negative_curvature_ratio", "component", _negative_curvature_ratio, ("lambda_min", "lambda_max"), "-lambda_min over |lambda_max|", -np.inf),
        _entry("trace_z", "component", _trace_z, ("trace",), "trace over its standard error", -np.inf),
        # attention layers
        _entry("attention_entropy", "component", _own("attention_entropy"), ("attention_entropy",), "row entropy over the logarithm of the visible positions: 0 one-hot, 1 uniform", 0, 1.001),
        _entry("initial_attention_entropy", "component", lambda s: Column.exact(np.broadcast_to(_first(s.component("attention_entropy").value), (len(s.names), len(s.steps))).copy()), ("attention_entropy",), "the same at the first measurement", 0, 1.001),
        _entry("attention_logit", "component", _own("attention_logit"), ("attention_logit",), "largest absolute attention logit before the mask"),
        _entry("attention_logit_growth", "component", _to_start("attention_logit"), ("attention_logit",), "largest logit over its first value"),
        _entry("empty_rows", "component", _own("empty_rows"), ("empty_rows",), "share of attention rows that are NaN although their logits are finite: every position is masked", 0, 1),
        # pairs
        _entry("coupling_share", "pair", lambda s: s.pair("coupling_share"), ("coupling_share",), "d_i'H_ij d_j along the update over the sum of all |d_k'H_kl d_l|", -1, 1),
    ]
)  # fmt: skip
"""Name to feature and the function that computes it."""

CATALOGUE: Final[Mapping[str, Feature]] = {name: entry[0] for name, entry in FEATURES.items()}


def feature_tables(recording: Recording) -> dict[Scope, Table]:
    """Computes every feature of a recording.

    Returns:
        Tables by scope. A feature whose quantities were never measured is all NaN there, so that a
        rule that needs it is unknown rather than silent.
    """
    source = Source(recording)
    subjects: dict[Scope, tuple[tuple[str, str | None], ...]] = {
        "run": ((MODEL, None),),
        "component": tuple((name, None) for name in source.names),
        "pair": source.pairs,
    }
    tables: dict[Scope, Table] = {}
    for scope, members in subjects.items():
        columns = {
            name: function(source)
            for name, (feature, function) in FEATURES.items()
            if feature.scope == scope
        }
        tables[scope] = Table(scope, source.steps, members, columns, source.kinds)
    return tables
