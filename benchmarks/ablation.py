"""What curvature adds: ``python -m benchmarks.ablation [--bench DIR] [--open-test REASON]``.

Carries out the plan of ``docs/ablation.md`` on the benchmark's watched runs. Without
``--open-test`` it is rehearsed on the dev subject, to ``DIR/ablation-dev.json``; with it, it is
carried out on the test subjects, which is logged, to ``benchmarks/results/ablation.json``. What is
finished is kept: given again, the command goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import joblib
import numpy as np
from joblib import Parallel, delayed

import diagnoser
from benchmarks.outcomes import SIZE
from diagnoser.benchmark.configuration import catalogue, code_digest
from diagnoser.benchmark.contrasts import ByPrefix, contrasts, interaction
from diagnoser.benchmark.dataset import Seen, digest_of_code, recording_of
from diagnoser.benchmark.evaluate import learn_classifier, read
from diagnoser.benchmark.families import (
    columns_of_components,
    columns_of_runs,
    permuted,
    with_noise,
)
from diagnoser.benchmark.intervals import wilson
from diagnoser.benchmark.jobs import Mode
from diagnoser.benchmark.judges import by_classifier
from diagnoser.benchmark.leaks import of_labels_at_random, of_metadata
from diagnoser.benchmark.partners import Followed, follow
from diagnoser.benchmark.plan import make_plan
from diagnoser.benchmark.results import Store, write_whole
from diagnoser.benchmark.scores import open_test
from diagnoser.benchmark.scoring import Figure, Verdict, auroc, figures
from diagnoser.benchmark.splits import (
    Split,
    operators_left_out,
    severities_left_out,
    subjects_left_out,
)
from diagnoser.benchmark.teaching import Extreme, extremes, learn_ranges
from diagnoser.benchmark.worker import measuring
from diagnoser.features import feature_tables
from diagnoser.rules.ranges import Ranges
from diagnoser.runlog import Recording

RESULT: Final = Path(__file__).parent / "results" / "ablation.json"
CONFIGURATIONS: Final = ("L", "LG", "LGA", "LGH", "LGAH", "H")
IN_TURN: Final = "training subjects in turn"
PRIMARY, SECONDARY = ("LGAH", "LGA"), ("LGH", "LG")
# The claim's own rules: columns of components, of which each has to be known of some, and what the
# lowest or highest of them come to.
CLAIMS: Final[Mapping[str, tuple[tuple[str, ...], Callable[..., float]]]] = {
    "a trace estimate is negative": (("trace_z.lowest",), lambda z: float(z < 0.0)),
    "a trace is negative by two errors": (("trace_z.lowest",), lambda z: float(z < -2.0)),
    "coupling over curvature": (("pair.coupling_to_curvature.highest",), float),
    "coupling along the step": (
        ("pair.coupling_share.lowest", "pair.coupling_share.highest"),
        lambda low, high: max(-low, high),
    ),
}
# Of the operators for which a benefit was predicted as possible, neither side is asked.
PREDICTED: Final = {"+": True, "0": False}
RAW: Final = "largest coupling norm"
TOP: Final = 3  # causes and components that are kept of a verdict

Columns = tuple[Sequence[str], Sequence[str]]  # of runs, of components


class Kept:
    """Verdicts that take long to make, in files of a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def get(self, name: str, compute: Callable[[], ByPrefix]) -> ByPrefix:
        """Returns verdicts by name, computed if they are not there."""
        path = self.directory / f"{name.replace(' ', '-')}.joblib"
        if path.exists():
            kept: ByPrefix = joblib.load(path)
            return kept
        begin = time.monotonic()
        made = compute()
        content = io.BytesIO()
        joblib.dump(made, content, compress=3)
        write_whole(path, content.getvalue())
        print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        return made


