"""The models whose curvature is measured, each trained until its Hessian is indefinite.

Every model maps one tensor of word numbers to logits, so that all libraries can take it as it is.
The synthetic tasks are about topics: each has words it prefers, and some of a text's words are
noise (`topics`, `halves`). Trained models are in eval mode; training uses one fixed seed, so the
same machine makes the same model every time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SEED = 0
MOST_SAMPLES = 256
CLASSES = 4
WORDS = 32  # of the tiny models' vocabulary

HAN_CASE = Path(__file__).parents[1] / "cases" / "han"


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained model in eval mode and its probe set.

    Attributes:
        name: Key in `SUBJECTS`.
        model: Word numbers to logits.
        inputs: (MOST_SAMPLES, ...) word numbers; a probe set of N samples is the first N.
        targets: (MOST_SAMPLES,) classes.
        losses: Of the first and the last training step.
        steps: Of training.
        dense: Small enough for the exact Hessian block by block.
        chosen: Components that are measured; None: all.
    """

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    losses: tuple[float, float]
    steps: int
    dense: bool
    chosen: Callable[[str], bool] | None = None

    def probe_set(self, samples: int) -> tuple[Tensor, Tensor]:
        """Returns the first samples: (N, ...) inputs and (N,) targets."""
        return self.inputs[:samples], self.targets[:samples]


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean cross-entropy."""
    return F.cross_entropy(model(inputs), targets)


def topics(
    generator: torch.Generator, samples: int, shape: tuple[int, ...], vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Draws texts, (samples, *shape) word numbers, half of whose words belong to their class."""
    targets = torch.randint(CLASSES, (samples,), generator=generator)
    noise = torch.randint(vocabulary, (samples, *shape), generator=generator)
    per_class = vocabulary // CLASSES
    own = noise % per_class + per_class * targets.view(-1, *[1] * len(shape))
    kept = torch.rand(noise.shape, generator=generator) < 0.5
    return torch.where(kept, own, noise), targets


