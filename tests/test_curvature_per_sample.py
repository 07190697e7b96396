"""Quadratic forms per sample, against the dense Hessian in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diagnoser.components import split_components
from diagnoser.curvature import Hessian, second_derivative_of_fused_attention
from diagnoser.curvature.per_sample import (
    Direction,
    RandomSigns,
    SampleForms,
    batch_error,
    forms_along,
    forms_of,
    signs,
)
from diagnoser.curvature.sample_rows import _Code, sample_rows
from diagnoser.types import Part
from tests.curvature_subjects import (
    TinyHAN,
    TinyTransformer,
    batch,
    build,
    dense,
    flat,
    positions,
    random_vector,
)

MODELS = {
    "fused attention": (TinyTransformer, {}),
    "attention with weights, causal": (TinyTransformer, {"need_weights": True, "causal": True}),
    "gru": (TinyHAN, {"packed": False}),
    "packed gru": (TinyHAN, {"packed": True}),
}


class TimeFirst(nn.Module):
    """(T, B, C) throughout, a shared layer applied twice, a bare gain, a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.position = nn.Parameter(torch.randn(4, 1, 4))
        self.shared = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens.T) + self.position
        x = torch.tanh(self.shared(torch.tanh(self.shared(x)))) * self.gain
        x = x + self.attention(x, x, x)[0]
        return self.head(x.mean(0))


