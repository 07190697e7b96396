"""A5: a hierarchical attention network (Yang et al. 2016) on made-up documents.

A document is some sentences, each of a subject, and belongs to the class that its one decisive
sentence speaks of: the sentence that holds a signal word. Sentences and documents differ in length.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from diagnoser.benchmark.subjects.objectives import accuracy, smoothed_cross_entropy
from diagnoser.injection.training import Batch, Data, Settings, Subject
from diagnoser.injection.weighing import visible, weigh

CLASSES = 4
PADDING, SIGNALS, OF_A_CLASS, COMMON = 0, 3, 6, 20
VOCABULARY = 1 + SIGNALS + CLASSES * OF_A_CLASS + COMMON
SENTENCES, WORDS = 4, 7
TRAIN, HELD_OUT = 6000, 600
SPOILT = 0.05  # share of class words that are of another class


@functools.cache
def data() -> Data:
    """Draws the documents."""
    generator = torch.Generator().manual_seed(0)
    return Data(train=draw(TRAIN, generator), held_out=draw(HELD_OUT, generator))


def draw(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draws documents, (count, SENTENCES, WORDS), and their classes, (count,)."""
    shape = (count, SENTENCES, WORDS)
    subjects = torch.randint(CLASSES, shape[:2], generator=generator)
    spoilt = torch.rand(shape, generator=generator) < SPOILT
    other = torch.randint(CLASSES, shape, generator=generator)
    of_class = torch.where(spoilt, other, subjects[..., None]) * OF_A_CLASS
    of_class = of_class + torch.randint(OF_A_CLASS, shape, generator=generator) + 1 + SIGNALS
    common = torch.randint(COMMON, shape, generator=generator) + 1 + SIGNALS + CLASSES * OF_A_CLASS
    tokens = torch.where(torch.rand(shape, generator=generator) < 0.35, of_class, common)

    length = torch.randint(4, WORDS + 1, shape[:2], generator=generator)
    lines = torch.randint(2, SENTENCES + 1, (count,), generator=generator)
    decisive = (torch.rand(count, generator=generator) * lines).long()
    signal = 1 + torch.randint(SIGNALS, (count,), generator=generator)
    place = torch.randint(0, 4, (count,), generator=generator)
    rows = torch.arange(count)
    tokens[rows, decisive, (place + 1) % 4] = of_class[rows, decisive, (place + 1) % 4]
    tokens[rows, decisive, place] = signal
    tokens[torch.arange(WORDS) >= length[..., None]] = PADDING
    tokens[torch.arange(SENTENCES) >= lines[:, None]] = PADDING
    return {"tokens": tokens, "targets": subjects[rows, decisive]}


class AdditiveAttention(nn.Module):
    """Scores u . tanh(W h + b) weigh the states of a row; its context u is learned."""

    def __init__(self, states: int, hidden: int) -> None:
        super().__init__()
        self.projection = nn.Linear(states, hidden)
        self.context = nn.Linear(hidden, 1, bias=False)
        self.weigh = functools.partial(weigh, scale=1.0)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """(rows, steps, states) and a (rows, 1, steps) mask to (rows, states)."""
        scores = self.context(torch.tanh(self.projection(states))).transpose(1, 2)
        return (self.weigh(scores, mask) @ states).squeeze(1)


class HierarchicalAttention(nn.Module):
    """Words make sentences, sentences make the document, by a GRU and attention each."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width, hidden = settings.width, settings.width // 2
        self.visible = functools.partial(visible, causal=False)
        self.embedding = nn.Embedding(VOCABULARY, width, padding_idx=PADDING)
        self.word_encoder = nn.GRU(width, hidden, batch_first=True, bidirectional=True)
        self.word_attention = AdditiveAttention(2 * hidden, width)
        self.sentence_encoder = nn.GRU(2 * hidden, hidden, batch_first=True, bidirectional=True)
        self.sentence_attention = AdditiveAttention(2 * hidden, width)
        self.dropout = nn.Dropout(settings.dropout)
        self.head = nn.Linear(2 * hidden, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, sentences, words) to logits (batch, classes)."""
        lines = tokens.flatten(0, 1)
        states, _ = self.word_encoder(self.dropout(self.embedding(lines)))
        vectors = self.word_attention(states, self.seen(lines != PADDING))
        vectors = vectors.unflatten(0, tokens.shape[:2])
        states, _ = self.sentence_encoder(self.dropout(vectors))
        document = self.sentence_attention(states, self.seen((tokens != PADDING).any(-1)))
        return self.head(self.dropout(document))  # type: ignore[no-any-return]

    def seen(self, present: Tensor) -> Tensor:
        """What the one context vector sees of (rows, steps): (rows, 1, steps)."""
        return self.visible(present)[:, 0, :1]


def predict(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a batch, (batch, classes)."""
    return model(batch["tokens"])  # type: ignore[no-any-return]


HAN = Subject(
    id="A5",
    name="han",
    split="dev",
    summary="hierarchical attention network, recurrent, on made-up documents, padded",
    recipes={
        "a": Settings(steps=250, batch_size=32, learning_rate=6e-3),
        "b": Settings(
            steps=300, batch_size=24, learning_rate=5e-3, optimizer="adam", betas=(0.9, 0.98),
            weight_decay=0.0, warmup=0.1, schedule="constant", width=24,
        ),
        "c": Settings(steps=250, batch_size=48, learning_rate=1e-2, weight_decay=0.1, width=20),
    },
    data=data,
    build=HierarchicalAttention,
    predict=predict,
    criterion=smoothed_cross_entropy,
    score=accuracy,
    score_name="accuracy",
)  # fmt: skip
