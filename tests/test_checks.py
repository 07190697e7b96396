"""Program checks: each sees its own mistake, and nothing where there is none or it cannot know."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from check_models import (
    CLASSES,
    LENGTH,
    PADDING,
    VOCABULARY,
    WIDTH,
    Attention,
    Classifier,
    batch,
    checked,
    numbers,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diagnoser.checks import BEFORE, CHECKS, OFTEN, Call, Calls, LossCall, Seen, examine
from diagnoser.checks.replica import Replica
from diagnoser.checks.trace import _apart
from diagnoser.errors import MeasurementError
from diagnoser.features import NOTED_NAMES
from diagnoser.features.program import PROGRAM
from diagnoser.monitor.subject import Subject, _kept_by


def classified(mistake, seed=0):
    torch.manual_seed(seed)
    tokens, target = batch()
    return checked(Classifier(mistake), tokens, target=target)


# quantity, mistake, what it is with the mistake, what it is without
SEEN = [
    ("attention_other_axis", "axis", 1.0, 0.0),
    ("attention_other_axis", "heads axis", 1.0, 0.0),
    ("attention_other_axis", "batch", 1.0, 0.0),
    ("attention_after_softmax", "after", 1.0, 0.0),
    ("attention_mask_after", "mask after", 1.0, 0.0),
    ("attention_scale", "unscaled", 2.0, 1.0),
    ("attention_scale", "model", 0.5, 1.0),
    ("attention_scale", "twice", 0.5, 1.0),
    ("content_weight", "inverted", 0.0, 1.0),
    ("padded_query_hidden", "queries", 1.0, 0.0),
    ("masked_rows", "everything", 1.0, 0.0),
    ("same_query_key", "shared", 1.0, 0.0),
    ("scrambled_heads", "scrambled", 1.0, 0.0),
    ("zero_scores", "zero", 1.0, 0.0),
    ("half_scores", "half", 1.0, 0.0),
    ("norms_absent", "no norm", 1.0, 0.0),
    ("residuals_absent", "no residual", 1.0, 0.0),
    ("residual_normalised", "residual behind norm", 1.0, 0.0),
    ("tied_elsewhere", "tied", 1.0, 0.0),
    ("needless_causal", "causal", 1.0, 0.0),
]


@pytest.mark.parametrize(("quantity", "mistake", "wrong", "right"), SEEN)
def test_a_check_sees_its_own_mistake(quantity, mistake, wrong, right):
    found, twin = classified(mistake), classified("")
    assert max(numbers(found, quantity), key=lambda x: abs(x - right)) == pytest.approx(wrong)
    assert numbers(twin, quantity) == pytest.approx([right] * len(numbers(twin, quantity)))
    assert numbers(twin, quantity)


def test_attention_to_padding_is_measured_against_an_even_one():
    assert min(numbers(classified("unmasked"), "padding_weight")) > 0.7
    assert numbers(classified(""), "padding_weight") == pytest.approx([0.0, 0.0])


def test_a_mask_that_scores_have_outgrown_leaks():
    assert max(numbers(classified("weak mask"), "mask_leak")) > 0.01
    assert min(numbers(classified("weak mask"), "mask_margin")) < 2
    assert max(numbers(classified(""), "mask_leak")) == 0.0
    assert min(numbers(classified(""), "mask_margin")) > 1e6


def test_heads_that_are_the_same_are_told_from_those_that_are_not():
    assert max(numbers(classified("heads"), "head_similarity")) == pytest.approx(1.0, abs=1e-6)
    assert max(numbers(classified(""), "head_similarity")) < 0.99


class OneLeft(nn.Module):
    """A decoder that attends to what is left, until one is."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        key, value = (
            layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.key, self.value)
        )
        chosen = []
        for step in range(x.shape[1]):
            query = self.query(x[:, step]).view(len(x), 4, 1, -1)
            scores = query @ key.transpose(-2, -1) / 2.0
            gone = torch.arange(x.shape[1]) < step
            chosen.append(scores.masked_fill(gone, -math.inf).softmax(-1) @ value)
        return torch.cat(chosen, -2)


def test_heads_that_see_one_key_alone_are_not_alike():
    torch.manual_seed(0)
    model, x = OneLeft(), torch.randn(6, 5, WIDTH)
    output = model(x)
    found = checked(model, x, loss=output.square().mean(), output=output)
    assert 0 < numbers(found, "head_similarity")[0] < 0.99


def test_units_that_start_alike_are_counted_once():
    assert max(numbers(classified("alike"), "twin_units")) == pytest.approx(15 / 16)
    assert max(numbers(classified(""), "twin_units")) == 0.0
    torch.manual_seed(0)
    tokens, target = batch()
    later = checked(Classifier("alike"), tokens, target=target, step=20)
    assert "twin_units" in later.unknown


def test_queries_that_start_smaller_make_up_for_a_scale_that_is_missing():
    torch.manual_seed(0)
    tokens, target = batch()
    model = Classifier("unscaled")
    plain = numbers(checked(model, tokens, target=target), "attention_excess")
    for block in model.blocks:
        for parameter in block.attention.query.parameters():
            parameter.data.mul_(0.5)  # the root of the width of a head
    smaller = numbers(checked(model, tokens, target=target), "attention_excess")
    scaled = numbers(classified(""), "attention_excess")
    assert smaller == pytest.approx(scaled, rel=0.3)
    assert plain == pytest.approx([2 * value for value in smaller], rel=0.3)


class Deep(nn.Module):
    def __init__(self, gain, depth=5):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(depth))
        self.head = nn.Linear(8, CLASSES)
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight, gain)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("gain", [0.1, 1.0, 10.0])
def test_activations_grow_from_block_to_block_as_their_weights_do(gain):
    torch.manual_seed(0)
    x, target = torch.randn(16, 8), torch.arange(16) % CLASSES
    found = checked(Deep(gain), x, target=target)
    assert numbers(found, "activation_growth") == pytest.approx([gain**4], rel=1e-3)
    assert "activation_growth" in checked(Deep(gain), x, target=target, step=20).unknown


def test_that_there_were_no_equal_blocks_is_remembered():
    torch.manual_seed(0)
    x, target = torch.randn(16, 8), torch.arange(16) % CLASSES
    memory = {}
    for step in (0, 20):
        found = checked(Deep(1.0, depth=2), x, target=target, step=step, memory=memory)
        assert found.unknown["activation_growth"] == "no list of three equal blocks"


def test_binary_targets_that_are_no_probabilities_and_smoothing_onto_padding():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1), torch.randn(8, 4)
    output = model(x)
    for target, outside in ((torch.full((8, 1), 3.0), 1.0), (torch.rand(8, 1), 0.0)):
        loss = F.binary_cross_entropy_with_logits(output, target)
        assert numbers(checked(model, x, loss=loss, output=output), "targets_outside") == [outside]

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, VOCABULARY)

        def forward(self, tokens):
            return self.embedding(tokens).log_softmax(-1)

    tokens, _ = batch()
    for mass in (0.05, 0.0):
        model = Tagger()
        scores = model(tokens)
        target = torch.full_like(scores, 0.05).detach()
        target[..., PADDING] = mass
        loss = F.kl_div(scores, target, reduction="batchmean")
        call = LossCall("kl_div", scores, target, {}, loss, None)
        found = checked(model, tokens, loss=loss, output=scores, losses=[call])
        assert numbers(found, "smoothed_padding") == pytest.approx([mass])


def test_a_scale_that_is_learned_is_nobodys_mistake():
    assert numbers(classified("learned"), "attention_scale") == []


