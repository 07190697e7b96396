"""How well `diagnoser diff` tells a run that went wrong from one that has another seed.

``python -m benchmarks.difference`` compares kept watched runs of `han` (``results/bench``) in pairs
and writes ``results/difference.json``, in some minutes; `difference_document` makes tables of it.
``--bounds`` writes instead what the bounds of `diagnoser.difference.SPREADS` are to be, from
healthy pairs of the training subjects, to ``results/difference-bounds.json``. Nothing was chosen on
`han`, and no test subject is read.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np

from benchmarks.outcomes import BENCH, archive_of
from diagnoser.benchmark.archive import unpack
from diagnoser.benchmark.baselines import chance
from diagnoser.benchmark.configuration import catalogue
from diagnoser.benchmark.dataset import Truth, recording_of, truths
from diagnoser.benchmark.jobs import Mode
from diagnoser.benchmark.plan import make_plan
from diagnoser.benchmark.results import Store, write_whole
from diagnoser.classifier import to_blame
from diagnoser.difference import EXACT, LOSS, SPREADS, Difference, compare, deviations
from diagnoser.runlog import Recording
from diagnoser.vocabulary import MODEL

RESULTS: Final = BENCH.parent / "difference.json"
BOUNDS: Final = BENCH.parent / "difference-bounds.json"
TRAIN: Final = ("vit", "gpt", "llama", "distilbert")
DEV: Final = ("han",)
MODES: Final[tuple[Mode, ...]] = ("watched", "budget")
OTHER_SEEDS: Final = (1, 5)  # added to a seed of a clean run, for its pairs
PASSED: Final = 0.005  # of healthy pairs pass the bound of a quantity
Runs: TypeAlias = Mapping[str, Mapping[int, Recording]]  # by configuration and seed
# What a pair is: of one configuration, healthy; or a clean run and a healthy one that is set up
# otherwise, or a faulty one.
SAME, CHANGED, FAULTY, RESEEDED = "same", "changed", "faulty", "faulty, other seed"
KINDS: Final = (SAME, CHANGED, FAULTY, RESEEDED)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two runs to compare, and what is true of the second; its seed stands first."""

    kind: str
    truth: Truth
    good: Recording
    bad: Recording
    seeds: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Row:
    """What was said of a pair.

    ``measured``: something left, whatever the set-up. ``right``, ``by_chance`` and ``by_gradient``
    say how often the first component is one to blame, of what was called different and has a
    place: the first that left, any component, and the one whose gradient norm differs most at the
    end; None where there is no place to find.
    """

    mode: str
    kind: str
    subject: str
    recipe: str
    hash: str
    operators: tuple[str, ...]
    seeds: tuple[int, int]
    verdict: str
    measured: bool
    first: str
    quantity: str
    step: int
    right: float | None
    by_chance: float | None
    by_gradient: float | None


