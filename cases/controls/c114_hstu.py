"""HSTU sequential recommender: pointwise (SiLU) attention, no softmax, no feed-forward; sampled softmax with a temperature."""
import argparse
import torch
from torch import nn, optim
import torch.nn.functional as F

ITEMS, LEN, MIN_LEN = 120, 14, 7


def log(**kw):
    print("  ".join(f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in kw.items()))


def make_users(n, g):
    """A user stays in a genre for a while and walks along its series; now and then anything."""
    genre_of = torch.arange(ITEMS) // 12
    seqs, stamps = torch.zeros(n, LEN + 1, dtype=torch.long), torch.zeros(n, LEN + 1)
    for u in range(n):
        L = int(torch.randint(MIN_LEN, LEN + 2, (1,), generator=g))
        tastes = torch.randperm(10, generator=g)[:2]
        cur = int(tastes[0]) * 12 + int(torch.randint(12, (1,), generator=g))
        clock, r = 0.0, torch.rand(L, 3, generator=g).tolist()
        for i in range(L):
            seqs[u, i] = cur + 1
            stamps[u, i] = clock
            clock += 1.0 + 4.0 * r[i][0]
            if r[i][1] < 0.72:
                cur = int(genre_of[cur]) * 12 + (cur % 12 + 1 + int(r[i][2] < 0.3)) % 12
            elif r[i][1] < 0.95:
                cur = int(tastes[i % 2]) * 12 + int(r[i][2] * 12)
                clock += 30.0
            else:
                cur = int(r[i][2] * ITEMS)
    return seqs, stamps


class HSTULayer(nn.Module):
    def __init__(self, d, heads, dqk, dv, n, buckets=12):
        super().__init__()
        self.h, self.dqk, self.dv, self.n, self.buckets = heads, dqk, dv, n, buckets
        self.norm_in, self.norm_att = nn.LayerNorm(d, eps=1e-6), nn.LayerNorm(heads * dv, eps=1e-6)
        self.uvqk = nn.Parameter(torch.randn(d, heads * (2 * dv + 2 * dqk)) * 0.1)
        self.out = nn.Linear(heads * dv, d)
        nn.init.xavier_uniform_(self.out.weight)
        self.pos_w = nn.Parameter(torch.randn(2 * n - 1) * 0.02)
        self.time_w = nn.Parameter(torch.randn(buckets + 1) * 0.02)
        i = torch.arange(n)
        self.register_buffer("rel", i[None] - i[:, None] + n - 1, persistent=False)

    def forward(self, x, stamps, valid):
        B, N, _ = x.shape
        mixed = F.silu(self.norm_in(x) @ self.uvqk)
        u, v, q, k = mixed.split([self.h * self.dv, self.h * self.dv, self.h * self.dqk, self.h * self.dqk], -1)
        q, k = q.view(B, N, self.h, -1), k.view(B, N, self.h, -1)
        gap = (stamps[:, :, None] - stamps[:, None, :]).abs().clamp(min=1.0)
        bucket = (gap.log() / 0.301).long().clamp(max=self.buckets)
        bias = self.pos_w[self.rel][None] + self.time_w[bucket]
        a = F.silu(torch.einsum("bnhd,bmhd->bhnm", q, k) + bias[:, None]) / self.n     # mean, not softmax
        a = a * valid[:, None]
        y = torch.einsum("bhnm,bmhd->bnhd", a, v.view(B, N, self.h, -1)).reshape(B, N, -1)
        return x + self.out(u * self.norm_att(y))


class HSTU(nn.Module):
    def __init__(self, d=48, layers=2, heads=2):
        super().__init__()
        self.item = nn.Embedding(ITEMS + 1, d, padding_idx=0)
        self.pos = nn.Embedding(LEN, d)
        nn.init.trunc_normal_(self.item.weight, std=0.02)
        nn.init.trunc_normal_(self.pos.weight, std=(1.0 / d) ** 0.5)
        with torch.no_grad():
            self.item.weight[0].zero_()
        self.layers = nn.ModuleList(HSTULayer(d, heads, 16, 16, LEN) for _ in range(layers))
        self.drop = nn.Dropout(0.1)

    def forward(self, ids, stamps):
        real = ids != 0
        x = self.drop(self.item(ids) * self.item.embedding_dim ** 0.5 + self.pos.weight[:ids.size(1)])
        x = x * real[..., None]
        n = ids.size(1)
        valid = torch.ones(n, n).tril()[None] * real[:, None, :]
        for l in self.layers:
            x = l(x, stamps, valid) * real[..., None]
        return F.normalize(x, dim=-1, eps=1e-6)


def sampled_softmax(model, h, pos, n_neg=24, temperature=0.05):
    neg = torch.randint(1, ITEMS + 1, (len(pos), n_neg))
    e = lambda i: F.normalize(model.item(i), dim=-1, eps=1e-6)
    lp = (h * e(pos)).sum(-1, keepdim=True) / temperature
    ln = torch.einsum("nd,nkd->nk", h, e(neg)) / temperature
    ln = ln.masked_fill(neg == pos[:, None], -5e4)
    return F.cross_entropy(torch.cat([lp, ln], 1), torch.zeros(len(pos), dtype=torch.long))


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--steps", type=int, default=180)
    a = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(a.seed)
    g = torch.Generator().manual_seed(a.seed)
    seqs, stamps = make_users(1100, g)
    n_tr = 850
    model = HSTU()
    opt = optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    warm = optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=20)
    model.train()
    for step in range(1, a.steps + 1):
        rows = torch.randint(n_tr, (20,), generator=g)
        s, t = seqs[rows], stamps[rows]
        h = model(s[:, :-1], t[:, :-1])
        tgt = s[:, 1:]
        keep = tgt != 0
        loss = sampled_softmax(model, h[keep], tgt[keep])
        opt.zero_grad()
        loss.backward()
        opt.step()
        warm.step()
        if step % 30 == 0:
            log(step=step, loss=loss.item())

    model.eval()
    s, t = seqs[n_tr:], stamps[n_tr:]
    last = (s != 0).sum(1) - 1                      # leave one out: the last item of unseen users
    rows = torch.arange(len(s))
    target = s[rows, last]
    with torch.no_grad():
        h = model(s[:, :-1], t[:, :-1])[rows, last - 1]
        scores = h @ F.normalize(model.item.weight, dim=-1, eps=1e-6).T
    scores[:, 0] = float("-inf")
    rank = (scores > scores[rows, target][:, None]).sum(1)
    pop = torch.bincount(seqs[:n_tr].flatten(), minlength=ITEMS + 1)
    pop[0] = 0
    log(users=len(s), hr5=(rank < 5).float().mean().item(),
        popular10=torch.isin(target, pop.topk(10).indices).float().mean().item())
    print(f"metric {(rank < 10).float().mean().item():.4f}")


if __name__ == "__main__":
    main()
