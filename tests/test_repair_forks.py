"""Trials of repairs in forks of a real script: nothing of them is seen but what is kept."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from made_rules import always
from torch import nn

from diagnoser import watch
from diagnoser.repair import Live
from diagnoser.repair_loop import forks
from diagnoser.repair_loop.forks import why_not
from diagnoser.runlog import Recording, read_run

STEPS = 90
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

# What a test puts in: SETUP before the loop, EVERY in each step behind the optimizer's, END behind.
TRAINING = """
import hashlib, os, pickle, random, sys
import numpy as np
import torch
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0); random.seed(0); np.random.seed(0)
ME = os.getpid()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 16)
    def forward(self, x):
        h = self.embed(x)
        a, _ = self.attention(h, h, h, need_weights=False)
        return self.head(self.norm(h + a).mean(1))

model = Net()
left_out = "attention" if FROZEN else "nothing"
optimizer = torch.optim.Adam(
    [p for n, p in model.named_parameters() if not n.startswith(left_out)], lr=RATE
)

def digest():
    sha = hashlib.sha256()
    for tensor in model.state_dict().values():
        sha.update(tensor.numpy().tobytes())
    for group in optimizer.param_groups:
        sha.update(repr({k: v for k, v in group.items() if k != "params"}).encode())
        sha.update(str(len(group["params"])).encode())
        for p in group["params"]:
            for key, value in sorted(optimizer.state[p].items()):
                sha.update(key.encode() + value.numpy().tobytes())
    sha.update(torch.get_rng_state().numpy().tobytes())
    sha.update(pickle.dumps((random.getstate(), np.random.get_state())))
    return sha.hexdigest()[:16]