class Images(nn.Module):
    """Convolutions, one of them in groups, over (B, 1, 4, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 2, padding=1)
        self.second = nn.Conv2d(4, 4, 2, stride=2, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.one_hot(tokens, 7).to(self.head.weight)[:, None, :, 1:4]
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).mean((2, 3)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss_on(model: nn.Module, size: int = 6) -> Tensor:
    tokens, labels = batch(0, size)
    return F.cross_entropy(model(tokens), labels)


def made(kind: str) -> nn.Module:
    if kind == "time first":
        return build(TimeFirst)
    if kind == "images":
        return build(Images)
    model, arguments = MODELS[kind]
    return build(model, **arguments)


@pytest.mark.parametrize("kind", [*MODELS, "time first", "images"])
def test_a_form_along_a_direction_is_that_of_the_dense_block(kind: str) -> None:
    model = made(kind)
    parameters = dict(model.named_parameters())
    with second_derivative_of_fused_attention():
        H = dense(loss_on(model), parameters)
    v = random_vector(parameters, 3)
    with Hessian(loss_on(model), parameters, sites=True) as hessian:
        forms = SampleForms.of(hessian, generator())
        assert forms is not None
        assert forms.samples == 6
        covered = 0
        for component in split_components({"": model}):
            if not forms.covers(component.parts, generator()):
                continue
            covered += 1
            at = positions(component.parts, parameters)
            exact = flat(v)[at] @ H[at][:, at] @ flat(v)[at]
            found = forms.forms(component.parts, Direction(component.parts, v)).sum()
            torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
    assert covered == len(split_components({"": model}))


@pytest.mark.parametrize("kind", ["fused attention", "packed gru", "images"])
def test_each_value_belongs_to_its_own_sample(kind: str) -> None:
    model = made(kind)
    parameters = dict(model.named_parameters())
    tokens, labels = batch(0, 6)
    v = random_vector(parameters, 4)
    with Hessian(loss_on(model), parameters, sites=True) as hessian:
        forms = SampleForms.of(hessian, generator())
        assert forms is not None
        components = split_components({"": model})
        found = {
            c.name: forms.forms(c.parts, Direction(c.parts, v))
            for c in components
            if forms.covers(c.parts, generator())
        }
    for n in range(6):
        alone = F.cross_entropy(model(tokens[n : n + 1]), labels[n : n + 1]) / 6
        with Hessian(alone, parameters) as hessian:
            for c in components:
                vector = hessian.flatten(c.parts, v)
                exact = vector @ hessian.block_product(c.parts, vector)
                torch.testing.assert_close(found[c.name][n], exact, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", [*MODELS, "time first", "images"])
def test_random_signs_give_the_trace_without_bias(kind: str) -> None:
    model = made(kind)
    parameters = dict(model.named_parameters())
    with second_derivative_of_fused_attention():
        H = dense(loss_on(model), parameters)
    draws = generator(5)
    with Hessian(loss_on(model), parameters, sites=True) as hessian:
        forms = SampleForms.of(hessian, draws)
        assert forms is not None
        for component in split_components({"": model}):
            if not forms.covers(component.parts, draws):
                continue
            at = positions(component.parts, parameters)
            found = torch.stack(
                [
                    forms.forms(component.parts, RandomSigns(hessian, component.parts, draws)).sum()
                    for _ in range(300)
                ]
            )
            error = float(found.std()) / math.sqrt(300)
            assert abs(float(found.mean() - H[at][:, at].trace())) < 4.5 * error + 1e-12


def test_samples_that_batch_norm_couples_are_noticed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, labels = torch.randn(6, 3).double(), torch.randint(0, 3, (6,))
    parameters = dict(model.named_parameters())
    with Hessian(F.cross_entropy(model(x), labels), parameters, sites=True) as hessian:
        forms = SampleForms.of(hessian, generator())
        if forms is not None:  # the last layer alone has separable samples
            assert not forms.covers((Part("0.weight"), Part("0.bias")), generator())
    model.eval()
    with Hessian(F.cross_entropy(model(x), labels), parameters, sites=True) as hessian:
        forms = SampleForms.of(hessian, generator())
        assert forms is not None
        assert forms.covers((Part("0.weight"), Part("0.bias")), generator())


def test_samples_that_a_contrastive_loss_couples_are_noticed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    z = F.normalize(model(torch.randn(6, 3).double()), dim=1)
    loss = F.cross_entropy(z @ z.T, torch.arange(6).roll(1))
    with Hessian(loss, dict(model.named_parameters()), sites=True) as hessian:
        assert SampleForms.of(hessian, generator()) is None


@pytest.mark.parametrize("time_first", [False, True])
def test_tokens_of_a_language_model_are_not_taken_for_samples(time_first: bool) -> None:
    torch.manual_seed(0)
    embedding, attention = nn.Embedding(7, 4), nn.MultiheadAttention(4, 2, batch_first=True)
    head = nn.Linear(4, 7)
    tokens = torch.randint(0, 7, (5, 3))
    x = embedding(tokens)
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1)
    scores = x + attention(x, x, x, attn_mask=mask, need_weights=False)[0]
    if time_first:
        scores, tokens = scores.transpose(0, 1).contiguous(), tokens.T
    loss = F.cross_entropy(head(scores).flatten(0, 1), tokens.reshape(-1))
    modules = {"embedding": embedding, "attention": attention, "head": head}
    parameters = {f"{k}.{n}": p for k, m in modules.items() for n, p in m.named_parameters()}
    with Hessian(loss, parameters, sites=True) as hessian:
        forms = SampleForms.of(hessian, generator())
        assert forms is not None
        assert forms.samples == 5
        assert forms.covers((Part("embedding.weight"),), generator())


def test_one_sample_has_no_forms() -> None:
    model = made("fused attention")
    loss = loss_on(model, 1)
    with Hessian(loss, dict(model.named_parameters()), sites=True) as hessian:
        assert SampleForms.of(hessian, generator()) is None


def test_a_parameter_used_elsewhere_as_well_is_not_covered() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    parameters = dict(model.named_parameters())
    x, labels = torch.randn(6, 3).double(), torch.randint(0, 3, (6,))
    penalty = 0.1 * (model[0].weight ** 2).sum()
    loss = F.cross_entropy(model(x), labels) + penalty
    with Hessian(loss, parameters, sites=True) as hessian:
        forms = SampleForms.of(hessian, generator())
        if forms is not None:
            assert not forms.covers((Part("0.weight"),), generator())


def test_what_a_kernel_hides_is_not_covered() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(3, 4, batch_first=True)
    head = nn.Linear(4, 3)
    loss = F.cross_entropy(head(model(torch.randn(6, 5, 3))[0].mean(1)), torch.randint(0, 3, (6,)))
    parameters = dict(model.named_parameters()) | {
        f"head.{n}": p for n, p in head.named_parameters()
    }
    with Hessian(loss, parameters, sites=True) as hessian:
        forms = SampleForms.of(hessian, generator())
        if forms is not None:
            parts = tuple(Part(n) for n, _ in model.named_parameters())
            assert not forms.covers(parts, generator())


def test_a_scaled_loss_gives_unscaled_values() -> None:
    model = made("fused attention")
    parameters = dict(model.named_parameters())
    part = (Part("feed_forward.weight"),)
    values = []
    for scale in (1.0, 1024.0):
        loss = loss_on(model) * scale
        with Hessian(loss, parameters, sites=True, scale=scale) as hessian:
            forms = SampleForms.of(hessian, generator())
            assert forms is not None
            v = random_vector(parameters, 1)
            values.append(forms.forms(part, Direction(part, v)))
    torch.testing.assert_close(values[0], values[1])


def test_signs_are_balanced_and_follow_their_generator() -> None:
    drawn = signs((1000, 67), generator(1), torch.zeros(1))
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(drawn.mean())) < 4 / math.sqrt(67_000)
    assert torch.equal(drawn, signs((1000, 67), generator(1), torch.zeros(1)))


def test_curvature_along_a_flat_vector_has_the_spread_of_its_samples() -> None:
    model = made("fused attention")
    parameters = dict(model.named_parameters())
    block = (Part("attention.in_proj_weight", 0, 4, 4), Part("attention.in_proj_bias", 0, 4, 4))
    tokens, labels = batch(0, 6)
    with Hessian(loss_on(model), parameters, sites=True) as hessian:
        forms = forms_of(hessian, generator())
        assert forms is not None
        v = torch.randn(hessian.size(block), generator=generator(2)).double()
        found = forms_along(hessian, block, v, forms)
        torch.testing.assert_close(found.sum(), v @ hessian.block_product(block, v))
    singles = []
    for n in range(6):
        alone = F.cross_entropy(model(tokens[n : n + 1]), labels[n : n + 1])
        with Hessian(alone, parameters) as hessian:
            singles.append(float(v @ hessian.block_product(block, v)))
    expected = torch.tensor(singles, dtype=torch.float64).std() / math.sqrt(6)
    assert batch_error(found) == pytest.approx(float(expected), rel=1e-6)


def test_a_second_head_that_couples_samples_is_noticed() -> None:
    torch.manual_seed(0)
    body, head, projection = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 4)
    named = {"body": body, "head": head, "projection": projection}
    parameters = {f"{k}.{n}": p for k, m in named.items() for n, p in m.named_parameters()}
    h = torch.tanh(body(torch.randn(6, 3)))
    z = F.normalize(torch.tanh(projection(h)), dim=1)
    contrast = F.cross_entropy(z @ z.T, torch.arange(6).roll(1))
    loss = F.cross_entropy(head(h), torch.randint(0, 3, (6,))) + contrast
    with Hessian(loss, parameters, sites=True) as hessian:
        forms = SampleForms.of(hessian, generator())
        block = (Part("body.weight"), Part("body.bias"))
        assert forms is None or not forms.covers(block, generator())


def test_rows_that_only_a_second_head_sees_are_not_lost() -> None:
    torch.manual_seed(0)
    body, whole, token = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 2)
    named = {"body": body, "whole": whole, "token": token}
    parameters = {f"{k}.{n}": p for k, m in named.items() for n, p in m.named_parameters()}
    h = torch.tanh(body(torch.randn(5, 4, 3)))
    loss = F.cross_entropy(whole(h[:, 0]), torch.randint(0, 3, (5,)))
    per_token = torch.tanh(token(h)).flatten(0, 1)
    loss = loss + F.cross_entropy(per_token, torch.randint(0, 2, (20,)))
    block = (Part("body.weight"), Part("body.bias"))
    vector = {n: torch.randn_like(p) for n, p in parameters.items()}
    with Hessian(loss, parameters, sites=True) as hessian:
        forms = SampleForms.of(hessian, generator())
        if forms is not None and forms.covers(block, generator()):
            v = hessian.flatten(block, vector)
            exact = v @ hessian.block_product(block, v)
            found = forms.forms(block, Direction(block, vector)).sum()
            torch.testing.assert_close(found.float(), exact, rtol=1e-4, atol=1e-6)


def test_signs_that_do_not_fit_into_memory_together_are_drawn_again_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = made("gru")
    found = []
    for limit in (1 << 24, 40):
        monkeypatch.setattr("diagnoser.curvature.sites.GROUP_ELEMENTS", limit)
        monkeypatch.setattr("diagnoser.curvature.per_sample.GROUP_ELEMENTS", limit)
        parameters = dict(model.named_parameters())
        block = tuple(Part(name) for name in parameters if name.startswith("gru."))
        with Hessian(loss_on(model), parameters, sites=True) as hessian:
            draws = RandomSigns(hessian, block, generator(7))
            name = "gru.weight_hh_l0"
            first = draws.batch(name, 0, 2)
            for other in parameters:
                if other.startswith("gru."):
                    draws.batch(other, 0, 2)
            assert torch.equal(first, draws.batch(name, 0, 2))
            held = sum(t.numel() for t in draws._drawn.values())
            assert held <= limit
            forms = SampleForms.of(hessian, generator())
            assert forms is not None
            found.append(forms.forms(block, RandomSigns(hessian, block, generator(8))).sum())
    assert all(value.isfinite() for value in found)


class Positions(nn.Module):
    """A table of positions that all samples share, looked up once and broadcast in several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.embedding = nn.Embedding(7, 4)
        self.position = nn.Embedding(5, 4)
        self.table = nn.Parameter(torch.randn(1, 4, 4))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.table
        places = torch.tensor([0, 3, 3, 1])  # one of them twice, two of them never
        if self.way == "time first":
            x = x.transpose(0, 1) + self.position(places).unsqueeze(1)
            x = x.transpose(0, 1)
        elif self.way == "expanded":
            x = x + self.position(places).unsqueeze(0).expand(len(tokens), -1, -1)
        elif self.way == "used twice":
            looked_up = self.position(places)
            x = torch.tanh(x + looked_up) * looked_up
        else:
            x = x + self.position(places if self.way == "rows" else places[None])
        return self.head(torch.tanh(self.norm(x)).mean(1))


