"""The diagnosis on a terminal or in a log: one page, at most 80 columns, verdict first.

Nothing here moves or redraws: a page of lines, coloured where the console is a terminal and plain
everywhere else. Names are untrusted: they go through `wording.visible`, and markup is never parsed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from rich.console import Console
from rich.text import Text

from diagnoser.report import wording
from diagnoser.types import Attempt, Checked, Cost, Diagnosis, Finding, RankedCause, Unknown

WIDTH: Final = 80
LINE: Final = 140  # characters of a live notice, names not counted: enough for its numbers

# How many entries one page has room for; the rest stands in diagnosis.json and the HTML page.
CAUSES: Final = 4
OTHERS: Final = 4  # causes that are only possible
FINDINGS: Final = 4  # under each cause
EVIDENCE: Final = 3  # under each finding
REPAIRS: Final = 4
PATCH: Final = 8  # lines
TRIED: Final = 6
ACTIONS: Final = 3  # of each repair that was tried
CHECKED: Final = 12
UNKNOWN: Final = 6

_STYLES: Final = {
    "faulty": "bold red",
    "healthy": "bold green",
    "inconclusive": "bold yellow",
    "critical": "bold red",
    "high": "red",
    "medium": "yellow",
    "low": "dim",
    "kept": "bold green",
    "rolled back": "bold yellow",
}


class Line(NamedTuple):
    """Text with its styles, hung at a column; ``mark`` stands before its first row."""

    indent: int
    parts: tuple[tuple[str, str], ...]
    mark: str = ""


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Prints ``diagnosis`` as one page, no line longer than 80 columns (or than the console)."""
    print_page(_page(diagnosis), console)


def print_page(lines: Iterable[Line], console: Console) -> None:
    """Prints lines, each wrapped at 80 columns (or at the console's) and hung at its column."""
    width = min(console.width, WIDTH)
    for indent, parts, mark in lines:
        text = Text.assemble(*((_encodable(part, console), style) for part, style in parts))
        for row, fragment in enumerate(text.wrap(console, max(width - indent, 20)) or [Text()]):
            start = mark.rjust(indent) if row == 0 else " " * indent
            printed = Text(start).append_text(fragment)
            printed.rstrip()
            console.print(printed, soft_wrap=True, highlight=False)


def finding_line(finding: Finding) -> str:
    """Returns the one-line notice of a finding that is printed while the training runs.

    At most 140 characters beside the name of the component; the message gives way at a word.
    """
    name = wording.subject(finding.component, finding.other)
    start = f"diagnoser: step {finding.since_step}: {finding.severity}: {finding.fault} in "
    message = wording.visible(finding.message, limit=1000)
    room = LINE - len(start) - len(": ") + (len(name) if name in message else 0)
    if len(message) > room:
        head = message[: room - len("...")]
        message = f"{head.rsplit(' ', 1)[0]}..."
    return f"{start}{name}: {message}"


def _encodable(text: str, console: Console) -> str:
    """Returns ``text`` as the console's encoding can write it; a log may well be plain ASCII."""
    try:
        text.encode(console.encoding)
    except UnicodeEncodeError:
        plain = text.replace("±", "+/-")
        return plain.encode(console.encoding, "backslashreplace").decode(console.encoding)
    return text


def line(indent: int, text: str, style: str = "", mark: str = "") -> Line:
    """Returns a line of one style."""
    return Line(indent, ((text, style),), mark)


def _page(diagnosis: Diagnosis) -> Iterator[Line]:
    verdict = wording.VERDICT_SENTENCES[diagnosis.verdict]
    yield Line(0, ((diagnosis.verdict, _STYLES[diagnosis.verdict]), (f": {verdict}", "bold")))
    yield line(0, wording.visible(diagnosis.reason, limit=400))
    ended = f", exit code {diagnosis.exit_code}" if diagnosis.exit_code else ""
    yield line(0, f"run {wording.visible(diagnosis.run)}{ended}", "dim")
    yield from _causes(diagnosis)
    yield from _tried(diagnosis.repairs)
    yield from _checked(diagnosis.checked)
    yield from _unknown(diagnosis.unknown)
    yield from _cost(diagnosis.cost)


def heading(text: str) -> Iterator[Line]:
    """Yields the title of a section, with an empty line before it."""
    yield line(0, "")
    yield line(0, text, "bold")


def _causes(diagnosis: Diagnosis) -> Iterator[Line]:
    groups = wording.findings_by_cause(diagnosis)
    likely, possible = wording.likely_and_possible(groups)
    if likely:
        title = wording.LOW_SEVERITY if diagnosis.verdict == "healthy" else "likely causes"
        yield from heading(title)
    for rank, (cause, findings) in enumerate(likely[:CAUSES], start=1):
        yield line(4, wording.cause_sentence(cause), "bold", mark=f"{rank}. ")
        measured = wording.confidence(cause.probability, cause.n)
        notes = (wording.cause_label(cause), measured, wording.place(findings, _here()))
        yield line(4, "; ".join(note for note in notes if note), "dim")
        if cause.because:
            yield line(4, wording.because_sentence(cause), "dim")
        yield from _findings(findings, explained=True)
        yield from _repairs(cause, findings)
        yield from _patch(findings)
    yield from _more(len(likely) - CAUSES, "cause")
    if possible:
        yield from heading("also possible")
    for rank, cause in enumerate(possible[:OTHERS], start=len(likely) + 1):
        yield line(4, wording.cause_label(cause), mark=f"{rank}. ")
    yield from _more(len(possible) - OTHERS, "cause")
    for unranked, findings in groups:
        if unranked is None:
            yield from heading("findings without a ranked cause")
            yield from _findings(findings, explained=False)
            yield from _repairs(None, findings)


