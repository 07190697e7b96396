"""Hierarchical attention network that reads the verdict of made-up reviews (words -> sentences -> review)."""
import argparse

import numpy as np
import torch
import torch.nn as nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, Dataset

GOOD = "great lovely tasty superb fine".split()
BAD = "awful bland rude dire poor".split()
MEH = "average okay ordinary usual plain".split()
ASPECT = "food service price room music staff".split()
VERDICT = "overall altogether finally".split()
FILLER = "the was and we found it a very there at night with friends".split()
VOCAB = ["<pad>"] + GOOD + BAD + MEH + ASPECT + VERDICT + FILLER
STOI = {w: i for i, w in enumerate(VOCAB)}
OPINION = [BAD, MEH, GOOD]


def write_review(rng):
    n_sent = rng.integers(2, 6)
    label = int(rng.integers(3))
    verdict_at = rng.integers(n_sent)
    review = []
    for s in range(n_sent):
        words = list(rng.choice(FILLER, rng.integers(1, 6)))
        if s == verdict_at:
            key, feeling = rng.choice(VERDICT), rng.choice(OPINION[label])
        else:
            key, feeling = rng.choice(ASPECT), rng.choice(OPINION[rng.integers(3)])
        words.insert(rng.integers(len(words) + 1), feeling)
        words.insert(rng.integers(len(words) + 1), key)
        review.append([STOI[w] for w in words])
    return review, label


class Reviews(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def collate(batch):
    docs, labels = zip(*batch)
    sent_counts = torch.tensor([len(d) for d in docs])
    word_counts = torch.zeros(len(docs), int(sent_counts.max()), dtype=torch.long)
    longest = max(len(s) for d in docs for s in d)
    tokens = torch.zeros(len(docs), int(sent_counts.max()), longest, dtype=torch.long)
    for i, d in enumerate(docs):
        for j, s in enumerate(d):
            tokens[i, j, :len(s)] = torch.tensor(s)
            word_counts[i, j] = len(s)
    return {"tokens": tokens, "sent_counts": sent_counts, "word_counts": word_counts,
            "label": torch.tensor(labels)}


class AttentionWithContext(nn.Module):
    """u = tanh(W h + b);  alpha = softmax(u . context);  sum alpha h"""

    def __init__(self, dim, att_dim):
        super().__init__()
        self.proj = nn.Linear(dim, att_dim)
        self.context = nn.Linear(att_dim, 1, bias=False)

    def forward(self, h, lengths):
        scores = self.context(torch.tanh(self.proj(h))).squeeze(-1)
        valid = torch.arange(h.size(1))[None, :] < lengths[:, None]
        alpha = torch.softmax(scores.masked_fill(~valid, float("-inf")), dim=1)
        return torch.bmm(alpha.unsqueeze(1), h).squeeze(1), alpha


class EncoderWithAttention(nn.Module):
    def __init__(self, in_dim, hidden, att_dim):
        super().__init__()
        self.gru = nn.GRU(in_dim, hidden, batch_first=True, bidirectional=True)
        self.attention = AttentionWithContext(2 * hidden, att_dim)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        h, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=x.size(1))
        return self.attention(h, lengths)


class HAN(nn.Module):
    def __init__(self, vocab, emb=32, hidden=24, att=32, classes=3):
        super().__init__()
        self.embed = nn.Embedding(vocab, emb, padding_idx=0)
        self.word_level = EncoderWithAttention(emb, hidden, att)
        self.sent_level = EncoderWithAttention(2 * hidden, hidden, att)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(2 * hidden, classes)

    def forward(self, tokens, sent_counts, word_counts):
        real = word_counts > 0                                # (docs, sents); skip sentences that are padding
        vec, word_alpha = self.word_level(self.dropout(self.embed(tokens[real])), word_counts[real])
        sents = vec.new_zeros(*real.shape, vec.size(-1))
        sents[real] = vec
        doc, sent_alpha = self.sent_level(sents, sent_counts)
        return {"logits": self.fc(self.dropout(doc)), "word_alpha": word_alpha, "sent_alpha": sent_alpha}


def accuracy(model, loader):
    model.eval()
    hit = n = 0
    with torch.no_grad():
        for batch in loader:
            out = model(batch["tokens"], batch["sent_counts"], batch["word_counts"])
            hit += (out["logits"].argmax(1) == batch["label"]).sum().item()
            n += len(batch["label"])
    return hit / n


def main(seed):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    unique = {}
    while len(unique) < 2100:
        review, label = write_review(rng)
        unique[str(review)] = (review, label)
    items = list(unique.values())
    train = DataLoader(Reviews(items[:1760]), batch_size=32, shuffle=True, collate_fn=collate)
    test = DataLoader(Reviews(items[1760:]), batch_size=100, collate_fn=collate)

    model = HAN(len(VOCAB))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    criterion = nn.CrossEntropyLoss()
    for epoch in range(3):
        model.train()
        total = 0.0
        for batch in train:
            optimizer.zero_grad()
            out = model(batch["tokens"], batch["sent_counts"], batch["word_counts"])
            loss = criterion(out["logits"], batch["label"])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: train loss {total / len(train):.4f}")
    print(f"metric {accuracy(model, test):.4f}")


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--seed", type=int, default=0)
    main(p.parse_args().seed)
