"""The command line: exit codes of the contract, one line for each mistake, no torch for reports."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from diagnoser import watch
from diagnoser.classifier import Example, Vectors, fit, save
from diagnoser.cli import main
from diagnoser.runlog import RunLogWriter
from diagnoser.types import Component, Estimate, Measurement, Part

SHIPPED = Path(__file__).parents[1] / "rules" / "diagnoser"


@pytest.fixture(scope="module")
def healthy_run(tmp_path_factory):
    return record(tmp_path_factory.mktemp("healthy") / "run", steps=30)


def record(directory: Path, steps: int, *, clear: bool = True) -> Path:
    """Records a small regression; gradients that are never cleared are a defect."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs = torch.randn(16, 3)
    with watch(model, optimizer, out=directory, verbose=False) as watched:
        for _ in range(steps):
            if clear:
                optimizer.zero_grad()
            (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
    watched.diagnose()
    return directory


@pytest.fixture
def run(healthy_run, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(healthy_run, tmp_path / "run"))


def one_line(capsys) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("diagnoser: ") and err.endswith("\n")
    assert err.count("\n") == 1, err
    return err


def refused(capsys, *arguments: str | Path) -> str:
    """Carries out a command that must end with 2 and one line of why; returns that line."""
    assert main([str(argument) for argument in arguments]) == 2
    return one_line(capsys)


# -- diagnose and report ---------------------------------------------------------------------------


def test_diagnose_exits_with_the_verdict(healthy_run, tmp_path, capsys):
    assert main(["diagnose", str(healthy_run)]) == 0
    assert capsys.readouterr().out.startswith("healthy: ")
    assert main(["diagnose", str(record(tmp_path / "short", steps=4))]) == 3
    assert capsys.readouterr().out.startswith("inconclusive: ")
    assert main(["diagnose", str(record(tmp_path / "carried", steps=60, clear=False))]) == 1
    assert "missing_zero_grad" in capsys.readouterr().out


def test_diagnose_json_is_the_run_s_diagnosis_byte_for_byte_each_time(healthy_run, capsys):
    expected = (healthy_run / "diagnosis.json").read_text("utf-8")
    for _ in range(2):
        assert main(["diagnose", "--json", str(healthy_run)]) == 0
        assert capsys.readouterr().out == expected
    assert json.loads(expected)["schema"] == "diagnoser.diagnosis/1"


def test_diagnose_takes_the_rules_it_is_given(healthy_run, capsys):
    for rules in ("autotrainer", str(SHIPPED.parent / "autotrainer")):
        chosen = ["--classifier", "off", "--rules", rules]
        assert main(["diagnose", "--json", *chosen, str(healthy_run)]) == 0
        unknown = {entry["rule"] for entry in json.loads(capsys.readouterr().out)["unknown"]}
        assert unknown <= {path.stem for path in (SHIPPED.parent / "autotrainer").glob("*.yaml")}


@pytest.fixture(scope="module")
def alarmist(tmp_path_factory) -> Path:
    """The file of a classifier that has learned that a falling loss is a fault."""
    rng = np.random.default_rng(0)

    def run(faulty: bool) -> Vectors:
        fall = rng.normal(0.9 if faulty else -0.9, 0.3)
        moved = {"update_ratio.latest": rng.normal(1.0, 0.1, 2)}
        return Vectors({"loss_fall.latest": fall}, moved, ("a", "b"), ("other", "other"))

    causes = ("residual", "normalization")
    made = [
        Example(run(i % 2 == 1), i % 2 == 1, causes[i % 4 // 2 :][: i % 2], ("program_defect",),
                ("a",) if i % 2 else (), str(i % 10))
        for i in range(120)
    ]  # fmt: skip
    learned = fit(made, ("loss_fall.latest",), ("update_ratio.latest",), {"runs": 120})
    # Of a run of which hardly anything is known it would not judge.
    learned = dataclasses.replace(learned, most_unfamiliar=1.0, least_known=0.0, usual=np.arange(0))
    path = tmp_path_factory.mktemp("classifier") / "alarmist.npz"
    save(learned, path, np.array([[0.9, np.nan]]))
    return path


def test_diagnose_takes_the_classifier_it_is_given(healthy_run, alarmist, capsys):
    command = ["diagnose", "--json", str(healthy_run), "--classifier"]
    assert main([*command, str(alarmist)]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert finding["source"] == "classifier" and finding["probability"] > 0.5
    assert main([*command, "off"]) == 0


@pytest.mark.alone
def test_the_classifier_that_ships_costs_less_than_three_seconds_and_no_torch(healthy_run):
    program = (
        "import json, sys, time; from diagnoser.cli import main; "
        f"code = main(['diagnose', {str(healthy_run)!r}]); "
        "print(json.dumps([code, time.process_time(), 'torch' in sys.modules]), file=sys.stderr)"
    )
    costs = []
    for _ in range(3):
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        code, seconds, torch_too = json.loads(done.stderr.splitlines()[-1])
        assert (code, torch_too) == (0, False)
        costs.append(seconds)
    assert statistics.median(costs) < 3.0, costs


def test_a_run_can_be_judged_by_either_alone_but_not_by_nothing(healthy_run, alarmist, capsys):
    alone = ["diagnose", "--json", "--rules", "off", str(healthy_run), "--classifier"]
    assert main([*alone, str(alarmist)]) == 1
    assert json.loads(capsys.readouterr().out)["unknown"] == []
    assert "nothing to judge a run by" in refused(capsys, *alone, "off")


def test_a_classifier_that_cannot_be_used_stops_everything_before_it_starts(
    healthy_run, alarmist, tmp_path, capsys
):
    other = tmp_path / "mine.npz"
    other.write_bytes(alarmist.read_bytes()[:-1])
    other.with_suffix(".json").write_bytes(alarmist.with_suffix(".json").read_bytes())
    script, ran = tmp_path / "script.py", tmp_path / "ran"
    script.write_text(f"open({str(ran)!r}, 'w')\n")
    for path, says in ((other, "is not the file that mine.json describes"),
                       (tmp_path / "none.npz", "cannot be read")):  # fmt: skip
        for command in (["diagnose", healthy_run], ["report", healthy_run], ["run", script]):
            line = refused(capsys, command[0], "--classifier", path, command[1])
            assert str(path) in line and says in line
    assert not ran.exists()


def test_a_classifier_that_fails_at_the_end_leaves_a_diagnosis_that_says_so(alarmist, tmp_path):
    other = tmp_path / "other.npz"
    other.write_bytes(alarmist.read_bytes())
    described = json.loads(alarmist.with_suffix(".json").read_text())
    described["check"] = [0.123] * len(described["check"])  # as of another machine
    other.with_suffix(".json").write_text(json.dumps(described))
    model = torch.nn.Linear(3, 1)
    watched = watch(model, classifier=other, out=tmp_path / "run", verbose=False)
    with watched:
        model(torch.ones(2, 3)).sum().backward()
    (said,) = [entry for entry in watched.diagnose().unknown if entry.rule == "classifier"]
    assert "predicts otherwise" in said.reason and str(other) in said.reason


def test_a_truncated_log_is_diagnosed_as_far_as_it_goes(run, capsys):
    log = run / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    assert main(["diagnose", str(run)]) == 0
    assert "30 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shutil.rmtree, "missing"),
        (lambda run: (run / "log.jsonl").unlink(), "no log.jsonl"),
        (lambda run: (run / "log.jsonl").write_text(""), "not the header"),
        (lambda run: (run / "log.jsonl").write_bytes(b"\x00\xff" * 99), "not the header"),
        (lambda run: (shutil.rmtree(run), run.write_text("a file")), "a file"),
        (lambda run: (run / "log.jsonl").write_text('{"schema":"diagnoser.log/99"}\n'), "upgrade"),
    ],
)
@pytest.mark.parametrize("command", ["diagnose", "report"])
def test_what_is_not_a_run_is_refused_in_one_line(run, capsys, command, spoil, says):
    spoil(run)
    line = refused(capsys, command, run)
    assert says in line and str(run) in line


def test_report_writes_one_page(run, tmp_path, capsys):
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    other = tmp_path / "other.html"
    assert main(["report", str(run), "-o", str(other)]) == 0
    assert other.read_bytes() == (run / "report.html").read_bytes()
    assert other.read_text("utf-8").lstrip().lower().startswith("<!doctype html>")


def test_a_report_that_cannot_be_written_is_refused_in_one_line(run, tmp_path, capsys):
    place = tmp_path / "no such folder" / "page.html"
    assert str(place) in refused(capsys, "report", run, "-o", place)


# -- diff ------------------------------------------------------------------------------------------


def logged(directory: Path, *names: str, steps: int = 60, since: int | None = None) -> Path:
    """Writes a log in which the last component's gradient is 500 times as large from a step on."""
    noise = np.random.default_rng(len(directory.name))
    parts = [Component(name, "other", name, i, (Part(name),), 9) for i, name in enumerate(names)]
    with RunLogWriter(directory, directory.name, {"arguments": ["--out", directory.name]}) as log:
        log.components(0, parts)
        for step in range(steps):
            log.loss(step, 1.0 / (1.0 + step) + 0.01 * noise.random())
            if step % 5 == 0:
                rows = []
                for name in names:
                    left = name == names[-1] and since is not None and step >= since
                    value = noise.lognormal(0.0, 0.1) * (500.0 if left else 1.0)
                    rows.append(Measurement(step, "gradient_norm", name, Estimate(value)))
                log.measurement(step, rows, 0.001)
        log.end(0, None)
    return directory


def test_diff_exits_with_what_it_says_and_names_what_left_first(tmp_path, capsys):
    good, other = logged(tmp_path / "good", "a", "b"), logged(tmp_path / "other", "a", "b")
    assert main(["diff", str(good), str(other)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("same: ") and "argument --out: good -> other" in out
    bad = logged(tmp_path / "bad", "a", "b", since=30)
    assert main(["diff", str(good), str(bad)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("different: ") and " 1. b from step 30\n" in out
    assert max(map(len, out.splitlines())) <= 80
    for unlike in (logged(tmp_path / "model", "x"), logged(tmp_path / "short", "a", "b", steps=3)):
        assert main(["diff", str(good), str(unlike)]) == 3
        assert capsys.readouterr().out.startswith("inconclusive: ")


def test_diff_json_is_valid_and_the_same_each_time(healthy_run, tmp_path, capsys):
    assert main(["diff", "--json", str(healthy_run), str(healthy_run)]) == 0
    same = json.loads(capsys.readouterr().out)
    assert (same["schema"], same["verdict"]) == ("diagnoser.difference/1", "same")
    assert same["departed"] == same["settings"] == []
    good, bad = (
        logged(tmp_path / name, "a", "b", since=since) for name, since in (("g", None), ("b", 20))
    )
    said = []
    for _ in range(2):
        assert main(["diff", "--json", str(good), str(bad)]) == 1
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    (left,) = json.loads(said[0])["departed"]
    assert (left["component"], left["since_step"]) == ("b", 20)


def test_diff_tells_of_damaged_lines_and_of_hostile_names(tmp_path, capsys):
    names = ("a", "x\x1b[31m[red]\u202e")
    good, bad = logged(tmp_path / "good", *names), logged(tmp_path / "bad", *names, since=30)
    log = bad / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:-2], b'{"record": "loss"}\n', b"\x00\n", *lines[-2:]]))
    assert main(["diff", str(good), str(bad)]) == 1
    out = capsys.readouterr().out
    assert "2 damaged lines in the log of the other run" in out
    assert "x\\x1b[31m[red]\\u202e from step 30" in out and "\x1b" not in out


@pytest.mark.parametrize("spoiled", [0, 1])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shutil.rmtree, "missing"),
        (lambda run: (run / "log.jsonl").write_text(""), "not the header"),
        (lambda run: (run / "log.jsonl").unlink(), "no log.jsonl"),
    ],
)
def test_what_is_not_a_run_is_compared_with_none(healthy_run, run, capsys, spoil, says, spoiled):
    spoil(run)
    runs = [healthy_run, healthy_run]
    runs[spoiled] = run
    line = refused(capsys, "diff", *runs)
    assert says in line and str(run) in line


