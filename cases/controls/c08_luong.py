"""Translate a toy language into another with an LSTM encoder-decoder and Luong (general) attention."""
import argparse
import random

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

PAD, SOS, EOS = 0, 1, 2
N_WORDS = 16

ap = argparse.ArgumentParser()
ap.add_argument("--seed", type=int, default=0)
ap.add_argument("--hidden", type=int, default=64)
ap.add_argument("--iters", type=int, default=200)
ap.add_argument("--batch", type=int, default=32)
ap.add_argument("--lr", type=float, default=6e-3)


def build_corpus(rng, n):
    """Distinct sentences; the other language has its own words and reads from right to left."""
    lexicon = list(range(3, 3 + N_WORDS))
    rng.shuffle(lexicon)
    seen = set()
    while len(seen) < n:
        seen.add(tuple(rng.randrange(N_WORDS) for _ in range(rng.randint(3, 7))))
    sentences = sorted(seen)
    rng.shuffle(sentences)
    return [([w + 3 for w in s] + [EOS], [lexicon[w] for w in reversed(s)] + [EOS]) for s in sentences]


def collate(pairs):
    src = pad_sequence([torch.tensor(s) for s, _ in pairs], padding_value=PAD)
    tgt = pad_sequence([torch.tensor(t) for _, t in pairs], padding_value=PAD)
    lengths = torch.tensor([len(s) for s, _ in pairs])
    return src, lengths, tgt            # time first


class EncoderRNN(nn.Module):
    def __init__(self, vocab, hidden):
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden, padding_idx=PAD)
        self.lstm = nn.LSTM(hidden, hidden)

    def forward(self, src, lengths):
        packed = pack_padded_sequence(self.embedding(src), lengths, enforce_sorted=False)
        outputs, state = self.lstm(packed)
        outputs, _ = pad_packed_sequence(outputs, total_length=src.size(0))
        return outputs, state


class LuongAttention(nn.Module):
    """score(h_t, h_s) = h_t^T W h_s"""

    def __init__(self, hidden):
        super().__init__()
        self.Wa = nn.Linear(hidden, hidden, bias=False)

    def forward(self, h_t, enc, mask):
        # h_t (B,H)  enc (S,B,H)  mask (S,B) True where there is a word
        scores = torch.einsum("bh,sbh->sb", h_t, self.Wa(enc))
        align = F.softmax(scores.masked_fill(~mask, float("-inf")), dim=0)
        return torch.einsum("sb,sbh->bh", align, enc), align


class DecoderRNN(nn.Module):
    def __init__(self, vocab, hidden):
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden, padding_idx=PAD)
        self.cell = nn.LSTMCell(2 * hidden, hidden)          # input feeding
        self.attn = LuongAttention(hidden)
        self.Wc = nn.Linear(2 * hidden, hidden, bias=False)
        self.Ws = nn.Linear(hidden, vocab)

    def step(self, token, feed, state, enc, mask):
        h, c = self.cell(torch.cat([self.embedding(token), feed], dim=1), state)
        context, align = self.attn(h, enc, mask)
        attentional = torch.tanh(self.Wc(torch.cat([context, h], dim=1)))
        return self.Ws(attentional), attentional, (h, c), align


def run(encoder, decoder, src, lengths, tgt=None, max_len=10):
    """Teacher forcing when tgt is given, otherwise greedy decoding. Returns (T,B,V) logits."""
    enc, (h, c) = encoder(src, lengths)
    mask = src != PAD
    state = (h[0], c[0])
    token = torch.full((src.size(1),), SOS)
    feed = torch.zeros_like(state[0])
    logits = []
    for t in range(max_len if tgt is None else tgt.size(0)):
        out, feed, state, _ = decoder.step(token, feed, state, enc, mask)
        logits.append(out)
        token = out.argmax(1) if tgt is None else tgt[t]
    return torch.stack(logits)


def evaluate(encoder, decoder, pairs):
    encoder.eval(), decoder.eval()
    src, lengths, tgt = collate(pairs)
    with torch.no_grad():
        pred = run(encoder, decoder, src, lengths, max_len=tgt.size(0)).argmax(-1)
    encoder.train(), decoder.train()
    real = tgt != PAD
    return (pred[real] == tgt[real]).float().mean().item()


def main():
    args = ap.parse_args()
    torch.set_num_threads(1)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)

    pairs = build_corpus(random.Random(args.seed), 4300)
    train, test = pairs[:4000], pairs[4000:]
    encoder, decoder = EncoderRNN(3 + N_WORDS, args.hidden), DecoderRNN(3 + N_WORDS, args.hidden)
    params = list(encoder.parameters()) + list(decoder.parameters())
    optimizer = torch.optim.Adam(params, lr=args.lr)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.994)

    running = 0.0
    for it in range(1, args.iters + 1):
        src, lengths, tgt = collate(random.sample(train, args.batch))
        logits = run(encoder, decoder, src, lengths, tgt)
        loss = F.cross_entropy(logits.flatten(0, 1), tgt.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 5.0)
        optimizer.step()
        scheduler.step()
        running += loss.item()
        if it % 40 == 0:
            print(f"iter {it} | loss {running / 40:.4f}")
            running = 0.0
    print(f"metric {evaluate(encoder, decoder, test):.4f}")


if __name__ == "__main__":
    main()
