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
from diagnoser.benchmark.harm import Harm
from diagnoser.benchmark.jobs import Mode
from diagnoser.benchmark.judges import (
    by_classifier,
    by_deepfd,
    by_opinion,
    by_rules,
    example,
    is_judged,
    precisions,
    together,
)
from diagnoser.benchmark.plan import Plan
from diagnoser.benchmark.results import Store
from diagnoser.benchmark.scoring import Verdict
from diagnoser.classifier import Classifier, fit
from diagnoser.diagnosis import default_rules
from diagnoser.errors import BenchmarkError
from diagnoser.rules import Precision

OPINIONS: Final = ("loss", "autotrainer", "gradient norm", "update ratio", "entropy")
FAMILIES: Final = ("L", "G", "A", "H")  # loss, gradients and program, attention and inputs, Hessian
OF_LOSS: Final = ("loss_", "non_finite_loss", "accuracy")
OF_FORWARD: Final = ("attention_", "initial_attention_", "entropy_", "empty_rows", "input_")
OF_CURVATURE: Final = (
    *("update_curvature", "component_curvature", "curvature_part", "overshoot", "step_"),
    *("model_step_", "negative_curvature", "trace_", "coupling_", "gradient_curvature"),
)


@dataclass(frozen=True, slots=True)
class Learned:
    """What was learned: a classifier, DeepFD, and the precision of every rule."""

    classifier: Classifier
    deepfd: DeepFD
    precision: Mapping[str, Precision]


def family_of(column: str) -> str:
    """Returns the family of features that a column of `Vectors` belongs to.

    >>> family_of("component.step_sharpness.highest"), family_of("loss_fall.latest")
    ('H', 'L')
    """
    name = column.removeprefix("component.").removeprefix("pair.").removeprefix("excess.")
    if name.startswith(OF_LOSS):
        return "L"
    if name.startswith(OF_CURVATURE):
        return "H"
    return "A" if name.startswith(OF_FORWARD) else "G"


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


def learn(seen: Sequence[Seen], families: Iterable[str] = FAMILIES) -> Learned:
    """Learns from runs that are known to be faulty or healthy.

    Raises:
        BenchmarkError, ClassifierError: Too few of them.
    """
    chosen = [run for run in seen if is_judged(run)]
    if not chosen:
        raise BenchmarkError("no run is known to be faulty or healthy: is `bench truth` finished?")
    wanted = set(families)
    run_columns = _columns((run.look.vectors.run for run in chosen), wanted)
    component_columns = _columns((run.look.vectors.components for run in chosen), wanted)
    about = {"families": sorted(wanted), "runs": len(chosen)}
    classifier = fit([example(run) for run in chosen], run_columns, component_columns, about)
    watched = [run for run in chosen if run.look.mode == "watched"]
    precision = precisions(watched, {rule.id: rule.causes for rule in default_rules()})
    labels = [run.truth.causes if run.truth.is_faulty else () for run in chosen]
    deepfd = fit_deepfd([run.look.deepfd for run in chosen], labels)
    return Learned(classifier, deepfd, precision)


def _columns(rows: Iterable[Mapping[str, object]], families: set[str]) -> tuple[str, ...]:
    names = dict.fromkeys(name for row in rows for name in row)
    return tuple(name for name in sorted(names) if family_of(name) in families)


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
