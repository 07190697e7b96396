"""What the tool does with the models, loops and frameworks that people have: cell by cell.

Every cell is a training and what is expected of it; `tests/test_compatibility.py` runs them all.
``docs/compatibility.md`` shows them and nothing else: ``python tests/compatibility.py`` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from popular_frameworks import FLAGS, FRAMEWORKS, Flags, Framework, Watched, small
from popular_loops import LOOPS, OWN, Loop, Training
from popular_models import MODELS, Subject

import diagnoser
from diagnoser.session import Watch

DOCUMENT = Path(__file__).parents[1] / "docs" / "compatibility.md"


@dataclass(frozen=True)
class Outcome:
    """How a watched training comes out.

    Attributes:
        mark: What stands in a table.
        means: What the legend says of it.
        curvature: By which methods curvature is measured; empty: it is not.
        says: Parts of all that the log says, but for what watching cost.
        measured: Steps, gradients and updates are recorded.
        trains: The program itself runs; else ``says`` is a part of torch's error.
    """

    mark: str
    means: str
    curvature: frozenset[str] = frozenset({"live"})
    says: tuple[str, ...] = ()
    measured: bool = True
    trains: bool = True


WORKS = Outcome("works", "all is measured: losses, gradients, updates, attention, curvature")
PART = Outcome(
    "first part",
    "the same, but curvature is that of the first of a step's several losses, times their number; "
    "the loss and the gradients are those of the whole step",
    frozenset({"live, first of 3 backwards"}),
)
HALVES = replace(PART, curvature=frozenset({"live, first of 2 backwards"}))
RIVALS = Outcome(
    "first loss",
    "the same, but curvature is that of the first loss alone and of what it reaches (the critic), "
    "and of the first step each optimizer's half is recorded as a step of its own",
)
HIDDEN = "a compiled module hides its operations: no attention, no activations"
ON_A_PROBE = "measure on a probe set, by watch(..., loss_fn=, probe=)"
REPLAY = Outcome(
    "replay",
    "compiled code has no second derivative: curvature falls back to calling the module once more, "
    "uncompiled, on the same numbers; attention, accuracy and activations are not seen",
    frozenset({"live, eager replay"}),
    (HIDDEN,),
)
RANDOM = Outcome(
    "no curvature (a)",
    "compiled code that draws random numbers of its own (dropout under inductor) cannot be called "
    "again on the same ones; the rest is as under replay",
    frozenset(),
    (HIDDEN, "uncompiled, the output differs by"),
)
BROKEN = Outcome(
    "no curvature (b)",
    "of a module that a graph break cuts into several compiled parts there is no replay; the rest "
    "is as under replay",
    frozenset(),
    (HIDDEN, "the compiled code uses a tensor with a gradient that is neither an input nor"),
)
REENTRANT = Outcome(
    "no curvature (c)",
    "all else is measured",
    frozenset(),
    (
        "a reentrant checkpoint hides the parameters inside it: call checkpoint(..., "
        f"use_reentrant=False), or {ON_A_PROBE}",
    ),
)
SKIPPED = Outcome(
    "works, skips said",
    "steps that a scaler skips are recorded as skipped and are no finding: their gradients do not "
    "count, nor a loss that is not finite",
    says=("the gradient scaler skipped",),
)
PROBE = Outcome(
    "probe",
    "curvature is measured on the fixed batch that `loss_fn=` and `probe=` give, on which the "
    "model runs uncompiled and without reentrant checkpoints",
    frozenset({"probe"}),
)
UNSEEN = Outcome(
    "refused",
    "the training runs as it is, nothing is recorded, the verdict is inconclusive",
    frozenset(),
    (
        "no training step was seen: an optimizer stepped, but torch.autograd.backward was never "
        "called; call loss.backward(), as gradients of torch.autograd.grad go unseen",
    ),
    measured=False,
)
NO_KERNEL = Outcome(
    "torch refuses",
    "torch itself has no such layer in float16 on a CPU; nothing to watch",
    frozenset(),
    ("could not create a primitive descriptor for the LSTM forward propagation primitive",),
    measured=False,
    trains=False,
)
OUTCOMES = (
    WORKS, PART, RIVALS, SKIPPED, REPLAY, RANDOM, BROKEN, REENTRANT, PROBE, UNSEEN, NO_KERNEL,
)  # fmt: skip

Run = Callable[[Training, Path | None], Watched | None]


@dataclass(frozen=True)
class Cell:
    """One training: where it stands, how it is run, and what is expected of it."""

    table: str
    row: str
    column: str
    run: Run = field(repr=False)
    outcome: Outcome = field(repr=False)

    def __str__(self) -> str:
        return f"{self.table}: {self.row}, {self.column}"


def by_loop(build: Callable[[], Subject], loop: Loop) -> Run:
    def run(training: Training, out: Path | None) -> Watched | None:
        watch = Watch(out) if out is not None else None
        loop(build(), training, watch or nullcontext())
        return None if watch is None else (watch, watch.diagnose(write=False))

    return run


def on_a_probe(build: Callable[[], Subject], loop: Loop) -> Run:
    def run(training: Training, out: Path | None) -> Watched | None:
        subject = build()
        probe, watch = subject.draw(), None
        if out is not None:
            watch = diagnoser.watch(
                subject.model, loss_fn=subject.loss, probe=probe, out=out, verbose=False
            )
        loop(subject, training, watch or nullcontext())
        return None if watch is None else (watch, watch.diagnose(write=False))

    return run


def by_framework(build: Callable[[], Subject], framework: Framework, flags: Flags) -> Run:
    return lambda training, out: framework(build(), training, flags, out)


# -- models and loops --------------------------------------------------------------------------

SHORT = {  # columns of the table of models, by their loop
    "plain": "plain",
    "gradient accumulation": "accumulation",
    "bfloat16 autocast": "bfloat16",
    "float16 and `GradScaler`": "`GradScaler`",
    "`checkpoint(use_reentrant=False)`": "checkpoint",
    '`torch.compile`, "aot_eager"': "compile",
}
OF_TRANSFORMERS = (
    "BERT", "DistilBERT", "RoBERTa", "GPT-2", "Llama", "Mixtral", "ViT", "T5", "LoRA",
)  # fmt: skip
ONLY = {  # loops that not every model is run in
    "checkpoint": OF_TRANSFORMERS,  # the others have no switch for it
    "compile": ("GPT-2", "GRU", "Conv2d"),
}


def of_model(model: str, column: str) -> Outcome:
    if column == "accumulation":
        return PART
    if (model, column) == ("LSTM", "`GradScaler`"):
        return NO_KERNEL
    # torch compiles no recurrent layer, and thereby nothing of the model around it
    of_compiled = {"GPT-2": BROKEN, "Conv2d": REPLAY}
    return of_compiled.get(model, WORKS) if column == "compile" else WORKS


def model_cells() -> list[Cell]:
    return [
        Cell("models", model, column, by_loop(build, LOOPS[loop]), of_model(model, column))
        for loop, column in SHORT.items()
        for model, build in MODELS.items()
        if model in ONLY.get(column, MODELS)
    ]


OF_LOOP = {
    "gradient accumulation": PART,
    "several losses and backwards a step": PART,
    "`retain_graph=True`, two backwards": HALVES,
    "GAN: two models, two optimizers": RIVALS,
    "`torch.autograd.grad` instead of a backward": UNSEEN,
    "float16 and `GradScaler` that skips steps": SKIPPED,
    "the same with a fused optimizer": SKIPPED,
    "`checkpoint(use_reentrant=True)`": REENTRANT,
    '`torch.compile`, "aot_eager"': REPLAY,
    '`model.compile()`, "aot_eager"': REPLAY,
    '`torch.compile`, "inductor"': REPLAY,
    '`torch.compile`, "inductor", with dropout': RANDOM,
}


ON_PROBES = {
    "`checkpoint(use_reentrant=True)`": PROBE,
    '`torch.compile`, "aot_eager"': replace(PROBE, says=(HIDDEN,)),
}


def loop_cells() -> list[Cell]:
    return [
        Cell("loops", loop, name, by_loop(build, train), OF_LOOP.get(loop, WORKS))
        for loop, train in LOOPS.items()
        for name, build in OWN.items()
        if name == "MLP" or not loop.startswith(("GAN", '`torch.compile`, "inductor"'))
    ] + [
        Cell("loops", f"{loop}, with `probe=`", name, on_a_probe(build, LOOPS[loop]), outcome)
        for loop, outcome in ON_PROBES.items()
        for name, build in OWN.items()
    ]


# -- frameworks ---------------------------------------------------------------------------------

OF_FLAG = {"gradient accumulation": PART, "compiled": REPLAY}


def framework_cells() -> list[Cell]:
    return [
        Cell(
            "frameworks",
            flag,
            name,
            by_framework(small, framework, flags),
            OF_FLAG.get(flag, WORKS),
        )
        for flag, flags in FLAGS.items()
        for name, framework in FRAMEWORKS.items()
    ]


def framework_model_cells() -> list[Cell]:
    return [
        Cell(
            "models in frameworks",
            model,
            name,
            by_framework(build, framework, FLAGS["plain"]),
            WORKS,
        )
        for model, build in MODELS.items()
        for name, framework in FRAMEWORKS.items()
        if (name == "transformers.Trainer") == (model in OF_TRANSFORMERS)
    ]


CELLS = (*model_cells(), *loop_cells(), *framework_cells(), *framework_model_cells())


# -- the document ---------------------------------------------------------------------------------


def lines_of(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(name: str, corner: str) -> str:
    """The cells of one table; where none is run there is nothing."""
    own = {(c.row, c.column): c.outcome.mark for c in CELLS if c.table == name}
    rows, columns = (list(dict.fromkeys(key[i] for key in own)) for i in (0, 1))
    return lines_of(
        [corner, *columns], [[row, *(own.get((row, c), "") for c in columns)] for row in rows]
    )


def legend() -> str:
    return lines_of(
        ["a cell says", "what is measured", "the log says"],
        [[o.mark, o.means, f"`{o.says[-1]}`" if o.says else ""] for o in OUTCOMES],
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "legend": legend,
    "models": lambda: table("models", "model"),
    "loops": lambda: table("loops", "loop"),
    "frameworks": lambda: table("frameworks", "DistilBERT"),
    "models in frameworks": lambda: table("models in frameworks", "model"),
    "count": lambda: f"There are {len(CELLS)} of them.",
}


def rendered(text: str) -> str:
    """Returns a document with each block between ``<!-- name -->`` and ``<!-- /name -->`` anew."""
    for name, block in BLOCKS.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda m, b=block: f"{m[1]}{b()}\n{m[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(rendered(DOCUMENT.read_text("utf-8")), "utf-8")
