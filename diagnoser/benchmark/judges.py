"""Judges that are scored against each other: rules, classifier, both, and simple baselines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from diagnoser.benchmark.baselines import DeepFD
from diagnoser.benchmark.dataset import Seen, Truth
from diagnoser.benchmark.scoring import Verdict
from diagnoser.classifier import Classifier, Example
from diagnoser.diagnosis import is_grave, places_in_order, ranked, suspicion, votes_of
from diagnoser.rules import Precision


def precisions(seen: Iterable[Seen], names: Mapping[str, Sequence[str]]) -> dict[str, Precision]:
    """Counts how often every rule was right on whole runs that are faulty or healthy.

    A run counts once a rule; ambiguous ones and latent defects are left out.

    Args:
        seen: Looks at runs; those at a part of one are passed over.
        names: The causes that each rule names, by its id.
    """
    fired: dict[str, list[Truth]] = {}
    for run in seen:
        if run.look.prefix == 1.0 and run.truth.is_scored:
            for rule in {claim.rule for claim in run.look.claims}:
                fired.setdefault(rule, []).append(run.truth)
    return {
        rule: Precision(
            n=len(truths),
            faulty=sum(truth.is_faulty for truth in truths),
            causes={
                cause: sum(truth.is_faulty and cause in truth.causes for truth in truths)
                for cause in names[rule]
            },
        )
        for rule, truths in sorted(fired.items())
    }


def example(run: Seen) -> Example:
    """Returns what the classifier learns from a run. Twins and severities stay together."""
    truth = run.truth
    group = f"{truth.subject} {'+'.join(truth.operators) or 'clean'}"
    return Example(
        run.look.vectors,
        truth.is_faulty,
        truth.causes,
        truth.faults,
        truth.components,
        group,
        alarmed=alarmed(run),
        origin=truth.subject,
    )


def by_rules(run: Seen, measured: Mapping[str, Precision]) -> Verdict:
    """The rules: as sure as the most precise rule that fires, more so the more fire."""
    causes = ranked(votes_of(run.look.claims, measured))
    return Verdict(
        run.truth,
        run.look.seed,
        alarmed(run),
        _suspicion(run, measured),
        _distinct(causes),
        places_in_order(causes),
    )


def alarmed(run: Seen) -> bool:
    """Whether the rules call a run faulty."""
    return any(is_grave(claim.severity) for claim in run.look.claims)


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
        not said.abstains and said.faulty >= classifier.threshold,
        said.faulty,
        tuple(cause for cause, _ in said.causes),
        tuple(name for name, _ in said.components),
    )


def together(run: Seen, classifier: Classifier, measured: Mapping[str, Precision]) -> Verdict:
    """Both, merged as `diagnose` does it: two witnesses, of whom either makes a run faulty.

    Of a run that neither calls faulty, causes and components are those that the merged order has.
    """
    said = classifier.predict(run.look.vectors, explain=False)
    by_itself = not said.abstains and said.faulty >= classifier.threshold
    faulty = by_itself or alarmed(run)
    causes = ranked(
        votes_of(run.look.claims, measured),
        None if said.abstains and faulty else said,
        adds=by_itself or not faulty,
    )
    doubt = 1.0 - min(_suspicion(run, measured), 0.999)
    return Verdict(
        run.truth,
        run.look.seed,
        faulty,
        1.0 - (1.0 - said.faulty) * doubt,
        _distinct(causes),
        places_in_order(causes, said),
    )


def _suspicion(run: Seen, measured: Mapping[str, Precision]) -> float:
    values = [
        suspicion(claim.severity, measured.get(claim.rule), of_check=claim.of_check)
        for claim in run.look.claims
        if is_grave(claim.severity)
    ]
    return max(values, default=0.0) + 0.001 * min(len(values), 50)


def _distinct(causes: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(cause for cause, _ in causes))


__all__ = [
    "alarmed",
    "by_classifier",
    "by_deepfd",
    "by_opinion",
    "by_rules",
    "example",
    "precisions",
    "together",
]
