"""Trackers: what is measured and found stands where the script logs, which notices nothing."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diagnoser import watch
from diagnoser.runlog import Recording, read_run
from diagnoser.trackers import tensorboard, wandb
from diagnoser.trackers.tracker import Said, tag
from diagnoser.trackers.tracking import TRACKED, TRACKERS

ROOT = Path(__file__).parents[1]
STEPS = 40

# Gradients are never cleared: a fault that the rules find after some steps.
SCRIPT = """
import hashlib, random, sys
import torch
from torch import nn
{opens}

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head((x + self.attention(x, x, x)[0]).mean(1))

def train():
    torch.manual_seed(0)
    random.seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    for step in range(40):
        x = torch.randn(8, 5, 8)
        loss = nn.functional.cross_entropy(model(x), x[:, 0, :3].argmax(1))
        loss.backward()
        optimizer.step()
        {logs}
    return model

{around}
    model = train()
{ends}
state = [*(p.detach().numpy().tobytes() for p in model.parameters()), torch.get_rng_state().numpy()]
state += [repr(random.getstate()).encode()]
print(hashlib.sha256(b"".join(bytes(s) for s in state)).hexdigest())
print(sorted({{"mlflow", "wandb", "tensorboard", "tensorboardX"}} & set(sys.modules)))
"""
PLAIN = {"opens": "", "logs": "pass", "around": "if True:", "ends": ""}
WRITER = {
    "opens": "from torch.utils.tensorboard import SummaryWriter\nwriter = SummaryWriter('board')",
    "logs": "writer.add_scalar('loss', loss.item(), step)",
    "around": "if True:",
    "ends": "writer.close()",
}
MLFLOW = {
    "opens": "import mlflow\nmlflow.set_tracking_uri('file:runs')",
    "logs": "mlflow.log_metric('loss', loss.item(), step=step)",
    "around": "with mlflow.start_run():",
    "ends": "",
}
WANDB = {
    "opens": "import wandb",
    "logs": "wandb.log({'loss': loss.item()})",
    "around": "with wandb.init(mode='offline', settings=wandb.Settings(silent=True)):",
    "ends": "",
}
SCRIPTS = {
    "TensorBoard": WRITER,
    "MLflow": MLFLOW,
    "W&B": WANDB,
}  # fmt: skip


def run(folder: Path, script: Mapping[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    """Runs a script, under the monitor where options are given."""
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPT.format(**script))
    under = ["-m", "diagnoser.cli", "run", "--out", "watched", *options] if options else []
    done = subprocess.run(
        [sys.executable, *under, "train.py"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MLFLOW_ALLOW_FILE_STORE": "true",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "WANDB_ERROR_REPORTING": "false",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


Curves = Mapping[str, list[tuple[int, float]]]


def read_board(folder: Path) -> tuple[Curves, str]:
    """Returns the scalars of event files and the last text of the findings."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "board"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    curves = {t: [(e.step, e.value) for e in events.Scalars(t)] for t in tags["scalars"]}
    (texts,) = [t for t in tags["tensors"] if t.startswith("diagnoser/")]
    last = events.Tensors(texts)[-1].tensor_proto.string_val[0].decode()
    return curves, last


