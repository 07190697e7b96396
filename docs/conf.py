"""The site of these pages: ``make docs``. Sphinx reads them as they are, by MyST's Markdown."""

import re
from pathlib import Path

from sphinx.application import Sphinx

# The navigation. A page of docs/ that is not named here stands behind those that are.
PAGES = [
    "start",
    "reading",
    "repair",
    "difference",
    "logs",
    "writing-rules",
    "rules",
    "measuring",
    "compatibility",
    "distributed",
    "limits",
    "scores",
    "reproductions",
    "benchmark",
    "curvature",
    "ablation",
    "study",
]
FIRST = "index"
OTHERS = sorted({page.stem for page in Path(__file__).parent.glob("*.md")} - {FIRST, *PAGES})

project = "diagnoser"
author = "The diagnoser developers"
extensions = ["myst_parser"]
myst_heading_anchors = 3  # links such as rules.md#missing-zero-grad, as they work in the sources
html_theme = "alabaster"
html_theme_options = {"page_width": "1100px", "sidebar_width": "240px"}
html_show_copyright = False
html_copy_source = False
html_use_index = False


def read(_: Sphinx, page: str, source: list[str]) -> None:
    """Adds what a site needs, so that the pages themselves stay plain Markdown.

    The first page gets the navigation; a page of another directory is a file to be loaded.
    """
    source[0] = re.sub(r"\]\((\.\./[^)]+\.md)\)", r"](path:\1)", source[0])
    if page == FIRST:
        source[0] += "\n".join(["\n```{toctree}", ":hidden:", *PAGES, *OTHERS, "```\n"])


def setup(app: Sphinx) -> None:
    """Is called by Sphinx."""
    app.connect("source-read", read)
