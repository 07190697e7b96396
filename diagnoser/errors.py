"""What can go wrong in our own hands, each with place and remedy in one line.

    DiagnoserError
    ├── UsageError          a command line or call that cannot be carried out
    ├── RunLogError         a run directory or log that cannot be read
    │   ├── NotARunError        no run here
    │   ├── NewerRunError       written by a newer version
    │   └── DamagedRunError     readable in no part
    ├── LoggedFileError     a script's own log that cannot be imported
    ├── RuleError           a rule file that cannot be used (path:line:column in the text)
    ├── MeasurementError    a quantity that cannot be measured here, and why
    ├── RepairError         a repair that cannot be applied or tried here, and why
    ├── InjectionError      a fault that cannot be injected here, or changed more than it says
    ├── ClassifierError     a classifier file that cannot be used, or runs too few to learn from
    └── BenchmarkError      a benchmark result that cannot be used, or a run that cannot be made

The command line prints the text after ``diagnoser: `` and exits with 2. Nothing here ever reaches
a user's training loop: the monitor turns its own failures into recorded events.
"""

from __future__ import annotations


class DiagnoserError(Exception):
    """Base of all errors of this package; its text is one line: what, where, what to do."""


class UsageError(DiagnoserError):
    """A command line or call that cannot be carried out."""


class RunLogError(DiagnoserError):
    """A run directory or run log that cannot be read or written."""


class NotARunError(RunLogError):
    """The directory holds no run."""


class NewerRunError(RunLogError):
    """The run was written by a newer version of diagnoser."""


class DamagedRunError(RunLogError):
    """Nothing of the log can be read."""


class LoggedFileError(DiagnoserError):
    """A log that a script wrote itself and that cannot be imported."""


class RuleError(DiagnoserError):
    """A rule file that cannot be used."""


class MeasurementError(DiagnoserError):
    """A quantity that cannot be measured here; the text says why."""


class InjectionError(DiagnoserError):
    """A fault that cannot be injected here, or that changed something it does not name."""


class ClassifierError(DiagnoserError):
    """A classifier file that cannot be used, or too few runs to learn one from."""


class BenchmarkError(DiagnoserError):
    """A benchmark result that cannot be used, or a run that cannot be made."""


class RepairError(DiagnoserError):
    """A repair that cannot be applied or tried here; the text says why."""
