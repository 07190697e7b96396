"""The run log: what is written is read, exactly, whatever happens to the process or the disk."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnoser import runlog
from diagnoser.errors import (
    DamagedRunError,
    NewerRunError,
    NotARunError,
    RunLogError,
    UsageError,
)
from diagnoser.runlog import LOG_FILE, Ending, Event, Fact, Recording, RunLogWriter, read_run
from diagnoser.types import Component, Cost, Estimate, Measurement, Part

QUERY = Component(
    name="h.0.attn.c_attn[query]",
    kind="query",
    layer="h.0.attn",
    order=0,
    parts=(Part("h.0.attn.c_attn.weight", 1, 0, 8), Part("h.0.attn.c_attn.bias", 0, 0, 8)),
    elements=72,
)
HEAD = Component("head", "head", "head", 1, (Part("head.weight"),), 16)
COST = Cost(steps=400, measurements=12, training_s=40.1, monitoring_s=3.2)
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

# Any text a program can make a name of, lone surrogates and control characters included.
texts = st.text(st.characters(), max_size=12)
steps = st.integers(0, 2**62)
estimates = st.builds(
    Estimate,
    value=st.floats(),
    std_error=st.none() | st.floats(),
    batch_std_error=st.none() | st.floats(),
    samples=st.none() | st.integers(0, 2**40),
    method=texts,
    dtype=texts,
)
measurements = st.builds(
    Measurement,
    step=steps,
    quantity=texts,
    component=texts,
    estimate=estimates,
    other=st.none() | texts,
)
components = st.builds(
    Component,
    name=texts,
    kind=texts,
    layer=texts,
    order=st.integers(0, 100),
    parts=st.lists(st.builds(Part, texts, st.none() | st.just(1), steps, steps)).map(tuple),
    elements=steps,
)
data = st.dictionaries(texts, st.none() | st.booleans() | st.integers() | texts, max_size=3)
facts = st.builds(Fact, step=steps, name=texts, component=texts, value=st.floats(), data=data)
events = st.builds(Event, step=steps, kind=texts, message=texts, data=data)
losses = st.tuples(steps, st.floats(), st.floats())
operations = st.lists(
    st.one_of(
        st.tuples(st.just("measurement"), st.lists(measurements, max_size=4)),
        st.tuples(st.just("components"), st.lists(components, max_size=3)),
        st.tuples(st.just("fact"), facts),
        st.tuples(st.just("event"), events),
        st.tuples(st.just("loss"), losses),
    ),
    max_size=12,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


def measured(step: int, value: float = 0.5, quantity: str = "gradient_norm") -> Measurement:
    return Measurement(step, quantity, "head", Estimate(value))


def rows_of(recording: Recording) -> list[Measurement]:
    """Returns the measurements as the values they were written from."""
    m = recording.measurements
    return [
        Measurement(
            step=int(m.step[i]),
            quantity=m.quantities[m.quantity[i]],
            component=m.components[m.component[i]],
            estimate=Estimate(
                value=float(m.value[i]),
                std_error=float(m.std_error[i]),
                batch_std_error=float(m.batch_std_error[i]),
                samples=None if m.samples[i] == -1 else int(m.samples[i]),
                method=m.methods[m.method[i]],
                dtype=m.dtypes[m.dtype[i]],
            ),
            other=None if m.other[i] == -1 else m.components[m.other[i]],
        )
        for i in range(len(m.step))
    ]


def as_read(row: Measurement) -> Measurement:
    """Returns ``row`` with its unknown errors as the columns have them: NaN."""
    unknown = {
        name: math.nan
        for name in ("std_error", "batch_std_error")
        if getattr(row.estimate, name) is None
    }
    return dataclasses.replace(row, estimate=dataclasses.replace(row.estimate, **unknown))


def contents(value: Any) -> Any:
    """Returns all that a recording holds, to the byte, in a form that compares NaN with NaN."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.tobytes()
    if dataclasses.is_dataclass(value):
        return [(f.name, contents(getattr(value, f.name))) for f in dataclasses.fields(value)]
    return repr(value)


