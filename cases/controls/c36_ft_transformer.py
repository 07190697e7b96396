"""FT-Transformer regressing the price of used cars from numerical and categorical columns (generated table)."""
import argparse
import math
import typing as ty

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.init as nn_init
from sklearn.preprocessing import QuantileTransformer
from torch import Tensor


def make_table(n, rng):
    age = rng.gamma(2.5, 2.5, n)
    km = age * rng.normal(14, 4, n).clip(3) + rng.exponential(5, n)
    power = rng.normal(110, 35, n).clip(45)
    owners = rng.poisson(1 + age / 8)
    width = rng.normal(180, 6, n)                                        # says nothing about the price
    brand = rng.integers(0, 6, n)
    fuel = rng.integers(0, 3, n)
    gearbox = rng.integers(0, 2, n)
    color = rng.integers(0, 8, n)                                        # nor does this
    level = np.array([-0.6, -0.2, 0.0, 0.2, 0.5, 0.9])[brand]
    wear = np.array([0.14, 0.06, 0.10])[fuel]
    y = (level + 0.010 * power * (1 + 0.6 * (brand >= 4)) - wear * age - 0.004 * km
         + 0.35 * gearbox * (power > 110) - 0.1 * owners + rng.normal(0, 0.12, n))
    return np.stack([age, km, power, owners, width], 1), np.stack([brand, fuel, gearbox, color], 1), y


class Tokenizer(nn.Module):
    category_offsets: ty.Optional[Tensor]

    def __init__(self, d_numerical: int, categories: ty.List[int], d_token: int) -> None:
        super().__init__()
        d_bias = d_numerical + len(categories)
        offsets = torch.tensor([0] + categories[:-1]).cumsum(0)
        self.register_buffer("category_offsets", offsets)
        self.category_embeddings = nn.Embedding(sum(categories), d_token)
        nn_init.kaiming_uniform_(self.category_embeddings.weight, a=math.sqrt(5))
        # the additional weight is the [CLS] token
        self.weight = nn.Parameter(torch.empty(d_numerical + 1, d_token))
        self.bias = nn.Parameter(torch.empty(d_bias, d_token))
        nn_init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn_init.kaiming_uniform_(self.bias, a=math.sqrt(5))

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        x_num = torch.cat([torch.ones(len(x_num), 1), x_num], dim=1)
        x = self.weight[None] * x_num[:, :, None]
        x = torch.cat([x, self.category_embeddings(x_cat + self.category_offsets[None])], dim=1)
        bias = torch.cat([torch.zeros(1, self.bias.shape[1]), self.bias])
        return x + bias[None]


class MultiheadAttention(nn.Module):
    def __init__(self, d: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.W_q, self.W_k, self.W_v, self.W_out = (nn.Linear(d, d) for _ in range(4))
        self.n_heads = n_heads
        self.dropout = nn.Dropout(dropout)
        for m in (self.W_q, self.W_k, self.W_v):
            nn_init.xavier_uniform_(m.weight, gain=1 / math.sqrt(2))
            nn_init.zeros_(m.bias)
        nn_init.zeros_(self.W_out.bias)

    def _reshape(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        dh = d // self.n_heads
        return x.reshape(b, n, self.n_heads, dh).transpose(1, 2).reshape(b * self.n_heads, n, dh)

    def forward(self, x_q: Tensor, x_kv: Tensor) -> Tensor:
        q, k, v = self._reshape(self.W_q(x_q)), self._reshape(self.W_k(x_kv)), self._reshape(self.W_v(x_kv))
        attention = F.softmax(q @ k.transpose(1, 2) / math.sqrt(k.shape[-1]), dim=-1)
        x = self.dropout(attention) @ v
        b, n = len(x_q), q.shape[1]
        x = x.reshape(b, self.n_heads, n, -1).transpose(1, 2).reshape(b, n, -1)
        return self.W_out(x)


def reglu(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return a * F.relu(b)


class FTTransformer(nn.Module):
    def __init__(self, d_numerical, categories, d_token=32, n_layers=3, n_heads=4, d_ffn_factor=4 / 3,
                 attention_dropout=0.05, ffn_dropout=0.05, d_out=1) -> None:
        super().__init__()
        self.tokenizer = Tokenizer(d_numerical, categories, d_token)
        d_hidden = int(d_token * d_ffn_factor)
        self.layers = nn.ModuleList()
        for i in range(n_layers):
            layer = nn.ModuleDict({
                "attention": MultiheadAttention(d_token, n_heads, attention_dropout),
                "linear0": nn.Linear(d_token, d_hidden * 2),
                "linear1": nn.Linear(d_hidden, d_token),
                "norm1": nn.LayerNorm(d_token),
            })
            if i:                                     # pre-normalization, but not in front of the first attention
                layer["norm0"] = nn.LayerNorm(d_token)
            self.layers.append(layer)
        self.ffn_dropout = ffn_dropout
        self.last_normalization = nn.LayerNorm(d_token)
        self.head = nn.Linear(d_token, d_out)

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        x = self.tokenizer(x_num, x_cat)
        for i, layer in enumerate(self.layers):
            is_last = i + 1 == len(self.layers)
            h = layer["norm0"](x) if i else x
            # only [CLS] is read by the head, so the last layer needs no other query
            h = layer["attention"](h[:, :1] if is_last else h, h)
            x = (x[:, :1] if is_last else x) + h
            h = reglu(layer["linear0"](layer["norm1"](x)))
            x = x + layer["linear1"](F.dropout(h, self.ffn_dropout, self.training))
        x = self.head(F.relu(self.last_normalization(x[:, 0])))
        return x.squeeze(-1)

    def optimization_param_groups(self):
        no_wd = ("tokenizer", "norm", ".bias")
        decayed = [p for n, p in self.named_parameters() if not any(s in n for s in no_wd)]
        rest = [p for n, p in self.named_parameters() if any(s in n for s in no_wd)]
        return [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]


@torch.no_grad()
def r2(model, x_num, x_cat, y) -> float:
    model.eval()
    pred = torch.cat([model(a, b) for a, b in zip(x_num.split(512), x_cat.split(512))])
    return (1 - ((pred - y) ** 2).sum() / ((y - y.mean()) ** 2).sum()).item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    num, cat, y = make_table(3000, rng)
    n_train = 2400
    qt = QuantileTransformer(output_distribution="normal", n_quantiles=240, random_state=args.seed)
    qt.fit(num[:n_train])
    x_num = torch.tensor(qt.transform(num), dtype=torch.float32)
    x_cat = torch.tensor(cat)
    mean, std = y[:n_train].mean(), y[:n_train].std()
    y = torch.tensor((y - mean) / std, dtype=torch.float32)
    categories = [6, 3, 2, 8]

    model = FTTransformer(x_num.shape[1], categories)
    optimizer = torch.optim.AdamW(model.optimization_param_groups(), lr=1e-3, weight_decay=1e-5)
    for epoch in range(1, 9):
        model.train()
        losses = []
        for idx in torch.randperm(n_train).split(64):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x_num[idx], x_cat[idx]), y[idx])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: train mse {np.mean(losses):.4f}")
    print(f"metric {r2(model, x_num[n_train:], x_cat[n_train:], y[n_train:]):.4f}")


if __name__ == "__main__":
    main()
