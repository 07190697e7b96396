"""Trains BiDAF to answer questions about short generated passages with a span of the passage."""
import argparse
import random

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

NAMES = "mary john sandra daniel oscar wendy peter laura felix nadia bruno helen".split()
ADJS = "red small heavy broken old green shiny wooden".split()
NOUNS = "lamp ladder kettle bottle jacket guitar camera basket hammer mirror".split()
PLACES = "garden harbour office kitchen library station market museum".split()
VERBS = [("took", "take"), ("sold", "sell"), ("found", "find"), ("dropped", "drop")]
MAX_CHARS = 10


def make_example(rng):
    facts = []
    for name in rng.sample(NAMES, rng.randint(2, 3)):
        adj = [rng.choice(ADJS)] if rng.random() < 0.4 else []
        if rng.random() < 0.6:
            past, base = rng.choice(VERBS)
            answer = adj + [rng.choice(NOUNS)]
            facts.append(([name, past, "the"], answer, ["what", "did", name, base, "?"]))
        else:
            answer = adj + [rng.choice(PLACES)]
            facts.append(([name, "visited", "the"], answer, ["where", "was", name, "?"]))
    asked = rng.randrange(len(facts))
    context, span = [], None
    for i, (prefix, answer, question) in enumerate(facts):
        context += prefix
        if i == asked:
            span = (len(context), len(context) + len(answer) - 1)
        context += answer + ["."]
    return context, facts[asked][2], span


def make_examples(n, rng):
    seen, out = set(), []
    while len(out) < n:
        ex = make_example(rng)
        key = (" ".join(ex[0]), " ".join(ex[1]))
        if key not in seen:
            seen.add(key)
            out.append(ex)
    return out


class QADataset(Dataset):
    def __init__(self, examples, word2id):
        ids = lambda words: torch.tensor([word2id[w] for w in words])
        self.examples = [(ids(c), ids(q), torch.tensor(span)) for c, q, span in examples]

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        return self.examples[i]


def collate(items):
    c, q, span = zip(*items)
    pad = lambda xs: nn.utils.rnn.pad_sequence(xs, batch_first=True)
    return {"c_word": pad(c), "c_len": torch.tensor([len(x) for x in c]),
            "q_word": pad(q), "q_len": torch.tensor([len(x) for x in q]), "span": torch.stack(span)}


def spell(words, char2id):
    table = torch.zeros(len(words) + 1, MAX_CHARS, dtype=torch.long)
    for i, w in enumerate(words):
        for j, ch in enumerate(w[:MAX_CHARS]):
            table[i + 1, j] = char2id[ch]
    return table


def reverse_sequence(x, lengths):
    """Reverses each sequence within its length; the padding stays at the end."""
    t = torch.arange(x.size(1))[None, :]
    idx = torch.where(t < lengths[:, None], lengths[:, None] - 1 - t, t)
    return x.gather(1, idx.unsqueeze(-1).expand_as(x))


class BiLSTM(nn.Module):
    def __init__(self, d_in, d_hid, layers=1, dropout=0.0):
        super().__init__()
        sizes = [d_in] + [2 * d_hid] * (layers - 1)
        self.fw = nn.ModuleList([nn.LSTM(n, d_hid, batch_first=True) for n in sizes])
        self.bw = nn.ModuleList([nn.LSTM(n, d_hid, batch_first=True) for n in sizes])
        self.drop = nn.Dropout(dropout)

    def forward(self, x, lengths):
        for i, (fw, bw) in enumerate(zip(self.fw, self.bw)):
            if i > 0:
                x = self.drop(x)
            ahead, _ = fw(x)
            back, _ = bw(reverse_sequence(x, lengths))
            x = torch.cat([ahead, reverse_sequence(back, lengths)], dim=-1)
        return x


