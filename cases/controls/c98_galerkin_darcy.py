"""Galerkin transformer that learns the solution operator of a 1d Darcy problem -(a u')' = 1."""
import argparse

import numpy as np
import torch
import torch.nn as nn
from torch.nn.init import xavier_uniform_


def darcy_1d(n_samples, n_grid, rng, fine=512):
    """log a is a smooth Gaussian random field; u(0) = u(1) = 0; u by exact quadrature on a fine mesh."""
    x = np.linspace(0, 1, fine + 1)
    k = np.arange(1, 6)
    coef = rng.randn(n_samples, 5) * 1.0 / k
    a = np.exp(coef @ np.cos(np.pi * k[:, None] * x[None, :]))
    cell = lambda f: 0.5 * (f[:, 1:] + f[:, :-1]) / fine
    inv, xinv = cell(1 / a), cell(x / a)
    flux = xinv.sum(1, keepdims=True) / inv.sum(1, keepdims=True)     # a u' = flux - x
    u = np.concatenate([np.zeros((n_samples, 1)), np.cumsum(flux * inv - xinv, 1)], 1)
    step = fine // n_grid
    return (torch.tensor(np.log(a[:, ::step]), dtype=torch.float),
            torch.tensor(u[:, ::step], dtype=torch.float), torch.tensor(x[::step], dtype=torch.float))


class UnitGaussianNormalizer:
    def __init__(self, x, eps=1e-5):
        self.mean, self.std, self.eps = x.mean(0), x.std(0), eps

    def encode(self, x):
        return (x - self.mean) / (self.std + self.eps)

    def decode(self, x):
        return x * (self.std + self.eps) + self.mean


class SimpleAttention(nn.Module):
    """Galerkin-type linear attention: layer norms on keys and values, no softmax, divided by the length."""

    def __init__(self, n_head, d_model, pos_dim=1, xavier_init=1e-2, diagonal_weight=1e-2, eps=1e-5):
        super().__init__()
        self.d_k = d_model // n_head
        self.n_head = n_head
        self.pos_dim = pos_dim
        self.linears = nn.ModuleList([nn.Linear(d_model, d_model) for _ in range(3)])
        self.norm_K = nn.ModuleList([nn.LayerNorm(self.d_k, eps=eps) for _ in range(n_head)])
        self.norm_V = nn.ModuleList([nn.LayerNorm(self.d_k, eps=eps) for _ in range(n_head)])
        self.fc = nn.Linear(d_model + n_head * pos_dim, d_model)
        for layer in self.linears:
            xavier_uniform_(layer.weight, gain=xavier_init)
            layer.weight.data += diagonal_weight * torch.eye(d_model)
            nn.init.zeros_(layer.bias)

    def forward(self, x, pos):
        bsz, n, _ = x.size()
        query, key, value = [lin(x).view(bsz, n, self.n_head, self.d_k).transpose(1, 2) for lin in self.linears]
        key = torch.stack([norm(key[:, i]) for i, norm in enumerate(self.norm_K)], dim=1)
        value = torch.stack([norm(value[:, i]) for i, norm in enumerate(self.norm_V)], dim=1)

        # coordinates are appended to every head
        pos = pos.unsqueeze(1).expand(bsz, self.n_head, n, self.pos_dim)
        query, key, value = [torch.cat([pos, t], dim=-1) for t in (query, key, value)]

        scores = torch.matmul(key.transpose(-2, -1), value) / n
        out = torch.matmul(query, scores)
        out = out.transpose(1, 2).contiguous().view(bsz, n, -1)
        return self.fc(out)


class FeedForward(nn.Module):
    def __init__(self, d_model, dim_feedforward):
        super().__init__()
        self.lr1 = nn.Linear(d_model, dim_feedforward)
        self.lr2 = nn.Linear(dim_feedforward, d_model)

    def forward(self, x):
        return self.lr2(torch.nn.functional.silu(self.lr1(x)))


class SimpleTransformerEncoderLayer(nn.Module):
    def __init__(self, d_model, n_head, dim_feedforward, pos_dim=1):
        super().__init__()
        self.attn = SimpleAttention(n_head, d_model, pos_dim)
        self.ff = FeedForward(d_model, dim_feedforward)

    def forward(self, x, pos):
        x = x + self.attn(x, pos)
        return x + self.ff(x)


class SimpleTransformer(nn.Module):
    def __init__(self, node_feats=1, pos_dim=1, d_model=48, n_head=2, n_layers=3):
        super().__init__()
        self.feat_extract = nn.Linear(node_feats + pos_dim, d_model)
        self.encoder_layers = nn.ModuleList(
            [SimpleTransformerEncoderLayer(d_model, n_head, 2 * d_model, pos_dim) for _ in range(n_layers)])
        self.regressor = nn.Sequential(nn.Linear(d_model + pos_dim, d_model), nn.SiLU(), nn.Linear(d_model, 1))

    def forward(self, node, pos):
        x = self.feat_extract(torch.cat([node, pos], dim=-1))
        for layer in self.encoder_layers:
            x = layer(x, pos)
        x = self.regressor(torch.cat([x, pos], dim=-1))
        return {'preds': x.squeeze(-1)}


def relative_l2(pred, target):
    return ((pred - target).norm(dim=1) / target.norm(dim=1)).mean()


def main():
    parser = argparse.ArgumentParser(description='1d Darcy, Galerkin transformer')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--batch-size', type=int, default=15)
    parser.add_argument('--epochs', type=int, default=8)
    parser.add_argument('--lr', type=float, default=3e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    n_train, n_test = 540, 150
    a, u, grid = darcy_1d(n_train + n_test, 32, np.random.RandomState(args.seed))
    norm_a, norm_u = UnitGaussianNormalizer(a[:n_train]), UnitGaussianNormalizer(u[:n_train])
    node, pos = norm_a.encode(a).unsqueeze(-1), grid[None, :, None]

    model = SimpleTransformer()
    n_steps = args.epochs * (n_train // args.batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=n_steps,
                                                    pct_start=0.3, div_factor=1e2, final_div_factor=1e2)

    def predict(idx):
        out = model(node[idx], pos.expand(len(idx), -1, -1))['preds']
        return norm_u.decode(out)

    test_idx = torch.arange(n_train, n_train + n_test)
    for epoch in range(args.epochs):
        model.train()
        losses = []
        for idx in torch.randperm(n_train).split(args.batch_size):
            optimizer.zero_grad()
            loss = relative_l2(predict(idx), u[idx])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.99)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            pred = predict(test_idx)
        print(f'epoch [{epoch + 1}/{args.epochs}] loss: {np.mean(losses):.4e} '
              f'val relative L2: {relative_l2(pred, u[test_idx]).item():.4e} lr: {scheduler.get_last_lr()[0]:.2e}')

    target = u[test_idx]
    r2 = 1 - ((pred - target) ** 2).sum() / ((target - target.mean(0)) ** 2).sum()
    print(f'metric {r2.item():.5f}')


if __name__ == '__main__':
    main()
