"""Transformer encoder that sorts a short list of numbers."""

import argparse
import math

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

NUMBERS, LENGTH = 20, 8


def scaled_dot_product_attention(query, key, value, temperature):
    scores = query @ key.transpose(-2, -1) / temperature
    return torch.softmax(scores, dim=-1) @ value


class MultiHeadAttention(nn.Module):
    def __init__(self, model_dim, num_heads, temperature):
        super().__init__()
        self.num_heads = num_heads
        self.temperature = temperature
        self.query_linear = nn.Linear(model_dim, model_dim)
        self.key_linear = nn.Linear(model_dim, model_dim)
        self.value_linear = nn.Linear(model_dim, model_dim)
        self.multihead_linear = nn.Linear(model_dim, model_dim)

    def forward(self, x):
        b, n, d = x.shape

        def heads(t):
            return t.view(b, n, self.num_heads, d // self.num_heads).transpose(1, 2)

        q, k, v = self.query_linear(x), self.key_linear(x), self.value_linear(x)
        attended = scaled_dot_product_attention(heads(q), heads(k), heads(v), self.temperature)
        return self.multihead_linear(attended.transpose(1, 2).reshape(b, n, d))


class EncoderBlock(nn.Module):
    def __init__(self, model_dim, num_heads, temperature):
        super().__init__()
        self.mha = MultiHeadAttention(model_dim, num_heads, temperature)
        self.norm1 = nn.LayerNorm(model_dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(model_dim, 2 * model_dim), nn.ReLU(), nn.Linear(2 * model_dim, model_dim)
        )
        self.norm2 = nn.LayerNorm(model_dim)

    def forward(self, x):
        x = self.norm1(x + self.mha(x))
        return self.norm2(x + self.feed_forward(x))


class Sorter(nn.Module):
    def __init__(self, model_dim, num_heads, num_blocks, temperature):
        super().__init__()
        self.embedding = nn.Embedding(NUMBERS, model_dim)
        position = torch.arange(LENGTH).unsqueeze(1)
        freq = torch.exp(torch.arange(0, model_dim, 2) * (-math.log(10000.0) / model_dim))
        pe = torch.zeros(LENGTH, model_dim)
        pe[:, 0::2] = torch.sin(position * freq)
        pe[:, 1::2] = torch.cos(position * freq)
        self.register_buffer("pe", pe)
        self.blocks = nn.ModuleList(
            [EncoderBlock(model_dim, num_heads, temperature) for _ in range(num_blocks)]
        )
        self.output = nn.Linear(model_dim, NUMBERS)

    def forward(self, x):
        x = self.embedding(x) + self.pe
        for block in self.blocks:
            x = block(x)
        return self.output(x)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    lists = torch.randint(NUMBERS, (10500, LENGTH)).unique(dim=0)
    lists = lists[torch.randperm(len(lists))]
    train_x, test_x = lists[:-500], lists[-500:]
    loader = DataLoader(
        TensorDataset(train_x, train_x.sort(dim=1).values), batch_size=32, shuffle=True
    )

    model_dim, num_heads = 64, 2
    dk = model_dim // num_heads
    temperature = math.sqrt(dk) if args.fixed else dk
    model = Sorter(model_dim, num_heads, 2, temperature)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    step, running = 0, 0.0
    for _ in range(1):
        for x, y in loader:
            logits = model(x)
            loss = criterion(logits.transpose(1, 2), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            running += loss.item()
            if step % 25 == 0:
                print(f"iteration {step}: loss {running / 25:.4f}")
                running = 0.0

    model.eval()
    with torch.no_grad():
        accuracy = (model(test_x).argmax(-1) == test_x.sort(dim=1).values).float().mean()
    print(f"metric {accuracy.item():.4f}")


if __name__ == "__main__":
    main()