def run_script(text: str, directory: Path) -> subprocess.CompletedProcess[str]:
    head = "import os, sys\nfrom pathlib import Path\nfrom tests.test_runlog import *\n"
    return subprocess.run(
        [sys.executable, "-c", head + text, str(directory)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )


def write_example(directory: Path, measurement_count: int = 5) -> list[bytes]:
    """Writes a small log and returns its lines: header, components, one for each measurement."""
    with RunLogWriter(directory, "example", {}) as writer:
        writer.components(0, [QUERY, HEAD])
        for step in range(measurement_count):
            writer.measurement(step, [measured(step)], 0.1)
    return (directory / LOG_FILE).read_bytes().splitlines(keepends=True)


@settings(deadline=None, max_examples=150)
@given(operations=operations, run=texts, header=data, code=st.none() | st.integers(-64, 255))
def test_everything_that_is_written_is_read_and_is_in_the_live_recording(
    operations: list[tuple[str, Any]], run: str, header: dict[str, Any], code: int | None
) -> None:
    expected: dict[str, list[Any]] = {
        name: [] for name in ("measurement", "components", "fact", "event", "loss")
    }
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        with RunLogWriter(directory, run, header) as writer:
            for name, value in operations:
                if name == "measurement":
                    writer.measurement(7, value, 0.25)
                    expected[name] += value
                elif name == "components":
                    writer.components(7, value)
                    expected[name] = value
                else:
                    fields = value if name == "loss" else vars_of(value)
                    getattr(writer, name)(*fields)
                    expected[name].append(value)
            assert contents(writer.recording()) == contents(read_run(directory))
            writer.end(code, COST)
        recording = read_run(directory)
        assert contents(writer.recording()) == contents(recording)

    assert (recording.run, recording.header) == (run, header)
    assert repr(rows_of(recording)) == repr([as_read(row) for row in expected["measurement"]])
    assert recording.measured.value.tolist() == [0.25] * sum(
        name == "measurement" for name, _ in operations
    )
    assert list(recording.components) == expected["components"]
    assert repr(list(recording.facts)) == repr(expected["fact"])
    assert list(recording.events) == expected["event"]
    curves = (recording.losses.step, recording.losses.value, recording.accuracies.value)
    assert repr(list(zip(*map(np.ndarray.tolist, curves), strict=True))) == repr(expected["loss"])
    assert recording.accuracies.step.tolist() == recording.losses.step.tolist()
    assert recording.ending == Ending(code, COST, lost_records=0)
    assert recording.damaged_lines == 0


def vars_of(value: Any) -> list[Any]:
    """Returns the fields of a dataclass in order."""
    return [getattr(value, field.name) for field in dataclasses.fields(value)]


@pytest.mark.parametrize("name", ["a\nb", "\r\n\t\0\x1b[31m", '"}]\\', "x" * 10_000, "\u2028", ""])
def test_untrusted_names_come_back_and_stay_on_their_line(tmp_path: Path, name: str) -> None:
    with RunLogWriter(tmp_path, name, {name: name}) as writer:
        writer.measurement(1, [Measurement(1, "gradient_norm", name, Estimate(1.0))], 0.1)
    assert len((tmp_path / LOG_FILE).read_bytes().splitlines()) == 2
    assert read_run(tmp_path).series("gradient_norm", name).value.tolist() == [1.0]


def test_what_json_does_not_have_is_taken_and_the_log_is_strict_json(tmp_path: Path) -> None:
    header = {"path": Path("train.py"), 3: np.float32(0.5), "n": np.array([1, 2]), "x": np.nan}
    with RunLogWriter(tmp_path, "run", header) as writer:
        writer.loss(np.int64(3), np.float32("inf"))
        estimate = Estimate(np.float32(0.1), np.float64(0.2), None, np.int32(4))
        writer.measurement(np.int64(3), [Measurement(3, "q", "model", estimate)], np.float64(0.1))
        writer.fact(3, "optimizer", "model", np.nan, {"betas": (0.9, np.inf)})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / LOG_FILE).read_text("ascii").splitlines():
        json.loads(line, parse_constant=refuse)
    recording = read_run(tmp_path)
    assert recording.header == {"path": "train.py", "3": 0.5, "n": [1, 2], "x": "NaN"}
    assert recording.losses.value.tolist() == [math.inf]
    assert recording.measurements.value.tolist() == [float(np.float32(0.1))]
    assert recording.measurements.samples.tolist() == [4]
    assert math.isnan(recording.facts[0].value)
    assert recording.facts[0].data == {"betas": [0.9, "Infinity"]}


