"""A small pre-norm transformer on associative recall, healthy or with one mistake in it.

A sequence is a list of key-value pairs and then one of its keys; the answer is that key's value.
Sequences hold different numbers of pairs and are padded on the left.
"""

from __future__ import annotations

import argparse
import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
PAIRS, SYMBOLS, PADDING = 6, 12, 0
LENGTH = 2 * PAIRS + 1
FEWEST_PAIRS = 3


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, states: Tensor, visible: Tensor) -> Tensor:
        """States, (batch, length, width), and a (batch, 1, length, length) mask to new states."""

        def split(tensor: Tensor) -> Tensor:
            return tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query, key, value = map(split, (self.query(states), self.key(states), self.value(states)))
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
        return self.output((weights @ value).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, states: Tensor, visible: Tensor) -> Tensor:
        states = states + self.attention(self.attention_norm(states), visible)
        return states + self.feed_forward(self.feed_forward_norm(states))


class Transformer(nn.Module):
    def __init__(self, width: int = 48, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1 + 2 * SYMBOLS, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, SYMBOLS)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) to the logits of the last token's value, (batch, symbols)."""
        visible = self.visible(tokens)
        states = self.embedding(tokens) + self.positions.weight
        for layer in self.layers:
            states = layer(states, visible)
        return self.head(self.norm(states[:, -1]))

    def visible(self, tokens: Tensor) -> Tensor:
        """The mask of the attention: no later token and no padding.

        A token always sees itself: a softmax over nothing is NaN.
        """
        itself = torch.eye(LENGTH, dtype=torch.bool)
        earlier = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        return (earlier & (tokens != PADDING)[:, None, None, :]) | itself


class CarelessTransformer(Transformer):
    """Lets no token see padding, also not the padding itself."""

    def visible(self, tokens: Tensor) -> Tensor:
        earlier = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        return earlier & (tokens != PADDING)[:, None, None, :]


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws sequences, (count, LENGTH), and the values asked for, (count,)."""
    keys = torch.rand(count, SYMBOLS, generator=generator).argsort(-1)[:, :PAIRS]
    values = torch.randint(SYMBOLS, (count, PAIRS), generator=generator)
    pairs = torch.randint(FEWEST_PAIRS, PAIRS + 1, (count,), generator=generator)
    asked = PAIRS - 1 - (torch.rand(count, generator=generator) * pairs).long()

    tokens = torch.stack([keys + 1, values + 1 + SYMBOLS], dim=-1).flatten(1)
    absent = torch.arange(2 * PAIRS) < 2 * (PAIRS - pairs)[:, None]
    question = keys.gather(1, asked[:, None]) + 1
    answer = values.gather(1, asked[:, None]).squeeze(1)
    return torch.cat([tokens.masked_fill(absent, PADDING), question], dim=1), answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fault", choices=FAULTS, default="none")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50, help="of one epoch")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    fault = arguments.fault
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    model = CarelessTransformer() if fault == "masked_row_nan" else Transformer()
    block = model.layers[1].attention
    if fault == "attention_weights_x12":
        with torch.no_grad():
            block.query.weight.mul_(12)
            block.key.weight.mul_(12)
    if fault == "frozen_block":
        block.requires_grad_(False)

    rate = arguments.learning_rate * (30 if fault == "learning_rate_x30" else 1)
    block_rate = rate * (100 if fault == "component_learning_rate_x100" else 1)
    chosen = list(block.parameters())
    others = [p for n, p in model.named_parameters() if not n.startswith("layers.1.attention.")]
    groups = [{"params": others, "lr": rate}, {"params": chosen, "lr": block_rate}]
    optimizer = torch.optim.AdamW(groups)
    if fault == "late_component":
        model.layers[1].attention = copy.deepcopy(block)

    generator = torch.Generator().manual_seed(arguments.seed)
    held_out = draw(1000, torch.Generator().manual_seed(arguments.seed + 1_000_000))
    for epoch in range(1, arguments.epochs + 1):
        total = 0.0
        for _ in range(arguments.steps):
            tokens, answers = draw(arguments.batch_size, generator)
            if fault != "no_zero_grad":
                optimizer.zero_grad()
            output = model(tokens)
            if fault == "softmax_before_loss":
                output = output.softmax(-1)
            loss = F.cross_entropy(output, answers)
            loss.backward()
            optimizer.step()
            total += loss.item()
        accuracy = evaluate(model, *held_out)
        print(
            f"epoch {epoch}  loss {total / arguments.steps:.4f}  accuracy {accuracy:.4f}",
            flush=True,
        )
    print(f"accuracy {evaluate(model, *held_out):.4f}")


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tensor, answers: Tensor) -> float:
    model.eval()
    accuracy = (model(tokens).argmax(-1) == answers).float().mean().item()
    model.train()
    return accuracy


if __name__ == "__main__":
    main()
