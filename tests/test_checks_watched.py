"""Program checks through a whole watch: what is recorded, when, where, and what becomes of it."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from check_models import Classifier, batch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diagnoser.monitor import Schedule
from diagnoser.monitor.recorder import COMPILED, MOST_EVALUATIONS
from diagnoser.session import Watch, watch


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 3))


def train(out, model, steps=24, *, around=None, every=None, clip=None, schedule=None, scaler=None):
    """A loop with what is to be looked at; ``around(step, model)`` runs between steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10) if schedule else None
    with watch(model, optimizer, out=out, verbose=False, every=every) as watched:
        for step in range(steps):
            x, target = torch.randn(16, 4), torch.arange(16) % 3
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            if schedule == "before":
                scheduler.step()
            (scaler.scale(loss) if scaler else loss).backward()
            if clip == "unscaled":
                scaler.unscale_(optimizer)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 1e-4)
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            if schedule == "after":
                scheduler.step()
            if around is not None:
                around(step, model)
    return watched


def series(watched, quantity, component="model"):
    return watched.log.series(quantity, component).value.tolist()


def grave(watched):
    return {f.source for f in watched.diagnose().findings if f.severity != "low"}


def test_checks_are_made_at_their_steps_and_name_their_places(tmp_path):
    watched = train(tmp_path / "run", small())
    found = watched.log.series("sample_leak", "model")
    assert found.step.tolist() == [0, 20]
    places = {fact.name: fact.data for fact in watched.log.facts if "file" in fact.data}
    assert {"loss", "model", "backward"} <= places.keys()
    assert all(data["file"] == __file__ for data in places.values())
    reasons = {f.component: f.data["reason"] for f in watched.log.facts if f.name == "unknown"}
    assert reasons["attention_scale"] == "no attention in the model's forward"
    unknown = {entry.rule: entry.reason for entry in watched.diagnose().unknown}
    assert unknown["attention-scale-too-small"] == "no attention in the model's forward"
    assert "never measured" not in unknown["attention-scale-too-small"]


def test_a_run_without_checks_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Schedule, "wants_checks", lambda schedule, step: False)
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(tmp_path / "run") as watched:
        for _ in range(24):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
    said = [entry for entry in watched.diagnose().unknown if entry.rule == "checks"]
    assert len(said) == 1
    assert "no step was checked" in said[0].reason


# -- clipping, schedules, scalers ------------------------------------------------------------------


def test_clipping_is_noted_with_how_far_it_went(tmp_path):
    watched = train(tmp_path / "run", small(), clip="plain")
    assert min(series(watched, "clip_ratio")) > 100
    assert set(series(watched, "clipped_share")) == {1.0}
    assert set(series(watched, "clipped_scaled")) == {0.0}
    assert series(train(tmp_path / "none", small()), "clip_ratio") == []


@pytest.mark.parametrize("clip", ["plain", "unscaled"])
def test_clipping_of_scaled_gradients_is_told_from_clipping_of_unscaled_ones(clip, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    watched = train(tmp_path / "run", small(), clip=clip, scaler=scaler)
    assert set(series(watched, "clipped_scaled")) == {float(clip == "plain")}
    assert ("check:clipped-before-unscaling" in grave(watched)) == (clip == "plain")


@pytest.mark.parametrize("order", ["clip step", "step clip"])
def test_clipping_behind_the_step_is_told_from_clipping_before_it(order, tmp_path):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    acts = {
        "clip": lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        "step": optimizer.step,
    }
    with watch(model, optimizer, out=tmp_path / "run", verbose=False) as watched:
        for _ in range(24):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(16, 4)), torch.arange(16) % 3).backward()
            for act in order.split():
                acts[act]()
    assert set(series(watched, "clipped_late")) == {float(order == "step clip")}
    assert ("check:clipped-too-late" in grave(watched)) == (order == "step clip")


