"""Does coupling say where a disturbance goes next? Asked of logs of runs with a local fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diagnoser.classifier import to_blame
from diagnoser.rules.ranges import Ranges, range_key
from diagnoser.table import Scope, Table

FEATURE = "gradient_to_start"  # what leaves its healthy range
COUPLING = "coupling_to_curvature"


@dataclass(frozen=True, slots=True)
class Followed:
    """What follows a faulty component out of the healthy range, in one run.

    ``by_coupling``: the component that is coupled to it most is among those that leave next;
    ``by_order``: its neighbour in the model is; ``by_chance``: the share of the others that are.
    """

    by_coupling: bool
    by_order: bool
    by_chance: float


def follow(tables: Mapping[Scope, Table], blamed: Sequence[str], ranges: Ranges) -> Followed | None:
    """Asks one run.

    None where no faulty component leaves its range, no other one does later, or no coupling was
    measured until the faulty one did.

    Args:
        tables: The run's feature tables.
        blamed: The components that are at fault, or prefixes of them.
        ranges: Healthy ranges of `FEATURE`, by kind.
    """
    left = _left(tables["component"], ranges)
    own = {name: at for name, at in left.items() if to_blame(name, blamed)}
    if not own:
        return None
    onset = min(own.values())
    coupling = _coupling(tables["pair"], blamed, onset)
    later = {name: left[name] for name in coupling if name in left and left[name] > onset}
    if not later:
        return None
    following = {name for name, at in later.items() if at == min(later.values())}
    # Those that had left before cannot be the next.
    open_to = [name for name in coupling if left.get(name, onset + 1) > onset]
    most = max(open_to, key=lambda name: (coupling[name], name))
    order = [name for name, _ in tables["component"].subjects]
    first = min(order.index(name) for name in own)
    nearest = min(open_to, key=lambda name: (abs(order.index(name) - first), order.index(name)))
    return Followed(most in following, nearest in following, len(following) / len(open_to))


def _left(table: Table, ranges: Ranges) -> dict[str, int]:
    """Returns the step at which each component first left its range, of those that did."""
    if FEATURE not in table.columns:
        return {}
    values = np.broadcast_to(table.columns[FEATURE].value, (len(table.subjects), len(table.steps)))
    found = {}
    for (name, _), row in zip(table.subjects, values, strict=True):
        key = range_key("component", [table.kinds.get(name)])
        low, high = ranges.end(FEATURE, key, "low"), ranges.end(FEATURE, key, "high")
        outside = np.flatnonzero((row < low[1]) | (row > high[2]))
        if len(outside):
            found[name] = int(table.steps[outside[0]])
    return found


def _coupling(table: Table, blamed: Sequence[str], onset: int) -> dict[str, float]:
    """Returns how strongly every other component was coupled to a faulty one, as last measured."""
    if COUPLING not in table.columns or not len(table.steps):
        return {}
    values = np.broadcast_to(table.columns[COUPLING].value, (len(table.subjects), len(table.steps)))
    found: dict[str, float] = {}
    for (a, b), row in zip(table.subjects, values, strict=True):
        if b is None or to_blame(a, blamed) == to_blame(b, blamed):
            continue
        known = row[~np.isnan(row) & (table.steps <= onset)]
        if len(known):
            other = b if to_blame(a, blamed) else a
            found[other] = max(found.get(other, 0.0), abs(float(known[-1])))
    return found
