"""Who is learned from and who is scored, so that nothing that is scored was learned from.

Every split keeps all runs of a configuration on one side. Healthy runs are scored once over all
parts of a split: those of a mistake that did no harm with their mistake, the others by the hash of
their configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from diagnoser.benchmark.dataset import Seen, Truth
from diagnoser.vocabulary import CAUSE_CATEGORY

FOLDS: Final = 4  # of operators that are never learned from
SEVERITIES: Final = ("low", "mid", "high", "extreme")


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """One part of a split: what is learned from, and what is scored."""

    name: str
    learned: tuple[Seen, ...]
    scored: tuple[Seen, ...]


def operators_left_out(seen: Sequence[Seen], track: str) -> Iterator[Split]:
    """Yields parts in each of which some operators are never learned from.

    Operators are dealt out in the order of their category, so that each part holds some of as many
    categories as there are. Learned from are the training subjects without them; scored are those
    of another track, too: neither the mistake nor the model was ever seen.
    """
    category = {
        name: CAUSE_CATEGORY[run.truth.causes[0]]
        for run in seen
        if run.truth.causes and len(run.truth.operators) == 1
        for name in run.truth.operators
    }
    ordered = sorted(category, key=lambda name: (category[name], name))
    part = {name: i % FOLDS for i, name in enumerate(ordered)}

    def part_of(truth: Truth) -> int:
        known = [part[name] for name in truth.operators if name in part]
        return known[0] if known else int(truth.hash, 16) % FOLDS

    for fold in range(min(FOLDS, len(ordered))):
        unseen = frozenset(ordered[fold::FOLDS])
        yield Split(
            f"operators {fold + 1}",
            tuple(
                run
                for run in seen
                if run.truth.track == "train" and not unseen & set(run.truth.operators)
            ),
            tuple(_scored(seen, track, fold, part_of, unseen)),
        )


def severities_left_out(seen: Sequence[Seen], track: str) -> Iterator[Split]:
    """Yields parts in each of which one severity of every graded operator is never learned from.

    Graded are those that the training subjects have at three severities or more.
    """
    graded: dict[str, set[str]] = {}
    for run in seen:
        if run.truth.track == "train" and len(run.truth.operators) == 1:
            graded.setdefault(run.truth.operators[0], set()).add(run.truth.severity)
    names = frozenset(name for name, severities in graded.items() if len(severities) >= 3)
    levels = [level for level in SEVERITIES if any(level in graded[name] for name in names)]

    def part_of(truth: Truth) -> int:
        if names & set(truth.operators) and truth.severity in levels:
            return levels.index(truth.severity)
        return int(truth.hash, 16) % len(levels)

    for part, level in enumerate(levels):
        yield Split(
            f"severity {level}",
            tuple(
                run
                for run in seen
                if run.truth.track == "train"
                and not (run.truth.severity == level and names & set(run.truth.operators))
            ),
            tuple(_scored(seen, track, part, part_of, names)),
        )


def subjects_left_out(seen: Sequence[Seen]) -> Iterator[Split]:
    """Yields a part for each training subject: learned from are the others."""
    train = [run for run in seen if run.truth.track == "train"]
    for subject in dict.fromkeys(run.truth.subject for run in train):
        yield Split(
            f"subject {subject}",
            tuple(run for run in train if run.truth.subject != subject),
            tuple(run for run in train if run.truth.subject == subject),
        )


def _scored(
    seen: Iterable[Seen],
    track: str,
    part: int,
    part_of: Callable[[Truth], int],
    operators: frozenset[str],
) -> Iterator[Seen]:
    """Yields the healthy runs of a part, and the faulty ones with one of the operators alone."""
    for run in seen:
        truth = run.truth
        if truth.track != track or not run.truth.is_scored or part_of(truth) != part:
            continue
        if not truth.is_faulty or (len(truth.operators) == 1 and truth.operators[0] in operators):
            yield run