@pytest.mark.parametrize("order", ["zero back step", "back zero step", "zero step back"])
def test_gradients_that_are_cleared_before_the_step_are_seen(order, tmp_path):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, out=tmp_path / "run", verbose=False) as watched:
        for _ in range(24):
            loss = F.cross_entropy(model(torch.randn(16, 4)), torch.arange(16) % 3)
            acts = {"zero": optimizer.zero_grad, "back": loss.backward, "step": optimizer.step}
            for act in order.split():
                acts[act]()
    right = order == "zero back step"
    assert set(series(watched, "cleared_gradients")) == {float(not right)}
    assert ("check:gradients-cleared-too-early" in grave(watched)) == (not right)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_schedule_before_the_optimizer_is_told_from_one_behind_it(order, tmp_path):
    watched = train(tmp_path / "run", small(), schedule=order)
    assert set(series(watched, "scheduler_first")) == {float(order == "before")}
    assert ("check:schedule-before-optimizer" in grave(watched)) == (order == "before")


@pytest.mark.parametrize("length", [4, 48])
def test_a_cosine_that_is_gone_through_again_and_again_is_told_from_one_that_is_not(
    length, tmp_path
):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length)
    with watch(model, optimizer, out=tmp_path / "run", verbose=False) as watched:
        for _ in range(24):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(16, 4)), torch.arange(16) % 3).backward()
            optimizer.step()
            scheduler.step()
    assert series(watched, "schedule_length")[-1] == pytest.approx(20 / length)
    assert ("check:schedule-gone-through-again" in grave(watched)) == (length == 4)


@pytest.mark.parametrize("rate", [1e-5, 1e-1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steps_that_are_lost_in_rounding_are_counted(rate, dtype, tmp_path):
    model = small().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with watch(model, optimizer, out=tmp_path / "run", verbose=False) as watched:
        for _ in range(24):
            optimizer.zero_grad()
            x = torch.randn(16, 4, dtype=dtype)
            F.cross_entropy(model(x).float(), torch.arange(16) % 3).backward()
            optimizer.step()
    lost = series(watched, "lost_updates", "3")
    assert (lost == []) == (dtype == torch.float32)
    small_steps = dtype == torch.bfloat16 and rate < 1e-3
    assert ("check:updates-lost-in-rounding" in grave(watched)) == small_steps


class WithMasters(torch.optim.Optimizer):
    """Gradient descent on single-precision copies of what it is given."""

    def __init__(self, parameters, rate):
        super().__init__(parameters, {"lr": rate})

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            master = state.setdefault("master", parameter.detach().float().clone())
            master.sub_(parameter.grad.float(), alpha=self.param_groups[0]["lr"])
            parameter.copy_(master)


def test_steps_on_master_weights_are_not_lost(tmp_path):
    model = small().to(torch.bfloat16)
    optimizer = WithMasters(list(model.parameters()), 1e-5)
    with watch(model, optimizer, out=tmp_path / "run", verbose=False) as watched:
        for _ in range(24):
            optimizer.zero_grad()
            x = torch.randn(16, 4, dtype=torch.bfloat16)
            F.cross_entropy(model(x).float(), torch.arange(16) % 3).backward()
            optimizer.step()
    assert series(watched, "lost_updates", "3") == []
    assert "check:updates-lost-in-rounding" not in grave(watched)


# -- evaluations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mode", [True, False])
def test_evaluations_are_seen_with_their_mode(context, mode, tmp_path):
    def evaluate(step, model):
        if step % 3 == 0:
            model.train(mode)
            with context():
                model(torch.randn(5, 4))
            model.train()

    watched = train(tmp_path / "run", small(), around=evaluate)
    assert set(series(watched, "scored_in_training")) == {float(mode)}
    assert ("check:evaluated-in-train-mode" in grave(watched)) == mode


def test_what_is_called_without_gradients_on_every_step_is_no_evaluation(tmp_path):
    generator = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))

    def generate(step, model):
        with torch.no_grad():
            generator(torch.randn(5, 4))

    watched = train(tmp_path / "run", small(), around=generate)
    assert watched._monitor._checking.recorder.evaluations
    assert series(watched, "scored_in_training") == []


