"""From the logs of watched runs to examples: what each judge sees of a run, and what is true of it.

Everything is computed at a tenth, a quarter, half and all of a run. ``DIR/features/<mode>/`` holds
``<hash>.parquet`` with a row a run and prefix, the classifier's numbers and what the rules say, and
``<hash>.components.parquet`` with a row for each of its components. They are made again when the
code that computes them, or a log, changed.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import diagnoser
from diagnoser.benchmark.baselines import (
    Opinion,
    autotrainer,
    deepfd_features,
    entropy_argmax,
    gradient_norm_argmax,
    loss_only,
    update_ratio_argmax,
)
from diagnoser.benchmark.configuration import Catalogue, code_digest
from diagnoser.benchmark.harm import OK, Harm
from diagnoser.benchmark.jobs import Mode
from diagnoser.benchmark.plan import Item
from diagnoser.benchmark.published import JUDGES, by_family
from diagnoser.benchmark.results import Store, write_whole
from diagnoser.classifier import EARLIER, Vectors, vectors
from diagnoser.diagnosis import FAMILIES, Claim, claims, default_rules
from diagnoser.features import feature_tables
from diagnoser.injection import places
from diagnoser.rules.ranges import FILE as RANGES_FILE
from diagnoser.runlog import LOG_FILE, Recording, read_run
from diagnoser.table import Scope, Table

PREFIXES: Final = (0.10, 0.25, 0.50, 1.00)
HARMLESS: Final = ("equivalent", "not worse")
HEALTHY: Final = ("HC1", "HC2", "HC3", "HC4", "HC5a")  # sets of controls that count as healthy
UNPROVEN: Final = {"proven": "", "ambiguous": "HCx", "incomplete": ""}
# Before these shares of a run there is nothing to be seen of a mistake.
NOT_YET: Final = {"X2": 0.50, "E1": 0.99}
CODE: Final = (
    *("features", "classifier/vectors.py", "table.py", "rules", "diagnosis", "runlog"),
    *("benchmark/baselines.py", "benchmark/published.py", "benchmark/harm.py"),
)
SAID: Final = ("claims", "opinions", "deepfd")
IDENTITY: Final = ("seed", "prefix", "part", *SAID)  # columns of no feature
WHOLE: Final = 1.0  # of a look; parts of it are those of `EARLIER`


@dataclass(frozen=True, slots=True)
class Truth:
    """What is true of a run: what was injected where, and whether that does harm.

    ``components`` are right to blame; empty where the whole model is. ``harm`` is the verdict of
    `harm.judge`; ``defect``: no author would want it, whether or not it does harm.
    """

    hash: str
    subject: str
    track: str
    recipe: str
    role: str
    operators: tuple[str, ...]
    severity: str
    harm: str
    trivial: bool
    defect: bool
    faults: tuple[str, ...]
    causes: tuple[str, ...]
    components: tuple[str, ...]
    curvature: str  # prediction that curvature helps: +, P or 0

    def shows(self, prefix: float) -> bool:
        """Whether there can be anything of the mistake in the first part of a run."""
        return all(prefix > NOT_YET.get(name, 0.0) for name in self.operators)

    @property
    def is_faulty(self) -> bool:
        """Whether it is scored as faulty: harm was proven."""
        return self.role in {"fault", "compound"} and self.harm == "proven"

    @property
    def is_scored(self) -> bool:
        """Whether it is known to be faulty, or known to be healthy."""
        return self.is_faulty or self.control in HEALTHY

    @property
    def control(self) -> str:
        """The set of healthy controls that it belongs to; empty: it is none.

        HC1 clean, HC2 to HC4 as planned where they are as good as clean, HC5a a harmless number,
        HC5b a harmless defect; HCx a planned control of which that is not proven.
        """
        if self.role == "clean":
            return "HC1"
        harmless = self.harm in HARMLESS
        if self.role.startswith("HC"):
            return self.role if harmless or self.harm == "no effect" else UNPROVEN[self.harm]
        if self.role == "fault" and harmless:
            return "HC5b" if self.defect else "HC5a"
        return ""


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """What all judges see of a run, and what those say that need not learn.

    ``claims`` are of the rules, ``opinions`` of the baselines by name, ``deepfd`` the features that
    DeepFD learns from.
    """

    mode: str  # watched or budget
    seed: int
    prefix: float
    vectors: Vectors
    claims: tuple[Claim, ...]
    opinions: Mapping[str, Opinion]
    deepfd: Mapping[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A look at a run, and its truth."""

    truth: Truth
    look: Look


