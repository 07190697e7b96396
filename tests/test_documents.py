"""README against the committed results, and the results against what they must show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import first_slice, monitor_overhead, tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def summary() -> dict[str, Any]:
    lines = json.loads((RESULTS / "first_slice.json").read_text(encoding="utf-8"))["summary"]
    return {line["runs"]: line for line in lines}


@pytest.mark.parametrize("path", tables.DOCUMENTS, ids=lambda path: path.name)
def test_documents_show_the_committed_results_and_nothing_else(path: Path) -> None:
    text, blocks = path.read_text(encoding="utf-8"), tables.DOCUMENTS[path]
    for name in blocks:
        assert f"<!-- {name} -->" in text
    assert tables.rendered(text, blocks) == text


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_summary_follows_from_the_rows() -> None:
    result = json.loads((RESULTS / "first_slice.json").read_text(encoding="utf-8"))
    rows = [first_slice.Row(**row) for row in result["rows"]]
    assert first_slice.summary(rows) == result["summary"]
    healthy = {(r.subject, r.seed) for r in rows if r.fault == first_slice.HEALTHY}
    assert healthy == {(s, seed) for s in ("han", "transformer") for seed in range(20)}
    faulty = {(r.subject, r.fault, r.seed) for r in rows if r.fault != first_slice.HEALTHY}
    wanted = {
        (t.subject, t.fault, seed)
        for t in first_slice.truths()
        for seed in range(5)
        if t.fault != first_slice.HEALTHY
    }
    assert faulty == wanted


def test_healthy_runs_are_silent_and_faults_are_found() -> None:
    found = summary()
    assert found["healthy"]["alarmed"]["of"] == 40
    assert found["healthy"]["alarmed"]["count"] <= 1
    faults = found["all faults"]
    for measure, share in (("faulty", 0.90), ("cause_in_top_3", 0.85), ("component_first", 0.80)):
        assert faults[measure]["count"] >= share * faults[measure]["of"], measure


def test_every_fault_does_harm_or_is_a_defect() -> None:
    harm = json.loads((RESULTS / "subject_harm.json").read_text(encoding="utf-8"))
    defects = {"frozen_block", "late_component"}
    for truth in first_slice.truths():
        if truth.fault != first_slice.HEALTHY and truth.fault not in defects:
            assert harm[truth.subject]["faults"][truth.fault]["harm"] == "proven"


@pytest.mark.parametrize("loop", ["han", "transformer", "tiny"])
def test_watching_keeps_its_budget(loop: str) -> None:
    row = json.loads((RESULTS / "overhead.json").read_text(encoding="utf-8"))[loop]
    assert row["curvature_measurements"] >= 8
    if row["plain_ms_a_step"] >= 30:
        assert row["ratio_median"] <= 1.125
    else:
        assert row["us_a_step_unguaranteed_median"] <= 150


def result(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def test_traces_are_several_times_cheaper_than_pyhessians() -> None:
    sections = result("curvature_cost.json")["sections"]
    models = ("tiny_transformer", "tiny_han", "han", "distilbert")
    assert set(sections) == {f"{model}/{samples}" for model in models for samples in (32, 256)}
    for name, section in sections.items():
        every = section["by_group"]["all"]
        # As a measurement takes them: after both ends; and with the price of these.
        if name.endswith("/256"):
            assert every["after_ends"]["fixed"] >= 3.0, name
        assert every["spectrum_ratio"] >= 1.0, name


def test_couplings_are_within_five_percent_at_eight_columns() -> None:
    for name, section in result("curvature_cost.json")["sections"].items():
        row = section["coupling"]
        assert row["columns_a_component"] == 8
        assert row["relative_std_error"] <= 0.05, name
        assert row["relative_rms_error"] is None or row["relative_rms_error"] <= 0.05, name


def test_a_large_model_is_measured_within_six_gibibytes() -> None:
    assert result("curvature_cost.json")["distilbert_base"]["peak_mb"] <= 6 * 1024


def test_misses_of_the_monitor_are_those_of_its_figures() -> None:
    found = result("monitor_overhead.json")
    assert set(found["models"]) == set(monitor_overhead.LOOPS)
    assert monitor_overhead.misses(found["models"]) == found["missed"]
    for row in found["models"].values():
        assert row["memory"]["ratio"] <= 2.5
        assert row["tiers"]["after an alarm"]["curvature_measurements_in_200_steps"] >= 8
