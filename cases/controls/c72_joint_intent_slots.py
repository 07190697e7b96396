"""Joint intent detection and slot filling: one attention encoder, two losses, gradient accumulation."""
import argparse
import random

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

CITIES = "boston denver dallas austin chicago seattle oakland memphis".split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
PATTERNS = [
    ("flight", "show flights from {from} to {to}"),
    ("flight", "i want to fly to {to} from {from} on {day}"),
    ("flight", "{from} to {to} {day} please"),
    ("fare", "how much is a ticket from {from} to {to}"),
    ("fare", "cheapest fare to {to} leaving {from} on {day}"),
    ("hotel", "find a hotel in {stay} for {day}"),
    ("hotel", "i want to sleep in {stay}"),
    ("weather", "will it rain in {where} on {day}"),
    ("weather", "weather {where} {day} please"),
]
POLITE = ["", "hello", "please could you help me"]
INTENTS = ["flight", "fare", "hotel", "weather"]
TAGS = ["O", "from", "to", "stay", "where", "day"]


def generate(rng):
    intent, pattern = rng.choice(PATTERNS)
    a, b = rng.sample(CITIES, 2)
    fill = {"from": a, "to": b, "stay": a, "where": a, "day": rng.choice(DAYS)}
    words, tags = [], []
    for w in (rng.choice(POLITE) + " " + pattern).split():
        name = w.strip("{}")
        slot = w.startswith("{")
        words.append(fill[name] if slot else w)
        tags.append(name if slot else "O")
    return tuple(words), intent, tuple(tags)


class Utterances(Dataset):
    def __init__(self, rows, vocab):
        self.rows = [(torch.tensor([vocab[w] for w in ws]), INTENTS.index(i), torch.tensor([TAGS.index(t) for t in ts]))
                     for ws, i, ts in rows]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def pad_batch(rows):
    ids, intents, tags = zip(*rows)
    ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=0)
    tags = nn.utils.rnn.pad_sequence(tags, batch_first=True, padding_value=-100)
    return ids, torch.tensor(intents), tags


class Layer(nn.Module):
    def __init__(self, dim, heads, p):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.drop = nn.Dropout(p)

    def forward(self, x, keep):
        B, L, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])
        x = x + self.drop(self.proj(y.transpose(1, 2).reshape(B, L, D)))
        return x + self.drop(self.mlp(self.norm2(x)))


class JointModel(nn.Module):
    def __init__(self, n_words, dim=48, heads=4, depth=2, max_len=24, p=0.1):
        super().__init__()
        self.tok = nn.Embedding(n_words, dim, padding_idx=0)
        self.pos = nn.Embedding(max_len, dim)
        self.cls = nn.Parameter(torch.randn(dim))
        self.layers = nn.ModuleList(Layer(dim, heads, p) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.intent_head = nn.Linear(dim, len(INTENTS))
        self.slot_head = nn.Linear(dim, len(TAGS))

    def forward(self, ids):
        x = torch.cat([self.cls.expand(len(ids), 1, -1), self.tok(ids)], 1)
        x = x + self.pos.weight[:x.size(1)]
        keep = F.pad(ids != 0, (1, 0), value=True)
        for layer in self.layers:
            x = layer(x, keep)
        x = self.norm(x)
        return self.intent_head(x[:, 0]), self.slot_head(x[:, 1:])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accum", type=int, default=3)
    parser.add_argument("--slot-weight", type=float, default=1.0)
    opt = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(opt.seed)
    rng = random.Random(opt.seed)

    rows = sorted({generate(rng) for _ in range(4000)})
    rng.shuffle(rows)
    rows = rows[:1840]
    vocab = {w: i + 1 for i, w in enumerate(sorted({w for r in rows for w in r[0]}))}
    test, train = Utterances(rows[:400], vocab), Utterances(rows[400:], vocab)
    loader = DataLoader(train, batch_size=16, shuffle=True, collate_fn=pad_batch)

    model = JointModel(len(vocab) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for epoch in range(7):
        model.train()
        sum_intent = sum_slot = updates = 0
        batches = list(loader)
        for start in range(0, len(batches), opt.accum):
            group = batches[start:start + opt.accum]
            n_utt = sum(len(b[1]) for b in group)
            n_tok = sum((b[2] != -100).sum().item() for b in group)
            optimizer.zero_grad()
            for ids, intents, tags in group:
                intent_logits, slot_logits = model(ids)
                loss_intent = F.cross_entropy(intent_logits, intents, reduction="sum") / n_utt
                loss_slot = F.cross_entropy(slot_logits.flatten(0, 1), tags.flatten(), ignore_index=-100,
                                            reduction="sum") / n_tok
                (loss_intent + opt.slot_weight * loss_slot).backward()
                sum_intent += loss_intent.item()
                sum_slot += loss_slot.item()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            updates += 1
        print(f"epoch {epoch}: intent {sum_intent / updates:.4f} slots {sum_slot / updates:.4f} ({updates} updates)")

    model.eval()
    hit_i = hit_t = n_t = 0
    with torch.no_grad():
        for ids, intents, tags in DataLoader(test, batch_size=64, collate_fn=pad_batch):
            intent_logits, slot_logits = model(ids)
            hit_i += (intent_logits.argmax(-1) == intents).sum().item()
            real = tags != -100
            hit_t += ((slot_logits.argmax(-1) == tags) & real).sum().item()
            n_t += real.sum().item()
    intent_acc, slot_acc = hit_i / len(test), hit_t / n_t
    print(f"intent accuracy {intent_acc:.4f}  slot accuracy {slot_acc:.4f}")
    print(f"metric {(intent_acc + slot_acc) / 2:.4f}")


if __name__ == "__main__":
    main()
