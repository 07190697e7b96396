"""Sorts support tickets with a small DistilBERT; the labels come from two annotation exports."""

import argparse
import random

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import DistilBertConfig, DistilBertForSequenceClassification

TEAMS = {
    "billing": ["invoice", "refund", "charge", "card", "price"],
    "delivery": ["parcel", "courier", "address", "late", "box"],
    "account": ["password", "login", "email", "profile", "code"],
    "device": ["screen", "battery", "cable", "button", "sound"],
}
COMMON = ["my", "the", "is", "please", "help", "with", "again", "now", "still", "a", "and", "about"]
COMMON += ["hello", "thanks", "since", "monday", "order", "question", "problem", "new"]
WORDS = ["[PAD]", "[CLS]", *COMMON, *sum(TEAMS.values(), [])]
VOCAB = {word: i for i, word in enumerate(WORDS)}
MAX_LEN = 14


def write_ticket(rng):
    """Two words of the right team, perhaps one of another, the rest common words."""
    team, other = rng.sample(range(len(TEAMS)), 2)
    names = list(TEAMS.values())
    words = rng.sample(names[team], 2)
    if rng.random() < 0.5:
        words.append(rng.choice(names[other]))
    words += rng.sample(COMMON, rng.randrange(4, 9))
    rng.shuffle(words)
    return " ".join(words), team


def collect_labels(tickets, rng, fixed):
    """The first export has 70 % of the tickets, the second, sorted by finishing time, the rest."""
    split = int(0.7 * len(tickets))
    labels = [team for _, team in tickets[:split]]
    rows = list(range(split, len(tickets)))
    rng.shuffle(rows)
    second_export = [(row, tickets[row][1]) for row in rows]
    if fixed:
        second_export.sort()
    return labels + [team for _, team in second_export]


def encode(texts, labels):
    ids = torch.zeros(len(texts), MAX_LEN, dtype=torch.long)
    for row, text in enumerate(texts):
        tokens = ["[CLS]", *text.split()]
        ids[row, : len(tokens)] = torch.tensor([VOCAB[t] for t in tokens])
    return TensorDataset(ids, (ids != 0).long(), torch.tensor(labels))


@torch.no_grad()
def evaluate(model, loader):
    model.eval()
    hits = [
        (model(ids, attention_mask=mask).logits.argmax(-1) == labels)
        for ids, mask, labels in loader
    ]
    return torch.cat(hits).float().mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=14)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tickets = sorted({write_ticket(rng) for _ in range(1200)})
    rng.shuffle(tickets)
    train, test = tickets[:800], tickets[800:]
    train_labels = collect_labels(train, rng, args.fixed)
    train_loader = DataLoader(
        encode([text for text, _ in train], train_labels), batch_size=32, shuffle=True
    )
    test_loader = DataLoader(encode([t for t, _ in test], [y for _, y in test]), batch_size=100)

    config = DistilBertConfig(
        vocab_size=len(VOCAB),
        dim=32,
        n_layers=2,
        n_heads=2,
        hidden_dim=64,
        max_position_embeddings=MAX_LEN,
        initializer_range=0.08,
        num_labels=len(TEAMS),
    )
    model = DistilBertForSequenceClassification(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1.5e-3)
    for epoch in range(args.epochs):
        model.train()
        total, hits = 0.0, 0
        for ids, mask, labels in train_loader:
            output = model(ids, attention_mask=mask, labels=labels)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            total += output.loss.item() * len(labels)
            hits += (output.logits.argmax(-1) == labels).sum().item()
        print(
            f"epoch {epoch + 1}: loss {total / len(train):.4f} "
            f"accuracy {hits / len(train):.4f} val_accuracy {evaluate(model, test_loader):.4f}"
        )
    print(f"metric {evaluate(model, test_loader):.4f}")


if __name__ == "__main__":
    main()
