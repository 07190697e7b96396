"""Performer encoder (FAVOR+ attention) that classifies digits as sequences of 32 pieces of two pixels."""
import argparse
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits


def orthogonal_matrix_chunk(cols):
    q, _ = torch.linalg.qr(torch.randn(cols, cols))
    return q.t()


def gaussian_orthogonal_random_matrix(nb_rows, nb_columns):
    blocks = []
    for start in range(0, nb_rows, nb_columns):
        q = orthogonal_matrix_chunk(nb_columns)
        blocks.append(q[: min(nb_columns, nb_rows - start)])
    multiplier = torch.randn(nb_rows, nb_columns).norm(dim=1)
    return multiplier[:, None] * torch.cat(blocks)


def softmax_kernel(data, projection, is_query, eps=1e-4):
    """Positive random features of the softmax kernel; data (b, h, n, d), projection (m, d)."""
    normalizer = data.shape[-1] ** -0.25
    ratio = projection.shape[0] ** -0.5
    data = data * normalizer
    dash = torch.einsum("bhnd,md->bhnm", data, projection)
    diag = (data ** 2).sum(dim=-1, keepdim=True) / 2.0
    if is_query:
        stab = dash.amax(dim=-1, keepdim=True).detach()
    else:
        stab = dash.amax(dim=(-1, -2), keepdim=True).detach()
    return ratio * (torch.exp(dash - diag - stab) + eps)


def linear_attention(q, k, v):
    d_inv = 1.0 / torch.einsum("bhnm,bhm->bhn", q, k.sum(dim=-2))
    context = torch.einsum("bhnm,bhnd->bhmd", k, v)
    return torch.einsum("bhmd,bhnm,bhn->bhnd", context, q, d_inv)


class FastAttention(nn.Module):
    def __init__(self, dim_heads, nb_features):
        super().__init__()
        self.register_buffer("projection_matrix", gaussian_orthogonal_random_matrix(nb_features, dim_heads))

    def forward(self, q, k, v):
        q = softmax_kernel(q, self.projection_matrix, is_query=True)
        k = softmax_kernel(k, self.projection_matrix, is_query=False)
        return linear_attention(q, k, v)


class Layer(nn.Module):
    def __init__(self, dim, heads, nb_features):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)
        self.fast_attention = FastAttention(dim // heads, nb_features)
        self.ff = nn.Sequential(nn.Linear(dim, dim * 2), nn.GELU(), nn.Linear(dim * 2, dim))

    def attend(self, x):
        b, n, d = x.shape
        split = lambda t: t.view(b, n, self.heads, d // self.heads).permute(0, 2, 1, 3)
        out = self.fast_attention(split(self.to_q(x)), split(self.to_k(x)), split(self.to_v(x)))
        return self.to_out(out.permute(0, 2, 1, 3).reshape(b, n, d))

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.ff(self.norm2(x))


class Performer(nn.Module):
    def __init__(self, piece, seq_len, num_classes, dim=48, depth=2, heads=3, nb_features=32):
        super().__init__()
        self.to_emb = nn.Linear(piece, dim)
        self.pos_emb = nn.Embedding(seq_len, dim)
        nn.init.normal_(self.pos_emb.weight, std=0.3)
        self.layers = nn.ModuleList([Layer(dim, heads, nb_features) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.to_out = nn.Linear(dim, num_classes)

    def forward(self, pieces):
        x = self.to_emb(pieces) + self.pos_emb(torch.arange(pieces.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.to_out(self.norm(x).mean(dim=1))


def accuracy(model, x, y):
    model.eval()
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, default=260)
    p.add_argument("--warmup", type=int, default=30)
    args = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    raw = load_digits()
    pieces = torch.tensor(raw.data, dtype=torch.float32).view(-1, 32, 2) / 8.0 - 1.0
    labels = torch.tensor(raw.target)
    perm = torch.randperm(len(labels))
    test, train = perm[:400], perm[400:]

    model = Performer(piece=2, seq_len=32, num_classes=10)
    opt = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    decay = lambda s: min((s + 1) / args.warmup, 0.5 * (1 + math.cos(math.pi * s / args.steps)))
    sched = torch.optim.lr_scheduler.LambdaLR(opt, decay)
    for step in range(1, args.steps + 1):
        model.train()
        batch = train[torch.randint(len(train), (32,))]
        loss = F.cross_entropy(model(pieces[batch]), labels[batch])
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        sched.step()
        if step % 50 == 0:
            print(f"{step:5d} | loss {loss.item():.4f} | lr {sched.get_last_lr()[0]:.2e}")
    print(f"metric {accuracy(model, pieces[test], labels[test]):.4f}")


if __name__ == "__main__":
    main()