def read_mlflow(folder: Path) -> tuple[Curves, str]:
    code = """
import json, mlflow
mlflow.set_tracking_uri("file:runs")
client = mlflow.MlflowClient()
(run,) = client.search_runs(["0"], filter_string="tags.`diagnoser.verdict` = 'faulty'")
curves = {k: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, k)]
          for k in run.data.metrics}
path = client.download_artifacts(run.info.run_id, "diagnoser/findings.md")
tags = {k: v for k, v in run.data.tags.items() if k.startswith("diagnoser")}
print(json.dumps([curves, str(tags) + open(path).read()]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    curves, text = json.loads(done.stdout)
    return {k: [(step, value) for step, value in points] for k, points in curves.items()}, text


def records(data: bytes, block: int = 32768) -> Iterator[bytes]:
    """Yields the records of an offline run: LevelDB's log format, after 7 bytes of its own."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def read_wandb(folder: Path) -> tuple[Curves, str]:
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    curves: dict[str, list[tuple[int, float]]] = {}
    summary: dict[str, Any] = {}
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.summary.update:
            summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        row = {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for name, value in row.items():
            if not isinstance(value, int | float) or name.startswith("_"):
                continue
            own = name.startswith("diagnoser/") and "/findings/" not in name
            step = row["diagnoser/step"] if own else row["_step"]
            curves.setdefault(name, []).append((step, value))
    tables = sorted(path.parent.glob("files/media/table/diagnoser/findings_*.table.json"))
    return curves, f"{summary['diagnoser/verdict']} {tables[-1].read_text()}"


READERS = {
    "TensorBoard": read_board,
    "MLflow": read_mlflow,
    "W&B": read_wandb,
}


def tracked_in(recording: Recording) -> Curves:
    """Returns what should be tracked of a run, by tag."""
    rows = recording.measurements
    curves: dict[str, list[tuple[int, float]]] = {}
    for i, code in enumerate(rows.quantity):
        name = rows.quantities[code]
        if name in TRACKED and rows.other[i] < 0 and np.isfinite(rows.value[i]):
            where = tag(name, rows.components[rows.component[i]])
            curves.setdefault(where, []).append((int(rows.step[i]), float(rows.value[i])))
    return curves


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a script prints of its parameters and random streams that nobody watches."""
    return run(tmp_path_factory.mktemp("script") / "plain", PLAIN).stdout.splitlines()[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_unmodified_script_finds_it_in_its_own_tracker(name, plain, tmp_path):
    done = run(tmp_path / "tracked", SCRIPTS[name], "--track", "--every", "5")
    assert done.stdout.splitlines()[0] == plain
    recording = read_run(tmp_path / "tracked" / "watched")
    assert not [e for e in recording.events if e.kind in ("monitor_error", "not_tracked")]

    curves, findings = READERS[name](tmp_path / "tracked")
    assert [step for step, _ in curves["loss"]] == list(range(STEPS))
    ours = {k: v for k, v in curves.items() if k.startswith("diagnoser/") and k.count("/") > 1}
    ours = {k: v for k, v in ours.items() if not k.startswith("diagnoser/findings/")}  # a table
    expected = tracked_in(recording)
    assert {t.split("/")[1] for t in expected} == set(TRACKED)
    assert ours.keys() == expected.keys()
    for where, points in expected.items():
        # The last measurement of a run that ends within it may not be whole, and is not written.
        assert [s for s, _ in ours[where]] == [s for s, _ in points][: len(ours[where])]
        assert len(ours[where]) >= len(points) - 1
        found, wanted = [v for _, v in ours[where]], [v for _, v in points][: len(ours[where])]
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert "faulty" in findings and "missing_zero_grad" in findings


@pytest.mark.slow
def test_nothing_is_imported_and_nothing_written_that_the_script_does_not(plain, tmp_path):
    done = run(tmp_path / "tracked", PLAIN, "--track")
    assert done.stdout.splitlines() == [plain, "[]"]
    assert "no open SummaryWriter, active MLflow run or W&B run was seen" in done.stderr
    assert {p.name for p in (tmp_path / "tracked").iterdir()} == {"train.py", "watched"}


# -- in one process: writers that are closed, that fail, that draw ---------------------------------


@pytest.fixture
def writer(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "board")) as made:
        yield made


def left(model: nn.Module) -> list[bytes]:
    tensors = [*model.state_dict().values(), torch.get_rng_state()]
    own = [repr(random.getstate()).encode(), np.random.get_state()[1].tobytes()]
    return [*(tensor.numpy().tobytes() for tensor in tensors), *own]


def train(out: Path | None, *, at: Mapping[int, Any] | None = None, **options: Any) -> Any:
    """Returns what a training leaves, and its watch; ``at`` holds what happens after steps."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def steps() -> None:
        for step in range(STEPS):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            if at is not None and step in at:
                at[step]()

    if out is None:
        steps()
        return left(model), None
    with watch(model, optimizer, out=out, every=5, verbose=False, **options) as watched:
        steps()
    return left(model), watched


def test_a_writer_that_fails_ends_the_tracking_and_nothing_else(writer, tmp_path, monkeypatch):
    calls = []

    def fails(*args: Any) -> None:
        calls.append(args)
        raise OSError("no space left")

    monkeypatch.setattr(writer, "add_scalar", fails)
    plain, _ = train(None)
    state, watched = train(tmp_path / "run", track=True)
    assert state == plain and len(calls) == 1
    (event,) = [e for e in watched.log.events if e.kind == "monitor_error"]
    assert "TensorBoard: OSError('no space left'); no more is written there" in event.message
    assert len(watched.log.losses.step) == STEPS and watched.diagnose().verdict


def test_what_a_tracker_draws_is_drawn_beside_the_training(writer, tmp_path, monkeypatch):
    original = writer.add_scalar

    def draws(*args: Any) -> None:
        torch.rand(3), random.random(), np.random.rand()
        original(*args)

    monkeypatch.setattr(writer, "add_scalar", draws)
    plain, _ = train(None)
    state, watched = train(tmp_path / "run", track=True)
    assert state == plain
    assert not [e for e in watched.log.events if e.kind == "monitor_error"]


def test_a_writer_that_is_opened_late_is_found_and_one_that_is_closed_still_told(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    made: list[SummaryWriter] = []
    _, watched = train(
        tmp_path / "run",
        at={
            12: lambda: made.append(SummaryWriter(str(tmp_path / "board"))),
            32: lambda: [one.close() for one in made],
        },
        track=True,
    )
    assert made[0].file_writer is None  # closed, as the script had left it
    curves, findings = read_board(tmp_path)
    steps = {step for points in curves.values() for step, _ in points}
    assert min(steps) > 12 and max(steps) <= 32
    assert findings.startswith(f"**{watched.diagnose().verdict}**")


def test_without_being_asked_it_writes_nothing(writer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path / "run", at={39: lambda: writer.add_scalar("loss", 1.0, 39)})
    writer.flush()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"] and events.Tags()["tensors"] == []


def test_the_writer_of_others_is_one_too(tmp_path):
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(tmp_path / "board")):
        _, watched = train(tmp_path / "run", track=True)
    curves, findings = read_board(tmp_path)
    assert curves.keys() == tracked_in(watched.log).keys()
    assert findings.startswith(f"**{watched.diagnose().verdict}**")


def test_of_several_writers_the_first_by_name_is_written_to(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "b")), SummaryWriter(str(tmp_path / "a")) as first:
        assert tensorboard.find() is first
    assert tensorboard.find() is None


