"""Character language model in the style of GPT-J (parallel attention and MLP, partial rotary) on tiny stories."""
import argparse
import math
import random

import torch
import torch.nn as nn
import torch.nn.functional as F

NAMES = ["anna", "ben", "carl", "dora", "emil", "fay"]
ITEMS = ["lamp", "cup", "book", "key", "hat", "coin"]
PLACES = ["attic", "garden", "kitchen", "hall", "shed"]


def write_story(rng):
    (n1, n2), (i1, i2) = rng.sample(NAMES, 2), rng.sample(ITEMS, 2)
    p1, p2 = rng.sample(PLACES, 2)
    facts = f"{n1} put the {i1} in the {p1}. {n2} put the {i2} in the {p2}. "
    k = rng.random() < 0.5
    return facts + f"the {i1 if k else i2} is in the {p1 if k else p2}.\n"


def corpus(seed, n_stories=1600, n_val=160):
    rng = random.Random(seed)
    stories = set()
    while len(stories) < n_stories:
        stories.add(write_story(rng))
    stories = sorted(stories)
    rng.shuffle(stories)
    return "".join(stories[n_val:]), "".join(stories[:n_val])


class Config:
    block_size = 96
    n_layer = 2
    n_head = 2
    n_embd = 64
    rotary_dim = 16
    vocab_size = None


def fixed_pos_embedding(dim, seq_len):
    inv_freq = 1.0 / (10000 ** (torch.arange(0, dim, 2) / dim))
    sinusoid = torch.outer(torch.arange(seq_len).float(), inv_freq)
    return sinusoid.sin(), sinusoid.cos()


def rotate_every_two(x):
    x1, x2 = x[..., ::2], x[..., 1::2]
    return torch.stack((-x2, x1), dim=-1).flatten(-2)


def apply_rotary(x, sin, cos):
    # x: (B, T, H, rotary_dim); sin, cos: (T, rotary_dim / 2)
    sin, cos = (t.repeat_interleave(2, dim=-1)[None, :, None, :] for t in (sin, cos))
    return x * cos + rotate_every_two(x) * sin


class GPTJAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.num_heads, self.head_dim = cfg.n_head, cfg.n_embd // cfg.n_head
        self.rotary_dim = cfg.rotary_dim
        self.q_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.k_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.v_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.out_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        mask = torch.tril(torch.ones(cfg.block_size, cfg.block_size, dtype=torch.bool))
        self.register_buffer("causal_mask", mask, persistent=False)
        sin, cos = fixed_pos_embedding(cfg.rotary_dim, cfg.block_size)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("cos", cos, persistent=False)

    def _rotate(self, t, n):
        rot, rest = t[..., :self.rotary_dim], t[..., self.rotary_dim:]
        return torch.cat([apply_rotary(rot, self.sin[:n], self.cos[:n]), rest], dim=-1)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (p(x).view(B, T, self.num_heads, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self._rotate(q, T).transpose(1, 2), self._rotate(k, T).transpose(1, 2)
        v = v.transpose(1, 2)
        w = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.head_dim)
        w = w.masked_fill(~self.causal_mask[:T, :T], torch.finfo(w.dtype).min)
        w = w.softmax(dim=-1)
        out = torch.matmul(w, v).transpose(1, 2).reshape(B, T, C)
        return self.out_proj(out)


class GPTJBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd)
        self.attn = GPTJAttention(cfg)
        self.mlp = nn.Sequential(
            nn.Linear(cfg.n_embd, 4 * cfg.n_embd), nn.GELU(approximate="tanh"), nn.Linear(4 * cfg.n_embd, cfg.n_embd))

    def forward(self, x):
        h = self.ln_1(x)
        return self.attn(h) + self.mlp(h) + x


class GPTJ(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.h = nn.ModuleList(GPTJBlock(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(m):
        if isinstance(m, (nn.Linear, nn.Embedding)):
            nn.init.normal_(m.weight, std=0.02)
            if isinstance(m, nn.Linear) and m.bias is not None:
                nn.init.zeros_(m.bias)

    def forward(self, idx):
        x = self.wte(idx)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--max_iters", type=int, default=190)
    p.add_argument("--batch_size", type=int, default=12)
    p.add_argument("--learning_rate", type=float, default=4e-3)
    args = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    train_text, val_text = corpus(args.seed)
    stoi = {c: i for i, c in enumerate(sorted(set(train_text + val_text)))}
    train_data, val_data = (torch.tensor([stoi[c] for c in t]) for t in (train_text, val_text))
    cfg = Config()
    cfg.vocab_size = len(stoi)

    def get_batch():
        ix = torch.randint(len(train_data) - cfg.block_size, (args.batch_size,))
        x = torch.stack([train_data[i:i + cfg.block_size] for i in ix])
        y = torch.stack([train_data[i + 1:i + 1 + cfg.block_size] for i in ix])
        return x, y

    model = GPTJ(cfg)
    decay = [q for q in model.parameters() if q.dim() >= 2]
    no_decay = [q for q in model.parameters() if q.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}],
        lr=args.learning_rate, betas=(0.9, 0.95))

    def get_lr(it, warmup=30):
        if it < warmup:
            return args.learning_rate * (it + 1) / warmup
        r = (it - warmup) / (args.max_iters - warmup)
        return args.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * r)))

    model.train()
    for it in range(args.max_iters):
        for g in optimizer.param_groups:
            g["lr"] = get_lr(it)
        x, y = get_batch()
        logits = model(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (it + 1) % 50 == 0:
            print(f"iter {it + 1}: loss {loss.item():.4f}")

    model.eval()
    n = (len(val_data) - 1) // cfg.block_size * cfg.block_size
    xv, yv = val_data[:n].view(-1, cfg.block_size), val_data[1:n + 1].view(-1, cfg.block_size)
    with torch.no_grad():
        acc = (model(xv).argmax(-1) == yv).float().mean().item()
    print(f"metric {acc:.4f}")


if __name__ == "__main__":
    main()
