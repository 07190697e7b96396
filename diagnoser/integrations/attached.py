"""A watch that callbacks begin and end, as no ``with`` can stand around a framework's loop."""

from __future__ import annotations

import atexit
import sys
from typing import Any, ClassVar

from rich.console import Console
from torch import nn

from diagnoser.errors import DiagnoserError, UsageError
from diagnoser.report import print_diagnosis
from diagnoser.session import Watch, watch
from diagnoser.types import Diagnosis


class Attached:
    """Watches from `begin` to `end`, then diagnoses; what a callback of any framework holds.

    Args:
        verbose: Print findings as they appear, and the diagnosis at the end, to stderr.
        options: Of `diagnoser.watch`, but for ``stop_on``: a framework has its own way to stop.

    Attributes:
        watch: The present or last one; None: nothing has begun yet.

    Raises:
        UsageError: An option that is not for here.
    """

    _open: ClassVar[Attached | None] = None  # a training that raised may never say that it ended

    def __init__(self, *, verbose: bool = True, **options: Any) -> None:
        if "stop_on" in options:
            raise UsageError(
                "stop_on= is for `with diagnoser.watch(...)`; a callback cannot use it"
            )
        self.watch: Watch | None = None
        self._diagnosis: Diagnosis | None = None
        self._verbose, self._options = verbose, options

    @property
    def diagnosis(self) -> Diagnosis | None:
        """Of the last training that has ended; None: there is none.

        One rank of several makes it as the training ends, and any other when it is asked.
        """
        if self._diagnosis is None and self.watch is not None and self.watch.has_ended:
            self._diagnosis = self.watch.diagnose()
        return self._diagnosis

    def begin(self, model: nn.Module) -> None:
        """Begins to watch a training; one that began in such a way and never ended does so first.

        Raises:
            DiagnoserError: The options do not fit, the run directory cannot be written, or a
                ``with diagnoser.watch(...)`` stands around all this.
        """
        if Attached._open is not None:
            Attached._open.end(failed=True)
        self.watch = watch(model, verbose=self._verbose, **self._options)
        self.watch.__enter__()
        Attached._open = self
        atexit.register(self.end, failed=True)

    def end(self, *, failed: bool = False) -> None:
        """Ends the log and diagnoses, once; ``failed``: the training did not come to its end."""
        if Attached._open is not self or self.watch is None:
            return
        Attached._open = None
        atexit.unregister(self.end)
        self.watch.end(1 if failed else None)
        self._diagnosis = None
        if self.watch.directory is None or not self.watch.diagnoses:  # off, or another rank does
            return
        try:
            self._diagnosis = self.watch.diagnose()
        except DiagnoserError as error:  # a full disk is no reason not to say what was found
            print(f"diagnoser: {error}", file=sys.stderr)
            self._diagnosis = self.watch.diagnose(write=False)
        if self._verbose:
            print_diagnosis(self._diagnosis, Console(file=sys.stderr))
            print(f"diagnoser: report {self.watch.directory}/report.html", file=sys.stderr)
