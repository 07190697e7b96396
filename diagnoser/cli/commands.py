"""What each command does. Each takes what was parsed and returns an exit code."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

from diagnoser.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from diagnoser.cases import Case
    from diagnoser.launch import Outcome
    from diagnoser.rules import Rule
    from diagnoser.runlog import Recording
    from diagnoser.types import Diagnosis

VERDICT_CODE = {"healthy": 0, "faulty": 1, "inconclusive": 3}
DIFFERENCE_CODE = {"same": 0, "different": 1, "inconclusive": 3}
USAGE = 2


def do_run(arguments: argparse.Namespace) -> int:
    """Runs a script under the monitor; the exit code is its own."""
    from diagnoser.launch import run_script
    from diagnoser.session import strategy_named

    script, *its_own = _program(arguments)
    outcome = run_script(
        script,
        its_own,
        module=arguments.module,
        out=arguments.out,
        overhead=arguments.overhead,
        every=arguments.every,
        rules=arguments.rules,
        classifier=arguments.classifier,
        repair=arguments.repair,
        strategy=strategy_named(arguments.strategy),
        stop_on=arguments.stop_on,
        heads=arguments.heads,
        track=arguments.track,
    )
    return _end_of_run(outcome, exit_verdict=arguments.exit_verdict)


def do_check(arguments: argparse.Namespace) -> int:
    """Runs the first steps of a script, with all checks."""
    from diagnoser.launch import run_script
    from diagnoser.session import Limit

    if arguments.steps < 1 or not arguments.seconds > 0:
        raise UsageError("--steps and --seconds: 1 step or more, a positive number of seconds")
    script, *its_own = _program(arguments)
    outcome = run_script(
        script,
        its_own,
        module=arguments.module,
        out=arguments.out,
        rules=arguments.rules,
        classifier=arguments.classifier,
        limit=Limit(arguments.steps, arguments.seconds),
    )
    _end_of_run(outcome, exit_verdict=False)
    if outcome.diagnosis is None:  # watching is switched off
        return outcome.exit_code
    return VERDICT_CODE[outcome.diagnosis.verdict]


def _end_of_run(outcome: Outcome, *, exit_verdict: bool) -> int:
    with suppress(OSError, ValueError):  # the script may have closed stderr, its exit code counts
        if outcome.diagnosis is not None:
            _print_page(outcome.diagnosis, sys.__stderr__)
        if outcome.problem is not None:
            print(f"diagnoser: {outcome.problem}", file=sys.__stderr__)
        elif outcome.directory is not None:
            print(f"diagnoser: report {outcome.directory}/report.html", file=sys.__stderr__)
    if outcome.diagnosis is None or outcome.exit_code != 0 or not exit_verdict:
        return outcome.exit_code
    return VERDICT_CODE[outcome.diagnosis.verdict]


def _print_page(diagnosis: Diagnosis, file: TextIO | None) -> None:
    """Prints a diagnosis; raises as `_printed` does."""
    from diagnoser.report import print_diagnosis

    _printed(lambda console: print_diagnosis(diagnosis, console), file)


def _printed(page: Callable[[Console], None], file: TextIO | None) -> None:
    """Prints a page.

    Raises:
        BrokenPipeError: Whoever was reading is gone; rich would end the process with 1, which says
            «faulty».
    """
    from rich.console import Console

    try:
        page(Console(file=file))
    except SystemExit as stop:
        raise BrokenPipeError from stop


def do_diagnose(arguments: argparse.Namespace) -> int:
    """Collecting garbage would be a tenth of the second that this takes."""
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # it would look for some
    was_on = gc.isenabled()
    gc.disable()
    try:
        return _diagnose_run(arguments)
    finally:
        if was_on:
            gc.enable()


def _diagnose_run(arguments: argparse.Namespace) -> int:
    from diagnoser.diagnosis import diagnose
    from diagnoser.runlog import read_run

    recording = read_run(arguments.run)
    diagnosis = diagnose(recording, *_judges(arguments, recording))
    if arguments.json:
        from diagnoser.report import diagnosis_to_json

        sys.stdout.write(diagnosis_to_json(diagnosis))
    else:
        _print_page(diagnosis, sys.stdout)
    return VERDICT_CODE[diagnosis.verdict]


def _judges(arguments: argparse.Namespace, recording: Recording) -> tuple[Any, Any]:
    from diagnoser.diagnosis import judges

    return judges(arguments.rules, arguments.classifier, imported=recording.imported)


def do_import(arguments: argparse.Namespace) -> int:
    """Makes a run of a log that a script wrote itself, and diagnoses it."""
    from diagnoser.diagnosis import diagnose, judges
    from diagnoser.importing import import_log
    from diagnoser.report import write_run

    imported = import_log(arguments.file, arguments.out, dict(arguments.columns))
    diagnosis = diagnose(imported.recording, *judges(imported=True))
    print(f"diagnoser: {imported.summary}")
    _print_page(diagnosis, sys.stdout)
    write_run(diagnosis, imported.recording, imported.directory)
    print(f"diagnoser: report {imported.directory}/report.html")
    return VERDICT_CODE[diagnosis.verdict]


def do_diff(arguments: argparse.Namespace) -> int:
    """Says where a run left one that went well."""
    from diagnoser.difference import compare
    from diagnoser.report.difference import difference_to_json, print_difference
    from diagnoser.runlog import read_run

    difference = compare(read_run(arguments.good), read_run(arguments.bad))
    if arguments.json:
        sys.stdout.write(difference_to_json(difference))
    else:
        _printed(lambda console: print_difference(difference, console), sys.stdout)
    return DIFFERENCE_CODE[difference.verdict]


def do_report(arguments: argparse.Namespace) -> int:
    """Writes a recorded run as a page."""
    from diagnoser.diagnosis import diagnose
    from diagnoser.report import report_data, write_report
    from diagnoser.runlog import read_run

    recording = read_run(arguments.run)
    diagnosis = diagnose(recording, *_judges(arguments, recording))
    path = arguments.file or arguments.run / "report.html"
    write_report(diagnosis, report_data(recording, diagnosis.cost), path)
    print(path)
    return 0


def do_rules_list(_: argparse.Namespace) -> int:
    """Prints the shipped rules, one a line."""
    for rule in _shipped_rules():
        name = f"{rule.family}/{rule.id}"
        print(f"{name:<50} {rule.severity:<9} {rule.status:<13} {rule.title}")
    return 0


def _shipped_rules() -> list[Rule]:
    from diagnoser.diagnosis import SHIPPED, default_rules

    return [rule for family in SHIPPED for rule in default_rules(family)]


def do_rules_show(arguments: argparse.Namespace) -> int:
    """Prints the file of a rule."""
    wanted = arguments.id.rpartition("/")[2]
    rules = _shipped_rules()
    for rule in rules:
        if arguments.id in (rule.id, f"{rule.family}/{rule.id}"):
            print(rule.path.read_text(encoding="utf-8"), end="")
            return 0
    import difflib

    near = difflib.get_close_matches(wanted, [rule.id for rule in rules], n=1)
    hint = f"; did you mean {near[0]}" if near else "; `diagnoser rules list` shows all"
    raise UsageError(f"no rule '{arguments.id}'{hint}")


def do_rules_check(arguments: argparse.Namespace) -> int:
    """Loads rules of somebody's own and tries their examples."""
    from diagnoser.features import CATALOGUE
    from diagnoser.rules import check_directory

    problems = check_directory(arguments.directory, CATALOGUE)
    for problem in problems:
        print(f"diagnoser: {problem}", file=sys.stderr)
    if not problems:
        print(
            f"{arguments.directory}: every rule loads, its examples hold, no clause is decoration"
        )
    return USAGE if problems else 0


