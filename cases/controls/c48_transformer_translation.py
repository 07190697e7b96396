"""Encoder-decoder Transformer that translates English noun phrases and clauses to toy Spanish."""
import argparse
import math
import random

import torch
import torch.nn as nn
from torch.nn.utils.rnn import pad_sequence

PAD_IDX, BOS_IDX, EOS_IDX = 0, 1, 2
SPECIALS = ['<pad>', '<bos>', '<eos>']

NOUNS = {'cat': ('gato', 'm'), 'dog': ('perro', 'm'), 'book': ('libro', 'm'), 'boy': ('nino', 'm'),
         'horse': ('caballo', 'm'), 'car': ('coche', 'm'), 'house': ('casa', 'f'), 'table': ('mesa', 'f'),
         'girl': ('nina', 'f'), 'apple': ('manzana', 'f'), 'queen': ('reina', 'f'), 'flower': ('flor', 'f')}
ADJS = {'red': 'roj', 'white': 'blanc', 'small': 'pequen', 'pretty': 'bonit', 'new': 'nuev', 'black': 'negr'}
VERBS = {'sees': 've', 'wants': 'quiere', 'has': 'tiene', 'finds': 'encuentra', 'paints': 'pinta'}
DETS = {'the': {'m': 'el', 'f': 'la'}, 'a': {'m': 'un', 'f': 'una'}}


def phrase(rng):
    det, noun = rng.choice(list(DETS)), rng.choice(list(NOUNS))
    adjs = rng.sample(list(ADJS), rng.choice([0, 1, 1, 2]))
    es, gender = NOUNS[noun]
    ending = 'o' if gender == 'm' else 'a'
    # the adjectives follow the noun, in reverse order, and agree with it
    return [det] + adjs + [noun], [DETS[det][gender], es] + [ADJS[a] + ending for a in reversed(adjs)]


def pair(rng):
    en, es = phrase(rng)
    if rng.random() < 0.6:
        verb = rng.choice(list(VERBS))
        en2, es2 = phrase(rng)
        en, es = en + [verb] + en2, es + [VERBS[verb]] + es2
    return tuple(en), tuple(es)


def build_corpus(seed, n):
    rng = random.Random(seed)
    pairs = {}
    while len(pairs) < n:
        en, es = pair(rng)
        pairs[en] = es
    pairs = list(pairs.items())
    rng.shuffle(pairs)
    return pairs


def build_vocab(sentences):
    return {w: i for i, w in enumerate(SPECIALS + sorted({w for s in sentences for w in s}))}


class PositionalEncoding(nn.Module):
    def __init__(self, emb_size, dropout, maxlen=32):
        super().__init__()
        den = torch.exp(-torch.arange(0, emb_size, 2) * math.log(10000) / emb_size)
        pos = torch.arange(0, maxlen).reshape(maxlen, 1)
        pe = torch.zeros((maxlen, emb_size))
        pe[:, 0::2] = torch.sin(pos * den)
        pe[:, 1::2] = torch.cos(pos * den)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer('pos_embedding', pe.unsqueeze(-2))

    def forward(self, token_embedding):
        return self.dropout(token_embedding + self.pos_embedding[:token_embedding.size(0)])


class TokenEmbedding(nn.Module):
    def __init__(self, vocab_size, emb_size):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, emb_size, padding_idx=PAD_IDX)
        nn.init.normal_(self.embedding.weight, std=emb_size ** -0.5)
        with torch.no_grad():
            self.embedding.weight[PAD_IDX].zero_()
        self.emb_size = emb_size

    def forward(self, tokens):
        return self.embedding(tokens) * math.sqrt(self.emb_size)