def truths(items: Iterable[Item], harms: Iterable[Harm], known: Catalogue) -> dict[str, Truth]:
    """Returns what is true of each configuration by its hash."""
    judged = {harm.hash: harm for harm in harms if harm.role != "remedy"}
    found = {}
    for item in items:
        if item.role in {"remedy", "twin"} or item.hash not in judged:
            continue
        made, harm = item.configuration, judged[item.hash]
        subject = known.subject(made.subject)
        settings = made.settings(subject)
        operators = [known.operator(name) for name, _, _ in made.injections]
        components: list[str] = []
        for operator, (_, _, at) in zip(operators, made.injections, strict=True):
            here = {place.name: place for place in places(operator, subject, settings)}
            components += [name for name in here[at].components if name != "model"]
            if "model" in here[at].components:
                components = []
                break
        found[item.hash] = Truth(
            item.hash,
            made.subject,
            item.track,
            made.recipe,
            item.role,
            tuple(operator.id for operator in operators),
            made.severity,
            harm.harm,
            harm.trivial,
            any(operator.defect for operator in operators),
            tuple(dict.fromkeys(fault for o in operators for fault in o.faults)),
            tuple(dict.fromkeys(o.causes[0] for o in operators if o.causes)),
            tuple(dict.fromkeys(components)),
            max((o.curvature for o in operators), key="0P+".index, default="0"),
        )
    return found


def recording_of(packed: bytes, folder: Path) -> Recording:
    """Reads a packed log; ``folder`` is an empty directory that it is unpacked into."""
    (folder / LOG_FILE).write_bytes(gzip.decompress(packed))
    return read_run(folder)


def compute(log: Path, mode: Mode, seed: int, folder: Path) -> list[Look]:
    """Looks at a run at each prefix."""
    whole, rules = recording_of(log.read_bytes(), folder), default_rules()
    found, earlier = [], {}
    for prefix in PREFIXES:
        recording = whole.part(prefix)
        tables = feature_tables(recording)
        for share in (prefix * part for part in EARLIER):
            if share not in earlier:
                earlier[share] = vectors(feature_tables(whole.part(share)))
        found.append(
            Look(
                mode,
                seed,
                prefix,
                replace(vectors(tables), earlier=tuple(earlier[prefix * part] for part in EARLIER)),
                claims(tables, recording, rules),
                opinions(recording, tables),
                deepfd_features(recording),
            )
        )
    return found


def opinions(recording: Recording, tables: Mapping[Scope, Table]) -> dict[str, Opinion]:
    """Returns what the baselines that need not learn say of a run, by name.

    Args:
        recording: The run.
        tables: Its feature tables.
    """
    alarm = loss_only(recording)
    ranked = {
        "gradient norm": gradient_norm_argmax(recording),
        "update ratio": update_ratio_argmax(recording),
        "entropy": entropy_argmax(recording),
    }
    return {
        "loss": Opinion(alarm >= 0, alarm),
        "autotrainer": autotrainer(recording),
        **{name: by_family(name, tables, recording) for name in JUDGES},
        **{name: Opinion(True, math.nan, (), order) for name, order in ranked.items()},
    }


def digest_of_code() -> str:
    """Returns a digest of what looks rest on: code without docstrings, rules, healthy ranges."""
    root = Path(diagnoser.__file__).parent
    paths = [p for name in CODE for p in sorted((root / name).rglob("*.py")) or [root / name]]
    parts = [code_digest(path.read_text("utf-8")) for path in paths]
    rules = [rule for family in FAMILIES for rule in default_rules(family)]
    parts += [rule.path.read_text("utf-8") for rule in rules]
    parts += [(rules[0].path.parents[1] / RANGES_FILE).read_text("utf-8")]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def features(store: Store, mode: Mode, digest: str, code: str, folder: Path) -> list[Look]:
    """Looks at the watched runs of a configuration.

    What was computed by this code from these logs is read, the rest computed.
    """
    rows = [row for row in store.rows(mode, digest) if row["status"] == OK]
    if not rows:
        return []
    logs = hashlib.sha256("".join(str(row["log_sha256"]) for row in rows).encode()).hexdigest()
    note = {"diagnoser.code": code, "diagnoser.logs": logs[:16]}
    known = _read(_paths(store, mode, digest), mode, note)
    if known is not None:
        return known
    found = []
    for row in rows:
        own = folder / f"{mode}-{digest}-{row['seed']}"
        own.mkdir()
        found += compute(store.log_path(mode, digest, row["seed"]), mode, int(row["seed"]), own)
    _write(_paths(store, mode, digest), note, found)
    return found


