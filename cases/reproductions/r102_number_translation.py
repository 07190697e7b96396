# Transformer from scratch: write numbers out in English ("4 0 7" -> "four hundred seven")
import argparse
import math
import random

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--fixed", action="store_true")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.set_num_threads(1)
random.seed(args.seed)
np.random.seed(args.seed)
torch.manual_seed(args.seed)

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()


def spell(n):
    if n < 20:
        return [ONES[n]]
    if n < 100:
        return [TENS[n // 10]] + ([ONES[n % 10]] if n % 10 else [])
    if n < 1000:
        return [ONES[n // 100], "hundred"] + (spell(n % 100) if n % 100 else [])
    return spell(n // 1000) + ["thousand"] + (spell(n % 1000) if n % 1000 else [])


PAD, BOS, EOS = 0, 1, 2
TGT_VOCAB = ["<pad>", "<bos>", "<eos>"] + ONES + TENS[2:] + ["hundred", "thousand"]
TGT_INDEX = {w: i for i, w in enumerate(TGT_VOCAB)}
SRC_SIZE = 1 + 10
SRC_LEN, TGT_LEN = 4, 10


def make_example(n):
    src = [int(d) + 1 for d in str(n)]
    tgt = [BOS] + [TGT_INDEX[w] for w in spell(n)] + [EOS]
    return src + [PAD] * (SRC_LEN - len(src)), tgt + [PAD] * (TGT_LEN - len(tgt))


numbers = random.sample(range(1, 10000), 9000)
data = [make_example(n) for n in numbers]
src_all = torch.tensor([d[0] for d in data])
tgt_all = torch.tensor([d[1] for d in data])
train_src, train_tgt = src_all[:8000], tgt_all[:8000]
test_src, test_tgt = src_all[8000:], tgt_all[8000:]


class AttentionHead(nn.Module):
    def __init__(self, d_model, d_feature, dropout=0.1):
        super().__init__()
        self.query_tfm = nn.Linear(d_model, d_feature)
        self.key_tfm = nn.Linear(d_model, d_feature)
        self.value_tfm = nn.Linear(d_model, d_feature)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries, keys, values, mask=None):
        Q, K, V = self.query_tfm(queries), self.key_tfm(keys), self.value_tfm(values)
        scores = torch.bmm(Q, K.transpose(1, 2)) / math.sqrt(Q.size(-1))
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return torch.bmm(self.dropout(F.softmax(scores, dim=-1)), V)


class MultiHeadAttention(nn.Module):
    def __init__(self, d_model, d_feature, n_heads, dropout=0.1):
        super().__init__()
        self.attn_heads = nn.ModuleList([AttentionHead(d_model, d_feature, dropout) for _ in range(n_heads)])
        self.projection = nn.Linear(d_feature * n_heads, d_model)

    def forward(self, queries, keys, values, mask=None):
        return self.projection(torch.cat([h(queries, keys, values, mask=mask) for h in self.attn_heads], dim=-1))


class EncoderBlock(nn.Module):
    def __init__(self, d_model, d_feature, d_ff, n_heads, dropout=0.1):
        super().__init__()
        self.attn_head = MultiHeadAttention(d_model, d_feature, n_heads, dropout)
        self.layer_norm1 = nn.LayerNorm(d_model)
        self.layer_norm2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.position_wise_feed_forward = nn.Sequential(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model))

    def forward(self, x, mask=None):
        x = self.layer_norm1(x + self.dropout(self.attn_head(x, x, x, mask=mask)))
        return self.layer_norm2(x + self.dropout(self.position_wise_feed_forward(x)))


class DecoderBlock(nn.Module):
    def __init__(self, d_model, d_feature, d_ff, n_heads, dropout=0.1):
        super().__init__()
        self.masked_attn_head = MultiHeadAttention(d_model, d_feature, n_heads, dropout)
        self.attn_head = MultiHeadAttention(d_model, d_feature, n_heads, dropout)
        self.position_wise_feed_forward = nn.Sequential(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model))
        self.layer_norm1 = nn.LayerNorm(d_model)
        self.layer_norm2 = nn.LayerNorm(d_model)
        self.layer_norm3 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, enc_out, src_mask=None, tgt_mask=None):
        # attention over the target so far
        att = self.masked_attn_head(x, x, x, mask=tgt_mask)
        x = self.layer_norm1(x + self.dropout(att))
        # attention over the encoder outputs and outputs of the previous layer
        if args.fixed:
            att = self.attn_head(queries=x, keys=enc_out, values=enc_out, mask=src_mask)
        else:
            att = self.attn_head(queries=x, keys=x, values=x, mask=tgt_mask)
        x = self.layer_norm2(x + self.dropout(att))
        # feed forward
        return self.layer_norm3(x + self.dropout(self.position_wise_feed_forward(x)))


class Embedding(nn.Module):
    def __init__(self, vocab, max_len, d_model):
        super().__init__()
        self.word = nn.Embedding(vocab, d_model)
        self.position = nn.Embedding(max_len, d_model)
        nn.init.normal_(self.word.weight, std=0.5)
        nn.init.normal_(self.position.weight, std=0.5)

    def forward(self, x):
        return self.word(x) + self.position(torch.arange(x.size(1)))[None]


class Transformer(nn.Module):
    def __init__(self, d_model=48, n_heads=3, n_blocks=2, d_ff=96):
        super().__init__()
        self.src_emb = Embedding(SRC_SIZE, SRC_LEN, d_model)
        self.tgt_emb = Embedding(len(TGT_VOCAB), TGT_LEN, d_model)
        kw = dict(d_model=d_model, d_feature=d_model // n_heads, d_ff=d_ff, n_heads=n_heads, dropout=0.05)
        self.encoders = nn.ModuleList([EncoderBlock(**kw) for _ in range(n_blocks)])
        self.decoders = nn.ModuleList([DecoderBlock(**kw) for _ in range(n_blocks)])
        self.out = nn.Linear(d_model, len(TGT_VOCAB))

    def forward(self, src, tgt):
        src_mask = (src != PAD)[:, None, :]
        causal = torch.ones(tgt.size(1), tgt.size(1), dtype=torch.bool).tril()[None]
        enc = self.src_emb(src)
        for block in self.encoders:
            enc = block(enc, mask=src_mask)
        dec = self.tgt_emb(tgt)
        for block in self.decoders:
            dec = block(dec, enc, src_mask=src_mask, tgt_mask=causal)
        return self.out(dec)


def token_accuracy(model):
    model.eval()
    with torch.no_grad():
        pred = model(test_src, test_tgt[:, :-1]).argmax(-1)
    gold = test_tgt[:, 1:]
    keep = gold != PAD
    model.train()
    return (pred[keep] == gold[keep]).float().mean().item()


model = Transformer()
criterion = nn.CrossEntropyLoss(ignore_index=PAD)
n_steps, warmup = 155, 20
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
schedule = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda s: min((s + 1) / warmup, max(0.05, 1 - s / n_steps)))

for step in range(1, n_steps + 1):
    pick = torch.randint(0, len(train_src), (32,))
    src, tgt = train_src[pick], train_tgt[pick]
    logits = model(src, tgt[:, :-1])
    loss = criterion(logits.reshape(-1, logits.size(-1)), tgt[:, 1:].reshape(-1))
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    if step % 31 == 0:
        print(f"[{step}/{n_steps}] loss={loss.item():.4f}")

print(f"metric {token_accuracy(model):.4f}")
