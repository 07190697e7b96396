"""Variational autoencoder for digits; the encoder is a small transformer over patches, the KL term is annealed."""
import argparse

import numpy as np
import torch
import torch.nn as nn
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

SIGMA = 0.15


def patchify(x, p=2):
    """(B, 8, 8) -> (B, 16, 4)"""
    b, s, _ = x.shape
    return x.view(b, s // p, p, s // p, p).permute(0, 1, 3, 2, 4).reshape(b, -1, p * p)


class AttentionPool(nn.Module):
    """One learned query gathers the tokens into a vector."""

    def __init__(self, d, heads):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, d))
        self.attn = nn.MultiheadAttention(d, heads, batch_first=True)

    def forward(self, tokens):
        out, _ = self.attn(self.query.expand(tokens.size(0), -1, -1), tokens, tokens, need_weights=False)
        return out.squeeze(1)


class Encoder(nn.Module):
    def __init__(self, d=48, heads=4, layers=1, latent=10):
        super().__init__()
        self.proj = nn.Linear(4, d)
        self.pos = nn.Parameter(torch.randn(1, 16, d) * 0.5)
        layer = nn.TransformerEncoderLayer(d, heads, 2 * d, dropout=0.0, activation="gelu",
                                           batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(d), enable_nested_tensor=False)
        self.pool = AttentionPool(d, heads)
        self.mu, self.logvar = nn.Linear(d, latent), nn.Linear(d, latent)

    def forward(self, x):
        h = self.pool(self.blocks(self.proj(patchify(x)) + self.pos))
        return self.mu(h), self.logvar(h)


class Decoder(nn.Module):
    def __init__(self, latent=10, hidden=128):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                                 nn.Linear(hidden, 64))

    def forward(self, z):
        return torch.sigmoid(self.net(z)).view(-1, 8, 8)


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()

    def forward(self, x):
        mu, logvar = self.encoder(x)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu) if self.training else mu
        return self.decoder(z), mu, logvar


def loss_terms(mean, x, mu, logvar):
    # Gaussian likelihood with a fixed standard deviation, constants left out
    recon = (0.5 * (mean - x).pow(2) / SIGMA ** 2).sum(dim=(1, 2)).mean()
    kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(dim=1).mean()
    return recon, kl


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=11)
    parser.add_argument("--anneal-epochs", type=float, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    images = torch.tensor(load_digits().images / 16.0, dtype=torch.float32)
    order = torch.from_numpy(np.random.RandomState(args.seed).permutation(len(images)))
    train_x, test_x = images[order[:1500]], images[order[1500:]]
    loader = DataLoader(TensorDataset(train_x), batch_size=30, shuffle=True)

    vae = VAE()
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3, fused=True)
    step = 0
    for epoch in range(1, args.epochs + 1):
        vae.train()
        sums = np.zeros(2)
        for (x,) in loader:
            beta = min(1.0, (step + 1) / (args.anneal_epochs * len(loader)))
            mean, mu, logvar = vae(x)
            recon, kl = loss_terms(mean, x, mu, logvar)
            optimizer.zero_grad(set_to_none=True)
            (recon + beta * kl).backward()
            optimizer.step()
            sums += recon.item(), kl.item()
            step += 1
        recon, kl = sums / len(loader)
        print(f"epoch {epoch:2d}  beta {beta:.2f}  recon {recon:.3f}  kl {kl:.3f}")

    vae.eval()
    with torch.no_grad():
        rebuilt = vae(test_x)[0]
    r2 = 1 - (test_x - rebuilt).pow(2).sum() / (test_x - test_x.mean(0)).pow(2).sum()
    print(f"metric {r2.item():.4f}")


if __name__ == "__main__":
    main()
