"""Decoder-only language model with multi-query attention on lines that count in changing steps."""
import argparse
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

DIGITS, STEPS, LENGTH = 10, 4, 20
VOCAB = DIGITS + STEPS                     # 0..9, then the words "+1", "+2", "+3", "+4"


def document(rng):
    """+3 4 7 0 3 +1 4 5 6 ...: count on in steps (modulo ten) until another step is announced"""
    step = rng.integers(1, STEPS + 1)
    words, value = [DIGITS + step - 1], rng.integers(DIGITS)
    words.append(value)
    while len(words) < LENGTH:
        if rng.random() < 0.2 and words[-1] < DIGITS:
            step = rng.integers(1, STEPS + 1)
            words.append(DIGITS + step - 1)
        else:
            value = (value + step) % DIGITS
            words.append(value)
    return tuple(int(w) for w in words)


class MultiQueryAttention(nn.Module):
    """h heads of queries share one head of keys and values"""

    def __init__(self, d_model, n_heads):
        super().__init__()
        k = d_model // n_heads
        std = d_model ** -0.5
        self.P_q = nn.Parameter(torch.randn(n_heads, d_model, k) * std)
        self.P_k = nn.Parameter(torch.randn(d_model, k) * std)
        self.P_v = nn.Parameter(torch.randn(d_model, k) * std)
        self.P_o = nn.Parameter(torch.randn(n_heads, d_model, k) * std)

    def forward(self, x, mask):
        q = torch.einsum("bnd,hdk->bhnk", x, self.P_q)
        k = torch.einsum("bmd,dk->bmk", x, self.P_k)
        v = torch.einsum("bmd,dv->bmv", x, self.P_v)
        logits = torch.einsum("bhnk,bmk->bhnm", q, k) / math.sqrt(k.shape[-1])
        weights = torch.softmax(logits + mask, dim=-1)
        o = torch.einsum("bhnm,bmv->bhnv", weights, v)
        return torch.einsum("bhnv,hdv->bnd", o, self.P_o)


class Layer(nn.Module):
    def __init__(self, d_model, n_heads, d_ff):
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(d_model), MultiQueryAttention(d_model, n_heads)
        self.ln2 = nn.LayerNorm(d_model)
        self.ff = nn.Sequential(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model))

    def forward(self, x, mask):
        x = x + self.attn(self.ln1(x), mask)
        return x + self.ff(self.ln2(x))


class Decoder(nn.Module):
    def __init__(self, vocab, max_len, d_model=64, n_heads=4, d_ff=128, n_layers=2):
        super().__init__()
        self.tok = nn.Embedding(vocab, d_model)
        self.pos = nn.Embedding(max_len, d_model)
        nn.init.normal_(self.tok.weight, std=0.5)
        nn.init.normal_(self.pos.weight, std=0.5)
        self.layers = nn.ModuleList([Layer(d_model, n_heads, d_ff) for _ in range(n_layers)])
        self.ln = nn.LayerNorm(d_model)
        self.unembed = nn.Linear(d_model, vocab, bias=False)
        self.register_buffer("mask", torch.full((max_len, max_len), float("-inf")).triu(1), persistent=False)

    def forward(self, tokens):
        n = tokens.shape[1]
        x = self.tok(tokens) + self.pos(torch.arange(n, device=tokens.device))
        for layer in self.layers:
            x = layer(x, self.mask[:n, :n])
        return self.unembed(self.ln(x))


def lr_at(step, total, peak, warmup=30):
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))))


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, default=400)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--lr", type=float, default=4e-3)
    a = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(a.seed)
    rng = np.random.default_rng(a.seed)

    docs = list(dict.fromkeys(document(rng) for _ in range(4000)))
    held = torch.tensor(docs[:300])
    train = torch.tensor(docs[300:])
    length = train.shape[1]

    lm = Decoder(VOCAB, length - 1)
    optim = torch.optim.AdamW(lm.parameters(), lr=a.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    lm.train()
    for step in range(a.steps):
        for group in optim.param_groups:
            group["lr"] = lr_at(step, a.steps, a.lr)
        batch = train[torch.from_numpy(rng.integers(0, len(train), a.batch))]
        inputs, targets = batch[:, :-1], batch[:, 1:]
        loss = F.cross_entropy(lm(inputs).reshape(-1, VOCAB), targets.reshape(-1))
        optim.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optim.step()
        if (step + 1) % 50 == 0:
            print(f"{step + 1:5d} | loss {loss.item():.4f} | ppl {loss.exp().item():.2f} | grad norm {norm.item():.2f}")

    # accuracy where a number follows; the first number of a line is arbitrary
    lm.eval()
    with torch.no_grad():
        targets = held[:, 2:]
        guess = lm(held[:, :-1])[:, 1:].argmax(-1)
        number = targets < DIGITS
        right = guess[number] == targets[number]
    print(f"metric {right.float().mean().item():.4f}")


if __name__ == "__main__":
    main()
