"""What features compute: functions of a `Source` that return one `Column` each.

Private steps (moving medians, first values) work on plain (subjects, steps) arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from diagnoser.features.source import INITIAL_LOSSES, LOSS_WINDOW, Source
from diagnoser.table import Array, Column
from diagnoser.vocabulary import STOPPED

EARLY_SAMPLES: Final = 3  # measurements that make a component's own early window
NEAR_THE_END: Final = 0.7  # of the run: a measurement before says nothing of its end
RESTING: Final = 0.05  # of its highest learning rate: below it hardly anything is learned


def of_the_run(value: float, source: Source) -> Column:
    """A number that is of all that was recorded: the same at each step."""
    return Column.exact(np.full((1, len(source.steps)), value))


def quotient(a: Array, b: Array) -> Array:
    result: Array = a / b
    return np.where(np.isfinite(result), result, np.nan)


def moving_median(values: Array) -> Array:
    """Median of the last three known values of each row, at the steps where one is known."""
    result = np.full_like(values, np.nan)
    for row, medians in zip(values, result, strict=True):
        known = ~np.isnan(row)
        own = row[known]
        of_three = np.sort(np.stack([own[:-2], own[1:-1], own[2:]]), axis=0)[1]
        medians[known] = np.concatenate([own[:1], (own[:1] + own[1:2]) / 2.0, of_three])
    return result


def early_median(values: Array) -> Array:
    """Median of each row's first three known values; (rows, 1)."""
    result = np.full((len(values), 1), np.nan)
    for r, row in enumerate(values):
        known = row[~np.isnan(row)][:EARLY_SAMPLES]
        if len(known) == EARLY_SAMPLES:
            result[r] = np.median(known)
    return result


def first_known(values: Array) -> Array:
    """Each row's first known value; (rows, 1)."""
    result = np.full((len(values), 1), np.nan)
    for r, row in enumerate(values):
        known = row[~np.isnan(row)][:1]
        if len(known):
            result[r] = known[0]
    return result


def median_over_components(values: Array, quantile: float = 0.5) -> Array:
    """Median, or another quantile, over the components that are known at a step; (1, steps)."""
    result = np.full((1, values.shape[1]), np.nan)
    ordered = np.sort(values, axis=0)  # what is missing comes last
    count = len(values) - np.isnan(values).sum(axis=0)
    for known in np.unique(count[count > 0]):
        at = count == known
        result[0, at] = np.quantile(ordered[:known, at], quantile, axis=0)
    return result


def broadcast(row: Array, source: Source) -> Array:
    return np.broadcast_to(row, (len(source.names), row.shape[1]))


def siblings(source: Source, values: Array) -> Array:
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


def matrix_rows(source: Source) -> list[int]:
    """Components with a kernel, in the order of the model, that have a gradient."""
    names = [
        (component.order, source.names.index(component.name))
        for component in source.recording.components
        if component.kind != "norm" and component.name in source.names
    ]
    norms = source.component("gradient_norm").value
    return [row for _, row in sorted(names) if not np.isnan(norms[row]).all()]


# -- the functions behind the catalogue ------------------------------------------------------------


def loss_fall(s: Source) -> Column:
    fall = 1.0 - s.loss / s.initial_loss
    return Column.exact(np.where(s.steps < INITIAL_LOSSES, np.nan, fall))


def loss_rise(s: Source) -> Column:
    best = np.fmin.accumulate(s.loss, axis=1)
    return Column.exact(quotient(s.loss - best, np.full_like(best, s.initial_loss)))


def loss_spread(s: Source) -> Column:
    spread = s.windows(s.recording.losses, lambda w: float(np.std(w)))
    return Column.exact(quotient(spread, np.abs(s.loss)))


