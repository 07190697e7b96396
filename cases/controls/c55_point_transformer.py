"""Classify synthetic point clouds with a small point transformer (vector attention over neighbours)."""
import argparse

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

CLASSES = ["sphere", "cube", "cylinder", "cone", "torus"]


def surface(kind, n, rng):
    t = rng.uniform(0, 2 * np.pi, n)
    if kind == "sphere":
        p = rng.normal(size=(n, 3))
        return p / np.linalg.norm(p, axis=1, keepdims=True)
    if kind == "cube":
        p = rng.uniform(-1, 1, (n, 3))
        p[np.arange(n), rng.integers(0, 3, n)] = rng.choice([-1.0, 1.0], n)
        return p
    if kind == "cylinder":
        r = np.where(rng.random(n) < 0.3, np.sqrt(rng.random(n)), 1.0)
        z = np.where(r < 1, rng.choice([-1.0, 1.0], n), rng.uniform(-1, 1, n))
        return np.stack([r * np.cos(t), r * np.sin(t), z], 1)
    if kind == "cone":
        s = np.sqrt(rng.random(n))
        return np.stack([s * np.cos(t), s * np.sin(t), 1 - 2 * s], 1)
    phi = rng.uniform(0, 2 * np.pi, n)
    return np.stack([(1 + 0.4 * np.cos(phi)) * np.cos(t), (1 + 0.4 * np.cos(phi)) * np.sin(t), 0.4 * np.sin(phi)], 1)


def make_clouds(count, n_points, rng):
    clouds, labels = [], []
    for _ in range(count):
        c = int(rng.integers(len(CLASSES)))
        p = surface(CLASSES[c], n_points, rng) * rng.uniform(0.8, 1.2, 3)
        a = rng.uniform(0, 2 * np.pi)                     # random heading around the vertical axis
        p[:, :2] = p[:, :2] @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
        p += rng.normal(scale=0.02, size=p.shape)
        p -= p.mean(0)
        clouds.append(p / np.linalg.norm(p, axis=1).max())
        labels.append(c)
    return torch.tensor(np.array(clouds), dtype=torch.float32), torch.tensor(labels)


def square_distance(src, dst):
    return torch.sum((src[:, :, None] - dst[:, None]) ** 2, dim=-1)


def index_points(points, idx):
    """points (B, N, C), idx (B, S, [K]) -> (B, S, [K], C)"""
    flat = idx.reshape(idx.size(0), -1)
    res = torch.gather(points, 1, flat[..., None].expand(-1, -1, points.size(-1)))
    return res.reshape(*idx.shape, -1)


def farthest_point_sample(xyz, npoint):
    B, N, _ = xyz.shape
    centroids = torch.zeros(B, npoint, dtype=torch.long)
    distance = torch.full((B, N), 1e10)
    farthest = torch.zeros(B, dtype=torch.long)
    rows = torch.arange(B)
    for i in range(npoint):
        centroids[:, i] = farthest
        d = ((xyz - xyz[rows, farthest].unsqueeze(1)) ** 2).sum(-1)
        distance = torch.minimum(distance, d)
        farthest = distance.argmax(-1)
    return centroids


class PointTransformerLayer(nn.Module):
    def __init__(self, d_points, d_model, k):
        super().__init__()
        self.fc1 = nn.Linear(d_points, d_model)
        self.fc2 = nn.Linear(d_model, d_points)
        self.fc_delta = nn.Sequential(nn.Linear(3, d_model), nn.ReLU(), nn.Linear(d_model, d_model))
        self.fc_gamma = nn.Sequential(nn.Linear(d_model, d_model), nn.ReLU(), nn.Linear(d_model, d_model))
        self.w_qs = nn.Linear(d_model, d_model, bias=False)
        self.w_ks = nn.Linear(d_model, d_model, bias=False)
        self.w_vs = nn.Linear(d_model, d_model, bias=False)
        self.k = k

    def forward(self, xyz, features):
        knn_idx = square_distance(xyz, xyz).topk(self.k, dim=-1, largest=False).indices
        knn_xyz = index_points(xyz, knn_idx)
        x = self.fc1(features)
        q = self.w_qs(x)
        k, v = index_points(self.w_ks(x), knn_idx), index_points(self.w_vs(x), knn_idx)
        pos_enc = self.fc_delta(xyz[:, :, None] - knn_xyz)              # B N K F
        attn = F.softmax(self.fc_gamma(q[:, :, None] - k + pos_enc), dim=-2)
        res = torch.einsum("bmnf,bmnf->bmf", attn, v + pos_enc)
        return self.fc2(res) + features


class TransitionDown(nn.Module):
    def __init__(self, npoint, k, c_in, c_out):
        super().__init__()
        self.npoint, self.k = npoint, k
        self.lin = nn.Linear(c_in, c_out)
        self.bn = nn.BatchNorm1d(c_out)

    def forward(self, xyz, features):
        idx = farthest_point_sample(xyz, self.npoint)
        new_xyz = index_points(xyz, idx)
        f = self.lin(features)
        f = F.relu(self.bn(f.flatten(0, 1))).view_as(f)
        nn_idx = square_distance(new_xyz, xyz).topk(self.k, dim=-1, largest=False).indices
        return new_xyz, index_points(f, nn_idx).max(dim=2).values


class PointTransformerCls(nn.Module):
    def __init__(self, n_classes, k=8):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16))
        self.layer1 = PointTransformerLayer(16, 24, k)
        self.down = TransitionDown(12, k, 16, 32)
        self.layer2 = PointTransformerLayer(32, 32, k)
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, n_classes))

    def forward(self, xyz):
        f = self.layer1(xyz, self.embed(xyz))
        xyz, f = self.down(xyz, f)
        f = self.layer2(xyz, f)
        return self.head(f.mean(1))


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, default=0)
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    x_train, y_train = make_clouds(720, 48, rng)
    x_test, y_test = make_clouds(300, 48, rng)

    model = PointTransformerCls(len(CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    epochs, batch = 5, 16
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 4], gamma=0.3)
    for epoch in range(epochs):
        model.train()
        losses = []
        for idx in torch.randperm(len(y_train)).split(batch):
            loss = F.cross_entropy(model(x_train[idx]), y_train[idx])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scheduler.step()
        print(f"epoch {epoch + 1}/{epochs} loss {np.mean(losses):.4f}")

    model.eval()
    with torch.no_grad():
        pred = torch.cat([model(c).argmax(1) for c in x_test.split(100)])
    print(f"metric {(pred == y_test).float().mean().item():.4f}")


if __name__ == "__main__":
    main()
