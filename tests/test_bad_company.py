"""Scripts that do to a process what they please run as without us, and are judged or refused."""

from __future__ import annotations

import json
import textwrap

import pytest

from diagnoser.cli import main
from diagnoser.runlog import LOG_FILE
from tests.forked_runs import Job, Ran, run_jobs
from tests.test_launch import TRAINING, without_ours

CLOCK = """
    import time
    real, now = time.perf_counter, [1e9]
    def clock():
        now[0] -= {by}
        return now[0]
    time.time = time.monotonic = time.perf_counter = clock
    train(60)
"""
SCRIPTS = {
    "plain": "train(30)",
    "clock_goes_back": CLOCK.format(by=3.7),
    "clock_stands": CLOCK.format(by=0.0),
    "closes_its_streams": """
        import os, sys
        train(30)
        sys.stdout.flush()
        os.close(1)
        os.close(2)
        sys.exit(4)
    """,
    "stderr_cannot_be_written": """
        import sys
        class Broken:
            def write(self, text): raise ValueError("broken")
            def flush(self): raise ValueError("broken")
        sys.stderr = Broken()
        train(30)
        sys.exit(4)
    """,
    "workers_train_themselves": """
        import multiprocessing, sys
        train(10)
        sys.stdout.flush()
        def work(steps):
            train(steps)
            sys.stdout.flush()
            if steps == 9:
                raise SystemExit(3)
        context = multiprocessing.get_context("fork")
        for steps in (7, 9):
            worker = context.Process(target=work, args=(steps,))
            worker.start()
            worker.join()
            print(worker.exitcode)
        with context.Pool(2) as pool:
            print(pool.map(abs, [1, -2]))
        train(20)
    """,
    "a_child_that_is_killed": """
        import os, signal
        train(10)
        child = os.fork()
        if child == 0:
            for i in range(25):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            os.kill(os.getpid(), signal.SIGKILL)
        print(os.waitpid(child, 0)[1])
        train(20)
    """,
    "trains_in_a_thread": """
        import threading
        thread = threading.Thread(target=train, args=(30,))
        thread.start()
        thread.join()
    """,
    "trains_in_one_thread_after_another": """
        import threading
        for steps in (25, 15):
            thread = threading.Thread(target=train, args=(steps,))
            thread.start()
            thread.join()
    """,
    "two_train_at_once": """
        import threading
        layers = [[torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)] for _ in "ab"]
        models, losses = [torch.nn.Sequential(*own) for own in layers], [[], []]
        turns = threading.Barrier(2)
        def run(k):
            optimizer = torch.optim.SGD(models[k].parameters(), lr=0.1 + k)
            for _ in range(60):
                turns.wait()
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(models[k](x), y)
                loss.backward()
                optimizer.step()
                losses[k].append(loss.item())
        threads = [threading.Thread(target=run, args=(k,)) for k in (0, 1)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(losses)
    """,
    "patches_backward_and_takes_it_back": """
        earlier, calls = torch.autograd.backward, []
        def backward(*args, **kwargs):
            calls.append(len(args))
            return earlier(*args, **kwargs)
        train(5)
        torch.autograd.backward = backward
        train(15)
        torch.autograd.backward = earlier
        train(10)
        print(len(calls))
    """,
    "patches_backward_for_good": """
        import functools
        def counted(owner, name, earlier, calls=[]):
            @functools.wraps(earlier)
            def backward(*args, **kwargs):
                calls.append(name)
                return earlier(*args, **kwargs)
            setattr(owner, name, backward)
            return calls
        calls = counted(torch.autograd, "backward", torch.autograd.backward)
        counted(torch.Tensor, "backward", torch.Tensor.backward)
        train(30)
        print(calls)
    """,
    "has_a_backward_of_its_own": """
        def backward(tensors, *_, **__):
            parameters = list(model.parameters())
            for p, g in zip(parameters, torch.autograd.grad(tensors, parameters)):
                p.grad = g
        torch.autograd.backward = backward
        train(30)
    """,
    "deletes_where_it_is_recorded": """
        import shutil
        train(10)
        shutil.rmtree("deletes_where_it_is_recorded.run", ignore_errors=True)
        train(30)
    """,
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    folder = tmp_path_factory.mktemp("company")
    jobs: list[Job | list[Job]] = []
    for name, body in SCRIPTS.items():
        (folder / f"{name}.py").write_text(TRAINING + textwrap.dedent(body))
        jobs += [Job(f"{name}.alone", f"{name}.py", None), Job(name, f"{name}.py", f"{name}.run")]
    jobs.append(Job("again", "plain.py", "plain.run"))
    jobs.append([Job(name, "plain.py", "both.run") for name in ("both", "of_two")])
    return run_jobs(folder, jobs)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs_as_without_us(ran, name):
    alone, ours = ran[f"{name}.alone"], ran[name]
    assert alone.code == ours.code != 99
    assert alone.stdout == ours.stdout
    assert without_ours(ours.stderr) == alone.stderr
    assert "Traceback" not in ours.stderr
    assert "a failure of the monitor" not in ours.stderr


# How many losses are in each log: all of the training that was watched, and nothing else.
STEPS = {
    "plain": 30,
    "clock_goes_back": 60,
    "clock_stands": 60,
    "closes_its_streams": 30,
    "stderr_cannot_be_written": 30,
    "workers_train_themselves": 30,
    "a_child_that_is_killed": 30,
    "trains_in_a_thread": 30,
    "trains_in_one_thread_after_another": 40,
    "patches_backward_and_takes_it_back": 30,
    "patches_backward_for_good": 30,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_its_training_is_recorded_whole_and_judged(ran, name):
    recording = ran[name].recording
    assert recording.losses.step.tolist() == list(range(STEPS[name]))
    assert recording.ending is not None and recording.ending.exit_code == ran[name].code
    assert len(recording.measured.step) >= 6
    cost = recording.ending.cost
    assert cost is not None and cost.training_s >= 0 and cost.monitoring_s >= 0
    assert json.loads((ran[name].run / "diagnosis.json").read_text())["verdict"] == "healthy"


@pytest.mark.slow
def test_a_clock_that_stands_buys_nothing(ran):
    for name in ("clock_stands", "clock_goes_back"):
        assert set(ran[name].recording.measured.step.tolist()) <= {0, 2, 5, 10, 20, 35, 50}


@pytest.mark.slow
def test_two_that_train_at_once_are_not_measured_and_it_says_so(ran):
    ours = ran["two_train_at_once"]
    recording = ours.recording
    theirs = json.loads(ours.stdout)
    assert recording.losses.value.tolist() in theirs
    assert set(recording.measured.step.tolist()) <= {0}  # before the other was seen
    assert len(ours.lines("several threads train at once")) == 1
    assert json.loads((ours.run / "diagnosis.json").read_text())["verdict"] == "inconclusive"


@pytest.mark.slow
def test_a_backward_of_its_own_is_named(ran):
    ours = ran["has_a_backward_of_its_own"]
    assert len(ours.recording.losses.step) == 0
    assert len(ours.lines("the program replaces torch.autograd.backward")) == 1


@pytest.mark.slow
def test_a_deleted_directory_is_said_once_and_the_diagnosis_all_the_same(ran):
    ours = ran["deletes_where_it_is_recorded"]
    assert not ours.run.exists()
    assert len(ours.lines("cannot write the run log (No such file or directory)")) == 1
    assert len(ours.lines("of 40 steps")) == 1


@pytest.mark.slow
def test_a_directory_takes_one_run_and_nothing_of_it_is_lost(ran):
    again = ran["again"]
    assert (again.code, again.stdout) == (2, "")
    assert again.stderr.count("\n") == 1
    assert "a run is recorded here already; choose another directory" in again.stderr
    first = ran["plain"]
    assert len(first.recording.losses.step) == 30
    assert sorted(path.name for path in first.run.iterdir()) == [
        "diagnosis.json", LOG_FILE, "report.html",
    ]  # fmt: skip
    # Of two at the same time one is refused, and the other never notices.
    assert sorted(ran[name].code for name in ("both", "of_two")) == [0, 2]
    assert ran["both"].recording.losses.step.tolist() == list(range(30))
    assert ran["both"].recording.damaged_lines == 0


@pytest.mark.parametrize(
    ("version", "says"),
    [(3, "written by a newer version (diagnoser.log/3); upgrade"), (0, "not the header of a run")],
)
def test_a_run_of_another_version_is_refused_in_one_line(tmp_path, capsys, version, says):
    (tmp_path / LOG_FILE).write_text(
        json.dumps({"record": "header", "schema": f"diagnoser.log/{version}"}) + "\n"
    )
    for command in (["diagnose"], ["report"], ["diff", str(tmp_path)]):
        assert main([*command, str(tmp_path)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        assert says in printed.err
