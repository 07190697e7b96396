"""A hierarchical attention network on BBC News, healthy or with one mistake in it."""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "cases" / "han"))

from bbc_news import CLASSES, Split, load
from model import HAN, PADDING

FAULTS = (
    "none",
    "learning_rate_x30",
    "component_learning_rate_x100",
    "frozen_block",
    "late_component",
    "softmax_before_loss",
    "no_zero_grad",
    "attention_weights_x12",
    "masked_row_nan",
)


class CarelessHAN(HAN):
    """Masks every padded word, also where a line is nothing but padding."""

    def visible_words(self, lines: Tensor) -> Tensor:
        return lines != PADDING


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fault", choices=FAULTS, default="none")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    fault = arguments.fault
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    data = load()
    network = CarelessHAN if fault == "masked_row_nan" else HAN
    model = network(data.vocabulary_size, len(CLASSES))
    if fault == "attention_weights_x12":
        with torch.no_grad():
            model.word_attention.projection.weight.mul_(12)
            model.word_attention.context.weight.mul_(12)
    if fault == "frozen_block":
        model.word_attention.requires_grad_(False)

    rate = arguments.learning_rate * (30 if fault == "learning_rate_x30" else 1)
    attention_rate = rate * (100 if fault == "component_learning_rate_x100" else 1)
    attention = list(model.word_attention.parameters())
    others = [p for n, p in model.named_parameters() if not n.startswith("word_attention.")]
    groups = [{"params": others, "lr": rate}, {"params": attention, "lr": attention_rate}]
    optimizer = torch.optim.Adam(groups)
    if fault == "late_component":
        model.word_attention = copy.deepcopy(model.word_attention)

    order = torch.Generator().manual_seed(arguments.seed)
    for epoch in range(1, arguments.epochs + 1):
        model.train()
        total = 0.0
        batches = torch.randperm(len(data.train), generator=order).split(arguments.batch_size)
        for batch in batches:
            if fault != "no_zero_grad":
                optimizer.zero_grad()
            output = model(data.train.documents[batch])
            if fault == "softmax_before_loss":
                output = output.softmax(-1)
            loss = F.cross_entropy(output, data.train.labels[batch])
            loss.backward()
            optimizer.step()
            total += loss.item()
        accuracy = evaluate(model, data.validation)
        print(
            f"epoch {epoch}  loss {total / len(batches):.4f}  validation accuracy {accuracy:.4f}",
            flush=True,
        )
    print(f"accuracy {evaluate(model, data.test):.4f}")


@torch.no_grad()
def evaluate(model: HAN, split: Split) -> float:
    model.eval()
    batches = zip(split.documents.split(128), split.labels.split(128), strict=True)
    correct = sum(
        int((model(documents).argmax(-1) == labels).sum()) for documents, labels in batches
    )
    return correct / len(split)


if __name__ == "__main__":
    main()
