"""The committed outcomes: they follow from the runs, and the runs can be made again."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks.benchmark_document import RESTORED, calibrations, harms
from benchmarks.outcomes import BENCH, SIZE, WATCHED, read_runs, scored_items
from diagnoser.benchmark.configuration import catalogue
from diagnoser.benchmark.execute import Resources, execute
from diagnoser.benchmark.harm import Harm, judge
from diagnoser.benchmark.plan import Item, make_plan
from diagnoser.benchmark.results import Store

KNOWN = catalogue()
FLOORS = {name: (s.floor, s.relative) for name, s in KNOWN.subjects.items()}
SUBJECTS_SAMPLED, OF_EACH = 5, 2
PAIRS = 12


@pytest.fixture(scope="module")
def items() -> tuple[Item, ...]:
    return make_plan(KNOWN, SIZE).items


@pytest.fixture(scope="module")
def committed() -> dict[str, Harm]:
    return {harm.hash: harm for harm in harms()}


@pytest.mark.slow
def test_the_runs_are_of_this_code_and_the_verdicts_follow_from_them(items, committed):
    runs = read_runs()
    assert set(runs) == {item.hash for item in items if item.truth}
    again = judge([item.judged() for item in items], runs, FLOORS)
    assert [repr(harm) for harm in again] == [repr(harm) for harm in harms()]
    assert not [harm for harm in committed.values() if harm.harm == "incomplete"]


@pytest.mark.slow
def test_logs_are_kept_of_all_scored_runs_of_a_subject_and_made_by_this_code():
    plan = make_plan(KNOWN, SIZE)
    scored = scored_items(plan, harms(), KNOWN)
    kept = [path for mode in WATCHED for path in (BENCH / mode).glob("*.parquet")]
    assert kept
    for path in kept:
        of = scored[path.stem]
        mode = path.parent.name
        table = pq.read_table(path, columns=["hash", "seed", "status"])
        runs = list(zip(*(table[name].to_pylist() for name in ("hash", "seed")), strict=True))
        assert sorted(runs) == sorted((i.hash, seed) for i in of for seed in i.seeds(mode))
        assert set(table["status"].to_pylist()) == {"ok"}


def test_every_subject_has_mistakes_that_do_harm_and_hardly_any_is_obvious(committed):
    proven = [h for h in committed.values() if h.role == "fault" and h.harm == "proven"]
    assert {h.subject for h in proven} == set(KNOWN.subjects)
    assert sum(h.trivial for h in proven) <= 0.3 * len(proven)
    tested = [h for h in proven if KNOWN.subjects[h.subject].split == "test"]
    assert sum(h.trivial for h in tested) <= 0.3 * len(tested)


def test_hardly_any_outcome_hangs_on_rounding(committed):
    tested = [h for h in committed.values() if h.role in {"fault", "compound", "HC2", "HC3", "HC4"}]
    assert 0 < sum(h.is_at_the_margin for h in tested) <= 0.05 * len(tested)


def test_every_mistake_has_a_remedy_that_gives_the_clean_result_or_none_is_known(committed):
    tried: dict[str, list[bool]] = {}
    for harm in committed.values():
        if harm.role == "remedy":
            tried.setdefault(harm.operator, []).append(harm.harm in RESTORED)
    assert {name for name, good in tried.items() if not any(good)} == set()


def test_clean_runs_are_hardly_ever_proven_harmful():
    found = calibrations()
    assert {c.subject for c in found} == set(KNOWN.subjects)
    assert all(c.kills <= 0.05 * c.splits for c in found)


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ten_configurations_made_from_scratch_have_the_committed_outcome(
    items, committed, tmp_path: Path
):
    drawn = random.Random(0)
    sample: list[Item] = []
    for subject in sorted(drawn.sample(sorted(KNOWN.subjects), SUBJECTS_SAMPLED)):
        own = [
            item
            for item in items
            if item.configuration.subject == subject
            and item.role not in {"clean", "twin", "remedy"}
        ]
        recipe = drawn.choice(sorted({item.configuration.recipe for item in own}))
        sample += drawn.sample([i for i in own if i.configuration.recipe == recipe], OF_EACH)
    twins = {item.clean for item in sample}
    clean = [i for i in items if i.hash in twins and i.role in {"clean", "twin"}]
    wanted = [replace(item, truth=tuple(range(PAIRS))) for item in [*clean, *sample]]
    store, complaints = Store(tmp_path, print), []
    execute(wanted, "truth", store, Resources(jobs=2), complain=complaints.append)
    assert complaints == []
    runs = read_runs()
    other_rounding = False
    for item in wanted:
        # Runs of clean twins beyond the pairs stay: they only say how clean runs spread.
        made = {row["seed"]: row for row in store.rows("truth", item.hash)}
        kept = {row["seed"]: row for row in runs[item.hash]}
        if item.hash in twins:
            other_rounding |= any(row["loss"] != kept[seed]["loss"] for seed, row in made.items())
        runs[item.hash] = [made.get(row["seed"], row) for row in runs[item.hash]]
    again = {h.hash: h for h in judge([i.judged() for i in items], runs, FLOORS)}
    for item in sample:
        made, kept = again[item.hash], committed[item.hash]
        if not other_rounding:
            assert repr(made) == repr(kept), item.configuration
        # Where a processor rounds otherwise numbers may differ, by less than what would matter, and
        # decide only where the gap is all but the margin.
        assert abs(made.gap - kept.gap) <= kept.margin / 2, item.configuration
        if not (other_rounding and kept.is_at_the_margin):
            assert made.harm == kept.harm, item.configuration
        assert made.harm in {kept.harm, "proven", "ambiguous"}, item.configuration