# -- probes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mistake", ["", "batch", "no positions", "pooled padding"])
def test_a_probe_runs_the_model_twice_at_most(mistake, monkeypatch):
    runs = []
    original = Replica.run
    monkeypatch.setattr(
        Replica, "run", lambda *args, **kwargs: (runs.append(1), original(*args, **kwargs))[1]
    )
    counted = {}

    def counting(name, check):
        def run(seen, found):
            before = len(runs)
            try:
                check.run(seen, found)
            finally:
                counted[name] = len(runs) - before

        return dataclasses.replace(check, run=run)

    changed = {name: counting(name, check) for name, check in CHECKS.items()}
    monkeypatch.setattr("diagnoser.checks.CHECKS", changed)
    classified(mistake)
    assert max(counted.values()) <= 2
    assert sum(counted.values()) <= 7  # of which one is the base, and one once a run


def test_samples_that_depend_on_each_other_leak():
    assert numbers(classified("batch mean"), "sample_leak")[0] > 0.01
    assert numbers(classified("batch"), "sample_leak")[0] > 0.001
    mixed = [r.component for r in classified("batch").rows if r.quantity == "sample_leak_begins"]
    assert mixed == ["blocks.0.attention"]
    assert numbers(classified(""), "sample_leak") == [0.0]


class TimeFirst(nn.Module):
    """Scores are (queries, keys, batch, heads), as Transformer-XL has them."""

    def __init__(self, fill):
        super().__init__()
        self.fill = fill
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        length, batch, _ = x.shape
        q, k, v = (f(x).view(length, batch, 4, -1) for f in (self.query, self.key, self.value))
        scores = torch.einsum("ibnd,jbnd->ijbn", q, k) / (WIDTH // 4) ** 0.5
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later[:, :, None, None], self.fill).softmax(dim=1)
        return torch.einsum("ijbn,jbnd->ibnd", weights, v).reshape(x.shape)


@pytest.mark.parametrize(("fill", "leaks"), [(-math.inf, False), (-1e9, False), (-2.0, True)])
def test_masks_are_read_in_the_order_of_the_weights(fill, leaks):
    torch.manual_seed(0)
    model, x = TimeFirst(fill), torch.randn(LENGTH, 3, WIDTH)
    output = model(x)
    found = checked(model, x, loss=output.square().mean(), output=output)
    [leak] = numbers(found, "mask_leak")
    assert leak > 0.01 if leaks else leak == 0.0
    assert numbers(found, "masked_rows") == [0.0]


class Where(nn.Module):
    """Masks written with the value that hides in the first place, as tensors of one value."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, padded):
        scores = self.query(x) @ self.key(x).transpose(1, 2) / WIDTH**0.5
        low = torch.full_like(scores, -(2.0**32) + 1)
        scores = torch.where(padded[:, None, :], low, scores)
        later = torch.ones(LENGTH, LENGTH).triu(1) == 1
        return torch.where(later, low, scores).softmax(-1) @ self.value(x)


def test_a_value_that_hides_is_not_taken_for_the_scores():
    torch.manual_seed(0)
    model, x = Where(), torch.randn(3, LENGTH, WIDTH)
    padded = torch.arange(LENGTH) < torch.tensor([[4], [2], [0]])  # on the left
    output = model(x, padded)
    found = checked(model, x, padded, loss=output.square().mean(), output=output)
    assert numbers(found, "mask_leak") == [0.0]
    assert numbers(found, "mask_margin")[0] > 1e6
    assert numbers(found, "attention_scale") == [pytest.approx(1.0)]


class OffByOne(nn.Module):
    """A softmax by hand with one more logit of zero: weights sum to less than one."""

    def __init__(self, extra):
        super().__init__()
        self.extra = extra
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, padded):
        scores = self.query(x) @ self.key(x).transpose(1, 2) / WIDTH**0.5
        scores = scores.masked_fill(padded[:, None, :], -1e9)
        top = scores.amax(-1, keepdim=True)
        raised = (scores - top).exp()
        total = raised.sum(-1, keepdim=True) + (-top).exp() * self.extra
        return raised / total @ self.value(x)


@pytest.mark.parametrize("extra", [0.0, 1.0])
def test_a_softmax_with_one_more_logit_is_over_no_other_axis_and_its_mask_hides(extra):
    torch.manual_seed(0)
    model, x = OffByOne(extra), torch.randn(3, LENGTH, WIDTH)
    padded = torch.arange(LENGTH) >= torch.tensor([[4], [6], [9]])
    output = model(x, padded)
    found = checked(model, x, padded, loss=output.square().mean(), output=output)
    assert (numbers(found, "attention_sum_error")[0] > 0.01) == bool(extra)
    assert numbers(found, "attention_other_axis") == [0.0]
    assert numbers(found, "mask_leak") == [0.0]
    assert numbers(found, "mask_margin")[0] > 1e6


class Sinks(nn.Module):
    """A learned logit beside the keys, whose weight is cut off: rows sum to less than one."""

    def __init__(self):
        super().__init__()
        self.sink = nn.Parameter(torch.zeros(1, 1, 1))
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        scores = self.query(x) @ self.key(x).transpose(1, 2) / WIDTH**0.5
        scores = torch.cat([scores, self.sink.expand(*scores.shape[:2], 1)], -1)
        return scores.softmax(-1)[..., :-1] @ self.value(x)


def test_an_attention_sink_is_no_other_axis():
    torch.manual_seed(0)
    model, x = Sinks(), torch.randn(3, LENGTH, WIDTH)
    output = model(x)
    found = checked(model, x, loss=output.square().mean(), output=output)
    assert numbers(found, "attention_sum_error")[0] > 0.01
    assert numbers(found, "attention_other_axis") == [0.0]


class TalkingHeads(nn.Module):
    """Heads are mixed before and behind the softmax, by a layer or a convolution."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        make = (lambda: nn.Linear(4, 4)) if how == "linear" else (lambda: nn.Conv2d(4, 4, 1))
        self.before, self.behind = make(), make()

    def mix(self, layer, x):
        if self.how == "linear":
            return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return layer(x)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 4, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / 2.0
        weights = self.mix(self.behind, self.mix(self.before, scores).softmax(-1))
        return (weights @ v).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("how", ["linear", "convolution"])
def test_heads_that_talk_are_no_softmax_over_another_axis(how):
    torch.manual_seed(0)
    model, x = nn.Sequential(TalkingHeads(how)), torch.randn(3, 6, WIDTH)
    output = model(x)
    found = checked(model, x, loss=output.square().mean(), output=output)
    assert "heads are mixed" in found.unknown["attention_other_axis"]
    assert numbers(found, "zero_scores") == [0.0]  # the product was found behind the mixture
    assert numbers(found, "scrambled_heads") == [0.0]


class BothWays(nn.Module):
    """Each of two sentences attends to the other with the same scores."""

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, a, b):
        scores = self.project(a) @ self.project(b).transpose(1, 2)
        to_b = scores.softmax(-1) @ (a if self.wrong else b)
        to_a = scores.softmax(1).transpose(1, 2) @ (b if self.wrong else a)
        return torch.cat([to_b, to_a], -1)


@pytest.mark.parametrize("wrong", [True, False])
def test_keys_are_those_that_the_softmax_is_over(wrong):
    torch.manual_seed(0)
    model, a, b = BothWays(wrong), torch.randn(4, 5, WIDTH), torch.randn(4, 5, WIDTH)
    output = model(a, b)
    found = checked(model, a, b, loss=output.square().mean(), output=output)
    assert numbers(found, "key_value_apart") == [float(wrong)]


class SharedQueryKey(nn.Module):
    """Reformer: keys are queries of length one."""

    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        query = self.query(x)
        return (query @ F.normalize(query, dim=-1).transpose(1, 2)).softmax(-1) @ self.value(x)


def test_keys_divided_by_their_norm_are_normalised():
    torch.manual_seed(0)
    model, x = SharedQueryKey(), torch.randn(4, 5, WIDTH)
    output = model(x)
    found = checked(model, x, loss=output.square().mean(), output=output)
    assert numbers(found, "attention_scale") == []
    assert numbers(found, "attention_scale_normalised") == [pytest.approx(WIDTH**0.5)]