def loss_trend(s: Source) -> Column:
    half = np.searchsorted(s.steps, s.steps // 2, side="right") - 1
    earlier = np.where(half >= 0, s.loss[:, half], np.nan)
    kept = quotient(s.loss, np.where(earlier > 0, earlier, np.nan))
    return Column.exact(np.where(s.steps < INITIAL_LOSSES, np.nan, 1.0 - kept))


def loss_to_chance(s: Source) -> Column:
    return Column.exact(quotient(s.loss, np.full_like(s.loss, loss_of_chance(s))))


def initial_loss_to_chance(s: Source) -> Column:
    return of_the_run(s.initial_loss / loss_of_chance(s), s)


def loss_of_chance(s: Source) -> float:
    """Of a single class there is nothing to guess, and it is not known."""
    classes, factors = s.run("classes").value, s.run("loss_factor").value
    known = classes[~np.isnan(classes)]
    if not len(known) or known.max() <= 1:
        return float("nan")
    factor = float(np.median(factors[~np.isnan(factors)])) if (~np.isnan(factors)).any() else 1.0
    return float(np.log(known.max())) * factor


def loss_half_time(s: Source) -> Column:
    """Nothing of it is known before the loss has fallen at all."""
    best = np.fmin.accumulate(s.loss[0])
    result = np.full((1, len(s.steps)), np.nan)
    for i, at in enumerate(s.steps):
        if at > 0 and best[i] < s.initial_loss:
            half = (s.initial_loss + best[i]) / 2.0
            result[0, i] = s.steps[: i + 1][best[: i + 1] <= half][0] / at
    return Column.exact(result)


def loss_persistence(s: Source) -> Column:
    return Column.exact(s.windows(s.recording.losses, persistence, of_neighbours=True))


def persistence(window: Array) -> float:
    """Correlation of neighbouring values of a window around the line through them."""
    if len(window) < LOSS_WINDOW or not np.isfinite(window).all():
        return float("nan")
    place = np.arange(len(window)) - (len(window) - 1) / 2.0
    rest = window - window.mean()
    rest = rest - place * (place @ rest) / (place @ place)
    square = float(rest @ rest)
    return float(rest[1:] @ rest[:-1]) / square if square > 0 else float("nan")


def loss_spike(s: Source) -> Column:
    highest = s.windows(s.recording.losses, lambda w: float(np.max(w)))
    middle = s.windows(s.recording.losses, lambda w: float(np.median(w)))
    return Column.exact(quotient(highest, np.where(middle > 0, middle, np.nan)))


def non_finite_loss(s: Source) -> Column:
    losses = s.recording.losses
    bad = losses.step[~np.isfinite(losses.value)]
    result = np.full((1, len(s.steps)), 0.0 if len(losses.step) else np.nan)
    if len(bad):
        result[0, s.steps >= bad[0]] = 1.0
    return Column.exact(result)


def trained_update_ratios(s: Source) -> Array:
    """Update ratios of the components that are trained; the others only decay, or stand."""
    trained = (s.component("gradient_norm").value > 0) & ~(s.component("optimized").value == 0)
    return moving_median(np.where(trained, s.component("update_ratio").value, np.nan))


def median_update_ratio(s: Source) -> Column:
    return Column.exact(median_over_components(trained_update_ratios(s)))


def update_ratio(s: Source) -> Column:
    return Column.exact(moving_median(s.component("update_ratio").value))


def update_ratio_to_median(s: Source) -> Column:
    own = trained_update_ratios(s)
    median = median_over_components(np.where(own > 0, own, np.nan))
    return Column.exact(quotient(own, broadcast(median, s)))


def adaptive_step(s: Source) -> Column:
    """Of optimizers that divide by a second moment alone: of others it has a unit."""
    adaptive = ~np.isnan(s.component("moment_ratio").value)
    rate = np.where(adaptive, s.component("learning_rate").value, np.nan)
    return Column.exact(quotient(root_mean_squares(s, "update_norm"), rate))


def median_adaptive_step(s: Source) -> Column:
    return Column.exact(median_over_components(adaptive_step(s).value))


def highest_adaptive_step(s: Source) -> Column:
    return Column.exact(np.fmax.accumulate(median_adaptive_step(s).value, axis=1))


def gradient_to_median(s: Source) -> Column:
    size = root_mean_squares(s, "gradient_norm")
    median = median_over_components(np.where(size > 0, size, np.nan))
    return Column.exact(quotient(moving_median(size), broadcast(median, s)))


def root_mean_squares(s: Source, norm: str) -> Array:
    """Root mean square of the entries behind a norm."""
    return s.component(norm).value / np.sqrt(s.elements)


def scheduled_rate(s: Source) -> Array:
    """The script's own learning rate of each component, without what a repair makes of it.

    Of a run without components, as an imported log is, that of the whole model.
    """
    if not s.names:
        return s.run("learning_rate").value
    factor = s.component("rate_factor").value
    return s.component("learning_rate").value / np.where(np.isnan(factor), 1.0, factor)


def learning_rate_to_peak(s: Source) -> Column:
    rate = scheduled_rate(s)
    return Column.exact(median_over_components(quotient(rate, np.fmax.accumulate(rate, axis=1))))


def resting_share(s: Source) -> Column:
    """A measurement stands for the steps since the last one."""
    rate = learning_rate_to_peak(s).value[0]
    gaps = np.diff(s.steps, prepend=-1).astype(float) * ~np.isnan(rate)
    resting = np.cumsum(gaps * (rate < RESTING))
    return Column.exact(quotient(resting, np.cumsum(gaps))[np.newaxis])


def since_peak_share(s: Source) -> Column:
    rate = median_over_components(scheduled_rate(s))[0]
    highest = np.fmax.accumulate(rate)
    risen = np.diff(highest, prepend=np.nan) > 0.0  # NaN before the first known rate
    first = ~np.isnan(highest) & (np.cumsum(~np.isnan(highest)) == 1)
    begun = np.fmax.accumulate(np.where(risen | first, s.steps, np.nan))
    return Column.exact(((s.steps - begun) / (s.steps + 1.0))[np.newaxis])


def learning_rate_to_quartile(s: Source) -> Column:
    """Not to the median: where half of a model has a rate of its own, that is the median."""
    rate = s.component("learning_rate").value
    return Column.exact(quotient(rate, broadcast(median_over_components(rate, 0.25), s)))


def gradient_to_start(s: Source) -> Column:
    norm = s.component("gradient_norm").value
    return Column.exact(
        quotient(moving_median(norm), np.broadcast_to(early_median(norm), norm.shape))
    )


def median_weight_growth(s: Source) -> Column:
    trained = s.component("gradient_norm").value > 0
    return Column.exact(median_over_components(np.where(trained, weight_growth(s).value, np.nan)))


def weight_growth(s: Source) -> Column:
    norm = s.component("weight_norm").value
    return Column.exact(quotient(norm, np.broadcast_to(first_known(norm), norm.shape)))


def initial_weight_scale_to_median(s: Source) -> Column:
    first = first_known(s.component("weight_scale").value)
    known = first[~np.isnan(first)]
    median = np.median(known) if len(known) > 2 else np.nan
    ratio = quotient(first, np.full_like(first, median))
    return Column.exact(np.broadcast_to(ratio, (len(s.names), len(s.steps))).copy())


def moved(s: Source) -> Column:
    size = s.component("update_norm").value
    known = ~np.isnan(size)
    ever = np.maximum.accumulate(np.where(known, size, 0.0) > 0, axis=1).astype(float)
    return Column.exact(np.where(np.maximum.accumulate(known, axis=1), ever, np.nan))


def ever_reached(s: Source) -> Column:
    norm, reached = s.component("gradient_norm").value, s.component("reached").value
    known = ~np.isnan(reached)
    seen = (norm > 0) | (s.component("non_finite_gradient").value > 0)
    ever = np.maximum.accumulate(seen, axis=1).astype(float)
    return Column.exact(np.where(np.maximum.accumulate(known, axis=1), ever, np.nan))


def in_graph(s: Source) -> Column:
    """1 once any parameter of the component had a gradient, be it zero."""
    reached = s.component("reached").value
    known = ~np.isnan(reached)
    ever = np.maximum.accumulate(np.where(known, reached, 0.0) > 0, axis=1).astype(float)
    return Column.exact(np.where(np.maximum.accumulate(known, axis=1), ever, np.nan))


def layer_in_graph(s: Source) -> Column:
    """The same of any component of the layer."""
    own = in_graph(s).value
    layers = np.array([s.layers[name] for name in s.names])
    best = own.copy()
    for layer in np.unique(layers):
        of_layer = layers == layer
        best[of_layer] = np.fmax.reduce(own[of_layer], axis=0)
    return Column.exact(best)


def had_rate(s: Source) -> Column:
    highest = np.fmax.accumulate(s.component("learning_rate").value, axis=1)
    return Column.exact(np.where(np.isnan(highest), np.nan, (highest > 0).astype(float)))


def averaging_to_run(s: Source) -> Column:
    steps = np.fmax.accumulate(s.run("averaging_steps").value, axis=1)
    return Column.exact(quotient(steps, s.steps[np.newaxis].astype(float) + 1.0))


def curvature_part(s: Source) -> Column:
    size = np.abs(s.component("update_curvature").value)
    total = np.nansum(size, axis=0, keepdims=True)
    return Column.exact(quotient(size, np.broadcast_to(total, size.shape)))


def update_curvature_share(s: Source) -> Column:
    half = 0.5 * s.run("update_curvature").value
    return Column.exact(quotient(half, loss_to_divide_by(s)))


def component_curvature_share(s: Source) -> Column:
    half = 0.5 * np.abs(s.component("update_curvature").value)
    return Column.exact(quotient(half, loss_to_divide_by(s)))


def loss_to_divide_by(s: Source) -> Array:
    """Near the end of training the loss is too small for it: a tenth of the first then."""
    return np.maximum(s.loss, 0.1 * s.initial_loss)


def entropy_of_layer(s: Source) -> Column:
    entropy = s.component("attention_entropy").value
    row = {name: i for i, name in enumerate(s.names)}
    layers = [row.get(s.layers[name], row[name]) for name in s.names]
    return Column.exact(entropy[layers])


def initial(quantity: str) -> Callable[[Source], Column]:
    def function(s: Source) -> Column:
        first = first_known(s.component(quantity).value)
        return Column.exact(np.broadcast_to(first, (len(s.names), len(s.steps))).copy())

    return function


def frozen_prefix(s: Source) -> Column:
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


def trained_share(s: Source) -> Column:
    return Column.exact(mean_over_elements(s, s.component("trainable").value))


def negative_curvature_ratio(s: Source) -> Column:
    low, high = s.component("lambda_min"), s.component("lambda_max")
    scale = np.abs(high.value)  # without any positive curvature there is nothing to compare with
    return Column(
        quotient(-low.value, scale), quotient(-low.upper, scale), quotient(-low.lower, scale)
    )


def coupling_to_curvature(s: Source) -> Column:
    low, high = s.component("lambda_min").value, s.component("lambda_max").value
    largest = np.fmax(np.abs(low), np.abs(high))  # of a block; NaN where neither end is known
    row = {name: i for i, name in enumerate(s.names)}
    unknown = np.full(len(s.steps), np.nan)
    both = [[largest[row[name]] if name in row else unknown for name in pair] for pair in s.pairs]
    mean = np.array([np.sqrt(a * b) for a, b in both]).reshape(len(both), len(s.steps))
    coupling = s.pair("coupling_norm")
    return Column(
        quotient(coupling.value, mean),
        quotient(coupling.lower, mean),
        quotient(coupling.upper, mean),
    )


def trace_z(s: Source) -> Column:
    trace = s.component("trace")
    error = (trace.upper - trace.lower) / 4.0
    return Column.exact(quotient(trace.value, np.where(error > 0, error, np.nan)))


def own(quantity: str) -> Callable[[Source], Column]:
    return lambda s: s.component(quantity)


def own_run(quantity: str) -> Callable[[Source], Column]:
    return lambda s: s.run(quantity)


def last_seen(quantity: str) -> Callable[[Source], Column]:
    return lambda s: Column.exact(filled(s.component(quantity).value))


def last_seen_run(quantity: str) -> Callable[[Source], Column]:
    return lambda s: Column.exact(filled(s.run(quantity).value))


def filled(values: Array) -> Array:
    """Each row with what is not known replaced by the last that was."""
    known = ~np.isnan(values)
    at = np.maximum.accumulate(np.where(known, np.arange(values.shape[1]), -1), axis=1)
    rows = np.arange(len(values))[:, np.newaxis]
    return np.where(at >= 0, values[rows, np.maximum(at, 0)], np.nan)


def rate_growth(s: Source) -> Column:
    """Of the median component: learning rate over its first that is not zero."""
    rate = median_over_components(scheduled_rate(s))
    return Column.exact(
        quotient(rate, np.broadcast_to(first_known(np.where(rate > 0, rate, np.nan)), rate.shape))
    )


def at_the_end(s: Source) -> Column:
    """1 at the last measurement of a run that has ended, unless much of it came after; else 0.

    A run that was stopped before its time has no end that says anything.
    """
    result = np.zeros((1, len(s.steps)))
    if any(fact.name == STOPPED for fact in s.recording.facts):
        return Column.exact(result)
    losses = s.recording.losses.step
    last = int(losses[-1]) if len(losses) else 0
    if len(s.steps) and s.recording.ending is not None and s.steps[-1] >= NEAR_THE_END * last:
        result[0, -1] = 1.0
    return Column.exact(result)


def siblings_of(quantity: str) -> Callable[[Source], Column]:
    return lambda s: Column.exact(siblings(s, s.component(quantity).value))


def to_start(quantity: str) -> Callable[[Source], Column]:
    def function(s: Source) -> Column:
        value = s.component(quantity).value
        return Column.exact(quotient(value, np.broadcast_to(first_known(value), value.shape)))

    return function


def change(quantity: str) -> Callable[[Source], Column]:
    def function(s: Source) -> Column:
        value = s.component(quantity).value
        return Column.exact(value - first_known(value))

    return function


def smoothed(quantity: str) -> Callable[[Source], Column]:
    return lambda s: Column.exact(moving_median(s.component(quantity).value))


def smoothed_run(quantity: str) -> Callable[[Source], Column]:
    return lambda s: Column.exact(moving_median(s.run(quantity).value))


def first_gradient_norm(s: Source) -> Column:
    rows = matrix_rows(s)
    norm = s.component("gradient_norm").value
    return Column.exact(norm[rows[:1]] if rows else np.full((1, len(s.steps)), np.nan))


def first_gradient_ratio(s: Source) -> Column:
    rows = matrix_rows(s)
    norm = s.component("gradient_norm").value
    if len(rows) < 2:
        return Column.exact(np.full((1, len(s.steps)), np.nan))
    return Column.exact(quotient(norm[rows[:1]], norm[rows[-1:]]))


def zero_gradient_share(s: Source) -> Column:
    return Column.exact(mean_over_elements(s, s.component("zero_share").value))


def mean_over_elements(s: Source, share: Array) -> Array:
    """Mean of a share over components by their size, of those it is known of; (1, steps)."""
    weight = s.elements * ~np.isnan(share)
    total = (np.nan_to_num(share) * weight).sum(axis=0, keepdims=True)
    return quotient(total, weight.sum(axis=0, keepdims=True))


def accuracy_best(s: Source) -> Column:
    epochs = s.epoch_accuracies
    return of_the_run(float(epochs.max()) if len(epochs) else float("nan"), s)


def accuracy_best_gain(s: Source) -> Column:
    epochs = s.epoch_accuracies
    return of_the_run(float(np.diff(epochs).max()) if len(epochs) > 1 else float("nan"), s)


def accuracy_swings(s: Source) -> Column:
    """AutoTrainer: the i-th local maximum with the i-th local minimum, apart by 0.03 or more."""
    epochs = s.epoch_accuracies
    if len(epochs) < 3:
        return of_the_run(float("nan"), s)
    middle, before, after = epochs[1:-1], epochs[:-2], epochs[2:]
    highs = middle[(middle > before) & (middle >= after)]
    lows = middle[(middle < before) & (middle <= after)]
    pairs = min(len(highs), len(lows))
    swings = int((highs[:pairs] - lows[:pairs] >= 0.03).sum())
    return of_the_run(swings / len(epochs), s)
