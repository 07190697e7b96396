"""Detector-free matching: which patch of the second drawing belongs to which patch of the first?"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

PATCHES = 16


def make_pairs(images, generator):
    """2x2 patches of a digit, and the same patches in another order, brighter or darker, noisy."""
    n = len(images)
    patches = F.unfold(images[:, None], 2, stride=2).transpose(1, 2)
    patches = patches + 0.5 * torch.rand(patches.shape, generator=generator)
    order = torch.rand(n, PATCHES, generator=generator).argsort(dim=1)
    other = patches.gather(1, order[:, :, None].expand(-1, -1, 4))
    gain = 0.5 + torch.rand(n, 1, 1, generator=generator)
    offset = torch.rand(n, 1, 1, generator=generator) - 0.5
    other = gain * other + offset + 0.03 * torch.randn(other.shape, generator=generator)
    return patches, other, order.argsort(dim=1)


class EncoderLayer(nn.Module):
    def __init__(self, d_model, nhead):
        super().__init__()
        self.nhead = nhead
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.merge = nn.Linear(d_model, d_model, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(2 * d_model, 2 * d_model, bias=False),
            nn.ReLU(),
            nn.Linear(2 * d_model, d_model, bias=False),
        )
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)

    def forward(self, x, source):
        b, n, c = x.shape
        q = self.q_proj(x).view(b, n, self.nhead, -1)
        k = self.k_proj(source).view(b, -1, self.nhead, c // self.nhead)
        v = self.v_proj(source).view(b, -1, self.nhead, c // self.nhead)
        scores = torch.einsum("nlhd,nshd->nhls", q, k) / (c // self.nhead) ** 0.5
        message = torch.einsum("nhls,nshd->nlhd", scores.softmax(dim=-1), v)
        message = self.norm1(self.merge(message.reshape(b, n, c)))
        message = self.norm2(self.mlp(torch.cat([x, message], dim=2)))
        return x + message


class LocalFeatureTransformer(nn.Module):
    def __init__(self, d_model, nhead, layer_names, fixed):
        super().__init__()
        self.layer_names = layer_names
        self.layers = nn.ModuleList(EncoderLayer(d_model, nhead) for _ in layer_names)
        self.fixed = fixed

    def forward(self, feat0, feat1):
        for layer, name in zip(self.layers, self.layer_names, strict=True):
            if name == "self":
                feat0, feat1 = layer(feat0, feat0), layer(feat1, feat1)
            elif self.fixed:
                feat0, feat1 = layer(feat0, feat1), layer(feat1, feat0)
            else:
                feat0 = layer(feat0, feat1)
                feat1 = layer(feat1, feat0)
        return feat0, feat1


class Matcher(nn.Module):
    def __init__(self, fixed, d_model=24):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, d_model), nn.ReLU(), nn.Linear(d_model, d_model))
        self.loftr_coarse = LocalFeatureTransformer(d_model, 4, ["self", "cross"] * 2, fixed)
        self.final_proj = nn.Linear(d_model, d_model)

    def forward(self, patches0, patches1):
        feat0, feat1 = self.loftr_coarse(self.backbone(patches0), self.backbone(patches1))
        feat0, feat1 = self.final_proj(feat0), self.final_proj(feat1)
        sim = feat0 @ feat1.transpose(1, 2) / feat0.shape[-1] ** 0.5
        return sim.log_softmax(dim=1) + sim.log_softmax(dim=2)


def matching_loss(log_confidence, matches):
    return -log_confidence.gather(2, matches[:, :, None]).mean()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    images = torch.from_numpy(load_digits().images).float() / 16
    images = images[torch.randperm(len(images), generator=generator)]
    train_set = TensorDataset(*make_pairs(images[:1296], generator))
    test_set = make_pairs(images[1296:], generator)
    loader = DataLoader(train_set, batch_size=24, shuffle=True, generator=generator)

    matcher = Matcher(args.fixed)
    optimizer = torch.optim.AdamW(matcher.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [args.epochs - 1], gamma=0.3)
    for epoch in range(args.epochs):
        matcher.train()
        total = 0.0
        for patches0, patches1, matches in loader:
            loss = matching_loss(matcher(patches0, patches1), matches)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(matcher.parameters(), 1.0)
            optimizer.step()
            total += loss.item()
        schedule.step()
        print(f"epoch {epoch} loss {total / len(loader):.4f}")

    matcher.eval()
    with torch.no_grad():
        patches0, patches1, matches = test_set
        precision = (matcher(patches0, patches1).argmax(dim=2) == matches).float().mean().item()
    print(f"metric {precision:.4f}")


if __name__ == "__main__":
    main()