class BiDAF(nn.Module):
    def __init__(self, spelling, n_chars, d_word=24, d_char=8, n_filters=12, d=20, dropout=0.05):
        super().__init__()
        self.register_buffer("spelling", spelling)        # (words, characters)
        self.word_emb = nn.Embedding(len(spelling), d_word, padding_idx=0)
        self.char_emb = nn.Embedding(n_chars, d_char, padding_idx=0)
        self.char_conv = nn.Conv1d(d_char, n_filters, kernel_size=5, padding=2)
        d_in = d_word + n_filters
        self.highway_gate = nn.ModuleList([nn.Linear(d_in, d_in) for _ in range(2)])
        self.highway_lin = nn.ModuleList([nn.Linear(d_in, d_in) for _ in range(2)])
        self.contextual = BiLSTM(d_in, d)
        self.w_c = nn.Linear(2 * d, 1, bias=False)
        self.w_q = nn.Linear(2 * d, 1, bias=False)
        self.w_cq = nn.Parameter(torch.empty(2 * d))
        nn.init.normal_(self.w_cq, std=(2 * d) ** -0.5)
        self.modeling = BiLSTM(8 * d, d, layers=2, dropout=dropout)
        self.output_rnn = BiLSTM(2 * d, d)
        self.start_out = nn.Linear(10 * d, 1)
        self.end_out = nn.Linear(10 * d, 1)
        self.drop = nn.Dropout(dropout)

    def char_table(self):
        """Character features of the whole (small) vocabulary, looked up by word afterwards."""
        c = self.char_conv(self.char_emb(self.spelling).transpose(1, 2))
        return F.relu(c).max(dim=2).values

    def embed(self, words, table):
        c = F.embedding(words, table)
        x = torch.cat([c, self.word_emb(words)], dim=-1)
        for gate, lin in zip(self.highway_gate, self.highway_lin):
            g = torch.sigmoid(gate(x))
            x = g * F.relu(lin(x)) + (1 - g) * x
        return self.drop(x)

    def attention_flow(self, h, u, c_mask, q_mask):
        # trilinear similarity w^T [h; u; h*u], computed without the (b, t, j, 6d) tensor
        s = self.w_c(h) + self.w_q(u).transpose(1, 2) + torch.matmul(h * self.w_cq, u.transpose(1, 2))
        s = s.masked_fill(~q_mask[:, None, :], -1e9)
        c2q = torch.softmax(s, dim=2) @ u
        best = s.max(dim=2).values.masked_fill(~c_mask, -1e9)
        q2c = torch.softmax(best, dim=1).unsqueeze(1) @ h
        return torch.cat([h, c2q, h * c2q, h * q2c], dim=-1)

    def forward(self, batch):
        c_mask, q_mask = batch["c_word"] != 0, batch["q_word"] != 0
        table = self.char_table()
        h = self.contextual(self.embed(batch["c_word"], table), batch["c_len"])
        u = self.contextual(self.embed(batch["q_word"], table), batch["q_len"])
        g = self.drop(self.attention_flow(h, u, c_mask, q_mask))
        m = self.drop(self.modeling(g, batch["c_len"]))
        m2 = self.drop(self.output_rnn(m, batch["c_len"]))
        p1 = self.start_out(torch.cat([g, m], -1)).squeeze(-1)
        p2 = self.end_out(torch.cat([g, m2], -1)).squeeze(-1)
        return p1.masked_fill(~c_mask, -1e9), p2.masked_fill(~c_mask, -1e9)


class EMA:
    def __init__(self, model, decay):
        self.decay = decay
        self.shadow = {n: p.detach().clone() for n, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model):
        for n, p in model.named_parameters():
            self.shadow[n].lerp_(p, 1 - self.decay)

    @torch.no_grad()
    def assign(self, model):
        for n, p in model.named_parameters():
            p.copy_(self.shadow[n])


@torch.no_grad()
def exact_match(model, loader):
    model.eval()
    hits, total = 0, 0
    for batch in loader:
        p1, p2 = model(batch)
        joint = F.log_softmax(p1, 1).unsqueeze(2) + F.log_softmax(p2, 1).unsqueeze(1)
        n = joint.size(1)
        legal = torch.ones(n, n, dtype=torch.bool).triu()
        flat = joint.masked_fill(~legal, -1e18).view(len(p1), -1).argmax(1)
        pred = torch.stack([flat // n, flat % n], 1)
        hits += (pred == batch["span"]).all(1).sum().item()
        total += len(pred)
    model.train()
    return hits / total


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--epochs", type=int, default=3)
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    rng = random.Random(args.seed)

    examples = make_examples(1510, rng)
    train, dev = examples[:1310], examples[1310:]
    words = sorted({w for c, q, _ in train for w in c + q})
    word2id = {w: i + 1 for i, w in enumerate(words)}
    char2id = {c: i + 1 for i, c in enumerate(sorted(set("".join(words))))}
    train_loader = DataLoader(QADataset(train, word2id), 24, shuffle=True, collate_fn=collate,
                              generator=torch.Generator().manual_seed(args.seed))
    dev_loader = DataLoader(QADataset(dev, word2id), 100, collate_fn=collate)

    model = BiDAF(spell(words, char2id), len(char2id) + 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-3)
    ema = EMA(model, decay=0.9)
    step = 0
    for epoch in range(args.epochs):
        for batch in train_loader:
            p1, p2 = model(batch)
            loss = F.cross_entropy(p1, batch["span"][:, 0]) + F.cross_entropy(p2, batch["span"][:, 1])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            ema.update(model)
            step += 1
            if step % 50 == 0:
                print(f"epoch {epoch} step {step} loss {loss.item():.4f}")
    ema.assign(model)
    print(f"metric {exact_match(model, dev_loader):.4f}")


if __name__ == "__main__":
    main()