class Pairs(nn.Module):
    """A contrastive model, or one whose output has time first and as many steps as samples."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.layer(x)
        if self.how == "contrast":
            return y.mean(1) @ y.mean(1).t()
        return y.transpose(0, 1)


@pytest.mark.parametrize(
    ("how", "reason"), [("contrast", "compares each sample"), ("time", "the second axis")]
)
def test_samples_that_are_compared_or_lie_along_another_axis_do_not_leak(how, reason):
    torch.manual_seed(0)
    model, x = Pairs(how), torch.randn(6, 6, WIDTH)
    output = model(x)
    found = checked(model, x, loss=output.square().mean(), output=output)
    assert reason in found.unknown["sample_leak"]
    assert numbers(found, "sample_leak_begins") == []


class Reversible(nn.Module):
    """RevIN: every series is normalised within the model."""

    def __init__(self, normalises):
        super().__init__()
        self.normalises = normalises
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        if self.normalises:
            series = x.unsqueeze(-1).squeeze(-1)
            x = (x - series.mean(1, keepdim=True)) / series.std(1, keepdim=True)
        return self.layer(x)


@pytest.mark.parametrize("normalises", [True, False])
def test_how_large_inputs_are_does_not_matter_where_the_model_normalises_them(normalises):
    torch.manual_seed(0)
    model, x = Reversible(normalises), 1e5 * torch.randn(6, 8).abs() + 1e6
    output = model(x)
    found = checked(model, x, loss=output.square().mean(), output=output)
    assert bool(numbers(found, "weighed_input_largest")) == (not normalises)


def test_one_block_in_two_places_is_shared_on_purpose():
    assert set(numbers(classified("one block"), "tied_elsewhere")) == {0.0}


class Graph(nn.Module):
    """Attention between the nodes of one graph, where there is an edge."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, nodes, edges):
        scores = self.query(nodes) @ self.key(nodes).t() / WIDTH**0.5
        weights = scores.masked_fill(edges == 0, -9e15).softmax(-1)
        return self.head(weights @ self.value(nodes))


def test_members_of_one_set_are_no_samples_that_leak():
    torch.manual_seed(0)
    nodes, edges = torch.randn(12, WIDTH), (torch.rand(12, 12) < 0.5).float() + torch.eye(12)
    found = checked(Graph(), nodes, edges, target=torch.arange(12) % CLASSES)
    reason = "what is given is one set, whose members attend to each other"
    assert found.unknown["sample_leak"] == reason
    assert found.unknown["sample_leak_begins"] == reason
    assert found.unknown["position_share"].startswith("what is given is one set")


class Neighbours(nn.Module):
    """The mean over the neighbours of a node, by matrix or by list of edges, and attention."""

    def __init__(self, kept):
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.register_buffer("kept", kept)

    def forward(self, nodes, edges=None):
        x = self.embed(nodes)
        if edges is None:
            return self.head(self.kept @ x)
        return self.head(torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]))


@pytest.mark.parametrize("listed", [False, True])
def test_nodes_that_are_added_up_along_edges_are_no_samples_that_leak(listed):
    torch.manual_seed(0)
    nodes, edges = torch.randn(12, WIDTH), torch.randint(12, (2, 40))
    given = (nodes, edges) if listed else (nodes,)
    model = Neighbours((torch.rand(12, 12) < 0.5).float())
    found = checked(model, *given, target=torch.arange(12) % CLASSES)
    assert found.unknown["sample_leak"].startswith("what is given is one set")


def test_positions_that_cannot_be_told_apart_have_no_share():
    assert numbers(classified("no positions"), "position_share") == [0.0]
    assert numbers(classified(""), "position_share")[0] > 0.3


def test_positions_that_begin_as_zeros_are_not_without_effect_yet():
    torch.manual_seed(0)
    tokens, target = batch()
    model = Classifier()
    model.positions.data.zero_()
    found = checked(model, tokens, target=target)
    assert found.unknown["positions_unused"] == "positions are learned, and still zero"


class GivenPositions(Classifier):
    """Codes of positions come with the input, as those of the nodes of a graph do."""

    def __init__(self):
        super().__init__("no positions")
        del self.positions
        self.pos_enc = nn.Linear(4, WIDTH)
        self.content = nn.Linear(5, WIDTH)

    def forward(self, x, codes):
        padded = torch.zeros(x.shape[:2], dtype=torch.bool)
        x = self.content(x) + self.pos_enc(codes * 2.0)
        for block in self.blocks:
            x = block(x, padded)
        return self.head(x.mean(1))


def test_positions_that_are_given_are_not_without_effect():
    torch.manual_seed(0)
    x, codes = torch.randn(6, LENGTH, 5), torch.randn(6, LENGTH, 4)
    found = checked(GivenPositions(), x, codes, target=torch.arange(6) % CLASSES)
    assert found.unknown["positions_unused"].startswith("positions are among the inputs")


def test_what_padding_holds_has_no_influence_behind_a_mask():
    assert numbers(classified("pooled padding"), "padding_influence")[0] > 0.05
    assert numbers(classified("unmasked"), "padding_influence")[0] > 0.05
    assert numbers(classified(""), "padding_influence") == [0.0]


@pytest.mark.parametrize("seed", range(5))
def test_a_word_that_stands_at_the_end_by_chance_is_no_padding(seed):
    """In short batches of words without any, some word stands once, and at an end."""
    torch.manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY - 1, (5, LENGTH))
    tokens[seed, -1] = VOCABULARY - 1
    found = checked(Classifier("unmasked"), tokens, target=torch.arange(5) % CLASSES)
    assert found.unknown["padding_weight"].startswith("no padding was seen")


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.inner = nn.GRU(WIDTH, WIDTH, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, tokens):
        return self.head(self.inner(self.embedding(tokens))[0][:, 0])


def test_recurrent_layers_learn_to_pass_padding():
    torch.manual_seed(0)
    tokens, target = batch()
    found = checked(Recurrent(), tokens, target=target)
    assert found.unknown["padding_influence"].startswith("recurrent and convolutional")


class Tagger(Classifier):
    """One number a token, (batch, length)."""

    def forward(self, tokens):
        padded = tokens == PADDING
        x = self.embedding(tokens) + self.positions
        for block in self.blocks:
            x = block(x, padded)
        return self.head(x)[..., 0]


def test_what_is_said_of_padding_itself_does_not_count():
    torch.manual_seed(0)
    tokens, _ = batch()
    model = Tagger()
    output = model(tokens)
    found = checked(model, tokens, loss=output[tokens != PADDING].square().mean(), output=output)
    assert numbers(found, "padding_influence") == [0.0]


def test_what_is_not_finite_is_not_measured():
    torch.manual_seed(0)
    tokens, target = batch()
    broken = Classifier()
    with torch.no_grad():
        broken.positions.fill_(math.nan)
    found = checked(broken, tokens, target=target)
    assert "not finite" in found.unknown["position_share"]
    assert found.unknown["attention_sum_error"].startswith("no row of attention has finite weights")
    assert all(math.isfinite(row.estimate.value) for row in found.rows)


def test_a_batch_that_counts_no_target_has_no_share_of_padded_ones():
    torch.manual_seed(0)
    tokens, _ = batch()
    model = Tagger()
    output = model(tokens)
    scores = torch.stack([output, -output], 1)
    loss = F.cross_entropy(scores, torch.full(tokens.shape, -100))
    found = checked(model, tokens, loss=loss, output=output)
    assert numbers(found, "padded_target_share") == []
    assert all(math.isfinite(row.estimate.value) for row in found.rows)


