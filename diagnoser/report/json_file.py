"""`diagnosis.json`: the diagnosis for other programs, and the JSON Schema that describes it.

The same diagnosis gives the same bytes: no time stamps, floats by ``repr``, parameters in
alphabetical order, ASCII only (so that a hostile name cannot steer the terminal the file is shown
on). NaN and infinities are the strings "NaN", "Infinity" and "-Infinity", because JSON has no
numbers for them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from importlib import resources
from typing import Any

from diagnoser.types import (
    Arm,
    Attempt,
    Cost,
    Diagnosis,
    Estimate,
    Evidence,
    Finding,
    RankedCause,
    Repair,
    Unknown,
)

SCHEMA = "diagnoser.diagnosis/1"


def diagnosis_to_json(diagnosis: Diagnosis) -> str:
    """Returns the text of `diagnosis.json`, causes and findings in the order of ``diagnosis``.

    ``repairs`` lists those that were carried out; findings hold those that are only suggested.
    """
    document = {
        "schema": SCHEMA,
        "run": diagnosis.run,
        "verdict": diagnosis.verdict,
        "script": {"exit_code": diagnosis.exit_code},
        "causes": [_ranked_cause(cause) for cause in diagnosis.causes],
        "findings": [_finding(finding) for finding in diagnosis.findings],
        "unknown": [_unknown(unknown) for unknown in diagnosis.unknown],
        "repairs": [_attempt(attempt) for attempt in diagnosis.repairs],
        "cost": _cost(diagnosis.cost),
    }
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def diagnosis_schema() -> dict[str, Any]:
    """Returns the JSON Schema (draft 2020-12) that every `diagnosis.json` satisfies."""
    text = resources.files(__package__).joinpath("diagnosis.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def _number(value: float | None) -> float | int | str | None:
    if value is None or isinstance(value, int):
        return value
    value = float(value)  # a numpy scalar becomes what json writes by repr
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def _steps(steps: Iterable[int]) -> list[int]:
    return [int(step) for step in steps]


def _count(n: int | None) -> int | None:
    return None if n is None else int(n)


def _ranked_cause(cause: RankedCause) -> dict[str, Any]:
    return {
        "cause": cause.cause,
        "component": cause.component,
        "probability": _number(cause.probability),
        "n": _count(cause.n),
        "because": list(cause.because),
    }


def _finding(finding: Finding) -> dict[str, Any]:
    where = finding.where
    return {
        "fault": finding.fault,
        "component": finding.component,
        "other": finding.other,
        "severity": finding.severity,
        "probability": _number(finding.probability),
        "n": _count(finding.n),
        "since_step": int(finding.since_step),
        "source": finding.source,
        "causes": [
            {"cause": cause.cause, "probability": _number(cause.probability)}
            for cause in finding.causes
        ],
        "evidence": [_evidence(evidence) for evidence in finding.evidence],
        "message": finding.message,
        "where": None if where is None else {"file": where.file, "line": int(where.line)},
        "patch": finding.patch,
        "repairs": [_repair(repair) for repair in finding.repairs],
    }


def _evidence(evidence: Evidence) -> dict[str, Any]:
    return {
        "feature": evidence.feature,
        "observed": _number(evidence.observed),
        "std_error": _number(evidence.std_error),
        "batch_std_error": _number(evidence.batch_std_error),
        "method": evidence.method,
        "comparison": evidence.comparison,
        "threshold": _number(evidence.threshold),
        "steps": _steps(evidence.steps),
    }


def _repair(repair: Repair) -> dict[str, Any]:
    return {
        "name": repair.name,
        "component": repair.component,
        "parameters": {
            name: value if isinstance(value, str) else _number(value)
            for name, value in sorted(repair.parameters.items())
        },
    }


def _attempt(attempt: Attempt) -> dict[str, Any]:
    return {
        "step": {
            "at": int(attempt.step),
            "finding": attempt.source,
            "component": attempt.component,
            "actions": [_repair(action) for action in attempt.actions],
            "derivation": attempt.derivation,
            "guarantee": attempt.guarantee,
            "batches": int(attempt.batches),
        },
        "before": _arm(attempt.before),
        "after": _arm(attempt.after),
        "twin": _arm(attempt.twin),
        "difference": _estimate(attempt.difference),
        "verdict": "kept" if attempt.kept else "rolled_back",
        "reason": attempt.reason,
    }


def _arm(arm: Arm | None) -> dict[str, Any] | None:
    if arm is None:
        return None
    return {
        "steps": int(arm.steps),
        "loss": _number(arm.loss),
        "evidence": [_evidence(evidence) for evidence in arm.evidence],
        "firing": list(arm.firing),
    }


def _estimate(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    return {
        "value": _number(estimate.value),
        "std_error": _number(estimate.std_error),
        "batch_std_error": _number(estimate.batch_std_error),
        "samples": _count(estimate.samples),
        "method": estimate.method,
        "dtype": estimate.dtype,
    }


def _unknown(unknown: Unknown) -> dict[str, Any]:
    return {
        "rule": unknown.rule,
        "component": unknown.component,
        "missing": list(unknown.missing),
        "reason": unknown.reason,
    }


def _cost(cost: Cost) -> dict[str, Any]:
    return {
        "steps": int(cost.steps),
        "measurements": int(cost.measurements),
        "training_s": _number(cost.training_s),
        "monitoring_s": _number(cost.monitoring_s),
        "repairing_s": _number(cost.repairing_s),
    }
