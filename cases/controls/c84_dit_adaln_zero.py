"""Class-conditional diffusion transformer (adaLN-Zero) on 8x8 handwritten digits."""
import argparse
import copy
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size, frequency_embedding_size=64):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(),
                                 nn.Linear(hidden_size, hidden_size))
        self.frequency_embedding_size = frequency_embedding_size

    def forward(self, t):
        half = self.frequency_embedding_size // 2
        freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        ang = t[:, None].float() * freqs[None]
        return self.mlp(torch.cat([torch.cos(ang), torch.sin(ang)], dim=-1))


class LabelEmbedder(nn.Module):
    """Class labels, dropped at random for classifier-free guidance."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, labels, train):
        if train and self.dropout_prob > 0:
            drop = torch.rand(labels.shape[0]) < self.dropout_prob
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=True)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class DiTBlock(nn.Module):
    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        inner = int(hidden_size * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, inner), nn.GELU(approximate='tanh'),
                                 nn.Linear(inner, hidden_size))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class FinalLayer(nn.Module):
    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def sincos_2d(dim, grid):
    omega = 1. / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4.))
    ys, xs = np.meshgrid(np.arange(grid), np.arange(grid), indexing='ij')
    emb = [f(np.outer(p.reshape(-1), omega)) for p in (xs, ys) for f in (np.sin, np.cos)]
    return np.concatenate(emb, axis=1)


class DiT(nn.Module):
    def __init__(self, input_size=8, patch_size=2, in_channels=1, hidden_size=48, depth=3, num_heads=4,
                 num_classes=10, class_dropout_prob=0.1):
        super().__init__()
        self.patch_size, self.in_channels = patch_size, in_channels
        self.grid = input_size // patch_size
        self.x_embedder = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.register_buffer('pos_embed', torch.from_numpy(sincos_2d(hidden_size, self.grid)).float()[None])
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self.initialize_weights()

    def initialize_weights(self):
        def _basic_init(module):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.constant_(module.bias, 0)
        self.apply(_basic_init)
        w = self.x_embedder.weight.data
        nn.init.xavier_uniform_(w.view([w.shape[0], -1]))
        nn.init.constant_(self.x_embedder.bias, 0)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for block in self.blocks:
            nn.init.constant_(block.adaLN_modulation[-1].weight, 0)
            nn.init.constant_(block.adaLN_modulation[-1].bias, 0)
        for layer in (self.final_layer.adaLN_modulation[-1], self.final_layer.linear):
            nn.init.constant_(layer.weight, 0)
            nn.init.constant_(layer.bias, 0)

    def unpatchify(self, x):
        p, c, g = self.patch_size, self.in_channels, self.grid
        x = x.reshape(x.shape[0], g, g, p, p, c)
        return torch.einsum('nhwpqc->nchpwq', x).reshape(x.shape[0], c, g * p, g * p)

    def forward(self, x, t, y):
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    def forward_with_cfg(self, x, t, y, cfg_scale):
        null = torch.full_like(y, self.y_embedder.num_classes)
        eps_c, eps_u = self(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).chunk(2)
        return eps_u + cfg_scale * (eps_c - eps_u)


@torch.no_grad()
def update_ema(ema_model, model, decay):
    for p_ema, p in zip(ema_model.parameters(), model.parameters()):
        p_ema.mul_(decay).add_(p, alpha=1 - decay)


@torch.no_grad()
def ddim_sample(model, abar, y, steps=10, cfg_scale=2.0):
    x = torch.randn(len(y), 1, 8, 8)
    ts = torch.linspace(len(abar) - 1, 0, steps).long()
    for i, t in enumerate(ts):
        eps = model.forward_with_cfg(x, t.expand(len(y)), y, cfg_scale)
        x0 = ((x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()).clamp(-1, 1)
        if i + 1 == steps:
            return x0
        prev = abar[ts[i + 1]]
        x = prev.sqrt() * x0 + (1 - prev).sqrt() * eps


def main(args):
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8. - 1.
    labels = torch.tensor(data.target)
    tr, va = train_test_split(np.arange(len(images)), test_size=0.2, random_state=args.seed, stratify=data.target)
    x_train, y_train, x_val, y_val = images[tr], labels[tr], images[va], labels[va]

    T = 1000
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T), dim=0)

    def q_sample(x0, t, noise):
        a = abar[t].view(-1, 1, 1, 1)
        return a.sqrt() * x0 + (1 - a).sqrt() * noise

    model = DiT()
    ema = copy.deepcopy(model).requires_grad_(False)
    ema.eval()
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min(1., (s + 1) / 30) * (1 - 0.9 * s / args.steps))
    model.train()
    running = 0.
    for step in range(1, args.steps + 1):
        idx = torch.randint(0, len(x_train), (args.batch_size,))
        x, y = x_train[idx], y_train[idx]
        t = torch.randint(0, T, (len(x),))
        noise = torch.randn_like(x)
        loss = F.mse_loss(model(q_sample(x, t, noise), t, y), noise)
        opt.zero_grad()
        loss.backward()
        opt.step()
        sched.step()
        update_ema(ema, model, 0.98)
        running += loss.item()
        if step % 50 == 0:
            print(f'(step={step:05d}) train loss: {running / 50:.4f}')
            running = 0.

    gen = torch.Generator().manual_seed(1234)
    se, st = 0., 0.
    with torch.no_grad():
        for _ in range(3):
            t = torch.randint(0, T, (len(x_val),), generator=gen)
            noise = torch.randn(x_val.shape, generator=gen)
            pred = ema(q_sample(x_val, t, noise), t, y_val)
            se += F.mse_loss(pred, noise, reduction='sum').item()
            st += (noise - noise.mean()).pow(2).sum().item()
    sample = ddim_sample(ema, abar, torch.arange(10))
    means = torch.stack([x_train[y_train == k].mean(0) for k in range(10)])
    print(f'samples: mean {sample.mean():.3f} std {sample.std():.3f} '
          f'distance to class means {(sample - means).pow(2).mean():.3f}')
    print(f'metric {1 - se / st:.4f}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--steps', type=int, default=300)
    parser.add_argument('--batch-size', type=int, default=24)
    main(parser.parse_args())
