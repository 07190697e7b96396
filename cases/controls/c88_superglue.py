"""SuperGlue: matches two sets of keypoints with attentional aggregation and differentiable Sinkhorn."""
import argparse
from copy import deepcopy

import numpy as np
import torch
from torch import nn


def MLP(channels, do_bn=True):
    """Multi-layer perceptron of 1x1 convolutions."""
    n = len(channels)
    layers = []
    for i in range(1, n):
        layers.append(nn.Conv1d(channels[i - 1], channels[i], kernel_size=1, bias=True))
        if i < n - 1:
            if do_bn:
                layers.append(nn.BatchNorm1d(channels[i]))
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def normalize_keypoints(kpts, size):
    center = size / 2
    scaling = size.max() * 0.7
    return (kpts - center) / scaling


class KeypointEncoder(nn.Module):
    """Joint encoding of visual appearance and location."""

    def __init__(self, feature_dim, layers):
        super().__init__()
        self.encoder = MLP([3] + layers + [feature_dim])
        nn.init.constant_(self.encoder[-1].bias, 0.0)

    def forward(self, kpts, scores):
        return self.encoder(torch.cat([kpts.transpose(1, 2), scores.unsqueeze(1)], dim=1))


def attention(query, key, value):
    dim = query.shape[1]
    scores = torch.einsum('bdhn,bdhm->bhnm', query, key) / dim ** .5
    prob = nn.functional.softmax(scores, dim=-1)
    return torch.einsum('bhnm,bdhm->bdhn', prob, value), prob


class MultiHeadedAttention(nn.Module):
    def __init__(self, num_heads, d_model):
        super().__init__()
        assert d_model % num_heads == 0
        self.dim = d_model // num_heads
        self.num_heads = num_heads
        self.merge = nn.Conv1d(d_model, d_model, kernel_size=1)
        self.proj = nn.ModuleList([deepcopy(self.merge) for _ in range(3)])

    def forward(self, query, key, value):
        b = query.size(0)
        query, key, value = [l(x).view(b, self.dim, self.num_heads, -1)
                             for l, x in zip(self.proj, (query, key, value))]
        x, _ = attention(query, key, value)
        return self.merge(x.contiguous().view(b, self.dim * self.num_heads, -1))


class AttentionalPropagation(nn.Module):
    def __init__(self, feature_dim, num_heads):
        super().__init__()
        self.attn = MultiHeadedAttention(num_heads, feature_dim)
        self.mlp = MLP([feature_dim * 2, feature_dim * 2, feature_dim])
        nn.init.constant_(self.mlp[-1].bias, 0.0)

    def forward(self, x, source):
        message = self.attn(x, source, source)
        return self.mlp(torch.cat([x, message], dim=1))


class AttentionalGNN(nn.Module):
    def __init__(self, feature_dim, layer_names, num_heads=4):
        super().__init__()
        self.layers = nn.ModuleList([AttentionalPropagation(feature_dim, num_heads) for _ in layer_names])
        self.names = layer_names

    def forward(self, desc0, desc1):
        for layer, name in zip(self.layers, self.names):
            if name == 'cross':
                src0, src1 = desc1, desc0
            else:
                src0, src1 = desc0, desc1
            delta0, delta1 = layer(desc0, src0), layer(desc1, src1)
            desc0, desc1 = desc0 + delta0, desc1 + delta1
        return desc0, desc1


def log_sinkhorn_iterations(Z, log_mu, log_nu, iters):
    u, v = torch.zeros_like(log_mu), torch.zeros_like(log_nu)
    for _ in range(iters):
        u = log_mu - torch.logsumexp(Z + v.unsqueeze(1), dim=2)
        v = log_nu - torch.logsumexp(Z + u.unsqueeze(2), dim=1)
    return Z + u.unsqueeze(2) + v.unsqueeze(1)


def log_optimal_transport(scores, alpha, iters):
    b, m, n = scores.shape
    ms, ns = scores.new_tensor(float(m)), scores.new_tensor(float(n))
    bins0 = alpha.expand(b, m, 1)
    bins1 = alpha.expand(b, 1, n)
    couplings = torch.cat([torch.cat([scores, bins0], -1),
                           torch.cat([bins1, alpha.expand(b, 1, 1)], -1)], 1)
    norm = -(ms + ns).log()
    log_mu = torch.cat([norm.expand(m), ns.log()[None] + norm])
    log_nu = torch.cat([norm.expand(n), ms.log()[None] + norm])
    log_mu, log_nu = log_mu[None].expand(b, -1), log_nu[None].expand(b, -1)
    Z = log_sinkhorn_iterations(couplings, log_mu, log_nu, iters)
    return Z - norm


