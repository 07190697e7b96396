"""Train a GRU encoder-decoder with Bahdanau attention that turns spelled-out numbers into digits."""
import argparse
import random

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
        "sixteen seventeen eighteen nineteen").split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
PAD, SOS, EOS = 0, 1, 2


def spell(n):
    words = []
    if n >= 1000:
        words += [ONES[n // 1000], "thousand"]
        n %= 1000
    if n >= 100:
        words += [ONES[n // 100], "hundred"]
        n %= 100
        if n:
            words.append("and")
    if n >= 20:
        words.append(TENS[n // 10])
        n %= 10
        if n:
            words.append(ONES[n])
    elif n:
        words.append(ONES[n])
    return words


SRC_WORDS = ["<pad>", "</s>"] + ONES[1:] + TENS[2:] + ["hundred", "thousand", "and"]
SRC_ID = {w: i for i, w in enumerate(SRC_WORDS)}


def encode_pair(n):
    src = [SRC_ID[w] for w in spell(n)] + [SRC_ID["</s>"]]
    tgt = [SOS] + [int(c) + 3 for c in str(n)] + [EOS]
    return torch.tensor(src), torch.tensor(tgt)


def make_batch(pairs):
    pairs = sorted(pairs, key=lambda p: -len(p[0]))
    src_len = torch.tensor([len(s) for s, _ in pairs])
    src = pad_sequence([s for s, _ in pairs], padding_value=PAD)      # (S, B)
    tgt = pad_sequence([t for _, t in pairs], padding_value=PAD)      # (T, B)
    return src, src_len, tgt


class Encoder(nn.Module):
    def __init__(self, vocab, emb, hid):
        super().__init__()
        self.embedding = nn.Embedding(vocab, emb, padding_idx=PAD)
        self.rnn = nn.GRU(emb, hid, bidirectional=True)
        self.bridge = nn.Linear(hid, hid)

    def forward(self, src, src_len):
        packed = pack_padded_sequence(self.embedding(src), src_len)
        out, h = self.rnn(packed)
        out, _ = pad_packed_sequence(out)
        return out, torch.tanh(self.bridge(h[1]))       # the backward state has read the first word last


class AdditiveAttention(nn.Module):
    def __init__(self, hid, enc_dim, att):
        super().__init__()
        self.W = nn.Linear(hid, att, bias=False)
        self.U = nn.Linear(enc_dim, att)
        self.v = nn.Linear(att, 1, bias=False)

    def forward(self, state, keys, annotations, mask):
        e = self.v(torch.tanh(self.W(state).unsqueeze(0) + keys)).squeeze(-1)   # (S, B)
        e = e.masked_fill(~mask, float("-inf"))
        alpha = F.softmax(e, dim=0)
        return (alpha.unsqueeze(-1) * annotations).sum(0), alpha


class Decoder(nn.Module):
    def __init__(self, vocab, emb, hid, enc_dim, att):
        super().__init__()
        self.embedding = nn.Embedding(vocab, emb, padding_idx=PAD)
        self.attention = AdditiveAttention(hid, enc_dim, att)
        self.cell = nn.GRUCell(emb + enc_dim, hid)
        self.readout = nn.Linear(hid + emb + enc_dim, 2 * hid)
        self.out = nn.Linear(hid, vocab)

    def step(self, token, state, keys, annotations, mask):
        y = self.embedding(token)
        context, _ = self.attention(state, keys, annotations, mask)
        state = self.cell(torch.cat([y, context], -1), state)
        t = self.readout(torch.cat([state, y, context], -1))
        t = t.view(t.size(0), -1, 2).max(-1).values        # maxout
        return self.out(t), state


class Seq2Seq(nn.Module):
    def __init__(self, src_vocab, tgt_vocab, emb=32, hid=64, att=48):
        super().__init__()
        self.encoder = Encoder(src_vocab, emb, hid)
        self.decoder = Decoder(tgt_vocab, emb, hid, 2 * hid, att)

    def forward(self, src, src_len, tgt_in):
        annotations, state = self.encoder(src, src_len)
        mask = src != PAD
        keys = self.decoder.attention.U(annotations)
        logits = []
        for token in tgt_in:
            o, state = self.decoder.step(token, state, keys, annotations, mask)
            logits.append(o)
        return torch.stack(logits)

    @torch.no_grad()
    def translate(self, src, src_len, max_len=6):
        annotations, state = self.encoder(src, src_len)
        mask = src != PAD
        keys = self.decoder.attention.U(annotations)
        token = torch.full((src.size(1),), SOS)
        done = torch.zeros(src.size(1), dtype=torch.bool)
        result = []
        for _ in range(max_len):
            o, state = self.decoder.step(token, state, keys, annotations, mask)
            token = o.argmax(-1).masked_fill(done, PAD)
            result.append(token)
            done |= token == EOS
        return torch.stack(result)


def exact_match(model, pairs):
    model.eval()
    good = 0
    for i in range(0, len(pairs), 100):
        src, src_len, tgt = make_batch(pairs[i:i + 100])
        hyp = model.translate(src, src_len)
        ref = torch.zeros_like(hyp)
        ref[:tgt.size(0) - 1] = tgt[1:]
        good += (hyp == ref).all(0).sum().item()
    return good / len(pairs)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    args = ap.parse_args()
    torch.set_num_threads(1)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)

    numbers = list(range(1, 10000))
    random.shuffle(numbers)
    test = [encode_pair(n) for n in numbers[:400]]
    train = [encode_pair(n) for n in numbers[400:]]

    model = Seq2Seq(len(SRC_WORDS), 13)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    criterion = nn.CrossEntropyLoss(ignore_index=PAD)

    running = 0.0
    for it in range(1, 231):
        model.train()
        src, src_len, tgt = make_batch(random.sample(train, 48))
        logits = model(src, src_len, tgt[:-1])
        loss = criterion(logits.flatten(0, 1), tgt[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        running += loss.item()
        if it % 46 == 0:
            print(f"iter {it:4d}  loss {running / 46:.4f}")
            running = 0.0
    print(f"metric {exact_match(model, test):.4f}")


if __name__ == "__main__":
    main()
