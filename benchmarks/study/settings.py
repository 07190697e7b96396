"""The three models of the study, each as its case trains it, one step at a time.

A `Training` makes the steps of the case's script (a test holds its losses against what the script
prints), so that a study can stop between two steps, measure, disturb, and go on.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diagnoser.cases import load_case, missing_names, read_case
from diagnoser.errors import UsageError

CASES: Final = Path(__file__).parents[2] / "cases"
PROBE: Final = 64  # samples of the training part, the same at every measurement
HELD_OUT: Final = 256  # samples whose predicted classes are compared
NOISE: Final = (0.01, 0.03, 0.1, 0.3, 1.0)  # alpha
QUICK: Final = 8  # steps of an epoch, and samples of the probe, in the quick form

Batch = tuple[Any, Tensor]
LossFunction = Callable[[nn.Module, Batch], Tensor]


@dataclass(eq=False)
class Training:
    """A training between two steps.

    ``batch`` gives inputs and labels of some rows of the training part; ``predict`` the logits of
    inputs. ``probe`` and ``held_out`` are fixed batches. ``slowed`` maps parameters to what their
    learning rate is multiplied by: their step is made that much shorter, which for the optimizers
    here is the same, and leaves groups and schedules alone.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Callable[[Tensor], Batch]
    predict: Callable[[nn.Module, Any], Tensor]
    rows: int
    batch_size: int
    epochs: int
    seed: int
    probe: Batch
    held_out: Batch
    clip: float | None = None
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None
    made: int = 0
    slowed: Mapping[str, float] = field(default_factory=dict)
    _order: torch.Generator = field(init=False)
    _waiting: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._order = torch.Generator().manual_seed(self.seed)

    @property
    def steps(self) -> int:
        """How many steps the whole training has."""
        return self.epochs * -(-self.rows // self.batch_size)

    def reorder(self, seed: int) -> None:
        """Draws what is left of this epoch, and every later one, in another order."""
        self._order.manual_seed(seed)
        left = torch.cat(self._waiting) if self._waiting else torch.zeros(0, dtype=torch.long)
        drawn = left[torch.randperm(len(left), generator=self._order)]
        self._waiting = list(drawn.split(self.batch_size))[::-1] if len(drawn) else []

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of a model on a batch, a mean over samples."""
        inputs, labels = batch
        return F.cross_entropy(self.predict(model, inputs), labels)

    def step(self) -> float:
        """Makes one step and returns the loss before it."""
        if not self._waiting:
            order = torch.randperm(self.rows, generator=self._order)
            self._waiting = list(order.split(self.batch_size))[::-1]
        self.model.train()
        self.optimizer.zero_grad()
        loss = self.loss(self.model, self.batch(self._waiting.pop()))
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(
                [p for p in self.model.parameters() if p.requires_grad], self.clip
            )
        named = dict(self.model.named_parameters()) if self.slowed else {}
        before = {name: named[name].detach().clone() for name in self.slowed}
        self.optimizer.step()
        with torch.no_grad():
            for name, factor in self.slowed.items():
                named[name].copy_(before[name].lerp(named[name], factor))
        if self.schedule is not None:
            self.schedule.step()
        self.made += 1
        return loss.item()

    def until(self, step: int) -> float:
        """Makes steps until so many are made, and returns the last loss."""
        loss = float("nan")
        while self.made < min(step, self.steps):
            loss = self.step()
        return loss

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return self.steps // self.epochs

    @torch.no_grad()
    def predictions(self) -> Tensor:
        """Predicted classes of the held-out samples; leaves the model in eval mode."""
        self.model.eval()
        return torch.cat(
            [self.predict(self.model, inputs).argmax(-1) for inputs in pieces(self.held_out[0])]
        )

    def accuracy(self) -> float:
        """Share of the held-out samples that are right."""
        return float((self.predictions() == self.held_out[1]).double().mean())


@dataclass(frozen=True)
class Setting:
    """One model of the study.

    ``matrices`` and ``layers`` are the rows of its table, groups of parameters that the case's file
    names; ``pictured`` those whose loss is drawn, ``pairs`` those whose coupling is told,
    ``disturbed`` those that are perturbed, ``lowered`` those whose learning rate the intervention
    lowers. What follows is what a model of its size can be given: Hessian products of a block, for
    its trace and again for its ends; products of a component for a coupling norm; the checkpoints
    at which PyHessian is asked, counted from 0; magnitudes of noise.
    """

    name: str
    title: str
    seeds: int
    begin: Callable[[int, bool], Training]
    matrices: tuple[str, ...]
    layers: tuple[str, ...]
    pictured: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    disturbed: tuple[str, ...]
    lowered: tuple[str, ...]
    products: int = 24
    columns: int = 6
    asked_of_pyhessian: tuple[int, ...] = (0, 1, 2)
    noise: tuple[float, ...] = NOISE
    quick: bool = False

    def start(self, seed: int) -> Training:
        """Returns a training before its first step.

        Raises:
            UsageError: What the case needs is not installed, or its file names a parameter that
                the model has not got.
        """
        case = load_case(self.name)
        training = self.begin(seed, self.quick)
        if self.quick:
            training.rows = min(training.rows, QUICK * training.batch_size)
            training.probe = _first(training.probe, QUICK)
        else:
            names = [name for name, _ in training.model.named_parameters()]
            problem = missing_names(case, names)
            if problem is not None:
                raise UsageError(problem)
        return training

    def pairs_of(self, groups: Sequence[str]) -> tuple[tuple[str, str], ...]:
        """The pairs that some groups are part of."""
        return tuple(pair for pair in self.pairs if not set(pair).isdisjoint(groups))

    def block(self, name: str) -> tuple[str, ...]:
        """The parameters of a group; of the quick form's last layer, which is another."""
        names = read_case(CASES / self.name / "case.yaml").groups[name]
        return tuple(n.replace("layer.5.", "layer.1.") if self.quick else n for n in names)


def pieces(inputs: Any, size: int = 64) -> Iterator[Any]:
    """Yields inputs (a tensor or a tuple of them) some samples at a time."""
    if isinstance(inputs, Tensor):
        yield from inputs.split(size)
    else:
        yield from zip(*(tensor.split(size) for tensor in inputs), strict=True)


def _first(batch: Batch, count: int) -> Batch:
    inputs, labels = batch
    fewer = inputs[:count] if isinstance(inputs, Tensor) else tuple(t[:count] for t in inputs)
    return fewer, labels[:count]


@contextmanager
def modules_of(case: str) -> Iterator[Callable[[str], ModuleType]]:
    """Gives an import of what lies beside a case's script under names that others use, too."""
    folder = str(CASES / case)
    own = {path.stem for path in (CASES / case).glob("*.py")}
    kept = {name: sys.modules.pop(name) for name in own if name in sys.modules}
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(folder)
        for name in own:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


def han(seed: int, quick: bool = False) -> Training:
    """The hierarchical attention network on BBC News."""
    torch.manual_seed(seed)
    with modules_of("han") as load:
        data = load("bbc_news").load()
        model = load("model").HAN(data.vocabulary_size, 5)
    attention = list(model.word_attention.parameters())
    others = [p for n, p in model.named_parameters() if not n.startswith("word_attention.")]
    optimizer = torch.optim.Adam(
        [{"params": others, "lr": 3e-3}, {"params": attention, "lr": 3e-3}]
    )
    train, test = data.train, data.test
    return Training(
        model=model,
        optimizer=optimizer,
        batch=lambda rows: (train.documents[rows], train.labels[rows]),
        predict=lambda m, documents: m(documents),
        rows=len(train),
        batch_size=32,
        epochs=2 if quick else 5,
        seed=seed,
        probe=(train.documents[:PROBE], train.labels[:PROBE]),
        held_out=(test.documents[:HELD_OUT], test.labels[:HELD_OUT]),
    )


def video(seed: int, quick: bool = False) -> Training:
    """The 3D-CNN on moving digits."""
    torch.manual_seed(seed)
    with modules_of("video") as load:
        digits = load("moving_digits")
        data = digits.load()
        model = load("model").VideoModel(len(digits.MOTIONS))
    train, test = data["train"], data["test"]
    return Training(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5),
        batch=lambda rows: (train.frames[rows], train.motions[rows]),
        predict=lambda m, clips: m(clips),
        rows=len(train),
        batch_size=32,
        epochs=2 if quick else 6,
        seed=seed,
        probe=(train.frames[:PROBE], train.motions[:PROBE]),
        held_out=(test.frames[:HELD_OUT], test.motions[:HELD_OUT]),
    )


