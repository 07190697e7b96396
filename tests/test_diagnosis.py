"""From recordings made by hand to verdicts: pure, repeatable, silent where too little is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnoser.diagnosis import default_rules, diagnose
from diagnoser.features import CATALOGUE, feature_tables
from diagnoser.runlog import Recording, RunLogWriter
from diagnoser.types import Component, Estimate, Measurement, Part
from diagnoser.vocabulary import CAUSE_CATEGORY, FAULTS, REPAIRS

RULES = default_rules()
COMPONENTS = tuple(
    Component(f"body.{i}", "feed_forward", "body", i, (Part(f"body.{i}.weight"),), 10)
    for i in range(3)
)


def record(
    directory: Path, losses: list[float], rows: dict[str, list[float]], component: str = "body.0"
) -> Recording:
    """Records losses at every step, and quantities of one component at every fifth."""
    with RunLogWriter(directory, "run", {}) as log:
        log.components(0, COMPONENTS, {})
        for step, loss in enumerate(losses):
            log.loss(step, loss)
        for k in range(max(map(len, rows.values()), default=0)):
            found = [
                Measurement(5 * k, name, component, Estimate(series[k]))
                for name, series in rows.items()
                if k < len(series)
            ]
            log.measurement(5 * k, found, 0.001)
        return log.recording()


FALLING = [1.0 / (1 + 0.1 * i) for i in range(40)]
FINE = {"gradient_norm": [1.0] * 8, "update_norm": [0.01] * 8, "optimized": [1.0] * 8}


def test_healthy_faulty_and_inconclusive(tmp_path: Path) -> None:
    healthy = diagnose(record(tmp_path / "a", FALLING, FINE), RULES)
    assert (healthy.verdict, healthy.findings) == ("healthy", ())
    assert diagnose(record(tmp_path / "b", FALLING[:10], FINE), RULES).verdict == "inconclusive"
    assert diagnose(record(tmp_path / "c", [], {}), RULES).verdict == "inconclusive"
    broken = diagnose(record(tmp_path / "d", [*FALLING[:30], *[math.nan] * 10], FINE), RULES)
    assert broken.verdict == "faulty"
    assert "non_finite" in {finding.fault for finding in broken.findings}


def test_the_same_recording_gives_the_same_diagnosis(tmp_path: Path) -> None:
    recording = record(tmp_path / "a", [*FALLING[:30], *[math.inf] * 10], FINE)
    assert repr(diagnose(recording, RULES)) == repr(diagnose(recording, RULES))


def test_rules_speak_the_vocabulary() -> None:
    assert RULES
    for rule in (*RULES, *default_rules(Path("autotrainer"))):
        assert rule.fault in FAULTS
        assert set(rule.causes) <= CAUSE_CATEGORY.keys()
        assert {repair.name for repair in rule.repairs} <= REPAIRS.keys()


def test_an_unmeasured_quantity_is_nan_in_every_feature_that_needs_it(tmp_path: Path) -> None:
    tables = feature_tables(record(tmp_path / "a", FALLING, {"nothing": [1.0] * 8}))
    for table in tables.values():
        for name, column in table.columns.items():
            if CATALOGUE[name].quantities and table.subjects:
                assert np.isnan(column.value).all(), name


@settings(max_examples=15, deadline=None)
@given(scale=st.floats(1e-6, 1e6))
def test_features_do_not_depend_on_the_unit_of_the_loss(
    scale: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tables = []
    for factor in (1.0, scale):
        rows = {name: [factor * 0.1 * (k + 1) for k in range(8)] for name in ("gradient_norm",)}
        directory = tmp_path_factory.mktemp("run") / "run"
        tables.append(feature_tables(record(directory, [factor * x for x in FALLING], rows)))
    for name in ("loss_fall", "loss_rise", "loss_spread"):
        a, b = (t["run"].columns[name].value for t in tables)
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9, err_msg=name)
    a, b = (t["component"].columns["gradient_to_start"].value for t in tables)
    np.testing.assert_allclose(a, b, rtol=1e-6)
