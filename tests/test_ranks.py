"""Logs of several ranks as one, where they meet, and what a rank must not do by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diagnoser import ranks, watch
from diagnoser.checks.calls import Call
from diagnoser.checks.replica import Replica
from diagnoser.curvature import communicating_nodes
from diagnoser.errors import MeasurementError, UsageError
from diagnoser.monitor import Schedule
from diagnoser.monitor.shards import held, local
from diagnoser.ranks import Rank, Team
from diagnoser.runlog import RANK, SHARD, Recording, RunLogWriter, read_run
from diagnoser.types import Component, Cost, Estimate, Measurement, Part
from diagnoser.vocabulary import MODEL

COST = Cost(2, 1, 1.0, 0.1)


def logged(
    directory: Path,
    rank: int | None,
    rows: list[Measurement] = (),  # type: ignore[assignment]
    *,
    losses: tuple[float, ...] = (),
    size: int = 2,
    exit_code: int | None = 0,
) -> None:
    """Writes the log of one rank; ``exit_code`` None: it was killed."""
    log = RunLogWriter(directory, directory.name, {})
    if rank is not None:
        log.fact(0, RANK, MODEL, float(rank), {"ranks": size})
    for step, loss in enumerate(losses):
        log.loss(step, loss)
    log.measurement(0, rows, 0.1)
    if exit_code is not None:
        log.end(exit_code, COST)
    log.close()


def row(quantity: str, value: float, component: str = "layer", **more: Any) -> Measurement:
    return Measurement(0, quantity, component, Estimate(value, **more))


def both(folder: Path, first: list[Measurement], second: list[Measurement]) -> Recording:
    logged(folder, 0, first)
    logged(folder / "rank-1", 1, second)
    return read_run(folder)


def only(recording: Recording, quantity: str, component: str = "layer") -> tuple[float, ...]:
    series = recording.series(quantity, component)
    assert len(series.step) == 1
    return series.value[0], series.std_error[0], series.batch_std_error[0]


# -- logs as one -------------------------------------------------------------------------------


def test_what_ranks_see_alike_stays_to_the_last_bit(tmp_path):
    value = 0.1 + 0.2
    recording = both(tmp_path, [row("gradient_norm", value)], [row("gradient_norm", value)])
    found = only(recording, "gradient_norm")
    assert found[:2] == (value, 0.0) and math.isnan(found[2])


def test_what_they_see_otherwise_is_averaged_with_its_error(tmp_path):
    first = [row("update_curvature", 1.0, std_error=0.3), row("attention_logit", 5.0)]
    second = [row("update_curvature", 2.0, std_error=0.4), row("attention_logit", 9.0)]
    recording = both(tmp_path, first, second)
    assert only(recording, "update_curvature") == pytest.approx((1.5, 0.25, 0.5))
    assert only(recording, "attention_logit")[0] == 9.0


def test_a_quotient_is_that_of_the_means(tmp_path):
    def rank(curvature: float, descent: float) -> list[Measurement]:
        rows = [("update_curvature", curvature), ("step_descent", descent), ("overshoot", 77.0)]
        return [row(quantity, value, MODEL) for quantity, value in rows]

    recording = both(tmp_path, rank(1.0, -1.0), rank(3.0, -0.01))
    assert only(recording, "overshoot", MODEL)[0] == pytest.approx(0.5 * 2.0 / 0.505)


def test_losses_are_averaged_and_nan_stays_nan(tmp_path):
    logged(tmp_path, 0, losses=(1.0, 2.0, 3.0))
    logged(tmp_path / "rank-1", 1, losses=(3.0, math.nan))
    value = read_run(tmp_path).losses.value
    np.testing.assert_array_equal(value, [2.0, math.nan, 3.0])


def test_shards_give_what_the_whole_would_have_given(tmp_path):
    generator = np.random.default_rng(0)
    whole, update, after = generator.standard_normal((3, 10))

    def rank(here: slice) -> list[Measurement]:
        w, u, a = whole[here], update[here], after[here]
        norm = np.linalg.norm
        found = {
            "weight_norm": norm(w), "update_norm": norm(u), "gradient_norm": norm(w),
            "next_gradient_norm": norm(a), "gradient_product": w @ a,
            "weight_scale": norm(w) / math.sqrt(max(len(w), 1)),
            "zero_share": sum(w > 0) / max(len(w), 1), "non_finite_weight": float(len(w)),
        }  # fmt: skip
        rows = [row(SHARD + q, float(v), samples=len(w)) for q, v in found.items() if len(w)]
        return rows + [row(SHARD + q, 1.0, MODEL, samples=1) for q in found]

    logged(tmp_path, 0, rank(slice(0, 3)), size=3)
    logged(tmp_path / "rank-1", 1, rank(slice(3, 10)), size=3)
    logged(tmp_path / "rank-2", 2, rank(slice(10, 10)), size=3)  # it holds nothing
    recording = read_run(tmp_path)
    size = np.linalg.norm
    for quantity, expected in {
        "weight_norm": size(whole), "update_norm": size(update),
        "update_ratio": size(update) / size(whole),
        "weight_scale": size(whole) / math.sqrt(10),
        "gradient_cosine": whole @ after / size(whole) / size(after),
        "zero_share": sum(whole > 0) / 10, "non_finite_weight": 10.0,
    }.items():  # fmt: skip
        assert only(recording, quantity)[0] == pytest.approx(expected, rel=1e-12), quantity
    names = recording.measurements.quantities
    present = {names[code] for code in recording.measurements.quantity}
    assert not present & {"gradient_product", "next_gradient_norm"}
    assert not [name for name in present if name.startswith(SHARD)]


@pytest.mark.parametrize("second", ["missing", "failed", "not finite"])
def test_a_part_of_the_shards_gives_no_number(tmp_path, second):
    told = row(SHARD + "gradient_norm", 1.0, MODEL, samples=1)
    logged(tmp_path, 0, [row(SHARD + "gradient_norm", 3.0, samples=4), told])
    if second == "failed":
        logged(tmp_path / "rank-1", 1, [row("learning_rate", 1.0)])
    elif second == "not finite":
        rows = [row(SHARD + "gradient_norm", math.nan, samples=4), told]
        logged(tmp_path / "rank-1", 1, rows)
    assert not len(read_run(tmp_path).series("gradient_norm", "layer").step)


def test_who_is_missing_or_came_to_no_end_is_said(tmp_path):
    logged(tmp_path, 0, losses=(1.0, 1.0), size=4)
    logged(tmp_path / "rank-2", 2, losses=(1.0,), size=4, exit_code=None)
    messages = [event.message for event in read_run(tmp_path).events]
    assert messages == [
        "ranks 1, 3 of 4 left no log here (on another host, without a directory in common?): "
        "all that is said is of the others",
        "rank 2 came to no end; its log ends at step 0",
    ]


def test_the_first_failure_is_how_the_run_ended(tmp_path):
    logged(tmp_path, 0, exit_code=0)
    logged(tmp_path / "rank-1", 1, exit_code=3)
    ending = read_run(tmp_path).ending
    assert ending is not None and ending.exit_code == 3


def test_trainings_of_no_common_group_are_not_mixed(tmp_path):
    logged(tmp_path, None)  # the process that started them
    logged(tmp_path / "rank-0", None, losses=(1.0, 1.0))
    logged(tmp_path / "rank-1", None, losses=(5.0, 5.0))
    assert read_run(tmp_path).losses.value.tolist() == [1.0, 1.0]


def test_a_damaged_log_of_a_rank_counts_as_missing(tmp_path):
    logged(tmp_path, 0, losses=(1.0,))
    (tmp_path / "rank-1").mkdir()
    (tmp_path / "rank-1" / "log.jsonl").write_text("no log\n")
    (message,) = [event.message for event in read_run(tmp_path).events]
    assert message.startswith("rank 1 of 2 left no log here")


# -- where they meet ---------------------------------------------------------------------------


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> torch.distributed.HashStore:
    """This process is of a group of two whose other rank is elsewhere; `as_rank` says which."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(ranks, "_store", lambda: store)
    monkeypatch.setattr(ranks, "PATIENCE_S", 0.2)
    monkeypatch.setattr(Team, "_watches", 0)
    as_rank(monkeypatch, 0)
    return store


