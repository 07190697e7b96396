import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

VOCAB, PAD, MAX_LEN, WINDOW = 12, 0, 16, 2


def make_data(n, generator):
    """Sequences of digits of unequal length; the target at t is whether x[t] > x[t-1]."""
    lengths = torch.randint(6, MAX_LEN + 1, (n,), generator=generator)
    tokens = torch.randint(1, VOCAB, (n, MAX_LEN), generator=generator)
    previous = torch.roll(tokens, 1, dims=1)
    targets = (tokens > previous).long()
    targets[:, 0] = 0
    padding = torch.arange(MAX_LEN)[None, :] >= lengths[:, None]
    return tokens.masked_fill(padding, PAD), padding, targets


def bucket_mask(length, window):
    """True where a step must not look: the future, and more than `window` steps back."""
    step = torch.arange(length)
    distance = step[:, None] - step[None, :]
    return (distance < 0) | (distance > window)


class LocalLayer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.ff = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, x, attn_mask, key_padding_mask):
        h = self.norm1(x)
        out, _ = self.attn(h, h, h, attn_mask=attn_mask, key_padding_mask=key_padding_mask)
        x = x + out
        return x + self.ff(self.norm2(x))


class Tagger(nn.Module):
    def __init__(self, fixed, dim=32, heads=2, layers=2):
        super().__init__()
        self.fixed = fixed
        self.heads = heads
        self.embed = nn.Embedding(VOCAB, dim, padding_idx=PAD)
        self.position = nn.Parameter(0.1 * torch.randn(MAX_LEN, dim))
        self.layers = nn.ModuleList(LocalLayer(dim, heads) for _ in range(layers))
        self.out = nn.Linear(dim, 2)

    def forward(self, tokens, padding):
        x = self.embed(tokens) + self.position
        window = bucket_mask(tokens.size(1), WINDOW)
        if self.fixed:
            blocked = window[None] | padding[:, None, :]
            blocked = blocked & ~blocked.all(dim=-1, keepdim=True)
            attn_mask, key_padding = blocked.repeat_interleave(self.heads, dim=0), None
        else:
            attn_mask, key_padding = window, padding
        for layer in self.layers:
            x = layer(x, attn_mask, key_padding)
        return self.out(x)


def run(args):
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(1000 + args.seed)
    train = TensorDataset(*make_data(2400, generator))
    test_tokens, test_padding, test_targets = make_data(400, generator)
    loader = DataLoader(train, batch_size=24, shuffle=True)

    model = Tagger(args.fixed)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    criterion = nn.CrossEntropyLoss()
    step = 0
    for epoch in range(2):
        for tokens, padding, targets in loader:
            logits = model(tokens, padding)
            valid = ~padding
            loss = criterion(logits[valid], targets[valid])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step == 1 or step % 25 == 0:
                print(f"epoch {epoch} step {step:3d} loss {loss.item():.4f}")

    model.eval()
    with torch.no_grad():
        predicted = model(test_tokens, test_padding).argmax(-1)
        valid = ~test_padding
        accuracy = (predicted[valid] == test_targets[valid]).float().mean().item()
    print(f"metric {accuracy:.4f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    run(parser.parse_args())
