"""Transformer tagger with softmax-off-by-one: does the partner of each token occur in the sequence?"""
import argparse

import torch
from torch import nn

PAD = 0


def softmax_one(x, dim=-1):
    """exp(x_i) / (1 + sum_j exp(x_j)): a softmax with one more logit that is fixed to zero."""
    shift = x.amax(dim=dim, keepdim=True).clamp(min=0)
    ex = torch.exp(x - shift)
    return ex / (torch.exp(-shift) + ex.sum(dim=dim, keepdim=True))


class QuietAttention(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.h = h
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.proj = nn.Linear(d, d)

    def forward(self, x, key_mask):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.h, d // self.h).unbind(2)
        logits = torch.einsum('bqhc,bkhc->bhqk', q, k) * (d // self.h) ** -0.5
        logits = logits.masked_fill(~key_mask[:, None, None, :], float('-inf'))
        out = torch.einsum('bhqk,bkhc->bqhc', softmax_one(logits), v)
        return self.proj(out.reshape(b, t, d))


class Layer(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.att = QuietAttention(d, h)
        self.fc1, self.fc2 = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x, key_mask):
        x = x + self.att(self.n1(x), key_mask)
        return x + self.fc2(torch.relu(self.fc1(self.n2(x))))


class Tagger(nn.Module):
    """A bag of tokens: the tags do not depend on the order, so there are no positions."""

    def __init__(self, vocab, d=48, h=4, depth=2):
        super().__init__()
        self.emb = nn.Embedding(vocab + 1, d, padding_idx=PAD)
        self.layers = nn.ModuleList([Layer(d, h) for _ in range(depth)])
        self.norm = nn.LayerNorm(d)
        self.cls = nn.Linear(d, 1)

    def forward(self, tokens):
        mask = tokens != PAD
        x = self.emb(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return self.cls(self.norm(x)).squeeze(-1), mask


def generate(n, n_pairs, min_len, max_len, gen):
    """Tokens 2i+1 and 2i+2 are partners; labels say for each token if its partner is there."""
    lengths = torch.randint(min_len, max_len + 1, (n,), generator=gen)
    keys = torch.rand(n, 2 * n_pairs, generator=gen)
    tokens = keys.argsort(dim=1)[:, :max_len] + 1                 # distinct tokens
    tokens = tokens.masked_fill(torch.arange(max_len)[None] >= lengths[:, None], PAD)
    partner = (tokens - 1).bitwise_xor(1) + 1
    labels = (partner[:, :, None] == tokens[:, None, :]).any(-1)
    # the model sees a set, so no set may come twice
    members = torch.zeros(n, 2 * n_pairs + 1, dtype=torch.long).scatter_(1, tokens, 1)[:, 1:]
    code = (members << torch.arange(2 * n_pairs)).sum(1).tolist()
    unique = list({c: i for i, c in enumerate(code)}.values())
    return tokens[unique], labels[unique].float()


def score(model, tokens, labels):
    model.eval()
    with torch.no_grad():
        logit, mask = model(tokens)
    return ((logit > 0) == (labels > 0.5))[mask].float().mean().item()


def run(seed, steps, batch, lr):
    torch.manual_seed(seed)
    gen = torch.Generator().manual_seed(seed)
    n_pairs = 10
    tokens, labels = generate(6500, n_pairs, 6, 14, gen)
    train_x, train_y, test_x, test_y = tokens[500:], labels[500:], tokens[:500], labels[:500]

    model = Tagger(2 * n_pairs)
    opt = torch.optim.RAdam(model.parameters(), lr=lr)
    sched = torch.optim.lr_scheduler.PolynomialLR(opt, total_iters=steps, power=1.0)
    bce = nn.BCEWithLogitsLoss()
    for it in range(1, steps + 1):
        model.train()
        pick = torch.randint(0, len(train_x), (batch,), generator=gen)
        logit, mask = model(train_x[pick])
        loss = bce(logit[mask], train_y[pick][mask])
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        sched.step()
        if it % 50 == 0:
            print(f'{it:5d}  bce {loss.item():.4f}  held-out acc {score(model, test_x, test_y):.4f}')
    return score(model, test_x, test_y)


if __name__ == '__main__':
    cli = argparse.ArgumentParser()
    cli.add_argument('--seed', type=int, default=0)
    cli.add_argument('--steps', type=int, default=300)
    cli.add_argument('--batch', type=int, default=64)
    cli.add_argument('--lr', type=float, default=3e-3)
    a = cli.parse_args()
    torch.set_num_threads(1)
    print(f'metric {run(a.seed, a.steps, a.batch, a.lr):.4f}')
