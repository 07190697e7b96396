"""Fine-tunes a small BERT for sentiment and looks at what it says about unseen sentences."""

import argparse
import itertools
import random

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

NOUNS = ["film", "plot", "cast", "music", "ending", "script", "camera", "dialogue"]
ADVERBS = ["really", "quite", "very", "rather", "truly"]
GOOD = ["good", "great", "funny", "clever", "moving", "fresh"]
BAD = ["bad", "dull", "boring", "weak", "messy", "stale"]
WORDS = ["[PAD]", "[CLS]", "[SEP]", "the", "was", "not", *NOUNS, *ADVERBS, *GOOD, *BAD]
VOCAB = {word: i for i, word in enumerate(WORDS)}
MAX_LEN = 10


def read_reviews(seed):
    reviews = []
    for noun, adverb, word, negated in itertools.product(NOUNS, ADVERBS, GOOD + BAD, (False, True)):
        text = f"the {noun} was {'not ' if negated else ''}{adverb} {word}"
        reviews.append((text, int((word in GOOD) != negated)))
    random.Random(seed).shuffle(reviews)
    return reviews


def encode(reviews):
    ids = torch.zeros(len(reviews), MAX_LEN, dtype=torch.long)
    for row, (text, _) in enumerate(reviews):
        tokens = ["[CLS]", *text.split(), "[SEP]"]
        ids[row, : len(tokens)] = torch.tensor([VOCAB[t] for t in tokens])
    labels = torch.tensor([label for _, label in reviews])
    return TensorDataset(ids, (ids != 0).long(), labels)


def evaluate(model, loader):
    model.eval()
    logits, gold = [], []
    with torch.no_grad():
        for input_ids, attention_mask, labels in loader:
            logits.append(model(input_ids=input_ids, attention_mask=attention_mask).logits)
            gold.append(labels)
    logits, gold = torch.cat(logits), torch.cat(gold)
    print("first logits:", [[round(v, 3) for v in row] for row in logits[:4].tolist()])
    return (logits.argmax(-1) == gold).float().mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    reviews = read_reviews(args.seed)
    train_loader = DataLoader(encode(reviews[:640]), batch_size=32, shuffle=True)
    test_loader = DataLoader(encode(reviews[640:]), batch_size=64)

    config = BertConfig(
        vocab_size=len(VOCAB),
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=16,
        num_labels=2,
    )
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if args.fixed else 1e-2)

    for epoch in range(1, args.epochs + 1):
        model.train()
        losses = []
        for input_ids, attention_mask, labels in train_loader:
            optimizer.zero_grad()
            out = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
            out.loss.backward()
            optimizer.step()
            losses.append(out.loss.item())
        print(f"epoch {epoch}: mean train loss {sum(losses) / len(losses):.4f}")
    print(f"metric {evaluate(model, test_loader):.4f}")


if __name__ == "__main__":
    main()
