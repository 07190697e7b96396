"""Judges that are scored against each other: rules, classifier, both, and simple baselines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from diagnoser.benchmark.baselines import DeepFD
from diagnoser.benchmark.dataset import Seen
from diagnoser.benchmark.intervals import wilson
from diagnoser.benchmark.scoring import HEALTHY, Verdict
from diagnoser.classifier import Classifier, Example
from diagnoser.vocabulary import MODEL, severity_rank

GRAVE: Final = severity_rank("medium")  # from here on a finding makes a run faulty


@dataclass(frozen=True, slots=True)
class Precision:
    """How often a run is faulty where a rule fires on it at severity medium or more."""

    rule: str
    hits: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share, with one hit and one miss added, so that three of three is not certain."""
        return (self.hits + 1) / (self.n + 2)


def precisions(seen: Iterable[Seen]) -> dict[str, Precision]:
    """Measures the precision of every rule on runs that are faulty or healthy.

    A run counts once a rule; ambiguous ones and latent defects are left out.
    """
    counts: dict[str, tuple[int, int]] = {}
    for run in seen:
        if not is_judged(run):
            continue
        fired = {name for name, severity, _ in run.look.rules.findings if _is_grave(severity)}
        for name in fired:
            hits, n = counts.get(name, (0, 0))
            counts[name] = (hits + run.truth.is_faulty, n + 1)
    return {
        name: Precision(name, hits, n, *wilson(hits, n))
        for name, (hits, n) in sorted(counts.items())
    }


def is_judged(run: Seen) -> bool:
    """Whether a run is known to be faulty, or known to be healthy."""
    return run.truth.is_faulty or run.truth.control in HEALTHY


def example(run: Seen) -> Example:
    """Returns what the classifier learns from a run. Twins and severities stay together."""
    truth = run.truth
    group = f"{truth.subject} {'+'.join(truth.operators) or 'clean'}"
    return Example(
        run.look.vectors, truth.is_faulty, truth.causes, truth.faults, truth.components, group
    )


def by_rules(run: Seen, precision: Mapping[str, Precision]) -> Verdict:
    """The rules: as sure as the most precise rule that fires, more so the more fire."""
    values = [
        precision[name].value if name in precision else 0.5
        for name, severity, _ in run.look.rules.findings
        if _is_grave(severity)
    ]
    score = max(values, default=0.0) + 0.001 * min(len(values), 50)
    causes = tuple(dict.fromkeys(cause for cause, _ in run.look.rules.causes))
    return Verdict(run.truth, run.look.seed, run.look.rules.faulty, score, causes, _named(run))


def by_opinion(run: Seen, name: str) -> Verdict:
    """A baseline that need not learn; of one without a score NaN, which has no AUROC."""
    said = run.look.opinions[name]
    return Verdict(run.truth, run.look.seed, said.faulty, said.score, said.causes, said.components)


def by_deepfd(run: Seen, learned: DeepFD) -> Verdict:
    """DeepFD's features and its three estimators, united."""
    said = learned.predict(run.look.deepfd)
    return Verdict(run.truth, run.look.seed, said.faulty, said.score, said.causes)


def by_classifier(run: Seen, classifier: Classifier) -> Verdict:
    """The classifier alone."""
    said = classifier.predict(run.look.vectors, explain=False)
    return Verdict(
        run.truth,
        run.look.seed,
        said.faulty >= classifier.threshold,
        said.faulty,
        tuple(cause for cause, _ in said.causes),
        tuple(name for name, _ in said.components),
    )


def together(
    run: Seen, classifier: Classifier, precision: Mapping[str, Precision], threshold: float
) -> Verdict:
    """Rules and classifier as independent witnesses; causes and components by summed belief."""
    said = classifier.predict(run.look.vectors, explain=False)
    rules = by_rules(run, precision)
    belief = min(rules.score, 0.999)
    score = 1.0 - (1.0 - said.faulty) * (1.0 - belief)
    return Verdict(
        run.truth,
        run.look.seed,
        score >= threshold,
        score,
        _merged(rules.causes, said.causes, belief),
        _merged(rules.components, said.components, belief),
    )


def _merged(
    first: Sequence[str], second: Sequence[tuple[str, float]], belief: float
) -> tuple[str, ...]:
    """Adds what the rules believe of each name, less by rank, to the classifier's probability."""
    total = dict(second)
    for rank, name in enumerate(first, start=1):
        total[name] = total.get(name, 0.0) + belief / rank
    return tuple(sorted(total, key=lambda name: (-total[name], name)))


def _named(run: Seen) -> tuple[str, ...]:
    return tuple(dict.fromkeys(where for _, where in run.look.rules.causes if where != MODEL))


def _is_grave(severity: str) -> bool:
    return severity_rank(severity) >= GRAVE


__all__ = [
    "Precision",
    "by_classifier",
    "by_deepfd",
    "by_opinion",
    "by_rules",
    "example",
    "is_judged",
    "precisions",
    "together",
]
