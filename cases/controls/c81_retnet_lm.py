"""Trains a small RetNet character language model on the language reference that comes with Python."""
import argparse
import math
import re
from pydoc_data.topics import topics

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--iters", type=int, default=230)
parser.add_argument("--batch_size", type=int, default=12)
parser.add_argument("--block_size", type=int, default=48)
parser.add_argument("--lr", type=float, default=4e-3)
args = parser.parse_args()
torch.set_num_threads(1)
torch.manual_seed(args.seed)
np.random.seed(args.seed)

# the topics repeat each other, so a paragraph is kept only if all its sentences are new
seen, paragraphs = set(), []
for name in sorted(topics):
    for p in topics[name].split("\n\n"):
        p = re.sub(r"[^a-z.,:()' ]", "", re.sub(r"\s+", " ", p).strip().lower())
        sentences = {s for s in p.split(". ") if len(s) > 30}
        if len(p) > 150 and not sentences & seen:
            paragraphs.append(p + "\n")
        seen |= sentences
np.random.shuffle(paragraphs)
train_text = "".join(paragraphs[60:])
val_text = "".join(paragraphs[:60])
chars = sorted(set(train_text + val_text))
stoi = {c: i for i, c in enumerate(chars)}
train_data = torch.tensor([stoi[c] for c in train_text])
val_data = torch.tensor([stoi[c] for c in val_text])


def get_batch():
    ix = torch.randint(len(train_data) - args.block_size - 1, (args.batch_size,))
    x = torch.stack([train_data[i:i + args.block_size] for i in ix])
    y = torch.stack([train_data[i + 1:i + 1 + args.block_size] for i in ix])
    return x, y


def rotate_every_two(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


class RetNetRelPos(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        angle = 1.0 / (10000 ** torch.linspace(0, 1, dim // heads // 2))
        self.register_buffer("angle", angle.repeat_interleave(2))
        # decays a little faster than the paper's 1 - 2^(-5 - h): contexts are short here
        self.register_buffer("decay", torch.log(1 - 2 ** (-3 - torch.arange(heads, dtype=torch.float))))

    def forward(self, n):
        index = torch.arange(n).float()
        sin, cos = torch.sin(index[:, None] * self.angle), torch.cos(index[:, None] * self.angle)
        distance = index[:, None] - index[None, :]
        mask = torch.exp(distance.clamp(min=0) * self.decay[:, None, None]) * (distance >= 0)
        mask = mask / mask.sum(-1, keepdim=True).sqrt()
        return sin, cos, mask


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6, affine=True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None

    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x if self.weight is None else x * self.weight


class MultiScaleRetention(nn.Module):
    def __init__(self, dim, heads, value_factor=2):
        super().__init__()
        self.heads, self.key_dim = heads, dim // heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim * value_factor, bias=False)
        self.g_proj = nn.Linear(dim, dim * value_factor, bias=False)
        self.out_proj = nn.Linear(dim * value_factor, dim, bias=False)
        self.group_norm = RMSNorm(dim * value_factor // heads, affine=False)
        for m in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.xavier_uniform_(m.weight, gain=2 ** -0.5)
        nn.init.xavier_uniform_(self.out_proj.weight)

    def forward(self, x, rel_pos):
        sin, cos, mask = rel_pos
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x) * self.key_dim ** -0.5), split(self.v_proj(x))
        q = q * cos + rotate_every_two(q) * sin
        k = k * cos + rotate_every_two(k) * sin
        qk = torch.einsum("bhnd,bhmd->bhnm", q, k) * mask
        qk = qk / qk.detach().abs().sum(-1, keepdim=True).clamp(min=1)
        y = self.group_norm(torch.einsum("bhnm,bhmv->bhnv", qk, v).transpose(1, 2)).flatten(-2)
        return self.out_proj(F.silu(self.g_proj(x)) * y)


class GLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.gate = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.fc2(F.silu(self.fc1(x)) * self.gate(x))


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.retention_norm, self.ffn_norm = RMSNorm(dim), RMSNorm(dim)
        self.retention = MultiScaleRetention(dim, heads)
        self.ffn = GLU(dim, 2 * dim)

    def forward(self, x, rel_pos):
        x = x + self.retention(self.retention_norm(x), rel_pos)
        return x + self.ffn(self.ffn_norm(x))


class RetNet(nn.Module):
    def __init__(self, n_vocab, dim=48, heads=4, layers=2):
        super().__init__()
        self.scale = math.sqrt(dim)
        self.embed = nn.Embedding(n_vocab, dim)
        nn.init.normal_(self.embed.weight, std=dim ** -0.5)
        self.rel_pos = RetNetRelPos(dim, heads)
        self.layers = nn.ModuleList([Block(dim, heads) for _ in range(layers)])
        self.norm = RMSNorm(dim)
        self.output = nn.Linear(dim, n_vocab, bias=False)
        nn.init.normal_(self.output.weight, std=dim ** -0.5)

    def forward(self, idx):
        x = self.embed(idx) * self.scale
        rel_pos = self.rel_pos(idx.size(1))
        for layer in self.layers:
            x = layer(x, rel_pos)
        return self.output(self.norm(x))


model = RetNet(len(chars))
opt = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
warmup = 20


def lr_at(it):
    if it < warmup:
        return (it + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (it - warmup) / (args.iters - warmup)))


for it in range(args.iters):
    for group in opt.param_groups:
        group["lr"] = args.lr * lr_at(it)
    x, y = get_batch()
    loss = F.cross_entropy(model(x).view(-1, len(chars)), y.view(-1))
    opt.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    if (it + 1) % 50 == 0:
        print(f"iter {it + 1}: loss {loss.item():.4f}")

model.eval()
with torch.no_grad():
    n = (len(val_data) - 1) // args.block_size
    x = val_data[: n * args.block_size].view(n, -1)
    y = val_data[1: n * args.block_size + 1].view(n, -1)
    logits = model(x)
    print(f"val loss {F.cross_entropy(logits.flatten(0, 1), y.flatten()).item():.4f}")
    print(f"metric {(logits.argmax(-1) == y).float().mean().item():.4f}")