def batch():
    x = torch.randint(16, (32, 8))
    return x, x.max(1).values
{setup}
step = 0
while step < STEPS:
    x, y = batch()
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    print(step, loss.item(), random.random(), np.random.rand())
{every}
    step += 1
{end}
print("END", digest())
"""


def write(
    folder: Path,
    *,
    frozen: bool = False,
    rate: float = 3e-3,
    steps: int = STEPS,
    setup: str = "",
    every: str = "",
    end: str = "",
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = TRAINING.replace("{setup}", textwrap.dedent(setup))
    text = text.replace("{every}", textwrap.indent(textwrap.dedent(every), "    "))
    text = text.replace("{end}", textwrap.dedent(end))
    head = f"FROZEN, RATE, STEPS = {frozen}, {rate}, {steps}\n"
    (folder / "script.py").write_text(head + text)


@dataclass(frozen=True)
class Done:
    code: int
    stdout: bytes
    stderr: str
    run: Path

    @property
    def lines(self) -> list[str]:
        return self.stdout.decode().splitlines()

    @property
    def losses(self) -> list[float]:
        return [float(line.split()[1]) for line in self.lines if line[:1].isdigit()]

    @property
    def recording(self) -> Recording:
        return read_run(self.run)

    @property
    def repairs(self) -> list[dict[str, Any]]:
        found = json.loads((self.run / "diagnosis.json").read_text())["repairs"]
        return [{**r, **r["step"], "step": r["step"]["at"]} for r in found]

    @property
    def trials(self) -> list[Path]:
        return sorted((self.run / "trials").glob("*"))


def plain(folder: Path) -> Done:
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, check=False)
    return Done(done.returncode, done.stdout, done.stderr.decode(), folder / "none")


def command(run: Path, mode: str, *options: str, limits: str = "") -> list[str]:
    start = ["-m", "diagnoser.cli"]
    if limits:
        code = f"import sys, diagnoser.repair_loop.forks as forks\n{limits}\n"
        start = ["-c", f"{code}from diagnoser.cli import main\nsys.exit(main())"]
    given = ["run", "--out", str(run), "--repair", mode, *options, "script.py"]
    return [sys.executable, *start, *given]


def watched(folder: Path, mode: str, *options: str, limits: str = "", **extra: Any) -> Done:
    run = folder / f"run-{mode}"
    extra = {"env": ENVIRONMENT, "timeout": 300} | extra
    words = command(run, mode, *options, limits=limits)
    done = subprocess.run(words, cwd=folder, capture_output=True, check=False, **extra)
    return Done(done.returncode, done.stdout, done.stderr.decode(), run)


def actions(repair: dict[str, Any]) -> list[str]:
    return [action["name"] for action in repair["actions"]]


# -- an attention block that the optimizer was not given ------------------------------------------

NO_CHILD = """
try:
    print("child", os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    print("no child")
"""


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    folder = tmp_path_factory.mktemp("frozen")
    write(folder, frozen=True, end=NO_CHILD)
    modes = ("off", "suggest", "apply")
    return {"plain": plain(folder)} | {mode: watched(folder, mode) for mode in modes}


@pytest.mark.slow
def test_a_real_fault_gets_a_repair_that_is_kept_and_the_loss_ends_lower(frozen):
    before, done = frozen["plain"], frozen["apply"]
    assert done.code == 0, done.stderr
    kept = [r for r in done.repairs if r["verdict"] == "kept"]
    assert [actions(r) for r in kept] == [["register_parameters"]]
    assert kept[0]["component"] == "attention"
    assert len(done.losses) == STEPS
    assert sum(done.losses[-20:]) < 0.9 * sum(before.losses[-20:])
    assert "kept: register_parameters in attention" in done.stderr


@pytest.mark.slow
def test_until_then_it_is_the_training_that_it_was(frozen):
    before, done = frozen["plain"], frozen["apply"]
    at = next(r["step"] for r in done.repairs if r["verdict"] == "kept")
    assert done.lines[: at + 1] == before.lines[: at + 1]
    assert done.losses[at + 3 :] != before.losses[at + 3 :]
    # batches, and what else the script draws, go on as they would have
    drawn = [[line.split()[2:] for line in d.lines if line[:1].isdigit()] for d in (before, done)]
    assert drawn[0] == drawn[1]


@pytest.mark.slow
def test_stdout_is_what_the_script_prints_and_no_child_is_left(frozen):
    for done in frozen.values():
        assert [line.split()[0] for line in done.lines] == [
            *map(str, range(STEPS)),
            "no",
            "END",
        ]
        assert done.lines[-2] == "no child"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["off", "suggest"])
def test_what_is_only_said_changes_no_bit(frozen, mode):
    assert frozen[mode].stdout == frozen["plain"].stdout
    assert frozen[mode].code == 0
    assert frozen[mode].repairs == [] and frozen[mode].trials == []


@pytest.mark.slow
def test_suggest_says_what_would_be_tried_once(frozen):
    said = [line for line in frozen["suggest"].stderr.splitlines() if "would try" in line]
    mine = [line for line in said if "register_parameters in attention" in line]
    assert len(mine) == 1 and mine[0].startswith("diagnoser: step ")
    assert mine[0].endswith(" first (it has a gradient and no optimizer)")
    assert "would try" not in frozen["off"].stderr


@pytest.mark.slow
def test_every_attempt_stands_in_the_diagnosis_with_its_numbers(frozen):
    done = frozen["apply"]
    events = [e for e in done.recording.events if e.kind == "repair"]
    assert len(events) == len(done.repairs) >= 1
    for repair in done.repairs:
        assert repair["reason"] and repair["derivation"]
        assert repair["guarantee"].startswith("paired: every arm is a fork of this process")
    kept = next(r for r in done.repairs if r["verdict"] == "kept")
    assert kept["difference"]["value"] < 0 < kept["difference"]["std_error"]
    assert kept["after"]["loss"] < kept["twin"]["loss"]


@pytest.mark.slow
def test_the_log_of_the_run_is_of_the_run_alone(frozen):
    log = frozen["apply"].recording
    assert log.losses.step.tolist() == list(range(STEPS))
    assert [format(x, ".6g") for x in log.losses.value] == [
        format(x, ".6g") for x in frozen["apply"].losses
    ]
    assert log.ending is not None and log.ending.exit_code == 0
    assert not log.damaged_lines
    assert [e.kind for e in log.events if e.kind == "trial"] == []
    assert log.ending.cost is not None and log.ending.cost.repairing_s > 0


@pytest.mark.slow
def test_each_trial_has_a_log_of_its_own_that_can_be_diagnosed(frozen):
    done = frozen["apply"]
    assert len(done.trials) >= 1 + len(done.repairs)
    assert [t.name for t in done.trials] == [f"{i + 1:02d}" for i in range(len(done.trials))]
    at = min(r["step"] for r in done.repairs)
    for trial in done.trials:
        log = read_run(trial)
        assert log.ending is not None
        assert log.losses.step.tolist() == list(range(len(log.losses.step)))
        assert len(log.losses.step) > at
    last = [sys.executable, "-m", "diagnoser.cli", "diagnose", str(done.trials[1]), "--json"]
    told = subprocess.run(last, capture_output=True, check=False)
    assert told.returncode in (0, 1, 3), told.stderr.decode()
    assert json.loads(told.stdout)["verdict"]


# -- trainings whose bits must not change ----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["off", "suggest", "apply"])
def test_a_healthy_training_keeps_every_bit(tmp_path, mode):
    write(tmp_path, steps=200)
    before, done = plain(tmp_path), watched(tmp_path, mode)
    assert (done.code, done.stdout) == (0, before.stdout)
    assert done.repairs == []


# All that a script can have open, and how it can be noticed that it was used in a trial.
FILES = """
import logging
from torch import save
LOG = open("steps.txt", "a")
logging.basicConfig(filename="train.log", level=logging.INFO, format="%(message)s")
TEXT = open("data.txt")
RAW = open("data.bin", "rb", buffering=0)
PIPE = os.pipe()
os.write(PIPE[1], bytes(range(250)))
def batch():
    words = TEXT.readline().split()
    x = torch.tensor([int(w) % 16 for w in words[:256]]).view(32, 8)
    x[0, 0] = RAW.read(1)[0] % 16
    if PIPED:
        x[0, 1] = os.read(PIPE[0], 1)[0] % 16
    return x, x.max(1).values
"""
FILES_EVERY = """
print(step, "unbuffered", flush=step % 7 == 0)
print(step, file=LOG, flush=step % 5 == 0)
logging.info("step %d: %.6f", step, loss.item())
os.write(LOG.fileno(), b".")
if step % 40 == 39:
    torch.save(model.state_dict(), f"model-{step}.pt")
if step % 60 == 59:
    save(optimizer.state_dict(), f"optimizer-{step}.pt")
"""


def contents(folder: Path) -> dict[str, bytes]:
    kept = (".txt", ".log", ".bin", ".pt", ".npy")
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix in kept}


def with_data(folder: Path, **parts: str) -> None:
    write(folder, **parts)
    random = torch.Generator().manual_seed(3)
    rows = torch.randint(16, (STEPS, 256), generator=random).tolist()
    (folder / "data.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
    (folder / "data.bin").write_bytes(bytes(i % 251 for i in range(STEPS)))


@pytest.mark.slow
@pytest.mark.parametrize("piped", [False, True])
def test_files_output_and_place_in_the_data_are_those_of_one_training(tmp_path, piped):
    """A pipe cannot be read twice: trials get nothing from it, and cannot be made then."""
    for name in ("plain", "apply"):
        with_data(
            tmp_path / name, setup=f"PIPED = {piped}\n{FILES}", every=FILES_EVERY, end="LOG.close()"
        )
    before = plain(tmp_path / "plain")
    assert before.code == 0, before.stderr
    done = watched(tmp_path / "apply", "apply", *always(tmp_path))
    assert (done.code, done.stdout) == (0, before.stdout), done.stderr
    assert contents(tmp_path / "apply") == contents(tmp_path / "plain")
    assert len(contents(tmp_path / "apply")) == 7
    compared = [r for r in done.repairs if r["difference"] is not None]
    assert bool(compared) is not piped
    assert all(r["verdict"] == "rolled_back" for r in done.repairs)
    assert ("cannot be continued" in done.stderr) is piped


@pytest.mark.slow
def test_a_checkpoint_late_in_a_trial_does_not_spoil_it(tmp_path):
    """The steps before it are compared."""
    write(tmp_path, frozen=True, every="if step % 33 == 32: torch.save(loss, f'{step}.pt')")
    done = watched(tmp_path, "apply")
    kept = [actions(r) for r in done.repairs if r["verdict"] == "kept"]
    assert kept == [["register_parameters"]], done.stderr
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["32.pt", "65.pt"]


TRACES = [
    "open('new.txt', 'a').close()",
    "os.close(os.open('new.txt', os.O_WRONLY | os.O_CREAT))",
    "open('a.txt', 'r+').write('x')",
    "np.save('step.npy', np.array(step))",
    "torch.save(step, 'step.pt')",
    "torch.save(step, 'old.pt', _use_new_zipfile_serialization=False)",
    "from torch import save; save(step, 'other.pt')",
    "SAVE(step, 'before.pt')",
    "torch.jit.save(torch.jit.script(nn.Linear(1, 1)), 'script.pt')",
    "import subprocess; subprocess.run(['touch', 'process.txt'])",
    "os.system('touch shell.txt')",
    "os.fork() or open('forked.txt', 'w').close()",
    "import sqlite3; sqlite3.connect('base.txt').execute('create table t (x)')",
    "os.makedirs('directory.txt')",
    "os.replace('a.txt', 'b.txt')",
    "os.remove('a.txt')",
    "os.chmod('a.txt', 0o600)",
    "os.utime('a.txt', (1, 1))",
    "os.kill(ME, 15)",
]


@pytest.mark.slow
def test_what_would_leave_a_trace_ends_a_trial_before_it_does(tmp_path):
    setup = f"""
        SAVE = torch.save
        TRACES = {TRACES}
        with open("a.txt", "w") as file:
            file.write("mine")
        os.chmod("a.txt", 0o644)
    """
    # Of five steps each; a round of trials begins in every five, and only a trial does it.
    every = "if os.getpid() != ME: exec(TRACES[step // 5])"
    with_traces, without = tmp_path / "traces", tmp_path / "plain"
    for folder in (with_traces, without):
        write(folder, steps=5 * len(TRACES), setup=setup, every=every)
    before = plain(without)
    assert before.code == 0, before.stderr
    limits = "import diagnoser.repair_loop.script as script; script.SETTLING = 3"
    done = watched(with_traces, "apply", *always(tmp_path), "--every", "5", limits=limits)
    assert (done.code, done.stdout) == (0, before.stdout), done.stderr
    assert done.repairs == []
    assert {p.name for p in with_traces.iterdir()} == {"script.py", "a.txt", "run-apply"}
    assert (with_traces / "a.txt").read_text() == "mine"
    assert (with_traces / "a.txt").stat().st_mode & 0o777 == 0o644
    assert (with_traces / "a.txt").stat().st_mtime > 1
    begun = set()
    for trial in done.trials:
        log = read_run(trial)
        said = [e.message for e in log.events if e.kind == "trial"]
        assert len(said) == 1 and said[0].startswith("it would have "), (trial, said)
        assert log.ending is not None and log.ending.exit_code is None
        begun.add(int(log.losses.step[-1]) // 5)
    assert begun == set(range(len(TRACES)))


@pytest.mark.slow
def test_a_file_each_step_makes_trials_impossible_which_is_said_once(tmp_path):
    every = "open('steps.txt', 'a').write(f'{step}\\n')"
    for name in ("plain", "apply"):
        write(tmp_path / name, every=every)
    before = plain(tmp_path / "plain")
    done = watched(tmp_path / "apply", "apply", *always(tmp_path))
    assert (done.code, done.stdout) == (0, before.stdout)
    assert contents(tmp_path / "apply") == contents(tmp_path / "plain")
    assert done.repairs == []
    said = [line for line in done.stderr.splitlines() if "cannot be continued" in line]
    assert len(said) == 1 and said[0].endswith("it would have written a file"), done.stderr


@pytest.mark.slow
def test_what_is_saved_into_memory_is_no_trace(tmp_path):
    every = "import io; torch.save(model.state_dict(), io.BytesIO())"
    write(tmp_path, every=every)
    done = watched(tmp_path, "apply", *always(tmp_path))
    assert [r for r in done.repairs if r["difference"] is not None], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("steps", [6, 15])
def test_a_script_may_end_inside_a_trial(tmp_path, steps):
    write(tmp_path, steps=steps, end="open('ended.txt', 'a').write('once')")
    before = plain(tmp_path)
    (tmp_path / "ended.txt").unlink()
    done = watched(tmp_path, "apply", *always(tmp_path))
    assert (done.code, done.stdout) == (0, before.stdout), done.stderr
    assert (tmp_path / "ended.txt").read_text() == "once"
    assert all(r["verdict"] == "rolled_back" for r in done.repairs)
    assert done.stderr.count("diagnoser: report") == 1


@pytest.mark.slow
def test_a_script_may_raise_inside_a_trial(tmp_path):
    every = """
        if step == 12:
            try:
                raise ValueError("at twelve")
            finally:
                print("cleaned up")
    """
    write(tmp_path, every=every)
    before, done = plain(tmp_path), watched(tmp_path, "apply", *always(tmp_path))
    assert (done.code, done.stdout) == (1, before.stdout)
    assert done.stderr.count("ValueError: at twelve") == 1
    assert done.recording.ending.exit_code == 1
    assert all(r["verdict"] == "rolled_back" for r in done.repairs)


RAISE = "{name: scale_learning_rate, component: model, parameters: {factor: 1000.0}}"


@pytest.mark.slow
def test_what_fails_with_the_repair_alone_is_not_kept_and_is_told(tmp_path):
    every = "assert loss.item() < 20, 'diverged'"
    write(tmp_path, every=every)
    before, done = plain(tmp_path), watched(tmp_path, "apply", *always(tmp_path, RAISE))
    assert (done.code, done.stdout) == (0, before.stdout), done.stderr
    raised = [r for r in done.repairs if r["actions"][0]["name"] == "scale_learning_rate"]
    assert raised and all(r["verdict"] == "rolled_back" for r in raised)
    assert "diverged" not in done.stderr
    failed = [r for r in raised if "exit code 1" in r["reason"]]
    assert failed, [r["reason"] for r in raised]


@pytest.mark.slow
def test_a_loss_that_is_no_number_with_the_repair_alone_is_not_kept(tmp_path):
    every = "if optimizer.param_groups[0]['lr'] != RATE: raise SystemExit(9)"
    setup = """
        class Clipped(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x): return torch.log(30 - x)
            @staticmethod
            def backward(ctx, g): return g
        forward = Net.forward
        Net.forward = lambda self, x: forward(self, x) + 0 * Clipped.apply(
            self.head.weight.abs().max()
        )
    """
    write(tmp_path, every=every, setup=setup)
    before, done = plain(tmp_path), watched(tmp_path, "apply", *always(tmp_path, RAISE))
    assert (done.code, done.stdout) == (0, before.stdout), done.stderr
    lost = [r for r in done.repairs if r["reason"] == "the loss became NaN or infinite"]
    assert lost and all(r["verdict"] == "rolled_back" for r in lost)
    assert all(r["difference"] is None for r in lost)


@pytest.mark.slow
def test_a_trial_that_hangs_is_killed_after_its_time(tmp_path):
    setup = "import time\nMADE = []"
    every = """
        if os.getpid() != ME:
            MADE.append(1)
            if len(MADE) == 4 and os.environ.get("HANG"):
                time.sleep(1000)
    """
    write(tmp_path, setup=setup, every=every)
    before = plain(tmp_path)
    start = time.monotonic()
    done = watched(
        tmp_path,
        "apply",
        *always(tmp_path),
        limits="forks.AT_LEAST_S, forks.SLOWER = 2.0, 0.0",
        env=ENVIRONMENT | {"HANG": "1"},
    )
    assert time.monotonic() - start < 120
    assert (done.code, done.stdout) == (0, before.stdout)
    assert "the trial took longer than 2 s" in done.stderr
    assert read_run(done.trials[0]).ending is None


@pytest.mark.slow
def test_a_trial_that_dies_says_of_what(tmp_path):
    every = """
        if os.getpid() != ME and step > 20:
            import ctypes
            ctypes.string_at(0)
    """
    write(tmp_path, every=every)
    before, done = plain(tmp_path), watched(tmp_path, "apply", *always(tmp_path))
    assert (done.code, done.stdout) == (0, before.stdout)
    assert "the trial was killed by SIGSEGV" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False])
def test_ctrl_c_during_a_trial_leaves_no_child_and_the_script_its_own_weights(
    tmp_path, whole_group
):
    slow = """
        print(step, STATE, flush=True)
        if os.getpid() != ME:
            import time
            time.sleep(0.5)
    """
    write(tmp_path, every=slow)
    text = (tmp_path / "script.py").read_text()
    text = text.replace("    optimizer.step()\n", "    optimizer.step()\n    STATE = digest()\n")
    loop = text.index("step = 0\nwhile")
    end = text.index('print("END"')
    body = textwrap.indent(text[loop:end], "    ")
    handler = "except KeyboardInterrupt:\n    print('HANDLED', step, digest())\n    raise\n"
    (tmp_path / "script.py").write_text(f"{text[:loop]}try:\n{body}\n{handler}{text[end:]}")
    before = plain(tmp_path)
    words = command(tmp_path / "run", "apply", *always(tmp_path))
    process = subprocess.Popen(
        words,
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    trials = tmp_path / "run" / "trials"
    end_s = time.monotonic() + 60
    while not list(trials.glob("*/log.jsonl")):
        assert time.monotonic() < end_s
        time.sleep(0.02)
    time.sleep(1.0)
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr.decode()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    lines = stdout.decode().splitlines()
    assert lines[-1].startswith("HANDLED")
    _, step, state = lines[-1].split()
    assert lines[:-1] == before.lines[: len(lines) - 1]
    assert state == digest_at(before, int(step))  # Ctrl-C came behind this step
    assert b"diagnoser/repair_loop" not in stderr


def digest_at(done: Done, step: int) -> str:
    return next(
        words[1]
        for words in (line.split() for line in done.lines)
        if words[0] == str(step) and len(words) == 2
    )


@pytest.mark.slow
def test_with_several_threads_a_trial_does_not_wait_for_those_that_it_lost(tmp_path):
    setup = """
        torch.set_num_threads(2)
        WIDE = torch.randn(700, 700)
        assert torch.isfinite(WIDE @ WIDE).all()
    """
    every = "(WIDE @ WIDE).exp().sum(); torch.sort(torch.randn(100_000))"
    write(tmp_path, setup=setup, every=every)
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "OMP_NUM_THREADS"}
    limits = "forks.AT_LEAST_S, forks.SLOWER = 30.0, 0.0"
    done = watched(tmp_path, "apply", *always(tmp_path), limits=limits, env=environment)
    assert done.code == 0
    assert "took longer" not in done.stderr
    assert [r for r in done.repairs if r["difference"] is not None], done.stderr
    assert done.lines[-1].startswith("END")


@pytest.mark.slow
def test_where_trials_cannot_be_written_the_training_goes_on(tmp_path):
    write(tmp_path)
    before = plain(tmp_path)
    (tmp_path / "run-apply").mkdir()
    (tmp_path / "run-apply" / "trials").write_text("a file")
    done = watched(tmp_path, "apply", *always(tmp_path))
    assert (done.code, done.stdout) == (0, before.stdout), done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if "cannot be continued" in line]
    assert len(said) == 1, done.stderr
    assert done.repairs == []


SCHEDULED = """
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
"""
SCHEDULED_EVERY = """
schedule.step()
print("rates", step, [g["lr"] for g in optimizer.param_groups], len(optimizer.param_groups))
"""


@pytest.mark.slow
def test_the_script_s_schedule_clipping_and_accumulation_go_on_behind_a_repair(tmp_path):
    write(tmp_path, frozen=True, setup=SCHEDULED, every=SCHEDULED_EVERY)
    text = (tmp_path / "script.py").read_text()
    accumulated = """    loss.backward()
    x, y = batch()
    (nn.functional.cross_entropy(model(x), y) / 2).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    assert sum(p.grad.square().sum() for p in model.parameters()).sqrt() < 0.5001
"""
    (tmp_path / "script.py").write_text(text.replace("    loss.backward()\n", accumulated))
    before, done = plain(tmp_path), watched(tmp_path, "apply")
    assert (before.code, done.code) == (0, 0), before.stderr + done.stderr
    kept = [actions(r) for r in done.repairs if r["verdict"] == "kept"]
    assert kept == [["register_parameters"]], done.stderr
    rates = [[line for line in d.lines if line.startswith("rates")] for d in (before, done)]
    assert rates[0] == rates[1] and len(rates[0]) == STEPS
    assert sum(done.losses[-20:]) < sum(before.losses[-20:])


@pytest.mark.slow
def test_a_rate_far_too_high_is_lowered_and_the_script_s_schedule_sees_its_own(tmp_path):
    write(tmp_path, rate=1.0, steps=150, setup=SCHEDULED, every=SCHEDULED_EVERY)
    before, done = plain(tmp_path), watched(tmp_path, "apply")
    assert done.code == 0
    kept = [actions(r) for r in done.repairs if r["verdict"] == "kept"]
    assert any("scale_learning_rate" in names for names in kept), done.stderr
    rates = [[line for line in d.lines if line.startswith("rates")] for d in (before, done)]
    assert rates[0] == rates[1]
    assert sum(done.losses[-20:]) < 0.8 * sum(before.losses[-20:])


# -- what cannot be forked -------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _threads_of_this_test(monkeypatch):
    """Threads that other tests of this process left behind are none of a training's."""
    others, every = set(threading.enumerate()) - {threading.main_thread()}, threading.enumerate
    monkeypatch.setattr(threading, "enumerate", lambda: [t for t in every() if t not in others])


@pytest.fixture
def live() -> Live:
    model = nn.Linear(2, 2)
    return Live({"model": model}, [torch.optim.SGD(model.parameters(), lr=0.1)])


def test_a_plain_training_can_be_forked(live):
    assert why_not(live) == ""


@pytest.fixture
def waiting() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_other_threads_would_be_lost(live, waiting):
    thread = threading.Thread(target=waiting.wait, name="prefetch", daemon=True)
    thread.start()
    assert re.fullmatch(r"it has other threads \(prefetch\), .*", why_not(live))
    waiting.set()
    thread.join()
    assert why_not(live) == ""


def test_the_thread_of_a_progress_bar_only_sleeps(live, waiting):
    class TMonitor(threading.Thread):
        pass

    TMonitor(target=waiting.wait, daemon=True).start()
    assert why_not(live) == ""


def test_another_thread_than_the_main_one_is_refused(live):
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(why_not(live)))
    thread.start()
    thread.join()
    assert said == ["it does not train in the main thread"]


