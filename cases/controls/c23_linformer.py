"""Linformer classifying handwritten digits read as sequences of 64 pixel intensities."""
import argparse
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def init_(t):
    bound = 1 / math.sqrt(t.shape[-1])
    return t.uniform_(-bound, bound)


class LinformerSelfAttention(nn.Module):
    """Keys and values are projected from length n down to k (shared by the heads, one matrix each)."""

    def __init__(self, dim, seq_len, k=16, heads=4):
        super().__init__()
        self.heads, self.dim_head = heads, dim // heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.proj_k = nn.Parameter(init_(torch.zeros(seq_len, k)))
        self.proj_v = nn.Parameter(init_(torch.zeros(seq_len, k)))
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, d = x.shape
        h, d_h = self.heads, self.dim_head
        queries = self.to_q(x).reshape(b, n, h, d_h).transpose(1, 2)
        keys = torch.einsum("bnd,nk->bkd", self.to_k(x), self.proj_k)
        values = torch.einsum("bnd,nk->bkd", self.to_v(x), self.proj_v)
        keys, values = (t.reshape(b, -1, h, d_h).transpose(1, 2) for t in (keys, values))
        dots = torch.einsum("bhnd,bhkd->bhnk", queries, keys) * d_h ** -0.5
        out = torch.einsum("bhnk,bhkd->bhnd", dots.softmax(dim=-1), values)
        return self.to_out(out.transpose(1, 2).reshape(b, n, d))


class PreNorm(nn.Module):
    def __init__(self, dim, fn):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x):
        return self.fn(self.norm(x))


class Linformer(nn.Module):
    def __init__(self, num_tokens, seq_len, dim, depth, k, heads, num_classes):
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb = nn.Embedding(seq_len, dim)
        nn.init.normal_(self.token_emb.weight, std=0.2)
        nn.init.normal_(self.pos_emb.weight, std=0.2)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            self.layers.append(nn.ModuleList([
                PreNorm(dim, LinformerSelfAttention(dim, seq_len, k, heads)),
                PreNorm(dim, nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))),
            ]))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, ids):
        x = self.token_emb(ids) + self.pos_emb(torch.arange(ids.shape[1]))
        for attn, ff in self.layers:
            x = x + attn(x)
            x = x + ff(x)
        return self.head(self.norm(x).mean(dim=1))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)

    digits = load_digits()
    x_tr, x_te, y_tr, y_te = train_test_split(digits.data.astype(np.int64), digits.target, test_size=0.2,
                                              random_state=args.seed, stratify=digits.target)
    x_tr, x_te, y_tr, y_te = map(torch.from_numpy, (x_tr, x_te, y_tr, y_te))

    net = Linformer(num_tokens=17, seq_len=64, dim=32, depth=2, k=16, heads=4, num_classes=10)
    opt = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=1e-2)
    total = args.epochs * math.ceil(len(x_tr) / args.batch_size)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=args.lr, total_steps=total, pct_start=0.15)

    for epoch in range(args.epochs):
        net.train()
        losses = []
        for idx in torch.randperm(len(x_tr)).split(args.batch_size):
            loss = F.cross_entropy(net(x_tr[idx]), y_tr[idx])
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            sched.step()
            losses.append(loss.item())
        net.eval()
        with torch.no_grad():
            acc = (net(x_te).argmax(-1) == y_te).float().mean().item()
        print(f"epoch {epoch + 1}/{args.epochs}  loss {np.mean(losses):.4f}  test acc {acc:.4f}")
    print(f"metric {acc:.4f}")


if __name__ == "__main__":
    main()
