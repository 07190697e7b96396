"""Families of published checks as judges: what their rules say of a run, as an opinion."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Final

from diagnoser.benchmark.baselines import Opinion
from diagnoser.diagnosis import (
    claims,
    default_rules,
    is_grave,
    places_in_order,
    ranked,
    votes_of,
)
from diagnoser.rules import Rule, precision_of
from diagnoser.runlog import Recording
from diagnoser.table import Scope, Table

# AutoTrainer's rules are a judge of `baselines`.
JUDGES: Final = ("umlaut", "deeplocalize", "deepdiagnosis")


def by_family(family: str, tables: Mapping[Scope, Table], recording: Recording) -> Opinion:
    """Returns what the rules of a family say, as `baselines.autotrainer` does.

    The score is the share of its rules that fire. What each family leaves out, as the log does not
    hold it, stands at the top of one of its rules.

    Args:
        family: One of the shipped families.
        tables: The run's feature tables.
        recording: The run they were made of.
    """
    rules = _rules(family)
    said = claims(tables, recording, rules)
    causes = ranked(votes_of(said, precision_of(rules)))
    return Opinion(
        any(is_grave(claim.severity) for claim in said),
        len({claim.rule for claim in said}) / len(rules),
        tuple(dict.fromkeys(cause for cause, _ in causes)),
        places_in_order(causes),
    )


@functools.cache
def _rules(family: str) -> tuple[Rule, ...]:
    return default_rules(family)
