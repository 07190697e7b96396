"""Multi-time attention network (mTAND encoder) that classifies irregularly sampled, partly observed series."""
import argparse
import math
import random

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from sklearn import model_selection
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument('--niters', type=int, default=9)
parser.add_argument('--lr', type=float, default=0.005)
parser.add_argument('--rec-hidden', type=int, default=32)
parser.add_argument('--embed-time', type=int, default=32)
parser.add_argument('--num-ref', type=int, default=16)
parser.add_argument('--enc-num-heads', type=int, default=2)
parser.add_argument('--seed', type=int, default=0)
parser.add_argument('--n', type=int, default=1200)
parser.add_argument('--batch-size', type=int, default=50)
args = parser.parse_args()

HOURS = 12.


def irregular_series(n, rng, max_obs=30, dim=3):
    """Three sensors on a drifting oscillation; sensors report at their own random times."""
    X = np.zeros((n, max_obs, 2 * dim + 1), dtype=np.float32)
    labels = rng.integers(4, size=n)
    for i, c in enumerate(labels):
        length = rng.integers(18, max_obs + 1)
        t = np.sort(rng.uniform(0, 1, length))
        phase, amp = rng.uniform(-0.9, 0.9), rng.uniform(0.8, 1.2)
        freq = (1.0, 2.0)[c // 2] * rng.uniform(0.93, 1.07)
        trend = (-1.0, 1.0)[c % 2] * rng.uniform(1.5, 2.5)
        clean = np.stack([amp * np.sin(2 * np.pi * freq * t + phase),
                          amp * np.cos(2 * np.pi * freq * t + phase),
                          trend * (t - 0.5) + 0.3 * np.sin(2 * np.pi * t + phase)], 1)
        m = rng.random((length, dim)) < 0.5
        m[np.arange(length), rng.integers(dim, size=length)] = True     # a time stamp has a report
        m[rng.integers(length, size=dim), np.arange(dim)] = True        # a sensor is seen at least once
        X[i, :length, :dim] = (clean + 0.1 * rng.standard_normal(clean.shape)) * m
        X[i, :length, dim:2 * dim] = m
        X[i, :length, -1] = HOURS * t
    return X, labels


class multiTimeAttention(nn.Module):
    def __init__(self, input_dim, nhidden=16, embed_time=16, num_heads=1):
        super(multiTimeAttention, self).__init__()
        assert embed_time % num_heads == 0
        self.embed_time = embed_time
        self.embed_time_k = embed_time // num_heads
        self.h = num_heads
        self.dim = input_dim
        self.nhidden = nhidden
        self.linears = nn.ModuleList([nn.Linear(embed_time, embed_time),
                                      nn.Linear(embed_time, embed_time),
                                      nn.Linear(input_dim * num_heads, nhidden)])

    def attention(self, query, key, value, mask=None, dropout=None):
        "Compute 'Scaled Dot Product Attention', separately normalised for every input dimension"
        dim = value.size(-1)
        d_k = query.size(-1)
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(d_k)
        scores = scores.unsqueeze(-1).repeat_interleave(dim, dim=-1)
        if mask is not None:
            scores = scores.masked_fill(mask.unsqueeze(-3) == 0, -1e9)
        p_attn = F.softmax(scores, dim=-2)
        if dropout is not None:
            p_attn = dropout(p_attn)
        return torch.sum(p_attn * value.unsqueeze(-3), -2), p_attn

    def forward(self, query, key, value, mask=None, dropout=None):
        batch, seq_len, dim = value.size()
        if mask is not None:
            # Same mask applied to all h heads.
            mask = mask.unsqueeze(1)
        value = value.unsqueeze(1)
        query, key = [l(x).view(x.size(0), -1, self.h, self.embed_time_k).transpose(1, 2)
                      for l, x in zip(self.linears, (query, key))]
        x, _ = self.attention(query, key, value, mask, dropout)
        x = x.transpose(1, 2).contiguous().view(batch, -1, self.h * dim)
        return self.linears[-1](x)


class enc_mtan_classif(nn.Module):
    def __init__(self, input_dim, query, nhidden=16, embed_time=16, num_heads=1, n_classes=4):
        super(enc_mtan_classif, self).__init__()
        self.embed_time = embed_time
        self.dim = input_dim
        self.nhidden = nhidden
        self.register_buffer('query', query)
        self.att = multiTimeAttention(2 * input_dim, nhidden, embed_time, num_heads)
        self.classifier = nn.Sequential(
            nn.Linear(nhidden, 50),
            nn.ReLU(),
            nn.Linear(50, 50),
            nn.ReLU(),
            nn.Linear(50, n_classes))
        self.enc = nn.GRU(nhidden, nhidden)
        self.periodic = nn.Linear(1, embed_time - 1)
        self.linear = nn.Linear(1, 1)

    def learn_time_embedding(self, tt):
        tt = tt.unsqueeze(-1)
        out2 = torch.sin(self.periodic(tt))
        out1 = self.linear(tt)
        return torch.cat([out1, out2], -1)

    def forward(self, x, time_steps):
        batch = x.size(0)
        mask = x[:, :, self.dim:]
        mask = torch.cat((mask, mask), 2)
        key = self.learn_time_embedding(time_steps)
        query = self.learn_time_embedding(self.query.unsqueeze(0))
        out = self.att(query, key, x, mask)
        out = out.permute(1, 0, 2)
        _, out = self.enc(out)
        return self.classifier(out.squeeze(0))


def evaluate_classifier(model, loader, dim):
    model.eval()
    hits, test_loss, n = 0, 0.0, 0
    with torch.no_grad():
        for batch, label in loader:
            out = model(batch[:, :, :2 * dim], batch[:, :, -1])
            test_loss += F.cross_entropy(out, label, reduction='sum').item()
            hits += (out.argmax(1) == label).sum().item()
            n += len(label)
    return test_loss / n, hits / n


if __name__ == '__main__':
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    random.seed(args.seed)

    dim = 3
    X, y = irregular_series(args.n, np.random.default_rng(args.seed))
    X_tr, X_te, y_tr, y_te = model_selection.train_test_split(X, y, train_size=0.75, random_state=args.seed, shuffle=True)
    train_loader = DataLoader(TensorDataset(torch.from_numpy(X_tr), torch.from_numpy(y_tr)), args.batch_size, shuffle=True)
    test_loader = DataLoader(TensorDataset(torch.from_numpy(X_te), torch.from_numpy(y_te)), 100)

    rec = enc_mtan_classif(dim, torch.linspace(0, HOURS, args.num_ref), args.rec_hidden, args.embed_time, args.enc_num_heads)
    optimizer = optim.Adam(rec.parameters(), lr=args.lr)
    criterion = nn.CrossEntropyLoss()
    for itr in range(1, args.niters + 1):
        rec.train()
        train_loss, train_n, train_acc = 0.0, 0, 0
        for train_batch, label in train_loader:
            out = rec(train_batch[:, :, :2 * dim], train_batch[:, :, -1])
            loss = criterion(out, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            train_loss += loss.item() * len(label)
            train_acc += (out.argmax(1) == label).sum().item()
            train_n += len(label)
        test_loss, test_acc = evaluate_classifier(rec, test_loader, dim)
        print('Iter: {}, loss: {:.4f}, acc: {:.4f}, test_loss: {:.4f}, test_acc: {:.4f}'.format(
            itr, train_loss / train_n, train_acc / train_n, test_loss, test_acc))
    print('metric {:.5f}'.format(test_acc))
