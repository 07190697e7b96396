"""The subjects: healthy recipes that learn, models that can be split, data that never change."""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import replace

import pytest
import torch

from diagnoser.benchmark.subjects import SUBJECTS
from diagnoser.components import parameters_of
from diagnoser.errors import BenchmarkError
from diagnoser.injection import MOMENTS, TARGETS, Training, assemble, train

NAMES = tuple(SUBJECTS)
RECIPES = tuple((name, key) for name in NAMES for key in SUBJECTS[name].recipes)

# The score that a healthy run of each recipe reaches at least; what guessing reaches.
HEALTHY = {
    "vit": (0.85, 0.12),
    "gpt": (-2.40, -math.log(33)),
    "llama": (0.85, 0.15),
    "distilbert": (0.90, 0.55),
    "han": (0.93, 0.35),
    "video": (0.78, 0.35),
    "seq2seq": (0.85, 0.15),
    "series": (0.80, 0.05),
}
NEEDS_ATTENTION = ("llama", "distilbert", "video", "seq2seq", "series")


@pytest.fixture(params=NAMES)
def subject(request):
    return SUBJECTS[request.param]


def training_of(subject, key="a", seed=0, **changes):
    return assemble(subject, replace(subject.recipes[key], **changes), seed)[0]


def small(batch, count=4):
    return {name: tensor[:count] for name, tensor in batch.items()}


def loss_of(training, batch):
    return training.criterion(training.subject.predict(training.model, batch), batch[TARGETS])


def test_eight_subjects_of_three_recipes_divided_for_training_and_tests():
    assert [s.split for s in SUBJECTS.values()] == ["train"] * 4 + ["dev"] + ["test"] * 3
    assert [s.id for s in SUBJECTS.values()] == [f"A{number}" for number in range(1, 9)]
    for name, subject in SUBJECTS.items():
        assert subject.name == name
        assert list(subject.recipes) == ["a", "b", "c"]
        assert all(150 <= recipe.steps <= 600 for recipe in subject.recipes.values())
        for varied in ("learning_rate", "batch_size", "weight_decay"):
            assert len({getattr(recipe, varied) for recipe in subject.recipes.values()}) > 1


def test_held_out_samples_are_none_of_the_training_samples(subject):
    data = subject.data()
    assert data.train.keys() == data.held_out.keys()
    assert len({len(tensor) for tensor in data.train.values()}) == 1

    def samples(batch):
        inputs = [tensor for name, tensor in batch.items() if name != TARGETS]
        return [
            b"".join(t[row].numpy().tobytes() for t in inputs) for row in range(len(batch[TARGETS]))
        ]

    seen = set(samples(data.train))
    again = sum(sample in seen for sample in samples(data.held_out))
    assert again == 0


def test_data_do_not_depend_on_the_global_random_numbers(subject):
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        made.append(subject.data.__wrapped__())
        assert torch.equal(torch.get_rng_state(), before)
    for split in ("train", "held_out"):
        first, second = (getattr(data, split) for data in made)
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("name", "key"), RECIPES)
def test_every_parameter_element_is_in_one_component_of_a_known_kind(name, key):
    training = training_of(SUBJECTS[name], key)
    parameters = parameters_of({"model": training.model})
    count = {name: torch.zeros(p.shape, dtype=torch.int) for name, p in parameters.items()}
    for component in training.components:
        for part in component.parts:
            tensor = count[part.parameter]
            if part.dim is not None:
                tensor = tensor.narrow(part.dim, part.start, part.length)
            tensor += 1
    assert all(bool((counted == 1).all()) for counted in count.values())
    kinds = {component.kind for component in training.components}
    needed = {"query", "key", "value", "attention_output", "norm", "feed_forward"}
    if name == "han":
        needed = {"attention_projection", "attention_context", "recurrent"}
    if name != "series":  # its positions are no parameters, and its embedding is a linear map
        needed |= {"embedding"}
    assert needed | {"head"} <= kinds
    assert "other" not in kinds


def test_loss_has_first_and_second_derivatives_everywhere(subject):
    training = training_of(subject)
    parameters = list(training.model.parameters())
    loss = loss_of(training, small(training.data.train))
    first = torch.autograd.grad(loss, parameters, create_graph=True)
    along = sum((g * torch.ones_like(g)).sum() for g in first)
    second = torch.autograd.grad(along, parameters)
    assert all(bool(g.isfinite().all()) for g in (*first, *second))
    assert all(bool(g.any()) for g in first)


def test_training_mode_without_dropout_and_evaluation_agree(subject):
    training = training_of(subject, dropout=0.0)
    batch = small(training.data.held_out)
    outputs = [subject.predict(training.model.train(mode), batch) for mode in (True, False)]
    assert torch.equal(*outputs)


