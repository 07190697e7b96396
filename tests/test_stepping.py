"""What is adjusted of a step is exactly that, and a script never sees any of it between steps."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from diagnoser.errors import RepairError
from diagnoser.repair import Live, apply
from diagnoser.stepping import _HOOKS, _STANDING, Adjustment, adjust, groups_of_step
from diagnoser.types import Repair

STEPS = 14
FACTOR = 0.25  # a power of two, with which products are exact in any order


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"first": nn.Linear(3, 5), "second": nn.Linear(5, 5)})
        self.head = nn.Linear(5, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body["second"](self.body["first"](inputs).tanh()).tanh())


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    inputs = torch.randn(6, 3, generator=generator)
    return inputs, torch.randint(2, (6,), generator=generator)


def backward(model: nn.Module, i: int) -> Tensor:
    inputs, labels = batch(i)
    loss = F.cross_entropy(model(inputs), labels)
    loss.backward()
    return loss


def step(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> float:
    optimizer.zero_grad()
    loss = backward(model, i)
    optimizer.step()
    return loss.item()


@pytest.fixture(autouse=True)
def no_hooks():
    """Each test begins without a hook of the ones before it."""
    _STANDING.clear()
    adjust(torch.optim.SGD(net().parameters()), Adjustment(None))()
    assert not _HOOKS


def repair(model: nn.Module, optimizer: torch.optim.Optimizer, *repairs: Repair):
    return apply(Live({"model": model}, [optimizer]), repairs)


def scale(component: str, factor: float = FACTOR) -> Repair:
    return Repair("scale_learning_rate", component, {"factor": factor})


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
}


class ByHand:
    """A script that writes learning rates itself, each step anew."""

    def __init__(self, optimizer: torch.optim.Optimizer, shares: list[float]) -> None:
        self.optimizer, self.shares, self.made = optimizer, shares, 0
        self.step()

    def step(self) -> None:
        for group, share in zip(self.optimizer.param_groups, self.shares, strict=True):
            group["lr"] = 0.05 / (1 + self.made) * share
        self.made += 1


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, list[float]], Any]] = {
    "lambda": lambda o, _: lr_scheduler.LambdaLR(o, lambda i: min(1.0, (i + 1) / 8)),
    "one cycle": lambda o, shares: lr_scheduler.OneCycleLR(
        o, [0.1 * share for share in shares], total_steps=STEPS + 2
    ),
    "plateau": lambda o, _: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, eps=0.0),
    "by hand": ByHand,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_scaled_component_trains_as_one_in_a_group_of_its_own(optimizer, schedule):
    mine, theirs, untouched = net(), net(), net()
    repaired = OPTIMIZERS[optimizer](mine.parameters())
    second = list(theirs.body["second"].parameters())
    others = [p for p in theirs.parameters() if all(p is not one for one in second)]
    reference = OPTIMIZERS[optimizer](
        [{"params": others}, {"params": second, "lr": repaired.param_groups[0]["lr"] * FACTOR}]
    )
    plain = OPTIMIZERS[optimizer](untouched.parameters())
    schedules = [
        SCHEDULES[schedule](repaired, [1.0]),
        SCHEDULES[schedule](reference, [1.0, FACTOR]),
        SCHEDULES[schedule](plain, [1.0]),
    ]
    applied = repair(mine, repaired, scale("body.second"))
    own = list(repaired.param_groups)
    parameters = list(own[0]["params"])
    for i in range(STEPS):
        for model, one in ((mine, repaired), (theirs, reference), (untouched, plain)):
            step(model, one, i)
        assert [id(g) for g in repaired.param_groups] == [id(g) for g in own]
        assert all(a is b for a, b in zip(own[0]["params"], parameters, strict=True))
        without = {k: v for k, v in own[0].items() if k != "params"}
        assert without == {k: v for k, v in plain.param_groups[0].items() if k != "params"}
        for one in schedules:
            # The same metric for all: they are different trainings.
            one.step(1.0) if schedule == "plateau" else one.step()
        assert own[0]["lr"] == plain.param_groups[0]["lr"]
    assert_same(mine, theirs)
    assert not torch.equal(mine.body["second"].weight, untouched.body["second"].weight)

    saved, expected = repaired.state_dict(), plain.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    assert {k: sorted(v) for k, v in saved["state"].items()} == {
        k: sorted(v) for k, v in expected["state"].items()
    }
    plain.load_state_dict(copy.deepcopy(saved))
    untouched.load_state_dict(mine.state_dict())
    applied.take_back()
    step(mine, repaired, STEPS)
    step(untouched, plain, STEPS)
    assert_same(mine, untouched)


def test_adjustments_of_overlapping_components_compose():
    mine, theirs = net(), net()
    repaired = torch.optim.AdamW(mine.parameters(), lr=0.01)
    rates = {"body.first": 0.5 * 0.5, "body.second": 0.5 * 0.5 * 0.125, "head": 0.5}
    reference = torch.optim.AdamW(
        [
            {
                "params": list(theirs.get_submodule(name).parameters()),
                "lr": 0.01 * rate,
                "betas": (0.9, 0.5) if name == "body.second" else (0.9, 0.999),
            }
            for name, rate in rates.items()
        ]
    )
    repair(
        mine,
        repaired,
        scale("model", 0.5),
        scale("body", 0.5),
        scale("body.second", 0.125),
        Repair("change_betas", "body.second", {"beta2": 0.5}),
    )
    for i in range(STEPS):
        step(mine, repaired, i)
        step(theirs, reference, i)
    assert_same(mine, theirs)


def test_one_of_two_adjustments_taken_back_leaves_the_other():
    mine, theirs = net(), net()
    repaired = torch.optim.SGD(mine.parameters(), lr=0.1)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1 * FACTOR)
    applied = repair(mine, repaired, scale("body.second"))
    repair(mine, repaired, scale("model"))
    applied.take_back()
    for i in range(3):
        step(mine, repaired, i)
        step(theirs, reference, i)
    assert_same(mine, theirs)


class Writing(torch.optim.SGD):
    """Counts in its groups, keeps a new option there, and fails when it is told to."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["momentum"] = 0.5
        if self.fails:
            raise RuntimeError("out of memory")
        return super().step(closure)


