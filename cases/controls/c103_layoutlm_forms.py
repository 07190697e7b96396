"""LayoutLM (transformers, tiny config) labels the words of synthetic receipts: other, question, answer, total."""
import argparse
import random

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import LayoutLMConfig, LayoutLMForTokenClassification, get_cosine_schedule_with_warmup

PAD, CLS, SEP = 0, 1, 2
LABELS = ["other", "question", "answer", "total"]
KEYS = range(3, 9)          # "date", "cashier", "table", ...
FREE = range(9, 25)         # words that may stand anywhere
NUMS = range(25, 45)        # amounts
MAX = 26


def make_form(rng):
    """Keys stand on the left and their values to the right of them on the same line; the same
    words and amounts outside such a line are `other`, and the last amount of the column at the right is the total."""
    words, boxes, labels = [], [], []

    def put(w, x, y, lab):
        width = 40 + 5 * (w % 7)
        x, y = int(x + rng.uniform(-12, 12)), int(y + rng.uniform(-6, 6))
        words.append(w), boxes.append([x, y, min(1000, x + width), min(1000, y + 20)]), labels.append(lab)

    y = 40
    for _ in range(rng.randint(1, 3)):                      # header, centred
        put(rng.choice(FREE), rng.uniform(380, 560), y, 0)
        y += 35
    y = 250
    for key in rng.sample(list(KEYS), rng.randint(2, 3)):
        put(key, 60, y, 1)
        put(rng.choice(FREE if rng.random() < 0.5 else NUMS), 260, y, 2)
        y += rng.randint(40, 60)
    y = 520
    for _ in range(rng.randint(2, 4)):                      # items: description and amount
        put(rng.choice(FREE), 60, y, 0)
        put(rng.choice(NUMS), 800, y, 0)
        y += rng.randint(40, 60)
    labels[-1] = 3
    for _ in range(rng.randint(0, 2)):                      # footer, keys turn up here as plain words
        put(rng.choice(list(KEYS) + list(FREE)), rng.uniform(100, 800), 930, 0)
    return words, boxes, labels


class Forms(Dataset):
    def __init__(self, n, rng):
        self.items = [make_form(rng) for _ in range(n)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def collate(batch):
    n = max(len(w) for w, _, _ in batch) + 2
    out = {
        "input_ids": torch.full((len(batch), n), PAD),
        "bbox": torch.zeros(len(batch), n, 4, dtype=torch.long),
        "attention_mask": torch.zeros(len(batch), n, dtype=torch.long),
        "labels": torch.full((len(batch), n), -100),
    }
    for i, (w, b, l) in enumerate(batch):
        k = len(w) + 2
        out["input_ids"][i, :k] = torch.tensor([CLS] + w + [SEP])
        out["bbox"][i, :k] = torch.tensor([[0, 0, 0, 0]] + b + [[1000, 1000, 1000, 1000]])
        out["attention_mask"][i, :k] = 1
        out["labels"][i, 1 : k - 1] = torch.tensor(l)
    return out


def evaluate(model, loader):
    model.eval()
    preds, golds = [], []
    with torch.no_grad():
        for batch in loader:
            y = batch.pop("labels")
            p = model(**batch).logits.argmax(-1)
            preds.append(p[y != -100])
            golds.append(y[y != -100])
    p, y = torch.cat(preds), torch.cat(golds)
    f1 = []
    for c in range(len(LABELS)):
        tp = ((p == c) & (y == c)).sum().item()
        f1.append(2 * tp / max(1, (p == c).sum().item() + (y == c).sum().item()))
    const = 2 * (y == 0).sum().item() / (len(y) + (y == 0).sum().item()) / len(LABELS)
    return f1, const


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    train = DataLoader(Forms(1280, rng), batch_size=16, shuffle=True, collate_fn=collate)
    test = DataLoader(Forms(200, rng), batch_size=100, collate_fn=collate)

    config = LayoutLMConfig(vocab_size=45, hidden_size=40, num_hidden_layers=2, num_attention_heads=4,
                            intermediate_size=80, max_position_embeddings=32, max_2d_position_embeddings=1024,
                            type_vocab_size=1, hidden_dropout_prob=0.05, attention_probs_dropout_prob=0.05,
                            initializer_range=0.08, num_labels=len(LABELS), pad_token_id=PAD)
    model = LayoutLMForTokenClassification(config)
    no_decay = ("bias", "LayerNorm.weight")
    groups = [
        {"params": [p for n, p in model.named_parameters() if not n.endswith(no_decay)], "weight_decay": 0.01},
        {"params": [p for n, p in model.named_parameters() if n.endswith(no_decay)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, fused=True)
    epochs = 2
    scheduler = get_cosine_schedule_with_warmup(optimizer, 15, epochs * len(train))
    step = 0
    for epoch in range(epochs):
        model.train()
        for batch in train:
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            if step % 20 == 0:
                print(f"epoch {epoch} step {step} loss {loss.item():.4f}")
    f1, const = evaluate(model, test)
    for name, v in zip(LABELS, f1):
        print(f"f1 {name:10s} {v:.4f}")
    print(f"macro f1 of always-other {const:.4f}")
    print(f"metric {sum(f1) / len(f1):.4f}")


if __name__ == "__main__":
    main()