def test_a_model_that_gives_one_answer_has_no_influence_of_its_input():
    tokens, target = batch()
    model = Classifier("")
    nn.init.zeros_(model.head.weight)
    assert numbers(checked(model, tokens, target=target), "input_influence") == pytest.approx([0])


class LanguageModel(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.causal = causal
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.encoder(self.embedding(tokens), mask=mask if self.causal else None)
        return self.head(x)


def language(causal, shift=True):
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (8, LENGTH))
    model = LanguageModel(causal)
    scores = model(tokens)
    if shift:
        loss = F.cross_entropy(scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    else:
        loss = F.cross_entropy(scores.flatten(0, 1), tokens.flatten())
    return checked(model, tokens, loss=loss, output=scores)


def test_the_future_is_hidden_from_a_model_of_the_next_input():
    leaks, hides = language(causal=False), language(causal=True)
    assert min(numbers(leaks, "future_weight")) > 0.2
    assert numbers(leaks, "future_influence")[0] > 0.1
    assert numbers(hides, "future_weight") == [0.0, 0.0]
    assert numbers(hides, "future_influence") == [0.0]
    assert numbers(hides, "needless_causal") == []


class Padded(LanguageModel):
    """Causal, with padding in front: whoever stands there sees nothing, and all of it evenly."""

    def forward(self, tokens):
        later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        hidden = (later | (tokens == PADDING)[:, None, :]).repeat_interleave(4, 0)
        mask = torch.zeros(hidden.shape).masked_fill(hidden, -1e9)
        return self.head(self.encoder(self.embedding(tokens), mask=mask))


def test_whoever_sees_nothing_does_not_see_the_future():
    torch.manual_seed(0)
    tokens = torch.randint(1, VOCABULARY, (8, LENGTH))
    tokens[torch.arange(LENGTH) < torch.arange(8)[:, None] // 2] = PADDING
    scores = (model := Padded(causal=True))(tokens)
    loss = F.cross_entropy(
        scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PADDING
    )
    assert numbers(checked(model, tokens, loss=loss, output=scores), "future_weight") == [0.0, 0.0]


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_targets_are_the_inputs_of_a_later_position(shift):
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (8, LENGTH))
    scores = (model := LanguageModel(causal=True))(tokens)
    kept = scores[:, : LENGTH - shift].flatten(0, 1)
    loss = F.cross_entropy(kept, tokens[:, shift:].flatten())
    assert numbers(checked(model, tokens, loss=loss, output=scores), "target_shift") == [shift]


def test_targets_that_were_shifted_the_wrong_way_are_behind():
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (8, LENGTH))
    scores = (model := LanguageModel(causal=True))(tokens[:, 1:])
    loss = F.cross_entropy(scores.flatten(0, 1), tokens[:, :-1].flatten())
    found = checked(model, tokens[:, 1:], loss=loss, output=scores)
    assert numbers(found, "target_shift") == [-1]


def test_targets_that_are_no_inputs_have_no_shift():
    torch.manual_seed(0)
    tokens, other = torch.randint(VOCABULARY, (2, 8, LENGTH))
    scores = (model := LanguageModel(causal=True))(tokens)
    loss = F.cross_entropy(scores.flatten(0, 1), other.flatten())
    assert numbers(checked(model, tokens, loss=loss, output=scores), "target_shift") == []
    same = torch.full_like(tokens, 3)  # looks alike at every shift
    loss = F.cross_entropy(model(same).flatten(0, 1), same.flatten())
    assert numbers(checked(model, same, loss=loss, output=scores), "target_shift") == []


class Coded(LanguageModel):
    """Adds the embedding of a code to each position."""

    def __init__(self, code):
        super().__init__(causal=True)
        self.code = code
        self.pos_embedding = nn.Embedding(LENGTH, WIDTH)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.embedding(tokens) + self.pos_embedding(self.code)
        return self.head(self.encoder(x, mask=mask))


