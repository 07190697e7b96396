"""Names of layers are somebody else's text: all the way from a training to every page."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from diagnoser.runlog import read_run
from tests.test_launch import ENVIRONMENT

NAMES = (
    "esc\x1b[31m\x1b]0;title\x07",
    "line\nfaulty: everything\r\x85\u2028",
    "</script><script>alert(1)</script>",
    "\u202eevorp\u2066",
    "nul\x00\x01\x7f\x9b31m",
    "[red]bold[/red][link=file:///]",
    "x" * 5000,
    "lone\ud800",
    "&lt;\"'`${}{{7*7}}{% raw %}",
    "",
)
SCRIPT = """
import torch
torch.manual_seed(0)
names = {names!r}
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name in names:  # `add_module` takes no empty name, and no dots
            self._modules[name.replace(".", "") or "empty"] = torch.nn.Linear(6, 6)
    def forward(self, x):
        for layer in self._modules.values():
            x = x + layer(x).tanh()
        return x
Net.__name__ = Net.__qualname__ = names[0]
model = Net()
rest = [p for i, layer in enumerate(model._modules.values()) if i % 2 for p in layer.parameters()]
optimizer = torch.optim.SGD(rest, lr={rate})
x, y = torch.randn(16, 6), torch.randint(6, (16,))
for i in range(30):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
"""


def tell(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "diagnoser.cli", *words]
    env = ENVIRONMENT | environment
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, check=False)


pytestmark = pytest.mark.slow  # for two trainings in processes of their own


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("hostile")
    said = {}
    for run, rate in (("one", 0.1), ("other", 5.0)):
        (folder / f"{run}.py").write_text(
            SCRIPT.format(names=NAMES, rate=rate), encoding="utf-8", errors="surrogatepass"
        )
        said[run] = tell(folder, "run", "--out", run, f"{run}.py")
    return folder, said


def check_text(printed: bytes) -> str:
    """Checks that nothing in a text acts on a terminal, or makes lines that are not ours."""
    text = printed.decode("utf-8")
    assert all(c.isprintable() or c == "\n" for c in text), repr(text)
    assert not [line for line in text.splitlines() if line.startswith("faulty: everything")]
    assert max(map(len, text.splitlines())) < 400
    return text


def test_a_training_with_such_layers_is_watched_and_told_of(ran):
    folder, said = ran
    done = said["one"]
    assert done.returncode == 0, done.stderr
    assert done.stdout == b""
    text = check_text(done.stderr)
    assert "not-in-optimizer" in text or "in no optimizer" in text
    assert "esc\\x1b[31m" in text  # named, as it is written
    assert "diagnoser: step" in text  # and said while it trained
    recording = read_run(folder / "one")
    assert {component.name for component in recording.components} >= {*NAMES} - {"", NAMES[8]}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_diagnosis_is_text_in_a_terminal_and_exact_in_json(ran, encoding):
    folder, _ = ran
    page = tell(folder, "diagnose", "one", PYTHONIOENCODING=encoding)
    assert (page.returncode, page.stderr) == (1, b"")
    check_text(page.stdout)
    data = json.loads(tell(folder, "diagnose", "one", "--json", PYTHONIOENCODING=encoding).stdout)
    named = {finding["component"] for finding in data["findings"]}
    assert NAMES[0] in named
    assert json.loads((folder / "one" / "diagnosis.json").read_bytes()) == data


class Scripts(HTMLParser):
    """Counts elements that run or load something, and gathers the text of the others."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [name for name, _ in attrs]


def test_a_page_has_no_element_that_is_not_ours(ran):
    folder, _ = ran
    done = tell(folder, "report", "one", "-o", "page.html")
    assert (done.returncode, done.stderr) == (0, b"")
    page = (folder / "page.html").read_bytes().decode("utf-8")
    parser = Scripts()
    parser.feed(page)
    assert parser.elements.count("script") == 1
    assert not {"iframe", "object", "embed", "link", "base"} & set(parser.elements)
    assert not [name for name in parser.attributes if name.startswith("on")]
    assert "<script>alert(1)" not in page
    assert all(c.isprintable() or c in "\n\t" for c in page)
    assert "{{7*7}}" in page  # no template was made of a name
    assert (folder / "one" / "report.html").stat().st_size < 500_000


def test_a_comparison_is_text_too(ran):
    folder, _ = ran
    done = tell(folder, "diff", "one", "other")
    assert done.returncode in (0, 1, 3), done.stderr
    check_text(done.stdout)
    json.loads(tell(folder, "diff", "one", "other", "--json").stdout)
