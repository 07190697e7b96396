"""Bidirectional linear transformer that classifies digits read as sequences of small patches."""
import argparse
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def elu_feature_map(x):
    return F.elu(x) + 1


class LinearAttention(nn.Module):
    """O(N) attention, Transformers are RNNs, eq. 4-6 (non-causal)."""

    def __init__(self, eps=1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, queries, keys, values):  # N L H E
        Q = elu_feature_map(queries)
        K = elu_feature_map(keys)
        KV = torch.einsum("nshd,nshm->nhmd", K, values)
        Z = 1 / (torch.einsum("nlhd,nhd->nlh", Q, K.sum(dim=1)) + self.eps)
        return torch.einsum("nlhd,nhmd,nlh->nlhm", Q, KV, Z)


class AttentionLayer(nn.Module):
    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.query_projection = nn.Linear(d_model, d_model)
        self.key_projection = nn.Linear(d_model, d_model)
        self.value_projection = nn.Linear(d_model, d_model)
        self.out_projection = nn.Linear(d_model, d_model)
        self.inner_attention = LinearAttention()

    def forward(self, x):
        N, L, _ = x.shape
        q = self.query_projection(x).view(N, L, self.n_heads, -1)
        k = self.key_projection(x).view(N, L, self.n_heads, -1)
        v = self.value_projection(x).view(N, L, self.n_heads, -1)
        return self.out_projection(self.inner_attention(q, k, v).reshape(N, L, -1))


class EncoderLayer(nn.Module):
    def __init__(self, d_model, n_heads, d_ff, dropout):
        super().__init__()
        self.attention = AttentionLayer(d_model, n_heads)
        self.linear1 = nn.Linear(d_model, d_ff)
        self.linear2 = nn.Linear(d_ff, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = self.norm1(x + self.dropout(self.attention(x)))
        y = self.linear2(self.dropout(F.gelu(self.linear1(x))))
        return self.norm2(x + self.dropout(y))


class PatchClassifier(nn.Module):
    def __init__(self, seq_len=16, d_patch=4, d_model=48, n_layers=2, n_heads=4, n_classes=10, dropout=0.05):
        super().__init__()
        self.value_embedding = nn.Linear(d_patch, d_model)
        self.position_embedding = nn.Parameter(torch.randn(1, seq_len, d_model) * 0.5)
        self.layers = nn.ModuleList([EncoderLayer(d_model, n_heads, 2 * d_model, dropout) for _ in range(n_layers)])
        self.classifier = nn.Linear(d_model, n_classes)

    def forward(self, patches):
        x = self.value_embedding(patches) + self.position_embedding
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x.mean(dim=1))


def to_patches(X, p=2):
    """(n, 64) images -> (n, 16, 4) sequences of 2x2 patches in raster order."""
    g = 8 // p
    return X.reshape(-1, g, p, g, p).transpose(0, 1, 3, 2, 4).reshape(-1, g * g, p * p)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=280)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    X, y = load_digits(return_X_y=True)
    X = to_patches(X / 8.0 - 1.0)
    X_train, X_test, y_train, y_test = train_test_split(
        torch.from_numpy(X).float(), torch.from_numpy(y), test_size=0.25, stratify=y, random_state=args.seed)

    model = PatchClassifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.iterations)

    it, seen, order = 0, 0, torch.randperm(len(X_train))
    model.train()
    while it < args.iterations:
        if seen + args.batch_size > len(order):
            seen, order = 0, torch.randperm(len(X_train))
        batch = order[seen:seen + args.batch_size]
        seen += args.batch_size
        loss = F.cross_entropy(model(X_train[batch]), y_train[batch])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
        it += 1
        if it % 40 == 0:
            print("iteration {:4d}  bits {:.3f}".format(it, loss.item() / math.log(2)))

    model.eval()
    with torch.inference_mode():
        acc = (model(X_test).argmax(1) == y_test).float().mean().item()
    print("metric {:.4f}".format(acc))


if __name__ == "__main__":
    main()
