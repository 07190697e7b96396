"""A small Perceiver IO encoder that classifies 8x8 digits, one token per 2x2 patch."""

import argparse
import operator

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class MultiHeadAttention(nn.Module):
    def __init__(self, kv_dim, q_dim, qk_out_dim, num_heads, apply_scale):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = qk_out_dim // num_heads
        self.k = nn.Linear(kv_dim, qk_out_dim)
        self.q = nn.Linear(q_dim, qk_out_dim)
        self.v = nn.Linear(kv_dim, qk_out_dim)
        self.projection = nn.Linear(qk_out_dim, q_dim)
        self.scale = self.head_dim**-0.5
        self.apply_scale = apply_scale

    def split(self, x):
        b, n, _ = x.shape
        return x.view(b, n, self.num_heads, self.head_dim).transpose(1, 2)

    def forward(self, inputs_kv, inputs_q):
        k, q, v = (
            self.split(self.k(inputs_kv)),
            self.split(self.q(inputs_q)),
            self.split(self.v(inputs_kv)),
        )
        attention = self.apply_scale(q @ k.transpose(-2, -1), self.scale).softmax(dim=-1)
        weighted = (attention @ v).transpose(1, 2).flatten(2)
        return self.projection(weighted)


class FeedForward(nn.Sequential):
    def __init__(self, dim, widening_factor=2):
        super().__init__(
            nn.Linear(dim, dim * widening_factor),
            nn.GELU(),
            nn.Linear(dim * widening_factor, dim),
        )


class CrossAttention(nn.Module):
    def __init__(self, kv_dim, q_dim, num_heads, apply_scale):
        super().__init__()
        self.kv_layer_norm = nn.LayerNorm(kv_dim)
        self.q_layer_norm = nn.LayerNorm(q_dim)
        self.qkv_layer_norm = nn.LayerNorm(q_dim)
        self.attention = MultiHeadAttention(kv_dim, q_dim, q_dim, num_heads, apply_scale)
        self.mlp = FeedForward(q_dim)

    def forward(self, inputs_kv, inputs_q):
        x = inputs_q + self.attention(self.kv_layer_norm(inputs_kv), self.q_layer_norm(inputs_q))
        return x + self.mlp(self.qkv_layer_norm(x))


class SelfAttention(nn.Module):
    def __init__(self, hidden_dim, num_heads, apply_scale):
        super().__init__()
        self.layer_norm = nn.LayerNorm(hidden_dim)
        self.qkv_layer_norm = nn.LayerNorm(hidden_dim)
        self.attention = MultiHeadAttention(
            hidden_dim, hidden_dim, hidden_dim, num_heads, apply_scale
        )
        self.mlp = FeedForward(hidden_dim)

    def forward(self, x):
        y = self.layer_norm(x)
        x = x + self.attention(y, y)
        return x + self.mlp(self.qkv_layer_norm(x))


class PerceiverEncoder(nn.Module):
    def __init__(self, num_latents, latent_dim, input_dim, num_blocks, apply_scale):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, latent_dim))
        self.cross_attn = CrossAttention(input_dim, latent_dim, 1, apply_scale)
        self.self_attention_block = nn.ModuleList(
            [SelfAttention(latent_dim, 2, apply_scale) for _ in range(num_blocks)]
        )

    def forward(self, x):
        latents = self.cross_attn(x, self.latents.expand(len(x), -1, -1))
        for layer in self.self_attention_block:
            latents = layer(latents)
        return latents


class DigitPerceiver(nn.Module):
    def __init__(self, apply_scale, dim=32):
        super().__init__()
        self.patch = nn.Linear(4, dim)
        self.position = nn.Parameter(0.5 * torch.randn(16, dim))
        self.encoder = PerceiverEncoder(8, dim, dim, 1, apply_scale)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(8 * dim, 10)

    def forward(self, images):
        patches = images.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        latents = self.encoder(self.patch(patches) + self.position)
        return self.head(self.norm(latents).flatten(1))


@torch.no_grad()
def evaluate(model, loader):
    model.eval()
    hits = [(model(x).argmax(1) == y).float() for x, y in loader]
    model.train()
    return torch.cat(hits).mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x / 16, dtype=torch.float32)
    y = torch.tensor(y)
    train_i, test_i = train_test_split(
        range(len(y)), test_size=0.3, random_state=args.seed, stratify=y
    )
    train_loader = DataLoader(
        TensorDataset(x[train_i], y[train_i]),
        batch_size=20,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(args.seed),
    )
    test_loader = DataLoader(TensorDataset(x[test_i], y[test_i]), batch_size=180)

    model = DigitPerceiver(operator.mul if args.fixed else operator.truediv)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    total = args.epochs * len(train_loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=total)
    criterion = nn.CrossEntropyLoss()
    for epoch in range(args.epochs):
        for inputs, labels in train_loader:
            loss = criterion(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        accuracy = evaluate(model, test_loader)
        print(f"[{epoch + 1}/{args.epochs}] loss={loss.item():.4f} acc={accuracy:.4f}")
    print(f"metric {accuracy:.4f}")


if __name__ == "__main__":
    main()
