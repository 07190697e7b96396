"""TimeSformer with divided space-time attention telling which way a blob moves in small videos."""
import argparse

import torch
import torch.nn.functional as F
from torch import nn

FRAMES, SIZE, PATCH = 5, 12, 4
MOVES = torch.tensor([[0, 2], [0, -2], [2, 0], [-2, 0]])


def make_videos(n, g):
    """clips (n,1,T,H,W): a blob moving right, left, down or up, always in sight"""
    label = torch.randint(0, 4, (n,), generator=g)
    move = MOVES[label]                                                           # n,2 (y, x)
    t = torch.arange(FRAMES) - (FRAMES - 1) / 2
    room = (SIZE - 1) / 2 - move.abs() * (FRAMES - 1) / 2
    centre = (SIZE - 1) / 2 + room * (2 * torch.rand(n, 2, generator=g) - 1)
    pos = centre[:, None] + move[:, None] * t[None, :, None]                      # n,T,2
    d = torch.arange(SIZE) - pos[..., None]                                       # n,T,2,S
    blob = torch.exp(-d[:, :, 0, :, None] ** 2 / 3) * torch.exp(-d[:, :, 1, None, :] ** 2 / 3)
    clip = 2 * blob + 0.2 * torch.randn(n, FRAMES, SIZE, SIZE, generator=g)
    return clip.unsqueeze(1), label


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    """time, then space, then the MLP; the class token takes part in the spatial attention of every frame"""

    def __init__(self, dim, num_heads, mlp_ratio=2):
        super().__init__()
        self.temporal_norm1 = nn.LayerNorm(dim)
        self.temporal_attn = Attention(dim, num_heads)
        self.temporal_fc = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x, T):
        B, L, C = x.shape
        S = (L - 1) // T
        cls, xt = x[:, :1], x[:, 1:]                                              # tokens ordered (space time)
        res = self.temporal_attn(self.temporal_norm1(xt.reshape(B * S, T, C)))
        xt = xt + self.temporal_fc(res).reshape(B, S * T, C)

        xs = xt.view(B, S, T, C).transpose(1, 2).reshape(B * T, S, C)
        cls_rep = cls.expand(B, T, C).reshape(B * T, 1, C)
        res = self.attn(self.norm1(torch.cat([cls_rep, xs], 1)))
        res_cls = res[:, 0].view(B, T, C).mean(1, keepdim=True)                   # averaged over the frames
        res_x = res[:, 1:].view(B, T, S, C).transpose(1, 2).reshape(B, S * T, C)

        x = torch.cat([cls, xt], 1) + torch.cat([res_cls, res_x], 1)
        return x + self.mlp(self.norm2(x))


class TimeSformer(nn.Module):
    def __init__(self, dim=32, depth=2, num_heads=4, num_classes=4):
        super().__init__()
        self.patch = nn.Conv2d(1, dim, PATCH, PATCH)
        n = (SIZE // PATCH) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, n + 1, dim))
        self.time_embed = nn.Parameter(torch.zeros(1, FRAMES, dim))
        for p in (self.cls_token, self.pos_embed, self.time_embed):
            nn.init.trunc_normal_(p, std=0.2)
        self.blocks = nn.ModuleList([Block(dim, num_heads) for _ in range(depth)])
        for block in self.blocks[1:]:
            nn.init.zeros_(block.temporal_fc.weight)
            nn.init.zeros_(block.temporal_fc.bias)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, clip):
        B, _, T, H, W = clip.shape
        x = self.patch(clip.transpose(1, 2).reshape(B * T, 1, H, W)).flatten(2).transpose(1, 2)   # BT,S,C
        x = x + self.pos_embed[:, 1:]
        x = x.view(B, T, -1, x.size(-1)) + self.time_embed.unsqueeze(2)
        x = x.transpose(1, 2).flatten(1, 2)                                       # B,(S T),C
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1), x], 1)
        for block in self.blocks:
            x = block(x, T)
        return self.head(self.norm(x)[:, 0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    opt = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(opt.seed)
    g = torch.Generator().manual_seed(opt.seed + 1)
    videos, labels = make_videos(1600, g)
    val_videos, val_labels = make_videos(400, g)

    net = TimeSformer()
    steps = 240
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    net.train()
    for it in range(steps):
        idx = torch.randint(0, len(videos), (16,), generator=g)
        loss = F.cross_entropy(net(videos[idx]), labels[idx])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if it % 40 == 39:
            print(f"iter {it + 1}: loss {loss.item():.4f}, lr {schedule.get_last_lr()[0]:.5f}")

    net.eval()
    with torch.no_grad():
        acc = (net(val_videos).argmax(1) == val_labels).float().mean()
    print(f"metric {acc.item():.4f}")
