"""Character-level decoder language model with ALiBi on sentences of a small grammar."""
import argparse
import math
import random

import torch
import torch.nn as nn
import torch.nn.functional as F

NOUNS = 'cat dog bird farmer teacher child king sailor doctor baker'.split()
VERBS = 'see chase help hear follow paint carry find'.split()
ADJS = 'old small red happy quiet tall brave tired'.split()
PLACES = 'garden river market forest house tower'.split()


def noun_phrase(r):
    plural = r.random() < 0.5
    words = [r.choice(['the', 'some']) if plural else r.choice(['the', 'a'])]
    if r.random() < 0.5:
        words.append(r.choice(ADJS))
    noun = r.choice(NOUNS)
    if plural:
        noun = 'children' if noun == 'child' else noun + 's'
    words.append(noun)
    return words, plural


def sentence(r):
    subj, plural = noun_phrase(r)
    obj, _ = noun_phrase(r)
    verb = r.choice(VERBS) + ('' if plural else 's')
    return ' '.join(subj + [verb] + obj + ['in', 'the', r.choice(PLACES)]) + '.'


def corpus(seed, n_train=4000, n_test=300):
    r = random.Random(seed)
    seen = set()
    while len(seen) < n_train + n_test:
        seen.add(sentence(r))
    lines = sorted(seen)
    r.shuffle(lines)
    return '\n'.join(lines[n_test:]) + '\n', '\n'.join(lines[:n_test]) + '\n'


def alibi_slopes(n_heads):
    start = 2.0 ** (-8.0 / n_heads)
    return torch.tensor([start ** (i + 1) for i in range(n_heads)])


def build_alibi(n_heads, length):
    pos = torch.arange(length)
    distance = (pos[None, :] - pos[:, None]).float()            # j - i, not positive for the past
    bias = alibi_slopes(n_heads).view(-1, 1, 1) * distance
    return bias.masked_fill(distance > 0, float('-inf'))        # H x T x T


class Attention(nn.Module):
    def __init__(self, dim, n_heads):
        super().__init__()
        self.n_heads, self.head_dim = n_heads, dim // n_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x, alibi):
        B, T, C = x.shape

        def heads(t):
            return t.view(B, T, self.n_heads, self.head_dim).transpose(1, 2).reshape(B * self.n_heads, T, -1)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        scores = torch.baddbmm(alibi.repeat(B, 1, 1), q, k.transpose(1, 2),
                               beta=1.0, alpha=1.0 / math.sqrt(self.head_dim))
        out = torch.bmm(scores.softmax(dim=-1), v)
        out = out.view(B, self.n_heads, T, self.head_dim).transpose(1, 2).reshape(B, T, C)
        return self.o_proj(out)


class Block(nn.Module):
    def __init__(self, dim, n_heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, n_heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, alibi):
        x = x + self.attn(self.ln_1(x), alibi)
        return x + self.mlp(self.ln_2(x))


class AlibiLM(nn.Module):
    def __init__(self, vocab, dim=48, n_heads=4, n_layers=2, max_len=128):
        super().__init__()
        self.wte = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block(dim, n_heads) for _ in range(n_layers))
        self.ln_f = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, vocab, bias=False)
        self.register_buffer('alibi', build_alibi(n_heads, max_len), persistent=False)
        nn.init.normal_(self.wte.weight, std=0.02)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx):
        T = idx.size(1)
        alibi = self.alibi[:, :T, :T]
        x = self.wte(idx)
        for block in self.blocks:
            x = block(x, alibi)
        return self.lm_head(self.ln_f(x))


@torch.no_grad()
def eval_loss(model, data, length):
    model.eval()
    n = (len(data) - 1) // length
    x = data[:n * length].view(n, length)
    y = data[1:n * length + 1].view(n, length)
    total = 0.0
    for xb, yb in zip(x.split(32), y.split(32)):
        total += F.cross_entropy(model(xb).flatten(0, 1), yb.flatten(), reduction='sum').item()
    model.train()
    return total / y.numel()


def main():
    p = argparse.ArgumentParser()
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--steps', type=int, default=240)
    p.add_argument('--batch-size', type=int, default=24)
    p.add_argument('--train-len', type=int, default=48)
    p.add_argument('--test-len', type=int, default=96)
    p.add_argument('--lr', type=float, default=6e-3)
    a = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(a.seed)

    train_text, test_text = corpus(a.seed)
    chars = sorted(set(train_text + test_text))
    stoi = {c: i for i, c in enumerate(chars)}
    train = torch.tensor([stoi[c] for c in train_text])
    test = torch.tensor([stoi[c] for c in test_text])

    model = AlibiLM(len(chars))
    opt = torch.optim.AdamW(model.parameters(), lr=a.lr, betas=(0.9, 0.95), weight_decay=0.01)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, a.lr, total_steps=a.steps, pct_start=0.1)

    for step in range(a.steps):
        start = torch.randint(len(train) - a.train_len, (a.batch_size,))
        win = torch.stack([train[s:s + a.train_len + 1] for s in start.tolist()])
        logits = model(win[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, len(chars)), win[:, 1:].reshape(-1))
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        sched.step()
        if (step + 1) % 60 == 0:
            print(f'step {step + 1} train loss {loss.item():.3f}'
                  f' test loss @{a.train_len} {eval_loss(model, test, a.train_len):.3f}')

    print(f'test loss @{a.test_len}: {eval_loss(model, test, a.test_len):.3f}')
    print(f'metric {-eval_loss(model, test, a.train_len):.4f}')


if __name__ == '__main__':
    main()
