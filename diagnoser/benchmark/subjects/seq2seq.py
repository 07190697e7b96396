"""A7: the encoder and decoder of the first transformer (Vaswani et al. 2017), on reversing digits.

Strings differ in length; the decoder is given the right digits so far (teacher forcing).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from diagnoser.benchmark.subjects.layers import Attention, FeedForward, PostNormLayer, plus
from diagnoser.benchmark.subjects.objectives import IGNORED, accuracy, smoothed_cross_entropy
from diagnoser.benchmark.subjects.splitting import apart
from diagnoser.injection.training import Batch, Data, Settings, Subject
from diagnoser.injection.weighing import visible

DIGITS, PADDING, START = 10, 0, 11  # digit d is token d + 1
SHORTEST, LENGTH = 4, 7
SPOILT = 0.04  # share of digits that the encoder reads wrongly, so that no model is always right
TRAIN, HELD_OUT = 14000, 500


@functools.cache
def data() -> Data:
    """Draws the strings."""
    generator = torch.Generator().manual_seed(0)
    return apart(train=draw(TRAIN, generator), held_out=draw(HELD_OUT, generator))


def draw(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draws strings, all (count, LENGTH): tokens, what the decoder has so far, and targets."""
    length = torch.randint(SHORTEST, LENGTH + 1, (count, 1), generator=generator)
    digits = torch.randint(DIGITS, (count, LENGTH), generator=generator)
    spoilt = torch.rand(count, LENGTH, generator=generator) < SPOILT
    other = torch.randint(DIGITS, (count, LENGTH), generator=generator)
    read = torch.where(spoilt, other, digits)
    places = torch.arange(LENGTH)
    absent = places >= length
    reversed_digits = digits.gather(1, (length - 1 - places).clamp(min=0))
    so_far = torch.cat([torch.full((count, 1), START), reversed_digits[:, :-1] + 1], dim=1)
    return {
        "tokens": (read + 1).masked_fill(absent, PADDING),
        "so_far": so_far.masked_fill(absent, PADDING),
        "targets": reversed_digits.masked_fill(absent, IGNORED),
    }


class DecoderLayer(nn.Module):
    """A post-norm block that attends to itself and then to the encoder's states."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.attention_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads)
        self.cross_attention_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, 2 * width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.residual = plus

    def forward(self, states: Tensor, mask: Tensor, source: Tensor, source_mask: Tensor) -> Tensor:
        """(batch, length, width), twice, and their masks to new states."""
        change = self.attention(states, mask)
        states = self.attention_norm(self.residual(states, self.dropout(change)))
        change = self.cross_attention(states, source_mask, source)
        states = self.cross_attention_norm(self.residual(states, self.dropout(change)))
        change = self.feed_forward(states)
        return self.feed_forward_norm(  # type: ignore[no-any-return]
            self.residual(states, self.dropout(change))
        )


class EncoderDecoder(nn.Module):
    """Encoder and decoder; ``visible`` masks the source, ``visible_so_far`` the decoder."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width, heads, dropout = settings.width, settings.heads, settings.dropout
        self.visible = functools.partial(visible, causal=False)
        self.visible_so_far = functools.partial(visible, causal=True)
        self.embedding = nn.Embedding(1 + DIGITS + 1, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.position_scale = 1.0
        self.encoder_layers = nn.ModuleList(
            PostNormLayer(width, heads, dropout) for _ in range(settings.depth)
        )
        self.decoder_layers = nn.ModuleList(
            DecoderLayer(width, heads, dropout) for _ in range(settings.depth)
        )
        self.head = nn.Linear(width, DIGITS)

    def forward(self, tokens: Tensor, so_far: Tensor) -> Tensor:
        """Twice (batch, length) to logits (batch, length, digits)."""
        source_mask = self.visible(tokens != PADDING)
        source = self.embed(tokens)
        for layer in self.encoder_layers:
            source = layer(source, source_mask)
        mask = self.visible_so_far(so_far != PADDING)
        states = self.embed(so_far)
        for layer in self.decoder_layers:
            states = layer(states, mask, source, source_mask)
        return self.head(states)  # type: ignore[no-any-return]

    def embed(self, tokens: Tensor) -> Tensor:
        """(batch, length) to states with positions, (batch, length, width)."""
        places = self.position_scale * self.positions.weight[: tokens.shape[1]]
        return self.embedding(tokens) + places  # type: ignore[no-any-return]


def predict(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a batch, (batch, length, digits)."""
    return model(batch["tokens"], batch["so_far"])  # type: ignore[no-any-return]


SEQ2SEQ = Subject(
    id="A7",
    name="seq2seq",
    split="test",
    summary="encoder and decoder, post-norm, on reversing strings of digits, padded",
    recipes={
        "a": Settings(steps=220, batch_size=48, learning_rate=3e-3, warmup=0.1, depth=1),
        "b": Settings(
            steps=200, batch_size=40, learning_rate=2.5e-3, optimizer="adam", betas=(0.9, 0.98),
            weight_decay=0.0, warmup=0.15, schedule="constant", depth=1,
        ),
        "c": Settings(
            steps=210, batch_size=48, learning_rate=3.5e-3, weight_decay=0.1, warmup=0.15, width=24,
            heads=2, depth=2,
        ),
    },
    data=data,
    build=EncoderDecoder,
    predict=predict,
    criterion=smoothed_cross_entropy,
    score=accuracy,
    score_name="accuracy of a digit",
)  # fmt: skip
