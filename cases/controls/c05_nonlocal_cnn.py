"""Small CNN with two non-local blocks (embedded Gaussian) on the 8x8 digits."""
import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument('--seed', type=int, default=0)
parser.add_argument('--epochs', type=int, default=9)
parser.add_argument('--batch-size', type=int, default=64)
parser.add_argument('--lr', type=float, default=0.05)
args = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(args.seed)


class NonLocalBlock2D(nn.Module):
    """z = W_z * softmax(theta(x)^T phi(x)) g(x) + x"""

    def __init__(self, in_channels, inter_channels=None, sub_sample=True):
        super().__init__()
        self.inter_channels = inter_channels or in_channels // 2
        self.theta = nn.Conv2d(in_channels, self.inter_channels, 1)
        self.phi = nn.Conv2d(in_channels, self.inter_channels, 1)
        self.g = nn.Conv2d(in_channels, self.inter_channels, 1)
        self.W = nn.Sequential(
            nn.Conv2d(self.inter_channels, in_channels, 1, bias=False),
            nn.BatchNorm2d(in_channels),
        )
        # the block is an identity at the start of training
        nn.init.zeros_(self.W[1].weight)
        nn.init.zeros_(self.W[1].bias)
        self.pool = nn.MaxPool2d(2) if sub_sample else nn.Identity()

    def forward(self, x):
        b, _, h, w = x.shape
        theta_x = self.theta(x).flatten(2).transpose(1, 2)             # b, hw, c
        phi_x = self.pool(self.phi(x)).flatten(2)                      # b, c, hw/4
        g_x = self.pool(self.g(x)).flatten(2).transpose(1, 2)          # b, hw/4, c
        f = torch.matmul(theta_x, phi_x)
        f_div_c = F.softmax(f, dim=-1)
        y = torch.matmul(f_div_c, g_x)
        y = y.transpose(1, 2).reshape(b, self.inter_channels, h, w)
        return self.W(y) + x


class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.nl1 = NonLocalBlock2D(16)
        self.stage = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
                                   nn.MaxPool2d(2))
        self.nl2 = NonLocalBlock2D(32, sub_sample=False)
        self.head = nn.Sequential(nn.Conv2d(32, 48, 3, bias=False), nn.BatchNorm2d(48), nn.ReLU(),
                                  nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(48, num_classes)

    def forward(self, x):
        x = self.nl1(self.stem(x))
        x = self.nl2(self.stage(x))
        return self.fc(self.head(x))


digits = load_digits()
xtr, xte, ytr, yte = train_test_split(digits.images, digits.target, test_size=0.25,
                                      stratify=digits.target, random_state=args.seed)
mean, std = xtr.mean(), xtr.std()


def to_dataset(images, labels):
    images = torch.tensor((images - mean) / std, dtype=torch.float32).unsqueeze(1)
    return TensorDataset(images, torch.tensor(labels, dtype=torch.long))


train_loader = DataLoader(to_dataset(xtr, ytr), batch_size=args.batch_size, shuffle=True, drop_last=True)
test_loader = DataLoader(to_dataset(xte, yte), batch_size=256)

model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[6, 8], gamma=0.1)


def evaluate():
    model.eval()
    correct = total = 0
    with torch.no_grad():
        for x, y in test_loader:
            correct += (model(x).argmax(1) == y).sum().item()
            total += y.numel()
    return correct / total


for epoch in range(1, args.epochs + 1):
    model.train()
    running = 0.0
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        running += loss.item()
    scheduler.step()
    print(f'epoch {epoch:2d}  loss {running / len(train_loader):.4f}  test acc {evaluate():.4f}')

print(f'metric {evaluate():.4f}')
