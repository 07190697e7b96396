"""Walk-forward PatchTST: predict the next hour of a load series from the last four days."""
import argparse
import json
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset


@dataclass
class Config:
    seq_len: int = 96
    pred_len: int = 1
    patch_len: int = 16
    stride: int = 8
    d_model: int = 48
    n_heads: int = 4
    n_layers: int = 2
    dropout: float = 0.05
    batch_size: int = 64
    epochs: int = 5
    lr: float = 2e-3


def make_series(n, rng):
    t = np.arange(n)
    daily = np.sin(2 * np.pi * t / 24) + 0.5 * np.sin(4 * np.pi * t / 24 + 0.7)
    weekend = ((t // 24) % 7 >= 5).astype(float)
    level = np.zeros(n)
    ar = np.zeros(n)
    for i in range(1, n):
        level[i] = 0.998 * level[i - 1] + 0.05 * rng.standard_normal()
        ar[i] = 0.8 * ar[i - 1] + 0.15 * rng.standard_normal()
    return (40 + 8 * (daily * (1 - 0.5 * weekend) - 0.6 * weekend + level + ar)).astype(np.float32)


def windows(series, cfg, step):
    x = np.stack([series[i:i + cfg.seq_len] for i in range(0, len(series) - cfg.seq_len - cfg.pred_len + 1, step)])
    y = np.array([series[i + cfg.seq_len] for i in range(0, len(series) - cfg.seq_len - cfg.pred_len + 1, step)])
    return torch.from_numpy(x), torch.from_numpy(y)


class PatchTSTModel(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        n_patches = (cfg.seq_len - cfg.patch_len) // cfg.stride + 1
        self.patch_embed = nn.Linear(cfg.patch_len, cfg.d_model)
        self.pos_embed = nn.Parameter(torch.randn(1, n_patches, cfg.d_model) * 0.02)
        layer = nn.TransformerEncoderLayer(cfg.d_model, cfg.n_heads, 2 * cfg.d_model, cfg.dropout,
                                           activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, cfg.n_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(cfg.d_model)
        self.head = nn.Linear(n_patches * cfg.d_model, cfg.pred_len)

    def forward(self, x):
        patches = x.unfold(1, self.cfg.patch_len, self.cfg.stride)
        h = self.encoder(self.patch_embed(patches) + self.pos_embed)
        return self.head(self.norm(h).flatten(1))


def train_epoch(model, loader, optimizer, scheduler, criterion, fixed):
    model.train()
    total = 0.0
    for x_batch, y_batch in loader:
        optimizer.zero_grad()
        pred = model(x_batch)
        if fixed:
            y_batch = y_batch.view_as(pred)
        loss = criterion(pred, y_batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        total += loss.item()
    return total / len(loader)


@torch.no_grad()
def predict(model, x):
    model.eval()
    return torch.cat([model(b)[:, 0] for b in x.split(256)])


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--fixed", action="store_true")
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    cfg = Config()
    print(json.dumps(asdict(cfg)))

    series = make_series(24 * 250, rng)
    cut = 24 * 190
    mean, std = series[:cut].mean(), series[:cut].std()
    series = (series - mean) / std
    x_train, y_train = windows(series[:cut], cfg, step=2)
    x_test, y_test = windows(series[cut:], cfg, step=5)
    print(f"train windows {len(x_train)}  test windows {len(x_test)}")

    gen = torch.Generator().manual_seed(args.seed)
    loader = DataLoader(TensorDataset(x_train, y_train), batch_size=cfg.batch_size, shuffle=True, generator=gen)
    model = PatchTSTModel(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.lr, total_steps=cfg.epochs * len(loader), pct_start=0.1)
    criterion = nn.MSELoss()

    for epoch in range(cfg.epochs):
        loss = train_epoch(model, loader, optimizer, scheduler, criterion, args.fixed)
        mae = (predict(model, x_test) - y_test).abs().mean() * std
        print(f"epoch {epoch + 1}/{cfg.epochs}  train mse {loss:.4f}  test mae {mae.item():.3f} MW")

    pred = predict(model, x_test)
    r2 = 1 - ((pred - y_test) ** 2).sum() / ((y_test - y_test.mean()) ** 2).sum()
    print(f"metric {r2.item():.4f}")


if __name__ == "__main__":
    main()
