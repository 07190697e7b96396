"""What is usual in healthy runs, for each kind of component.

A number says little by itself: query projections have negative curvature when all is well, norms
grow where projections do not. `Reference` holds the healthy middle and spread of every column for
each kind, and tells how far beyond them a component is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from diagnoser.classifier.vectors import Vectors, component_matrix
from diagnoser.table import Array

ANY_KIND: Final = ""  # all kinds together, for a kind that was hardly seen
ENOUGH: Final = 30  # healthy components of a kind
FURTHEST: Final = 20.0  # spreads from the middle that are told apart,
GRID: Final = 2.0**-16  # and how finely
QUARTILES: Final = (25.0, 50.0, 75.0)


@dataclass(frozen=True, slots=True)
class Reference:
    """Middle and spread of columns by kind; arrays (columns,), NaN where nothing was known.

    Both are of the inverse hyperbolic sine of the numbers: a logarithm far out, sign kept.
    """

    columns: tuple[str, ...]
    middle: Mapping[str, Array]
    spread: Mapping[str, Array]

    def excess(self, of: Vectors) -> Array:
        """Returns how many spreads each component is beyond the middle, (components, columns).

        NaN where the component or the reference has no number.
        """
        values = np.arcsinh(component_matrix(of, self.columns))
        chosen = [kind if kind in self.middle else ANY_KIND for kind in of.kinds]
        middle = np.array([self.middle[kind] for kind in chosen]).reshape(values.shape)
        spread = np.array([self.spread[kind] for kind in chosen]).reshape(values.shape)
        # An infinite number is as far out as can be told.
        beyond = np.clip((values - middle) / spread, -FURTHEST, FURTHEST)
        # The last digits are a processor's own; they must not break ties with what was learned.
        return np.asarray(np.round(beyond / GRID) * GRID)


def learn_reference(healthy: Sequence[Vectors], columns: Sequence[str]) -> Reference:
    """Learns what is usual from healthy runs.

    A column that hardly varies in healthy runs gets the spread of a hundredth, so that what never
    changes there is far out wherever it does.
    """
    rows = np.concatenate([np.arcsinh(component_matrix(of, columns)) for of in healthy])
    kinds = np.array([kind for of in healthy for kind in of.kinds])
    middle: dict[str, Array] = {}
    spread: dict[str, Array] = {}
    for kind in (ANY_KIND, *sorted(set(kinds.tolist()))):
        chosen = rows if kind == ANY_KIND else rows[kinds == kind]
        if kind == ANY_KIND or len(chosen) >= ENOUGH:
            low, middle[kind], high = _quartiles(chosen)
            spread[kind] = np.maximum((high - low) / 1.349, 0.01)  # a normal law's deviation
    return Reference(tuple(columns), middle, spread)


def _quartiles(rows: Array) -> Array:
    """Returns the quartiles of each column, (3, columns); NaN where nothing finite is known."""
    result = np.full((3, rows.shape[1]), np.nan)
    for i, column in enumerate(rows.T):
        known = column[np.isfinite(column)]
        if len(known):
            result[:, i] = np.percentile(known, QUARTILES)
    return result