@pytest.mark.parametrize("same", [True, False])
def test_a_causal_mask_does_not_make_up_for_positions_that_are_all_the_same(same):
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (8, LENGTH))
    model = Coded(torch.arange(LENGTH) * (not same))
    scores = model(tokens)
    loss = F.cross_entropy(scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    found = checked(model, tokens, loss=loss, output=scores)
    assert numbers(found, "positions_unused") == [float(same)]
    assert numbers(found, "position_share") == []


class Translator(nn.Module):
    """Sources are as long as targets; the encoder and the cross-attention may see all of them."""

    def __init__(self, causal=True):
        super().__init__()
        self.causal = causal
        self.source = nn.Embedding(VOCABULARY, WIDTH)
        self.target = nn.Embedding(VOCABULARY, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 4, 1, 1, 32, 0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        x = self.transformer(
            self.source(source), self.target(target), tgt_mask=mask if self.causal else None
        )
        return self.head(x)


@pytest.mark.parametrize("causal", [True, False])
def test_the_future_of_targets_is_not_that_of_sources(causal):
    torch.manual_seed(0)
    model, source = Translator(causal), torch.randint(VOCABULARY, (8, LENGTH))
    tokens = torch.randint(VOCABULARY, (8, LENGTH + 1))
    given, target = tokens[:, :-1], tokens[:, 1:]
    scores = model(source, given)
    loss = F.cross_entropy(scores.flatten(0, 1), target.flatten())
    found = checked(model, source, given, loss=loss, output=scores)
    rows = [row for row in found.rows if row.quantity == "future_weight"]
    assert [row.component for row in rows] == ["transformer.decoder.layers.0.self_attn"]
    assert (rows[0].estimate.value > 0.1) == (not causal)
    assert (numbers(found, "future_influence")[0] > 0.01) == (not causal)


def test_labels_that_were_not_shifted_are_in_the_input():
    assert numbers(language(causal=True, shift=False), "labels_in_input") == [1.0]
    assert numbers(language(causal=True), "labels_in_input") == []


def test_other_inputs_than_the_models_own_are_told_for_keys_and_values():
    class Cross(nn.Module):
        def __init__(self, wrong):
            super().__init__()
            self.wrong = wrong
            self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

        def forward(self, x, memory):
            key = x if self.wrong else memory
            return self.attention(x, key, memory, need_weights=False)[0]

    for wrong in (True, False):
        torch.manual_seed(0)
        model, x, memory = Cross(wrong), torch.randn(4, 5, WIDTH), torch.randn(4, 5, WIDTH)
        output = model(x, memory)
        found = checked(model, x, memory, loss=output.square().mean(), output=output)
        assert numbers(found, "key_value_apart") == [float(wrong)]


class ReadFrom(nn.Module):
    """Causal attention between RMS norms, whose mean is over features and not over positions."""

    def __init__(self, read):
        super().__init__()
        self.read = read
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.attentions = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions
        for attention in self.attentions:
            y = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            query, key, value = attention(y).unsqueeze(1).chunk(3, -1)
            x = x + F.scaled_dot_product_attention(query, key, value, is_causal=True)[:, 0]
        if self.read == "mean":
            return self.head(x.mean(1))
        return self.head(x[:, 0 if self.read == "first" else -1])


@pytest.mark.parametrize("read", ["mean", "first", "last"])
def test_a_causal_mask_is_judged_by_what_is_read_from_it(read):
    torch.manual_seed(0)
    tokens, target = torch.randint(1, VOCABULARY, (6, LENGTH)), torch.arange(6) % CLASSES
    found = checked(ReadFrom(read), tokens, target=target)
    assert numbers(found, "needless_causal") == [float(read == "mean")] * 2
    assert numbers(found, "first_sees_itself") == [float(read == "first")] * 2


class PostNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def test_norms_behind_blocks_are_no_misplaced_residuals_and_are_not_missing():
    torch.manual_seed(0)
    tokens, target = batch()
    found = checked(PostNorm(), tokens, target=target)
    assert numbers(found, "residual_normalised") == [0.0, 0.0]
    assert numbers(found, "norm_missing") == [0.0, 0.0]
    assert numbers(found, "residual_missing") == [0.0, 0.0]
    for bare, missing in ((1, [0.0, 1.0]), (0, [0.0, 0.0])):  # the first may do without
        model = PostNorm()
        model.layers[bare].norm1, model.layers[bare].norm2 = nn.Identity(), nn.Identity()
        assert numbers(checked(model, tokens, target=target), "norm_missing") == missing


class Queries(nn.Module):
    """Learned queries begin as zeros, to which a code is added: a decoder of DETR."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.codes = nn.Parameter(torch.randn(5, WIDTH))
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(WIDTH, 4, batch_first=True) for _ in range(2)
        )

    def forward(self, memory):
        x = torch.zeros(len(memory), 5, WIDTH)
        for attention in self.attentions:
            query = x + self.codes + memory.mean(1, keepdim=True)
            x = x * self.factor + attention(query, query, x + memory[:, :5])[0]
        return x


@pytest.mark.parametrize(("factor", "missing"), [(1.0, 0.0), (0.0, 1.0)])
def test_zeros_that_queries_begin_as_go_around_and_what_is_multiplied_by_zero_does_not(
    factor, missing
):
    torch.manual_seed(0)
    model, memory = Queries(factor), torch.randn(4, 7, WIDTH)
    output = model(memory)
    found = checked(model, memory, loss=output.square().mean(), output=output)
    assert numbers(found, "residual_missing") == [0.0, missing]


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH // 4) for _ in range(3))

    def forward(self, x):
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 2.0
        return scores.softmax(-1) @ self.value(x)


class HeadByHead(nn.Module):
    """Every head is a module of its own; they stand beside each other, not behind each other."""

    def __init__(self, depth):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(depth))
        self.layers = nn.ModuleList(nn.ModuleList(Head() for _ in range(4)) for _ in range(depth))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        for norm, heads in zip(self.norms, self.layers, strict=True):
            y = norm(x)
            x = x + torch.cat([head(y) for head in heads], -1)
        return self.head(x.mean(1))


def test_heads_that_are_modules_of_their_own_need_neither_norm_nor_residual():
    torch.manual_seed(0)
    x, target = torch.randn(6, 5, WIDTH), torch.arange(6) % CLASSES
    one = checked(HeadByHead(1), x, target=target)
    assert one.unknown["norm_missing"] == "no attention follows another"
    two = checked(HeadByHead(2), x, target=target)
    assert numbers(two, "norm_missing") == [0.0] * 8
    assert numbers(two, "residual_missing") == [0.0] * 8


class NormFree(nn.Module):
    def __init__(self, design):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.MultiheadAttention(WIDTH, 4, batch_first=True) for _ in range(3)
        )
        self.gain = nn.Parameter(torch.full((), 0.1)) if design == "gain" else 1.0
        self.head = nn.Linear(WIDTH, CLASSES)
        for layer in self.layers:
            if design == "zero":
                nn.init.zeros_(layer.out_proj.weight)

    def forward(self, x):
        for layer in self.layers:
            x = x + self.gain * layer(x, x, x)[0]
        return self.head(x.mean(1))


@pytest.mark.parametrize(("design", "missing"), [("gain", 0.0), ("zero", 0.0), ("", 1.0)])
def test_branches_that_begin_as_nothing_or_have_a_gain_need_no_norm(design, missing):
    torch.manual_seed(0)
    x, target = torch.randn(6, 5, WIDTH), torch.arange(6) % CLASSES
    found = checked(NormFree(design), x, target=target)
    assert numbers(found, "norms_absent") == [missing] * 3
    assert numbers(found, "norm_missing") == [0.0] * 3


class Doubled(nn.Module):
    """Adds what attention gives to itself, or to its input."""

    def __init__(self, doubled):
        super().__init__()
        self.doubled = doubled
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(WIDTH, 4, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        for attention in self.attentions:
            mixed = F.dropout(attention(x, x, x)[0], 0.1, self.training)
            x = mixed + (mixed if self.doubled else x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("doubled", [False, True])
def test_what_is_added_to_itself_does_not_go_around(doubled):
    torch.manual_seed(0)
    x, target = torch.randn(6, 5, WIDTH), torch.arange(6) % CLASSES
    found = checked(Doubled(doubled), x, target=target)
    assert numbers(found, "added_to_itself") == [float(doubled)] * 2


class Ternary(nn.Linear):
    """Its weight is computed from its parameter (BitNet)."""

    def forward(self, x):
        scale = self.weight.abs().mean()
        rounded = (self.weight / scale).round().clamp(-1, 1) * scale
        return F.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)


class Quantised(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.query, self.key, self.value = (Ternary(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        x = self.inner(x).relu()
        query, key, value = (layer(x).unsqueeze(1) for layer in (self.query, self.key, self.value))
        return F.scaled_dot_product_attention(query, key, value)[:, 0]


def test_attention_is_named_by_weights_that_are_computed_from_parameters():
    torch.manual_seed(0)
    model, x = Quantised(), torch.randn(6, 5, WIDTH)
    output = model(x)
    found = checked(model, x, loss=output.square().mean(), output=output)
    named = {row.component for row in found.rows if row.quantity == "attention_scale"}
    assert named in ({"query"}, {"key"})


class TwoParts(nn.Module):
    """A decoder that attends to its encoder, or to itself once more."""

    def __init__(self, memory):
        super().__init__()
        self.memory = memory  # "" for none, "whole", or "slices": written position by position
        self.encoder, self.own, self.cross = (
            nn.MultiheadAttention(WIDTH, 4, batch_first=True) for _ in range(3)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, source, x):
        memory = self.encoder(source, source, source)[0]
        if self.memory == "slices":
            parts, memory = memory.unbind(1), torch.zeros_like(memory)
            for position, part in enumerate(parts):
                memory[:, position].copy_(part)
        x = x + self.own(x, x, x)[0]
        keys = memory if self.memory else x
        return {"scores": self.head((x + self.cross(x, keys, keys)[0]).mean(1))}


@pytest.mark.parametrize("memory", ["", "whole", "slices"])
def test_an_attention_that_nothing_depends_on_is_unused(memory):
    torch.manual_seed(0)
    source, x = torch.randn(2, 6, 5, WIDTH)
    model, target = TwoParts(memory), torch.arange(6) % CLASSES
    output = model(source, x)
    loss = F.cross_entropy(output["scores"], target)
    found = checked(model, source, x, loss=loss, output=output)
    unused = {r.component: r.estimate.value for r in found.rows if r.quantity == "attention_unused"}
    assert unused == {"encoder": float(not memory), "own": 0.0, "cross": 0.0}


class QueryStream(nn.Module):
    """Content and query streams with the same weights; the last content goes nowhere (XLNet)."""

    def __init__(self):
        super().__init__()
        self.first, self.last = (
            nn.MultiheadAttention(WIDTH, 4, batch_first=True) for _ in range(2)
        )
        self.start, self.head = nn.Parameter(torch.zeros(1, 5, WIDTH)), nn.Linear(WIDTH, CLASSES)

    def forward(self, content):
        query = self.start.expand_as(content)
        for layer in (self.first, self.last):
            query, content = (
                query + layer(query, content, content)[0],
                content + layer(content, content, content)[0],
            )
        return self.head(query.mean(1))


def test_of_two_streams_with_the_same_weights_one_may_end():
    torch.manual_seed(0)
    found = checked(QueryStream(), torch.randn(6, 5, WIDTH), target=torch.arange(6) % CLASSES)
    unused = {r.component: r.estimate.value for r in found.rows if r.quantity == "attention_unused"}
    assert unused == {"first": 0.0, "last": 0.0}


class Apart(nn.Module):
    """Two encoders of one attention each, of which one has a sum around it, or two blocks."""

    def __init__(self, names):
        super().__init__()
        self.names = names
        for name in names:
            self.add_module(name, nn.MultiheadAttention(WIDTH, 4, batch_first=True))
        self.head = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        one, other = (getattr(self, name) for name in self.names)
        y = one(x, x, x)[0]
        z = other(y, y, y)[0] + y
        return self.out(self.head(z, z, z)[0].mean(1))


@pytest.mark.parametrize(
    ("names", "missing"), [(("paths", "cells"), 0.0), (("layer0", "layer1"), 1.0)]
)
def test_a_residual_is_missing_beside_its_like_alone(names, missing):
    torch.manual_seed(0)
    found = checked(Apart(names), torch.randn(6, 5, WIDTH), target=torch.arange(6) % CLASSES)
    told = {r.component: r.estimate.value for r in found.rows if r.quantity == "residual_missing"}
    assert told[names[0]] == missing
    assert told[names[1]] == 0.0


@st.composite
def views(draw, base):
    axis = draw(st.integers(0, base.ndim - 1))
    start = draw(st.integers(0, base.shape[axis] - 1))
    length = draw(st.integers(1, base.shape[axis] - start))
    view = base.narrow(axis, start, length)
    if draw(st.booleans()):
        view = view.movedim(0, -1)
    return view[:, draw(st.integers(0, 1)) :] if view.shape[1] > 1 else view


@given(st.data())
def test_views_that_are_taken_to_be_apart_have_no_element_in_common(data):
    base = torch.arange(60).reshape(3, 4, 5)
    one, other = data.draw(views(base)), data.draw(views(base))
    common = set(one.flatten().tolist()) & set(other.flatten().tolist())
    assert not (_apart(one, other) and common)


def test_parts_of_a_fused_projection_are_apart():
    query, key, value = torch.zeros(2, 3, 12).chunk(3, dim=-1)
    assert _apart(query, key) and _apart(value, query) and not _apart(key, key[:, 1:])


class Refined(nn.Module):
    """Two attentions of different purpose, none with a sum around it."""

    def __init__(self):
        super().__init__()
        self.own = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.norm = nn.LayerNorm([5, WIDTH])
        self.last = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x):
        x = self.norm(self.own(x, x, x)[0])
        return self.last(x, x, x)[0]


def test_a_residual_is_missing_only_where_there_is_a_sign_that_one_was_meant():
    torch.manual_seed(0)
    model, x = Refined(), torch.randn(4, 5, WIDTH)
    output = model(x)
    found = checked(model, x, loss=output.square().mean(), output=output)
    assert numbers(found, "residual_missing") == [0.0, 0.0]
    assert max(numbers(found, "twin_units")) == 0.0  # the gain of a norm has rows, all ones


class Summaries(nn.Module):
    """A summary of an encoding, to which candidates attend: nothing is applied to it twice."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(WIDTH, WIDTH)
        self.codes = nn.Parameter(torch.randn(3, WIDTH))

    def forward(self, x, candidates):
        keys = self.encode(x)
        for queries in (self.codes.expand(len(x), -1, -1), self.encode(candidates)):
            keys = (queries @ keys.transpose(1, 2)).softmax(-1) @ keys
        return keys


def test_an_attention_to_what_another_gave_is_no_second_stream():
    torch.manual_seed(0)
    x, candidates = torch.randn(6, 5, WIDTH), torch.randn(6, 4, WIDTH)
    output = (model := Summaries())(x, candidates)
    found = checked(model, x, candidates, loss=output.square().mean(), output=output)
    assert 1.0 not in numbers(found, "updated_stream")


class TwoStreams(nn.Module):
    def __init__(self, early):
        super().__init__()
        self.early = early
        self.cross = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, a, b):
        new = a + self.cross(a, b, b)[0]
        other = new if self.early else a
        return new, b + self.cross(b, other, other)[0]


@pytest.mark.parametrize("early", [True, False])
def test_a_stream_that_is_updated_too_early_is_told_from_two_that_are_treated_alike(early):
    torch.manual_seed(0)
    model, a, b = TwoStreams(early), torch.randn(4, 5, WIDTH), torch.randn(4, 6, WIDTH)
    output = model(a, b)
    loss = sum(x.square().mean() for x in output)
    found = checked(model, a, b, loss=loss, output=output)
    assert max(numbers(found, "updated_stream")) == float(early)


@pytest.mark.parametrize("by_feature", [True, False])
def test_attention_by_feature_is_told_from_one_weight_a_position(by_feature):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, WIDTH)
            self.projection = nn.Linear(WIDTH, WIDTH)
            self.context = nn.Parameter(torch.randn(WIDTH))
            self.head = nn.Linear(WIDTH, CLASSES)

        def forward(self, tokens):
            x = self.embedding(tokens)
            scores = torch.tanh(self.projection(x)) * self.context
            if not by_feature:
                scores = scores.sum(-1, keepdim=True).expand_as(x)
            return self.head((scores.softmax(1) * x).sum(1))

    torch.manual_seed(0)
    tokens, target = batch()
    found = checked(Pooled(), tokens, target=target)
    assert numbers(found, "attention_by_feature") == [float(by_feature)]


