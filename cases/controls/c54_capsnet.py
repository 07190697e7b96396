"""CapsNet with dynamic routing, margin loss and reconstruction on the 8x8 digits."""
import argparse

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits


def squash(s, dim=-1, eps=1e-8):
    sq = (s ** 2).sum(dim=dim, keepdim=True)
    return sq / (1.0 + sq) * s / torch.sqrt(sq + eps)


class PrimaryCaps(nn.Module):
    def __init__(self, in_channels, n_types, dim):
        super().__init__()
        self.dim = dim
        self.conv = nn.Conv2d(in_channels, n_types * dim, kernel_size=3, stride=2)

    def forward(self, x):
        u = self.conv(x)                                               # B, types*dim, H, W
        B, _, H, W = u.shape
        u = u.view(B, -1, self.dim, H, W).permute(0, 1, 3, 4, 2)
        return squash(u.reshape(B, -1, self.dim))


class DigitCaps(nn.Module):
    def __init__(self, n_in, dim_in, n_out=10, dim_out=12, iterations=3):
        super().__init__()
        self.iterations = iterations
        self.W = nn.Parameter(0.1 * torch.randn(n_out, n_in, dim_in, dim_out))

    def forward(self, u):
        u_hat = torch.einsum('bid,oide->boie', u, self.W)              # prediction vectors
        u_fixed = u_hat.detach()                                       # no gradient through the agreement
        b = torch.zeros(u_hat.shape[:3])
        for _ in range(self.iterations - 1):
            c = F.softmax(b, dim=1)                                    # over the output capsules
            v = squash(torch.einsum('boi,boie->boe', c, u_fixed))
            b = b + torch.einsum('boie,boe->boi', u_fixed, v)
        c = F.softmax(b, dim=1)
        return squash(torch.einsum('boi,boie->boe', c, u_hat))


class CapsNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3)
        self.primary = PrimaryCaps(32, n_types=12, dim=8)
        self.digits = DigitCaps(n_in=12 * 2 * 2, dim_in=8)
        self.decoder = nn.Sequential(
            nn.Linear(10 * 12, 64), nn.ReLU(inplace=True),
            nn.Linear(64, 128), nn.ReLU(inplace=True),
            nn.Linear(128, 64), nn.Sigmoid(),
        )

    def forward(self, x, y=None):
        v = self.digits(self.primary(F.relu(self.conv1(x))))
        lengths = v.norm(dim=-1)
        if y is None:
            y = lengths.argmax(dim=1)
        mask = F.one_hot(y, 10).to(v.dtype)
        recon = self.decoder((v * mask.unsqueeze(-1)).flatten(1))
        return lengths, recon


def margin_loss(lengths, y, m_pos=0.9, m_neg=0.1, lam=0.5):
    T = F.one_hot(y, 10).to(lengths.dtype)
    L = T * F.relu(m_pos - lengths) ** 2 + lam * (1 - T) * F.relu(lengths - m_neg) ** 2
    return L.sum(dim=1).mean()


parser = argparse.ArgumentParser()
parser.add_argument('--seed', type=int, default=0)
parser.add_argument('--epochs', type=int, default=10)
parser.add_argument('--batch_size', type=int, default=64)
parser.add_argument('--lam_recon', type=float, default=0.005)
args = parser.parse_args()
torch.set_num_threads(1)
torch.manual_seed(args.seed)

images, target = load_digits(return_X_y=True)
order = np.random.default_rng(args.seed).permutation(len(images))
images = torch.tensor(images[order], dtype=torch.float32).view(-1, 1, 8, 8) / 16.0
target = torch.tensor(target[order])
x_train, y_train = images[:1400], target[:1400]
x_test, y_test = images[1400:], target[1400:]

model = CapsNet()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.85)


def test():
    model.eval()
    with torch.no_grad():
        lengths, recon = model(x_test)
        mse = F.mse_loss(recon, x_test.flatten(1)).item()
    return (lengths.argmax(1) == y_test).float().mean().item(), mse


for epoch in range(args.epochs):
    model.train()
    total = 0.0
    batches = torch.randperm(len(x_train)).split(args.batch_size)
    for idx in batches:
        x, y = x_train[idx], y_train[idx]
        lengths, recon = model(x, y)
        rec_loss = (recon - x.flatten(1)).pow(2).sum(dim=1).mean()
        loss = margin_loss(lengths, y) + args.lam_recon * rec_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    scheduler.step()
    acc, mse = test()
    print('==> Epoch %02d: loss=%.5f, test_acc=%.4f, recon_mse=%.4f' % (epoch, total / len(batches), acc, mse))

print('metric %.4f' % test()[0])
