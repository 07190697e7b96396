"""What can be asked for on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from diagnoser import __version__
from diagnoser.cli.commands import (
    do_bench,
    do_bench_score,
    do_case_list,
    do_case_run,
    do_check,
    do_diagnose,
    do_diff,
    do_import,
    do_repair,
    do_report,
    do_rules_check,
    do_rules_list,
    do_rules_show,
    do_run,
)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all command lines; each sets ``command``, what carries it out."""
    made = argparse.ArgumentParser(
        prog="diagnoser",
        description="Finds out why a PyTorch training run goes wrong: which component, on what "
        "evidence, what to change.",
        epilog="DIAGNOSER_OFF=1 in the environment makes every form of watching do nothing.",
    )
    made.add_argument("--version", action="version", version=f"diagnoser {__version__}")
    commands = made.add_subparsers(metavar="COMMAND", required=True)

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
    diagnose.set_defaults(command=do_diagnose)

    _add_diff(commands)
    _add_import(commands)

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
    report.set_defaults(command=do_report)

    _add_repair(commands, out_help)

    rules = commands.add_parser("rules", help="list, show or check rules")
    actions = rules.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="all shipped rules, one a line")
    listing.set_defaults(command=do_rules_list)
    show = actions.add_parser("show", help="one rule's file")
    show.add_argument("id", metavar="ID", help="as `diagnoser rules list` prints it")
    show.set_defaults(command=do_rules_show)
    check = actions.add_parser(
        "check", help="load a directory of rules and run the examples in each file"
    )
    check.add_argument("directory", type=Path, metavar="DIR", help="directory of rule files")
    check.set_defaults(command=do_rules_check)

    case = commands.add_parser("case", help="list or run the shipped cases")
    case_actions = case.add_subparsers(metavar="ACTION", required=True)
    case_list = case_actions.add_parser("list", help="the shipped cases and their faults")
    case_list.set_defaults(command=do_case_list)
    case_run = case_actions.add_parser("run", help="run a case under the monitor")
    case_run.add_argument("name", metavar="NAME", help="as `diagnoser case list` prints it")
    case_run.add_argument(
        "--fault", metavar="FAULT", help="one of the case's faults (default: healthy)"
    )
    case_run.add_argument("--out", type=Path, metavar="DIR", help=out_help)
    case_run.add_argument("--exit-verdict", action="store_true", help=verdict_help)
    case_run.set_defaults(command=do_case_run)

    _add_bench(commands)
    return made  # fmt: skip


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
        "--stop-on",
        choices=("medium", "high", "critical"),
        metavar="SEVERITY",
        help="end the script when something of this severity or graver is found (medium, high or "
        "critical), and keep the last healthy state as healthy.pt in the run directory",
    )
    run.add_argument(
        "--heads",
        action="store_true",
        help="look at each attention head by itself (q_proj[head=3])",
    )
    run.add_argument(
        "--track",
        action="store_true",
        help="write what is measured and found into the trackers that the script itself uses, "
        "beside what it writes there: TensorBoard, MLflow, W&B (default: leave them alone)",
    )
    run.add_argument(
        "--exit-verdict",
        action="store_true",
        help=verdict_help,
    )
    _add_program(run)
    run.set_defaults(command=do_run)


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
    _add_program(check)
    check.set_defaults(command=do_check)


def _add_diff(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    diff = commands.add_parser(
        "diff",
        help="say where a recorded run left one that went well, without torch",
        description="Compares a recorded run with one of the same program that went well: which "
        "component left it first, at which step, in which quantity, and what else differs.",
        epilog="The exit code is 0 if there is no difference, 1 if they differ, 3 if they have too "
        "little in common to tell, 2 for a mistake.",
    )
    diff.add_argument("good", type=Path, metavar="GOOD", help="directory of a run that went well")
    diff.add_argument("bad", type=Path, metavar="BAD", help="directory of the run in question")
    diff.add_argument("--json", action="store_true", help="print JSON instead of text")
    diff.set_defaults(command=do_diff)


def _add_import(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    imports = commands.add_parser(
        "import",
        help="make a run of a log that a script wrote itself, and diagnose it, without torch",
        description="Makes a run directory of curves that a training script logged itself: a "
        "trainer_state.json of Hugging Face's Trainer (or a checkpoint with one in it), an event "
        "file of TensorBoard (or a directory of one run's), or a CSV file with a header. What "
        "curves cannot tell is said to be unknown; that a run is healthy is among it.",
        epilog="The exit code is 1 if a fault shows in the curves, 3 if none does, 2 for a "
        "mistake.",
    )
    imports.add_argument("file", type=Path, metavar="FILE", help="the log, a file or a directory")
    imports.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="the run directory (default: a new one in diagnoser-runs/)",
    )
    imports.add_argument(
        "--column",
        dest="columns",
        action="append",
        default=[],
        type=_column,
        metavar="QUANTITY=NAME",
        help="take QUANTITY (loss, evaluation_loss, accuracy, evaluation_accuracy, gradient_norm, "
        "learning_rate, or step in a CSV) from the column or tag NAME; without a NAME leave it "
        "out; may be given again",
    )
    imports.set_defaults(command=do_import)


def _column(text: str) -> tuple[str, str]:
    quantity, given, name = text.partition("=")
    if not given:
        raise argparse.ArgumentTypeError(f"'{text}': write QUANTITY=NAME, as in loss=train/loss")
    return quantity, name


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
    repair.set_defaults(command=do_repair)


def _add_program(command: argparse.ArgumentParser) -> None:
    """Adds the script and its arguments as one list, so that a ``--`` among these stays there."""
    command.usage = f"{command.prog} [OPTION ...] [-m] SCRIPT [ARG ...]"
    command.add_argument(
        "-m",
        dest="module",
        action="store_true",
        help="SCRIPT is the name of a module, as `python -m` takes it",
    )
    command.add_argument(
        "program",
        nargs=argparse.REMAINDER,
        metavar="SCRIPT [ARG ...]",
        help="the training script, a Python file, and its own arguments",
    )


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
        action.set_defaults(command=do_bench, action=name)
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
    score.set_defaults(command=do_bench_score)
    report = bench_actions.add_parser("report", help="print the scores that are there")
    _add_bench_options(report)
    report.set_defaults(command=do_bench, action="report")


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
