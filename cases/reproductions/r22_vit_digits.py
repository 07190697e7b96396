"""Vision transformer on scikit-learn's digits (8x8 pixels, patches of 2x2)."""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x) + x


class PreNorm(nn.Module):
    def __init__(self, dim, fn):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x):
        return self.fn(self.norm(x))


class FeedForward(nn.Module):
    def __init__(self, dim, hidden_dim, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        return self.net(x)


class Attention(nn.Module):
    def __init__(self, dim, heads, dim_head, scale, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.scale = scale
        self.to_qkv = nn.Linear(dim, heads * dim_head * 3, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.to_qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dots = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
        attn = dots.softmax(dim=-1)
        out = torch.einsum("bhij,bhjd->bhid", attn, v)
        return self.to_out(out.transpose(1, 2).reshape(b, n, -1))


class ViT(nn.Module):
    def __init__(self, dim, depth, heads, dim_head, mlp_dim, scale, dropout=0.0):
        super().__init__()
        self.patch_to_embedding = nn.Linear(4, dim)
        self.pos_embedding = nn.Parameter(torch.randn(1, 17, dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.layers = nn.ModuleList([])
        for _ in range(depth):
            attention = Attention(dim, heads, dim_head, scale, dropout)
            mlp = FeedForward(dim, mlp_dim, dropout)
            self.layers.append(
                nn.ModuleList([Residual(PreNorm(dim, attention)), Residual(PreNorm(dim, mlp))])
            )
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 10))

    def forward(self, img):
        patches = img.unfold(1, 2, 2).unfold(2, 2, 2).reshape(len(img), 16, 4)
        x = self.patch_to_embedding(patches)
        x = torch.cat([self.cls_token.expand(len(img), -1, -1), x], dim=1) + self.pos_embedding
        for attn, ff in self.layers:
            x = ff(attn(x))
        return self.mlp_head(x[:, 0])


def test(model, loader):
    model.eval()
    loss, correct, n = 0.0, 0, 0
    with torch.no_grad():
        for images, labels in loader:
            logits = model(images)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += (logits.argmax(dim=1) == labels).sum().item()
            n += len(labels)
    return loss / n, correct / n


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    digits = load_digits()
    order = np.random.default_rng(args.seed).permutation(len(digits.target))
    images = torch.tensor(digits.images[order] / 16.0, dtype=torch.float32)
    labels = torch.tensor(digits.target[order])
    train_loader = DataLoader(
        TensorDataset(images[:1300], labels[:1300]), batch_size=20, shuffle=True
    )
    test_loader = DataLoader(TensorDataset(images[1300:], labels[1300:]), batch_size=100)

    dim, heads, dim_head = 48, 6, 8
    scale = dim_head**-0.5 if args.fixed else dim**-0.5
    model = ViT(dim, 2, heads, dim_head, 64, scale, dropout=0.1)
    optimizer = torch.optim.NAdam(model.parameters(), lr=2e-3)
    epochs = 3
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.3)
    for epoch in range(epochs):
        model.train()
        for batch, target in train_loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch), target)
            loss.backward()
            optimizer.step()
        scheduler.step()
        test_loss, acc = test(model, test_loader)
        print(f"epoch {epoch:2d}  train {loss.item():.3f}  test {test_loss:.3f}  acc {acc:.3f}")
    print(f"metric {acc:.4f}")


if __name__ == "__main__":
    main()