def test_the_last_components_count_and_bring_their_facts(tmp_path: Path) -> None:
    trainable = Fact(0, "trainable", HEAD.name, 1.0)
    with RunLogWriter(tmp_path, "run", {}) as writer:
        writer.components(0, [QUERY])
        writer.components(1, [QUERY, HEAD], [trainable])
    recording = read_run(tmp_path)
    assert recording.components == (QUERY, HEAD)
    assert recording.facts == (trainable,)


def test_series_are_of_one_quantity_of_one_component_or_pair(tmp_path: Path) -> None:
    with RunLogWriter(tmp_path, "run", {}) as writer:
        for step in (10, 20):
            rows = [
                Measurement(step, "coupling", "a", Estimate(step + 0.1, 0.2, 0.3), "b"),
                Measurement(step, "coupling", "b", Estimate(step + 0.2), "a"),
                Measurement(step, "coupling", "a", Estimate(step + 0.3)),
            ]
            writer.measurement(step, rows, 0.1)
        recording = writer.recording()
    pair = recording.series("coupling", "a", "b")
    assert pair.step.tolist() == [10, 20]
    assert pair.value.tolist() == [10.1, 20.1]
    assert (pair.std_error.tolist(), pair.batch_std_error.tolist()) == ([0.2, 0.2], [0.3, 0.3])
    assert recording.series("coupling", "a").value.tolist() == [10.3, 20.3]
    for never in (("norm", "a", None), ("coupling", "c", None), ("coupling", "a", "c")):
        assert len(recording.series(*never).step) == 0


def test_what_was_known_at_a_step_is_what_a_log_cut_there_holds(tmp_path: Path) -> None:
    whole, cut = (RunLogWriter(tmp_path / name, "run", {}) for name in ("whole", "cut"))
    for step in range(20):
        for log in (whole, cut) if step <= 11 else (whole,):
            log.loss(step, 1.0 / (step + 1), 0.5)
            if step % 5 == 0:
                rows = [Measurement(step, "trace", "model", Estimate(float(step)))]
                log.measurement(step, rows, 0.25)
                log.fact(step, "seen", "model", 1.0, {})
                log.event(step, "trigger", "a spike", {})
    whole.end(0, None)
    known, expected = whole.recording().until(11), cut.recording()
    assert (known.facts, known.events, known.ending) == (expected.facts, expected.events, None)
    for name in ("losses", "accuracies", "measured"):
        for column in ("step", "value"):
            ours = getattr(getattr(known, name), column)
            np.testing.assert_array_equal(ours, getattr(getattr(expected, name), column))
    for column in ("step", "quantity", "component", "value", "std_error"):
        ours = getattr(known.measurements, column)
        np.testing.assert_array_equal(ours, getattr(expected.measurements, column))


def test_a_recording_cannot_be_changed_by_what_comes_later(tmp_path: Path) -> None:
    with RunLogWriter(tmp_path, "run", {}) as writer:
        writer.measurement(1, [measured(1)], 0.1)
        early = writer.recording()
        before = contents(early)
        writer.measurement(2, [measured(2, quantity="update_norm")], 0.1)
        writer.loss(2, 0.5)
        assert contents(early) == before != contents(writer.recording())
    with pytest.raises(ValueError, match="read-only"):
        early.measurements.value[0] = 1.0


