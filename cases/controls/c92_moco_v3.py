"""MoCo v3: momentum-contrastive pre-training of a small ViT on digits, evaluated by a linear probe."""
import argparse
import copy
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=True)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = attn.softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=2):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, dim * mlp_ratio), nn.GELU(), nn.Linear(dim * mlp_ratio, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformerMoCo(nn.Module):
    def __init__(self, embed_dim=48, depth=2, num_heads=4, patch_size=2, grid=4, stop_grad_conv1=True):
        super().__init__()
        self.patch_embed = nn.Conv2d(1, embed_dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.build_2d_sincos_position_embedding(embed_dim, grid)
        self.blocks = nn.Sequential(*[Block(embed_dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Identity()

        for name, m in self.named_modules():
            if isinstance(m, nn.Linear):
                if 'qkv' in name:
                    # treat the weights of Q, K, V separately
                    val = math.sqrt(6. / float(m.weight.shape[0] // 3 + m.weight.shape[1]))
                    nn.init.uniform_(m.weight, -val, val)
                else:
                    nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.normal_(self.cls_token, std=1e-6)
        val = math.sqrt(6. / float(patch_size ** 2 + embed_dim))
        nn.init.uniform_(self.patch_embed.weight, -val, val)
        nn.init.zeros_(self.patch_embed.bias)
        if stop_grad_conv1:
            self.patch_embed.weight.requires_grad = False
            self.patch_embed.bias.requires_grad = False

    def build_2d_sincos_position_embedding(self, embed_dim, grid, temperature=10000.):
        gw, gh = torch.meshgrid(torch.arange(grid).float(), torch.arange(grid).float(), indexing='ij')
        pos_dim = embed_dim // 4
        omega = 1. / temperature ** (torch.arange(pos_dim).float() / pos_dim)
        out_w, out_h = torch.outer(gw.flatten(), omega), torch.outer(gh.flatten(), omega)
        pos = torch.cat([out_w.sin(), out_w.cos(), out_h.sin(), out_h.cos()], dim=1)[None]
        self.pos_embed = nn.Parameter(torch.cat([torch.zeros(1, 1, embed_dim), pos], dim=1), requires_grad=False)

    def forward_features(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.norm(self.blocks(x))[:, 0]

    def forward(self, x):
        return self.head(self.forward_features(x))


def build_mlp(num_layers, input_dim, mlp_dim, output_dim):
    mlp = []
    for l in range(num_layers):
        dim1 = input_dim if l == 0 else mlp_dim
        dim2 = output_dim if l == num_layers - 1 else mlp_dim
        mlp.append(nn.Linear(dim1, dim2, bias=False))
        if l < num_layers - 1:
            mlp += [nn.BatchNorm1d(dim2), nn.ReLU(inplace=True)]
        else:
            mlp.append(nn.BatchNorm1d(dim2, affine=False))
    return nn.Sequential(*mlp)


class MoCo_ViT(nn.Module):
    def __init__(self, base_encoder, embed_dim=48, dim=32, mlp_dim=96, T=0.2):
        super().__init__()
        self.T = T
        self.base_encoder = base_encoder
        self.base_encoder.head = build_mlp(3, embed_dim, mlp_dim, dim)
        self.predictor = build_mlp(2, dim, mlp_dim, dim)
        self.momentum_encoder = copy.deepcopy(self.base_encoder)
        for p in self.momentum_encoder.parameters():
            p.requires_grad = False

    @torch.no_grad()
    def _update_momentum_encoder(self, m):
        for pb, pm in zip(self.base_encoder.parameters(), self.momentum_encoder.parameters()):
            pm.data = pm.data * m + pb.data * (1. - m)

    def contrastive_loss(self, q, k):
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        logits = torch.einsum('nc,mc->nm', q, k) / self.T
        return F.cross_entropy(logits, torch.arange(len(q))) * (2 * self.T)

    def forward(self, x1, x2, m):
        q1 = self.predictor(self.base_encoder(x1))
        q2 = self.predictor(self.base_encoder(x2))
        with torch.no_grad():
            self._update_momentum_encoder(m)
            k1 = self.momentum_encoder(x1)
            k2 = self.momentum_encoder(x2)
        return self.contrastive_loss(q1, k2) + self.contrastive_loss(q2, k1)


def augment(x):
    """Random affine view of each image with changes of contrast and noise."""
    n = len(x)
    a, s = (torch.rand(n) - 0.5) * 0.6, 0.85 + 0.3 * torch.rand(n)
    shear = (torch.rand(n) - 0.5) * 0.3
    shift = (torch.rand(n, 2) - 0.5) * 0.4
    theta = torch.stack([torch.stack([s * a.cos(), s * (shear - a.sin()), shift[:, 0]], 1),
                         torch.stack([s * a.sin(), s * a.cos(), shift[:, 1]], 1)], 1)
    x = F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)
    x = x * (0.7 + 0.6 * torch.rand(n, 1, 1, 1))
    return x + 0.05 * torch.randn_like(x)


def linear_probe(model, xtr, ytr, xte, yte):
    model.eval()
    with torch.no_grad():
        ftr, fte = [model.base_encoder.forward_features(x).numpy() for x in (xtr, xte)]
    mu, sd = ftr.mean(0), ftr.std(0) + 1e-6
    return RidgeClassifier().fit((ftr - mu) / sd, ytr).score((fte - mu) / sd, yte)


def main():
    parser = argparse.ArgumentParser(description='MoCo v3 pre-training')
    parser.add_argument('--seed', default=0, type=int)
    parser.add_argument('--iters', default=165, type=int)
    parser.add_argument('--warmup', default=20, type=int)
    parser.add_argument('-b', '--batch-size', default=40, type=int)
    parser.add_argument('--lr', default=3e-3, type=float)
    parser.add_argument('--wd', default=0.1, type=float)
    parser.add_argument('--moco-m', default=0.95, type=float)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    order = np.random.RandomState(args.seed).permutation(len(images))
    tr, te = order[:1400], order[1400:]
    mean, std = images[tr].mean(), images[tr].std()
    norm = lambda t: (t - mean) / std
    xtr = images[tr]
    data = (norm(images[tr]), digits.target[tr], norm(images[te]), digits.target[te])

    model = MoCo_ViT(VisionTransformerMoCo())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=args.wd,
                                  fused=True)
    print(f'linear probe at init: {linear_probe(model, *data):.4f}')
    model.train()
    running = []
    for i in range(args.iters):
        if i < args.warmup:
            lr = args.lr * (i + 1) / args.warmup
        else:
            lr = args.lr * 0.5 * (1. + math.cos(math.pi * (i - args.warmup) / (args.iters - args.warmup)))
        for group in optimizer.param_groups:
            group['lr'] = lr
        moco_m = 1. - 0.5 * (1. + math.cos(math.pi * i / args.iters)) * (1. - args.moco_m)
        batch = xtr[torch.randperm(len(xtr))[:args.batch_size]]
        loss = model(norm(augment(batch)), norm(augment(batch)), moco_m)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running.append(loss.item())
        if (i + 1) % 33 == 0:
            print(f'[{i + 1}/{args.iters}]  lr {lr:.2e}  m {moco_m:.4f}  loss {np.mean(running[-33:]):.4f}')
    print(f'metric {linear_probe(model, *data):.4f}')


if __name__ == '__main__':
    main()
