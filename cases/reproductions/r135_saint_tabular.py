"""SAINT-style row/column attention for a mixed-type table (binary target)."""
from argparse import ArgumentParser
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn


@dataclass
class Config:
    d_model: int = 12
    n_heads: int = 4
    n_layers: int = 2
    attn_dropout: float = 0.0
    ff_mult: int = 2
    lr: float = 3e-3
    batch_size: int = 40
    epochs: int = 7


N_NUM, CARDS = 6, (4, 3)


def load_table(seed, n=1900):
    rng = np.random.default_rng([seed, 42])
    num = rng.normal(size=(n, N_NUM)) * np.array([1, 1, 3, 0.5, 1, 8]) + np.array([0, 2, 0, 1, 0, 30])
    cat = np.stack([rng.integers(0, c, n) for c in CARDS], 1)
    z = (num - num.mean(0)) / num.std(0)
    sign = np.array([1.0, -1.0, 1.0, -1.0])[cat[:, 0]]
    score = 1.5 * sign * z[:, 0] + 0.8 * z[:, 1] - 0.8 * z[:, 2] + np.where(cat[:, 1] == 2, 1.2, -0.4) * z[:, 3]
    y = (score + 0.2 * rng.normal(size=n) > 0).astype('float32')
    n_train = 1440
    mu, sd = num[:n_train].mean(0), num[:n_train].std(0)
    num = torch.tensor((num - mu) / sd, dtype=torch.float32)
    cat, y = torch.tensor(cat), torch.tensor(y)
    return (num[:n_train], cat[:n_train], y[:n_train]), (num[n_train:], cat[n_train:], y[n_train:])


class FeatureTokens(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N_NUM, d))
        self.bias = nn.Parameter(torch.randn(N_NUM, d))
        self.cats = nn.ModuleList([nn.Embedding(c, d) for c in CARDS])
        self.cls = nn.Parameter(torch.randn(1, 1, d))

    def forward(self, num, cat):
        x = num.unsqueeze(-1) * self.weight + self.bias
        c = torch.stack([e(cat[:, i]) for i, e in enumerate(self.cats)], 1)
        return torch.cat([self.cls.expand(len(num), -1, -1), x, c], 1)


def attention_slot(d, heads, p):
    return nn.Sequential(nn.LayerNorm(d), nn.MultiheadAttention(d, heads, batch_first=True), nn.Dropout(p))


def feed_forward(d, mult):
    return nn.Sequential(nn.LayerNorm(d), nn.Linear(d, mult * d), nn.GELU(), nn.Linear(mult * d, d))


class RowColTransformer(nn.Module):
    def __init__(self, cfg, n_tokens, chain):
        super().__init__()
        d, wide = cfg.d_model, cfg.d_model * n_tokens
        self.chain = chain
        self.layers = nn.ModuleList([
            nn.ModuleList([
                attention_slot(d, cfg.n_heads, cfg.attn_dropout),
                feed_forward(d, cfg.ff_mult),
                attention_slot(wide, cfg.n_heads, cfg.attn_dropout),
                feed_forward(wide, 1),
            ]) for _ in range(cfg.n_layers)
        ])

    def attend(self, slot, x):
        if self.chain:
            h = slot[0](x)
            return slot[2](slot[1](h, h, h)[0]) + x
        return slot[1](x, x, x)[0] + x

    def forward(self, x):
        b, n, d = x.shape
        for col, ff1, row, ff2 in self.layers:
            x = self.attend(col, x)
            x = ff1(x) + x
            x = x.reshape(1, b, n * d)
            x = self.attend(row, x)
            x = ff2(x) + x
            x = x.reshape(b, n, d)
        return x


class SAINT(nn.Module):
    def __init__(self, cfg, chain):
        super().__init__()
        self.tokens = FeatureTokens(cfg.d_model)
        self.encoder = RowColTransformer(cfg, 1 + N_NUM + len(CARDS), chain)
        self.head = nn.Sequential(nn.LayerNorm(cfg.d_model), nn.Linear(cfg.d_model, 1))

    def forward(self, num, cat):
        return self.head(self.encoder(self.tokens(num, cat))[:, 0]).squeeze(-1)


def accuracy(model, part, bs):
    model.eval()
    hits = 0
    with torch.no_grad():
        for i in range(0, len(part[2]), bs):
            num, cat, y = (t[i:i + bs] for t in part)
            hits += ((model(num, cat) > 0).float() == y).sum().item()
    return hits / len(part[2])


def main():
    ap = ArgumentParser()
    ap.add_argument('--seed', type=int, default=0)
    ap.add_argument('--fixed', action='store_true')
    args = ap.parse_args()
    cfg = Config()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    train, test = load_table(args.seed)
    model = SAINT(cfg, chain=args.fixed)
    opt = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=1e-4, foreach=True)
    loss_fn = nn.BCEWithLogitsLoss()
    shuffler = torch.Generator().manual_seed(args.seed)
    for epoch in range(cfg.epochs):
        model.train()
        order = torch.randperm(len(train[2]), generator=shuffler)
        running = 0.0
        for ids in order.split(cfg.batch_size):
            opt.zero_grad()
            loss = loss_fn(model(train[0][ids], train[1][ids]), train[2][ids])
            loss.backward()
            opt.step()
            running += loss.item() * len(ids)
        print(f'epoch {epoch + 1:2d}  train_loss={running / len(order):.4f}  '
              f'test_acc={accuracy(model, test, cfg.batch_size):.4f}')
    print('metric', round(accuracy(model, test, cfg.batch_size), 4))


if __name__ == '__main__':
    main()
