"""Longformer-style span pointer: sliding-window attention, question tokens are global."""
import argparse
import math
import random

import torch
import torch.nn as nn
import torch.nn.functional as F

# vocabulary: 0 pad, 1 cls, 2 marker, questions, entities of several types, filler words
PAD, CLS, MARK = 0, 1, 2
N_TYPES, PER_TYPE, N_FILLER = 4, 5, 20
Q0 = 3
E0 = Q0 + N_TYPES
W0 = E0 + N_TYPES * PER_TYPE
VOCAB = W0 + N_FILLER
MAX_LEN = 48


def make_example(rng):
    """[cls] [question] document. The answer is the entity of the asked type that has a marker beside it."""
    n = rng.randint(30, MAX_LEN)
    tokens = [CLS, PAD] + [rng.randrange(W0, VOCAB) for _ in range(n - 2)]
    # entities sit on a grid of slots four apart, so that a marker belongs to one entity only
    slots = rng.sample(range(3, n - 1, 4), 6)
    asked = rng.randrange(N_TYPES)
    others = [(asked + rng.randrange(1, N_TYPES)) % N_TYPES for _ in range(4)]
    kinds = [asked, asked] + others
    marked = [True, False, True, True, False, False]
    for slot, kind, mark in zip(slots, kinds, marked):
        tokens[slot] = E0 + kind * PER_TYPE + rng.randrange(PER_TYPE)
        if mark:
            tokens[slot + rng.choice((-1, 1))] = MARK
    tokens[1] = Q0 + asked
    return tokens + [PAD] * (MAX_LEN - n), slots[0]


def make_split(n, rng):
    ids, answer = zip(*[make_example(rng) for _ in range(n)])
    return {'input_ids': torch.tensor(ids), 'answer': torch.tensor(answer)}


class LongformerSelfAttention(nn.Module):
    def __init__(self, hidden, heads, window):
        super().__init__()
        self.heads, self.head_dim, self.window = heads, hidden // heads, window
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.query_global = nn.Linear(hidden, hidden)
        self.key_global = nn.Linear(hidden, hidden)
        self.value_global = nn.Linear(hidden, hidden)
        self.query_global.load_state_dict(self.query.state_dict())
        self.key_global.load_state_dict(self.key.state_dict())
        self.value_global.load_state_dict(self.value.state_dict())
        self.out = nn.Linear(hidden, hidden)

    def attend(self, q, k, v, allowed):
        b, n, _ = q.shape
        q, k, v = (t.view(b, -1, self.heads, self.head_dim) for t in (q, k, v))
        scores = torch.einsum('bihd,bjhd->bhij', q, k) / math.sqrt(self.head_dim)
        probs = scores.masked_fill(~allowed.unsqueeze(1), float('-inf')).softmax(-1)
        return torch.einsum('bhij,bjhd->bihd', probs, v).reshape(b, n, -1)

    def forward(self, x, is_real, n_global):
        n = x.size(1)
        pos = torch.arange(n)
        near = (pos[n_global:, None] - pos[None, :]).abs() <= self.window
        visible = near | (pos < n_global)                     # the window and the global tokens
        local_mask = visible & is_real[:, None, :]
        global_mask = is_real[:, None, :].expand(-1, n_global, -1)
        local = self.attend(self.query(x[:, n_global:]), self.key(x), self.value(x), local_mask)
        full = self.attend(self.query_global(x[:, :n_global]), self.key_global(x), self.value_global(x),
                           global_mask)
        return self.out(torch.cat((full, local), dim=1))


class Layer(nn.Module):
    def __init__(self, hidden, heads, window, p):
        super().__init__()
        self.attention = LongformerSelfAttention(hidden, heads, window)
        self.norm1 = nn.LayerNorm(hidden)
        self.ffn = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))
        self.norm2 = nn.LayerNorm(hidden)
        self.drop = nn.Dropout(p)

    def forward(self, x, is_real, n_global):
        x = self.norm1(x + self.drop(self.attention(x, is_real, n_global)))
        return self.norm2(x + self.drop(self.ffn(x)))


class LongformerForSpan(nn.Module):
    def __init__(self, hidden=32, heads=4, windows=(2, 4), p=0.05):
        super().__init__()
        self.word = nn.Embedding(VOCAB, hidden, padding_idx=PAD)
        self.position = nn.Embedding(MAX_LEN, hidden)
        nn.init.normal_(self.position.weight, std=0.1)
        self.norm = nn.LayerNorm(hidden)
        self.layers = nn.ModuleList(Layer(hidden, heads, w, p) for w in windows)
        self.qa_output = nn.Linear(hidden, 1)

    def forward(self, input_ids):
        is_real = input_ids != PAD
        x = self.norm(self.word(input_ids) + self.position.weight[:input_ids.size(1)])
        for layer in self.layers:
            x = layer(x, is_real, n_global=2)                 # [cls] and the question
        logits = self.qa_output(x).squeeze(-1)
        return {'logits': logits.masked_fill(~is_real, float('-inf'))}


def evaluate(model, split):
    model.eval()
    with torch.no_grad():
        pred = model(split['input_ids'])['logits'].argmax(-1)
    return (pred == split['answer']).float().mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--steps', type=int, default=180)
    parser.add_argument('--batch', type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    train, test = make_split(2500, rng), make_split(300, rng)

    model = LongformerForSpan()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    warmup = 30
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, (args.steps - s) / (args.steps - warmup)))

    for step in range(1, args.steps + 1):
        model.train()
        rows = torch.randint(len(train['answer']), (args.batch,))
        out = model(train['input_ids'][rows])
        loss = F.cross_entropy(out['logits'], train['answer'][rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 30 == 0:
            print(f'step {step:4d} | loss {loss.item():.3f} | test exact {evaluate(model, test):.3f}')
    print(f'metric {evaluate(model, test):.4f}')


if __name__ == '__main__':
    main()
