"""One recording of the logs that the ranks of a distributed training left beside each other.

Each rank logs what it saw (`diagnoser.ranks` says why), with a fact that tells which one it is.
Here they become one, row by row: what every rank sees alike, such as a gradient that was reduced
over all, stays as it is, and what each sees of its own samples becomes the mean, whose spread over
ranks is the error that other samples would have made. Losses are averaged; NaN in one is NaN.

Of sharded parameters a rank sees its own elements. It logs what they show under names of their own
(``shard:gradient_norm``), which no rule knows, with their number as ``samples``; put together they
give the quantity itself, where each rank says, by a row of the model, that it logged all it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.runlog.recording import (
    COLUMNS,
    TABLE_OF,
    Curve,
    Ending,
    Event,
    Fact,
    Measurements,
    Recording,
)
from diagnoser.vocabulary import MODEL

RANK: Final = "rank"  # a fact: which rank a log is of; its data: of how many ``ranks``
MOST_RANKS: Final = 2**20  # a log that speaks of more is damaged
SHARD: Final = "shard:"  # before the name of a quantity of the elements on one rank

# What the worst of the ranks decides.
_WORST: Final = frozenset(
    {"attention_logit", "empty_rows", "input_largest", "input_non_finite", "label_classes",
     "non_finite_gradient", "non_finite_loss", "non_finite_weight", "weighed_input_largest"}
)  # fmt: skip
# How shards become one: roots of sums of squares, sums, and means weighted by elements.
_SQUARES: Final = frozenset({"gradient_norm", "next_gradient_norm", "weight_norm", "update_norm"})
_SUMS: Final = frozenset({"gradient_product", "non_finite_gradient", "non_finite_weight"})
_MEANS: Final = frozenset({"zero_share", "lost_updates"})
_MEAN_SQUARES: Final = frozenset({"moment_ratio", "weight_scale"})
_ONLY_OF_SHARDS: Final = frozenset({"gradient_product", "next_gradient_norm"})

_OF_ITS_OWN: Final = frozenset({"over_budget", "curvature_method", "trigger", "nothing_seen"})

Columns = dict[str, NDArray[Any]]


def merged(logs: Sequence[Recording]) -> Recording:
    """Returns what the logs of one run say together.

    Where they are of no process group, they are trainings apart: the first that trained counts.

    Args:
        logs: The run's own log first, whose name and header count; then those of single ranks.
    """
    own = logs[0]
    if len(logs) == 1 and _size(own) == 1:
        return own
    ranks = sorted((log for log in logs if _rank(log) is not None), key=lambda log: _rank(log) or 0)
    if not ranks:
        trained = next((log for log in logs if len(log.losses.step)), own)
        ranks = [trained]
    first = ranks[0]
    known = {(fact.name, fact.component) for fact in first.facts}
    others = [f for log in ranks[1:] for f in log.facts if (f.name, f.component) not in known]
    losses = _mean_curve([log.losses for log in ranks], unknown=False)
    gone = max(log.losses_seen for log in ranks) - len(losses.step)
    until = max(log.thinned.until for log in ranks)
    return replace(
        first,
        run=own.run,
        header=own.header,
        facts=(*first.facts, *{(f.name, f.component): f for f in reversed(others)}.values()),
        losses=losses,
        accuracies=_mean_curve([log.accuracies for log in ranks], unknown=True),
        measurements=_measurements(ranks, _size(first)),
        events=(*_events(own, ranks), *_absent(own, ranks)),
        ending=_ending(own, ranks),
        thinned=replace(first.thinned, losses=max(gone, 0), until=until),
        damaged_lines=sum(log.damaged_lines for log in {id(x): x for x in (own, *ranks)}.values()),
    )


def _fact(log: Recording) -> Fact | None:
    return next((fact for fact in log.facts if fact.name == RANK), None)


def _rank(log: Recording) -> int | None:
    fact = _fact(log)
    return None if fact is None or not math.isfinite(fact.value) else int(fact.value)


def _size(log: Recording) -> int:
    """Of how many ranks a log is one; 1: it does not say."""
    fact = _fact(log)
    size = 1 if fact is None else fact.data.get("ranks", 1)
    return size if isinstance(size, int) and 0 < size <= MOST_RANKS else 1


def _mean_curve(curves: Sequence[Curve], *, unknown: bool) -> Curve:
    """Returns the mean at each step that any curve has; NaN is left out only if ``unknown``."""
    if len(curves) == 1:
        return curves[0]
    step = np.concatenate([curve.step for curve in curves])
    value = np.concatenate([curve.value for curve in curves])
    kept = ~np.isnan(value) if unknown else np.ones(len(value), dtype=bool)
    steps, position = np.unique(step, return_inverse=True)
    count = np.bincount(position[kept], minlength=len(steps))
    total = np.bincount(position[kept], weights=value[kept], minlength=len(steps))
    with np.errstate(invalid="ignore", divide="ignore"):
        return Curve(steps, np.where(count > 0, total / count, np.nan))


def _events(own: Recording, ranks: Sequence[Recording]) -> list[Event]:
    """Returns those of the first log, and what happened on other ranks alone."""
    first = ranks[0]
    told = {event.message for event in first.events}
    found = list(first.events)
    if own not in ranks:
        found += [e for e in own.events if e.kind != "nothing_seen" and e.message not in told]
    for log in ranks[1:]:
        for event in log.events:
            if event.message not in told and event.kind not in _OF_ITS_OWN:
                told.add(event.message)
                found.append(replace(event, message=f"rank {_rank(log)}: {event.message}"))
    return found


def _absent(own: Recording, ranks: Sequence[Recording]) -> Iterator[Event]:
    """Yields what is missing: ranks without a log here, and logs that end before their time."""
    size, here = _size(ranks[0]), {_rank(log) for log in ranks}
    last = max((int(log.losses.step[-1]) for log in ranks if len(log.losses.step)), default=0)
    missing = [str(rank) for rank in range(size) if rank not in here]
    if missing and size > 1:
        which = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(missing[:8])}"
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        yield Event(
            last,
            "ranks",
            f"{which}{more} of {size} left no log here (on another host, without a directory in "
            "common?): all that is said is of the others",
            {"missing": len(missing)},
        )
    if own.ending is None and all(log.ending is None for log in ranks):
        return  # it goes on
    for log in ranks:
        if log.ending is None and len(log.losses.step):
            at = int(log.losses.step[-1])
            yield Event(at, "ranks", f"rank {_rank(log)} came to no end; its log ends at step {at}")


def _ending(own: Recording, ranks: Sequence[Recording]) -> Ending | None:
    """Returns the first failure of any rank, if there is one, else how the first one ended."""
    endings = [log.ending for log in (own, *ranks) if log.ending is not None]
    if not endings:
        return None
    failed = next((ending for ending in endings if ending.exit_code), endings[0])
    trained = (log.ending for log in ranks if log.ending is not None)
    return replace(
        failed,
        cost=next((ending.cost for ending in trained), failed.cost),
        lost_records=sum(ending.lost_records for ending in {id(e): e for e in endings}.values()),
    )


# -- rows -----------------------------------------------------------------------------------------


def _measurements(logs: Sequence[Recording], size: int) -> Measurements:
    columns, tables, rank = _together([log.measurements for log in logs])
    shard = np.array([name.startswith(SHARD) for name in tables["quantities"]], dtype=bool)
    of_shards = shard[columns["quantity"]] if len(shard) else np.zeros(0, dtype=bool)
    whole = _mean(_chosen(columns, ~of_shards), rank[~of_shards], tables["quantities"])
    if of_shards.any():
        added = _assembled(_chosen(columns, of_shards), rank[of_shards], tables, size)
        whole = {name: np.concatenate([whole[name], added[name]]) for name in COLUMNS}
    whole = _with_quotients(whole, tables)
    order = np.argsort(whole["step"], kind="stable")
    found: dict[str, Any] = {name: its[order] for name, its in whole.items()}
    found |= {name: tuple(table) for name, table in tables.items()}
    return Measurements(**found)


def _together(
    parts: Sequence[Measurements],
) -> tuple[Columns, dict[str, list[str]], NDArray[np.int64]]:
    """Returns the rows of all logs, with one table of names, and which log each is of."""
    tables: dict[str, dict[str, int]] = {table: {} for table in set(TABLE_OF.values())}
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in COLUMNS}
    for part in parts:
        codes = {
            table: np.array([known.setdefault(n, len(known)) for n in getattr(part, table)], int)
            for table, known in tables.items()
        }
        for name in COLUMNS:
            its = getattr(part, name)
            if name in TABLE_OF:
                table = codes[TABLE_OF[name]]
                its = np.where(its < 0, -1, table[its] if len(table) else its).astype(np.int32)
            columns[name].append(its)
    rank = np.repeat(np.arange(len(parts)), [len(part.step) for part in parts])
    return (
        {name: np.concatenate(its) for name, its in columns.items()},
        {name: list(known) for name, known in tables.items()},
        rank,
    )


def _chosen(columns: Columns, rows: NDArray[Any]) -> Columns:
    return {name: its[rows] for name, its in columns.items()}


def _groups(columns: Columns, rank: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Returns an order in which rows of one number on several ranks are neighbours, and its starts.

    A number that a rank logged twice at a step meets the second of the others.
    """
    names = ("other", "component", "quantity", "step")
    keys = [columns[name] for name in names]
    by_rank = np.lexsort((rank, *keys))
    repeated = np.zeros(len(rank), dtype=np.int64)
    if len(rank):
        starts = _starts([key[by_rank] for key in (rank, *keys)])
        length = np.diff(np.append(starts, len(rank)))
        repeated[by_rank] = np.arange(len(rank)) - np.repeat(starts, length)
    order = np.lexsort((rank, repeated, *keys))
    return order, _starts([key[order] for key in (repeated, *keys)])


