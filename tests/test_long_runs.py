"""A run that lasts for weeks: log and memory stay bounded, and what is found stays found."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnoser.diagnosis import diagnose, is_grave, judges
from diagnoser.errors import RunLogError
from diagnoser.features import feature_tables
from diagnoser.runlog import LOG_FILE, RANK, Recording, RunLogWriter, Thinned, read_run, thinning
from diagnoser.runlog.recording import COLUMNS
from diagnoser.session import watch
from diagnoser.types import Component, Estimate, Measurement, Part
from tests.test_runlog import contents, rows_of

SMALL = {
    "MOST_ROWS": 2**9,
    "MOST_LOSSES": 2**8,
    "MOST_NOTES": 2**6,
    "LOSSES_AN_OCTAVE": 2**3,
    "LAST_LOSSES": 2**5,
    "WHOLE": 4,
}
NAMES = tuple(f"layers.{i}" for i in range(4))
COMPONENTS = [
    Component(name, "linear", name, i, (Part(f"{name}.weight"),), 100)
    for i, name in enumerate(NAMES)
]


@contextmanager
def bounds(**small: int) -> Iterator[None]:
    with mock.patch.multiple(thinning, **(SMALL | small)):
        yield


def rows_at(step: int, draw: random.Random, names: Sequence[str] = NAMES) -> list[Measurement]:
    return [
        Measurement(step, quantity, name, Estimate(draw.choice((0.0, draw.random(), math.nan))))
        for quantity in ("gradient_norm", "weight_norm")
        for name in names
    ]


def check_size(recording: Recording, series: int, largest: int) -> None:
    """Checks that a recording is within its bounds, however long the run was."""
    rows = len(recording.measurements.step) + len(recording.measured.step)
    # The last, the first and those around beginnings; and seven rows of each series, which may each
    # be of another measurement.
    least = 3 * thinning.MOST_ROWS // thinning.ROOM + 7 * 2 * series
    assert rows <= max(thinning.MOST_ROWS, 2 * least) + largest + 1
    octaves = math.log2(max(int(recording.losses.step.max(initial=1)), 1)) + 2
    least = thinning.LAST_LOSSES + int(thinning.LOSSES_AN_OCTAVE * octaves)
    assert len(recording.losses.step) <= max(thinning.MOST_LOSSES, 2 * least) + 64
    assert len(recording.facts) + len(recording.events) <= thinning.MOST_NOTES


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_a_log_of_any_length_is_bounded_and_a_part_of_what_was_measured(
    data: st.DataObject,
) -> None:
    draw = random.Random(data.draw(st.integers(0, 2**32)))
    every = data.draw(st.integers(1, 9))
    length = data.draw(st.integers(0, 1500))
    noted = data.draw(st.floats(0.0, 0.3))
    rows: list[Measurement] = []
    losses, measured, facts = [], [], []
    with TemporaryDirectory() as scratch, bounds(), RunLogWriter(Path(scratch), "run", {}) as log:
        log.components(0, COMPONENTS)
        log.beginnings = lambda _: [draw.randrange(length)]
        for step in range(length):
            losses.append((step, draw.random(), draw.random()))
            log.loss(*losses[-1])
            if step % every == 0:
                own = rows_at(step, draw, NAMES[: draw.randrange(1, 5)])
                rows += own
                measured.append(step)
                log.measurement(step, own, 0.5)
            if draw.random() < noted:
                facts.append(draw.choice((0.0, draw.random())))
                log.fact(step, "fact", "model", facts[-1], {})
                log.event(step, "kind", draw.choice(("again", str(step))), {})
            if draw.random() < 0.01:
                check_size(log.recording(), 8, 8)
        recording = log.recording()
        check_size(recording, 8, 8)
        assert contents(recording) == contents(read_run(Path(scratch)))  # law 6
        assert log.failure is None

    gone = recording.thinned
    assert (len(recording.losses.step) + gone.losses, recording.losses_seen) == (length, length)
    assert recording.measurements_made == len(measured)
    assert len(recording.measurements.step) + gone.rows == len(rows)
    total = float(recording.measured.value.sum()) + gone.seconds
    assert total == pytest.approx(0.5 * len(measured))
    assert recording.components == tuple(COMPONENTS)
    # All that stays was measured, and stands in its order.
    curves = (recording.losses.step, recording.losses.value, recording.accuracies.value)
    assert is_part(list(zip(*map(np.ndarray.tolist, curves), strict=True)), losses)
    assert is_part(recording.measured.step.tolist(), measured)
    assert is_part([said(row) for row in rows_of(recording)], [said(row) for row in rows])
    assert is_part([fact.value for fact in recording.facts], facts)
    # What comes first and last is there.
    assert recording.losses.step[-1:].tolist() == [step for step, _, _ in losses[-1:]]
    for series in {(row.quantity, row.component) for row in rows}:
        known = [(r.step, r.estimate.value) for r in rows if (r.quantity, r.component) == series]
        known = [pair for pair in known if not math.isnan(pair[1])]
        kept = recording.series(*series)
        kept = [
            p for p in zip(kept.step.tolist(), kept.value.tolist(), strict=True) if p[1] == p[1]
        ]
        assert (kept[:3], kept[-3:]) == (known[:3], known[-3:])
        assert [p for p in kept if p[1] != 0][:1] == [p for p in known if p[1] != 0][:1]


def said(row: Measurement) -> str:
    return f"{row.step} {row.quantity} {row.component} {row.estimate.value!r}"


def is_part(some: list[Any], whole: list[Any]) -> bool:
    """Whether ``some`` are of ``whole``, in its order."""
    rest = iter(whole)
    return all(item in rest for item in some)


def test_a_shorter_log_is_left_as_it_is(tmp_path: Path) -> None:
    draw = random.Random(0)
    with RunLogWriter(tmp_path / "one", "run", {}) as one:
        lines = [*write_some(one, draw)]
    with (
        bounds(MOST_ROWS=one_less(lines), MOST_LOSSES=100),
        RunLogWriter(tmp_path / "two", "run", {}) as two,
    ):
        assert [*write_some(two, random.Random(0))] == lines
    assert (tmp_path / "one" / LOG_FILE).read_bytes() == (tmp_path / "two" / LOG_FILE).read_bytes()
    assert two.recording().thinned == Thinned()


def one_less(rows: Sequence[int]) -> int:
    """The bound that the rows, and one for each measurement, just do not exceed."""
    return sum(rows) + len(rows)


def write_some(log: RunLogWriter, draw: random.Random) -> Iterator[int]:
    for step in range(100):
        log.loss(step, draw.random())
        rows = rows_at(step, draw)
        log.measurement(step, rows, 0.1)
        yield len(rows)


# -- what is found stays found ---------------------------------------------------------------------

LENGTH = 6_000  # steps, of which every tenth is measured
COMPONENT = {
    "gradient_norm": 0.1,
    "update_norm": 0.1,
    "learning_rate": 0.01,
    "moment_ratio": 1.0,
    "trainable": 1.0,
    "optimized": 1.0,
    "reached": 1.0,
}
RUN = {"optimizers": 1.0, "carried_gradients": 0.0, "classes": 10.0}
UNREACHED = {"gradient_norm": 0.0, "update_norm": 0.0, "reached": 0.0}
IN_THE_MIDDLE = range(LENGTH // 2, LENGTH // 2 + 60)
# What is otherwise, when, and the rule that says so.
FAULTS = {
    "healthy": ({}, range(0), None),
    "a gradient is left": ({"carried_gradients": 1.0}, IN_THE_MIDDLE, "missing-zero-grad"),
    "rates are negative": ({"learning_rate": -0.01}, range(3000, 3001), "learning-rate-negative"),
    "steps are too long": ({"update_norm": 1.0}, IN_THE_MIDDLE, "second-average-too-short"),
    "the loss climbs back": ({"loss": 3.0}, range(LENGTH // 2, LENGTH), "loss-climbs-back"),
    "the loss was high": ({"loss": 4.0}, range(2000, 2400), "loss-climbs-back"),
    "a loss is not a number": ({"loss": math.nan}, range(2345, 2346), "non-finite-loss"),
    "a component is never reached": (UNREACHED, range(LENGTH), "never-reached"),
    "it is reached once": (UNREACHED, (*range(30), *range(31, LENGTH)), None),
}
NOISE = np.random.default_rng(1).normal(1.0, 0.03, (LENGTH, 2))


def record(directory: Path, fault: str) -> Recording:
    """Records a run that is as it should be but for one fault."""
    wrong, when, _ = FAULTS[fault]
    always = set(when)
    rules = judges(None, "off")[0]
    with RunLogWriter(directory, "run", {}) as log:
        log.beginnings = lambda seen: (
            evidence.steps[0] for f in diagnose(seen, rules).findings for evidence in f.evidence
        )
        log.components(0, COMPONENTS[:3])
        for step in range(LENGTH):
            here = wrong if step in always else {}
            log.loss(step, here.get("loss", 0.2 + 2.1 / (1 + step / 50)) * NOISE[step, 0])
            if step % 10 == 0:
                values = {("model", name): value for name, value in RUN.items()}
                values |= {(c, name): v for c in NAMES[:3] for name, v in COMPONENT.items()}
                values[NAMES[1], "gradient_norm"] *= NOISE[step, 1]
                places = ("model", NAMES[1], *(NAMES if fault.startswith("rates") else ()))
                values |= {k: here[k[1]] for k in values if k[1] in here and k[0] in places}
                log.measurement(
                    step,
                    [Measurement(step, q, c, Estimate(v, 0.0)) for (c, q), v in values.items()],
                    0.01,
                )
        log.end(0, None)
    return read_run(directory)


def grave(recording: Recording) -> dict[tuple[str, str], int]:
    found = diagnose(recording, judges(None, "off")[0]).findings
    return {(f.source, f.component): f.since_step for f in found if is_grave(f.severity)}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_found_in_a_long_run_is_found_in_its_thinned_log(
    tmp_path: Path, fault: str
) -> None:
    expected = grave(record(tmp_path / "whole", fault))
    rule = FAULTS[fault][2]
    bound = {"MOST_ROWS": 2**12, "MOST_LOSSES": 2**11, "LAST_LOSSES": 2**8, "WHOLE": 2}
    with bounds(**bound, LOSSES_AN_OCTAVE=2**7):
        thinned = record(tmp_path / "part", fault)
        found = grave(thinned)
    own = {key: since for key, since in expected.items() if key[0] == f"rule:{rule}"}
    assert bool(own) == (rule is not None)
    for key, since in own.items():
        assert abs(found[key] - since) <= LENGTH // 100
    assert found.keys() <= expected.keys()
    assert bool(found) == bool(rule)
    assert thinned.thinned.measurements > 400
    assert thinned.thinned.losses > 4000


def test_parts_of_a_window_count_alike_however_dense_they_are(tmp_path: Path) -> None:
    """Of the last losses none is gone: where they are others, windows must not follow them."""
    length, jump = 100_000, 99_000
    with bounds(LOSSES_AN_OCTAVE=2**8), RunLogWriter(tmp_path, "run", {}) as log:
        for step in range(length):
            level = 1.0 if step < jump else 3.0
            log.loss(step, level + 1e-3 * (step % 7), 0.2 if step < jump else 0.8)
            if step % 1000 == 250 or step == length - 1:
                log.measurement(step, [Measurement(step, "optimizers", "model", Estimate(1.0))], 0)
        recording = log.recording()
        columns = feature_tables(recording)["run"].columns
    assert recording.losses.value[recording.losses.step >= length * 0.9].mean() > 1.5
    assert columns["loss_rise"].value[0, -1] == pytest.approx(0.2, abs=0.1)  # a tenth is 3, not 1
    assert columns["accuracy"].value[0, -1] == pytest.approx(0.26, abs=0.03)
    assert columns["accuracy_best"].value[0, -1] == pytest.approx(0.32, abs=0.06)  # of a twentieth
    # What is of neighbours is known where they are there, and is not where they are gone.
    persistence = columns["loss_persistence"].value[0]
    assert np.isnan(persistence[[0, 1, -1]]).tolist() == [False, True, True]


def test_a_log_says_that_it_was_thinned(tmp_path: Path) -> None:
    with bounds(), RunLogWriter(tmp_path, "run", {}) as log:
        log.components(0, COMPONENTS)
        for step in range(2000):
            log.loss(step, 1.0)
            log.measurement(step, rows_at(step, random.Random(step)), 0.25)
    recording = read_run(tmp_path)
    diagnosis = diagnose(recording, ())
    (said,) = (entry for entry in diagnosis.unknown if entry.rule == "log")
    kept = len(recording.measured.step)
    assert f"of a long run it keeps {kept} of 2,000 measurements" in said.reason
    assert (diagnosis.cost.measurements, diagnosis.cost.monitoring_s) == (2000, 500.0)
    assert "in 2000 measurements of 2000 steps" in diagnosis.reason


def test_a_long_training_is_watched_within_bounds_and_what_was_found_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    forgets = range(87, 97)  # to clear the gradients
    most = 0
    with (
        bounds(MOST_ROWS=2**11, AROUND=(2, 4), WHOLE=3),
        watch(model, optimizer, out=tmp_path, every=4, classifier="off", verbose=False) as watched,
    ):
        for step in range(320):
            if step not in forgets:
                optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if step % 50 == 0:
                rows = watched.log.measurements.step
                most = max(most, len(rows))
        diagnosis = watched.diagnose()
        found = {finding.source: finding.since_step for finding in diagnosis.findings}
    assert most <= thinning.MOST_ROWS
    assert watched.log.thinned.measurements > 20
    assert found["rule:missing-zero-grad"] in forgets
    assert contents(read_run(tmp_path)) == contents(watched.log)
    assert not list(tmp_path.glob("*.part"))


# -- whatever happens while it is thinned ----------------------------------------------------------


def write_on_and_on(directory: Path, told: int) -> None:
    """Writes measurements until it is killed, and tells of each that was written."""
    draw = random.Random(0)
    log = RunLogWriter(directory, "run", {})
    for step in range(10**9):
        log.loss(step, 1.0)
        log.measurement(step, rows_at(step, draw), 0.1)
        os.write(told, b".")


def killed_while_writing(directory: Path, wait: float) -> int:
    """Kills a writer after some seconds; returns how many measurements it had written."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write_on_and_on(directory, write)
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as told:
        count = len(told.read(1))
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return count + len(told.read())


