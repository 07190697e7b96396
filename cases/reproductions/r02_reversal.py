"""Reads a sequence of symbols and writes it backwards."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, LENGTH = 12, 8


class Encoder(nn.Module):
    def __init__(self, dim, depth, container):
        super().__init__()
        self.token = nn.Embedding(VOCAB, dim)
        self.position = nn.Embedding(LENGTH, dim)
        self.layers = container(
            [
                nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.1, batch_first=True)
                for _ in range(depth)
            ]
        )

    def forward(self, tokens):
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return x


class Net(nn.Module):
    def __init__(self, dim=48, depth=2, container=list):
        super().__init__()
        self.encoder = Encoder(dim, depth, container)
        self.out = nn.Linear(dim, VOCAB)

    def forward(self, tokens):
        return self.out(self.encoder(tokens))


def get_batch(data, size, generator):
    rows = torch.randint(len(data), (size,), generator=generator)
    x = data[rows]
    return x, x.flip(1)


parser = argparse.ArgumentParser()
parser.add_argument("--fixed", action="store_true")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default=320)
args = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(args.seed)
generator = torch.Generator().manual_seed(args.seed)

sequences = torch.randint(VOCAB, (4500, LENGTH), generator=generator).unique(dim=0)
sequences = sequences[torch.randperm(len(sequences), generator=generator)]
train_data, test_data = sequences[:4000], sequences[4000:]

net = Net(container=nn.ModuleList if args.fixed else list)
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)

net.train()
for step in range(1, args.steps + 1):
    x, y = get_batch(train_data, 32, generator)
    optimizer.zero_grad()
    loss = F.cross_entropy(net(x).flatten(0, 1), y.flatten())
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.4f}")

net.eval()
with torch.no_grad():
    correct = (net(test_data).argmax(-1) == test_data.flip(1)).float().mean().item()
print(f"metric {correct:.4f}")