def test_dropout_acts_in_training_mode_only(subject):
    training = training_of(subject, dropout=0.5)
    batch = small(training.data.held_out)
    training.model.train()
    assert not torch.equal(*(subject.predict(training.model, batch) for _ in range(2)))
    training.model.eval()
    assert torch.equal(*(subject.predict(training.model, batch) for _ in range(2)))


def test_every_attention_weighs_by_an_attribute_that_changes_the_outputs(subject):
    training = training_of(subject)
    batch = small(training.data.held_out, 16)
    before = subject.predict(training.model, batch)
    attentions = [m for m in training.model.modules() if hasattr(m, "weigh")]
    assert attentions
    for attention in attentions:
        right = attention.weigh
        attention.weigh = functools.partial(right, scale=20.0)
        assert not torch.equal(subject.predict(training.model, batch), before)
        attention.weigh = right
    assert torch.equal(subject.predict(training.model, batch), before)


@pytest.mark.parametrize("name", ["gpt", "distilbert", "seq2seq"])
def test_padding_is_not_seen_and_not_asked_for(name):
    subject = SUBJECTS[name]
    training = training_of(subject)
    batch = small(training.data.held_out, 32)
    asked = batch[TARGETS] != -100
    before = subject.predict(training.model, batch)
    embedding = next(m for m in training.model.modules() if isinstance(m, torch.nn.Embedding))
    with torch.no_grad():
        embedding.weight[0] = torch.randn(embedding.weight.shape[1])
    after = subject.predict(training.model, batch)
    assert torch.allclose(before[asked], after[asked], atol=1e-5)
    training.model.visible = functools.partial(training.model.visible, padding=False)
    if name != "gpt":  # which sees no later token anyhow
        unmasked = subject.predict(training.model, batch)
        assert not torch.allclose(before[asked], unmasked[asked], atol=1e-3)


def test_the_attention_over_words_and_sentences_gives_padding_no_weight():
    training = training_of(SUBJECTS["han"])
    tokens = training.data.held_out["tokens"][:32]
    for name, present in (
        ("word_attention", (tokens != 0).flatten(0, 1)),
        ("sentence_attention", (tokens != 0).any(-1)),
    ):
        attention, seen = getattr(training.model, name), []
        right = attention.weigh
        attention.weigh = lambda *arguments, r=right, s=seen: s.append(r(*arguments)) or s[-1]
        training.model(tokens)
        weights = seen[0].squeeze(1)
        full = present.any(-1)
        assert bool((~present).any())
        assert float(weights[full][~present[full]].detach().abs().max()) == 0.0
        assert torch.allclose(weights.sum(-1), torch.ones(len(weights)))


@pytest.mark.parametrize(("name", "later"), [("gpt", "tokens"), ("llama", "tokens")])
def test_a_decoder_sees_no_later_token(name, later):
    subject = SUBJECTS[name]
    training = training_of(subject)
    batch = small(training.data.held_out)
    before = subject.predict(training.model, batch)
    changed = batch[later].clone()
    changed[:, 6:] = changed[:, 6:].flip(0)
    after = subject.predict(training.model, {**batch, later: changed})
    assert torch.allclose(before[:, :6], after[:, :6], atol=1e-6)
    assert not torch.allclose(before[:, 6:], after[:, 6:], atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "distilbert"])
def test_the_same_seed_gives_the_same_bits(name):
    subject = SUBJECTS[name]
    outcomes = [train(training_of(subject, seed=seed, steps=20, dropout=0.1)) for seed in (3, 3, 4)]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].losses != outcomes[2].losses


@pytest.mark.parametrize("name", ["vit", "gpt"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(BenchmarkError, match=f"subject {name} needs .*pip install"):
        SUBJECTS[name].data.__wrapped__()


def test_a_missing_transformers_is_named_when_the_model_is_built(monkeypatch):
    training = Training(SUBJECTS["distilbert"], SUBJECTS["distilbert"].recipes["a"], seed=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(BenchmarkError, match="distilbert needs the package transformers"):
        training.reach(MOMENTS[2])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key"), RECIPES)
def test_a_healthy_run_learns(name, key):
    outcome = train(training_of(SUBJECTS[name], key, seed=100))
    healthy, guessing = HEALTHY[name]
    assert outcome.score >= healthy > guessing


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_model_guesses(name):
    subject = SUBJECTS[name]
    outcome = train(training_of(subject, learning_rate=0.0, weight_decay=0.0, steps=1))
    healthy, guessing = HEALTHY[name]
    assert outcome.score <= guessing + 0.1 < healthy


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS_ATTENTION)
def test_without_attention_more_than_a_fifth_of_the_score_is_lost(name):
    subject = SUBJECTS[name]
    healthy = train(training_of(subject)).score
    training = training_of(subject)
    for module in training.model.modules():
        if hasattr(module, "weigh"):
            module.weigh = functools.partial(module.weigh, scale=0.0)  # every key weighs alike
    assert train(training).score < 0.8 * healthy