def distilbert(seed: int, quick: bool = False) -> Training:
    """DistilBERT on film reviews; the quick form is the case's small one."""
    torch.manual_seed(seed)
    with modules_of("distilbert") as load:
        script = load("train")
        model, train, _, test = script.small() if quick else script.full()
    trained = [p for p in model.parameters() if p.requires_grad]
    asked = script.SIZES["small" if quick else "full"]
    epochs, batch_size = (2 if quick else asked["epochs"]), asked["batch_size"]
    optimizer = torch.optim.AdamW(trained, lr=asked["learning_rate"], weight_decay=0.01)
    steps = epochs * -(-len(train) // batch_size)
    return Training(
        model=model,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, script.rate(steps)),
        clip=1.0,
        batch=lambda rows: ((train.tokens[rows], train.mask[rows]), train.labels[rows]),
        predict=lambda m, x: m(input_ids=x[0], attention_mask=x[1]).logits,
        rows=len(train),
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        probe=((train.tokens[:PROBE], train.mask[:PROBE]), train.labels[:PROBE]),
        held_out=((test.tokens[:HELD_OUT], test.mask[:HELD_OUT]), test.labels[:HELD_OUT]),
    )


def _parts(*layers: str) -> tuple[str, ...]:
    return tuple(f"{layer} {part}" for layer in layers for part in ("q", "k", "v", "out"))


