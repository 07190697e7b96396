"""Train a small BERT cross-encoder from scratch to tell whether a hypothesis follows from a premise."""
import argparse
import random

import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
WHO = ["shop", "baker", "farmer", "market", "village", "school"]
DID = ["sold", "bought", "made", "kept"]
WHAT = ["cakes", "boats", "carpets", "lamps", "chairs"]
EXTRA = ["today", "last year", "in the old town", "with great care", "before the rain"]
BOUND = ["at least", "no fewer than", "more than"]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]"]
VOCAB = {w: i for i, w in enumerate(SPECIAL + sorted(
    {w for group in (["the"], NUMBERS, WHO, DID, WHAT, EXTRA, BOUND) for text in group for w in text.split()}))}


def make_pair(rng):
    """(premise, hypothesis, 1 if the premise entails the hypothesis)"""
    who, did, what = rng.choice(WHO), rng.choice(DID), rng.choice(WHAT)
    have, need = rng.randrange(12), rng.randrange(12)
    bound = rng.choice(BOUND)
    premise = f"the {who} {did} {NUMBERS[have]} {what}"
    if rng.random() < 0.6:
        premise += " " + rng.choice(EXTRA)
    hypothesis = f"the {who} {did} {bound} {NUMBERS[need]} {what}"
    return premise, hypothesis, int(have > need if bound == "more than" else have >= need)


def collate(batch):
    ids, types = [], []
    for first, second, _ in batch:
        a = [VOCAB["[CLS]"]] + [VOCAB[w] for w in first.split()] + [VOCAB["[SEP]"]]
        b = [VOCAB[w] for w in second.split()] + [VOCAB["[SEP]"]]
        ids.append(a + b)
        types.append([0] * len(a) + [1] * len(b))
    width = max(map(len, ids))
    pad = lambda rows, value: torch.tensor([r + [value] * (width - len(r)) for r in rows])
    return {
        "input_ids": pad(ids, VOCAB["[PAD]"]),
        "token_type_ids": pad(types, 0),
        "attention_mask": pad([[1] * len(r) for r in ids], 0),
        "labels": torch.tensor([label for _, _, label in batch]),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    pairs = sorted({make_pair(rng) for _ in range(6000)})
    rng.shuffle(pairs)
    dev, train = pairs[:500], pairs[500:]
    loader = DataLoader(train, batch_size=32, shuffle=True, collate_fn=collate, drop_last=True)

    config = BertConfig(vocab_size=len(VOCAB), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=128, max_position_embeddings=32, type_vocab_size=2, pad_token_id=0,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.08,
                        num_labels=2)
    model = BertForSequenceClassification(config)
    epochs = 2
    no_decay = ("bias", "LayerNorm.weight")
    groups = [
        {"params": [p for n, p in model.named_parameters() if not n.endswith(no_decay)], "weight_decay": 0.01},
        {"params": [p for n, p in model.named_parameters() if n.endswith(no_decay)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    scheduler = get_linear_schedule_with_warmup(optimizer, 40, epochs * len(loader))

    step = 0
    for epoch in range(epochs):
        model.train()
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            if step % 50 == 0:
                print(f"epoch {epoch} step {step} loss {loss.item():.4f}")

    model.eval()
    hits = 0
    with torch.no_grad():
        for batch in DataLoader(dev, batch_size=100, collate_fn=collate):
            labels = batch.pop("labels")
            hits += (model(**batch).logits.argmax(-1) == labels).sum().item()
    print(f"metric {hits / len(dev):.4f}")


if __name__ == "__main__":
    main()
