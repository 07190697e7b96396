"""Autoformer: series decomposition and auto-correlation, forecasting three correlated hourly series."""
import argparse
import math
import numpy as np
import torch
import torch.nn as nn

L_IN, LABEL, PRED, CH = 48, 24, 24, 3


class SeriesDecomp(nn.Module):
    def __init__(self, kernel=13):
        super().__init__()
        self.pad = (kernel - 1) // 2
        self.avg = nn.AvgPool1d(kernel, stride=1)

    def forward(self, x):                                                  # B, T, C
        front, end = x[:, :1].repeat(1, self.pad, 1), x[:, -1:].repeat(1, self.pad, 1)
        trend = self.avg(torch.cat([front, x, end], 1).transpose(1, 2)).transpose(1, 2)
        return x - trend, trend


class AutoCorrelation(nn.Module):
    """similarity of whole lagged series through the FFT; the best lags are rolled and mixed"""
    def __init__(self, d, heads, factor=1):
        super().__init__()
        self.heads, self.factor = heads, factor
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))

    def forward(self, xq, xkv):
        B, L, D = xq.shape
        S, H = xkv.shape[1], self.heads
        q = self.q(xq).view(B, L, H, -1).permute(0, 2, 3, 1)               # B,H,E,L
        k = self.k(xkv).view(B, S, H, -1).permute(0, 2, 3, 1)
        v = self.v(xkv).view(B, S, H, -1).permute(0, 2, 3, 1)
        if L > S:
            k, v = nn.functional.pad(k, (0, L - S)), nn.functional.pad(v, (0, L - S))
        else:
            k, v = k[..., :L], v[..., :L]
        corr = torch.fft.irfft(torch.fft.rfft(q) * torch.conj(torch.fft.rfft(k)), n=L)
        mean = corr.mean((1, 2))                                           # B,L
        top = int(self.factor * math.log(L))
        if self.training:                                                  # lags chosen for the batch
            lags = mean.mean(0).topk(top).indices
            w = mean[:, lags].softmax(-1)
            out = sum(torch.roll(v, -int(lags[i]), -1) * w[:, i, None, None, None] for i in range(top))
        else:                                                              # lags chosen for each series
            w, lags = mean.topk(top, dim=-1)
            w = w.softmax(-1)
            base = torch.arange(L)
            out = 0
            for i in range(top):
                idx = (base + lags[:, i, None]) % L
                out = out + v.gather(-1, idx[:, None, None].expand_as(v)) * w[:, i, None, None, None]
        return self.o(out.permute(0, 3, 1, 2).reshape(B, L, D))


class SeasonalNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.ln = nn.LayerNorm(d)

    def forward(self, x):
        x = self.ln(x)
        return x - x.mean(1, keepdim=True)


