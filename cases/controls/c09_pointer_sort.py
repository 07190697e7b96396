"""Pointer network that sorts short lists of numbers of varying length."""
import argparse

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

MIN_LEN, MAX_LEN = 3, 6


def make_data(n, rng):
    lengths = rng.integers(MIN_LEN, MAX_LEN + 1, size=n)
    values = np.zeros((n, MAX_LEN), dtype=np.float32)
    order = np.full((n, MAX_LEN), -1, dtype=np.int64)
    for i, l in enumerate(lengths):
        values[i, :l] = rng.random(l)
        order[i, :l] = np.argsort(values[i, :l])
    return torch.from_numpy(values), torch.from_numpy(order), torch.from_numpy(lengths)


class Pointer(nn.Module):
    """u_j = v^T tanh(W1 e_j + W2 d)"""

    def __init__(self, hidden):
        super().__init__()
        self.W1 = nn.Linear(hidden, hidden, bias=False)
        self.W2 = nn.Linear(hidden, hidden, bias=False)
        self.v = nn.Linear(hidden, 1, bias=False)

    def forward(self, keys, d, pad):
        u = self.v(torch.tanh(keys + self.W2(d).unsqueeze(0))).squeeze(-1)   # L x B
        return u.masked_fill(pad, float('-inf'))


class PtrNet(nn.Module):
    def __init__(self, embed=32, hidden=64):
        super().__init__()
        self.embed = nn.Linear(1, embed)
        self.encoder = nn.LSTM(embed, hidden)
        self.decoder = nn.LSTMCell(embed, hidden)
        self.go = nn.Parameter(torch.empty(embed).uniform_(-0.1, 0.1))
        self.pointer = Pointer(hidden)

    def forward(self, values, lengths, targets=None):
        """values: L x B. Returns log-probabilities T x B x L and the chosen pointers T x B."""
        L, B = values.shape
        x = self.embed(values.unsqueeze(-1))
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        memory, (h, c) = self.encoder(packed)
        memory, _ = pad_packed_sequence(memory, total_length=L)
        h, c = h[0], c[0]
        pad = torch.arange(L).unsqueeze(1) >= lengths.unsqueeze(0)
        keys = self.pointer.W1(memory)

        inp = self.go.expand(B, -1)
        rows = torch.arange(B)
        logps, picks = [], []
        for t in range(L):
            h, c = self.decoder(inp, (h, c))
            logp = torch.log_softmax(self.pointer(keys, h, pad), dim=0)
            pick = logp.argmax(0)
            logps.append(logp.t())
            picks.append(pick)
            nxt = pick if targets is None else targets[t].clamp(min=0)
            inp = x[nxt, rows]
        return torch.stack(logps), torch.stack(picks)


def accuracy(model, data):
    values, order, lengths = data
    model.eval()
    with torch.no_grad():
        _, picks = model(values.t(), lengths)
    valid = order.t() >= 0
    hit = picks == order.t()
    return hit[valid].float().mean().item(), (hit | ~valid).all(0).float().mean().item()


if __name__ == '__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--seed', type=int, default=0)
    ap.add_argument('--steps', type=int, default=330)
    ap.add_argument('--batch', type=int, default=64)
    opt = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(opt.seed)
    rng = np.random.default_rng(opt.seed)
    train, test = make_data(8000, rng), make_data(500, rng)

    net = PtrNet()
    optim = torch.optim.Adam(net.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optim, opt.steps)
    nll = nn.NLLLoss(ignore_index=-1)

    for step in range(1, opt.steps + 1):
        net.train()
        idx = torch.from_numpy(rng.choice(len(train[0]), opt.batch, replace=False))
        values, order, lengths = train[0][idx].t(), train[1][idx].t(), train[2][idx]
        logp, _ = net(values, lengths, order)
        loss = nll(logp.flatten(0, 1), order.flatten())
        optim.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 2.0)
        optim.step()
        decay.step()
        if step % 66 == 0:
            acc, exact = accuracy(net, test)
            print(f'[{step}/{opt.steps}] loss {loss.item():.4f} | pointer acc {acc:.3f} | sorted {exact:.3f}')

    print('metric %.4f' % accuracy(net, test)[0])
