"""A disk that is full or read-only costs what cannot be written to it, and nothing else."""

from __future__ import annotations

import json

import pytest

from diagnoser.cli import main
from tests.forked_runs import Job, Ran, run_jobs
from tests.test_launch import write

TRAINED = "train(60)\nimport sys\nsys.exit(5)\n"

# A disk that takes so many writes of the log, then as many not, then all again; and that may take
# no new files. What the script itself writes is somewhere else.
BROKEN = """
import errno, io, os
opened, written, opened_file, made = os.open, os.write, io.open, os.mkdir
count = 0

def refuse():
    code = getattr(errno, error)
    raise OSError(code, os.strerror(code))

def is_ours(path):
    return isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(run)

def open_descriptor(path, flags, *rest, **more):
    if is_ours(path) and flags & os.O_WRONLY:
        global count
        count += 1
        if error == "EROFS" and good < count <= good + bad:
            refuse()
    return opened(path, flags, *rest, **more)

def write(descriptor, data):
    if error == "ENOSPC" and good < count <= good + bad:
        half = len(data) // 2
        if descriptor > 2 and count == good + 1 and half:
            return written(descriptor, data[:half])  # and then no more
        refuse()
    return written(descriptor, data)

def open_file(path, mode="r", *rest, **more):
    if not files and is_ours(path) and not {*mode}.isdisjoint("wax+"):
        refuse()
    return opened_file(path, mode, *rest, **more)

def make(path, *rest, **more):
    if error == "EROFS" and not good and is_ours(path):
        refuse()
    return made(path, *rest, **more)

os.open, os.write, io.open, os.mkdir = open_descriptor, write, open_file, make
"""
ALWAYS = 10**9
# Error, writes that succeed, those after them that do not, and whether there may be other files.
DISKS = {
    "full": ("ENOSPC", 0, ALWAYS, False),
    "read-only": ("EROFS", 0, ALWAYS, False),
    "full in the middle": ("ENOSPC", 65, ALWAYS, False),
    "read-only in the middle": ("EROFS", 65, ALWAYS, False),
    "full for a while": ("ENOSPC", 40, 4, True),
    "read-only at the end": ("EROFS", ALWAYS, 0, False),
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    folder = tmp_path_factory.mktemp("disks")
    write(folder, TRAINED)
    (folder / "file").touch()
    jobs = [Job("alone", "script.py", None), Job("below a file", "script.py", "file/run")]
    for name, disk in DISKS.items():
        run = f"{name}.run"
        what = f"run, (error, good, bad, files) = {str(folder / run)!r}, {disk}"
        jobs.append(Job(name, "script.py", run, what + BROKEN))
    return run_jobs(folder, jobs)


def check_training(ran: dict[str, Ran], done: Ran) -> None:
    """Checks that the script ran as it does alone, and that nothing of ours broke visibly."""
    assert (done.code, done.stdout) == (ran["alone"].code, ran["alone"].stdout)
    assert done.code == 5
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("full", "cannot write the run log (No space left on device)"),
        ("read-only", "cannot make this directory (Read-only file system)"),
        ("below a file", "cannot make this directory (Not a directory)"),
    ],
)
def test_from_the_beginning_it_is_refused_before_the_script_starts(ran, name, says):
    done = ran[name]
    assert (done.code, done.stdout) == (2, "")
    assert len(done.lines(says)) == len(done.stderr.splitlines()) == 1
    assert "choose another" in done.stderr
    assert not done.run.exists() or list(done.run.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full in the middle", "read-only in the middle"])
def test_from_the_middle_on_training_goes_on_and_what_was_written_is_kept(ran, name):
    done = ran[name]
    check_training(ran, done)
    (line,) = done.lines("cannot write the run log")
    assert "records are missing in it" in line
    assert len(done.lines("diagnosis.json: cannot be written")) == 1
    assert "healthy:" in done.stderr  # what was found is said all the same
    assert "of 60 steps" in done.stderr
    recording = done.recording
    assert 0 < len(recording.measured.step) < 10
    assert (recording.damaged_lines, recording.ending) == (0, None)


@pytest.mark.slow
def test_for_a_while_nothing_is_lost(ran):
    done = ran["full for a while"]
    check_training(ran, done)
    (line,) = done.lines("cannot write the run log")
    assert "nothing is missing in it" in line
    assert len(done.recording.losses.step) == 60
    assert done.recording.ending is not None
    assert json.loads((done.run / "diagnosis.json").read_text())["verdict"] == "healthy"


@pytest.mark.slow
def test_at_the_very_end_it_costs_the_report(ran, capsys):
    done = ran["read-only at the end"]
    check_training(ran, done)
    (line,) = done.lines("diagnosis.json: cannot be written")
    assert "the log is kept: `diagnoser diagnose" in line
    assert "healthy:" in done.stderr
    assert [path.name for path in done.run.iterdir()] == ["log.jsonl"]
    assert done.recording.ending.exit_code == 5
    assert main(["diagnose", str(done.run)]) == 0
    assert capsys.readouterr().err == ""
