"""Deep Interest Network for click-through prediction on a synthetic shop."""
import argparse

import numpy as np
import torch
import torch.nn as nn
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, TensorDataset

N_ITEMS, N_CATS, MAX_HIST = 300, 15, 15


def make_log(n_users, rng):
    """One impression per user. Item id 0 / category id 0 are padding."""
    cat_of = np.concatenate([[0], 1 + rng.integers(0, N_CATS, N_ITEMS)])
    by_cat = [np.flatnonzero(cat_of == c) for c in range(N_CATS + 1)]
    hist = np.zeros((n_users, MAX_HIST), dtype=np.int64)
    length = rng.integers(3, MAX_HIST + 1, n_users)
    cand = np.zeros(n_users, dtype=np.int64)
    click = np.zeros(n_users, dtype=np.float32)
    for u in range(n_users):
        tastes = 1 + rng.choice(N_CATS, size=3, replace=False)
        for t in range(length[u]):
            c = rng.choice(tastes) if rng.random() < 0.8 else rng.integers(1, N_CATS + 1)
            hist[u, t] = rng.choice(by_cat[c])
        c = rng.choice(tastes) if rng.random() < 0.5 else rng.integers(1, N_CATS + 1)
        cand[u] = rng.choice(by_cat[c])
        seen = (cat_of[hist[u, :length[u]]] == c).sum()
        click[u] = rng.random() < (0.05, 0.55, 0.85, 0.95)[min(seen, 3)]
    return [torch.from_numpy(a) for a in (hist, cat_of[hist], cand, cat_of[cand], length, click)]


class Dice(nn.Module):
    def __init__(self, dim, eps=1e-8):
        super().__init__()
        self.bn = nn.BatchNorm1d(dim, eps=eps, affine=False)
        self.alpha = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        p = torch.sigmoid(self.bn(x))
        return p * x + (1 - p) * self.alpha * x


class ActivationUnit(nn.Module):
    """Scores of the behaviours for a candidate; used as they are, so that intensity is kept."""

    def __init__(self, dim, hidden=(32, 16)):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4 * dim, hidden[0]), nn.PReLU(),
                                 nn.Linear(hidden[0], hidden[1]), nn.PReLU(),
                                 nn.Linear(hidden[1], 1))

    def forward(self, query, facts, mask):
        q = query.unsqueeze(1).expand_as(facts)
        scores = self.mlp(torch.cat([q, facts, q - facts, q * facts], dim=-1)).squeeze(-1)
        weights = scores * mask
        return torch.einsum("bt,btd->bd", weights, facts)


class DIN(nn.Module):
    def __init__(self, d=12):
        super().__init__()
        self.item_emb = nn.Embedding(N_ITEMS + 1, d, padding_idx=0)
        self.cat_emb = nn.Embedding(N_CATS + 1, d, padding_idx=0)
        nn.init.normal_(self.item_emb.weight[1:], std=0.1)
        nn.init.normal_(self.cat_emb.weight[1:], std=0.5)
        self.attention = ActivationUnit(2 * d)
        self.fc = nn.Sequential(nn.BatchNorm1d(6 * d),
                                nn.Linear(6 * d, 48), Dice(48),
                                nn.Linear(48, 24), Dice(24),
                                nn.Linear(24, 1))

    def embed(self, item, cat):
        return torch.cat([self.item_emb(item), self.cat_emb(cat)], dim=-1)

    def forward(self, hist, hist_cat, cand, cand_cat, length):
        behaviours = self.embed(hist, hist_cat)
        target = self.embed(cand, cand_cat)
        mask = (torch.arange(hist.shape[1])[None] < length[:, None]).float()
        interest = self.attention(target, behaviours, mask)
        return self.fc(torch.cat([interest, target, interest * target], dim=-1)).squeeze(-1)


def evaluate(model, loader):
    model.eval()
    scores, labels = [], []
    with torch.no_grad():
        for *features, y in loader:
            scores.append(torch.sigmoid(model(*features)))
            labels.append(y)
    return roc_auc_score(torch.cat(labels).numpy(), torch.cat(scores).numpy())


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--epochs", type=int, default=3)
    ap.add_argument("--lr", type=float, default=5e-3)
    cfg = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(cfg.seed)
    log = make_log(8000, np.random.default_rng(cfg.seed))
    n_train = 6500
    train = TensorDataset(*[t[:n_train] for t in log])
    test = TensorDataset(*[t[n_train:] for t in log])
    train_loader = DataLoader(train, batch_size=100, shuffle=True)
    test_loader = DataLoader(test, batch_size=500)

    net = DIN()
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    bce = nn.BCEWithLogitsLoss()
    for epoch in range(cfg.epochs):
        net.train()
        losses = []
        for *features, y in train_loader:
            loss = bce(net(*features), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scheduler.step()
        print(f"[epoch {epoch + 1}] logloss {np.mean(losses):.4f}  test auc {evaluate(net, test_loader):.4f}")
    print(f"metric {evaluate(net, test_loader):.4f}")
