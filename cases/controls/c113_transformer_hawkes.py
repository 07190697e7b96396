"""Transformer Hawkes process: causal attention over events, continuous-time intensity, Monte Carlo integral."""
import argparse
import math
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def simulate(rng, n, K=5, L=24):
    """Mutually exciting streams (Ogata thinning): an event of type k mostly triggers k+1 or k+2."""
    mu = np.full(K, 0.06)
    alpha = np.zeros((K, K))                       # alpha[i, j]: a j raises the rate of i
    for j in range(K):
        alpha[(j + 1) % K, j] = 0.75
        alpha[(j + 2) % K, j] = 0.10
    beta = 1.0
    out_t, out_k = np.zeros((n, L)), np.zeros((n, L), dtype=np.int64)
    for s in range(n):
        t, i, ex = 0.0, 0, np.zeros(K)
        while i < L:
            bound = mu.sum() + ex.sum()
            w = rng.exponential(1 / bound)
            t += w
            ex = ex * math.exp(-beta * w)
            lam = mu + ex
            u = rng.random() * bound
            if u < lam.sum():
                k = int(np.searchsorted(lam.cumsum(), u))
                out_t[s, i], out_k[s, i] = t, k
                ex = ex + beta * alpha[:, k]
                i += 1
    return torch.tensor(out_t, dtype=torch.float32), torch.tensor(out_k)


class THP(nn.Module):
    def __init__(self, K, d=32, heads=4, layers=2, ff=64):
        super().__init__()
        self.K, self.d = K, d
        self.emb = nn.Embedding(K, d)
        self.register_buffer("div", 10000.0 ** (2 * (torch.arange(d) // 2) / d), persistent=False)
        self.att = nn.ModuleList(nn.MultiheadAttention(d, heads, batch_first=True) for _ in range(layers))
        self.ff = nn.ModuleList(nn.Sequential(nn.Linear(d, ff), nn.GELU(), nn.Linear(ff, d)) for _ in range(layers))
        self.n1 = nn.ModuleList(nn.LayerNorm(d) for _ in range(layers))
        self.n2 = nn.ModuleList(nn.LayerNorm(d) for _ in range(layers))
        self.base = nn.Linear(d, K)
        self.alpha = nn.Parameter(torch.full((K,), -0.1))
        self.beta = nn.Parameter(torch.ones(K))
        self.next_type = nn.Linear(d, K, bias=False)
        self.next_gap = nn.Linear(d, 1, bias=False)

    def time_code(self, t):
        x = t[..., None] / self.div
        return torch.where(torch.arange(self.d) % 2 == 0, x.sin(), x.cos())

    def forward(self, t, k):
        z = self.time_code(t)
        x = self.emb(k)
        L = t.size(1)
        future = torch.ones(L, L, dtype=torch.bool).triu(1)
        for a, f, n1, n2 in zip(self.att, self.ff, self.n1, self.n2):
            x = x + z                              # the time code is added again before every layer
            x = n1(x + a(x, x, x, attn_mask=future, need_weights=False)[0])
            x = n2(x + f(x))
        return x

    def rate(self, h, elapsed, since):
        """lambda_k = beta_k log(1 + exp((alpha_k (t - t_j) / t_j + w_k h_j + b_k) / beta_k))"""
        raw = self.alpha * (elapsed / (since + 1.0))[..., None] + self.base(h)
        b = F.softplus(self.beta)
        return b * F.softplus(raw / b)

    def log_likelihood(self, h, t, k, samples=8):
        gap, since, hp = t[:, 1:] - t[:, :-1], t[:, :-1], h[:, :-1]
        lam = self.rate(hp, gap, since).gather(-1, k[:, 1:, None]).squeeze(-1)
        u = torch.rand(*gap.shape, samples)
        inside = self.rate(hp[:, :, None], u * gap[..., None], since[..., None]).sum(-1).mean(-1)
        return (torch.log(lam + 1e-9) - inside * gap).sum(1)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--epochs", type=int, default=7)
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    t, k = simulate(rng, 760)
    tr, te = slice(0, 600), slice(600, 760)
    model = THP(K=5)
    opt = torch.optim.Adam(model.parameters(), lr=3e-3, eps=1e-5)
    sched = torch.optim.lr_scheduler.StepLR(opt, 3, gamma=0.5)
    for epoch in range(args.epochs):
        model.train()
        order = torch.randperm(600)
        sums = np.zeros(3)
        for idx in order.split(24):
            tb, kb = t[tr][idx], k[tr][idx]
            h = model(tb, kb)
            ll = model.log_likelihood(h, tb, kb).sum()
            ce = F.cross_entropy(model.next_type(h[:, :-1]).flatten(0, 1), kb[:, 1:].flatten(), reduction="sum")
            se = F.mse_loss(model.next_gap(h[:, :-1]).squeeze(-1), tb[:, 1:] - tb[:, :-1], reduction="sum")
            loss = -ll + ce + se / 100
            opt.zero_grad()
            loss.backward()
            opt.step()
            sums += np.array([ll.item(), ce.item(), se.item()]) / (600 * (t.size(1) - 1))
        sched.step()
        print("epoch %d  log-likelihood/event %.4f  type CE %.4f  gap MSE %.4f" % (epoch + 1, *sums))
    model.eval()
    with torch.no_grad():
        h = model(t[te], k[te])
        ll = model.log_likelihood(h, t[te], k[te], samples=64).sum().item() / k[te][:, 1:].numel()
        hit = (model.next_type(h[:, :-1]).argmax(-1) == k[te][:, 1:]).float().mean().item()
    const = torch.bincount(k[te][:, 1:].flatten()).max().item() / k[te][:, 1:].numel()
    print("held-out log-likelihood/event %.4f, constant type %.4f" % (ll, const))
    print("metric %.4f" % hit)


if __name__ == "__main__":
    main()
