"""Signs and intervals of block traces: the benchmark on fewer trials, and its published figures."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.trace_coverage import (
    BLOCK,
    COMPONENTS,
    PROBE_SETS,
    RESULTS,
    SETTINGS,
    TRIALS,
    RecordedForms,
    RecordedHessian,
    Setting,
    Tally,
    effort,
    misses,
    recorded_blocks,
    sample_blocks,
    stops,
    texts,
    trained,
    trials,
)
from diagnoser.curvature.block_trace import block_trace
from diagnoser.curvature.decision import Question
from diagnoser.curvature.hessian import Hessian
from diagnoser.curvature.per_sample import SampleForms
from diagnoser.types import Estimate

KINDS = {component.kind: component for component in COMPONENTS}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_blocks(samples: int, size: int) -> Tensor:
    blocks = torch.randn(samples, size, size, generator=generator())
    return blocks + blocks.mT + 0.5 * torch.eye(size)


def trace_of(
    blocks: Tensor, aim: tuple[Question, int], seed: int = 0, *, forms: bool = False
) -> Estimate:
    operator = RecordedHessian(blocks)
    of_samples = cast(SampleForms, RecordedForms(blocks, operator.taken))
    return block_trace(
        cast(Hessian, operator),
        BLOCK,
        generator(seed),
        forms=[of_samples] if forms else None,
        question=aim[0],
        max_products=aim[1],
    )


# The figures that are published


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_the_published_figures_are_of_every_kind_setting_and_size(report: dict[str, Any]) -> None:
    assert report["trials"] == TRIALS
    assert list(report["kinds"]) == list(KINDS)
    for sizes in report["kinds"].values():
        assert list(sizes) == [str(samples) for samples in PROBE_SETS]
        for figures in sizes.values():
            assert list(figures["settings"]) == [setting.name for setting in SETTINGS]
            assert all(s["trials"] == TRIALS for s in figures["settings"].values())


@pytest.mark.parametrize("samples", PROBE_SETS)
def test_published_signs_are_right_and_mostly_decided(report: dict[str, Any], samples: int) -> None:
    found = misses(report["kinds"], samples)
    assert found["wrong"] == []
    assert found["undecided_clear"] == []
    assert report["misses"][str(samples)] == found


def test_published_intervals_miss_the_aim_no_more_often_than_is_said(
    report: dict[str, Any],
) -> None:
    # The aim, 93 to 97 % of the trials in every cell, is missed: by up to 0.3 % in six of 198 cells
    # with 256 samples, by more with 32, of which few may be far larger than the rest.
    found = {samples: misses(report["kinds"], samples)["coverage"] for samples in PROBE_SETS}
    assert len(found[256]) == 6
    assert all(0.97 < float(text.split()[-1]) <= 0.973 for text in found[256])
    assert len(found[32]) == 20


def test_the_published_rule_of_pyhessian_stops_at_once_below_zero(report: dict[str, Any]) -> None:
    for sizes in report["kinds"].values():
        for figures in sizes.values():
            rule, ours = figures["pyhessian_rule"], figures["settings"]["chosen, sign"]
            if figures["negative"]["share"] < 0.01:
                assert rule["published, negated"]["products"] < 2.5
            assert ours["wrong"]["share"] <= rule["repaired, negated"]["wrong"]["share"] + 0.005


# The same on fewer trials


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # said by torch.func
@pytest.mark.parametrize("kind", ["head", "attention_context"])
def test_signs_and_intervals_hold_on_fewer_trials(kind: str) -> None:
    names = ("chosen, sign", "chosen, value", "per sample, 2 rounds", "deflated, 8 products")
    settings = [setting for setting in SETTINGS if setting.name in names]
    blocks = recorded_blocks(KINDS[kind], samples=512)
    found = trials(blocks, samples=128, count=200, settings=settings, seed=1)
    for name, figures in found["settings"].items():
        assert figures["wrong"]["share"] <= 0.02, name
        for truth in ("covers_probe_set", "covers_population"):
            if figures[truth]["n"]:
                assert 0.90 <= figures[truth]["share"] <= 0.995, (name, truth)
    assert found["settings"]["chosen, sign"]["undecided_clear"]["share"] <= 0.15


def test_errors_that_are_too_small_would_be_noticed() -> None:
    blocks = random_blocks(8, 40)
    mean = blocks.mean(0)
    honest, bold = Tally(), Tally()
    for seed in range(200):
        found = trace_of(blocks, effort(8), seed)
        assert found.std_error is not None
        less = Estimate(found.value, 0.6 * found.std_error)
        for tally, estimate in ((honest, found), (bold, less)):
            truth = float(mean.trace())
            tally.add(estimate, (truth, truth), float(mean.norm()), Counter())
    assert honest.figures()["covers_probe_set"]["share"] > 0.92
    assert bold.figures()["covers_probe_set"]["share"] < 0.85


def test_a_wrong_sign_and_an_undecided_one_are_told_apart() -> None:
    tally = Tally()
    for value, error in ((1.0, 0.1), (-1.0, 0.1), (-1.0, 1.0)):
        tally.add(Estimate(value, error), (1.0, 1.0), 1.0, Counter(products=2))
    figures = tally.figures()
    assert (tally.wrong, tally.undecided, tally.undecided_clear) == (1, 1, 1)
    assert figures["covers_probe_set"]["hits"] == 1
    assert figures["covers_population"]["n"] == 0
    assert figures["products"] == 2.0


# What the errors rest on


def test_the_error_of_products_is_that_of_the_elements_off_the_diagonal() -> None:
    blocks = random_blocks(1, 50)
    off = blocks[0] - blocks[0].diagonal().diag()
    expected = math.sqrt(2.0 / 8) * float(off.norm())
    errors = torch.tensor([trace_of(blocks, effort(8), seed).std_error for seed in range(40)])
    assert float(errors.mean()) == pytest.approx(expected, rel=0.12)  # widened by a few per cent
    assert float(errors.std() / errors.mean()) < 0.1  # eight values alone: 0.25


def test_a_diagonal_block_has_no_error() -> None:
    diagonal = torch.arange(40.0).diag().unsqueeze(0)
    found = trace_of(diagonal, effort(8))
    assert found.value == pytest.approx(float(diagonal.sum()))
    assert found.std_error == pytest.approx(0.0, abs=1e-3)


def test_an_exact_trace_knows_the_error_of_the_batch() -> None:
    blocks = random_blocks(64, 6)
    found = trace_of(blocks, (Question.within(0.0), 32), forms=True)
    traces = blocks.diagonal(dim1=1, dim2=2).sum(1)
    assert found.method == "exact"
    assert found.std_error == 0.0
    assert found.value == pytest.approx(float(traces.mean()), rel=1e-5)
    spread = float(traces.std()) / math.sqrt(64)
    assert found.batch_std_error == pytest.approx(spread, rel=0.05)
    assert trace_of(blocks, (Question.within(0.0), 32)).batch_std_error is None


def test_products_on_one_chunk_get_the_error_of_the_batch_from_the_pilot() -> None:
    cancelling = torch.tensor([1.0, -1.0]).repeat(32)[:, None, None] * random_blocks(1, 40)
    own = torch.linspace(-10, 10, 64)
    blocks = cancelling + random_blocks(1, 40) / 40 + own[:, None, None] * torch.eye(40)
    found = trace_of(blocks, (Question.within(0.02), 32), forms=True)
    assert found.method == "hutchinson"
    assert found.batch_std_error == pytest.approx(40 * float(own.std()) / 8, rel=0.2)


def test_one_sample_says_nothing_of_the_batch() -> None:
    blocks = random_blocks(1, 40)
    found = trace_of(blocks, effort(8), forms=True)
    assert found.batch_std_error is None
    assert found.std_error is not None and found.std_error > 0


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("forms", [True, False])
@pytest.mark.parametrize("size", [3, 4, 5, 40])
def test_few_products_are_enough_to_return_something(size: int, most: int, forms: bool) -> None:
    found = trace_of(random_blocks(8, size), effort(most), forms=forms)
    assert math.isfinite(found.value)


# The recorded blocks, and the control


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # said by torch.func
def test_recorded_blocks_are_those_of_autograd() -> None:
    component = KINDS["norm"]
    model, loss = trained(component.model, steps=5)
    assert math.isfinite(loss)
    tokens, labels = texts(generator(), 2)
    blocks = sample_blocks(model, component.parameters, tokens, labels)
    own = dict(model.named_parameters())
    parameters = [own[name] for name in component.parameters]
    for n in range(2):
        loss_of_one = torch.nn.functional.cross_entropy(model(tokens[n, None]), labels[n, None])
        gradient = torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(loss_of_one, parameters, create_graph=True)]
        )
        rows = [
            torch.cat(
                [
                    torch.zeros_like(p).reshape(-1) if r is None else r.reshape(-1)
                    for p, r in zip(
                        parameters,
                        torch.autograd.grad(g, parameters, retain_graph=True, allow_unused=True),
                        strict=True,
                    )
                ]
            )
            for g in gradient
        ]
        assert torch.allclose(torch.stack(rows).float(), blocks[n], atol=1e-6)


def test_the_rule_of_pyhessian_and_its_repair() -> None:
    falling = -np.array([10.0, 1.0, 7.0, 3.0, 5.0])
    assert stops(falling, repaired=False) == 2
    assert stops(falling, repaired=True) == 5
    assert stops(-falling, repaired=False) == stops(-falling, repaired=True) == 5
    assert stops(np.full(9, 4.0), repaired=True) == 2


def test_settings_have_names_of_their_own() -> None:
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS)
    assert all(isinstance(setting, Setting) for setting in SETTINGS)
