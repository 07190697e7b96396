"""Models that people train are split into components; `test_compatibility` trains them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from popular_models import ATTENDING, MODELS

from diagnoser.components import parameters_of, split_components

ATTENTION = ("query", "key", "value", "attention_output")

# Attentions, and components of the other kinds.
KINDS: dict[str, tuple[int, dict[str, int]]] = {
    "BERT": (2, {"embedding": 3, "norm": 5, "feed_forward": 5, "head": 1}),
    "DistilBERT": (2, {"embedding": 2, "norm": 5, "feed_forward": 4, "head": 2}),
    "RoBERTa": (2, {"embedding": 3, "norm": 5, "feed_forward": 4, "head": 2}),
    "GPT-2": (2, {"embedding": 2, "norm": 5, "feed_forward": 4}),
    "Llama": (2, {"embedding": 1, "norm": 5, "feed_forward": 6, "head": 1}),
    "Mixtral": (2, {"embedding": 1, "norm": 5, "other": 6, "head": 1}),
    "ViT": (2, {"embedding": 2, "convolution": 1, "norm": 5, "feed_forward": 4, "head": 1}),
    "T5": (3, {"embedding": 3, "norm": 7, "feed_forward": 4}),
    "nn.Transformer": (3, {"embedding": 1, "norm": 7, "feed_forward": 4, "head": 1}),
    "nn.TransformerEncoder": (2, {"embedding": 1, "norm": 4, "feed_forward": 4, "head": 1}),
    "nn.TransformerDecoder": (4, {"embedding": 1, "norm": 6, "feed_forward": 4, "head": 1}),
    "GRU": (0, {"embedding": 1, "recurrent": 1, "head": 1}),
    "LSTM": (0, {"embedding": 1, "recurrent": 1, "head": 1}),
    "RNN": (0, {"embedding": 1, "recurrent": 1, "head": 1}),
    "Conv1d": (0, {"convolution": 2, "norm": 1, "head": 1}),
    "Conv2d": (0, {"convolution": 2, "norm": 1, "head": 1}),
    "Conv3d": (0, {"convolution": 2, "norm": 1, "head": 1}),
    "Perceiver": (2, {"other": 1, "embedding": 1, "norm": 1, "head": 1}),
    "LoRA": (1, {"embedding": 2, "norm": 3, "feed_forward": 2, "head": 2, "query": 2, "value": 2}),
    "mixture of experts": (0, {"embedding": 1, "feed_forward": 9, "head": 1}),
    "graph attention": (0, {"other": 4}),
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def test_every_model_has_its_kinds():
    assert KINDS.keys() == MODELS.keys()
    assert {name for name, (attentions, _) in KINDS.items() if attentions} == ATTENDING


@pytest.mark.parametrize("name", MODELS)
def test_its_components_are_of_the_right_kinds_and_hold_every_element_once(name):
    models = {"model": MODELS[name]().model}
    components = split_components(models)
    attentions, others = KINDS[name]
    expected = Counter(others) + Counter(dict.fromkeys(ATTENTION, attentions))
    assert Counter(component.kind for component in components) == expected
    assert len({component.name for component in components}) == len(components)
    seen = {n: torch.zeros_like(p, dtype=torch.int) for n, p in parameters_of(models).items()}
    for component in components:
        for part in component.parts:
            part.view(seen[part.parameter]).add_(1)
    assert all((count == 1).all() for count in seen.values())