def test_what_an_optimizer_writes_into_its_groups_is_kept():
    model = net()
    optimizer = Writing(model.parameters(), lr=0.1)
    repair(model, optimizer, scale("head"), Repair("add_warmup", "body", {"steps": 2}))
    for i in range(4):
        step(model, optimizer, i)
    (group,) = optimizer.param_groups
    assert (group["count"], group["momentum"], group["lr"]) == (4, 0.5, 0.1)


def test_a_rate_that_an_optimizer_writes_is_kept_where_none_is_adjusted():
    class Deciding(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            for group in self.param_groups:
                group["lr"] = group["lr"] / 2
            return result

    model = net()
    optimizer = Deciding(model.parameters(), lr=0.5)
    repair(model, optimizer, scale("head"))
    step(model, optimizer, 0)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_after_a_step_that_raised_the_next_one_leaves_the_groups_of_the_script():
    model, reference = net(), net()
    optimizer = Writing(model.parameters(), lr=0.1)
    plain = Writing(
        [
            {"params": list(reference.body.parameters())},
            {"params": list(reference.head.parameters()), "lr": 0.1 * FACTOR},
        ],
        lr=0.1,
    )
    (group,) = optimizer.param_groups
    repair(model, optimizer, scale("head"))
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        step(model, optimizer, 0)
    optimizer.fails = False
    plain.param_groups[0]["momentum"] = plain.param_groups[1]["momentum"] = 0.5
    for i in range(3):
        step(model, optimizer, i)
        step(reference, plain, i)
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0] is group
    assert (len(group["params"]), group["count"], group["lr"]) == (6, 4, 0.1)
    assert_same(model, reference)


