"""Point Cloud Transformer with offset-attention, classifying synthetic 3D shapes."""
import argparse

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

NAMES = ['sphere', 'box', 'torus', 'cylinder', 'cone', 'helix']


def sample_shape(kind, n, rng):
    u, v = rng.uniform(0, 2 * np.pi, n), rng.uniform(0, 1, n)
    if kind == 'sphere':
        p = rng.normal(size=(n, 3))
        p /= np.linalg.norm(p, axis=1, keepdims=True)
    elif kind == 'box':
        p = rng.uniform(-1, 1, (n, 3))
        p[np.arange(n), rng.integers(3, size=n)] = rng.choice([-1., 1.], n)
    elif kind == 'torus':
        r = rng.uniform(0.25, 0.4)
        w = 2 * np.pi * v
        p = np.stack([(1 + r * np.cos(w)) * np.cos(u), (1 + r * np.cos(w)) * np.sin(u), r * np.sin(w)], 1)
    elif kind == 'cylinder':
        p = np.stack([0.6 * np.cos(u), 0.6 * np.sin(u), 2 * v - 1], 1)
    elif kind == 'cone':
        h = np.sqrt(v)
        p = np.stack([h * np.cos(u), h * np.sin(u), 1 - 2 * h], 1)
    else:
        t = 4 * np.pi * v
        p = np.stack([0.8 * np.cos(t), 0.8 * np.sin(t), 2 * v - 1], 1) + rng.normal(0, 0.05, (n, 3))
    return p


class ShapeNetToy(Dataset):
    def __init__(self, size, num_points, rng, partition='train'):
        self.partition = partition
        self.label = rng.integers(len(NAMES), size=size)
        clouds = []
        for c in self.label:
            p = sample_shape(NAMES[c], num_points, rng) * rng.uniform(0.7, 1.3, 3)
            a = rng.uniform(0, 2 * np.pi)
            p = p @ np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
            p += rng.normal(0, 0.02, p.shape)
            p -= p.mean(0)
            clouds.append(p / np.linalg.norm(p, axis=1).max())
        self.data = np.stack(clouds).astype(np.float32)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, item):
        pointcloud = torch.from_numpy(self.data[item])
        if self.partition == 'train':
            scale = torch.empty(3).uniform_(2. / 3., 3. / 2.)
            pointcloud = pointcloud * scale + torch.empty(3).uniform_(-0.2, 0.2)
        return pointcloud, int(self.label[item])


class SA_Layer(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.q_conv = nn.Conv1d(channels, channels // 4, 1, bias=False)
        self.k_conv = nn.Conv1d(channels, channels // 4, 1, bias=False)
        self.q_conv.weight = self.k_conv.weight
        self.v_conv = nn.Conv1d(channels, channels, 1)
        self.trans_conv = nn.Conv1d(channels, channels, 1)
        self.after_norm = nn.BatchNorm1d(channels)
        self.act = nn.ReLU()
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        x_q = self.q_conv(x).permute(0, 2, 1)      # b, n, c
        x_k = self.k_conv(x)                       # b, c, n
        x_v = self.v_conv(x)
        energy = x_q @ x_k                         # b, n, n
        attention = self.softmax(energy)
        attention = attention / (1e-9 + attention.sum(dim=1, keepdim=True))
        x_r = x_v @ attention                      # b, c, n
        x_r = self.act(self.after_norm(self.trans_conv(x - x_r)))
        return x + x_r


class PCT(nn.Module):
    def __init__(self, output_channels, channels=32, dropout=0.3):
        super().__init__()
        self.conv1 = nn.Conv1d(3, channels, kernel_size=1, bias=False)
        self.conv2 = nn.Conv1d(channels, channels, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm1d(channels)
        self.bn2 = nn.BatchNorm1d(channels)
        self.sa1 = SA_Layer(channels)
        self.sa2 = SA_Layer(channels)
        self.sa3 = SA_Layer(channels)
        self.sa4 = SA_Layer(channels)
        self.conv_fuse = nn.Sequential(nn.Conv1d(4 * channels, 128, kernel_size=1, bias=False),
                                       nn.BatchNorm1d(128), nn.LeakyReLU(negative_slope=0.2))
        self.linear1 = nn.Linear(128, 64, bias=False)
        self.bn6 = nn.BatchNorm1d(64)
        self.dp1 = nn.Dropout(p=dropout)
        self.linear2 = nn.Linear(64, output_channels)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x1 = self.sa1(x)
        x2 = self.sa2(x1)
        x3 = self.sa3(x2)
        x4 = self.sa4(x3)
        x = self.conv_fuse(torch.cat((x1, x2, x3, x4), dim=1))
        x = F.adaptive_max_pool1d(x, 1).flatten(1)
        x = self.dp1(F.leaky_relu(self.bn6(self.linear1(x)), negative_slope=0.2))
        return self.linear2(x)


def cal_loss(pred, gold, eps=0.2):
    """Cross entropy with label smoothing."""
    n_class = pred.size(1)
    one_hot = torch.zeros_like(pred).scatter(1, gold.view(-1, 1), 1)
    one_hot = one_hot * (1 - eps) + (1 - one_hot) * eps / (n_class - 1)
    return -(one_hot * F.log_softmax(pred, dim=1)).sum(dim=1).mean()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Point Cloud Recognition')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--batch_size', type=int, default=16)
    parser.add_argument('--lr', type=float, default=0.05)
    parser.add_argument('--momentum', type=float, default=0.9)
    parser.add_argument('--num_points', type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    train_loader = DataLoader(ShapeNetToy(640, args.num_points, rng), batch_size=args.batch_size, shuffle=True,
                              drop_last=True)
    test_loader = DataLoader(ShapeNetToy(240, args.num_points, rng, 'test'), batch_size=80)

    model = PCT(len(NAMES))
    opt = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, args.epochs, eta_min=args.lr / 100)
    for epoch in range(args.epochs):
        model.train()
        train_loss, count = 0.0, 0
        for data, label in train_loader:
            opt.zero_grad()
            loss = cal_loss(model(data.permute(0, 2, 1)), label)
            loss.backward()
            opt.step()
            train_loss += loss.item() * len(data)
            count += len(data)
        scheduler.step()

        model.eval()
        correct = 0
        with torch.no_grad():
            for data, label in test_loader:
                correct += (model(data.permute(0, 2, 1)).argmax(dim=1) == label).sum().item()
        acc = correct / len(test_loader.dataset)
        print(f'Train {epoch}, loss: {train_loss / count:.6f}, test acc: {acc:.6f}')
    print(f'metric {acc:.4f}')
