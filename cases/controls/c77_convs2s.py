"""Trains a convolutional sequence-to-sequence model (GLU blocks, multi-step attention) on a toy translation."""
import argparse
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import weight_norm

NOUNS = [("katt", "cat", 0), ("hund", "dog", 0), ("hus", "house", 1), ("bord", "table", 1), ("bil", "car", 0),
         ("bok", "book", 0), ("barn", "child", 1), ("skip", "ship", 1)]
ADJS = [("rod", "red"), ("stor", "big"), ("ny", "new"), ("pen", "nice")]
VERBS = [("ser", "sees"), ("liker", "likes"), ("tar", "takes"), ("selger", "sells"), ("finner", "finds")]
ADVS = [("ofte", "often"), ("aldri", "never"), ("snart", "soon")]


def sentence_pair(rng):
    """English: [adv] [adj] noun verb [adj] noun.  Foreign: noun [adj+gender] noun [adj+gender] verb [adv]."""
    src, tgt = [], []
    adv = ADVS[rng.integers(len(ADVS))] if rng.random() < 0.5 else None
    if adv:
        src.append(adv[1])
    verb = VERBS[rng.integers(len(VERBS))]
    for k in range(2):
        foreign, english, gender = NOUNS[rng.integers(len(NOUNS))]
        tgt.append(foreign)
        if rng.random() < 0.6:
            a = ADJS[rng.integers(len(ADJS))]
            src.append(a[1])
            tgt.append(a[0] + ("t" if gender else "e"))
        src.append(english)
        if k == 0:
            src.append(verb[1])
    tgt.append(verb[0])
    if adv:
        tgt.append(adv[0])
    return tuple(src), tuple(tgt)


def corpus(n, rng):
    pairs = {}
    while len(pairs) < n:
        s, t = sentence_pair(rng)
        pairs[s] = t
    return list(pairs.items())


class Dictionary:
    def __init__(self, sentences):
        self.symbols = ["<pad>", "</s>"] + sorted({w for s in sentences for w in s})
        self.index = {w: i for i, w in enumerate(self.symbols)}
        self.pad, self.eos = 0, 1

    def __len__(self):
        return len(self.symbols)

    def encode(self, s):
        return torch.tensor([self.index[w] for w in s] + [self.eos])


def collate(pairs, sd, td):
    pad = lambda rows: nn.utils.rnn.pad_sequence(rows, batch_first=True)
    src = pad([sd.encode(s) for s, _ in pairs])
    tgt = [td.encode(t) for _, t in pairs]
    # previous output tokens: </s> moved to the front
    prev = pad([torch.cat([t[-1:], t[:-1]]) for t in tgt])
    return src, prev, pad(tgt)


def Embedding(n, dim, padding_idx=0):
    m = nn.Embedding(n, dim, padding_idx=padding_idx)
    nn.init.normal_(m.weight, 0, 0.1)
    nn.init.constant_(m.weight[padding_idx], 0)
    return m


def Linear(n_in, n_out, dropout=0.0):
    m = nn.Linear(n_in, n_out)
    m.weight.data.normal_(0, math.sqrt((1 - dropout) / n_in))
    m.bias.data.zero_()
    return weight_norm(m)


def ConvGLU(channels, width, dropout=0.0):
    m = nn.Conv1d(channels, 2 * channels, width)
    m.weight.data.normal_(0, math.sqrt(4 * (1 - dropout) / (width * channels)))
    m.bias.data.zero_()
    return weight_norm(m)


def positions(tokens, pad):
    mask = tokens.ne(pad).long()
    return mask.cumsum(1) * mask          # padding keeps position 0


class GradMultiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.scale, None