class Seq2SeqTransformer(nn.Module):
    def __init__(self, src_vocab, tgt_vocab, emb_size=48, nhead=4, layers=2, ffn=96, dropout=0.05):
        super().__init__()
        self.transformer = nn.Transformer(d_model=emb_size, nhead=nhead, num_encoder_layers=layers,
                                          num_decoder_layers=layers, dim_feedforward=ffn, dropout=dropout)
        self.generator = nn.Linear(emb_size, tgt_vocab)
        self.src_tok_emb = TokenEmbedding(src_vocab, emb_size)
        self.tgt_tok_emb = TokenEmbedding(tgt_vocab, emb_size)
        self.positional_encoding = PositionalEncoding(emb_size, dropout)

    def forward(self, src, tgt, src_padding_mask, tgt_padding_mask):
        memory = self.encode(src, src_padding_mask)
        return self.generator(self.decode(tgt, memory, tgt_padding_mask, src_padding_mask))

    def encode(self, src, src_padding_mask):
        emb = self.positional_encoding(self.src_tok_emb(src))
        return self.transformer.encoder(emb, src_key_padding_mask=src_padding_mask)

    def decode(self, tgt, memory, tgt_padding_mask, memory_key_padding_mask):
        n = tgt.size(0)
        tgt_mask = torch.triu(torch.ones(n, n, dtype=torch.bool), diagonal=1)
        emb = self.positional_encoding(self.tgt_tok_emb(tgt))
        return self.transformer.decoder(emb, memory, tgt_mask=tgt_mask, tgt_key_padding_mask=tgt_padding_mask,
                                        memory_key_padding_mask=memory_key_padding_mask)


def collate(batch, en_vocab, es_vocab):
    src = [torch.tensor([en_vocab[w] for w in en] + [EOS_IDX]) for en, _ in batch]
    tgt = [torch.tensor([BOS_IDX] + [es_vocab[w] for w in es] + [EOS_IDX]) for _, es in batch]
    return pad_sequence(src, padding_value=PAD_IDX), pad_sequence(tgt, padding_value=PAD_IDX)


@torch.no_grad()
def greedy_decode(model, src, max_len):
    model.eval()
    src_padding_mask = (src == PAD_IDX).t()
    memory = model.encode(src, src_padding_mask)
    ys = torch.full((1, src.size(1)), BOS_IDX)
    finished = torch.zeros(src.size(1), dtype=torch.bool)
    for _ in range(max_len):
        out = model.decode(ys, memory, (ys == PAD_IDX).t(), src_padding_mask)
        next_word = model.generator(out[-1]).argmax(-1).masked_fill(finished, PAD_IDX)
        ys = torch.cat([ys, next_word.unsqueeze(0)])
        finished |= next_word == EOS_IDX
    return ys[1:]


def translation_accuracy(model, src, tgt):
    """Share of the reference tokens (the end included) that greedy decoding puts in the right place."""
    gold = tgt[1:]
    pred = greedy_decode(model, src, gold.size(0))
    real = gold != PAD_IDX
    right = (pred == gold) & real
    return right.sum().item() / real.sum().item(), (right | ~real).all(0).float().mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--epochs', type=int, default=3)
    parser.add_argument('--batch-size', type=int, default=40)
    parser.add_argument('--lr', type=float, default=4e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    random.seed(args.seed)

    pairs = build_corpus(args.seed, 2120)
    train, test = pairs[:2000], pairs[2000:]
    en_vocab, es_vocab = build_vocab(p[0] for p in pairs), build_vocab(p[1] for p in pairs)
    test_src, test_tgt = collate(test, en_vocab, es_vocab)

    model = Seq2SeqTransformer(len(en_vocab), len(es_vocab))
    for p in model.transformer.parameters():
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)
    loss_fn = nn.CrossEntropyLoss(ignore_index=PAD_IDX, label_smoothing=0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.98), eps=1e-9)
    warmup = 40
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, (warmup / (s + 1)) ** 0.5))

    for epoch in range(1, args.epochs + 1):
        model.train()
        random.shuffle(train)
        losses = 0.0
        starts = range(0, len(train), args.batch_size)
        for i in starts:
            src, tgt = collate(train[i:i + args.batch_size], en_vocab, es_vocab)
            tgt_input, tgt_out = tgt[:-1], tgt[1:]
            logits = model(src, tgt_input, (src == PAD_IDX).t(), (tgt_input == PAD_IDX).t())
            loss = loss_fn(logits.reshape(-1, logits.size(-1)), tgt_out.reshape(-1))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            losses += loss.item()
        token, exact = translation_accuracy(model, test_src, test_tgt)
        print(f'Epoch: {epoch}, train loss: {losses / len(starts):.3f}, token acc: {token:.3f}, exact: {exact:.3f}')

    print(f'metric {translation_accuracy(model, test_src, test_tgt)[0]:.4f}')


if __name__ == '__main__':
    main()
