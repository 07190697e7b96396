import argparse
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

"""Vision transformer whose second half uses Soft MoE layers in place of MLPs, on noisy drawings of six shapes."""


def draw(rng, n, size=16):
    yy, xx = np.mgrid[0:size, 0:size].astype(np.float32)
    imgs, labels = np.zeros((n, 1, size, size), np.float32), rng.integers(0, 6, n)
    for i, c in enumerate(labels):
        cy, cx, r, th = *rng.uniform(6.3, 8.7, 2), rng.uniform(3.2, 5.2), rng.uniform(-0.3, 0.3)
        v = np.cos(th) * (yy - cy) + np.sin(th) * (xx - cx)
        u = -np.sin(th) * (yy - cy) + np.cos(th) * (xx - cx)
        rad, box = np.hypot(u, v), np.maximum(abs(u), abs(v))
        if c == 0:
            m = rad < r                                            # disc
        elif c == 1:
            m = abs(rad - r) < 0.9                                 # ring
        elif c == 2:
            m = box < 0.85 * r                                     # square
        elif c == 3:
            m = (np.minimum(abs(u), abs(v)) < 1) & (box < r)       # plus
        elif c == 4:
            m = (abs(abs(u) - abs(v)) < 1.2) & (box < 0.9 * r)     # cross
        else:
            m = (abs(box - 0.85 * r) < 0.9)                        # frame
        imgs[i, 0] = m * rng.uniform(0.7, 1.3)
    return torch.from_numpy(imgs + 0.15 * rng.standard_normal(imgs.shape).astype(np.float32)), torch.from_numpy(labels)


class SoftMoE(nn.Module):
    """every slot is a convex mixture of all tokens, every token a convex mixture of all slots' outputs"""

    def __init__(self, d, experts=4, slots=4, hidden=48):
        super().__init__()
        self.e, self.s = experts, slots
        self.phi = nn.Parameter(torch.randn(d, experts * slots) * d ** -0.5)
        self.scale = nn.Parameter(torch.ones(()))
        self.w1 = nn.Parameter(torch.empty(experts, d, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, d))
        self.b1, self.b2 = nn.Parameter(torch.zeros(experts, 1, hidden)), nn.Parameter(torch.zeros(experts, 1, d))
        for e in range(experts):
            nn.init.xavier_uniform_(self.w1[e])
            nn.init.xavier_uniform_(self.w2[e])

    def forward(self, x):
        b, m, d = x.shape
        logits = F.normalize(x, dim=-1) @ (self.scale * F.normalize(self.phi, dim=0))     # b, tokens, slots
        dispatch = logits.softmax(dim=1)
        combine = logits.softmax(dim=2)
        slots = (dispatch.transpose(1, 2) @ x).view(b, self.e, self.s, d)
        h = F.gelu(slots @ self.w1 + self.b1) @ self.w2 + self.b2
        return combine @ h.reshape(b, self.e * self.s, d)


class Layer(nn.Module):
    def __init__(self, d, heads, moe):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.att = nn.MultiheadAttention(d, heads, batch_first=True)
        self.ff = SoftMoE(d) if moe else nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x):
        y = self.ln1(x)
        x = x + self.att(y, y, y, need_weights=False)[0]
        return x + self.ff(self.ln2(x))


class SoftMoEViT(nn.Module):
    def __init__(self, d=32, heads=4, depth=2, classes=6):
        super().__init__()
        self.embed = nn.Conv2d(1, d, 4, stride=4)
        grid = torch.arange(4.0)
        freq = 1 / 100 ** (torch.arange(d // 4) / (d // 4 - 1))
        y, x = torch.meshgrid(grid, grid, indexing="ij")
        y, x = y.flatten()[:, None] * freq, x.flatten()[:, None] * freq
        self.register_buffer("pos", torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1))    # fixed 2d sines
        self.layers = nn.ModuleList(Layer(d, heads, moe=i >= depth // 2) for i in range(depth))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, classes)
        nn.init.zeros_(self.head.weight)                           # output layer starts at nought
        nn.init.zeros_(self.head.bias)

    def forward(self, img):
        x = self.embed(img).flatten(2).transpose(1, 2) + self.pos
        for l in self.layers:
            x = l(x)
        return self.head(self.norm(x).mean(1))


def rsqrt_schedule(step, total, warm=30, cool=70, timescale=60):
    f = min(1.0, step / warm) / max(1.0, 1 + (step - warm) / timescale) ** 0.5
    return f * min(1.0, (total - step) / cool)


def run(seed, steps=250, batch=32):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 124])
    x, y = draw(rng, 1200)
    xt, yt = draw(rng, 300)
    model = SoftMoEViT()
    opt = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-4)
    for step in range(1, steps + 1):
        for g in opt.param_groups:
            g["lr"] = 4e-3 * rsqrt_schedule(step, steps + 1)
        idx = torch.from_numpy(rng.integers(0, len(x), batch))
        xb = x[idx]
        if rng.random() < 0.5:
            xb = xb.flip(-1)
        logits = model(xb)
        loss = F.cross_entropy(logits, y[idx])
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if step % 50 == 0:
            print("step", step, "loss", round(loss.item(), 4), "scale", round(model.layers[-1].ff.scale.item(), 4))
    model.eval()
    with torch.no_grad():
        acc = (model(xt).argmax(1) == yt).float().mean().item()
    print("constant", round(yt.bincount().max().item() / len(yt), 4))
    print("metric", round(acc, 4))


if __name__ == "__main__":
    cli = argparse.ArgumentParser()
    cli.add_argument("--seed", type=int, default=0)
    run(cli.parse_args().seed)
