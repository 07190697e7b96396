import argparse
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

# Attentive neural process on curves drawn from Gaussian processes with random kernel parameters.


def gp_batch(gen, batch=16, testing=False):
    """context is a subset of the targets, sizes are drawn for each batch"""
    nc = int(torch.randint(3, 21, (1,), generator=gen))
    nt = nc + (30 if testing else int(torch.randint(3, 21, (1,), generator=gen)))
    x = torch.rand(batch, nt, 1, generator=gen) * 4 - 2
    ell = 0.3 + 0.7 * torch.rand(batch, 1, 1, generator=gen)
    sig = 0.6 + 0.6 * torch.rand(batch, 1, 1, generator=gen)
    K = sig ** 2 * torch.exp(-0.5 * (x - x.transpose(1, 2)) ** 2 / ell ** 2) + 4e-4 * torch.eye(nt)
    y = torch.linalg.cholesky(K.double()).float() @ torch.randn(batch, nt, 1, generator=gen)
    return x[:, :nc], y[:, :nc], x, y


def mlp(*sizes):
    mods = []
    for a, b in zip(sizes[:-1], sizes[1:]):
        mods += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*mods[:-1])


class ANP(nn.Module):
    def __init__(self, d=40, heads=4):
        super().__init__()
        self.lat_in = mlp(2, d, d)
        self.lat_att = nn.MultiheadAttention(d, heads, batch_first=True)
        self.lat_mid, self.lat_mu, self.lat_sd = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.det_in = mlp(2, d, d)
        self.det_att = nn.MultiheadAttention(d, heads, batch_first=True)
        self.key = mlp(1, d, d)                      # shared by queries and keys
        self.cross = nn.MultiheadAttention(d, heads, batch_first=True)
        self.dec = mlp(2 * d + 1, d, d, 2)

    def latent(self, x, y):
        h = self.lat_in(torch.cat([x, y], -1))
        h = self.lat_att(h, h, h, need_weights=False)[0].mean(1)
        h = torch.relu(self.lat_mid(h))
        return Normal(self.lat_mu(h), 0.1 + 0.9 * torch.sigmoid(self.lat_sd(h)))

    def deterministic(self, xc, yc, xt):
        v = self.det_in(torch.cat([xc, yc], -1))
        v = self.det_att(v, v, v, need_weights=False)[0]
        return self.cross(self.key(xt), self.key(xc), v, need_weights=False)[0]

    def forward(self, xc, yc, xt, yt=None):
        prior = self.latent(xc, yc)
        post = self.latent(xt, yt) if yt is not None else None
        z = (post or prior).rsample()
        r = self.deterministic(xc, yc, xt)
        out = self.dec(torch.cat([r, z[:, None].expand(-1, xt.shape[1], -1), xt], -1))
        mu, raw = out.chunk(2, -1)
        return Normal(mu, 0.1 + 0.9 * nn.functional.softplus(raw)), prior, post


def main(seed):
    torch.manual_seed(seed)
    gen = torch.Generator().manual_seed(seed)
    net = ANP()
    opt = torch.optim.Adam(net.parameters(), lr=2e-3)
    for it in range(1, 261):
        xc, yc, xt, yt = gp_batch(gen)
        pred, prior, post = net(xc, yc, xt, yt)
        ll = pred.log_prob(yt).sum(-1)
        kl = kl_divergence(post, prior).sum(-1, keepdim=True)
        loss = -(ll - kl / xt.shape[1]).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        if it % 52 == 0:
            print("iter %d loss %.4f loglik %.4f kl %.3f" % (it, loss.item(), ll.mean().item(), kl.mean().item()))
    net.eval()
    held = torch.Generator().manual_seed(10_000 + seed)
    scores, ys = [], []
    with torch.no_grad():
        for _ in range(24):
            xc, yc, xt, yt = gp_batch(held, testing=True)
            new = slice(xc.shape[1], None)                                # only the points not given as context
            lls = torch.stack([net(xc, yc, xt[:, new])[0].log_prob(yt[:, new]) for _ in range(3)])
            scores.append((lls.logsumexp(0) - torch.log(torch.tensor(3.0))).mean())
            ys.append(yt[:, new].flatten())
    ys = torch.cat(ys)
    print("constant %.4f" % Normal(ys.mean(), ys.std()).log_prob(ys).mean().item())
    print("metric %.4f" % torch.stack(scores).mean().item())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    torch.set_num_threads(1)
    main(parser.parse_args().seed)
