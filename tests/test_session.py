"""Watching in code: probe batches, schedules, what is refused, and the recording while it runs."""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diagnoser import session, watch
from diagnoser.errors import RunLogError, UsageError
from diagnoser.monitor import schedule
from diagnoser.runlog import new_run_directory, read_run

BATCHES = [torch.randn(8, 3, generator=torch.Generator().manual_seed(i)).double() for i in range(4)]


class Training:
    """A small float64 network with dropout, trained by plain gradient descent."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 1)
        ).double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.points = [self.point()]

    def point(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss_on(self.model, torch.cat(BATCHES)).backward()
        self.optimizer.step()
        self.points.append(self.point())


def loss_on(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch.sum(1, keepdim=True)).square().mean()


def quadratic_form(model: nn.Module, point: Tensor, direction: Tensor, batch: Tensor) -> float:
    """d'Hd of the loss on a batch in eval mode, by the dense Hessian."""
    names = {name: p.shape for name, p in model.named_parameters()}
    modes = model.training
    model.eval()

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in names.values()])
        values = {n: part.view(s) for (n, s), part in zip(names.items(), parts, strict=True)}
        outputs = torch.func.functional_call(model, values, (batch,))
        return (outputs - batch.sum(1, keepdim=True)).square().mean()

    hessian = torch.autograd.functional.hessian(loss, point)
    model.train(modes)
    return float(direction @ hessian @ direction)


@pytest.mark.parametrize("batches", [1, 4])
def test_curvature_on_a_probe_is_the_quadratic_form_of_its_dense_hessian(tmp_path, batches):
    training = Training()
    probe = BATCHES[0] if batches == 1 else BATCHES[:batches]
    out = tmp_path / "run"
    with watch(
        training.model, training.optimizer, loss_fn=loss_on, probe=probe, out=out, verbose=False
    ) as watched:
        for _ in range(12):
            training.step()
    assert all(module.training for module in training.model.modules())
    found = watched.log.series("update_curvature", "model")
    assert found.step.tolist() == [0, 5, 10]
    for step, value, spread in zip(found.step, found.value, found.batch_std_error, strict=True):
        before, after = training.points[step : step + 2]
        forms = [
            # along the step of 0, at the point where the schedule measures: before or after it
            [quadratic_form(training.model, at, after - before, b) for b in BATCHES[:batches]]
            for at in (before, after)
        ]
        exact = [form for form in forms if math.isclose(np.mean(form), value, rel_tol=1e-6)]
        assert exact, (step, value, forms)
        if batches == 1:
            assert math.isnan(spread)
        else:
            assert spread == pytest.approx(np.std(exact[0], ddof=1) / math.sqrt(batches))
    methods = watched.log.measurements
    curved = methods.quantity == methods.quantities.index("update_curvature")
    assert {methods.methods[i] for i in methods.method[curved]} == {"probe"}


def test_the_recording_while_it_runs_is_what_the_file_says(tmp_path):
    training = Training()
    with watch(training.model, training.optimizer, out=tmp_path / "run", verbose=False) as watched:
        for step in range(30):
            training.step()
            if step in (0, 7, 29):
                live, read = watched.log, read_run(tmp_path / "run")
                assert live.ending is None
                same(live, read)
                assert watched.diagnose().run == "run"
    same(watched.log, read_run(tmp_path / "run"))
    assert watched.log.ending.cost.steps == 30


def same(live, read) -> None:
    for name in ("run", "header", "components", "facts", "events", "ending", "damaged_lines"):
        assert getattr(live, name) == getattr(read, name), name
    for name in ("losses", "accuracies", "measured"):
        for column in ("step", "value"):
            np.testing.assert_array_equal(
                getattr(getattr(live, name), column), getattr(getattr(read, name), column)
            )
    for column in ("step", "quantity", "component", "other", "value", "std_error", "method"):
        np.testing.assert_array_equal(
            getattr(live.measurements, column), getattr(read.measurements, column)
        )


def test_every_measures_everything_at_that_distance(tmp_path):
    training = Training()
    with watch(
        training.model, training.optimizer, every=4, out=tmp_path / "run", verbose=False
    ) as watched:
        for _ in range(18):
            training.step()
    for quantity in ("update_curvature", "trace", "lambda_max", "gradient_norm"):
        steps = watched.log.series(quantity, "0").step.tolist()
        assert steps == [0, 4, 8, 12, 16], quantity
    assert watched.log.series("coupling_norm", "0", "3").step.tolist() == [0, 4, 8, 12, 16]