@pytest.mark.slow
def test_a_process_killed_while_it_thins_loses_nothing(tmp_path: Path) -> None:
    waits = random.Random(0)
    thinned = half_way = 0
    with bounds(MOST_ROWS=2**9):  # a log is thinned after thirty measurements, and is then written
        for i in range(100):
            directory = tmp_path / str(i)
            written = killed_while_writing(directory, waits.uniform(0.0, 0.2))
            recording = read_run(directory)
            assert written <= recording.measurements_made <= written + 1
            assert recording.measured.step[-1] >= written - 1
            assert recording.losses_seen >= written
            assert recording.damaged_lines == 0
            thinned += recording.thinned.measurements > 0
            half_way += (directory / f"{LOG_FILE}.part").exists()
    assert thinned > 50
    assert half_way > 5


@pytest.mark.parametrize("name", ["fsync", "rename", "open"])
def test_a_disk_that_takes_no_second_file_keeps_the_first(tmp_path: Path, name: str) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, os.strerror(28))

    place = {"fsync": "os.fsync", "rename": "pathlib.Path.replace", "open": "pathlib.Path.open"}
    draw = random.Random(0)
    with bounds(), RunLogWriter(tmp_path, "run", {}) as log:
        with mock.patch(place[name], full):
            for step in range(100):
                log.measurement(step, rows_at(step, draw), 0.1)
        assert log.failure is not None and "No space left on device" in log.failure
        assert log.failure.count("\n") == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == [LOG_FILE]
        assert log.recording().thinned.measurements > 0  # memory is bounded all the same
        assert read_run(tmp_path).measured.step.tolist() == list(range(100))
        for step in range(100, 200):  # the disk takes it again
            log.measurement(step, rows_at(step, draw), 0.1)
        assert contents(log.recording()) == contents(read_run(tmp_path))


