"""Two ranks on CPU, watched: nothing of them changes, and what is found is that of one process."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from diagnoser.runlog import Recording, read_run
from tests import rank_jobs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
RUN = (sys.executable, "-m", "diagnoser.cli", "run")
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "MASTER_ADDR": "127.0.0.1",
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))),
}
PATIENCE = 240.0  # seconds, for machines with other things to do; a hang is longer


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def on_two_ranks(folder: Path, *command: str) -> list[subprocess.CompletedProcess[str]]:
    """Runs a command on two ranks, as a launcher does that ends none of them."""
    ports = {"MASTER_PORT": free_port(), "SECOND_PORT": free_port()}
    common = ENVIRONMENT | {"WORLD_SIZE": "2"} | ports
    started = [
        subprocess.Popen(
            command,
            cwd=folder,
            env=common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=PATIENCE) for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return [
        subprocess.CompletedProcess(p.args, p.returncode, *texts)
        for p, texts in zip(started, said, strict=True)
    ]


SCRIPT = """
    import hashlib, os, signal, sys
    import torch, torch.distributed as dist
    from torch import nn
    def train(rank, ranks, how):
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))
        model = nn.parallel.DistributedDataParallel(layers)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        torch.manual_seed(rank)
        for step in range(40):
            points = torch.randn(16, 8)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(points), points[:, :3].argmax(1))
            loss.backward()
            optimizer.step()
            if step == 25 and rank == 1 and how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if step == 25 and rank == 1 and how == "raises":
                raise ValueError("rank 1 is unwell")
            if step == 25 and rank == 1 and how == "leaves":
                sys.exit()
        sha = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
        for tensor in model.state_dict().values():
            sha.update(tensor.numpy().tobytes())
        print(f"{rank} {loss.item()!r} {sha.hexdigest()}\\n", end="", flush=True)
        dist.destroy_process_group()
    if __name__ == "__main__":
        how = sys.argv[1]
        if how == "spawned":
            import torch.multiprocessing as mp
            mp.spawn(train, args=(2, how), nprocs=2)
        else:
            train(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), how)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "train.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return path


Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def job(script: Path) -> tuple[Path, Found]:
    folder = script.parent
    done = on_two_ranks(folder, sys.executable, str(Path(rank_jobs.__file__)), str(script))
    assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
    found = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]
    for rank, one in zip(found, done, strict=True):
        rank["plain"] = one.stdout.strip()
    return folder, found


def rows(recording: Recording) -> dict[tuple[int, str, str, str], float]:
    table = recording.measurements
    names = (*table.components, "")  # the last: no other component
    return {
        (int(step), table.quantities[quantity], names[component], names[other]): float(value)
        for step, quantity, component, other, value in zip(
            table.step, table.quantity, table.component, table.other, table.value, strict=True
        )
    }


def events(recording: Recording, *kinds: str) -> list[str]:
    return [event.message for event in recording.events if event.kind in kinds]


# -- watching changes nothing ------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*rank_jobs.DDP, *rank_jobs.FSDP])
def test_every_bit_is_the_same_on_both_ranks(job, mode):
    folder, found = job
    for rank in found:
        plain, watched = rank["bits"][mode]
        assert plain == watched
    recording = read_run(folder / f"bits {mode}")
    assert not events(recording, "monitor_error")
    measured = {quantity for _, quantity, _, _ in rows(recording)}
    assert {"gradient_norm", "update_ratio", "learning_rate"} <= measured
    assert ("update_curvature" in measured) == (mode in rank_jobs.DDP or "probe" in mode)


# -- what is measured --------------------------------------------------------------------------

