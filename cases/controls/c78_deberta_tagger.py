"""Trains a small DeBERTa-v2 from scratch to tag names of persons, places and companies."""
import argparse
import random

import torch
from torch.utils.data import DataLoader
from transformers import DebertaV2Config, DebertaV2ForTokenClassification, get_linear_schedule_with_warmup

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG"]
NAMES = "ash brook carter dale ellis frost grant hill irving jordan lake mason north olsen parker stone".split()
FILL = "the a said on monday that it was very quiet today and people were happy about this news".split()
PATTERNS = [(["mr"], "PER", []), (["mrs"], "PER", []), (["in"], "LOC", []), (["near"], "LOC", []),
            ([], "ORG", ["inc"]), ([], "ORG", ["shares"]), ([], "PER", ["told"]), ([], "LOC", ["county"])]


def make_sentence(rng):
    words, tags = [], []

    def fill(lo, hi):
        k = rng.randint(lo, hi)
        words.extend(rng.choice(FILL) for _ in range(k))
        tags.extend(["O"] * k)

    fill(0, 3)
    for _ in range(rng.randint(1, 3)):
        before, kind, after = rng.choice(PATTERNS)
        name = [rng.choice(NAMES) for _ in range(rng.randint(1, 3))]
        words.extend(before + name + after)
        tags.extend(["O"] * len(before) + ["B-" + kind] + ["I-" + kind] * (len(name) - 1) + ["O"] * len(after))
        fill(1, 3)
    return tuple(words), tuple(tags)


def unique_sentences(n, rng):
    found = {}
    while len(found) < n:
        w, t = make_sentence(rng)
        found[w] = t
    return list(found.items())


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--epochs", type=int, default=3)
    ap.add_argument("--lr", type=float, default=2e-3)
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    data = unique_sentences(1150, rng)
    train, test = data[:1000], data[1000:]
    vocab = {w: i for i, w in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]"] + sorted({w for s, _ in train for w in s}))}

    def collate(batch):
        longest = max(len(w) for w, _ in batch) + 2
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        for i, (words, tags) in enumerate(batch):
            n = len(words)
            ids[i, :n + 2] = torch.tensor([vocab["[CLS]"]] + [vocab.get(w, vocab["[UNK]"]) for w in words] + [vocab["[SEP]"]])
            mask[i, :n + 2] = 1
            labels[i, 1:n + 1] = torch.tensor([LABELS.index(t) for t in tags])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    config = DebertaV2Config(
        vocab_size=len(vocab), hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        max_position_embeddings=64, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True,
        norm_rel_ebd="layer_norm", position_buckets=16, position_biased_input=False, type_vocab_size=0,
        pad_token_id=0, num_labels=len(LABELS), initializer_range=0.1, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
        id2label=dict(enumerate(LABELS)), label2id={t: i for i, t in enumerate(LABELS)})
    model = DebertaV2ForTokenClassification(config)

    loader = DataLoader(train, batch_size=16, shuffle=True, collate_fn=collate,
                        generator=torch.Generator().manual_seed(args.seed))
    no_decay = ("bias", "LayerNorm.weight")
    groups = [
        {"params": [p for n, p in model.named_parameters() if not n.endswith(no_decay)], "weight_decay": 0.01},
        {"params": [p for n, p in model.named_parameters() if n.endswith(no_decay)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    total = args.epochs * len(loader)
    scheduler = get_linear_schedule_with_warmup(optimizer, total // 10, total)

    model.train()
    for epoch in range(args.epochs):
        running = 0.0
        for batch in loader:
            out = model(**batch)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            running += out.loss.item()
        print(f"epoch {epoch + 1} train loss {running / len(loader):.4f}")

    model.eval()
    tp = n_pred = n_gold = 0
    with torch.no_grad():
        for batch in DataLoader(test, batch_size=50, collate_fn=collate):
            pred = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
            gold = batch["labels"]
            real = gold != -100
            tp += ((pred == gold) & (gold > 0) & real).sum().item()
            n_pred += ((pred > 0) & real).sum().item()
            n_gold += ((gold > 0) & real).sum().item()
    f1 = 2 * tp / max(n_pred + n_gold, 1)
    print(f"metric {f1:.4f}")


if __name__ == "__main__":
    main()
