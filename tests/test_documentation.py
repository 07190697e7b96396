"""The documents: every command in them is run, every example too, and the site has no dead link.

What stands in an ``sh`` block is run in a directory that has what the documents speak of; what
stands in a ``text`` block behind it is what it prints. What takes hours, or the network, is listed
here with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import diagnoser
from benchmarks import first_fault
from diagnoser import cli
from diagnoser.monitor import schedule

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"sh", "python", "text", "yaml", "json"}

NETWORK = "loads packages"
HOURS = "takes hours; its results are committed, and tests hold the documents against them"
NOT_RUN = {
    "pip install .": NETWORK,
    "make demo": f"{NETWORK}; benchmarks/newcomer.py runs it",
    "make test": "runs this test",
    "diagnoser repair han": "trains for minutes; benchmarks/repair_han.py runs it",
    "diagnoser bench plan": "needs the extra bench, which nobody else needs",
    "diagnoser bench truth": HOURS,
    "diagnoser bench run": HOURS,
    "diagnoser bench score": HOURS,
    "diagnoser bench score --split test": HOURS,
    "python -m benchmarks.outcomes": HOURS,
    "python -m benchmarks.defaultplusplus": HOURS,
    "python -m benchmarks.reproductions harm": HOURS,
    "python -m benchmarks.reproductions watch --lot all": HOURS,
    "python -m benchmarks.controls watch --lot first": HOURS,
    "python -m benchmarks.odd_controls": HOURS,
    "python -m benchmarks.reproductions score --lot all": HOURS,
}
EXIT_CODES = {  # of what does not succeed; all else does
    "diagnoser import trainer_state.json": 3,  # that it is healthy cannot be told
    "diagnoser import curves.csv --column loss=train/nll": 3,
}

TRAIN = """
import argparse

import torch

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=2)
torch.manual_seed(0)
points = torch.randn(512, 8)
labels = points[:, :3].argmax(1)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(parser.parse_args().epochs):
    for batch in torch.randperm(512).split(16):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(points[batch]), labels[batch]).backward()
        optimizer.step()
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document; ``behind`` is the language of the block right before it."""

    page: str
    language: str
    text: str
    behind: Block | None = None


def blocks(path: Path) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    before, end = None, 0
    for found in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE):
        between = re.sub(r"<!--.*?-->", "", text[end : found.start()])
        block = Block(
            path.name, found[2], textwrap.dedent(found[3]), None if between.strip() else before
        )
        before, end = block, found.end()
        yield block


BLOCKS = [block for page in PAGES for block in blocks(page)]


def commands_of(block: Block) -> list[str]:
    """The commands of a block, one a line, without what is said behind them."""
    lines = (re.sub(r"(^|\s+)#.*$", "", line) for line in block.text.splitlines())
    return [line for line in lines if line]


COMMANDS = list(dict.fromkeys(c for b in BLOCKS if b.language == "sh" for c in commands_of(b)))
RUN = [command for command in COMMANDS if command not in NOT_RUN]
SHOWN = {
    commands_of(block.behind)[-1]: block.text
    for block in BLOCKS
    if block.language == "text" and block.behind is not None and block.behind.language == "sh"
}
RULE = next(block.text for block in BLOCKS if block.language == "yaml")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all that the documents name."""
    folder = tmp_path_factory.mktemp("scratch")
    (folder / "train.py").write_text(TRAIN)
    curve = [(step, 0.2 + 1.2 * 0.99**step) for step in range(0, 500, 10)]
    history = [{"step": step, "loss": loss} for step, loss in curve]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    lines = ["step,train/nll", *(f"{step},{loss}" for step, loss in curve)]
    (folder / "curves.csv").write_text("\n".join(lines))
    (folder / "examples").mkdir()
    shutil.copy(first_fault.SCRIPT, folder / "examples")
    named = re.match(r"# (\S+)\n", RULE)
    assert named is not None
    (folder / named[1]).parent.mkdir()
    (folder / named[1]).write_text(RULE)
    with (
        mock.patch.object(sys, "argv", ["train.py"]),
        diagnoser.watch(out=folder / "diagnoser-runs" / "today", verbose=False) as watched,
    ):
        runpy.run_path(str(folder / "train.py"))
    watched.diagnose()
    for copy in ("diagnoser-runs/last-week", "GOOD", "BAD"):
        shutil.copytree(folder / "diagnoser-runs" / "today", folder / copy)
    return folder


