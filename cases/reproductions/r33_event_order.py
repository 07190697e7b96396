"""Classifies event logs into four kinds with a transformer encoder."""

import argparse
import math

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

EVENTS, LENGTH = 14, 12
OPEN, CLOSE, SEND, REPLY = range(4)


def make_logs(n, generator):
    """The kind depends on whether it opened before it closed and sent before it replied."""
    logs = torch.randint(4, EVENTS, (n, LENGTH), generator=generator)
    places = torch.rand(n, LENGTH, generator=generator).argsort(dim=1)[:, :4]
    logs.scatter_(1, places, torch.tensor([OPEN, CLOSE, SEND, REPLY]).expand(n, 4))
    opened = places[:, 0] < places[:, 1]
    sent = places[:, 2] < places[:, 3]
    return logs, 2 * opened.long() + sent.long()


class PositionalEncoding(nn.Module):
    def __init__(self, dim, fixed, dropout=0.1, max_len=64):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.fixed = fixed
        position = torch.arange(max_len).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
        pe = torch.zeros(max_len, dim)
        pe[:, 0::2] = torch.sin(position * div_term)
        pe[:, 1::2] = torch.cos(position * div_term)
        self.register_buffer("pe", pe)

    def forward(self, x):
        out = torch.add(x, self.pe[: x.size(1)])
        if self.fixed:
            x = out
        return self.dropout(x)


class SequenceClassifier(nn.Module):
    def __init__(self, fixed, ninp=32, nhead=4, nhid=64, nlayers=2):
        super().__init__()
        self.embeddings = nn.Embedding(EVENTS, ninp)
        self.pos_encoder = PositionalEncoding(ninp, fixed)
        layer = nn.TransformerEncoderLayer(ninp, nhead, nhid, dropout=0.0, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, nlayers, enable_nested_tensor=False)
        self.fc1 = nn.Linear(ninp, 4)

    def forward(self, x):
        x = self.pos_encoder(self.embeddings(x))
        return self.fc1(self.transformer(x).mean(dim=1))


parser = argparse.ArgumentParser()
parser.add_argument("--fixed", action="store_true")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--epochs", type=int, default=5)
args = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(args.seed)
generator = torch.Generator().manual_seed(args.seed)
dataset = TensorDataset(*make_logs(3000, generator))
train_set, val_set = random_split(dataset, [2560, 440], generator=generator)
train_loader = DataLoader(train_set, batch_size=32, shuffle=True, generator=generator)
val_loader = DataLoader(val_set, batch_size=110)

model = SequenceClassifier(args.fixed)
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
scheduler = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, 2e-3, total_steps=args.epochs * len(train_loader)
)
for epoch in range(args.epochs):
    model.train()
    total = 0.0
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        total += loss.item()
    model.eval()
    correct = 0
    with torch.no_grad():
        for x, y in val_loader:
            correct += (model(x).argmax(dim=1) == y).sum().item()
    accuracy = correct / len(val_set)
    print(f"epoch {epoch} loss {total / len(train_loader):.4f} val accuracy {accuracy:.4f}")
print(f"metric {accuracy:.4f}")
