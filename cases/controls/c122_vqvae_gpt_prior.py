import argparse
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

# Two stages: (1) VQ-VAE with an EMA codebook, 4x4 codes for a digit; (2) a causal transformer over the codes in
# raster order, class token first.  Metric: share of the codes' entropy (codes drawn from their training
# frequencies) that the prior removes on held-back digits.

CODES, CDIM, GRID = 32, 8, 16


class Quantizer(nn.Module):
    def __init__(self, decay=0.95, eps=1e-5):
        super().__init__()
        self.decay, self.eps = decay, eps
        self.register_buffer("book", torch.randn(CODES, CDIM))
        self.register_buffer("count", torch.ones(CODES))
        self.register_buffer("total", self.book.clone())
        self.started = False

    def nearest(self, flat):
        return torch.cdist(flat, self.book).argmin(1)

    def forward(self, z):                                    # B,C,H,W
        flat = z.permute(0, 2, 3, 1).reshape(-1, CDIM)
        if self.training and not self.started:               # codebook starts from encoder outputs
            self.book.copy_(flat.detach()[torch.randperm(len(flat))[:CODES]])
            self.total.copy_(self.book)
            self.started = True
        idx = self.nearest(flat.detach())
        used = self.book[idx].clone()
        if self.training:
            with torch.no_grad():
                onehot = F.one_hot(idx, CODES).float()
                self.count.mul_(self.decay).add_(onehot.sum(0), alpha=1 - self.decay)
                self.total.mul_(self.decay).add_(onehot.t() @ flat, alpha=1 - self.decay)
                n = self.count.sum()
                smooth = (self.count + self.eps) / (n + CODES * self.eps) * n
                self.book.copy_(self.total / smooth[:, None])
                dead = self.count < 0.5                       # codes nobody uses restart from encoder outputs
                if dead.any():
                    fresh = flat[torch.randperm(len(flat))[:int(dead.sum())]]
                    self.book[dead], self.total[dead], self.count[dead] = fresh, fresh, 1.0
        q = used.view(z.shape[0], z.shape[2], z.shape[3], CDIM).permute(0, 3, 1, 2)
        commit = F.mse_loss(z, q)
        return z + (q - z).detach(), commit, idx.view(len(z), -1)


class VQVAE(nn.Module):
    def __init__(self, w=16):
        super().__init__()
        self.enc = nn.Sequential(nn.Conv2d(1, w, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(w, w, 3, padding=1),
                                 nn.ReLU(), nn.Conv2d(w, CDIM, 1))
        self.vq = Quantizer()
        self.dec = nn.Sequential(nn.Conv2d(CDIM, w, 3, padding=1), nn.ReLU(),
                                 nn.ConvTranspose2d(w, w, 4, stride=2, padding=1), nn.ReLU(),
                                 nn.Conv2d(w, 1, 3, padding=1))

    def forward(self, x):
        q, commit, idx = self.vq(self.enc(x))
        return self.dec(q), commit, idx


class Prior(nn.Module):
    def __init__(self, d=40, heads=4, depth=2, drop=0.1):
        super().__init__()
        self.cls, self.tok = nn.Embedding(10, d), nn.Embedding(CODES, d)
        self.pos = nn.Parameter(torch.zeros(GRID, d))
        layer = nn.TransformerEncoderLayer(d, heads, 3 * d, drop, activation="gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(d), enable_nested_tensor=False)
        self.head = nn.Linear(d, CODES, bias=False)
        self.register_buffer("mask", torch.full((GRID, GRID), float("-inf")).triu(1))
        for m in (self.cls, self.tok, self.head):
            nn.init.normal_(m.weight, std=0.02)
        nn.init.normal_(self.pos, std=0.02)

    def forward(self, y, codes):
        x = torch.cat([self.cls(y)[:, None], self.tok(codes[:, :-1])], 1) + self.pos
        return self.head(self.body(x, mask=self.mask, is_causal=True))


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--seed", type=int, default=0)
    seed = p.parse_args().seed
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    X, Y = load_digits(return_X_y=True)
    X = torch.tensor(X, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    itr, ite = train_test_split(range(len(Y)), test_size=0.2, random_state=seed, stratify=Y)
    xtr, xte, ytr, yte = X[itr], X[ite], torch.tensor(Y[itr]), torch.tensor(Y[ite])

    vae = VQVAE()
    opt = torch.optim.Adam(vae.parameters(), lr=2e-3)
    vae.train()
    for s in range(1, 161):
        x = xtr[torch.randint(0, len(xtr), (32,))]
        rec, commit, idx = vae(x)
        mse = F.mse_loss(rec, x)
        loss = mse / xtr.var() + 0.25 * commit
        opt.zero_grad()
        loss.backward()
        opt.step()
        if s % 40 == 0:
            print(f"vq  {s:4d} mse {mse.item():.4f} commit {commit.item():.4f} codes in batch {idx.unique().numel()}")
    vae.eval()
    with torch.no_grad():
        ctr, cte = vae(xtr)[2], vae(xte)[2]
        print(f"held-back reconstruction mse {F.mse_loss(vae(xte)[0], xte).item():.4f} (variance {xte.var().item():.4f})")

    prior = Prior()
    opt = torch.optim.AdamW(prior.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    T = 150
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=T, pct_start=0.1)
    for s in range(1, T + 1):
        i = torch.randint(0, len(xtr), (32,))
        loss = F.cross_entropy(prior(ytr[i], ctr[i]).flatten(0, 1), ctr[i].flatten())
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        opt.step()
        sched.step()
        if s % 30 == 0:
            print(f"gpt {s:4d} nats per code {loss.item():.4f}")
    prior.eval()
    with torch.no_grad():
        nll = F.cross_entropy(prior(yte, cte).flatten(0, 1), cte.flatten())
        freq = (torch.bincount(ctr.flatten(), minlength=CODES) + 0.5) / (ctr.numel() + 0.5 * CODES)
        const = -freq.log()[cte].mean()
    print(f"held-back nats per code {nll.item():.4f}, with training frequencies {const.item():.4f}")
    print(f"metric {1 - (nll / const).item():.4f}")