HAN: Final = Setting(
    name="han",
    title="HAN",
    seeds=10,
    begin=han,
    matrices=("W1", "W2", "S1", "S2"),
    layers=("word attention", "sentence attention"),
    pictured=("word attention", "sentence attention"),
    pairs=(
        ("W1", "W2"),
        ("W1", "S1"),
        ("W1", "S2"),
        ("W2", "S1"),
        ("W2", "S2"),
        ("S1", "S2"),
        ("word attention", "sentence attention"),
    ),
    disturbed=("word attention", "sentence attention"),
    lowered=("W1", "W2"),
)
VIDEO: Final = Setting(
    name="video",
    title="3D-CNN",
    seeds=5,
    begin=video,
    matrices=_parts("spatial", "temporal", "cross"),
    layers=("spatial attention", "temporal attention", "cross attention"),
    pictured=("spatial attention", "temporal attention", "cross attention"),
    pairs=(
        ("spatial attention", "temporal attention"),
        ("spatial attention", "cross attention"),
        ("temporal attention", "cross attention"),
    ),
    disturbed=("spatial attention", "temporal attention", "cross attention"),
    lowered=("cross attention",),
)
DISTILBERT: Final = Setting(
    name="distilbert",
    title="DistilBERT",
    seeds=5,
    begin=distilbert,
    matrices=_parts("first", "last"),
    layers=("first attention", "last attention"),
    pictured=("first q", "first k", "first out", "last q", "last k", "last out"),
    pairs=(("first q", "first out"), ("last q", "last out")),
    disturbed=("last q", "last out"),
    lowered=("last q",),
    products=8,
    columns=3,
    asked_of_pyhessian=(2,),
    noise=(0.03, 0.1, 0.3),
)


def settings(*, quick: bool = False) -> Sequence[Setting]:
    """The three models; the quick forms are small and train for a few steps."""
    found = (HAN, VIDEO, DISTILBERT)
    if not quick:
        return found
    return [
        replace(s, quick=True, products=3, columns=3, asked_of_pyhessian=(2,), noise=(0.3, 1.0))
        for s in found
    ]
