"""A small 3D-CNN for video: factored convolutions, then attention within frames, across time, and
from a few learned latents to all of it (as a Perceiver does)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, LATENTS = 32, 2, 8


class Factored(nn.Sequential):
    """A convolution over space, then one over time (Tran et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(
            nn.Conv3d(inputs, outputs, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
            nn.BatchNorm3d(outputs),
            nn.ReLU(),
            nn.Conv3d(outputs, outputs, (3, 1, 1), padding=(1, 0, 0), bias=False),
            nn.BatchNorm3d(outputs),
            nn.ReLU(),
        )


class Attention(nn.Module):
    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, source: Tensor) -> Tensor:
        q = self.q_proj(queries).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k = self.k_proj(source).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        v = self.v_proj(source).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention before which inputs are normalised, added to them."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.attention(normed, normed)


class CrossAttention(nn.Module):
    """Learned latents ask the whole clip."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.latents = nn.Parameter(0.02 * torch.randn(LATENTS, width))
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        latents = self.latents.expand(len(tokens), -1, -1)
        latents = latents + self.attention(latents, self.norm(tokens))
        return latents + self.feed_forward(latents)


class VideoModel(nn.Module):
    def __init__(self, classes: int, *, cross_attention: str = "at-once") -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            Factored(1, 8, 1), Factored(8, 16, 2), Factored(16, 16, 2)
        )
        self.projection = nn.Linear(16, WIDTH)
        self.space = nn.Parameter(0.02 * torch.randn(25, WIDTH))
        self.time = nn.Parameter(0.02 * torch.randn(8, 1, WIDTH))
        self.spatial_attention = Block()
        self.temporal_attention = Block()
        self.cross_attention = CrossAttention() if cross_attention == "at-once" else None
        self.self_attention = Block()
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, clips: Tensor) -> Tensor:
        """(N, 1, T, H, W) to logits (N, classes)."""
        x = self.convolutions(clips).flatten(3).permute(0, 2, 3, 1)  # (N, T, places, channels)
        x = self.projection(x) + self.space + self.time
        n, t, p, _ = x.shape
        x = self.spatial_attention(x.flatten(0, 1)).unflatten(0, (n, t))
        x = self.temporal_attention(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (n, p))
        if self.cross_attention is None:  # built when it is first needed
            self.cross_attention = CrossAttention()
        x = self.self_attention(self.cross_attention(x.flatten(1, 2)))
        return self.head(self.norm(x).mean(1))