ALIKE = {  # whatever the number of ranks, with how far they may differ
    "gradient_norm": 1e-6, "update_norm": 1e-6, "update_ratio": 1e-6, "weight_norm": 1e-6,
    "weight_scale": 1e-6, "moment_ratio": 1e-6, "gradient_cosine": 1e-6, "zero_share": 1e-6,
    "learning_rate": 0.0, "reached": 0.0, "optimized": 0.0, "trainable": 0.0,
    "non_finite_gradient": 0.0, "non_finite_weight": 0.0,
}  # fmt: skip
CURVATURE = {
    "update_curvature": 1e-6, "update_curvature_share": 1e-6, "step_sharpness": 1e-6,
    "overshoot": 1e-6, "coupling": 1e-6, "coupling_share": 1e-6, "block_curvature": 1e-6,
}  # fmt: skip
# By central differences: what is beside curvature is taken beside the weights, to second order.
BY_DIFFERENCES = {
    "update_curvature": 1e-6, "step_sharpness": 1e-6,
    "update_curvature_share": 1e-3, "overshoot": 1e-3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "compared"),
    [
        ("ddp", ALIKE | CURVATURE),
        ("fsdp", ALIKE),
        ("hsdp", ALIKE),
        ("fsdp on a probe", ALIKE | BY_DIFFERENCES),
    ],
)
def test_numbers_are_those_of_one_process_on_the_joint_batch(job, tmp_path, kind, compared):
    folder, _ = job
    rank_jobs.numbers("single on a probe" if "probe" in kind else "single", tmp_path / "run")
    alone, both = read_run(tmp_path / "run"), read_run(folder / kind)
    assert both.losses.step.tolist() == alone.losses.step.tolist()
    assert both.losses.value == pytest.approx(alone.losses.value, rel=1e-9)
    assert [c.name for c in both.components] == [c.name for c in alone.components]
    expected, found = rows(alone), rows(both)
    largest: dict[tuple[int, str], float] = {}
    for (step, quantity, _, _), value in expected.items():
        largest[step, quantity] = max(largest.get((step, quantity), 0.0), abs(value))
    for quantity, within in compared.items():
        wanted = {key for key in expected if key[1] == quantity}
        assert wanted, quantity
        assert wanted == {key for key in found if key[1] == quantity}
        for key in wanted:
            if key[1:3] == ("zero_share", "fused.in_proj[key]"):
                continue  # the gradient of a key's bias is rounding, which may sum to zero
            # Of a component that hardly counts, what rounding leaves of it may differ.
            scale = max(abs(expected[key]), 1e-6 * largest[key[:2]])
            assert abs(found[key] - expected[key]) <= within * scale, key


def test_of_one_shard_alone_nothing_is_said(job, tmp_path):
    folder, _ = job
    (tmp_path / "log.jsonl").write_bytes((folder / "fsdp" / "log.jsonl").read_bytes())
    recording = read_run(tmp_path)
    assert "gradient_norm" not in {quantity for _, quantity, _, _ in rows(recording)}
    assert events(recording, "ranks") == [
        "rank 1 of 2 left no log here (on another host, without a directory in common?): "
        "all that is said is of the others"
    ]


@pytest.mark.parametrize("fault", rank_jobs.FAULTS)
def test_a_fault_is_found_where_one_process_finds_it(job, tmp_path, fault):
    folder, found = job
    assert found[0]["faults"][fault] == (expected := _as_json(fault, tmp_path))
    assert expected["verdict"] == ("healthy" if fault == "healthy" else "faulty")
    if fault == "nan":  # on one rank, for one step; after that on all
        recording = read_run(folder / "fault nan")
        assert [math.isnan(loss) for loss in recording.losses.value] == [False] * 30 + [True] * 30


def _as_json(fault: str, folder: Path) -> Any:
    return json.loads(json.dumps(rank_jobs.faulty(fault, folder / "run")))