def _paths(store: Store, mode: Mode, digest: str) -> tuple[Path, Path]:
    base = store.directory / "features" / mode
    return base / f"{digest}.parquet", base / f"{digest}.components.parquet"


def _write(
    paths: tuple[Path, Path],
    note: Mapping[str, str],
    found: Sequence[Look],
) -> None:
    runs, components = [], []
    for look in found:
        said = {
            "claims": json.dumps([dataclasses.astuple(claim) for claim in look.claims]),
            "opinions": json.dumps({k: dataclasses.astuple(v) for k, v in look.opinions.items()}),
            "deepfd": json.dumps(dict(look.deepfd)),
        }
        parts = (*look.vectors.earlier, look.vectors)
        for part, of in zip((*EARLIER, WHOLE), parts, strict=True):
            key = {"seed": look.seed, "prefix": look.prefix, "part": part}
            of_part = said if part == WHOLE else dict.fromkeys(SAID)
            runs.append({**key, **of_part, **of.run})
            for i, (name, kind) in enumerate(zip(of.names, of.kinds, strict=True)):
                numbers = {column: float(values[i]) for column, values in of.components.items()}
                components.append({**key, "name": name, "kind": kind, **numbers})
    for path, rows in zip(paths, (runs, components), strict=True):
        content = io.BytesIO()
        table = pa.Table.from_pylist(rows).replace_schema_metadata(dict(note))
        pq.write_table(table, content, compression="zstd")
        write_whole(path, content.getvalue())


def _read(paths: tuple[Path, Path], mode: Mode, note: Mapping[str, str]) -> list[Look] | None:
    tables = []
    for path in paths:
        try:
            table = pq.read_table(io.BytesIO(path.read_bytes()))
        except (OSError, pa.ArrowException):
            return None  # not there, or cut: it is computed again
        stored = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        if any(stored.get(name) != value for name, value in note.items()):
            return None
        tables.append(table)
    return list(_looks(mode, *tables))


def _looks(mode: Mode, runs: pa.Table, components: pa.Table) -> Iterator[Look]:
    of_row = ("seed", "prefix", "part")
    columns = [c for c in components.column_names if c not in {*of_row, "name", "kind"}]
    numbers = {c: components[c].to_numpy(zero_copy_only=False).astype(float) for c in columns}
    names, kinds = components["name"].to_pylist(), components["kind"].to_pylist()
    at: dict[tuple[float, ...], list[int]] = {}
    keys = zip(*(components[name].to_pylist() for name in of_row), strict=True)
    for i, key in enumerate(keys):
        at.setdefault(key, []).append(i)
    earlier: list[Vectors] = []
    for row in runs.to_pylist():
        own = np.array(at.get(tuple(row[name] for name in of_row), []), dtype=int)
        of = Vectors(
            {name: _number(value) for name, value in row.items() if name not in IDENTITY},
            {c: values[own] for c, values in numbers.items()},
            tuple(names[i] for i in own),
            tuple(kinds[i] for i in own),
        )
        if row["part"] != WHOLE:
            earlier.append(of)
            continue
        claimed = [
            Claim(rule, severity, at, since, tuple(causes), tuple(under) if under else None, *rest)
            for rule, severity, at, since, causes, under, *rest in json.loads(row["claims"])
        ]
        said = json.loads(row["opinions"])
        others = {
            name: Opinion(faulty, score, tuple(causes), tuple(components))
            for name, (faulty, score, causes, components) in said.items()
        }
        yield Look(
            mode,
            int(row["seed"]),
            float(row["prefix"]),
            replace(of, earlier=tuple(earlier)),
            tuple(claimed),
            others,
            json.loads(row["deepfd"]),
        )
        earlier = []


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
