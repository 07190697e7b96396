"""Universal Transformer encoder that writes a digit string backwards."""
import argparse
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

PAD, FIRST = 0, 1
BASE = 10
MAX_LEN = 12


def timing_signal(length, channels):
    """Tensor2tensor style: sines in the first half of the channels, cosines in the second."""
    n = channels // 2
    inv = torch.exp(torch.arange(n) * (-math.log(1e4) / (n - 1)))
    scaled = torch.arange(length, dtype=torch.float32)[:, None] * inv[None]
    return torch.cat([scaled.sin(), scaled.cos()], dim=1)


class TransitionFunction(nn.Sequential):
    def __init__(self, d, d_inner):
        super().__init__(nn.Linear(d, d_inner), nn.ReLU(), nn.Linear(d_inner, d))


class SharedBlock(nn.Module):
    def __init__(self, d, heads, d_inner, dropout):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)
        self.transition = TransitionFunction(d, d_inner)
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h, attend):
        b, t, d = h.shape
        q, k, v = self.qkv(h).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=attend)
        a = self.proj(a.transpose(1, 2).reshape(b, t, d))
        h = self.ln1(h + self.dropout(a))
        return self.ln2(h + self.dropout(self.transition(h)))


class UniversalTransformer(nn.Module):
    def __init__(self, d=64, heads=4, d_inner=128, n_steps=3, dropout=0.0):
        super().__init__()
        self.n_steps = n_steps
        self.embed = nn.Embedding(BASE + 1, d, padding_idx=PAD)
        self.block = SharedBlock(d, heads, d_inner, dropout)
        self.out = nn.Linear(d, BASE + 1)
        self.register_buffer("position", timing_signal(MAX_LEN, d))
        self.register_buffer("time", timing_signal(n_steps, d))

    def forward(self, tokens):
        h = self.embed(tokens)
        attend = (tokens != PAD)[:, None, None, :]
        for step in range(self.n_steps):
            h = h + self.position[: tokens.shape[1]] + self.time[step]
            h = self.block(h, attend)
        return self.out(h)


def strings(n, gen):
    """Strings of 8 to 12 digits, padded on the right, and their reversals in the same columns."""
    lengths = torch.randint(8, MAX_LEN + 1, (n, 1), generator=gen)
    col = torch.arange(MAX_LEN)[None]
    keep = col < lengths
    src = torch.randint(FIRST, FIRST + BASE, (n, MAX_LEN), generator=gen) * keep
    back = (lengths - 1 - col).clamp(min=0)
    tgt = src.gather(1, back) * keep
    return src, tgt


def main():
    cli = argparse.ArgumentParser()
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--steps", type=int, default=420)
    cli.add_argument("--lr", type=float, default=3e-3)
    args = cli.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    gen = torch.Generator().manual_seed(args.seed)
    src, tgt = strings(12400, gen)
    train_src, train_tgt, test_src, test_tgt = src[:12000], tgt[:12000], src[12000:], tgt[12000:]

    model = UniversalTransformer()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.98), eps=1e-9)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 50, 1.0) * max(0.05, 1 - s / args.steps))
    model.train()
    for step in range(1, args.steps + 1):
        idx = torch.randint(len(train_src), (32,), generator=gen)
        logits = model(train_src[idx])
        loss = F.cross_entropy(logits.transpose(1, 2), train_tgt[idx], ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 70 == 0:
            print(f"step {step} loss {loss.item():.4f}")

    model.eval()
    with torch.no_grad():
        guess = model(test_src).argmax(-1)
        real = test_tgt != PAD
        acc = (guess == test_tgt)[real].float().mean().item()
        whole = ((guess == test_tgt) | ~real).all(1).float().mean().item()
    print(f"whole strings {whole:.4f}")
    print(f"metric {acc:.4f}")


if __name__ == "__main__":
    main()