@pytest.fixture(scope="module")
def said(scratch: Path) -> Any:
    """Runs a command as a shell would, once; returns all that it printed."""
    known: dict[str, str] = {}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}

    def run(command: str) -> str:
        if command not in known:
            done = subprocess.run(
                ["/bin/sh", "-c", command],
                cwd=scratch,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=500,
                check=False,
            )
            assert done.returncode == EXIT_CODES.get(command, 0), done.stdout
            known[command] = done.stdout
        return known[command]

    return run


# -- the lists -------------------------------------------------------------------------------------


def test_what_is_not_run_and_what_fails_still_stands_in_a_document() -> None:
    assert set(NOT_RUN) <= set(COMMANDS)
    assert set(EXIT_CODES) <= set(RUN)
    assert len(RUN) > 12


def test_every_block_says_its_language() -> None:
    assert {block.language for block in BLOCKS} <= LANGUAGES
    for page in PAGES:  # no fence is left over
        text = page.read_text(encoding="utf-8")
        assert text.count("```") == 2 * sum(block.page == page.name for block in BLOCKS), page.name


# -- commands --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_a_command_does_what_is_said_of_it(said: Any, command: str) -> None:
    output = said(command)
    if command in SHOWN:
        assert _without_time(SHOWN[command]) in _without_time(output)


def _without_time(text: str) -> str:
    """A run directory is called after the time."""
    return re.sub(r"-\d{8}-\d{6}", "-TIME", text)


@pytest.mark.slow
def test_the_first_script_is_told_its_cause_by_one_command(said: Any, scratch: Path) -> None:
    lines = first_fault.SCRIPT.read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line]) <= 34
    output = said("diagnoser run examples/first_fault.py")
    directory = Path(re.findall(r"report (\S+)/report\.html", output)[-1])
    found = json.loads((scratch / directory / "diagnosis.json").read_text(encoding="utf-8"))
    assert found["verdict"] == "faulty"
    first = found["causes"][0]
    assert (first["cause"], first["component"]) == ("loss_function", "model")
    assert ".backward()" in lines[found["findings"][0]["where"]["line"] - 1]


def _parsers(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """The sub-commands of a command."""
    actions = parser._actions
    choices = next((a.choices for a in actions if isinstance(a, argparse._SubParsersAction)), {})
    return dict(choices)


INLINE = {
    (page.name, " ".join(code.split()))
    for page in PAGES
    for code in re.findall(
        r"(?<!`)`([^`]+)`(?!`)", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)
    )
}


@pytest.mark.parametrize(
    ("page", "code"), sorted(item for item in INLINE if item[1].startswith("diagnoser "))
)
def test_a_command_in_a_sentence_exists(page: str, code: str) -> None:
    parser, words = cli.parser(), code.split()[1:]
    while words and (known := _parsers(parser)):
        assert words[0] in known, code
        parser, words = known[words[0]], words[1:]
    for word in words:
        if word.endswith(".py") or word == "SCRIPT":
            break
        if word.startswith("--"):
            assert word.partition("=")[0] in parser._option_string_actions, code


def test_targets_and_modules_in_sentences_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    named = {code for _, code in INLINE} | set(COMMANDS)
    wanted = {code.split()[1] for code in named if re.match(r"make \w", code)}
    assert wanted and wanted <= targets
    modules = [code.split()[2] for code in named if code.startswith("python -m ")]
    assert modules
    for module in modules:
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