class Embedding(nn.Module):
    """values by a circular convolution plus calendar features; no position embedding"""
    def __init__(self, d, drop):
        super().__init__()
        self.conv = nn.Conv1d(CH, d, 3, padding=1, padding_mode="circular", bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_in", nonlinearity="leaky_relu")
        self.time = nn.Linear(2, d, bias=False)
        self.drop = nn.Dropout(drop)

    def forward(self, x, mark):
        return self.drop(self.conv(x.transpose(1, 2)).transpose(1, 2) + self.time(mark))


def ffn(d, drop):
    return nn.Sequential(nn.Linear(d, 2 * d, bias=False), nn.GELU(), nn.Dropout(drop), nn.Linear(2 * d, d, bias=False))


class Encoder(nn.Module):
    def __init__(self, d, heads, drop):
        super().__init__()
        self.att, self.ff, self.drop = AutoCorrelation(d, heads), ffn(d, drop), nn.Dropout(drop)
        self.d1, self.d2, self.norm = SeriesDecomp(), SeriesDecomp(), SeasonalNorm(d)

    def forward(self, x):
        x, _ = self.d1(x + self.drop(self.att(x, x)))
        x, _ = self.d2(x + self.drop(self.ff(x)))
        return self.norm(x)


class Decoder(nn.Module):
    def __init__(self, d, heads, drop):
        super().__init__()
        self.self_att, self.cross, self.ff = AutoCorrelation(d, heads), AutoCorrelation(d, heads), ffn(d, drop)
        self.d1, self.d2, self.d3 = SeriesDecomp(), SeriesDecomp(), SeriesDecomp()
        self.drop, self.norm = nn.Dropout(drop), SeasonalNorm(d)
        self.trend = nn.Conv1d(d, CH, 3, padding=1, padding_mode="circular", bias=False)
        self.out = nn.Linear(d, CH)

    def forward(self, x, mem, trend):
        x, t1 = self.d1(x + self.drop(self.self_att(x, x)))
        x, t2 = self.d2(x + self.drop(self.cross(x, mem)))
        x, t3 = self.d3(x + self.drop(self.ff(x)))
        trend = trend + self.trend((t1 + t2 + t3).transpose(1, 2)).transpose(1, 2)
        return self.out(self.norm(x)) + trend


class Autoformer(nn.Module):
    def __init__(self, d=16, heads=2, drop=0.05):
        super().__init__()
        self.decomp = SeriesDecomp()
        self.enc_emb, self.dec_emb = Embedding(d, drop), Embedding(d, drop)
        self.enc, self.dec = Encoder(d, heads, drop), Decoder(d, heads, drop)

    def forward(self, x, mark_x, mark_y):
        seasonal, trend = self.decomp(x)
        mean = x.mean(1, keepdim=True).repeat(1, PRED, 1)
        trend = torch.cat([trend[:, -LABEL:], mean], 1)
        seasonal = torch.cat([seasonal[:, -LABEL:], torch.zeros_like(mean)], 1)
        mem = self.enc(self.enc_emb(x, mark_x))
        return self.dec(self.dec_emb(seasonal, mark_y), mem, trend)[:, -PRED:]


def make_series(rng, n=2400):
    t = np.arange(n)
    day, week = 2 * np.pi * t / 24, 2 * np.pi * t / 168
    amp = 1 + 0.3 * np.sin(week + rng.uniform(0, 6))
    common = np.zeros(n)
    for i in range(1, n):
        common[i] = 0.97 * common[i - 1] + 0.08 * rng.standard_normal()
    cols = []
    for c in range(CH):
        p = rng.uniform(0, 2 * np.pi, 2)
        cols.append(amp * (np.sin(day + p[0]) + 0.5 * np.sin(2 * day + p[1])) + common * rng.uniform(0.5, 1)
                    + 0.3 * np.cos(week + c) + 0.2 * rng.standard_normal(n))
    mark = np.stack([(t % 24) / 23 - 0.5, (t // 24 % 7) / 6 - 0.5], 1)
    return np.stack(cols, 1).astype(np.float32), mark.astype(np.float32)


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--seed", type=int, default=0)
    seed = p.parse_args().seed
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    y, mark = make_series(rng)
    cut = 1900
    y = (y - y[:cut].mean(0)) / y[:cut].std(0)
    y, mark = torch.from_numpy(y), torch.from_numpy(mark)

    def window(starts):
        i = torch.as_tensor(starts)[:, None]
        ix, iy = i + torch.arange(L_IN), i + L_IN - LABEL + torch.arange(LABEL + PRED)
        return y[ix], mark[ix], mark[iy], y[iy[:, -PRED:]]

    net = Autoformer()
    opt = torch.optim.Adam(net.parameters(), lr=3e-3)
    steps, per_epoch = 160, 40
    net.train()
    for s in range(steps):
        if s and s % per_epoch == 0:                    # halved after each epoch
            for g in opt.param_groups:
                g["lr"] *= 0.5
        xb, mx, my, tb = window(rng.integers(0, cut - L_IN - PRED + 1, 24))
        loss = nn.functional.mse_loss(net(xb, mx, my), tb)
        opt.zero_grad()
        loss.backward()
        opt.step()
        if (s + 1) % per_epoch == 0:
            print(f"epoch {(s + 1) // per_epoch} mse {loss.item():.4f} lr {opt.param_groups[0]['lr']:.5f}")
    net.eval()
    with torch.no_grad():
        xb, mx, my, tb = window(np.arange(cut, len(y) - L_IN - PRED + 1, 6))
        mse = (net(xb, mx, my) - tb).pow(2).mean((0, 1))
    r2 = (1 - mse / tb.var((0, 1), correction=0)).mean().item()
    print("mse by series", " ".join(f"{v:.3f}" for v in mse.tolist()))
    print(f"metric {r2:.4f}")
