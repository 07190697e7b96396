"""Results of the ablation in words and tables, from results that are made up."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import ablation, ablation_document
from diagnoser.benchmark.contrasts import MARGINS, Contrast
from diagnoser.benchmark.scoring import Figure


def contrasts(helping: tuple[str, ...] = ()) -> dict[str, Contrast]:
    return {
        name: Contrast(Figure(name, 0.125, 0.0625, 0.25, 40, 0.0005), 0.0004, name in helping)
        for name in MARGINS
    }


def result(helping: tuple[str, ...] = ()) -> dict[str, Any]:
    """As the script writes it."""
    figures = [Figure("auroc", 0.75, 0.5, 0.875, 60), Figure("recall", 0.5, 0.25, 0.75, 40)]
    by_prefix = {"0.25": figures, "1.0": figures}
    pairs = {"LGAH - LGA": contrasts(), "LGH - LG": {}, "figures": by_prefix}
    found = {
        "runs": {"HC1": 15, "HC3": 5, "faulty": 40},
        "families": dict.fromkeys(ablation.CONFIGURATIONS, by_prefix),
        "primary": contrasts(helping),
        "secondary": contrasts(),
        "prediction": Figure("interaction", 0.125, -0.0625, 0.25, 60),
        "permuted": contrasts(),
        "splits": {
            "operators never learned from": pairs,
            ablation.IN_TURN: {"LGAH - LGA": contrasts(), "figures": by_prefix},
        },
        "claims": {"a trace estimate is negative": figures[0], ablation.RAW: None},
        "partners": {
            "asked": 9, "n": 4, "coupling": [0.5, 0.25, 0.75], "order": [0.25, 0.0, 0.5],
            "chance": 0.125,
        },
        "leaks": {"set-up": Figure("auroc", 0.5, 0.25, 0.75, 60), "labels at random": None},
        "cost": {"training": 2.5, "measuring": float("nan")},
    }  # fmt: skip
    return json.loads(json.dumps(ablation.plain(found)))


def test_without_a_result_every_block_says_so(tmp_path):
    make = ablation_document.block(ablation_document.outcome, tmp_path / "none.json")
    assert make() == ablation_document.NOT_YET


@pytest.mark.parametrize("name", ablation_document.PARTS)
def test_a_result_gives_every_block_and_no_table_has_a_gap(name, tmp_path):
    path = tmp_path / "ablation.json"
    path.write_text(json.dumps(result()))
    made = ablation_document.block(ablation_document.PARTS[name], path)()
    rows = [line for line in made.splitlines() if line.startswith("|")]
    assert made and "nan" not in made
    assert len({row.count("|") for row in rows}) <= 1


@pytest.mark.parametrize("name", ["auroc", "macro_f1", "component_top_1"])
def test_a_benefit_in_any_of_three_keeps_curvature_in_the_default(name):
    said = ablation_document.outcome(result((name,)))
    assert said.count("curvature helps") == 1 and said.count("no benefit found") == 3
    assert "stays in the default budget" in said


@pytest.mark.parametrize("helping", [(), ("lead",)])
def test_without_a_benefit_in_those_three_curvature_is_a_second_stage(helping):
    said = ablation_document.outcome(result(helping))
    assert "second stage" in said and "stays in the default budget" not in said
    assert "40 faulty runs and 20 healthy ones (15 of HC1, 5 of HC3)" in said
    assert "+0.125 [+0.062, +0.250], p < 0.001 (Holm)" in said


def test_an_interval_that_holds_zero_confirms_no_prediction():
    found = result()
    assert "was not confirmed" in ablation_document.predicted(found)
    found["prediction"]["low"] = 0.01
    assert "The prediction held" in ablation_document.predicted(found)


def test_a_control_whose_interval_misses_a_half_is_shown_as_a_leak():
    found = result()
    assert found["leaks"]["labels at random"] is None
    assert "| set-up | 0.500 [0.250, 0.750] | yes |" in ablation_document.leaks(found)
    found["leaks"]["set-up"]["low"] = 0.6
    assert "| no |" in ablation_document.leaks(found)
