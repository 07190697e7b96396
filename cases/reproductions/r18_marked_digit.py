"""Vision transformer on pictures of nine digits: which digit stands in the framed patch?"""

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

GRID, PATCH = 3, 10


class PatchEmbedding(nn.Module):
    def __init__(self, embed_dim):
        super().__init__()
        self.conv = nn.Conv2d(1, embed_dim, kernel_size=PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.2)
        self.position = nn.Parameter(torch.randn(1, GRID * GRID + 1, embed_dim) * 0.2)

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.repeat(len(x), 1, 1), x], dim=1)
        return x + self.position


class AttentionHead(nn.Module):
    def __init__(self, embed_dim, head_dim, dim):
        super().__init__()
        self.q_layer = nn.Linear(embed_dim, head_dim)
        self.k_layer = nn.Linear(embed_dim, head_dim)
        self.v_layer = nn.Linear(embed_dim, head_dim)
        self.softmax = nn.Softmax(dim=dim)
        self.scale = head_dim**-0.5

    def forward(self, x):
        q, k, v = self.q_layer(x), self.k_layer(x), self.v_layer(x)
        attention = self.softmax(torch.matmul(q, k.transpose(1, 2)) * self.scale)
        return torch.matmul(attention, v)


class MultiHeadAttention(nn.Module):
    def __init__(self, embed_dim, num_heads, dim):
        super().__init__()
        self.heads = nn.ModuleList(
            [AttentionHead(embed_dim, embed_dim // num_heads, dim) for _ in range(num_heads)]
        )
        self.linear = nn.Linear(embed_dim, embed_dim)

    def forward(self, x):
        return self.linear(torch.cat([head(x) for head in self.heads], dim=-1))


class EncoderBlock(nn.Module):
    def __init__(self, embed_dim, num_heads, hidden_dim, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attention = MultiHeadAttention(embed_dim, num_heads, dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, embed_dim)
        )

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, embed_dim, num_heads, hidden_dim, num_layers, dim):
        super().__init__()
        self.embedding = PatchEmbedding(embed_dim)
        self.encoder = nn.Sequential(
            *[EncoderBlock(embed_dim, num_heads, hidden_dim, dim) for _ in range(num_layers)]
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.mlp_head = nn.Linear(embed_dim, 10)

    def forward(self, x):
        x = self.encoder(self.embedding(x))
        return self.mlp_head(self.norm(x[:, 0]))


def make_pictures(images, target, n, rng):
    cells = rng.integers(len(images), size=(n, GRID, GRID))
    tiles = np.zeros((n, GRID, GRID, PATCH, PATCH), dtype=np.float32)
    tiles[..., 1:-1, 1:-1] = images[cells]
    marked = rng.integers(GRID, size=(n, 2))
    which = (np.arange(n), marked[:, 0], marked[:, 1])
    frame = np.ones((PATCH, PATCH), dtype=np.float32)
    frame[1:-1, 1:-1] = 0.0
    tiles[which] += frame
    pictures = tiles.transpose(0, 1, 3, 2, 4).reshape(n, 1, GRID * PATCH, GRID * PATCH)
    return torch.from_numpy(pictures), torch.from_numpy(target[cells[which]])


parser = argparse.ArgumentParser()
parser.add_argument("--fixed", action="store_true")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--lr", type=float, default=2e-3)
args = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(args.seed)
rng = np.random.default_rng(args.seed)

digits = load_digits()
order = rng.permutation(len(digits.target))
images = (digits.images[order] / 16.0).astype(np.float32)
target = digits.target[order]
train_x, train_y = make_pictures(images[:1300], target[:1300], 4800, rng)
test_x, test_y = make_pictures(images[1300:], target[1300:], 500, rng)

model = VisionTransformer(
    embed_dim=48, num_heads=4, hidden_dim=96, num_layers=1, dim=-1 if args.fixed else 1
)
loss_function = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)

for epoch in range(2):
    losses = []
    for rows in torch.randperm(len(train_x)).split(32):
        optimizer.zero_grad()
        loss = loss_function(model(train_x[rows]), train_y[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % 40 == 0:
            print(f"epoch {epoch} batch {len(losses)} loss {np.mean(losses[-40:]):.4f}")
    scheduler.step()

model.eval()
with torch.no_grad():
    prediction = model(test_x).argmax(dim=1)
print(f"metric {(prediction == test_y).float().mean().item():.4f}")
