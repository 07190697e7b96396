"""
Rectified flow on the 8x8 digits with a U-ViT: time, label and patches are all tokens, long skips join shallow and
deep blocks. Logit-normal times, label dropped for classifier-free guidance, EMA weights, Euler sampler.
Judged by nearest neighbours among the real training digits: does the sample show the digit asked for?
"""
import argparse, copy, math
import torch
from torch import nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier

NULL = 10


def time_embedding(t, dim):
    freq = torch.exp(-math.log(10000) * torch.arange(dim // 2) / (dim // 2))
    ang = 1000 * t[:, None] * freq
    return torch.cat([ang.cos(), ang.sin()], -1)


class Block(nn.Module):
    def __init__(self, d, heads, skip=False):
        super().__init__()
        self.skip = nn.Linear(2 * d, d) if skip else None
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)
        self.fc1, self.fc2 = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.heads = heads

    def forward(self, x, long=None):
        if self.skip is not None:
            x = self.skip(torch.cat([x, long], -1))
        b, n, d = x.shape
        q, k, v = self.qkv(self.n1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return x + self.fc2(F.gelu(self.fc1(self.n2(x))))


class UViT(nn.Module):
    def __init__(self, d=56, heads=4):
        super().__init__()
        self.d = d
        self.patch = nn.Linear(16, d)
        self.label = nn.Embedding(11, d)
        self.pos = nn.Parameter(torch.randn(1, 6, d) * 0.02)
        self.down, self.mid, self.up = Block(d, heads), Block(d, heads), Block(d, heads, skip=True)
        self.norm, self.out = nn.LayerNorm(d), nn.Linear(d, 16)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t, y):
        p = F.unfold(x, 4, stride=4).transpose(1, 2)
        h = torch.cat([time_embedding(t, self.d)[:, None], self.label(y)[:, None], self.patch(p)], 1) + self.pos
        s = self.down(h)
        h = self.up(self.mid(s), s)
        h = self.out(self.norm(h))[:, 2:]
        return self.conv(F.fold(h.transpose(1, 2), 8, 4, stride=4))


@torch.no_grad()
def sample(net, y, steps=12, guidance=2.0):
    x = torch.randn(len(y), 1, 8, 8)
    null = torch.full_like(y, NULL)
    for i in range(steps):
        t = torch.full((len(y),), i / steps)
        v, v0 = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).chunk(2)
        x = x + (v + guidance * (v - v0)) / steps
    return x


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    seed = ap.parse_args().seed
    torch.set_num_threads(1)
    torch.manual_seed(seed)

    X, Y = load_digits(return_X_y=True)
    xtr, xte, ytr, yte = train_test_split(X, Y, test_size=0.2, random_state=seed, stratify=Y)
    judge = KNeighborsClassifier(5).fit(xtr, ytr)
    print(f"judge on held-back digits {judge.score(xte, yte):.4f}")
    data, lab = torch.tensor(xtr, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(ytr)

    net = UViT()
    ema = copy.deepcopy(net).requires_grad_(False)
    opt = torch.optim.AdamW(net.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    N = 220
    for step in range(N):
        for g in opt.param_groups:
            g["lr"] = 2e-3 * min(1, (step + 1) / 20)
        i = torch.randint(0, len(data), (32,))
        x1, y = data[i], lab[i].clone()
        y[torch.rand(len(y)) < 0.1] = NULL
        t = torch.sigmoid(torch.randn(len(y)))                 # logit-normal
        x0 = torch.randn_like(x1)
        xt = t[:, None, None, None] * x1 + (1 - t[:, None, None, None]) * x0
        loss = F.mse_loss(net(xt, t, y), x1 - x0)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        decay = min(0.98, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in net.parameters()], 1 - decay)
        if (step + 1) % 44 == 0:
            print(f"{step + 1:4d} flow loss {loss.item():.4f}")

    ema.eval()
    want = torch.arange(100) % 10
    img = (sample(ema, want).clamp(-1, 1) + 1) * 8
    got = torch.tensor(judge.predict(img.flatten(1).double().numpy()))
    print("per digit", " ".join(f"{(got[want == k] == k).float().mean():.2f}" for k in range(10)))
    print(f"metric {(got == want).float().mean():.4f}")


main()
