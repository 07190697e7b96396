"""A script under `diagnoser run` behaves as under plain Python, whatever it does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from diagnoser.runlog import Recording, read_run

TRAINING = """
import torch
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, y = torch.randn(32, 4), torch.randint(3, (32,))
def train(steps):
    for i in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        print(i, loss.item())
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Done:
    code: int
    stdout: bytes
    stderr: str
    run: Path

    @property
    def recording(self) -> Recording:
        return read_run(self.run)

    @property
    def diagnosis(self) -> dict[str, Any]:
        return json.loads((self.run / "diagnosis.json").read_text())


def watched_command(script: str, *arguments: str, run: Path | str, options: tuple[str, ...] = ()):
    command = [sys.executable, "-m", "diagnoser.cli", "run", "--out", str(run), *options]
    return [*command, script, *arguments]


def write(folder: Path, body: str, name: str = "script.py") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(TRAINING + textwrap.dedent(body))
    return path


def plain(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, script, *arguments]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, check=False)


def plain_module(folder: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    return plain(folder, "-m", *words)


def watched(folder: Path, script: str, *arguments: str, options=(), **extra: Any) -> Done:
    run = folder / "run"
    command = watched_command(script, *arguments, run=run, options=options)
    extra = {"env": ENVIRONMENT} | extra
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False, **extra)
    return Done(done.returncode, done.stdout, done.stderr.decode(), run)


def without_ours(stderr: str) -> str:
    """What the script wrote: everything before the first line of the diagnosis."""
    lines = stderr.splitlines(keepends=True)
    kept = []
    for line in lines:
        if line.startswith(("healthy:", "faulty:", "inconclusive:")):
            break
        if not line.startswith("diagnoser:"):
            kept.append(line)
    return "".join(kept)


IDENTITY = """
    import inspect, multiprocessing, os, pickle, sys
    import neighbour
    from torch.utils.data import DataLoader
    class Point:
        def __init__(self, value): self.value = value
    class Data:
        def __len__(self): return 4
        def __getitem__(self, i): return Point(i).value, __name__ != "__main__"
    if __name__ == "__main__":
        print(sys.argv, os.path.normpath(__file__), __name__, sys.path[0], __spec__)
        print(type(__loader__).__name__)
        print(sorted(n for n in globals() if n.startswith("__") and n != "__annotations__"))
        print(pickle.loads(pickle.dumps(Point(3))).value, inspect.getsource(Point.__init__))
        for method in ("spawn", "fork"):
            loader = DataLoader(Data(), 2, num_workers=2, multiprocessing_context=method)
            print(method, [[part.tolist() for part in batch] for batch in loader])
        train(25)
"""


def test_the_script_is_main_as_in_plain_python(tmp_path):
    write(tmp_path, IDENTITY, "inner/script.py")
    (tmp_path / "inner" / "neighbour.py").write_text("")
    arguments = ("./inner/script.py", "--out", "x", "-h", "--e", "--", "-1")
    expected, done = plain(tmp_path, *arguments), watched(tmp_path, *arguments)
    assert expected.returncode == 0, expected.stderr.decode()
    assert (done.code, done.stdout) == (0, expected.stdout)
    assert b"spawn [[[0, 1], [True, True]]" in done.stdout
    assert b"fork [[[0, 1], [False, False]]" in done.stdout
    assert done.recording.losses.step.tolist() == list(range(25))
    assert done.recording.ending.exit_code == 0
    assert done.diagnosis["verdict"] == "healthy"
    assert "healthy" in done.stderr and "report.html" in done.stderr


MODULE = """
    import os, sys
    from . import neighbour
    from torch.utils.data import DataLoader
    class Data:
        def __len__(self): return 4
        def __getitem__(self, i): return i, __name__ != "__main__"
    if __name__ == "__main__":
        print(sys.argv, __file__, __name__, __package__, sys.path[0], neighbour.__name__)
        print(__spec__.name, type(__loader__).__name__, os.path.basename(__cached__))
        print(sorted(n for n in globals() if n.startswith("__") and n != "__annotations__"))
        method = "fork" if __spec__.name == "package.__main__" else "spawn"  # as Python allows
        loader = DataLoader(Data(), 2, num_workers=1, multiprocessing_context=method)
        print([[part.tolist() for part in batch] for batch in loader])
        train(25)
"""


