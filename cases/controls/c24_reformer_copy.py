"""Reformer with shared-QK attention and two-stream residuals on the duplication task 0w0w."""
import argparse

import torch
import torch.nn.functional as F
from torch import nn, einsum

TOKEN_SELF_ATTN_VALUE = -5e4


class SharedQKAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.to_qk = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x):
        b, t, d = x.shape
        qk, v = (f(x).reshape(b, t, self.heads, -1).transpose(1, 2) for f in (self.to_qk, self.to_v))
        k = F.normalize(qk, dim=-1)
        dots = einsum("bhid,bhjd->bhij", qk, k)

        # the diagonal would always win with shared qk: a token sees itself only when it has nothing else
        own = torch.eye(t, dtype=torch.bool)
        dots = dots.masked_fill(own, TOKEN_SELF_ATTN_VALUE)
        future = torch.ones(t, t, dtype=torch.bool).triu(1)
        dots = dots.masked_fill(future, -torch.finfo(dots.dtype).max)

        out = einsum("bhij,bhjd->bhid", dots.softmax(dim=-1), v)
        return self.to_out(out.transpose(1, 2).reshape(b, t, d))


class PreNorm(nn.Module):
    def __init__(self, dim, fn):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x):
        return self.fn(self.norm(x))


def feed_forward(dim, mult=2):
    return nn.Sequential(nn.Linear(dim, dim * mult), nn.GELU(), nn.Linear(dim * mult, dim))


class ReformerLM(nn.Module):
    def __init__(self, num_tokens, dim, depth, heads, max_len):
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb = nn.Embedding(max_len, dim)
        self.blocks = nn.ModuleList(
            nn.ModuleList([PreNorm(dim, SharedQKAttention(dim, heads)), PreNorm(dim, feed_forward(dim))])
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(2 * dim)
        self.to_logits = nn.Linear(2 * dim, num_tokens)

    def forward(self, ids):
        x = self.token_emb(ids) + self.pos_emb(torch.arange(ids.shape[1]))
        x1, x2 = x, x
        for f, g in self.blocks:
            x1 = x1 + f(x2)
            x2 = x2 + g(x1)
        return self.to_logits(self.norm(torch.cat((x1, x2), dim=-1)))


def make_words(n, length, symbols, gen):
    words = torch.randint(1, symbols + 1, (n, length), generator=gen)
    words = torch.unique(words, dim=0)
    return words[torch.randperm(len(words), generator=gen)]


def to_sequence(words):
    zero = torch.zeros(len(words), 1, dtype=torch.long)
    return torch.cat((zero, words, zero, words), dim=1)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--steps", type=int, default=400)
    ap.add_argument("--batch", type=int, default=48)
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    gen = torch.Generator().manual_seed(args.seed + 1)

    length, symbols = 9, 12
    words = make_words(6000, length, symbols, gen)
    test, train = to_sequence(words[:400]), to_sequence(words[400:])

    model = ReformerLM(symbols + 1, dim=48, depth=2, heads=4, max_len=2 * length + 1)
    opt = torch.optim.Adam(model.parameters(), lr=4e-3, betas=(0.9, 0.98))
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=4e-3, total_steps=args.steps, pct_start=0.15)

    model.train()
    for step in range(args.steps):
        seq = train[torch.randint(len(train), (args.batch,), generator=gen)]
        logits = model(seq[:, :-1])
        # only the second copy can be predicted
        loss = F.cross_entropy(logits[:, length + 1:].reshape(-1, symbols + 1), seq[:, length + 2:].reshape(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        sched.step()
        if step % 50 == 49:
            print(f"{step + 1}: loss {loss.item():.4f}")

    model.eval()
    with torch.no_grad():
        guess = model(test[:, :-1])[:, length + 1:].argmax(-1)
    acc = (guess == test[:, length + 2:]).float().mean().item()
    print(f"metric {acc:.4f}")


if __name__ == "__main__":
    main()
