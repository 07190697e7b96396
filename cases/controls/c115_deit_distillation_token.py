"""DeiT on the 8x8 digits: a small convolutional teacher is trained first, then a ViT with a class token and a
distillation token learns from the labels and from the teacher's hard decisions."""
import argparse
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.set_num_threads(1)
torch.manual_seed(args.seed)
np.random.seed(args.seed)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = attn.softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DistilledViT(nn.Module):
    def __init__(self, dim=48, depth=2, heads=3, classes=10):
        super().__init__()
        self.patch_embed = nn.Conv2d(1, dim, 2, stride=2)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 16 + 2, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, classes)
        self.head_dist = nn.Linear(dim, classes)
        for p in (self.cls_token, self.dist_token, self.pos_embed):
            nn.init.trunc_normal_(p, std=0.02)
        self.apply(self._init)

    @staticmethod
    def _init(m):
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        B = x.shape[0]
        x = torch.cat((self.cls_token.expand(B, -1, -1), self.dist_token.expand(B, -1, -1), x), dim=1)
        x = self.norm(self.blocks(x + self.pos_embed))
        a, b = self.head(x[:, 0]), self.head_dist(x[:, 1])
        if self.training:
            return a, b
        return (a + b) / 2      # the two classifiers are averaged at test time


def augment(x):
    """contrast and a little noise, seen alike by the teacher and the student"""
    gain = 0.8 + 0.4 * torch.rand(len(x), 1, 1, 1)
    return (x + 1) * gain - 1 + 0.1 * torch.randn_like(x)


def batches(n, size, steps):
    done = 0
    while done < steps:
        perm = torch.randperm(n)
        for i in range(0, n - size + 1, size):
            yield perm[i:i + size]
            done += 1
            if done == steps:
                return


X, y = load_digits(return_X_y=True)
xtr, xte, ytr, yte = train_test_split(X, y, test_size=0.25, stratify=y, random_state=args.seed)
xtr, xte = (torch.tensor(a, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1 for a in (xtr, xte))
ytr, yte = torch.tensor(ytr), torch.tensor(yte)
print(f"constant answer {yte.bincount().max().item() / len(yte):.4f}")

# ---- teacher -------------------------------------------------------------------------------------------------
teacher = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))
T_STEPS = 100
opt = torch.optim.SGD(teacher.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
sched = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=T_STEPS)
for idx in batches(len(xtr), 48, T_STEPS):
    loss = F.cross_entropy(teacher(augment(xtr[idx])), ytr[idx])
    opt.zero_grad()
    loss.backward()
    opt.step()
    sched.step()
teacher.eval().requires_grad_(False)
print(f"teacher  loss {loss.item():.4f}  test accuracy {(teacher(xte).argmax(1) == yte).float().mean():.4f}")

# ---- student -------------------------------------------------------------------------------------------------
S_STEPS, WARMUP = 240, 24
student = DistilledViT()
decay = [p for n, p in student.named_parameters() if p.ndim > 1 and "token" not in n and "pos_embed" not in n]
skip = [p for n, p in student.named_parameters() if not (p.ndim > 1 and "token" not in n and "pos_embed" not in n)]
opt = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": skip, "weight_decay": 0.0}], lr=3e-3)
sched = torch.optim.lr_scheduler.LambdaLR(
    opt, lambda s: (s + 1) / WARMUP if s < WARMUP
    else 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (s - WARMUP) / (S_STEPS - WARMUP))))
student.train()
for step, idx in enumerate(batches(len(xtr), 48, S_STEPS)):
    x = augment(xtr[idx])
    with torch.no_grad():
        hard = teacher(x).argmax(1)
    out, out_dist = student(x)
    base = F.cross_entropy(out, ytr[idx], label_smoothing=0.1)
    dist = F.cross_entropy(out_dist, hard)
    loss = 0.5 * base + 0.5 * dist
    opt.zero_grad()
    loss.backward()
    opt.step()
    sched.step()
    if step % 50 == 49:
        print(f"step {step + 1:4d}  base {base.item():.4f}  distill {dist.item():.4f}")
student.eval()
with torch.no_grad():
    acc = (student(xte).argmax(1) == yte).float().mean().item()
print(f"metric {acc:.4f}")
