"""Checks of losses, layers and optimizers: each sees its mistake, and nothing in its twin."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from check_models import CLASSES, PADDING, VOCABULARY, WIDTH, Classifier, batch, checked, numbers
from torch import nn

from diagnoser.checks import Calls, LossCall, Seen, examine_often


def of_loss(name="cross_entropy", *, scores=None, target=None, sign=1.0, optimizer=None, **options):
    """Checks a classifier whose loss was seen called with some options."""
    torch.manual_seed(0)
    model, (tokens, labels) = Classifier(), batch()
    output = model(tokens) if scores is None else scores(model(tokens))
    labels = labels if target is None else target
    value = getattr(F, name)(output, labels, **options)
    call = LossCall(name, output, labels, options, value, None)
    return checked(
        model, tokens, output=output, loss=sign * value, losses=[call],
        optimizer=optimizer(model) if optimizer else None,
    )  # fmt: skip


def only(found, quantity):
    (value,) = numbers(found, quantity)
    return value


def test_label_smoothing_is_read_where_it_is_given():
    assert only(of_loss(label_smoothing=0.9), "label_smoothing") == 0.9
    assert only(of_loss(), "label_smoothing") == 0.0


def test_samples_of_a_class_that_is_ignored_are_counted():
    labels = batch()[1]
    share = float((labels == 1).float().mean())
    assert only(of_loss(ignore_index=1), "ignored_classes") == pytest.approx(share)
    assert only(of_loss(), "ignored_classes") == 0.0
    unlabelled = torch.where(labels == 1, -1, labels)  # a number that is no class is one on purpose
    assert only(of_loss(ignore_index=-1, target=unlabelled), "ignored_classes") == 0.0


def test_labels_are_not_of_one_class_where_all_others_are_ignored():
    torch.manual_seed(0)
    model, (tokens, _) = Classifier(), batch()
    labels = torch.arange(len(tokens)) % 2
    output = model(tokens)
    for ignored, classes in ((1, []), (-100, [2.0])):
        loss = F.cross_entropy(output, labels, ignore_index=ignored)
        seen = Seen(0, Calls(), loss, dict(model.named_parameters()), lambda _: None, [], {})
        assert numbers(examine_often(seen), "label_classes") == classes


@pytest.mark.parametrize("sampled", [True, False])
def test_the_first_of_sampled_candidates_is_no_class_of_labels(sampled):
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, 7)
    x, labels = torch.randn(12, WIDTH), torch.zeros(12, dtype=torch.long)
    scores = model(x)
    if sampled:  # the right one and ten others, as similarities
        candidates = torch.cat([scores.unsqueeze(1), torch.randn(12, 10, 7)], 1)
        scores = (candidates @ scores.unsqueeze(-1)).squeeze(-1)
    loss = F.cross_entropy(scores, labels)
    seen = Seen(0, Calls(), loss, dict(model.named_parameters()), lambda _: None, [], {})
    assert numbers(examine_often(seen), "label_classes") == ([] if sampled else [1.0])


def test_padding_that_is_ignored_is_no_class():
    model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY))
    tokens, _ = batch()
    scores = model(tokens).flatten(0, 1)
    value = F.cross_entropy(scores, tokens.flatten(), ignore_index=PADDING)
    call = LossCall(
        "cross_entropy", scores, tokens.flatten(), {"ignore_index": PADDING}, value, None
    )
    found = checked(model, tokens, output=scores, loss=value, losses=[call])
    assert found.unknown["ignored_classes"] == "no loss compares one label of each sample"


@pytest.mark.parametrize("backwards", [False, True])
def test_class_weights_are_to_make_classes_alike(backwards):
    counts = torch.tensor([14.0, 1.0, 1.0])
    labels = torch.repeat_interleave(torch.arange(CLASSES), counts.long())
    weight = counts**2 if backwards else 1 / counts
    imbalance = only(of_loss(weight=weight, target=labels), "weighted_imbalance")
    expected = 14**3 / (14**3 + 2) if backwards else 1 / 3
    assert imbalance == pytest.approx(expected - 14 / 16)


def test_without_weights_there_is_nothing_to_compare():
    assert of_loss().unknown["weighted_imbalance"] == "no loss weighs classes"


def test_scores_behind_a_rectifier_are_cut_off():
    assert only(of_loss(scores=F.relu), "scores_cut") > 0.2
    assert only(of_loss(scores=lambda x: x), "scores_cut") == 0.0
    assert only(of_loss(scores=F.softplus), "scores_cut") == 0.0
    assert only(of_loss(scores=lambda x: 0 * x), "scores_cut") == 0.0  # a head that begins at zero


def maximising(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)


@pytest.mark.parametrize(
    ("sign", "optimizer", "climbs"),
    [(1, None, 0.0), (-1, None, 1.0), (1, maximising, 1.0), (-1, maximising, 0.0)],
)
def test_a_loss_that_is_climbed_is_told_from_one_that_is_descended(sign, optimizer, climbs):
    assert only(of_loss(sign=sign, optimizer=optimizer), "loss_climbed") == climbs


def test_of_a_loss_with_more_in_it_no_direction_is_said():
    assert "one loss function" in of_loss(sign=-0.5).unknown["loss_climbed"]


def test_averages_are_as_long_as_their_factor_says():
    def adam(model):
        return torch.optim.Adam(model.parameters(), betas=(0.999, 0.9))

    assert only(of_loss(optimizer=adam), "averaging_steps") == pytest.approx(1000)
    assert only(of_loss(optimizer=maximising), "averaging_steps") == 1.0


# -- layers ----------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Two layers with something between, over (batch, length, width)."""

    def __init__(self, middle, between=None):
        super().__init__()
        self.first, self.second = nn.Linear(8, middle), nn.Linear(middle, 8)
        self.between = between or (lambda x: x)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head((x + self.second(self.between(self.first(x)))).mean(1))


