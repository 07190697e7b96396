"""A watch in a notebook: it shows itself, and cells that follow one another can be watched."""

from __future__ import annotations

import ast
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from report_examples import HOSTILE, hostile_page
from torch import nn
from torch.nn import functional as F

import diagnoser
from diagnoser.report import framed


class Elements(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


SETUP = """
import torch
from torch.nn import functional as F
import diagnoser
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
optimizer = torch.optim.Adam(model.parameters())
def train(steps):
    for _ in range(steps):
        optimizer.zero_grad()
        points = torch.randn(16, 4)
        F.cross_entropy(model(points), points[:, :3].argmax(1)).backward()
        optimizer.step()
"""


def notebook(*cells: str, **space: Any) -> tuple[list[str | None], dict[str, Any]]:
    """Runs cells in one namespace, each compiled by itself, as IPython does.

    Returns:
        What each shows that ends with an expression, at the time; and the namespace.
    """
    shown: list[str | None] = []
    for number, cell in enumerate(cells):
        tree, value = ast.parse(cell), None
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell-{number}", "exec"), space)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"cell-{number}", "eval"), space)
        show = getattr(value, "_repr_html_", None)
        shown.append(None if show is None else show())
    return shown, space


def page_of(shown: str) -> str:
    ((tag, attributes),) = Elements(shown).found
    assert tag == "iframe"
    assert (attributes["sandbox"] or "").split() == ["allow-scripts", "allow-modals"]
    return attributes["srcdoc"] or ""


def test_a_block_in_one_cell_is_shown_by_another(tmp_path):
    watched = """
with diagnoser.watch(model, optimizer, out=out, verbose=False) as w:
    train(24)
"""
    (*_, shown), space = notebook(SETUP, watched, "w", out=tmp_path / "run")
    page = page_of(shown or "")
    assert "nothing of severity medium or more in" in Elements(page).text
    space["w"].diagnose()
    written = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert page.replace('\n<base href="about:srcdoc">', "") == written


def test_cells_that_follow_one_another_are_watched_until_the_end(tmp_path):
    begin = "w = diagnoser.watch(model, optimizer, out=out, verbose=False)\nw.__enter__()"
    train = "train(12)\nw"
    shown, space = notebook(SETUP, begin, train, train, "w.end(None)", "w", out=tmp_path / "run")
    setup, *lines, end, report = shown
    assert [Elements(line or "").text[:19] for line in lines] == [
        "diagnoser: 0 steps ",
        "diagnoser: 11 steps",  # the twelfth ends when the next one begins
        "diagnoser: 23 steps",
    ]
    assert setup is end is None
    assert page_of(report or "")
    assert space["w"].log.losses.step.tolist() == list(range(24))


def test_while_it_goes_on_a_line_is_shown(tmp_path):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hostile = tmp_path / "<img src=x onerror=alert(1)>"
    with diagnoser.watch(model, optimizer, out=hostile, verbose=False) as w:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 2)).square().mean().backward()
            optimizer.step()
        shown = Elements(w._repr_html_())
    assert [tag for tag, _ in shown.found] == ["p"]
    assert "2 steps so far" in shown.text and str(hostile) in shown.text
    assert "3 steps watched" in repr(w)


def test_switched_off_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("DIAGNOSER_OFF", "1")
    with diagnoser.watch(nn.Linear(1, 1), out=tmp_path / "run") as w:
        pass
    assert "DIAGNOSER_OFF" in Elements(w._repr_html_()).text


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_text_inside_of_the_frame(name):
    page = hostile_page(name)
    shown = framed(page)
    assert page_of(shown) == page.replace("<head>", '<head>\n<base href="about:srcdoc">', 1)
    assert [tag for tag, _ in Elements(shown).found] == ["iframe"]


def test_a_layer_with_a_hostile_name_is_escaped_twice(tmp_path):
    model = nn.Module()
    model.add_module('"><script>alert(1)</script>', nn.Linear(2, 2))
    (layer,) = model.children()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with diagnoser.watch(model, optimizer, out=tmp_path / "run", verbose=False) as w:
        for _ in range(24):
            optimizer.zero_grad()
            F.cross_entropy(layer(torch.randn(8, 2)), torch.arange(8) % 2).backward()
            optimizer.step()
    shown = w._repr_html_()
    assert [tag for tag, _ in Elements(shown).found] == ["iframe"]
    page = Elements(page_of(shown))
    assert "alert(1)" in page.text
    assert "alert(1)" not in "".join(str(a) for tag, a in page.found if tag == "script")