def test_a_fork_of_the_training_writes_nothing(writer, tmp_path):
    from diagnoser.trackers import Tracking
    from diagnoser.types import Estimate, Measurement

    written = []
    writer.add_scalar = lambda *args: written.append(args)
    with watch(out=tmp_path / "run", verbose=False) as watched:
        tracking = Tracking(watched._log, watched.diagnose)
        rows = [Measurement(3, "gradient_norm", "head", Estimate(2.0))]
        read, write = os.pipe()
        if os.fork() == 0:
            tracking.measured(3, rows)
            os.write(write, str(len(written)).encode())
            os._exit(0)
        os.wait()
        assert os.read(read, 9) == b"0"
        tracking.measured(3, rows)
        assert written == [("diagnoser/gradient_norm/head", 2.0, 3)]
        tracking.end()
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("name", ["finish", "_finish"])
def test_before_a_run_is_finished_the_diagnosis_is_written(name):
    """Whether a run is left by `finish` alone or through what `with` calls, too."""
    said = []
    kind = type("Run", (), {name: lambda self, exit_code=None: said.append(exit_code)})
    finished = kind()
    undo = wandb.before_end(finished, lambda: said.append("diagnosis"))
    getattr(finished, name)(exit_code=3)
    assert said == ["diagnosis", 3]
    undo()
    getattr(finished, name)()
    assert said == ["diagnosis", 3, None] and not vars(finished)


def test_switched_off_it_does_nothing(writer, tmp_path, monkeypatch):
    monkeypatch.setenv("DIAGNOSER_OFF", "1")
    monkeypatch.setattr(writer, "add_scalar", lambda *_: pytest.fail("written to"))
    train(tmp_path / "run", track=True)


# -- what is written -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("component", "expected"),
    [
        ("layers.0.attn[query]", "layers.0.attn.query"),
        ("q_lin[head=3]", "q_lin.head.3"),
        ("generator:layers.0", "generator/layers.0"),
        ("param_groups[0][1]", "param_groups.0.1"),
        ("../../etc", "etc"),
        ("a\x1b[31m\n|é", "a_.31m___"),
        ("", ""),
    ],
)
def test_names_are_in_letters_that_every_tracker_takes(component, expected):
    assert tag("gradient_norm", component) == f"diagnoser/gradient_norm/{expected}".rstrip("/")


def test_names_and_messages_do_not_break_a_table():
    row = ("high", "dead_component", "a|b<script>", 3, "initialization", "x [y](z) `c`")
    lines = Said("faulty", "why *so*", (row,)).markdown().splitlines()
    assert lines[0] == r"**faulty**: why \*so\*"
    assert "dead_component" in lines[-1]
    assert lines[-1].replace(r"\|", "").count("|") == 7
    assert "<script>" not in lines[-1].replace(r"\<", "")


def test_every_tracker_is_in_the_table():
    files = {p.stem for p in (ROOT / "diagnoser" / "trackers").glob("*.py")}
    files -= {"__init__", "tracker", "tracking"}
    assert files == {t.scalars.__module__.rpartition(".")[2] for t in TRACKERS}
