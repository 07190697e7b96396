"""Repairs of weights, state and membership do what they say, and nothing to anything else."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diagnoser.components import split_components
from diagnoser.errors import RepairError
from diagnoser.repair import ACTIONS, Live, Snapshot, apply
from diagnoser.stepping import groups_of_step
from diagnoser.types import Repair
from diagnoser.vocabulary import REPAIRS


class Block(nn.Module):
    """Fused attention, recurrence, batch and layer norm, and parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.full((1, 1, 8), 3.0))
        self.table = nn.Parameter(torch.full((8, 12), 3.0))
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.batch_norm = nn.BatchNorm1d(8)
        self.layer_norm = nn.LayerNorm(8)
        self.head = nn.Linear(12, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        states = self.gru(inputs + self.token)[0]
        states = states + self.attention(states, states, states, need_weights=False)[0]
        states = self.batch_norm(states.mT).mT
        return self.head(self.layer_norm(states).mean(1) @ self.table)


def trained(
    optimizer: str = "adamw", steps: int = 4, model: nn.Module | None = None
) -> tuple[Any, Live]:
    torch.manual_seed(0)
    model = Block() if model is None else model
    makers = {
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=0.01),
        "adagrad": lambda: torch.optim.Adagrad(
            model.parameters(), lr=0.01, initial_accumulator_value=0.5
        ),
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    }
    live = Live({"model": model}, [makers[optimizer]()])
    train(live, steps)
    return model, live


def train(live: Live, steps: int) -> None:
    for _ in range(steps):
        for optimizer in live.optimizers:
            optimizer.zero_grad()
        backward(live)
        for optimizer in live.optimizers:
            optimizer.step()


def backward(live: Live) -> None:
    for model in live.models.values():
        F.cross_entropy(model(torch.randn(4, 5, 8)), torch.tensor([0, 1, 0, 1])).backward()


def held(live: Live) -> dict[str, Tensor]:
    """All weights, buffers and averages, by name."""
    found: dict[str, Tensor] = {}
    for model in live.models.values():
        found |= {name: value.clone() for name, value in model.state_dict().items()}
        for name, parameter in model.named_parameters():
            for optimizer in live.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    found[f"{name} {key}"] = value.clone()
    return found


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {
        name
        for name in before.keys() | after.keys()
        if name not in before or name not in after or not torch.equal(before[name], after[name])
    }


def state_names(*parameters: str) -> set[str]:
    return {f"{p} {key}" for p in parameters for key in ("step", "exp_avg", "exp_avg_sq")}


# -- reinitialize --------------------------------------------------------------------------------


def reinitialize(live: Live, component: str, seed: int = 0) -> None:
    apply(live, [Repair("reinitialize", component, {"seed": seed})])


def test_of_a_fused_projection_the_rows_of_the_component_alone_are_drawn():
    model, live = trained()
    before = held(live)
    reinitialize(live, "attention.in_proj[key]", 3)
    after = held(live)
    torch.manual_seed(3)
    fresh = nn.MultiheadAttention(8, 2)
    torch.manual_seed(3)
    fresh._reset_parameters()
    names = ("attention.in_proj_weight", "attention.in_proj_bias")
    for name in names:
        for key in ("", " exp_avg", " exp_avg_sq"):
            now, then = after[name + key], before[name + key]
            assert torch.equal(now[:8], then[:8])
            assert torch.equal(now[16:], then[16:])
            expected = fresh.get_parameter(name.split(".")[1])[8:16] if not key else torch.zeros(1)
            assert torch.equal(now[8:16], expected.expand_as(now[8:16]))
            assert not torch.equal(now[8:16], then[8:16])
    assert changed(before, after) == {
        f"{n}{k}" for n in names for k in ("", " exp_avg", " exp_avg_sq")
    }
    train(live, 1)


@pytest.mark.parametrize(
    ("component", "parameters"),
    [
        ("gru", ["gru.weight_ih_l0", "gru.weight_hh_l0", "gru.bias_ih_l0", "gru.bias_hh_l0"]),
        ("head", ["head.weight", "head.bias"]),
        ("layer_norm", ["layer_norm.weight", "layer_norm.bias"]),
    ],
)
def test_a_module_is_drawn_as_its_own_code_draws_it_and_its_averages_are_forgotten(
    component, parameters
):
    model, live = trained()
    before = held(live)
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    reinitialize(live, component, 5)
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == streams[1:]
    assert changed(before, held(live)) == {*parameters, *state_names(*parameters)}
    expected = copy.deepcopy(model.get_submodule(component))
    torch.manual_seed(5)
    expected.reset_parameters()
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, model.get_submodule(component).get_parameter(name))
    train(live, 2)
    assert all(value.isfinite().all() for value in held(live).values())


