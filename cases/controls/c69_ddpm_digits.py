"""Denoising diffusion on 8x8 digits with a small attention U-Net."""
import argparse
import copy
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn


def timestep_embedding(t, dim, max_period=10000):
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32) / half)
    args = t[:, None].float() * freqs[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


def zero_module(module):
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, emb, groups=8):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(groups, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, c_out))
        self.out_layers = nn.Sequential(nn.GroupNorm(groups, c_out), nn.SiLU(),
                                        zero_module(nn.Conv2d(c_out, c_out, 3, padding=1)))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip(x) + self.out_layers(h)


class AttentionBlock(nn.Module):
    def __init__(self, channels, heads=2, groups=8):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x):
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        q, k, v = self.qkv(self.norm(x)).reshape(b * self.heads, -1, x.shape[-1]).chunk(3, dim=1)
        scale = 1 / math.sqrt(math.sqrt(q.shape[1]))
        weight = torch.bmm((q * scale).transpose(1, 2), k * scale).softmax(dim=-1)
        h = torch.bmm(v, weight.transpose(1, 2)).reshape(b, c, -1)
        return (x + self.proj_out(h)).reshape(b, c, *spatial)


class UNet(nn.Module):
    def __init__(self, ch=16, emb=48):
        super().__init__()
        self.ch = ch
        self.time_embed = nn.Sequential(nn.Linear(ch, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.conv_in = nn.Conv2d(1, ch, 3, padding=1)
        self.down1 = ResBlock(ch, ch, emb)
        self.downsample = nn.Conv2d(ch, ch, 3, stride=2, padding=1)
        self.down2 = ResBlock(ch, 2 * ch, emb)
        self.down_attn = AttentionBlock(2 * ch)
        self.mid1 = ResBlock(2 * ch, 2 * ch, emb)
        self.mid_attn = AttentionBlock(2 * ch)
        self.mid2 = ResBlock(2 * ch, 2 * ch, emb)
        self.up2 = ResBlock(4 * ch, 2 * ch, emb)
        self.upsample = nn.Conv2d(2 * ch, ch, 3, padding=1)
        self.up1 = ResBlock(2 * ch, ch, emb)
        self.out = nn.Sequential(nn.GroupNorm(8, ch), nn.SiLU(), zero_module(nn.Conv2d(ch, 1, 3, padding=1)))

    def forward(self, x, t):
        emb = self.time_embed(timestep_embedding(t, self.ch))
        h1 = self.down1(self.conv_in(x), emb)                              # 8x8
        h2 = self.down_attn(self.down2(self.downsample(h1), emb))          # 4x4
        h = self.mid2(self.mid_attn(self.mid1(h2, emb)), emb)
        h = self.up2(torch.cat([h, h2], 1), emb)
        h = self.upsample(F.interpolate(h, scale_factor=2, mode="nearest"))
        return self.out(self.up1(torch.cat([h, h1], 1), emb))


class Diffusion:
    def __init__(self, T=100):
        # linear schedule of the paper, rescaled to fewer steps
        self.T = T
        self.betas = torch.linspace(1e-4 * 1000 / T, 0.02 * 1000 / T, T)
        self.alphas_bar = torch.cumprod(1 - self.betas, 0)

    def q_sample(self, x0, t, noise):
        ab = self.alphas_bar[t][:, None, None, None]
        return ab.sqrt() * x0 + (1 - ab).sqrt() * noise

    @torch.no_grad()
    def sample(self, model, n):
        x = torch.randn(n, 1, 8, 8)
        for i in reversed(range(self.T)):
            eps = model(x, torch.full((n,), i))
            x = (x - self.betas[i] / (1 - self.alphas_bar[i]).sqrt() * eps) / (1 - self.betas[i]).sqrt()
            if i > 0:
                x = x + self.betas[i].sqrt() * torch.randn_like(x)
        return x.clamp(-1, 1)


def show(image):
    for row in image:
        print("".join(" .:-=+*#%@"[int((v + 1) / 2 * 9.99)] * 2 for v in row.tolist()))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=24)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--ema", type=float, default=0.98)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    images = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    images = images[torch.randperm(len(images))]
    train, held = images[:1500], images[1500:]

    diffusion, model = Diffusion(), UNet()
    ema = copy.deepcopy(model).requires_grad_(False)
    opt = torch.optim.Adam(model.parameters(), lr=args.lr)

    model.train()
    for step in range(1, args.steps + 1):
        x0 = train[torch.randint(len(train), (args.batch_size,))]
        t = torch.randint(diffusion.T, (len(x0),))
        noise = torch.randn_like(x0)
        loss = F.mse_loss(model(diffusion.q_sample(x0, t, noise), t), noise)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        with torch.no_grad():
            for pe, p in zip(ema.parameters(), model.parameters()):
                pe.lerp_(p, 1 - args.ema)
        if step % 40 == 0:
            print(f"step {step}: eps mse {loss.item():.4f}")

    ema.eval()
    show(diffusion.sample(ema, 1)[0, 0])
    with torch.no_grad():
        t = torch.arange(len(held)) % diffusion.T
        noise = torch.randn_like(held)
        mse = F.mse_loss(ema(diffusion.q_sample(held, t, noise), t), noise).item()
    print(f"metric {-mse:.4f}")


if __name__ == "__main__":
    main()