def as_rank(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(ranks, "of_group", lambda: Rank(number, 2))
    monkeypatch.setattr(Team, "_watches", 0)


class Doubled(torch.autograd.Function):
    """A function of the user's own, as those that communicate are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * gradient


def trained(steps: int = 25, *, own: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer, verbose=False, **options) as watching:
        for _ in range(steps):
            optimizer.zero_grad()
            output = model(torch.randn(8, 3))
            loss = (Doubled.apply(output) if own else output).square().mean()
            loss.backward()
            optimizer.step()
    return watching


def test_ranks_meet_in_the_directory_of_rank_0(tmp_path, monkeypatch, group):
    first = trained(out=tmp_path / "run")
    as_rank(monkeypatch, 1)
    second = trained(out=tmp_path / "elsewhere")
    assert second.directory == first.directory == tmp_path / "run"
    assert (tmp_path / "run" / "rank-1" / "log.jsonl").exists()
    assert not (tmp_path / "elsewhere").exists()
    first.diagnose()
    assert (tmp_path / "run" / "diagnosis.json").exists()
    assert second.diagnose(write=False).verdict == first.diagnose().verdict == "healthy"


def test_without_a_directory_in_common_rank_0_says_whom_it_has_not_seen(
    tmp_path, monkeypatch, group
):
    first = trained(out=tmp_path / "run")
    assert [e.message for e in first.log.events if e.kind == "ranks"][0].startswith("rank 1 of 2")
    assert first.diagnose().verdict == "healthy"
    (tmp_path / "run").rename(tmp_path / "on another host")
    as_rank(monkeypatch, 1)
    second = trained(out=tmp_path / "elsewhere")
    assert second.directory is None and not second.diagnoses
    assert [path.name for path in tmp_path.iterdir()] == ["on another host"]


def test_another_run_in_a_directory_of_the_same_name_is_left_alone(tmp_path, monkeypatch, group):
    trained(out=tmp_path / "run")
    (tmp_path / "run" / "log.jsonl").unlink()
    logged(tmp_path / "run", None)
    as_rank(monkeypatch, 1)
    assert trained(out=tmp_path / "run").directory is None
    assert not (tmp_path / "run" / "rank-1").exists()


def test_a_rank_is_neither_repaired_nor_stopped(tmp_path, monkeypatch, group):
    for options in ({"repair": "apply"}, {"stop_on": "critical"}):
        with pytest.raises(UsageError, match="one of 2 ranks"):
            trained(out=tmp_path / "run", **options)


def test_an_elastic_restart_has_a_directory_of_its_own(tmp_path, monkeypatch, group):
    trained(out=tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert trained(out=tmp_path / "run").directory == tmp_path / "run-restart-1"


# -- what a rank must not do by itself ----------------------------------------------------------


def test_ranks_measure_at_the_same_steps_whatever_time_they_take():
    def plans(seconds: float) -> list[Any]:
        schedule = Schedule(agreed=True)
        found = []
        for step in range(2000):
            schedule.steps, schedule.training_s = step, step * seconds
            plan = schedule.plan(step)
            schedule.account(plan, seconds)
            if step % 97 == 0:  # what one rank sees
                assert not schedule.ask(step)
            schedule.alarmed = step > 100 * seconds
            found.append((plan, schedule.wants_checks(step)))
        return found

    fast, slow = plans(0.001), plans(1.0)
    assert fast == slow
    late = [step for step, (plan, _) in enumerate(fast) if plan.statistics and step > 198]
    assert late and late[-1] > 1500 and any(fast[step][0].curvature for step in late)


def test_a_graph_that_may_communicate_is_not_gone_through_again(tmp_path, group):
    watching = trained(out=tmp_path / "run", own=True)
    recording = watching.log
    assert not len(recording.series("update_curvature", "model").step)
    assert len(recording.series("gradient_norm", "Linear").step) >= 3
    (message,) = [e.message for e in recording.events if e.kind == "unmeasurable"]
    assert "Doubled" in message and "no curvature" in message


def test_nodes_that_communicate_are_known():
    x = torch.ones(2, requires_grad=True)
    assert communicating_nodes((x * 2).sum()) == []
    (name,) = communicating_nodes(Doubled.apply(x).sum())
    assert name.endswith("Doubled")


class Synchronised(nn.Linear):
    """Sums something over ranks that no gradient depends on."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.detach().sum()
        torch.distributed.all_reduce(total)
        return super().forward(x)


def test_a_copy_of_a_model_that_communicates_is_not_run():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        model, x = Synchronised(2, 2), torch.ones(4, 2)
        replica = Replica(Call(model, (x,), {}, None, True, True, None))
        with pytest.raises(MeasurementError, match="communicates with other ranks"):
            replica.run()
    finally:
        torch.distributed.destroy_process_group()


@dataclass
class Mesh:
    shape: tuple[int, ...]
    at: tuple[int, ...]

    def size(self, axis: int) -> int:
        return self.shape[axis]

    def get_coordinate(self) -> tuple[int, ...]:
        return self.at


class Shard:
    def __init__(self, dim: int) -> None:
        self.dim = dim

    def is_replicate(self) -> bool:
        return False


class Replicate:
    def is_replicate(self) -> bool:
        return True


class Strided(Shard):
    pass


class Spread:
    """What is asked of a DTensor."""

    def __init__(self, whole: Tensor, mesh: Mesh, *placements: Any) -> None:
        self.shape, self.device_mesh, self.placements = whole.shape, mesh, placements
        self.whole = whole

    def to_local(self) -> Tensor:
        found = self.whole
        for axis, one in enumerate(self.placements):
            if isinstance(one, Shard):
                pieces = list(found.chunk(self.device_mesh.shape[axis], one.dim))
                pieces += [found.narrow(one.dim, 0, 0)] * self.device_mesh.shape[axis]
                found = pieces[self.device_mesh.at[axis]]
        return found


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 12])
@pytest.mark.parametrize("shape", [(3,), (2, 2)], ids=["shards", "copies of shards"])
def test_each_element_of_a_component_is_on_one_rank_and_on_no_other(rows, shape):
    whole = torch.arange(rows * 3.0).reshape(rows, 3)
    half = rows // 2
    components = [
        Component("first", "query", "", 0, (Part("fused", 0, 0, half),), half * 3),
        Component("second", "key", "", 1, (Part("fused", 0, half, rows - half),), 0),
        Component("columns", "other", "", 2, (Part("fused", 1, 1, 1),), rows),
        Component("all", "other", "", 3, (Part("fused"),), rows * 3),
    ]
    placements = (Shard(0),) if len(shape) == 1 else (Replicate(), Shard(0))
    found: dict[str, list[float]] = {component.name: [] for component in components}
    for at in np.ndindex(*shape):
        spread: Any = Spread(whole, Mesh(shape, at), *placements)
        for component in held(components, {"fused": spread}):
            for part in component.parts:
                found[component.name] += part.view(local(spread)).flatten().tolist()
    for component in components:
        (part,) = component.parts
        assert sorted(found[component.name]) == part.view(whole).flatten().tolist()


def test_what_is_spread_otherwise_is_refused():
    spread: Any = Spread(torch.zeros(4), Mesh((2,), (0,)), Strided(0))
    component = Component("layer", "other", "", 0, (Part("weight"),), 4)
    with pytest.raises(MeasurementError, match="weight: spread over ranks as"):
        held([component], {"weight": spread})


def test_of_the_older_fsdp_only_losses_are_recorded(tmp_path):
    class FullyShardedDataParallel(nn.Linear):
        pass

    model = FullyShardedDataParallel(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer, out=tmp_path / "run", verbose=False) as watching:
        for _ in range(25):
            optimizer.zero_grad()
            model(torch.randn(8, 3)).square().mean().backward()
            optimizer.step()
    assert len(watching.log.losses.step) == 25
    assert watching.diagnose().verdict == "inconclusive"
    assert "use torch.distributed.fsdp.fully_shard" in watching.log.events[0].message