def test_losses_are_written_in_batches_and_within_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with RunLogWriter(tmp_path, "run", {}) as writer:
        for step in range(1000):
            writer.loss(step, 1.0)
        assert len((tmp_path / LOG_FILE).read_bytes().splitlines()) == 1 + 1000 // 64
        now += 1.5
        writer.loss(1000, 1.0)
        assert read_run(tmp_path).losses.step.tolist() == list(range(1001))
        writer.loss(1001, 1.0)
        writer.measurement(1001, [], 0.1)
        assert read_run(tmp_path).losses.step[-1] == 1001


def test_leaving_the_context_writes_what_waits_and_ends_writing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunLogWriter(tmp_path, "run", {}) as writer:
        writer.loss(1, 0.5)
        raise KeyError
    writer.loss(2, 0.5)
    writer.event(2, "late", "after the end", {})
    recording = read_run(tmp_path)
    assert recording.losses.step.tolist() == [1]
    assert recording.events == ()
    assert recording.ending is None


WRITE_FOREVER = """
writer, step = RunLogWriter(Path(sys.argv[1]), "run", {}), 0
while True:
    writer.loss(step, 1.0)
    writer.measurement(step, [measured(step)] * 100, 0.1)
    os.write(1, b".")
    step += 1
"""


def check_kill(directory: Path, wait: float) -> None:
    """Kills a writing process and checks that each call that had returned is in its log."""
    head = "import os, sys\nfrom pathlib import Path\nfrom tests.test_runlog import *\n"
    with subprocess.Popen(
        [sys.executable, "-c", head + WRITE_FOREVER, str(directory)],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        returned = len(process.stdout.read(1))
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        returned += len(process.stdout.read())
    recording = read_run(directory)
    kept = len(recording.measured.step)
    assert 0 < returned <= kept <= returned + 1
    assert recording.measurements.step.tolist() == [s for s in range(kept) for _ in range(100)]
    assert recording.losses.step.tolist()[:kept] == list(range(kept))
    assert recording.damaged_lines == 0
    assert recording.ending is None


def test_a_killed_process_loses_nothing_that_was_written(tmp_path: Path) -> None:
    for i, wait in enumerate((0.0, 0.01, 0.05)):
        check_kill(tmp_path / str(i), wait)


@pytest.mark.slow
def test_a_process_killed_at_random_moments_loses_nothing_that_was_written(tmp_path: Path) -> None:
    waits = random.Random(0)
    for i in range(20):
        check_kill(tmp_path / str(i), waits.uniform(0.0, 0.1))


def test_a_fork_writes_nothing(tmp_path: Path) -> None:
    run_script(
        """
writer = RunLogWriter(Path(sys.argv[1]), "run", {})
writer.loss(1, 0.5)
child = os.fork()
if child == 0:
    writer.loss(2, 0.5)
    writer.measurement(2, [measured(2)], 0.1)
    writer.end(0, None)
    writer.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert read_run(Path(sys.argv[1])).losses.step.tolist() == []
writer.loss(3, 0.5)
writer.end(0, None)
""",
        tmp_path,
    )
    recording = read_run(tmp_path)
    assert recording.losses.step.tolist() == [1, 3]
    assert len(recording.measurements.step) == 0


def test_a_script_may_change_its_directory_and_close_every_file(tmp_path: Path) -> None:
    run_script(
        """
os.chdir(sys.argv[1])
writer = RunLogWriter(Path("log"), "run", {})
os.mkdir("elsewhere")
os.chdir("elsewhere")
os.closerange(3, 256)
theirs = open("theirs.txt", "w")
writer.measurement(1, [measured(1)], 0.1)
assert writer.failure is None
assert open("theirs.txt").read() == ""
""",
        tmp_path,
    )
    assert len(read_run(tmp_path / "log").measurements.step) == 1


def test_a_log_is_never_overwritten(tmp_path: Path) -> None:
    lines = write_example(tmp_path)
    with pytest.raises(RunLogError, match="recorded here already; choose another directory"):
        RunLogWriter(tmp_path, "second", {})
    assert (tmp_path / LOG_FILE).read_bytes() == b"".join(lines)


def test_a_place_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    for directory in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunLogError, match="cannot make this directory .*; choose another"):
            RunLogWriter(directory, "run", {})

    def read_only(*_: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        with pytest.raises(RunLogError, match=r"Read-only file system.*choose another directory$"):
            RunLogWriter(tmp_path / "run", "run", {})


def test_a_disk_full_at_the_start_is_refused_and_leaves_no_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(RunLogError, match=r"^[^\n]*No space left on device[^\n]*free some"):
            RunLogWriter(tmp_path, "run", {})
    assert not (tmp_path / LOG_FILE).exists()


def test_nothing_is_lost_when_space_returns(tmp_path: Path) -> None:
    done = run_script(
        """
import resource
directory = Path(sys.argv[1])
writer = RunLogWriter(directory, "run", {})
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # cuts a record in two
for step in range(10):
    writer.measurement(step, [measured(step)], 0.1)
during = read_run(directory)
assert 0 < len(during.measured.step) < 10 and during.damaged_lines == 0
assert (directory / LOG_FILE).stat().st_size == 1000
assert len(writer.recording().measured.step) == 10
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
writer.measurement(10, [measured(10)], 0.1)
print(writer.failure)
""",
        tmp_path,
    )
    assert done.stdout.count("\n") == 1
    assert "File too large" in done.stdout
    recording = read_run(tmp_path)
    assert recording.measured.step.tolist() == list(range(11))
    assert recording.damaged_lines == 0


def test_memory_stays_bounded_on_a_full_disk_and_what_is_lost_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise FULL

    monkeypatch.setattr("diagnoser.runlog.writer.UNWRITTEN_BYTES", 1000)
    with RunLogWriter(tmp_path, "run", {}) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            for step in range(100):
                writer.measurement(step, [measured(step)], 0.1)
            assert len(writer.recording().measured.step) == 100
        assert "No space left" in str(writer.failure)
        writer.loss(100, 0.5)
        writer.recording()  # space returned: the backlog goes out
        writer.end(0, COST)
    recording = read_run(tmp_path)
    kept = recording.measured.step.tolist()
    assert kept == list(range(len(kept)))
    assert 0 < len(kept) < 10
    assert recording.ending == Ending(0, COST, lost_records=writer.lost_records)
    assert len(kept) + writer.lost_records in (100, 101)  # the loss may have been one of them


def test_a_record_larger_than_what_may_wait_is_written_while_the_disk_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diagnoser.runlog.writer.UNWRITTEN_BYTES", 1000)
    with RunLogWriter(tmp_path, "run", {}) as writer:
        writer.measurement(1, [measured(1)] * 100, 0.1)
    assert len(read_run(tmp_path).measurements.step) == 100
    assert writer.lost_records == 0


def test_a_log_deleted_under_the_writer_is_a_failure_and_the_first_failure_stays(
    tmp_path: Path,
) -> None:
    with RunLogWriter(tmp_path, "run", {}) as writer:
        (tmp_path / LOG_FILE).unlink()
        writer.measurement(1, [measured(1)], 0.1)
        first = writer.failure
        assert first is not None
        assert "No such file" in first
        (tmp_path / LOG_FILE).mkdir()  # from now on the failure is another one
        assert len(writer.recording().measured.step) == 1
        assert writer.failure == first


def test_a_cut_last_line_is_dropped_wherever_it_was_cut(tmp_path: Path) -> None:
    lines = write_example(tmp_path)
    log = b"".join(lines)
    for cut in range(1, len(lines[-1]) + 1):
        (tmp_path / LOG_FILE).write_bytes(log[:-cut])
        recording = read_run(tmp_path)
        assert recording.measured.step.tolist() == [0, 1, 2, 3]
        assert recording.damaged_lines == 0


def check_damage(line: bytes) -> None:
    """Puts a damaged line into a log and checks that it costs itself, at most."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        lines = write_example(directory)
        undamaged = contents(read_run(directory))
        (directory / LOG_FILE).write_bytes(b"".join([*lines[:4], line, *lines[4:]]))
        recording = read_run(directory)
        if recording.damaged_lines:
            assert recording.damaged_lines == 1
            assert contents(dataclasses.replace(recording, damaged_lines=0)) == undamaged
        else:  # the line happened to be a good record
            assert json.loads(line)["record"] in ("measurement", "loss", "components", "end")


@settings(deadline=None, max_examples=60)
@given(junk=st.binary().map(lambda text: text.replace(b"\n", b" ") + b"\n"))
def test_damaged_bytes_cost_one_line(junk: bytes) -> None:
    check_damage(junk)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_record_with_one_wrong_value_costs_one_line(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        records = [json.loads(line) for line in write_example(Path(scratch))[1:3]]
    record: dict[str, Any] = data.draw(st.sampled_from(records))
    place = record["rows"] if "rows" in record and data.draw(st.booleans()) else record
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(json_values)
    check_damage(json.dumps(record).encode() + b"\n")


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"3\n",
        b"[" * 100_000 + b"\n",
        b'{"record":"measurement"}\n',
        b'{"record":"nonsense"}\n',
        b'{"record":"loss","step":[1,2],"value":[0.5],"accuracy":[0.5]}\n',
        b'{"record":"loss","step":[1.5],"value":[0.5],"accuracy":[0.5]}\n',
        b'{"record":"loss","step":[1],"value":["high"],"accuracy":[0.5]}\n',
        b'{"record":"loss","step":[1],"value":[[0.5]],"accuracy":[0.5]}\n',
        b'{"record":"end","exit_code":"0","cost":null,"lost_records":0}\n',
        b'{"record":"fact","step":1,"name":2,"component":"a","value":1,"data":{}}\n',
        b'{"record":"event","step":1,"kind":"a","message":"b","data":[]}\n',
        b'{"record":"event","step":9223372036854775808,"kind":"a","message":"b","data":{}}\n',
    ],
)
def test_damaged_lines_are_counted(tmp_path: Path, line: bytes) -> None:
    lines = write_example(tmp_path)
    (tmp_path / LOG_FILE).write_bytes(b"".join([*lines[:3], line, *lines[3:]]))
    recording = read_run(tmp_path)
    assert recording.damaged_lines == 1
    assert recording.measured.step.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("component", [1]),  # points at no name
        ("component", [-1]),
        ("other", [-2]),
        ("value", [0.5, 0.5]),  # longer than the other columns
        ("method", []),
        ("samples", [1.5]),
        ("value", [[0.5]]),
    ],
)
def test_rows_that_do_not_fit_are_damage(tmp_path: Path, column: str, values: list[Any]) -> None:
    lines = write_example(tmp_path)
    record = json.loads(lines[2])
    record["rows"][column] = values
    (tmp_path / LOG_FILE).write_bytes(b"".join([*lines, json.dumps(record).encode() + b"\n"]))
    assert read_run(tmp_path).damaged_lines == 1


def test_a_step_of_more_than_64_bits_leaves_nothing_of_its_measurement(tmp_path: Path) -> None:
    record = json.loads(write_example(tmp_path)[2])
    for step in (2**63, -(2**63) - 1):
        check_damage(json.dumps({**record, "step": step}).encode() + b"\n")


def test_what_is_not_a_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotARunError, match="missing; give a run's directory"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(NotARunError, match=f"a file; give a run's directory, with {LOG_FILE}"):
        read_run(tmp_path / "file")
    with pytest.raises(NotARunError, match=f"no {LOG_FILE} in this directory"):
        read_run(tmp_path)


def test_a_log_of_a_newer_version_asks_for_an_upgrade(tmp_path: Path) -> None:
    lines = write_example(tmp_path)
    newer = lines[0].replace(b"diagnoser.log/1", b"diagnoser.log/3")
    (tmp_path / LOG_FILE).write_bytes(b"".join([newer, *lines[1:]]))
    with pytest.raises(NewerRunError, match=r"diagnoser\.log/3\); upgrade diagnoser"):
        read_run(tmp_path)


@pytest.mark.parametrize("header", [b"", b"{\n", b"\xff\xfe\n", b"[]\n", b'{"schema":"other/1"}\n'])
def test_a_log_without_a_readable_header_is_damaged(tmp_path: Path, header: bytes) -> None:
    (tmp_path / LOG_FILE).write_bytes(header)
    with pytest.raises(DamagedRunError, match="not the header of a run log"):
        read_run(tmp_path)


def test_a_cut_header_is_damaged_wherever_it_was_cut(tmp_path: Path) -> None:
    header = write_example(tmp_path)[0]
    for cut in range(1, len(header)):
        (tmp_path / LOG_FILE).write_bytes(header[:-cut])
        with pytest.raises(DamagedRunError):
            read_run(tmp_path)


@pytest.mark.alone
def test_a_hundred_thousand_rows_are_read_within_two_seconds(tmp_path: Path) -> None:
    rows = [
        Measurement(0, f"quantity_{i % 20}", f"layers.{i // 20}.attn", Estimate(i / 7, i / 9, None))
        for i in range(500)
    ]
    with RunLogWriter(tmp_path, "run", {}) as writer:
        for step in range(200):
            writer.measurement(step, rows, 0.1)
    start = time.perf_counter()
    recording = read_run(tmp_path)
    assert time.perf_counter() - start < 2.0
    assert len(recording.measurements.step) == 100_000


def test_frame_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_example(tmp_path)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="pip install pandas"):
        read_run(tmp_path).frame()


def test_frame_gives_columns_with_names_as_categories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Categorical:
        @staticmethod
        def from_codes(codes: np.ndarray, names: tuple[str, ...]) -> list[str | None]:
            return [None if code == -1 else names[code] for code in codes]

    stand_in = types.SimpleNamespace(Categorical=Categorical, DataFrame=dict)
    monkeypatch.setitem(sys.modules, "pandas", stand_in)
    write_example(tmp_path, measurement_count=2)
    frame = read_run(tmp_path).frame()
    assert frame["quantity"] == ["gradient_norm"] * 2
    assert frame["other"] == [None] * 2
    assert frame["step"].tolist() == [0, 1]


def test_the_choice_of_the_format_rests_on_the_measured_figures() -> None:
    path = Path(__file__).parent.parent / "benchmarks" / "results" / "runlog_format.json"
    formats = json.loads(path.read_text())["formats"]
    ours, other = formats["json_lines"], formats["sqlite_wal"]
    assert (ours["keeps_nan"], other["keeps_nan"]) == (True, False)
    assert ours["kill_9"]["most_lost_in_a_kill"] == other["kill_9"]["most_lost_in_a_kill"] == 0
    text = " ".join(str(runlog.__doc__).split())
    for claim in (
        f"in {ours['kill_9']['kills']} `kill -9`",
        f"takes {ours['append']['200']['median_ms']:.1f} ms here",
        f"against {other['append']['200']['median_ms']:.1f} ms",
        f"{ours['append']['200']['bytes_a_row']:.0f} bytes a row"
        f" against {other['append']['200']['bytes_a_row']:.0f}",
        *(
            f"{figures['seconds']:.1f} s and {figures['peak_mib']} MiB"
            for figures in (ours["read"]["1000000"], other["read"]["1000000"])
        ),
    ):
        assert claim in text
