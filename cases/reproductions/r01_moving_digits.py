"""Which way does the digit move?  3D convolutions, latent queries, a small transformer on top."""

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

FRAMES, SIZE = 5, 14
MOTIONS = [(0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1)]


def make_clips(images, rng):
    clips = np.zeros((len(images), 1, FRAMES, SIZE, SIZE), dtype=np.float32)
    labels = rng.integers(0, len(MOTIONS), len(images))
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        dy, dx = MOTIONS[label]
        y, x = rng.integers(2, 5, 2)
        for t in range(FRAMES):
            step = t - FRAMES // 2
            top, left = np.clip([y + dy * step, x + dx * step], 0, SIZE - 8)
            clips[i, 0, t, top : top + 8, left : left + 8] = image
    clips += 0.1 * rng.standard_normal(clips.shape).astype(np.float32)
    return torch.from_numpy(clips), torch.from_numpy(labels)


class Attention(nn.Module):
    def __init__(self, query_dim, context_dim, heads=2, dim_head=16):
        super().__init__()
        self.heads = heads
        self.scale = dim_head**-0.5
        self.to_q = nn.Linear(query_dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, query_dim)

    def forward(self, x, context):
        b, n, _ = x.shape
        q = self.to_q(x)
        k, v = self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (t.view(b, -1, self.heads, t.shape[-1] // self.heads) for t in (q, k, v))
        sim = torch.einsum("bihd,bjhd->bhij", q, k) * self.scale
        out = torch.einsum("bhij,bjhd->bihd", sim.softmax(dim=-1), v)
        return self.to_out(out.reshape(b, n, -1))


def feed_forward(dim):
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
    )


class CrossAttention(nn.Module):
    """Learned latents look at the feature map of the backbone."""

    def __init__(self, input_channels, num_latents=8, latent_dim=32):
        super().__init__()
        context_dim = input_channels + 3
        self.latents = nn.Parameter(torch.randn(num_latents, latent_dim))
        self.norm = nn.LayerNorm(latent_dim)
        self.norm_context = nn.LayerNorm(context_dim)
        self.attn = Attention(latent_dim, context_dim)
        self.ff = feed_forward(latent_dim)

    def forward(self, data):
        b, *axes, _ = data.shape
        grid = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in axes], indexing="ij")
        pos = torch.stack(grid, dim=-1).expand(b, *axes, 3)
        context = self.norm_context(torch.cat([data, pos], dim=-1).flatten(1, 3))
        x = self.latents.expand(b, -1, -1)
        x = self.attn(self.norm(x), context) + x
        return self.ff(x) + x


class SelfAttention(nn.Module):
    def __init__(self, num_classes, latent_dim=32):
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, latent_dim))
        self.norm = nn.LayerNorm(latent_dim)
        self.attn = Attention(latent_dim, latent_dim)
        self.ff = feed_forward(latent_dim)
        self.to_logits = nn.Sequential(nn.LayerNorm(latent_dim), nn.Linear(latent_dim, num_classes))

    def forward(self, x):
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        y = self.norm(x)
        x = self.attn(y, y) + x
        x = self.ff(x) + x
        return self.to_logits(x[:, 0])


class VideoModel(nn.Module):
    def __init__(self, num_classes, input_channels=None):
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv3d(1, 8, 3, stride=(1, 2, 2), padding=1),
            nn.BatchNorm3d(8),
            nn.ReLU(),
            nn.Conv3d(8, 16, 3, stride=(1, 2, 2), padding=1),
            nn.BatchNorm3d(16),
            nn.ReLU(),
        )
        self.self_attention = SelfAttention(num_classes)
        self.cross_attention = None
        if input_channels is not None:
            self.cross_attention = CrossAttention(input_channels)

    def forward(self, x):
        x = self.cnn(x).permute(0, 2, 3, 4, 1)
        if self.cross_attention is None:
            self.cross_attention = CrossAttention(x.shape[-1])
        return self.self_attention(self.cross_attention(x))


def evaluate(model, loader):
    model.eval()
    correct = total = 0
    with torch.no_grad():
        for clips, labels in loader:
            correct += (model(clips).argmax(dim=-1) == labels).sum().item()
            total += len(labels)
    model.train()
    return correct / total


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    images = (load_digits().images / 16).astype(np.float32)[rng.permutation(1797)]
    train_set = TensorDataset(*make_clips(images[:640], rng))
    test_set = TensorDataset(*make_clips(images[1397:], rng))
    order = torch.Generator().manual_seed(args.seed)
    train_loader = DataLoader(train_set, batch_size=16, shuffle=True, generator=order)
    test_loader = DataLoader(test_set, batch_size=128)

    model = VideoModel(len(MOTIONS), input_channels=16 if args.fixed else None)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3, weight_decay=1e-5)
    scheduler = CosineAnnealingLR(optimizer, args.epochs, eta_min=5e-4)
    for epoch in range(args.epochs):
        running = 0.0
        for clips, labels in train_loader:
            loss = criterion(model(clips), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            running += loss.item()
        scheduler.step()
        print(f"epoch {epoch + 1} train_loss {running / len(train_loader):.4f}")
    print(f"metric {evaluate(model, test_loader):.4f}")


if __name__ == "__main__":
    main()
