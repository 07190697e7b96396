"""What the classifier adds to a diagnosis: a finding, that all is well, or that it is lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from diagnoser.classifier.predict import Classifier, Prediction, Reason
from diagnoser.classifier.vectors import EXCESS, Vectors
from diagnoser.types import Cause, Checked, Evidence, Finding, Unknown
from diagnoser.vocabulary import MODEL

SOURCE: Final = "classifier"
CAUSES_NAMED: Final = 3


@dataclass(frozen=True, slots=True)
class Said:
    """One of three: ``finding``, ``checked`` (it is like the healthy runs), or ``unknown``."""

    prediction: Prediction
    finding: Finding | None = None
    checked: Checked | None = None
    unknown: Unknown | None = None


def say(classifier: Classifier, of: Vectors, steps: tuple[int, ...]) -> Said:
    """Judges a run and puts it as rules put theirs.

    Args:
        classifier: The judge.
        of: The run.
        steps: At which steps it was measured, in order.
    """
    said = classifier.predict(of)
    if said.abstains:
        reason = (
            f"this run is unlike those it learned from: {100 * said.unfamiliar:.0f} % of its "
            "numbers lie beyond all of theirs"
        )
        if said.unfamiliar <= classifier.most_unfamiliar:
            reason = f"it learned from runs that had what this one has not: {_named(said.lacking)}"
        return Said(said, unknown=Unknown(SOURCE, MODEL, (), reason))
    if said.faulty < classifier.threshold or not said.causes:
        title = "It is not like the faulty runs that the classifier learned from"
        return Said(said, checked=Checked(SOURCE, title, len(of.names), len(steps)))
    causes = tuple(Cause(name, probability) for name, probability in said.causes[:CAUSES_NAMED])
    first = causes[0].cause
    return Said(
        said,
        finding=Finding(
            fault=classifier.fault_of[first],
            component=said.place,
            severity="medium",
            since_step=steps[-1] if steps else 0,
            source=SOURCE,
            message=(
                f"This run is like those with {first.replace('_', ' ')} that the classifier "
                f"learned from; what speaks for it most is "
                f"{_named([reason.column for reason in said.reasons])}."
            ),
            causes=causes,
            evidence=_evidence(said.reasons, classifier, steps),
            probability=said.faulty,
            n=int(classifier.about.get("runs", 0)) or None,
        ),
    )


def _named(columns: Sequence[str]) -> str:
    names = dict.fromkeys(map(_feature, columns))
    return ", ".join(name.replace("_", " ") for name in list(names)[:3]) or "no single number"


def _feature(column: str) -> str:
    """Returns the feature that a column sums up.

    >>> _feature("excess.update_ratio.highest"), _feature("pair.coupling_share.latest")
    ('update_ratio', 'coupling_share')
    """
    return column.removeprefix(EXCESS).rpartition(".")[0].rpartition(".")[2] or column


def _evidence(
    reasons: tuple[Reason, ...], classifier: Classifier, steps: tuple[int, ...]
) -> tuple[Evidence, ...]:
    """Numbers against the middle of healthy runs; one that no healthy run has is left out."""
    span = (steps[0], steps[-1]) if steps else (0, 0)
    middles = dict(zip(classifier.run_columns, classifier.middle.tolist(), strict=True))
    return tuple(
        Evidence(
            feature=reason.column,
            observed=reason.value,
            comparison="<" if reason.value < middles[reason.column] else ">",
            threshold=middles[reason.column],
            steps=span,
            method="against healthy runs",
        )
        for reason in reasons
        if math.isfinite(middles[reason.column])
    )
