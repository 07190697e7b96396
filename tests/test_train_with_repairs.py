"""Repairs in a loop that is handed over: nothing is lost, what is kept helps, and it shows."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diagnoser
from diagnoser.benchmark.subjects import SUBJECTS
from diagnoser.curvature import RandomStates
from diagnoser.diagnosis import diagnose
from diagnoser.errors import RunLogError, UsageError
from diagnoser.injection.training import Training, learning_rate_factor
from diagnoser.injection.training import batches as training_batches
from diagnoser.repair import Live, Snapshot, apply
from diagnoser.repair_loop import comparing, loop, replaying, script, states
from diagnoser.repair_loop.replaying import FEWEST, GUARANTEE, Feed, Replays, Stream, copied
from diagnoser.runlog import RunLogWriter, read_run
from diagnoser.stepping import groups_of_step
from diagnoser.types import Repair

ALWAYS = """
title: Whatever is measured
status: test
description: Detects anything.
references: []
fault: slow_convergence
scope: run
when: median_update_ratio > 0
severity: high
message: "something"
causes: [learning_rate_too_high]
repairs:
  - name: reset_optimizer_state
    component: model
  - name: clip_gradient
    component: model
    parameters: {norm: 0.01}
  - name: add_warmup
    component: model
  - name: reinitialize
    component: model
  - name: temper_attention
    component: model
    parameters: {factor: 0.5}
falsepositives: [everything]
tests:
  - {name: always, series: {median_update_ratio: [1]}, fires: true}
  - {name: a step that changes nothing, series: {median_update_ratio: [0]}, fires: false}
