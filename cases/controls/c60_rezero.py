"""Deep ReZero transformer (no normalisation) that learns to sort short sequences of symbols."""
import argparse

import torch
from torch import nn
import torch.nn.functional as F


class RZTXEncoderLayer(nn.Module):
    def __init__(self, d_model, nhead, dim_feedforward, dropout=0.0):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.dropout = nn.Dropout(dropout)
        self.resweight = nn.Parameter(torch.zeros(1))

    def forward(self, src):
        src2, _ = self.self_attn(src, src, src, need_weights=False)
        src = src + self.dropout(src2 * self.resweight)
        src2 = self.linear2(F.relu(self.linear1(src)))
        return src + self.dropout(src2 * self.resweight)


class Sorter(nn.Module):
    def __init__(self, n_symbols, length, d_model=48, nhead=4, depth=6):
        super().__init__()
        self.symbol = nn.Embedding(n_symbols, d_model)
        self.position = nn.Embedding(length, d_model)
        self.layers = nn.ModuleList([RZTXEncoderLayer(d_model, nhead, 2 * d_model) for _ in range(depth)])
        self.readout = nn.Linear(d_model, n_symbols)

    def forward(self, seq):                                   # seq: (length, batch)
        pos = torch.arange(seq.size(0)).unsqueeze(1)
        h = self.symbol(seq) + self.position(pos)
        for layer in self.layers:
            h = layer(h)
        return self.readout(h)


def run(seed, n_symbols=10, length=8, steps=240, batch=40):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    pool = torch.unique(torch.randint(n_symbols, (12000, length)), dim=0)
    pool = pool[torch.randperm(len(pool))].t()                # (length, N), every sequence once
    test, train = pool[:, :500], pool[:, 500:]

    model = Sorter(n_symbols, length)
    opt = torch.optim.Adam(model.parameters(), lr=2e-3)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min(1.0, 2.0 * (1 - s / steps)))
    for step in range(1, steps + 1):
        model.train()
        cols = torch.randint(train.size(1), (batch,))
        x = train[:, cols]
        logits = model(x)
        loss = F.cross_entropy(logits.reshape(-1, n_symbols), x.sort(dim=0).values.reshape(-1))
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        sched.step()
        if step % 40 == 0:
            alphas = ' '.join(f'{layer.resweight.item():+.2f}' for layer in model.layers)
            print(f'{step:4d} loss {loss.item():.3f} alpha {alphas}')

    model.eval()
    with torch.no_grad():
        pred = model(test).argmax(-1)
    return (pred == test.sort(dim=0).values).float().mean().item()


if __name__ == '__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--seed', type=int, default=0)
    print(f'metric {run(p.parse_args().seed):.4f}')
