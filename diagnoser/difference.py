"""Where a run that went wrong left one that did not: which component, from which step, in what.

`compare` holds two recordings side by side. Every quantity of every component that both have is a
pair of curves. The question of each is not whether they differ, since runs with other seeds do, but
whether they differ by more than healthy runs of one program do, and keep on doing so.

**Common steps.** A schedule of measurements adapts to time, so two runs are seldom measured at the
same steps, and a process that died was measured at few. The bad run's measurements are held against
the healthy one at the same step, interpolated, where both runs are.

**Scale.** arcsinh(x / u) with u a thousandth of the healthy curve's median magnitude: a logarithm,
so that a tenth and ten times are as far away, that goes on through zero to the other sign (a bias
starts at zero; a dead component's gradient is zero). What unit a quantity has changes nothing.

**Envelope.** With another seed a loss falls somewhat sooner or later; where it falls fast that is a
large distance at one step and a small one in time. So the healthy run is an envelope: all that it
is within `SHIFT` of the step, either way, and at the measurements around it. What counts is the
distance from that.

**Spread.** Left is to divide by what healthy runs differ by anyway,

    sigma^2 = floor^2 + 1 / n + (4 s)^2 + (r / 5)^2,

with n the number of a component's weights (of their norm alone: the logarithms of the norms of two
draws of n normal numbers differ by 1 / sqrt(n), to first order), s the scatter of the healthy curve
around its local trend (from its second differences, robust) and r how far the healthy curve has
moved so far: what has moved far by chance may move far to another place (of the loss s counts half
as much, and r nothing). The scatter of the bad run is left out on purpose: it is what may be wrong
with it, and a run must not excuse itself by being wild. One run cannot tell how far another seed
would lie from it, steadily and without any scatter; the floor is for that. `SPREADS` holds one for
each quantity, from pairs of healthy runs of the training subjects (`benchmarks/difference.py`).

**The loss** is compared by its mean over equal blocks of steps. Its unit is its median, so that
below that distances are as on a straight line: whether a loss ends at a hundredth or at a
thousandth is of no importance, and differs between healthy runs. It is meant to move, so how far
it has moved is no excuse for another one that has not.

**Staying away.** A component has left at the first measurement from which the distance is beyond
the bound in `CONSECUTIVE` measurements in a row: one batch proves nothing. Where fewer are left,
the last ones count if they are as many times further away as they are too few. A number that is not
finite where the healthy run's neighbours are counts at once.

**Many comparisons.** `SPREADS` holds the bound of each quantity: that which one pair of healthy
runs in two hundred passes in any of its components, so that curves that move together count as
often as they do. Where more curves are compared than there, the largest of many chance deviations
is larger: their tails are about exponential, and the bound grows with the logarithm of the number.

**What a program sets** (learning rates, what is trained) has no chance in it: it differs where it
does by a fifth, within the envelope of a schedule whose steps lie otherwise. So do the models: a
component that only one run has, or has in another size, is a difference of its own. Other contrasts
of the set-up (arguments, versions) are told, and decide nothing: another seed is one of them.

NaN is never a number here: what one of the runs does not know is not compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diagnoser.features import PROGRAM_NAMES
from diagnoser.runlog import IMPORTED, Curve, Recording
from diagnoser.vocabulary import MODEL

LOSS: Final = "loss"


@dataclass(frozen=True, slots=True)
class Spread:
    """How far apart healthy runs are in a quantity.

    ``floor`` is in units of the scale, ``bound`` in sigmas; ``unit`` is that of the scale, in
    median magnitudes of the healthy curve, ``scatter`` and ``moved`` are what its scatter and how
    far it has moved count. ``drawn``: it is a norm of weights that are drawn.
    """

    floor: float
    bound: float
    unit: float = 1e-3
    scatter: float = 4.0
    moved: float = 0.2
    drawn: bool = False


# What is compared. One curve in ten of healthy pairs is as far apart as the floor, about; one pair
# of healthy runs in two hundred passes the bound in any component (`benchmarks/difference.py`).
SPREADS: Final[Mapping[str, Spread]] = {
    "gradient_norm": Spread(0.6, 2.23),
    "update_ratio": Spread(0.2, 2.63),
    "weight_norm": Spread(0.06, 3.24, drawn=True),
    "attention_entropy": Spread(0.35, 2.19),
    "attention_logit": Spread(0.6, 1.83),
    "input_scale": Spread(0.15, 3.95),
    LOSS: Spread(0.225, 2.77, unit=1.0, scatter=2.0, moved=0.0),
}
# Whole numbers that say what the program does; they differ or they do not.
FLAGS: Final = (
    "trainable",
    "optimized",
    "reached",
    "carried_gradients",
    "probabilities_into_loss",
    "classes",
    "optimizers",
)
EXACT: Final = frozenset({"learning_rate", *FLAGS})  # set by a program, not by chance
EXACTLY: Final = Spread(0.2, 1.0, scatter=0.0, moved=0.0)  # a learning rate that is a fifth higher
GROWTH: Final = 0.2  # of a bound, for each e-fold more than
CURVES: Final = 250  # curves, the most that a run of the training subjects has
SHIFT: Final = 0.2  # of a step
CONSECUTIVE: Final = 3
BLOCKS: Final = 16  # of the loss curve, each as one measurement
BLOCK: Final = 8  # the fewest steps of one
NAMED: Final = 3  # components that could not be compared, by name

Floats: TypeAlias = NDArray[np.float64]
Key: TypeAlias = tuple[str, str]  # component, quantity
Setting: TypeAlias = str | float | int | None
Verdict: TypeAlias = Literal["same", "different", "inconclusive"]


@dataclass(frozen=True, slots=True)
class Departure:
    """A quantity that left what it was in the healthy run.

    ``good`` and ``bad`` are its values at ``step``, the first from which it stayed away, in its own
    unit; ``bounds`` says how many times the bound it was away at least. ``from_the_start``: it was
    so at the first step that the two can be compared at.
    """

    quantity: str
    step: int
    from_the_start: bool
    good: float
    bad: float
    bounds: float


@dataclass(frozen=True, slots=True)
class Departed:
    """A component, or the whole model, that left the healthy run; what left first comes first."""

    component: str
    departures: tuple[Departure, ...]

    @property
    def step(self) -> int:
        """The step from which it was away."""
        return self.departures[0].step

    @property
    def from_the_start(self) -> bool:
        """Whether it was away at the first step that can be compared."""
        return self.departures[0].from_the_start


@dataclass(frozen=True, slots=True)
class Contrast:
    """Something of the set-up that differs; None: a run does not have it."""

    what: str
    component: str
    good: Setting
    bad: Setting


@dataclass(frozen=True, slots=True)
class Difference:
    """How a run differs from a healthy one.

    ``good`` and ``bad`` are the names of the runs. ``departed`` is in the order in which components
    left, at one step the furthest first. ``steps`` are the first and last step at which something
    was compared, None where nothing was; ``compared`` counts the curves.
    """

    good: str
    bad: str
    verdict: Verdict
    reason: str
    steps: tuple[int, int] | None
    compared: int
    departed: tuple[Departed, ...]
    settings: tuple[Contrast, ...]
    not_compared: tuple[str, ...]

    @property
    def first(self) -> Departed | None:
        """The component that left first; the whole model only where no component did."""
        return _first(self.departed)


@dataclass(frozen=True, slots=True, eq=False)
class Deviation:
    """One quantity of one component in both runs, at the bad run's steps (S,) that both have.

    ``good`` and ``bad`` are values in the quantity's own unit; ``times`` says how many times its
    bound the bad run is outside the healthy envelope: infinite where it is not finite and should
    be. The bound is that of `CURVES` curves.
    """

    component: str
    quantity: str
    step: Floats
    good: Floats
    bad: Floats
    times: Floats

    @property
    def lasting(self) -> Floats:
        """How many times its bound it is away at least in the measurements from each on, (S,)."""
        times = self.times
        padded = np.append(times, [np.inf] * (CONSECUTIVE - 1))
        least = np.lib.stride_tricks.sliding_window_view(padded, CONSECUTIVE).min(axis=1)
        left = np.minimum(np.arange(len(times), 0, -1), CONSECUTIVE)
        lasting: Floats = np.where(np.isinf(times), np.inf, least * left / CONSECUTIVE)
        return lasting


def compare(good: Recording, bad: Recording) -> Difference:
    """Says where ``bad`` left ``good``, and what differs in how they were set up.

    Args:
        good: The recording of a run that went well.
        bad: One of the same program, or nearly, that did not.
    """
    found = deviations(good, bad)
    shared = {c.name for c in good.components} & {c.name for c in bad.components}
    # The losses of two models that share nothing are not two curves of one quantity; of two logs
    # of curves nobody knows more than that they are to be compared.
    logs = good.imported and bad.imported
    departed = _departed(found, _broken(good, bad)) if shared or logs else ()
    structure = list(_structure(good, bad))
    settings = (*structure, *_program(good, bad), *_rates(departed))
    lasting = any((logs or d.component != MODEL) and len(d.step) >= CONSECUTIVE for d in found)
    steps = None
    if found:
        steps = int(min(d.step[0] for d in found)), int(max(d.step[-1] for d in found))
    verdict, reason = _judged(departed, structure, bool(shared) or logs, lasting)
    if verdict != "inconclusive" and steps is not None:
        reason += f"; {len(found)} curves were compared over steps {steps[0]} to {steps[1]}"
    return Difference(
        good.run,
        bad.run,
        verdict,
        reason,
        steps,
        len(found),
        departed,
        settings,
        tuple(_not_compared(good, bad, shared, found)),
    )


def deviations(good: Recording, bad: Recording) -> list[Deviation]:
    """Returns how far every quantity that both runs have is from the healthy one."""
    mine, others = (
        _curves(run, lambda name: name in SPREADS or name in EXACT) for run in (good, bad)
    )
    pairs = [(key, mine[key], others[key]) for key in mine if key in others]
    loss = _loss_blocks(good, bad)
    if loss is not None:
        pairs.append(((MODEL, LOSS), *loss))
    elements = {component.name: component.elements for component in good.components}
    # What overflows is infinitely far, and a difference of infinities is not known.
    with np.errstate(all="ignore"):
        found = [
            _deviation(key, healthy, other, elements.get(key[0], 0))
            for key, healthy, other in pairs
        ]
    return [deviation for deviation in found if deviation is not None]


def _curves(recording: Recording, wanted: Callable[[str], bool]) -> dict[Key, Curve]:
    """Returns the curves of some quantities: of the listed components, and of the whole model."""
    rows = recording.measurements
    listed = {component.name for component in recording.components} | {MODEL}
    quantities = [i for i, name in enumerate(rows.quantities) if wanted(name)]
    components = [i for i, name in enumerate(rows.components) if name in listed]
    chosen = np.flatnonzero(
        np.isin(rows.quantity, quantities) & np.isin(rows.component, components) & (rows.other < 0)
    )
    order = chosen[np.lexsort((rows.step[chosen], rows.quantity[chosen], rows.component[chosen]))]
    step, value = rows.step[order], rows.value[order]
    code = rows.component[order].astype(np.int64) * len(rows.quantities) + rows.quantity[order]
    # Of two measurements at one step the later counts.
    last = np.append((np.diff(code) != 0) | (np.diff(step) != 0), True)[: len(order)]
    step, value, code = step[last], value[last], code[last]
    starts = np.flatnonzero(np.diff(code, prepend=-1))
    ends = np.append(starts[1:], len(code))[: len(starts)]
    found = {}
    for start, end in zip(starts, ends, strict=True):
        component, quantity = divmod(int(code[start]), len(rows.quantities))
        key = rows.components[component], rows.quantities[quantity]
        found[key] = Curve(step[start:end], value[start:end])
    return dict(sorted(found.items()))


def _loss_blocks(good: Recording, bad: Recording) -> tuple[Curve, Curve] | None:
    """Returns both losses as means of equal blocks of the steps that both have; None: too few.

    Adversaries have no common loss: where several optimizers step there is none.
    """
    curves = (good.losses, bad.losses)
    if any(
        len(curve.step) == 0 or _rivals(run) for curve, run in zip(curves, (good, bad), strict=True)
    ):
        return None
    first = max(int(curve.step[0]) for curve in curves)
    last = min(int(curve.step[-1]) for curve in curves)
    blocks = min(BLOCKS, (last - first + 1) // BLOCK)
    if blocks < CONSECUTIVE:
        return None
    edges = np.linspace(first, last + 1, blocks + 1)
    middle = ((edges[:-1] + edges[1:]) / 2.0).astype(np.int64)
    means = [_means(curve, edges) for curve in curves]
    known = np.isfinite(means[0]) & np.isfinite(means[1])  # see `_broken` for what is not
    if not known.any():
        return None
    return Curve(middle[known], means[0][known]), Curve(middle[known], means[1][known])


def _broken(good: Recording, bad: Recording) -> Departure | None:
    """Returns the first loss that is not finite where those of the healthy run still are."""
    first = np.flatnonzero(~np.isfinite(bad.losses.value))
    if not len(first):
        return None
    step = int(bad.losses.step[first[0]])
    before = good.losses.value[good.losses.step <= step]
    if not len(before) or not np.isfinite(before).all():
        return None
    value = float(bad.losses.value[first[0]])
    return Departure(LOSS, step, bool(first[0] == 0), float(before[-1]), value, math.inf)


def _means(curve: Curve, edges: Floats) -> Floats:
    """Returns the mean of each block; NaN where a block has no steps, or one that is not finite."""
    at = np.searchsorted(curve.step, edges)
    with np.errstate(all="ignore"):
        parts = zip(at[:-1], at[1:], strict=True)
        return np.array([curve.value[a:b].mean() if b > a else math.nan for a, b in parts])


def _rivals(recording: Recording) -> bool:
    many, shared = (recording.series(name, MODEL) for name in ("optimizers", "shared_loss"))
    return not set(many.step[many.value > 1].tolist()) <= set(shared.step.tolist())


def _deviation(key: Key, good: Curve, bad: Curve, elements: int) -> Deviation | None:
    """Returns how far one curve is from another, None where they have no steps in common.

    ``elements`` is how many weights the component has; 0: it is none.
    """
    component, quantity = key
    inside = (bad.step >= good.step[0]) & (bad.step <= good.step[-1])
    step, value = bad.step[inside].astype(np.float64), bad.value[inside]
    # What the healthy run has on both sides of a step must be finite: else it is not known there.
    finite = np.isfinite(good.value)
    before = np.searchsorted(good.step, step, side="right") - 1
    after = np.searchsorted(good.step, step, side="left")
    known = finite[before] & finite[after]
    step, value = step[known], value[known]
    if not len(step):
        return None
    at, healthy = good.step[finite].astype(np.float64), good.value[finite]
    usual = EXACTLY if quantity in EXACT else SPREADS[quantity]
    unit = usual.unit * _magnitude(healthy, value)
    curve, other = np.arcsinh(healthy / unit), np.arcsinh(value / unit)
    low, high = _envelope(at, curve, step)
    distance = np.maximum(np.maximum(other - high, low - other), 0.0)
    distance[~np.isfinite(value)] = np.inf
    drawn = 1.0 / math.sqrt(elements) if usual.drawn and elements else 0.0
    own = usual.scatter * _scatter(curve), usual.moved * _moved(at, curve, step)
    sigma = np.sqrt(sum(np.square(part) for part in (usual.floor, drawn, *own)))
    times = distance / (usual.bound * sigma)
    return Deviation(component, quantity, step, np.interp(step, at, healthy), value, times)


def _magnitude(healthy: Floats, value: Floats) -> float:
    """Returns the healthy curve's median magnitude; the other one's where that is 0, or else 1."""
    for curve in (healthy, value):
        known = np.abs(curve[np.isfinite(curve)])
        middle = float(np.median(known)) if len(known) else 0.0
        if middle == 0.0 and len(known):
            middle = float(known.max())
        if middle > 0.0:
            return middle
    return 1.0


def _envelope(at: Floats, curve: Floats, step: Floats) -> tuple[Floats, Floats]:
    """Returns the least and the most that a curve is around each step.

    That is within `SHIFT` of it, either way, and at the measurements before and after it: what a
    curve does between two of them is not known.
    """
    last = len(at) - 1
    before = np.clip(np.searchsorted(at, step, side="right") - 1, 0, last)
    after = np.clip(np.searchsorted(at, step, side="left"), 0, last)
    ends = [np.interp(step * share, at, curve) for share in (1.0 - SHIFT, 1.0 + SHIFT)]
    ends += [curve[before], curve[after]]
    near = (at >= (1.0 - SHIFT) * step[:, None]) & (at <= (1.0 + SHIFT) * step[:, None])
    low = np.minimum(np.min(ends, axis=0), np.where(near, curve, np.inf).min(axis=1))
    high = np.maximum(np.max(ends, axis=0), np.where(near, curve, -np.inf).max(axis=1))
    return low, high


def _moved(at: Floats, curve: Floats, step: Floats) -> Floats:
    """Returns the range of a curve up to each step."""
    last = np.maximum(np.searchsorted(at, step, side="right") - 1, 0)
    moved: Floats = (np.maximum.accumulate(curve) - np.minimum.accumulate(curve))[last]
    return moved


def _scatter(curve: Floats) -> float:
    """Returns the standard deviation of a curve around its local trend; 0 where it is too short.

    Second differences of independent numbers have six times their variance, of a line none.
    """
    if len(curve) < 4:
        return 0.0
    return float(1.4826 * np.median(np.abs(np.diff(curve, 2))) / math.sqrt(6.0))


def _departed(found: Sequence[Deviation], broken: Departure | None) -> tuple[Departed, ...]:
    """Returns what left, in order: by step, then by how far; ``broken`` is of the loss."""
    by_component: dict[str, list[Departure]] = {MODEL: [broken]} if broken is not None else {}
    grown = growth(len(found))
    for deviation in found:
        departure = _departure(deviation, 1.0 if deviation.quantity in EXACT else grown)
        if departure is not None:
            by_component.setdefault(deviation.component, []).append(departure)
    departed = [
        Departed(name, tuple(sorted(own, key=_order))) for name, own in by_component.items()
    ]
    return tuple(sorted(departed, key=lambda d: (*_order(d.departures[0]), d.component)))


def growth(curves: int) -> float:
    """Returns how many times larger a bound is where so many curves are compared."""
    return 1.0 + GROWTH * max(math.log(max(curves, 1) / CURVES), 0.0)


def _order(departure: Departure) -> tuple[int, float, str]:
    return departure.step, -departure.bounds, departure.quantity


def _departure(deviation: Deviation, limit: float) -> Departure | None:
    """Returns from when a quantity stays beyond its bound, None if it never does."""
    lasting = deviation.lasting / limit
    beyond = np.flatnonzero(lasting > 1.0)
    if not len(beyond):
        return None
    i = int(beyond[0])
    return Departure(
        deviation.quantity,
        int(deviation.step[i]),
        i == 0,
        float(deviation.good[i]),
        float(deviation.bad[i]),
        float(lasting[i]),
    )


def _first(departed: Sequence[Departed]) -> Departed | None:
    parts = [one for one in departed if one.component != MODEL]
    return next(iter(parts or departed), None)


def _judged(
    departed: Sequence[Departed], structure: Sequence[Contrast], shared: bool, lasting: bool
) -> tuple[Verdict, str]:
    """Returns the verdict, and in one sentence why."""
    if not shared:
        return "inconclusive", "no component of one run has the name of one of the other"
    first = _first(departed)
    if first is not None:
        left = first.departures[0]
        name = "the model" if first.component == MODEL else first.component
        when = "from the first step" if left.from_the_start else f"from step {left.step}"
        return "different", f"{name} left first, {when}, in {left.quantity.replace('_', ' ')}"
    if structure:
        other = structure[0]
        return "different", f"the models are not the same: {other.what} of {other.component}"
    if not lasting:
        return "inconclusive", f"nothing was measured {CONSECUTIVE} times in steps that both have"
    return "same", "nothing left the healthy run"


def _structure(good: Recording, bad: Recording) -> Iterator[Contrast]:
    """Yields components that only one run has, and those of another kind or size."""
    mine = {component.name: component for component in good.components}
    others = {component.name: component for component in bad.components}
    for name in dict.fromkeys((*mine, *others)):
        a, b = mine.get(name), others.get(name)
        if a is None or b is None:
            kinds = [None if one is None else one.kind for one in (a, b)]
            yield Contrast("component", name, *kinds)
            continue
        if a.kind != b.kind:
            yield Contrast("kind", name, a.kind, b.kind)
        if a.elements != b.elements:
            yield Contrast("elements", name, a.elements, b.elements)


def _program(good: Recording, bad: Recording) -> Iterator[Contrast]:
    """Yields what the two programs were started with, and what they were seen to do."""
    for key in dict.fromkeys((*good.header, *bad.header)):
        a, b = good.header.get(key), bad.header.get(key)
        if key == IMPORTED:  # what columns of a log are called is no matter of the run
            continue
        if key == "arguments":
            yield from _options(a, b)
        elif a != b:
            yield Contrast(key, MODEL, _text(a), _text(b))
    facts = [_optimizers(recording) for recording in (good, bad)]
    for what in dict.fromkeys((*facts[0], *facts[1])):
        if facts[0].get(what) != facts[1].get(what):
            yield Contrast(what, MODEL, facts[0].get(what), facts[1].get(what))
    seen = [_checked(recording) for recording in (good, bad)]
    for component, quantity in sorted(seen[0].keys() & seen[1].keys()):
        numbers = [known[component, quantity] for known in seen]
        if numbers[0] != numbers[1]:
            yield Contrast(quantity, component, *numbers)
    lengths = [recording.losses_seen for recording in (good, bad)]
    if lengths[0] != lengths[1]:
        yield Contrast("steps", MODEL, *lengths)


def _options(good: Any, bad: Any) -> Iterator[Contrast]:
    """Yields the arguments that differ: options by name, the others in one."""
    mine, others = _parsed(good), _parsed(bad)
    for name in dict.fromkeys((*mine, *others)):
        if mine.get(name) != others.get(name):
            yield Contrast(f"argument {name}".rstrip(), MODEL, mine.get(name), others.get(name))


def _parsed(arguments: Any) -> dict[str, str]:
    """Returns the values of a command line by option; of what belongs to none by ""."""
    words = [str(word) for word in arguments] if isinstance(arguments, list) else []
    found: dict[str, list[str]] = {}
    option = ""
    for word in words:
        if word.startswith("-") and not word[1:2].isdigit() and word[1:2] != ".":
            option, given, value = word.partition("=")
            found.setdefault(option, []).extend([value] if given else [])
            option = "" if given else option
        else:
            found.setdefault(option, []).append(word)
    return {name: " ".join(values) for name, values in found.items()}


def _optimizers(recording: Recording) -> dict[str, Setting]:
    """Returns what is known of the optimizers: their classes, and their groups of parameters."""
    known = [fact.data for fact in recording.facts if fact.name == "optimizer"]
    found = {}
    for what, key in (("optimizer", "class"), ("parameter groups", "groups")):
        values = list(dict.fromkeys(str(data[key]) for data in known if key in data))
        if values:
            found[what] = ", ".join(values)
    return dict(found)


def _checked(recording: Recording) -> dict[Key, float]:
    """Returns what program checks last said, where that is a whole number: a yes, a no, a count.

    Other numbers of theirs vary with the batch.
    """
    curves = _curves(recording, lambda name: name in PROGRAM_NAMES or name in FLAGS)
    last = {key: float(curve.value[-1]) for key, curve in curves.items()}
    return {key: value for key, value in last.items() if value.is_integer()}


def _rates(departed: Sequence[Departed]) -> Iterator[Contrast]:
    """Yields the learning rates that were others from the first step."""
    for one in departed:
        for departure in one.departures:
            if departure.quantity == "learning_rate" and departure.from_the_start:
                yield Contrast("learning_rate", one.component, departure.good, departure.bad)


def _text(value: Any) -> Setting:
    if value is None or isinstance(value, (str, int, float)):
        return value
    return json.dumps(value, sort_keys=True, default=str)


def _not_compared(
    good: Recording, bad: Recording, shared: set[str], found: Sequence[Deviation]
) -> Iterator[str]:
    """Yields what could not be compared, each with the reason."""
    measured = _measured(good) | _measured(bad)
    lost = sorted((shared & measured) - {deviation.component for deviation in found})
    if lost:
        more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
        yield f"{', '.join(lost[:NAMED])}{more}: measured at no steps that both runs have"
    if (MODEL, LOSS) not in {(d.component, d.quantity) for d in found}:
        yield f"the training loss: fewer than {CONSECUTIVE * BLOCK} steps that both runs have"
    for which, recording in (("healthy", good), ("other", bad)):
        if recording.damaged_lines:
            yield f"{recording.damaged_lines} damaged lines in the log of the {which} run"


def _measured(recording: Recording) -> set[str]:
    rows = recording.measurements
    return {rows.components[i] for i in np.unique(rows.component)}
