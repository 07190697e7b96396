"""Visual question answering on toy grids with dense symmetric co-attention between image cells and words."""
import argparse
import math
import random

import torch
from torch import nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

parser = argparse.ArgumentParser()
parser.add_argument('--seed', type=int, default=0)
parser.add_argument('--steps', type=int, default=240)
parser.add_argument('--batch-size', type=int, default=40)
parser.add_argument('--lr', type=float, default=5e-3)

COLORS = {'red': (1, 0, 0), 'green': (0, 1, 0), 'blue': (0, 0, 1), 'yellow': (1, 1, 0)}
SHAPES = {
    'square': ['####', '#..#', '#..#', '####'],
    'cross': ['#..#', '.##.', '.##.', '#..#'],
    'bar': ['....', '####', '####', '....'],
    'tower': ['.##.', '.##.', '.##.', '.##.'],
}
ANSWERS = list(COLORS) + list(SHAPES)
TEMPLATES = {
    'color': ['what color is the {}', 'color of {}', 'tell me the color of the {} please'],
    'shape': ['what shape is {}', 'which object is the {} one', 'shape of the thing that is {}'],
}
WORDS = sorted({w for ts in TEMPLATES.values() for t in ts for w in t.replace('{}', '').split()} | set(ANSWERS))
VOCAB = {w: i + 1 for i, w in enumerate(WORDS)}
MAXLEN = 8


def sample(rng):
    image = torch.zeros(3, 12, 12)
    n = 3
    cells = rng.sample(range(9), n)
    colors, shapes = rng.sample(list(COLORS), n), rng.sample(list(SHAPES), n)
    for cell, c, s in zip(cells, colors, shapes):
        r, k = divmod(cell, 3)
        bitmap = torch.tensor([[float(ch == '#') for ch in row] for row in SHAPES[s]])
        image[:, 4 * r:4 * r + 4, 4 * k:4 * k + 4] = torch.tensor(COLORS[c]).view(3, 1, 1) * bitmap
    j = rng.randrange(n)
    if rng.random() < 0.5:
        text, answer = rng.choice(TEMPLATES['color']).format(shapes[j]), colors[j]
    else:
        text, answer = rng.choice(TEMPLATES['shape']).format(colors[j]), shapes[j]
    ids = [VOCAB[w] for w in text.split()]
    key = (tuple(cells), tuple(colors), tuple(shapes), text)
    return key, image, ids, ANSWERS.index(answer)


def build(n, rng):
    seen, images, questions, lengths, answers = set(), [], [], [], []
    while len(images) < n:
        key, im, ids, a = sample(rng)
        key = (frozenset(zip(*key[:3])), key[3])
        if key in seen:
            continue
        seen.add(key)
        images.append(im)
        questions.append(ids + [0] * (MAXLEN - len(ids)))
        lengths.append(len(ids))
        answers.append(a)
    return (torch.stack(images), torch.tensor(questions), torch.tensor(lengths), torch.tensor(answers))


class DenseCoAttn(nn.Module):
    def __init__(self, d, heads=4, n_none=3):
        super().__init__()
        self.h, self.dh = heads, d // heads
        self.proj_v = nn.Linear(d, d, bias=False)
        self.proj_q = nn.Linear(d, d, bias=False)
        self.none_v = nn.Parameter(torch.randn(n_none, d) / math.sqrt(d))
        self.none_q = nn.Parameter(torch.randn(n_none, d) / math.sqrt(d))
        self.fuse_v = nn.Linear(2 * d, d)
        self.fuse_q = nn.Linear(2 * d, d)

    def forward(self, v, q, q_mask):
        B, T, _ = v.shape
        N = q.size(1)
        v_ = torch.cat([v, self.none_v.expand(B, -1, -1)], 1)
        q_ = torch.cat([q, self.none_q.expand(B, -1, -1)], 1)
        keep = F.pad(q_mask, (0, self.none_q.size(0)), value=True)
        a = torch.einsum('bthd,bnhd->bhtn',
                         self.proj_v(v_).view(B, -1, self.h, self.dh),
                         self.proj_q(q_).view(B, -1, self.h, self.dh)) / math.sqrt(self.dh)
        over_words = a.masked_fill(~keep[:, None, None, :], float('-inf')).softmax(dim=3).mean(1)
        over_cells = a.softmax(dim=2).mean(1)
        q_for_v = torch.bmm(over_words, q_)[:, :T]
        v_for_q = torch.bmm(over_cells.transpose(1, 2), v_)[:, :N]
        v = F.relu(self.fuse_v(torch.cat([v, q_for_v], -1))) + v
        q = F.relu(self.fuse_q(torch.cat([q, v_for_q], -1))) + q
        return v, q


class Summary(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 1, bias=False))

    def forward(self, x, mask=None):
        s = self.mlp(x).squeeze(-1)
        if mask is not None:
            s = s.masked_fill(~mask, float('-inf'))
        return torch.einsum('bn,bnd->bd', s.softmax(-1), x)


class DCN(nn.Module):
    def __init__(self, d=64, layers=2):
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv2d(3, d, 4, stride=4), nn.ReLU(), nn.Conv2d(d, d, 1))
        self.emb = nn.Embedding(len(VOCAB) + 1, d, padding_idx=0)
        self.lstm = nn.LSTM(d, d // 2, batch_first=True, bidirectional=True)
        self.layers = nn.ModuleList([DenseCoAttn(d) for _ in range(layers)])
        self.sum_v, self.sum_q = Summary(d), Summary(d)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Sequential(nn.Linear(2 * d, d), nn.ReLU(), nn.Linear(d, len(ANSWERS)))

    def forward(self, image, question, length):
        v = self.cnn(image).flatten(2).transpose(1, 2)
        packed = pack_padded_sequence(self.emb(question), length, batch_first=True, enforce_sorted=False)
        q, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=question.size(1))
        mask = question != 0
        for layer in self.layers:
            v, q = layer(v, q, mask)
        z = torch.cat([self.sum_v(v), self.sum_q(q, mask)], -1)
        return self.head(self.drop(z))


if __name__ == '__main__':
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    data = build(4500, random.Random(args.seed))
    images, questions, lengths, answers = data
    images += 0.05 * torch.randn_like(images)
    n_train = 4000
    net = DCN()
    opt = torch.optim.Adam(net.parameters(), lr=args.lr, betas=(0.9, 0.99))
    sched = torch.optim.lr_scheduler.MultiStepLR(opt, [170, 215], gamma=0.3)

    order = torch.randperm(n_train)
    pos = 0
    for step in range(args.steps):
        if pos + args.batch_size > n_train:
            order, pos = torch.randperm(n_train), 0
        i = order[pos:pos + args.batch_size]
        pos += args.batch_size
        net.train()
        loss = F.cross_entropy(net(images[i], questions[i], lengths[i]), answers[i])
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        opt.step()
        sched.step()
        if (step + 1) % 48 == 0:
            print('[%d/%d] loss %.3f' % (step + 1, args.steps, loss.item()))

    net.eval()
    with torch.no_grad():
        pred = net(images[n_train:], questions[n_train:], lengths[n_train:]).argmax(1)
    print('metric %.4f' % (pred == answers[n_train:]).float().mean().item())
