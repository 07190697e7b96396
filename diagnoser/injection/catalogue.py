"""All operators by their id: mistakes, healthy oddities, and mistakes that come together."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from diagnoser.injection.attention import ATTENTION
from diagnoser.injection.controls import ALL_CONTROLS
from diagnoser.injection.data import DATA
from diagnoser.injection.execution import EXECUTION
from diagnoser.injection.model import MODEL_OPERATORS
from diagnoser.injection.objective import OBJECTIVE
from diagnoser.injection.operator import Operator
from diagnoser.injection.optimisation import OPTIMISATION

_MISTAKES: Final = (*OPTIMISATION, *ATTENTION, *MODEL_OPERATORS, *OBJECTIVE, *DATA, *EXECUTION)

INJECTIONS: Final[Mapping[str, Operator]] = MappingProxyType(
    {operator.id: operator for operator in _MISTAKES}
)
CONTROLS: Final[Mapping[str, Operator]] = MappingProxyType(
    {operator.id: operator for operator in ALL_CONTROLS}
)
COMPOUNDS: Final[Mapping[str, tuple[tuple[str, str, str], ...]]] = MappingProxyType(
    {  # operator, severity, place
        "C1": (("O3", "high", "first"), ("N2b", "high", "last")),
        "C2": (("D1", "mid", "model"), ("O5a", "high", "model")),
        "C3": (("M3", "high", "model"), ("S1", "high", "all")),
    }
)
