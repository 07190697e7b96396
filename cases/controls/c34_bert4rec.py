"""BERT4Rec: bidirectional masked item model for next-item recommendation, leave-one-out NDCG@10."""
import argparse
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

PAD = 0


def simulate_users(num_users, num_items, rng):
    """Each item has two usual followers; a user prefers one of them and wanders off now and then."""
    followers = np.stack([rng.permutation(num_items) for _ in range(2)], 1) + 1
    histories = []
    for _ in range(num_users):
        taste = int(rng.integers(2))
        item = int(rng.integers(num_items)) + 1
        seq = [item]
        for _ in range(int(rng.integers(5, 18))):
            if rng.random() < 0.1:
                item = int(rng.integers(num_items)) + 1
            else:
                item = int(followers[item - 1, taste])
            seq.append(item)
        histories.append(seq)
    return histories


class ClozeDataset(Dataset):
    def __init__(self, histories, max_len, mask_token, mask_prob, rng):
        self.histories, self.max_len = histories, max_len
        self.mask_token, self.mask_prob, self.rng = mask_token, mask_prob, rng

    def __len__(self):
        return len(self.histories)

    def __getitem__(self, u):
        seq = self.histories[u][-self.max_len:]
        tokens, labels = [], []
        only_last = self.rng.random() < 0.25
        for i, s in enumerate(seq):
            hide = i == len(seq) - 1 if only_last else self.rng.random() < self.mask_prob
            tokens.append(self.mask_token if hide else s)
            labels.append(s if hide else PAD)
        pad = self.max_len - len(tokens)
        return torch.tensor([PAD] * pad + tokens), torch.tensor([PAD] * pad + labels)


class Layer(nn.Module):
    def __init__(self, hidden, heads, dropout):
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden, heads, dropout=dropout)
        self.norm1 = nn.LayerNorm(hidden)
        self.ffn = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
        self.norm2 = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, pad_mask):
        a, _ = self.attention(x, x, x, key_padding_mask=pad_mask, need_weights=False)
        x = self.norm1(x + self.dropout(a))
        return self.norm2(x + self.dropout(self.ffn(x)))


class BERT4Rec(nn.Module):
    def __init__(self, num_items, max_len, hidden=48, heads=2, layers=2, dropout=0.1):
        super().__init__()
        self.item = nn.Embedding(num_items + 2, hidden, padding_idx=PAD)
        self.position = nn.Embedding(max_len, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList([Layer(hidden, heads, dropout) for _ in range(layers)])
        self.transform = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden))
        self.bias = nn.Parameter(torch.zeros(num_items))
        nn.init.normal_(self.item.weight, std=0.05)
        nn.init.normal_(self.position.weight, std=0.05)
        with torch.no_grad():
            self.item.weight[PAD].zero_()

    def forward(self, tokens):
        pad_mask = tokens == PAD
        x = self.item(tokens) + self.position.weight
        x = self.dropout(self.norm(x)).transpose(0, 1)          # time first
        for layer in self.layers:
            x = layer(x, pad_mask)
        x = self.transform(x.transpose(0, 1))
        return x @ self.item.weight[1:-1].t() + self.bias       # tied; real items only


@torch.no_grad()
def ndcg_at_10(model, histories, max_len, mask_token):
    model.eval()
    rows, target = [], []
    for h in histories:
        t = h[:-1][-(max_len - 1):] + [mask_token]
        rows.append([PAD] * (max_len - len(t)) + t)
        target.append(h[-1])
    scores = model(torch.tensor(rows))[:, -1]
    target = torch.tensor(target).unsqueeze(1) - 1
    rank = (scores > scores.gather(1, target)).sum(1).float()
    return torch.where(rank < 10, 1 / torch.log2(rank + 2), torch.zeros_like(rank)).mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--mask_prob", type=float, default=0.2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    random.seed(args.seed)

    num_items, max_len = 40, 14
    mask_token = num_items + 1
    histories = simulate_users(1000, num_items, np.random.default_rng(args.seed))
    # the last item of every user is kept for the test
    train = ClozeDataset([h[:-1] for h in histories], max_len, mask_token, args.mask_prob, random)
    loader = DataLoader(train, batch_size=50, shuffle=True)

    model = BERT4Rec(num_items, max_len)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-6)
    steps = args.epochs * len(loader)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 20, 1 - 0.95 * s / steps))
    criterion = nn.CrossEntropyLoss(ignore_index=-1)
    for epoch in range(1, args.epochs + 1):
        model.train()
        losses = []
        for tokens, labels in loader:
            logits = model(tokens)
            loss = criterion(logits.flatten(0, 1), labels.flatten() - 1)   # PAD becomes -1
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        print(f"epoch {epoch:2d}  loss {np.mean(losses):.4f}")
    print(f"metric {ndcg_at_10(model, histories, max_len, mask_token):.4f}")


if __name__ == "__main__":
    main()
