"""What the benchmark's runs teach: ``python -m benchmarks.teach [--bench DIR]``.

With ``--bench``, from a directory in which ``diagnoser bench truth`` and ``run`` of size small have
finished, and from the training subjects alone:

* ``rules/healthy-ranges.json``: how far each feature reaches in healthy runs, by kind, and in
  those of the paper's study (`benchmarks.study.ranges`);
* ``rules/precision.json``: how often each rule was right;
* ``benchmarks/results/bench/examples.parquet`` and ``components.parquet``: what the classifier
  learns from, in the columns that it rests on.

Without it, the last two are read; either way ``diagnoser/classifier/shipped.npz`` is learned
again from them, to the same predictions.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from joblib import Parallel, delayed

import diagnoser
from benchmarks.outcomes import BENCH, SIZE
from benchmarks.study.ranges import widened
from diagnoser.benchmark.configuration import catalogue
from diagnoser.benchmark.dataset import HEALTHY, Seen, Truth, recording_of, truths
from diagnoser.benchmark.evaluate import lessons, read
from diagnoser.benchmark.examples import columns_of, read_examples, write_examples
from diagnoser.benchmark.jobs import Mode
from diagnoser.benchmark.judges import precisions
from diagnoser.benchmark.plan import make_plan
from diagnoser.benchmark.results import Store
from diagnoser.benchmark.teaching import Extreme, extremes, learn_ranges
from diagnoser.classifier import Classifier, fit, fitted_rows, save
from diagnoser.diagnosis import default_rules
from diagnoser.features import feature_tables
from diagnoser.rules import save_precision
from diagnoser.rules.ranges import save_ranges, shipped_ranges

RULES: Final = Path(__file__).parents[1] / "rules"
SHIPPED: Final = Path(diagnoser.__file__).parent / "classifier" / "shipped.npz"


def main() -> None:
    """Learns anew what ships."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bench", type=Path, metavar="DIR")
    directory = parser.parse_args().bench
    if directory is not None:
        from_runs(Store(directory, lambda text: print(text, file=sys.stderr)))
    classifier = from_examples(BENCH, SHIPPED)
    print(f"{SHIPPED}: learned from {classifier.about['runs']} runs")


def from_runs(store: Store) -> None:
    """Writes healthy ranges, the precision of the rules, and what is learned from."""
    known = catalogue()
    plan, harms = make_plan(known, SIZE), store.read_harm()
    jobs = os.cpu_count() or 1
    true = truths(plan.items, harms, known)
    train = {h: t for h, t in true.items() if t.track == "train"}

    healthy = [t for t in train.values() if t.control in HEALTHY]
    reached = _extremes(store, healthy, jobs)
    ranges = widened(learn_ranges(reached))
    save_ranges(RULES / "healthy-ranges.json", ranges)
    shipped_ranges.cache_clear()
    print(f"healthy ranges of {len(ranges.features)} features from {ranges.runs} runs")

    learning = replace(plan, items=tuple(item for item in plan.items if item.track == "train"))
    modes: tuple[Mode, ...] = ("watched", "budget")
    seen = {mode: read(store, learning, harms, known, mode, jobs) for mode in modes}
    rules = default_rules()
    counted = precisions(seen["watched"], {rule.id: rule.causes for rule in rules})
    runs = sum(run.truth.is_scored and run.look.prefix == 1.0 for run in seen["watched"])
    save_precision(RULES / "precision.json", rules, counted, runs)
    print(f"precision of {len(counted)} rules on {runs} runs")

    examples = lessons([run for runs in seen.values() for run in runs])
    about = {
        "runs": runs,
        "budget_runs": len({_run(run) for run in seen["budget"] if run.truth.is_scored}),
    }
    write_examples(BENCH, examples, about)


def from_examples(directory: Path, path: Path) -> Classifier:
    """Learns the classifier from what is kept, and writes it."""
    examples, about = read_examples(directory)
    run_columns, component_columns = columns_of(examples)
    classifier = fit(examples, run_columns, component_columns, about)
    save(classifier, path, fitted_rows(classifier, examples))
    return classifier


def _extremes(
    store: Store, healthy: Iterable[Truth], jobs: int
) -> list[tuple[tuple[str, ...], Sequence[Extreme]]]:
    tasks = [
        (truth, store.log_path("watched", truth.hash, row["seed"]))
        for truth in healthy
        for row in store.rows("watched", truth.hash)
        if row["status"] == "ok"
    ]
    found = Parallel(n_jobs=jobs)(delayed(_extremes_of)(path) for _, path in tasks)
    clusters = [(t.subject, t.recipe, *t.operators) for t, _ in tasks]
    return list(zip(clusters, found, strict=True))


def _extremes_of(path: Path) -> Sequence[Extreme]:
    with tempfile.TemporaryDirectory() as folder:
        return extremes(feature_tables(recording_of(path.read_bytes(), Path(folder))))


def _run(run: Seen) -> tuple[str, int]:
    return run.truth.hash, run.look.seed


if __name__ == "__main__":
    main()