# -- rules and cases -------------------------------------------------------------------------------


def test_every_shipped_rule_is_listed_and_shown(capsys):
    assert main(["rules", "list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    files = {f"{p.parent.name}/{p.stem}": p for p in SHIPPED.parent.glob("*/*.yaml")}
    assert sorted(listed) == sorted(files)
    for name, path in files.items():
        for spelled in (name, path.stem):
            assert main(["rules", "show", spelled]) == 0
            assert capsys.readouterr().out == path.read_text("utf-8")


def test_a_rule_that_is_not_there_is_refused_with_the_nearest(capsys):
    assert "did you mean learning-rate-too-high" in refused(
        capsys, "rules", "show", "learning-rate-to-high"
    )


def test_the_shipped_rules_pass_their_own_check(capsys):
    assert main(["rules", "check", str(SHIPPED)]) == 0
    assert str(SHIPPED) in capsys.readouterr().out


BOMB = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.replace("when: ", "when: loss_ris > 1 and "), "did you mean"),
        (lambda t: t + "\nseverity: high\n", "severity"),
        (lambda t: t.replace("when: ", "when: 9**9**9 > 1 and "), "**"),
        (lambda t: t.replace("when: ", "when: __import__('os') and "), "__import__"),
        (lambda t: f"a0: &a0 [x]\n{BOMB}\n{t}", "alias"),
        (lambda t: "title: [", ""),
    ],
    ids=["typo", "duplicated key", "9**9**9", "__import__", "alias bomb", "not YAML"],
)
def test_a_bad_rule_stops_everything_before_it_starts(healthy_run, tmp_path, capsys, change, says):
    text = (SHIPPED / "loss-climbs-back.yaml").read_text("utf-8")
    assert "when: " in text
    rules = tmp_path / "mine"
    rules.mkdir()
    path = rules / "loss-climbs-back.yaml"
    path.write_text(change(text), "utf-8")
    script, ran = tmp_path / "script.py", tmp_path / "ran"
    script.write_text(f"open({str(ran)!r}, 'w')\n")
    for command in (
        ["diagnose", "--rules", str(rules), str(healthy_run)],
        ["run", "--rules", str(rules), "--out", str(tmp_path / "run"), str(script)],
        ["rules", "check", str(rules)],
    ):
        start = time.monotonic()
        assert main(command) == 2
        assert time.monotonic() - start < 2.0
        out, err = capsys.readouterr()
        assert out == "" and "Traceback" not in err
        assert err.startswith(f"diagnoser: {path}:")
        assert says in err
    assert not ran.exists() and not (tmp_path / "run").exists()


def test_rules_that_are_not_there_are_refused(healthy_run, tmp_path, capsys):
    assert "autotrainer" in refused(capsys, "diagnose", "--rules", "autotrain", healthy_run)
    line = refused(capsys, "diagnose", "--rules", tmp_path / "none", healthy_run)
    assert str(tmp_path / "none") in line


def test_the_cases_are_listed_with_their_faults(capsys):
    assert main(["case", "list"]) == 0
    assert "word-attention-learning-rate" in capsys.readouterr().out


def test_cases_and_faults_that_are_not_there_are_refused(capsys):
    assert "did you mean han" in refused(capsys, "case", "run", "ham")
    assert "word-attention-learning-rate" in refused(capsys, "case", "run", "han", "--fault", "x")


# -- run: what is refused before the script starts -------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.py", None, "no such script"),
        ("binary.py", b"\x7fELF\x00\x01\xff", "not a Python script"),
        ("prose.py", b"x = 1\nthis is no Python\n", "prose.py:2"),
        ("latin.py", b"name = '\xe9'\n", "not a Python script"),
        ("nul.py", b"x = 1\x00\n", "not a Python script"),
        ("", None, "a directory"),
    ],
)
def test_what_is_not_a_script_is_refused_in_one_line(tmp_path, capsys, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    line = refused(capsys, "run", "--out", tmp_path / "run", tmp_path / name)
    assert says in line and str(tmp_path / name) in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--overhead=-1", "--overhead=nan", "--every=1"])
def test_options_out_of_range_are_refused_in_one_line(tmp_path, capsys, option):
    (tmp_path / "script.py").write_text("")
    refused(capsys, "run", option, "--out", tmp_path / "run", tmp_path / "script.py")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["no-such"], ["run", "--no-such", "x.py"], ["rules"], ["diagnose"]]
)
def test_a_command_line_that_cannot_be_understood_exits_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and "error:" in err


def test_a_script_in_the_place_of_a_command_is_told_the_command(capsys):
    assert "diagnoser run train.py" in refused(capsys, "train.py", "--epochs", "3")


@pytest.mark.parametrize("arguments", [["run"], ["run", "-m"], ["run", "--"], ["check"]])
def test_a_script_that_is_missing_is_asked_for(capsys, arguments):
    assert "no script was given" in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module_there", "no such module"),
        ("", "no such module"),
        ("torch.no_such", "no such module"),
        ("train.py", "without .py"),
        ("package", "without __main__"),
        ("package.prose", "prose.py:2"),
        ("_bisect", "not written in Python"),
    ],
)
def test_what_is_not_a_module_is_refused_in_one_line(tmp_path, capsys, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("raise AssertionError('was imported')")
    (tmp_path / "package" / "prose.py").write_text("x = 1\nthis is no Python\n")
    assert says in refused(capsys, "run", "--out", tmp_path / "run", "-m", name)
    assert not (tmp_path / "run").exists()


def test_an_output_directory_that_cannot_be_used_is_refused_in_one_line(
    healthy_run, tmp_path, capsys
):
    script, ran = tmp_path / "script.py", tmp_path / "ran"
    script.write_text(f"open({str(ran)!r}, 'w')\n")
    assert "recorded here already" in refused(capsys, "run", "--out", healthy_run, script)
    for place in (script / "below-a-file", Path("/proc/no-run-here")):
        assert str(place) in refused(capsys, "run", "--out", place, script)
    assert not ran.exists()


# -- in processes of their own ---------------------------------------------------------------------

READER_GONE = """
import os, sys
from diagnoser.cli import main
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, {descriptor})
code = main(sys.argv[1:])
os._exit(code)
"""


@pytest.mark.parametrize("verdict_asked_for", [False, True])
def test_a_reader_that_is_gone_does_not_change_the_exit_code(tmp_path, verdict_asked_for):
    (tmp_path / "script.py").write_text("import sys\n")
    command = ["run", *["--exit-verdict"] * verdict_asked_for, str(tmp_path / "script.py")]
    program = READER_GONE.format(descriptor=2)
    done = subprocess.run(
        [sys.executable, "-c", program, *command], cwd=tmp_path, check=False, timeout=60
    )
    assert done.returncode == (3 if verdict_asked_for else 0)


@pytest.mark.parametrize("command", ["diagnose", "diff"])
def test_a_reader_that_is_gone_is_not_a_verdict(healthy_run, command):
    program = READER_GONE.format(descriptor=1)
    runs = [str(healthy_run)] * (2 if command == "diff" else 1)
    done = subprocess.run([sys.executable, "-c", program, command, *runs], check=False, timeout=60)
    assert done.returncode == 2


WITHOUT = """
import sys
class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {absent}:
            raise ImportError(name)
sys.meta_path.insert(0, Nowhere())
from diagnoser.cli import main
sys.exit(main(sys.argv[1:]))
"""


def without(absent: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT.format(absent=absent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_everything_about_a_recorded_run_works_without_torch(run):
    heavy = ["torch", "transformers", "pandas"]
    for absent, arguments in (
        (heavy, ["diagnose", str(run)]),
        (heavy, ["report", str(run)]),
        ([*heavy, "sklearn", "scipy"], ["diff", str(run), str(run)]),
        ([*heavy, "sklearn"], ["diagnose", "--json", "--classifier", "off", str(run)]),
        ([*heavy, "sklearn"], ["report", "--classifier", "off", str(run)]),
        ([*heavy, "sklearn"], ["rules", "list"]),
        ([*heavy, "sklearn"], ["case", "list"]),
    ):
        done = without(absent, *arguments)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert done.stdout


def test_the_classifier_that_ships_judges_without_the_library_it_was_learned_with(run):
    done = without(["sklearn", "scipy"], "diagnose", str(run))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_leaves_early_is_no_traceback(healthy_run):
    command = f"'{sys.executable}' -m diagnoser.cli rules show never-reached | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.alone
@pytest.mark.slow
def test_diagnose_by_rules_alone_takes_little_more_than_a_second(healthy_run):
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        command = [sys.executable, "-m", "diagnoser.cli", "diagnose", str(healthy_run)]
        command += ["--classifier", "off"]
        subprocess.run(command, check=True, capture_output=True, env=dict(os.environ))
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 1.2, seconds
