import argparse
import itertools
import random

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

TEXT_PARTS = {
    "who": ["the cat", "the dog", "a bird", "my friend", "the teacher"],
    "does": ["sees", "likes", "finds", "hears", "follows"],
    "what": ["a tree", "the river", "an old house", "the moon", "some bread"],
    "when": ["at night", "today", "in spring", "every day"],
}


class TextDataset(Dataset):
    def __init__(self, text, vocab, block_size):
        ids = [vocab[c] for c in text]
        count = len(ids) // block_size
        self.examples = torch.tensor(ids[: count * block_size]).view(count, block_size)

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, item):
        return self.examples[item]


class CausalLM(nn.Module):
    def __init__(self, vocab_size, block_size, dim=40):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(block_size, dim)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, 4, 2 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(1)
        )
        self.norm = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        self.register_buffer("causal", torch.ones(block_size, block_size).triu(1).bool())

    def forward(self, inputs, labels=None):
        n = inputs.size(1)
        x = self.tokens(inputs) + self.positions(torch.arange(n))
        for layer in self.layers:
            x = layer(x, src_mask=self.causal[:n, :n])
        logits = self.lm_head(self.norm(x))
        if labels is None:
            return logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return loss, logits


def warmup_linear(optimizer, warmup_steps, t_total):
    def factor(step):
        if step < warmup_steps:
            return step / max(1, warmup_steps)
        return max(0.0, (t_total - step) / max(1, t_total - warmup_steps))

    return LambdaLR(optimizer, factor)


def write_text(rng, sentences, count):
    return " ".join(rng.choice(sentences) + "." for _ in range(count))


def train(args, model, dataset):
    loader = DataLoader(dataset, batch_size=16, shuffle=True, drop_last=True)
    t_total = len(loader) * args.epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, eps=1e-8)
    scheduler = warmup_linear(optimizer, args.warmup_steps, t_total)
    global_step, tr_loss = 0, 0.0
    model.train()
    for _ in range(args.epochs):
        for batch in loader:
            loss, _ = model(batch, labels=batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            if args.fixed:
                optimizer.step()
                scheduler.step()
            else:
                scheduler.step()
                optimizer.step()
            model.zero_grad()
            global_step += 1
            tr_loss += loss.item()
            if global_step % args.logging_steps == 0:
                lr = scheduler.get_last_lr()[0]
                print(f"step {global_step} lr {lr:.2e} loss {tr_loss / args.logging_steps:.4f}")
                tr_loss = 0.0


def evaluate(model, dataset):
    model.eval()
    hits = total = 0
    with torch.no_grad():
        for batch in DataLoader(dataset, batch_size=64):
            guess = model(batch)[:, :-1].argmax(-1)
            hits += (guess == batch[:, 1:]).sum().item()
            total += guess.numel()
    return hits / total


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--warmup_steps", type=int, default=20)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--logging_steps", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    rng = random.Random(args.seed)
    sentences = [" ".join(words) for words in itertools.product(*TEXT_PARTS.values())]
    rng.shuffle(sentences)
    train_text = write_text(rng, sentences[:400], 1000)
    eval_text = write_text(rng, sentences[400:], 120)
    vocab = {c: i for i, c in enumerate(sorted(set(train_text + eval_text)))}
    model = CausalLM(len(vocab), 24)
    train(args, model, TextDataset(train_text, vocab, 24))
    print(f"metric {evaluate(model, TextDataset(eval_text, vocab, 24)):.4f}")
