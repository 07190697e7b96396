"""SAINT on the wine table: attention over features, then over the rows of the mini-batch."""
import argparse

import numpy as np
import torch
from torch import nn, einsum
import torch.nn.functional as F
from sklearn.datasets import load_wine
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x, **kwargs):
        return self.fn(x, **kwargs) + x


class PreNorm(nn.Module):
    def __init__(self, dim, fn):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x, **kwargs):
        return self.fn(self.norm(x), **kwargs)


class GEGLU(nn.Module):
    def forward(self, x):
        x, gates = x.chunk(2, dim=-1)
        return x * F.gelu(gates)


class FeedForward(nn.Module):
    def __init__(self, dim, mult=4, dropout=0.):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, dim * mult * 2), GEGLU(), nn.Dropout(dropout),
                                 nn.Linear(dim * mult, dim))

    def forward(self, x):
        return self.net(x)


class Attention(nn.Module):
    def __init__(self, dim, heads=4, dim_head=16, dropout=0.):
        super().__init__()
        inner_dim = dim_head * heads
        self.heads = heads
        self.scale = dim_head ** -0.5
        self.to_qkv = nn.Linear(dim, inner_dim * 3, bias=False)
        self.to_out = nn.Linear(inner_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t.reshape(b, n, self.heads, -1).transpose(1, 2) for t in self.to_qkv(x).chunk(3, dim=-1))
        sim = einsum('b h i d, b h j d -> b h i j', q, k) * self.scale
        attn = self.dropout(sim.softmax(dim=-1))
        out = einsum('b h i j, b h j d -> b h i d', attn, v)
        return self.to_out(out.transpose(1, 2).reshape(b, n, -1))


class RowColTransformer(nn.Module):
    def __init__(self, dim, nfeats, depth, heads, dim_head, attn_dropout, ff_dropout):
        super().__init__()
        self.layers = nn.ModuleList([])
        row = dim * nfeats
        for _ in range(depth):
            self.layers.append(nn.ModuleList([
                PreNorm(dim, Residual(Attention(dim, heads, dim_head, attn_dropout))),
                PreNorm(dim, Residual(FeedForward(dim, dropout=ff_dropout))),
                PreNorm(row, Residual(Attention(row, heads, dim_head, attn_dropout))),
                PreNorm(row, Residual(FeedForward(row, mult=1, dropout=ff_dropout))),
            ]))

    def forward(self, x):
        b, n, d = x.shape
        for attn1, ff1, attn2, ff2 in self.layers:
            x = ff1(attn1(x))
            x = x.reshape(1, b, n * d)          # the rows of the batch become the sequence
            x = ff2(attn2(x))
            x = x.reshape(b, n, d)
        return x


def simple_MLP(dims):
    return nn.Sequential(nn.Linear(dims[0], dims[1]), nn.ReLU(), nn.Linear(dims[1], dims[2]))


class SAINT(nn.Module):
    def __init__(self, num_continuous, dim=8, depth=2, heads=4, dim_head=16, y_dim=3):
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, dim))
        self.simple_MLP = nn.ModuleList([simple_MLP([1, 24, dim]) for _ in range(num_continuous)])
        self.transformer = RowColTransformer(dim, num_continuous + 1, depth, heads, dim_head, 0.1, 0.1)
        self.mlpfory = simple_MLP([dim, 64, y_dim])

    def forward(self, x_cont):
        tokens = [mlp(x_cont[:, i:i + 1]) for i, mlp in enumerate(self.simple_MLP)]
        x = torch.cat([self.cls.expand(len(x_cont), -1, -1), torch.stack(tokens, 1)], 1)
        return self.mlpfory(self.transformer(x)[:, 0])


parser = argparse.ArgumentParser()
parser.add_argument('--seed', default=0, type=int)
parser.add_argument('--batchsize', default=32, type=int)
parser.add_argument('--epochs', default=56, type=int)
parser.add_argument('--lr', default=7e-4, type=float)


def main():
    opt = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(opt.seed)
    X, y = load_wine(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.4, random_state=opt.seed, stratify=y)
    mean, std = X_train.mean(0), X_train.std(0)
    to_ds = lambda a, b: TensorDataset(torch.tensor((a - mean) / std, dtype=torch.float32), torch.tensor(b))
    trainloader = DataLoader(to_ds(X_train, y_train), batch_size=opt.batchsize, shuffle=True, drop_last=True)
    testloader = DataLoader(to_ds(X_test, y_test), batch_size=opt.batchsize, shuffle=False)

    model = SAINT(X.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=opt.lr)
    for epoch in range(opt.epochs):
        model.train()
        running_loss = 0.0
        for x_cont, y_gts in trainloader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x_cont), y_gts)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
        if (epoch + 1) % 8 == 0:
            print(f'[EPOCH {epoch + 1}] loss {running_loss / len(trainloader):.4f}')

    model.eval()
    correct = 0
    with torch.no_grad():
        for x_cont, y_gts in testloader:
            correct += (model(x_cont).argmax(1) == y_gts).sum().item()
    print(f'metric {correct / len(y_test):.4f}')


if __name__ == '__main__':
    main()
