"""Trains a small SepFormer to separate mixtures of two synthetic voices (permutation-invariant SI-SNR)."""
import argparse
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

SR, N_SAMPLES = 4000, 1280


def voice(rng, low, high, n_harmonics):
    t = np.arange(N_SAMPLES) / SR
    f0 = rng.uniform(low, high) * (1 + 0.03 * np.sin(2 * np.pi * rng.uniform(3, 6) * t + rng.uniform(0, 6.28)))
    phase = 2 * np.pi * np.cumsum(f0) / SR
    x = sum(rng.uniform(0.5, 1.0) / k * np.sin(k * phase + rng.uniform(0, 6.28)) for k in range(1, n_harmonics + 1))
    env = 0.6 + 0.4 * np.sin(2 * np.pi * rng.uniform(2, 8) * t + rng.uniform(0, 6.28))
    x = x * env
    return x / x.std()


def make_mixtures(n, rng):
    sources = []
    for _ in range(n):
        pair = [voice(rng, 80, 140, 4), voice(rng, 700, 1100, 1)]
        if rng.random() < 0.5:
            pair = pair[::-1]
        gain = 10 ** (rng.uniform(-2.5, 2.5) / 20)
        sources.append([pair[0] * gain, pair[1] / gain])
    s = torch.tensor(np.array(sources), dtype=torch.float32)
    return s.sum(1), s


class SelfAttention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.heads = heads

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class TransformerLayer(nn.Module):
    def __init__(self, d, heads, d_ff):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = SelfAttention(d, heads)
        self.ffn = nn.Sequential(nn.Linear(d, d_ff), nn.ReLU(), nn.Linear(d_ff, d))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class SBTransformerBlock(nn.Module):
    """Transformer layers on sequences; positions are added before, a long skip is added after."""

    def __init__(self, d, layers, heads, d_ff, max_len=64):
        super().__init__()
        self.layers = nn.ModuleList([TransformerLayer(d, heads, d_ff) for _ in range(layers)])
        self.norm = nn.LayerNorm(d)
        pos = torch.arange(max_len).unsqueeze(1)
        freq = torch.exp(torch.arange(0, d, 2) * (-math.log(10000.0) / d))
        pe = torch.zeros(max_len, d)
        pe[:, 0::2], pe[:, 1::2] = torch.sin(pos * freq), torch.cos(pos * freq)
        self.register_buffer("pe", pe)

    def forward(self, x):
        y = x + self.pe[:x.size(1)]
        for layer in self.layers:
            y = layer(y)
        return self.norm(y)


class DualPathBlock(nn.Module):
    def __init__(self, d, layers, heads, d_ff):
        super().__init__()
        self.intra = SBTransformerBlock(d, layers, heads, d_ff)
        self.inter = SBTransformerBlock(d, layers, heads, d_ff)
        self.intra_norm, self.inter_norm = nn.GroupNorm(1, d, eps=1e-8), nn.GroupNorm(1, d, eps=1e-8)

    def forward(self, x):                                      # (batch, d, chunk size, chunks)
        b, d, k, s = x.shape
        y = self.intra(x.permute(0, 3, 2, 1).reshape(b * s, k, d))
        x = x + self.intra_norm(y.view(b, s, k, d).permute(0, 3, 2, 1))
        y = self.inter(x.permute(0, 2, 3, 1).reshape(b * k, s, d))
        return x + self.inter_norm(y.view(b, k, s, d).permute(0, 3, 1, 2))


class SepFormer(nn.Module):
    def __init__(self, d=32, kernel=16, chunk=16, blocks=1, layers=2, heads=4, d_ff=64, n_src=2):
        super().__init__()
        self.encoder = nn.Conv1d(1, d, kernel, stride=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(1, d, eps=1e-8)
        self.bottleneck = nn.Conv1d(d, d, 1, bias=False)
        self.blocks = nn.ModuleList([DualPathBlock(d, layers, heads, d_ff) for _ in range(blocks)])
        self.prelu = nn.PReLU()
        self.split = nn.Conv2d(d, d * n_src, 1)
        self.output, self.output_gate = nn.Conv1d(d, d, 1), nn.Conv1d(d, d, 1)
        self.end = nn.Conv1d(d, d, 1, bias=False)
        self.decoder = nn.ConvTranspose1d(d, 1, kernel, stride=kernel // 2, bias=False)
        self.chunk, self.n_src = chunk, n_src

    def segment(self, x):
        """Overlapping chunks (half a chunk of hop), (b, d, t) -> (b, d, chunk, n)."""
        hop = self.chunk // 2
        gap = (-x.size(2)) % hop
        x = F.pad(x, (hop, hop + gap))
        return x.unfold(2, self.chunk, hop).transpose(2, 3), gap

    def merge(self, x, gap):
        b, d, k, s = x.shape
        hop = k // 2
        y = F.fold(x.reshape(b, d * k, s), (1, hop * (s + 1)), (1, k), stride=(1, hop)).squeeze(2)
        return y[..., hop:y.size(2) - hop - gap]

    def forward(self, mix):
        w = F.relu(self.encoder(mix.unsqueeze(1)))             # (b, d, t)
        x, gap = self.segment(self.bottleneck(self.norm(w)))
        for block in self.blocks:
            x = block(x)
        b, d, k, s = x.shape
        x = self.split(self.prelu(x)).view(b * self.n_src, d, k, s)
        x = self.merge(x, gap)
        x = torch.tanh(self.output(x)) * torch.sigmoid(self.output_gate(x))
        masks = F.relu(self.end(x)).view(b, self.n_src, d, -1)
        est = self.decoder((masks * w.unsqueeze(1)).flatten(0, 1)).view(b, self.n_src, -1)
        return F.pad(est, (0, mix.size(1) - est.size(2)))


def si_snr(est, ref):
    est, ref = est - est.mean(-1, keepdim=True), ref - ref.mean(-1, keepdim=True)
    target = (est * ref).sum(-1, keepdim=True) * ref / (ref.pow(2).sum(-1, keepdim=True) + 1e-8)
    noise = est - target
    return 10 * torch.log10((target.pow(2).sum(-1) + 1e-8) / (noise.pow(2).sum(-1) + 1e-8))


def pit_si_snr(est, ref):
    straight, swapped = si_snr(est, ref).mean(1), si_snr(est, ref.flip(1)).mean(1)
    return torch.maximum(straight, swapped)


def run(args):
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    mix, src = make_mixtures(500, rng)
    test_mix, test_src = make_mixtures(60, rng)

    net = SepFormer()
    opt = torch.optim.Adam(net.parameters(), lr=args.lr)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, args.steps, eta_min=args.lr / 20)
    for step in range(args.steps):
        idx = torch.randint(len(mix), (args.batch,))
        loss = -pit_si_snr(net(mix[idx]), src[idx]).mean()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5)
        opt.step()
        sched.step()
        if (step + 1) % 30 == 0:
            print(f"step {step + 1}: SI-SNR {-loss.item():.2f} dB")
    net.eval()
    with torch.no_grad():
        score = pit_si_snr(net(test_mix), test_src)
        unprocessed = si_snr(test_mix.unsqueeze(1).expand_as(test_src), test_src).mean(1)
    print(f"SI-SNR {score.mean():.2f} dB, mixture {unprocessed.mean():.2f} dB")
    print(f"metric {(score - unprocessed).mean().item():.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=3)
    parser.add_argument("--lr", type=float, default=3e-3)
    torch.set_num_threads(1)
    run(parser.parse_args())
