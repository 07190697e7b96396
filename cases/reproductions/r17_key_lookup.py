"""Looks a key up in a short list of (key, value) pairs with a global attention layer."""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

KEYS, VALUES, PAIRS = 16, 8, 6


def make_data(n, generator):
    keys = torch.rand(n, KEYS, generator=generator).argsort(dim=1)[:, :PAIRS]
    values = torch.randint(VALUES, (n, PAIRS), generator=generator)
    asked = torch.randint(PAIRS, (n, 1), generator=generator)
    return keys, values, keys.gather(1, asked), values.gather(1, asked).squeeze(1)


class Attention(nn.Module):
    """Scores every element of `context` against `query`, returns the mixed context and weights."""

    def __init__(self, dimensions, attention_type="general", dim=-1):
        super().__init__()
        self.attention_type = attention_type
        if attention_type == "general":
            self.linear_in = nn.Linear(dimensions, dimensions, bias=False)
        self.linear_out = nn.Linear(dimensions * 2, dimensions, bias=False)
        self.softmax = nn.Softmax(dim=dim)
        self.tanh = nn.Tanh()

    def forward(self, query, context):
        batch_size, output_len, dimensions = query.size()
        query_len = context.size(1)
        if self.attention_type == "general":
            query = self.linear_in(query)
        scores = torch.bmm(query, context.transpose(1, 2))
        weights = self.softmax(scores.view(batch_size * output_len, query_len))
        weights = weights.view(batch_size, output_len, query_len)
        mix = torch.bmm(weights, context)
        combined = torch.cat((mix, query), dim=2).view(batch_size * output_len, 2 * dimensions)
        output = self.linear_out(combined).view(batch_size, output_len, dimensions)
        return self.tanh(output), weights


class LookupModel(nn.Module):
    def __init__(self, dim, softmax_dim):
        super().__init__()
        self.key_embedding = nn.Embedding(KEYS, dim)
        self.value_embedding = nn.Embedding(VALUES, dim)
        self.pair = nn.Linear(2 * dim, dim)
        self.attention = Attention(dim, dim=softmax_dim)
        self.classifier = nn.Linear(dim, VALUES)

    def forward(self, keys, values, query):
        pairs = torch.cat([self.key_embedding(keys), self.value_embedding(values)], dim=-1)
        output, _ = self.attention(self.key_embedding(query), self.pair(pairs))
        return self.classifier(output.squeeze(1))


def train_epoch(model, loader, criterion, optimizer):
    model.train()
    total = 0.0
    for *inputs, target in loader:
        optimizer.zero_grad()
        loss = criterion(model(*inputs), target)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(loader)


def accuracy(model, loader):
    model.eval()
    hits = count = 0
    with torch.no_grad():
        for *inputs, target in loader:
            hits += (model(*inputs).argmax(1) == target).sum().item()
            count += len(target)
    return hits / count


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    data = make_data(5000, generator)
    train = TensorDataset(*(t[:4000] for t in data))
    test = TensorDataset(*(t[4000:] for t in data))
    train_loader = DataLoader(train, batch_size=32, shuffle=True, generator=generator)
    test_loader = DataLoader(test, batch_size=1)

    model = LookupModel(32, softmax_dim=-1 if args.fixed else 0)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=2e-3)
    for epoch in range(6):
        loss = train_epoch(model, train_loader, criterion, optimizer)
        print(f"Epoch {epoch + 1}: train loss {loss:.4f}")
    print(f"metric {accuracy(model, test_loader):.4f}")


if __name__ == "__main__":
    main()
