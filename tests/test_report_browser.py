"""The HTML page in a real browser: what it shows, how it is used, what it never does."""

from __future__ import annotations

import functools
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from chromium import Chromium, find_chromium
from report_examples import (
    HAN_COMPONENTS,
    HOSTILE,
    LARGE,
    healthy_diagnosis,
    hostile_page,
    large_data,
    repaired_diagnosis,
    report_data,
)

from diagnoser.report import framed, render_report
from diagnoser.report.drawing import LEVELS

CHROMIUM = find_chromium()
IN_CI = os.environ.get("CI", "").lower() not in {"", "0", "false"}
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not IN_CI,
    reason="Chromium is not installed (Debian: apt-get install chromium)",
)

SECTIONS = (
    "Likely causes, and what to change",
    "Repairs that were tried",
    "The run over time",
    "Findings and their evidence",
    "Where and when",
    "Which components move together",
    "Every component",
    "Checked and fine",
    "Could not be judged",
    "What watching cost",
)
PAPER = 717  # pixels of A4 between the margins that Chromium leaves
PAGES = ("example", "large", "healthy")


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    assert CHROMIUM is not None, "CI has to have Chromium: .ci/run installs it"
    started = Chromium(CHROMIUM)
    yield started
    started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {
        "example": lambda: render_report(repaired_diagnosis(), report_data()),
        "large": lambda: render_report(repaired_diagnosis(), large_data()),
        "healthy": lambda: render_report(healthy_diagnosis(), report_data()),
    }

    @functools.cache
    def page(name: str) -> Path:
        kind, _, number = name.partition("-")
        text = hostile_page(HOSTILE[int(number)]) if kind == "hostile" else made[name]()
        path = folder / f"{name}.html"
        path.write_text(text, "utf-8")
        return path

    return page


@pytest.fixture
def example(browser: Chromium, pages: Callable[[str], Path]) -> Chromium:
    browser.look()
    browser.open(pages("example"))
    return browser


def silent(browser: Chromium) -> bool:
    return not (browser.complaints or browser.requests or browser.dialogs)


# -- what is seen -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_a_page_loads_nothing_and_complains_of_nothing(browser, pages, name):
    browser.look()
    browser.open(pages(name))
    browser.run("scrollTo(0, document.body.scrollHeight)")
    broken = "[...document.images].filter((image) => image.complete && !image.naturalWidth).length"
    assert browser.run(broken) == 0
    assert silent(browser), (browser.complaints, browser.requests, browser.dialogs)


def test_the_verdict_the_causes_and_every_section_are_seen_in_this_order(example):
    seen = example.run("""[...document.querySelectorAll("h1, h2, h3")].filter((head) => {
        const box = head.getBoundingClientRect();
        return head.checkVisibility({opacityProperty: true, visibilityProperty: true})
          && box.width > 0 && box.height > 0 && box.left >= 0;
      }).map((head) => [head.innerText.trim(), head.getBoundingClientRect().top])""")
    words = [text for text, _ in seen]
    assert words[0] == "faulty something is wrong with this run"
    assert words[1] == SECTIONS[0]
    assert words[2] == "1 The learning rate of word_attention.projection is too high."
    assert [text for text in words if text in SECTIONS] == list(SECTIONS)
    tops = [top for text, top in seen if text in SECTIONS]
    assert tops == sorted(tops)
    assert seen[2][1] < 900  # the first cause, without scrolling
    drawn = example.run("""[...document.querySelectorAll("figure, table")].map((drawing) =>
        drawing.checkVisibility() && drawing.getBoundingClientRect().height)""")
    assert len(drawn) == 2 + 7 + 3 + 3 + 1 + 1
    assert all(height and height > 30 for height in drawn)


def luminance(colour: str) -> float:
    return float(np.mean([int(part) for part in re.findall(r"\d+", colour)[:3]])) / 255