"""


@pytest.fixture
def always(tmp_path):
    """A directory with one rule, which fires on everything."""
    folder = tmp_path / "rules"
    folder.mkdir()
    (folder / "always.yaml").write_text(ALWAYS.lstrip(), "utf-8")
    return folder


@pytest.fixture
def short(monkeypatch):
    """Trials of few steps, in few rounds."""
    monkeypatch.setattr(comparing, "FEWEST_STEPS", 14)
    monkeypatch.setattr(comparing, "MOST_STEPS", 14)
    monkeypatch.setattr(loop, "MOST_PLANS", 3)
    monkeypatch.setattr(loop, "LONGER", 2)
    monkeypatch.setattr(script, "MOST_ROUNDS", 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.v_proj, self.out_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 2)
        self.calls, self.hidden = 0, torch.zeros(8)

    def forward(self, inputs):
        self.calls += 1
        states = self.embed(inputs) + 0.1 * self.hidden
        self.hidden = states.detach().mean((0, 1))
        scores = self.q_proj(states) @ self.k_proj(states).mT / 8**0.5
        states = states + self.out_proj(F.dropout(scores.softmax(-1), 0.1) @ self.v_proj(states))
        return self.head(self.norm(states.mT).mT.mean(1))


class Seen:
    """What the training that counts was trained on."""

    def __init__(self):
        self.sums = []

    def state_dict(self):
        return {"sums": list(self.sums)}

    def load_state_dict(self, state):
        self.sums = list(state["sums"])


class Setup:
    """A training of all that can be in one; what it learns is noise, so that no repair helps."""

    def __init__(self, make, schedule=None, *, scaled=False, accumulate=1, clip=None, steps=36):
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        self.model = Net()
        self.optimizer = make(self.model.parameters())
        self.scheduler = schedule(self.optimizer) if schedule else None
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=7)
        self.scaled, self.accumulate, self.clip = scaled, accumulate, clip
        self.seen = Seen()
        self.steps = steps
        self.own = np.random.default_rng(3)

    def batches(self):
        """Draws from every stream, in turn with the training."""
        for i in range(self.steps):
            size = random.choice((6, 8))
            inputs = torch.randn(self.accumulate, size, 4, 3)
            targets = torch.from_numpy(np.random.randint(0, 2, (self.accumulate, size)))
            yield {"inputs": inputs, "targets": targets, "i": i}

    def step(self, batch):
        self.seen.sums.append((batch["i"], float(batch["inputs"].sum())))
        self.optimizer.zero_grad()
        for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True):
            inputs.add_(0.01 * float(self.own.normal()))  # in place, as augmentation is
            loss = F.cross_entropy(self.model(inputs), targets) / self.accumulate
            (self.scaler.scale(loss) if self.scaled else loss).backward()
        if self.scaled:
            self.scaler.unscale_(self.optimizer)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        if self.scaled:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(float(loss.detach()))
        elif self.scheduler is not None:
            self.scheduler.step()

    def plain(self):
        for batch in self.batches():
            self.step(batch)
        return copy.deepcopy(self.state())

    def repaired(self, out, step=None, batches=None, **options):
        others = [self.seen, self.own, self.scaler]
        others += [self.scheduler] if self.scheduler else []
        options = {"verbose": False, "others": others} | options
        return diagnoser.train_with_repairs(
            step or self.step, batches if batches is not None else self.batches(),
            model=self.model, optimizer=self.optimizer, out=out, **options,
        )  # fmt: skip

    def state(self):
        return {
            "model": self.model.state_dict(),
            "numbers": (self.model.calls, self.model.hidden),
            "gradients": [p.grad for p in self.model.parameters()],
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler and self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": [getattr(RandomStates.now(), n) for n in ("_cpu", "_python", "_numpy")],
            "own": self.own.bit_generator.state,
            "seen": self.seen.sums,
        }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or callable(a))


def different(mine, theirs):
    return [key for key in mine if not same(mine[key], theirs[key])]


SGD = lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)  # noqa: E731
CASES = {
    "sgd": {"make": SGD},
    "adam one cycle clip": {
        "make": lambda p: torch.optim.Adam(p, lr=1e-3),
        "schedule": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 3e-3, total_steps=200),
        "clip": 0.5,
    },
    "adamw fused plateau": {
        "make": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
        "schedule": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=3),
    },
    "adam scaler": {"make": lambda p: torch.optim.Adam(p, lr=1e-3), "scaled": True, "clip": 1.0},
    "rate in a tensor": {
        "make": lambda p: torch.optim.SGD(p, lr=torch.tensor(1e-2)),
        "schedule": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.99),
    },
    "accumulation sequential": {
        "make": lambda p: torch.optim.RMSprop(p, lr=1e-4),
        "schedule": lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=30),
                torch.optim.lr_scheduler.CosineAnnealingLR(o, 200),
            ],
            [30],
        ),
        "accumulate": 2,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_rolled_back_leaves_no_trace(case, always, short, tmp_path):
    theirs = Setup(**CASES[case]).plain()
    setup = Setup(**CASES[case])
    diagnosis = setup.repaired(tmp_path / "run", rules=always, classifier="off")
    attempts = diagnosis.repairs
    assert len(attempts) >= 3
    assert not any(attempt.kept for attempt in attempts), attempts
    assert all(attempt.guarantee.startswith(GUARANTEE) for attempt in attempts)
    assert different(setup.state(), theirs) == []


@pytest.mark.parametrize("case", ["adam one cycle clip", "adam scaler"])
def test_a_training_without_findings_is_the_plain_loop(case, tmp_path):
    theirs = Setup(**CASES[case]).plain()
    setup = Setup(**CASES[case])
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "never.yaml").write_text(
        ALWAYS.lstrip()
        .replace("ratio > 0", "ratio > 1000000")
        .replace("[1]", "[2000000]"),
        "utf-8",
    )  # fmt: skip
    diagnosis = setup.repaired(tmp_path / "run", rules=tmp_path / "rules", classifier="off")
    assert diagnosis.repairs == ()
    assert different(setup.state(), theirs) == []
    assert [i for i, _ in setup.seen.sums] == list(range(setup.steps))
    assert not (tmp_path / "run" / "trials").exists()


def test_switched_off_it_is_the_plain_loop(tmp_path, monkeypatch):
    theirs = Setup(**CASES["sgd"]).plain()
    monkeypatch.setenv("DIAGNOSER_OFF", "1")
    setup = Setup(**CASES["sgd"])
    diagnosis = setup.repaired(tmp_path / "run")
    assert diagnosis.verdict == "inconclusive"
    assert different(setup.state(), theirs) == []
    assert not (tmp_path / "run").exists()


def test_what_nobody_told_of_is_put_back_as_well(always, short, tmp_path):
    """Schedules and scalers of torch are found."""
    case = CASES["adam one cycle clip"] | {"scaled": True}
    theirs = Setup(**case).plain()
    setup = Setup(**case)
    others = [setup.seen, setup.own]
    diagnosis = setup.repaired(tmp_path / "run", rules=always, classifier="off", others=others)
    assert diagnosis.repairs
    assert different(setup.state(), theirs) == []


def test_trials_are_runs_of_their_own(always, short, tmp_path):
    setup = Setup(**CASES["sgd"])
    probe = torch.randn(4, 4, 3)

    def loss_fn(model, batch):
        hidden = model.hidden
        loss = model(batch).square().mean()
        model.hidden = hidden
        return loss

    diagnosis = setup.repaired(
        tmp_path / "run", rules=always, classifier="off", probe=probe,
        loss_fn=loss_fn,
    )  # fmt: skip
    main = read_run(tmp_path / "run")
    assert list(main.losses.step) == list(range(setup.steps))
    trials = sorted((tmp_path / "run" / "trials").iterdir())
    assert trials
    begun = diagnosis.repairs[0].step
    for directory in trials[:2]:
        trial = read_run(directory)
        assert trial.ending.exit_code == 0
        assert list(trial.losses.step) == list(range(begun + 1 + 14))
        earlier = main.losses.value[: begun + 1]
        assert np.array_equal(trial.losses.value[: begun + 1], earlier)
        measured = {int(s) for s in trial.measured.step if s > begun}
        assert measured == {begun + 1 + round(s * 14) for s in comparing.MEASURED_AT}
        assert any("probe" in name for name in trial.measurements.methods)
        diagnose(trial, [])
    twin = read_run(trials[0])
    after = twin.losses.value[begun + 1 :]
    assert np.array_equal(after, main.losses.value[begun + 1 : begun + 1 + len(after)])


class Counted:
    """A step that does something else at some call, counted from the first trial on."""

    def __init__(self, setup, at, act, monkeypatch):
        self.setup, self.at, self.act, self.calls, self.arms = setup, at, act, 0, 0
        self.inside = False
        original = Replays._train

        def train(replays, *args):
            self.inside, self.calls = True, 0
            self.arms += 1
            try:
                return original(replays, *args)
            finally:
                self.inside = False

        monkeypatch.setattr(Replays, "_train", train)

    def __call__(self, batch):
        if self.inside:
            self.calls += 1
            if (self.arms, self.calls) in self.at:
                self.act(self.setup, batch)
        self.setup.step(batch)


def interrupt(setup, _):
    with torch.no_grad():
        setup.model.embed.weight.zero_()
    raise KeyboardInterrupt


def raise_in_the_middle(setup, batch):
    loss = setup.model(batch["inputs"][0]).square().mean()
    setup.scaler.scale(loss).backward()
    setup.scaler.unscale_(setup.optimizer)
    raise MemoryError("no more")


def leave(setup, _):
    raise SystemExit(3)


def test_an_interrupt_in_a_trial_puts_the_training_back_first(always, short, tmp_path, monkeypatch):
    setup = Setup(**CASES["adam one cycle clip"])
    step = Counted(setup, {(2, 5)}, interrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        setup.repaired(tmp_path / "run", step=step, rules=always, classifier="off")
    made = len(setup.seen.sums)
    assert 0 < made < 20
    theirs = Setup(**CASES["adam one cycle clip"])
    drawn = theirs.batches()
    for _ in range(made):
        theirs.step(next(drawn))
    assert different(setup.state(), theirs.state()) == []
    assert not hasattr(torch.autograd.backward, "__wrapped__")
    assert read_run(tmp_path / "run").ending is not None


@pytest.mark.parametrize("act", [raise_in_the_middle, leave])
def test_an_exception_in_a_trial_ends_that_arm_alone(act, always, short, tmp_path, monkeypatch):
    case = CASES["adam scaler"]
    theirs = Setup(**case).plain()
    setup = Setup(**case)
    step = Counted(setup, {(2, 3), (3, 14)}, act, monkeypatch)
    diagnosis = setup.repaired(tmp_path / "run", step=step, rules=always, classifier="off")
    assert different(setup.state(), theirs) == []
    failed = [a for a in diagnosis.repairs if "the step raised" in a.reason]
    assert len(failed) == 2
    assert not any(a.kept for a in diagnosis.repairs)
    said = read_run(tmp_path / "run" / "trials" / "02").events
    assert [e.kind for e in said][-1] == "trial"


def test_nan_in_a_trial_ends_that_arm_alone(always, short, tmp_path, monkeypatch):
    def spoil(setup, batch):
        batch["inputs"].fill_(torch.nan)  # the trial's own copy

    theirs = Setup(**CASES["sgd"]).plain()
    setup = Setup(**CASES["sgd"])
    step = Counted(setup, {(2, 3)}, spoil, monkeypatch)
    diagnosis = setup.repaired(tmp_path / "run", step=step, rules=always, classifier="off")
    assert diagnosis.repairs[0].reason == "the loss became NaN or infinite"
    assert different(setup.state(), theirs) == []


def test_an_exception_of_the_training_itself_goes_up(tmp_path):
    setup = Setup(**CASES["sgd"])

    def step(batch):
        if batch["i"] == 7:
            raise ZeroDivisionError
        setup.step(batch)

    with pytest.raises(ZeroDivisionError):
        setup.repaired(tmp_path / "run", step=step)
    assert read_run(tmp_path / "run").ending.exit_code == 1


def test_an_exception_of_the_data_comes_when_training_gets_there(always, short, tmp_path):
    setup = Setup(**CASES["sgd"])

    def broken():
        for batch in setup.batches():
            if batch["i"] == 20:
                raise OSError("gone")
            yield batch

    with pytest.raises(OSError, match="gone"):
        setup.repaired(tmp_path / "run", batches=broken(), rules=always, classifier="off")
    assert [i for i, _ in setup.seen.sums] == list(range(20))


def no_memory(monkeypatch, disk):
    from diagnoser.repair import snapshot

    monkeypatch.setattr(snapshot, "free_memory", lambda device: 0)
    usage = type("Usage", (), {"free": disk})
    monkeypatch.setattr(snapshot.shutil, "disk_usage", lambda path: usage)


def test_without_memory_snapshots_go_to_disk(always, short, tmp_path, monkeypatch):
    no_memory(monkeypatch, 10**9)
    theirs = Setup(**CASES["adam scaler"]).plain()
    setup = Setup(**CASES["adam scaler"])
    diagnosis = setup.repaired(tmp_path / "run", rules=always, classifier="off")
    assert diagnosis.repairs
    assert different(setup.state(), theirs) == []
    left = list((tmp_path / "run" / "snapshots").iterdir())
    assert len(left) <= 1 + states.KEPT


def test_without_room_nothing_is_tried_and_it_is_said_once(
    always, short, tmp_path, monkeypatch, capsys
):
    no_memory(monkeypatch, 0)
    theirs = Setup(**CASES["sgd"]).plain()
    setup = Setup(**CASES["sgd"])
    diagnosis = setup.repaired(tmp_path / "run", rules=always, classifier="off", verbose=True)
    assert diagnosis.repairs == ()
    assert different(setup.state(), theirs) == []
    assert capsys.readouterr().err.count("no repair is tried: a snapshot takes") == 1


def test_a_state_that_cannot_be_held_is_a_refusal(always, short, tmp_path, capsys):
    class Locked(Seen):
        def state_dict(self):
            return {"lock": (i for i in ())}

    setup = Setup(**CASES["sgd"])
    setup.repaired(
        tmp_path / "run", rules=always, classifier="off", verbose=True, others=[Locked()]
    )
    assert "no repair is tried: its state cannot be held: TypeError" in capsys.readouterr().err
    assert len(setup.seen.sums) == setup.steps


def test_a_training_that_cannot_be_put_back_does_not_go_on(always, short, tmp_path):
    class Broken(Seen):
        def load_state_dict(self, state):
            raise RuntimeError("lost")

    setup = Setup(**CASES["sgd"])
    with pytest.raises(RuntimeError, match="lost"):
        setup.repaired(tmp_path / "run", rules=always, classifier="off", others=[Broken()])


@pytest.mark.parametrize("steps", [14, 8])
def test_short_data_make_short_trials_and_it_is_said(steps, always, short, tmp_path, capsys):
    theirs = Setup(**CASES["sgd"], steps=steps).plain()
    setup = Setup(**CASES["sgd"], steps=steps)
    diagnosis = setup.repaired(tmp_path / "run", rules=always, classifier="off", verbose=True)
    said = capsys.readouterr().err
    assert different(setup.state(), theirs) == []
    if steps < FEWEST:
        assert f"the data end, and a trial takes {FEWEST} steps" in said
        assert diagnosis.repairs == ()
    else:
        first = diagnosis.repairs[0]
        left = steps - 1 - first.step
        assert f"the data end: trials take {left} steps instead of 14" in said
        assert first.after.steps == first.twin.steps == left


def test_wrong_arguments():
    setup = Setup(**CASES["sgd"])
    with pytest.raises(UsageError, match="others=: a int has no state_dict"):
        setup.repaired(None, others=[3])
    with pytest.raises(UsageError, match="strategy"):
        setup.repaired(None, strategy="best")


# -- what helps is kept ----------------------------------------------------------------------------


class Digits:
    """The vision transformer of the benchmark, as a loop that is handed over."""

    def __init__(self, steps, **changes):
        settings = {"steps": steps, "batch_size": 32} | changes
        recipe = SUBJECTS["vit"].recipes["a"]
        self.training = Training(SUBJECTS["vit"], dataclasses.replace(recipe, **settings), seed=0)
        for moment in ("data", "model", "objective", "optimizer"):
            self.training.reach(moment)
        self.settings = self.training.settings
        (self.optimizer,) = self.training.optimizers
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(self.settings, step)
        )
        self.losses, self.norms = [], []

    def batches(self):
        supply = training_batches(self.training)
        for _ in range(self.settings.steps):
            yield [next(supply) for _ in range(self.settings.accumulation)]

    def step(self, batch):
        self.optimizer.zero_grad()
        total = 0.0
        for part in batch:
            outputs = self.training.subject.predict(self.training.model, part)
            loss = self.training.criterion(outputs, part["targets"]) / len(batch)
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(self.training.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.scheduler.step()
        self.losses.append(total)

    def repaired(self, out):
        diagnosis = diagnoser.train_with_repairs(
            self.step, self.batches(), model=self.training.model, optimizer=self.optimizer,
            others=[self.scheduler], out=out, verbose=True,
        )  # fmt: skip
        return diagnosis, read_run(out).losses.value

    def plain(self):
        for batch in self.batches():
            self.step(batch)
        return np.array(self.losses)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "actions"),
    [
        ({"left_out": ("layers.0.attention", "layers.1")}, {"register_parameters"}),
        (
            {
                "learning_rate_factors": (("layers.0.attention", 100.0),),
                "accumulation": 2,
            },
            {"scale_learning_rate"},
        ),
    ],
)
def test_what_helps_is_kept_and_all_else_stays_in_force(fault, actions, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "MOST_ROUNDS", 1)
    monkeypatch.setattr(loop, "MOST_PLANS", 3)
    steps = 110
    theirs = Digits(steps, **fault).plain()
    digits = Digits(steps, **fault)
    diagnosis, losses = digits.repaired(tmp_path / "run")
    kept = [attempt for attempt in diagnosis.repairs if attempt.kept]
    assert actions & {action.name for attempt in kept for action in attempt.actions}
    assert len(losses) == steps
    assert losses[-20:].mean() < 0.9 * theirs[-20:].mean()
    assert digits.scheduler.last_epoch == steps
    assert digits.optimizer.param_groups[0]["lr"] == pytest.approx(
        digits.settings.learning_rate * learning_rate_factor(digits.settings, steps)
    )


# -- the batches -----------------------------------------------------------------------------------


def test_batches_that_are_looked_at_come_again():
    def draws():
        for _ in range(5):
            yield torch.randn(2)

    torch.manual_seed(0)
    plain = []
    for batch in draws():
        plain.append((batch, torch.rand(1)))
    torch.manual_seed(0)
    feed, mine = Feed(draws()), []
    for batch in feed:
        mine.append((batch, torch.rand(1)))
        if len(mine) == 2:
            held = RandomStates.now()
            ahead = []
            for place in range(9):
                found = feed.ahead(place)
                if found is None:
                    break
                ahead.append(found[0].fill_(7.0))
                torch.rand(1)
            assert len(ahead) == 3
            assert feed.why_ended == "the data end"
            held.restore()
    assert same(mine, plain)


def test_memory_that_gets_short_ends_looking_ahead(monkeypatch):
    monkeypatch.setattr(replaying, "free_memory", lambda device: 100)
    feed = Feed(iter([torch.zeros(2), torch.zeros(20), torch.zeros(2), torch.zeros(2)]))
    assert [feed.ahead(i) is None for i in range(3)] == [False, False, True]
    assert feed.why_ended == "memory is too short for more batches"
    assert [batch.numel() for batch in feed] == [2, 20, 2, 2]


def test_a_copy_of_a_batch_has_tensors_of_its_own():
    class Graph:
        def __init__(self, x):
            self.x = x

        def clone(self):
            return Graph(self.x.clone())

    Pair = namedtuple("Pair", "a b")
    whole = torch.zeros(100)
    batch = [
        {"x": whole[:2], "n": 3},
        (np.zeros(2), "text", None),
        Pair(torch.zeros(1, requires_grad=True), [torch.zeros(2, dtype=torch.long)]),
        Graph(torch.zeros(3)),
    ]
    other = copied(batch)
    other[0]["x"] += 1
    other[1][0][:] = 1
    other[2].b[0] += 1
    other[3].x += 1
    assert not whole.any()
    assert not batch[1][0].any()
    assert not batch[2].b[0].any()
    assert not batch[3].x.any()
    assert other[2].a.requires_grad
    assert other[0]["x"].untyped_storage().nbytes() == 8


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: torch.Generator().manual_seed(0), lambda g: torch.rand(1, generator=g).item()),
        (lambda: random.Random(0), lambda g: g.random()),
        (lambda: np.random.default_rng(0), lambda g: g.random()),
        (lambda: np.random.RandomState(0), lambda g: g.rand()),
    ],
)
def test_a_generator_of_the_user_is_put_back(make, draw):
    generator = make()
    assert Stream.is_one(generator)
    stream = Stream(generator)
    held = copy.deepcopy(stream.state_dict())
    first = [draw(generator) for _ in range(3)]
    stream.load_state_dict(held)
    assert [draw(generator) for _ in range(3)] == first


# -- what it needs of others -----------------------------------------------------------------------


def test_a_warmup_in_force_is_counted_back(tmp_path):
    """What an earlier repair counts is of the training, too."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    live = Live({"model": model}, [optimizer])
    applied = apply(live, [Repair("add_warmup", "model", {"steps": 10})])
    optimizer.step()
    held = Snapshot.take(live, tmp_path)
    rate = groups_of_step(optimizer)[0]["lr"]
    for _ in range(3):
        optimizer.step()
    assert groups_of_step(optimizer)[0]["lr"] > rate
    held.restore()
    assert groups_of_step(optimizer)[0]["lr"] == rate
    applied.take_back()


