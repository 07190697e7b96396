"""Splits, noise and leaks: nothing that is scored was learned from, nothing else tells it apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_bench_scores import runs
from test_bench_scoring import CLEAN, HOT, MASKED

from diagnoser.benchmark.dataset import Seen
from diagnoser.benchmark.families import (
    FAMILIES,
    columns_of_components,
    columns_of_runs,
    family_of,
    permuted,
    with_noise,
)
from diagnoser.benchmark.leaks import of_labels_at_random, of_metadata
from diagnoser.benchmark.splits import operators_left_out, severities_left_out, subjects_left_out


def numbered(seen: list[Seen]) -> list[Seen]:
    """The made-up runs with a hash for each subject, operator and severity, as real ones have."""
    names = sorted({(r.truth.subject, r.truth.operators, r.truth.severity) for r in seen})
    number = {name: f"{i:016x}" for i, name in enumerate(names)}

    def own(run: Seen) -> Seen:
        key = (run.truth.subject, run.truth.operators, run.truth.severity)
        return replace(run, truth=replace(run.truth, hash=number[key]))

    return [own(run) for run in seen]


@pytest.fixture(scope="module")
def seen() -> list[Seen]:
    found = runs()
    # A third mistake, and two more severities of the first, on every subject.
    for run in found[:]:
        if run.truth.operators == HOT.operators:
            found += [
                replace(run, truth=replace(run.truth, severity=level)) for level in ("low", "mid")
            ]
            truth = replace(MASKED, operators=("M1",), subject=run.truth.subject)
            found.append(replace(run, truth=replace(truth, track=run.truth.track)))
    return numbered(found)


def test_no_operator_of_a_part_is_learned_from_and_every_one_is_scored_once(seen):
    parts = list(operators_left_out(seen, "dev"))
    scored = [{o for r in part.scored for o in r.truth.operators} for part in parts]
    assert sorted(name for part in scored for name in part) == ["M1", "O1", "O11b"]
    for part, operators in zip(parts, scored, strict=True):
        assert {run.truth.track for run in part.learned} == {"train"}
        assert {run.truth.track for run in part.scored} == {"dev"}
        assert not operators & {o for r in part.learned for o in r.truth.operators}


def test_healthy_runs_are_scored_once_over_all_parts(seen):
    healthy = [r for r in seen if r.truth.track == "dev" and not r.truth.is_faulty]
    for parts in (operators_left_out(seen, "dev"), severities_left_out(seen, "dev")):
        scored = [id(r) for part in parts for r in part.scored if not r.truth.is_faulty]
        assert sorted(scored) == sorted(map(id, healthy))


def test_no_severity_of_a_part_is_learned_from(seen):
    parts = {part.name: part for part in severities_left_out(seen, "dev")}
    assert set(parts) == {"severity low", "severity mid", "severity high"}
    for level in ("low", "mid", "high"):
        part = parts[f"severity {level}"]
        graded = [r for r in part.learned if r.truth.operators == ("O1",)]
        assert graded and level not in {r.truth.severity for r in graded}
        faulty = [r.truth for r in part.scored if r.truth.is_faulty]
        assert faulty and {(t.operators, t.severity) for t in faulty} == {(("O1",), level)}
        # An operator that has one severity is learned from whatever that is.
        assert ("O11b",) in {r.truth.operators for r in part.learned}


def test_subjects_are_left_out_one_by_one_and_no_other_track_is_touched(seen):
    parts = list(subjects_left_out(seen))
    assert [part.name for part in parts] == [f"subject train-{i}" for i in (1, 2, 3)]
    for part in parts:
        (subject,) = {run.truth.subject for run in part.scored}
        assert subject not in {run.truth.subject for run in part.learned}
        assert {run.truth.track for run in (*part.learned, *part.scored)} == {"train"}


# -- noise -----------------------------------------------------------------------------------------


def test_noise_has_the_columns_of_what_it_replaces_no_gaps_and_no_information(seen):
    run_columns = (*columns_of_runs(seen), "pair.coupling_share.highest")  # of another run alone
    component_columns = columns_of_components(seen)
    noisy = with_noise(seen, {"L", "G"}, run_columns, component_columns)
    for before, after in zip(seen, noisy, strict=True):
        was, now = before.look.vectors, after.look.vectors
        assert set(now.run) == set(run_columns)
        for name in run_columns:
            if family_of(name) in "LG":
                assert now.run[name] == was.run[name]
        assert not np.isnan(now.components["trace_z.latest"]).any()
    drawn = np.array([run.look.vectors.run["pair.coupling_share.highest"] for run in noisy])
    assert abs(drawn.mean()) < 0.2 and 0.9 < drawn.std() < 1.1
    faulty = np.array([run.truth.is_faulty for run in noisy])
    assert abs(drawn[faulty].mean() - drawn[~faulty].mean()) < 0.3
    again = with_noise(seen, {"L", "G"}, run_columns, component_columns)
    assert [r.look.vectors.run for r in again] == [r.look.vectors.run for r in noisy]


def test_noise_and_other_runs_are_also_in_what_was_seen_earlier(seen):
    early = [
        replace(run, look=replace(run.look, vectors=replace(v, earlier=(v, v))))
        for run in seen
        for v in [run.look.vectors]
    ]
    columns = columns_of_runs(seen), columns_of_components(seen)
    name = "model_step_sharpness.highest"
    for changed in (with_noise(early, {"L"}, *columns), permuted(early, {"H"})):
        moved = 0
        for before, after in zip(early, changed, strict=True):
            now = after.look.vectors
            assert len(now.earlier) == 2
            for moment in now.earlier:
                assert moment.run["loss_fall.latest"] == before.look.vectors.run["loss_fall.latest"]
                moved += moment.run[name] != before.look.vectors.run[name]
        assert moved > len(seen)


def test_nothing_is_replaced_where_nothing_is_left_out(seen):
    same = with_noise(seen, FAMILIES, columns_of_runs(seen), columns_of_components(seen))
    assert [r.look.vectors.run for r in same] == [r.look.vectors.run for r in seen]


def test_permuted_columns_are_those_of_other_runs_of_the_subject(seen):
    mixed = permuted(seen, {"H"})
    name = "model_step_sharpness.highest"
    moved = 0
    for subject in {run.truth.subject for run in seen}:
        before = [r.look.vectors.run[name] for r in seen if r.truth.subject == subject]
        after = [r.look.vectors.run[name] for r in mixed if r.truth.subject == subject]
        assert sorted(before) == sorted(after)
        moved += sum(a != b for a, b in zip(before, after, strict=True))
    assert moved > len(seen) / 2
    for before, after in zip(seen, mixed, strict=True):
        assert (
            before.look.vectors.run["loss_fall.latest"]
            == after.look.vectors.run["loss_fall.latest"]
        )


# -- leaks -----------------------------------------------------------------------------------------


def sides(seen):
    return ([r for r in seen if r.truth.track == t] for t in ("train", "test"))


def test_how_runs_were_set_up_tells_nothing_unless_it_leaks(seen):
    found = of_metadata(*sides(seen))
    assert found.low <= 0.5 <= found.high
    leaking = [
        replace(run, truth=replace(run.truth, recipe="b" if run.truth.is_faulty else "a"))
        for run in seen
    ]
    assert of_metadata(*sides(leaking)).low > 0.9


def test_seeds_that_only_clean_runs_have_are_no_leak(seen):
    more = [
        replace(run, look=replace(run.look, seed=run.look.seed + 100))
        for run in seen
        if run.truth.operators == CLEAN.operators
    ]
    found = of_metadata(*sides(seen + more))
    assert found.low <= 0.5 <= found.high


def test_labels_at_random_teach_nothing(seen):
    own = [replace(r, truth=replace(r.truth, hash=f"{i:016x}")) for i, r in enumerate(seen)]
    found = of_labels_at_random(*sides(own))
    assert found.low < 0.5 < found.high
    assert found.n == sum(r.truth.track == "test" and r.look.prefix == 1.0 for r in own)