class SuperGlue(nn.Module):
    default_config = {
        'descriptor_dim': 32,
        'keypoint_encoder': [16, 32],
        'GNN_layers': ['self', 'cross'] * 2,
        'sinkhorn_iterations': 8,
        'match_threshold': 0.2,
    }

    def __init__(self, config=None):
        super().__init__()
        self.config = {**self.default_config, **(config or {})}
        dim = self.config['descriptor_dim']
        self.kenc = KeypointEncoder(dim, self.config['keypoint_encoder'])
        self.gnn = AttentionalGNN(dim, self.config['GNN_layers'])
        self.final_proj = nn.Conv1d(dim, dim, kernel_size=1, bias=True)
        self.bin_score = nn.Parameter(torch.tensor(1.))

    def forward(self, data):
        desc0 = data['descriptors0'] + self.kenc(normalize_keypoints(data['keypoints0'], data['size']), data['scores0'])
        desc1 = data['descriptors1'] + self.kenc(normalize_keypoints(data['keypoints1'], data['size']), data['scores1'])
        desc0, desc1 = self.gnn(desc0, desc1)
        mdesc0, mdesc1 = self.final_proj(desc0), self.final_proj(desc1)
        scores = torch.einsum('bdn,bdm->bnm', mdesc0, mdesc1) / self.config['descriptor_dim'] ** .5
        scores = log_optimal_transport(scores, self.bin_score, iters=self.config['sinkhorn_iterations'])

        max0, max1 = scores[:, :-1, :-1].max(2), scores[:, :-1, :-1].max(1)
        indices0, indices1 = max0.indices, max1.indices
        ids = torch.arange(indices0.shape[1])[None]
        mutual0 = ids == indices1.gather(1, indices0)
        mscores0 = torch.where(mutual0, max0.values.exp(), torch.zeros_like(max0.values))
        valid0 = mutual0 & (mscores0 > self.config['match_threshold'])
        return {'scores': scores,
                'matches0': torch.where(valid0, indices0, torch.full_like(indices0, -1)),
                'matching_scores0': mscores0}


def make_pairs(rng, n_pairs, n_kpts=24, dim=32, width=160., height=120.):
    """Two views of a plane under a random similarity; some points are seen in one view only, and
    texture repeats: groups of points share (almost) one descriptor."""
    size = np.array([width, height])
    out = {k: [] for k in ('keypoints0', 'keypoints1', 'descriptors0', 'descriptors1', 'scores0', 'scores1', 'gt')}
    for _ in range(n_pairs):
        n_common = rng.integers(14, 20)
        extra = n_kpts - n_common
        words = rng.normal(size=(16, dim))
        total = n_common + 2 * extra
        desc = words[rng.integers(16, size=total)] + 0.15 * rng.normal(size=(total, dim))
        pts = rng.uniform(0.1, 0.9, (total, 2)) * size
        ang, scale = rng.uniform(-0.25, 0.25), rng.uniform(0.85, 1.15)
        R = scale * np.array([[np.cos(ang), -np.sin(ang)], [np.sin(ang), np.cos(ang)]])
        shift = rng.uniform(-0.1, 0.1, 2) * size
        i0 = np.arange(n_common + extra)
        i1 = np.concatenate([np.arange(n_common), np.arange(n_common + extra, total)])
        i0, i1 = rng.permutation(i0), rng.permutation(i1)
        k0 = pts[i0] + rng.normal(0, 0.5, (n_kpts, 2))
        k1 = (pts[i1] - size / 2) @ R.T + size / 2 + shift + rng.normal(0, 0.5, (n_kpts, 2))
        d0, d1 = [desc[i] + 0.35 * rng.normal(size=(n_kpts, dim)) for i in (i0, i1)]
        where = {p: c for c, p in enumerate(i1)}
        out['gt'].append([where.get(p, -1) for p in i0])
        out['keypoints0'].append(k0)
        out['keypoints1'].append(k1)
        out['descriptors0'].append((d0 / np.linalg.norm(d0, axis=1, keepdims=True)).T)
        out['descriptors1'].append((d1 / np.linalg.norm(d1, axis=1, keepdims=True)).T)
        strength = rng.uniform(0.2, 1.0, total)
        out['scores0'].append(strength[i0])
        out['scores1'].append(strength[i1])
    data = {k: torch.tensor(np.array(v), dtype=torch.long if k == 'gt' else torch.float32) for k, v in out.items()}
    data['size'] = torch.tensor(size, dtype=torch.float32)
    return data


def take(data, idx):
    return {k: (v if k == 'size' else v[idx]) for k, v in data.items()}


def matching_loss(Z, gt):
    """Negative log-likelihood of the matches and of the dustbins of the unmatched points in both images."""
    b, m = gt.shape
    n = Z.shape[2] - 1
    target0 = torch.where(gt >= 0, gt, n)
    nll0 = -Z[:, :-1].gather(2, target0[..., None]).squeeze(-1)
    seen1 = torch.zeros(b, n + 1, dtype=torch.bool).scatter_(1, target0, True)[:, :n]
    nll1 = -Z[:, -1, :-1][~seen1]
    return (nll0.sum() + nll1.sum()) / (nll0.numel() + nll1.numel())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--learning_rate', type=float, default=3e-3)
    parser.add_argument('--batch_size', type=int, default=12)
    parser.add_argument('--iterations', type=int, default=165)
    opt = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(opt.seed)
    rng = np.random.default_rng(opt.seed)
    train, val = make_pairs(rng, 1000), make_pairs(rng, 100)

    superglue = SuperGlue()
    optimizer = torch.optim.Adam(superglue.parameters(), lr=opt.learning_rate)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.99)
    superglue.train()
    mean_loss = []
    for it in range(1, opt.iterations + 1):
        batch = take(train, torch.randint(len(train['gt']), (opt.batch_size,)))
        loss = matching_loss(superglue(batch)['scores'], batch['gt'])
        superglue.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        mean_loss.append(loss.item())
        if it % 33 == 0:
            print(f'Iteration [{it}/{opt.iterations}]  loss {np.mean(mean_loss):.4f}  bin {superglue.bin_score.item():.3f}')
            mean_loss = []

    superglue.eval()
    with torch.no_grad():
        pred = superglue(val)['matches0']
    gt = val['gt']
    correct = ((pred == gt) & (gt >= 0)).sum().item()
    precision = correct / max((pred >= 0).sum().item(), 1)
    recall = correct / (gt >= 0).sum().item()
    print(f'precision {precision:.4f}  recall {recall:.4f}')
    print(f'metric {(pred == gt).float().mean().item():.4f}')


if __name__ == '__main__':
    main()
