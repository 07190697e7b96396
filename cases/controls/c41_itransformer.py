"""iTransformer forecasting the next 12 steps of a multivariate series from the last 48."""
import argparse
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset


def make_series(length, n_vars, rng):
    t = np.arange(length)
    waves = []
    for period in (24.0, 17.0, 40.0):
        wander = np.cumsum(rng.normal(0, 0.04, length))                  # phase drifts slowly
        waves.append(np.sin(2 * np.pi * t / period + wander + rng.uniform(0, 6.28)))
    mix = rng.normal(0, 1, (3, n_vars))
    level = np.cumsum(rng.normal(0, 0.03, (length, n_vars)), axis=0)
    return np.stack(waves, 1) @ mix + level + rng.normal(0, 0.15, (length, n_vars))


class Dataset_Custom(Dataset):
    def __init__(self, data, seq_len, pred_len):
        self.data, self.seq_len, self.pred_len = data, seq_len, pred_len

    def __len__(self):
        return len(self.data) - self.seq_len - self.pred_len + 1

    def __getitem__(self, i):
        s_end = i + self.seq_len
        return self.data[i:s_end], self.data[s_end:s_end + self.pred_len]


class FullAttention(nn.Module):
    def __init__(self, attention_dropout=0.1):
        super().__init__()
        self.dropout = nn.Dropout(attention_dropout)

    def forward(self, queries, keys, values):
        B, L, H, E = queries.shape
        scale = 1.0 / math.sqrt(E)
        scores = torch.einsum("blhe,bshe->bhls", queries, keys)
        A = self.dropout(torch.softmax(scale * scores, dim=-1))
        V = torch.einsum("bhls,bshd->blhd", A, values)
        return V.contiguous()


class AttentionLayer(nn.Module):
    def __init__(self, attention, d_model, n_heads):
        super().__init__()
        self.inner_attention = attention
        self.query_projection = nn.Linear(d_model, d_model)
        self.key_projection = nn.Linear(d_model, d_model)
        self.value_projection = nn.Linear(d_model, d_model)
        self.out_projection = nn.Linear(d_model, d_model)
        self.n_heads = n_heads

    def forward(self, queries, keys, values):
        B, L, _ = queries.shape
        S, H = keys.shape[1], self.n_heads
        queries = self.query_projection(queries).view(B, L, H, -1)
        keys = self.key_projection(keys).view(B, S, H, -1)
        values = self.value_projection(values).view(B, S, H, -1)
        out = self.inner_attention(queries, keys, values)
        return self.out_projection(out.view(B, L, -1))


class EncoderLayer(nn.Module):
    def __init__(self, attention, d_model, d_ff, dropout=0.1):
        super().__init__()
        self.attention = attention
        self.conv1 = nn.Conv1d(d_model, d_ff, kernel_size=1)
        self.conv2 = nn.Conv1d(d_ff, d_model, kernel_size=1)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.dropout(self.attention(x, x, x))
        y = x = self.norm1(x)
        y = self.dropout(F.gelu(self.conv1(y.transpose(-1, 1))))
        y = self.dropout(self.conv2(y).transpose(-1, 1))
        return self.norm2(x + y)


class Model(nn.Module):
    def __init__(self, configs):
        super().__init__()
        self.enc_embedding = nn.Linear(configs.seq_len, configs.d_model)
        self.dropout = nn.Dropout(configs.dropout)
        self.encoder = nn.ModuleList([
            EncoderLayer(AttentionLayer(FullAttention(configs.dropout), configs.d_model, configs.n_heads),
                         configs.d_model, configs.d_ff, configs.dropout)
            for _ in range(configs.e_layers)])
        self.norm = nn.LayerNorm(configs.d_model)
        self.projector = nn.Linear(configs.d_model, configs.pred_len)

    def forward(self, x_enc):
        # normalization of the non-stationary Transformer; x_enc is B L N
        means = x_enc.mean(1, keepdim=True).detach()
        x_enc = x_enc - means
        stdev = torch.sqrt(torch.var(x_enc, dim=1, keepdim=True, unbiased=False) + 1e-5).detach()
        x_enc = x_enc / stdev

        enc_out = self.dropout(self.enc_embedding(x_enc.permute(0, 2, 1)))      # B N E
        for layer in self.encoder:
            enc_out = layer(enc_out)
        enc_out = self.norm(enc_out)
        dec_out = self.projector(enc_out).permute(0, 2, 1)                      # B S N
        return dec_out * stdev + means


@torch.no_grad()
def predict(model, loader):
    model.eval()
    preds, trues = [], []
    for batch_x, batch_y in loader:
        preds.append(model(batch_x))
        trues.append(batch_y)
    return torch.cat(preds), torch.cat(trues)


def main():
    parser = argparse.ArgumentParser(description="iTransformer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seq_len", type=int, default=48)
    parser.add_argument("--pred_len", type=int, default=12)
    parser.add_argument("--d_model", type=int, default=64)
    parser.add_argument("--d_ff", type=int, default=64)
    parser.add_argument("--n_heads", type=int, default=4)
    parser.add_argument("--e_layers", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--train_epochs", type=int, default=6)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    series = make_series(2600, 7, np.random.default_rng(args.seed))
    a, b = 1800, 2100
    mean, std = series[:a].mean(0), series[:a].std(0)
    series = torch.tensor((series - mean) / std, dtype=torch.float32)
    sets = [Dataset_Custom(part, args.seq_len, args.pred_len) for part in (series[:a], series[a:b], series[b:])]
    train_loader = DataLoader(sets[0], batch_size=32, shuffle=True, drop_last=True)
    vali_loader, test_loader = (DataLoader(s, batch_size=256) for s in sets[1:])

    model = Model(args)
    model_optim = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    criterion = nn.MSELoss()
    best, best_state = float("inf"), None
    for epoch in range(args.train_epochs):
        model.train()
        train_loss = []
        for batch_x, batch_y in train_loader:
            model_optim.zero_grad()
            loss = criterion(model(batch_x), batch_y)
            loss.backward()
            model_optim.step()
            train_loss.append(loss.item())
        pred, true = predict(model, vali_loader)
        vali_loss = criterion(pred, true).item()
        print(f"Epoch: {epoch + 1} | Train Loss: {np.mean(train_loss):.5f} Vali Loss: {vali_loss:.5f}")
        if vali_loss < best:
            best, best_state = vali_loss, {k: v.clone() for k, v in model.state_dict().items()}
        for group in model_optim.param_groups:
            group["lr"] = args.learning_rate * 0.6 ** (epoch + 1)

    model.load_state_dict(best_state)
    pred, true = predict(model, test_loader)
    r2 = 1 - ((pred - true) ** 2).sum() / ((true - true.mean()) ** 2).sum()
    print(f"test mse: {F.mse_loss(pred, true).item():.4f}, mae: {F.l1_loss(pred, true).item():.4f}")
    print(f"metric {r2.item():.4f}")


if __name__ == "__main__":
    main()