def _starts(keys: Sequence[NDArray[Any]]) -> NDArray[np.intp]:
    """Returns where any of several sorted columns changes, the beginning included."""
    changes = np.zeros(len(keys[0]), dtype=bool)
    changes[:1] = True
    for key in keys:
        changes[1:] |= key[1:] != key[:-1]
    return np.flatnonzero(changes)


def _mean(columns: Columns, rank: NDArray[np.int64], quantities: Sequence[str]) -> Columns:
    """Returns one row for the same number of several ranks: their mean, or the worst of them."""
    if not len(rank):
        return columns
    order, starts = _groups(columns, rank)
    rows = _chosen(columns, order)
    count = np.diff(np.append(starts, len(order)))
    found = _chosen(rows, starts)
    value = rows["value"]
    first = np.repeat(found["value"], count)
    with np.errstate(invalid="ignore", over="ignore"):
        # From the first on: what is equal on all ranks stays what it is, to the last bit.
        away = np.where(value == first, 0.0, value - first)
        shift = np.add.reduceat(away, starts) / count
        squares = np.add.reduceat(away * away, starts) - count * shift * shift
        spread = np.sqrt(np.maximum(squares, 0.0) / np.maximum(count - 1, 1) / count)
        errors = np.sqrt(np.add.reduceat(rows["std_error"] ** 2, starts)) / count
    worst = np.array([name in _WORST for name in quantities], dtype=bool)[found["quantity"]]
    differs = (np.maximum.reduceat(np.abs(away), starts) > 0) & ~worst
    found["value"] = np.where(worst, np.maximum.reduceat(value, starts), found["value"] + shift)
    found["std_error"] = np.where(count > 1, errors, found["std_error"])
    found["batch_std_error"] = np.where(differs, spread, found["batch_std_error"])
    found["samples"] = np.where(differs, count, found["samples"])
    return _chosen(found, np.argsort(np.minimum.reduceat(order, starts), kind="stable"))