def test_taken_back_after_a_step_that_raised_nothing_is_left():
    model = net()
    optimizer = Writing(model.parameters(), lr=0.1)
    (group,) = optimizer.param_groups
    applied = repair(model, optimizer, scale("head"))
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        step(model, optimizer, 0)
    applied.take_back()
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0] is group


def test_an_optimizer_that_calls_the_step_it_is_derived_from_makes_one_step():
    class Derived(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            rates.append({group["lr"] for group in self.param_groups})
            return result

    rates: list[set[float]] = []
    model = net()
    torch.optim.SGD(net().parameters(), lr=1.0)  # from here on its step calls hooks as well
    optimizer = Derived(model.parameters(), lr=0.1)
    repair(model, optimizer, Repair("add_warmup", "model", {"steps": 3}))
    for i in range(4):
        step(model, optimizer, i)
    assert rates == [{0.1 * 0.25}, {0.1 * 0.5}, {0.1 * 0.75}, {0.1}]
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_with_a_closure(line_search):
    mine, theirs = net(), net()
    repaired = torch.optim.LBFGS(mine.parameters(), lr=1.0, line_search_fn=line_search)
    reference = torch.optim.LBFGS(theirs.parameters(), lr=FACTOR, line_search_fn=line_search)
    (group,) = repaired.param_groups
    repair(mine, repaired, scale("model"))

    def closure(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            optimizer.zero_grad()
            return backward(model, 0)

        return evaluate

    for _ in range(3):
        repaired.step(closure(mine, repaired))
        reference.step(closure=closure(theirs, reference))
    assert_same(mine, theirs)
    assert repaired.param_groups == [group]


def test_a_component_of_lbfgs_cannot_have_a_rate_of_its_own():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(RepairError, match="LBFGS steps all parameters as one; give model"):
        repair(model, optimizer, scale("head"))
    repair(model, optimizer, Repair("clip_gradient", "head", {"norm": 0.1}))
    optimizer.step(lambda: backward(model, 0))
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("by_name", [False, True])
def test_a_gradient_that_a_closure_makes_is_clipped(by_name):
    mine, theirs = net(), net()
    repaired = torch.optim.SGD(mine.parameters(), lr=0.5)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.5)
    repair(mine, repaired, Repair("clip_gradient", "model", {"norm": 0.01}))
    for i in range(3):

        def closure(i: int = i) -> Tensor:
            repaired.zero_grad()
            return backward(mine, i)

        loss = repaired.step(closure=closure) if by_name else repaired.step(closure)
        reference.zero_grad()
        assert torch.allclose(loss, backward(theirs, i))
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
        reference.step()
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_with_a_gradient_scaler(fused):
    mine, theirs = net(), net()
    repaired = torch.optim.AdamW(mine.parameters(), lr=0.01, fused=fused)
    reference = torch.optim.AdamW(
        [
            {"params": list(theirs.body.parameters())},
            {"params": list(theirs.head.parameters()), "lr": 0.01 * FACTOR},
        ],
        lr=0.01,
        fused=fused,
    )
    live = [(mine, repaired), (theirs, reference)]
    clip = Repair("clip_gradient", "model", {"norm": 1e-3})
    repair(mine, repaired, scale("head"), clip)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in live]
    for i in range(6):
        for (model, optimizer), scaler in zip(live, scalers, strict=True):
            optimizer.zero_grad()
            inputs, labels = batch(i)
            spoilt = float("inf") if i == 2 else 1.0  # a step that is left out
            scaler.scale(F.cross_entropy(model(inputs), labels) * spoilt).backward()
            if model is theirs:
                scaler.unscale_(optimizer)
                if i != 2:
                    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            scaler.step(optimizer)
            scaler.update()
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)
    assert scalers[0].get_scale() == scalers[1].get_scale() < 2.0**10
    assert len(repaired.param_groups) == 1


