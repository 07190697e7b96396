"""What is trained, by its content: a run is a pure function of a configuration and a seed.

A configuration's hash covers the values that it stands for and the code that carries it out, so a
result is found again exactly as long as it would come out the same. Code counts without docstrings,
comments and layout.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any, Self

import diagnoser.injection as injection_room
from diagnoser.errors import BenchmarkError
from diagnoser.injection import Injection, Operator, Settings, Subject
from diagnoser.injection import training as training_module
from diagnoser.injection import weighing as weighing_module

# Files that only carry out, check or list what others say: no result depends on them.
MACHINERY = frozenset({"__init__.py", "operator.py", "checking.py", "assembly.py", "catalogue.py"})


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What there is to train and to get wrong; ``name`` is where `catalogue` finds it."""

    name: str
    subjects: Mapping[str, Subject]
    operators: Mapping[str, Operator]
    controls: Mapping[str, Operator] = field(default_factory=dict)
    compounds: Mapping[str, tuple[tuple[str, str, str], ...]] = field(default_factory=dict)

    def subject(self, name: str) -> Subject:
        """Returns a subject by name.

        Raises:
            BenchmarkError: There is none; the text lists those there are.
        """
        if name not in self.subjects:
            raise BenchmarkError(f"no subject {name}; there are {', '.join(self.subjects)}")
        return self.subjects[name]

    def operator(self, name: str) -> Operator:
        """Returns a mistake or a control by its id.

        Raises:
            BenchmarkError: There is none.
        """
        found = self.operators.get(name) or self.controls.get(name)
        if found is None:
            known = ", ".join([*self.operators, *self.controls])
            raise BenchmarkError(f"no operator {name}; there are {known}")
        return found