# -- examples in Python ----------------------------------------------------------------------------


def _names() -> dict[str, Any]:
    """What examples suppose that a training has."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    batch = (torch.randn(16, 4), torch.arange(16) % 3)
    return {
        "diagnoser": diagnoser,
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_function": torch.nn.functional.cross_entropy,
        "batch": batch,
        "loader": [batch] * 30,
    }


PYTHON = [b for b in BLOCKS if b.language == "python" and b.page != "rules.md"]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.page)
def test_an_example_runs(
    block: Block, scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(scratch)
    exec(compile(block.text, block.page, "exec"), _names())
    if "print(" in block.text:
        assert capsys.readouterr().out.strip()


def test_patches_that_rules_suggest_are_python() -> None:
    patches = [b.text for b in BLOCKS if b.language == "python" and b.page == "rules.md"]
    assert len(patches) > 50
    for patch in patches:
        compile(patch, "rules.md", "exec")


# -- the site --------------------------------------------------------------------------------------


def built(source: Path, to: Path) -> subprocess.CompletedProcess[str]:
    """Builds a site as the Makefile does."""
    (line,) = (x for x in (ROOT / "Makefile").read_text().splitlines() if "-m sphinx" in x)
    *options, _, _ = line.split()[1:]
    command = [sys.executable, *options, "--doctree-dir", str(to / "trees"), str(source), str(to)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_site_is_built_and_every_page_is_in_its_navigation(tmp_path: Path) -> None:
    done = built(ROOT / "docs", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    first = (tmp_path / "index.html").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f'class="reference internal" href="{page.stem}.html"' in first or (
            page.stem == "index"
        ), page.stem


@pytest.mark.slow
def test_a_link_to_nothing_ends_the_site(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    conf = (ROOT / "docs" / "conf.py").read_text(encoding="utf-8")
    (docs / "conf.py").write_text(re.sub(r"PAGES = \[.*?\]", "PAGES = []", conf, flags=re.S))
    links = ["gone.md", "other.md#gone", "#gone", "../gone.py", "../gone.md", "other.md#two"]
    (docs / "index.md").write_text("# First\n\n" + "\n\n".join(f"[to]({link})" for link in links))
    (docs / "other.md").write_text("# Other\n\n## Two\n")
    done = built(docs, tmp_path / "site")
    assert done.returncode != 0
    warned = {int(n) for n in re.findall(r"index\.md:(\d+): WARNING", done.stderr)}
    assert warned == {3, 5, 7, 9, 11}  # all but the last


def test_the_steps_that_every_run_measures_are_those_that_are_said() -> None:
    text = " ".join((ROOT / "docs" / "measuring.md").read_text(encoding="utf-8").split())
    *steps, last = schedule.GUARANTEED_STATISTICS
    assert f"At steps {', '.join(map(str, steps))} and {last} every run is measured" in text
    assert len(schedule.GUARANTEED_CURVATURE) == 8 and "eight of these times with curvature" in text
    assert schedule.GUARANTEED_CHECKS == (0, 20) and "at 0 and 20 the program is checked" in text


# -- the newcomer ----------------------------------------------------------------------------------


def test_a_newcomer_has_a_first_diagnosis_within_ten_minutes() -> None:
    found = json.loads((first_fault.RESULTS / "newcomer.json").read_text(encoding="utf-8"))
    assert [verdict for _, verdict in found["demo"]["verdicts"]] == ["healthy", "faulty"]
    own = found["own_script"]
    assert [verdict for _, verdict in own["verdicts"]] == ["faulty"]
    assert (own["cause"], own["component"]) == ("loss_function", "model")
    for way in ("demo", "own_script"):
        assert found[way]["first_diagnosis_s"] < 600
    typed = [step["command"] for way in ("demo", "own_script") for step in found[way]["commands"]]
    for command in ("make demo", "pip install .", "diagnoser run first_fault.py"):
        assert any(command in step for step in typed), command
