"""Rule files, ``rules/<family>/<id>.yaml``, into `Rule` values; every mistake with its place.

All that is wrong with a directory is reported together, one line a problem.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from diagnoser.errors import RuleError
from diagnoser.rules.message import SUBJECTS, Message, parse_message
from diagnoser.rules.parsing import Mistake, parse_expression, resolve_feature, suggestion
from diagnoser.rules.rule import Example, Rule, Stage, SuggestedRepair
from diagnoser.rules.strict_yaml import Document, Location, read_document
from diagnoser.table import Catalogue, Column, Scope
from diagnoser.vocabulary import (
    CAUSE_CATEGORY,
    FAULTS,
    KINDS,
    MODEL,
    PLACES,
    REPAIRS,
    SEVERITIES,
    STATUSES,
)

_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_STANDARD_ERRORS: Final = 2.0  # each side of a value, as in `table`


def _word(known: Collection[str], what: str) -> AfterValidator:
    """Returns a check that a text is one of a closed vocabulary."""

    def check(word: str) -> str:
        if word not in known:
            hint = suggestion(word, known) or f"; one of {', '.join(known)}"
            raise ValueError(f"unknown {what} '{word[:60]}'{hint}")
        return word

    return AfterValidator(check)


def _starts_with_detects(text: str) -> str:
    if not text.startswith("Detects"):
        raise ValueError('a description starts with "Detects"')
    return text


def _parameter(value: Any) -> float | str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise ValueError("a parameter is a finite number or text")


Text = Annotated[str, Field(min_length=1, max_length=4000)]
Fault = Annotated[str, _word(FAULTS, "fault")]
CauseName = Annotated[str, _word(CAUSE_CATEGORY, "cause")]
KindName = Annotated[str, _word(KINDS, "component kind")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _RepairFile(_Strict):
    name: Annotated[str, _word(REPAIRS, "repair")]
    parameters: dict[str, Annotated[Any, AfterValidator(_parameter)]] = {}
    component: Annotated[str, _word((*SUBJECTS, MODEL), "component of a repair")] = "component"


class _SeriesFile(_Strict):
    """A list of numbers, or ``{value: [...], std_error: [...]}``; null is not measured."""

    value: Annotated[list[float | None], Field(min_length=1)]
    std_error: list[float | None] | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain_list(cls, data: Any) -> Any:
        return {"value": data} if isinstance(data, list) else data

    @model_validator(mode="after")
    def _same_length(self) -> _SeriesFile:
        if self.std_error is not None and len(self.std_error) != len(self.value):
            raise ValueError("value and std_error differ in length")
        return self

    def column(self) -> Column:
        value = np.array([self.value], dtype=np.float64)  # None becomes NaN: not measured
        if self.std_error is None:
            return Column.exact(value)
        reach = _STANDARD_ERRORS * np.array([self.std_error], dtype=np.float64)
        unknown = np.isnan(value - reach)
        return Column(np.where(unknown, np.nan, value), value - reach, value + reach)


class _KindsFile(_Strict):
    """``kind: query``, or ``kind: {a: query, b: key}`` in a pair rule."""

    a: KindName = "other"
    b: KindName = "other"

    @model_validator(mode="before")
    @classmethod
    def _plain_kind(cls, data: Any) -> Any:
        return {"a": data, "b": data} if isinstance(data, str) else data


_EndsFile = Annotated[
    list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=2, max_length=2)
]


class _ExampleFile(_Strict):
    name: Text
    series: Annotated[dict[str, _SeriesFile], Field(min_length=1)]
    kind: _KindsFile = _KindsFile()
    healthy: dict[str, _EndsFile] = {}
    fires: bool


class _StageFile(_Strict):
    on: Literal["a", "b", "a,b"]
    when: Text


class _RuleFile(_Strict):
    title: Text
    status: Annotated[str, _word(STATUSES, "status")]
    description: Annotated[Text, AfterValidator(_starts_with_detects)]
    references: list[Text] = []
    fault: Fault
    scope: Literal["run", "component", "pair"]
    kind: Literal["condition", "sequence"] = "condition"
    when: Text | None = None
    hold: Annotated[int, Field(alias="for", ge=1, le=1000)] = 1
    stages: Annotated[list[_StageFile], Field(min_length=2, max_length=8)] | None = None
    within: Annotated[int, Field(ge=1, le=1000)] | None = None
    severity: Annotated[str, _word(SEVERITIES, "severity")]
    message: Text
    causes: Annotated[list[CauseName], Field(min_length=1)]
    repairs: list[_RepairFile] = []
    explains: list[Fault] = []
    ends_run: bool = False
    where: Annotated[str, _word(PLACES, "place")] | None = None
    patch: Text | None = None
    falsepositives: Annotated[list[Text], Field(min_length=1)]
    tests: Annotated[list[_ExampleFile], Field(min_length=2)]


_KEYS: Final = tuple(
    field.alias or name
    for model in (_RuleFile, _RepairFile, _ExampleFile, _StageFile, _SeriesFile)
    for name, field in model.model_fields.items()
)


def shipped_rules_directory(family: str) -> Path:
    """Returns the directory of a family of the rules that ship with the package.

    A wheel carries them inside the package; in a checkout they lie beside it.

    Raises:
        RuleError: there is no such family.
    """
    package = Path(__file__).parent.parent
    roots = (package / "_shipped" / "rules", package.parent / "rules")
    root = next((root for root in roots if root.is_dir()), None)
    families = sorted(path.name for path in root.iterdir() if path.is_dir()) if root else []
    if root is None or family not in families:
        known = ", ".join(families) or "none is installed"
        raise RuleError(f"no family '{family[:60]}' of rules; there is: {known}")
    return root / family


def load_rules(directory: Path, catalogue: Catalogue) -> tuple[Rule, ...]:
    """Loads every rule of a family's directory, or of a directory of families.

    Args:
        directory: holds ``<id>.yaml`` or ``<family>/<id>.yaml``.
        catalogue: the features that rules may name.

    Returns:
        The rules by family and id.

    Raises:
        RuleError: one line for each thing that is wrong; notes show the places.
    """
    if not directory.is_dir():
        raise RuleError(f"{directory}: not a directory; name one that holds rule files")
    paths = sorted({*directory.glob("*.yaml"), *directory.glob("*/*.yaml")})
    if not paths:
        raise RuleError(f"{directory}: holds no rule file (<id>.yaml or <family>/<id>.yaml)")
    rules: dict[str, Rule] = {}
    problems: list[RuleError] = []
    for path in sorted({*directory.glob("*.yml"), *directory.glob("*/*.yml")}):
        problems.append(RuleError(f"{path}: a rule file ends in .yaml; rename it"))
    for path in paths:
        try:
            rule = load_rule(path, catalogue)
        except RuleError as error:
            problems.append(error)
            continue
        if rule.id in rules:
            problems.append(RuleError(f"{path}: {rules[rule.id].path} has the same id; rename one"))
        rules[rule.id] = rule
    _raise_together(problems)
    return tuple(sorted(rules.values(), key=lambda rule: (rule.family, rule.id)))


def load_rule(path: Path, catalogue: Catalogue) -> Rule:
    """Loads one rule file.

    Raises:
        RuleError: one line for each thing that is wrong with it; notes show the places.
    """
    document = read_document(path)
    if not _ID.fullmatch(path.stem):
        raise RuleError(f"{path}: the file's name is the rule's id: a-z, 0-9 and '-' only")
    try:
        file = _RuleFile.model_validate(document.data)
    except ValidationError as error:
        _raise_together(_translate(document, error))
        raise AssertionError from error  # pragma: no cover - a validation error has details
    problems = list(_contradictions(document, file))
    _raise_together(problems)
    return _build(document, file, catalogue)


def _raise_together(problems: list[RuleError]) -> None:
    if not problems:
        return
    error = RuleError("\n".join(str(problem) for problem in problems))
    for problem in problems:
        for note in getattr(problem, "__notes__", ()):
            error.add_note(note)
    raise error


def _translate(document: Document, error: ValidationError) -> list[RuleError]:
    """Turns the complaints of pydantic into ours, each once and with its place."""
    problems = {}
    for detail in error.errors(include_url=False, include_context=False):
        location: Location = tuple(detail["loc"])
        name = str(location[-1])[:60] if location else ""
        match detail["type"]:
            case "missing":
                problem = document.error(location, f"key '{name}' is missing")
            case "extra_forbidden":
                text = f"unknown key '{name}'{suggestion(name, _KEYS)}"
                problem = document.error(location, text, at_key=True)
            case _:
                text = detail["msg"].removeprefix("Value error, ")
                text = text.replace("Input should be", "must be")
                problem = document.error(location, " ".join(text.split()))
        problems[str(problem)] = problem
    return list(problems.values())


def _contradictions(document: Document, file: _RuleFile) -> Iterator[RuleError]:
    """Yields what is wrong between keys that are each right."""
    if file.kind == "condition":
        if file.when is None:
            yield document.error((), "key 'when' is missing")
        for key in ("stages", "within"):
            if key in document.data:
                text = f"'{key}' belongs to a rule of kind: sequence"
                yield document.error((key,), text, at_key=True)
    else:
        for key in ("when", "for"):
            if key in document.data:
                yield document.error((key,), f"a sequence has stages, no '{key}'", at_key=True)
        for key in ("stages", "within"):
            if key not in document.data:
                yield document.error((), f"key '{key}' is missing: a sequence needs it")
        if file.scope != "pair":
            yield document.error(("scope",), "a sequence has scope: pair")
        if file.stages and file.stages[0].on == "a,b":
            yield document.error(("stages", 0, "on"), "a sequence starts on one component")
    if file.status == "experimental" and file.severity != "low":
        yield document.error(("severity",), "an experimental rule has severity: low")
    if file.scope != "pair":
        for i, repair in enumerate(file.repairs):
            if repair.component == "other":
                yield document.error(("repairs", i), "only a pair rule has an 'other'")
    for fires in (True, False):
        if all(example.fires is not fires for example in file.tests):
            wanted = "must fire" if fires else "must not fire"
            yield document.error(("tests",), f"no example on which the rule {wanted}", at_key=True)


def _build(document: Document, file: _RuleFile, catalogue: Catalogue) -> Rule:
    scope: Scope = file.scope
    problems: list[RuleError] = []
    stages: list[Stage] = []
    texts: list[tuple[str, Location, str]] = [
        (stage.on, ("stages", i, "when"), stage.when) for i, stage in enumerate(file.stages or ())
    ]
    for on, location, text in texts or [("", ("when",), str(file.when))]:
        try:
            component = on if on in ("a", "b") else ""
            stages.append(Stage(on, parse_expression(text, catalogue, scope, component)))
        except Mistake as mistake:
            problems.append(document.error_in_text(location, mistake.offset, str(mistake)))

    def resolve(name: str) -> str:
        if name == "component" or (name == "other" and scope == "pair"):
            return name
        prefix, _, feature = name.rpartition(".")
        return resolve_feature(prefix, feature, catalogue, scope)

    message = Message(())
    try:
        message = parse_message(file.message, resolve)
    except (LookupError, ValueError) as error:
        problems.append(document.error(("message",), str(error.args[0])))
    used = {name for stage in stages for name in stage.when.names} | set(message.features)
    ranged = {end.name for stage in stages for end in stage.when.ranges}
    examples = []
    for i, test in enumerate(file.tests):
        location = ("tests", i)
        wrong = list(_wrong_series(document, location, test, resolve, catalogue))
        if not wrong and not problems:
            wrong = [
                document.error((*location, "series", name), f"'{name}' is not used by this rule")
                for name in test.series
                if name not in used
            ]
            wrong += _wrong_ranges(document, location, test, ranged, catalogue)
        problems += wrong
        healthy = {name: (float(low), float(high)) for name, (low, high) in test.healthy.items()}
        columns = {name: series.column() for name, series in test.series.items()}
        kinds = {"a": test.kind.a, "b": test.kind.b}
        line = document.values[location][0] + 1
        examples.append(Example(test.name, columns, kinds, healthy, test.fires, line))
    _raise_together(problems)
    return Rule(
        id=document.path.stem,
        family=document.path.resolve().parent.name,
        path=document.path,
        title=file.title,
        status=file.status,
        description=file.description,
        references=tuple(file.references),
        fault=file.fault,
        scope=scope,
        stages=tuple(stages),
        hold=file.hold,
        within=file.within or 1,
        severity=file.severity,
        message=message,
        causes=tuple(file.causes),
        repairs=tuple(
            SuggestedRepair(repair.name, repair.component, repair.parameters)
            for repair in file.repairs
        ),
        explains=tuple(file.explains),
        ends_run=file.ends_run,
        where=file.where,
        patch=file.patch,
        falsepositives=tuple(file.falsepositives),
        tests=tuple(examples),
    )


def _wrong_series(
    document: Document,
    location: Location,
    test: _ExampleFile,
    resolve: Callable[[str], str],
    catalogue: Catalogue,
) -> Iterator[RuleError]:
    """Yields what is wrong with an example's series: names, lengths, values out of range."""
    steps = len(next(iter(test.series.values())).value)
    for name, series in test.series.items():
        place = (*location, "series", name)
        try:
            if name in SUBJECTS or resolve(name) != name:
                raise LookupError(f"'{name[:60]}' is no feature")
        except LookupError as error:
            yield document.error(place, str(error.args[0]), at_key=True)
            continue
        feature = catalogue[name.rpartition(".")[2]]
        if len(series.value) != steps:
            yield document.error(place, f"'{name}' has not {steps} values as the first series has")
        for value in series.value:
            if value is not None and (value < feature.low or value > feature.high):
                text = f"{value:g}: {feature.name} lies in [{feature.low:g}, {feature.high:g}]"
                yield document.error(place, text)