@pytest.mark.parametrize("name", ["package", "package.inner.job"])
def test_a_module_is_main_as_with_python_m(tmp_path, name):
    for place in ("package/__main__.py", "package/inner/job.py"):
        write(tmp_path, MODULE, place)
        (tmp_path / place).with_name("neighbour.py").write_text("")
    for place in ("package", "package/inner"):
        (tmp_path / place / "__init__.py").write_text("import sys; print(sys.argv, __name__)")
    arguments = ("--out", "x", "-m", "y", "--", "-1")
    expected = plain_module(tmp_path, name, *arguments)
    done = watched(tmp_path, name, *arguments, options=("-m",))
    assert expected.returncode == 0, expected.stderr.decode()
    assert (done.code, done.stdout) == (0, expected.stdout)
    assert done.recording.losses.step.tolist() == list(range(25))
    assert done.recording.header["script"] == name


def test_two_dashes_before_the_script_are_ours_and_behind_it_its_own(tmp_path):
    write(tmp_path, "import sys; print(sys.argv)")
    expected = plain(tmp_path, "script.py", "--", "--out", "x")
    done = watched(tmp_path, "script.py", "--", "--out", "x", options=("--",))
    assert (done.code, done.stdout) == (0, expected.stdout)
    assert b"['script.py', '--', '--out', 'x']" in done.stdout


def test_a_traceback_is_the_script_s_alone_and_nothing_measured_is_lost(tmp_path):
    body = """
        train(25)
        try:
            torch.ones(2, requires_grad=True).backward()
        except RuntimeError as error:
            raise ValueError("second") from error
    """
    write(tmp_path, body)
    expected, done = plain(tmp_path, "script.py"), watched(tmp_path, "script.py")
    assert (done.code, done.stdout) == (1, expected.stdout)
    assert without_ours(done.stderr) == expected.stderr.decode()
    assert "ValueError: second" in done.stderr
    assert len(done.recording.losses.step) >= 25
    assert (done.diagnosis["script"]["exit_code"], done.diagnosis["verdict"]) == (1, "healthy")


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("sys.exit(3)", 3),
        pytest.param("sys.exit()", 0, marks=pytest.mark.slow),
        pytest.param("sys.exit(-1)", 255, marks=pytest.mark.slow),
        pytest.param("sys.exit('a word at the end')", 1, marks=pytest.mark.slow),
        pytest.param("raise SystemExit(True)", 1, marks=pytest.mark.slow),
        pytest.param("import no_such_module", 1, marks=pytest.mark.slow),
        pytest.param("sys.stderr.close(); sys.exit('unheard')", 1, marks=pytest.mark.slow),
        pytest.param("sys.stdout = sys.stderr = None; sys.exit(4)", 4, marks=pytest.mark.slow),
        pytest.param("import io; sys.stdout = io.StringIO(); print(1)", 0, marks=pytest.mark.slow),
        pytest.param("os.chdir('/'); print(os.getcwd())", 0, marks=pytest.mark.slow),
        pytest.param("os.closerange(3, 99); sys.exit(5)", 5, marks=pytest.mark.slow),
        pytest.param("sys.excepthook = lambda *_: print('mine'); 1 / 0", 1, marks=pytest.mark.slow),
        pytest.param("error = ValueError(1); raise error from error", 1, marks=pytest.mark.slow),
        pytest.param("sys.excepthook = lambda *_: 1 / 0; [][1]", 1, marks=pytest.mark.slow),
    ],
)
def test_the_exit_code_is_the_script_s_own(tmp_path, end, code):
    write(tmp_path, f"import os, sys\ntrain(25)\n{end}\n")
    expected, done = plain(tmp_path, "script.py"), watched(tmp_path, "script.py")
    assert expected.returncode == code
    assert (done.code, done.stdout) == (code, expected.stdout)
    assert done.diagnosis["script"]["exit_code"] == code
    assert len(done.recording.losses.step) == 25
    assert "diagnoser/" not in without_ours(done.stderr).replace(str(tmp_path), "")


