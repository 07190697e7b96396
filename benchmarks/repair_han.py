"""The paper's own case, repaired: a hierarchical attention network whose word attention is too hot.

For each seed the same script is run as it should be, with the word attention's learning rate 100
times too high, with that and the paper's remedy (the rate of the flagged group is lowered, nothing
else), and with that and ``--repair apply``. Beside accuracy on held-back documents it measures what
the paper's 3.3 speaks of: the coupling of word and sentence attention, and how many predictions
change when the word attention is disturbed. ``python -m benchmarks.repair_han`` makes what is
missing of ``benchmarks/results/repair-han.jsonl`` (an hour of CPU time).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.forked import answers, rows_of
from diagnoser.cases import command_line, load_case
from diagnoser.components import layers_of, split_components
from diagnoser.curvature import ProbeSet, coupling_matrix, coupling_norms
from diagnoser.repair_loop import DIAGNOSER, Plan, Situation, Strategy, plans
from diagnoser.session import Watch
from diagnoser.types import Repair
from diagnoser.vocabulary import MODEL

RESULTS: Final = Path(__file__).parent / "results" / "repair-han.jsonl"
SEEDS: Final = tuple(range(20))
FAULT: Final = "word-attention-learning-rate"
PAIR: Final = ("word_attention", "sentence_attention")
PROBE: Final = 64  # documents
DRAWS, ALPHA = 20, 0.5  # of the disturbance: W + alpha * rms(W) * N(0, I), the paper's 2.5
ARMS: Final = ("healthy", "nothing", "paper", "diagnoser")


def run(arm: str, seed: int) -> dict[str, Any]:
    """Runs the script once and returns what it came to."""
    case = load_case("han")
    words = command_line(case, None if arm == "healthy" else FAULT, seed=seed)
    sys.path.insert(0, str(case.script.parent))
    sys.argv = [str(case.script), *words]
    import train  # type: ignore[import-not-found]  # noqa: PLC0415 - the case's script

    seen: dict[str, Any] = {}
    evaluate = train.evaluate

    def evaluated(model: nn.Module, split: Any) -> float:
        seen["model"], seen["split"] = model, split
        return float(evaluate(model, split))

    train.evaluate = evaluated
    row: dict[str, Any] = {}
    said = io.StringIO()

    def first_plans(situation: Situation) -> Sequence[Plan]:
        if "before" not in seen:
            seen["before"] = copy.deepcopy(watch._monitor.subject.models[""].state_dict())  # type: ignore[union-attr]
            row["before_step"] = situation.step
        if arm == "diagnoser":
            return plans(situation)
        flagged = situation.findings[0]
        rate = Repair("scale_learning_rate", flagged.component, {"factor": 0.01})
        return [Plan((rate,), "the paper's remedy", flagged.source, flagged.component)]

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said):
        if arm in ("healthy", "nothing"):
            train.main()
        else:
            judge = DIAGNOSER.judge if arm == "diagnoser" else None
            strategy = Strategy(arm, first_plans, judge)
            watch = Watch(Path(folder) / "run", repair="apply", strategy=strategy)
            with watch:
                train.main()
            diagnosis = watch.diagnose(write=False)
            row["causes"] = [[c.cause, c.component] for c in diagnosis.causes[:3]]
            row["kept"] = [
                {
                    "step": attempt.step,
                    "source": attempt.source,
                    "actions": [[a.name, a.component, dict(a.parameters)] for a in attempt.actions],
                    "reason": attempt.reason,
                }
                for attempt in diagnosis.repairs
                if attempt.kept
            ]
            row["attempts"] = len(diagnosis.repairs)
    row["accuracy"] = float(said.getvalue().split()[-1])
    row["epochs"] = [
        float(line.split()[-1]) for line in said.getvalue().splitlines() if "validation" in line
    ]
    model, split = seen["model"], seen["split"]
    row["after"] = measured(model, split)
    if "before" in seen:
        model.load_state_dict(seen["before"])
        row["before"] = measured(model, split)
    return row


def measured(model: nn.Module, split: Any) -> dict[str, float]:
    """Returns coupling and prediction variability of a model on held-back documents.

    ``norm``: Frobenius norm of the off-diagonal block over the root of the product of those of the
    diagonal ones is not bounded, so the plain norm is given, with its standard error; ``share``:
    |g_i' H_ij g_j| over the sum of all such terms along the gradient, signed; ``ratio``: the
    paper's, g_i' H_ij g_j over the root of |g_i' H_ii g_i| |g_j' H_jj g_j|, which is no correlation
    where H is indefinite. ``variability``: share of predictions that a disturbance changes.
    """
    model.eval()
    found = layers_of(split_components({MODEL: model}))
    pair = [next(c for c in found if c.name == name) for name in PAIR]
    batch = (split.documents[:PROBE], split.labels[:PROBE])
    probe = ProbeSet(lambda m, b: F.cross_entropy(m(b[0]), b[1]), model, [batch])

    def work(operator: Any) -> dict[str, float]:
        along = coupling_matrix(operator, operator.gradient, pair)
        (a, ab), (_, b) = (tuple(e.value for e in row) for row in along.values)
        norms = coupling_norms(operator, pair, torch.Generator().manual_seed(0))
        norm = norms[PAIR]
        below = math.sqrt(abs(a * b))
        return {
            "share": along.shares[0][1].value,
            "ratio": ab / below if below > 0 else math.nan,
            "norm": norm.value,
            "norm_error": norm.std_error or 0.0,
        }

    return {**probe.measure(work), "variability": variability(model, split)}


@torch.no_grad()
def variability(model: nn.Module, split: Any) -> float:
    """Returns the share of predictions that change when the word attention is disturbed."""
    disturbed = [p for n, p in model.named_parameters() if n.startswith(f"{PAIR[0]}.")]
    kept = [p.clone() for p in disturbed]
    usual = predictions(model, split)
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(DRAWS):
        for weight, old in zip(disturbed, kept, strict=True):
            scale = ALPHA * old.square().mean().sqrt()
            weight.copy_(old + scale * torch.randn(old.shape, generator=generator))
        shares.append(float((predictions(model, split) != usual).float().mean()))
    for weight, old in zip(disturbed, kept, strict=True):
        weight.copy_(old)
    return sum(shares) / len(shares)


def predictions(model: nn.Module, split: Any) -> Tensor:
    """Returns the class of each document."""
    return torch.cat([model(documents).argmax(-1) for documents in split.documents.split(128)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the runs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, action="append", default=[])
    parser.add_argument("--arm", action="append", default=[])
    given = parser.parse_args(arguments)
    done = {(row["arm"], row["seed"]) for row in rows_of(given.out)}
    wanted = [(a, s) for s in given.seed or SEEDS for a in given.arm or ARMS if (a, s) not in done]
    with given.out.open("a", encoding="utf-8") as file:
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)  # imports at first use
        for (arm, seed), row in answers(wanted, lambda task: run(*task), given.jobs):
            if "problem" in row:
                print(f"{arm} {seed}: {row['problem']}", file=sys.stderr)
                continue
            named = {"arm": arm, "seed": seed, **row}
            file.write(json.dumps(named) + "\n")
            file.flush()
            show(named)
    return 0


def show(row: Mapping[str, Any]) -> None:
    """Prints a run in a line."""
    after = {name: f"{value:.3g}" for name, value in row["after"].items()}
    kept = [[a[:2] + list(a[2].values()) for a in k["actions"]] for k in row.get("kept", ())]
    print(row["arm"], row["seed"], row["accuracy"], after, kept, flush=True)


if __name__ == "__main__":
    sys.exit(main())