def test_what_a_full_disk_kept_out_comes_in_when_the_log_is_written_anew(tmp_path: Path) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, os.strerror(28))

    draw = random.Random(0)
    with bounds(), RunLogWriter(tmp_path, "run", {}) as log:
        with (
            mock.patch("os.write", full),
            mock.patch("diagnoser.runlog.writer.UNWRITTEN_BYTES", 1000),
        ):
            for step in range(20):
                log.measurement(step, rows_at(step, draw), 0.1)
        assert log.lost_records > 0
        for step in range(20, 100):
            log.measurement(step, rows_at(step, draw), 0.1)
        log.end(0, None)
        assert contents(log.recording()) == contents(read_run(tmp_path))
    assert read_run(tmp_path).measurements_made == 100
    assert log.recording().ending is not None and log.recording().ending.lost_records == 0


def test_a_failure_to_say_what_began_when_is_an_event(tmp_path: Path) -> None:
    def fails(_: Recording) -> Iterator[int]:
        raise KeyError("no such rule")

    with bounds(), RunLogWriter(tmp_path, "run", {}) as log:
        log.beginnings = fails
        for step in range(100):
            log.measurement(step, rows_at(step, random.Random(step)), 0.1)
    recording = read_run(tmp_path)
    assert recording.thinned.measurements > 0
    assert "no such rule" in recording.events[0].message


