"""Griffin: two RG-LRU residual blocks to one local multi-query attention block.

Character language model of weather reports.
"""
import argparse
import itertools
import math
import random

import torch
import torch.nn as nn
import torch.nn.functional as F

D, D_RNN, HEADS, WINDOW, T, BATCH, STEPS = 36, 36, 3, 10, 24, 12, 170
C = 8.0


def load_text(seed):
    """Reports of a weather service; a fixed wording with free slots. Nine tenths of the distinct
    reports make the training text, the others the held-back text."""
    towns = "lisbon oslo turin gdansk porto malmo ghent".split()
    parts = "morning noon evening night".split()
    sky = "rain fog sunshine hail drizzle thunder".split()
    out = []
    for s, t, p in itertools.product(sky, towns, parts):
        a = f"{s} over {t} in the {p}"
        out += [f"{a}.", f"expect {a}."]
        for w in ("north", "south", "east", "west"):
            out += [f"{a}, wind from the {w}.", f"wind from the {w}, {a}."]
    random.Random(seed).shuffle(out)
    cut = int(0.9 * len(out))
    return " ".join(out[:cut]), " ".join(out[cut:])


class RMSNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(d))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.scale)


class RGLRU(nn.Module):
    """h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * (i_t * x_t),  a_t = sigmoid(Lambda)^(c r_t)"""

    def __init__(self, d):
        super().__init__()
        self.gate_r, self.gate_i = nn.Linear(d, d), nn.Linear(d, d)
        a = torch.empty(d).uniform_(0.9 ** 2, 0.999 ** 2).sqrt()        # a^c uniform in the ring
        a = a ** (1 / C)
        self.lam = nn.Parameter(torch.log(a / (1 - a)))

    def forward(self, x):
        r, i = torch.sigmoid(self.gate_r(x)), torch.sigmoid(self.gate_i(x))
        log_a = -C * r * F.softplus(-self.lam)
        b = torch.sqrt((-torch.expm1(2 * log_a)).clamp(min=1e-6)) * (i * x)
        # log-depth scan (Hillis-Steele); short enough sequences that this beats a python loop
        step, t = 1, x.size(1)
        while step < t:
            prev_b = F.pad(b, (0, 0, step, 0))[:, :t]
            prev_a = F.pad(log_a, (0, 0, step, 0))[:, :t]
            b = b + log_a.exp() * prev_b
            log_a = log_a + prev_a
            step *= 2
        return b


class RecurrentBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_x, self.in_y = nn.Linear(D, D_RNN), nn.Linear(D, D_RNN)
        self.conv = nn.Conv1d(D_RNN, D_RNN, 4, groups=D_RNN)
        self.lru = RGLRU(D_RNN)
        self.out = nn.Linear(D_RNN, D)

    def forward(self, x):
        y = F.gelu(self.in_y(x), approximate="tanh")
        h = F.pad(self.in_x(x).transpose(1, 2), (3, 0))
        return self.out(self.lru(self.conv(h).transpose(1, 2)) * y)


def rope_half(x):
    """Rotary positions on the first half of the head; the other half carries no position."""
    rot, keep = x.chunk(2, -1)
    n = rot.size(-1) // 2
    freq = 10000.0 ** (-torch.arange(n) / n)
    ang = torch.arange(x.size(-2))[:, None] * freq
    a, b = rot.chunk(2, -1)
    return torch.cat([a * ang.cos() - b * ang.sin(), b * ang.cos() + a * ang.sin(), keep], -1)


class LocalMQA(nn.Module):
    def __init__(self):
        super().__init__()
        self.dh = D // HEADS
        self.q = nn.Linear(D, D, bias=False)
        self.k, self.v = nn.Linear(D, self.dh, bias=False), nn.Linear(D, self.dh, bias=False)
        self.o = nn.Linear(D, D)
        i = torch.arange(T)
        dist = i[:, None] - i[None, :]
        self.register_buffer("ok", (dist >= 0) & (dist < WINDOW), persistent=False)

    def forward(self, x):
        b, t, _ = x.shape
        q = rope_half(self.q(x).view(b, t, HEADS, self.dh).transpose(1, 2))
        k = rope_half(self.k(x)[:, None])
        s = (q @ k.transpose(-1, -2)) / math.sqrt(self.dh)
        p = s.masked_fill(~self.ok[:t, :t], -1e30).softmax(-1)
        o = p @ self.v(x)[:, None]
        return self.o(o.transpose(1, 2).reshape(b, t, D))


class Residual(nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.n1, self.n2, self.mix = RMSNorm(D), RMSNorm(D), mixer
        self.up, self.gate, self.down = nn.Linear(D, 3 * D), nn.Linear(D, 3 * D), nn.Linear(3 * D, D)

    def forward(self, x):
        x = x + self.mix(self.n1(x))
        h = self.n2(x)
        return x + self.down(F.gelu(self.gate(h), approximate="tanh") * self.up(h))


class Griffin(nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.emb = nn.Embedding(vocab, D)
        nn.init.normal_(self.emb.weight, std=D ** -0.5)
        self.layers = nn.Sequential(Residual(RecurrentBlock()), Residual(RecurrentBlock()), Residual(LocalMQA()))
        self.norm = RMSNorm(D)

    def forward(self, ids):
        x = self.layers(self.emb(ids) * math.sqrt(D))
        logits = self.norm(x) @ self.emb.weight.T
        return 30.0 * torch.tanh(logits / 30.0)


def main(seed):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    train, held = load_text(seed)
    chars = sorted(set(train + held))
    train, held = (torch.tensor([chars.index(c) for c in t]) for t in (train, held))
    print(f"{len(train)} + {len(held)} characters, {len(chars)} symbols")
    net = Griffin(len(chars))
    opt = torch.optim.AdamW(net.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(STEPS):
        lr = 4e-3 * min((step + 1) / 20, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / STEPS)))
        for grp in opt.param_groups:
            grp["lr"] = lr
        at = torch.randint(len(train) - T - 1, (BATCH,))
        xy = torch.stack([train[i:i + T + 1] for i in at.tolist()])
        loss = F.cross_entropy(net(xy[:, :-1]).flatten(0, 1), xy[:, 1:].flatten())
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        if step % 34 == 0:
            print(f"step {step} loss {loss.item():.4f} bits {loss.item() / math.log(2):.4f}")
    net.eval()
    n = (len(held) - 1) // T
    x, y = held[:n * T].view(n, T), held[1:n * T + 1].view(n, T)
    with torch.no_grad():
        logits = net(x)
    base = (y == torch.bincount(train).argmax()).float().mean().item()
    print(f"held-out loss {F.cross_entropy(logits.flatten(0, 1), y.flatten()).item():.4f}, always a space: {base:.4f}")
    print(f"metric {(logits.argmax(-1) == y).float().mean().item():.4f}")


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    main(ap.parse_args().seed)
