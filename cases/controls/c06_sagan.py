"""Class-conditional SAGAN on 8x8 digits, judged by a classifier fitted to generated and scored on real images."""
import argparse

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.utils import spectral_norm

parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--iters", type=int, default=210)
parser.add_argument("--batch_size", type=int, default=32)
parser.add_argument("--z_dim", type=int, default=16)
parser.add_argument("--g_lr", type=float, default=2e-3)
parser.add_argument("--d_lr", type=float, default=4e-3)
opt = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(opt.seed)
np.random.seed(opt.seed)


class Self_Attn(nn.Module):
    """ Self attention Layer"""

    def __init__(self, in_dim):
        super().__init__()
        self.query_conv = spectral_norm(nn.Conv2d(in_dim, in_dim // 8, kernel_size=1))
        self.key_conv = spectral_norm(nn.Conv2d(in_dim, in_dim // 8, kernel_size=1))
        self.value_conv = spectral_norm(nn.Conv2d(in_dim, in_dim, kernel_size=1))
        self.gamma = nn.Parameter(torch.zeros(1))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        B, C, width, height = x.size()
        proj_query = self.query_conv(x).view(B, -1, width * height).permute(0, 2, 1)   # B x N x C/8
        proj_key = self.key_conv(x).view(B, -1, width * height)                        # B x C/8 x N
        energy = torch.bmm(proj_query, proj_key)
        attention = self.softmax(energy)                                               # B x N x N
        proj_value = self.value_conv(x).view(B, -1, width * height)                    # B x C x N
        out = torch.bmm(proj_value, attention.permute(0, 2, 1))
        out = out.view(B, C, width, height)
        return self.gamma * out + x


class CondBatchNorm(nn.Module):
    def __init__(self, ch, n_classes):
        super().__init__()
        self.bn = nn.BatchNorm2d(ch, affine=False)
        self.embed = nn.Embedding(n_classes, ch * 2)
        self.embed.weight.data[:, :ch].fill_(1.0)
        self.embed.weight.data[:, ch:].zero_()

    def forward(self, x, y):
        gamma, beta = self.embed(y)[:, :, None, None].chunk(2, 1)
        return gamma * self.bn(x) + beta


class Generator(nn.Module):
    def __init__(self, z_dim, conv_dim=32, n_classes=10):
        super().__init__()
        self.l1 = spectral_norm(nn.ConvTranspose2d(z_dim, conv_dim * 2, 2, bias=False))
        self.n1 = CondBatchNorm(conv_dim * 2, n_classes)
        self.l2 = spectral_norm(nn.ConvTranspose2d(conv_dim * 2, conv_dim, 4, 2, 1, bias=False))
        self.n2 = CondBatchNorm(conv_dim, n_classes)
        self.attn = Self_Attn(conv_dim)
        self.last = nn.ConvTranspose2d(conv_dim, 1, 4, 2, 1)

    def forward(self, z, y):
        out = F.relu(self.n1(self.l1(z[:, :, None, None]), y))      # 2 x 2
        out = F.relu(self.n2(self.l2(out), y))                      # 4 x 4
        out = self.attn(out)
        return torch.tanh(self.last(out))                           # 8 x 8


class Discriminator(nn.Module):
    def __init__(self, conv_dim=32, n_classes=10):
        super().__init__()
        self.l1 = spectral_norm(nn.Conv2d(1, conv_dim, 4, 2, 1))
        self.attn = Self_Attn(conv_dim)
        self.l2 = spectral_norm(nn.Conv2d(conv_dim, conv_dim * 2, 4, 2, 1))
        self.last = spectral_norm(nn.Linear(conv_dim * 2, 1))
        self.embed = spectral_norm(nn.Embedding(n_classes, conv_dim * 2))

    def forward(self, x, y):
        h = F.leaky_relu(self.l1(x), 0.1)                           # 4 x 4
        h = self.attn(h)
        h = F.leaky_relu(self.l2(h), 0.1).sum(dim=(2, 3))
        return self.last(h).squeeze(1) + (self.embed(y) * h).sum(1)


digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8.0 - 1.0
labels = torch.tensor(digits.target)
i_tr, i_te = train_test_split(np.arange(len(labels)), test_size=0.25, random_state=opt.seed, stratify=digits.target)
loader = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(images[i_tr], labels[i_tr]),
    batch_size=opt.batch_size, shuffle=True, drop_last=True)


def forever(dl):
    while True:
        yield from dl


G, D = Generator(opt.z_dim), Discriminator()
g_optimizer = torch.optim.Adam(G.parameters(), opt.g_lr, betas=(0.0, 0.9))
d_optimizer = torch.optim.Adam(D.parameters(), opt.d_lr, betas=(0.0, 0.9))

data = forever(loader)
G.train()
D.train()
for it in range(1, opt.iters + 1):
    # --- discriminator ---
    real, y = next(data)
    z = torch.randn(len(y), opt.z_dim)
    y_fake = torch.randint(0, 10, (len(y),))
    with torch.no_grad():
        fake = G(z, y_fake)
    d_loss_real = F.relu(1.0 - D(real, y)).mean()
    d_loss_fake = F.relu(1.0 + D(fake, y_fake)).mean()
    d_loss = d_loss_real + d_loss_fake
    d_optimizer.zero_grad()
    d_loss.backward()
    d_optimizer.step()

    # --- generator ---
    for p in D.parameters():
        p.requires_grad_(False)
    z = torch.randn(opt.batch_size, opt.z_dim)
    y_fake = torch.randint(0, 10, (opt.batch_size,))
    g_loss = -D(G(z, y_fake), y_fake).mean()
    g_optimizer.zero_grad()
    g_loss.backward()
    g_optimizer.step()
    for p in D.parameters():
        p.requires_grad_(True)

    if it % 50 == 0:
        print(f"[{it}/{opt.iters}] d_loss {d_loss.item():.4f} g_loss {g_loss.item():.4f} "
              f"gamma_G {G.attn.gamma.item():.4f} gamma_D {D.attn.gamma.item():.4f}")

G.eval()
with torch.no_grad():
    y_gen = torch.arange(10).repeat(100)
    x_gen = G(torch.randn(len(y_gen), opt.z_dim), y_gen)
clf = KNeighborsClassifier(5).fit(x_gen.flatten(1).numpy(), y_gen.numpy())
acc = clf.score(images[i_te].flatten(1).numpy(), labels[i_te].numpy())
print(f"metric {acc:.4f}")
