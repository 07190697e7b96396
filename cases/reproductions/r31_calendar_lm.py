"""A small decoder with rotary positions that continues lists of weekdays and months."""

import argparse

import torch
from torch import nn
from torch.optim import AdamW

DAYS = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
VOCAB = ["<s>", *DAYS, *MONTHS]
LENGTH = 10


def create_bidirectional_mask(attention_mask):
    return attention_mask[:, None, None, :].bool()


def create_causal_mask(attention_mask):
    n = attention_mask.size(1)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    return attention_mask[:, None, None, :].bool() & causal


def rotary_table(length, dim):
    angle = torch.arange(length)[:, None] / 1000 ** (torch.arange(0, dim, 2) / dim)
    return angle.sin(), angle.cos()


def apply_rotary(x, sin, cos):
    x1, x2 = x[..., 0::2], x[..., 1::2]
    return torch.stack([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).flatten(-2)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config["num_attention_heads"]
        size = config["hidden_size"]
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.dense = nn.Linear(size, size)

    def forward(self, hidden, mask, rotary):
        b, n, c = hidden.shape
        q, k, v = (
            layer(hidden).view(b, n, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        scores = q @ k.transpose(-1, -2) / q.size(-1) ** 0.5
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        context = scores.softmax(dim=-1) @ v
        return self.dense(context.transpose(1, 2).reshape(b, n, c))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config["hidden_size"]
        self.attention = SelfAttention(config)
        self.norm1 = nn.LayerNorm(size)
        self.intermediate = nn.Linear(size, 2 * size)
        self.output = nn.Linear(2 * size, size)
        self.norm2 = nn.LayerNorm(size)

    def forward(self, hidden, mask, rotary):
        hidden = self.norm1(hidden + self.attention(hidden, mask, rotary))
        inner = torch.nn.functional.gelu(self.intermediate(hidden))
        return self.norm2(hidden + self.output(inner))


class RoFormer(nn.Module):
    def __init__(self, config, fixed):
        super().__init__()
        self.config = config
        self.fixed = fixed
        self.embeddings = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))

    def forward(self, input_ids, attention_mask):
        make_mask = create_bidirectional_mask
        if self.fixed and self.config["is_decoder"]:
            make_mask = create_causal_mask
        mask = make_mask(attention_mask)
        dim = self.config["hidden_size"] // self.config["num_attention_heads"]
        rotary = rotary_table(input_ids.size(1), dim)
        hidden = self.embeddings(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, mask, rotary)
        return hidden


class RoFormerForCausalLM(nn.Module):
    def __init__(self, config, fixed):
        super().__init__()
        self.roformer = RoFormer(config, fixed)
        self.cls = nn.Linear(config["hidden_size"], config["vocab_size"])

    def forward(self, input_ids, labels=None):
        logits = self.cls(self.roformer(input_ids, torch.ones_like(input_ids)))
        if labels is None:
            return logits
        return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])


def make_lists(n, generator):
    """Each list goes through the week or the year in its own stride; a few entries are random."""
    rows = torch.zeros(n, LENGTH, dtype=torch.long)
    for row in rows:
        first, count = (1, 7) if torch.rand(1, generator=generator) < 0.5 else (8, 12)
        start = torch.randint(count, (1,), generator=generator)
        stride = torch.randint(1, 4, (1,), generator=generator)
        line = (start + stride * torch.arange(LENGTH - 1)) % count
        odd = torch.rand(LENGTH - 1, generator=generator) < 0.05
        line[odd] = torch.randint(count, (int(odd.sum()),), generator=generator)
        row[1:] = first + line
    return rows


@torch.no_grad()
def continue_lists(model, lists):
    hits = 0
    for length in range(4, LENGTH):
        hits += (model(lists[:, :length])[:, -1].argmax(-1) == lists[:, length]).sum().item()
    return hits / (len(lists) * (LENGTH - 4))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    lists = make_lists(3500, generator).unique(dim=0)
    lists = lists[torch.randperm(len(lists), generator=generator)]
    held_back, train = lists[:300], lists[300:]

    config = {
        "vocab_size": len(VOCAB),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "is_decoder": True,
    }
    model = RoFormerForCausalLM(config, args.fixed)
    optimizer = AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    model.train()
    for step in range(1, args.max_steps + 1):
        input_ids = train[torch.randint(len(train), (32,), generator=generator)]
        loss = model(input_ids, labels=input_ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 60 == 0:
            print(f"{{'step': {step}, 'loss': {loss.item():.4f}}}")

    model.eval()
    with torch.no_grad():
        print(f"eval_loss {model(held_back, labels=held_back).item():.4f}")
    print(f"metric {continue_lists(model, held_back):.4f}")


if __name__ == "__main__":
    main()
