# Word sense tagging. Every sentence has one hidden domain; each ambiguous word gets the
# sense it has in that domain. The domain is only visible through a few cue words.
import argparse

import numpy as np
import torch
from torch import nn
import torch.nn.functional as F

N_DOMAINS = 4
N_CUES = 5            # cue words per domain
N_WORDS = 16          # ambiguous words
N_SENSES = 6
LENGTH = 14


class SenseData:
    def __init__(self, seed, sizes=(1152, 256)):
        rs = np.random.RandomState(seed)
        self.sense = np.stack([rs.permutation(N_WORDS) % N_SENSES for _ in range(N_DOMAINS)])
        rows, seen = [], set()
        while len(rows) < sum(sizes):
            words, tags = self.sentence(rs)
            if tuple(words) not in seen:
                seen.add(tuple(words))
                rows.append((words, tags))
        x = torch.tensor(np.array([r[0] for r in rows]))
        y = torch.tensor(np.array([r[1] for r in rows]))
        self.train, self.test = (x[:sizes[0]], y[:sizes[0]]), (x[sizes[0]:], y[sizes[0]:])

    def sentence(self, rs):
        domain = rs.randint(N_DOMAINS)
        words = rs.randint(N_WORDS, size=LENGTH)
        tags = self.sense[domain][words]
        spots = rs.choice(LENGTH, size=rs.randint(3, 5), replace=False)
        words[spots] = N_WORDS + domain * N_CUES + rs.randint(N_CUES, size=len(spots))
        tags[spots] = -1
        return words, tags


class ScaledDotProductAttention(nn.Module):
    def __init__(self, head_dim):
        super().__init__()
        self.scaling_factor = head_dim ** 0.5

    def forward(self, query, key, value):
        attn_score = torch.bmm(query, key.transpose(1, 2)) / self.scaling_factor
        attn_score = F.softmax(attn_score, -1)
        return torch.bmm(attn_score, value), attn_score


class MultiHeadAttention(nn.Module):
    def __init__(self, emb_dim, num_heads, fixed):
        super().__init__()
        self.head_dim = emb_dim // num_heads
        self.num_heads = num_heads
        self.fixed = fixed
        self.query_proj = nn.Linear(emb_dim, emb_dim)
        self.key_proj = nn.Linear(emb_dim, emb_dim)
        self.value_proj = nn.Linear(emb_dim, emb_dim)
        self.out_proj = nn.Linear(emb_dim, emb_dim)
        self.scaled_dot_attn = ScaledDotProductAttention(self.head_dim)

    def reshape_to_heads(self, batch_size, t):
        t = t.view(batch_size, -1, self.num_heads, self.head_dim).permute(0, 2, 1, 3)
        return t.reshape(batch_size * self.num_heads, -1, self.head_dim)

    def reshape_to_concat(self, batch_size, t):
        t = t.permute(0, 2, 1, 3)
        return t.reshape(batch_size, -1, self.num_heads * self.head_dim)

    def forward(self, query, key, value):
        batch_size = query.size(0)
        query = self.reshape_to_heads(batch_size, self.query_proj(query))
        key = self.reshape_to_heads(batch_size, self.key_proj(key))
        value = self.reshape_to_heads(batch_size, self.value_proj(value))
        output, attn_score = self.scaled_dot_attn(query, key, value)
        if self.fixed:
            output = output.view(batch_size, self.num_heads, -1, self.head_dim)
        else:
            output = output.view(self.num_heads, batch_size, -1, self.head_dim)
        return self.out_proj(self.reshape_to_concat(batch_size, output)), attn_score


class EncoderLayer(nn.Module):
    def __init__(self, emb_dim, num_heads, fixed):
        super().__init__()
        self.mha = MultiHeadAttention(emb_dim, num_heads, fixed)
        self.norm_a = nn.LayerNorm(emb_dim)
        self.mlp = nn.Sequential(nn.Linear(emb_dim, 2 * emb_dim), nn.ReLU(), nn.Linear(2 * emb_dim, emb_dim))
        self.norm_b = nn.LayerNorm(emb_dim)

    def forward(self, x):
        x = self.norm_a(x + self.mha(x, x, x)[0])
        return self.norm_b(x + self.mlp(x))


class Tagger(nn.Module):
    def __init__(self, fixed, emb_dim=32, num_heads=4, num_layers=2):
        super().__init__()
        self.words = nn.Embedding(N_WORDS + N_DOMAINS * N_CUES, emb_dim)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, emb_dim))
        self.encoder = nn.ModuleList([EncoderLayer(emb_dim, num_heads, fixed) for _ in range(num_layers)])
        self.tag = nn.Linear(emb_dim, N_SENSES)

    def forward(self, x):
        h = self.words(x) + self.places
        for layer in self.encoder:
            h = layer(h)
        return self.tag(h)


def score(model, x, y):
    model.eval()
    with torch.no_grad():
        hits = torch.cat([model(part).argmax(-1) for part in x.split(32)]) == y
    model.train()
    return hits[y >= 0].float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", default=0, type=int)
    opts = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(opts.seed)
    data = SenseData(opts.seed)
    x, y = data.train
    model = Tagger(opts.fixed)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)

    step = 0
    for epoch in range(6):
        total = 0.0
        order = torch.randperm(len(x))
        for batch in order.view(-1, 36):
            loss = F.cross_entropy(model(x[batch]).transpose(1, 2), y[batch], ignore_index=-1)
            adam.zero_grad()
            loss.backward()
            adam.step()
            total += loss.item()
            step += 1
        print("epoch", epoch, "steps", step, "loss", round(total / (len(x) // 36), 4),
              "test", round(score(model, *data.test), 4))
    print("metric", round(score(model, *data.test), 4))
