# A structured self-attentive sentence embedding: BiLSTM, r attention hops, matrix sentence
# embedding M = A H, and the penalty ||A A^T - I||_F^2.  Toy reviews, one to five stars.
import argparse
import random
import torch
import torch.nn as nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

FOOD = "soup bread pasta fish cake coffee".split()
STAFF = "waiter cook owner service desk host".split()
GOOD = "tasty lovely superb kind warm quick".split()
BAD = "stale awful cold rude slow dirty".split()
FILL = "the was we then today again there for lunch so on table at night".split()
VOCAB = ["<pad>", "not"] + FOOD + STAFF + GOOD + BAD + FILL
W2I = {w: i for i, w in enumerate(VOCAB)}


def clause(rnd, noun_list, positive):
    negate = rnd.random() < 0.25
    adj = rnd.choice(GOOD if positive != negate else BAD)
    words = [rnd.choice(FILL) for _ in range(rnd.randint(0, 1))] + [rnd.choice(noun_list), "was"]
    return words + (["not"] if negate else []) + [adj]


def review(rnd):
    food = [rnd.random() < 0.5 for _ in range(2)]
    staff = [rnd.random() < 0.5 for _ in range(2)]
    parts = [clause(rnd, FOOD, v) for v in food] + [clause(rnd, STAFF, v) for v in staff]
    rnd.shuffle(parts)
    words = [w for p in parts for w in p] + [rnd.choice(FILL) for _ in range(rnd.randint(0, 3))]
    return words, sum(food) + sum(staff)


class SelfAttentiveEncoder(nn.Module):
    def __init__(self, n_words, emb=20, u=16, d_a=24, hops=5):
        super().__init__()
        self.embed = nn.Embedding(n_words, emb, padding_idx=0)
        self.lstm = nn.LSTM(emb, u, batch_first=True, bidirectional=True)
        self.ws1 = nn.Linear(2 * u, d_a, bias=False)
        self.ws2 = nn.Linear(d_a, hops, bias=False)
        nn.init.uniform_(self.ws1.weight, -0.1, 0.1)
        nn.init.uniform_(self.ws2.weight, -0.1, 0.1)

    def forward(self, tokens, lengths):
        packed = pack_padded_sequence(self.embed(tokens), lengths, batch_first=True, enforce_sorted=False)
        H, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=tokens.size(1))
        scores = self.ws2(torch.tanh(self.ws1(H))).transpose(1, 2)            # batch, hops, n
        scores = scores.masked_fill((tokens == 0).unsqueeze(1), float("-inf"))
        A = torch.softmax(scores, dim=-1)
        return A @ H, A


class Rater(nn.Module):
    def __init__(self, n_words, hops=5, u=16):
        super().__init__()
        self.encoder = SelfAttentiveEncoder(n_words, u=u, hops=hops)
        self.mlp = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(hops * 2 * u, 64), nn.ReLU(),
                                 nn.Dropout(0.2), nn.Linear(64, 5))

    def forward(self, tokens, lengths):
        M, A = self.encoder(tokens, lengths)
        return self.mlp(M), A


def penalty(A):
    eye = torch.eye(A.size(1))
    return ((A @ A.transpose(1, 2) - eye) ** 2).sum((1, 2)).mean()


def batchify(rows):
    n = max(len(w) for w, _ in rows)
    x = torch.tensor([[W2I[t] for t in w] + [0] * (n - len(w)) for w, _ in rows])
    return x, torch.tensor([len(w) for w, _ in rows]), torch.tensor([y for _, y in rows])


def run(seed):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rnd = random.Random(seed)
    seen, data = set(), []
    while len(data) < 4300:
        words, y = review(rnd)
        if tuple(words) not in seen:
            seen.add(tuple(words))
            data.append((words, y))
    test, train = data[:300], data[300:]
    net = Rater(len(VOCAB))
    opt = torch.optim.Adagrad(net.parameters(), lr=0.04)
    ce = nn.CrossEntropyLoss()
    step, coef = 0, 0.3
    for epoch in range(2):
        rnd.shuffle(train)
        net.train()
        tot = tot_p = n = 0
        for i in range(0, len(train), 32):
            x, l, y = batchify(train[i:i + 32])
            logits, A = net(x, l)
            task, pen = ce(logits, y), penalty(A)
            opt.zero_grad()
            (task + coef * pen).backward()
            clip_grad_norm_(net.parameters(), 0.5)
            opt.step()
            step += 1
            tot, tot_p, n = tot + task.item(), tot_p + pen.item(), n + 1
        print(f"epoch {epoch + 1} steps {step} cross-entropy {tot / n:.4f} penalty {tot_p / n:.4f}")
    net.eval()
    with torch.no_grad():
        x, l, y = batchify(test)
        logits, _ = net(x, l)
    print(f"mean absolute error {(logits.argmax(1) - y).abs().float().mean().item():.4f}")
    print(f"most frequent rating {torch.bincount(y).max().item() / len(y):.4f}")
    print(f"metric {(logits.argmax(1) == y).float().mean().item():.4f}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser()
    cli.add_argument("--seed", type=int, default=0)
    run(cli.parse_args().seed)
