"""Speech-to-text style Transformer encoder with a strided convolutional subsampler, trained with CTC on toy utterances."""
import argparse
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

N_PHONES, N_MEL, BLANK = 8, 16, 0


def synthesize(n, templates, rng):
    """Utterances: phones without immediate repeats, 6 to 11 frames each, a speaker offset and noise."""
    utts = []
    for _ in range(n):
        length = int(rng.integers(3, 7))
        phones = [int(rng.integers(N_PHONES))]
        while len(phones) < length:
            p = int(rng.integers(N_PHONES))
            if p != phones[-1]:
                phones.append(p)
        frames = np.concatenate([np.repeat(templates[p][None], rng.integers(6, 12), axis=0) for p in phones])
        frames = frames + 0.5 * rng.standard_normal(N_MEL) + 0.8 * rng.standard_normal(frames.shape)
        utts.append((torch.tensor(frames, dtype=torch.float32), torch.tensor(phones) + 1))
    return utts


def collate(utts):
    src_lengths = torch.tensor([len(f) for f, _ in utts])
    src = torch.zeros(len(utts), int(src_lengths.max()), N_MEL)
    for i, (f, _) in enumerate(utts):
        src[i, : len(f)] = f
    targets = torch.cat([p for _, p in utts])
    target_lengths = torch.tensor([len(p) for _, p in utts])
    return src, src_lengths, targets, target_lengths


def lengths_to_padding_mask(lengths, max_len):
    return torch.arange(max_len)[None, :] >= lengths[:, None]


class Conv1dSubsampler(nn.Module):
    def __init__(self, in_channels, mid_channels, out_channels, kernel_sizes=(5, 5)):
        super().__init__()
        self.kernel_sizes = kernel_sizes
        n = len(kernel_sizes)
        self.conv_layers = nn.ModuleList(
            nn.Conv1d(in_channels if i == 0 else mid_channels // 2,
                      mid_channels if i < n - 1 else out_channels * 2, k, stride=2, padding=k // 2)
            for i, k in enumerate(kernel_sizes))

    def forward(self, src, lengths):
        x = src.transpose(1, 2)                       # B x C x T
        for conv, k in zip(self.conv_layers, self.kernel_sizes):
            x = F.glu(conv(x), dim=1)
            lengths = (lengths + 2 * (k // 2) - k) // 2 + 1
            x = x.masked_fill(lengths_to_padding_mask(lengths, x.size(2))[:, None, :], 0.0)
        return x.permute(2, 0, 1), lengths            # T x B x C


class SinusoidalPositions(nn.Module):
    def __init__(self, dim, max_len=256):
        super().__init__()
        pos = torch.arange(max_len)[:, None].float()
        freq = torch.exp(torch.arange(0, dim, 2).float() * (-math.log(10000.0) / dim))
        table = torch.zeros(max_len, dim)
        table[:, 0::2], table[:, 1::2] = torch.sin(pos * freq), torch.cos(pos * freq)
        self.register_buffer("table", table[:, None, :])

    def forward(self, x):
        return x + self.table[: x.size(0)]


class TransformerEncoderLayer(nn.Module):
    def __init__(self, dim, heads, ffn, dropout):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=dropout)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.final_layer_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, padding_mask):
        y = self.self_attn_layer_norm(x)
        y, _ = self.self_attn(y, y, y, key_padding_mask=padding_mask, need_weights=False)
        x = x + self.dropout(y)
        y = self.fc2(self.dropout(F.relu(self.fc1(self.final_layer_norm(x)))))
        return x + self.dropout(y)


class S2TEncoder(nn.Module):
    def __init__(self, dim=48, heads=4, layers=2, dropout=0.05):
        super().__init__()
        self.subsample = Conv1dSubsampler(N_MEL, 64, dim)
        self.embed_scale = math.sqrt(dim)
        self.positions = SinusoidalPositions(dim)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(TransformerEncoderLayer(dim, heads, dim * 2, dropout) for _ in range(layers))
        self.layer_norm = nn.LayerNorm(dim)
        self.ctc_proj = nn.Linear(dim, N_PHONES + 1)

    def forward(self, src, src_lengths):
        x, lengths = self.subsample(src, src_lengths)
        padding_mask = lengths_to_padding_mask(lengths, x.size(0))
        x = self.dropout(self.positions(self.embed_scale * x))
        for layer in self.layers:
            x = layer(x, padding_mask)
        return {"log_probs": self.ctc_proj(self.layer_norm(x)).log_softmax(-1), "lengths": lengths}


def edit_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        prev, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            prev, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, prev + (x != y))
    return row[-1]


@torch.no_grad()
def phone_accuracy(model, utts):
    """1 - phone error rate of the greedy CTC path."""
    model.eval()
    src, src_lengths, _, _ = collate(utts)
    out = model(src, src_lengths)
    best = out["log_probs"].argmax(-1).t()
    errors = total = 0
    for path, n, (_, ref) in zip(best, out["lengths"], utts):
        hyp = [int(p) for p in torch.unique_consecutive(path[:n]) if p != BLANK]
        errors += edit_distance(hyp, ref.tolist())
        total += len(ref)
    return 1.0 - errors / total


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--lr", type=float, default=4e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    templates = rng.standard_normal((N_PHONES, N_MEL))
    train, valid = synthesize(800, templates, rng), synthesize(150, templates, rng)

    model = S2TEncoder()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.98))
    warmup = 40
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda u: min((u + 1) / warmup, math.sqrt(warmup / (u + 1))))

    for update in range(1, args.updates + 1):
        model.train()
        batch = [train[i] for i in rng.choice(len(train), 16, replace=False)]
        src, src_lengths, targets, target_lengths = collate(batch)
        out = model(src, src_lengths)
        loss = F.ctc_loss(out["log_probs"], targets, out["lengths"], target_lengths, blank=BLANK)
        optimizer.zero_grad()
        loss.backward()
        gnorm = nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        scheduler.step()
        if update % 50 == 0:
            print(f"update {update} | ctc_loss {loss.item():.3f} | gnorm {gnorm.item():.2f}")

    print(f"metric {phone_accuracy(model, valid):.4f}")


if __name__ == "__main__":
    main()
