"""The hierarchical attention network (Yang et al., NAACL 2016): words, sentences, document."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

PADDING = 0


class Attention(nn.Module):
    """Additive attention: u = tanh(W h + b), weights = softmax(u . c), result = sum weights * h."""

    def __init__(self, states: int, hidden: int) -> None:
        super().__init__()
        self.projection = nn.Linear(states, hidden)
        self.context = nn.Linear(hidden, 1, bias=False)

    def forward(self, states: Tensor, visible: Tensor) -> Tensor:
        """(rows, steps, states) and a (rows, steps) mask to (rows, states)."""
        scores = self.context(torch.tanh(self.projection(states))).squeeze(-1)
        weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
        return (weights.unsqueeze(1) @ states).squeeze(1)


class HAN(nn.Module):
    def __init__(
        self,
        vocabulary: int,
        classes: int,
        *,
        embedding: int = 64,
        hidden: int = 32,
        attention: int = 64,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding, padding_idx=PADDING)
        self.word_encoder = nn.GRU(embedding, hidden, batch_first=True, bidirectional=True)
        self.word_attention = Attention(2 * hidden, attention)
        self.sentence_encoder = nn.GRU(2 * hidden, hidden, batch_first=True, bidirectional=True)
        self.sentence_attention = Attention(2 * hidden, attention)
        self.classifier = nn.Linear(2 * hidden, classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, documents: Tensor) -> Tensor:
        """(documents, sentences, words) to logits (documents, classes)."""
        batch, sentences, _ = documents.shape
        lines = documents.flatten(0, 1)
        states = encode(self.word_encoder, self.dropout(self.embedding(lines)), lines != PADDING)
        vectors = self.word_attention(states, self.visible_words(lines)).view(batch, sentences, -1)
        present = (documents != PADDING).any(-1)
        states = encode(self.sentence_encoder, self.dropout(vectors), present)
        return self.classifier(self.dropout(self.sentence_attention(states, present)))

    def visible_words(self, lines: Tensor) -> Tensor:
        """The mask of the word attention.

        An empty line keeps its first word visible: a softmax over nothing is NaN.
        """
        visible = lines != PADDING
        visible[:, 0] = True
        return visible


def encode(encoder: nn.GRU, inputs: Tensor, present: Tensor) -> Tensor:
    """Runs a GRU over the present steps only; an empty row counts as one step long."""
    packed = pack_padded_sequence(
        inputs, present.sum(1).clamp(min=1), batch_first=True, enforce_sorted=False
    )
    states, _ = pad_packed_sequence(encoder(packed)[0], True, total_length=inputs.shape[1])
    return states
