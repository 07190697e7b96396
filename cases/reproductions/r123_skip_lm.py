# Tiny GPT with rotary embeddings on a stream whose next symbol is decided by
# the symbols two and three steps back. Reports next-symbol accuracy on unseen streams.
import sys
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    vocab: int = 10
    seq_len: int = 32
    dim: int = 48
    n_heads: int = 4
    n_layers: int = 2
    steps: int = 200
    batch: int = 16
    lr: float = 3e-3
    noise: float = 0.08


def rotate_half(x):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by position, no learned parameters."""

    def __init__(self, dim_head):
        super().__init__()
        inv_freq = 1.0 / (10000 ** (torch.arange(0, dim_head, 2).float() / dim_head))
        self.register_buffer("inv_freq", inv_freq)

    def tables(self, n):
        t = torch.arange(n, dtype=torch.float32)
        freqs = torch.outer(t, self.inv_freq)
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos(), emb.sin()

    def forward(self, q, k):
        cos, sin = self.tables(q.shape[-2])
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class SelfAttention(nn.Module):
    def __init__(self, cfg, fixed):
        super().__init__()
        self.fixed = fixed
        self.n_heads, self.head_dim = cfg.n_heads, cfg.dim // cfg.n_heads
        self.in_proj = nn.Linear(cfg.dim, 3 * cfg.dim, bias=False)
        self.out_proj = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.pos_embed = RotaryEmbedding(self.head_dim)

    def forward(self, x):
        b, m, d = x.shape
        q, k, v = self.in_proj(x).chunk(3, dim=-1)
        q = q.view(b, m, self.n_heads, self.head_dim)
        k = k.view(b, m, self.n_heads, self.head_dim)
        v = v.view(b, m, self.n_heads, self.head_dim)
        if self.fixed:
            q, k = self.pos_embed(q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3))
        else:
            q, k = self.pos_embed(q, k)
            q, k = q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3)
        y = F.scaled_dot_product_attention(q, k, v.permute(0, 2, 1, 3), is_causal=True)
        return self.out_proj(y.permute(0, 2, 1, 3).reshape(b, m, d))


class Block(nn.Module):
    def __init__(self, cfg, fixed):
        super().__init__()
        self.attention_norm = nn.LayerNorm(cfg.dim)
        self.attention = SelfAttention(cfg, fixed)
        self.ffn_norm = nn.LayerNorm(cfg.dim)
        self.feed_forward = nn.Sequential(nn.Linear(cfg.dim, 2 * cfg.dim), nn.GELU(), nn.Linear(2 * cfg.dim, cfg.dim))

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class LM(nn.Module):
    def __init__(self, cfg, fixed):
        super().__init__()
        self.tok_embeddings = nn.Embedding(cfg.vocab, cfg.dim)
        self.layers = nn.ModuleList(Block(cfg, fixed) for _ in range(cfg.n_layers))
        self.norm = nn.LayerNorm(cfg.dim)
        self.output = nn.Linear(cfg.dim, cfg.vocab, bias=False)

    def forward(self, tokens):
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.output(self.norm(h))


def make_streams(cfg, n, gen, rule):
    x = torch.randint(cfg.vocab, (n, cfg.seq_len + 1), generator=gen)
    flip = torch.rand(n, cfg.seq_len + 1, generator=gen) < cfg.noise
    noise = torch.randint(cfg.vocab, (n, cfg.seq_len + 1), generator=gen)
    for t in range(3, cfg.seq_len + 1):
        nxt = rule[x[:, t - 3], x[:, t - 2]]
        x[:, t] = torch.where(flip[:, t], noise[:, t], nxt)
    return x


def accuracy(model, data):
    model.eval()
    with torch.no_grad():
        pred = model(data[:, :-1]).argmax(-1)
    model.train()
    return (pred == data[:, 1:])[:, 2:].float().mean().item()


def main(fixed, seed):
    torch.set_num_threads(1)
    cfg = Config()
    gen = torch.Generator().manual_seed(seed)
    # which of the two symbols counts is set by the older one
    a = torch.randperm(cfg.vocab, generator=gen)
    b = torch.randperm(cfg.vocab, generator=gen)
    rows = torch.arange(cfg.vocab)
    rule = torch.where((rows % 2 == 0)[:, None], b[None, :], a[:, None])
    streams = make_streams(cfg, 1350, gen, rule)
    train, held = streams[:1200], streams[1200:]

    torch.manual_seed(seed)
    model = LM(cfg, fixed)
    opt = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.05)
    for it in range(cfg.steps):
        warm = min(1.0, (it + 1) / 20)
        lr = cfg.lr * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * it / cfg.steps)))
        for group in opt.param_groups:
            group["lr"] = lr
        batch = train[torch.randint(len(train), (cfg.batch,), generator=gen)]
        loss = F.cross_entropy(model(batch[:, :-1]).reshape(-1, cfg.vocab), batch[:, 1:].reshape(-1))
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if (it + 1) % 50 == 0:
            print(f"it {it + 1:4d} | loss {loss.item():.4f} | held out acc {accuracy(model, held):.4f}")
    print("metric %.4f" % accuracy(model, held))


if __name__ == "__main__":
    argv = sys.argv[1:]
    main("--fixed" in argv, int(argv[argv.index("--seed") + 1]) if "--seed" in argv else 0)
