"""Pre-trains a tiny HuBERT: masked prediction of k-means units of synthetic speech from the raw waveform."""
import argparse
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.cluster import KMeans

SR, HOP, N_FRAMES = 4000, 40, 32
N_SAMPLES = HOP * N_FRAMES
UNITS = [(300, 1100), (500, 1700), (250, 800), (700, 1400), (400, 1900), (600, 900)]
# words are fixed strings of sounds, so that a hidden stretch can be told from what surrounds it
WORDS = [(0, 1, 2), (3, 4, 5), (2, 0, 4), (5, 3, 1)]


def utterance(rng):
    sounds = []
    while len(sounds) * 6 < N_FRAMES + 6:
        sounds.extend(WORDS[rng.integers(len(WORDS))])
    pieces = []
    for u in sounds:
        n = int(rng.integers(5, 8)) * HOP
        t = np.arange(n) / SR
        f1, f2 = np.array(UNITS[u]) * rng.normal(1, 0.01)
        pieces.append(np.sin(2 * np.pi * f1 * t + rng.uniform(0, 6.28)) + np.sin(2 * np.pi * f2 * t + rng.uniform(0, 6.28)))
    x = np.concatenate(pieces)
    start = rng.integers(0, HOP)
    x = x[start:start + N_SAMPLES]
    x = np.pad(x, (0, N_SAMPLES - len(x)))
    x = x + 0.1 * rng.standard_normal(N_SAMPLES)
    return (x - x.mean()) / x.std()


def log_spectrum(wave):
    spec = torch.stft(wave, 80, HOP, window=torch.hann_window(80), return_complex=True).abs()
    return torch.log(spec + 0.5)[:, :, :N_FRAMES].transpose(1, 2)


class ConvFeatureExtractor(nn.Module):
    """Strided convolutions over the waveform; group norm (one group per channel) after the first only."""

    def __init__(self, dim, layers=((10, 5), (4, 4), (3, 2))):
        super().__init__()
        blocks, n_in = [], 1
        for i, (k, s) in enumerate(layers):
            mods = [nn.Conv1d(n_in, dim, k, s, bias=False)]
            nn.init.kaiming_normal_(mods[0].weight)
            if i == 0:
                mods.append(nn.GroupNorm(dim, dim))
            blocks.append(nn.Sequential(*mods, nn.GELU()))
            n_in = dim
        self.conv_layers = nn.ModuleList(blocks)

    def forward(self, wave):
        x = wave.unsqueeze(1)
        for conv in self.conv_layers:
            x = conv(x)
        return x


class TransformerSentenceEncoderLayer(nn.Module):
    def __init__(self, dim, heads, ffn, dropout):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=dropout)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.final_layer_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        y, _ = self.self_attn(x, x, x, need_weights=False)
        x = self.self_attn_layer_norm(x + self.dropout(y))
        y = self.fc2(F.gelu(self.fc1(x)))
        return self.final_layer_norm(x + self.dropout(y))


class TransformerEncoder(nn.Module):
    def __init__(self, dim, heads, ffn, layers, dropout=0.05, conv_pos=16, groups=4):
        super().__init__()
        conv = nn.Conv1d(dim, dim, conv_pos, padding=conv_pos // 2, groups=groups)
        nn.init.normal_(conv.weight, std=math.sqrt(4.0 / (conv_pos * dim)))
        nn.init.zeros_(conv.bias)
        self.pos_conv = nn.utils.parametrizations.weight_norm(conv, dim=2)
        self.layer_norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList([TransformerSentenceEncoderLayer(dim, heads, ffn, dropout) for _ in range(layers)])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):                                             # (batch, time, dim)
        pos = F.gelu(self.pos_conv(x.transpose(1, 2))[:, :, :-1])     # even kernel: drop the last step
        x = self.dropout(self.layer_norm(x + pos.transpose(1, 2)))
        x = x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return x.transpose(0, 1)


class Hubert(nn.Module):
    def __init__(self, n_classes, conv_dim=24, dim=48, final_dim=24, temp=0.1):
        super().__init__()
        self.feature_extractor = ConvFeatureExtractor(conv_dim)
        self.layer_norm = nn.LayerNorm(conv_dim)
        self.post_extract_proj = nn.Linear(conv_dim, dim)
        self.mask_emb = nn.Parameter(torch.empty(dim).uniform_())
        self.encoder = TransformerEncoder(dim, heads=4, ffn=96, layers=2)
        self.final_proj = nn.Linear(dim, final_dim)
        self.label_embs = nn.Parameter(torch.empty(n_classes, final_dim).uniform_())
        self.temp = temp

    def forward(self, wave, mask):
        features = self.feature_extractor(F.pad(wave, (20, 20)))
        pen = features.float().pow(2).mean()
        x = self.post_extract_proj(self.layer_norm(features.transpose(1, 2)[:, :mask.size(1)]))
        x = torch.where(mask.unsqueeze(-1), self.mask_emb, x)
        x = self.final_proj(self.encoder(x)[mask])
        logits = F.cosine_similarity(x.unsqueeze(1), self.label_embs.unsqueeze(0), dim=-1) / self.temp
        return logits, pen


def span_mask(batch, rng, prob=0.08, length=5):
    mask = np.zeros((batch, N_FRAMES), dtype=bool)
    n = int(prob * N_FRAMES)
    for row in mask:
        for s in rng.choice(N_FRAMES - length, n, replace=False):
            row[s:s + length] = True
    return torch.from_numpy(mask)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--updates", type=int, default=190)
    ap.add_argument("--clusters", type=int, default=8)
    ap.add_argument("--lr", type=float, default=4e-3)
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    waves = torch.tensor(np.stack([utterance(rng) for _ in range(360)]), dtype=torch.float32)
    train, valid = waves[:300], waves[300:]
    frames = log_spectrum(train)
    km = KMeans(args.clusters, n_init=1, random_state=args.seed)
    km.fit(frames[:40].flatten(0, 1).numpy())
    assign = lambda f: torch.from_numpy(km.predict(f.flatten(0, 1).numpy()).astype(np.int64)).view(f.shape[:2])
    train_labels, valid_labels = assign(frames), assign(log_spectrum(valid))

    model = Hubert(args.clusters)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    warm = int(0.08 * args.updates)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: (k + 1) / warm if k < warm else max(0.0, (args.updates - k) / (args.updates - warm)))

    model.train()
    for update in range(1, args.updates + 1):
        idx = torch.from_numpy(rng.choice(len(train), 8, replace=False))
        mask = span_mask(len(idx), rng)
        logits, pen = model(train[idx], mask)
        target = train_labels[idx][mask]
        loss = F.cross_entropy(logits, target) + 0.01 * pen
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        scheduler.step()
        if update % 40 == 0:
            acc = (logits.argmax(-1) == target).float().mean()
            print(f"update {update} loss {loss.item():.4f} masked accuracy {acc:.3f}")

    model.eval()
    mask = span_mask(len(valid), rng)
    with torch.no_grad():
        logits, _ = model(valid, mask)
    print(f"metric {(logits.argmax(-1) == valid_labels[mask]).float().mean().item():.4f}")


if __name__ == "__main__":
    main()
