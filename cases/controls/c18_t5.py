"""A small T5 written from scratch, trained on text-to-text sorting, upwards or downwards."""
import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn, Tensor

PAD, EOS, UP, DOWN = range(4)
LETTERS = 16
VOCAB = 4 + LETTERS


class RMSNorm(nn.Module):
    def __init__(self, d: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class RelativeBias(nn.Module):
    def __init__(self, heads: int, bidirectional: bool, buckets: int = 16, max_distance: int = 32):
        super().__init__()
        self.bidirectional, self.buckets, self.max_distance = bidirectional, buckets, max_distance
        self.table = nn.Embedding(buckets, heads)
        nn.init.normal_(self.table.weight, std=0.1)

    def bucket(self, rel: Tensor) -> Tensor:
        """rel = key position - query position"""
        n, ret = self.buckets, torch.zeros_like(rel)
        if self.bidirectional:
            n //= 2
            ret = ret + (rel > 0).long() * n
            rel = rel.abs()
        else:
            rel = -torch.min(rel, torch.zeros_like(rel))
        exact = n // 2
        large = exact + (torch.log(rel.float().clamp(min=1) / exact) / math.log(self.max_distance / exact)
                         * (n - exact)).long()
        return ret + torch.where(rel < exact, rel, large.clamp(max=n - 1))

    def forward(self, q_len: int, k_len: int) -> Tensor:
        rel = torch.arange(k_len)[None, :] - torch.arange(q_len)[:, None]
        return self.table(self.bucket(rel)).permute(2, 0, 1)[None]      # 1, heads, q, k


class Attention(nn.Module):
    def __init__(self, d: int, heads: int, d_kv: int):
        super().__init__()
        self.heads, self.d_kv = heads, d_kv
        inner = heads * d_kv
        self.q = nn.Linear(d, inner, bias=False)
        self.k = nn.Linear(d, inner, bias=False)
        self.v = nn.Linear(d, inner, bias=False)
        self.o = nn.Linear(inner, d, bias=False)
        # the 1/sqrt(d_kv) lives in the initialisation of q
        nn.init.normal_(self.q.weight, std=(d * d_kv) ** -0.5)
        nn.init.normal_(self.k.weight, std=d ** -0.5)
        nn.init.normal_(self.v.weight, std=d ** -0.5)
        nn.init.normal_(self.o.weight, std=inner ** -0.5)

    def forward(self, x: Tensor, kv: Tensor, bias: Tensor) -> Tensor:
        split = lambda t: t.view(t.size(0), t.size(1), self.heads, self.d_kv).transpose(1, 2)
        q, k, v = split(self.q(x)), split(self.k(kv)), split(self.v(kv))
        scores = torch.matmul(q, k.transpose(-1, -2)) + bias
        out = torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)
        return self.o(out.transpose(1, 2).reshape(x.size(0), x.size(1), -1))


class FeedForward(nn.Module):
    def __init__(self, d: int, d_ff: int):
        super().__init__()
        self.wi = nn.Linear(d, d_ff, bias=False)
        self.wo = nn.Linear(d_ff, d, bias=False)
        nn.init.normal_(self.wi.weight, std=d ** -0.5)
        nn.init.normal_(self.wo.weight, std=d_ff ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.relu(self.wi(x)))


class Block(nn.Module):
    def __init__(self, d: int, heads: int, d_kv: int, d_ff: int, p: float, decoder: bool):
        super().__init__()
        self.ln1, self.self_attn = RMSNorm(d), Attention(d, heads, d_kv)
        self.decoder = decoder
        if decoder:
            self.ln2, self.cross_attn = RMSNorm(d), Attention(d, heads, d_kv)
        self.ln3, self.ff = RMSNorm(d), FeedForward(d, d_ff)
        self.drop = nn.Dropout(p)

    def forward(self, x, self_bias, memory=None, memory_bias=None):
        h = self.ln1(x)
        x = x + self.drop(self.self_attn(h, h, self_bias))
        if self.decoder:
            x = x + self.drop(self.cross_attn(self.ln2(x), memory, memory_bias))
        return x + self.drop(self.ff(self.ln3(x)))