# The contrast of WCAG 2.2, 1.4.3: of every piece of text with what is behind it.
CONTRAST = """(() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].reduce((sum, c, k) => {
    const share = c / 255;
    const linear = share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    return sum + [0.2126, 0.7152, 0.0722][k] * linear;
  }, 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parts(getComputedStyle(at).backgroundColor);
      if (colour.length === 3) return colour;
      if (colour[3] > 0) throw new Error("half transparent: " + at.className);
    }
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  for (let node; node = walker.nextNode();) {
    const element = node.parentElement;
    if (!node.textContent.trim() || !element.checkVisibility()) continue;
    const pair = [light(parts(getComputedStyle(element).color)), light(behind(element))];
    const [low, high] = pair.sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), node.textContent.trim().slice(0, 40)]);
  }
  return found;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_the_scheme_that_is_preferred(browser, pages, scheme):
    browser.look(scheme=scheme)
    browser.open(pages("example"))
    background = luminance(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert background > 0.9 if scheme == "light" else background < 0.15
    measured = browser.run(CONTRAST)
    assert len(measured) > 300
    assert [pair for pair in measured if pair[0] < 4.5] == []


@pytest.mark.parametrize("name", [*PAGES, "hostile-9", "hostile-8"])
def test_a_narrow_window_scrolls_one_way_only(browser, pages, name):
    browser.look(400)
    browser.open(pages(name))
    assert browser.run("document.documentElement.scrollWidth") <= 400
    assert browser.run("document.documentElement.scrollHeight") > 900


def test_nothing_moves_for_a_reader_who_wants_it_so(browser, pages):
    moves = "getComputedStyle(document.documentElement).scrollBehavior"
    for motion, expected in (("reduce", "auto"), ("no-preference", "smooth")):
        browser.look(motion=motion)
        browser.open(pages("example"))
        assert browser.run(moves) == expected
        animated = "document.getAnimations().length"
        assert browser.run(animated) == 0


def test_everything_has_a_name_for_a_screen_reader(example):
    nodes = example.call("Accessibility.getFullAXTree")["nodes"]
    kinds: dict[str, list[tuple[str, str]]] = {}
    for node in nodes:
        if not node.get("ignored"):
            words = [node.get(key, {}).get("value", "") for key in ("name", "description")]
            kinds.setdefault(str(node["role"]["value"]), []).append((words[0], words[1]))
    for role in ("application", "image", "link", "button", "searchbox", "checkbox", "region"):
        assert kinds[role]
        assert [words for words in kinds[role] if not words[0].strip()] == []
    assert len(kinds["application"]) == 7
    for name, words in kinds["application"]:
        assert "arrow keys read single cells" in name
        assert words.startswith("Largest ")
    curves = [words for name, words in kinds["image"] if name.endswith(" over steps")]
    assert len(curves) == 2
    assert all(re.match(r"From .* to .*; lowest .*, highest .*\.", words) for words in curves)
    assert len(kinds["columnheader"]) >= 9


def test_without_scripts_everything_is_there_but_the_controls(browser, pages):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.look()
        browser.open(pages("example"))
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    words = browser.run("document.body.innerText")
    for section in SECTIONS:
        assert section in words
    assert "Show names" not in words
    assert browser.run("document.querySelectorAll('button').length") == 0


# -- how it is used -----------------------------------------------------------------------------

FOCUSED = """(() => {
  const at = document.activeElement, style = getComputedStyle(at);
  const ring = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1;
  return [at.tagName, at.id, at.className, at.getAttribute("aria-label") ?? "", ring];
})()"""


def test_the_tab_key_reaches_everything_and_shows_where_it_is(example):
    stops = []
    for _ in range(200):
        example.press("Tab")
        stop = tuple(example.run(FOCUSED))
        if stop[0] == "BODY":
            break
        stops.append(stop)
    tags = [stop[0] for stop in stops]
    assert tags.count("SUMMARY") == 1 + 3 + 3
    assert len([stop for stop in stops if stop[2].startswith("cells")]) == 7
    assert len([stop for stop in stops if stop[2].startswith("scroll")]) == 7
    assert tags.count("BUTTON") == 9
    assert [stop[1] for stop in stops if stop[0] == "INPUT"] == ["filter", "only-found"]
    assert len([stop for stop in stops if stop[2].startswith("flag")]) == 4  # on the loss alone
    assert [stop for stop in stops if not stop[4]] == []


def focus(browser: Chromium, selector: str) -> None:
    """Goes to an element as the Tab key does, ring included."""
    browser.run(f"document.querySelector({json.dumps(selector)}).focus({{focusVisible: true}})")


READING = "document.querySelector('figure.heat .reading').textContent"


def until(browser: Chromium, condition: str) -> None:
    """Waits for what the page does in its own time, ten seconds at most."""
    browser.run(f"""new Promise((done, fail) => {{
      const end = performance.now() + 10000;
      const look = () => {condition} ? done()
        : performance.now() > end ? fail(new Error("in vain")) : setTimeout(look, 5);
      look();
    }})""")


def reading(browser: Chromium) -> str:
    """Waits for the heat map, which unpacks its image when it is first asked."""
    until(browser, READING)
    return str(browser.run(READING))


def test_arrow_keys_read_the_cells_of_a_heat_map(example):
    values = report_data().quantities["gradient_norm"]
    steps = report_data().steps
    finite = values[np.isfinite(values)]
    width = (finite.max() / finite.min()) ** (1 / LEVELS)  # of one colour
    focus(example, "figure.heat .cells")
    live = "document.querySelector('figure.heat .reading').getAttribute('aria-live')"
    assert example.run(live) == "polite"
    row, column = 0, -1
    moves = {"ArrowRight": (0, 1), "ArrowDown": (1, 0), "ArrowLeft": (0, -1), "ArrowUp": (-1, 0)}
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowUp"):
        example.press(key)
        row, column = row + moves[key][0], column + moves[key][1]
        name, value = reading(example).split(": about ")
        assert name == f"{HAN_COMPONENTS[row].name}, step {steps[column]}"
        assert abs(np.log(float(value) / values[row, column])) < np.log(width) / 2 + 0.05
    example.press("End")
    assert reading(example).startswith("word_rnn.weight_ih, step 400: about ")
    example.press("ArrowRight")
    assert ", step 400: " in reading(example)
    example.press("Home")
    for _ in range(7):
        example.press("ArrowRight")
    assert reading(example) == f"word_rnn.weight_ih, step {steps[7]}: not measured"
    example.press("Tab")
    assert example.run(READING) == ""


def test_a_pointer_reads_them_too_and_forgets_when_it_leaves(example):
    box = example.run("""(() => {
      const cells = document.querySelector("figure.heat .cells");
      cells.scrollIntoView({block: "center", behavior: "instant"});
      const box = cells.getBoundingClientRect();
      return [box.left, box.top, box.width, box.height];
    })()""")
    for row, column in ((3, 20), (9, 40)):
        place = {
            "x": box[0] + box[2] * (column + 0.5) / 41,
            "y": box[1] + box[3] * (row + 0.5) / 10,
        }
        example.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
        expected = f"{HAN_COMPONENTS[row].name}, step {report_data().steps[column]}: "
        assert reading(example).startswith(expected)
    example.call("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert example.run(READING) == ""


SHOWN = "document.getElementById('shown')"
NAMES = """[...document.getElementById("components-table").tBodies[0].rows]
  .filter((row) => row.checkVisibility()).map((row) => row.cells[0].innerText.split("\\n")[0])"""


def test_the_filter_leaves_what_is_asked_for_and_says_how_many(example):
    everything = [component.name for component in HAN_COMPONENTS]
    assert example.run(NAMES) == everything
    assert example.run(f"{SHOWN}.getAttribute('aria-live')") == "polite"
    assert example.run(f"{SHOWN}.textContent") == "10 of 10 components"
    focus(example, "#filter")
    example.write("Word_Attention")
    assert example.run(NAMES) == ["word_attention.projection", "word_attention.context"]
    assert example.run(f"{SHOWN}.textContent") == "2 of 10 components"
    example.run("document.getElementById('filter').select()")
    example.write("recurrent")  # a kind
    assert len(example.run(NAMES)) == 4
    example.write("no such thing")
    assert example.run(NAMES) == []
    assert example.run(f"{SHOWN}.textContent") == "0 of 10 components"
    example.run("document.getElementById('filter').select()")
    example.write(" ")
    example.press("Tab")
    example.press(" ")
    assert example.run("document.getElementById('only-found').checked") is True
    assert len(example.run(NAMES)) == 3


SORTED = """[...document.querySelectorAll("#components-table thead th")].map((head) =>
  head.getAttribute("aria-sort"))"""


@pytest.mark.parametrize("column", range(9))
def test_a_heading_sorts_by_its_column_both_ways(example, column):
    data = report_data()
    names = [component.name for component in HAN_COMPONENTS]
    ranks = {"word_attention.projection": 3, "word_attention.context": 3}
    ranks["sentence_attention.context"] = 1
    if column == 0:
        expected = sorted(names)
    elif column == 1:
        expected = names[::-1]  # it was sorted so from the start: the other way
    elif column == 2:
        expected = sorted(names, key=lambda name: -ranks.get(name, 0))
    else:
        values = list(data.quantities.values())[column - 3]
        known = {name: row[np.isfinite(row)] for name, row in zip(names, values, strict=True)}
        lasts = {name: float(row[-1]) for name, row in known.items() if row.size}
        expected = sorted(lasts, key=lambda name: -float(f"{lasts[name]:.3g}"))
        expected += [name for name in names if name not in lasts]
    focus(example, f"#components-table th:nth-child({column + 1}) button")
    example.press("Enter")
    assert example.run(NAMES) == expected
    direction = "ascending" if column == 0 else "descending"
    assert example.run(SORTED) == [direction if k == column else None for k in range(9)]
    announced = example.run(f"{SHOWN}.textContent")
    heading = example.run("document.activeElement.textContent")
    assert announced.startswith(f"10 of 10 components, by {heading}, ")
    example.press(" ")
    back = example.run(NAMES)
    unknown = len(names) - len(lasts) if column > 2 else 0
    if column == 1:
        assert back == names
    elif column != 2:  # severities are shared: those stay in the model's order
        last = len(names) - unknown
        assert back == expected[:last][::-1] + expected[last:]
    assert example.run(f"{SHOWN}.textContent") != announced


def test_details_fold_by_key_and_a_link_unfolds_what_it_leads_to(example):
    opened = "document.getElementById('finding-1').open"
    focus(example, "#finding-1 > summary")
    assert example.run(opened) is True
    example.press("Enter")
    assert example.run(opened) is False
    assert "120 to 160" not in example.run("document.getElementById('finding-1').innerText")
    focus(example, ".chart a[href='#finding-1']")
    example.press("Enter")
    until(example, opened)
    assert "120 to 160" in example.run("document.getElementById('finding-1').innerText")


# -- what it never does -------------------------------------------------------------------------

CENSUS = "[...new Set([...document.querySelectorAll('*')].map((each) => each.tagName))]"
HANDLERS = """[...document.querySelectorAll("*")].flatMap((each) =>
  [...each.attributes].filter((one) => one.name.startsWith("on")).map((one) => one.name))"""


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_names_stay_text_in_a_browser(browser, pages, number):
    browser.look()
    browser.open(pages("example"))
    allowed = set(browser.run(CENSUS))
    browser.open(pages(f"hostile-{number}"))
    for selector in ("figure.heat .cells", "figure.pairwise .cells"):
        focus(browser, selector)
        for key in ("ArrowRight", "ArrowDown", "End"):
            browser.press(key)
    until(browser, "document.querySelector('.pairwise .reading').textContent")
    focus(browser, "#filter")
    browser.write(HOSTILE[number].encode("utf-8", "replace").decode()[:100])
    focus(browser, "#components-table th button")
    browser.press("Enter")
    assert set(browser.run(CENSUS)) <= allowed
    assert browser.run("document.scripts.length") == 1
    assert browser.run(HANDLERS) == []
    assert silent(browser), (browser.complaints, browser.requests, browser.dialogs)


def test_a_script_in_a_name_can_be_read(browser, pages):
    browser.open(pages(f"hostile-{HOSTILE.index('<script>alert(1)</script>')}"))
    assert "<script>alert(1)</script>" in browser.run("document.body.innerText")


# -- on paper -----------------------------------------------------------------------------------


def test_printing_unfolds_everything_and_folds_it_again(example):
    example.run("document.querySelectorAll('details').forEach((each) => { each.open = false; })")
    example.run("""void (window.printed = null, addEventListener("beforeprint", () => {
      window.printed = document.querySelectorAll("details:not([open])").length; }))""")
    pdf = example.print()
    assert pdf.startswith(b"%PDF")
    assert 4 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 15
    assert example.run("window.printed") == 0  # folded when the paper was laid out
    still_open = example.run("document.querySelectorAll('details[open]').length")
    assert still_open == 0  # as the reader had left it


@pytest.mark.parametrize("name", ["example", "large"])
def test_paper_has_every_section_and_cuts_nothing_off(browser, pages, name):
    browser.look(PAPER, media="print")
    browser.open(pages(name))
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("document.querySelectorAll('details:not([open])').length") == 0
    seen = "[...document.querySelectorAll('h2')].filter((head) => head.checkVisibility())"
    assert browser.run(f"{seen}.map((head) => head.innerText)") == list(SECTIONS)
    drawn = (
        "[...document.querySelectorAll('figure, table')].every((each) => each.checkVisibility())"
    )
    assert browser.run(drawn) is True
    cut = browser.run(f"""[...document.querySelectorAll("body *")].filter((each) =>
      each.checkVisibility() && !each.closest(".names") && !each.closest("script")
      && each.getBoundingClientRect().right > {PAPER} + 8
    ).map((each) => each.tagName + "." + each.className)""")
    assert cut == []
    assert browser.run("document.querySelector('.controls').checkVisibility()") is False
    assert luminance(browser.run("getComputedStyle(document.body).backgroundColor")) == 1


def test_paper_shows_what_is_folded_where_no_script_opens_it(browser, pages):
    browser.look(PAPER, media="print")
    browser.open(pages("example"))
    browser.run("document.querySelectorAll('details').forEach((each) => { each.open = false; })")
    hidden = browser.run("""[...document.querySelectorAll("details")].filter((each) =>
      !each.lastElementChild.checkVisibility()).length""")
    assert hidden == 0


# -- how large, how fast ------------------------------------------------------------------------


def share_of_a_core() -> float:
    """Returns how much of one core is to be had now."""
    wall, own = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < 0.3:
        pass
    return (time.process_time() - own) / (time.perf_counter() - wall)


@pytest.mark.alone
@pytest.mark.slow
def test_the_largest_run_has_a_small_page_that_opens_within_a_second(browser, pages):
    assert pages("large").stat().st_size < 500_000
    browser.look()
    browser.call("Performance.enable")
    times, shares = [], [share_of_a_core()]
    for _ in range(3):
        browser.call("Page.navigate", url="about:blank")
        browser.open(pages("large"))
        browser.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
        loaded, painted = browser.run("""new Promise((done) => {
          const seen = (paints) => paints.getEntriesByName("first-contentful-paint")
            .forEach((paint) => done([
              performance.getEntriesByType("navigation")[0].loadEventEnd, paint.startTime]));
          new PerformanceObserver(seen).observe({type: "paint", buffered: true});
        })""")
        metrics = browser.call("Performance.getMetrics")["metrics"]
        (busy,) = (1000 * each["value"] for each in metrics if each["name"] == "ThreadTime")
        times.append((busy, loaded, painted))
        shares.append(share_of_a_core())
    busy, loaded, painted = (statistics.median(column) for column in zip(*times, strict=True))
    assert min(busy, loaded, painted) > 0
    assert busy < 1000, times
    share = min(shares)  # of a core; the rest of the time belongs to others
    assert share * loaded < 1000, (share, times)
    assert share * painted < 1000, (share, times)


def test_the_largest_run_has_every_component_and_names_its_layers(browser, pages):
    browser.look()
    browser.open(pages("large"))
    assert browser.run("document.getElementById('components-table').tBodies[0].rows.length") == 200
    names = browser.run(
        "[...document.querySelectorAll('figure.heat:first-of-type .names li')]"
        ".slice(0, 20).map((each) => each.textContent.trim())"
    )
    assert names == [f"transformer.encoder.layer.{k}" for k in range(20)]
    focus(browser, "figure.heat .cells")
    for _ in range(LARGE[0] + 5):
        browser.press("ArrowDown")
    expected = "transformer.encoder.layer.19.attention.self.output_projection[199], step 0: about "
    assert reading(browser).startswith(expected)


# -- in a notebook ------------------------------------------------------------------------------


def notebook(folder: Path, sandbox: bool) -> Path:
    shown = framed(render_report(repaired_diagnosis(), report_data()))
    if not sandbox:  # in which nobody can look inside
        shown = shown.replace(' sandbox="allow-scripts allow-modals"', "")
    path = folder / "notebook.html"
    path.write_text(f"<!doctype html><title>notebook</title><h1>Mine</h1>{shown}", "utf-8")
    return path


def test_in_a_notebook_a_link_to_a_finding_opens_it_in_the_frame(browser, tmp_path):
    browser.look()
    browser.open(notebook(tmp_path, sandbox=False))
    opened = browser.run("""new Promise((done) => {
      const frame = document.querySelector("iframe");
      const inside = frame.contentDocument;
      inside.querySelector('a.number[href="#finding-2"]').click();
      frame.contentWindow.addEventListener("hashchange", () => setTimeout(() =>
        done([frame.contentWindow.location.href, inside.getElementById("finding-2").open])));
    })""")
    assert opened == ["about:srcdoc#finding-2", True]


def test_in_a_notebook_the_frame_reaches_nothing_around_it(browser, tmp_path):
    browser.look()
    browser.open(notebook(tmp_path, sandbox=True))
    assert browser.run("document.querySelector('iframe').contentDocument") is None
    assert browser.run("document.querySelectorAll('h1').length") == 1
    assert silent(browser), (browser.complaints, browser.requests, browser.dialogs)