@pytest.mark.parametrize("way", ["rows", "batch of one", "time first", "expanded"])
def test_a_table_of_positions_has_the_forms_of_every_sample(way: str) -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Positions(way).double()
    parameters = dict(model.named_parameters())
    H = dense(loss_on(model), parameters)
    v = random_vector(parameters, 3)
    tokens, labels = batch(0, 6)
    for name in ("position.weight", "table"):
        block = (Part(name),)
        at = positions(block, parameters)
        with Hessian(loss_on(model), parameters, sites=True) as hessian:
            forms = SampleForms.of(hessian, generator())
            assert forms is not None
            assert forms.covers(block, generator())
            found = forms.forms(block, Direction(block, v))
            draws = generator(5)
            rounds = torch.stack(
                [forms.forms(block, RandomSigns(hessian, block, draws)).sum() for _ in range(300)]
            )
        torch.testing.assert_close(found.sum(), flat(v)[at] @ H[at][:, at] @ flat(v)[at])
        error = float(rounds.std()) / math.sqrt(300)
        assert abs(float(rounds.mean() - H[at][:, at].trace())) < 4.5 * error
        for n in range(6):
            alone = F.cross_entropy(model(tokens[n : n + 1]), labels[n : n + 1]) / 6
            with Hessian(alone, parameters) as hessian:
                vector = hessian.flatten(block, v)
                exact = vector @ hessian.block_product(block, vector)
            torch.testing.assert_close(found[n], exact, rtol=1e-8, atol=1e-12)