def test_branches_of_a_thinned_log_go_their_own_way(tmp_path: Path) -> None:
    draw = random.Random(0)
    with bounds(), RunLogWriter(tmp_path / "trunk", "run", {}) as log:
        for step in range(200):
            log.measurement(step, rows_at(step, draw), 0.1)
        branch = log.branch(tmp_path / "branch")
        for step in range(200, 400):
            branch.measurement(step, rows_at(step, draw), 0.1)
        assert contents(branch.recording()) == contents(read_run(tmp_path / "branch"))
        assert contents(log.recording()) == contents(read_run(tmp_path / "trunk"))
        assert log.recording().measurements_made == 200
        assert branch.recording().measurements_made == 400


def test_a_log_that_waits_for_its_place_is_bounded_and_written_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with bounds(), RunLogWriter(None, "run", {}) as log:
        for step in range(200):
            log.measurement(step, rows_at(step, random.Random(step)), 0.1)
        assert log.recording().thinned.measurements > 0
        assert len(log._unwritten) < 500 * thinning.MOST_ROWS
        log.place(tmp_path / "run")
        for step in range(200, 210):
            log.measurement(step, rows_at(step, random.Random(step)), 0.1)
        assert contents(log.recording()) == contents(read_run(tmp_path / "run"))
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_ranks_that_were_thinned_at_different_times_are_put_together(tmp_path: Path) -> None:
    with bounds():
        for rank, directory in enumerate((tmp_path, tmp_path / "rank-1")):
            with RunLogWriter(directory, "run", {}) as log:
                log.fact(0, RANK, "model", float(rank), {"ranks": 2})
                for step in range(1000 + 90 * rank):
                    log.loss(step, 1.0 + step + rank)
    recording = read_run(tmp_path)
    assert recording.losses_seen == 1090
    assert recording.thinned.until == max(read_one.thinned.until for read_one in ranks(tmp_path))
    assert np.all(np.diff(recording.losses.step) > 0)
    both = recording.losses.step < 1000
    known = (recording.losses.value - recording.losses.step)[both]
    assert set(known.tolist()) <= {1.0, 1.5, 2.0}  # of one that is left, or of both


