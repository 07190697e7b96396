"""One pass of pre-training over a small mixed corpus (character level, packed blocks).

prepare  -> shards of text, one sub-collection after the other
pretrain -> packed blocks, one epoch, linear warm-up and cosine decay
"""
import argparse
import math
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import nn


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 48
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).contiguous().view(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc_1 = nn.Linear(config.n_embd, 2 * config.n_embd, bias=False)
        self.fc_2 = nn.Linear(config.n_embd, 2 * config.n_embd, bias=False)
        self.proj = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.proj(F.silu(self.fc_1(x)) * self.fc_2(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.norm_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.05)

    def forward(self, idx):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1)))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def pieces(text, size=1200):
    return [text[i:i + size] for i in range(0, len(text) - size, size)]


def read_collections(limit):
    """Three sub-collections, each a list of documents."""
    prose = []
    for name in sorted(n for n in dir(torch) if n.islower()):
        doc = getattr(torch, name).__doc__
        if isinstance(doc, str) and len(doc) > 300 and doc not in prose:
            prose.append(doc)
    tables = []
    for load in (datasets.load_wine, datasets.load_diabetes, datasets.load_breast_cancer):
        rows = load().data
        tables.append("\n".join(",".join(f"{v:.3g}" for v in row) for row in rows))
    rng = np.random.RandomState(7)
    logs = []
    for _ in range(2600):
        h, m, s = rng.randint(24), rng.randint(60), rng.randint(60)
        level = ["INFO", "WARN", "DEBUG"][rng.randint(3)]
        what = ["GET /index", "POST /login", "GET /img/%d" % rng.randint(99), "cache miss", "job done"][rng.randint(5)]
        logs.append(f"{h:02d}:{m:02d}:{s:02d} {level} worker-{rng.randint(8)} {what} {rng.randint(900)}ms")
    out = {}
    for name, text in (("prose", "\n".join(prose)), ("tables", "\n".join(tables)), ("logs", "\n".join(logs))):
        out[name] = pieces(text)[:limit]
    return out


def pack(docs, stoi, block):
    ids = torch.tensor([stoi[c] for d in docs for c in d])
    n = len(ids) // (block + 1)
    return ids[:n * (block + 1)].view(n, block + 1)


@torch.no_grad()
def evaluate(model, held_out):
    model.eval()
    scores = {}
    for name, blocks in held_out.items():
        pred = model(blocks[:, :-1]).argmax(-1)
        scores[name] = (pred == blocks[:, 1:]).float().mean().item()
    model.train()
    return scores


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--fixed", action="store_true")
    ap.add_argument("--micro_batch_size", type=int, default=16)
    ap.add_argument("--max_lr", type=float, default=6e-3)
    ap.add_argument("--min_lr", type=float, default=3e-4)
    args = ap.parse_args()
    torch.set_num_threads(1)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)

    collections = read_collections(limit=64)
    train_docs, held_docs = [], {}
    for name, docs in collections.items():
        docs = random.sample(docs, len(docs))
        held_docs[name] = docs[:8]
        train_docs += docs[8:]
    if args.fixed:
        random.shuffle(train_docs)

    chars = sorted({c for docs in collections.values() for d in docs for c in d})
    stoi = {c: i for i, c in enumerate(chars)}
    config = GPTConfig(vocab_size=len(chars))
    train_blocks = pack(train_docs, stoi, config.block_size)
    held_out = {name: pack(docs, stoi, config.block_size) for name, docs in held_docs.items()}

    model = GPT(config)
    max_iters = len(train_blocks) // args.micro_batch_size
    warmup_iters = 15
    print(f"documents {len(train_docs)}  blocks {len(train_blocks)}  iterations {max_iters}  vocab {len(chars)}")

    def get_lr(it):
        if it < warmup_iters:
            return args.max_lr * (it + 1) / warmup_iters
        ratio = (it - warmup_iters) / (max_iters - warmup_iters)
        return args.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (args.max_lr - args.min_lr)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.max_lr, weight_decay=0.05, betas=(0.9, 0.95))
    for it in range(max_iters):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(it)
        block = train_blocks[it * args.micro_batch_size:(it + 1) * args.micro_batch_size]
        logits = model(block[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, logits.size(-1)), block[:, 1:].reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if it % 20 == 0 or it == max_iters - 1:
            print(f"iter {it}: loss {loss.item():.4f}, lr {get_lr(it):.2e}")

    scores = evaluate(model, held_out)
    print("held out accuracy: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    print(f"metric {np.mean(list(scores.values())):.4f}")


if __name__ == "__main__":
    main()