# -- a trainer that owns the loop ---------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # what frameworks warn of in their own code is theirs
@pytest.mark.parametrize(("kind", "times"), [("divides", 1.0), ("averages", 2.0)])
def test_what_a_trainer_multiplies_a_loss_by_is_known(job, tmp_path, kind, times):
    """Its gradients are averaged over ranks, so it multiplies by their number what is divided by
    the labels of all of them, and what a model has averaged over its own as well."""
    folder, found = job
    alone = rank_jobs.by_trainer(kind, tmp_path / "run")
    for rank in found:
        assert rank["trainer"][kind]["bits"] == rank["trainer"][kind]["plain bits"]
        assert rank["trainer"][kind]["verdict"] == alone["verdict"] == "healthy"
        assert rank["trainer"][kind]["sources"] == alone["sources"]
    one, both = read_run(tmp_path / "run"), read_run(folder / f"trainer {kind}")
    assert not events(both, "monitor_error", "ranks")
    assert both.losses.step.tolist() == one.losses.step.tolist() == list(range(160))
    assert both.losses.value / times == pytest.approx(one.losses.value, rel=1e-9)
    factors = [value for key, value in rows(both).items() if key[1] == "loss_factor"]
    assert (len(factors) > 0) is (kind == "averages")  # of a sum of losses it is not known
    assert factors == pytest.approx([times] * len(factors), rel=1e-9)


# -- from the command line ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(job: tuple[Path, Found]) -> list[str]:
    """What the script prints where nobody watches, a line a rank."""
    return [rank["plain"] for rank in job[1]]


def check_whole(run: Path, stdout: str, stderr: str, plain: list[str]) -> None:
    """Two ranks were watched, to the end, and it is said once."""
    assert sorted(line for line in stdout.split("\n") if line) == plain
    assert stderr.count("healthy: nothing is wrong with this run") == 1
    assert stderr.count(f"report {run}/report.html") == 1
    recording = read_run(run)
    assert recording.ending is not None and recording.ending.exit_code == 0
    assert len(recording.losses.step) == 40
    assert not events(recording, "ranks", "monitor_error")
    assert (run / "diagnosis.json").exists() and (run / "rank-1" / "log.jsonl").exists()
    assert not list(run.glob("rank-*/diagnosis.json"))


def test_torchrun_starts_diagnoser_on_every_rank(script, plain, tmp_path):
    torchrun = Path(sys.executable).with_name("torchrun")
    diagnoser = Path(sys.executable).with_name("diagnoser")
    command = [torchrun, "--standalone", "--nproc-per-node", "2", "--no-python", diagnoser, "run"]
    done = subprocess.run(
        [*map(str, command), str(script), "well"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "diagnoser-runs").iterdir()
    check_whole(run, done.stdout, done.stderr, plain)


def test_processes_that_the_script_spawns_are_ranks_of_its_run(script, plain, tmp_path):
    run = tmp_path / "run"
    done = subprocess.run(
        [*RUN, "--out", str(run), str(script), "spawned"],
        cwd=tmp_path,
        env=ENVIRONMENT | {"MASTER_PORT": free_port()},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check_whole(run, done.stdout, done.stderr, plain)


# -- ranks that die ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "exit_codes", "failed_first"),
    [
        ("killed", (1, -signal.SIGKILL), "rank 0"),
        ("raises", (1, 1), "rank 1"),
        ("leaves", (1, 0), "rank 0"),
    ],
)
def test_when_a_rank_dies_the_other_neither_hangs_nor_is_silent(
    script, tmp_path, how, exit_codes, failed_first
):
    run = tmp_path / "run"
    done = on_two_ranks(tmp_path, *RUN, "--out", str(run), str(script), how)
    assert tuple(one.returncode for one in done) == exit_codes
    said = done[0].stderr + done[1].stderr
    assert said.count(f"report {run}/report.html") == 1
    assert (run / "first-failure").read_text() == f"{failed_first}\n"
    recording = read_run(run)
    assert len(recording.losses.step) >= 20  # what waits for a second may be lost
    assert recording.ending is not None and recording.ending.exit_code == 1
    absent = [message for message in events(recording, "ranks") if "rank 1 came to no" in message]
    assert len(absent) == (how == "killed")
    assert ("rank 1 came to no end" in said) == (how == "killed")
