"""SASRec on short shopping sessions (PyTorch port of my TF2 version).

python x111_sasrec_sessions.py [--fixed] [--seed 0]
"""
import argparse
import random

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

torch.set_num_threads(1)

ITEMS = 240          # ids 1..240, 0 is padding
MAXLEN = 24
NEG_EVAL = 99


def make_sessions(n_users, seed):
    """Sessions are two interleaved threads of interest, each walking along its own chain of items."""
    world = np.random.RandomState(1234)
    nxt = world.permutation(ITEMS) + 1
    nxt2 = world.permutation(ITEMS) + 1
    rng = np.random.RandomState(seed)
    sessions = []
    for _ in range(n_users):
        n = rng.randint(4, 12) if rng.rand() < 0.8 else rng.randint(12, MAXLEN + 1)
        s = [rng.randint(1, ITEMS + 1)]
        while len(s) < n + 1:
            u = rng.rand()
            if u < 0.70:
                s.append(nxt[s[-1] - 1])
            elif u < 0.90 and len(s) > 1:
                s.append(nxt2[s[-2] - 1])
            else:
                s.append(rng.randint(1, ITEMS + 1))
        sessions.append(s)
    return sessions


def pad(seq):
    seq = list(seq)[-MAXLEN:]
    return [0] * (MAXLEN - len(seq)) + seq


def sample_batch(sessions, size, rng):
    seqs, poss, negs = [], [], []
    for i in rng.randint(0, len(sessions), size):
        s = sessions[i]
        seq, pos = pad(s[:-1]), pad(s[1:])
        have = set(s)
        neg = []
        for p in pos:
            if p == 0:
                neg.append(0)
                continue
            t = rng.randint(1, ITEMS + 1)
            while t in have:
                t = rng.randint(1, ITEMS + 1)
            neg.append(t)
        seqs.append(seq)
        poss.append(pos)
        negs.append(neg)
    return torch.LongTensor(seqs), torch.LongTensor(poss), torch.LongTensor(negs)


class MultiHeadAttention(nn.Module):
    def __init__(self, dim, heads, dropout, fixed):
        super().__init__()
        self.heads = heads
        self.wq = nn.Linear(dim, dim)
        self.wk = nn.Linear(dim, dim)
        self.wv = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.fixed = fixed

    def forward(self, query, key, seq):
        b, l, d = query.shape
        q, k, v = self.wq(query), self.wk(key), self.wv(key)

        if self.fixed:
            key_masks = (seq != 0).float()
        else:
            key_masks = torch.sign(torch.abs(k.sum(dim=-1)))       # (b, l)

        q = q.view(b, l, self.heads, -1).transpose(1, 2)
        k = k.view(b, l, self.heads, -1).transpose(1, 2)
        v = v.view(b, l, self.heads, -1).transpose(1, 2)
        scores = q @ k.transpose(-2, -1) / (d // self.heads) ** 0.5

        paddings = torch.full_like(scores, -2.0 ** 32 + 1)
        scores = torch.where(key_masks[:, None, None, :] == 0, paddings, scores)
        tril = torch.tril(torch.ones(l, l))
        scores = torch.where(tril == 0, paddings, scores)

        weights = self.dropout(F.softmax(scores, dim=-1))
        return (weights @ v).transpose(1, 2).reshape(b, l, d)


class Block(nn.Module):
    def __init__(self, dim, heads, dropout, fixed):
        super().__init__()
        self.ln1 = nn.LayerNorm(dim, eps=1e-8)
        self.attn = MultiHeadAttention(dim, heads, dropout, fixed)
        self.ln2 = nn.LayerNorm(dim, eps=1e-8)
        self.fc1 = nn.Linear(dim, dim)
        self.fc2 = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, seq):
        q = self.ln1(x)
        x = q + self.dropout(self.attn(q, x, seq))
        h = self.ln2(x)
        x = h + self.dropout(self.fc2(F.relu(self.fc1(h))))
        return x * (seq != 0).unsqueeze(-1)


class SASRec(nn.Module):
    def __init__(self, dim=32, blocks=2, heads=2, dropout=0.1, fixed=False):
        super().__init__()
        self.dim = dim
        self.item_emb = nn.Embedding(ITEMS + 1, dim, padding_idx=0)
        self.pos_emb = nn.Embedding(MAXLEN, dim)
        nn.init.normal_(self.item_emb.weight[1:].data, std=0.05)
        nn.init.normal_(self.pos_emb.weight, std=0.05)
        self.emb_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList([Block(dim, heads, dropout, fixed) for _ in range(blocks)])
        self.last_ln = nn.LayerNorm(dim, eps=1e-8)

    def encode(self, seq):
        x = self.item_emb(seq) * self.dim ** 0.5
        x = x + self.pos_emb(torch.arange(seq.size(1)))
        x = self.emb_dropout(x) * (seq != 0).unsqueeze(-1)
        for blk in self.blocks:
            x = blk(x, seq)
        return self.last_ln(x)

    def forward(self, seq, pos, neg):
        h = self.encode(seq)
        return (h * self.item_emb(pos)).sum(-1), (h * self.item_emb(neg)).sum(-1)

    def predict(self, seq, candidates):
        h = self.encode(seq)[:, -1]
        return (self.item_emb(candidates) @ h.unsqueeze(-1)).squeeze(-1)


def evaluate(model, sessions):
    rng = np.random.RandomState(99)
    model.eval()
    seqs, cands = [], []
    for s in sessions:
        seqs.append(pad(s[:-1]))
        c = [s[-1]]
        while len(c) < NEG_EVAL + 1:
            t = rng.randint(1, ITEMS + 1)
            if t not in c:
                c.append(t)
        cands.append(c)
    with torch.no_grad():
        scores = model.predict(torch.LongTensor(seqs), torch.LongTensor(cands))
    rank = (scores[:, 1:] >= scores[:, :1]).sum(1)
    hit = (rank < 10).float()
    ndcg = hit / torch.log2(rank.float() + 2)
    model.train()
    return ndcg.mean().item(), hit.mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)

    train = make_sessions(2000, 10 + args.seed)
    seen = set(map(tuple, train))
    test = [s for s in make_sessions(400, 70000 + args.seed) if tuple(s) not in seen]
    rng = np.random.RandomState(args.seed)

    model = SASRec(fixed=args.fixed)
    opt = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    model.train()
    for step in range(1, 157):
        seq, pos, neg = sample_batch(train, 48, rng)
        pos_logits, neg_logits = model(seq, pos, neg)
        idx = pos != 0
        loss = F.binary_cross_entropy_with_logits(pos_logits[idx], torch.ones_like(pos_logits[idx]))
        loss = loss + F.binary_cross_entropy_with_logits(neg_logits[idx], torch.zeros_like(neg_logits[idx]))
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step % 26 == 0:
            print("step %d  loss %.4f" % (step, loss.item()))

    ndcg, hr = evaluate(model, test)
    print("test NDCG@10 %.4f  HR@10 %.4f" % (ndcg, hr))
    print("metric %.4f" % hr)


if __name__ == "__main__":
    main()
