import argparse
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from sklearn.datasets import load_digits


def get_clips(images, n, rng, frames=4, size=16):
    """Two digits drift over a black canvas and bounce from the walls."""
    clips = np.zeros((n, 1, frames, size, size), dtype=np.float32)
    lim = size - 8
    for i in range(n):
        for _ in range(2):
            img = images[rng.randint(len(images))]
            pos = rng.randint(0, lim + 1, 2)
            vel = rng.randint(-2, 3, 2)
            for t in range(frames):
                y, x = pos
                clips[i, 0, t, y:y + 8, x:x + 8] = np.maximum(clips[i, 0, t, y:y + 8, x:x + 8], img)
                for k in range(2):
                    if not 0 <= pos[k] + vel[k] <= lim:
                        vel[k] = -vel[k]
                pos = np.clip(pos + vel, 0, lim)
    return torch.from_numpy(clips)


def nonlinearity(x):
    return x * torch.sigmoid(x)


class ResnetBlock3D(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1 = nn.GroupNorm(4, c)
        self.conv1 = nn.Conv3d(c, c, 3, padding=1)
        self.norm2 = nn.GroupNorm(4, c)
        self.conv2 = nn.Conv3d(c, c, 3, padding=1)

    def forward(self, x):
        h = self.conv1(nonlinearity(self.norm1(x)))
        h = self.conv2(nonlinearity(self.norm2(h)))
        return x + h


class AttnBlock3D(nn.Module):
    def __init__(self, in_channels, fixed=False):
        super().__init__()
        self.norm = nn.GroupNorm(4, in_channels)
        self.q = nn.Conv3d(in_channels, in_channels, 1)
        self.k = nn.Conv3d(in_channels, in_channels, 1)
        self.v = nn.Conv3d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv3d(in_channels, in_channels, 1)
        self.fixed = fixed

    def forward(self, x):
        h_ = self.norm(x)
        q, k, v = self.q(h_), self.k(h_), self.v(h_)

        # spatial attention inside every frame
        b, c, t, h, w = q.shape
        if self.fixed:
            q, k, v = (z.permute(0, 2, 1, 3, 4) for z in (q, k, v))
        q = q.reshape(b * t, c, h * w).permute(0, 2, 1)     # b*t, hw, c
        k = k.reshape(b * t, c, h * w)                      # b*t, c, hw
        w_ = torch.bmm(q, k) * (c ** -0.5)                  # b*t, hw, hw
        w_ = F.softmax(w_, dim=2)

        v = v.reshape(b * t, c, h * w)
        h_ = torch.bmm(v, w_.permute(0, 2, 1))              # b*t, c, hw
        if self.fixed:
            h_ = h_.reshape(b, t, c, h, w).permute(0, 2, 1, 3, 4)
        else:
            h_ = h_.reshape(b, c, t, h, w)
        return x + self.proj_out(h_)


class VideoDenoiser(nn.Module):
    def __init__(self, ch=16, fixed=False):
        super().__init__()
        self.conv_in = nn.Conv3d(1, ch, (1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1))
        self.pos = nn.Parameter(torch.randn(1, ch, 1, 8, 8) * 0.02)
        self.down = ResnetBlock3D(ch)
        self.mid_attn = AttnBlock3D(ch, fixed)
        self.mid = ResnetBlock3D(ch)
        self.up_attn = AttnBlock3D(ch, fixed)
        self.norm_out = nn.GroupNorm(4, ch)
        self.conv_out = nn.ConvTranspose3d(ch, 1, (1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1))

    def forward(self, x):
        h = self.conv_in(x) + self.pos
        h = self.mid_attn(self.down(h))
        h = self.up_attn(self.mid(h))
        return self.conv_out(nonlinearity(self.norm_out(h)))


def main(args):
    torch.manual_seed(args.seed)
    rng = np.random.RandomState(args.seed)
    digits = load_digits().images.astype(np.float32) / 16.0
    digits = digits[rng.permutation(len(digits))]
    train_clips = get_clips(digits[:1400], 800, rng)
    val_clips = get_clips(digits[1400:], 100, rng)
    val_noise = torch.randn(val_clips.shape, generator=torch.Generator().manual_seed(args.seed + 5)) * args.sigma

    net = VideoDenoiser(fixed=args.fixed)
    opt = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=1e-4)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, args.steps, eta_min=1e-4)

    def validate():
        net.eval()
        with torch.no_grad():
            rec = net(val_clips + val_noise)
        net.train()
        mse = F.mse_loss(rec, val_clips)
        ref = F.mse_loss(train_clips.mean(0, keepdim=True).expand_as(val_clips), val_clips)
        return mse.item(), (1 - mse / ref).item()

    for it in range(args.steps):
        clean = train_clips[torch.randint(len(train_clips), (args.batch,))]
        noisy = clean + torch.randn_like(clean) * args.sigma
        loss = F.mse_loss(net(noisy), clean)
        opt.zero_grad()
        loss.backward()
        opt.step()
        sched.step()
        if (it + 1) % 40 == 0:
            mse, r2 = validate()
            print(f"iter {it + 1:4d} | train mse {loss.item():.5f} | val mse {mse:.5f} | explained {r2:.4f}")

    mse, r2 = validate()
    print(f"metric {r2:.4f}")


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--fixed", action="store_true")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, default=160)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--sigma", type=float, default=0.3)
    torch.set_num_threads(1)
    main(p.parse_args())
