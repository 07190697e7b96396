"""Trains a deep biaffine dependency parser on a small generated treebank."""
import argparse
import random

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

parser = argparse.ArgumentParser()
parser.add_argument('--seed', type=int, default=0)
parser.add_argument('--steps', type=int, default=180)
args = parser.parse_args()
torch.set_num_threads(1)
torch.manual_seed(args.seed)
rng = random.Random(args.seed)

# ---------------------------------------------------------------- treebank
NOUN = 'dog cat man woman child teacher farmer house tree river boat book table road bird'.split()
ADJ = 'big old quiet young bright cold strange tiny'.split()
MOTION = 'walks runs moves rolls'.split()
OTHER = 'sees likes reads holds paints'.split()
ADV = 'often slowly gladly never'.split()
RELS = ['root', 'nsubj', 'obj', 'det', 'amod', 'case', 'nmod', 'obl', 'advmod', 'cc', 'conj']


class Node:
    def __init__(self, form, tag, rel=None):
        self.form, self.tag, self.rel, self.head = form, tag, rel, None


def noun_phrase(depth=0):
    """Returns (nodes in order, head node)."""
    head = Node(rng.choice(NOUN), 'NN')
    nodes = []
    if rng.random() < .8:
        nodes.append(Node(rng.choice(['the', 'a']), 'DT', 'det'))
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        nodes.append(Node(rng.choice(ADJ), 'JJ', 'amod'))
    for n in nodes:
        n.head = head
    nodes.append(head)
    if depth == 0 and rng.random() < .25:
        inner, h = noun_phrase(1)
        prep = Node('of', 'IN', 'case')
        prep.head, h.head, h.rel = h, head, 'nmod'
        nodes += [prep] + inner
    if depth == 0 and rng.random() < .2:
        inner, h = noun_phrase(1)
        cc = Node('and', 'CC', 'cc')
        cc.head, h.head, h.rel = h, head, 'conj'
        nodes += [cc] + inner
    return nodes, head


def sentence():
    motion = rng.random() < .5
    verb = Node(rng.choice(MOTION if motion else OTHER), 'VB', 'root')
    subj, sh = noun_phrase()
    sh.head, sh.rel = verb, 'nsubj'
    nodes = subj
    if rng.random() < .3:
        adv = Node(rng.choice(ADV), 'RB', 'advmod')
        adv.head = verb
        nodes = nodes + [adv]
    obj, oh = noun_phrase(1)
    oh.head, oh.rel = verb, 'obj'
    nodes = nodes + [verb] + obj
    if rng.random() < .6:     # "in" and "near" attach to motion verbs, else to the object; "with" to the verb
        prep = Node(rng.choice(['in', 'near', 'with']), 'IN', 'case')
        inner, h = noun_phrase(1)
        to_verb = motion or prep.form == 'with'
        prep.head, h.head, h.rel = h, (verb if to_verb else oh), ('obl' if to_verb else 'nmod')
        nodes = nodes + [prep] + inner
    index = {id(n): i + 1 for i, n in enumerate(nodes)}
    return ([n.form for n in nodes], [n.tag for n in nodes],
            [0 if n.head is None else index[id(n.head)] for n in nodes], [RELS.index(n.rel) for n in nodes])


treebank = {}
while len(treebank) < 1700:
    s = sentence()
    treebank.setdefault(' '.join(s[0]), s)
treebank = list(treebank.values())
train, test = treebank[:1500], treebank[1500:]

PAD, BOS, UNK = 0, 1, 2
words = {w: i + 3 for i, w in enumerate(sorted({w for s in train for w in s[0]}))}
tags = {t: i + 2 for i, t in enumerate(sorted({t for s in train for t in s[1]}))}


def numericalize(batch):
    w = [torch.tensor([BOS] + [words.get(x, UNK) for x in s[0]]) for s in batch]
    t = [torch.tensor([BOS] + [tags[x] for x in s[1]]) for s in batch]
    a = [torch.tensor([0] + s[2]) for s in batch]
    r = [torch.tensor([0] + s[3]) for s in batch]
    w, t, a, r = (pad_sequence(x, batch_first=True) for x in (w, t, a, r))
    mask = w.ne(PAD)
    return w, t, a, r, mask


# ---------------------------------------------------------------- model
class SharedDropout(nn.Module):
    """One mask for all time steps of a sequence."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        m = x.new_empty(x.size(0), 1, x.size(2)).bernoulli_(1 - self.p) / (1 - self.p)
        return x * m


class IndependentDropout(nn.Module):
    """Drops the word or the tag of a token; the other one is scaled up."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, *items):
        if not self.training:
            return items
        masks = [x.new_empty(x.shape[:2]).bernoulli_(1 - self.p) for x in items]
        total = sum(masks)
        scale = len(items) / total.clamp(min=1)
        return [x * (m * scale).unsqueeze(-1) for x, m in zip(items, masks)]


