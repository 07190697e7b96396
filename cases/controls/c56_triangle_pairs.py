"""Pair stack with triangle updates and gated triangle attention, predicting hop distances in sparse graphs."""
import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

MAX_NODES = 10
CLASSES = ["2 hops", "3 hops", "4+ hops", "not connected"]


def random_graph(rng):
    n = int(rng.integers(6, MAX_NODES + 1))
    adj = np.triu(rng.random((n, n)) < 1.7 / (n - 1), 1)
    adj = adj | adj.T
    dist = np.where(adj, 1.0, np.inf)
    np.fill_diagonal(dist, 0)
    for k in range(n):
        dist = np.minimum(dist, dist[:, k, None] + dist[None, k])
    return adj, dist


def build(num, rng, known):
    feats = np.zeros((num, MAX_NODES, MAX_NODES, 3), dtype=np.float32)
    mask = np.zeros((num, MAX_NODES), dtype=np.float32)
    label = np.full((num, MAX_NODES, MAX_NODES), -100, dtype=np.int64)   # -100: adjacent, diagonal or padding
    i = 0
    while i < num:
        adj, dist = random_graph(rng)
        n = len(adj)
        key = (n, adj.tobytes())
        if key in known:
            continue
        known.add(key)
        eye = np.eye(n, dtype=bool)
        feats[i, :n, :n] = np.stack([adj, ~adj & ~eye, eye], -1)
        mask[i, :n] = 1
        lab = np.where(np.isinf(dist), 3, np.clip(dist, 2, 4, where=np.isfinite(dist), out=dist.copy()) - 2)
        label[i, :n, :n] = np.where(adj | eye, -100, lab)
        i += 1
    return torch.from_numpy(feats), torch.from_numpy(mask), torch.from_numpy(label)


class GatingLinear(nn.Linear):
    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.bias)


class FinalLinear(nn.Linear):
    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class TriangleMultiplication(nn.Module):
    def __init__(self, c_z, c_hidden, outgoing):
        super().__init__()
        self.equation = "bikc,bjkc->bijc" if outgoing else "bkic,bkjc->bijc"
        self.layer_norm_in = nn.LayerNorm(c_z)
        self.layer_norm_out = nn.LayerNorm(c_hidden)
        self.a_p, self.a_g = nn.Linear(c_z, c_hidden), GatingLinear(c_z, c_hidden)
        self.b_p, self.b_g = nn.Linear(c_z, c_hidden), GatingLinear(c_z, c_hidden)
        self.g = GatingLinear(c_z, c_z)
        self.z = FinalLinear(c_hidden, c_z)

    def forward(self, z, pair_mask):
        m = pair_mask.unsqueeze(-1)
        z = self.layer_norm_in(z)
        a = self.a_p(z) * torch.sigmoid(self.a_g(z)) * m
        b = self.b_p(z) * torch.sigmoid(self.b_g(z)) * m
        x = self.layer_norm_out(torch.einsum(self.equation, a, b))
        return self.z(x) * torch.sigmoid(self.g(z))


class TriangleAttention(nn.Module):
    def __init__(self, c_z, c_hidden, heads, starting):
        super().__init__()
        self.heads, self.c, self.starting = heads, c_hidden, starting
        self.layer_norm = nn.LayerNorm(c_z)
        self.linear_b = nn.Linear(c_z, heads, bias=False)
        self.q = nn.Linear(c_z, heads * c_hidden, bias=False)
        self.k = nn.Linear(c_z, heads * c_hidden, bias=False)
        self.v = nn.Linear(c_z, heads * c_hidden, bias=False)
        self.g = GatingLinear(c_z, heads * c_hidden)
        self.o = FinalLinear(heads * c_hidden, c_z)

    def forward(self, z, pair_mask):
        if not self.starting:
            z, pair_mask = z.transpose(1, 2), pair_mask.transpose(1, 2)
        z = self.layer_norm(z)
        B, I, J, _ = z.shape
        q, k, v, g = (f(z).view(B, I, J, self.heads, self.c) for f in (self.q, self.k, self.v, self.g))
        logits = torch.einsum("bijhc,bikhc->bihjk", q * self.c ** -0.5, k)
        logits = logits + self.linear_b(z).permute(0, 3, 1, 2).unsqueeze(1)     # b_jk, shared by all i
        logits = logits + 1e9 * (pair_mask[:, :, None, None, :] - 1)
        out = torch.einsum("bihjk,bikhc->bijhc", logits.softmax(-1), v) * torch.sigmoid(g)
        out = self.o(out.reshape(B, I, J, -1))
        return out if self.starting else out.transpose(1, 2)


class PairBlock(nn.Module):
    def __init__(self, c_z, heads):
        super().__init__()
        self.tri_mul_out = TriangleMultiplication(c_z, c_z, outgoing=True)
        self.tri_mul_in = TriangleMultiplication(c_z, c_z, outgoing=False)
        self.tri_att_start = TriangleAttention(c_z, c_z // heads, heads, starting=True)
        self.tri_att_end = TriangleAttention(c_z, c_z // heads, heads, starting=False)
        self.transition = nn.Sequential(
            nn.LayerNorm(c_z), nn.Linear(c_z, 2 * c_z), nn.ReLU(), FinalLinear(2 * c_z, c_z)
        )

    def forward(self, z, pair_mask):
        z = z + self.tri_mul_out(z, pair_mask)
        z = z + self.tri_mul_in(z, pair_mask)
        z = z + self.tri_att_start(z, pair_mask)
        z = z + self.tri_att_end(z, pair_mask)
        return z + self.transition(z)


class PairStack(nn.Module):
    def __init__(self, c_z=24, heads=4, blocks=2):
        super().__init__()
        self.embed = nn.Linear(3, c_z)
        self.blocks = nn.ModuleList([PairBlock(c_z, heads) for _ in range(blocks)])
        self.norm = nn.LayerNorm(c_z)
        self.distogram = nn.Linear(c_z, len(CLASSES))

    def forward(self, feats, mask):
        pair_mask = mask[:, :, None] * mask[:, None, :]
        z = self.embed(feats)
        for block in self.blocks:
            z = block(z, pair_mask)
        half = self.distogram(self.norm(z))
        return half + half.transpose(1, 2)


def main(seed, steps, batch):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    known = set()
    train, test = build(1200, rng, known), build(200, rng, known)

    model = PairStack()
    opt = torch.optim.Adam(model.parameters(), lr=4e-3, eps=1e-6)
    warm = torch.optim.lr_scheduler.LinearLR(opt, 0.1, 1.0, total_iters=15)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps - 15, eta_min=1e-4)
    sched = torch.optim.lr_scheduler.SequentialLR(opt, [warm, decay], milestones=[15])
    model.train()
    for step in range(steps):
        idx = torch.from_numpy(rng.choice(len(train[0]), batch, replace=False))
        feats, mask, label = (t[idx] for t in train)
        loss = F.cross_entropy(model(feats, mask).flatten(0, 2), label.flatten(), ignore_index=-100)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        sched.step()
        if (step + 1) % 40 == 0:
            print(f"step {step + 1} loss {loss.item():.4f}", flush=True)

    model.eval()
    with torch.no_grad():
        feats, mask, label = test
        pred = model(feats, mask).argmax(-1)
    valid = label != -100
    print(f"metric {(pred[valid] == label[valid]).float().mean().item():.4f}")


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--steps", type=int, default=160)
    ap.add_argument("--batch", type=int, default=8)
    a = ap.parse_args()
    main(a.seed, a.steps, a.batch)
