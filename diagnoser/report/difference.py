"""How two runs differ, on a terminal or as JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, Final

from rich.console import Console

from diagnoser.difference import Contrast, Departed, Departure, Difference, Setting
from diagnoser.report import wording
from diagnoser.report.terminal import Line, heading, line, print_page
from diagnoser.vocabulary import MODEL

SCHEMA: Final = "diagnoser.difference/1"

# How many entries one page has room for; all of them are in the JSON.
COMPONENTS: Final = 8
QUANTITIES: Final = 3  # of each component
SETTINGS: Final = 12
MISSING: Final = 6

_STYLES: Final = {"same": "bold green", "different": "bold red", "inconclusive": "bold yellow"}
_SENTENCES: Final = {
    "same": "the second run is like the healthy one, as far as was measured",
    "different": "the second run left the healthy one",
    "inconclusive": "the two runs have too little in common to be compared",
}


def print_difference(difference: Difference, console: Console) -> None:
    """Prints a difference as one page, no line longer than 80 columns (or than the console)."""
    print_page(_page(difference), console)


def difference_to_json(difference: Difference) -> str:
    """Returns the text for programs: valid JSON; NaN and infinities are texts, as in the log."""
    document = {
        "schema": SCHEMA,
        "good": difference.good,
        "bad": difference.bad,
        "verdict": difference.verdict,
        "reason": difference.reason,
        "steps": None if difference.steps is None else [int(step) for step in difference.steps],
        "compared": int(difference.compared),
        "departed": [
            {
                "component": departed.component,
                "since_step": int(departed.step),
                "from_the_first_step": departed.from_the_start,
                "departures": [_departure(departure) for departure in departed.departures],
            }
            for departed in difference.departed
        ],
        "settings": [
            {
                "what": contrast.what,
                "component": contrast.component,
                "good": _value(contrast.good),
                "bad": _value(contrast.bad),
            }
            for contrast in difference.settings
        ],
        "not_compared": list(difference.not_compared),
    }
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _departure(departure: Departure) -> dict[str, Any]:
    return {
        "quantity": departure.quantity,
        "since_step": int(departure.step),
        "from_the_first_step": departure.from_the_start,
        "good": _value(float(departure.good)),
        "bad": _value(float(departure.bad)),
        "bounds": _value(float(departure.bounds)),
    }


def _value(value: Setting) -> Setting:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _page(difference: Difference) -> Iterator[Line]:
    said = f": {_SENTENCES[difference.verdict]}"
    yield Line(0, ((difference.verdict, _STYLES[difference.verdict]), (said, "bold")))
    yield line(0, wording.visible(difference.reason, limit=400))
    good, bad = wording.visible(difference.good), wording.visible(difference.bad)
    yield line(0, f"healthy run {good}, compared with {bad}", "dim")
    yield from _departed(difference)
    yield from _settings(difference.settings)
    if difference.not_compared:
        yield from heading("not compared")
        for reason in difference.not_compared[:MISSING]:
            yield line(6, wording.visible(reason, limit=300), mark="- ")
        yield from _more(len(difference.not_compared) - MISSING, "reason")


def _departed(difference: Difference) -> Iterator[Line]:
    if not difference.departed:
        return
    yield from heading("what left the healthy run, in this order")
    for rank, departed in enumerate(difference.departed[:COMPONENTS], start=1):
        since = f" {_since(departed)}"
        name = wording.subject(departed.component)
        yield Line(4, ((name, "bold"), (since, "")), f"{rank}. ")
        for departure in departed.departures[:QUANTITIES]:
            later = departure.step != departed.step
            yield line(
                6,
                f"{_named(departure.quantity)} {wording.number(departure.bad)} where the healthy "
                f"run has {wording.number(departure.good)}"
                f"{f', {_since(departure)}' if later else ''}",
                "cyan",
                mark="- ",
            )
        yield from _more(len(departed.departures) - QUANTITIES, "quantity", "quantities", 6)
    yield from _more(len(difference.departed) - COMPONENTS, "component")


def _since(what: Departed | Departure) -> str:
    return "from the first step" if what.from_the_start else f"from step {what.step}"


def _settings(settings: tuple[Contrast, ...]) -> Iterator[Line]:
    if not settings:
        return
    yield from heading("what differs in the set-up")
    for contrast in settings[:SETTINGS]:
        of = "" if contrast.component == MODEL else f" of {wording.subject(contrast.component)}"
        what = f"{wording.visible(_named(contrast.what))}{of}"
        yield line(6, f"{what}: {_shown(contrast.good)} -> {_shown(contrast.bad)}", mark="- ")
    yield from _more(len(settings) - SETTINGS, "setting")


def _shown(value: Setting) -> str:
    if value is None:
        return "none"
    if value == "":
        return "given"  # an option without a value
    return wording.visible(value) if isinstance(value, str) else wording.number(value)


def _named(quantity: str) -> str:
    return wording.visible(quantity.replace("_", " "))


def _more(n: int, noun: str, plural: str = "", indent: int = 4) -> Iterator[Line]:
    if n > 0:
        yield line(indent, f"and {wording.count(n, f'more {noun}', plural and f'more {plural}')} "
                   "with --json", "dim")  # fmt: skip
