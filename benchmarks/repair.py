"""What repairs come to: faulty runs, each repaired in several ways, beside their healthy twins.

A run of a subject with a mistake, and its twin without, start from the same weights and see the
same batches. Arms that act do so when the rules first find something; what differs is what they do
then. Runs that nobody acts on are those of the fault benchmark (``results/bench/truth.parquet``):
the healthy twin, the faulty run, and for a restart the faulty run of another seed.
``python -m benchmarks.repair run`` makes what is missing of ``results/repair.jsonl`` (one to three
CPU-hours), ``show`` prints it; `repair_document` makes tables of it.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq
import torch
from torch.backends.cpu import get_cpu_capability

from benchmarks.forked import answers, rows_of
from diagnoser.benchmark.configuration import Configuration, catalogue, content_hash
from diagnoser.injection import Training, assemble, train
from diagnoser.repair import ACTIONS
from diagnoser.repair_loop import AUTOTRAINER, DIAGNOSER, Plan, Situation, Strategy
from diagnoser.session import Watch
from diagnoser.types import Repair
from diagnoser.vocabulary import MODEL

RESULTS: Final = Path(__file__).parent / "results" / "repair.jsonl"
SEEDS: Final = tuple(range(10))
HEALTHY_SEEDS: Final = tuple(range(5))
RESTART: Final = 1  # added to a seed: other weights, other batches
TRUTH: Final = RESULTS.parent / "bench" / "truth.parquet"
HARM: Final = RESULTS.parent / "bench" / "harm.parquet"


@dataclass(frozen=True, slots=True)
class Case:
    """A mistake on a subject; without an operator, none."""

    subject: str
    recipe: str
    operator: str
    severity: str
    place: str

    @property
    def name(self) -> str:
        """The mistake and the subject."""
        return (
            f"{self.operator} {self.subject}" if self.operator else f"{self.subject} {self.recipe}"
        )

    @property
    def healthy(self) -> Configuration:
        """The same without the mistake."""
        return Configuration(subject=self.subject, recipe=self.recipe)

    @property
    def faulty(self) -> Configuration:
        """Its configuration."""
        injections = ((self.operator, self.severity, self.place),) if self.operator else ()
        return Configuration(subject=self.subject, recipe=self.recipe, injections=injections)


# One subject and place for each mistake whose harm is proven there (docs/benchmark.md), and which
# an action can undo in a training that runs.
CASES: Final = (
    Case("vit", "b", "O1", "high", "model"),
    Case("gpt", "b", "O2", "high", "model"),
    Case("llama", "a", "O3", "high", "first"),
    Case("seq2seq", "a", "O5b", "high", "model"),
    Case("han", "b", "O6a", "high", "model"),
    Case("llama", "b", "O11b", "high", "first"),
    Case("llama", "b", "O12", "high", "last"),
    Case("gpt", "a", "O14", "high", "first"),
    Case("distilbert", "a", "S1", "high", "last"),
    Case("llama", "b", "S3", "high", "last"),
    Case("llama", "b", "S5", "high", "last"),
    Case("distilbert", "b", "Q1", "high", "all"),
    Case("llama", "b", "Q2", "high", "first"),
    Case("distilbert", "b", "Q3", "high", "first"),
    Case("distilbert", "b", "N2a", "extreme", "all"),
    Case("llama", "a", "F1a", "high", "all"),
    Case("llama", "a", "X2", "high", "all"),
    Case("han", "a", "O3", "high", "all"),
)
HEALTHY: Final = tuple(
    Case(subject, recipe, "", "", "")
    for subject in ("vit", "gpt", "llama", "distilbert", "han", "video", "seq2seq", "series")
    for recipe in ("a", "b", "c")
)


def _one_third(situation: Situation) -> Sequence[Plan]:
    return [_plan(situation, Repair("scale_learning_rate", MODEL, {"factor": 1 / 3}))]


def _paper(situation: Situation) -> Sequence[Plan]:
    """Its 3.3: a lower learning rate on the group that was found, and nothing else."""
    flagged = situation.findings[0].component
    return [_plan(situation, Repair("scale_learning_rate", flagged, {"factor": 0.1}))]


def _at_random(situation: Situation) -> Sequence[Plan]:
    """Any action, anywhere, with numbers as people would try them."""
    draw = random.Random(f"{situation.step} {situation.recording.losses.value[0]}")
    numbers: Mapping[str, Mapping[str, Sequence[float]]] = {
        "scale_learning_rate": {"factor": (0.1, 0.3, 3.0, 10.0)},
        "clip_gradient": {"norm": (0.1, 1.0)},
        "add_warmup": {"steps": (20, 100)},
        "change_betas": {"beta2": (0.9, 0.99, 0.9999)},
        "temper_attention": {"factor": (0.1, 0.3)},
    }
    names = [c.name for c in situation.recording.components]
    found = []
    for _ in range(50):  # the first of these that can be applied
        name = draw.choice(sorted(ACTIONS))
        parameters = {key: draw.choice(values) for key, values in numbers.get(name, {}).items()}
        place = MODEL if draw.random() < 0.5 else draw.choice(names)
        found.append(_plan(situation, Repair(name, place, parameters)))
    return found


def _plan(situation: Situation, repair: Repair) -> Plan:
    first = situation.findings[0]
    return Plan((repair,), "as this arm always does", first.source, first.component)


ARMS: Final[Mapping[str, Strategy]] = {
    "third": Strategy("third", _one_third, None),
    "random": Strategy("random", _at_random, None),
    "paper": Strategy("paper", _paper, None),
    "autotrainer": AUTOTRAINER,
    "diagnoser": DIAGNOSER,
}


@dataclass(frozen=True, slots=True)
class Truth:
    """Scores without anybody acting, by seed, and how much of a loss of score is harm."""

    healthy: Mapping[int, float]
    nothing: Mapping[int, float]
    margin: float


def truths(cases: Sequence[Case]) -> dict[Case, Truth]:
    """Reads what the fault benchmark knows of some cases."""
    known = catalogue()
    scores: dict[str, dict[int, float]] = {}
    for row in pq.read_table(TRUTH).to_pylist():
        value = math.nan if row["score"] is None else row["score"]
        scores.setdefault(row["hash"], {})[row["seed"]] = value
    margins = {row["hash"]: row["margin"] for row in pq.read_table(HARM).to_pylist()}
    found = {}
    for case in cases:
        digest = content_hash(case.faulty, known)
        clean = scores.get(content_hash(case.healthy, known), {})
        found[case] = Truth(clean, scores.get(digest, {}), margins.get(digest, math.nan))
    return found


# Also in the benchmark's truth; made anew for runs on another processor, which rounds otherwise.
UNWATCHED: Final = ("healthy", "nothing")


def assembled(case: Case, seed: int, *, healthy: bool) -> Training:
    """Returns a training, ready to run."""
    known = catalogue()
    subject = known.subject(case.subject)
    configuration = case.faulty
    injected = () if healthy else configuration.injected(known)
    return assemble(subject, configuration.settings(subject), seed, injected)[0]


def run(case: Case, arm: str, seed: int) -> dict[str, Any]:
    """Makes one run and returns what it came to."""
    training = assembled(case, seed, healthy=arm == "healthy")
    begun = time.process_time()
    row: dict[str, Any] = {}
    if arm in UNWATCHED:
        outcome = train(training)
    else:
        strategy = ARMS[arm]
        with tempfile.TemporaryDirectory(prefix="diagnoser-repair-") as folder:
            watch = Watch(
                Path(folder) / "run",
                models={MODEL: training.model},
                repair="apply",
                strategy=strategy,
                rules="autotrainer" if strategy is AUTOTRAINER else None,
            )
            with watch:
                outcome = train(training)
            diagnosis = watch.diagnose(write=False)
        row["attempts"] = [
            {
                "step": attempt.step,
                "source": attempt.source,
                "actions": [[a.name, a.component, dict(a.parameters)] for a in attempt.actions],
                "kept": attempt.kept,
                "reason": attempt.reason,
                "steps": attempt.after.steps if attempt.after else 0,
            }
            for attempt in diagnosis.repairs
        ]
        row["causes"] = [[c.cause, c.component] for c in diagnosis.causes[:3]]
        row["events"] = [e.message for e in watch.log.events if e.kind in ("repairs",)]
        row["failures"] = [e.message for e in watch.log.events if e.kind == "monitor_error"]
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    row |= {
        "score": outcome.score,
        "loss": outcome.loss,
        "cpu_s": time.process_time() - begun + children.ru_utime + children.ru_stime,
        "processor": processor(),
    }
    return row


@functools.cache
def processor() -> str:
    """Returns what decides how numbers are rounded here."""
    listed = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", listed.read_text("utf-8") if listed.exists() else "")
    return f"{names[0] if names else platform.machine()}, {get_cpu_capability()}"


def head(case: Case, arm: str, seed: int) -> dict[str, Any]:
    """What names a run."""
    return {
        "subject": case.subject, "recipe": case.recipe, "operator": case.operator,
        "severity": case.severity, "place": case.place, "arm": arm, "seed": seed,
    }  # fmt: skip


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two rows the same run."""
    names = ("subject", "recipe", "operator", "severity", "place", "arm", "seed")
    return tuple(row[name] for name in names)