def test_gradients_of_what_no_model_has_are_put_back(tmp_path):
    model, free = nn.Linear(2, 1), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([*model.parameters(), free], lr=torch.tensor(0.1))
    free.grad = torch.ones(2)
    held = Snapshot.take(Live({"model": model}, [optimizer]), tmp_path)
    free.grad = None
    optimizer.param_groups[0]["lr"].fill_(5.0)
    held.restore()
    assert torch.equal(free.grad, torch.ones(2))
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)


def test_a_discarded_snapshot_leaves_its_number_alone(tmp_path, monkeypatch):
    no_memory(monkeypatch, 10**9)
    live = Live({"model": nn.Linear(2, 1)}, [])
    first, second = Snapshot.take(live, tmp_path), Snapshot.take(live, tmp_path)
    first.discard()
    third = Snapshot.take(live, tmp_path)
    assert third.path != second.path


def test_a_branch_of_a_log_goes_on_by_itself(tmp_path):
    log = RunLogWriter(tmp_path / "main", "main", {})
    log.loss(0, 1.0)
    branch = log.branch(tmp_path / "branch")
    branch.loss(1, 2.0)
    log.loss(1, 3.0)
    branch.close()
    log.close()
    assert list(read_run(tmp_path / "main").losses.value) == [1.0, 3.0]
    assert list(read_run(tmp_path / "branch").losses.value) == [1.0, 2.0]
    with pytest.raises(RunLogError, match="cannot write"):
        log.branch(tmp_path / "main" / "log.jsonl")
