import argparse
import math
import random

import numpy as np
import torch
from torch import nn, optim

# Imputation of partially observed sensor windows (POTS) with a transformer encoder.
# Every window comes from another site, and sites differ in level and amplitude.

LEN, VARS = 24, 3


def get_windows(n, seed):
    r = np.random.RandomState(seed)
    t = np.arange(LEN)[None, :, None]
    period = r.choice([6, 8, 12], size=(n, 1, 1))
    phase = r.uniform(0, 2 * np.pi, (n, 1, 1))
    lag = np.array([0.0, 0.7, 1.9])[None, None]
    wave = np.sin(2 * np.pi * t / period + phase + lag) + 0.35 * np.cos(4 * np.pi * t / period + phase)
    wave = wave + r.normal(0, 0.05, (n, LEN, VARS))
    level = r.normal(0, 40, (n, 1, VARS))
    amp = np.exp(r.normal(2.0, 0.8, (n, 1, VARS)))
    x = (level + amp * wave).astype("float32")
    seen = (r.rand(n, LEN, VARS) > 0.2)
    hide = seen & (r.rand(n, LEN, VARS) < 0.25)
    return torch.from_numpy(x), torch.from_numpy(seen), torch.from_numpy(hide)


class RevIN(nn.Module):
    def __init__(self, n_features, full=True, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.full = full
        self.gain = nn.Parameter(torch.ones(n_features))
        self.shift = nn.Parameter(torch.zeros(n_features))

    def norm(self, x, mask=None):
        if mask is None:
            self.mean = x.mean(1, keepdim=True).detach()
            self.std = torch.sqrt(x.var(1, keepdim=True, unbiased=False) + self.eps).detach()
            x = (x - self.mean) / self.std
        else:
            count = mask.sum(1, keepdim=True).clamp(min=1)
            self.mean = ((x * mask).sum(1, keepdim=True) / count).detach()
            centred = (x - self.mean).masked_fill(mask == 0, 0)
            self.std = torch.sqrt((centred * centred).sum(1, keepdim=True) / count + self.eps).detach()
            x = centred / self.std if self.full else centred
        return x * self.gain + self.shift

    def denorm(self, y):
        y = (y - self.shift) / (self.gain + self.eps)
        return y * self.std + self.mean


class SelfAttention(nn.Module):
    def __init__(self, d_model, n_heads):
        super().__init__()
        self.h, self.dk = n_heads, d_model // n_heads
        self.w_qs = nn.Linear(d_model, d_model, bias=False)
        self.w_ks = nn.Linear(d_model, d_model, bias=False)
        self.w_vs = nn.Linear(d_model, d_model, bias=False)
        self.fc = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.w_qs(x).view(b, n, self.h, self.dk).transpose(1, 2)
        k = self.w_ks(x).view(b, n, self.h, self.dk).transpose(1, 2)
        v = self.w_vs(x).view(b, n, self.h, self.dk).transpose(1, 2)
        w = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(self.dk), dim=-1)
        return self.fc((w @ v).transpose(1, 2).reshape(b, n, -1))


class EncoderLayer(nn.Module):
    def __init__(self, d_model, n_heads, d_ffn):
        super().__init__()
        self.slf_attn = SelfAttention(d_model, n_heads)
        self.attn_norm = nn.LayerNorm(d_model)
        self.ffn = nn.Sequential(nn.Linear(d_model, d_ffn), nn.ReLU(), nn.Linear(d_ffn, d_model))
        self.ffn_norm = nn.LayerNorm(d_model)

    def forward(self, x):
        x = x + self.slf_attn(self.attn_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class Imputer(nn.Module):
    def __init__(self, full, d_model=32, n_heads=4, n_layers=2):
        super().__init__()
        self.revin = RevIN(VARS, full)
        self.embed = nn.Linear(2 * VARS, d_model)
        pe = torch.zeros(LEN, d_model)
        pos = torch.arange(LEN).float()[:, None]
        div = torch.exp(torch.arange(0, d_model, 2).float() * (-math.log(100.0) / d_model))
        pe[:, 0::2], pe[:, 1::2] = torch.sin(pos * div), torch.cos(pos * div)
        self.register_buffer("pe", pe)
        self.encoder = nn.ModuleList([EncoderLayer(d_model, n_heads, 64) for _ in range(n_layers)])
        self.final_norm = nn.LayerNorm(d_model)
        self.output = nn.Linear(d_model, VARS)

    def forward(self, x, mask):
        z = self.revin.norm(x, mask)
        z = self.embed(torch.cat([z * mask, mask], dim=2)) + self.pe
        for layer in self.encoder:
            z = layer(z)
        return self.revin.denorm(self.output(self.final_norm(z)))


def masked_mae(pred, target, mask):
    return ((pred - target).abs() * mask).sum() / mask.sum()


def validate(model, x, seen, hide):
    """One minus the error relative to filling in the mean of what was observed."""
    given = (seen & ~hide).float()
    model.eval()
    with torch.no_grad():
        pred = model(x * given, given)
    base = (x * given).sum(1, keepdim=True) / given.sum(1, keepdim=True).clamp(min=1)
    h = hide.float()
    return 1 - (masked_mae(pred, x, h) / masked_mae(base.expand_as(x), x, h)).item()


def run(cfg):
    random.seed(cfg.seed)
    np.random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    torch.set_num_threads(1)
    X, seen, hide = get_windows(960, 10 * cfg.seed + 1)
    val = get_windows(240, 10 * cfg.seed + 2)
    model = Imputer(full=cfg.fixed)
    optimizer = optim.Adam(model.parameters(), lr=cfg.lr, foreach=True)
    scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.epochs)
    bs = 24
    for epoch in range(1, cfg.epochs + 1):
        model.train()
        perm = np.random.permutation(len(X))
        losses = []
        for s in range(0, len(X), bs):
            i = torch.from_numpy(perm[s:s + bs])
            given = (seen[i] & ~hide[i]).float()
            pred = model(X[i] * given, given)
            loss = masked_mae(pred, X[i], given) + masked_mae(pred, X[i], hide[i].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scheduler.step()
        print("epoch %02d - training loss: %.4f, validation score: %.4f"
              % (epoch, np.mean(losses), validate(model, *val)))
    print("metric %.4f" % validate(model, *val))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--epochs", type=int, default=7)
    run(parser.parse_args())
