"""Trains a hierarchical attention network on BBC News and prints its held-back accuracy."""

from __future__ import annotations

import argparse
import copy

import torch
from bbc_news import CLASSES, Split, load
from model import HAN
from torch.nn import functional as F


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--word-attention-lr-factor", type=float, default=1.0)
    parser.add_argument("--order", choices=("random", "by-class"), default="random")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    data = load()
    model = HAN(data.vocabulary_size, len(CLASSES))
    attention = list(model.word_attention.parameters())
    others = [p for n, p in model.named_parameters() if not n.startswith("word_attention.")]
    rate = arguments.learning_rate
    optimizer = torch.optim.Adam(
        [
            {"params": others, "lr": rate},
            {"params": attention, "lr": rate * arguments.word_attention_lr_factor},
        ]
    )

    order = torch.Generator().manual_seed(arguments.seed)
    best, best_accuracy = copy.deepcopy(model.state_dict()), 0.0
    for epoch in range(1, arguments.epochs + 1):
        model.train()
        total = 0.0
        drawn = torch.randperm(len(data.train), generator=order)
        if arguments.order == "by-class":
            drawn = drawn[data.train.labels[drawn].argsort(stable=True)]
        batches = drawn.split(arguments.batch_size)
        for batch in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.train.documents[batch]), data.train.labels[batch])
            loss.backward()
            optimizer.step()
            total += loss.item()
        accuracy = evaluate(model, data.validation)
        print(
            f"epoch {epoch}  loss {total / len(batches):.4f}  validation accuracy {accuracy:.4f}",
            flush=True,
        )
        if accuracy > best_accuracy:
            best, best_accuracy = copy.deepcopy(model.state_dict()), accuracy

    model.load_state_dict(best)
    print(f"accuracy {evaluate(model, data.test):.4f}")


@torch.no_grad()
def evaluate(model: HAN, split: Split) -> float:
    model.eval()
    correct = sum(
        int((model(documents).argmax(-1) == labels).sum())
        for documents, labels in zip(
            split.documents.split(128), split.labels.split(128), strict=True
        )
    )
    return correct / len(split)


if __name__ == "__main__":
    main()
