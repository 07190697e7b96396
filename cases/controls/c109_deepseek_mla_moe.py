# DeepSeek-V3 style decoder: multi-head latent attention with decoupled rotary keys, a dense first layer,
# then a mixture with one shared expert, sigmoid routing and balancing by a bias instead of a loss.
# Data: every sequence is written in one of several Markov "dialects"; the dialect has to be found in context.
import sys, math, argparse
import numpy as np
import torch, torch.nn as nn, torch.nn.functional as F

torch.set_num_threads(1)

class Cfg:
    vocab, dim, heads = 18, 48, 4
    q_rank, kv_rank = 24, 16
    nope, rope, vdim = 12, 8, 12
    experts, active, expert_dim, ffn = 4, 2, 32, 96
    bias_speed, route_scale = 0.001, 1.0
    length, batch, steps = 24, 16, 170

def markov_languages(rng, n, vocab):
    """Each dialect: every symbol has a favourite and a second follower."""
    mats = np.full((n, vocab, vocab), 0.1 / vocab)
    for k in range(n):
        first, second = rng.permutation(vocab), rng.permutation(vocab)
        for i in range(vocab):
            mats[k, i, first[i]] += 0.7
            mats[k, i, second[i]] += 0.2
    return mats

def draw(rng, mats, rows, length):
    cum = mats.cumsum(-1)
    cum[..., -1] = 1.0
    which = rng.integers(len(mats), size=rows)
    seq = np.zeros((rows, length + 1), dtype=np.int64)
    seq[:, 0] = rng.integers(mats.shape[1], size=rows)
    for t in range(length):
        u = rng.random(rows)[:, None]
        seq[:, t + 1] = (u > cum[which, seq[:, t]]).sum(1)
    return torch.from_numpy(seq)

class RMS(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.w = nn.Parameter(torch.ones(d))
    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),), self.w, 1e-6)

def rotary(x, cos, sin):                       # interleaved pairs
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

class MLA(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q_down, self.q_norm = nn.Linear(c.dim, c.q_rank, bias=False), RMS(c.q_rank)
        self.q_up = nn.Linear(c.q_rank, c.heads * (c.nope + c.rope), bias=False)
        self.kv_down, self.kv_norm = nn.Linear(c.dim, c.kv_rank + c.rope, bias=False), RMS(c.kv_rank)
        self.kv_up = nn.Linear(c.kv_rank, c.heads * (c.nope + c.vdim), bias=False)
        self.out = nn.Linear(c.heads * c.vdim, c.dim, bias=False)
        ang = torch.arange(c.length)[:, None] / 10000 ** (torch.arange(0, c.rope, 2) / c.rope)
        self.register_buffer('cos', ang.cos(), persistent=False)
        self.register_buffer('sin', ang.sin(), persistent=False)
    def forward(self, x):
        c, (B, T, _) = self.c, x.shape
        q = self.q_up(self.q_norm(self.q_down(x))).view(B, T, c.heads, -1).transpose(1, 2)
        q_n, q_r = q.split([c.nope, c.rope], -1)
        latent, k_r = self.kv_down(x).split([c.kv_rank, c.rope], -1)   # one rotary key for all heads
        kv = self.kv_up(self.kv_norm(latent)).view(B, T, c.heads, -1).transpose(1, 2)
        k_n, v = kv.split([c.nope, c.vdim], -1)
        q_r = rotary(q_r, self.cos[:T], self.sin[:T])
        k_r = rotary(k_r[:, None], self.cos[:T], self.sin[:T]).expand(-1, c.heads, -1, -1)
        q, k = torch.cat((q_n, q_r), -1), torch.cat((k_n, k_r), -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)    # 1/sqrt(nope + rope)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))

class SwiGLU(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(d, h, bias=False), nn.Linear(d, h, bias=False), nn.Linear(h, d, bias=False)
    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))

class MoE(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.centroids = nn.Parameter(torch.randn(c.experts, c.dim) / math.sqrt(c.dim))
        self.register_buffer('balance', torch.zeros(c.experts))
        self.experts = nn.ModuleList(SwiGLU(c.dim, c.expert_dim) for _ in range(c.experts))
        self.shared = SwiGLU(c.dim, c.expert_dim)
        self.load = None
    def forward(self, x):
        c, flat = self.c, x.reshape(-1, x.size(-1))
        aff = torch.sigmoid(flat @ self.centroids.t())
        top = (aff + self.balance).topk(c.active, -1).indices          # the bias only chooses
        gate = aff.gather(1, top)
        gate = c.route_scale * gate / gate.sum(-1, keepdim=True)       # weights are the plain affinities
        y = self.shared(flat)
        for e, expert in enumerate(self.experts):
            row, slot = (top == e).nonzero(as_tuple=True)
            if len(row):
                y = y.index_add(0, row, expert(flat[row]) * gate[row, slot, None])
        if self.training:
            self.load = torch.bincount(top.flatten(), minlength=c.experts).float()
        return y.view_as(x)
    def rebalance(self):
        self.balance += self.c.bias_speed * torch.sign(self.load.mean() - self.load)

class Layer(nn.Module):
    def __init__(self, c, ffn):
        super().__init__()
        self.n1, self.att, self.n2, self.ffn = RMS(c.dim), MLA(c), RMS(c.dim), ffn
    def forward(self, x):
        x = x + self.att(self.n1(x))
        return x + self.ffn(self.n2(x))

class LM(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.emb = nn.Embedding(c.vocab, c.dim)
        self.layers = nn.ModuleList([Layer(c, SwiGLU(c.dim, c.ffn)), Layer(c, MoE(c))])
        self.norm, self.head = RMS(c.dim), nn.Linear(c.dim, c.vocab, bias=False)
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=0.1)
    def forward(self, ids):
        x = self.emb(ids)
        for l in self.layers:
            x = l(x)
        return self.head(self.norm(x))

if __name__ == '__main__':
    a = argparse.ArgumentParser(); a.add_argument('--seed', default=0, type=int)
    seed = a.parse_args().seed
    torch.manual_seed(seed); rng = np.random.default_rng(seed)
    c = Cfg()
    mats = markov_languages(rng, 4, c.vocab)
    test = draw(rng, mats, 150, c.length)
    net = LM(c)
    print('parameters', sum(p.numel() for p in net.parameters()))
    opt = torch.optim.AdamW(net.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for s in range(1, c.steps + 1):
        for gr in opt.param_groups:
            gr['lr'] = 5e-3 * min(1.0, s / 20, (c.steps - s + 1) / 80)
        seq = draw(rng, mats, c.batch, c.length)
        logits = net(seq[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, c.vocab), seq[:, 1:].reshape(-1))
        opt.zero_grad(); loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        moe = net.layers[1].ffn
        moe.rebalance()
        if s % 34 == 0:
            print(f'{s:4d} loss {loss.item():.4f} busiest/mean expert {(moe.load.max() / moe.load.mean()).item():.3f}')
    net.eval()
    with torch.no_grad():
        y = test[:, 1:]
        hit = (net(test[:, :-1]).argmax(-1) == y).float()
    print('accuracy by position', ' '.join(f'{v:.3f}' for v in hit.mean(0)[[0, 1, 3, 7, 15, 23]].tolist()))
    print(f'constant symbol {(y == y.flatten().mode().values).float().mean().item():.4f}')
    print(f'metric {hit.mean().item():.4f}')
