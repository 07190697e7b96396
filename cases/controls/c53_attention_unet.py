"""Attention U-Net segmenting discs among distracting squares and noise."""
import argparse

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset


class Shapes(Dataset):
    def __init__(self, n, rng, size=28):
        yy, xx = np.mgrid[:size, :size]
        self.x = np.zeros((n, 1, size, size), np.float32)
        self.y = np.zeros((n, 1, size, size), np.float32)
        for i in range(n):
            for _ in range(rng.integers(1, 3)):
                cy, cx, r = rng.integers(5, size - 5), rng.integers(5, size - 5), rng.uniform(3.5, 7)
                self.y[i, 0] = np.maximum(self.y[i, 0], (yy - cy) ** 2 + (xx - cx) ** 2 <= r ** 2)
            image = self.y[i, 0] * rng.uniform(0.7, 1.2)
            for _ in range(rng.integers(1, 3)):
                y, x, s = rng.integers(0, size - 6), rng.integers(0, size - 6), rng.integers(5, 10)
                patch = np.s_[y:y + s, x:x + s]
                image[patch] = np.where(self.y[i, 0][patch] > 0, image[patch], rng.uniform(0.6, 1.1))
            self.x[i, 0] = image + rng.normal(0, 0.25, (size, size))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"image": torch.from_numpy(self.x[i]), "mask": torch.from_numpy(self.y[i])}


class ConvBlock(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True),
            nn.Conv2d(cout, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True))

    def forward(self, x):
        return self.conv(x)


class UpConv(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.up = nn.Sequential(
            nn.Upsample(scale_factor=2), nn.Conv2d(cin, cout, 3, padding=1, bias=False),
            nn.BatchNorm2d(cout), nn.ReLU(inplace=True))

    def forward(self, x):
        return self.up(x)


class AttentionGate(nn.Module):
    """psi = sigmoid(W_psi relu(W_g g + W_x x)) scales the skip connection x"""

    def __init__(self, f_g, f_l, f_int):
        super().__init__()
        self.W_g = nn.Sequential(nn.Conv2d(f_g, f_int, 1, bias=False), nn.BatchNorm2d(f_int))
        self.W_x = nn.Sequential(nn.Conv2d(f_l, f_int, 1, bias=False), nn.BatchNorm2d(f_int))
        self.psi = nn.Sequential(nn.Conv2d(f_int, 1, 1, bias=False), nn.BatchNorm2d(1), nn.Sigmoid())
        self.relu = nn.ReLU(inplace=True)

    def forward(self, g, x):
        return x * self.psi(self.relu(self.W_g(g) + self.W_x(x)))


class AttU_Net(nn.Module):
    def __init__(self, chans=(8, 16, 32)):
        super().__init__()
        c1, c2, c3 = chans
        self.pool = nn.MaxPool2d(2)
        self.Conv1, self.Conv2, self.Conv3 = ConvBlock(1, c1), ConvBlock(c1, c2), ConvBlock(c2, c3)
        self.Up3, self.Att3, self.Up_conv3 = UpConv(c3, c2), AttentionGate(c2, c2, c2 // 2), ConvBlock(2 * c2, c2)
        self.Up2, self.Att2, self.Up_conv2 = UpConv(c2, c1), AttentionGate(c1, c1, c1 // 2), ConvBlock(2 * c1, c1)
        self.Conv_1x1 = nn.Conv2d(c1, 1, 1)

    def forward(self, x):
        x1 = self.Conv1(x)
        x2 = self.Conv2(self.pool(x1))
        x3 = self.Conv3(self.pool(x2))
        d3 = self.Up3(x3)
        d3 = self.Up_conv3(torch.cat((self.Att3(d3, x2), d3), dim=1))
        d2 = self.Up2(d3)
        d2 = self.Up_conv2(torch.cat((self.Att2(d2, x1), d2), dim=1))
        return self.Conv_1x1(d2)


def criterion(logits, mask):
    prob = logits.sigmoid()
    inter = (prob * mask).sum(dim=(1, 2, 3))
    dice = (2 * inter + 1) / (prob.sum(dim=(1, 2, 3)) + mask.sum(dim=(1, 2, 3)) + 1)
    return F.binary_cross_entropy_with_logits(logits, mask) + 1 - dice.mean()


@torch.no_grad()
def mean_dice(model, loader):
    model.eval()
    scores = []
    for batch in loader:
        pred = (model(batch["image"]) > 0).float()
        inter = (pred * batch["mask"]).sum(dim=(1, 2, 3))
        scores.append(2 * inter / (pred.sum(dim=(1, 2, 3)) + batch["mask"].sum(dim=(1, 2, 3))))
    return torch.cat(scores).mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=5e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    train = DataLoader(Shapes(432, rng), batch_size=8, shuffle=True)
    val = DataLoader(Shapes(80, rng), batch_size=40)
    model = AttU_Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        for batch in train:
            loss = criterion(model(batch["image"]), batch["mask"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        scheduler.step()
        dice = mean_dice(model, val)
        print(f"epoch {epoch + 1}  train loss {total / len(train):.4f}  val dice {dice:.4f}")
    print(f"metric {dice:.4f}")


if __name__ == "__main__":
    main()
