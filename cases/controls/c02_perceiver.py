"""Perceiver that reads handwritten digits as a flat array of 100 pixels with Fourier position features."""
import argparse
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import einsum, nn


def exists(v):
    return v is not None


def fourier_encode(x, max_freq, num_bands):
    # x: (n, axes) in [-1, 1]  ->  (n, axes * (2 * bands + 1))
    scales = torch.linspace(1.0, max_freq / 2, num_bands)
    ang = x[..., None] * scales * math.pi
    enc = torch.cat((ang.sin(), ang.cos(), x[..., None]), dim=-1)
    return enc.flatten(1)


class PreNorm(nn.Module):
    def __init__(self, dim, fn, context_dim=None):
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(context_dim) if exists(context_dim) else None

    def forward(self, x, context=None):
        x = self.norm(x)
        if exists(self.norm_context):
            return self.fn(x, self.norm_context(context))
        return self.fn(x)


class GEGLU(nn.Module):
    def forward(self, x):
        x, gates = x.chunk(2, dim=-1)
        return x * F.gelu(gates)


class FeedForward(nn.Module):
    def __init__(self, dim, mult=2):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, dim * mult * 2), GEGLU(), nn.Linear(dim * mult, dim))

    def forward(self, x):
        return self.net(x)


class Attention(nn.Module):
    def __init__(self, query_dim, context_dim=None, heads=4, dim_head=16):
        super().__init__()
        inner = heads * dim_head
        context_dim = context_dim if exists(context_dim) else query_dim
        self.heads = heads
        self.scale = dim_head ** -0.5
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_kv = nn.Linear(context_dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, query_dim)

    def forward(self, x, context=None):
        h = self.heads
        q = self.to_q(x)
        k, v = self.to_kv(context if exists(context) else x).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (h, -1)).transpose(1, 2) for t in (q, k, v))
        sim = einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
        attn = sim.softmax(dim=-1)
        out = einsum("b h i j, b h j d -> b h i d", attn, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Perceiver(nn.Module):
    def __init__(self, *, side, channels=1, num_freq_bands=4, max_freq=10.0, rounds=3, self_per_cross=1,
                 num_latents=16, latent_dim=48, num_classes=10):
        super().__init__()
        axis = torch.linspace(-1.0, 1.0, side)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(-1, 2)
        self.register_buffer("pos", fourier_encode(grid, max_freq, num_freq_bands))
        input_dim = channels + self.pos.shape[-1]

        self.latents = nn.Parameter(torch.empty(num_latents, latent_dim))
        nn.init.trunc_normal_(self.latents, std=0.02, a=-2.0, b=2.0)

        def cross():
            return nn.ModuleList([
                PreNorm(latent_dim, Attention(latent_dim, input_dim, heads=1, dim_head=32), context_dim=input_dim),
                PreNorm(latent_dim, FeedForward(latent_dim)),
            ])

        def latent_block():
            return nn.ModuleList([
                PreNorm(latent_dim, Attention(latent_dim, heads=4, dim_head=12)),
                PreNorm(latent_dim, FeedForward(latent_dim)),
            ])

        # the first round has its own weights, all later rounds share theirs
        first = (cross(), nn.ModuleList([latent_block() for _ in range(self_per_cross)]))
        shared = (cross(), nn.ModuleList([latent_block() for _ in range(self_per_cross)]))
        self.layers = nn.ModuleList([nn.ModuleList(first if i == 0 else shared) for i in range(rounds)])
        self.to_logits = nn.Sequential(nn.LayerNorm(latent_dim), nn.Linear(latent_dim, num_classes))

    def forward(self, data):
        # data: (b, n, channels)
        b = data.shape[0]
        data = torch.cat((data, self.pos.expand(b, -1, -1)), dim=-1)
        x = self.latents.expand(b, -1, -1)
        for (cross_attn, cross_ff), blocks in self.layers:
            x = cross_attn(x, context=data) + x
            x = cross_ff(x) + x
            for self_attn, self_ff in blocks:
                x = self_attn(x) + x
                x = self_ff(x) + x
        return self.to_logits(x.mean(dim=1))


def load(side):
    d = load_digits()
    img = torch.tensor(d.images, dtype=torch.float32)[:, None] / 16.0
    img = F.interpolate(img, size=(side, side), mode="bilinear", align_corners=False)
    x = img.flatten(2).transpose(1, 2) * 2 - 1
    y = torch.tensor(d.target)
    tr, te = train_test_split(range(len(y)), test_size=0.25, random_state=0, stratify=d.target)
    return x[tr], y[tr], x[te], y[te]


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--steps", type=int, default=200)
    ap.add_argument("--batch", type=int, default=32)
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    side = 10
    xtr, ytr, xte, yte = load(side)
    model = Perceiver(side=side, max_freq=float(side))
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=3e-3, total_steps=args.steps, pct_start=0.15)

    step, running = 0, 0.0
    while step < args.steps:
        for idx in torch.randperm(len(xtr)).split(args.batch):
            if step == args.steps:
                break
            model.train()
            loss = F.cross_entropy(model(xtr[idx]), ytr[idx])
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            sched.step()
            running += loss.item()
            step += 1
            if step % 50 == 0:
                print(f"step {step:4d}  loss {running / 50:.4f}")
                running = 0.0

    model.eval()
    with torch.no_grad():
        pred = torch.cat([model(c).argmax(-1) for c in xte.split(128)])
    print(f"metric {(pred == yte).float().mean().item():.4f}")


if __name__ == "__main__":
    main()
