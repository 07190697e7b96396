"""Contrastive image-text pretraining on captioned pictures of two coloured shapes."""
import argparse
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

COLORS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1)}
SHAPES = ["square", "cross", "frame"]
WORDS = ["<pad>", "<start>", "a", "the", "left-of", "above"] + list(COLORS) + SHAPES + ["<end>"]
TOKEN = {w: i for i, w in enumerate(WORDS)}   # <end> has the highest id
CONTEXT = 9
RES = 16


def glyph(shape):
    g = np.zeros((5, 5), dtype=np.float32)
    if shape == "square":
        g[:] = 1
    elif shape == "cross":
        g[2, :] = g[:, 2] = 1
    else:
        g[:] = 1
        g[1:4, 1:4] = 0
    return g


def render(scene, rng):
    (c1, s1), rel, (c2, s2) = scene
    img = rng.normal(0, 0.05, size=(3, RES, RES)).astype(np.float32)
    jit = rng.integers(0, 4, size=2), rng.integers(0, 4, size=2)
    other = rng.integers(0, 9) + rng.integers(0, 3, size=2)      # roughly the same height (or column)
    if rel == "left-of":
        corners = [(other[0], jit[0][1]), (other[1], 8 + jit[1][1])]
    else:
        corners = [(jit[0][0], other[0]), (8 + jit[1][0], other[1])]
    for (r, c), col, shp in zip(corners, (c1, c2), (s1, s2)):
        img[:, r:r + 5, c:c + 5] += np.array(COLORS[col], dtype=np.float32)[:, None, None] * glyph(shp)
    return img


def tokenize(scene, rng):
    (c1, s1), rel, (c2, s2) = scene
    words = ["<start>"]
    if rng.random() < 0.5:
        words.append(rng.choice(["a", "the"]))
    words += [c1, s1, rel]
    if rng.random() < 0.5:
        words.append(rng.choice(["a", "the"]))
    words += [c2, s2, "<end>"]
    ids = [TOKEN[w] for w in words]
    return ids + [0] * (CONTEXT - len(ids))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    def __init__(self, d_model, n_head, attn_mask=None):
        super().__init__()
        self.attn = nn.MultiheadAttention(d_model, n_head)
        self.ln_1 = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(OrderedDict([
            ("c_fc", nn.Linear(d_model, d_model * 2)),
            ("gelu", QuickGELU()),
            ("c_proj", nn.Linear(d_model * 2, d_model)),
        ]))
        self.ln_2 = nn.LayerNorm(d_model)
        self.register_buffer("attn_mask", attn_mask, persistent=False)

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, attn_mask=None):
        super().__init__()
        self.resblocks = nn.Sequential(*[ResidualAttentionBlock(width, heads, attn_mask) for _ in range(layers)])

    def forward(self, x):
        return self.resblocks(x)


class VisionTransformer(nn.Module):
    def __init__(self, patch, width, layers, heads, output_dim):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        scale = width ** -0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((RES // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim))

    def forward(self, x):
        x = self.conv1(x).flatten(2).permute(0, 2, 1)
        cls = self.class_embedding.expand(x.shape[0], 1, -1)
        x = self.ln_pre(torch.cat([cls, x], dim=1) + self.positional_embedding)
        x = self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)   # NLD -> LND -> NLD
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(nn.Module):
    def __init__(self, embed_dim=32, width=48, layers=2, heads=4):
        super().__init__()
        self.visual = VisionTransformer(4, width, layers, heads, embed_dim)
        mask = torch.full((CONTEXT, CONTEXT), float("-inf")).triu_(1)
        self.transformer = Transformer(width, layers, heads, attn_mask=mask)
        self.token_embedding = nn.Embedding(len(WORDS), width)
        self.positional_embedding = nn.Parameter(torch.empty(CONTEXT, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
        nn.init.normal_(self.token_embedding.weight, std=0.1)
        nn.init.normal_(self.positional_embedding, std=0.05)
        nn.init.normal_(self.text_projection, std=width ** -0.5)

    def encode_image(self, image):
        return F.normalize(self.visual(image), dim=-1)

    def encode_text(self, text):
        x = self.token_embedding(text) + self.positional_embedding
        x = self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        x = self.ln_final(x)
        # features of the <end> token, which is the largest number in each sequence
        return F.normalize(x[torch.arange(len(x)), text.argmax(dim=-1)] @ self.text_projection, dim=-1)

    def forward(self, image, text):
        logits = self.logit_scale.exp() * self.encode_image(image) @ self.encode_text(text).t()
        return logits, logits.t()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=56)
    parser.add_argument("--batch-size", type=int, default=48)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    things = [(c, s) for c in COLORS for s in SHAPES]
    scenes = [(a, rel, b) for a in things for b in things for rel in ("left-of", "above")]
    order = rng.permutation(len(scenes))
    held, train = [scenes[i] for i in order[:96]], [scenes[i] for i in order[96:]]

    def batch_of(items):
        return (torch.from_numpy(np.stack([render(s, rng) for s in items])),
                torch.tensor([tokenize(s, rng) for s in items]))

    test_images, test_texts = batch_of(held)

    model = CLIP()
    decay = [p for p in model.parameters() if p.ndim >= 2]
    no_decay = [p for p in model.parameters() if p.ndim < 2]
    steps = args.epochs * (len(train) // args.batch_size)
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.02}, {"params": no_decay, "weight_decay": 0.0}],
                                  lr=3e-3, betas=(0.9, 0.98), eps=1e-6)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)

    for epoch in range(args.epochs):
        model.train()
        perm = rng.permutation(len(train))
        total, batches = 0.0, 0
        for i in range(0, len(train) - args.batch_size + 1, args.batch_size):
            images, texts = batch_of([train[j] for j in perm[i:i + args.batch_size]])
            per_image, per_text = model(images, texts)
            target = torch.arange(len(images))
            loss = (F.cross_entropy(per_image, target) + F.cross_entropy(per_text, target)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, np.log(100))
            total, batches = total + loss.item(), batches + 1
        if (epoch + 1) % 8 == 0:
            print(f"epoch {epoch + 1}: loss {total / batches:.3f}  scale {model.logit_scale.exp().item():.1f}")

    model.eval()
    with torch.no_grad():
        per_image, per_text = model(test_images, test_texts)
        truth = torch.arange(len(held))
        r1 = [(m.argmax(-1) == truth).float().mean().item() for m in (per_image, per_text)]
    print(f"image->text R@1 {r1[0]:.3f}, text->image R@1 {r1[1]:.3f}")
    print(f"metric {sum(r1) / 2:.4f}")


if __name__ == "__main__":
    main()