def do_case_list(_: argparse.Namespace) -> int:
    """Prints the shipped cases and their faults."""
    from diagnoser.cases import load_cases

    for case in load_cases():
        faults = ", ".join(fault.name for fault in case.faults)
        print(f"{case.name:<16} healthy {case.metric.name} {case.metric.healthy}; faults: {faults}")
    return 0


def do_case_run(arguments: argparse.Namespace) -> int:
    """Runs a case under the monitor."""
    from diagnoser.cases import command_line, load_case
    from diagnoser.launch import run_script

    case = load_case(arguments.name)
    outcome = run_script(case.script, command_line(case, arguments.fault), out=arguments.out)
    code = _end_of_run(outcome, exit_verdict=arguments.exit_verdict)
    _require_names(case, outcome)
    return code


def do_repair(arguments: argparse.Namespace) -> int:
    """Runs a case, repairs what is found, and keeps what helped."""
    from diagnoser.cases import load_case
    from diagnoser.restart import repair_case
    from diagnoser.session import strategy_named

    case = load_case(arguments.case)
    fault = arguments.fault
    if fault is None and case.faults:
        fault = case.faults[0].name
    outcome = repair_case(
        case,
        None if fault == "none" else fault,
        out=arguments.out,
        strategy=strategy_named(arguments.strategy),
    )
    _end_of_run(outcome, exit_verdict=False)
    _require_names(case, outcome)
    if outcome.exit_code != 0 or outcome.diagnosis is None:
        return outcome.exit_code
    return 0 if outcome.repaired or outcome.diagnosis.verdict == "healthy" else 1


def _require_names(case: Case, outcome: Outcome) -> None:
    """Raises UsageError where a case's file names what the model that it ran has not got."""
    from diagnoser.cases import missing_names
    from diagnoser.runlog import read_run

    if outcome.exit_code != 0 or outcome.directory is None:
        return
    components = read_run(outcome.directory).components
    if not components:  # nothing was seen that could be compared
        return
    problem = missing_names(case, [part.parameter for c in components for part in c.parts])
    if problem is not None:
        raise UsageError(problem)


def do_bench(arguments: argparse.Namespace) -> int:
    """Plans, runs or reports the benchmark."""
    commands, request = _bench_request(arguments)
    getattr(commands, arguments.action)(request)
    return 0


def do_bench_score(arguments: argparse.Namespace) -> int:
    """Scores all judges on one part of the benchmark."""
    commands, request = _bench_request(arguments)
    commands.score(request, split=arguments.split, again=arguments.again)
    return 0


def _bench_request(arguments: argparse.Namespace) -> tuple[Any, Any]:
    try:
        from diagnoser.benchmark import commands
    except ModuleNotFoundError as error:
        raise UsageError(
            f"bench needs the package {error.name}; run: pip install 'diagnoser[bench]'"
        ) from error
    request = commands.Request(
        size=arguments.size,
        out=arguments.out,
        jobs=arguments.jobs,
        minutes=arguments.minutes,
        dask=arguments.dask,
        only=tuple(arguments.only),
        operators=tuple(arguments.operator),
        catalogue=arguments.catalogue,
    )
    return commands, request


def _program(arguments: argparse.Namespace) -> list[str]:
    """Returns the script and its arguments.

    Raises:
        UsageError: There is none.
    """
    words: list[str] = arguments.program
    words = words[1:] if words[:1] == ["--"] else words
    if not words:
        raise UsageError("no script was given; write: diagnoser run [OPTION ...] SCRIPT [ARG ...]")
    return words