def wait_for(path: Path, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


SIGNALLED = "train(30)\nopen('ready', 'w').close()\nimport time\ntime.sleep(60)\n"


def started(folder: Path) -> subprocess.Popen[bytes]:
    write(folder, SIGNALLED)
    command = watched_command("script.py", run=folder / "run")
    process = subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for(folder / "ready")
    return process


def test_ctrl_c_ends_with_a_diagnosis_and_130(tmp_path):
    process = started(tmp_path)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"KeyboardInterrupt" in stderr and b"healthy" in stderr
    assert b"diagnoser/launch.py" not in stderr
    assert len(read_run(tmp_path / "run").losses.step) == 30
    assert json.loads((tmp_path / "run" / "diagnosis.json").read_text())["script"] == {
        "exit_code": 130
    }


@pytest.mark.slow
def test_a_killed_run_can_be_diagnosed(tmp_path):
    process = started(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    recording = read_run(tmp_path / "run")
    assert recording.ending is None
    assert len(recording.losses.step) >= 20  # at most the last second is missing
    command = [sys.executable, "-m", "diagnoser.cli", "diagnose", str(tmp_path / "run")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_os_exit_leaves_a_readable_log(tmp_path):
    write(tmp_path, "train(200)\nimport os\nos._exit(7)\n")
    done = watched(tmp_path, "script.py")
    assert done.code == 7
    assert done.recording.ending is None
    assert len(done.recording.losses.step) >= 100


@pytest.mark.slow
def test_a_child_that_runs_to_the_end_leaves_run_and_output_alone(tmp_path):
    body = """
        import os, sys
        train(10)
        sys.stdout.flush()
        child = os.fork()
        if child:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        train(20)
        sys.stdout.flush()
        sys.exit(0 if child else 9)
    """
    write(tmp_path, body)
    expected, done = plain(tmp_path, "script.py"), watched(tmp_path, "script.py")
    assert (done.code, done.stdout) == (0, expected.stdout)
    assert len(done.recording.losses.step) == 30
    assert done.stderr.count("diagnoser: report") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import sys\nprint('nothing to do')\n", "built no model"),
        ("import torch\ntorch.nn.Linear(1, 1)\n", "no training step was seen"),
    ],
)
def test_no_training_at_all_is_inconclusive(tmp_path, body, reason):
    (tmp_path / "script.py").write_text(body)
    done = watched(tmp_path, "script.py", options=("--exit-verdict",))
    assert (done.code, done.diagnosis["verdict"]) == (3, "inconclusive")
    assert reason in done.stderr


@pytest.mark.slow
def test_a_training_without_an_optimizer_object_is_seen(tmp_path):
    body = """
        for i in range(30):
            loss = torch.nn.functional.cross_entropy(model(x), y)
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
    """
    path = write(tmp_path, body)
    text = path.read_text()
    path.write_text("\n".join(t for t in text.splitlines() if not t.startswith("optimizer")))
    done = watched(tmp_path, "script.py", options=("--exit-verdict",))
    assert (done.code, done.diagnosis["verdict"]) == (0, "healthy")
    assert len(done.recording.series("update_ratio", "0").step) >= 5


@pytest.mark.slow
def test_findings_are_printed_while_it_trains_and_the_verdict_is_the_exit_code(tmp_path):
    body = """
        model[0].weight.requires_grad_(True)
        for i in range(40):
            loss = torch.nn.functional.cross_entropy(model(x).softmax(-1), y)
            loss.backward()
            optimizer.step()
        import sys
        print("TRAINED", file=sys.stderr)
    """
    write(tmp_path, body)
    done = watched(tmp_path, "script.py", options=("--exit-verdict",))
    assert (done.code, done.diagnosis["verdict"]) == (1, "faulty")
    live = done.stderr.partition("TRAINED")[0]
    assert "diagnoser: step" in live and "program_defect" in live
    assert done.diagnosis["findings"][0]["where"]["file"] == str(tmp_path / "script.py")


@pytest.mark.slow
def test_switched_off_it_is_plain_python(tmp_path):
    write(tmp_path, "import sys\ntrain(3)\nprint(type(torch.autograd.backward))\nsys.exit(6)\n")
    expected = plain(tmp_path, "script.py")
    done = watched(tmp_path, "script.py", env=ENVIRONMENT | {"DIAGNOSER_OFF": "1"})
    assert (done.code, done.stdout) == (6, expected.stdout)
    assert done.stderr == expected.stderr.decode()
    assert not done.run.exists()


@pytest.mark.slow
def test_a_full_disk_costs_the_files_and_nothing_else(tmp_path):
    write(tmp_path, "train(300)\n")
    limited = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (15000, 15000)); sys.argv = sys.argv[1:];"
        "runpy.run_module('diagnoser.cli', run_name='__main__')"
    )
    command = watched_command("script.py", run=tmp_path / "run")
    command = [sys.executable, "-c", limited, "diagnoser", *command[3:]]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, check=False)
    stderr = done.stderr.decode()
    assert (done.returncode, done.stdout) == (0, plain(tmp_path, "script.py").stdout)
    assert stderr.count("cannot write the run log") == 1
    assert "300 steps" in stderr and "healthy" in stderr  # what was found is said all the same
    assert "Traceback" not in stderr
    assert len(read_run(tmp_path / "run").losses.step) > 0
