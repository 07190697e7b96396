"""Intervals for counts."""

from diagnoser.benchmark.intervals import wilson

__all__ = ["wilson"]