def test_at_measures_at_its_steps_what_each_names(tmp_path):
    training, at = Training(), {3: ("spectrum",), 9: ("interaction", "norms"), 12: ()}
    with watch(training.model, at=at, out=tmp_path / "run", verbose=False) as watched:
        for _ in range(18):
            training.step()
    log = watched.log
    assert log.series("update_curvature", "0").step.tolist() == [3, 9, 12]
    assert log.series("lambda_max", "0").step.tolist() == [3]
    assert log.series("coupling", "0", "3").step.tolist() == [9]
    assert log.series("coupling_norm", "0", "3").step.tolist() == [9]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"at": {3: ()}, "every": 4}, "exclude each other"),
        ({"at": {3: (), 4: ()}}, "takes two steps"),
        ({"at": {-1: ()}}, "the first is 0"),
        ({"at": {3: ("spectra",)}}, "spectra"),
        ({"at": {3: "spectrum"}}, "none of"),
    ],
)
def test_forced_steps_that_make_no_sense_are_refused(tmp_path, arguments, said):
    with pytest.raises(UsageError, match=said):
        watch(Training().model, out=tmp_path / "run", verbose=False, **arguments)


def test_without_arguments_model_and_optimizer_are_found(tmp_path):
    with watch(out=tmp_path / "run", verbose=False) as watched:
        training = Training()
        for _ in range(25):
            training.step()
    assert {c.name for c in watched.log.components} >= {"0", "3"}
    assert watched.diagnose().verdict == "healthy"
    assert (tmp_path / "run" / "diagnosis.json").exists()
    assert (tmp_path / "run" / "report.html").exists()


def test_several_models_are_named_by_the_caller(tmp_path):
    training, other = Training(), nn.Linear(1, 1).double()
    both = [*training.model.parameters(), *other.parameters()]
    optimizer = torch.optim.SGD(both, lr=0.01)
    models = {"body": training.model, "top": other}
    with watch(models, optimizer, out=tmp_path / "run", verbose=False) as watched:
        for _ in range(4):
            optimizer.zero_grad()
            other(training.model(BATCHES[0])).square().mean().backward()
            optimizer.step()
    assert {c.name.partition(":")[0] for c in watched.log.components} == {"body", "top"}


@pytest.mark.parametrize("overhead", [0.0, 0.001])
def test_the_guaranteed_curvature_comes_at_any_budget_and_the_log_says_so(tmp_path, overhead):
    training = Training()
    with watch(
        training.model, training.optimizer, overhead=overhead, out=tmp_path / "run", verbose=False
    ) as watched:
        for _ in range(200):
            training.step()
    assert len(watched.log.series("update_curvature", "model").step) >= 8
    (said,) = (e.message for e in watched.log.events if e.kind == "over_budget")
    cost = watched.diagnose(write=False).cost
    assert f"{cost.monitoring_s / cost.training_s:.0%} of training" in said


@pytest.mark.parametrize("clear", [True, False])
def test_curvature_beyond_the_guaranteed_waits_for_an_alarm(tmp_path, monkeypatch, clear):
    """However large the budget is. Gradients that are never cleared are one."""
    monkeypatch.setattr(schedule, "SMALL_STEP_S", 0.0)
    monkeypatch.setattr(session, "ANNOUNCING_SHARE", 100.0)  # of a training of milliseconds
    training = Training()
    if not clear:
        monkeypatch.setattr(training.optimizer, "zero_grad", lambda: None)
    with watch(
        training.model, training.optimizer, overhead=100.0, out=tmp_path / "run", verbose=False
    ) as watched:
        for _ in range(120):
            training.step()
    bought = {*watched.log.measured.step.tolist()} - {*schedule.GUARANTEED_STATISTICS}
    curved = {*watched.log.series("update_curvature", "model").step.tolist()}
    assert len(bought) >= 10
    assert bool(bought & curved) is not clear
    assert ("trace" in watched.log.measurements.quantities) is not clear
    assert watched.diagnose().verdict == ("healthy" if clear else "faulty")


