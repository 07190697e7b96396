"""Set Transformer on handwritten digits given as sets of inked pixels (x, y, intensity)."""
import argparse
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class MAB(nn.Module):
    def __init__(self, dim_Q, dim_K, dim_V, num_heads):
        super().__init__()
        self.dim_V = dim_V
        self.num_heads = num_heads
        self.fc_q = nn.Linear(dim_Q, dim_V)
        self.fc_k = nn.Linear(dim_K, dim_V)
        self.fc_v = nn.Linear(dim_K, dim_V)
        self.ln0 = nn.LayerNorm(dim_V)
        self.ln1 = nn.LayerNorm(dim_V)
        self.fc_o = nn.Linear(dim_V, dim_V)

    def forward(self, Q, K, mask=None):
        Q = self.fc_q(Q)
        K, V = self.fc_k(K), self.fc_v(K)

        dim_split = self.dim_V // self.num_heads
        Q_ = torch.cat(Q.split(dim_split, 2), 0)
        K_ = torch.cat(K.split(dim_split, 2), 0)
        V_ = torch.cat(V.split(dim_split, 2), 0)

        S = Q_.bmm(K_.transpose(1, 2)) / math.sqrt(self.dim_V)
        if mask is not None:
            S = S.masked_fill(~mask.repeat(self.num_heads, 1).unsqueeze(1), float("-inf"))
        A = torch.softmax(S, 2)
        O = torch.cat((Q_ + A.bmm(V_)).split(Q.size(0), 0), 2)
        O = self.ln0(O)
        O = O + F.relu(self.fc_o(O))
        return self.ln1(O)


class ISAB(nn.Module):
    def __init__(self, dim_in, dim_out, num_heads, num_inds):
        super().__init__()
        self.I = nn.Parameter(torch.empty(1, num_inds, dim_out))
        nn.init.xavier_uniform_(self.I)
        self.mab0 = MAB(dim_out, dim_in, dim_out, num_heads)
        self.mab1 = MAB(dim_in, dim_out, dim_out, num_heads)

    def forward(self, X, mask):
        H = self.mab0(self.I.repeat(X.size(0), 1, 1), X, mask)
        return self.mab1(X, H)


class PMA(nn.Module):
    def __init__(self, dim, num_heads, num_seeds):
        super().__init__()
        self.S = nn.Parameter(torch.empty(1, num_seeds, dim))
        nn.init.xavier_uniform_(self.S)
        self.mab = MAB(dim, dim, dim, num_heads)

    def forward(self, X, mask):
        return self.mab(self.S.repeat(X.size(0), 1, 1), X, mask)


class SetTransformer(nn.Module):
    def __init__(self, dim_input=3, num_classes=10, dim_hidden=48, num_heads=4, num_inds=8):
        super().__init__()
        self.isab1 = ISAB(dim_input, dim_hidden, num_heads, num_inds)
        self.isab2 = ISAB(dim_hidden, dim_hidden, num_heads, num_inds)
        self.pool = PMA(dim_hidden, num_heads, 1)
        self.head = nn.Linear(dim_hidden, num_classes)

    def forward(self, X, mask):
        X = self.isab1(X, mask)
        X = self.isab2(X, mask)
        return self.head(self.pool(X, mask).squeeze(1))


def images_to_sets(images):
    sets = []
    for img in images:
        r, c = np.nonzero(img >= 8)
        sets.append(np.stack([c / 3.5 - 1, 1 - r / 3.5, img[r, c] / 8 - 1], 1))
    n = max(len(s) for s in sets)
    X = np.zeros((len(sets), n, 3), dtype=np.float32)
    mask = np.zeros((len(sets), n), dtype=bool)
    for i, s in enumerate(sets):
        X[i, : len(s)] = s
        mask[i, : len(s)] = True
    return torch.from_numpy(X), torch.from_numpy(mask)


parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default=350)
parser.add_argument("--batch_size", type=int, default=32)
parser.add_argument("--lr", type=float, default=3e-3)
args = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(args.seed)
digits = load_digits()
X, mask = images_to_sets(digits.images)
y = torch.from_numpy(digits.target).long()
train_idx, test_idx = train_test_split(
    np.arange(len(y)), test_size=400, random_state=args.seed, stratify=digits.target
)
train_idx, test_idx = torch.from_numpy(train_idx), torch.from_numpy(test_idx)

model = SetTransformer()
optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(args.steps * 0.7)], gamma=0.2)

model.train()
for step in range(1, args.steps + 1):
    idx = train_idx[torch.randint(len(train_idx), (args.batch_size,))]
    n = int(mask[idx].sum(1).max())
    loss = F.cross_entropy(model(X[idx, :n], mask[idx, :n]), y[idx])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    if step % 50 == 0:
        print(f"step {step:4d}  loss {loss.item():.4f}")

model.eval()
with torch.no_grad():
    pred = model(X[test_idx], mask[test_idx]).argmax(1)
    acc = (pred == y[test_idx]).float().mean().item()
print(f"metric {acc:.4f}")
