"""
Character GPT on a deliberately small corpus of generated kitchen notes, with
periodic evaluation on notes that are not in the training part.
"""
import argparse
import math
import random

import torch
import torch.nn.functional as F

WHO = ["anna", "piet", "the cook", "our guest", "my aunt", "the boy"]
ACT = ["peeled", "washed", "burned", "chopped", "hid", "sold", "cooked"]
HOW_MANY = ["two", "six", "ten", "some", "no"]
WHAT = ["onions", "carrots", "figs", "eggs", "plums", "beans", "apples"]
WHEN = ["at noon", "today", "before dawn", "last night", "on sunday"]


def write_notes(n, rng):
    notes = set()
    while len(notes) < n:
        notes.add(f"{rng.choice(WHO)} {rng.choice(ACT)} {rng.choice(HOW_MANY)} {rng.choice(WHAT)} {rng.choice(WHEN)}.\n")
    notes = sorted(notes)
    rng.shuffle(notes)
    return notes


class CoreAttention(torch.nn.Module):
    """Causal attention core around torch's fused kernel.

    attention_dropout: drop rate of the attention weights while training.
    """

    def __init__(self, attention_dropout=0.0, fixed=False):
        super().__init__()
        self.dropout_p = attention_dropout
        self.fixed = fixed

    def forward(self, q, k, v):
        if self.fixed:
            dropout_p = self.dropout_p if self.training else 0.0
        else:
            if not self.training:
                self.dropout_p = 0.0
            dropout_p = self.dropout_p
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)


class ParallelAttention(torch.nn.Module):
    def __init__(self, hp):
        super().__init__()
        self.heads = hp.heads
        self.query_key_value = torch.nn.Linear(hp.hidden, 3 * hp.hidden)
        self.core_attention = CoreAttention(hp.attention_dropout, hp.fixed)
        self.dense = torch.nn.Linear(hp.hidden, hp.hidden)

    def forward(self, x):
        b, s, h = x.shape
        q, k, v = self.query_key_value(x).view(b, s, 3, self.heads, h // self.heads).permute(2, 0, 3, 1, 4)
        return self.dense(self.core_attention(q, k, v).transpose(1, 2).reshape(b, s, h))


class Layer(torch.nn.Module):
    def __init__(self, hp):
        super().__init__()
        self.input_layernorm = torch.nn.LayerNorm(hp.hidden)
        self.attention = ParallelAttention(hp)
        self.post_attention_layernorm = torch.nn.LayerNorm(hp.hidden)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(hp.hidden, 3 * hp.hidden), torch.nn.GELU(),
                                       torch.nn.Linear(3 * hp.hidden, hp.hidden))

    def forward(self, x):
        x = x + self.attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(torch.nn.Module):
    def __init__(self, hp, vocab):
        super().__init__()
        self.word_embeddings = torch.nn.Embedding(vocab, hp.hidden)
        self.position_embeddings = torch.nn.Embedding(hp.window, hp.hidden)
        self.layers = torch.nn.ModuleList([Layer(hp) for _ in range(hp.layers)])
        self.final_layernorm = torch.nn.LayerNorm(hp.hidden)
        self.head = torch.nn.Linear(hp.hidden, vocab)

    def forward(self, ids):
        x = self.word_embeddings(ids) + self.position_embeddings.weight[:ids.size(1)]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.final_layernorm(x))


def evaluate(model, ids, window):
    model.eval()
    n = (len(ids) - 1) // window
    x, y = ids[:n * window].view(n, window), ids[1:n * window + 1].view(n, window)
    with torch.no_grad():
        logits = model(x)
    model.train()
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    return loss.item(), (logits.argmax(-1) == y).float().mean().item()


def get_args():
    p = argparse.ArgumentParser()
    p.add_argument("--fixed", action="store_true")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--hidden", type=int, default=48)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--window", type=int, default=32)
    p.add_argument("--attention-dropout", type=float, default=0.2)
    p.add_argument("--micro-batch", type=int, default=12)
    p.add_argument("--lr", type=float, default=6e-3)
    p.add_argument("--train-iters", type=int, default=200)
    p.add_argument("--eval-interval", type=int, default=40)
    return p.parse_args()


def pretrain(hp):
    torch.set_num_threads(1)
    torch.manual_seed(hp.seed)
    notes = write_notes(120, random.Random(hp.seed))
    text = "".join(notes)
    chars = sorted(set(text))
    ids = lambda part: torch.tensor([chars.index(c) for c in "".join(part)])
    train_ids, valid_ids = ids(notes[:16]), ids(notes[16:76])

    model = GPT(hp, len(chars))
    optimizer = torch.optim.AdamW(model.parameters(), lr=hp.lr, betas=(0.9, 0.95), weight_decay=0.01)
    sampler = torch.Generator().manual_seed(hp.seed + 17)
    model.train()
    for iteration in range(1, hp.train_iters + 1):
        lr = hp.lr * min(iteration / 20, 0.55 + 0.45 * math.cos(math.pi * iteration / hp.train_iters))
        for group in optimizer.param_groups:
            group["lr"] = lr
        starts = torch.randint(len(train_ids) - hp.window - 1, (hp.micro_batch,), generator=sampler)
        chunk = torch.stack([train_ids[i:i + hp.window + 1] for i in starts.tolist()])
        loss = F.cross_entropy(model(chunk[:, :-1]).flatten(0, 1), chunk[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if iteration % hp.eval_interval == 0:
            valid_loss, valid_acc = evaluate(model, valid_ids, hp.window)
            print(f"iteration {iteration:5d} | lm loss {loss.item():.4f} | valid loss {valid_loss:.4f} | valid acc {valid_acc:.4f}")
    valid_loss, valid_acc = evaluate(model, valid_ids, hp.window)
    print(f"final valid loss {valid_loss:.4f} acc {valid_acc:.4f}")
    # likelihood per held-out character (geometric mean)
    print(f"metric {math.exp(-valid_loss):.4f}")


if __name__ == "__main__":
    pretrain(get_args())
