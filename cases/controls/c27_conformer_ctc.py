"""Small Conformer encoder with CTC on synthetic log-mel utterances of a few phones."""
import argparse
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

N_PHONES, N_MELS, N_FRAMES = 6, 20, 64
BLANK = 0


def synth_corpus(n, rng):
    """Fixed-length windows that are completely filled with phones and pauses."""
    f1 = np.array([3, 6, 9, 4, 8, 5], dtype=np.float32)
    f2 = np.array([11, 16, 13, 17, 18, 13], dtype=np.float32)
    glide = np.array([0, 1.5, -1.5, -1.0, 0, 2.0], dtype=np.float32)
    mel = np.arange(N_MELS, dtype=np.float32)
    feats = rng.normal(0, 0.35, size=(n, N_FRAMES, N_MELS)).astype(np.float32)
    labels = []
    for i in range(n):
        k = int(rng.integers(3, 7))
        seq = rng.integers(0, N_PHONES, size=k)
        speaker, gain = rng.normal(0, 0.4), rng.uniform(1.5, 2.2)
        cuts = np.sort(rng.choice(np.arange(1, (N_FRAMES - 8 * k) + k), size=k, replace=False)) - np.arange(k)
        # phone j takes eight frames plus a pause of random length before it
        for j, ph in enumerate(seq):
            t0 = cuts[j] + 8 * j
            tau = np.linspace(-0.5, 0.5, 8, dtype=np.float32)[:, None]
            for f in (f1, f2):
                centre = f[ph] + speaker + glide[ph] * tau
                feats[i, t0:t0 + 8] += gain * np.exp(-0.5 * ((mel - centre) / 1.1) ** 2)
        labels.append(torch.from_numpy(seq + 1))
    return torch.from_numpy(feats), labels


class FeedForwardModule(nn.Sequential):
    def __init__(self, d, mult=2, p=0.05):
        super().__init__(nn.LayerNorm(d), nn.Linear(d, mult * d), nn.SiLU(), nn.Dropout(p),
                         nn.Linear(mult * d, d), nn.Dropout(p))


class RelPositionMHSA(nn.Module):
    """Self-attention with Transformer-XL relative sinusoidal positions."""

    def __init__(self, d, heads, p=0.05):
        super().__init__()
        self.h, self.dk = heads, d // heads
        self.norm = nn.LayerNorm(d)
        self.linear_q = nn.Linear(d, d)
        self.linear_k = nn.Linear(d, d)
        self.linear_v = nn.Linear(d, d)
        self.linear_pos = nn.Linear(d, d, bias=False)
        self.linear_out = nn.Linear(d, d)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, self.dk))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, self.dk))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)
        self.attn_drop, self.drop = nn.Dropout(p), nn.Dropout(p)

    @staticmethod
    def rel_shift(x):
        # (B, h, T, 2T-1), columns are distances T-1 ... -(T-1)  ->  (B, h, T, T)
        b, h, t, n = x.shape
        x = F.pad(x, (1, 0)).view(b, h, n + 1, t)
        return x[:, :, 1:].reshape(b, h, t, n)[..., :t]

    def forward(self, x, pos_emb):
        b, t, _ = x.shape
        x = self.norm(x)
        q = self.linear_q(x).view(b, t, self.h, self.dk)
        k = self.linear_k(x).view(b, t, self.h, self.dk).permute(0, 2, 3, 1)
        v = self.linear_v(x).view(b, t, self.h, self.dk).transpose(1, 2)
        pos = self.linear_pos(pos_emb).view(2 * t - 1, self.h, self.dk).permute(1, 2, 0)
        content = torch.matmul((q + self.pos_bias_u).transpose(1, 2), k)
        position = self.rel_shift(torch.matmul((q + self.pos_bias_v).transpose(1, 2), pos))
        attn = torch.softmax((content + position) / math.sqrt(self.dk), dim=-1)
        out = torch.matmul(self.attn_drop(attn), v).transpose(1, 2).reshape(b, t, -1)
        return self.drop(self.linear_out(out))


