"""Informer forecaster: ProbSparse encoder with distilling, start-token decoder, hourly load series."""
import argparse
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


def make_series(hours, seed):
    rng = np.random.default_rng(seed)
    t = np.arange(hours)
    hour, day = t % 24, (t // 24) % 7
    weekend = np.where(day >= 5, 0.5, 1.0)
    base = np.sin(2 * np.pi * (hour - 8) / 24) + 0.5 * np.sin(4 * np.pi * (hour - 3) / 24)
    level, level_path = 0.0, []
    for _ in t:
        level = 0.99 * level + 0.06 * rng.normal()
        level_path.append(level)
    level = np.array(level_path)
    noise = 0.12 * rng.normal(size=(hours, 3))
    y = np.stack([weekend * base + level, 0.8 * np.roll(base, 4) - level, 0.6 * weekend + np.cos(2 * np.pi * hour / 12) + level], 1)
    return (y + noise).astype(np.float32), np.stack([hour, day], 1)


class ProbAttention(nn.Module):
    def __init__(self, factor=3):
        super().__init__()
        self.factor = factor

    def forward(self, q, k, v):
        B, L_Q, H, D = q.shape
        L_K = k.shape[1]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        n_sample = min(self.factor * math.ceil(math.log(L_K)), L_K)
        n_top = min(self.factor * math.ceil(math.log(L_Q)), L_Q)

        with torch.no_grad():   # sparsity measure of each query from a random sample of keys
            index = torch.randint(L_K, (L_Q, n_sample))
            k_sample = k[:, :, index]                                        # B H L_Q n D
            qk = torch.einsum("bhld,bhlnd->bhln", q, k_sample)
            M = qk.max(-1)[0] - qk.sum(-1) / L_K
            top = M.topk(n_top, sorted=False)[1]
        gather = top.unsqueeze(-1).expand(-1, -1, -1, D)
        scores = torch.matmul(q.gather(2, gather), k.transpose(-2, -1)) / math.sqrt(D)
        update = torch.matmul(torch.softmax(scores, dim=-1), v)
        context = v.mean(dim=2, keepdim=True).expand(B, H, L_Q, D)           # lazy queries take the mean
        return context.scatter(2, gather, update).transpose(1, 2)


class FullAttention(nn.Module):
    def __init__(self, causal=False):
        super().__init__()
        self.causal = causal

    def forward(self, q, k, v):
        scores = torch.einsum("blhe,bshe->bhls", q, k)
        if self.causal:
            L = q.shape[1]
            scores = scores.masked_fill(torch.triu(torch.ones(L, L, dtype=torch.bool), 1), -np.inf)
        A = torch.softmax(scores / math.sqrt(q.shape[-1]), dim=-1)
        return torch.einsum("bhls,bshd->blhd", A, v)


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
        out = self.inner_attention(
            self.query_projection(queries).view(B, L, H, -1),
            self.key_projection(keys).view(B, S, H, -1),
            self.value_projection(values).view(B, S, H, -1),
        )
        return self.out_projection(out.reshape(B, L, -1))


class DataEmbedding(nn.Module):
    def __init__(self, c_in, d_model, dropout):
        super().__init__()
        self.token = nn.Conv1d(c_in, d_model, 3, padding=1, padding_mode="circular", bias=False)
        self.hour = nn.Embedding(24, d_model)
        self.weekday = nn.Embedding(7, d_model)
        pos = torch.arange(200).unsqueeze(1)
        div = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        pe = torch.zeros(200, d_model)
        pe[:, 0::2], pe[:, 1::2] = torch.sin(pos * div), torch.cos(pos * div)
        self.register_buffer("pe", pe)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mark):
        tok = self.token(x.transpose(1, 2)).transpose(1, 2)
        return self.dropout(tok + self.pe[: x.shape[1]] + self.hour(mark[..., 0]) + self.weekday(mark[..., 1]))


class EncoderLayer(nn.Module):
    def __init__(self, d_model, n_heads, d_ff, dropout):
        super().__init__()
        self.attention = AttentionLayer(ProbAttention(), d_model, n_heads)
        self.conv1, self.conv2 = nn.Conv1d(d_model, d_ff, 1), nn.Conv1d(d_ff, d_model, 1)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = self.norm1(x + self.dropout(self.attention(x, x, x)))
        y = self.dropout(F.gelu(self.conv1(x.transpose(-1, 1))))
        y = self.dropout(self.conv2(y).transpose(-1, 1))
        return self.norm2(x + y)


