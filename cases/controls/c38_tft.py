"""Temporal fusion transformer: quantile forecasts of shop sales with static, known and observed inputs."""
import argparse
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

PAST, FUTURE, N_SHOPS, N_REGIONS = 14, 6, 8, 3
QUANTILES = (0.1, 0.5, 0.9)


class GLU(nn.Module):
    def __init__(self, d_in, d_out):
        super().__init__()
        self.fc = nn.Linear(d_in, 2 * d_out)

    def forward(self, x):
        return F.glu(self.fc(x), dim=-1)


class GateAddNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.glu, self.norm = GLU(d, d), nn.LayerNorm(d)

    def forward(self, x, skip):
        return self.norm(self.glu(x) + skip)


class GRN(nn.Module):
    """LayerNorm(skip(a) + GLU(W1 ELU(W2 a + W3 c)))"""

    def __init__(self, d_in, d_hidden, d_out, d_context=None):
        super().__init__()
        self.skip = nn.Identity() if d_in == d_out else nn.Linear(d_in, d_out)
        self.w2 = nn.Linear(d_in, d_hidden)
        self.w3 = nn.Linear(d_context, d_hidden, bias=False) if d_context else None
        self.w1 = nn.Linear(d_hidden, d_hidden)
        self.glu = GLU(d_hidden, d_out)
        self.norm = nn.LayerNorm(d_out)

    def forward(self, a, c=None):
        eta = self.w2(a)
        if c is not None:
            eta = eta + self.w3(c)
        return self.norm(self.skip(a) + self.glu(self.w1(F.elu(eta))))


class VariableSelection(nn.Module):
    def __init__(self, n_vars, d, d_context=None):
        super().__init__()
        self.weights = GRN(n_vars * d, d, n_vars, d_context)
        self.each = nn.ModuleList([GRN(d, d, d) for _ in range(n_vars)])

    def forward(self, xs, c=None):
        # xs: list of (..., d)
        w = self.weights(torch.cat(xs, -1), c).softmax(-1)
        processed = torch.stack([f(x) for f, x in zip(self.each, xs)], -1)
        return (processed * w.unsqueeze(-2)).sum(-1), w


class InterpretableMultiHead(nn.Module):
    """Every head has its own queries and keys; all of them look at the same values, and are averaged."""

    def __init__(self, d, heads):
        super().__init__()
        self.d_k = d // heads
        self.q = nn.ModuleList([nn.Linear(d, self.d_k) for _ in range(heads)])
        self.k = nn.ModuleList([nn.Linear(d, self.d_k) for _ in range(heads)])
        self.v = nn.Linear(d, self.d_k)
        self.out = nn.Linear(self.d_k, d, bias=False)

    def forward(self, query, memory, mask):
        v = self.v(memory)
        attn = []
        for fq, fk in zip(self.q, self.k):
            s = torch.bmm(fq(query), fk(memory).transpose(1, 2)) / math.sqrt(self.d_k)
            attn.append(s.masked_fill(mask, -1e9).softmax(-1))
        attn = torch.stack(attn).mean(0)
        return self.out(torch.bmm(attn, v)), attn


class TFT(nn.Module):
    def __init__(self, d=16, heads=4):
        super().__init__()
        self.shop = nn.Embedding(N_SHOPS, d)
        self.size = nn.Linear(1, d)
        self.region = nn.Embedding(N_REGIONS, d)
        self.price = nn.Linear(1, d)
        self.weekday = nn.Embedding(7, d)
        self.promo = nn.Linear(1, d)
        self.sales = nn.Linear(1, d)
        self.static_vsn = VariableSelection(3, d)
        self.context = nn.ModuleDict({k: GRN(d, d, d) for k in ("select", "hidden", "cell", "enrich")})
        self.past_vsn = VariableSelection(4, d, d)
        self.future_vsn = VariableSelection(3, d, d)
        self.encoder = nn.LSTM(d, d, batch_first=True)
        self.decoder = nn.LSTM(d, d, batch_first=True)
        self.after_lstm = GateAddNorm(d)
        self.enrich = GRN(d, d, d, d)
        self.attention = InterpretableMultiHead(d, heads)
        self.after_attention = GateAddNorm(d)
        self.feed_forward = GRN(d, d, d)
        self.before_output = GateAddNorm(d)
        self.output = nn.Linear(d, len(QUANTILES))
        # a step of the horizon sees the whole past and the horizon up to itself
        t = torch.arange(PAST + FUTURE)
        self.register_buffer("mask", t[None, :] > t[PAST:, None])

    def forward(self, batch):
        static, _ = self.static_vsn([self.shop(batch["shop"]), self.region(batch["region"]),
                                     self.size(batch["size"].unsqueeze(-1))])
        c = {k: f(static) for k, f in self.context.items()}
        day, promo = self.weekday(batch["weekday"]), self.promo(batch["promo"].unsqueeze(-1))
        price, sales = self.price(batch["price"].unsqueeze(-1)), self.sales(batch["sales"].unsqueeze(-1))
        select = c["select"].unsqueeze(1)
        past, _ = self.past_vsn([sales, day[:, :PAST], promo[:, :PAST], price[:, :PAST]], select)
        future, _ = self.future_vsn([day[:, PAST:], promo[:, PAST:], price[:, PAST:]], select)

        enc, state = self.encoder(past, (c["hidden"].unsqueeze(0), c["cell"].unsqueeze(0)))
        dec, _ = self.decoder(future, state)
        temporal = self.after_lstm(torch.cat([enc, dec], 1), torch.cat([past, future], 1))

        enriched = self.enrich(temporal, c["enrich"].unsqueeze(1))
        attended, weights = self.attention(enriched[:, PAST:], enriched, self.mask)
        x = self.after_attention(attended, enriched[:, PAST:])
        x = self.before_output(self.feed_forward(x), temporal[:, PAST:])
        return {"prediction": self.output(x), "attention": weights}


