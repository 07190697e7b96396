"""Trains a small 3D-CNN with attention to tell how a digit moves, and prints its test accuracy."""

from __future__ import annotations

import argparse
import copy

import torch
from model import VideoModel
from moving_digits import MOTIONS, Clips, load
from torch.nn import functional as F


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--cross-attention", choices=("at-once", "lazy"), default="at-once")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    data = load()
    model = VideoModel(len(MOTIONS), cross_attention=arguments.cross_attention)
    optimizer = torch.optim.Adam(model.parameters(), lr=arguments.learning_rate, weight_decay=1e-5)
    train = data["train"]
    order = torch.Generator().manual_seed(arguments.seed)
    best, best_accuracy = copy.deepcopy(model.state_dict()), -1.0
    for epoch in range(1, arguments.epochs + 1):
        model.train()
        total = 0.0
        batches = torch.randperm(len(train), generator=order).split(arguments.batch_size)
        for batch in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(train.frames[batch]), train.motions[batch])
            loss.backward()
            optimizer.step()
            total += loss.item()
        accuracy = evaluate(model, data["validation"])
        print(
            f"epoch {epoch}  loss {total / len(batches):.4f}  validation accuracy {accuracy:.4f}",
            flush=True,
        )
        if accuracy > best_accuracy:
            best, best_accuracy = copy.deepcopy(model.state_dict()), accuracy

    model.load_state_dict(best)
    print(f"accuracy {evaluate(model, data['test']):.4f}")


@torch.no_grad()
def evaluate(model: VideoModel, clips: Clips) -> float:
    model.eval()
    found = torch.cat([model(part).argmax(-1) for part in clips.frames.split(140)])
    return float((found == clips.motions).double().mean())


if __name__ == "__main__":
    main()