def test_with_gradients_that_are_accumulated():
    mine, theirs = net(), net()
    repaired = torch.optim.AdamW(mine.parameters(), lr=0.01)
    reference = torch.optim.AdamW(
        [
            {"params": list(theirs.body.parameters())},
            {"params": list(theirs.head.parameters()), "lr": 0.01 * FACTOR},
        ],
        lr=0.01,
    )
    repair(mine, repaired, scale("head"), Repair("add_warmup", "model", {"steps": 3}))
    for i in range(18):
        for model, optimizer in ((mine, repaired), (theirs, reference)):
            backward(model, i)
            if i % 3 == 2:
                made = i // 3
                if model is theirs and made < 4:  # each three batches make one step of a warmup
                    for group, rate in zip(
                        optimizer.param_groups, (0.01, 0.01 * FACTOR), strict=True
                    ):
                        group["lr"] = rate * ((made + 1) / 4)
                optimizer.step()
                optimizer.zero_grad()
    assert_same(mine, theirs)


def test_an_optimizer_that_dies_leaves_nothing_behind():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    gone = weakref.ref(optimizer)
    clip = Repair("clip_gradient", "model", {"norm": 1.0})
    applied = repair(model, optimizer, scale("head"), clip)
    step(model, optimizer, 0)
    before = len(_STANDING)
    del applied, optimizer
    gc.collect()
    assert gone() is None
    assert len(_STANDING) == before - 1


def test_groups_of_step_says_what_a_step_uses():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    assert groups_of_step(optimizer) is optimizer.param_groups
    seen: list[list[dict[str, Any]]] = []
    optimizer.register_step_post_hook(lambda one, *_: seen.append(list(groups_of_step(one))))
    repair(model, optimizer, scale("head"), Repair("add_warmup", "model", {"steps": 3}))

    def rates(groups: list[dict[str, Any]]) -> dict[str, float]:
        return {
            name: group["lr"]
            for group in groups
            for name, parameter in model.named_parameters()
            if any(parameter is one for one in group["params"])
        }

    for i, share in enumerate([0.25, 0.5, 0.75, 1.0, 1.0]):
        expected = {
            name: 0.5 * share * (FACTOR if "head" in name else 1.0)
            for name, _ in model.named_parameters()
        }
        assert rates(groups_of_step(optimizer)) == expected  # before it
        step(model, optimizer, i)
        assert rates(seen[-1]) == expected  # and in it
        assert set(rates(optimizer.param_groups).values()) == {0.5}


def test_an_adjustment_may_be_taken_back_and_made_by_another_hook_of_a_step():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    rates: list[set[float]] = []
    todo: list[Callable[[], Any]] = []

    def note(one: torch.optim.Optimizer, *_: object) -> None:
        rates.append({group["lr"] for group in groups_of_step(one)})

    def decide(*_: object) -> None:
        if todo:
            made.append(todo.pop(0)())

    made: list[Any] = []
    optimizer.register_step_post_hook(note)
    handle = register_optimizer_step_post_hook(decide)  # it stands before those of a repair
    try:
        warmup = Repair("add_warmup", "model", {"steps": 3})
        applied = repair(model, optimizer, scale("model"))
        todo += [applied.take_back, lambda: repair(model, optimizer, warmup)]
        for i in range(4):
            step(model, optimizer, i)
            assert len(optimizer.param_groups) == 1
    finally:
        handle.remove()
    assert rates == [{0.125}, {0.5}, {0.125}, {0.25}]
    made[1].take_back()
    assert groups_of_step(optimizer) is optimizer.param_groups