# -- loss, data, modes, optimizers ----------------------------------------------------------------


def regression(target, prediction=None, model=None):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    x = torch.randn(16, 4)
    output = model(x)
    target = target(output) if callable(target) else target
    return checked(model, x, loss=F.mse_loss(output, target), output=output)


def test_targets_of_a_regression_have_a_scale_and_no_gradient():
    assert numbers(regression(torch.randn(16, 1) * 300), "target_scale")[0] > 100
    assert numbers(regression(torch.ones(16, 1)), "target_constant") == [1.0]
    assert numbers(regression(torch.randn(16, 1)), "target_constant") == [0.0]


def test_predictions_and_targets_of_differing_shape_are_compared_all_with_all():
    torch.manual_seed(0)
    model, x, target = nn.Linear(4, 1), torch.randn(16, 4), torch.randn(16)
    output = model(x)
    wrong = LossCall("mse_loss", output, target, {}, None, None)
    right = LossCall("mse_loss", output[:, 0], target, {}, None, None)
    for call, broadcast in ((wrong, 1.0), (right, 0.0)):
        loss = F.mse_loss(*torch.broadcast_tensors(call.scores, target))
        found = checked(model, x, loss=loss, output=output, losses=[call])
        assert numbers(found, "loss_broadcast") == [broadcast]


def test_targets_that_are_nan_have_no_scale():
    target = torch.randn(16, 1)
    target[3] = torch.nan
    seen = regression(target)
    assert numbers(seen, "target_scale") == numbers(seen, "target_constant") == []
    assert numbers(regression(target.nan_to_num(torch.inf)), "target_scale") == [float("inf")]
    assert numbers(regression(torch.randn(16, 1)), "target_gradient") == [0.0]
    assert numbers(regression(lambda output: output.flip(0) + 1), "target_gradient") == [1.0]
    assert numbers(regression(lambda o: o.flip(0).detach() + 1), "target_gradient") == [0.0]


def test_two_distributions_that_are_drawn_to_each_other_are_on_purpose():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)), torch.randn(16, 4)
    one, other = (model(x).log_softmax(-1) for _ in range(2))
    loss = F.kl_div(one, other, log_target=True, reduction="batchmean")
    assert numbers(checked(model, x, loss=loss, output=one), "target_gradient") == []


def test_a_reconstruction_with_its_arguments_swapped_has_no_target_to_detach():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 4), torch.randn(16, 4)
    output = model(x)
    found = checked(model, x, loss=F.mse_loss(x, output), output=output)
    assert numbers(found, "target_gradient") == [0.0]


