"""A case that is changed and started again: for repairs that no running training can be given.

What changes data, loss or architecture cannot be tried beside the training as it is. Where the file
of a case says which arguments of its script make such a change (``restarts``), the whole script is
run once more with them, and both runs are compared by what the case is about: the metric on
held-back data, which its script prints at the end.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from diagnoser.cases import Case, Metric, command_line
from diagnoser.diagnosis import EVENT, attempt_data, diagnose, is_grave, judges
from diagnoser.errors import DiagnoserError
from diagnoser.launch import Outcome, run_script
from diagnoser.repair_loop import Strategy, instructions
from diagnoser.report import write_run
from diagnoser.runlog import Recording, add_event, read_run
from diagnoser.types import Arm, Attempt, Finding, Repair

_COMPARED: Final = 0.1  # share of a run, its last, whose mean loss is told
_KEPT_OF_OUTPUT: Final = 2000  # characters, among which the metric is looked for


def repair_case(case: Case, fault: str | None, *, out: Path | None, strategy: Strategy) -> Outcome:
    """Runs a case, repairs it while it runs, and starts it again where that is what it needs.

    Args:
        case: What is run; ``case.restarts`` are the changes that may be tried.
        fault: One of its faults, or None for its healthy form.
        out: The run directory; runs that are started again go to ``restarts`` in it, with what
            they printed in a text beside each.
        strategy: How repairs are chosen while it runs.

    Raises:
        UsageError, RunLogError: As `launch.run_script` does.
    """
    words = command_line(case, fault)
    with _heard() as printed:
        first = run_script(case.script, words, out=out, repair="apply", strategy=strategy)
    if first.exit_code != 0 or first.diagnosis is None or first.directory is None:
        return first
    if first.repaired or first.diagnosis.verdict == "healthy" or first.problem is not None:
        return first
    log = read_run(first.directory)
    metric = metric_of(printed.tail, case.metric)
    left: tuple[Finding, ...] | None = None
    for finding, repair in _exposed(case, first.diagnosis.findings):
        words = command_line(case, fault, **case.restarts[repair.name])
        folder = first.directory / "restarts" / repair.name
        try:
            attempt, remaining = _tried(case, words, folder, finding, repair, log, metric)
            message = f"{repair.name} and a new start: {attempt.reason}"
            add_event(first.directory, attempt.step, EVENT, message, attempt_data(attempt))
        except (DiagnoserError, OSError) as error:  # what the first run came to is still told
            told = f"the case could not be started again for {repair.name}: {error}"
            return replace(first, problem=told)
        if attempt.kept:
            left = remaining
            break
    recording = read_run(first.directory)
    diagnosis = diagnose(recording, *judges(None, None))
    try:
        write_run(diagnosis, recording, first.directory)
    except DiagnoserError as error:
        return replace(first, diagnosis=diagnosis, problem=str(error))
    return replace(first, diagnosis=diagnosis, left=first.left if left is None else left)


def _exposed(case: Case, findings: Sequence[Finding]) -> Iterator[tuple[Finding, Repair]]:
    """Yields the instructions that the case has arguments for, each once."""
    seen = set[str]()
    for finding, repair in instructions(findings):
        if repair.name in case.restarts and repair.name not in seen:
            seen.add(repair.name)
            yield finding, replace(repair, parameters=dict(case.restarts[repair.name]))


def _tried(
    case: Case,
    words: Sequence[str],
    folder: Path,
    finding: Finding,
    repair: Repair,
    before: Recording,
    metric: float,
) -> tuple[Attempt, tuple[Finding, ...]]:
    """Runs the script with other arguments; returns what came of it, and what is still found."""
    folder.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "diagnoser.cli", "run", "--out", str(folder)]
    done = subprocess.run(
        [*command, str(case.script), *words], capture_output=True, text=True, check=False
    )
    changed = " ".join(f"--{n.replace('_', '-')} {v}" for n, v in repair.parameters.items())
    attempt = Attempt(
        step=finding.since_step,
        source=finding.source,
        component=finding.component,
        actions=(repair,),
        derivation=f"the case has arguments for it: {changed}",
        guarantee="started again: the whole script was run a second time, from the same seed",
        kept=False,
        reason="",
        before=replace(_arm(before, (finding,)), evidence=finding.evidence),
    )
    output = folder.with_suffix(".txt")
    output.write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode != 0:
        told = f"it ended with {done.returncode}; what it printed is in restarts/{output.name}"
        return replace(attempt, reason=told), ()
    recording = read_run(folder)
    remaining = tuple(
        f for f in diagnose(recording, *judges(None, None)).findings if is_grave(f.severity)
    )
    kept, reason = judged(
        case.metric,
        metric,
        metric_of(done.stdout[-_KEPT_OF_OUTPUT:], case.metric),
        cured=finding.source not in {f.source for f in remaining},
    )
    after = _arm(recording, remaining)
    twin = attempt.before
    return replace(attempt, kept=kept, reason=reason, after=after, twin=twin), remaining


def judged(metric: Metric, before: float, after: float, *, cured: bool) -> tuple[bool, str]:
    """Returns whether a new start is the better run, and why: by more than the case's margin.

    >>> accuracy = Metric(name="accuracy", better="higher", healthy=0.9, within=0.03)
    >>> judged(accuracy, 0.4, 0.9, cured=True)
    (True, 'the finding is gone; accuracy 0.9 instead of 0.4 on held-back data')
    """
    if not (math.isfinite(before) and math.isfinite(after)):
        which = "the run" if not math.isfinite(before) else "the new run"
        return False, f"{which} printed no {metric.name} to compare by"
    gain = after - before if metric.better == "higher" else before - after
    numbers = f"{metric.name} {after:.4g} instead of {before:.4g} on held-back data"
    if not cured:
        return False, f"the finding is still there; {numbers}"
    if gain <= metric.within:
        return False, f"the finding is gone; {numbers}: no more than the margin of {metric.within}"
    return True, f"the finding is gone; {numbers}"


def metric_of(printed: str, metric: Metric) -> float:
    """Returns the number behind the last line that begins with a metric's name; else NaN."""
    found = re.findall(rf"^{re.escape(metric.name)}[ :=]+(\S+)\s*$", printed, re.MULTILINE)
    try:
        return float(found[-1])
    except (IndexError, ValueError):
        return math.nan


def _arm(recording: Recording, findings: Sequence[Finding]) -> Arm:
    values = recording.losses.value
    last = values[-max(1, round(_COMPARED * len(values))) :]
    loss = float(last.mean()) if len(last) else math.nan
    return Arm(len(values), loss, (), tuple(dict.fromkeys(f.source for f in findings)))


class _Heard(io.TextIOBase):
    """Passes on what is printed, and remembers its end."""

    def __init__(self, stream: io.TextIOBase) -> None:
        self._stream, self.tail = stream, ""

    def write(self, text: str) -> int:
        self.tail = (self.tail + text)[-_KEPT_OF_OUTPUT:]
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()


@contextlib.contextmanager
def _heard() -> Iterator[_Heard]:
    heard = _Heard(sys.stdout)  # type: ignore[arg-type]
    with contextlib.redirect_stdout(heard):
        yield heard
