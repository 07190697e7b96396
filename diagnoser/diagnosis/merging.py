"""How what rules believe and what the classifier believes become one order of causes and places.

A rule believes in a cause as often as it was right about it on the calibration runs, less where
there were few of them: two more runs are counted, on which it was as good as its severity and the
rank of the cause say without any measurement. Rules are not independent of each other (many see
one and the same thing), so only the strongest counts and the others break ties; the classifier was
learned from other numbers, and its probability is added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from diagnoser.rules import Precision
from diagnoser.vocabulary import MODEL, severity_rank

if TYPE_CHECKING:  # by rules alone, nobody waits for it
    from diagnoser.classifier import Prediction

# What a rule counts for before it is measured, by severity.
UNMEASURED: Final[Mapping[str, float]] = {"low": 0.05, "medium": 0.2, "high": 0.4, "critical": 0.8}
OF_A_CHECK: Final = 0.8  # of a grave one: it saw the mistake itself, not what comes of it
WITHOUT_A_PLACE: Final = 0.9  # times that, of one that sees it in the whole model: a probe, often
PRIOR_RUNS: Final = 2
SYMPTOM: Final = 0.05  # what a symptom adds to the cause that explains it
TIE: Final = 0.01  # share of all votes that breaks ties
MOST_VOTES: Final = 1.0  # beyond which more of them break no tie
NAMED: Final = 3  # causes that the classifier adds


@dataclass(frozen=True, slots=True)
class Claim:
    """What a rule says of a run: how grave, where, since when, and its causes, likeliest first.

    ``under`` is the cause, and its place, of another rule's finding that explains this one.
    ``order`` is the place of the component in the model; ``of_check`` says that it is a rule on
    what a program check measures.
    """

    rule: str
    severity: str
    component: str
    since_step: int
    causes: tuple[str, ...]
    under: tuple[str, str] | None = None
    order: int = 0
    of_check: bool = False

    @property
    def source(self) -> str:
        """As in a finding."""
        return f"{'check' if self.of_check else 'rule'}:{self.rule}"


@dataclass(frozen=True, slots=True)
class Vote:
    """What a claim says for a cause at a place, from 0 to 1; ``source`` and ``order`` are its."""

    cause: str
    component: str
    weight: float
    since_step: int
    source: str = ""
    order: int = 0


def prior_of(severity: str, *, of_check: bool) -> float:
    """Returns how surely a finding is right before that was counted."""
    return OF_A_CHECK if of_check and is_grave(severity) else UNMEASURED[severity]


def belief(
    severity: str, rank: int, cause: str, measured: Precision | None, *, of_check: bool = False
) -> float:
    """Returns how far a rule is to be believed about a cause that it names as its ``rank``-th.

    >>> belief("medium", 2, "residual", None)
    0.1
    >>> belief("medium", 1, "residual", Precision(n=8, faulty=8, causes={"residual": 7}))
    0.74
    """
    prior = prior_of(severity, of_check=of_check) / rank
    if measured is None:
        return prior
    return (measured.causes.get(cause, 0) + PRIOR_RUNS * prior) / (measured.n + PRIOR_RUNS)


def suspicion(severity: str, measured: Precision | None, *, of_check: bool = False) -> float:
    """Returns how surely a run is faulty on which a rule fires, from 0 to 1."""
    prior = prior_of(severity, of_check=of_check)
    if measured is None:
        return prior
    return (measured.faulty + PRIOR_RUNS * prior) / (measured.n + PRIOR_RUNS)


def is_grave(severity: str) -> bool:
    """Whether a finding of this severity makes a run faulty."""
    return severity_rank(severity) >= severity_rank("medium")


def votes_of(claims: Iterable[Claim], measured: Mapping[str, Precision]) -> tuple[Vote, ...]:
    """Returns how claims vote; a symptom votes for what explains it, not for its own guesses."""
    votes = []
    for claim in claims:
        if claim.under is not None:
            votes.append(Vote(*claim.under, SYMPTOM, claim.since_step, claim.source))
            continue
        known = measured.get(claim.rule)
        less = WITHOUT_A_PLACE if claim.of_check and claim.component == MODEL else 1.0
        for rank, cause in enumerate(claim.causes, start=1):
            weight = less * belief(claim.severity, rank, cause, known, of_check=claim.of_check)
            vote = Vote(cause, claim.component, weight, claim.since_step, claim.source, claim.order)
            votes.append(vote)
    return tuple(votes)


def ranked(
    votes: Iterable[Vote],
    said: Prediction | None = None,
    since_step: int = 0,
    *,
    adds: bool = True,
) -> tuple[tuple[str, str], ...]:
    """Returns causes with their places, best first.

    Args:
        votes: Those of the rules.
        said: The classifier's, if it has a say: a cause that a rule names keeps the rule's place,
            another one is placed where the classifier would.
        since_step: When the classifier's causes are said to have begun; it only breaks ties.
        adds: Whether the classifier names causes that no rule does.
    """
    weights: dict[tuple[str, str], list[float]] = {}
    since: dict[tuple[str, str], int] = {}
    order: dict[tuple[str, str], int] = {}
    for vote in votes:
        key = (vote.cause, vote.component)
        weights.setdefault(key, []).append(vote.weight)
        since[key] = min(since.get(key, vote.since_step), vote.since_step)
        order[key] = min(order.get(key, vote.order), vote.order)
    strength = {key: max(own) + TIE * min(sum(own), MOST_VOTES) for key, own in weights.items()}
    if said is not None:
        by_rules = {cause for cause, _ in strength}
        strength = {
            (cause, place): value + _probability(said, cause)
            for (cause, place), value in strength.items()
        }
        for cause, probability in said.causes[: NAMED if adds else 0]:
            if cause not in by_rules:
                strength[cause, said.place] = probability
                since[cause, said.place] = since_step
    # Of equal ones the earlier, then the one nearer to the input: what is behind it may follow.
    return tuple(
        sorted(
            strength,
            key=lambda key: (-round(strength[key], 9), since[key], order.get(key, 0), key),
        )
    )


def reasons(
    votes: Iterable[Vote], said: Prediction | None = None
) -> dict[tuple[str, str], tuple[str, ...]]:
    """Returns who votes for each cause at its place, the strongest first.

    Args:
        votes: Those of the rules.
        said: The classifier's, if it has a say; it counts for a cause wherever it is placed.
    """
    by_cause: dict[tuple[str, str], dict[str, float]] = {}
    for vote in votes:
        own = by_cause.setdefault((vote.cause, vote.component), {})
        own[vote.source] = max(own.get(vote.source, 0.0), vote.weight)
    if said is not None:
        for cause, probability in said.causes:
            places = [key for key in by_cause if key[0] == cause] or [(cause, said.place)]
            for key in places:
                by_cause.setdefault(key, {})["classifier"] = probability
    return {
        key: tuple(sorted(own, key=lambda source: (-own[source], source)))
        for key, own in by_cause.items()
    }


def places_in_order(
    causes: Sequence[tuple[str, str]], said: Prediction | None = None
) -> tuple[str, ...]:
    """Returns the components that may be to blame: those of the causes, then the classifier's."""
    named = [place for _, place in causes]
    likely = [name for name, _ in said.components] if said is not None else []
    return tuple(dict.fromkeys(name for name in [*named, *likely] if name != MODEL))


def _probability(said: Prediction, cause: str) -> float:
    return next((probability for name, probability in said.causes if name == cause), 0.0)