def test_a_table_of_positions_that_is_used_in_two_ways_is_not_covered() -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Positions("used twice").double()
    with Hessian(loss_on(model), dict(model.named_parameters()), sites=True) as hessian:
        forms = SampleForms.of(hessian, generator())
        assert forms is not None
        assert not forms.covers((Part("position.weight"),), generator())


@pytest.mark.parametrize("size", [256, 300])
def test_small_differences_behind_a_softmax_are_recognised_in_float32(size: int) -> None:
    model = build(TinyHAN, torch.float32, packed=True)
    # Nearly equal states: gradients of scores are what is left of large numbers that cancel.
    model.projection.weight.data.mul_(1e-3)  # type: ignore[operator, union-attr]
    model.gru.weight_ih_l0.data.mul_(1e-3)  # type: ignore[operator, union-attr]
    model.gru.weight_ih_l0_reverse.data.mul_(1e-3)  # type: ignore[operator, union-attr]
    parameters = dict(model.named_parameters())
    with Hessian(loss_on(model, size), parameters, sites=True) as hessian:
        found = sample_rows(hessian.graphs[0].sites, hessian.graphs[0].at_sites, size, generator())
        assert found is not None
        sites = hessian.graphs[0].sites
    for site, rows in zip(sites, found[1], strict=True):
        assert rows is not None, site.names
        if site.names[0].startswith(("projection", "context")):
            expected = torch.arange(size).repeat_interleave(4)
            known = rows.labels >= 0
            assert torch.equal(rows.labels[known], expected[known])
            assert int(known.sum()) >= 4 * size - 2 * int((batch(0, size)[0] == 0).sum())


@pytest.mark.parametrize("exponents", [8, 128])
@pytest.mark.parametrize("samples", [2, 31, 32, 256, 257, 1000])
def test_numbers_of_samples_are_read_exactly_and_mixtures_noticed(
    samples: int, exponents: int
) -> None:
    code = _Code.of(samples, exponents, generator(1))
    bound = 2.0 ** (exponents // 2)
    assert bool((code.factors.abs() <= bound).all())
    assert bool((code.factors.abs() >= 1 / bound).all())
    once = torch.randn(2, samples, generator=generator(2)) * torch.logspace(-9, 0, samples)
    again = [once * factor.float() for factor in code.factors]
    own, fits, _ = code.read(once.double(), [each.double() for each in again])
    assert bool(fits.all())
    assert torch.equal(own, torch.arange(samples))
    other = torch.randn(2, samples, generator=generator(3)).double() * 0.05 * once.norm(dim=0)
    mixed = [a + other * factor.roll(1) for a, factor in zip(again, code.factors, strict=True)]
    _, fits, _ = code.read(once + other, mixed)
    assert not bool(fits.any())


def test_what_is_not_finite_belongs_to_no_sample() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    model[2].weight.data[0, 0] = math.inf
    loss = F.cross_entropy(model(torch.randn(6, 3)), torch.randint(0, 3, (6,)))
    with Hessian(loss, dict(model.named_parameters()), sites=True) as hessian:
        forms = SampleForms.of(hessian, generator())
        assert forms is None or not forms.covers((Part("0.weight"),), generator())