def test_change_betas_is_a_training_that_was_built_with_them():
    mine, theirs = net(), net()
    repaired = torch.optim.AdamW(mine.parameters(), lr=0.01)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.5, 0.9))
    repair(mine, repaired, Repair("change_betas", "model", {"beta1": 0.5, "beta2": 0.9}))
    for i in range(STEPS):
        step(mine, repaired, i)
        step(theirs, reference, i)
    assert_same(mine, theirs)
    assert repaired.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("made", [torch.optim.AdamW, torch.optim.RMSprop])
def test_another_epsilon_is_a_training_that_was_built_with_it(made):
    """Also where an optimizer has an epsilon and no averaging factors of this kind."""
    mine, theirs = net(), net()
    repaired = made(mine.parameters(), lr=0.01, eps=1.0)
    reference = made(theirs.parameters(), lr=0.01, eps=1e-8)
    repair(mine, repaired, Repair("change_betas", "model", {"eps": 1e-8}))
    for i in range(STEPS):
        step(mine, repaired, i)
        step(theirs, reference, i)
    assert_same(mine, theirs)
    assert repaired.param_groups[0]["eps"] == 1.0


@pytest.mark.parametrize("optimizer", ["sgd foreach", "adamw"])
def test_a_warmup_multiplies_rates_and_ends_by_itself(optimizer):
    mine, theirs = net(), net()
    repaired = OPTIMIZERS[optimizer](mine.parameters())
    reference = OPTIMIZERS[optimizer](theirs.parameters())
    rate = reference.param_groups[0]["lr"]
    step(mine, repaired, 50)
    step(theirs, reference, 50)
    repair(mine, repaired, Repair("add_warmup", "model", {"steps": 4}))
    for i in range(8):
        step(mine, repaired, i)
        reference.param_groups[0]["lr"] = rate * ((i + 1) / 5) if i < 4 else rate
        step(theirs, reference, i)
    assert_same(mine, theirs)
    assert [group["lr"] for group in groups_of_step(repaired)] == [rate]


def test_clip_gradient_is_clip_grad_norm_right_before_the_step():
    mine, theirs = net(), net()
    repaired = torch.optim.SGD(mine.parameters(), lr=0.5)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.5)
    repair(mine, repaired, Repair("clip_gradient", "body", {"norm": 0.05}))
    clipped = 0
    for i in range(STEPS):
        reference.zero_grad()
        backward(theirs, i)
        clipped += int(nn.utils.clip_grad_norm_(theirs.body.parameters(), 0.05) > 0.05)
        reference.step()
        step(mine, repaired, i)
    assert clipped > 0
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-6)
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def test_a_gradient_below_the_norm_is_not_touched():
    mine, theirs = net(), net()
    repaired = torch.optim.SGD(mine.parameters(), lr=0.5)
    repair(mine, repaired, Repair("clip_gradient", "model", {"norm": 100.0}))
    reference = torch.optim.SGD(theirs.parameters(), lr=0.5)
    for i in range(3):
        step(mine, repaired, i)
        step(theirs, reference, i)
    assert_same(mine, theirs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_left_alone(value):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    repair(model, optimizer, Repair("clip_gradient", "model", {"norm": 1e-3}))
    backward(model, 0)
    model.head.bias.grad[0] = value
    before = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step()
    for parameter, grad in zip(model.parameters(), before, strict=True):
        assert parameter.grad.numpy().tobytes() == grad.numpy().tobytes()


def test_each_of_two_optimizers_clips_what_it_steps():
    model = net()
    optimizers = [
        torch.optim.SGD(model.body.parameters(), lr=0.1),
        torch.optim.Adam(model.head.parameters(), lr=0.1),
    ]
    apply(
        Live({"model": model}, optimizers),
        [Repair("clip_gradient", "model", {"norm": 1e-3})],
    )
    backward(model, 0)
    before = [parameter.grad.clone() for parameter in model.head.parameters()]
    optimizers[0].step()
    assert norm(model.body) == pytest.approx(1e-3, rel=1e-4)
    for parameter, grad in zip(model.head.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, grad)
    optimizers[1].step()
    assert norm(model.head) == pytest.approx(1e-3, rel=1e-4)
    assert norm(model.body) == pytest.approx(1e-3, rel=1e-4)


def norm(module: nn.Module) -> float:
    return torch.cat([p.grad.flatten() for p in module.parameters()]).norm().item()


def test_a_sparse_gradient_is_clipped_with_the_dense_ones():
    def made(sparse: bool) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 3, sparse=sparse), nn.Flatten(), nn.Linear(6, 1))

    mine, theirs = made(True), made(False)
    tokens = torch.tensor([[1, 1], [2, 1], [5, 8]])  # a row that comes several times
    repaired = torch.optim.SGD(mine.parameters(), lr=0.5)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.5)
    repair(mine, repaired, Repair("clip_gradient", "model", {"norm": 0.01}))
    for model, optimizer in ((mine, repaired), (theirs, reference)):
        (100 * model(tokens)).square().mean().backward()
        if model is theirs:
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    assert mine[0].weight.grad.is_sparse
    assert torch.allclose(mine[0].weight.grad.to_dense(), theirs[0].weight.grad, rtol=1e-3)
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other)