def test_a_layer_norm_goes_back_to_ones_and_zeros():
    model, live = trained()
    assert not torch.equal(model.layer_norm.weight, torch.ones(8))
    reinitialize(live, "layer_norm")
    assert torch.equal(model.layer_norm.weight, torch.ones(8))
    assert torch.equal(model.layer_norm.bias, torch.zeros(8))


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, states: Tensor) -> Tensor:
        return self.weight * states / states.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("value", [1.0, 7.0])
def test_so_does_a_norm_whose_author_wrote_no_way_to_draw_it(value):
    model = nn.Sequential(RMSNorm(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.fill_(value)
    reinitialize(Live({"model": model}, []), "0")
    assert torch.equal(model[0].weight, torch.ones(8))


def test_bare_parameters_are_drawn_as_linear_layers_are():
    model, live = trained()
    before = held(live)
    reinitialize(live, "token")
    reinitialize(live, "table")
    own = {"token", "table"}
    assert changed(before, held(live)) == {*own, *state_names(*own)}
    bound = 1 / math.sqrt(12)  # a uniform draw in it has this standard deviation
    assert model.table.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.3)
    assert model.token.abs().max() < 3.0


def names_of(live: Live) -> set[str]:
    return {component.name for component in live.components}


def test_the_draw_depends_on_the_seed_and_on_nothing_else():
    drawn = []
    for seed, noise in ((1, 0), (1, 99), (2, 0)):
        model, live = trained(steps=1 + noise % 2)
        torch.manual_seed(noise)
        random.seed(noise)
        np.random.seed(noise)
        for component in ("gru", "attention", "table"):
            reinitialize(live, component, seed)
        drawn.append(held(live))
    own = [
        name
        for name in drawn[0]
        if name.startswith(("gru", "attention", "table")) and " " not in name
    ]
    assert len(own) == 9
    for name in own:
        assert torch.equal(drawn[0][name], drawn[1][name]), name
    assert not torch.equal(drawn[0]["gru.weight_hh_l0"], drawn[2]["gru.weight_hh_l0"])
    assert not torch.equal(drawn[0]["table"], drawn[2]["table"])


def test_an_author_that_draws_with_numpy_is_asked_with_the_same_seed():
    class Own(nn.Linear):
        def reset_parameters(self) -> None:
            with torch.no_grad():
                self.weight.copy_(torch.from_numpy(np.random.randn(2, 8)))
                self.bias.fill_(random.random())

    model = nn.Sequential(nn.Linear(8, 8), Own(8, 2))
    live = Live({"model": model}, [])
    results = []
    for noise in (0, 1):
        np.random.seed(noise)
        random.seed(noise)
        reinitialize(live, "1", 4)
        results.append([parameter.clone() for parameter in model[1].parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def transformer(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=50, dim=64, n_heads=2, n_layers=1, hidden_dim=64, max_position_embeddings=8
        )
        return transformers.DistilBertForSequenceClassification(config)
    if name == "bert":
        config = transformers.BertConfig(
            vocab_size=50,
            hidden_size=64,
            num_attention_heads=2,
            num_hidden_layers=1,
            intermediate_size=64,
            max_position_embeddings=8,
        )
        return transformers.BertForSequenceClassification(config)
    config = transformers.GPT2Config(vocab_size=50, n_embd=64, n_head=2, n_layer=8, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


class Around(nn.Module):
    """A module of one's own around somebody's model."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("name", "component", "weight", "std"),
    [
        (
            "distilbert",
            "distilbert.transformer.layer.0.attention.q_lin",
            "distilbert.transformer.layer.0.attention.q_lin.weight",
            0.02,
        ),
        (
            "distilbert",
            "distilbert.embeddings.word_embeddings",
            "distilbert.embeddings.word_embeddings.weight",
            0.02,
        ),
        (
            "bert",
            "bert.encoder.layer.0.attention.self.key",
            "bert.encoder.layer.0.attention.self.key.weight",
            0.02,
        ),
        ("gpt2", "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_fc.weight", 0.02),
        # "scaled by the root of the number of residual layers" (GPT-2)
        ("gpt2", "transformer.h.0.mlp.c_proj", "transformer.h.0.mlp.c_proj.weight", 0.02 / 4),
        ("gpt2", "transformer.h.0.attn.c_proj", "transformer.h.0.attn.c_proj.weight", 0.02 / 4),
    ],
)
def test_a_transformer_is_drawn_with_its_own_standard_deviation(
    name, component, weight, std, wrapped
):
    model = transformer(name)
    prefix = "encoder." if wrapped else ""
    live = Live({"model": Around(model) if wrapped else model}, [])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
            parameter._is_hf_initialized = True  # as after from_pretrained
    reinitialize(live, prefix + component)
    drawn = model.get_parameter(weight)
    assert drawn.std().item() == pytest.approx(std, rel=0.1)
    assert drawn.mean().item() == pytest.approx(0.0, abs=std / 10)
    bias = weight.replace("weight", "bias")
    own = {weight} | ({bias} if bias in dict(model.named_parameters()) else set())
    if bias in own:
        assert not model.get_parameter(bias).any()
    for other, parameter in model.named_parameters():
        assert other in own or bool((parameter == 7.0).all()), other


def test_the_key_of_a_fused_conv1d_is_drawn_alone():
    model = transformer("gpt2")
    live = Live({"model": model}, [torch.optim.Adam(model.parameters(), lr=0.01)])
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    live.optimizers[0].step()
    before = held(live)
    reinitialize(live, "transformer.h.0.attn.c_attn[key]")
    after = held(live)
    name = "transformer.h.0.attn.c_attn"
    weight, bias = after[f"{name}.weight"], after[f"{name}.bias"]
    assert weight[:, 64:128].std().item() == pytest.approx(0.02, rel=0.1)
    assert not bias[64:128].any()
    assert not after[f"{name}.weight exp_avg"][:, 64:128].any()
    for key in (f"{name}.weight", f"{name}.weight exp_avg", f"{name}.weight exp_avg_sq"):
        assert torch.equal(after[key][:, :64], before[key][:, :64])
        assert torch.equal(after[key][:, 128:], before[key][:, 128:])
        assert not torch.equal(after[key][:, 64:128], before[key][:, 64:128])
    assert all(one.startswith(name) for one in changed(before, after))


def test_a_way_to_draw_the_whole_model_is_not_mistaken_for_one_of_a_module():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def _init_weights(self, verbose: object = False) -> None:
            for parameter in self.parameters():
                parameter.data.fill_(0.5)

    model = Whole()
    before = model.body.weight.clone()
    reinitialize(Live({"model": model}, []), "head")
    assert torch.equal(model.body.weight, before)
    assert not (model.head.weight == 0.5).any()


def test_hooks_of_others_are_neither_copied_nor_called():
    class Watcher:
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("a file cannot be copied")

        def hook(self, *_: object) -> None:
            return

    model, live = trained()
    model.head.register_forward_hook(Watcher().hook)
    reinitialize(live, "head", 5)
    torch.manual_seed(5)
    assert torch.equal(model.head.weight, nn.Linear(12, 2).weight)
    assert len(model.head._forward_hooks) == 1


@pytest.mark.parametrize("action", ["reset_optimizer_state", "reinitialize"])
@pytest.mark.parametrize("component", ["head", "attention.in_proj[query]"])
def test_adagrad_goes_on_with_its_initial_sum(action, component):
    model, live = trained("adagrad")
    apply(live, [Repair(action, component)])
    state = live.optimizers[0].state
    if component == "head":
        assert torch.equal(state[model.head.weight]["sum"], torch.full((2, 12), 0.5))
    else:
        sums = state[model.attention.in_proj_weight]["sum"]
        assert bool((sums[:8] == 0.5).all())
        assert bool((sums[16:] != 0.5).any())
    train(live, 1)


def test_resetting_the_state_forgets_it_of_the_component_alone():
    _, live = trained()
    before = held(live)
    apply(live, [Repair("reset_optimizer_state", "head")])
    assert changed(before, held(live)) == state_names("head.weight", "head.bias")


# -- temper_attention ----------------------------------------------------------------------------


class Separate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.attention.add_module(name, nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)

    def logits(self, states: Tensor) -> Tensor:
        return self.attention.q_proj(states) @ self.attention.k_proj(states).mT


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 1, batch_first=True)
        nn.init.normal_(self.attention.in_proj_bias)
        self.head = nn.Linear(8, 2)

    def logits(self, states: Tensor) -> Tensor:
        q, k, _ = F.linear(
            states, self.attention.in_proj_weight, self.attention.in_proj_bias
        ).chunk(3, -1)
        return q @ k.mT


class Additive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.projection = nn.Linear(8, 6)
        self.attention.context = nn.Linear(6, 1, bias=False)
        self.head = nn.Linear(8, 2)

    def logits(self, states: Tensor) -> Tensor:
        return self.attention.context(torch.tanh(self.attention.projection(states)))


@pytest.mark.parametrize("factor", [0.25, 0.1, 3.0])
@pytest.mark.parametrize(
    ("kind", "component", "touched"),
    [
        (Separate, "attention.q_proj", "q_proj"),
        (Separate, "attention.k_proj", "k_proj"),
        (Separate, "attention", "q_proj"),
        (Separate, "model", "q_proj"),
        (Separate, "attention.out_proj", "q_proj"),
        (Fused, "attention.in_proj[query]", "in_proj"),
        (Fused, "attention.in_proj[key]", "in_proj"),
        (Fused, "attention", "in_proj"),
        (Additive, "attention.context", "context"),
        (Additive, "attention.projection", "context"),
        (Additive, "attention", "context"),
    ],
)
def test_attention_logits_are_multiplied_by_the_factor(kind, component, touched, factor):
    torch.manual_seed(0)
    model = kind().double()
    states = torch.randn(2, 5, 8, dtype=torch.float64)
    before, weights = model.logits(states), copy.deepcopy(model.state_dict())
    apply(Live({"model": model}, []), [Repair("temper_attention", component, {"factor": factor})])
    assert torch.allclose(model.logits(states), factor * before, rtol=1e-12, atol=1e-12)
    assert all(touched in name for name in changed(weights, model.state_dict()))
    if kind is Fused:
        now, then = model.attention.in_proj_weight, weights["attention.in_proj_weight"]
        start = 8 if "key" in component else 0
        same = [i for i in range(24) if not start <= i < start + 8]
        assert torch.equal(now[same], then[same])


STEPPED = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd with momentum and decay": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, weight_decay=0.1
    ),
    "adam with decay": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.02, amsgrad=True),
    "a large epsilon": lambda p: torch.optim.Adam(p, lr=0.02, eps=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("factor", [0.01, 3.0])
@pytest.mark.parametrize("made", STEPPED.values(), ids=STEPPED.keys())
def test_tempered_weights_learn_as_if_the_scale_in_the_program_had_been_changed(
    made, factor, clipped
):
    """That is: the same logits, after as many steps, and gradients of the same size all the way."""

    def trained(scale: float, *, tempered: bool) -> tuple[Tensor, list[float]]:
        torch.manual_seed(0)
        model = Separate().double()
        states, wanted = torch.randn(2, 4, 6, 8, dtype=torch.float64)
        optimizer = made(model.parameters())
        if tempered:
            live = Live({"model": model}, [optimizer])
            apply(live, [Repair("temper_attention", "attention", {"factor": factor})])
        norms = []
        for _ in range(12):
            optimizer.zero_grad()
            scores = (scale * model.logits(states)).softmax(-1)
            made_of = model.attention.out_proj(scores @ model.attention.v_proj(states))
            F.mse_loss(made_of, wanted).backward()
            most = 0.05 if clipped else math.inf
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), most).item())
            optimizer.step()
        return scale * model.logits(states).detach(), norms

    (mine, my_norms), (theirs, their_norms) = (
        trained(1.0 / factor, tempered=True), trained(1.0, tempered=False)
    )  # fmt: skip
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)
    assert my_norms == pytest.approx(their_norms, rel=1e-7)


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan])
def test_no_factor_at_all_is_refused(factor):
    with pytest.raises(RepairError, match="is no positive number"):
        apply(
            Live({"model": Separate()}, []),
            [Repair("temper_attention", "attention", {"factor": factor})],
        )


@pytest.mark.parametrize(("kind", "component"), [(Separate, "head"), (nn.Linear, "model")])
def test_where_there_is_nothing_to_temper_it_is_refused(kind, component):
    model = Separate() if kind is Separate else nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RepairError, match=f"no query or context vector in {component}"):
        apply(
            Live({"model": model}, []),
            [Repair("temper_attention", component, {"factor": 0.5})],
        )
    assert not changed(before, model.state_dict())


# -- register_parameters, unfreeze ---------------------------------------------------------------


def partly(left_out: str = "", frozen: str = "") -> tuple[nn.Sequential, Live]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(40, 8), nn.Tanh(), nn.Linear(8, 2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and name.startswith(frozen)))
    own = [p for n, p in model.named_parameters() if not (left_out and n.startswith(left_out))]
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in own if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in own if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.1,
        momentum=0.9,
    )
    return model, Live({"model": model}, [optimizer])


def test_registered_parameters_move_and_are_cleared_and_what_had_piled_up_has_no_effect():
    model, live = partly(left_out="1")
    train(live, 3)
    assert model[1].weight.grad.norm() > 0  # nobody clears it
    before = model[1].weight.clone(), model[1].bias.clone()
    apply(live, [Repair("register_parameters", "1")])
    weight, bias = live.optimizers[0].param_groups
    assert any(p is model[1].weight for p in weight["params"])
    assert any(p is model[1].bias for p in bias["params"])
    live.optimizers[0].step()
    assert torch.equal(model[1].weight, before[0])
    live.optimizers[0].zero_grad()
    backward(live)
    gradient = model[1].weight.grad.clone()
    live.optimizers[0].step()
    assert torch.allclose(model[1].weight, before[0] - 0.1 * (gradient + 0.1 * before[0]))
    assert not torch.equal(model[1].bias, before[1])
    live.optimizers[0].zero_grad()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_what_an_optimizer_has_is_not_registered_twice():
    _, live = partly()
    with pytest.raises(RepairError, match="an optimizer has all of 1"):
        apply(live, [Repair("register_parameters", "1")])


def test_without_an_optimizer_nothing_is_changed():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)).requires_grad_(False)
    for action in ("register_parameters", "unfreeze"):
        with pytest.raises(RepairError, match="there is no optimizer"):
            apply(Live({"model": model}, []), [Repair(action, "0")])
    assert not any(p.requires_grad for p in model.parameters())


def test_lbfgs_takes_no_more_parameters():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    live = Live({"model": model}, [torch.optim.LBFGS(model[1].parameters())])
    with pytest.raises(RepairError, match="LBFGS cannot take more"):
        apply(live, [Repair("register_parameters", "0")])


def test_parameters_join_an_optimizer_of_their_own_model():
    generator = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8))
    critic = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1))
    optimizers = [
        torch.optim.SGD(generator.parameters(), lr=0.1),
        torch.optim.SGD(critic[1].parameters(), lr=0.1),
    ]
    live = Live({"generator": generator, "critic": critic}, optimizers)
    apply(live, [Repair("register_parameters", "critic:0")])
    assert live.optimizer_of(critic[0].weight) is optimizers[1]
    assert len(optimizers[0].param_groups[0]["params"]) == 4


def test_names_that_an_optimizer_knows_are_kept_complete():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model[1].named_parameters(), lr=0.1)
    apply(Live({"model": model}, [optimizer]), [Repair("register_parameters", "0")])
    names = optimizer.state_dict()["param_groups"][0]["param_names"]
    assert names == ["weight", "bias", "0.weight", "0.bias"]


@pytest.mark.parametrize("left_out", ["", "1"])
def test_what_was_frozen_moves_once_it_is_unfrozen(left_out):
    model, live = partly(left_out=left_out, frozen="1")
    model[1].weight.grad = torch.full_like(model[1].weight, 1e6)  # of before it was frozen
    before = model[1].weight.clone()
    apply(live, [Repair("unfreeze", "1")])
    assert all(p.requires_grad for p in model.parameters())
    live.optimizers[0].step()
    assert torch.equal(model[1].weight, before)
    train(live, 1)
    assert not torch.equal(model[1].weight, before)
    assert torch.allclose(model[1].weight, before, atol=1.0)
    live.optimizers[0].zero_grad()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_what_is_trained_cannot_be_unfrozen():
    _, live = partly(frozen="1")
    with pytest.raises(RepairError, match="3 requires gradients already"):
        apply(live, [Repair("unfreeze", "3")])


# -- roll_back -----------------------------------------------------------------------------------


def test_rolling_back_brings_weights_averages_and_buffers_and_nothing_else():
    _, live = trained(steps=3)
    schedule = torch.optim.lr_scheduler.LambdaLR(live.optimizers[0], lambda i: 1 / (1 + i))
    live.others = [schedule]
    live.healthy = Snapshot(live, None)
    then = held(live)
    train(live, 3)
    schedule.step()
    rest = torch.get_rng_state(), schedule.state_dict(), live.optimizers[0].param_groups[0]["lr"]
    assert len(changed(then, held(live))) > 20
    apply(live, [Repair("roll_back", "model")])
    assert not changed(then, held(live))
    assert torch.equal(torch.get_rng_state(), rest[0])
    assert schedule.state_dict() == rest[1]
    assert live.optimizers[0].param_groups[0]["lr"] == rest[2] == 0.005
    train(live, 1)
    assert changed(then, held(live))


def test_rolling_back_one_component_leaves_the_others():
    _, live = trained(steps=3)
    live.healthy = Snapshot(live, None)
    then = held(live)
    train(live, 3)
    now = held(live)
    apply(live, [Repair("roll_back", "batch_norm")])
    after = held(live)
    own = {name for name in after if name.startswith("batch_norm")}
    assert {"batch_norm.running_var", "batch_norm.num_batches_tracked"} < own
    assert changed(now, after) == own
    assert not changed({n: then[n] for n in own}, {n: after[n] for n in own})


def test_rolling_back_a_part_of_a_fused_parameter_leaves_the_rest():
    _, live = trained(steps=3)
    live.healthy = Snapshot(live, None)
    then = held(live)
    train(live, 3)
    now = held(live)
    apply(live, [Repair("roll_back", "attention.in_proj[value]")])
    after = held(live)
    for name in ("in_proj_weight", "in_proj_bias", "in_proj_weight exp_avg"):
        assert torch.equal(after[f"attention.{name}"][16:], then[f"attention.{name}"][16:])
        assert torch.equal(after[f"attention.{name}"][:16], now[f"attention.{name}"][:16])
    assert all(name.startswith("attention.in_proj") for name in changed(now, after))


def test_rolling_back_brings_averages_back_that_were_forgotten_and_takes_those_that_are_new():
    _, live = trained(steps=3)
    live.healthy = Snapshot(live, None)
    then = held(live)
    apply(live, [Repair("reset_optimizer_state", "head"), Repair("roll_back", "head")])
    assert not changed(then, held(live))

    _, live = trained(steps=0)
    live.healthy = Snapshot(live, None)
    then = held(live)
    train(live, 4)
    apply(live, [Repair("roll_back", "head")])
    after = held(live)
    assert not {name for name in after if name.startswith("head") and " " in name}
    apply(live, [Repair("roll_back", "model")])
    assert not changed(then, held(live))


def test_without_a_healthy_state_there_is_nothing_to_go_back_to():
    _, live = trained(steps=1)
    with pytest.raises(RepairError, match="roll_back: no healthy state was kept before the fault"):
        apply(live, [Repair("roll_back", "model")])


# -- apply ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repair", "message"),
    [
        (Repair("explode", "head"), r"no action explode; there are scale_learning_rate, .*"),
        (Repair("zero_gradients", "model"), r"zero_gradients changes the program: .* a restart"),
        (
            Repair("scale_learning_rate", "head", {"by": 0.1}),
            "scale_learning_rate takes factor, not by",
        ),
        (Repair("scale_learning_rate", "head"), "scale_learning_rate needs factor"),
        (
            Repair("scale_learning_rate", "head", {"factor": "small"}),
            "scale_learning_rate: must be real number, not str",
        ),
        (
            Repair("change_betas", "head", {"beta3": 0.1, "beta2": 0.9}),
            "change_betas takes beta1, beta2, eps, not beta3",
        ),
        (Repair("unfreeze", "head", {"component": "gru"}), "unfreeze takes no parameters, not .*"),
        (Repair("reinitialize", "nowhere"), "no component nowhere; there are .* and more"),
    ],
)
def test_what_cannot_be_applied_is_said_in_one_line_and_changes_nothing(repair, message):
    _, live = trained(steps=1)
    before, group = held(live), live.optimizers[0].param_groups[0]
    with pytest.raises(RepairError, match=f"^{message}$") as caught:
        apply(live, [repair])
    assert "\n" not in str(caught.value)
    assert not changed(before, held(live))
    assert groups_of_step(live.optimizers[0]) == [group]


def test_every_action_is_in_the_vocabulary():
    assert set(ACTIONS) < set(REPAIRS)


def test_where_the_second_of_two_fails_the_first_is_not_in_force():
    _, live = trained(steps=1)
    factor = Repair("scale_learning_rate", "head", {"factor": 0.1})
    with pytest.raises(RepairError, match="no component nowhere"):
        apply(live, [factor, Repair("reinitialize", "nowhere")])
    assert groups_of_step(live.optimizers[0]) is live.optimizers[0].param_groups
    train(live, 1)
    assert len(live.optimizers[0].param_groups) == 1


# -- Live ----------------------------------------------------------------------------------------


def names(live: Live, name: str) -> list[str]:
    return [component.name for component in live.within(name)]


def test_a_name_stands_for_a_component_a_layer_a_prefix_or_all():
    model = nn.Sequential()
    model.add_module("blocks", nn.ModuleList([Separate(), Separate()]))
    live = Live({"net": model}, [])
    one = [f"blocks.1.attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    assert names(live, "blocks.1.attention.k_proj") == ["blocks.1.attention.k_proj"]
    assert names(live, "blocks.1.attention") == one
    assert names(live, "blocks.1") == [*one, "blocks.1.head"]
    assert len(names(live, "blocks")) == len(names(live, "model")) == 10
    elements = sum(t.numel() for t in live.tensors("model"))
    assert elements == sum(p.numel() for p in model.parameters())
    assert "blocks.1.attention" in names_of(live)


def test_a_fused_projection_stands_for_its_parts():
    live = Live({"net": Fused()}, [])
    parts = [f"attention.in_proj[{kind}]" for kind in ("query", "key", "value")]
    assert names(live, "attention.in_proj") == parts
    assert len(live.tensors("attention.in_proj")) == 2
    assert len(live.parts("attention.in_proj")) == 6


def test_a_prefix_is_one_of_whole_names():
    model = nn.Sequential()
    model.add_module("a", nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    model.add_module("ab", nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    assert names(Live({"net": model}, []), "a") == ["a.0", "a.1"]


def test_several_models_are_told_apart():
    live = Live({"generator": Separate(), "critic": nn.Sequential(nn.Linear(8, 1))}, [])
    assert names(live, "critic") == ["critic:0"]
    assert len(names(live, "generator")) == 5
    assert len(names(live, "generator:attention")) == 4
    assert len(names(live, "model")) == 6


def test_an_unknown_name_is_answered_with_some_that_exist():
    live = Live({"net": Separate()}, [])
    with pytest.raises(RepairError) as caught:
        live.within("attention.q")
    assert "no component attention.q; there are attention" in str(caught.value)
    assert "attention.k_proj" in str(caught.value)


def test_a_component_that_has_others_below_it_is_one_of_the_model():
    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.adapter = nn.Linear(8, 8)

    model = nn.Sequential()
    model.add_module("body", Adapted())
    model.add_module("head", nn.Linear(8, 2))
    live = Live({"net": model}, [])
    assert names(live, "model") == [c.name for c in split_components({"net": model})]
    assert len(live.tensors("model")) == 6


def test_parameters_that_no_module_owns_are_components_as_well():
    model, scale = nn.Linear(8, 2), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.1)
    live = Live({"net": model}, [optimizer], free={"param_groups[0][2]": scale})
    assert live.tensors("param_groups[0][2]") == [scale]
    assert len(live.tensors("model")) == 3
    apply(live, [Repair("clip_gradient", "model", {"norm": 1.0})])
    scale.grad = torch.full((3,), 10.0)
    optimizer.step()
    assert scale.grad.norm().item() == pytest.approx(1.0, rel=1e-4)