class ConvolutionModule(nn.Module):
    def __init__(self, d, kernel=7, p=0.05):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.pointwise1 = nn.Conv1d(d, 2 * d, 1)
        self.depthwise = nn.Conv1d(d, d, kernel, padding=(kernel - 1) // 2, groups=d, bias=False)
        self.bn = nn.BatchNorm1d(d)
        self.pointwise2 = nn.Conv1d(d, d, 1)
        self.drop = nn.Dropout(p)

    def forward(self, x):
        x = self.norm(x).transpose(1, 2)
        x = F.glu(self.pointwise1(x), dim=1)
        x = F.silu(self.bn(self.depthwise(x)))
        return self.drop(self.pointwise2(x)).transpose(1, 2)


class ConformerBlock(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.ff1 = FeedForwardModule(d)
        self.mhsa = RelPositionMHSA(d, heads)
        self.conv = ConvolutionModule(d)
        self.ff2 = FeedForwardModule(d)
        self.norm = nn.LayerNorm(d)

    def forward(self, x, pos_emb):
        x = x + 0.5 * self.ff1(x)
        x = x + self.mhsa(x, pos_emb)
        x = x + self.conv(x)
        x = x + 0.5 * self.ff2(x)
        return self.norm(x)


def relative_sinusoids(t, d):
    dist = torch.arange(t - 1, -t, -1.0)[:, None]
    freq = torch.exp(torch.arange(0, d, 2.0) * (-math.log(10000.0) / d))
    pe = torch.zeros(2 * t - 1, d)
    pe[:, 0::2], pe[:, 1::2] = torch.sin(dist * freq), torch.cos(dist * freq)
    return pe


class ConformerCTC(nn.Module):
    def __init__(self, d=40, heads=4, blocks=2, channels=8):
        super().__init__()
        self.subsample = nn.Sequential(nn.Conv2d(1, channels, 3, stride=2, padding=1), nn.ReLU())
        self.input = nn.Linear(channels * (N_MELS // 2), d)
        self.blocks = nn.ModuleList([ConformerBlock(d, heads) for _ in range(blocks)])
        self.output = nn.Linear(d, N_PHONES + 1)
        self.register_buffer("pos_emb", relative_sinusoids(N_FRAMES // 2, d), persistent=False)

    def forward(self, feats):
        x = self.subsample(feats[:, None])                     # (B, C, T/2, F/2)
        x = self.input(x.transpose(1, 2).flatten(2))
        for block in self.blocks:
            x = block(x, self.pos_emb)
        return self.output(x).log_softmax(-1)


def greedy(log_probs):
    hyps = []
    for path in log_probs.argmax(-1).tolist():
        hyps.append([p for i, p in enumerate(path) if p != BLANK and (i == 0 or p != path[i - 1])])
    return hyps


def edit_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        prev, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            prev, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, prev + (x != y))
    return row[-1]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--peak_lr", type=float, default=4e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    feats, labels = synth_corpus(1700, rng)
    n_train = 1500
    mean, std = feats[:n_train].mean((0, 1)), feats[:n_train].std((0, 1))
    feats = (feats - mean) / std

    model = ConformerCTC()
    opt = torch.optim.AdamW(model.parameters(), lr=args.peak_lr, betas=(0.9, 0.98), eps=1e-9, weight_decay=1e-4)
    warm = 40
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min((s + 1) / warm, (warm / (s + 1)) ** 0.5))
    ctc = nn.CTCLoss(blank=BLANK)

    for step in range(1, args.steps + 1):
        model.train()
        idx = torch.from_numpy(rng.choice(n_train, size=16, replace=False))
        target = [labels[i] for i in idx.tolist()]
        log_probs = model(feats[idx])
        in_len = torch.full((len(idx),), log_probs.shape[1], dtype=torch.long)
        tgt_len = torch.tensor([len(t) for t in target])
        loss = ctc(log_probs.transpose(0, 1), torch.cat(target), in_len, tgt_len)
        opt.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        opt.step()
        sched.step()
        if step % 30 == 0:
            print(f"step {step} | ctc {loss.item():.3f} | grad {norm.item():.2f} | lr {sched.get_last_lr()[0]:.2e}")

    model.eval()
    with torch.no_grad():
        hyps = greedy(model(feats[n_train:]))
    refs = [l.tolist() for l in labels[n_train:]]
    errors = sum(edit_distance(h, r) for h, r in zip(hyps, refs))
    per = errors / sum(map(len, refs))
    print(f"phone error rate {per:.4f}")
    print(f"metric {1 - per:.4f}")


if __name__ == "__main__":
    main()