def _assembled(
    columns: Columns, rank: NDArray[np.int64], tables: dict[str, list[str]], size: int
) -> Columns:
    """Returns what the shards of all ranks give together, where all of them logged theirs."""
    place = columns["step"] * len(tables["quantities"]) + columns["quantity"]
    told = columns["component"] == tables["components"].index(MODEL)
    marks = np.unique(np.stack([place[told], rank[told]]), axis=1)
    places, present = np.unique(marks[0], return_counts=True)
    there = np.isin(place, places[present == size]) & ~told
    columns, rank = _chosen(columns, there), rank[there]
    if not len(rank):
        return columns
    order, starts = _groups(columns, rank)
    rows = _chosen(columns, order)
    found = _chosen(rows, starts)
    value, weight = rows["value"], rows["samples"].astype(float)
    names = [name.removeprefix(SHARD) for name in tables["quantities"]]

    def of(kind: frozenset[str]) -> NDArray[np.bool_]:
        return np.array([name in kind for name in names], dtype=bool)[found["quantity"]]

    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        total = np.add.reduceat(weight, starts)
        found["value"] = np.select(
            [of(_SQUARES), of(_SUMS), of(_MEANS), of(_MEAN_SQUARES)],
            [
                np.sqrt(np.add.reduceat(value**2, starts)),
                np.add.reduceat(value, starts),
                np.add.reduceat(weight * value, starts) / total,
                np.sqrt(np.add.reduceat(weight * value**2, starts) / total),
            ],
            default=np.nan,
        )
    found["samples"][:] = -1
    found = _with_ratios(found, names, tables["quantities"])
    found = _chosen(found, np.isfinite(found["value"]))
    code = {
        name: tables["quantities"].index(name) for name in set(names) & set(tables["quantities"])
    }
    quantities = []
    for position in found["quantity"]:
        name = names[position]
        if name not in code:
            code[name] = len(tables["quantities"])
            tables["quantities"].append(name)
        quantities.append(code[name])
    found["quantity"] = np.array(quantities, dtype=np.int32)
    kept = [tables["quantities"][code] not in _ONLY_OF_SHARDS for code in found["quantity"]]
    return _chosen(found, np.array(kept, dtype=bool))


