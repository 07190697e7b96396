"""
Conditional masked language model (Mask-Predict), non-autoregressive translation.

Encoder-decoder without a causal mask; the decoder sees a target with a random number of words masked and
predicts those; the length comes from a LENGTH token in front of the source; decoding refines in T rounds.
"""
import argparse
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

PAD, MASK, LENGTH, BOS = 0, 1, 2, 3
N_NOUN, N_ADJ, N_VERB = 12, 8, 8
# source vocabulary
S_NOUN, S_ADJ, S_VERB, S_PLUR, S_NEG = 4, 16, 24, 32, 33
SRC = 34
# target vocabulary: article by gender, plural by ending (own word), negation in two pieces around the verb
T_ART, T_NOUN, T_NOUNS, T_ADJ, T_VERB, T_NE, T_PAS = 4, 6, 18, 30, 38, 46, 47
TGT = 48


def noun_phrase(r):
    noun, adj, plural = r.randint(N_NOUN), (r.randint(N_ADJ) if r.rand() < .6 else None), r.rand() < .4
    src = ([S_ADJ + adj] if adj is not None else []) + [S_NOUN + noun] + ([S_PLUR] if plural else [])
    tgt = [T_ART + noun % 2, (T_NOUNS if plural else T_NOUN) + noun] + ([T_ADJ + adj] if adj is not None else [])
    return src, tgt


def pair(r):
    s1, t1 = noun_phrase(r)
    s2, t2 = noun_phrase(r)
    v, neg = r.randint(N_VERB), r.rand() < .3
    src = s1 + ([S_NEG] if neg else []) + [S_VERB + v] + s2
    tgt = t1 + ([T_NE, T_VERB + v, T_PAS] if neg else [T_VERB + v]) + t2
    return src, tgt


def pad(rows, extra=()):
    rows = [list(extra) + x for x in rows]
    n = max(map(len, rows))
    return torch.tensor([x + [PAD] * (n - len(x)) for x in rows])


def sinusoid(n, d):
    pos, i = torch.arange(n)[:, None], torch.arange(0, d, 2)
    ang = pos / 10000 ** (i / d)
    return torch.stack([ang.sin(), ang.cos()], -1).flatten(1)


class CMLM(nn.Module):
    MAXLEN = 12

    def __init__(self, d=48, heads=4, ff=96):
        super().__init__()
        self.d = d
        self.src = nn.Embedding(SRC, d, padding_idx=PAD)
        self.tgt = nn.Embedding(TGT, d, padding_idx=PAD)
        kw = dict(dropout=0.0, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, heads, ff, **kw), 1, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(d, heads, ff, **kw), 2)
        self.len_head = nn.Linear(d, self.MAXLEN + 1)
        self.bias = nn.Parameter(torch.zeros(TGT))
        self.register_buffer("pe", sinusoid(16, d), persistent=False)
        for e in (self.src, self.tgt):
            nn.init.normal_(e.weight, std=d ** -0.5)
            with torch.no_grad():
                e.weight[PAD].zero_()

    def embed(self, table, ids):
        return table(ids) * math.sqrt(self.d) + self.pe[: ids.size(1)]

    def encode(self, src):
        pad_mask = src == PAD
        mem = self.encoder(self.embed(self.src, src), src_key_padding_mask=pad_mask)
        return mem, pad_mask, self.len_head(mem[:, 0])

    def decode(self, tgt, mem, mem_pad):
        h = self.decoder(self.embed(self.tgt, tgt), mem, tgt_key_padding_mask=tgt == PAD, memory_key_padding_mask=mem_pad)
        return F.linear(h, self.tgt.weight, self.bias)


def random_mask(tgt):
    """The number of masked words is uniform between one and the length of the target."""
    real = tgt != PAD
    n = real.sum(1)
    k = (torch.rand(len(tgt)) * n).floor().long() + 1
    score = torch.rand(tgt.shape).masked_fill(~real, 2.0)
    rank = score.argsort(1).argsort(1)
    return (rank < k[:, None]) & real


@torch.no_grad()
def mask_predict(model, src, rounds=3):
    mem, mem_pad, len_logits = model.encode(src)
    n = len_logits[:, 1:].argmax(-1) + 1
    pos = torch.arange(int(n.max()))[None]
    real = pos < n[:, None]
    y = torch.where(real, MASK, PAD)
    conf = torch.zeros(y.shape)
    for t in range(rounds):
        logits = model.decode(y, mem, mem_pad)
        logits[..., :4] = -1e9                              # specials are never words
        p, w = logits.softmax(-1).max(-1)
        todo = y == MASK
        y, conf = torch.where(todo, w, y), torch.where(todo, p, conf)
        if t + 1 < rounds:
            k = (n * (rounds - t - 1) / rounds).floor().long()
            rank = conf.masked_fill(~real, 9.0).argsort(1).argsort(1)
            y = torch.where((rank < k[:, None]) & real, MASK, y)
    return y


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--seed", type=int, default=0)
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    r = np.random.RandomState(args.seed)
    data, known = [], set()
    while len(data) < 3000:
        s, t = pair(r)
        if tuple(s) not in known:
            known.add(tuple(s))
            data.append((s, t))
    test, train = data[:150], data[150:]

    model = CMLM()
    steps, peak, warm = 312, 3e-3, 40
    opt = torch.optim.Adam(model.parameters(), lr=peak, betas=(0.9, 0.98), eps=1e-6, fused=True)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min((s + 1) / warm, ((s + 1) / warm) ** -0.5))
    model.train()
    for step in range(steps):
        rows = [train[i] for i in r.randint(len(train), size=16)]
        src, tgt = pad([s for s, _ in rows], [LENGTH]), pad([t for _, t in rows])
        m = random_mask(tgt)
        mem, mem_pad, len_logits = model.encode(src)
        logits = model.decode(tgt.masked_fill(m, MASK), mem, mem_pad)
        word = F.cross_entropy(logits[m], tgt[m], label_smoothing=0.1)
        length = F.cross_entropy(len_logits, (tgt != PAD).sum(1))
        loss = word + 0.1 * length
        opt.zero_grad()
        loss.backward()
        opt.step()
        sched.step()
        if step % 52 == 51:
            print(f"update {step + 1} word {word.item():.4f} length {length.item():.4f}")

    model.eval()
    hyp = mask_predict(model, pad([s for s, _ in test], [LENGTH]))
    exact = words = total = 0
    for h, (_, t) in zip(hyp.tolist(), test):
        h = [w for w in h if w != PAD]
        exact += h == t
        words += sum(a == b for a, b in zip(h, t)) if len(h) == len(t) else 0
        total += len(t)
    print(f"words right {words / total:.4f}")
    print(f"metric {exact / len(test):.4f}")


if __name__ == "__main__":
    main()
