# ColBERT: late interaction over contextual token embeddings (MaxSim), one shared encoder.
import argparse, math
import numpy as np
import torch
from torch import nn
import torch.nn.functional as F

p = argparse.ArgumentParser()
p.add_argument('--seed', type=int, default=0)
SEED = p.parse_args().seed
torch.set_num_threads(1)
torch.manual_seed(SEED)
rs = np.random.RandomState(SEED)

# --- vocabulary: every concept has a written form used in passages and another one used in queries
PAD, CLS, QTOK, DTOK, MASK, COMMA, STOP = range(7)
N_CONCEPT, N_FILL = 60, 8
DOC0 = 7
QRY0 = DOC0 + N_CONCEPT
FILL0 = QRY0 + N_CONCEPT
VOCAB = FILL0 + N_FILL
LD, LQ = 20, 8


def passage():
    concepts = rs.choice(N_CONCEPT, rs.randint(9, 13), replace=False)
    toks = [CLS, DTOK]
    for i, c in enumerate(concepts):
        toks.append(DOC0 + c)
        if rs.rand() < .2:
            toks.append(COMMA)
        if rs.rand() < .15:
            toks.append(FILL0 + rs.randint(N_FILL))
    toks = toks[:LD - 1] + [STOP]
    kept = [t - DOC0 for t in toks if DOC0 <= t < QRY0]
    return toks, kept


def query(kept):
    cs = rs.choice(kept, rs.randint(3, 5), replace=False)
    toks = [CLS, QTOK] + [(QRY0 if rs.rand() < .7 else DOC0) + c for c in cs]
    if rs.rand() < .5:
        toks.insert(2, FILL0 + rs.randint(N_FILL))
    return toks


def pack(rows, length, fill):
    out = np.full((len(rows), length), fill)
    for i, r in enumerate(rows):
        out[i, :len(r)] = r
    return torch.from_numpy(out)


def make(n):
    d, q = [], []
    for _ in range(n):
        toks, kept = passage()
        d.append(toks)
        q.append(query(kept))
    return pack(q, LQ, MASK), pack(d, LD, PAD)      # queries are filled up with [MASK], not [PAD]


class Block(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.h = h
        self.qkv, self.o = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.ff = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x, keys_ok):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.h, D // self.h).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keys_ok[:, None, None, :])
        x = self.n1(x + self.o(y.transpose(1, 2).reshape(B, T, D)))
        return self.n2(x + self.ff(x))


class ColBERT(nn.Module):
    def __init__(self, d=48, h=4, layers=2, dim=24):
        super().__init__()
        self.tok = nn.Embedding(VOCAB, d, padding_idx=PAD)
        self.pos = nn.Embedding(LD, d)
        self.norm = nn.LayerNorm(d)
        self.blocks = nn.ModuleList([Block(d, h) for _ in range(layers)])
        self.linear = nn.Linear(d, dim, bias=False)
        nn.init.normal_(self.tok.weight, std=.02)
        nn.init.normal_(self.pos.weight, std=.02)
        with torch.no_grad():
            self.tok.weight[PAD].zero_()

    def encode(self, ids, keys_ok):
        x = self.norm(self.tok(ids) + self.pos.weight[:ids.size(1)])
        for b in self.blocks:
            x = b(x, keys_ok)
        return F.normalize(self.linear(x), dim=-1)

    def query(self, ids):
        # [MASK] fillers are not attended to, but their own outputs do vote (query augmentation)
        return self.encode(ids, ids != MASK)

    def doc(self, ids):
        emb = self.encode(ids, ids != PAD)
        keep = (ids != PAD) & (ids != COMMA) & (ids != STOP)   # punctuation is not indexed
        return emb, keep


def maxsim(Q, D, keep):
    """(nq, Lq, e) x (nd, Ld, e) -> (nq, nd)"""
    sim = torch.einsum('qie,dje->qdij', Q, D)
    sim = sim.masked_fill(~keep[None, :, None, :], float('-inf'))
    return sim.max(-1).values.sum(-1)


train_q, train_d = make(2000)
test_q, test_d = make(120)
net = ColBERT()
STEPS, BS = 260, 16
opt = torch.optim.Adam(net.parameters(), lr=2.5e-3, fused=True)
lr_at = lambda s: min(1, (s + 1) / 25) * max(.05, 1 - s / STEPS)
sched = torch.optim.lr_scheduler.LambdaLR(opt, lr_at)
run = 0.
for step in range(STEPS):
    idx = torch.randperm(len(train_q))[:BS]
    Q = net.query(train_q[idx])
    D, keep = net.doc(train_d[idx])
    loss = F.cross_entropy(maxsim(Q, D, keep), torch.arange(BS))
    opt.zero_grad(set_to_none=True)
    loss.backward()
    gn = nn.utils.clip_grad_norm_(net.parameters(), 2.0)
    opt.step()
    sched.step()
    run += loss.item()
    if step % 52 == 51:
        print('%d steps | in-batch loss %.4f | grad %.3f' % (step + 1, run / 52, gn))
        run = 0.

net.eval()
with torch.no_grad():
    D, keep = net.doc(test_d)
    S = maxsim(net.query(test_q), D, keep)
rank = (S > S.diagonal()[:, None]).sum(1) + 1
print('recall@10 %.4f' % (rank <= 10).float().mean())
mrr = torch.where(rank <= 10, 1. / rank, torch.zeros(())).mean()
print('metric %.4f' % mrr)