def test_workers_of_a_data_loader_would_be_shared(live):
    loader = torch.utils.data.DataLoader([1, 2, 3, 4], num_workers=1)
    batches = iter(loader)
    next(batches)
    assert "worker processes" in why_not(live) or "other threads" in why_not(live)
    del batches, loader
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(10)
    assert why_not(live) == ""


def test_an_accelerator_cannot_be_forked(live, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert "accelerator" in why_not(live)
    monkeypatch.undo()
    on_meta = nn.Linear(2, 2, device="meta")
    assert "accelerator" in why_not(Live({"model": on_meta}, []))


def test_one_of_several_processes_is_refused(live, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert "several processes" in why_not(live)


def test_where_memory_is_short_it_is_said_how_much(live, monkeypatch):
    monkeypatch.setattr(forks, "free_memory", lambda _: 10)
    assert why_not(live) == "a fork may take 72 B, and 10 B of memory are free"
    monkeypatch.setattr(forks, "free_memory", lambda _: None)
    assert why_not(live) == ""


def test_a_file_that_is_mapped_for_writing_is_refused(live, tmp_path):
    np = pytest.importorskip("numpy")
    mapped = np.memmap(tmp_path / "counts.bin", dtype=np.int64, mode="w+", shape=(4,))
    assert "counts.bin" in why_not(live)
    del mapped
    read = np.memmap(tmp_path / "counts.bin", dtype=np.int64, mode="r")
    lock = multiprocessing.get_context("fork").RLock()
    assert why_not(live) == ""
    del read, lock


def test_memory_that_processes_share_is_refused(live):
    shared = torch.zeros(4).share_memory_()
    assert "mapped into memory" in why_not(live)
    del shared
    assert why_not(live) == ""


def test_a_system_without_fork_is_refused(live, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "cannot fork" in why_not(live)


# -- in code ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    repairs: list[dict[str, Any]]
    out: Path
    moved: list[bool]  # whether a step changed the body


def trained(out: Path, mode: str, anew: int = -1) -> Trained:
    """A training whose body the optimizer was not given; the test's own process is forked.

    At step ``anew`` it builds another optimizer, of the same mistake.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
    )
    parameters = [*model[0].parameters(), *model[4].parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    truth = torch.randn(8, 4)
    losses = []
    body = []
    with watch(model, optimizer, out=out, repair=mode, verbose=False) as watched_here:
        for step in range(60):
            if step == anew:
                optimizer = torch.optim.Adam(parameters, lr=0.01)
            body.append(model[2].weight.detach().clone())
            x = torch.randn(32, 8)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), (x @ truth).argmax(1))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        watched_here.diagnose()
    repairs = json.loads((out / "diagnosis.json").read_text())["repairs"]
    moved = [not torch.equal(*pair) for pair in itertools.pairwise(body)]
    return Trained(losses, repairs, out, moved)


def children() -> set[str]:
    """Processes of this one, those that have ended and were not waited for among them."""
    me = os.getpid()
    return set(Path(f"/proc/{me}/task/{me}/children").read_text().split())


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_loop_in_code_is_repaired_as_a_script_is(tmp_path, one_thread):
    earlier = children()
    before = trained(tmp_path / "off", "off")
    done = trained(tmp_path / "apply", "apply")
    assert before.repairs == [] and not any(before.moved)
    kept = [r for r in done.repairs if r["verdict"] == "kept"]
    assert [r["step"]["actions"][0]["name"] for r in kept] == ["register_parameters"]
    at = kept[0]["step"]["at"]
    assert done.losses[: at + 1] == before.losses[: at + 1]
    assert done.moved == [step > at for step in range(len(done.moved))]
    assert sum(done.losses[-10:]) < sum(before.losses[-10:])
    assert len(read_run(done.out).losses.step) == 60
    assert len(list((done.out / "trials").iterdir())) >= 2
    assert children() <= earlier


def test_an_optimizer_that_is_built_anew_takes_over_what_was_kept(tmp_path, one_thread):
    done = trained(tmp_path, "apply", anew=40)
    at = next(r["step"]["at"] for r in done.repairs if r["verdict"] == "kept")
    assert at < 39
    assert done.moved[at + 1 : 40] == [True] * (39 - at)
    assert done.moved[41:] == [True] * (len(done.moved) - 41)  # step 40 shows that it is another
    said = [e for e in read_run(tmp_path).events if "built anew" in e.message]
    assert [(e.step, e.kind) for e in said] == [(40, "repairs")]
    assert said[0].message.endswith("what was kept goes on: register_parameters in 2")


@pytest.mark.parametrize("anew", [14, 24])
def test_an_optimizer_may_be_built_anew_during_a_trial(tmp_path, one_thread, anew):
    done = trained(tmp_path, "apply", anew=anew)
    assert len(done.losses) == 60
    assert [r for r in done.repairs if r["difference"] is not None]
    assert all("Error" not in r["reason"] for r in done.repairs)
