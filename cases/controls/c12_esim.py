"""ESIM on small generated premise / hypothesis pairs with the labels entailment, contradiction and neutral."""
import argparse
import random

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader

COLORS = "red blue green black white".split()
NOUNS = "ball box cup lamp book chair".split()
JOINS = ["and", "near", "behind", "on"]
LABELS = {"entailment": 0, "contradiction": 1, "neutral": 2}
VOCAB = {w: i for i, w in enumerate(["<pad>", "the", "a", "is", "there"] + COLORS + NOUNS + JOINS)}


def sample_pair(rng):
    nouns = rng.sample(NOUNS, rng.choice([2, 3]))
    colors = [rng.choice(COLORS) for _ in nouns]
    premise = []
    for i, (n, c) in enumerate(zip(nouns, colors)):
        if i:
            premise.append(rng.choice(JOINS))
        premise += [rng.choice(["the", "a"]), c, n]
    label = rng.choice(list(LABELS))
    k = rng.randrange(len(nouns))
    if label == "entailment":
        noun, color = nouns[k], colors[k]
    elif label == "contradiction":
        noun, color = nouns[k], rng.choice([c for c in COLORS if c != colors[k]])
    else:
        noun, color = rng.choice([n for n in NOUNS if n not in nouns]), rng.choice(COLORS)
    hypothesis = ["the", noun, "is", color] if rng.random() < 0.6 else ["there", "is", "a", color, noun]
    return tuple(premise), tuple(hypothesis), LABELS[label]


def make_data(n, seed):
    rng = random.Random(seed)
    pairs = set()
    while len(pairs) < n:
        pairs.add(sample_pair(rng))
    pairs = sorted(pairs)
    rng.shuffle(pairs)
    return [(torch.tensor([VOCAB[w] for w in p]), torch.tensor([VOCAB[w] for w in h]), y) for p, h, y in pairs]


def collate(batch):
    p, h, y = zip(*batch)
    return {
        "premise": pad_sequence(p, batch_first=True), "premise_len": torch.tensor([len(t) for t in p]),
        "hypothesis": pad_sequence(h, batch_first=True), "hypothesis_len": torch.tensor([len(t) for t in h]),
        "label": torch.tensor(y),
    }


def get_mask(lengths, max_len):
    return torch.arange(max_len)[None, :] < lengths[:, None]


def masked_softmax(scores, mask):
    """scores (B, N, M), mask (B, M) true at words."""
    return scores.masked_fill(~mask[:, None, :], float("-inf")).softmax(dim=-1)


class Seq2SeqEncoder(nn.Module):
    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.lstm = nn.LSTM(input_size, hidden_size, batch_first=True, bidirectional=True)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = self.lstm(packed)
        return pad_packed_sequence(out, batch_first=True, total_length=x.size(1))[0]


class SoftmaxAttention(nn.Module):
    def forward(self, premise, p_mask, hypothesis, h_mask):
        similarity = premise.bmm(hypothesis.transpose(2, 1).contiguous())
        prem_hyp = masked_softmax(similarity, h_mask)
        hyp_prem = masked_softmax(similarity.transpose(1, 2).contiguous(), p_mask)
        attended_premises = prem_hyp.bmm(hypothesis) * p_mask[..., None]
        attended_hypotheses = hyp_prem.bmm(premise) * h_mask[..., None]
        return attended_premises, attended_hypotheses


class ESIM(nn.Module):
    def __init__(self, vocab_size, embedding_dim=32, hidden=32, dropout=0.1, num_classes=3):
        super().__init__()
        self.word_embedding = nn.Embedding(vocab_size, embedding_dim, padding_idx=0)
        self.rnn_dropout = nn.Dropout(dropout)
        self.encoding = Seq2SeqEncoder(embedding_dim, hidden)
        self.attention = SoftmaxAttention()
        self.projection = nn.Sequential(nn.Linear(4 * 2 * hidden, hidden), nn.ReLU())
        self.composition = Seq2SeqEncoder(hidden, hidden)
        self.classification = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(2 * 4 * hidden, hidden), nn.Tanh(),
            nn.Dropout(dropout), nn.Linear(hidden, num_classes))
        self.apply(self._init)

    @staticmethod
    def _init(m):
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
        elif isinstance(m, nn.LSTM):
            for name, p in m.named_parameters():
                if "weight_ih" in name:
                    nn.init.xavier_uniform_(p)
                elif "weight_hh" in name:
                    nn.init.orthogonal_(p)
                else:
                    nn.init.zeros_(p)
                    if "bias_ih" in name:
                        n = p.size(0) // 4
                        p.data[n:2 * n] = 1.0

    def forward(self, p, p_len, h, h_len):
        p_mask, h_mask = get_mask(p_len, p.size(1)), get_mask(h_len, h.size(1))
        a = self.encoding(self.rnn_dropout(self.word_embedding(p)), p_len)
        b = self.encoding(self.rnn_dropout(self.word_embedding(h)), h_len)

        a_hat, b_hat = self.attention(a, p_mask, b, h_mask)
        m_a = self.projection(torch.cat([a, a_hat, a - a_hat, a * a_hat], dim=-1))
        m_b = self.projection(torch.cat([b, b_hat, b - b_hat, b * b_hat], dim=-1))

        v_a = self.composition(self.rnn_dropout(m_a), p_len)
        v_b = self.composition(self.rnn_dropout(m_b), h_len)
        v = torch.cat(self.pool(v_a, p_mask) + self.pool(v_b, h_mask), dim=1)
        return self.classification(v)

    @staticmethod
    def pool(v, mask):
        m = mask[..., None]
        avg = (v * m).sum(1) / m.sum(1)
        mx = v.masked_fill(~m, -1e7).max(dim=1).values
        return [avg, mx]


def run(model, batch):
    return model(batch["premise"], batch["premise_len"], batch["hypothesis"], batch["hypothesis_len"])


@torch.no_grad()
def evaluate(model, loader):
    model.eval()
    hits = n = 0
    for batch in loader:
        hits += (run(model, batch).argmax(1) == batch["label"]).sum().item()
        n += len(batch["label"])
    return hits / n


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    data = make_data(2400, args.seed)
    train_loader = DataLoader(data[:1920], batch_size=32, shuffle=True, collate_fn=collate)
    test_loader = DataLoader(data[1920:], batch_size=120, collate_fn=collate)

    model = ESIM(len(VOCAB))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    for epoch in range(1, 5):
        model.train()
        total = 0.0
        for batch in train_loader:
            optimizer.zero_grad()
            loss = criterion(run(model, batch), batch["label"])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            total += loss.item()
        scheduler.step()
        print(f"epoch {epoch}  loss {total / len(train_loader):.4f}")
    print(f"metric {evaluate(model, test_loader):.4f}")


if __name__ == "__main__":
    main()
