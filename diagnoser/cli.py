"""The command line: ``diagnoser run | check | repair | diagnose | report | rules | ...``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from diagnoser import __version__
from diagnoser.errors import DiagnoserError, UsageError

if TYPE_CHECKING:
    from diagnoser.rules import Rule
    from diagnoser.types import Diagnosis

VERDICT_CODE = {"healthy": 0, "faulty": 1, "inconclusive": 3}
USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Parses a command line, carries it out, and returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        if words and words[0].endswith(".py"):
            raise UsageError(f"'{words[0]}' is no command; to watch it: diagnoser run {words[0]}")
        arguments = _parser().parse_args(words)
        command: Callable[[argparse.Namespace], int] = arguments.command
        return command(arguments)
    except DiagnoserError as error:
        print(f"diagnoser: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(note, file=sys.stderr)
        return USAGE
    except BrokenPipeError:
        # The reader of our output is gone; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return USAGE
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diagnoser",
        description="Finds out why a PyTorch training run goes wrong: which component, on what "
        "evidence, what to change.",
        epilog="DIAGNOSER_OFF=1 in the environment makes every form of watching do nothing.",
    )
    parser.add_argument("--version", action="version", version=f"diagnoser {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    out_help = "where log, diagnosis and report go (default: a new directory in diagnoser-runs/)"
    verdict_help = "exit with 1 if faulty, 3 if inconclusive, when the script itself succeeded"
    run_help = "directory of a recorded run, the one with log.jsonl in it"

    _add_run(commands, out_help, verdict_help)
    _add_check(commands, out_help)

    diagnose = commands.add_parser(
        "diagnose",
        help="diagnose a recorded run again, without torch",
        description="Diagnoses a recorded run again; neither torch nor the script is needed.",
        epilog="The exit code is 0 for a healthy run, 1 faulty, 3 inconclusive, 2 for a mistake.",
    )
    diagnose.add_argument("run", type=Path, metavar="RUN", help=run_help)
    _add_judges(diagnose)
    diagnose.add_argument(
        "--json", action="store_true", help="print diagnosis.json instead of text"
    )
    diagnose.set_defaults(command=_diagnose)

    report = commands.add_parser(
        "report",
        help="write a recorded run as one HTML page",
        description="Writes a recorded run as one self-contained HTML page.",
    )
    report.add_argument("run", type=Path, metavar="RUN", help=run_help)
    report.add_argument(
        "-o",
        dest="file",
        type=Path,
        metavar="FILE.html",
        help="the page to write (default: report.html in the run directory)",
    )
    _add_judges(report)
    report.set_defaults(command=_report)

    _add_repair(commands, out_help)

    rules = commands.add_parser("rules", help="list, show or check rules")
    actions = rules.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="all shipped rules, one a line")
    listing.set_defaults(command=_rules_list)
    show = actions.add_parser("show", help="one rule's file")
    show.add_argument("id", metavar="ID", help="as `diagnoser rules list` prints it")
    show.set_defaults(command=_rules_show)
    check = actions.add_parser(
        "check", help="load a directory of rules and run the examples in each file"
    )
    check.add_argument("directory", type=Path, metavar="DIR", help="directory of rule files")
    check.set_defaults(command=_rules_check)

    case = commands.add_parser("case", help="list or run the shipped cases")
    case_actions = case.add_subparsers(metavar="ACTION", required=True)
    case_list = case_actions.add_parser("list", help="the shipped cases and their faults")
    case_list.set_defaults(command=_case_list)
    case_run = case_actions.add_parser("run", help="run a case under the monitor")
    case_run.add_argument("name", metavar="NAME", help="as `diagnoser case list` prints it")
    case_run.add_argument(
        "--fault", metavar="FAULT", help="one of the case's faults (default: healthy)"
    )
    case_run.add_argument("--out", type=Path, metavar="DIR", help=out_help)
    case_run.add_argument("--exit-verdict", action="store_true", help=verdict_help)
    case_run.set_defaults(command=_case_run)

    _add_bench(commands)
    return parser  # fmt: skip


def _add_run(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], out_help: str, verdict_help: str
) -> None:
    run = commands.add_parser(
        "run",
        allow_abbrev=False,  # an abbreviation of ours may be an option of the script
        help="run a training script with the monitor on it, then diagnose",
        description="Runs an unmodified PyTorch training script with the monitor on it. Options of "
        "diagnoser stand before SCRIPT; everything after it belongs to the script.",
        epilog="The exit code is the script's own, and 2 for a mistake in this command line.",
    )
    run.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=out_help,
    )
    run.add_argument(
        "--overhead",
        type=float,
        default=0.10,
        metavar="SHARE",
        help="share of training time for measuring (default 0.10)",
    )
    run.add_argument(
        "--every",
        type=int,
        metavar="N",
        help="measure everything every N steps (2 or more), whatever it costs",
    )
    _add_judges(run)
    run.add_argument(
        "--repair",
        choices=("off", "suggest", "apply"),
        default="off",
        help="try repairs of what is found in copies of the process and keep one only if it helped "
        "(apply), or say what would be tried (suggest); default: off, which changes nothing",
    )
    _add_strategy(run)
    run.add_argument(
        "--exit-verdict",
        action="store_true",
        help=verdict_help,
    )
    run.add_argument("script", metavar="SCRIPT", help="the training script, a Python file")
    script_arguments = run.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="ARG", help="the script's own arguments"
    )
    script_arguments.required = False  # argparse says otherwise when SCRIPT is missing
    run.set_defaults(command=_run)


def _add_check(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], out_help: str
) -> None:
    check = commands.add_parser(
        "check",
        allow_abbrev=False,
        help="check a training script before it is run: its first steps, then it is stopped",
        description="Runs the first steps of an unmodified PyTorch training script, checks what it "
        "does, has a copy of its model learn one batch by heart, and stops it. About a minute.",
        epilog="The exit code is 0 for a healthy start, 1 faulty, 3 inconclusive, 2 for a mistake "
        "in this command line.",
    )
    check.add_argument("--out", type=Path, metavar="DIR", help=out_help)
    check.add_argument(
        "--steps",
        type=int,
        default=60,
        metavar="N",
        help="stop after N steps of training (default 60)",
    )
    check.add_argument(
        "--seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="or after S seconds of it (default 30)",
    )
    _add_judges(check)
    check.add_argument("script", metavar="SCRIPT", help="the training script, a Python file")
    check_arguments = check.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="ARG", help="the script's own arguments"
    )
    check_arguments.required = False
    check.set_defaults(command=_check)


def _add_repair(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], out_help: str
) -> None:
    repair = commands.add_parser(
        "repair",
        help="run a shipped case, and repair it while it runs",
        description="Runs a shipped case under the monitor. What is found is repaired: each repair "
        "is tried in a copy of the process beside one without it, on the same batches, and the "
        "best is kept if it helped. What no running training can be given is tried by starting the "
        "case again, where it has arguments for that.",
        epilog="The exit code is 0 if the case is healthy or was repaired, 1 if not, 2 for a "
        "mistake in this command line, 130 for Ctrl-C.",
    )
    repair.add_argument("case", metavar="CASE", help="as `diagnoser case list` prints it")
    repair.add_argument(
        "--fault",
        metavar="FAULT",
        help="one of the case's faults (default: its first; `none` for the healthy form)",
    )
    repair.add_argument("--out", type=Path, metavar="DIR", help=out_help)
    _add_strategy(repair)
    repair.set_defaults(command=_repair)


def _add_judges(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--rules",
        metavar="DIR",
        help="directory of rule files, or a shipped family: diagnoser, checks (both: the default), "
        "autotrainer, umlaut, deeplocalize or deepdiagnosis; off for none",
    )
    command.add_argument(
        "--classifier",
        metavar="FILE",
        help="a classifier instead of the shipped one; off for none",
    )


def _add_strategy(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--strategy",
        choices=("diagnoser", "autotrainer"),
        default="diagnoser",
        help="how repairs are chosen: by measurements and trials, or AutoTrainer's published order "
        "until no symptom is left (default: diagnoser)",
    )


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="runs with known mistakes: what tools are judged on",
        description="Trains small subjects with and without known mistakes. What is finished is "
        "kept and not made again; any of these commands can be stopped and given again.",
    )
    bench_actions = bench.add_subparsers(metavar="ACTION", required=True)
    for name, says in (
        ("plan", "how much would be run, and how long it takes"),
        ("run", "make the runs under the monitor"),
        ("truth", "make runs without the monitor, and prove which mistakes do harm"),
    ):
        action = bench_actions.add_parser(name, help=says)
        _add_bench_options(action)
        action.set_defaults(command=_bench, action=name)
    score = bench_actions.add_parser(
        "score", help="learn on the training subjects and score all judges on others"
    )
    _add_bench_options(score)
    score.add_argument(
        "--split",
        choices=("dev", "test"),
        default="dev",
        help="subjects to score on (default: dev); opening test is logged and done once a version",
    )
    score.add_argument(
        "--again",
        default="",
        metavar="REASON",
        help="open the test subjects again with the same version; the reason is logged",
    )
    score.set_defaults(command=_bench_score)
    report = bench_actions.add_parser("report", help="print the scores that are there")
    _add_bench_options(report)
    report.set_defaults(command=_bench, action="report")


def _add_bench_options(action: argparse.ArgumentParser) -> None:
    action.add_argument(
        "--size",
        choices=("smoke", "small", "full"),
        default="small",
        help="how much (default: small)",
    )
    action.add_argument(
        "--out",
        type=Path,
        default=Path("diagnoser-bench"),
        metavar="DIR",
        help="where results are kept (default: diagnoser-bench)",
    )
    action.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time (default: the number of cores)"
    )
    action.add_argument(
        "--minutes", type=float, metavar="M", help="begin nothing new after M minutes"
    )
    action.add_argument(
        "--dask",
        default="",
        metavar="ADDRESS",
        help="use the Dask cluster whose scheduler is at ADDRESS, such as tcp://host:8786",
    )
    action.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="SUBJECT",
        help="this subject alone; may be given again",
    )
    action.add_argument(
        "--operator",
        action="append",
        default=[],
        metavar="ID",
        help="this operator alone; may be given again",
    )
    action.add_argument(
        "--catalogue",
        default="",
        metavar="MODULE:NAME",
        help="subjects and operators of your own, a diagnoser.benchmark.configuration.Catalogue",
    )


def _run(arguments: argparse.Namespace) -> int:
    from diagnoser.launch import run_script
    from diagnoser.session import strategy_named

    outcome = run_script(
        arguments.script,
        arguments.arguments,
        out=arguments.out,
        overhead=arguments.overhead,
        every=arguments.every,
        rules=arguments.rules,
        classifier=arguments.classifier,
        repair=arguments.repair,
        strategy=strategy_named(arguments.strategy),
    )
    return _end_of_run(outcome, exit_verdict=arguments.exit_verdict)


def _check(arguments: argparse.Namespace) -> int:
    from diagnoser.launch import run_script
    from diagnoser.session import Limit

    if arguments.steps < 1 or not arguments.seconds > 0:
        raise UsageError("--steps and --seconds: 1 step or more, a positive number of seconds")
    outcome = run_script(
        arguments.script,
        arguments.arguments,
        out=arguments.out,
        rules=arguments.rules,
        classifier=arguments.classifier,
        limit=Limit(arguments.steps, arguments.seconds),
    )
    _end_of_run(outcome, exit_verdict=False)
    if outcome.diagnosis is None:  # watching is switched off
        return outcome.exit_code
    return VERDICT_CODE[outcome.diagnosis.verdict]


def _end_of_run(outcome: object, *, exit_verdict: bool) -> int:
    from diagnoser.launch import Outcome

    assert isinstance(outcome, Outcome)
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
    """Prints a diagnosis.

    Raises:
        BrokenPipeError: Whoever was reading is gone; rich would end the process with 1, which says
            «faulty».
    """
    from rich.console import Console

    from diagnoser.report import print_diagnosis

    try:
        print_diagnosis(diagnosis, Console(file=file))
    except SystemExit as stop:
        raise BrokenPipeError from stop


def _diagnose(arguments: argparse.Namespace) -> int:
    from diagnoser.diagnosis import diagnose, judges
    from diagnoser.runlog import read_run

    recording = read_run(arguments.run)
    diagnosis = diagnose(recording, *judges(arguments.rules, arguments.classifier))
    if arguments.json:
        from diagnoser.report import diagnosis_to_json

        sys.stdout.write(diagnosis_to_json(diagnosis))
    else:
        _print_page(diagnosis, sys.stdout)
    return VERDICT_CODE[diagnosis.verdict]


def _report(arguments: argparse.Namespace) -> int:
    from diagnoser.diagnosis import diagnose, judges
    from diagnoser.report import report_data, write_report
    from diagnoser.runlog import read_run

    recording = read_run(arguments.run)
    diagnosis = diagnose(recording, *judges(arguments.rules, arguments.classifier))
    path = arguments.file or arguments.run / "report.html"
    write_report(diagnosis, report_data(recording, diagnosis.cost), path)
    print(path)
    return 0


def _rules_list(_: argparse.Namespace) -> int:
    for rule in _shipped_rules():
        name = f"{rule.family}/{rule.id}"
        print(f"{name:<50} {rule.severity:<9} {rule.status:<13} {rule.title}")
    return 0


def _shipped_rules() -> list[Rule]:
    from diagnoser.diagnosis import FAMILIES, default_rules

    return [rule for family in FAMILIES for rule in default_rules(family)]


def _rules_show(arguments: argparse.Namespace) -> int:
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


def _rules_check(arguments: argparse.Namespace) -> int:
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


def _case_list(_: argparse.Namespace) -> int:
    from diagnoser.cases import load_cases

    for case in load_cases():
        faults = ", ".join(fault.name for fault in case.faults)
        print(f"{case.name:<16} healthy {case.metric.name} {case.metric.healthy}; faults: {faults}")
    return 0


def _case_run(arguments: argparse.Namespace) -> int:
    from diagnoser.cases import command_line, load_case
    from diagnoser.launch import run_script

    case = load_case(arguments.name)
    outcome = run_script(case.script, command_line(case, arguments.fault), out=arguments.out)
    return _end_of_run(outcome, exit_verdict=arguments.exit_verdict)


def _repair(arguments: argparse.Namespace) -> int:
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
    if outcome.exit_code != 0 or outcome.diagnosis is None:
        return outcome.exit_code
    return 0 if outcome.repaired or outcome.diagnosis.verdict == "healthy" else 1


def _bench(arguments: argparse.Namespace) -> int:
    commands, request = _bench_request(arguments)
    getattr(commands, arguments.action)(request)
    return 0


def _bench_score(arguments: argparse.Namespace) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