def test_scores_are_no_log_probabilities():
    torch.manual_seed(0)
    model, x, target = nn.Linear(4, CLASSES), torch.randn(16, 4), torch.randint(CLASSES, (16,))
    for wrong, scores in ((True, model(x)), (False, model(x).log_softmax(-1))):
        found = checked(model, x, loss=F.nll_loss(scores, target), output=scores)
        assert (numbers(found, "not_log_probabilities")[0] > 0.9) is wrong


def test_padding_that_counts_in_a_loss_is_seen():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, WIDTH)
            self.head = nn.Linear(WIDTH, VOCABULARY)

        def forward(self, tokens):
            return self.head(self.embedding(tokens))

    tokens, _ = batch()
    tags = torch.where(tokens == PADDING, PADDING, (tokens + 1) % VOCABULARY)
    for ignored, wrong in ((-100, True), (PADDING, False)):
        model = Tagger()
        scores = model(tokens)
        loss = F.cross_entropy(scores.flatten(0, 1), tags.flatten(), ignore_index=ignored)
        (share,) = numbers(checked(model, tokens, loss=loss, output=scores), "padded_target_share")
        assert (share > 0.2) is wrong


def test_inputs_out_of_scale_not_finite_and_all_the_same():
    torch.manual_seed(0)
    model = nn.Linear(4, CLASSES)
    x, target = torch.randn(16, 4), torch.randint(CLASSES, (16,))
    large = checked(model, x * 1e4, target=target)
    assert numbers(large, "input_largest")[0] > 1e4
    assert numbers(large, "weighed_input_largest") == numbers(large, "input_largest")
    x[0, 0] = torch.nan
    assert numbers(checked(model, x, target=target), "input_non_finite") == [1 / 64]
    nothing = checked(model, torch.full_like(x, torch.nan), target=target)
    assert numbers(nothing, "input_non_finite") == [1.0]
    assert numbers(nothing, "input_largest") == []
    same = torch.ones(16, 4)
    assert numbers(checked(model, same, target=target), "same_samples") == [1.0]


def test_a_model_trained_in_eval_mode_is_told_from_frozen_norms():
    def mode(set_mode):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        set_mode(model)
        return numbers(checked(model, torch.randn(8, 4), target=torch.arange(8) % 3), quantity)

    quantity = "trained_in_eval"
    assert mode(lambda m: m.train()) == [0.0]
    assert mode(lambda m: m.eval()) == [1.0]
    assert mode(lambda m: m[1].eval()) == [0.0]
    quantity = "batch_norm_momentum"
    assert mode(lambda m: setattr(m[1], "momentum", 1.0)) == [1.0]


def test_parameters_in_two_places_and_decay_that_outruns_the_step():
    torch.manual_seed(0)
    model, x, target = nn.Linear(4, 3), torch.randn(8, 4), torch.arange(8) % 3
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=10.0)
    found = checked(model, x, target=target, optimizer=optimizer)
    assert numbers(found, "times_optimized") == [1.0]
    assert numbers(found, "decay_to_step")[0] > 1.0
    assert numbers(found, "decayed_vectors") == [1.0]
    usual = checked(model, x, target=target)
    assert numbers(usual, "decay_to_step")[0] < 0.01
    assert numbers(usual, "decayed_vectors") == [0.0]


# -- what does not apply says so -------------------------------------------------------------------


@dataclasses.dataclass
class Output:
    scores: torch.Tensor
    extra: object = None


class Odd(nn.Module):
    """Returns what it is told to."""

    def __init__(self, wrap):
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.layer(x))


WRAPS = [
    lambda y: (y, None),
    lambda y: {"scores": y, "name": "x"},
    Output,
    lambda y: [y, {"more": (y,)}],
    lambda y: Output(y, {"deep": [y]}),
]


@pytest.mark.parametrize("wrap", WRAPS)
def test_any_output_is_looked_into(wrap):
    model, x = Odd(wrap), torch.randn(8, 4)
    scores = model.layer(x)
    loss = F.cross_entropy(scores, torch.arange(8) % CLASSES)
    found = checked(model, x, loss=loss, output=model(x))
    assert numbers(found, "sample_leak") == [0.0]


def test_every_quantity_is_measured_or_has_a_reason_in_one_line():
    torch.manual_seed(0)
    models = [
        (nn.Linear(4, CLASSES), (torch.randn(8, 4),)),
        (nn.Embedding(9, CLASSES), (torch.arange(8),)),
        (Classifier(""), (batch()[0],)),
    ]
    for model, inputs in models:
        output = model(*inputs)
        target = torch.arange(len(output)) % CLASSES
        found = checked(model, *inputs, target=target)
        given = {row.quantity for row in found.rows}
        for check in CHECKS.values():
            for quantity in check.quantities:
                assert (quantity in given) != (quantity in found.unknown), quantity
        for reason in found.unknown.values():
            assert reason
            assert "\n" not in reason
            assert "failed" not in reason


def test_nested_tensors_losses_of_ones_own_and_no_module_at_all_end_in_reasons():
    weight = nn.Parameter(torch.randn(4, 3))
    loss = (torch.randn(8, 4) @ weight).square().mean()
    subject = Subject({}, {"weight": weight})
    found = examine(
        Seen(
            0, Calls(), loss, subject.parameters, subject.layer_of, [torch.optim.SGD([weight])], {}
        )
    )
    assert "no call of a module that is trained was seen" in found.unknown.values()
    assert {row.quantity for row in found.rows} <= {
        "averaging_steps",
        "times_optimized",
        "decay_to_step",
        "twin_units",
    }

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x):
            return self.layer(x.to_padded_tensor(0.0))

    model = Nested()
    x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    output = model(x)
    found = checked(model, x, loss=output.square().mean(), output=output)
    assert not any("failed" in reason for reason in found.unknown.values())


def test_a_check_that_fails_is_a_reason_and_the_others_go_on(monkeypatch):
    def broken(seen, found):
        raise ZeroDivisionError("oh")

    names = iter(CHECKS)
    first = next(names)
    changed = {**CHECKS, first: dataclasses.replace(CHECKS[first], run=broken)}
    monkeypatch.setattr("diagnoser.checks.CHECKS", changed)
    found = classified("")
    assert "ZeroDivisionError" in found.unknown[CHECKS[first].quantities[0]]
    assert numbers(found, "sample_leak") == [0.0]


# -- the table -------------------------------------------------------------------------------------


def test_the_table_of_checks_and_the_catalogue_of_features_agree():
    measured = [q for check in (*CHECKS.values(), *BEFORE.values()) for q in check.quantities]
    often = {q for check in OFTEN.values() for q in check.quantities}
    assert often < NOTED_NAMES  # beside what the monitor notes by itself
    assert len(measured) == len(set(measured))
    expected = {*measured, *NOTED_NAMES, "recomputed_otherwise"}
    assert {quantity.name for quantity in PROGRAM} == expected


@pytest.mark.parametrize("check", [*CHECKS.values(), *OFTEN.values(), *BEFORE.values()])
def test_every_check_says_what_it_finds_its_source_what_it_cannot_see_and_what_it_costs(check):
    text = check.run.__doc__
    for part in ("Finds ", "Source: ", "Cannot see: ", "Costs: "):
        assert part in text
    for quantity in check.quantities:
        assert f"``{quantity}``" in text


# -- replicas leave no trace -----------------------------------------------------------------------


