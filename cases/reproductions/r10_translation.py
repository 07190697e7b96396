"""Translates sentences of a made-up language, word by word and with a change of word order."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

WORDS, LENGTH, BOS = 10, 6, 10


def make_corpus(size, dictionary):
    """Every word has one translation; the verb group moves from the end to the front."""
    source = torch.randint(WORDS, (size, LENGTH)).unique(dim=0)
    source = source[torch.randperm(len(source))]
    return source, dictionary[torch.roll(source, 2, dims=1)]


class Translator(nn.Module):
    def __init__(self, d_model=32, nhead=4, layers=1):
        super().__init__()
        self.src_embed = nn.Embedding(WORDS, d_model)
        self.tgt_embed = nn.Embedding(WORDS + 1, d_model)
        self.pos = nn.Parameter(torch.randn(LENGTH, d_model) * 0.5)
        self.transformer = nn.Transformer(
            d_model,
            nhead,
            num_encoder_layers=2 * layers,
            num_decoder_layers=layers,
            dim_feedforward=2 * d_model,
            dropout=0.0,
            batch_first=True,
        )
        self.generator = nn.Linear(d_model, WORDS)

    def forward(self, source, target):
        n = target.size(1)
        mask = torch.ones(n, n, dtype=torch.bool).triu(1)
        out = self.transformer(
            self.src_embed(source) + self.pos, self.tgt_embed(target) + self.pos[:n], tgt_mask=mask
        )
        return self.generator(out)


def shift(target):
    start = torch.full((len(target), 1), BOS)
    return torch.cat([start, target[:, :-1]], dim=1)


class InverseSqrt:
    def __init__(self, optimizer, lr, warmup_updates):
        self.optimizer, self.lr, self.warmup = optimizer, lr, warmup_updates

    def step_update(self, update):
        if update < self.warmup:
            lr = self.lr * update / self.warmup
        else:
            lr = self.lr * self.warmup**0.5 * update**-0.5
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr


class Linear:
    def __init__(self, optimizer, lr, max_update):
        self.optimizer, self.lr, self.max_update = optimizer, lr, max_update

    def step_update(self, update):
        lr = self.lr * (1 - update / (self.max_update + 1))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr


@torch.no_grad()
def translate(model, source):
    output = torch.full((len(source), 1), BOS)
    for _ in range(LENGTH):
        word = model(source, output)[:, -1].argmax(-1, keepdim=True)
        output = torch.cat([output, word], dim=1)
    return output[:, 1:]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--max-update", type=int, default=240)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    dictionary = torch.randperm(WORDS)
    source, target = make_corpus(4200, dictionary)
    train_source, train_target = source[200:], target[200:]

    model = Translator()
    optimizer = torch.optim.RAdam(
        model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=1e-4
    )
    if args.fixed:
        schedule = Linear(optimizer, args.lr, args.max_update)
    else:
        schedule = InverseSqrt(optimizer, args.lr, warmup_updates=1)

    model.train()
    for update in range(1, args.max_update + 1):
        lr = schedule.step_update(update)
        rows = torch.randint(len(train_source), (32,))
        logits = model(train_source[rows], shift(train_target[rows]))
        loss = F.cross_entropy(logits.transpose(1, 2), train_target[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update % 30 == 0:
            print(f"num_updates={update} lr={lr:.6f} loss={loss.item():.3f}")

    model.eval()
    correct = (translate(model, source[:200]) == target[:200]).float().mean().item()
    print(f"metric {correct:.4f}")


if __name__ == "__main__":
    main()