def main() -> None:
    """Rehearses, or opens the test subjects."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bench", type=Path, default=Path("diagnoser-bench"), metavar="DIR")
    parser.add_argument("--open-test", default="", metavar="REASON")
    arguments = parser.parse_args()
    directory: Path = arguments.bench
    track = "test" if arguments.open_test else "dev"
    store = Store(directory, lambda text: print(text, file=sys.stderr))
    code = digest_of_learning()
    if arguments.open_test and not list(directory.glob(f"ablation-test-{code}-*")):
        open_test(directory, code, arguments.open_test)
    found = {"track": track, "code": code, **carry_out(store, track, code)}
    path = RESULT if arguments.open_test else directory / "ablation-dev.json"
    write_whole(path, (json.dumps(plain(found), indent=1) + "\n").encode())
    print(path)


def digest_of_learning() -> str:
    """Returns a digest of what the verdicts rest on."""
    root = Path(diagnoser.__file__).parent
    names = ("classifier", "benchmark/families.py", "benchmark/splits.py", "benchmark/judges.py")
    paths = [p for name in names for p in sorted((root / name).rglob("*.py")) or [root / name]]
    text = "".join([digest_of_code(), *(code_digest(p.read_text("utf-8")) for p in paths)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of(seen: Iterable[Seen]) -> str:
    """Returns a digest of which runs there are, and of what is true of them."""
    names = [repr((r.truth, r.look.mode, r.look.seed, r.look.prefix)) for r in seen]
    return hashlib.sha256("".join(sorted(names)).encode()).hexdigest()[:8]


def carry_out(store: Store, track: str, code: str) -> dict[str, Any]:
    """Carries out the plan: learned from the training subjects, scored on those of a track."""
    known, harms = catalogue(), store.read_harm()
    plan = make_plan(known, SIZE)
    wanted = replace(plan, items=tuple(i for i in plan.items if i.track in {"train", track}))
    jobs = os.cpu_count() or 1
    modes: tuple[Mode, ...] = ("watched", "budget")
    seen = [run for mode in modes for run in read(store, wanted, harms, known, mode, jobs)]
    seen = [run for run in seen if run.truth.is_scored]
    train = [run for run in seen if run.truth.track == "train"]
    scored = [r for r in seen if r.truth.track == track and r.look.mode == "watched"]
    columns = columns_of_runs(train), columns_of_components(train)
    kept = Kept(store.directory / f"ablation-{track}-{code}-{digest_of(seen)}")

    said = {
        families: kept.get(
            f"families {families}", lambda f=families: judged(train, scored, f, columns)
        )
        for families in CONFIGURATIONS
    }
    mixed = kept.get(
        "permuted", lambda: judged(permuted(train, "H"), permuted(scored, "H"), "LGAH", columns)
    )
    splits = {
        "operators never learned from": list(operators_left_out(seen, track)),
        "severities never learned from": list(severities_left_out(seen, track)),
        IN_TURN: list(subjects_left_out(seen)),
    }
    return {
        "runs": counted(scored),
        "families": {families: by_prefix(verdicts) for families, verdicts in said.items()},
        "primary": contrasts(said["LGAH"], said["LGA"]),
        "secondary": contrasts(said["LGH"], said["LG"]),
        "prediction": interaction(
            said["LGAH"][1.0], said["LGA"][1.0], lambda v: PREDICTED.get(v.truth.curvature)
        ),
        "permuted": contrasts(mixed, said["LGA"]),
        "splits": {
            name: {
                f"{more} - {fewer}": contrasts(
                    pooled(kept, parts, more, columns),
                    pooled(kept, parts, fewer, columns),
                )
                for more, fewer in ((PRIMARY,) if name == IN_TURN else (PRIMARY, SECONDARY))
            }
            | {"figures": by_prefix(pooled(kept, parts, "LGAH", columns))}
            for name, parts in splits.items()
        },
        "claims": claims(store, [run for run in scored if run.look.prefix == 1.0]),
        "partners": partners(store, train, scored),
        "leaks": {
            "set-up": of_metadata(train, scored),
            "labels at random": of_labels_at_random(
                [run for run in train if run.look.mode == "watched"], scored
            ),
        },
        "cost": cost(store, scored),
    }


def judged(
    learned: Sequence[Seen], scored: Sequence[Seen], families: str, columns: Columns
) -> dict[float, list[Verdict]]:
    """Learns from some families, the others being noise, and judges.

    What rules say has no part in it: they rest on all families.
    """
    unruled = [replace(run, look=replace(run.look, claims=())) for run in learned]
    classifier = learn_classifier(with_noise(unruled, families, *columns))
    verdicts: dict[float, list[Verdict]] = {}
    for run in with_noise(scored, families, *columns):
        said = by_classifier(run, classifier)
        verdicts.setdefault(run.look.prefix, []).append(
            replace(said, causes=said.causes[:TOP], components=said.components[:TOP])
        )
    return verdicts


def pooled(
    kept: Kept, parts: Iterable[Split], families: str, columns: Columns
) -> dict[float, list[Verdict]]:
    """Returns the verdicts of all parts of a split together; a run is scored in one of them."""
    verdicts: dict[float, list[Verdict]] = {}
    for part in parts:
        watched = [run for run in part.scored if run.look.mode == "watched"]
        said = kept.get(
            f"{part.name} {families}",
            lambda p=part, w=watched: judged(p.learned, w, families, columns),
        )
        for prefix, own in said.items():
            verdicts.setdefault(prefix, []).extend(own)
    return verdicts


def by_prefix(verdicts: ByPrefix) -> dict[str, list[Figure]]:
    """Returns all figures at each prefix."""
    return {str(prefix): figures(verdicts[prefix]) for prefix in sorted(verdicts)}


def counted(scored: Sequence[Seen]) -> dict[str, int]:
    """Returns how many whole runs there are, faulty and of each set of controls."""
    whole = [run for run in scored if run.look.prefix == 1.0]
    names = ["faulty" if run.truth.is_faulty else run.truth.control for run in whole]
    return {name: names.count(name) for name in sorted(set(names))}


def claims(store: Store, whole: Sequence[Seen]) -> dict[str, Figure | None]:
    """Returns the AUROC of the claim's own rules, of runs of which the number is known."""
    values = {
        name: [claimed(run, columns, rule) for run in whole]
        for name, (columns, rule) in CLAIMS.items()
    }
    values[RAW] = Parallel(n_jobs=os.cpu_count())(
        delayed(_largest_coupling)(_log(store, run)) for run in whole
    )
    found: dict[str, Figure | None] = {}
    for name, numbers in values.items():
        known = [(run.truth, x) for run, x in zip(whole, numbers, strict=True) if not math.isnan(x)]
        found[name] = auroc([t for t, _ in known], [x for _, x in known], level=0.95)
    return found


