"""Learns on some subjects and scores all judges on others."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from joblib import Parallel, delayed

from diagnoser.benchmark.baselines import DeepFD, fit_deepfd
from diagnoser.benchmark.configuration import Catalogue
from diagnoser.benchmark.dataset import Seen, digest_of_code, features, truths
from diagnoser.benchmark.examples import columns_of, influential, rounded
from diagnoser.benchmark.families import (
    FAMILIES,
    columns_of_components,
    columns_of_runs,
    family_of,
)
from diagnoser.benchmark.harm import Harm
from diagnoser.benchmark.jobs import Mode
from diagnoser.benchmark.judges import (
    by_classifier,
    by_deepfd,
    by_opinion,
    by_rules,
    example,
    precisions,
    together,
)
from diagnoser.benchmark.plan import Plan
from diagnoser.benchmark.published import JUDGES
from diagnoser.benchmark.results import Store
from diagnoser.benchmark.scoring import Verdict
from diagnoser.classifier import Classifier, Example, fit
from diagnoser.diagnosis import default_rules
from diagnoser.errors import BenchmarkError
from diagnoser.rules import Precision

RUN_COLUMNS, COMPONENT_COLUMNS = 160, 40  # that the classifier that ships rests on
OPINIONS: Final = ("loss", "autotrainer", *JUDGES, "gradient norm", "update ratio", "entropy")


@dataclass(frozen=True, slots=True)
class Learned:
    """What was learned: a classifier, DeepFD, and the precision of every rule."""

    classifier: Classifier
    deepfd: DeepFD
    precision: Mapping[str, Precision]


def read(
    store: Store, made: Plan, harms: Iterable[Harm], known: Catalogue, mode: Mode, jobs: int
) -> list[Seen]:
    """Reads all watched runs of a plan as examples, at every prefix at which they show anything.

    Raises:
        BenchmarkError: There is none.
    """
    true, code = truths(made.items, harms, known), digest_of_code()
    hashes = list(dict.fromkeys(item.hash for item in made.items if item.hash in true))
    with tempfile.TemporaryDirectory(prefix="diagnoser-bench-") as folder:
        found = Parallel(n_jobs=jobs)(
            delayed(features)(store, mode, digest, code, Path(folder)) for digest in hashes
        )
    seen = [
        Seen(true[digest], look)
        for digest, looks in zip(hashes, found, strict=True)
        for look in looks
        if true[digest].shows(look.prefix)
    ]
    if not seen:
        raise BenchmarkError(f"{store.directory}: no watched run; `diagnoser bench run` makes them")
    return seen


def learn(seen: Sequence[Seen]) -> Learned:
    """Learns from runs known to be faulty or healthy, the classifier as the one that ships.

    Raises:
        BenchmarkError, ClassifierError: Too few of them.
    """
    examples = lessons(seen)
    classifier = fit(examples, *columns_of(examples), {"runs": len(examples)})
    chosen = [run for run in seen if run.truth.is_scored]
    watched = [run for run in chosen if run.look.mode == "watched"]
    precision = precisions(watched, {rule.id: rule.causes for rule in default_rules()})
    labels = [run.truth.causes if run.truth.is_faulty else () for run in chosen]
    deepfd = fit_deepfd([run.look.deepfd for run in chosen], labels)
    return Learned(classifier, deepfd, precision)


def lessons(seen: Sequence[Seen]) -> list[Example]:
    """Returns what the classifier that ships learns from: the columns on which one of all rests.

    Raises:
        BenchmarkError, ClassifierError: Too few runs that are known to be faulty or healthy.
    """
    columns = influential(learn_classifier(seen), RUN_COLUMNS, COMPONENT_COLUMNS)
    return [rounded(example(run), *columns) for run in seen if run.truth.is_scored]


def learn_classifier(seen: Sequence[Seen], families: Iterable[str] = FAMILIES) -> Classifier:
    """Learns the classifier alone, from columns of some families.

    Raises:
        BenchmarkError, ClassifierError: Too few runs that are known to be faulty or healthy.
    """
    chosen = [run for run in seen if run.truth.is_scored]
    if not chosen:
        raise BenchmarkError("no run is known to be faulty or healthy: is `bench truth` finished?")
    wanted = set(families)
    return fit(
        [example(run) for run in chosen],
        [name for name in columns_of_runs(chosen) if family_of(name) in wanted],
        [name for name in columns_of_components(chosen) if family_of(name) in wanted],
        {"families": sorted(wanted), "runs": len(chosen)},
    )


def judges(learned: Learned) -> dict[str, Callable[[Seen], Verdict]]:
    """Returns the judges that are scored, by name."""
    precision = learned.precision
    return {
        "rules": lambda run: by_rules(run, precision),
        "classifier": lambda run: by_classifier(run, learned.classifier),
        "together": lambda run: together(run, learned.classifier, precision),
        "deepfd": lambda run: by_deepfd(run, learned.deepfd),
        **{name: functools.partial(by_opinion, name=name) for name in OPINIONS},
    }
