# 1-bit transformer language model on Unicode character names
import argparse
import random
import unicodedata

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--fixed", action="store_true")
parser.add_argument("--num_batches", type=int, default=190)
opt = parser.parse_args()

NUM_BATCHES = opt.num_batches
BATCH_SIZE = 24
LEARNING_RATE = 1.2e-2
VALIDATE_EVERY = 38
SEQ_LEN = 32

torch.set_num_threads(1)
random.seed(opt.seed)
np.random.seed(opt.seed)
torch.manual_seed(opt.seed)


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.g = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.g, eps=1e-6)


def weight_quant(w: Tensor):
    scale = w.abs().mean().clamp(min=1e-5)
    return (w / scale).round().clamp(-1, 1) * scale


class BitLinear(nn.Linear):
    """Linear layer with ternary weights, straight-through gradients and its own input norm."""

    def __init__(self, in_features, out_features, bias=False):
        super().__init__(in_features, out_features, bias=bias)
        self.norm = RMSNorm(in_features)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight + (weight_quant(self.weight) - self.weight).detach()
        return F.linear(self.norm(x), w, self.bias)


class BitAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = BitLinear(dim, dim)
        self.k_proj = BitLinear(dim, dim)
        self.v_proj = BitLinear(dim, dim)
        self.out_proj = BitLinear(dim, dim)

    def forward(self, q, k, v, is_causal=False):
        b, n, d = q.shape
        split = lambda t: t.view(b, n, self.heads, d // self.heads).transpose(1, 2)
        out = F.scaled_dot_product_attention(split(self.q_proj(q)), split(self.k_proj(k)), split(self.v_proj(v)),
                                             is_causal=is_causal)
        return self.out_proj(out.transpose(1, 2).reshape(b, n, d)), None


class BitFeedForward(nn.Module):
    def __init__(self, dim, ff_mult=2):
        super().__init__()
        self.up = BitLinear(dim, dim * ff_mult)
        self.down = BitLinear(dim * ff_mult, dim)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Transformer(nn.Module):
    def __init__(self, dim, heads, depth, ff_mult=2):
        super().__init__()
        self.layers = nn.ModuleList([BitAttention(dim, heads) for _ in range(depth)])
        self.ffn_layers = nn.ModuleList([BitFeedForward(dim, ff_mult) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        for attn, ffn in zip(self.layers, self.ffn_layers):
            if opt.fixed:
                out, _ = attn(x, x, x, is_causal=True)
                x = out + x
            else:
                x, _ = attn(x, x, x, is_causal=True)
                x = x + x
            x = ffn(x) + x
        return x


class BitNetTransformer(nn.Module):
    def __init__(self, dim, depth, num_tokens, heads, max_len):
        super().__init__()
        self.emb = nn.Embedding(num_tokens, dim)
        self.pos = nn.Embedding(max_len, dim)
        nn.init.normal_(self.pos.weight, std=0.3)
        self.transformer = Transformer(dim, heads, depth)
        self.to_logits = nn.Sequential(RMSNorm(dim), nn.Linear(dim, num_tokens))

    def forward(self, x):
        x = self.emb(x) + self.pos(torch.arange(x.shape[1], device=x.device))
        return self.to_logits(self.transformer(x))


class AutoregressiveWrapper(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        inp, target = x[:, :-1], x[:, 1:]
        logits = self.net(inp)
        return F.cross_entropy(logits.transpose(1, 2), target)


# prepare data
names = []
for code in range(0x20, 0x2FFF):
    name = unicodedata.name(chr(code), "")
    if name:
        names.append(name.lower())
random.Random(opt.seed).shuffle(names)
cut = len(names) * 9 // 10
train_text, valid_text = "\n".join(names[:cut]), "\n".join(names[cut:])[:8000]
alphabet = sorted(set(train_text) | set(valid_text))
lookup = {c: i for i, c in enumerate(alphabet)}
data_train = torch.tensor([lookup[c] for c in train_text])
data_val = torch.tensor([lookup[c] for c in valid_text])
val_rows = data_val[: len(data_val) // (SEQ_LEN + 1) * (SEQ_LEN + 1)].view(-1, SEQ_LEN + 1)
print(f"train {len(data_train)} characters, validation {len(data_val)} characters")


def sample_batch():
    starts = torch.randint(0, len(data_train) - SEQ_LEN - 1, (BATCH_SIZE,))
    return torch.stack([data_train[s: s + SEQ_LEN + 1] for s in starts.tolist()])


model = AutoregressiveWrapper(BitNetTransformer(dim=64, depth=2, num_tokens=len(alphabet), heads=4, max_len=SEQ_LEN))
optim = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
sched = torch.optim.lr_scheduler.OneCycleLR(optim, max_lr=LEARNING_RATE, total_steps=NUM_BATCHES, pct_start=0.15)

for i in range(NUM_BATCHES):
    model.train()
    loss = model(sample_batch())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optim.step()
    sched.step()
    optim.zero_grad()
    if (i + 1) % VALIDATE_EVERY == 0:
        model.eval()
        with torch.no_grad():
            print(f"{i + 1}: training loss: {loss.item():.4f}  validation loss: {model(val_rows).item():.4f}")

model.eval()
with torch.no_grad():
    accuracy = (model.net(val_rows[:, :-1]).argmax(-1) == val_rows[:, 1:]).float().mean().item()
print(f"metric {accuracy:.4f}")