def claimed(run: Seen, columns: Sequence[str], rule: Callable[..., float]) -> float:
    """Returns what a rule comes to on a run; NaN where one of its columns is not known."""
    of = run.look.vectors.components
    values = []
    for column in columns:
        numbers = of.get(column, np.empty(0))
        known = numbers[~np.isnan(numbers)]
        furthest = np.min if column.endswith(".lowest") else np.max
        values.append(float(furthest(known)) if len(known) else math.nan)
    return math.nan if any(math.isnan(value) for value in values) else rule(*values)


def partners(store: Store, train: Sequence[Seen], scored: Sequence[Seen]) -> dict[str, Any]:
    """Returns how often the partner that is coupled most is the next to leave its range."""
    whole = [run for run in (*train, *scored) if run.look.prefix == 1.0]
    whole = [run for run in whole if run.look.mode == "watched"]
    healthy = [r for r in whole if r.truth.track == "train" and not r.truth.is_faulty]
    reached = Parallel(n_jobs=os.cpu_count())(delayed(_extremes)(_log(store, r)) for r in healthy)
    clusters = [(r.truth.subject, r.truth.recipe, *r.truth.operators) for r in healthy]
    ranges = learn_ranges(list(zip(clusters, reached, strict=True)))
    asked = [r for r in whole if r.truth.is_faulty and r.truth.components]
    answers = Parallel(n_jobs=os.cpu_count())(
        delayed(_follow)(_log(store, run), run.truth.components, ranges) for run in asked
    )
    followed: list[Followed] = [answer for answer in answers if answer is not None]
    n = len(followed)
    if not n:
        return {"asked": len(asked), "n": 0}
    hits, near = sum(f.by_coupling for f in followed), sum(f.by_order for f in followed)
    return {
        "asked": len(asked),
        "n": n,
        "coupling": [hits / n, *wilson(hits, n)],
        "order": [near / n, *wilson(near, n)],
        "chance": float(np.mean([f.by_chance for f in followed])),
    }


def cost(store: Store, scored: Sequence[Seen]) -> dict[str, float]:
    """Returns medians over runs, in seconds: training, measuring, and one measurement."""
    whole = [run for run in scored if run.look.prefix == 1.0]
    rows = Parallel(n_jobs=os.cpu_count())(delayed(_seconds)(_log(store, run)) for run in whole)
    names = ("training", "measuring", "a measurement", "a measurement with spectra")
    medians = np.nanmedian(np.array(rows), axis=0).tolist()
    return dict(zip(names, medians, strict=True))


def _log(store: Store, run: Seen) -> Path:
    return store.log_path("watched", run.truth.hash, run.look.seed)


def _recorded(path: Path) -> Recording:
    with tempfile.TemporaryDirectory() as folder:
        return recording_of(path.read_bytes(), Path(folder))


def _largest_coupling(path: Path) -> float:
    rows = _recorded(path).measurements
    if "coupling_norm" not in rows.quantities:
        return math.nan
    own = rows.value[rows.quantity == rows.quantities.index("coupling_norm")]
    return float(np.nanmax(own)) if len(own) and not np.isnan(own).all() else math.nan


def _extremes(path: Path) -> Sequence[Extreme]:
    return extremes(feature_tables(_recorded(path)))


def _follow(path: Path, blamed: Sequence[str], ranges: Ranges) -> Followed | None:
    return follow(feature_tables(_recorded(path)), blamed, ranges)


def _seconds(path: Path) -> list[float]:
    recording = _recorded(path)
    steps = len(recording.losses.step)
    with_spectra = {step for step, turns in measuring(steps).items() if "spectrum" in turns}
    values = recording.measured.value
    spectra = np.array([step in with_spectra for step in recording.measured.step.tolist()])
    ending = recording.ending
    training = (
        ending.cost.training_s if ending is not None and ending.cost is not None else math.nan
    )
    kinds = [values[kind] for kind in (~spectra, spectra)]
    usual = [float(np.median(kind)) if len(kind) else math.nan for kind in kinds]
    return [training, float(values.sum()), *usual]


def plain(value: Any) -> Any:
    """Returns figures and contrasts as what JSON knows; a number that is none is null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(own) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
