"""Causal language model with talking-heads attention on second-order symbol sequences."""
import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F

VOCAB, LENGTH = 8, 32


def sample_sequences(n, table, gen):
    """x[t] = table[x[t-2], x[t-1]] nine times out of ten, else a random symbol."""
    x = torch.randint(VOCAB, (n, LENGTH + 1), generator=gen)
    noise = torch.rand(n, LENGTH + 1, generator=gen) < 0.1
    for t in range(2, LENGTH + 1):
        x[:, t] = torch.where(noise[:, t], x[:, t], table[x[:, t - 2], x[:, t - 1]])
    return x


class TalkingHeadsAttention(nn.Module):
    """Shazeer et al.: h_k key heads -> h softmax heads -> h_v value heads."""

    def __init__(self, d_model, h_k=4, h=6, h_v=4, d_head=12):
        super().__init__()
        self.P_q = nn.Parameter(torch.randn(d_model, h_k, d_head) * (d_model * d_head) ** -0.5)  # 1/sqrt(d_k) folded in
        self.P_k = nn.Parameter(torch.randn(d_model, h_k, d_head) * d_model ** -0.5)
        self.P_v = nn.Parameter(torch.randn(d_model, h_v, d_head) * d_model ** -0.5)
        self.P_o = nn.Parameter(torch.randn(h_v, d_head, d_model) * (h_v * d_head) ** -0.5)
        self.P_l = nn.Parameter(torch.randn(h_k, h) * h_k ** -0.5)
        self.P_w = nn.Parameter(torch.randn(h, h_v) * h ** -0.5)

    def forward(self, X, bias):
        Q = torch.einsum("bnd,dhk->bhnk", X, self.P_q)
        K = torch.einsum("bmd,dhk->bhmk", X, self.P_k)
        V = torch.einsum("bmd,dhv->bhmv", X, self.P_v)
        J = torch.einsum("bhnk,bhmk->bhnm", Q, K)
        L = torch.einsum("bhnm,hg->bgnm", J, self.P_l) + bias
        W = torch.softmax(L, dim=-1)
        U = torch.einsum("bgnm,gv->bvnm", W, self.P_w)
        O = torch.einsum("bvnm,bvmd->bvnd", U, V)
        return torch.einsum("bvnd,vde->bne", O, self.P_o)


class Layer(nn.Module):
    def __init__(self, d_model, d_ff):
        super().__init__()
        self.norm_a, self.norm_f = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attn = TalkingHeadsAttention(d_model)
        self.wi, self.wg = nn.Linear(d_model, d_ff, bias=False), nn.Linear(d_model, d_ff, bias=False)
        self.wo = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x, bias):
        x = x + self.attn(self.norm_a(x), bias)
        y = self.norm_f(x)
        return x + self.wo(F.gelu(self.wg(y)) * self.wi(y))


class LanguageModel(nn.Module):
    def __init__(self, d_model=48, d_ff=96, layers=2):
        super().__init__()
        self.tok = nn.Embedding(VOCAB, d_model)
        self.pos = nn.Embedding(LENGTH, d_model)
        self.layers = nn.ModuleList(Layer(d_model, d_ff) for _ in range(layers))
        self.norm = nn.LayerNorm(d_model)
        self.unembed = nn.Linear(d_model, VOCAB)
        future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        self.register_buffer("bias", torch.zeros(LENGTH, LENGTH).masked_fill(future, float("-inf")))

    def forward(self, ids):
        n = ids.shape[1]
        x = self.tok(ids) + self.pos.weight[:n]
        for layer in self.layers:
            x = layer(x, self.bias[:n, :n])
        return self.unembed(self.norm(x))


def run(seed, steps=300, batch=24, lr=4e-3):
    torch.manual_seed(seed)
    gen = torch.Generator().manual_seed(seed + 1000)
    table = torch.randint(VOCAB, (VOCAB, VOCAB), generator=gen)
    data = torch.unique(sample_sequences(3200, table, gen), dim=0)      # no sequence in both parts
    data = data[torch.randperm(len(data), generator=gen)]
    train, valid = data[400:], data[:400]

    lm = LanguageModel()
    optim = torch.optim.AdamW(lm.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    lr_at = torch.optim.lr_scheduler.SequentialLR(optim, [
        torch.optim.lr_scheduler.LinearLR(optim, 0.05, 1.0, 30),
        torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps - 30, eta_min=lr / 20)], [30])
    for step in range(steps):
        seqs = train[torch.randint(len(train), (batch,), generator=gen)]
        logits = lm(seqs[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, VOCAB), seqs[:, 1:].reshape(-1))
        optim.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optim.step()
        lr_at.step()
        if (step + 1) % 50 == 0:
            print(f"{step + 1:>5} nll {loss.item():.4f}")

    lm.eval()
    with torch.no_grad():
        logits = lm(valid[:, :-1])
        nll = F.cross_entropy(logits.reshape(-1, VOCAB), valid[:, 1:].reshape(-1)).item()
        acc = (logits.argmax(-1) == valid[:, 1:]).float().mean().item()
    print(f"valid nll {nll:.4f}")
    print(f"metric {acc:.4f}")


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.set_num_threads(1)
    run(a.seed)
