"""A small GPT with query-key normalisation and a learned temperature per head that learns to sort digits."""
import argparse
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

# hyperparameters
length = 7
num_digits = 6
batch_size = 48
max_iters = 320
eval_interval = 80
learning_rate = 4e-3
n_embd = 36
n_head = 3
n_layer = 2
block_size = 2 * length - 1
# ------------

torch.set_num_threads(1)
torch.manual_seed(args.seed)


class Head(nn.Module):
    """one head of self-attention: softmax(g * cos(q, k)) v"""

    def __init__(self, head_size):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.g = nn.Parameter(torch.tensor(math.log2(block_size ** 2 - block_size)))
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))

    def forward(self, x):
        T = x.shape[1]
        k = F.normalize(self.key(x), dim=-1)
        q = F.normalize(self.query(x), dim=-1)
        wei = self.g * (q @ k.transpose(-2, -1))
        wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return F.softmax(wei, dim=-1) @ self.value(x)


class MultiHeadAttention(nn.Module):
    def __init__(self, num_heads, head_size):
        super().__init__()
        self.heads = nn.ModuleList([Head(head_size) for _ in range(num_heads)])
        self.proj = nn.Linear(num_heads * head_size, n_embd)

    def forward(self, x):
        return self.proj(torch.cat([h(x) for h in self.heads], dim=-1))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.sa = MultiHeadAttention(n_head, n_embd // n_head)
        self.ffwd = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.ReLU(), nn.Linear(4 * n_embd, n_embd))
        self.ln1 = nn.LayerNorm(n_embd)
        self.ln2 = nn.LayerNorm(n_embd)

    def forward(self, x):
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(num_digits, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*[Block() for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, num_digits)

    def forward(self, idx, targets=None):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(-1, num_digits), targets.reshape(-1), ignore_index=-1)
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, n):
        for _ in range(n):
            logits, _ = self(idx)
            idx = torch.cat((idx, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
        return idx


def draw(n, held_back):
    """random digit strings; a quarter of all strings belongs to the held-back side"""
    inp = torch.randint(num_digits, (2 * n if not held_back else 8 * n, length))
    code = (inp * 10 ** torch.arange(length)).sum(1)
    side = (code * 2654435761 % 4294967296) % 97 < 24
    return inp[side == held_back][:n]


def get_batch(inp):
    full = torch.cat((inp, inp.sort(dim=1).values), dim=1)
    x, y = full[:, :-1], full[:, 1:].clone()
    y[:, : length - 1] = -1          # no loss while the input is still being read
    return x, y


@torch.no_grad()
def estimate_accuracy():
    model.eval()
    out = model.generate(test_inp, length)[:, length:]
    model.train()
    return (out == test_inp.sort(dim=1).values).all(1).float().mean().item()


test_inp = draw(400, True)
model = GPT()
optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_iters, eta_min=learning_rate / 20)

for it in range(max_iters):
    xb, yb = get_batch(draw(batch_size, False))
    _, loss = model(xb, yb)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    if (it + 1) % eval_interval == 0:
        acc = estimate_accuracy()
        print(f"iter {it + 1}: loss {loss.item():.4f}, sorted correctly {acc:.4f}")

print(f"metric {acc:.4f}")