def test_of_a_fused_parameter_the_gradient_of_the_component_alone_is_clipped():
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2, batch_first=True)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    repair(model, optimizer, Repair("clip_gradient", "attention.in_proj[key]", {"norm": 1e-4}))
    states = torch.randn(2, 3, 4)
    model["attention"](states, states, states)[0].square().sum().backward()
    weight, bias = model["attention"].in_proj_weight, model["attention"].in_proj_bias
    before = weight.grad.clone()
    optimizer.step()
    assert torch.equal(weight.grad[:4], before[:4])
    assert torch.equal(weight.grad[8:], before[8:])
    clipped = torch.cat([weight.grad[4:8].flatten(), bias.grad[4:8]])
    assert clipped.norm().item() == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("scale_learning_rate", {"factor": 0.0}, "factor 0.0 is no positive number"),
        ("scale_learning_rate", {"factor": float("nan")}, "factor nan is no positive number"),
        ("add_warmup", {"steps": 1}, "1 steps; give 2 or more"),
        ("add_warmup", {"steps": float("inf")}, "inf steps; give 2 or more"),
        ("change_betas", {"beta2": 1.0}, "1.0 is not in"),
        ("change_betas", {"beta2": 0.9}, "SGD has no betas"),
        ("change_betas", {}, "give beta1, beta2 or both, or eps"),
        ("change_betas", {"eps": 1e-8}, "SGD has no eps"),
        ("change_betas", {"eps": 0.0}, "eps 0.0 is no positive number"),
        ("change_betas", {"eps": float("nan")}, "eps nan is no positive number"),
        ("clip_gradient", {"norm": -1.0}, "norm -1.0 is no positive number"),
    ],
)
def test_what_makes_no_sense_is_refused(name, parameters, message):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RepairError, match=message):
        repair(model, optimizer, Repair(name, "model", parameters))
    assert groups_of_step(optimizer) is optimizer.param_groups


def test_an_optimizer_without_a_rate_of_its_own_cannot_have_it_scaled():
    class Relative(torch.optim.SGD):
        """As Adafactor of transformers: lr=None says that it finds a rate itself."""

        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=1.0)
            for group in self.param_groups:
                group["lr"] = None

    model = net()
    with pytest.raises(RepairError, match="Relative has no lr"):
        repair(model, Relative(model.parameters()), scale("head"))


def test_what_no_optimizer_steps_cannot_be_adjusted():
    model = net()
    optimizer = torch.optim.SGD(model.body.parameters(), lr=0.1)
    with pytest.raises(RepairError, match="no optimizer was given its parameters"):
        repair(model, optimizer, scale("head"))