class T5(nn.Module):
    def __init__(self, d=48, heads=4, d_kv=12, d_ff=96, layers=2, p=0.0):
        super().__init__()
        self.d = d
        self.shared = nn.Embedding(VOCAB, d)                            # std 1, tied with the output
        self.encoder = nn.ModuleList([Block(d, heads, d_kv, d_ff, p, False) for _ in range(layers)])
        self.decoder = nn.ModuleList([Block(d, heads, d_kv, d_ff, p, True) for _ in range(layers)])
        self.enc_bias, self.dec_bias = RelativeBias(heads, True), RelativeBias(heads, False)
        self.enc_norm, self.dec_norm = RMSNorm(d), RMSNorm(d)
        self.drop = nn.Dropout(p)

    @staticmethod
    def key_mask(tokens: Tensor) -> Tensor:
        return torch.where(tokens == PAD, -1e9, 0.0)[:, None, None, :]

    def encode(self, src: Tensor) -> Tensor:
        x = self.drop(self.shared(src))
        bias = self.enc_bias(src.size(1), src.size(1)) + self.key_mask(src)
        for block in self.encoder:
            x = block(x, bias)
        return self.drop(self.enc_norm(x))

    def decode(self, dec_in: Tensor, memory: Tensor, src: Tensor) -> Tensor:
        n = dec_in.size(1)
        causal = torch.full((n, n), -1e9).triu(1)
        bias, cross = self.dec_bias(n, n) + causal, self.key_mask(src)
        x = self.drop(self.shared(dec_in))
        for block in self.decoder:
            x = block(x, bias, memory, cross)
        x = self.drop(self.dec_norm(x)) * self.d ** -0.5                # because the embedding is tied
        return x @ self.shared.weight.t()

    def forward(self, src: Tensor, labels: Tensor):
        dec_in = F.pad(labels[:, :-1], (1, 0), value=PAD)               # <pad> starts the decoder
        logits = self.decode(dec_in, self.encode(src), src)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PAD)
        return loss, logits

    @torch.no_grad()
    def generate(self, src: Tensor, steps: int) -> Tensor:
        memory = self.encode(src)
        out = torch.full((src.size(0), 1), PAD)
        for _ in range(steps):
            out = torch.cat([out, self.decode(out, memory, src)[:, -1].argmax(-1, keepdim=True)], 1)
        return out[:, 1:]


def make_examples(n: int, g: torch.Generator):
    """<task> letters </s>  ->  letters in order, then the one that came first </s>; every source occurs once"""
    longest, seen, src, tgt = 7, set(), [], []
    while len(src) < n:
        size = int(torch.randint(3, longest + 1, (1,), generator=g))
        letters = (torch.randperm(LETTERS, generator=g)[:size] + 4).tolist()
        task = UP if torch.rand(1, generator=g) < 0.5 else DOWN
        row = [task] + letters + [EOS]
        if tuple(row) in seen:
            continue
        seen.add(tuple(row))
        answer = sorted(letters, reverse=task == DOWN) + [task, letters[0], EOS]
        src.append(row + [PAD] * (longest - size))
        tgt.append(answer + [PAD] * (longest - size))
    return torch.tensor(src), torch.tensor(tgt)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    g = torch.Generator().manual_seed(args.seed + 1000)

    src, tgt = make_examples(2800, g)
    train_src, train_tgt, test_src, test_tgt = src[:2500], tgt[:2500], src[2500:], tgt[2500:]
    model = T5()
    steps, warmup = 250, 30
    opt = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    # inverse square root schedule
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min((s + 1) / warmup, math.sqrt(warmup / (s + 1))))

    model.train()
    for step in range(steps):
        idx = torch.randint(0, len(train_src), (24,), generator=g)
        loss, _ = model(train_src[idx], train_tgt[idx])
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        sched.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}\tloss {loss.item():.4f}\tlr {sched.get_last_lr()[0]:.2e}")

    model.eval()
    pred = model.generate(test_src, test_tgt.size(1))
    real = test_tgt != PAD
    print(f"metric {(pred[real] == test_tgt[real]).float().mean().item():.4f}")
