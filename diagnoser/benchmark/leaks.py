"""What must carry no information: what a run is called, and labels at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from diagnoser.benchmark.dataset import Seen, Truth
from diagnoser.benchmark.evaluate import learn_classifier
from diagnoser.benchmark.judges import by_classifier
from diagnoser.benchmark.scoring import Figure, auroc
from diagnoser.table import Array

LEVEL = 0.99  # of the intervals, which must hold a half
DRAWS = 10  # of labels at random
STUDENT = 3.2498  # half a 99 % interval in standard errors, of 9 degrees of freedom


def of_metadata(learned: Sequence[Seen], scored: Sequence[Seen]) -> Figure | None:
    """Returns the AUROC of a judge that sees how a run was set up, and nothing that it did.

    It sees the recipe, the seed, the number of components and how the run was watched. Clean runs
    have more seeds than others by design, which no feature can know: only seeds that all have are
    taken.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    train, test = _comparable(learned), _comparable(scored)
    truth = [run.truth.is_faulty for run in train]
    if len(set(truth)) < 2 or not test:
        return None
    estimator = HistGradientBoostingClassifier(max_iter=80, early_stopping=False, random_state=0)
    estimator.fit(_metadata(train), truth)
    scores = estimator.decision_function(_metadata(test))
    return auroc([run.truth for run in test], scores.tolist(), level=LEVEL)


def of_labels_at_random(learned: Sequence[Seen], scored: Sequence[Seen]) -> Figure | None:
    """Returns the AUROC, against the true labels, of what was learned from labels at random.

    Labels change places between configurations of a subject, all of what is true of one at once.
    One permutation may by chance resemble the truth, and runs of one kind move together, so that
    the interval is Student's over `DRAWS` of them. Whole runs only.
    """
    chosen, judged = _whole(learned), _whole(scored)
    found = []
    for seed in range(DRAWS):
        classifier = learn_classifier(_with_other_labels(chosen, seed))
        said = [by_classifier(run, classifier).score for run in judged]
        found.append(auroc([run.truth for run in judged], said, level=LEVEL))
    values = np.array([figure.value for figure in found if figure is not None])
    if len(values) < DRAWS:
        return None
    mean = float(values.mean())
    half = float(STUDENT * values.std(ddof=1) / np.sqrt(DRAWS))
    return Figure("auroc", mean, mean - half, mean + half, len(judged))


def _with_other_labels(seen: Sequence[Seen], seed: int) -> list[Seen]:
    truths = {run.truth.hash: run.truth for run in seen}
    rng = np.random.default_rng(seed)
    swapped: dict[str, str] = {}
    for subject in sorted({truth.subject for truth in truths.values()}):
        own = sorted(h for h, truth in truths.items() if truth.subject == subject)
        swapped |= zip(own, rng.permutation(own).tolist(), strict=True)

    def other(truth: Truth) -> Truth:
        false = truths[swapped[truth.hash]]
        return replace(false, hash=truth.hash, recipe=truth.recipe)

    return [replace(run, truth=other(run.truth)) for run in seen]


def _whole(seen: Sequence[Seen]) -> list[Seen]:
    return [run for run in seen if run.truth.is_scored and run.look.prefix == 1.0]


def _comparable(seen: Sequence[Seen]) -> list[Seen]:
    """Whole runs whose truth is known, of seeds that faulty runs have, too."""
    judged = _whole(seen)
    seeds = {run.look.seed for run in judged if run.truth.is_faulty}
    return [run for run in judged if run.look.seed in seeds]


def _metadata(seen: Sequence[Seen]) -> Array:
    rows: list[list[Any]] = [
        [
            ord(run.truth.recipe[0]),
            run.look.seed,
            len(run.look.vectors.names),
            run.look.mode == "watched",
        ]
        for run in seen
    ]
    return np.array(rows, dtype=float)