def _wrong_ranges(
    document: Document,
    location: Location,
    test: _ExampleFile,
    ranged: Collection[str],
    catalogue: Catalogue,
) -> Iterator[RuleError]:
    """Yields what is wrong with an example's healthy ranges: names, order, values out of range."""
    for name, (low, high) in test.healthy.items():
        place = (*location, "healthy", name)
        if name not in ranged:
            text = f"'{name[:60]}': the rule has no healthy_low or healthy_high of it"
            yield document.error(place, text + suggestion(name, ranged), at_key=True)
            continue
        feature = catalogue[name.rpartition(".")[2]]
        if low > high:
            yield document.error(place, f"[{low:g}, {high:g}]: the low end comes first")
        elif low < feature.low or high > feature.high:
            text = f"{feature.name} lies in [{feature.low:g}, {feature.high:g}]"
            yield document.error(place, f"[{low:g}, {high:g}]: {text}")
        twin = f"b.{feature.name}"
        same_kind = name == f"a.{feature.name}" and test.kind.a == test.kind.b
        if same_kind and test.healthy.get(twin, [low, high]) != [low, high]:
            text = f"a and b are of one kind, '{test.kind.a}', and so have one range"
            yield document.error(place, f"'{name}' and '{twin}': {text}; give two kinds")
