"""The overhead benchmark: its tiers measure what they are called, and its quick form runs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks import monitor_overhead
from benchmarks.monitor_overhead import (
    BINS,
    HISTOGRAMS,
    TIERS,
    distilbert,
    first_with_histograms,
    main,
    misses,
    table,
)
from benchmarks.overhead import seconds, tiny


def plans(name: str) -> list[Any]:
    """Of 3000 steps of 50 ms, with samples of 0.2 s and other turns of 2 s."""
    schedule, found = TIERS[name](), []
    for step in range(3000):
        schedule.steps, schedule.training_s = step, 0.05 * step
        plan = schedule.plan(step)
        found.append(plan)
        if plan.follow:
            cost = 2.0 if plan.spectrum or plan.interaction else 0.2
            schedule.account(plan, cost)
            schedule.learn(plan, cost)
    return found


@pytest.mark.parametrize(
    ("name", "measured"),
    [
        ("always on", set()),
        ("statistics", {"statistics"}),
        ("curvature", {"statistics", "curvature"}),
        ("after an alarm", {"statistics", "curvature", "spectrum", "interaction"}),
    ],
)
def test_a_tier_measures_what_it_is_called(name: str, measured: set[str]) -> None:
    kinds = ("statistics", "curvature", "spectrum", "interaction")
    found = plans(name)
    assert {kind for kind in kinds if any(getattr(plan, kind) for plan in found)} == measured
    bought = [plan for plan in found if plan.statistics and not plan.guaranteed]
    assert (len(bought) > 10) == bool(measured)


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_histograms_count_every_element_and_change_nothing(name: str) -> None:
    make = first_with_histograms(tiny, HISTOGRAMS[name])
    loops = []
    for _ in range(2):
        torch.manual_seed(0)
        loops.append(make())
    batch = next(loops[0].batches)
    for _ in range(3):
        for loop in loops:
            seconds(loop, batch)
    first, second = (loop.model for loop in loops)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    log = loops[0].optimizer.log
    assert [len(counts) for counts in log] == [BINS] * 4
    assert [sum(counts) for counts in log] == [p.numel() for p in first.parameters()]
    assert not hasattr(loops[1].optimizer, "log")


def test_the_distilbert_is_of_the_size_that_is_said() -> None:
    loop = distilbert()
    tokens, labels = next(loop.batches)
    assert tokens.shape == (16, 64)
    assert loop.model.config.dim == 128 and len(loop.model.distilbert.transformer.layer) == 4
    assert F.cross_entropy(loop.model(tokens), labels).isfinite()


def figures(
    plain_ms: float, default: float, always: float, us: float, count: int, memory: float = 2.5
) -> Any:
    def tier(ratio: float) -> dict[str, Any]:
        return {
            "ratio_median": ratio,
            "us_a_step_unguaranteed_median": us,
            "curvature_measurements_in_200_steps": count,
        }

    return {
        "plain_ms_a_step": plain_ms,
        "tiers": {"always on": tier(always), "after an alarm": tier(default)},
        "memory": {"ratio": 1.0, "everything_ratio": memory},
        "others": {"control": {"ratio_median": 1.0}},
    }


def test_misses_names_the_targets_that_are_missed() -> None:
    assert misses({"a": figures(40.0, 1.125, 1.03, 900.0, 8)}) == []
    assert misses({"a": figures(8.0, 1.5, 1.1, 150.0, 9)}) == []
    large, small = figures(40.0, 1.2, 1.04, 0.0, 7), figures(8.0, 1.0, 1.0, 180.0, 8, 2.6)
    assert misses({"a": large, "b": small}) == [
        "a: curvature measurements is 7, not 8",
        "a: default budget, ratio is 1.2, not 1.125",
        "a: always on, ratio is 1.04, not 1.03",
        "b: peak memory is 2.6, not 2.5",
        "b: us a step besides the guaranteed is 180, not 150",
    ]
    nothing_known = figures(40.0, float("nan"), 1.0, 0.0, 8)
    assert misses({"a": nothing_known}) == ["a: default budget, ratio is nan, not 1.125"]


def test_the_quick_form_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(monitor_overhead, "LOOPS", {"tiny": lambda: replace(tiny(), steps=12)})
    out = tmp_path / "found.json"
    try:
        main(["--quick", "--out", str(out), "tiny"])
    finally:
        torch.set_num_threads(threads)
    found = json.loads(out.read_text())
    row = found["models"]["tiny"]
    assert set(row["tiers"]) == set(TIERS)
    if sys.platform == "linux":
        assert 0 < row["memory"]["plain_mb"] < row["memory"]["watched_mb"]
        assert row["memory"]["everything_ratio"] > 1.0
    assert row["tiers"]["always on"]["samples"] == 0
    assert row["tiers"]["statistics"]["curvature_measurements_in_200_steps"] == 0
    assert (
        row["tiers"]["after an alarm"]["curvature_measurements_in_200_steps"] == 4
    )  # 0, 5, 10 and 20
    assert found["published"]["training time, every step"] == {"HessTrace": 1.57, "HessMaxEV": 7.1}
    assert capsys.readouterr().out.strip() == table(found["models"])


def test_an_unknown_model_is_refused_by_name(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["hann"])
    assert "hann: no such model; there are han, distilbert, transformer" in capsys.readouterr().err
