"""A4: DistilBERT (Sanh et al. 2019) as transformers builds it, small, on sentiment with negation.

A review says something good or bad of the film and of one or two other things, plainly or by
negation; only what it says of the film counts, so words without their neighbours decide little.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from diagnoser.benchmark.subjects.objectives import accuracy, smoothed_cross_entropy
from diagnoser.benchmark.subjects.packages import folder_of
from diagnoser.benchmark.subjects.splitting import apart
from diagnoser.injection.training import Batch, Data, Settings, Subject
from diagnoser.injection.weighing import visible, weigh

FILM = "film"
OTHERS = ("book", "trailer", "cinema", "popcorn")
GOOD = ("good", "great", "lovely")
BAD = ("bad", "dull", "awful")
NOT = ("not", "never")
WORDS = ("[PAD]", "[CLS]", "and", FILM, *OTHERS, *GOOD, *BAD, *NOT)
NUMBER = {word: index for index, word in enumerate(WORDS)}
PADDING = 0
LENGTH = 12
DRAWS = 14  # random numbers a review is made from
TRAIN, HELD_OUT = 12000, 600
CLASSES = 2
ATTENTION = "weighed"  # the name under which transformers finds `attend`


@functools.cache
def data() -> Data:
    """Draws the reviews."""
    generator = torch.Generator().manual_seed(0)
    return apart(train=draw(TRAIN, generator), held_out=draw(HELD_OUT, generator))


def draw(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draws reviews, (count, LENGTH), and whether the film is good, (count,)."""
    tokens = torch.full((count, LENGTH), PADDING)
    targets = torch.zeros(count, dtype=torch.long)
    chances = torch.rand(count, DRAWS, generator=generator).tolist()
    for row, chance in enumerate(chances):
        words, good = review(chance)
        tokens[row, : len(words)] = torch.tensor([NUMBER[word] for word in words])
        targets[row] = int(good)
    return {"tokens": tokens, "targets": targets}


def review(chance: list[float]) -> tuple[list[str], bool]:
    """Makes a review from `DRAWS` numbers in [0, 1), and says whether it finds the film good.

    >>> review([0.9, 0.0, *(0.1, 0.9, 0.0, 0.0) * 3])
    (['[CLS]', 'film', 'bad', 'and', 'book', 'bad'], False)
    """
    clauses = 2 + int(chance[0] < 0.5)
    film = int(chance[1] * clauses)
    words, good = ["[CLS]"], False
    for place in range(clauses):
        verdict, negated, which, thing = chance[2 + 4 * place : 6 + 4 * place]
        if place:
            words.append("and")
        if place == film:
            good = verdict >= 0.5
        noun = FILM if place == film else _pick(OTHERS, thing)
        words += clause(noun, verdict >= 0.5, negated, which)
    return words, good


def clause(noun: str, good: bool, negated: float, which: float) -> list[str]:
    """Says of something that it is good or bad, a third of the times by negation."""
    negates = negated < 1 / 3
    middle = [_pick(NOT, negated * 3)] if negates else []
    return [noun, *middle, _pick(GOOD if good != negates else BAD, which)]


def _pick(words: tuple[str, ...], chance: float) -> str:
    return words[min(int(chance * len(words)), len(words) - 1)]


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: object
) -> tuple[Tensor, Tensor]:
    """Attention as transformers calls it, with the module's own `weigh`.

    Args:
        module: The attention module.
        query: (batch, heads, length, width of a head), as are key and value.
        key: See query.
        value: See query.
        mask: True where a query may see a key.

    Returns:
        Attended values, (batch, length, heads, width of a head), and weights.
    """
    weights = module.weigh(query @ key.transpose(-2, -1), mask)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Classifier(nn.Module):
    """DistilBERT, and a linear head on the state of the first token."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        folder_of("transformers", "distilbert", "pip install transformers")
        from transformers import AttentionInterface, DistilBertConfig, DistilBertModel
        from transformers.models.distilbert.modeling_distilbert import DistilBertSelfAttention

        AttentionInterface.register(ATTENTION, attend)
        width, heads = settings.width, settings.heads
        self.visible = functools.partial(visible, causal=False)
        configuration: Any = DistilBertConfig  # its fields are not typed
        self.distilbert: nn.Module = DistilBertModel(
            configuration(
                vocab_size=len(WORDS), max_position_embeddings=LENGTH, pad_token_id=PADDING,
                n_layers=settings.depth, n_heads=heads, dim=width, hidden_dim=2 * width,
                dropout=settings.dropout, attention_dropout=0.0, initializer_range=0.3,
                attn_implementation=ATTENTION,
            )
        )  # fmt: skip
        for module in self.distilbert.modules():
            if isinstance(module, DistilBertSelfAttention):
                attention: Any = module
                attention.heads = heads
                attention.weigh = functools.partial(weigh, scale=1.0 / math.sqrt(width // heads))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) to logits (batch, classes)."""
        mask = self.visible(tokens != PADDING)
        states = self.distilbert(input_ids=tokens, attention_mask=mask).last_hidden_state
        return self.head(states[:, 0])  # type: ignore[no-any-return]


def predict(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a batch, (batch, classes)."""
    return model(batch["tokens"])  # type: ignore[no-any-return]


DISTILBERT = Subject(
    id="A4",
    name="distilbert",
    split="train",
    summary="DistilBERT of transformers, post-norm, on sentiment with negation, padded",
    recipes={
        "a": Settings(steps=320, batch_size=56, learning_rate=4e-3, warmup=0.1),
        "b": Settings(
            steps=350, batch_size=48, learning_rate=3e-3, optimizer="adam", betas=(0.9, 0.98),
            weight_decay=0.0, warmup=0.15, schedule="constant",
        ),
        "c": Settings(
            steps=420, batch_size=32, learning_rate=4e-3, weight_decay=0.1, warmup=0.1,
            schedule="constant", width=24,
        ),
    },
    data=data,
    build=Classifier,
    predict=predict,
    criterion=smoothed_cross_entropy,
    score=accuracy,
    score_name="accuracy",
    packages=("transformers",),
)  # fmt: skip
