"""From a recording, rules and a classifier to one diagnosis."""

from diagnoser.diagnosis.attempts import EVENT, attempt_data, attempts_of
from diagnoser.diagnosis.defaults import (
    DEFAULT_FAMILIES,
    FAMILIES,
    LOGGED,
    SHIPPED,
    chosen,
    default_rules,
    judges,
)
from diagnoser.diagnosis.diagnosing import claims, diagnose, vectors_of
from diagnoser.diagnosis.merging import (
    Claim,
    is_grave,
    places_in_order,
    ranked,
    suspicion,
    votes_of,
)

__all__ = [
    "DEFAULT_FAMILIES",
    "EVENT",
    "FAMILIES",
    "LOGGED",
    "SHIPPED",
    "Claim",
    "attempt_data",
    "attempts_of",
    "chosen",
    "claims",
    "default_rules",
    "diagnose",
    "is_grave",
    "judges",
    "places_in_order",
    "ranked",
    "suspicion",
    "vectors_of",
    "votes_of",
]
