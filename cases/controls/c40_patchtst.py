"""PatchTST forecaster for the hourly load (in kW) of a few substations."""
import argparse

import numpy as np
import torch
from torch import nn


def load_series(n_hours, rng):
    """(n_hours, 4) raw loads, tens of thousands of kW, daily and weekly cycles, slow drift."""
    t = np.arange(n_hours)
    base = np.array([52000.0, 38000.0, 71000.0, 45000.0])
    out = np.zeros((n_hours, 4))
    for c in range(4):
        day = rng.uniform(3500, 5500) * np.sin(2 * np.pi * (t / 24 + rng.uniform()))
        half = rng.uniform(1000, 2000) * np.sin(2 * np.pi * (t / 12 + rng.uniform()))
        week = rng.uniform(1000, 2000) * np.sin(2 * np.pi * (t / 168 + rng.uniform()))
        drift = np.cumsum(rng.normal(0, 60, n_hours))
        out[:, c] = base[c] + day + half + week + drift + rng.normal(0, 500, n_hours)
    return torch.from_numpy(out.astype(np.float32))


class RevIN(nn.Module):
    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.affine_weight = nn.Parameter(torch.ones(num_features))
        self.affine_bias = nn.Parameter(torch.zeros(num_features))

    def normalize(self, x):  # (B, L, C)
        mean = x.mean(dim=1, keepdim=True).detach()
        stdev = torch.sqrt(x.var(dim=1, keepdim=True, unbiased=False) + self.eps).detach()
        return (x - mean) / stdev * self.affine_weight + self.affine_bias, (mean, stdev)

    def denormalize(self, x, stats):
        mean, stdev = stats
        return (x - self.affine_bias) / (self.affine_weight + self.eps * self.eps) * stdev + mean


class BatchNormTokens(nn.Module):
    """BatchNorm over the feature axis of (B, N, D) token tensors."""

    def __init__(self, d_model):
        super().__init__()
        self.bn = nn.BatchNorm1d(d_model)

    def forward(self, x):
        return self.bn(x.transpose(1, 2)).transpose(1, 2)


class ResidualAttention(nn.Module):
    """Multi-head attention whose raw scores are passed on to the next layer (RealFormer)."""

    def __init__(self, d_model, n_heads, dropout):
        super().__init__()
        self.n_heads, self.d_k = n_heads, d_model // n_heads
        self.W_Q = nn.Linear(d_model, d_model)
        self.W_K = nn.Linear(d_model, d_model)
        self.W_V = nn.Linear(d_model, d_model)
        self.to_out = nn.Sequential(nn.Linear(d_model, d_model), nn.Dropout(dropout))
        self.scale = self.d_k ** -0.5

    def forward(self, x, prev=None):
        bs, n, _ = x.shape
        q = self.W_Q(x).view(bs, n, self.n_heads, self.d_k).transpose(1, 2)
        k = self.W_K(x).view(bs, n, self.n_heads, self.d_k).permute(0, 2, 3, 1)
        v = self.W_V(x).view(bs, n, self.n_heads, self.d_k).transpose(1, 2)
        scores = torch.matmul(q, k) * self.scale
        if prev is not None:
            scores = scores + prev
        weights = torch.softmax(scores, dim=-1)
        out = torch.matmul(weights, v).transpose(1, 2).reshape(bs, n, -1)
        return self.to_out(out), scores


class TSTEncoderLayer(nn.Module):
    def __init__(self, d_model, n_heads, d_ff, dropout):
        super().__init__()
        self.self_attn = ResidualAttention(d_model, n_heads, dropout)
        self.norm_attn = BatchNormTokens(d_model)
        self.ff = nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(), nn.Dropout(dropout), nn.Linear(d_ff, d_model), nn.Dropout(dropout))
        self.norm_ffn = BatchNormTokens(d_model)

    def forward(self, x, prev=None):
        y, scores = self.self_attn(x, prev)
        x = self.norm_attn(x + y)
        x = self.norm_ffn(x + self.ff(x))
        return x, scores


class PatchTST(nn.Module):
    def __init__(self, c_in=4, context=96, horizon=24, patch_len=16, stride=8, d_model=32, n_heads=4, n_layers=2, d_ff=64, dropout=0.1):
        super().__init__()
        self.patch_len, self.stride = patch_len, stride
        self.revin = RevIN(c_in)
        self.pad_end = nn.ReplicationPad1d((0, stride))
        n_patches = (context - patch_len) // stride + 2
        self.W_P = nn.Linear(patch_len, d_model)
        self.W_pos = nn.Parameter(torch.empty(n_patches, d_model).uniform_(-0.02, 0.02))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList([TSTEncoderLayer(d_model, n_heads, d_ff, dropout) for _ in range(n_layers)])
        self.head = nn.Linear(n_patches * d_model, horizon)

    def forward(self, x):                                   # (B, L, C) raw values
        z, stats = self.revin.normalize(x)
        z = self.pad_end(z.transpose(1, 2))                  # (B, C, L + stride)
        z = z.unfold(-1, self.patch_len, self.stride)        # (B, C, N, P)
        b, c, n, p = z.shape
        z = self.dropout(self.W_P(z.reshape(b * c, n, p)) + self.W_pos)
        scores = None
        for layer in self.layers:
            z, scores = layer(z, scores)
        y = self.head(z.reshape(b, c, -1)).transpose(1, 2)   # (B, H, C)
        return self.revin.denormalize(y, stats)


def windows(series, context, horizon, step=1):
    w = series.unfold(0, context + horizon, step).transpose(1, 2)
    return w[:, :context], w[:, context:]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    context, horizon = 96, 24
    series = load_series(2600, np.random.default_rng(args.seed))
    x_tr, y_tr = windows(series[:1900], context, horizon)
    x_te, y_te = windows(series[1900:], context, horizon, step=3)

    model = PatchTST(context=context, horizon=horizon)
    opt = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    batch = 32
    per_epoch = len(x_tr) // batch
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=args.learning_rate, total_steps=args.epochs * per_epoch, pct_start=0.3)
    mae = nn.L1Loss()

    for epoch in range(args.epochs):
        model.train()
        order = torch.randperm(len(x_tr))
        total = 0.0
        for b in range(per_epoch):
            idx = order[b * batch:(b + 1) * batch]
            loss = mae(model(x_tr[idx]), y_tr[idx])
            opt.zero_grad()
            loss.backward()
            opt.step()
            sched.step()
            total += loss.item()
        print(f"Epoch {epoch + 1}  train MAE {total / per_epoch:.1f} kW")

    model.eval()
    with torch.no_grad():
        pred = model(x_te)
    sse = ((pred - y_te) ** 2).sum((0, 1))
    sst = ((y_te - y_te.mean((0, 1))) ** 2).sum((0, 1))
    print("R2 by channel", " ".join(f"{v:.3f}" for v in (1 - sse / sst).tolist()))
    print(f"metric {(1 - sse / sst).mean().item():.4f}")


if __name__ == "__main__":
    main()
