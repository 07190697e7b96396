import argparse
import math
import random

import torch
from torch import nn

PAD, CLS, SEP = 0, 1, 2
NAMES = ["anna", "ben", "carl", "dora", "emil", "fay"]
THINGS = ["apples", "books", "coins", "drums", "eggs", "flags"]
FILLER = ["yesterday", "again", "at", "home", "with", "friends", "quickly", "today"]
POSITIVE = ["has", "owns"]
NEGATIVE = ["lacks", "lost"]
OTHER = ["wants", "likes"]
WORDS = [*NAMES, *THINGS, *FILLER, *POSITIVE, *NEGATIVE, *OTHER]
VOCAB = {w: i + 3 for i, w in enumerate(WORDS)}
LABELS = ["entailment", "contradiction", "neutral"]


def make_pair(rng):
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    tail = rng.sample(FILLER, rng.randint(0, 5))
    verbs = [POSITIVE, NEGATIVE]
    rng.shuffle(verbs)
    label = rng.randrange(3)
    premise = [name, rng.choice(verbs[0]), thing, *tail]
    hypothesis = [name, rng.choice([verbs[0], verbs[1], OTHER][label]), thing]
    return premise, hypothesis, label


def build(n, rng, seen):
    rows = []
    while len(rows) < n:
        premise, hypothesis, label = make_pair(rng)
        key = " ".join([*premise, "|", *hypothesis])
        if key not in seen:
            seen.add(key)
            rows.append((premise, hypothesis, label))
    return rows


def collate(rows, args):
    ids, segments, labels = [], [], []
    for premise, hypothesis, label in rows:
        first = [CLS] + [VOCAB[w] for w in premise] + [SEP]
        second = [VOCAB[w] for w in hypothesis] + [SEP]
        ids.append(first + second)
        segments.append([0] * len(first) + [1] * len(second))
        labels.append(label)
    width = max(len(x) for x in ids)
    lengths = torch.tensor([len(x) for x in ids])
    input_ids = torch.tensor([x + [PAD] * (width - len(x)) for x in ids])
    token_types = torch.tensor([x + [0] * (width - len(x)) for x in segments])
    mask = torch.ones_like(input_ids)
    if args.fixed:
        mask[torch.arange(width)[None, :] >= lengths[:, None]] = 0
    return input_ids, token_types, mask, torch.tensor(labels)


class SelfAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def split(self, x):
        b, n, d = x.shape
        return x.view(b, n, self.heads, d // self.heads).transpose(1, 2)

    def forward(self, x, mask):
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
        scores = scores + (1.0 - mask[:, None, None, :].float()) * -10000.0
        context = scores.softmax(dim=-1) @ v
        return self.output(context.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attention = SelfAttention(dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x, mask):
        x = x + self.attention(self.norm1(x), mask)
        return x + self.ffn(self.norm2(x))


class BertNLI(nn.Module):
    def __init__(self, dim=32, heads=2, layers=2, max_len=24):
        super().__init__()
        self.words = nn.Embedding(len(VOCAB) + 3, dim, padding_idx=PAD)
        self.positions = nn.Embedding(max_len, dim)
        self.segments = nn.Embedding(2, dim)
        nn.init.normal_(self.positions.weight, std=0.1)
        nn.init.normal_(self.segments.weight, std=0.1)
        self.norm = nn.LayerNorm(dim)
        self.encoder = nn.ModuleList(Layer(dim, heads) for _ in range(layers))
        self.pooler = nn.Linear(dim, dim)
        self.nli_head = nn.Linear(dim, len(LABELS))

    def forward(self, input_ids, token_types, mask):
        positions = torch.arange(input_ids.size(1))
        x = self.words(input_ids) + self.positions(positions) + self.segments(token_types)
        for layer in self.encoder:
            x = layer(x, mask)
        return self.nli_head(torch.tanh(self.pooler(self.norm(x[:, 0]))))


def evaluate(model, rows, args):
    model.eval()
    hits = 0
    with torch.no_grad():
        for start in range(0, len(rows), 150):
            ids, types, mask, labels = collate(rows[start : start + 150], args)
            hits += (model(ids, types, mask).argmax(1) == labels).sum().item()
    model.train()
    return hits / len(rows)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    seen = set()
    train_rows = build(1440, rng, seen)
    test_rows = build(300, rng, seen)

    model = BertNLI()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    loss_fn = nn.CrossEntropyLoss()
    batch_size, step = 16, 0
    for epoch in range(3):
        rng.shuffle(train_rows)
        for start in range(0, len(train_rows), batch_size):
            ids, types, mask, labels = collate(train_rows[start : start + batch_size], args)
            loss = loss_fn(model(ids, types, mask), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 50 == 0:
                print(f"epoch {epoch} step {step} loss {loss.item():.4f}")
    print("metric", round(evaluate(model, test_rows, args), 4))


if __name__ == "__main__":
    main()