def test_a_few_evaluations_are_enough(tmp_path):
    @torch.no_grad()
    def evaluate(step, model):
        model(torch.randn(5, 4))

    model = small()
    watched = train(tmp_path / "run", model, around=evaluate)
    assert len(watched._monitor._checking.recorder.evaluations) <= MOST_EVALUATIONS + 1


def test_what_is_computed_without_gradients_in_a_step_is_no_evaluation(tmp_path):
    def look(step, model):
        with torch.no_grad():
            sum(p.norm() for p in model.parameters())

    assert series(train(tmp_path / "run", small(), around=look), "scored_in_training") == []


# -- what ends recording ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_recorded_once_something_is_compiled(tmp_path):
    def compiling(step, model):
        if step == 5:
            torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))

    watched = train(tmp_path / "run", small(), around=compiling)
    assert watched.log.series("sample_leak", "model").step.tolist() == [0]
    reasons = [f.data["reason"] for f in watched.log.facts if f.name == "unknown" and f.step == 20]
    assert COMPILED in reasons or not reasons


def test_the_place_of_attention_is_in_the_users_file(tmp_path):
    torch.manual_seed(0)
    model = Classifier("axis")
    optimizer = torch.optim.Adam(model.parameters())
    with watch(model, optimizer, out=tmp_path / "run", verbose=False) as watched:
        for _ in range(24):
            tokens, target = batch()
            optimizer.zero_grad()
            F.cross_entropy(model(tokens), target).backward()
            optimizer.step()
    finding = next(
        f for f in watched.diagnose().findings if f.source == "check:softmax-over-another-axis"
    )
    assert finding.where is not None
    assert finding.where.file.endswith("check_models.py")
    assert "softmax" in finding.patch
    first = watched.diagnose().causes[0]
    assert first.cause == "softmax_axis"
    assert first.because[0] == "check:softmax-over-another-axis"


def test_accumulated_steps_are_checked_on_their_first_batch(tmp_path):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, out=tmp_path / "run", verbose=False) as watched:
        for _ in range(24):
            optimizer.zero_grad()
            for size in (16, 8):
                F.cross_entropy(model(torch.randn(size, 4)), torch.arange(size) % 3).backward()
            optimizer.step()
    assert watched.log.series("sample_leak", "model").step.tolist() == [0, 20]


def test_checkpoints_that_draw_again_are_a_finding(tmp_path):
    torch.manual_seed(0)
    first, second = nn.Linear(4, 8), nn.Linear(8, 3)
    model = nn.ModuleList([first, second])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def block(x):
        return F.dropout(first(x).tanh(), 0.5)

    with warnings.catch_warnings(), watch(out=tmp_path / "run", verbose=False) as watched:
        warnings.simplefilter("ignore")
        for _ in range(24):
            x = torch.randn(16, 4)
            hidden = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            optimizer.zero_grad()
            F.cross_entropy(second(hidden), torch.arange(16) % 3).backward()
            optimizer.step()
    assert 1.0 in series(watched, "recomputed_otherwise")
    assert "check:recomputed-otherwise" in grave(watched)


def test_labels_are_looked_at_in_every_sample(tmp_path):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    classes = itertools.cycle(range(3))
    with watch(model, optimizer, out=tmp_path / "run", verbose=False) as watched:
        for _ in range(60):
            optimizer.zero_grad()
            target = torch.full((16,), next(classes))
            F.cross_entropy(model(torch.randn(16, 4)), target).backward()
            optimizer.step()
    assert series(watched, "batch_label_entropy")[-1] == 0.0
    assert "check:batches-of-one-class" in grave(watched)
