"""Fine-tunes DistilBERT to tell fresh from rotten film reviews, and prints its test accuracy.

``--size small`` trains a small one from random weights instead, which takes seconds.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from reviews import Reviews, by_words, encoded, texts, vocabulary_of
from torch import nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification

# What the options are where they are not given.
SIZES = {
    "full": {"epochs": 2, "batch_size": 16, "learning_rate": 2e-4},
    "small": {"epochs": 3, "batch_size": 32, "learning_rate": 1e-3},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0, help="of the head, dropout and the batches")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    size, _ = parser.parse_known_args()
    parser.set_defaults(**SIZES[size.size])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    model, train, validation, test = small() if arguments.size == "small" else full()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=0.01)
    steps = arguments.epochs * -(-len(train) // arguments.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate(steps))

    order = torch.Generator().manual_seed(arguments.seed)
    best, best_accuracy = copy.deepcopy(model.state_dict()), -1.0
    for epoch in range(1, arguments.epochs + 1):
        model.train()
        total = 0.0
        batches = torch.randperm(len(train), generator=order).split(arguments.batch_size)
        for batch in batches:
            optimizer.zero_grad()
            loss = model(
                input_ids=train.tokens[batch],
                attention_mask=train.mask[batch],
                labels=train.labels[batch],
            ).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        accuracy = evaluate(model, validation)
        print(
            f"epoch {epoch}  loss {total / len(batches):.4f}  validation accuracy {accuracy:.4f}",
            flush=True,
        )
        if accuracy > best_accuracy:
            best, best_accuracy = copy.deepcopy(model.state_dict()), accuracy

    model.load_state_dict(best)
    print(f"accuracy {evaluate(model, test):.4f}")


def rate(steps: int) -> Callable[[int], float]:
    """Rises over the first tenth of the steps, then falls to nothing."""
    warmup = max(1, steps // 10)
    return lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))


def full() -> tuple[nn.Module, Reviews, Reviews, Reviews]:
    from pretrained import CONFIG, tokenizer, weights

    model = DistilBertForSequenceClassification(CONFIG)
    model.distilbert.load_state_dict(weights())
    model.distilbert.embeddings.requires_grad_(False)
    encode = tokenizer()
    parts = [encoded(part, encode) for part in texts((960, 320, 640))]
    return model, *parts


def small() -> tuple[nn.Module, Reviews, Reviews, Reviews]:
    parts = texts((4800, 800, 1600))
    vocabulary = vocabulary_of(parts[0])
    config = DistilBertConfig(
        vocab_size=len(vocabulary) + 3,
        max_position_embeddings=32,
        n_layers=2,
        n_heads=2,
        dim=32,
        hidden_dim=64,
    )
    encode = by_words(vocabulary)
    model = DistilBertForSequenceClassification(config)
    return model, *(encoded(part, encode) for part in parts)


@torch.no_grad()
def evaluate(model: nn.Module, reviews: Reviews) -> float:
    model.eval()
    right = 0
    for rows in torch.arange(len(reviews)).split(64):
        logits = model(input_ids=reviews.tokens[rows], attention_mask=reviews.mask[rows]).logits
        right += int((logits.argmax(-1) == reviews.labels[rows]).sum())
    return right / len(reviews)


if __name__ == "__main__":
    main()