@pytest.mark.parametrize(
    "arguments",
    [
        {"overhead": -0.1},
        {"overhead": math.nan},
        {"overhead": math.inf},
        {"every": 1},
        {"every": 0},
        {"loss_fn": loss_on},
        {"probe": BATCHES},
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_is_written(tmp_path, arguments):
    with pytest.raises(UsageError) as refused:
        watch(nn.Linear(1, 1), out=tmp_path / "run", **arguments)
    assert "\n" not in str(refused.value)
    assert next(iter(arguments)) in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_probe_needs_one_model(tmp_path):
    for model in (None, {"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}):
        with pytest.raises(UsageError, match="exactly one model"):
            watch(model, loss_fn=loss_on, probe=BATCHES, out=tmp_path / "run")


def test_a_second_watch_inside_is_refused_and_the_first_goes_on(tmp_path):
    training = Training()
    with watch(training.model, training.optimizer, out=tmp_path / "a", verbose=False) as first:
        training.step()
        with (
            pytest.raises(UsageError, match="watched already"),
            watch(training.model, out=tmp_path / "b", verbose=False),
        ):
            pass
        training.step()
    assert len(first.log.losses.step) == 2


def test_one_watch_after_another_is_fine(tmp_path):
    original = torch.autograd.backward
    for name in ("a", "b"):
        training = Training()
        with watch(training.model, out=tmp_path / name, verbose=False) as watched:
            training.step()
        assert len(watched.log.losses.step) == 1
        assert torch.autograd.backward is original
    with pytest.raises(RunLogError, match="recorded here already"):
        watch(out=tmp_path / "a")


def test_an_exception_in_the_loop_passes_and_what_was_measured_stays(tmp_path):
    training = Training()
    original = torch.autograd.backward
    with (
        pytest.raises(ZeroDivisionError),
        watch(training.model, training.optimizer, out=tmp_path / "run", verbose=False) as watched,
    ):
        for _ in range(25):
            training.step()
        raise ZeroDivisionError
    assert torch.autograd.backward is original
    assert len(watched.log.losses.step) == 25
    assert watched.log.ending.exit_code == 1
    assert watched.diagnose().verdict == "healthy"


def test_switched_off_nothing_is_watched_written_or_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DIAGNOSER_OFF", "1")
    monkeypatch.chdir(tmp_path)
    training, original = Training(), torch.autograd.backward
    with watch(training.model, training.optimizer) as watched:
        training.step()
        assert torch.autograd.backward is original
    diagnosis = watched.diagnose()
    assert (diagnosis.verdict, watched.directory) == ("inconclusive", None)
    assert "DIAGNOSER_OFF" in diagnosis.reason
    assert len(watched.log.losses.step) == 0
    assert list(tmp_path.iterdir()) == []


def test_new_runs_never_share_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [new_run_directory("name") for _ in range(5)]
    assert len(set(made)) == 5
    assert all(a.is_dir() and a.name < b.name for a, b in pairwise(made))


def test_where_no_directory_can_be_made_it_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "diagnoser-runs").write_text("a file")
    with pytest.raises(RunLogError, match=r"^[^\n]*diagnoser-runs[^\n]*choose another$"):
        watch(verbose=False)


def test_findings_are_said_as_they_appear_and_only_once(tmp_path, capsys):
    training = Training()
    with watch(training.model, training.optimizer, out=tmp_path / "run"):
        for _ in range(60):
            loss_on(training.model, BATCHES[0]).backward()
            training.optimizer.step()
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "gradients" in line or "program_defect" in line]
    assert out == ""
    assert len(lines) == 1 and lines[0].startswith("diagnoser: step ")


@pytest.mark.parametrize("share", [None, 0.25, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_accuracy_of_a_cross_entropy_is_recorded_as_it_was(tmp_path, share, smoothing) -> None:
    """Itself, by accumulation's share or a scale, or with smoothed labels."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    with watch(model, optimizer, out=tmp_path / "run", verbose=False) as observer:
        for _ in range(25):
            optimizer.zero_grad()
            right = 0.0
            for _ in range(2):
                x, y = torch.randn(16, 4), torch.randint(3, (16,))
                y[:5] = -100  # not counted
                scores = model(x)
                loss = nn.functional.cross_entropy(scores, y, label_smoothing=smoothing)
                (loss if share is None else loss * share).backward()
                right += float((scores.argmax(1) == y)[5:].float().mean())
            optimizer.step()
            expected.append(right / 2)
    found = observer.log.accuracies.value
    known = ~np.isnan(found)
    assert known[::4].all()  # such short steps are looked at one in four
    np.testing.assert_allclose(found[known], np.array(expected)[known], rtol=1e-6)


def test_who_patched_on_top_may_go_on_when_the_watch_is_over(tmp_path):
    training = Training()
    original = torch.autograd.backward
    try:
        for name in ("first", "second"):
            directory = tmp_path / name
            with watch(training.model, training.optimizer, out=directory, verbose=False) as watched:
                earlier = torch.autograd.backward
                torch.autograd.backward = functools.wraps(earlier)(
                    lambda *args, earlier=earlier, **more: earlier(*args, **more)
                )
                for _ in range(5):
                    training.step()
            for _ in range(5):
                training.step()  # theirs calls ours, which has nothing to say
            assert len(watched.log.losses.step) == 5
    finally:
        torch.autograd.backward = original
