"""Faults on demand: mistakes as developers make them, each with its truth.

`training` holds what a training is made of, `operator` what a mistake is, `checking` the proof that
a mistake changed what it names and nothing else, `assembly` puts them together. The operators stand
in `INJECTIONS` (mistakes) and `CONTROLS` (odd, but valid), by category in files of their own.
"""

from diagnoser.injection.assembly import Injection, assemble, places
from diagnoser.injection.catalogue import COMPOUNDS, CONTROLS, INJECTIONS
from diagnoser.injection.checking import differences, snapshot
from diagnoser.injection.operator import Change, FaultRecord, Operator, Place, Remedy
from diagnoser.injection.training import (
    MOMENTS,
    TARGETS,
    Data,
    Outcome,
    Perturbation,
    Settings,
    Subject,
    Training,
    train,
)

__all__ = [
    "COMPOUNDS",
    "CONTROLS",
    "INJECTIONS",
    "MOMENTS",
    "TARGETS",
    "Change",
    "Data",
    "FaultRecord",
    "Injection",
    "Operator",
    "Outcome",
    "Perturbation",
    "Place",
    "Remedy",
    "Settings",
    "Subject",
    "Training",
    "assemble",
    "differences",
    "places",
    "snapshot",
    "train",
]
