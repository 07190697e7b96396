"""Trains an attention-based recurrent sequence generator with location-aware attention to recognise phones."""
import argparse

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

SR, HOP, WIN = 8000, 100, 200
N_PHONES, EOS = 10, 10
FORMANTS = [(300, 2300), (400, 2000), (550, 1800), (700, 1200), (600, 900),
            (350, 800), (450, 1400), (650, 2600), (300, 3200), (500, 3000)]


def filterbank(n_bands=20):
    edges = np.linspace(0, WIN // 2, n_bands + 2)
    bins = np.arange(WIN // 2 + 1)[:, None]
    up = (bins - edges[None, :-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[None, 2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.tensor(np.clip(np.minimum(up, down), 0, None), dtype=torch.float32)


def synthesize(rng):
    """One utterance: phones of random duration, pitch and loudness, with noise."""
    n = rng.integers(3, 5)
    phones = [int(rng.integers(N_PHONES))]
    while len(phones) < n:
        p = int(rng.integers(N_PHONES))
        if p != phones[-1]:
            phones.append(p)
    pieces = []
    for p in phones:
        length = int(rng.integers(3, 6)) * HOP
        t = np.arange(length) / SR
        f1, f2 = np.array(FORMANTS[p]) * rng.normal(1.0, 0.03)
        wave = np.sin(2 * np.pi * f1 * t + rng.uniform(0, 6.28)) + 0.7 * np.sin(2 * np.pi * f2 * t + rng.uniform(0, 6.28))
        pieces.append(wave * rng.uniform(0.6, 1.2) * np.hanning(length + 2)[1:-1] ** 0.3)
    audio = np.concatenate(pieces)
    return audio + 0.1 * rng.standard_normal(len(audio)), phones


def make_corpus(n, rng):
    fb, window, corpus = filterbank(), torch.hann_window(WIN), []
    for _ in range(n):
        audio, phones = synthesize(rng)
        spec = torch.stft(torch.tensor(audio, dtype=torch.float32), WIN, HOP, window=window, return_complex=True).abs()
        corpus.append((torch.log(spec.t() @ fb + 1e-2), torch.tensor(phones + [EOS])))
    return corpus


def make_batch(items, mean, std):
    feats, targets = zip(*items)
    x_len = torch.tensor([len(f) for f in feats])
    x = nn.utils.rnn.pad_sequence([(f - mean) / std for f in feats], batch_first=True)
    y = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-1)
    return x, x_len, y


class LocationAwareAttention(nn.Module):
    """e = w^T tanh(W s + V h + U f + b), f = F * alpha_prev; normalised logistic instead of softmax ("smoothing")."""

    def __init__(self, d_state, d_enc, d_att, n_filters=10, width=7):
        super().__init__()
        self.W = nn.Linear(d_state, d_att, bias=False)
        self.V = nn.Linear(d_enc, d_att)
        self.U = nn.Linear(n_filters, d_att, bias=False)
        self.F = nn.Conv1d(1, n_filters, width, padding=width // 2, bias=False)
        self.w = nn.Linear(d_att, 1, bias=False)

    def precompute(self, h):
        return self.V(h)

    def forward(self, s, alpha, h, Vh, mask):
        f = self.F(alpha.unsqueeze(1)).transpose(1, 2)
        e = self.w(torch.tanh(self.W(s).unsqueeze(1) + Vh + self.U(f))).squeeze(-1)
        a = torch.sigmoid(e) * mask
        a = a / a.sum(dim=1, keepdim=True)
        return torch.bmm(a.unsqueeze(1), h).squeeze(1), a


class ARSG(nn.Module):
    def __init__(self, n_in=20, n_out=N_PHONES + 1, d_enc=32, d_dec=64, d_att=48, d_emb=24, pieces=2):
        super().__init__()
        self.encoder = nn.GRU(n_in, d_enc, num_layers=2, bidirectional=True, batch_first=True)
        self.attention = LocationAwareAttention(d_dec, 2 * d_enc, d_att)
        self.embed = nn.Embedding(n_out, d_emb)
        self.recurrency = nn.GRUCell(d_emb + 2 * d_enc, d_dec)
        self.s0 = nn.Parameter(torch.zeros(d_dec))
        self.maxout = nn.Linear(d_dec + 2 * d_enc, 48 * pieces)
        self.out = nn.Linear(48, n_out)
        self.pieces = pieces

    def encode(self, x, x_len):
        packed = nn.utils.rnn.pack_padded_sequence(x, x_len, batch_first=True, enforce_sorted=False)
        h, _ = nn.utils.rnn.pad_packed_sequence(self.encoder(packed)[0], batch_first=True)
        mask = (torch.arange(h.size(1))[None] < x_len[:, None]).float()
        alpha = torch.zeros(h.size(0), h.size(1))
        alpha[:, 0] = 1.0                      # the reader starts at the first frame
        return h, mask, alpha, self.s0.expand(h.size(0), -1)

    def generate(self, s, g):
        m = self.maxout(torch.cat([s, g], 1)).view(s.size(0), -1, self.pieces).max(-1).values
        return self.out(m)

    def forward(self, x, x_len, y):
        h, mask, alpha, s = self.encode(x, x_len)
        Vh = self.attention.precompute(h)
        y_in, logits = self.embed(y.clamp(min=0)), []
        for i in range(y.size(1)):
            g, alpha = self.attention(s, alpha, h, Vh, mask)
            logits.append(self.generate(s, g))
            if i + 1 < y.size(1):
                s = self.recurrency(torch.cat([y_in[:, i], g], 1), s)
        return torch.stack(logits, 1)

    @torch.no_grad()
    def greedy(self, x, x_len, max_len=8):
        h, mask, alpha, s = self.encode(x, x_len)
        Vh = self.attention.precompute(h)
        hyp = []
        for _ in range(max_len):
            g, alpha = self.attention(s, alpha, h, Vh, mask)
            tok = self.generate(s, g).argmax(-1)
            hyp.append(tok)
            s = self.recurrency(torch.cat([self.embed(tok), g], 1), s)
        rows = torch.stack(hyp, 1).tolist()
        return [r[:r.index(EOS)] if EOS in r else r for r in rows]


def edit_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        prev, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            prev, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, prev + (x != y))
    return row[-1]


def phone_error_rate(hyps, refs):
    return sum(edit_distance(h, r) for h, r in zip(hyps, refs)) / sum(len(r) for r in refs)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--updates", type=int, default=155)
    p.add_argument("--batch-size", type=int, default=16)
    a = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(a.seed)
    rng = np.random.default_rng(a.seed)

    train, test = make_corpus(500, rng), make_corpus(120, rng)
    frames = torch.cat([f for f, _ in train])
    mean, std = frames.mean(0), frames.std(0)

    net = ARSG()
    opt = torch.optim.Adam(net.parameters(), lr=5e-3)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: min(1.0, 2.0 * (1 - k / a.updates)))
    net.train()
    for it in range(1, a.updates + 1):
        x, x_len, y = make_batch([train[i] for i in rng.choice(len(train), a.batch_size, replace=False)], mean, std)
        logits = net(x, x_len, y)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        sched.step()
        if it % 40 == 0:
            print(f"update {it} nll {loss.item():.4f}")
    net.eval()
    x, x_len, y = make_batch(test, mean, std)
    per = phone_error_rate(net.greedy(x, x_len), [t.tolist()[:-1] for _, t in test])
    print(f"PER {per:.4f}")
    print(f"metric {1 - per:.4f}")


if __name__ == "__main__":
    main()
