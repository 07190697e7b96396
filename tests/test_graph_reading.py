"""What the autograd graph of a loss shows: attention, accuracy, probabilities given to a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diagnoser.statistics import (
    AttentionStatistics,
    InputStatistics,
    cross_entropy_of,
    loss_factor,
    read_graph,
)

torch.set_num_threads(1)

LENGTH, CAUSAL = 5, torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 5, [False, False, False, True, True]])


def only(loss: Tensor) -> AttentionStatistics:
    (attention,) = read_graph(loss).attention
    return attention


def entropy_by_hand(weights: Tensor, visible: Tensor) -> float:
    """Mean over rows that see two positions or more of entropy over its maximum."""
    visible = visible.expand_as(weights).reshape(-1, weights.shape[-1])
    shares = [
        -sum(float(p) * math.log(float(p)) for p in row if p > 0) / math.log(int(seen.sum()))
        for row, seen in zip(weights.reshape(-1, weights.shape[-1]), visible, strict=True)
        if int(seen.sum()) > 1
    ]
    return sum(shares) / len(shares)


def projections() -> tuple[Tensor, Tensor, Tensor, list[nn.Linear]]:
    torch.manual_seed(0)
    x = torch.randn(2, LENGTH, 8)
    layers = [nn.Linear(8, 8) for _ in range(3)]
    q, k, v = (layer(x).view(2, LENGTH, 2, 4).transpose(1, 2) for layer in layers)
    return q, k, v, layers


def float_mask(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
def test_fused_attention(mask: str, dropout: float) -> None:
    q, k, v, layers = projections()
    hidden = {"none": torch.zeros(2, 1, 5, 5, dtype=torch.bool), "causal": CAUSAL}.get(
        mask, PADDING[:, None, None, :]
    )
    arguments = {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": ~hidden.expand(2, 1, 5, 5)},
        "float": {"attn_mask": float_mask(hidden).expand(2, 1, 5, 5)},
    }[mask]
    torch.manual_seed(0)
    found = only(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **arguments).sum())
    logits = q @ k.transpose(-2, -1) / 2.0
    weights = logits.masked_fill(hidden, -math.inf).softmax(-1).detach()
    assert found.largest_logit == pytest.approx(float(logits.detach().abs().max()), rel=1e-5)
    assert found.entropy == pytest.approx(entropy_by_hand(weights, ~hidden), rel=1e-4)
    assert found.empty_rows == 0.0
    expected = {id(p) for layer in layers[:2] for p in layer.parameters()}
    assert {id(p) for p in found.parameters} == expected


@pytest.mark.parametrize("hidden", [CAUSAL, PADDING[:, None, None, :]])
def test_hand_written_attention(hidden: Tensor) -> None:
    q, k, v, layers = projections()
    logits = q @ k.transpose(-2, -1) / 2.0
    weights = logits.masked_fill(hidden, -math.inf).softmax(-1)
    found = only(F.dropout(weights, 0.1).matmul(v).sum())
    assert found.largest_logit == pytest.approx(float(logits.detach().abs().max()), rel=1e-5)
    assert found.entropy == pytest.approx(entropy_by_hand(weights.detach(), ~hidden), rel=1e-4)
    assert {id(p) for p in found.parameters} == {
        id(p) for layer in layers[:2] for p in layer.parameters()
    }


def test_a_weight_rounded_to_zero_is_still_a_visible_position() -> None:
    q, k, v, _ = projections()
    hidden = PADDING[:, None, None, :]
    logits = 200.0 * (q @ k.transpose(-2, -1))
    weights = logits.masked_fill(hidden, -math.inf).softmax(-1)
    assert int((weights[0] == 0).sum()) > 0
    found = only((weights @ v).sum())
    assert found.entropy == pytest.approx(entropy_by_hand(weights.detach(), ~hidden), rel=1e-4)


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(need_weights: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, LENGTH, 8)
    out, _ = attention(x, x, x, need_weights=need_weights, attn_mask=CAUSAL)
    found = only(out.sum())
    _, weights = attention(x, x, x, attn_mask=CAUSAL, average_attn_weights=False)
    assert found.entropy == pytest.approx(entropy_by_hand(weights.detach(), ~CAUSAL), rel=1e-4)
    assert any(p is attention.in_proj_weight for p in found.parameters)
    assert found.largest_logit > 0


@pytest.mark.parametrize("as_vector", [True, False])
def test_additive_attention(as_vector: bool) -> None:
    torch.manual_seed(0)
    projection, context = nn.Linear(6, 4), nn.Linear(4, 1, bias=False)
    h = torch.randn(2, LENGTH, 6)
    u = torch.tanh(projection(h))
    scores = u @ context.weight[0] if as_vector else context(u).squeeze(-1)
    weights = scores.masked_fill(PADDING, -math.inf).softmax(-1)
    found = only((weights.unsqueeze(-1) * projection(h)).sum())
    assert found.entropy == pytest.approx(entropy_by_hand(weights.detach(), ~PADDING), rel=1e-4)
    assert found.largest_logit == pytest.approx(float(scores.detach().abs().max()), rel=1e-5)


def test_a_row_with_every_position_masked_is_empty_where_it_is_nan() -> None:
    q, k, v, _ = projections()
    hidden = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    hidden[0, :, 1] = True
    logits = q @ k.transpose(-2, -1)
    found = only((logits.masked_fill(hidden, -math.inf).softmax(-1) @ v).sum())
    assert found.empty_rows == pytest.approx(2 / 20)
    assert math.isfinite(found.entropy)
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden)
    assert bool(torch.isfinite(fused).all())  # the fused operation makes such rows zero
    assert only(fused.sum()).empty_rows == 0.0


def test_nan_logits_give_no_entropy_and_are_not_empty_rows() -> None:
    q, k, v, _ = projections()
    logits = q * math.nan @ k.transpose(-2, -1)
    found = only((logits.softmax(-1) @ v).sum())
    assert math.isnan(found.entropy) and found.empty_rows == 0.0
    # After the first NaN everything is; the mask alone still tells which rows are empty.
    hidden = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    hidden[0, :, 1] = True
    masked = only((logits.masked_fill(hidden, -math.inf).softmax(-1) @ v).sum())
    assert masked.empty_rows == pytest.approx(2 / 20)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["distilbert", "gpt2"])
def test_models_of_transformers(family: str, implementation: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family == "distilbert":
        config = transformers.DistilBertConfig(vocab_size=30, dim=8, n_layers=2, n_heads=2,
            hidden_dim=16, max_position_embeddings=8, attention_dropout=0.0)  # fmt: skip
        config._attn_implementation = implementation
        model = transformers.DistilBertForSequenceClassification(config)
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
        batch = {"attention_mask": mask, "labels": torch.tensor([0, 1])}
        wanted = ["q_lin.weight", "k_lin.weight"]
    else:
        config = transformers.GPT2Config(vocab_size=30, n_embd=8, n_layer=2, n_head=2,
            n_positions=8, attn_pdrop=0.0)  # fmt: skip
        config._attn_implementation = implementation
        model = transformers.GPT2LMHeadModel(config)
        batch = {"labels": torch.randint(0, 30, (2, 6))}
        wanted = ["c_attn.weight"]
    tokens = torch.randint(0, 30, (2, 6))
    reading = read_graph(model(tokens, **batch).loss)
    assert len(reading.attention) == 2
    assert reading.loss is not None
    assert reading.probabilities_into_loss is None
    names = {id(p): n for n, p in model.named_parameters()}
    for i, attention in enumerate(reading.attention):
        assert 0.9 < attention.entropy <= 1.0 + 1e-6  # small weights: nearly uniform
        assert attention.empty_rows == 0.0
        own = [names[id(p)] for p in attention.parameters]
        assert all(any(n.endswith(w) and f".{i}." in n for n in own) for w in wanted)


def test_accuracy_and_classes_of_the_loss() -> None:
    torch.manual_seed(0)
    head, x = nn.Linear(4, 3), torch.randn(20, 4)
    target = torch.randint(0, 3, (20,))
    target[:5] = -100
    scores = head(x)
    reading = read_graph(F.cross_entropy(scores, target))
    assert reading.loss is not None and reading.attention == []
    right = float((scores.argmax(1) == target)[5:].float().mean())
    assert reading.loss.accuracy == pytest.approx(right)
    assert (reading.loss.classes, reading.loss.samples) == (3, 15)
    binary = read_graph(F.binary_cross_entropy_with_logits(scores, (scores > 0).float()))
    assert binary.loss is not None and (binary.loss.accuracy, binary.loss.classes) == (1.0, 2)
    assert read_graph(scores.square().mean()).loss is None


WHOLE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "alone": (F.cross_entropy, True),
    "accumulated": (lambda s, t: F.cross_entropy(s, t) / 4, True),
    "smoothed": (lambda s, t: F.cross_entropy(s, t, label_smoothing=0.1), True),
    "with a penalty": (lambda s, t: F.cross_entropy(s, t) + 0.01 * s.square().mean(), True),
    "mean by hand": (lambda s, t: F.cross_entropy(s, t, reduction="none").mean(), True),
    "summed": (lambda s, t: F.cross_entropy(s, t, reduction="sum"), False),
    "beside a larger one": (lambda s, t: F.cross_entropy(s, t) + 50 * s.square().mean(), False),
    "three of them": (lambda s, t: sum(F.cross_entropy(s * i, t) for i in (1, 2, 3)), False),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_guessing_costs_is_known_of_a_loss_that_is_trained_as_it_is(name: str) -> None:
    loss, whole = WHOLE[name]
    torch.manual_seed(0)
    scores, target = nn.Linear(4, 3)(torch.randn(20, 4)), torch.randint(0, 3, (20,))
    reading = read_graph(loss(scores, target)).loss
    assert reading is not None and reading.is_whole == whole


LABELS = torch.tensor([0, 1, 2, 0])
TARGETS = F.one_hot(LABELS, 3).float()
LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "softmax, cross-entropy": (lambda s: F.cross_entropy(s.softmax(-1), LABELS), True),
    "sigmoid, cross-entropy": (lambda s: F.cross_entropy(s.sigmoid(), LABELS), True),
    "softmax, nll": (lambda s: F.nll_loss(s.softmax(-1), LABELS), True),
    "sigmoid, logits loss": (
        lambda s: F.binary_cross_entropy_with_logits(s.sigmoid(), TARGETS),
        True,
    ),
    "softmax reshaped": (
        lambda s: F.cross_entropy(s.view(2, 2, 3).softmax(-1).view(4, 3), LABELS),
        True,
    ),
    "logits, cross-entropy": (lambda s: F.cross_entropy(s, LABELS), False),
    "log-softmax, nll": (lambda s: F.nll_loss(s.log_softmax(-1), LABELS), False),
    "log of softmax, nll": (lambda s: F.nll_loss(s.softmax(-1).log(), LABELS), False),
    "logits loss": (lambda s: F.binary_cross_entropy_with_logits(s, TARGETS), False),
    "sigmoid, bce": (lambda s: F.binary_cross_entropy(s.sigmoid(), TARGETS), False),
}


@pytest.mark.parametrize("name", LOSSES)
def test_probabilities_into_a_loss_that_normalises_by_itself(name: str) -> None:
    loss, wrong = LOSSES[name]
    torch.manual_seed(0)
    reading = read_graph(loss(nn.Linear(4, 3)(torch.randn(4, 4))))
    assert (reading.probabilities_into_loss is not None) == wrong
    assert reading.attention == []  # the softmax of a loss weights no values


def test_reading_leaves_the_graph_alive() -> None:
    q, k, v, layers = projections()
    loss = F.scaled_dot_product_attention(q, k, v).square().mean()
    assert {id(p) for p in read_graph(loss, values=False).parameters} == {
        id(p) for layer in layers for p in layer.parameters()
    }
    read_graph(loss)
    loss.backward()
    assert all(p.grad is not None for layer in layers for p in layer.parameters())


# -- what weights multiply -------------------------------------------------------------------------


def of_parameter(loss: Tensor, parameter: Tensor) -> InputStatistics:
    (found,) = [i for i in read_graph(loss).inputs if i.parameter is parameter]
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
def test_the_input_of_a_linear_layer_is_summed_up(bias, shape):
    torch.manual_seed(0)
    hidden = nn.Linear(5, 5)(torch.randn(shape)).relu()
    layer = nn.Linear(5, 2, bias=bias)
    found = of_parameter(layer(hidden).sum(), layer.weight)

    rows = hidden.detach().reshape(-1, 5)
    cosine = F.cosine_similarity(rows[:, None], rows[None], dim=-1)
    different = cosine[~torch.eye(len(rows), dtype=torch.bool)].mean()
    assert found.scale == pytest.approx(rows.square().mean().sqrt().item(), rel=1e-6)
    assert found.similarity == pytest.approx(different.item(), abs=1e-6)
    assert found.zero_share == pytest.approx((rows == 0).float().mean().item(), abs=1e-7)


def test_the_features_of_a_convolution_are_its_channels():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 4, 4)
    layer = nn.Conv2d(3, 2, 3)
    found = of_parameter(layer(images).sum(), layer.weight)
    rows = images.movedim(1, -1).reshape(-1, 3)
    assert found.scale == pytest.approx(rows.square().mean().sqrt().item(), rel=1e-6)


def test_rows_that_all_say_the_same_are_similar_and_zero_rows_are_left_out():
    layer = nn.Linear(2, 1)
    same = torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.0, 0.0]])
    assert of_parameter(layer(same).sum(), layer.weight).similarity == pytest.approx(1.0)
    alone = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert math.isnan(of_parameter(layer(alone).sum(), layer.weight).similarity)


def test_a_weight_without_a_gradient_kept_nothing_of_its_input():
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    assert read_graph(layer(torch.ones(3, 2)).sum()).inputs == []


LOGITS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def of_scores(reading: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return reading(LOGITS.clone().requires_grad_(), LABELS)


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        lambda scores, labels: F.nll_loss(scores.log_softmax(1), labels),
        lambda scores, labels: 0.5 * F.cross_entropy(scores, labels) / torch.tensor(3.0),
        lambda scores, labels: 0.0 + F.cross_entropy(scores, labels).clone() * 2,
        lambda scores, labels: F.cross_entropy(scores, labels, label_smoothing=0.1) / 4,
        lambda scores, labels: F.cross_entropy(
            scores, labels, torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1
        ),
        lambda scores, labels: F.cross_entropy(
            scores, labels, reduction="sum", label_smoothing=0.1
        ),
        lambda scores, labels: F.cross_entropy(
            scores, labels.where(labels > 0, -100), label_smoothing=0.1
        ),
    ],
)
def test_a_cross_entropy_is_known_when_scaled_or_smoothed(loss) -> None:
    found = cross_entropy_of(of_scores(loss))
    assert found is not None
    assert torch.equal(found._saved_self, LOGITS.log_softmax(1))


@pytest.mark.parametrize(
    "loss",
    [
        lambda scores, labels: F.cross_entropy(scores, labels) + F.cross_entropy(-scores, labels),
        lambda scores, labels: F.cross_entropy(scores, labels) + 0.1 * scores.square().mean(),
        lambda scores, labels: F.cross_entropy(scores, labels) * scores.std(),
        lambda scores, labels: (F.cross_entropy(scores, labels) - 0.1).abs(),
        lambda scores, labels: F.mse_loss(scores, F.one_hot(labels, 3).float()) / 2,
        lambda scores, labels: scores.requires_grad_(False).sum(),
    ],
)
def test_what_is_more_than_a_cross_entropy_is_not_one(loss) -> None:
    assert cross_entropy_of(of_scores(loss)) is None


class Returning(nn.Module):
    """A model that returns what ``outputs`` makes of its scores and of others it does not use."""

    def __init__(self, outputs: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.used, self.unused, self.outputs = nn.Linear(3, 3), nn.Linear(3, 3), outputs

    def forward(self, x: Tensor) -> object:
        return self.outputs(self.used(x), self.unused(x))


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize(
    ("outputs", "loss"),
    [
        (lambda used, _: F.cross_entropy(used, LABELS), lambda out: out * 2),
        (lambda used, _: (F.cross_entropy(used, LABELS), used), lambda out: out[0] * 2),
        (
            lambda used, other: (None, LABELS, other, 7, F.cross_entropy(used, LABELS)),
            lambda out: out[-1] * 2,
        ),
        (
            lambda used, other: {"a": other, "b": used},
            lambda o: F.cross_entropy(o["b"], LABELS) * 2,
        ),
    ],
)
def test_a_graph_is_read_through_what_ddp_puts_behind_a_model(outputs, loss) -> None:
    model = Returning(outputs)
    root = loss(DistributedDataParallel(model, find_unused_parameters=True)(LOGITS))
    likelihood = cross_entropy_of(root)
    assert likelihood is not None
    assert torch.equal(likelihood._saved_self, model.used(LOGITS).log_softmax(1))
    assert loss_factor(root) == pytest.approx(2.0)
    reading = read_graph(root)
    assert reading.loss is not None and reading.loss.is_whole
    assert {id(p) for p in reading.parameters} == {id(p) for p in model.used.parameters()}


@pytest.mark.usefixtures("group_of_one")
def test_probabilities_are_seen_to_enter_a_loss_behind_ddp() -> None:
    model = Returning(lambda used, other: (other, used.softmax(1)))
    _, shares = DistributedDataParallel(model, find_unused_parameters=True)(LOGITS)
    assert read_graph(F.cross_entropy(shares, LABELS)).probabilities_into_loss is not None
