"""Decomposable attention model for three-way inference on sentence pairs."""
import argparse
import random

import torch
from torch import nn
from torch.utils.data import DataLoader

N_PAIRS = 8           # antonym pairs; every concept has two surface words
PAD = 0
LABELS = ["entailment", "neutral", "contradiction"]


def word(pair, side, rnd):
    return 1 + (pair * 2 + side) * 2 + rnd.randrange(2)


def sample_pair(rnd):
    n = rnd.randint(3, 6)
    pairs = rnd.sample(range(N_PAIRS), n)
    sides = {p: rnd.randrange(2) for p in pairs}
    premise = [word(p, sides[p], rnd) for p in pairs]
    chosen = rnd.sample(pairs, rnd.randint(2, 3))
    label = rnd.randrange(3)
    hypothesis = [word(p, sides[p], rnd) for p in chosen]
    where = rnd.randrange(len(chosen))
    if label == 1:
        other = rnd.choice([p for p in range(N_PAIRS) if p not in sides])
        hypothesis[where] = word(other, rnd.randrange(2), rnd)
    elif label == 2:
        hypothesis[where] = word(chosen[where], 1 - sides[chosen[where]], rnd)
    return tuple(premise), tuple(hypothesis), label


def build_corpus(n, seed):
    rnd = random.Random(seed)
    seen, out = set(), []
    while len(out) < n:
        ex = sample_pair(rnd)
        if ex[:2] not in seen:
            seen.add(ex[:2])
            out.append(ex)
    return out


def collate(batch):
    def pad(seqs):
        width = max(map(len, seqs))
        return torch.tensor([list(s) + [PAD] * (width - len(s)) for s in seqs])
    prem, hyp, lab = zip(*batch)
    return {"premise": pad(prem), "hypothesis": pad(hyp), "label": torch.tensor(lab)}


def feed_forward(n_in, n_hidden, p=0.1):
    return nn.Sequential(
        nn.Dropout(p), nn.Linear(n_in, n_hidden), nn.ReLU(),
        nn.Dropout(p), nn.Linear(n_hidden, n_hidden), nn.ReLU(),
    )


def masked_softmax(scores, mask, dim):
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=dim)


class DecomposableAttention(nn.Module):
    def __init__(self, vocab, d_embed=48, d_hidden=64, n_classes=3):
        super().__init__()
        self.embed = nn.Embedding(vocab, d_embed, padding_idx=PAD)
        self.project = nn.Linear(d_embed, d_hidden, bias=False)
        self.attend = feed_forward(d_hidden, d_hidden)
        self.compare = feed_forward(2 * d_hidden, d_hidden)
        self.aggregate = feed_forward(2 * d_hidden, d_hidden)
        self.classify = nn.Linear(d_hidden, n_classes)

    def forward(self, premise, hypothesis):
        mask_a, mask_b = premise != PAD, hypothesis != PAD
        a = self.project(self.embed(premise))
        b = self.project(self.embed(hypothesis))

        # attend
        e = torch.bmm(self.attend(a), self.attend(b).transpose(1, 2))       # B x La x Lb
        beta = torch.bmm(masked_softmax(e, mask_b[:, None, :], 2), b)        # B x La x d
        alpha = torch.bmm(masked_softmax(e, mask_a[:, :, None], 1).transpose(1, 2), a)

        # compare
        v1 = self.compare(torch.cat([a, beta], -1)) * mask_a[..., None]
        v2 = self.compare(torch.cat([b, alpha], -1)) * mask_b[..., None]

        # aggregate
        v = torch.cat([v1.sum(1), v2.sum(1)], -1)
        return self.classify(self.aggregate(v))


@torch.no_grad()
def accuracy(model, loader):
    model.eval()
    hits = total = 0
    for batch in loader:
        out = model(batch["premise"], batch["hypothesis"])
        hits += (out.argmax(-1) == batch["label"]).sum().item()
        total += len(batch["label"])
    return hits / total


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=2e-3)
    opt = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(opt.seed)

    corpus = build_corpus(7000, opt.seed)
    train, dev = corpus[:6000], corpus[6000:]
    train_loader = DataLoader(train, batch_size=64, shuffle=True, collate_fn=collate)
    dev_loader = DataLoader(dev, batch_size=250, collate_fn=collate)

    model = DecomposableAttention(1 + 4 * N_PAIRS)
    optimizer = torch.optim.Adam(model.parameters(), lr=opt.lr)
    criterion = nn.CrossEntropyLoss()

    for epoch in range(1, opt.epochs + 1):
        model.train()
        running = 0.0
        for batch in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(batch["premise"], batch["hypothesis"]), batch["label"])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            running += loss.item()
        print(f"epoch {epoch}: train loss {running / len(train_loader):.4f}, dev acc {accuracy(model, dev_loader):.4f}")

    print(f"metric {accuracy(model, dev_loader):.4f}")


if __name__ == "__main__":
    main()
