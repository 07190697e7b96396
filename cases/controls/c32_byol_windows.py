"""BYOL pretraining of a small patch transformer on unlabelled sensor windows, followed by linear evaluation."""
import argparse
import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn


def make_windows(n, n_classes, length, rng):
    """Windows of periodic sensor signals: a waveform per class, cut at an arbitrary phase."""
    t = np.arange(length) / length
    harmonics = np.arange(1, 7)
    amp = rng.gamma(1.0, 1.0, (n_classes, 6))
    amp /= np.sqrt((amp ** 2).sum(1, keepdims=True))
    phase = rng.uniform(0, 2 * np.pi, (n_classes, 6))
    y = rng.integers(0, n_classes, n)
    shift = rng.uniform(0, 1, (n, 1))
    arg = 2 * np.pi * harmonics[None, :, None] * (t[None, None] + shift[:, :, None]) + phase[y][:, :, None]
    x = (amp[y][:, :, None] * np.sin(arg)).sum(1)
    x = x * rng.uniform(0.7, 1.4, (n, 1)) + rng.normal(0, 0.25, (n, length))
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


def augment(x):
    """Another phase, gain and noise for every window."""
    b, n = x.shape
    shift = torch.randint(0, n, (b, 1))
    x = x.gather(1, (torch.arange(n) + shift) % n)
    x = x * torch.empty(b, 1).uniform_(0.7, 1.4)
    return x + 0.2 * torch.randn_like(x)


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim * 2), nn.GELU(), nn.Linear(dim * 2, dim))

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(self.ln_1(x)).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(a.transpose(1, 2).reshape(b, n, d))
        return x + self.mlp(self.ln_2(x))


class PatchTransformer(nn.Module):
    def __init__(self, length=64, patch=8, dim=48, depth=2, heads=3):
        super().__init__()
        self.patch = patch
        self.patch_embed = nn.Linear(patch, dim)
        self.pos_embed = nn.Parameter(torch.randn(1, length // patch, dim) * 0.02)
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.out_dim = dim

    def forward(self, x):
        x = self.patch_embed(x.unflatten(1, (-1, self.patch))) + self.pos_embed
        return self.norm(self.blocks(x)).mean(dim=1)


def mlp_head(dim, hidden, out):
    return nn.Sequential(nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out))


class BYOL(nn.Module):
    def __init__(self, encoder, hidden=128, proj=32):
        super().__init__()
        self.online = nn.Sequential(encoder, mlp_head(encoder.out_dim, hidden, proj))
        self.predictor = mlp_head(proj, hidden, proj)
        self.target = copy.deepcopy(self.online)
        self.target.requires_grad_(False)

    @torch.no_grad()
    def update_target(self, tau):
        for p, t in zip(self.online.parameters(), self.target.parameters()):
            t.mul_(tau).add_(p, alpha=1 - tau)

    def forward(self, v1, v2):
        p1, p2 = self.predictor(self.online(v1)), self.predictor(self.online(v2))
        with torch.no_grad():
            z1, z2 = self.target(v1), self.target(v2)
        loss = (2 - 2 * F.cosine_similarity(p1, z2, dim=-1)) + (2 - 2 * F.cosine_similarity(p2, z1, dim=-1))
        return loss.mean(), z1


@torch.no_grad()
def linear_accuracy(encoder, xtr, ytr, xte, yte):
    encoder.eval()
    ftr, fte = encoder(xtr).numpy(), encoder(xte).numpy()
    encoder.train()
    return LogisticRegression(max_iter=1000).fit(ftr, ytr.numpy()).score(fte, yte.numpy())


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--epochs", type=int, default=10)
    ap.add_argument("--batch-size", type=int, default=64)
    ap.add_argument("--lr", type=float, default=3e-3)
    ap.add_argument("--tau", type=float, default=0.97)
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    x, y = make_windows(2000, 8, 64, np.random.default_rng(args.seed))
    train, test = torch.arange(1600), torch.arange(1600, 2000)

    model = BYOL(PatchTransformer())
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.lr, weight_decay=1e-4)
    per_epoch = len(train) // args.batch_size
    total, step = args.epochs * per_epoch, 0
    print(f"before training: linear probe {linear_accuracy(model.online[0], x[train], y[train], x[test], y[test]):.4f}")

    model.train()
    for epoch in range(args.epochs):
        shuffled = train[torch.randperm(len(train))]
        running = 0.0
        for i in range(per_epoch):
            windows = x[shuffled[i * args.batch_size:(i + 1) * args.batch_size]]
            lr = args.lr * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / total))
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, z = model(augment(windows), augment(windows))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.update_target(1 - (1 - args.tau) * (math.cos(math.pi * step / total) + 1) / 2)
            running += loss.item()
            step += 1
        if (epoch + 1) % 2 == 0:
            std = F.normalize(z, dim=-1).std(dim=0).mean().item()
            print(f"epoch {epoch + 1:3d}  loss {running / per_epoch:.4f}  std of z {std:.4f}")

    print(f"metric {linear_accuracy(model.online[0], x[train], y[train], x[test], y[test]):.4f}")


if __name__ == "__main__":
    main()