def ranks(directory: Path) -> list[Recording]:
    alone = directory / "alone"
    alone.mkdir()
    (alone / LOG_FILE).write_bytes((directory / LOG_FILE).read_bytes())
    return [read_run(alone), read_run(directory / "rank-1")]


def test_an_older_version_is_told_to_upgrade_by_a_thinned_log_alone(tmp_path: Path) -> None:
    with bounds(), RunLogWriter(tmp_path, "run", {}) as log:
        log.loss(0, 1.0)
        assert b"diagnoser.log/1" in (tmp_path / LOG_FILE).read_bytes()
        for step in range(100):
            log.measurement(step, rows_at(step, random.Random(step)), 0.1)
        assert b"diagnoser.log/2" in (tmp_path / LOG_FILE).read_bytes().splitlines()[0]
    with pytest.raises(RunLogError):
        RunLogWriter(tmp_path, "another", {})


# -- as large as they come -------------------------------------------------------------------------

QUANTITIES = (
    "gradient_norm", "weight_norm", "update_norm", "update_ratio", "learning_rate", "zero_share",
    "reached", "trainable", "optimized", "gradient_cosine", "moment_ratio", "weight_scale",
    "input_scale", "input_similarity", "input_zero_share", "update_curvature", "lambda_max",
    "lambda_min", "trace", "non_finite_gradient",
)  # fmt: skip
SHARES = ("reached", "trainable", "optimized")
MANY = [
    Component(f"layers.{i // 5}.part{i % 5}", "linear", f"layers.{i // 5}", i, (Part(f"{i}"),), 100)
    for i in range(50)
]


