"""The benchmark's runs: the same numbers anywhere, kept whole, resumed after anything."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from bench_subjects import HUNG, SMALL, WORKERS, harm_of

from diagnoser.benchmark import commands
from diagnoser.benchmark import execute as execute_module
from diagnoser.benchmark.configuration import (
    Configuration,
    _listed_in,
    catalogue,
    code_digest,
    content_hash,
)
from diagnoser.benchmark.jobs import Answer, Job, carry_out
from diagnoser.benchmark.plan import make_plan
from diagnoser.benchmark.results import SCHEMA, Store
from diagnoser.benchmark.worker import run
from diagnoser.cli import main

HERE = Path(__file__).parent
MISTAKE = Configuration(subject="line", recipe="a", injections=(("SLOW", "high", "model"),))


@pytest.fixture(autouse=True)
def workers_find_the_catalogue(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("BENCH_MARKER", str(tmp_path / "marker"))


@pytest.fixture
def no_workers(monkeypatch, tmp_path_factory):
    """Runs are made right here, where it is not the worker that is tested."""

    def here(job, environment=None):
        configuration = Configuration.from_json(job.configuration)
        known = catalogue(job.catalogue)
        head = dataclasses.asdict(job) | {"remedy": "", "subject": configuration.subject}
        head |= {"recipe": "a", "operator": configuration.operator, "severity": "", "place": ""}
        names = set(SCHEMA.names) - {"seed"}
        head = {name: value for name, value in head.items() if name in names}
        rows = []
        for seed in job.seeds:
            made = run(known, configuration, seed, job.mode, tmp_path_factory.mktemp("run") / "r")
            rows.append({**head, **made, "seed": seed, "cpu_s": 1.5})
        return Answer(job, tuple(rows))

    monkeypatch.setattr(execute_module, "carry_out", here)


def bench(action, catalogue, out, *more):
    options = ["--size", "smoke", "--catalogue", f"bench_subjects:{catalogue}", "--out", str(out)]
    return ["bench", action, *options, "--jobs", "1", *more]


def one_subject(action, out, *more):
    """The clean run and one mistake of one subject: two configurations."""
    return bench(action, "SMALL", out, "--only", "line", "--operator", "FAST", *more)


def table(out, mode="truth"):
    """All rows, without what depends on the machine."""
    rows = [row for p in (out / mode).glob("*.parquet") for row in pq.read_table(p).to_pylist()]
    for row in rows:
        row.pop("cpu_s")
        row.pop("log_sha256")  # a log holds times
    return sorted(map(repr, rows))


def job(configuration, known, mode="truth", **options):
    digest = content_hash(configuration, known)
    options = {"seeds": (0, 1, 2), "limit_s": 60.0, **options}
    return Job(digest, configuration.to_json(), mode=mode, catalogue=known.name, **options)


def of_run(row):
    return {name: row[name] for name in ("score", "loss", "area", "first_loss", "last_loss")}


@pytest.mark.slow
def test_a_run_is_the_same_bit_for_bit_in_any_process_and_under_the_monitor(tmp_path):
    here = [of_run(run(SMALL, MISTAKE, seed, "truth", tmp_path)) for seed in (0, 1, 2)]
    for mode in ("truth", "watched", "budget"):
        answer = carry_out(job(MISTAKE, SMALL, mode))
        assert answer.complaint == ""
        assert [of_run(row) for row in answer.rows] == here
    assert len({repr(row) for row in here}) == 3


def test_a_job_for_other_code_is_refused():
    answer = carry_out(dataclasses.replace(job(MISTAKE, SMALL), hash="0" * 16))
    assert [row["status"] for row in answer.rows] == ["refused"] * 3
    assert content_hash(MISTAKE, SMALL) in answer.rows[0]["reason"]


def test_a_run_that_hangs_is_stopped():
    hanging = Configuration(subject="line", recipe="a", injections=(("NAP", "high", "model"),))
    (row,) = carry_out(job(hanging, HUNG, seeds=(0,), limit_s=1.0)).rows
    assert (row["status"], row["reason"]) == ("late", "stopped after 1 s")


@pytest.mark.slow
def test_what_kills_or_breaks_a_run_is_named_and_the_rest_goes_on(tmp_path, capsys):
    assert main(bench("truth", "FAILING", tmp_path)) == 0
    out, err = capsys.readouterr()
    complaints = [line for line in err.splitlines() if line.startswith("diagnoser: line a")]
    assert len(complaints) == 2
    assert "KILL high model" in complaints[0] and "seed 1: killed" in complaints[0]
    assert complaints[1].endswith("seed 1: failed: ValueError: cannot be built")
    assert len(table(tmp_path)) == 4 * 3
    assert "2 incomplete" in out
    # What was killed is tried again; what failed by itself would fail again.
    assert main(bench("truth", "FAILING", tmp_path)) == 2  # the killed one was killed again
    said = capsys.readouterr()
    assert "1 runs made, 0 left of 12" in said.out
    assert "none of the 1 runs made now gave a result" in said.err


def test_where_no_run_gives_a_result_the_command_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        execute_module,
        "carry_out",
        lambda job, environment=None: Answer(job, (), "the worker process was killed by SIGKILL"),
    )
    for action in ("truth", "run"):
        assert main(one_subject(action, tmp_path)) == 2
        said = capsys.readouterr().err
        assert ": killed: the worker process was killed by SIGKILL" in said
        assert "runs made now gave a result; each is named above with its reason" in said


def test_runs_that_are_scored_are_made_first(tmp_path):
    plan = make_plan(SMALL, "smoke")
    store = Store(tmp_path, complain=pytest.fail)
    assert commands._scored_first(plan, store, SMALL) == [plan.items]
    verdicts = {"SLOW": "ambiguous", "FAST": "proven", "": "equivalent"}
    store.write_harm([harm_of(i, verdicts[i.configuration.operator]) for i in plan.items], [])
    first, second = commands._scored_first(plan, store, SMALL)
    assert {item.configuration.operator for item in first} == {"", "FAST"}
    assert {item.configuration.operator for item in second} == {"SLOW"}
    assert len(first) + len(second) == len(plan.items)


@pytest.mark.slow
def test_a_killed_worker_is_named_and_its_runs_are_made_the_next_time(tmp_path, capsys):
    assert main(bench("truth", "WORKERS", tmp_path)) == 0
    err = capsys.readouterr().err
    assert "seed 1, 2: killed: the worker process was killed by SIGKILL" in err
    assert main(bench("truth", "WORKERS", tmp_path)) == 0
    assert "2 runs made, 0 left of 9" in capsys.readouterr().out
    assert len(table(tmp_path)) == len(make_plan(WORKERS, "smoke").items[:3]) * 3


@pytest.mark.parametrize("spoil", ["cut", "foreign", "empty", "text"])
def test_a_file_that_cannot_be_used_is_named_moved_aside_and_made_again(
    tmp_path, capsys, no_workers, spoil
):
    arguments = one_subject("truth", tmp_path)
    assert main(arguments) == 0
    before = table(tmp_path)
    path, other = sorted((tmp_path / "truth").glob("*.parquet"))
    content = {
        "cut": path.read_bytes()[:-200],
        "foreign": other.read_bytes(),
        "empty": b"",
        "text": b"not parquet at all",
    }
    path.write_bytes(content[spoil])
    capsys.readouterr()
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert f"{path} cannot be used" in err and "3 runs made" in out
    assert path.with_name(f"{path.name}.corrupt").read_bytes() == content[spoil]
    assert table(tmp_path) == before


def test_a_log_that_was_altered_or_lost_is_made_again(tmp_path, capsys, no_workers):
    arguments = one_subject("run", tmp_path)
    assert main(arguments) == 0
    before = table(tmp_path, "runs")
    first, second = sorted((tmp_path / "runs").glob("*/0.jsonl.gz"))
    assert gzip.decompress(first.read_bytes()).endswith(b"}\n")
    first.write_bytes(first.read_bytes()[:-9])
    second.unlink()
    assert main(arguments) == 0
    err = capsys.readouterr().err
    assert f"{first} cannot be used" in err and f"{second} is missing" in err
    assert gzip.decompress(second.read_bytes()).endswith(b"}\n")
    assert table(tmp_path, "runs") == before


def test_a_full_disk_stops_with_a_message_and_leaves_nothing_half_written(
    tmp_path, capsys, monkeypatch, no_workers
):
    real, written = os.fsync, []

    def full_after_two(descriptor):
        written.append(descriptor)
        if len(written) > 2:  # the plan and the first configuration
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full_after_two)
        assert main(one_subject("truth", tmp_path)) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("diagnoser: ") and "the disk is full" in err
    assert [path.suffix for path in (tmp_path / "truth").iterdir()] == [".parquet"]
    assert main(one_subject("truth", tmp_path)) == 0
    assert "3 runs made, 0 left of 6" in capsys.readouterr().out


def test_a_subject_without_its_package_is_left_out(tmp_path, capsys, no_workers):
    assert main(bench("truth", "LACKING", tmp_path)) == 0
    err = capsys.readouterr().err
    said = "left out: absent needs no-such-package; run: pip install no-such-package"
    assert err.count(said) == 1
    assert len(table(tmp_path)) == 2 * 3


def test_nothing_new_begins_after_the_given_time(tmp_path, capsys):
    assert main(one_subject("truth", tmp_path, "--minutes", "1e-9")) == 0
    out = capsys.readouterr().out
    assert "0 runs made, 6 left of 6" in out and "give the same command again" in out


def test_a_plan_says_how_much_and_how_long_and_makes_no_results(tmp_path, capsys, no_workers):
    assert main(bench("plan", "SMALL", tmp_path / "none")) == 0
    out = capsys.readouterr().out
    assert "size smoke: 7 configurations" in out
    assert (
        "truth: 18 runs to make" in out
        and "watched: 6 runs to make" in out
        and "budget: 6 runs to make" in out
    )
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--only", "lime"], "no subject lime; there are line, other"),
        (["--operator", "SLO"], "no operator SLO; there are SLOW, FAST"),
        (["--minutes", "-1"], "--minutes -1.0"),
        (["--jobs", "0"], "--jobs 0"),
        (["--catalogue", "nowhere:X"], "no catalogue nowhere:X"),
        (["--dask", "tcp://127.0.0.1:1"], "no Dask scheduler at tcp://127.0.0.1:1"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, capsys, monkeypatch, more, says):
    monkeypatch.setattr(execute_module, "CONNECT_S", 0.5)
    assert main(bench("truth", "SMALL", tmp_path, *more)) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and says in err[0]


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch):
    for name in [n for n in sys.modules if n.startswith("diagnoser.benchmark")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(sys.modules["diagnoser"], "benchmark", raising=False)
    monkeypatch.setitem(sys.modules, "joblib", None)
    assert main(["bench", "plan"]) == 2
    assert "pip install 'diagnoser[bench]'" in capsys.readouterr().err


def start(arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "diagnoser.cli", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for_results(out, process):
    while not list((out / "truth").glob("*.parquet")):
        assert process.poll() is None
        time.sleep(0.05)


@pytest.mark.slow
def test_after_kill_9_the_rest_is_made_and_the_table_is_that_of_one_go(tmp_path, capsys):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = start([*bench("truth", "SLEEPY", stopped), "--jobs", "2"])
    wait_for_results(stopped, process)
    process.kill()
    process.wait()
    finished = len(list((stopped / "truth").glob("*.parquet")))
    assert 0 < finished < 6
    for out in (stopped, whole):
        assert main([*bench("truth", "SLEEPY", out), "--jobs", "2"]) == 0
    first, second = (line for line in capsys.readouterr().out.splitlines() if "runs made" in line)
    assert first.startswith(f"{18 - 3 * finished} runs made") and second.startswith("18 runs made")
    assert table(stopped) == table(whole)
    harm, again = (pq.read_table(out / "harm.parquet") for out in (stopped, whole))
    assert harm.drop_columns([]).to_pandas().equals(again.to_pandas())


@pytest.mark.slow
def test_workers_have_the_environment_of_the_call_though_the_pool_is_older(tmp_path, monkeypatch):
    assert main([*bench("truth", "SMALL", tmp_path / "first"), "--jobs", "2"]) == 0
    monkeypatch.delenv("PYTHONPATH")
    main([*bench("truth", "SMALL", tmp_path / "second"), "--jobs", "2"])
    paths = (tmp_path / "second" / "truth").glob("*.parquet")
    reasons = {row["reason"] for path in paths for row in pq.read_table(path).to_pylist()}
    assert len(reasons) == 1 and "no catalogue bench_subjects:SMALL" in reasons.pop()


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_keeps_what_is_finished(tmp_path):
    process = start([*bench("truth", "SLEEPY", tmp_path), "--jobs", "2"])
    wait_for_results(tmp_path, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert not [p for p in (tmp_path / "truth").iterdir() if p.suffix != ".parquet"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the cluster's own threads and sockets
def test_a_dask_cluster_of_two_workers_gives_the_same_rows(tmp_path):
    from dask.distributed import LocalCluster

    here, there = tmp_path / "here", tmp_path / "there"
    assert main([*bench("truth", "SMALL", here), "--jobs", "2"]) == 0
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        arguments = bench("truth", "SMALL", there, "--dask", cluster.scheduler_address)
        assert main(arguments) == 0
    assert table(here) == table(there)


@pytest.mark.slow
def test_the_smoke_size_takes_less_than_four_minutes_on_two_cores(tmp_path, capsys):
    for action in ("truth", "run"):
        assert main(["bench", action, "--size", "smoke", "--out", str(tmp_path)]) == 0
    assert "failed" not in capsys.readouterr().err
    rows = [
        row
        for folder in ("truth", "budget", "runs")
        for path in (tmp_path / folder).glob("*.parquet")
        for row in pq.read_table(path).to_pylist()
    ]
    assert rows and all(row["status"] == "ok" for row in rows)
    # Of their processes, so that what else the machine does is left out; about 3 s a worker more.
    starts = len({(row["hash"], row["mode"]) for row in rows})
    assert sum(row["cpu_s"] for row in rows) + 3 * starts < 2 * 240


def hash_with(**changes):
    """The hash of a mistake on a subject or with an operator that is altered."""
    subject, operator = SMALL.subjects["line"], SMALL.operators["SLOW"]
    recipe = dataclasses.replace(subject.recipes["a"], **changes.get("settings", {}))
    subject = dataclasses.replace(subject, recipes={"a": recipe})
    severities = {**operator.severities, **changes.get("severities", {})}
    operator = dataclasses.replace(operator, severities=severities)
    known = dataclasses.replace(SMALL, subjects={"line": subject}, operators={"SLOW": operator})
    return content_hash(MISTAKE, known)


def test_a_hash_changes_with_what_the_numbers_depend_on_and_nothing_else():
    same = content_hash(MISTAKE, SMALL)
    assert hash_with() == same
    assert hash_with(severities={"low": {"factor": 9.0}}) == same  # it is run at high
    assert hash_with(severities={"high": {"factor": 9.0}}) != same
    assert hash_with(settings={"steps": 13}) != same
    others = [
        dataclasses.replace(MISTAKE, remedy="scale_learning_rate"),
        dataclasses.replace(MISTAKE, injections=()),
        dataclasses.replace(MISTAKE, overrides=(("steps", 13),)),
        dataclasses.replace(MISTAKE, subject="other"),
    ]
    hashes = {content_hash(other, SMALL) for other in others}
    assert len(hashes) == 4 and same not in hashes


def test_code_counts_and_docstrings_and_comments_do_not():
    code = 'def f(x):\n    """Says."""\n    return x + 1\n'
    assert code_digest(code) == code_digest("def f(x):\n    # says\n\n    return x+1\n")
    assert code_digest(code) != code_digest(code.replace("+ 1", "+ 2"))
    assert code_digest("x = 1") != code_digest("x = '1'")


def test_a_configuration_survives_its_json():
    made = dataclasses.replace(MISTAKE, overrides=(("betas", (0.9, 0.99)), ("steps", 3)))
    assert Configuration.from_json(made.to_json()) == made


@pytest.mark.slow
def test_asking_for_more_seeds_keeps_the_runs_that_are_there(tmp_path):
    store = Store(tmp_path, pytest.fail)
    for seeds in ((0, 1), (2,)):
        answer = carry_out(job(MISTAKE, SMALL, seeds=seeds))
        store.add("truth", answer.job.hash, MISTAKE.to_json(), answer.rows)
    assert [row["seed"] for row in store.rows("truth", answer.job.hash)] == [0, 1, 2]
    assert store.missing("truth", answer.job.hash, range(5)) == (3, 4)


def test_the_file_that_an_operator_is_listed_in_counts():
    """What a factory is given stands there: it is in no function that the operator holds."""
    known = catalogue()
    for operator in (*known.operators.values(), *known.controls.values()):
        assert _listed_in(operator, ""), operator.id


@pytest.mark.slow
def test_the_plan_of_size_small_is_the_same_each_time_and_covers_every_subject_and_operator():
    plan = make_plan(catalogue(), "small", only=("series",))
    again = make_plan(catalogue(), "small", only=("series",))
    assert plan == again
    roles = {item.role for item in plan.items}
    assert roles >= {"clean", "fault", "remedy", "HC2", "HC3", "HC4"}
    clean = {item.hash for item in plan.items if item.role in {"clean", "twin"}}
    assert {item.clean for item in plan.items} == clean
    assert all(len(item.truth) == 12 for item in plan.items if item.role == "fault")
    first = {item.configuration.injections[0][2] for item in plan.items if item.role == "fault"}
    assert len(first & {"first", "middle", "last"}) >= 2 and "model" in first
    graded = {i.configuration.severity for i in plan.items if i.configuration.operator == "O1"}
    assert graded == set(catalogue().operators["O1"].severities)
