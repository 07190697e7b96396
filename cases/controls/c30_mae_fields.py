"""Masked autoencoder on 2x2 patches of smooth 8x8 fields: the encoder sees 4 of 16 patches."""
import argparse
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


def sincos_2d(dim, grid):
    def one(pos):
        omega = 1.0 / 100 ** (np.arange(dim // 4) / (dim / 4.0))
        out = pos.reshape(-1)[:, None] * omega[None]
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    gy, gx = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    pe = np.concatenate([one(gx), one(gy)], axis=1)
    pe = np.concatenate([np.zeros((1, dim)), pe], axis=0)  # row 0 is for the cls token
    return torch.from_numpy(pe).float().unsqueeze(0)


def smooth_fields(n, size, modes, noise, rng):
    """Random mixtures of the lowest 2-D cosine modes, a little noise on top."""
    k = np.arange(modes)
    x = (np.arange(size) + 0.5) / size
    basis = np.cos(np.pi * k[:, None] * x[None])
    amp = rng.normal(size=(n, modes, modes)) / (1 + k[:, None] + k[None])
    img = np.einsum("nab,ay,bx->nyx", amp, basis, basis)
    img = img + noise * rng.normal(size=img.shape)
    return torch.from_numpy(img).float()


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=2):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim * mlp_ratio), nn.GELU(), nn.Linear(dim * mlp_ratio, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MaskedAutoencoder(nn.Module):
    def __init__(self, patch=2, grid=4, dim=64, depth=3, heads=4, dec_dim=32, dec_depth=1, dec_heads=4):
        super().__init__()
        self.patch, self.grid = patch, grid
        self.patch_embed = nn.Linear(patch * patch, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("pos_embed", sincos_2d(dim, grid))
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)

        self.decoder_embed = nn.Linear(dim, dec_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dec_dim))
        self.register_buffer("decoder_pos_embed", sincos_2d(dec_dim, grid))
        self.decoder_blocks = nn.ModuleList([Block(dec_dim, dec_heads) for _ in range(dec_depth)])
        self.decoder_norm = nn.LayerNorm(dec_dim)
        self.decoder_pred = nn.Linear(dec_dim, patch * patch)

        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)

    def patchify(self, imgs):
        p, g = self.patch, self.grid
        return imgs.reshape(-1, g, p, g, p).permute(0, 1, 3, 2, 4).reshape(-1, g * g, p * p)

    @staticmethod
    def random_masking(x, mask_ratio, generator=None):
        N, L, D = x.shape
        keep = int(L * (1 - mask_ratio))
        noise = torch.rand(N, L, generator=generator)
        ids_shuffle = noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        x_kept = torch.gather(x, 1, ids_shuffle[:, :keep].unsqueeze(-1).expand(-1, -1, D))
        mask = torch.ones(N, L)
        mask[:, :keep] = 0
        return x_kept, torch.gather(mask, 1, ids_restore), ids_restore

    def forward(self, imgs, mask_ratio=0.75, generator=None):
        target = self.patchify(imgs)
        x = self.patch_embed(target) + self.pos_embed[:, 1:]
        x, mask, ids_restore = self.random_masking(x, mask_ratio, generator)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([cls, x], dim=1)
        for blk in self.blocks:
            x = blk(x)
        x = self.decoder_embed(self.norm(x))

        fill = self.mask_token.expand(x.shape[0], ids_restore.shape[1] + 1 - x.shape[1], -1)
        y = torch.cat([x[:, 1:], fill], dim=1)
        y = torch.gather(y, 1, ids_restore.unsqueeze(-1).expand(-1, -1, y.shape[2]))
        y = torch.cat([x[:, :1], y], dim=1) + self.decoder_pos_embed
        for blk in self.decoder_blocks:
            y = blk(y)
        pred = self.decoder_pred(self.decoder_norm(y))[:, 1:]

        loss = (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()
        return loss, pred, mask


def main():
    parser = argparse.ArgumentParser("MAE pre-training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iters", type=int, default=380)
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    images = smooth_fields(4000, 8, 3, 0.05, np.random.default_rng(args.seed))
    test, train = images[:400], images[400:]
    mean, std = train.mean(), train.std()
    train, test = (train - mean) / std, (test - mean) / std

    model = MaskedAutoencoder()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))

    model.train()
    for it in range(args.iters):
        frac = it / args.iters
        lr = args.lr * min(1.0, (it + 1) / 40) * 0.5 * (1 + math.cos(math.pi * frac))
        for g in optimizer.param_groups:
            g["lr"] = lr
        loss, _, _ = model(train[torch.randint(len(train), (args.batch_size,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if it % 100 == 0 or it == args.iters - 1:
            print(f"iter {it:4d} lr {lr:.2e} loss {loss.item():.4f}")

    # R2 on the hidden patches, against the mean training image
    model.eval()
    with torch.no_grad():
        _, pred, mask = model(test, generator=torch.Generator().manual_seed(1234))
        target = model.patchify(test)
        mean_image = model.patchify(train).mean(0)
        m = mask.unsqueeze(-1)
        r2 = 1 - (((pred - target) ** 2) * m).sum() / (((mean_image - target) ** 2) * m).sum()
    print(f"metric {r2.item():.4f}")


if __name__ == "__main__":
    main()