class MLP(nn.Module):
    def __init__(self, n_in, n_out, p):
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)
        self.act = nn.LeakyReLU(.1)
        self.dropout = SharedDropout(p)
        nn.init.orthogonal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return self.dropout(self.act(self.linear(x)))


class Biaffine(nn.Module):
    def __init__(self, n_in, n_out=1, bias_x=True, bias_y=True):
        super().__init__()
        self.bias_x, self.bias_y = bias_x, bias_y
        self.weight = nn.Parameter(torch.zeros(n_out, n_in + bias_x, n_in + bias_y))

    def forward(self, x, y):
        if self.bias_x:
            x = torch.cat((x, torch.ones_like(x[..., :1])), -1)
        if self.bias_y:
            y = torch.cat((y, torch.ones_like(y[..., :1])), -1)
        s = torch.einsum('bxi,oij,byj->boxy', x, self.weight, y)
        return s.squeeze(1)


class BiaffineParser(nn.Module):
    def __init__(self, n_words, n_tags, n_rels, n_embed=32, n_hidden=40, n_arc=48, n_rel=24, p=.2):
        super().__init__()
        self.word_embed = nn.Embedding(n_words, n_embed, padding_idx=PAD)
        self.tag_embed = nn.Embedding(n_tags, n_embed, padding_idx=PAD)
        self.embed_dropout = IndependentDropout(p)
        self.lstm = nn.ModuleList([nn.LSTM(2 * n_embed, n_hidden, batch_first=True, bidirectional=True),
                                   nn.LSTM(2 * n_hidden, n_hidden, batch_first=True, bidirectional=True)])
        self.lstm_dropout = SharedDropout(p)
        self.mlp_arc_d = MLP(2 * n_hidden, n_arc, p)
        self.mlp_arc_h = MLP(2 * n_hidden, n_arc, p)
        self.mlp_rel_d = MLP(2 * n_hidden, n_rel, p)
        self.mlp_rel_h = MLP(2 * n_hidden, n_rel, p)
        self.arc_attn = Biaffine(n_arc, bias_x=True, bias_y=False)
        self.rel_attn = Biaffine(n_rel, n_out=n_rels)

    def forward(self, w, t, mask):
        x = torch.cat(self.embed_dropout(self.word_embed(w), self.tag_embed(t)), -1)
        lengths = mask.sum(1)
        for lstm in self.lstm:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            x, _ = pad_packed_sequence(lstm(packed)[0], batch_first=True, total_length=w.size(1))
            x = self.lstm_dropout(x)
        s_arc = self.arc_attn(self.mlp_arc_d(x), self.mlp_arc_h(x))                 # [b, dep, head]
        s_rel = self.rel_attn(self.mlp_rel_d(x), self.mlp_rel_h(x)).permute(0, 2, 3, 1)
        s_arc = s_arc.masked_fill(~mask.unsqueeze(1), float('-inf'))
        return s_arc, s_rel


def token_mask(mask):
    m = mask.clone()
    m[:, 0] = False            # the artificial root has no head
    return m


model = BiaffineParser(len(words) + 3, len(tags) + 2, len(RELS))
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(.9, .9), eps=1e-12)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, .75 ** (1 / 5000))
criterion = nn.CrossEntropyLoss()


@torch.no_grad()
def evaluate(data):
    model.eval()
    n = uas = las = 0
    for i in range(0, len(data), 100):
        w, t, arcs, rels, mask = numericalize(data[i:i + 100])
        s_arc, s_rel = model(w, t, mask)
        pred_arc = s_arc.argmax(-1)
        pred_rel = s_rel.argmax(-1).gather(-1, pred_arc.unsqueeze(-1)).squeeze(-1)
        m = token_mask(mask)
        ok = pred_arc.eq(arcs) & m
        n += m.sum().item()
        uas += ok.sum().item()
        las += (ok & pred_rel.eq(rels)).sum().item()
    model.train()
    return uas / n, las / n


# buckets of similar length, shuffled each epoch
by_length = sorted(train, key=lambda s: len(s[0]))
buckets = [by_length[i:i + 30] for i in range(0, len(by_length), 30)]
step = 0
while step < args.steps:
    rng.shuffle(buckets)
    for bucket in buckets:
        w, t, arcs, rels, mask = numericalize(bucket)
        s_arc, s_rel = model(w, t, mask)
        m = token_mask(mask)
        arc_loss = criterion(s_arc[m], arcs[m])
        gold = s_rel[m]
        gold = gold[torch.arange(len(gold)), arcs[m]]
        loss = arc_loss + criterion(gold, rels[m])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.)
        optimizer.step()
        scheduler.step()
        step += 1
        if step % 30 == 0:
            print(f'step {step:4d}  loss {loss.item():.4f}')
        if step == args.steps:
            break
uas, las = evaluate(test)
print(f'UAS {uas:.4f}  LAS {las:.4f}')
print(f'metric {las:.4f}')
