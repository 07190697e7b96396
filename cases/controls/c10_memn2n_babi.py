"""End-to-end memory network (three hops) answering where a person is after a short story."""
import argparse

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

PEOPLE = "mary john sandra daniel".split()
PLACES = "kitchen garden office bathroom hallway bedroom".split()
MOVES = ["went to the", "moved to the", "travelled to the", "went back to the"]
THINGS = "football apple milk".split()
WORDS = sorted(set(PEOPLE + PLACES + THINGS + " ".join(MOVES).split() + "where is picked up the".split()))
VOCAB = {w: i + 1 for i, w in enumerate(WORDS)}  # 0 is the nil word
MAX_STORY, MAX_SENT = 8, 6


def make_story(rng):
    n = int(rng.integers(3, MAX_STORY + 1))
    where, lines = {}, []
    for i in range(n):
        p = PEOPLE[rng.integers(len(PEOPLE))]
        if i > 0 and rng.random() < 0.25:
            lines.append(f"{p} picked up the {THINGS[rng.integers(len(THINGS))]}")
        else:
            place = PLACES[rng.integers(len(PLACES))]
            lines.append(f"{p} {MOVES[rng.integers(len(MOVES))]} {place}")
            where[p] = place
    who = sorted(where)[rng.integers(len(where))]
    return lines, f"where is {who}", where[who]


def make_data(rng, n, seen):
    S = np.zeros((n, MAX_STORY, MAX_SENT), dtype=np.int64)
    Q = np.zeros((n, MAX_SENT), dtype=np.int64)
    A = np.zeros(n, dtype=np.int64)
    i = 0
    while i < n:
        lines, q, a = make_story(rng)
        key = "|".join(lines) + q
        if key in seen:
            continue
        seen.add(key)
        for m, line in enumerate(lines):
            w = [VOCAB[t] for t in line.split()]
            S[i, m, : len(w)] = w
        w = [VOCAB[t] for t in q.split()]
        Q[i, : len(w)] = w
        A[i] = VOCAB[a] - 1
        i += 1
    return torch.from_numpy(S), torch.from_numpy(Q), torch.from_numpy(A)


class MemN2N(nn.Module):
    """Adjacent weight tying: A[k+1] = C[k], B = A[1], W = C[K]^T."""

    def __init__(self, vocab_size, dim, hops, max_story):
        super().__init__()
        self.hops = hops
        self.dim = dim
        self.embed = nn.ModuleList(nn.Embedding(vocab_size, dim, padding_idx=0) for _ in range(hops + 1))
        self.time = nn.ParameterList(nn.Parameter(torch.randn(max_story, dim) * 0.1) for _ in range(hops + 1))
        for e in self.embed:
            nn.init.normal_(e.weight, 0, 0.1)
            with torch.no_grad():
                e.weight[0].zero_()

    def position_encoding(self, tokens):
        J = (tokens != 0).sum(-1, keepdim=True).clamp(min=1).unsqueeze(-1).float()
        j = torch.arange(1, tokens.size(-1) + 1).float().unsqueeze(-1)
        k = torch.arange(1, self.dim + 1).float()
        return (1 - j / J) - (k / self.dim) * (1 - 2 * j / J)

    def forward(self, story, query):
        filled = (story != 0).any(-1)                                   # (B, M)
        n = filled.sum(1, keepdim=True)
        age = (n - 1 - torch.arange(story.size(1))).clamp(min=0)        # 0 = most recent sentence
        pe_s, pe_q = self.position_encoding(story), self.position_encoding(query)

        u = (self.embed[0](query) * pe_q).sum(1)
        for hop in range(self.hops):
            m = (self.embed[hop](story) * pe_s).sum(2) + self.time[hop][age]
            c = (self.embed[hop + 1](story) * pe_s).sum(2) + self.time[hop + 1][age]
            p = (m * u.unsqueeze(1)).sum(2)
            p = F.softmax(p.masked_fill(~filled, float("-inf")), dim=1)
            o = (p.unsqueeze(2) * c).sum(1)
            u = u + o
        return F.linear(u, self.embed[self.hops].weight[1:])            # the nil word is no answer


def evaluate(model, S, Q, A):
    model.eval()
    with torch.no_grad():
        return (model(S, Q).argmax(1) == A).float().mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    seen = set()
    train = make_data(rng, 2000, seen)
    test = make_data(rng, 500, seen)
    model = MemN2N(len(VOCAB) + 1, 32, 3, MAX_STORY)
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    sched = torch.optim.lr_scheduler.StepLR(opt, step_size=3, gamma=0.5)

    for epoch in range(10):
        model.train()
        total = 0.0
        perm = torch.randperm(len(train[2]))
        for ix in perm.split(48):
            S, Q, A = (t[ix] for t in train)
            loss = F.cross_entropy(model(S, Q), A)
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 40.0)
            opt.step()
            total += loss.item() * len(ix)
        sched.step()
        print(f"epoch {epoch + 1:2d} loss {total / len(perm):.4f} train acc {evaluate(model, *train):.3f}")
    print(f"metric {evaluate(model, *test):.4f}")


if __name__ == "__main__":
    main()
