"""Cheap statistics of a training step: gradients, updates, and what the autograd graph shows.

Everything here only reads. Per-component numbers are taken with one fused call a kind of statistic
and one read-out, so that a device is synchronised once a measurement.
"""

from diagnoser.statistics.activations import InputStatistics
from diagnoser.statistics.attention import AttentionStatistics
from diagnoser.statistics.graph import (
    GraphReading,
    LossReading,
    cross_entropy_of,
    loss_factor,
    read_graph,
)
from diagnoser.statistics.nodes import signed
from diagnoser.statistics.norms import (
    PartList,
    cosines,
    counts,
    inner_products,
    non_finite_counts,
    nonzero_shares,
    norms,
    sums,
)

__all__ = [
    "AttentionStatistics",
    "GraphReading",
    "InputStatistics",
    "LossReading",
    "PartList",
    "cosines",
    "counts",
    "cross_entropy_of",
    "inner_products",
    "loss_factor",
    "non_finite_counts",
    "nonzero_shares",
    "norms",
    "read_graph",
    "signed",
    "sums",
]
