"""Character-level date translation: "14 march 2017" -> "2017-03-14".

A small encoder-decoder transformer written from scratch; greedy decoding on
dates that never occur in training.
"""
import argparse
import datetime
import math
import random

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--fixed", action="store_true")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(args.seed)
rng = random.Random(args.seed)

PAD, SOS, EOS = 0, 1, 2
CHARS = "abcdefghijklmnopqrstuvwxyz0123456789 ,-/"
stoi = {c: i + 3 for i, c in enumerate(CHARS)}
VOCAB = len(CHARS) + 3

D_MODEL, N_HEAD, FFN, MAX_LEN = 32, 2, 64, 24
BATCH, STEPS = 24, 230


# ---------------------------------------------------------------- data

def render(d):
    month = d.strftime("%B").lower()
    style = rng.randrange(3)
    if style == 0:
        return f"{d.day} {month} {d.year}"
    if style == 1:
        return f"{month} {d.day}, {d.year}"
    return f"{d.day} {month[:3]} {d.year}"


def encode(text, specials=False):
    ids = [stoi[c] for c in text]
    return [SOS] + ids + [EOS] if specials else ids


def make_pairs(days):
    src, trg = [], []
    for d in days:
        src.append(encode(render(d)))
        trg.append(encode(d.strftime("%Y-%m-%d"), specials=True))
    width = max(map(len, src))
    src = torch.tensor([s + [PAD] * (width - len(s)) for s in src])
    return src, torch.tensor(trg)


first = datetime.date(1996, 1, 1)
days = [first + datetime.timedelta(n) for n in range(7300)]
rng.shuffle(days)
train_src, train_trg = make_pairs(days[:7000])
test_src, test_trg = make_pairs(days[7000:7120])


# ---------------------------------------------------------------- model

class ScaleDotProductAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, q, k, v, mask=None, e=1e-12):
        score = (q @ k.transpose(2, 3)) / math.sqrt(k.size(-1))
        if mask is not None:
            score = score.masked_fill(mask == 0, -10000.0 if args.fixed else -e)
        return self.softmax(score) @ v


class MultiHeadAttention(nn.Module):
    def __init__(self, d_model, n_head):
        super().__init__()
        self.n_head = n_head
        self.attention = ScaleDotProductAttention()
        self.w_q = nn.Linear(d_model, d_model)
        self.w_k = nn.Linear(d_model, d_model)
        self.w_v = nn.Linear(d_model, d_model)
        self.w_concat = nn.Linear(d_model, d_model)

    def split(self, t):
        b, n, d = t.shape
        return t.view(b, n, self.n_head, d // self.n_head).transpose(1, 2)

    def forward(self, q, k, v, mask=None):
        q, k, v = self.split(self.w_q(q)), self.split(self.w_k(k)), self.split(self.w_v(v))
        out = self.attention(q, k, v, mask=mask)
        b, h, n, d = out.shape
        return self.w_concat(out.transpose(1, 2).reshape(b, n, h * d))


def feed_forward():
    return nn.Sequential(nn.Linear(D_MODEL, FFN), nn.ReLU(), nn.Linear(FFN, D_MODEL))


class EncoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = MultiHeadAttention(D_MODEL, N_HEAD)
        self.norm1 = nn.LayerNorm(D_MODEL)
        self.ffn = feed_forward()
        self.norm2 = nn.LayerNorm(D_MODEL)

    def forward(self, x, src_mask):
        x = self.norm1(x + self.attention(x, x, x, src_mask))
        return self.norm2(x + self.ffn(x))


class DecoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attention = MultiHeadAttention(D_MODEL, N_HEAD)
        self.norm1 = nn.LayerNorm(D_MODEL)
        self.enc_dec_attention = MultiHeadAttention(D_MODEL, N_HEAD)
        self.norm2 = nn.LayerNorm(D_MODEL)
        self.ffn = feed_forward()
        self.norm3 = nn.LayerNorm(D_MODEL)

    def forward(self, y, enc, trg_mask, src_mask):
        y = self.norm1(y + self.self_attention(y, y, y, trg_mask))
        y = self.norm2(y + self.enc_dec_attention(y, enc, enc, src_mask))
        return self.norm3(y + self.ffn(y))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.src_emb = nn.Embedding(VOCAB, D_MODEL, padding_idx=PAD)
        self.trg_emb = nn.Embedding(VOCAB, D_MODEL, padding_idx=PAD)
        pos = torch.arange(MAX_LEN).float().unsqueeze(1)
        freq = torch.exp(torch.arange(0, D_MODEL, 2).float() * (-math.log(10000.0) / D_MODEL))
        table = torch.zeros(MAX_LEN, D_MODEL)
        table[:, 0::2], table[:, 1::2] = torch.sin(pos * freq), torch.cos(pos * freq)
        self.register_buffer("pos_table", table)
        self.encoder = EncoderLayer()
        self.decoder = DecoderLayer()
        self.linear = nn.Linear(D_MODEL, VOCAB)

    def make_src_mask(self, src):
        return (src != PAD)[:, None, None, :]

    def make_trg_mask(self, trg):
        n = trg.size(1)
        return (trg != PAD)[:, None, None, :] & torch.tril(torch.ones(n, n, dtype=torch.bool))

    def forward(self, src, trg):
        src_mask, trg_mask = self.make_src_mask(src), self.make_trg_mask(trg)
        enc = self.encoder(self.src_emb(src) + self.pos_table[:src.size(1)], src_mask)
        dec = self.decoder(self.trg_emb(trg) + self.pos_table[:trg.size(1)], enc, trg_mask, src_mask)
        return self.linear(dec)


@torch.no_grad()
def translate(model, src, steps):
    model.eval()
    out = torch.full((src.size(0), 1), SOS)
    for _ in range(steps):
        nxt = model(src, out)[:, -1].argmax(-1, keepdim=True)
        out = torch.cat([out, nxt], dim=1)
    model.train()
    return out


model = Transformer()
optimizer = torch.optim.Adam(model.parameters(), lr=6e-3, betas=(0.9, 0.98), fused=True)
scheduler = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda s: min((s + 1) / 25, max(0.05, 1 - s / STEPS)))
criterion = nn.CrossEntropyLoss(ignore_index=PAD)

running = 0.0
for step in range(1, STEPS + 1):
    pick = torch.randint(0, len(train_src), (BATCH,))
    src, trg = train_src[pick], train_trg[pick]
    logits = model(src, trg[:, :-1])
    loss = criterion(logits.reshape(-1, VOCAB), trg[:, 1:].reshape(-1))
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    running += loss.item()
    if step % 46 == 0:
        print(f"step {step:4d}  train loss {running / 46:.4f}")
        running = 0.0

hyp = translate(model, test_src, test_trg.size(1) - 1)
print("exact dates", f"{(hyp == test_trg).all(1).float().mean().item():.4f}")
print("metric", f"{(hyp[:, 1:] == test_trg[:, 1:]).float().mean().item():.4f}")