class DistilLayer(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.conv = nn.Conv1d(d_model, d_model, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm1d(d_model)
        self.pool = nn.MaxPool1d(3, stride=2, padding=1)

    def forward(self, x):
        return self.pool(F.elu(self.norm(self.conv(x.transpose(1, 2))))).transpose(1, 2)


class DecoderLayer(nn.Module):
    def __init__(self, d_model, n_heads, d_ff, dropout):
        super().__init__()
        self.self_attention = AttentionLayer(FullAttention(causal=True), d_model, n_heads)
        self.cross_attention = AttentionLayer(FullAttention(), d_model, n_heads)
        self.conv1, self.conv2 = nn.Conv1d(d_model, d_ff, 1), nn.Conv1d(d_ff, d_model, 1)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d_model), nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, cross):
        x = self.norm1(x + self.dropout(self.self_attention(x, x, x)))
        x = self.norm2(x + self.dropout(self.cross_attention(x, cross, cross)))
        y = self.dropout(F.gelu(self.conv1(x.transpose(-1, 1))))
        y = self.dropout(self.conv2(y).transpose(-1, 1))
        return self.norm3(x + y)


class Informer(nn.Module):
    def __init__(self, c, pred_len, d_model=32, n_heads=4, d_ff=64, dropout=0.05):
        super().__init__()
        self.pred_len = pred_len
        self.enc_embedding = DataEmbedding(c, d_model, dropout)
        self.dec_embedding = DataEmbedding(c, d_model, dropout)
        self.enc1 = EncoderLayer(d_model, n_heads, d_ff, dropout)
        self.distil = DistilLayer(d_model)
        self.enc2 = EncoderLayer(d_model, n_heads, d_ff, dropout)
        self.enc_norm = nn.LayerNorm(d_model)
        self.decoder = DecoderLayer(d_model, n_heads, d_ff, dropout)
        self.dec_norm = nn.LayerNorm(d_model)
        self.projection = nn.Linear(d_model, c)

    def forward(self, x_enc, x_mark_enc, x_dec, x_mark_dec):
        enc = self.enc1(self.enc_embedding(x_enc, x_mark_enc))
        enc = self.enc_norm(self.enc2(self.distil(enc)))
        dec = self.dec_norm(self.decoder(self.dec_embedding(x_dec, x_mark_dec), enc))
        return self.projection(dec)[:, -self.pred_len:]


def windows(series, mark, starts, seq_len, label_len, pred_len):
    enc = torch.from_numpy(np.stack([series[s: s + seq_len] for s in starts]))
    enc_mark = torch.from_numpy(np.stack([mark[s: s + seq_len] for s in starts]))
    begin = seq_len - label_len
    dec_mark = torch.from_numpy(np.stack([mark[s + begin: s + seq_len + pred_len] for s in starts]))
    y = torch.from_numpy(np.stack([series[s + seq_len: s + seq_len + pred_len] for s in starts]))
    dec = torch.cat([enc[:, begin:], torch.zeros_like(y)], dim=1)    # start token, then placeholders
    return enc, enc_mark, dec, dec_mark, y


def main():
    parser = argparse.ArgumentParser(description="[Informer] long sequence forecasting")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seq_len", type=int, default=48)
    parser.add_argument("--label_len", type=int, default=24)
    parser.add_argument("--pred_len", type=int, default=24)
    parser.add_argument("--train_steps", type=int, default=165)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed + 100)

    series, mark = make_series(24 * 150, args.seed)
    split = 24 * 115
    mean, std = series[:split].mean(0), series[:split].std(0)
    series = (series - mean) / std
    lens = (args.seq_len, args.label_len, args.pred_len)
    span = args.seq_len + args.pred_len
    test = windows(series, mark, range(split, len(series) - span + 1, 6), *lens)

    model = Informer(series.shape[1], args.pred_len)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    criterion = nn.MSELoss()
    model.train()
    for step in range(1, args.train_steps + 1):
        starts = rng.integers(0, split - span + 1, args.batch_size)
        *inputs, y = windows(series, mark, starts, *lens)
        optimizer.zero_grad()
        loss = criterion(model(*inputs), y)
        loss.backward()
        optimizer.step()
        if step % 40 == 0:
            print(f"\titers: {step} | loss: {loss.item():.5f}")
            for group in optimizer.param_groups:
                group["lr"] *= 0.5

    model.eval()
    with torch.no_grad():
        *inputs, y = test
        pred = model(*inputs)
    r2 = 1 - ((pred - y) ** 2).sum() / ((y - y.mean((0, 1))) ** 2).sum()
    print(f"metric {r2.item():.4f}")


if __name__ == "__main__":
    main()
