"""Hierarchical attention over short court reports: which department does the ruling concern?"""

import argparse
import random

import torch
from torch import nn
from torch.nn import functional as F

TOPICS = {
    "traffic": ["car", "road", "signal", "driver"],
    "housing": ["rent", "tenant", "roof", "lease"],
    "labour": ["wage", "shift", "union", "notice"],
    "tax": ["refund", "income", "levy", "duty"],
    "school": ["pupil", "lesson", "exam", "teacher"],
}
FILLER = ["the", "a", "then", "was", "seen", "by", "page", "day", "file", "old", "new", "said"]
RULING = ["court", "ordered", "judge"]
WORDS = [*FILLER, *RULING, *(word for words in TOPICS.values() for word in words)]
INDEX = {word: i for i, word in enumerate(WORDS)}
SENTENCES, LENGTH = 4, 7


def write_sentence(rng, topic, ruling):
    words = [rng.choice(FILLER) for _ in range(LENGTH)]
    for place in rng.sample(range(1, LENGTH), 2):
        words[place] = rng.choice(TOPICS[topic])
    if ruling:
        words[0] = rng.choice(RULING)
    return [INDEX[word] for word in words]


def write_documents(rng, count):
    documents, labels = [], []
    names = list(TOPICS)
    for _ in range(count):
        topics = [rng.choice(names) for _ in range(SENTENCES)]
        ruling = rng.randrange(SENTENCES)
        documents.append([write_sentence(rng, t, i == ruling) for i, t in enumerate(topics)])
        labels.append(names.index(topics[ruling]))
    return torch.tensor(documents), torch.tensor(labels)


class TaskAttention(nn.Module):
    """Reduces the units of a sequence to one vector, with a learned context vector."""

    def __init__(self, input_size, output_size, fixed):
        super().__init__()
        self.projection = nn.Linear(input_size, output_size)
        self.context = nn.Parameter(torch.empty(1, output_size))
        nn.init.xavier_uniform_(self.context)
        self.fixed = fixed

    def forward(self, inputs):
        projected = torch.tanh(self.projection(inputs))
        if self.fixed:
            score = (projected * self.context).sum(dim=2, keepdim=True)
            weights = F.softmax(score, dim=1)
        else:
            weights = F.softmax(projected * self.context, dim=-1)
        return (projected * weights).sum(dim=1)


class HAN(nn.Module):
    def __init__(self, fixed, emb=24, hidden=16, out=32):
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), emb)
        self.word_rnn = nn.GRU(emb, hidden, batch_first=True, bidirectional=True)
        self.word_attention = TaskAttention(2 * hidden, out, fixed)
        self.sentence_rnn = nn.GRU(out, hidden, batch_first=True, bidirectional=True)
        self.sentence_attention = TaskAttention(2 * hidden, out, fixed)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(out, len(TOPICS))

    def forward(self, documents):
        b, s, w = documents.shape
        words, _ = self.word_rnn(self.embedding(documents.view(b * s, w)))
        sentences = self.dropout(self.word_attention(words)).view(b, s, -1)
        encoded, _ = self.sentence_rnn(sentences)
        return self.classifier(self.dropout(self.sentence_attention(encoded)))


def batches(documents, labels, size, rng):
    order = list(range(len(labels)))
    rng.shuffle(order)
    for start in range(0, len(order) - size + 1, size):
        rows = order[start : start + size]
        yield documents[rows], labels[rows]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    train_x, train_y = write_documents(rng, 1920)
    dev_x, dev_y = write_documents(rng, 400)

    model = HAN(args.fixed)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for epoch in range(1, args.epochs + 1):
        model.train()
        total, count = 0.0, 0
        for x, y in batches(train_x, train_y, 32, rng):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            total, count = total + loss.item(), count + 1
        model.eval()
        with torch.no_grad():
            accuracy = (model(dev_x).argmax(dim=1) == dev_y).float().mean().item()
        print(f"epoch {epoch} train loss {total / count:.4f} dev accuracy {accuracy:.4f}")
    print(f"metric {accuracy:.4f}")


if __name__ == "__main__":
    main()
