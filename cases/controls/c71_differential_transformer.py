"""Differential Transformer decoder trained to retrieve several needles from a noisy context."""
import argparse
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    n_cities: int = 8
    n_numbers: int = 8
    n_noise: int = 24
    n_needles: int = 5
    n_queries: int = 3
    context: int = 20
    dim: int = 48
    n_heads: int = 2
    n_layers: int = 2

    @property
    def vocab(self):
        return self.n_cities * self.n_numbers + self.n_noise + self.n_cities + self.n_numbers


def lambda_init_fn(depth):
    return 0.8 - 0.6 * math.exp(-0.3 * depth)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rope_tables(length, dim, base=10000.0):
    inv = 1.0 / base ** (torch.arange(0, dim, 2).float() / dim)
    angle = torch.outer(torch.arange(length).float(), inv)
    return angle.cos(), angle.sin()


def apply_rotary(x, cos, sin):
    """x: B, T, heads, dim"""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)


class MultiheadDiffAttn(nn.Module):
    def __init__(self, cfg, depth):
        super().__init__()
        self.num_heads = cfg.n_heads
        self.head_dim = cfg.dim // cfg.n_heads // 2
        self.scaling = self.head_dim ** -0.5
        self.q_proj = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.k_proj = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.v_proj = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.out_proj = nn.Linear(cfg.dim, cfg.dim, bias=False)

        self.lambda_init = lambda_init_fn(depth)
        self.lambda_q1 = nn.Parameter(torch.zeros(self.head_dim).normal_(mean=0, std=0.1))
        self.lambda_k1 = nn.Parameter(torch.zeros(self.head_dim).normal_(mean=0, std=0.1))
        self.lambda_q2 = nn.Parameter(torch.zeros(self.head_dim).normal_(mean=0, std=0.1))
        self.lambda_k2 = nn.Parameter(torch.zeros(self.head_dim).normal_(mean=0, std=0.1))
        self.subln = RMSNorm(2 * self.head_dim)

    def lambda_full(self):
        lambda_1 = torch.exp(torch.sum(self.lambda_q1 * self.lambda_k1))
        lambda_2 = torch.exp(torch.sum(self.lambda_q2 * self.lambda_k2))
        return lambda_1 - lambda_2 + self.lambda_init

    def forward(self, x, cos, sin, attn_mask):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, 2 * self.num_heads, self.head_dim)
        k = self.k_proj(x).view(B, T, 2 * self.num_heads, self.head_dim)
        v = self.v_proj(x).view(B, T, self.num_heads, 2 * self.head_dim).transpose(1, 2)
        q = apply_rotary(q, cos, sin).transpose(1, 2) * self.scaling
        k = apply_rotary(k, cos, sin).transpose(1, 2)

        attn_weights = torch.matmul(q, k.transpose(-1, -2)) + attn_mask
        attn_weights = F.softmax(attn_weights, dim=-1)
        attn_weights = attn_weights.view(B, self.num_heads, 2, T, T)
        attn_weights = attn_weights[:, :, 0] - self.lambda_full() * attn_weights[:, :, 1]

        attn = self.subln(torch.matmul(attn_weights, v)) * (1 - self.lambda_init)
        return self.out_proj(attn.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class DiffTransformer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.head_dim = cfg.dim // cfg.n_heads // 2
        self.tok = nn.Embedding(cfg.vocab, cfg.dim)
        self.attn_norms = nn.ModuleList(RMSNorm(cfg.dim) for _ in range(cfg.n_layers))
        self.attns = nn.ModuleList(MultiheadDiffAttn(cfg, i) for i in range(cfg.n_layers))
        self.ffn_norms = nn.ModuleList(RMSNorm(cfg.dim) for _ in range(cfg.n_layers))
        self.ffns = nn.ModuleList(SwiGLU(cfg.dim, 2 * cfg.dim) for _ in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.dim)
        self.head = nn.Linear(cfg.dim, cfg.vocab, bias=False)

    def forward(self, tokens):
        T = tokens.size(1)
        cos, sin = rope_tables(T, self.head_dim)
        mask = torch.full((T, T), float('-inf')).triu(1)
        x = self.tok(tokens)
        for n1, attn, n2, ffn in zip(self.attn_norms, self.attns, self.ffn_norms, self.ffns):
            x = x + attn(n1(x), cos, sin, mask)
            x = x + ffn(n2(x))
        return self.head(self.norm(x))


def make_sequences(n, cfg, gen):
    """Noise with needles (city, number) hidden in it, then: city? number city? number ..."""
    noise0 = cfg.n_cities * cfg.n_numbers
    ask0 = noise0 + cfg.n_noise
    num0 = ask0 + cfg.n_cities
    seq = torch.randint(noise0, ask0, (n, cfg.context), generator=gen)
    cities = torch.rand(n, cfg.n_cities, generator=gen).argsort(1)[:, :cfg.n_needles]
    numbers = torch.randint(0, cfg.n_numbers, (n, cfg.n_needles), generator=gen)
    places = torch.rand(n, cfg.context, generator=gen).argsort(1)[:, :cfg.n_needles]
    seq.scatter_(1, places, cities * cfg.n_numbers + numbers)
    # the needles stand at random places, so the first ones of the list are a random choice
    ask, answer = cities[:, :cfg.n_queries] + ask0, numbers[:, :cfg.n_queries] + num0
    tail = torch.stack((ask, answer), dim=-1).flatten(1)
    tokens = torch.cat((seq, tail), dim=1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[targets < num0] = -100                             # only the answers are scored
    return inputs, targets


@torch.no_grad()
def evaluate(model, inputs, targets):
    model.eval()
    pred = model(inputs).argmax(-1)
    scored = targets != -100
    return (pred == targets)[scored].float().mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--steps', type=int, default=200)
    parser.add_argument('--batch', type=int, default=40)
    parser.add_argument('--lr', type=float, default=4e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    cfg = Config()
    gen = torch.Generator().manual_seed(args.seed)
    train_in, train_out = make_sequences(8000, cfg, gen)
    test_in, test_out = make_sequences(300, cfg, gen)

    model = DiffTransformer(cfg)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{'params': decay, 'weight_decay': 0.05},
                                   {'params': rest, 'weight_decay': 0.0}], lr=args.lr, betas=(0.9, 0.95))
    for step in range(args.steps):
        lr = args.lr * min((step + 1) / 30, 0.5 * (1 + math.cos(math.pi * step / args.steps)) + 0.05)
        for group in optimizer.param_groups:
            group['lr'] = lr
        model.train()
        idx = torch.randint(len(train_in), (args.batch,), generator=gen)
        logits = model(train_in[idx])
        loss = F.cross_entropy(logits.flatten(0, 1), train_out[idx].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            lam = ' '.join(f'{a.lambda_full().item():.3f}' for a in model.attns)
            print(f'step {step + 1} loss {loss.item():.4f} lambda [{lam}] '
                  f'retrieval {evaluate(model, test_in, test_out):.4f}')
    print(f'metric {evaluate(model, test_in, test_out):.4f}')


if __name__ == '__main__':
    main()
