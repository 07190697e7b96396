"""CaiT (LayerScale, talking heads, class-attention stage) on 8x8 digits."""
import argparse
import math

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn, optim


def drop_path(x, p, training):
    if p == 0.0 or not training:
        return x
    keep = 1 - p
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
    return x * mask / keep


class TalkingHeadAttn(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj_l = nn.Linear(num_heads, num_heads)
        self.proj_w = nn.Linear(num_heads, num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
        attn = q @ k.transpose(-2, -1)
        attn = self.proj_l(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        attn = attn.softmax(dim=-1)
        attn = self.proj_w(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))


class ClassAttn(nn.Module):
    """Only the class token asks; it looks at itself and at all patches."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, u):
        B, N, C = u.shape
        h = self.num_heads
        q = self.q(u[:, 0]).unsqueeze(1).reshape(B, 1, h, C // h).permute(0, 2, 1, 3) * self.scale
        k = self.k(u).reshape(B, N, h, C // h).permute(0, 2, 1, 3)
        v = self.v(u).reshape(B, N, h, C // h).permute(0, 2, 1, 3)
        attn = (q @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, 1, C))


class Mlp(nn.Sequential):
    def __init__(self, dim, hidden):
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class LayerScaleBlock(nn.Module):
    def __init__(self, dim, heads, init_values, drop):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = TalkingHeadAttn(dim, heads)
        self.mlp = Mlp(dim, 2 * dim)
        self.gamma_1 = nn.Parameter(init_values * torch.ones(dim))
        self.gamma_2 = nn.Parameter(init_values * torch.ones(dim))
        self.drop = drop

    def forward(self, x):
        x = x + drop_path(self.gamma_1 * self.attn(self.norm1(x)), self.drop, self.training)
        return x + drop_path(self.gamma_2 * self.mlp(self.norm2(x)), self.drop, self.training)


class ClassBlock(nn.Module):
    def __init__(self, dim, heads, init_values):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = ClassAttn(dim, heads)
        self.mlp = Mlp(dim, 2 * dim)
        self.gamma_1 = nn.Parameter(init_values * torch.ones(dim))
        self.gamma_2 = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x, x_cls):
        u = torch.cat((x_cls, x), dim=1)
        x_cls = x_cls + self.gamma_1 * self.attn(self.norm1(u))
        return x_cls + self.gamma_2 * self.mlp(self.norm2(x_cls))


class CaiT(nn.Module):
    def __init__(self, dim=40, depth=3, depth_cls=2, heads=4, init_values=0.1, drop=0.05):
        super().__init__()
        self.patch_embed = nn.Conv2d(1, dim, 2, stride=2)
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(LayerScaleBlock(dim, heads, init_values, drop) for _ in range(depth))
        self.cls_blocks = nn.ModuleList(ClassBlock(dim, heads, init_values) for _ in range(depth_cls))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, img):
        x = self.patch_embed(img).flatten(2).transpose(1, 2) + self.pos_embed
        for blk in self.blocks:
            x = blk(x)
        cls = self.cls_token.expand(len(x), -1, -1)
        for blk in self.cls_blocks:
            cls = blk(x, cls)
        return {"logits": self.head(self.norm(torch.cat((cls, x), dim=1))[:, 0])}


def get_args():
    p = argparse.ArgumentParser()
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--epochs", type=int, default=7)
    p.add_argument("--bs", type=int, default=48)
    p.add_argument("--lr", type=float, default=4e-3)
    return p.parse_args()


def main():
    args = get_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.RandomState(args.seed)

    X, y = load_digits(return_X_y=True)
    perm = rng.permutation(len(X))
    n_test = 360
    X = torch.tensor(X[perm] / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.tensor(y[perm])
    Xte, yte, Xtr, ytr = X[:n_test], y[:n_test], X[n_test:], y[n_test:]

    net = CaiT()
    skip = {"pos_embed", "cls_token"}
    decay = [p for n, p in net.named_parameters() if p.ndim > 1 and n not in skip]
    plain = [p for n, p in net.named_parameters() if p.ndim <= 1 or n in skip]
    opt = optim.AdamW([{"params": decay, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}], lr=args.lr)
    per_epoch = math.ceil(len(Xtr) / args.bs)
    sched = optim.lr_scheduler.OneCycleLR(opt, args.lr, epochs=args.epochs, steps_per_epoch=per_epoch, pct_start=0.1)
    for ep in range(args.epochs):
        net.train()
        seen = 0.0
        for idx in np.array_split(rng.permutation(len(Xtr)), per_epoch):
            out = net(Xtr[idx])
            loss = nn.functional.cross_entropy(out["logits"], ytr[idx], label_smoothing=0.05)
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            sched.step()
            seen += loss.item()
        print(f"[{ep + 1}/{args.epochs}] loss={seen / per_epoch:.4f}")

    net.eval()
    with torch.no_grad():
        acc = (net(Xte)["logits"].argmax(-1) == yte).float().mean()
    print(f"metric {acc.item():.4f}")


if __name__ == "__main__":
    main()
