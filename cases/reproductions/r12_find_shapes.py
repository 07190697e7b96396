"""DETR-like model: one object query for each shape asks where in the picture that shape is."""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn

SHAPES, CELLS, PIXELS = 6, 9, 16


def default_init(linear, generator):
    # truncated normal with variance 1 / fan_in
    std = linear.in_features**-0.5 / 0.87962566103423978
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
    nn.init.zeros_(linear.bias)


def xavier_uniform(linear, generator, parts=1):
    bound = math.sqrt(6.0 / (linear.in_features + parts * linear.out_features))
    nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
    nn.init.zeros_(linear.bias)


class MultiHeadDotProductAttention(nn.Module):
    def __init__(self, features, num_heads, fixed, generator):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(features, features)
        self.key = nn.Linear(features, features)
        self.value = nn.Linear(features, features)
        self.out = nn.Linear(features, features)
        for projection in (self.query, self.key, self.value):
            if fixed:
                xavier_uniform(projection, generator, parts=3)
            else:
                default_init(projection, generator)
        xavier_uniform(self.out, generator)

    def forward(self, inputs_q, inputs_k, inputs_v):
        def heads(x):
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        q, k, v = (
            heads(self.query(inputs_q)),
            heads(self.key(inputs_k)),
            heads(self.value(inputs_v)),
        )
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)), dim=-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class MlpBlock(nn.Sequential):
    def __init__(self, features, hidden, generator):
        super().__init__(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, features))
        xavier_uniform(self[0], generator)
        xavier_uniform(self[2], generator)


class EncoderBlock(nn.Module):
    def __init__(self, dim, heads, fixed, generator):
        super().__init__()
        self.self_attn = MultiHeadDotProductAttention(dim, heads, fixed, generator)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = MlpBlock(dim, 2 * dim, generator)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x, pos):
        x = self.norm1(x + self.self_attn(x + pos, x + pos, x))
        return self.norm2(x + self.mlp(x))


class DecoderBlock(nn.Module):
    def __init__(self, dim, heads, fixed, generator):
        super().__init__()
        self.self_attn = MultiHeadDotProductAttention(dim, heads, fixed, generator)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn = MultiHeadDotProductAttention(dim, heads, fixed, generator)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MlpBlock(dim, 2 * dim, generator)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, tgt, memory, pos, query_pos):
        x = self.norm1(tgt + self.self_attn(tgt + query_pos, tgt + query_pos, tgt))
        x = self.norm2(x + self.cross_attn(x + query_pos, memory + pos, memory))
        return self.norm3(x + self.mlp(x))


class Detr(nn.Module):
    def __init__(self, fixed, generator, dim=32, heads=4):
        super().__init__()
        self.backbone = nn.Linear(PIXELS, dim)
        xavier_uniform(self.backbone, generator)
        self.pos_embed = nn.Parameter(torch.randn(CELLS, dim, generator=generator))
        self.query_embed = nn.Parameter(torch.randn(SHAPES, dim, generator=generator))
        self.encoder = nn.ModuleList([EncoderBlock(dim, heads, fixed, generator)])
        self.decoder = nn.ModuleList(DecoderBlock(dim, heads, fixed, generator) for _ in range(2))
        self.decoder_norm = nn.LayerNorm(dim)
        self.class_head = nn.Linear(dim, CELLS + 1)
        xavier_uniform(self.class_head, generator)

    def forward(self, patches):
        memory = self.backbone(patches)
        for block in self.encoder:
            memory = block(memory, self.pos_embed)
        tgt = torch.zeros(len(patches), *self.query_embed.shape)
        for block in self.decoder:
            tgt = block(tgt, memory, self.pos_embed, self.query_embed)
        return self.class_head(self.decoder_norm(tgt))


def make_pictures(n, shapes, generator):
    """Half of the shapes, each in a cell of its own; the target is the cell, or CELLS if absent."""
    cell_of = torch.rand(n, CELLS, generator=generator).argsort(dim=1)[:, :SHAPES]
    absent = torch.rand(n, SHAPES, generator=generator) < 0.4
    patches = 0.5 * torch.randn(n, CELLS, PIXELS, generator=generator)
    for s in range(SHAPES):
        rows = (~absent[:, s]).nonzero().squeeze(1)
        patches[rows, cell_of[rows, s]] += shapes[s]
    return patches, cell_of.masked_fill(absent, CELLS)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    data_generator = torch.Generator().manual_seed(args.seed)

    shapes = torch.randn(SHAPES, PIXELS, generator=data_generator).sign()
    patches, cells = make_pictures(4500, shapes, data_generator)
    test_patches, test_cells = patches[4000:], cells[4000:]

    model = Detr(args.fixed, torch.Generator().manual_seed(args.seed + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    iterations = 260
    for it in range(iterations):
        rows = torch.randint(4000, (32,), generator=data_generator)
        logits = model(patches[rows])
        loss = F.cross_entropy(logits.flatten(0, 1), cells[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if it % 40 == 0 or it == iterations - 1:
            print(f"{it:4d} loss {loss.item():.4f} grad {grad_norm.item():.2f}")

    model.eval()
    with torch.no_grad():
        found = model(test_patches).argmax(-1) == test_cells
    present = test_cells < CELLS
    print(f"recall of shapes {found[present].float().mean():.3f}")
    print(f"metric {found.float().mean().item():.4f}")


if __name__ == "__main__":
    main()
