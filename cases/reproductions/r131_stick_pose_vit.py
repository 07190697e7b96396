"""Top-down keypoint heatmaps for two-segment arms with a small ViT backbone."""
import argparse
import math

import numpy as np
import torch
import torch.nn as nn

torch.set_num_threads(1)

IMG, PATCH, HEAT, JOINTS = 24, 6, 12, 3


def render(n, rng):
    base = rng.uniform(8, 16, (n, 2))
    a1 = rng.uniform(0, 2 * math.pi, n)
    a2 = a1 + rng.uniform(-2.2, 2.2, n)
    l1, l2 = rng.uniform(5, 7, n), rng.uniform(4, 6, n)
    elbow = base + np.stack([np.cos(a1), np.sin(a1)], 1) * l1[:, None]
    tip = elbow + np.stack([np.cos(a2), np.sin(a2)], 1) * l2[:, None]
    joints = np.clip(np.stack([base, elbow, tip], 1), 1, IMG - 2)
    yy, xx = np.mgrid[0:IMG, 0:IMG]
    pix = np.stack([xx, yy], -1).reshape(1, -1, 2)
    img = rng.normal(0, 0.05, (n, IMG * IMG))
    for (s, e), level in zip(((0, 1), (1, 2)), (1.0, 0.55)):
        p, q = joints[:, s][:, None], joints[:, e][:, None]
        d = q - p
        t = np.clip(((pix - p) * d).sum(-1) / ((d * d).sum(-1) + 1e-6), 0, 1)
        dist = (pix - p - t[..., None] * d)
        img += level * np.exp(-(dist * dist).sum(-1) / 1.3)
    img = ((img - 0.12) / 0.3).reshape(n, 1, IMG, IMG)

    c = joints / (IMG / HEAT)
    gy, gx = np.mgrid[0:HEAT, 0:HEAT] + 0.25
    heat = np.exp(-((gx - c[..., 0, None, None]) ** 2 + (gy - c[..., 1, None, None]) ** 2) / 2.0)
    as_t = lambda a: torch.tensor(a, dtype=torch.float32)
    return as_t(img), as_t(heat), as_t(c)


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Backbone(nn.Module):
    def __init__(self, dim=32, depth=3, heads=4):
        super().__init__()
        n = (IMG // PATCH) ** 2
        self.patch_embed = nn.Conv2d(1, dim, PATCH, PATCH)
        self.pos_embed = nn.Parameter(torch.zeros(1, n, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.last_norm = nn.LayerNorm(dim)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        for blk in self.blocks:
            x = blk(x)
        return self.last_norm(x)


class PoseNet(nn.Module):
    def __init__(self, dim=32, depth=3):
        super().__init__()
        self.backbone = Backbone(dim, depth)
        self.keypoint_head = nn.Sequential(
            nn.ConvTranspose2d(dim, 16, 3, 3), nn.ReLU(), nn.Conv2d(16, JOINTS, 1))

    def forward(self, x):
        f = self.backbone(x)
        side = IMG // PATCH
        return self.keypoint_head(f.transpose(1, 2).reshape(x.size(0), -1, side, side))


class LayerDecayOptimizer:
    """Wraps an optimizer so that every parameter group follows its own rate."""

    def __init__(self, optimizer, rates, at_start):
        self.optimizer = optimizer
        self.rates = rates
        self.at_start = at_start
        if at_start:
            self._scale()

    def _scale(self):
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group['lr'] *= rate

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self):
        self.optimizer.step()
        if not self.at_start:
            self._scale()


def layer_groups(model, decay):
    bb = model.backbone
    stacks = [[bb.patch_embed.weight, bb.patch_embed.bias, bb.pos_embed]]
    stacks += [list(b.parameters()) for b in bb.blocks]
    stacks += [list(bb.last_norm.parameters()) + list(model.keypoint_head.parameters())]
    top = len(stacks) - 1
    return [{'params': s} for s in stacks], [decay ** (top - i) for i in range(len(stacks))]


def pck(pred, centers, radius=1.5):
    flat = pred.flatten(2).argmax(-1)
    xy = torch.stack([flat % HEAT, flat // HEAT], -1).float() + 0.25
    return ((xy - centers).norm(dim=-1) < radius).float().mean().item()


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--seed', type=int, default=0)
    ap.add_argument('--fixed', action='store_true')
    ap.add_argument('--epochs', type=int, default=5)
    args = ap.parse_args()

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    img, heat, _ = render(800, rng)
    v_img, v_heat, v_xy = render(250, rng)

    model = PoseNet()
    groups, rates = layer_groups(model, decay=0.85)
    adamw = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.999), weight_decay=0.05, foreach=True)
    optimizer = LayerDecayOptimizer(adamw, rates, at_start=args.fixed)
    bs = 16
    per_epoch = len(img) // bs
    warmup = torch.optim.lr_scheduler.LinearLR(adamw, 0.1, total_iters=20)
    drops = torch.optim.lr_scheduler.MultiStepLR(adamw, [3 * per_epoch, 4 * per_epoch], gamma=0.3)
    criterion = nn.MSELoss()

    for epoch in range(args.epochs):
        model.train()
        order = torch.from_numpy(rng.permutation(len(img)))
        total = 0.0
        for i in range(per_epoch):
            idx = order[i * bs:(i + 1) * bs]
            loss = criterion(model(img[idx]), heat[idx])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            warmup.step()
            drops.step()
            total += loss.item()
        model.eval()
        with torch.no_grad():
            out = model(v_img)
            v = criterion(out, v_heat).item()
        print(f'[{epoch:03d}/{args.epochs}] loss(train) {total / per_epoch:.5f}  '
              f'loss(valid) {v:.5f}  lr {adamw.param_groups[-1]["lr"]:.2e}  pck {pck(out, v_xy):.4f}')
    print(f'metric {pck(out, v_xy):.4f}')


if __name__ == '__main__':
    main()