@functools.cache
def catalogue(name: str = "") -> Catalogue:
    """Returns the shipped catalogue, or another one as ``module:attribute``.

    Raises:
        BenchmarkError: There is no such catalogue.
    """
    if not name:
        from diagnoser.benchmark.subjects import SUBJECTS
        from diagnoser.injection import COMPOUNDS, CONTROLS, INJECTIONS

        return Catalogue("", SUBJECTS, INJECTIONS, CONTROLS, COMPOUNDS)
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BenchmarkError(f"no catalogue {name}: {error}") from error
    if not isinstance(found, Catalogue):
        raise BenchmarkError(f"{name} is no Catalogue of subjects and operators")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """A recipe of a subject with mistakes in it.

    ``injections`` are operator, severity and place; ``remedy`` names what is done about the only
    one of them; ``overrides`` are fields of the recipe's settings that are set otherwise.
    """

    subject: str
    recipe: str
    injections: tuple[tuple[str, str, str], ...] = ()
    remedy: str = ""
    overrides: tuple[tuple[str, Any], ...] = ()

    def to_json(self) -> str:
        """Returns the configuration as canonical JSON: equal ones give equal text."""
        return canonical({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote.

        Raises:
            BenchmarkError: The text is no configuration.
        """
        try:
            found = json.loads(text)
            return cls(
                subject=found["subject"],
                recipe=found["recipe"],
                injections=tuple((o, s, p) for o, s, p in found["injections"]),
                remedy=found["remedy"],
                overrides=tuple((name, _frozen(value)) for name, value in found["overrides"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(f"no configuration: {text[:80]} ({error})") from error

    @property
    def operator(self) -> str:
        """The operators in one word, such as ``O3+N2``; empty without any."""
        return "+".join(operator for operator, _, _ in self.injections)

    @property
    def severity(self) -> str:
        """Their severities in one word."""
        return "+".join(severity for _, severity, _ in self.injections)

    @property
    def place(self) -> str:
        """Their places in one word."""
        return "+".join(place for _, _, place in self.injections)

    def settings(self, subject: Subject) -> Settings:
        """Returns the recipe's settings with the overrides.

        Raises:
            BenchmarkError: No such recipe or setting.
        """
        if self.recipe not in subject.recipes:
            known = ", ".join(subject.recipes)
            raise BenchmarkError(f"{subject.name} has no recipe {self.recipe}; it has {known}")
        try:
            return dataclasses.replace(subject.recipes[self.recipe], **dict(self.overrides))
        except TypeError as error:
            raise BenchmarkError(f"{subject.name}, recipe {self.recipe}: {error}") from error

    def injected(self, known: Catalogue) -> tuple[Injection, ...]:
        """Returns the mistakes, ready for `assemble`.

        Raises:
            BenchmarkError: No such operator or remedy, or a remedy of several mistakes at once.
        """
        if not self.remedy:
            return tuple(Injection(known.operator(o), s, p) for o, s, p in self.injections)
        if len(self.injections) != 1:
            raise BenchmarkError(f"remedy {self.remedy} needs one mistake, not {self.operator}")
        ((name, severity, place),) = self.injections
        operator = known.operator(name)
        for remedy in operator.remedies:
            if remedy.name == self.remedy:
                return (Injection(operator, severity, place, remedy),)
        raise BenchmarkError(f"{name} has no remedy {self.remedy}")


def content_hash(configuration: Configuration, known: Catalogue) -> str:
    """Returns 16 hexadecimal digits that change with anything a run's numbers depend on.

    Those are the settings, the values of each severity, its place, the remedy, and the code of the
    training loop, the subject and the operators, with what they import from beside them.

    Raises:
        BenchmarkError: Something named in the configuration does not exist.
    """
    subject = known.subject(configuration.subject)
    operators = [known.operator(name) for name, _, _ in configuration.injections]
    values = []
    for operator, (_, severity, place) in zip(operators, configuration.injections, strict=True):
        if severity not in operator.severities:
            raise BenchmarkError(f"{operator.id} has no severity {severity}")
        values.append((operator.id, dict(operator.severities[severity]), place))
    files = {Path(training_module.__file__), Path(weighing_module.__file__)}
    files |= _files_of(subject.build, subject.predict, subject.data, subject.criterion)
    for operator in operators:
        files |= _listed_in(operator, known.name.partition(":")[0])
        changes = [operator.change, *(remedy.change for remedy in operator.remedies)]
        files |= _files_of(operator.places, *(change.apply for change in changes))
    content = {
        "subject": subject.name,
        "settings": dataclasses.asdict(configuration.settings(subject)),
        "injections": values,
        "remedy": configuration.remedy,
        "code": [code_digest(path.read_text("utf-8")) for path in sorted(_with_imports(files))],
    }
    return hashlib.sha256(canonical(content).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=256)
def code_digest(source: str) -> str:
    """Returns a digest of what a source file does, without its docstrings, comments and layout."""
    text = "".join(_written(_without_docstrings(ast.parse(source))))
    return hashlib.sha256(text.encode()).hexdigest()


def missing_packages(subject: Subject) -> tuple[str, ...]:
    """Returns the packages that a subject needs and that are not installed."""
    absent = []
    for package in subject.packages:
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            absent.append(package)
    return tuple(absent)


def canonical(value: Any) -> str:
    """Returns JSON in which order and spaces say nothing; functions go by their name."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_named)


def _named(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    if name is None:
        raise BenchmarkError(f"a configuration cannot hold a {type(value).__name__}")
    return f"{value.__module__}.{name}"


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _files_of(*functions: Callable[..., Any]) -> set[Path]:
    """The source files of functions and of the functions they close over."""
    found: set[Path] = set()
    seen: set[int] = set()
    waiting: list[Any] = list(functions)
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, functools.partial):
            waiting += [item.func, *item.args, *item.keywords.values()]
        elif isinstance(item, type):
            waiting += [v for v in vars(item).values() if callable(v)]
        elif isinstance(item, (tuple, list)):
            waiting += item
        elif dataclasses.is_dataclass(item):
            waiting += [getattr(item, f.name) for f in dataclasses.fields(item)]
        item = getattr(item, "__wrapped__", item)  # such as what functools.cache wraps
        code = getattr(item, "__code__", None)
        if isinstance(code, CodeType):
            path = Path(code.co_filename)
            if path.exists() and path.name not in MACHINERY:
                found.add(path)
            waiting += [cell.cell_contents for cell in item.__closure__ or ()]
            waiting += list(item.__defaults__ or ())
    return {path for path in found if "site-packages" not in path.parts}


def _listed_in(operator: Operator, module: str) -> set[Path]:
    """The file whose table an operator stands in: what is passed to its functions stands there."""
    found = set()
    for name, loaded in list(sys.modules.items()):
        if name.startswith(f"{injection_room.__name__}.") or name == module:
            path = Path(str(loaded.__file__))
            tables = [v for v in vars(loaded).values() if isinstance(v, (tuple, Operator))]
            listed = any(
                t is operator or (isinstance(t, tuple) and any(o is operator for o in t))
                for t in tables
            )
            if listed and path.name not in MACHINERY:
                found.add(path)
    return found


def _with_imports(files: Iterable[Path]) -> set[Path]:
    """Adds the files that these import from the folder they are in, and so on."""
    found: set[Path] = set()
    waiting = list(files)
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        names = set(_imported(path.read_text("utf-8")))
        beside = [path.parent / f"{name.rpartition('.')[2]}.py" for name in names]
        waiting += [p for p in beside if p.exists() and p.name not in MACHINERY]
    return found


@functools.lru_cache(maxsize=256)
def _imported(source: str) -> tuple[str, ...]:
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return tuple(found)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, holders) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return tree


def _written(node: Any) -> Iterator[str]:
    """A tree as text; empty fields are left out, since versions of Python differ in them."""
    if isinstance(node, ast.AST):
        yield f"{type(node).__name__}("
        for name, value in ast.iter_fields(node):
            if value is not None and value != []:
                yield f"{name}="
                yield from _written(value)
        yield ")"
    elif isinstance(node, Sequence) and not isinstance(node, (str, bytes)):
        yield "["
        for item in node:
            yield from _written(item)
        yield "]"
    else:
        yield f"{node!r},"