def recordings(mode: Mode, subject: str) -> Runs:
    """Returns the kept watched runs of a subject, by the hash of the configuration and the seed."""
    runs: dict[str, dict[int, Recording]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for row, log in unpack(archive_of(mode, subject).read_bytes()):
            runs.setdefault(row["hash"], {})[row["seed"]] = recording_of(log, Path(folder))
    return runs


def pairs(
    runs: Runs, known: Mapping[str, tuple[Truth, str]], kinds: Collection[str]
) -> Iterator[Pair]:
    """Yields pairs of runs: healthy with healthy, and healthy with changed or faulty.

    Args:
        runs: Of one subject.
        known: The truth of each configuration, and the hash of its clean twin, by hash.
        kinds: Those that are wanted.
    """
    for pair in _pairs(runs, known):
        if pair.kind in kinds:
            yield pair


def _pairs(runs: Runs, known: Mapping[str, tuple[Truth, str]]) -> Iterator[Pair]:
    for digest, own in runs.items():
        if digest not in known:
            continue
        truth, clean = known[digest]
        healthy = runs.get(clean, {})
        for seed, run in own.items():
            if not truth.is_faulty:
                for added in OTHER_SEEDS if truth.role == "clean" else (1,):
                    other = (seed + added) % len(own)
                    if other != seed:
                        yield Pair(SAME, truth, own[other], run, (seed, other))
            if truth.role != "clean" and healthy:
                other = (seed + len(healthy) // 2) % len(healthy)
                kind = RESEEDED if truth.is_faulty else CHANGED
                yield Pair(kind, truth, healthy[other], run, (seed, other))
                if truth.is_faulty and seed in healthy:
                    yield Pair(FAULTY, truth, healthy[seed], run, (seed, seed))


def judged(mode: Mode, pair: Pair) -> Row:
    """Compares a pair, and holds what is said against what is true."""
    said, truth = compare(pair.good, pair.bad), pair.truth
    first = said.first
    placed = pair.kind in {FAULTY, RESEEDED} and bool(truth.components) and _named(said) is not None
    right = by_chance = by_gradient = None
    if placed:
        right = float(to_blame(_named(said) or "", truth.components))
        by_chance = chance(pair.bad, truth.components).top_1
        by_gradient = float(to_blame(_by_gradient(pair.good, pair.bad), truth.components))
    return Row(
        mode,
        pair.kind,
        truth.subject,
        truth.recipe,
        truth.hash,
        truth.operators,
        pair.seeds,
        said.verdict,
        bool(said.departed),
        "" if first is None else first.component,
        "" if first is None else first.departures[0].quantity,
        -1 if first is None else first.step,
        right,
        by_chance,
        by_gradient,
    )


def _named(said: Difference) -> str | None:
    """Returns the component that is said to have left first; None where only the model did."""
    first = said.first
    return None if first is None or first.component == MODEL else first.component


def _by_gradient(good: Recording, bad: Recording) -> str:
    """Returns the component whose gradient norm differs most, in its logarithm, as last measured.

    The simplest way to ask where two runs differ; one that is zero or not finite in one run alone
    differs most of all.
    """
    furthest, most = "", -1.0
    for component in bad.components:
        last = [run.series("gradient_norm", component.name).value[-1:] for run in (good, bad)]
        if all(len(values) for values in last):
            with np.errstate(all="ignore"):
                apart = abs(float(np.log(last[1][0]) - np.log(last[0][0])))
            apart = math.inf if math.isnan(apart) and last[0][0] > 0 else apart
            if apart > most:
                furthest, most = component.name, apart
    return furthest


def known_truths(subjects: Sequence[str]) -> dict[str, tuple[Truth, str]]:
    """Returns the truth of each scored configuration, and the hash of its clean twin, by hash."""
    known = catalogue()
    plan = make_plan(known, "small", only=subjects)
    harms = Store(BENCH, lambda text: print(text, file=sys.stderr)).read_harm()
    clean = {item.hash: item.clean for item in plan.items}
    true = truths(plan.items, harms, known)
    return {h: (truth, clean[h]) for h, truth in true.items() if truth.is_scored}


def bounds() -> dict[str, float]:
    """Returns what `PASSED` of healthy training pairs pass in any component, by quantity."""
    known = known_truths(TRAIN)
    highest: dict[str, list[float]] = {quantity: [] for quantity in SPREADS}
    for subject in TRAIN:
        for mode in MODES:
            for pair in pairs(recordings(mode, subject), known, {SAME}):
                for quantity, most in _furthest(pair).items():
                    highest[quantity].append(most)
            print(f"{subject}, {mode}: {len(highest[LOSS])} pairs so far", file=sys.stderr)
    return {q: float(np.quantile(values, 1.0 - PASSED)) for q, values in highest.items()}


def _furthest(pair: Pair) -> dict[str, float]:
    """Returns how many sigmas a pair is apart for good in any component, by quantity."""
    most = dict.fromkeys(SPREADS, 0.0)
    for found in deviations(pair.good, pair.bad):
        if found.quantity not in EXACT:
            times = float(found.lasting.max()) * SPREADS[found.quantity].bound
            most[found.quantity] = max(most[found.quantity], times)
    return most


def measured(subjects: Sequence[str], kinds: Collection[str]) -> list[Row]:
    """Compares pairs of some subjects."""
    known = known_truths(subjects)
    rows: list[Row] = []
    for subject in subjects:
        for mode in MODES:
            rows += [judged(mode, pair) for pair in pairs(recordings(mode, subject), known, kinds)]
            print(f"{subject}, {mode}: {len(rows)} pairs so far", file=sys.stderr)
    return rows


def main() -> None:
    """Writes bounds, or what was said of all pairs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bounds", action="store_true", help="write bounds for healthy pairs")
    if parser.parse_args().bounds:
        found = {quantity: round(value, 2) for quantity, value in bounds().items()}
        write_whole(BOUNDS, (json.dumps(found, indent=1) + "\n").encode())
        return
    rows = [json.dumps(asdict(row), allow_nan=False) for row in measured(DEV, KINDS)]
    write_whole(RESULTS, ("[\n" + ",\n".join(rows) + "\n]\n").encode())


if __name__ == "__main__":
    main()
