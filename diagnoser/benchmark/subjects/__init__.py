"""Architectures on tasks, small enough to be trained many times on a laptop.

Four are for training a classifier and setting thresholds, one for development, three only for
tests: no rule and no classifier has seen their kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from diagnoser.benchmark.subjects.distilbert import DISTILBERT
from diagnoser.benchmark.subjects.gpt import GPT
from diagnoser.benchmark.subjects.han import HAN
from diagnoser.benchmark.subjects.llama import LLAMA
from diagnoser.benchmark.subjects.seq2seq import SEQ2SEQ
from diagnoser.benchmark.subjects.series import SERIES
from diagnoser.benchmark.subjects.video import VIDEO
from diagnoser.benchmark.subjects.vit import VIT
from diagnoser.injection.training import Subject

__all__ = ["SUBJECTS"]

SUBJECTS: Mapping[str, Subject] = MappingProxyType(
    {
        subject.name: subject
        for subject in (VIT, GPT, LLAMA, DISTILBERT, HAN, VIDEO, SEQ2SEQ, SERIES)
    }
)
