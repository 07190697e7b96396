"""Families of features, and runs in which some of them are nothing but noise."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeVar

import numpy as np

from diagnoser.benchmark.dataset import Seen
from diagnoser.classifier import EXCESS, PAIR, Vectors
from diagnoser.features import PROGRAM_NAMES
from diagnoser.features.logged import OF_LOGS
from diagnoser.features.published import OF_PUBLISHED

T = TypeVar("T")

OF_CHECKS: Final = PROGRAM_NAMES | {
    "averaging_to_run",
    "initial_attention_scores",
    "initial_attention_excess",
    "initial_head_similarity",
}  # P: of the program
OF_ACCURACY: Final = {"accuracy", "accuracy_best", "accuracy_best_gain", "accuracy_swings"}
FAMILIES: Final = ("L", "G", "A", "H")  # loss, gradients and program, attention and inputs, Hessian
OF_LOSS: Final = ("loss_", "initial_loss_", "non_finite_loss", "accuracy")
OF_FORWARD: Final = ("attention_", "initial_attention_", "entropy_", "empty_rows", "input_")
OF_CURVATURE: Final = (
    *("update_curvature", "component_curvature", "curvature_part", "overshoot", "step_"),
    *("model_step_", "negative_curvature", "trace_", "coupling_", "gradient_curvature"),
)


def family_of(column: str) -> str:
    """Returns the family of features that a column of `Vectors` belongs to.

    >>> family_of("excess.step_sharpness.highest"), family_of("excess.pair.coupling_share.lowest")
    ('H', 'H')
    >>> family_of("loss_fall.latest"), family_of("attention_entropy.early")
    ('L', 'A')
    """
    name = column.removeprefix(EXCESS).removeprefix(PAIR)
    if name.split(".")[0] in OF_CHECKS:
        return "P"
    if name.startswith(OF_LOSS):
        return "L"
    if name.startswith(OF_CURVATURE):
        return "H"
    return "A" if name.startswith(OF_FORWARD) else "G"


def columns_of_runs(seen: Iterable[Seen]) -> tuple[str, ...]:
    """Returns the columns that any run has and that are learned from, in order."""
    return _ordered(name for run in seen for name in run.look.vectors.run)


def columns_of_components(seen: Iterable[Seen]) -> tuple[str, ...]:
    """Returns the columns that components of any run have and that are learned from, in order."""
    return _ordered(name for run in seen for name in run.look.vectors.components)


def is_learned_from(column: str) -> bool:
    """Whether a classifier may learn from a column.

    It may not from what was published for others to compare, which is often absolute; nor from what
    program checks measure, which rules judge, and these vote for themselves; nor from accuracy,
    which only classifications have, and whose level is that of the task; nor from what logs of
    scripts alone have.

    >>> is_learned_from("excess.step_sharpness.highest"), is_learned_from("accuracy_best.latest")
    (True, False)
    """
    name = column.removeprefix(EXCESS).removeprefix(PAIR).split(".")[0]
    return name not in OF_PUBLISHED | OF_CHECKS | OF_ACCURACY | OF_LOGS


def _ordered(columns: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(filter(is_learned_from, set(columns))))


def with_noise(
    seen: Sequence[Seen],
    families: Collection[str],
    run_columns: Iterable[str],
    component_columns: Iterable[str],
    seed: int = 0,
) -> list[Seen]:
    """Returns runs in which every column of another family is standard normal noise.

    So a configuration of families has as many columns to draw splits from as any other. Noise has
    no gaps: that something was not measured is a part of what is left out.

    Args:
        seen: Runs.
        families: Those that stay as they are.
        run_columns: All columns of runs.
        component_columns: All columns of components.
        seed: Of the noise, which is another one for each run and prefix.
    """
    run_noise = [name for name in run_columns if family_of(name) not in families]
    component_noise = [name for name in component_columns if family_of(name) not in families]
    found = []
    for run in seen:
        look = run.look
        which = (seed, run.truth.hash, look.mode, look.seed, look.prefix)
        rng = np.random.default_rng(_number(which))
        vectors = _noisy(look.vectors, run_noise, component_noise, rng)
        found.append(replace(run, look=replace(look, vectors=vectors)))
    return found


def _noisy(
    of: Vectors, run: Sequence[str], component: Sequence[str], rng: np.random.Generator
) -> Vectors:
    drawn = dict(zip(run, rng.standard_normal(len(run)).tolist(), strict=True))
    parts = rng.standard_normal((len(component), len(of.names)))
    return Vectors(
        {**of.run, **drawn},
        {**of.components, **dict(zip(component, parts, strict=True))},
        of.names,
        of.kinds,
        tuple(_noisy(moment, run, component, rng) for moment in of.earlier),
    )


def permuted(seen: Sequence[Seen], families: Collection[str], seed: int = 0) -> list[Seen]:
    """Returns runs that have the columns of some families from another run of their subject.

    Numbers of components are drawn from the other run's components, so that none is left without.
    """
    rng = np.random.default_rng(seed)
    groups: dict[tuple[str, str, float], list[int]] = {}
    for i, run in enumerate(seen):
        groups.setdefault((run.truth.subject, run.look.mode, run.look.prefix), []).append(i)
    found = list(seen)
    for members in groups.values():
        for i, j in zip(members, rng.permutation(members).tolist(), strict=True):
            vectors = _mixed(seen[i].look.vectors, seen[j].look.vectors, families, rng)
            found[i] = replace(seen[i], look=replace(seen[i].look, vectors=vectors))
    return found


def _mixed(
    own: Vectors, other: Vectors, families: Collection[str], rng: np.random.Generator
) -> Vectors:
    rows = rng.integers(max(len(other.names), 1), size=len(own.names))
    numbers = _others(own.run, families)
    numbers.update((n, v) for n, v in other.run.items() if family_of(n) in families)
    parts = _others(own.components, families)
    if len(other.names):
        taken = ((n, v) for n, v in other.components.items() if family_of(n) in families)
        parts.update((n, v[rows]) for n, v in taken)
    earlier = zip(own.earlier, other.earlier, strict=True)
    mixed = tuple(_mixed(before, others, families, rng) for before, others in earlier)
    return Vectors(numbers, parts, own.names, own.kinds, mixed)


def _others(columns: Mapping[str, T], families: Collection[str]) -> dict[str, T]:
    return {name: value for name, value in columns.items() if family_of(name) not in families}


def _number(which: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(which).encode()).digest()[:8], "big")