def import_all() -> None:
    """Imports what is imported at first use, so that no run pays for it."""
    for subject in {case.subject: case for case in CASES}.values():
        training = assembled(subject, 0, healthy=True)
        torch.optim.SGD(training.model.parameters(), lr=0.1)


def wanted(
    cases: Sequence[Case], healthy: Sequence[Case], arms: Sequence[str], seeds: Sequence[int]
) -> Iterator[tuple[Case, str, int]]:
    """Yields all runs, whole seeds first: what is there after half of the time can be read."""
    for seed in seeds:
        for case in cases:
            for arm in arms:
                yield case, arm, seed
        if seed - seeds[0] < len(HEALTHY_SEEDS):
            for case in healthy:
                if "diagnoser" in arms:
                    yield case, "diagnoser", seed


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes runs, or prints what they come to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("run", "show"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--arm", action="append", default=[])
    parser.add_argument("--operator", action="append", default=[])
    parser.add_argument("--seed", type=int, action="append", default=[])
    parser.add_argument("--without-healthy", action="store_true")
    given = parser.parse_args(arguments)
    if given.action == "run":
        done = {key(row) for row in rows_of(given.out)}
        cases = [c for c in CASES if not given.operator or c.operator in given.operator]
        todo = [
            task
            for task in wanted(
                cases,
                () if given.without_healthy else HEALTHY,
                given.arm or tuple(ARMS),
                given.seed or SEEDS,
            )
            if key(head(*task)) not in done
        ]
        print(f"{len(todo)} runs", file=sys.stderr)
        import_all()
        with given.out.open("a", encoding="utf-8") as file:
            ends = time.monotonic() + 60 * given.minutes
            for task, row in answers(todo, lambda task: run(*task), given.jobs, ends):
                file.write(json.dumps({**head(*task), **row}) + "\n")
                file.flush()
    show(rows_of(given.out))
    return 0


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints scores by case and arm."""
    by: dict[tuple[Any, ...], dict[str, dict[int, Mapping[str, Any]]]] = {}
    for row in rows:
        by.setdefault(key(row)[:5], {}).setdefault(row["arm"], {})[row["seed"]] = row
    for case, arms in by.items():
        print(*case)
        for arm, runs in arms.items():
            scores = [run.get("score", math.nan) for run in runs.values()]
            cpu = sum(run.get("cpu_s", 0.0) for run in runs.values()) / len(runs)
            print(f"   {arm:12s} {cpu:6.1f} s", *(f"{score:8.3f}" for score in scores[:10]))
            for seed, run in runs.items():
                for attempt in run.get("attempts", ()):
                    if attempt["kept"]:
                        what = ", ".join(f"{a[0]} {a[1]} {a[2]}" for a in attempt["actions"][:3])
                        print(
                            f"        {seed}: {attempt['step']}: {what}: {attempt['reason'][:90]}"
                        )
                if "problem" in run or run.get("failures"):
                    print(f"        {seed}: {run.get('problem')} {run.get('failures')}")


if __name__ == "__main__":
    sys.exit(main())
