import argparse
import math

import torch
from torch import nn
from torch.nn import functional as F

VOCAB, BLOCK = 16, 12


class CausalSelfAttention(nn.Module):
    def __init__(self, n_embd, n_head, fixed):
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.register_buffer("bias", torch.tril(torch.ones(BLOCK, BLOCK)).bool())
        self.masked_bias = torch.finfo(torch.float32).min if fixed else -1e4

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)
        att = q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))
        att = att.masked_fill(~self.bias[:T, :T], self.masked_bias)
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, n_embd, n_head, fixed):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = CausalSelfAttention(n_embd, n_head, fixed)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd)
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, fixed, n_embd=32, n_head=2, n_layer=2):
        super().__init__()
        self.wte = nn.Embedding(VOCAB, n_embd)
        self.wpe = nn.Embedding(BLOCK, n_embd)
        self.h = nn.ModuleList(Block(n_embd, n_head, fixed) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, VOCAB, bias=False)

    def forward(self, idx):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1)))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def make_sequences(n, generator):
    """Each sequence counts on by its own step, and now and then a symbol is a random one."""
    start = torch.randint(VOCAB, (n, 1), generator=generator)
    stride = torch.randint(1, 4, (n, 1), generator=generator)
    seq = (start + stride * torch.arange(BLOCK + 1)) % VOCAB
    noise = torch.rand(n, BLOCK + 1, generator=generator) < 0.15
    return torch.where(noise, torch.randint(VOCAB, seq.shape, generator=generator), seq)


@torch.no_grad()
def continuation_accuracy(model, sequences):
    """The next symbol from an unfinished sequence, as in generation."""
    hits = 0
    for length in (4, 7, 10):
        logits = model(sequences[:, :length])[:, -1]
        hits += (logits.argmax(-1) == sequences[:, length]).sum().item()
    return hits / (3 * len(sequences))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    sequences = torch.unique(make_sequences(6000, generator), dim=0)
    sequences = sequences[torch.randperm(len(sequences), generator=generator)]
    train, held_back = sequences[:-500], sequences[-500:]

    model = GPT(args.fixed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    steps = 200
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for it in range(steps):
        batch = train[torch.randint(len(train), (32,), generator=generator)]
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, VOCAB), batch[:, 1:].reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if it % 40 == 39:
            with torch.no_grad():
                logits = model(held_back[:, :-1])
                val = F.cross_entropy(logits.reshape(-1, VOCAB), held_back[:, 1:].reshape(-1))
            print(f"iter {it + 1}: train loss {loss.item():.4f} val loss {val.item():.4f}")
    model.eval()
    print(f"metric {continuation_accuracy(model, held_back):.4f}")


if __name__ == "__main__":
    main()
