"""Features: a recording as tables that rules are evaluated on. No torch here.

`catalogue` holds the table of features, `functions` what they compute, `source` the recording as
matrices.
"""

from __future__ import annotations

import numpy as np

from diagnoser.features.catalogue import CATALOGUE, FEATURES
from diagnoser.features.program import NAMES as PROGRAM_NAMES
from diagnoser.features.program import NOTED as NOTED_NAMES
from diagnoser.features.source import Source
from diagnoser.runlog import Recording
from diagnoser.table import Scope, Table
from diagnoser.vocabulary import MODEL

__all__ = ["CATALOGUE", "FEATURES", "NOTED_NAMES", "PROGRAM_NAMES", "feature_tables"]


def feature_tables(recording: Recording) -> dict[Scope, Table]:
    """Computes every feature of a recording.

    Returns:
        Tables by scope. A feature whose quantities were never measured is all NaN there, so that a
        rule that needs it is unknown rather than silent.
    """
    source = Source(recording)
    subjects: dict[Scope, tuple[tuple[str, str | None], ...]] = {
        "run": ((MODEL, None),),
        "component": tuple((name, None) for name in source.names),
        "pair": source.pairs,
    }
    tables: dict[Scope, Table] = {}
    # What overflows or is 0 / 0 is Inf or NaN in the column, which is what rules need to see.
    with np.errstate(all="ignore"):
        for scope, members in subjects.items():
            columns = {
                name: function(source)
                for name, (feature, function) in FEATURES.items()
                if feature.scope == scope
            }
            tables[scope] = Table(scope, source.steps, members, columns, source.kinds)
    return tables
