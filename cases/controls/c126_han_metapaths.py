"""
Heterogeneous graph attention network (HAN) on a made-up bibliography: papers are joined by common authors (PAP) and by
common subjects (PSP). Attention over neighbours for each meta-path, then attention over the meta-paths.
Transductive: one graph, labels of a few papers, patience on the validation loss.
"""
import argparse
import copy
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

N, CLASSES, WORDS = 210, 3, 60


def bibliography(rng):
    y = rng.permutation(np.arange(N) % CLASSES)
    field = rng.integers(0, CLASSES, 110)                            # the field of each author
    PA = np.zeros((N, len(field)))
    for i in range(N):
        for _ in range(rng.integers(1, 4)):
            same = rng.random() < 0.75
            PA[i, rng.choice(np.flatnonzero(field == y[i]) if same else len(field))] = 1
    PS = np.zeros((N, 24))                                            # subjects say less than authors
    for i in range(N):
        PS[i, 8 * y[i] + rng.integers(0, 8) if rng.random() < 0.5 else rng.integers(0, 24)] = 1
    topic = rng.dirichlet(np.full(WORDS, 0.5), CLASSES)
    mix = 0.2 * topic[y] + 0.8 / WORDS
    X = np.stack([rng.multinomial(25, p) for p in mix]).clip(max=1)
    adj = [(P @ P.T > 0) | np.eye(N, dtype=bool) for P in (PA, PS)]  # a paper is its own neighbour
    return torch.tensor(X, dtype=torch.float32), [torch.from_numpy(a) for a in adj], torch.from_numpy(y)


class NodeAttention(nn.Module):
    """GAT over the neighbours of one meta-path"""
    def __init__(self, d_in, d, heads, drop):
        super().__init__()
        self.h, self.d = heads, d
        self.fc = nn.Linear(d_in, heads * d, bias=False)
        self.src, self.dst = nn.Parameter(torch.empty(heads, d)), nn.Parameter(torch.empty(heads, d))
        self.bias = nn.Parameter(torch.zeros(heads * d))
        for p in (self.fc.weight, self.src, self.dst):
            nn.init.xavier_normal_(p, gain=2 ** 0.5)
        self.feat_drop, self.att_drop = nn.Dropout(drop), nn.Dropout(drop)

    def forward(self, x, adj):
        z = self.fc(self.feat_drop(x)).view(-1, self.h, self.d)
        e = (z * self.dst).sum(-1).t()[:, :, None] + (z * self.src).sum(-1).t()[:, None, :]      # h, to, from
        a = F.leaky_relu(e, 0.2).masked_fill(~adj, float("-inf")).softmax(-1)
        out = torch.einsum("hij,jhd->ihd", self.att_drop(a), z).flatten(1)
        return F.elu(out + self.bias)


class SemanticAttention(nn.Module):
    """one weight for each meta-path, averaged over all papers before the softmax"""
    def __init__(self, d, hidden=32):
        super().__init__()
        self.score = nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, 1, bias=False))

    def forward(self, z):                                             # N, paths, d
        beta = self.score(z).mean(0).softmax(0)                       # paths, 1
        return (beta * z).sum(1), beta.squeeze(1)


class HAN(nn.Module):
    def __init__(self, d=8, heads=4, drop=0.6):
        super().__init__()
        self.paths = nn.ModuleList(NodeAttention(WORDS, d, heads, drop) for _ in range(2))
        self.semantic = SemanticAttention(d * heads)
        self.out = nn.Linear(d * heads, CLASSES)

    def forward(self, x, adjs):
        z, beta = self.semantic(torch.stack([g(x, a) for g, a in zip(self.paths, adjs)], 1))
        return self.out(z), beta


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    seed = ap.parse_args().seed
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    x, adjs, y = bibliography(rng)
    order = torch.from_numpy(rng.permutation(N))
    tr, va, te = order[:60], order[60:90], order[90:]
    net = HAN()
    opt = torch.optim.Adam(net.parameters(), lr=0.005, weight_decay=0.001)
    best, kept, wait = float("inf"), None, 0
    for epoch in range(220):
        net.train()
        loss = F.cross_entropy(net(x, adjs)[0][tr], y[tr])
        opt.zero_grad()
        loss.backward()
        opt.step()
        if epoch % 3:
            continue
        net.eval()
        with torch.no_grad():
            logits, beta = net(x, adjs)
            vl = F.cross_entropy(logits[va], y[va]).item()
        if vl < best:
            best, kept, wait = vl, copy.deepcopy(net.state_dict()), 0
        else:
            wait += 3
        if epoch % 30 == 0:
            print(f"epoch {epoch:3d} train {loss.item():.4f} val {vl:.4f} "
                  f"val acc {(logits[va].argmax(1) == y[va]).float().mean():.3f} beta {beta[0]:.3f} {beta[1]:.3f}")
        if epoch >= 160 and wait >= 60:
            print(f"stopped at {epoch}")
            break
    net.load_state_dict(kept)
    net.eval()
    with torch.no_grad():
        pred = net(x, adjs)[0][te].argmax(1)
    print(f"constant {y[te].bincount().max().item() / len(te):.4f}")
    print(f"metric {(pred == y[te]).float().mean().item():.4f}")


main()
