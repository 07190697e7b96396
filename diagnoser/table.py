"""Feature columns: what rules are evaluated on.

A `Table` holds, for one scope, the values of named features for every subject (component, pair of
components, or the run) at every measured step. Each value carries bounds: ``lower <= value <=
upper`` with both standard errors inside (two standard errors each side); an exact number has all
three equal, an unmeasured one is NaN in all three. A NaN is never turned into a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Scope = Literal["run", "component", "pair"]


@dataclass(frozen=True, slots=True)
class Column:
    """Values and bounds of one feature; each array is (subjects, steps), float64, NaN = unknown."""

    value: Array
    lower: Array
    upper: Array

    @classmethod
    def exact(cls, value: Array) -> Column:
        """Returns a column without uncertainty."""
        return cls(value, value, value)


@dataclass(frozen=True, slots=True)
class Feature:
    """An entry of the feature catalogue.

    ``low`` and ``high`` are the values the feature can take at all (a comparison outside them is a
    mistake in a rule and refused when it is loaded). ``quantities`` names what must have been
    measured; ``unit`` is for reports. ``description`` gives formula and source.
    """

    name: str
    scope: Scope
    description: str
    unit: str = ""
    low: float = -np.inf
    high: float = np.inf
    quantities: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """Feature columns of one scope.

    ``subjects`` are ``(component, other)`` pairs; ``other`` is None except in scope ``pair``, and
    the run is ``("model", None)``. ``steps`` (S,) are optimizer steps in ascending order.
    ``kinds`` gives the component kind of a component name.
    """

    scope: Scope
    steps: NDArray[np.int64]
    subjects: tuple[tuple[str, str | None], ...]
    columns: Mapping[str, Column]
    kinds: Mapping[str, str]


Catalogue = Mapping[str, Feature]
FeatureFunction = Callable[..., Column]