def write_large(directory: Path, measurements: int, steps: int) -> RunLogWriter:
    """Writes a log of a thousand rows a measurement, as columns: objects would take a minute."""
    count = len(MANY) * len(QUANTITIES)
    draw = np.random.default_rng(0)
    fixed = {
        "quantity": [q for q in range(len(QUANTITIES)) for _ in MANY],
        "component": [*range(len(MANY))] * len(QUANTITIES),
        "other": [-1] * count,
        "std_error": [0.0] * count,
        "batch_std_error": [None] * count,
        "samples": [-1] * count,
        "method": [0] * count,
        "dtype": [0] * count,
    }
    tables = {
        "quantities": QUANTITIES,
        "components": [component.name for component in MANY],
        "methods": ["exact"],
        "dtypes": ["float32"],
    }
    log = RunLogWriter(directory, "large", {})
    log.components(0, MANY)
    for i in range(measurements):
        step = i * steps
        for at in range(step, step + steps):
            log.loss(at, 0.5 + 2.0 / (1 + at / 500) + 0.1 * draw.random(), 0.5)
        values = 1.0 + draw.random((len(QUANTITIES), len(MANY)))
        values[[QUANTITIES.index(name) for name in SHARES]] = 1.0
        values[[QUANTITIES.index(name) for name in ("zero_share", "non_finite_gradient")]] = 0.0
        rows = {"step": [step] * count, "value": values.ravel().tolist(), **fixed}
        log._write({"record": "measurement", "step": step, "seconds": 0.01, **tables, "rows": rows})
    log.end(0, None)
    return log


# Not `ru_maxrss`: a child is born with that of the process that started it, and keeps it.
AS_CHILD = """
import sys
from pathlib import Path
from diagnoser.cli import main
code = main(sys.argv[1:])
status = Path("/proc/self/status").read_text().splitlines()
(most,) = [line.split()[1] for line in status if line.startswith("VmHWM:")]
print(int(most) // 1024, file=sys.stderr)
sys.exit(code)
"""


def in_a_child(*arguments: str) -> tuple[float, int, str]:
    """Returns seconds, MiB at the most and what was printed; of two tries the faster."""
    tries = []
    for _ in range(2):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", AS_CHILD, *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode in (0, 1), done.stderr
        tries.append((time.perf_counter() - start, int(done.stderr), done.stdout))
    return min(tries)


@pytest.mark.slow
@pytest.mark.alone
def test_a_million_rows_are_diagnosed_in_ten_seconds_and_a_gibibyte(tmp_path: Path) -> None:
    with bounds(MOST_ROWS=2**30, MOST_LOSSES=2**30):  # as a log is that could not be thinned
        write_large(tmp_path, 1000, 150)
    recording = read_run(tmp_path)
    assert (len(recording.measurements.step), len(recording.losses.step)) == (10**6, 150_000)
    seconds, memory, printed = in_a_child("diagnose", str(tmp_path))
    assert "in 1000 measurements of 150000 steps" in printed or "faulty" in printed
    assert seconds < 10.0
    assert memory < 1024
    seconds, memory, _ = in_a_child("report", str(tmp_path))
    assert seconds < 15.0
    assert memory < 1024
    assert (tmp_path / "report.html").stat().st_size < 500_000


@pytest.mark.slow
@pytest.mark.alone
def test_weeks_take_as_much_of_disk_and_memory_as_days(tmp_path: Path) -> None:
    log = write_large(tmp_path, 700, 200)
    recording = log.recording()
    assert recording.measurements_made == 700
    assert recording.losses_seen == 140_000
    assert recording.thinned.measurements > 200
    assert recording.thinned.losses > 50_000
    rows = len(recording.measurements.step) + len(recording.measured.step)
    assert rows <= thinning.MOST_ROWS + 1001
    assert len(recording.losses.step) <= thinning.MOST_LOSSES + 64
    assert (tmp_path / LOG_FILE).stat().st_size < 64 * 2**20
    held = [getattr(recording.measurements, name).nbytes for name in COLUMNS]
    assert sum(held) < 40 * 2**20
    assert contents(recording) == contents(read_run(tmp_path))
    assert feature_tables(recording)["run"].columns["loss_fall"].value[0, -1] > 0.5
