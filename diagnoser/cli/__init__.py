"""The command line: ``diagnoser run | check | repair | diagnose | diff | import | report ...``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from diagnoser.cli.commands import USAGE
from diagnoser.cli.parser import parser
from diagnoser.errors import DiagnoserError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Parses a command line, carries it out, and returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        if words and words[0].endswith(".py"):
            raise UsageError(f"'{words[0]}' is no command; to watch it: diagnoser run {words[0]}")
        arguments = parser().parse_args(words)
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
