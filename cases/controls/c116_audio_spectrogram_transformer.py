import argparse, math
import numpy as np, torch, torch.nn as nn
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

# Audio Spectrogram Transformer for tagging short synthetic clips with several labels each.

SR, LEN, NFFT, HOP, MELS = 4000, 4000, 256, 64, 32
TAGS = ["upsweep", "downsweep", "beeps", "clicks", "hum", "hiss"]


def synth(rng, n):
    t = np.arange(LEN) / SR
    wav = np.zeros((n, LEN), np.float32)
    lab = (rng.random((n, len(TAGS))) < 0.35).astype(np.float32)
    for i in range(n):
        w = 0.05 * rng.standard_normal(LEN)
        dur = rng.uniform(0.35, 0.6)
        on = rng.uniform(0, 1 - dur)
        for c in np.flatnonzero(lab[i]):
            g = rng.uniform(0.2, 0.5)
            win = ((t >= on) & (t < on + dur)) * 1.0
            u = np.clip(t - on, 0, dur)
            lo, hi = rng.uniform(250, 500), rng.uniform(1000, 1700)
            if c == 0:
                w += g * win * np.sin(2 * np.pi * (lo * u + (hi - lo) * u ** 2 / (2 * dur)))
            elif c == 1:
                w += g * win * np.sin(2 * np.pi * (hi * u - (hi - lo) * u ** 2 / (2 * dur)))
            elif c == 2:
                w += 1.5 * g * np.sin(2 * np.pi * rng.uniform(600, 1400) * t) * ((t * rng.uniform(5, 8)) % 1 < 0.4)
            elif c == 3:
                for p in rng.integers(0, LEN - 20, rng.integers(4, 9)):
                    w[p:p + 12] += 3 * g * rng.choice([-1, 1], 12)
            elif c == 4:
                f0 = rng.uniform(70, 110)
                w += g * (np.sin(2 * np.pi * f0 * t) + 0.5 * np.sin(4 * np.pi * f0 * t))
            else:
                nz = rng.standard_normal(LEN)
                w += 0.6 * g * win * np.diff(nz, prepend=0.0)
        wav[i] = w
    return torch.from_numpy(wav), torch.from_numpy(lab)


def mel_matrix():
    mel = lambda f: 1127 * np.log1p(f / 700)
    inv = lambda m: 700 * np.expm1(m / 1127)
    edges = inv(np.linspace(mel(20), mel(SR / 2), MELS + 2))
    f = np.linspace(0, SR / 2, NFFT // 2 + 1)
    fb = np.zeros((MELS, len(f)), np.float32)
    for m in range(MELS):
        a, b, c = edges[m:m + 3]
        fb[m] = np.clip(np.minimum((f - a) / (b - a), (c - f) / (c - b)), 0, None)
    return torch.from_numpy(fb)


def fbank(wav):
    spec = torch.stft(wav, NFFT, HOP, window=torch.hann_window(NFFT, periodic=False), center=False,
                      return_complex=True).abs() ** 2
    return torch.log(mel_matrix() @ spec + 1e-4).unsqueeze(1)       # B,1,mel,time


class AST(nn.Module):
    def __init__(self, frames, dim=40, depth=2, heads=4, patch=8, stride=6):
        super().__init__()
        self.proj = nn.Conv2d(1, dim, patch, stride=stride)          # overlapping patches
        n = ((MELS - patch) // stride + 1) * ((frames - patch) // stride + 1)
        self.cls = nn.Parameter(torch.empty(1, 1, dim))
        self.dist = nn.Parameter(torch.empty(1, 1, dim))
        self.pos = nn.Parameter(torch.empty(1, n + 2, dim))
        for p in (self.cls, self.dist, self.pos):
            nn.init.trunc_normal_(p, std=0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout=0.0, activation="gelu", batch_first=True,
                                       norm_first=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, len(TAGS)))

    def forward(self, x):
        x = self.proj(x).flatten(2).transpose(1, 2)
        b = len(x)
        x = torch.cat([self.cls.expand(b, -1, -1), self.dist.expand(b, -1, -1), x], 1) + self.pos
        for l in self.layers:
            x = l(x)
        x = self.norm(x)
        return self.mlp_head((x[:, 0] + x[:, 1]) / 2)


def spec_augment(x, fmax=4, tmax=8):
    x = x.clone()
    for i in range(len(x)):
        f, t = np.random.randint(0, fmax + 1), np.random.randint(0, tmax + 1)
        f0, t0 = np.random.randint(0, x.shape[2] - f + 1), np.random.randint(0, x.shape[3] - t + 1)
        x[i, :, f0:f0 + f] = 0
        x[i, :, :, t0:t0 + t] = 0
    return x


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--steps", type=int, default=200)
    a = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(a.seed)
    np.random.seed(a.seed)
    rng = np.random.default_rng(a.seed)
    xtr, ytr = synth(rng, 700)
    xte, yte = synth(rng, 200)
    xtr, xte = fbank(xtr), fbank(xte)
    mean, std = xtr.mean(), xtr.std()
    xtr, xte = (xtr - mean) / (2 * std), (xte - mean) / (2 * std)
    print("log mel", tuple(xtr.shape), "prevalence", [round(v, 3) for v in yte.mean(0).tolist()])

    net = AST(xtr.shape[-1])
    opt = torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.95, 0.999), weight_decay=5e-7)
    warm = 20
    sched = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda s: min(1.0, (s + 1) / warm) * 0.5 ** sum(s >= m for m in (120, 150, 180)))
    avg, navg = None, 0
    for step in range(1, a.steps + 1):
        i = np.random.randint(0, len(xtr), 16)
        x, y = xtr[i], ytr[i]
        if np.random.rand() < 0.5:                                   # mixup within the batch
            lam = np.random.beta(10, 10)
            p = torch.randperm(len(i))
            x, y = lam * x + (1 - lam) * x[p], lam * y + (1 - lam) * y[p]
        loss = F.binary_cross_entropy_with_logits(net(spec_augment(x)), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        sched.step()
        if step > 150 and step % 10 == 0:                            # weight averaging of late checkpoints
            sd = {k: v.detach().clone() for k, v in net.state_dict().items()}
            navg += 1
            avg = sd if avg is None else {k: avg[k] + (sd[k] - avg[k]) / navg for k in sd}
        if step % 40 == 0:
            print(f"[{step}/{a.steps}] bce {loss.item():.4f} lr {sched.get_last_lr()[0]:.2e}")
    net.load_state_dict(avg)
    net.eval()
    with torch.no_grad():
        prob = torch.sigmoid(net(xte)).numpy()
    ap_ = [average_precision_score(yte[:, c].numpy(), prob[:, c]) for c in range(len(TAGS))]
    for n, v in zip(TAGS, ap_):
        print(f"  AP {n:10s} {v:.3f}")
    print(f"constant mAP {yte.mean().item():.4f}")
    print(f"metric {np.mean(ap_):.4f}")


if __name__ == "__main__":
    main()
