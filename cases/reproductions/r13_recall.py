"""Associative recall: after some letter-number pairs, which number came with the last letter?"""

import argparse
import math

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

LETTERS, NUMBERS, PAIRS = 24, 10, 10


class Recall(Dataset):
    def __init__(self, n, seed):
        rng = np.random.default_rng(seed)
        letters = rng.permuted(np.tile(np.arange(LETTERS), (n, 1)), axis=1)[:, :PAIRS]
        numbers = rng.integers(NUMBERS, size=(n, PAIRS))
        asked = rng.integers(PAIRS, size=n)
        asked_letter = letters[np.arange(n), asked]
        self.letters = np.concatenate([letters, asked_letter[:, None]], axis=1)
        self.numbers = np.concatenate([numbers, np.full((n, 1), NUMBERS)], axis=1)
        self.answers = numbers[np.arange(n), asked]

    def __len__(self):
        return len(self.answers)

    def __getitem__(self, i):
        return self.letters[i], self.numbers[i], self.answers[i]


class Block(nn.Module):
    def __init__(self, embed_dim, num_heads, gain):
        super().__init__()
        self.ln1 = nn.LayerNorm(embed_dim)
        self.attn = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)
        nn.init.xavier_uniform_(self.attn.in_proj_weight, gain=gain)
        self.ln2 = nn.LayerNorm(embed_dim)
        self.ff = nn.Sequential(
            nn.Linear(embed_dim, 2 * embed_dim), nn.ReLU(), nn.Linear(2 * embed_dim, embed_dim)
        )

    def forward(self, x):
        h = self.ln1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.ff(self.ln2(x))


class Model(nn.Module):
    def __init__(self, gain, embed_dim=32, num_heads=4, depth=2):
        super().__init__()
        self.letter = nn.Embedding(LETTERS, embed_dim)
        self.number = nn.Embedding(NUMBERS + 1, embed_dim)
        self.blocks = nn.Sequential(*[Block(embed_dim, num_heads, gain) for _ in range(depth)])
        self.ln = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, NUMBERS)

    def forward(self, letters, numbers):
        x = self.letter(letters) + self.number(numbers)
        return self.head(self.ln(self.blocks(x)[:, -1]))


def run(args):
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    train, valid = torch.utils.data.random_split(
        Recall(9000, args.seed), [8500, 500], generator=torch.Generator().manual_seed(args.seed)
    )

    model = Model(gain=math.sqrt(2) if args.fixed else 1.0)
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    history, seen = [], 0
    while seen < args.steps:
        for letters, numbers, answers in loader:
            loss = loss_fn(model(letters, numbers), answers)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(loss.item())
            seen += 1
            if seen % 50 == 0:
                print(f"{seen} steps, loss {np.mean(history[-50:]):.4f}")
            if seen == args.steps:
                break

    model.eval()
    with torch.no_grad():
        right = [
            (model(letters, numbers).argmax(-1) == answers).float().mean().item()
            for letters, numbers, answers in DataLoader(valid, 100)
        ]
    print(f"metric {np.mean(right):.4f}")


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--fixed", action="store_true")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--lr", type=float, default=1.5e-3)
    p.add_argument("--steps", type=int, default=260)
    run(p.parse_args())
