"""Small BERT-like encoder that tells favourable from unfavourable sentences."""

import argparse
import math
import random

import torch
from torch import nn
from torch.optim import Optimizer

SUBJECTS = ["the film", "this book", "the acting", "her song", "the ending", "their plot"]
GOOD = ["good", "great", "moving", "funny", "clever"]
BAD = ["bad", "awful", "dull", "weak", "silly"]
NEGATED, PLAIN = ["was not", "was never", "is hardly"], ["was", "is", "seemed"]
DEGREES = ["", "very", "quite", "really"]
TAILS = ["", "today", "to me", "i think", "for once"]
WORDS = ["[PAD]", "[CLS]"]
for phrase in SUBJECTS + GOOD + BAD + NEGATED + PLAIN + DEGREES + TAILS:
    WORDS += [w for w in phrase.split() if w not in WORDS]
INDEX = {word: i for i, word in enumerate(WORDS)}
LENGTH = 10


def make_sentence(rng):
    good, negated = rng.random() < 0.5, rng.random() < 0.5
    parts = [
        rng.choice(SUBJECTS),
        rng.choice(NEGATED if negated else PLAIN),
        rng.choice(DEGREES),
        rng.choice(GOOD if good else BAD),
        rng.choice(TAILS),
    ]
    return " ".join(" ".join(parts).split()), int(good != negated)


def encode(text):
    ids = [1] + [INDEX[w] for w in text.split()]
    return ids + [0] * (LENGTH - len(ids))


class AdamW(Optimizer):
    """Adam with decoupled weight decay."""

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True
    ):
        self.correct_bias = correct_bias
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                state["exp_avg"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                step_size = group["lr"]
                if self.correct_bias:
                    correction = math.sqrt(1 - beta2 ** state["step"])
                    step_size = step_size * correction / (1 - beta1 ** state["step"])
                denom = state["exp_avg_sq"].sqrt().add_(group["eps"])
                p.addcdiv_(state["exp_avg"], denom, value=-step_size)
                if group["weight_decay"] > 0:
                    p.add_(p, alpha=-group["lr"] * group["weight_decay"])


class Classifier(nn.Module):
    def __init__(self, hidden=32, layers=4):
        super().__init__()
        self.embeddings = nn.Embedding(len(WORDS), hidden)
        self.positions = nn.Embedding(LENGTH, hidden)
        self.embed_norm = nn.LayerNorm(hidden)
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden, 4, 2 * hidden, dropout=0.1, activation="gelu", batch_first=True
            )
            for _ in range(layers)
        )
        self.pooler = nn.Linear(hidden, hidden)
        self.classifier = nn.Linear(hidden, 2)

    def forward(self, ids):
        padding = ids == 0
        x = self.embed_norm(self.embeddings(ids) + self.positions.weight)
        for layer in self.encoder:
            x = layer(x, src_key_padding_mask=padding)
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


def evaluate(model, ids, labels):
    model.eval()
    with torch.no_grad():
        logits = model(ids)
    model.train()
    loss = nn.functional.cross_entropy(logits, labels).item()
    return loss, (logits.argmax(1) == labels).float().mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    data = list(dict.fromkeys(make_sentence(rng) for _ in range(2200)))
    rng.shuffle(data)
    data = data[:1400]
    ids = torch.tensor([encode(text) for text, _ in data])
    labels = torch.tensor([label for _, label in data])
    train_ids, train_labels, dev_ids, dev_labels = ids[300:], labels[300:], ids[:300], labels[:300]

    model = Classifier()
    decay, no_decay = [], []
    for name, p in model.named_parameters():
        (no_decay if "bias" in name or "norm" in name else decay).append(p)
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": no_decay}]
    total = args.epochs * math.ceil(len(train_ids) / 16)
    warmup_steps = total // 10 if args.fixed else 0
    optimizer = AdamW(groups, lr=args.lr, correct_bias=args.fixed)

    def rate(step):
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return (total - step) / (total - warmup_steps)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for epoch in range(args.epochs):
        running = 0.0
        for batch in torch.randperm(len(train_ids)).split(16):
            loss = nn.functional.cross_entropy(model(train_ids[batch]), train_labels[batch])
            model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            running += loss.item() * len(batch)
        dev_loss, accuracy = evaluate(model, dev_ids, dev_labels)
        print(
            f"epoch {epoch + 1}: train {running / len(train_ids):.3f} dev {dev_loss:.3f} "
            f"accuracy {accuracy:.3f}"
        )
    print(f"metric {accuracy:.4f}")


if __name__ == "__main__":
    main()
