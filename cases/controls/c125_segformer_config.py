#!/usr/bin/env python
"""SegFormer (transformers, tiny config, from scratch): semantic segmentation of drawn scenes."""
import argparse
import numpy as np
import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation

NAMES = ["ground", "disc", "box", "stripe"]
IGNORE = 255


def scenes(rng, n, size=32):
    yy, xx = np.mgrid[:size, :size]
    img = rng.uniform(0.2, 0.4, (n, 3, 1, 1)) + 0.08 * rng.standard_normal((n, 3, size, size))
    lab = np.zeros((n, size, size), np.int64)
    for i in range(n):
        for _ in range(rng.integers(1, 3)):
            c = rng.integers(1, 4)
            cy, cx, r = rng.integers(6, size - 6), rng.integers(6, size - 6), rng.integers(5, 9)
            if c == 1:
                dist = np.hypot(yy - cy, xx - cx) - r
            elif c == 2:
                dist = np.maximum(abs(yy - cy), abs(xx - cx)) - r
            else:
                dist = np.maximum(abs(yy - cy) - 1.5, abs(xx - cx) - 2 * r)
            m = dist <= 0
            colour = rng.uniform(0.6, 1.0, 3)
            img[i][:, m] = colour[:, None] + 0.08 * rng.standard_normal((3, m.sum()))
            lab[i][m] = c
            lab[i][(dist > 0) & (dist < 1)] = IGNORE        # one pixel around each object is not judged
    return torch.tensor((img - 0.4) / 0.25, dtype=torch.float32), torch.from_numpy(lab)


def miou(pred, lab):
    ok = lab != IGNORE
    ious = []
    for c in range(len(NAMES)):
        p, t = (pred == c) & ok, (lab == c) & ok
        ious.append(((p & t).sum() / (p | t).sum().clamp(min=1)).item())
    return ious


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--iters", type=int, default=200)
opts = parser.parse_args()
torch.set_num_threads(1)
torch.manual_seed(opts.seed)
rng = np.random.default_rng(opts.seed)

config = SegformerConfig(
    num_encoder_blocks=3, depths=[1, 1, 1], sr_ratios=[4, 2, 1], hidden_sizes=[16, 24, 32], patch_sizes=[7, 3, 3],
    strides=[2, 2, 2], num_attention_heads=[1, 2, 4], mlp_ratios=[2, 2, 2], decoder_hidden_size=32,
    drop_path_rate=0.0, classifier_dropout_prob=0.0, num_labels=4, semantic_loss_ignore_index=IGNORE)
model = SegformerForSemanticSegmentation(config)

xtr, ytr = scenes(rng, 400)
xte, yte = scenes(rng, 60)

head = list(model.decode_head.parameters())
norm_ids = {id(p) for m in model.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()}
enc = list(model.segformer.parameters())
lr = 1e-3
groups = [
    {"params": [p for p in enc if id(p) not in norm_ids], "lr": lr, "weight_decay": 0.01},
    {"params": [p for p in enc if id(p) in norm_ids], "lr": lr, "weight_decay": 0.0},
    {"params": head, "lr": 10 * lr, "weight_decay": 0.01},         # as published: the head learns ten times faster
]
optimizer = torch.optim.AdamW(groups)
warm = 15
scheduler = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda i: (i + 1) / warm if i < warm else 1 - (i - warm) / (opts.iters - warm))

model.train()
for it in range(opts.iters):
    idx = rng.integers(0, len(xtr), 8)
    x, y = xtr[idx], ytr[idx]
    if rng.random() < 0.5:
        x, y = x.flip(-1), y.flip(-1)
    out = model(pixel_values=x, labels=y)
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    scheduler.step()
    if (it + 1) % 50 == 0:
        print(f"iter {it + 1}/{opts.iters}  loss {out.loss.item():.4f}  head lr {scheduler.get_last_lr()[2]:.5f}")

model.eval()
with torch.no_grad():
    logits = model(pixel_values=xte).logits
    logits = torch.nn.functional.interpolate(logits, size=yte.shape[-2:], mode="bilinear", align_corners=False)
ious = miou(logits.argmax(1), yte)
for n, v in zip(NAMES, ious):
    print(f"  {n:7s} {v:.3f}")
print(f"constant (all ground) {np.mean(miou(torch.zeros_like(yte), yte)):.4f}")
print(f"metric {np.mean(ious):.4f}")
