"""Character-level language model from nn.TransformerEncoder with a causal mask and tied embeddings."""
import argparse
import math
import random

import torch
import torch.nn as nn


class PositionalEncoding(nn.Module):
    def __init__(self, d_model, dropout=0.1, max_len=200):
        super().__init__()
        self.dropout = nn.Dropout(p=dropout)
        pe = torch.zeros(max_len, d_model)
        position = torch.arange(0, max_len, dtype=torch.float).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, d_model, 2).float() * (-math.log(10000.0) / d_model))
        pe[:, 0::2] = torch.sin(position * div_term)
        pe[:, 1::2] = torch.cos(position * div_term)
        self.register_buffer('pe', pe.unsqueeze(1))

    def forward(self, x):
        return self.dropout(x + self.pe[:x.size(0)])


class TransformerModel(nn.Module):
    def __init__(self, ntoken, ninp, nhead, nhid, nlayers, dropout):
        super().__init__()
        self.ninp = ninp
        self.input_emb = nn.Embedding(ntoken, ninp)
        self.pos_encoder = PositionalEncoding(ninp, dropout)
        layer = nn.TransformerEncoderLayer(ninp, nhead, nhid, dropout)
        self.encoder = nn.TransformerEncoder(layer, nlayers, enable_nested_tensor=False)
        self.decoder = nn.Linear(ninp, ntoken)
        self.decoder.weight = self.input_emb.weight
        self.init_weights()

    def init_weights(self):
        nn.init.uniform_(self.input_emb.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        for p in self.encoder.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, src):
        mask = nn.Transformer.generate_square_subsequent_mask(src.size(0))
        x = self.pos_encoder(self.input_emb(src) * math.sqrt(self.ninp))
        x = self.encoder(x, mask=mask, is_causal=True)
        return self.decoder(x)


ADJ = ['small', 'old', 'quick', 'lazy', 'brown', 'happy', 'quiet']
NOUN = ['fox', 'dog', 'farmer', 'king', 'child', 'river', 'ship', 'garden']
VERB = ['sees', 'follows', 'likes', 'fears', 'finds', 'forgets']
WHEN = ['in the morning', 'at night', 'every day', 'again']


def sentence(rng):
    def np_():
        return 'the ' + (rng.choice(ADJ) + ' ' if rng.random() < 0.5 else '') + rng.choice(NOUN)
    s = np_() + ' ' + rng.choice(VERB) + ' ' + np_()
    if rng.random() < 0.5:
        s += ' ' + rng.choice(WHEN)
    return s + '.\n'


def batchify(data, bsz):
    nbatch = data.size(0) // bsz
    return data[:nbatch * bsz].view(bsz, -1).t().contiguous()


def get_batch(source, i, bptt):
    seq_len = min(bptt, len(source) - 1 - i)
    return source[i:i + seq_len], source[i + 1:i + 1 + seq_len].reshape(-1)


parser = argparse.ArgumentParser(description='Transformer language model')
parser.add_argument('--seed', type=int, default=0)
parser.add_argument('--emsize', type=int, default=48)
parser.add_argument('--nhead', type=int, default=4)
parser.add_argument('--nhid', type=int, default=96)
parser.add_argument('--nlayers', type=int, default=2)
parser.add_argument('--dropout', type=float, default=0.05)
parser.add_argument('--lr', type=float, default=0.004)
parser.add_argument('--clip', type=float, default=0.5)
parser.add_argument('--epochs', type=int, default=3)
parser.add_argument('--batch_size', type=int, default=16)
parser.add_argument('--bptt', type=int, default=36)
args = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(args.seed)
rng = random.Random(args.seed)

sentences = sorted({sentence(rng) for _ in range(1600)})
rng.shuffle(sentences)
held = len(sentences) // 10
valid_text, train_text = ''.join(sentences[:held]), ''.join(sentences[held:])
chars = sorted(set(train_text))
stoi = {c: i for i, c in enumerate(chars)}
train_data = batchify(torch.tensor([stoi[c] for c in train_text]), args.batch_size)
val_data = batchify(torch.tensor([stoi[c] for c in valid_text]), 10)

ntokens = len(chars)
model = TransformerModel(ntokens, args.emsize, args.nhead, args.nhid, args.nlayers, args.dropout)
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def evaluate(data_source):
    model.eval()
    total, hits = 0, 0
    with torch.no_grad():
        for i in range(0, data_source.size(0) - 1, args.bptt):
            data, targets = get_batch(data_source, i, args.bptt)
            pred = model(data).view(-1, ntokens).argmax(-1)
            hits += (pred == targets).sum().item()
            total += targets.numel()
    return hits / total


for epoch in range(1, args.epochs + 1):
    model.train()
    total_loss, count = 0., 0
    starts = list(range(0, train_data.size(0) - 1, args.bptt))
    rng.shuffle(starts)
    for i in starts:
        data, targets = get_batch(train_data, i, args.bptt)
        optimizer.zero_grad()
        loss = criterion(model(data).view(-1, ntokens), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        total_loss += loss.item()
        count += 1
    scheduler.step()
    print('| epoch {:2d} | {:4d} batches | loss {:.3f} | valid acc {:.3f}'.format(
        epoch, count, total_loss / count, evaluate(val_data)))
print('metric {:.4f}'.format(evaluate(val_data)))
