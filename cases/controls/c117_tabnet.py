# TabNet (sequential attention over features, sparsemax masks) on the breast-cancer table.
import argparse
import torch
from torch import nn
from torch.nn import functional as F
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split


def sparsemax(z):
    z = z - z.max(dim=1, keepdim=True).values
    srt = z.sort(dim=1, descending=True).values
    k = torch.arange(1, z.size(1) + 1, dtype=z.dtype)
    css = srt.cumsum(1)
    support = 1 + k * srt > css
    kz = support.sum(1, keepdim=True)
    tau = (css.gather(1, kz - 1) - 1) / kz.to(z.dtype)
    return torch.clamp(z - tau, min=0)


class GhostBN(nn.Module):
    def __init__(self, d, virtual=32, momentum=0.02):
        super().__init__()
        self.virtual, self.bn = virtual, nn.BatchNorm1d(d, momentum=momentum)

    def forward(self, x):
        if not self.training:
            return self.bn(x)
        return torch.cat([self.bn(c) for c in x.chunk(max(1, x.size(0) // self.virtual))])


class GLU(nn.Module):
    def __init__(self, din, dout, fc=None):
        super().__init__()
        self.fc = fc if fc is not None else nn.Linear(din, 2 * dout, bias=False)
        self.bn = GhostBN(2 * dout)

    def forward(self, x):
        a, b = self.bn(self.fc(x)).chunk(2, dim=1)
        return a * torch.sigmoid(b)


class FeatureTransformer(nn.Module):
    """one layer shared by all steps, one of its own; residuals scaled by sqrt(1/2)"""
    def __init__(self, din, d, shared):
        super().__init__()
        self.l1 = GLU(din, d, fc=shared)
        self.l2 = GLU(d, d)

    def forward(self, x):
        x = self.l1(x)
        return (x + self.l2(x)) * 0.5 ** 0.5


class TabNet(nn.Module):
    def __init__(self, d_in, n_d=8, n_a=8, steps=3, gamma=1.3, classes=2):
        super().__init__()
        self.n_d, self.gamma = n_d, gamma
        self.bn = nn.BatchNorm1d(d_in, momentum=0.02)
        d = n_d + n_a
        shared = nn.Linear(d_in, 2 * d, bias=False)
        self.first = FeatureTransformer(d_in, d, shared)
        self.feats = nn.ModuleList([FeatureTransformer(d_in, d, shared) for _ in range(steps)])
        self.atts = nn.ModuleList([nn.ModuleList([nn.Linear(n_a, d_in, bias=False), GhostBN(d_in)])
                                   for _ in range(steps)])
        self.out = nn.Linear(n_d, classes, bias=False)

    def forward(self, x):
        x = self.bn(x)
        prior = torch.ones_like(x)
        a = self.first(x)[:, self.n_d:]
        total, reg, masks = 0, 0, []
        for feat, (lin, bn) in zip(self.feats, self.atts):
            m = sparsemax(bn(lin(a)) * prior)
            reg = reg + (-m * torch.log(m + 1e-10)).sum(1).mean()      # entropy of the mask
            prior = prior * (self.gamma - m)
            h = feat(m * x)
            total = total + F.relu(h[:, :self.n_d])
            a = h[:, self.n_d:]
            masks.append(m)
        return self.out(total), reg / len(self.feats), masks


cli = argparse.ArgumentParser()
cli.add_argument("--seed", type=int, default=0)
seed = cli.parse_args().seed
torch.set_num_threads(1)
torch.manual_seed(seed)

data = load_breast_cancer()
xtr, xte, ytr, yte = train_test_split(data.data, data.target, test_size=0.3, random_state=seed, stratify=data.target)
xtr, xte = torch.tensor(xtr, dtype=torch.float32), torch.tensor(xte, dtype=torch.float32)
ytr, yte = torch.tensor(ytr), torch.tensor(yte)

net = TabNet(xtr.size(1))
opt = torch.optim.Adam(net.parameters(), lr=0.02)
sched = torch.optim.lr_scheduler.StepLR(opt, step_size=10, gamma=0.95)
step = 0
for epoch in range(67):
    net.train()
    order = torch.randperm(len(xtr))
    run = 0.0
    for b in range(3):                                # raw columns: the first batch norm does the scaling
        i = order[b * 128:(b + 1) * 128]
        logits, reg, _ = net(xtr[i])
        ce = F.cross_entropy(logits, ytr[i])
        loss = ce + 1e-3 * reg
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        sched.step()
        step += 1
        run += ce.item() / 3
    if epoch % 11 == 0:
        print(f"epoch {epoch:3d} step {step:4d} ce {run:.4f} mask entropy {reg.item():.3f}")

net.eval()
with torch.no_grad():
    logits, _, masks = net(xte)
used = torch.stack(masks).mean((0, 1))
print("most used:", ", ".join(data.feature_names[j] for j in used.argsort(descending=True)[:4].tolist()))
print(f"constant {torch.bincount(yte).max().item() / len(yte):.4f}")
print(f"metric {(logits.argmax(1) == yte).float().mean().item():.4f}")