def gated(x):
    return torch.cat([x[..., ::2] * x[..., 1::2].sigmoid()] * 2, -1)


@pytest.mark.parametrize(
    ("middle", "between", "vain"),
    [
        (32, None, 1.0),
        (32, nn.Dropout(0.1), 1.0),
        (32, lambda x: 2 * x, 1.0),
        (32, F.gelu, 0.0),
        (32, gated, 0.0),
        (32, nn.LayerNorm(32), 0.0),
        (32, lambda x: x + x.relu(), 0.0),
        (2, None, 0.0),  # a factorisation
        (8, None, 0.0),
    ],
)
def test_a_layer_that_widens_in_vain_is_told_from_one_that_does_not(middle, between, vain):
    torch.manual_seed(0)
    found = checked(Layers(middle, between), torch.randn(6, 5, 8), target=torch.arange(6) % CLASSES)
    told = {r.component: r.estimate.value for r in found.rows if r.quantity == "widened_in_vain"}
    assert told.get("first", 0.0) == vain
    assert set(told.values()) <= {0.0, vain}


# -- modes and embeddings --------------------------------------------------------------------------


class Dropping(nn.Module):
    """Attention with dropout of a kind."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.project, self.head = kind, nn.Linear(8, 24), nn.Linear(8, CLASSES)

    def forward(self, x, training=None):
        q, k, v = self.project(x).chunk(3, -1)
        if self.kind == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2)
        else:
            weights = (q @ k.transpose(1, 2) / 8**0.5).softmax(-1)
            on = {"always": True, "mode": self.training, "told": training}[self.kind]
            mixed = F.dropout(weights, 0.2, training=on) @ v
        return self.head((x + mixed).mean(1))


@pytest.mark.parametrize(("kind", "dropped"), [("always", 1.0), ("fused", 1.0), ("mode", 0.0)])
def test_dropout_that_does_not_know_the_mode_is_seen(kind, dropped):
    torch.manual_seed(0)
    found = checked(Dropping(kind), torch.randn(6, 5, 8), target=torch.arange(6) % CLASSES)
    assert only(found, "dropout_in_eval") == dropped
    assert set(numbers(found, "attention_mask_after")) <= {0.0}  # noise is no mask
    assert set(numbers(found, "attention_other_axis")) <= {0.0}


def test_a_model_that_is_told_to_train_is_not_judged_by_its_mode():
    model, x = Dropping("told"), torch.randn(6, 5, 8)
    target = torch.arange(6) % CLASSES
    found = checked(model, x, True, output=model(x, True), target=target)
    assert "an argument may tell" in found.unknown["dropout_in_eval"]


@pytest.mark.parametrize("index", [PADDING, 7])
def test_a_padding_index_that_is_a_word_is_told_from_one_that_is_padding(index):
    torch.manual_seed(0)
    tokens, target = batch()
    model = Classifier()
    model.embedding.padding_idx = index
    found = checked(model, tokens, target=target)
    share = float((tokens[tokens != PADDING] == index).float().mean())
    assert only(found, "padding_index_content") == pytest.approx(share)
    assert (share > 0) == (index != PADDING)


# -- scores and targets of positions -------------------------------------------------------------


class Tagger(nn.Module):
    """Tags for each token of the second input, which is longer than the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, source, tokens):
        return self.head(self.second(tokens) + self.first(source).mean(1, keepdim=True))


@pytest.mark.parametrize("way", ["view", "transpose", "copy"])
def test_scores_that_a_view_brought_into_shape_are_scrambled(way):
    torch.manual_seed(0)
    model, (tokens, _) = Tagger(), batch()
    output, tags = model(tokens[:, :4], tokens), tokens % CLASSES
    scores = {
        "view": lambda: output.view(len(tokens), CLASSES, -1),
        "transpose": lambda: output.transpose(1, 2),
        "copy": lambda: output.permute(0, 2, 1).contiguous(),
    }[way]()
    value = F.cross_entropy(scores, tags)
    call = LossCall("cross_entropy", scores, tags, {}, value, None)
    found = checked(model, tokens[:, :4], tokens, output=output, loss=value, losses=[call])
    assert only(found, "classes_scrambled") == float(way == "view")


@pytest.mark.parametrize("ignored", [-100, PADDING])
def test_padding_of_any_input_that_has_the_targets_positions_counts(ignored):
    torch.manual_seed(0)
    model, (tokens, _) = Tagger(), batch()
    source = torch.randint(1, VOCABULARY, (len(tokens), 4))
    tags = torch.where(tokens == PADDING, PADDING, 1 + tokens % (CLASSES - 1))
    output = model(source, tokens)
    value = F.cross_entropy(output.flatten(0, 1), tags.flatten(), ignore_index=ignored)
    found = checked(model, source, tokens, output=output, loss=value)
    share = float((tokens == PADDING).float().mean()) if ignored < 0 else 0.0
    assert only(found, "padded_target_share") == pytest.approx(share)


def test_inputs_of_one_position_have_no_padding():
    torch.manual_seed(0)
    model, tags = Tagger(), torch.arange(12).reshape(12, 1) % CLASSES
    source, tokens = torch.randint(1, VOCABULARY, (12, 4)), torch.arange(12).reshape(12, 1) // 3
    output = model(source, tokens)
    value = F.cross_entropy(output.flatten(0, 1), tags.flatten())
    found = checked(model, source, tokens, output=output, loss=value)
    assert numbers(found, "padded_target_share") == []