def _with_ratios(found: Columns, names: list[str], quantities: list[str]) -> Columns:
    """Adds what is a quotient of numbers of all shards: no mean of quotients would be right."""
    of: dict[str, dict[tuple[int, int], int]] = {}
    for row, (step, quantity, component) in enumerate(
        zip(found["step"], found["quantity"], found["component"], strict=True)
    ):
        of.setdefault(names[quantity], {})[step, component] = row
    value, rows, results, codes = found["value"], [], [], []
    for name, above, below in (
        ("update_ratio", "update_norm", ("weight_norm",)),
        ("gradient_cosine", "gradient_product", ("gradient_norm", "next_gradient_norm")),
    ):
        quantities.append(SHARD + name)
        names.append(name)
        for place, row in of.get(above, {}).items():
            parts = [of.get(one, {}).get(place) for one in below]
            divisor = math.prod(float(value[part]) if part is not None else 0.0 for part in parts)
            if divisor > 0:
                rows.append(row)
                results.append(float(value[row]) / divisor)
                codes.append(len(names) - 1)
    added = _chosen(found, np.array(rows, dtype=int))
    added["value"] = np.array(results, dtype=float)
    added["quantity"] = np.array(codes, dtype=np.int32)
    return {name: np.concatenate([found[name], added[name]]) for name in COLUMNS}


def _with_quotients(rows: Columns, tables: Mapping[str, list[str]]) -> Columns:
    """Takes quotients of numbers that ranks differ in from the means of both, and of no quotients.

    What curvature adds to the loss over the loss, over the descent, and a pair's part of all of it.
    """
    model = tables["components"].index(MODEL) if MODEL in tables["components"] else -2
    code = {name: position for position, name in enumerate(tables["quantities"])}
    alone = rows["other"] < 0

    def of(quantity: str) -> NDArray[np.intp]:
        return np.flatnonzero(rows["quantity"] == code.get(quantity, -1))

    def by_step(quantity: str) -> dict[int, float]:
        chosen = [i for i in of(quantity) if rows["component"][i] == model and alone[i]]
        return {int(rows["step"][i]): abs(float(rows["value"][i])) for i in chosen}

    everything: dict[int, float] = {}
    for quantity, times in (("block_curvature", 1.0), ("coupling", 2.0)):
        for i in of(quantity):
            step = int(rows["step"][i])
            everything[step] = everything.get(step, 0.0) + times * abs(float(rows["value"][i]))
    for quantity, above, factor, below in (
        ("update_curvature_share", "update_curvature", 0.5, by_step("step_loss")),
        ("overshoot", "update_curvature", 0.5, by_step("step_descent")),
        ("coupling_share", "coupling", 1.0, everything),
    ):
        place = ("step", "component", "other")
        numerators = {tuple(int(rows[n][i]) for n in place): i for i in of(above)}
        for i in of(quantity):
            row = numerators.get(tuple(int(rows[n][i]) for n in place))
            divisor = below.get(int(rows["step"][i]), 0.0)
            if row is not None and divisor > 0:
                for name in ("value", "std_error", "batch_std_error"):
                    rows[name][i] = rows[name][row] * factor / divisor
    return rows