class FConvEncoder(nn.Module):
    def __init__(self, n_words, dim, channels, layers, width, dropout, n_attn, max_pos=32):
        super().__init__()
        self.embed_tokens, self.embed_positions = Embedding(n_words, dim), Embedding(max_pos, dim)
        self.fc1, self.fc2 = Linear(dim, channels, dropout), Linear(channels, dim)
        self.convs = nn.ModuleList([ConvGLU(channels, width, dropout) for _ in range(layers)])
        self.width, self.dropout, self.n_attn = width, dropout, n_attn

    def forward(self, src):
        pad = src.eq(0)
        emb = self.embed_tokens(src) + self.embed_positions(positions(src, 0))
        emb = F.dropout(emb, self.dropout, self.training)
        x = self.fc1(emb).transpose(1, 2)
        for conv in self.convs:
            res = x
            x = x.masked_fill(pad.unsqueeze(1), 0)
            x = F.dropout(x, self.dropout, self.training)
            x = F.glu(conv(F.pad(x, ((self.width - 1) // 2, self.width // 2))), dim=1)
            x = (x + res) * math.sqrt(0.5)
        x = self.fc2(x.transpose(1, 2)).masked_fill(pad.unsqueeze(-1), 0)
        x = GradMultiply.apply(x, 1.0 / (2.0 * self.n_attn))
        y = (x + emb) * math.sqrt(0.5)     # values: keys plus the input embeddings
        return x, y, pad


class AttentionLayer(nn.Module):
    def __init__(self, channels, dim):
        super().__init__()
        self.in_projection, self.out_projection = Linear(channels, dim), Linear(dim, channels)

    def forward(self, x, target_emb, enc):
        keys, values, pad = enc
        residual = x
        x = (self.in_projection(x) + target_emb) * math.sqrt(0.5)
        scores = torch.bmm(x, keys.transpose(1, 2)).masked_fill(pad.unsqueeze(1), float("-inf"))
        x = torch.bmm(F.softmax(scores, dim=-1), values)
        s = (~pad).sum(1).float().view(-1, 1, 1)
        x = x * s.sqrt()                   # s * sqrt(1 / s) with s source tokens
        return (self.out_projection(x) + residual) * math.sqrt(0.5)


class FConvDecoder(nn.Module):
    def __init__(self, n_words, dim, channels, layers, width, dropout, max_pos=32):
        super().__init__()
        self.embed_tokens, self.embed_positions = Embedding(n_words, dim), Embedding(max_pos, dim)
        self.fc1 = Linear(dim, channels, dropout)
        self.convs = nn.ModuleList([ConvGLU(channels, width, dropout) for _ in range(layers)])
        self.attention = nn.ModuleList([AttentionLayer(channels, dim) for _ in range(layers)])
        self.fc2, self.fc3 = Linear(channels, dim), Linear(dim, n_words, dropout)
        self.width, self.dropout = width, dropout

    def forward(self, prev, enc):
        pos = torch.arange(1, prev.size(1) + 1).expand_as(prev)
        emb = self.embed_tokens(prev) + self.embed_positions(pos)
        emb = F.dropout(emb, self.dropout, self.training)
        x = self.fc1(emb)
        for conv, attn in zip(self.convs, self.attention):
            res = x
            x = F.dropout(x, self.dropout, self.training).transpose(1, 2)
            x = F.glu(conv(F.pad(x, (self.width - 1, 0))), dim=1).transpose(1, 2)
            x = attn(x, emb, enc)
            x = (x + res) * math.sqrt(0.5)
        return self.fc3(F.dropout(self.fc2(x), self.dropout, self.training))


class FConvModel(nn.Module):
    def __init__(self, n_src, n_tgt, dim=48, channels=48, layers=2, width=3, dropout=0.05):
        super().__init__()
        self.encoder = FConvEncoder(n_src, dim, channels, layers, width, dropout, n_attn=layers)
        self.decoder = FConvDecoder(n_tgt, dim, channels, layers, width, dropout)

    def forward(self, src, prev):
        return self.decoder(prev, self.encoder(src))


@torch.no_grad()
def translate(model, src, td, max_len=12):
    model.eval()
    enc = model.encoder(src)
    out = torch.full((src.size(0), 1), td.eos)
    for _ in range(max_len):
        nxt = model.decoder(out, enc)[:, -1].argmax(-1, keepdim=True)
        out = torch.cat([out, nxt], 1)
    model.train()
    return out[:, 1:]


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--max-update", type=int, default=300)
    ap.add_argument("--lr", type=float, default=0.25)
    ap.add_argument("--clip-norm", type=float, default=0.1)
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    pairs = corpus(2200, rng)
    train, valid = pairs[:2000], pairs[2000:]
    sd, td = Dictionary([s for s, _ in train]), Dictionary([t for _, t in train])

    model = FConvModel(len(sd), len(td))
    opt = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.99, nesterov=True)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1.0 if k < 0.8 * args.max_update else 0.1)
    for update in range(1, args.max_update + 1):
        src, prev, tgt = collate([train[i] for i in rng.integers(len(train), size=24)], sd, td)
        logits = model(src, prev)
        loss = F.cross_entropy(logits.reshape(-1, len(td)), tgt.reshape(-1), ignore_index=td.pad)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip_norm)
        opt.step()
        sched.step()
        if update % 50 == 0:
            print(f"| update {update} | loss {loss.item() / math.log(2):.3f} | ppl {loss.exp().item():.2f}")

    src, _, tgt = collate(valid, sd, td)
    hyp = translate(model, src, td, max_len=tgt.size(1))
    real = tgt.ne(td.pad)
    acc = (hyp.eq(tgt) & real).sum().item() / real.sum().item()
    print(f"metric {acc:.4f}")


if __name__ == "__main__":
    main()