def halves(
    generator: torch.Generator, samples: int, length: int, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Draws texts, (samples, length), of two topics, one a half; the class needs both.

    Twice «the topics differ» plus the first topic. While the exclusive-or is being learnt, blocks
    of a transformer have negative traces, which a benchmark of traces should not lack.
    """
    first, second = torch.randint(2, (2, samples), generator=generator)
    noise = torch.randint(vocabulary, (samples, length), generator=generator)
    half = length // 2
    topic = torch.stack([first, second], 1).repeat_interleave(half, 1)
    own = noise % (vocabulary // 2) + vocabulary // 2 * topic
    kept = torch.rand(noise.shape, generator=generator) < 0.6
    return torch.where(kept, own, noise), 2 * (first ^ second) + first


class SelfAttention(nn.Module):
    """Multi-head attention written out, which every way of differentiating twice can follow."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """(samples, tokens, width) to the same."""
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-LN transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(samples, tokens, width) to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class TinyTransformer(nn.Module):
    """Embedding, pre-LN layers, mean over tokens, head: 5,252 parameters as it is by default."""

    def __init__(self, layers: int = 2, width: int = 16, length: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.position = nn.Embedding(length, width)
        self.layers = nn.ModuleList(Block(width, 2) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """(samples, tokens) to logits."""
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class AdditiveAttention(nn.Module):
    """Additive attention (Yang et al. 2016, equations 5 to 7) over texts of equal length."""

    def __init__(self, states: int, hidden: int) -> None:
        super().__init__()
        self.projection = nn.Linear(states, hidden)
        self.context = nn.Linear(hidden, 1, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """(rows, steps, states) to (rows, states)."""
        weights = self.context(torch.tanh(self.projection(states))).softmax(1)
        return (weights * states).sum(1)


class TinyHAN(nn.Module):
    """A hierarchical attention network without packing: words, sentences, document."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.word_encoder = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.word_attention = AdditiveAttention(2 * width, width)
        self.sentence_encoder = nn.GRU(2 * width, width, batch_first=True, bidirectional=True)
        self.sentence_attention = AdditiveAttention(2 * width, width)
        self.classifier = nn.Linear(2 * width, CLASSES)

    def forward(self, documents: Tensor) -> Tensor:
        """(samples, sentences, words) to logits."""
        samples, sentences, _ = documents.shape
        words = self.word_encoder(self.embedding(documents.flatten(0, 1)))[0]
        lines = self.word_attention(words).view(samples, sentences, -1)
        return self.classifier(self.sentence_attention(self.sentence_encoder(lines)[0]))


def tiny_transformer(length: int = 12, layers: int = 2) -> Subject:
    """Two layers of width 16 on texts of 12 words."""
    return _trained(
        "tiny_transformer",
        lambda: TinyTransformer(layers, length=length),
        lambda g, n: halves(g, n, length, WORDS),
        steps=60,
        rate=1e-2,
        dense=True,
    )


def tiny_han() -> Subject:
    """Recurrent layers of width 8 on documents of 4 sentences of 6 words."""
    return _trained(
        "tiny_han",
        TinyHAN,
        lambda g, n: topics(g, n, (4, 6), WORDS),
        steps=80,
        rate=5e-3,
        dense=True,
    )


def han() -> Subject:
    """The hierarchical attention network of the case, on BBC News (packed sequences)."""
    if str(HAN_CASE) not in sys.path:
        sys.path.insert(0, str(HAN_CASE))
    import bbc_news
    import model as han_model

    data = bbc_news.load()
    held_out = data.validation

    def draw(generator: torch.Generator, samples: int) -> tuple[Tensor, Tensor]:
        if samples == MOST_SAMPLES:
            if len(held_out) >= samples:
                return held_out.documents[:samples], held_out.labels[:samples]
            return data.test.documents[:samples], data.test.labels[:samples]
        rows = torch.randint(len(data.train), (samples,), generator=generator)
        return data.train.documents[rows], data.train.labels[rows]

    return _trained(
        "han",
        lambda: han_model.HAN(data.vocabulary_size, len(bbc_news.CLASSES)),
        draw,
        steps=60,
        rate=3e-3,
        dense=False,
    )


def distilbert() -> Subject:
    """A DistilBERT of width 128 with 4 layers, on texts of 64 tokens; layers 0 and 3 measured.

    The norms of the two layers stand for one another: the second of each is left out.
    """
    return _trained(
        "distilbert",
        lambda: _distilbert(dim=128, n_layers=4, n_heads=4, hidden_dim=512, vocab_size=8000),
        lambda g, n: halves(g, n, 64, 1000),
        steps=80,
        rate=1e-3,
        dense=False,
        chosen=lambda name: (
            "layer." not in name
            or (("layer.0." in name or "layer.3." in name) and "output_layer_norm" not in name)
        ),
    )


def distilbert_base() -> nn.Module:
    """The full DistilBERT (66 M parameters), untrained: for time and memory only."""
    torch.manual_seed(SEED)
    return _distilbert().eval()


def _distilbert(**sizes: int) -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    class Classifier(DistilBertForSequenceClassification):
        """Takes tokens, returns logits: nothing else than tensors."""

        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(input_ids=tokens).logits

    settings = {
        "max_position_embeddings": 64,
        "num_labels": CLASSES,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0,
    }
    return Classifier(DistilBertConfig(**(settings | sizes)))


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "tiny_transformer": tiny_transformer,
    "tiny_han": tiny_han,
    "han": han,
    "distilbert": distilbert,
}


def _trained(
    name: str,
    make: Callable[[], nn.Module],
    draw: Callable[[torch.Generator, int], tuple[Tensor, Tensor]],
    *,
    steps: int,
    rate: float,
    dense: bool,
    chosen: Callable[[str], bool] | None = None,
) -> Subject:
    """Trains with Adam on fresh batches of 32, then draws the probe set from another stream."""
    with torch.random.fork_rng([]):
        torch.manual_seed(SEED)
        model = make().train()
        generator = torch.Generator().manual_seed(SEED)
        optimizer = torch.optim.Adam(model.parameters(), rate)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_of(model, *draw(generator, 32))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        optimizer.zero_grad(set_to_none=True)
        inputs, targets = draw(torch.Generator().manual_seed(SEED + 1), MOST_SAMPLES)
    return Subject(
        name, model.eval(), inputs, targets, (losses[0], losses[-1]), steps, dense, chosen
    )