def _findings(findings: Sequence[wording.Numbered], explained: bool) -> Iterator[Line]:
    for number, finding in findings[:FINDINGS]:
        place = "" if explained else wording.place([(number, finding)], _here())
        yield Line(
            4,
            (
                (finding.severity, _STYLES[finding.severity]),
                (f" {finding.fault}", "bold"),
                (f" in {wording.subject(finding.component, finding.other)}", ""),
                (f" from step {finding.since_step}{f' ({place})' if place else ''}", ""),
            ),
        )
        yield line(8, wording.visible(finding.message, limit=240))
        shown = _shown(len(finding.evidence), EVIDENCE)
        for evidence in finding.evidence[:shown]:
            yield line(10, wording.observation(evidence), "cyan", mark="- ")
        if finding.causes and not explained:
            yield line(8, f"possible causes: {', '.join(c.cause for c in finding.causes)}")
        yield from _more(len(finding.evidence) - shown, "comparison", indent=10)
    yield from _more(len(findings) - FINDINGS, "finding")


def _repairs(cause: RankedCause | None, findings: Sequence[wording.Numbered]) -> Iterator[Line]:
    repairs = wording.suggestions(cause, findings)
    if not repairs:
        return
    yield line(4, "what to try", "bold")
    shown = _shown(len(repairs), REPAIRS)
    for repair in repairs[:shown]:
        yield line(6, f"{repair.name}: {wording.repair_sentence(repair)}", mark="- ")
    yield from _more(len(repairs) - shown, "suggestion")


def _patch(findings: Sequence[wording.Numbered]) -> Iterator[Line]:
    """Yields the first patch there is, for the place that its finding names."""
    for number, finding in findings:
        if finding.patch:
            at = wording.place([(number, finding)], _here())
            yield line(4, f"to write{f' at {at}' if at else ''}", "bold")
            for code in _code(finding.patch)[:PATCH]:
                yield line(6, wording.visible(code, limit=160), "green")
            return


def _code(patch: str) -> list[str]:
    """Returns the lines of a patch; a remark that would wrap, and then be code, stands above."""
    lines = []
    for code in patch.rstrip().split("\n"):
        statement, mark, remark = code.partition("  # ")
        if mark and len(code) > WIDTH - 6:
            margin = statement[: len(statement) - len(statement.lstrip())]
            lines += [f"{margin}# {remark}", statement]
        else:
            lines.append(code)
    return lines


def _tried(attempts: Sequence[Attempt]) -> Iterator[Line]:
    if not attempts:
        return
    yield from heading("repairs that were tried")
    shown = wording.kept_first(attempts)[:TRIED]
    for position, attempt in shown:
        outcome = wording.outcome(attempt)
        place = f" at step {attempt.step} in {wording.subject(attempt.component)}"
        yield Line(4, ((outcome, _STYLES[outcome]), (place, "")), f"{position}. ")
        actions = _shown(len(attempt.actions), ACTIONS)
        for action in attempt.actions[:actions]:
            yield line(6, wording.repair_sentence(action), mark="- ")
        yield from _more(len(attempt.actions) - actions, "action", indent=6)
        reason = wording.visible(attempt.reason, limit=240)
        losses = wording.loss_sentence(attempt)
        yield Line(4, ((losses, "cyan"), (f"; {reason}" if reason else "", "")))
    yield from _more(len(attempts) - len(shown), "repair")
    for numbers, guarantee in wording.comparisons(shown):
        yield line(4, f"compared{f' ({numbers})' if numbers else ''}: {guarantee}", "dim")


def _here() -> Path | None:
    """Returns the present directory, None where the script has removed it."""
    try:
        return Path.cwd()
    except OSError:
        return None


def _checked(checked: Sequence[Checked]) -> Iterator[Line]:
    yield from heading("checked and fine")
    if not checked:
        yield line(4, "nothing could be checked")
        return
    titles = [wording.visible(rule.title) for rule in checked]
    more = f"; and {len(titles) - CHECKED} more" if len(titles) > CHECKED else ""
    found_nothing = f"{wording.count(len(titles), 'rule')} found none of this: "
    yield line(4, f"{found_nothing}{'; '.join(titles[:CHECKED])}{more}")


def _unknown(unknown: Sequence[Unknown]) -> Iterator[Line]:
    if not unknown:
        return
    yield from heading("could not be judged")
    groups = wording.unknown_by_reason(unknown)
    for rules, reason in groups[:UNKNOWN]:
        yield line(6, f"{wording.visible(rules, limit=300)}: {reason}", mark="- ")
    yield from _more(len(groups) - UNKNOWN, "reason")


def _cost(cost: Cost) -> Iterator[Line]:
    yield from heading("cost")
    yield line(4, wording.cost_sentence(cost))


def _shown(available: int, room: int) -> int:
    """Returns how many to show: one too many is shown, too, as saying so would take its line."""
    return available if available <= room + 1 else room


def _more(n: int, noun: str, indent: int = 4) -> Iterator[Line]:
    if n > 0:
        yield line(indent, f"and {wording.count(n, f'more {noun}')} in diagnosis.json", "dim")
