"""Houlsby adapters: a Transformer is pretrained on the digits 0-4, frozen, and adapted to tell 5-9 apart."""
import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F


class Adapter(nn.Module):
    """Bottleneck with a skip connection, close to the identity at the start."""

    def __init__(self, d_model, bottleneck):
        super().__init__()
        self.down = nn.Linear(d_model, bottleneck)
        self.up = nn.Linear(bottleneck, d_model)
        for lin in (self.down, self.up):
            nn.init.trunc_normal_(lin.weight, std=1e-2, a=-2e-2, b=2e-2)
            nn.init.zeros_(lin.bias)

    def forward(self, x):
        return x + self.up(F.gelu(self.down(x)))


class EncoderLayer(nn.Module):
    def __init__(self, d_model, n_heads, dropout):
        super().__init__()
        self.attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout, batch_first=True)
        self.ln1 = nn.LayerNorm(d_model)
        self.fc1 = nn.Linear(d_model, 2 * d_model)
        self.fc2 = nn.Linear(2 * d_model, d_model)
        self.ln2 = nn.LayerNorm(d_model)
        self.drop = nn.Dropout(dropout)
        self.adapter1 = self.adapter2 = None

    def insert_adapters(self, bottleneck):
        d_model = self.fc1.in_features
        self.adapter1, self.adapter2 = Adapter(d_model, bottleneck), Adapter(d_model, bottleneck)

    def forward(self, x):
        h = self.drop(self.attn(x, x, x, need_weights=False)[0])
        if self.adapter1 is not None:
            h = self.adapter1(h)
        x = self.ln1(x + h)
        h = self.drop(self.fc2(F.gelu(self.fc1(x))))
        if self.adapter2 is not None:
            h = self.adapter2(h)
        return self.ln2(x + h)


class Backbone(nn.Module):
    def __init__(self, d_in=8, n_tokens=8, d_model=48, n_heads=4, n_layers=3, dropout=0.05):
        super().__init__()
        self.embed = nn.Linear(d_in, d_model)
        self.cls = nn.Parameter(torch.randn(1, 1, d_model) * 0.02)
        self.pos = nn.Parameter(torch.randn(1, n_tokens + 1, d_model) * 0.02)
        self.ln = nn.LayerNorm(d_model)
        self.layers = nn.ModuleList(EncoderLayer(d_model, n_heads, dropout) for _ in range(n_layers))
        self.d_model = d_model

    def forward(self, rows):
        x = torch.cat([self.cls.expand(len(rows), -1, -1), self.embed(rows)], dim=1)
        x = self.ln(x + self.pos)
        for layer in self.layers:
            x = layer(x)
        return x[:, 0]


def fit(model, params, x, y, steps, lr, batch_size=32):
    params = list(params)
    opt = torch.optim.Adam(params, lr=lr)
    # linear warm-up over a tenth of the steps, then linear decay
    warm = steps // 10
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min((s + 1) / warm, (steps - s) / (steps - warm)))
    model.train()
    for step in range(1, steps + 1):
        idx = torch.randint(len(x), (batch_size,))
        loss = F.cross_entropy(model(x[idx]), y[idx])
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        sched.step()
        if step % 50 == 0:
            print(f"  step {step}: loss {loss.item():.4f}")


@torch.no_grad()
def accuracy(model, x, y):
    model.eval()
    return (model(x).argmax(-1) == y).float().mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bottleneck", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1          # a row of pixels is a token
    y = torch.tensor(digits.target)
    held_back = torch.zeros(len(y), dtype=torch.bool)
    held_back[torch.randperm(len(y))[:450]] = True
    source, target = y < 5, y >= 5

    print("pretraining on 0-4")
    backbone = Backbone()
    pretrained = nn.Sequential(backbone, nn.Linear(backbone.d_model, 5))
    fit(pretrained, pretrained.parameters(), x[source & ~held_back], y[source & ~held_back], steps=180, lr=2e-3)
    print(f"  accuracy on 0-4: {accuracy(pretrained, x[source & held_back], y[source & held_back]):.4f}")

    print("adapter tuning on 5-9")
    backbone.requires_grad_(False)
    for layer in backbone.layers:
        layer.insert_adapters(args.bottleneck)
    for module in backbone.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)
    model = nn.Sequential(backbone, nn.Linear(backbone.d_model, 5))
    trainable = [p for p in model.parameters() if p.requires_grad]
    total = sum(p.numel() for p in model.parameters())
    print(f"  training {sum(p.numel() for p in trainable)} of {total} parameters")
    fit(model, trainable, x[target & ~held_back], y[target & ~held_back] - 5, steps=220, lr=4e-3)
    print(f"metric {accuracy(model, x[target & held_back], y[target & held_back] - 5):.4f}")


if __name__ == "__main__":
    main()
