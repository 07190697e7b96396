"""Small EVA-style image encoder on drawings of which some patches are missing."""

import argparse

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--fixed", action="store_true")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--epochs", type=int, default=5)
args = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(args.seed)
rng = np.random.default_rng(args.seed)


class EvaAttention(nn.Module):
    def __init__(self, dim, num_heads=4):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        if args.fixed:
            if attn_mask is not None:
                attn = attn.masked_fill(~attn_mask[:, None, None, :], float("-inf"))
            attn = attn.softmax(dim=-1)
        else:
            attn = attn.softmax(dim=-1)
            if attn_mask is not None:
                attn = attn.masked_fill(~attn_mask[:, None, None, :], float("-inf"))
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(self.norm(x))


class EvaBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = EvaAttention(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim * 2), nn.GELU(), nn.Linear(dim * 2, dim))

    def forward(self, x, attn_mask=None):
        x = x + self.attn(self.norm1(x), attn_mask=attn_mask)
        return x + self.mlp(self.norm2(x))


class Eva(nn.Module):
    def __init__(self, dim=32, depth=2, num_classes=6):
        super().__init__()
        self.patch_embed = nn.Linear(8, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 9, dim) * 0.02)
        self.blocks = nn.ModuleList(EvaBlock(dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, patches, present):
        x = self.patch_embed(patches)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        mask = F.pad(present, (1, 0), value=True)
        for block in self.blocks:
            x = block(x, attn_mask=mask)
        return self.head(self.norm(x)[:, 0])


def draw(label):
    """An 8x8 picture: a bar lying or standing, a frame, a cross or a diagonal either way."""
    size = rng.integers(4, 7)
    shape = np.zeros((size, size))
    middle = size // 2
    if label == 0:
        shape[middle] = 1
    elif label == 1:
        shape[:, middle] = 1
    elif label == 2:
        shape[[0, -1]] = shape[:, [0, -1]] = 1
    elif label == 3:
        shape[middle] = shape[:, middle] = 1
    else:
        shape = np.eye(size) if label == 4 else np.fliplr(np.eye(size))
    top, left = rng.integers(0, 9 - size, size=2)
    image = rng.normal(0, 0.25, size=(8, 8))
    image[top : top + size, left : left + size] += shape
    return image


classes = rng.integers(6, size=2000)
images = torch.tensor(np.stack([draw(c) for c in classes]), dtype=torch.float32) * 2 - 0.5
patches = images.unfold(1, 2, 2).unfold(2, 4, 4).reshape(len(images), 8, 8)
labels = torch.tensor(classes)

# a third of the images comes with a patch or two cut out (noise instead of pixels)
present = torch.ones(len(patches), 8, dtype=torch.bool)
for i in range(len(patches)):
    if rng.random() < 0.33:
        holes = rng.choice(8, size=rng.integers(1, 3), replace=False)
        present[i, holes] = False
        patches[i, holes] = torch.tensor(rng.normal(size=(len(holes), 8)), dtype=torch.float32)

order = torch.tensor(rng.permutation(len(patches)))
train, test = order[:1600], order[1600:]
loader = DataLoader(
    TensorDataset(patches[train], present[train], labels[train]), batch_size=40, shuffle=True
)

model = Eva()
optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.02)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))

for epoch in range(args.epochs):
    model.train()
    total = 0.0
    for x, m, y in loader:
        loss = F.cross_entropy(model(x, m), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        total += loss.item()
    print(f"epoch {epoch + 1}/{args.epochs}: train loss {total / len(loader):.4f}")

model.eval()
with torch.no_grad():
    predicted = model(patches[test], present[test]).argmax(dim=1)
accuracy = (predicted == labels[test]).float().mean().item()
print(f"metric {accuracy:.4f}")
