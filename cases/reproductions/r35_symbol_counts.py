"""A transformer encoder that says, at every position, how often its symbol occurs in the row."""

import argparse
import math

import torch
from torch import nn
from torch.nn import functional as F

VOCAB, LENGTH = 8, 10


class MultiHeadAttention(nn.Module):
    def __init__(self, hidden_dim, num_heads, fixed):
        super().__init__()
        self.qkv_dim = hidden_dim // num_heads
        self.num_heads = num_heads
        self.fixed = fixed
        self.qkv_proj = nn.Linear(hidden_dim, 3 * hidden_dim)
        self.o_proj = nn.Linear(hidden_dim, hidden_dim)
        for layer in (self.qkv_proj, self.o_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def scaled_dot_product(self, q, k, v):
        logits = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(self.qkv_dim)
        return torch.matmul(logits.softmax(dim=-1), v)

    def forward(self, x):
        batch_size, sequence_length, hidden_dim = x.size()
        qkv = self.qkv_proj(x)
        qkv = qkv.reshape(batch_size, sequence_length, self.num_heads, 3 * self.qkv_dim)
        q, k, v = qkv.permute(0, 2, 1, 3).chunk(3, dim=-1)
        values = self.scaled_dot_product(q, k, v)
        if self.fixed:
            values = values.permute(0, 2, 1, 3)
        values = values.reshape(batch_size, sequence_length, hidden_dim)
        return self.o_proj(values)


class EncoderBlock(nn.Module):
    def __init__(self, hidden_dim, ff_dim, num_heads, fixed):
        super().__init__()
        self.self_mha = MultiHeadAttention(hidden_dim, num_heads, fixed)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden_dim, ff_dim), nn.ReLU(), nn.Linear(ff_dim, hidden_dim)
        )
        self.layer_norm1 = nn.LayerNorm(hidden_dim)
        self.layer_norm2 = nn.LayerNorm(hidden_dim)

    def forward(self, x):
        x = self.layer_norm1(x + self.self_mha(x))
        return self.layer_norm2(x + self.feed_forward(x))


class TransformerEncoder(nn.Module):
    def __init__(self, fixed, hidden_dim=32, ff_dim=64, num_heads=4, num_layers=2):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, hidden_dim)
        self.positions = nn.Embedding(LENGTH, hidden_dim)
        self.encoder_blocks = nn.ModuleList(
            EncoderBlock(hidden_dim, ff_dim, num_heads, fixed) for _ in range(num_layers)
        )
        self.output_layer = nn.Linear(hidden_dim, LENGTH)

    def forward(self, tokens):
        x = self.embed(tokens) + self.positions.weight
        for block in self.encoder_blocks:
            x = block(x)
        return self.output_layer(x)


def make_rows(n, generator):
    """Rows in which some symbols are much more frequent than others."""
    weights = torch.rand(n, VOCAB, generator=generator) ** 3 + 1e-3
    return torch.multinomial(weights, LENGTH, replacement=True, generator=generator)


def counts(rows):
    return (rows[:, :, None] == rows[:, None, :]).sum(-1) - 1


def train(model, rows, steps, generator):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.98), eps=1e-9)
    model.train()
    losses = []
    for step in range(1, steps + 1):
        batch = rows[torch.randint(len(rows), (32,), generator=generator)]
        loss = F.cross_entropy(model(batch).transpose(1, 2), counts(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step:4d}  loss {sum(losses[-50:]) / 50:.4f}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=450)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    rows = make_rows(5000, generator).unique(dim=0)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    model = TransformerEncoder(args.fixed)
    train(model, rows[500:], args.steps, generator)
    model.eval()
    with torch.no_grad():
        correct = (model(rows[:500]).argmax(-1) == counts(rows[:500])).float().mean().item()
    print(f"metric {correct:.4f}")


if __name__ == "__main__":
    main()