class Stateful(nn.Module):
    """Keeps, counts, draws and prints in its forward."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.kept, self.count = [], 0
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x):
        y = self.norm(self.layer(x)) + torch.randn(4)
        self.kept.append(y)
        self.last, self.count = y, self.count + 1
        self.total += y.detach().sum(0)
        x.mul_(2.0)
        print("forward")
        return y


def test_a_replica_changes_nothing_and_prints_nothing(capsys):
    torch.manual_seed(0)
    model, x = Stateful(), torch.randn(8, 4)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    output = model(x)
    capsys.readouterr()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, numpy_state, plain = (
        torch.get_rng_state(),
        np.random.get_state()[1].copy(),
        random.getstate(),
    )
    given, count, kept, last = x.clone(), model.count, list(model.kept), model.last
    replica = Replica(Call(model, (x,), {}, output, True, True, None))
    first, second = replica.run(), replica.run()
    assert torch.equal(first[0], second[0])  # the same random numbers each time
    assert capsys.readouterr() == ("", "")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()
    assert plain == random.getstate()
    assert torch.equal(given, x)
    assert (model.count, model.kept, model.last is last, seen) == (count, kept, True, [1])
    assert model.training
    assert model.norm.training
    assert replica.module.layer.weight is model.layer.weight
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_cannot_be_copied_or_run_again_says_why():
    class Locked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.rows = nn.Linear(2, 2), (i for i in range(3))

        def forward(self, x):
            return self.layer(x)

    model, x = Locked(), torch.ones(2, 2)
    with pytest.raises(MeasurementError, match="the model cannot be copied"):
        Replica(Call(model, (x,), {}, model(x), True, True, None))
    fine = nn.Linear(2, 2)
    replica = Replica(Call(fine, (x,), {}, fine(x), True, True, None))
    with pytest.raises(MeasurementError, match="cannot be run on its batch again"):
        replica.run((torch.ones(2, 3),), {})


class Momentum(nn.Module):
    """Averages a teacher within its forward (MoCo), in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.student, self.teacher = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)

    @torch.no_grad()
    def average(self):
        pairs = zip(self.student.parameters(), self.teacher.parameters(), strict=True)
        for own, kept in pairs:
            if self.how == "assigned":
                kept.data = kept.data * 0.9 + own.data * 0.1
                kept.requires_grad_(False)
            elif self.how == "in place":
                kept.mul_(0.9).add_(own, alpha=0.1)
            elif self.how == "data":
                kept.data.mul_(0.9).add_(own.data, alpha=0.1)
            elif self.how == "many":
                torch._foreach_mul_([kept], 0.9)
            else:
                torch.mul(kept, 0.9, out=kept)

    def forward(self, x):
        if self.how:
            self.average()
        return self.student(x) + self.teacher(x)


@pytest.mark.parametrize("how", ["assigned", "in place", "data", "many", "out"])
def test_a_forward_that_writes_to_parameters_leaves_the_model_as_it_was(how):
    torch.manual_seed(0)
    model, x, target = Momentum(how), torch.randn(6, WIDTH), torch.arange(6) % CLASSES
    output = model(x)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    found = checked(model, x, target=target, output=output)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    reason = found.unknown.get("sample_leak", "")
    assert "its forward writes to its parameters" in reason or how == "assigned"


@pytest.mark.parametrize("name", ["layers", "_layers"])
def test_a_layer_in_a_plain_list_is_named_by_who_keeps_it(name):
    inner, owner = nn.Module(), nn.Module()
    layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    setattr(inner, name, layers)
    owner.transformer = inner
    assert _kept_by(owner, layers[1]) == f"transformer.{name}.1"
    assert _kept_by(owner, nn.Linear(4, 4)) is None


def test_layers_in_a_plain_list_are_run_in_eval_mode_and_keep_their_parameters():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(4, 4), nn.Dropout(0.5)]
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    model, x = Listed(), torch.ones(4, 4)
    replica = Replica(
        Call(model, (x,), {}, model(x), True, True, None), model.layers[0].parameters()
    )
    assert torch.equal(replica.run()[0], model.head(model.layers[0](x)))
    assert model.layers[1].training
    assert replica.module.layers[0].weight is model.layers[0].weight


# -- other ways to write an attention --------------------------------------------------------------


class Written(nn.Module):
    """One attention, written in one of many ways, all right."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.attention = Attention()
        self.fused = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.context = nn.Linear(WIDTH, 1, bias=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens):  # noqa: PLR0912 - one branch a way
        padded, x, a = tokens == PADDING, self.embedding(tokens), self.attention
        query, key, value = a.split(a.query(x)), a.split(a.key(x)), a.split(a.value(x))
        hidden = padded[:, None, None, :]
        match self.how:
            case "einsum":
                scores = torch.einsum("bhtd,bhsd->bhts", query, key) * 0.5
                weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
                mixed = torch.einsum("bhts,bhsd->bhtd", weights, value)
            case "added":
                scores = (query / 2) @ key.mT + hidden * -1e9
                mixed = scores.softmax(-1) @ value
            case "exponential":
                scores = (query @ key.mT / 2).masked_fill(hidden, -torch.inf)
                weights = (scores - scores.amax(-1, keepdim=True)).exp()
                mixed = (weights / weights.sum(-1, keepdim=True)) @ value
            case "where":
                scores = torch.where(hidden, -torch.inf, query @ key.mT / 2)
                mixed = scores.softmax(-1) @ value
            case "sdpa":
                mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=~hidden)
            case "module":
                mixed = self.fused(x, x, x, key_padding_mask=padded)[0]
            case "module without weights":
                mixed = self.fused(x, x, x, key_padding_mask=padded, need_weights=False)[0]
            case "additive":
                scores = self.context(torch.tanh(a.query(x))).masked_fill(
                    padded.unsqueeze(-1), -torch.inf
                )
                mixed = (scores.softmax(1) * x).sum(1, keepdim=True)
            case "additive product":
                scores = self.context(torch.tanh(a.query(x))).squeeze(-1)
                mixed = scores.masked_fill(padded, -torch.inf).softmax(-1).unsqueeze(1) @ x
        if mixed.ndim == 4:
            mixed = mixed.transpose(1, 2).flatten(2)
        return self.head(mixed[:, 0])


WAYS = [
    "einsum", "added", "exponential", "where", "sdpa", "module", "module without weights",
    "additive", "additive product",
]  # fmt: skip


@pytest.mark.parametrize("how", WAYS)
def test_an_attention_is_read_however_it_is_written(how):
    torch.manual_seed(0)
    tokens, target = batch()
    found = checked(Written(how), tokens, target=target)
    assert numbers(found, "attention_sum_error") == pytest.approx([0.0], abs=1e-5)
    assert numbers(found, "attention_other_axis") == [0.0]
    assert numbers(found, "padding_weight") == pytest.approx([0.0], abs=1e-6)
    assert numbers(found, "content_weight") == pytest.approx([1.0])
    if not how.startswith("additive"):
        assert numbers(found, "attention_scale") == pytest.approx([1.0])
        assert numbers(found, "masked_rows") == [0.0]


class Fused(nn.Module):
    """Torch's own attention, which shows only what goes into it, over padded tokens."""

    def __init__(self, heads, masked):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, heads, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.masked = masked

    def forward(self, tokens):
        x = self.embedding(tokens)
        mask = tokens == PADDING if self.masked else None
        mixed = self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0]
        return self.head(mixed[:, 0])


@pytest.mark.parametrize(("size", "heads"), [(32, 1), (32, 2), (32, 4), (48, 2), (96, 4), (10, 2)])
def test_of_a_large_batch_samples_are_not_taken_for_heads(size, heads):
    """Of a fused attention some samples are looked at: with heads they may be as many as all."""
    torch.manual_seed(0)
    tokens, target = batch(size)
    found = checked(Fused(heads, masked=True), tokens, target=target)
    assert numbers(found, "padding_weight") == pytest.approx([0.0], abs=1e-6)
    found = checked(Fused(heads, masked=False), tokens, target=target)
    assert numbers(found, "padding_weight")[0] > 0.7


def test_a_softmax_that_weights_nothing_is_no_attention():
    model, x = nn.Sequential(nn.Linear(4, CLASSES), nn.Softmax(-1)), torch.randn(8, 4)
    found = checked(model, x, target=torch.arange(8) % CLASSES)
    assert found.unknown["attention_sum_error"] == "no attention in the model's forward"
