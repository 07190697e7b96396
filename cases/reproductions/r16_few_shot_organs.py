"""Few-shot segmentation: finds the tissue that is marked in a support scan."""

import argparse

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

SIZE, KINDS = 12, 3


class SelfAttention(nn.Module):
    def __init__(self, dim, fts_size, fixed):
        super().__init__()
        self.scale = (dim // 2) ** -0.5
        self.query = nn.Conv2d(dim, dim // 2, 1)
        self.key = nn.Conv2d(dim, dim // 2, 1)
        self.value = nn.Conv2d(dim, dim, 1)
        self.softmax = nn.Softmax(dim=-1)
        if fixed:
            self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
            self.norm = nn.LayerNorm([dim, *fts_size])
        else:
            self.mlp = self.norm = None

    def attend(self, x, y):
        B, C, H, W = x.shape
        q = self.query(x).view(B, -1, H * W).permute(0, 2, 1) * self.scale
        k = self.key(y).view(B, -1, H * W)
        v = self.value(y).view(B, -1, H * W)
        attn = self.softmax(torch.bmm(q, k))
        out = torch.bmm(v, attn.permute(0, 2, 1)).view(B, C, H, W)
        if self.mlp is not None:
            out = self.mlp(out.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            out = self.norm(out)
        return out

    def forward(self, x):
        return self.attend(x, x)


class CrossAttention(SelfAttention):
    def forward(self, x, y):
        return self.attend(x, y), self.attend(y, x)


class FewShotSeg(nn.Module):
    def __init__(self, fixed, dim=32, fts_size=(6, 6)):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, dim, 3, stride=2, padding=1),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.BatchNorm2d(dim),
        )
        self.position = nn.Parameter(0.1 * torch.randn(dim, *fts_size))
        self.t = nn.Parameter(torch.tensor([-10.0]))
        self.scaler = 20.0
        self.self_attention = SelfAttention(dim, fts_size, fixed)
        self.cross_attention = CrossAttention(dim, fts_size, fixed)

    def forward(self, supp_imgs, fore_mask, qry_imgs):
        fts = self.encoder(torch.cat([supp_imgs, qry_imgs])) + self.position
        supp_fts, qry_fts = self.self_attention(fts).chunk(2)
        supp_fts, qry_fts = self.cross_attention(supp_fts, qry_fts)
        mask = F.adaptive_avg_pool2d(fore_mask, supp_fts.shape[-2:])
        prototype = (supp_fts * mask).sum(dim=(2, 3)) / (mask.sum(dim=(2, 3)) + 1e-5)
        sim = -F.cosine_similarity(qry_fts, prototype[..., None, None], dim=1) * self.scaler
        pred = 1.0 - torch.sigmoid(0.5 * (sim - self.t))
        pred = pred.unsqueeze(1)
        pred = F.interpolate(pred, size=qry_imgs.shape[-2:], mode="bilinear", align_corners=True)
        return torch.cat((1.0 - pred, pred), dim=1)


def make_episodes(n, rng):
    """Support and query show one kind of tissue, beside any other kind."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] - (SIZE - 1) / 2

    def picture(kind):
        other = (kind + rng.integers(1, KINDS)) % KINDS
        angle, shift = rng.uniform(0, 2 * np.pi), rng.uniform(-1.5, 1.5)
        mask = np.cos(angle) * x + np.sin(angle) * y > shift
        level = np.linspace(-1.5, 1.5, KINDS)
        image = np.where(mask, level[kind], level[other])
        return image + 0.4 * rng.standard_normal(image.shape), mask

    episodes = []
    for _ in range(n):
        kind = rng.integers(KINDS)
        episodes.append((*picture(kind), *picture(kind)))
    parts = zip(*episodes, strict=True)
    return [torch.tensor(np.stack(part), dtype=torch.float32).unsqueeze(1) for part in parts]


def dice(model, episodes):
    supp, fore, qry, label = episodes
    model.eval()
    with torch.no_grad():
        pred = model(supp, fore, qry).argmax(dim=1).float()
    label = label.squeeze(1)
    inter = (pred * label).sum(dim=(1, 2))
    score = 2 * inter / (pred.sum(dim=(1, 2)) + label.sum(dim=(1, 2)))
    model.train()
    return score.mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--lr", type=float, default=5e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    train, test = make_episodes(2500, rng), make_episodes(200, rng)

    model = FewShotSeg(args.fixed)
    criterion = nn.NLLLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [160, 210], gamma=0.3)
    total = 0.0
    for i in range(1, args.steps + 1):
        rows = torch.from_numpy(rng.integers(2500, size=16))
        supp, fore, qry, label = (part[rows] for part in train)
        pred = model(supp, fore, qry)
        log_prob = torch.log(torch.clamp(pred, 1e-7, 1 - 1e-7))
        loss = criterion(log_prob, label.squeeze(1).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        total += loss.item()
        if i % 40 == 0:
            print(f"iteration {i}: loss {total / 40:.4f}")
            total = 0.0
    print(f"metric {dice(model, test):.4f}")


if __name__ == "__main__":
    main()
