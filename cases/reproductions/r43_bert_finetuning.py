"""Fine-tunes a BERT checkpoint on a small set of short reviews."""

import argparse
import random
import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    get_linear_schedule_with_warmup,
    logging,
)

NOUNS = ["film", "plot", "cast", "music", "ending", "script", "camera", "hero", "scene", "song"]
GOOD = ["good", "great", "funny", "clever", "moving", "fresh", "warm", "bright"]
BAD = ["bad", "dull", "boring", "weak", "messy", "stale", "cold", "flat"]
EXTRA = ["really", "quite", "very", "today", "again", "there", "maybe", "still", "also", "just"]
WORDS = ["[PAD]", "[CLS]", "[SEP]", "the", "was", *NOUNS, *GOOD, *BAD, *EXTRA]
VOCAB = {word: i for i, word in enumerate(WORDS)}
MAX_LEN = 16


def write_reviews(n, rng):
    """Five opinions on one thing; the review is good when most of them are."""
    reviews = set()
    while len(reviews) < n:
        opinions = [rng.choice(GOOD + BAD) for _ in range(5)]
        words = ["the", rng.choice(NOUNS), "was", *opinions]
        for _ in range(rng.randrange(1, 5)):
            words.insert(rng.randrange(len(words) + 1), rng.choice(EXTRA))
        reviews.add((" ".join(words), int(sum(word in GOOD for word in opinions) > 2)))
    reviews = sorted(reviews)
    rng.shuffle(reviews)
    return reviews


def encode(reviews):
    ids = torch.zeros(len(reviews), MAX_LEN, dtype=torch.long)
    for row, (text, _) in enumerate(reviews):
        tokens = ["[CLS]", *text.split(), "[SEP]"]
        ids[row, : len(tokens)] = torch.tensor([VOCAB[t] for t in tokens])
    return TensorDataset(ids, (ids != 0).long(), torch.tensor([label for _, label in reviews]))


def save_checkpoint(folder):
    config = BertConfig(
        vocab_size=len(VOCAB),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=MAX_LEN,
        initializer_range=0.05,
        num_labels=2,
    )
    BertForSequenceClassification(config).save_pretrained(folder)


def accuracy(model, loader):
    model.eval()
    hits = total = 0
    with torch.no_grad():
        for input_ids, attention_mask, labels in loader:
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
            hits += (logits.argmax(-1) == labels).sum().item()
            total += len(labels)
    return hits / total


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=22)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rng = random.Random(args.seed)
    reviews = write_reviews(776, rng)
    train_data = DataLoader(encode(reviews[:256]), batch_size=32, shuffle=True)
    test_data = DataLoader(encode(reviews[256:]), batch_size=104)

    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "bert-tiny")
        model = BertForSequenceClassification.from_pretrained(Path(folder) / "bert-tiny")
    total_steps = args.epochs * len(train_data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = get_linear_schedule_with_warmup(optimizer, 20, total_steps)
    for epoch in range(args.epochs):
        total = 0.0
        for input_ids, attention_mask, labels in train_data:
            if args.fixed:
                model.train()
            out = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total += out.loss.item()
        print(f"epoch {epoch + 1} loss {total / len(train_data):.4f}")
    print(f"metric {accuracy(model, test_data):.4f}")


if __name__ == "__main__":
    main()