def quantile_loss(pred, y):
    q = torch.tensor(QUANTILES)
    err = y.unsqueeze(-1) - pred
    return torch.maximum(q * err, (q - 1) * err).sum(-1).mean()


def simulate(g, days=420):
    """Sales of all shops; what a promotion does depends on the shop."""
    region = torch.arange(N_SHOPS) % N_REGIONS
    weekly = torch.randn(N_REGIONS, 7, generator=g)[region]
    size = torch.rand(N_SHOPS, generator=g)
    effect = 0.5 + 1.5 * torch.rand(N_SHOPS, generator=g)
    promo = (torch.rand(N_SHOPS, days, generator=g) < 0.2).float()
    price = torch.randn(N_SHOPS, days, generator=g)
    level = torch.zeros(N_SHOPS, days)
    for t in range(1, days):
        level[:, t] = 0.97 * level[:, t - 1] + 0.15 * torch.randn(N_SHOPS, generator=g)
    day = torch.arange(days) % 7
    sales = 2 * size[:, None] + weekly[:, day] + effect[:, None] * promo - 0.5 * price + level
    sales = sales + 0.2 * torch.randn(N_SHOPS, days, generator=g)
    return sales, promo, price, day, region, size


def windows(series, shops, starts):
    sales, promo, price, day, region, size = series
    t = starts[:, None] + torch.arange(PAST + FUTURE)
    full = sales[shops[:, None], t]
    batch = {"shop": shops, "region": region[shops], "size": size[shops], "weekday": day[t],
             "promo": promo[shops[:, None], t], "price": price[shops[:, None], t], "sales": full[:, :PAST]}
    return batch, full[:, PAST:]


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--steps", type=int, default=220)
    ap.add_argument("--batch", type=int, default=32)
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    g = torch.Generator().manual_seed(args.seed)

    sales, *inputs = simulate(g)
    split = 340                                          # the last days are held back
    mean, std = sales[:, :split].mean(), sales[:, :split].std()
    series = ((sales - mean) / std, *inputs)

    model = TFT()
    opt = torch.optim.Adam(model.parameters(), lr=8e-3, fused=True)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, args.steps, eta_min=5e-4)
    model.train()
    for step in range(1, args.steps + 1):
        shops = torch.randint(0, N_SHOPS, (args.batch,), generator=g)
        starts = torch.randint(0, split - PAST - FUTURE + 1, (args.batch,), generator=g)
        batch, target = windows(series, shops, starts)
        loss = quantile_loss(model(batch)["prediction"], target)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        sched.step()
        if step % 44 == 0:
            print(f"step {step:4d}  quantile loss {loss.item():.4f}")

    model.eval()
    first = torch.arange(split, sales.shape[1] - PAST - FUTURE + 1, 3)
    shops, starts = torch.arange(N_SHOPS).repeat_interleave(len(first)), first.repeat(N_SHOPS)
    with torch.no_grad():
        batch, target = windows(series, shops, starts)
        pred = model(batch)["prediction"][..., QUANTILES.index(0.5)]
    r2 = 1 - (target - pred).square().sum() / (target - target.mean()).square().sum()
    print(f"metric {r2.item():.4f}")


if __name__ == "__main__":
    main()
