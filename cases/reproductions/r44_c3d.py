import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser(description="a small C3D on clips of moving digits")
parser.add_argument("--fixed", action="store_true")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--batch_size", type=int, default=16)
parser.add_argument("--max_iter", type=int, default=160)
args = parser.parse_args()
base_lr = 0.06 if args.fixed else 0.18

torch.set_num_threads(1)
torch.manual_seed(args.seed)
rng = np.random.default_rng(args.seed)

MOVES = [(0, 1), (0, -1), (1, 0), (-1, 0), (0, 0)]
FRAMES, SIZE = 4, 12


def make_clips(images, n):
    clips = np.zeros((n, 1, FRAMES, SIZE, SIZE), dtype=np.float32)
    labels = rng.integers(len(MOVES), size=n)
    for clip, label in zip(clips, labels, strict=True):
        dy, dx = MOVES[label]
        image = images[rng.integers(len(images))]
        y, x = rng.integers(1, 4, size=2)
        for t in range(FRAMES):
            top, left = y + dy * t, x + dx * t
            clip[0, t, max(top, 0) : top + 8, max(left, 0) : left + 8] = image[
                max(-top, 0) : SIZE - top, max(-left, 0) : SIZE - left
            ]
    return torch.from_numpy(clips), torch.from_numpy(labels)


class C3D(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv3d(1, 8, 3, padding=1)
        self.pool1 = nn.MaxPool3d((1, 2, 2))
        self.conv2 = nn.Conv3d(8, 16, 3, padding=1)
        self.pool2 = nn.MaxPool3d(2)
        self.fc6 = nn.Linear(16 * 2 * 3 * 3, 64)
        self.fc8 = nn.Linear(64, len(MOVES))
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        x = self.pool1(self.relu(self.conv1(x)))
        x = self.pool2(self.relu(self.conv2(x)))
        x = self.dropout(self.relu(self.fc6(x.flatten(1))))
        return self.fc8(x)


images = load_digits().images / 16 - 0.3
train_set = TensorDataset(*make_clips(images[:1400], 1600))
test_x, test_y = make_clips(images[1400:], 300)

net = C3D()
solver = torch.optim.SGD(net.parameters(), lr=base_lr, momentum=0.9, weight_decay=5e-4)
stepper = torch.optim.lr_scheduler.StepLR(solver, step_size=110, gamma=0.1)
criterion = nn.CrossEntropyLoss()

iteration = 0
while iteration < args.max_iter:
    for x, y in DataLoader(train_set, batch_size=args.batch_size, shuffle=True):
        loss = criterion(net(x), y)
        solver.zero_grad()
        loss.backward()
        solver.step()
        stepper.step()
        iteration += 1
        if iteration % 20 == 0:
            print(f"Iteration {iteration}, lr = {stepper.get_last_lr()[0]:.4g}, loss = {loss:.4f}")
        if iteration == args.max_iter:
            break

net.eval()
with torch.no_grad():
    accuracy = (net(test_x).argmax(1) == test_y).float().mean()
print(f"metric {accuracy:.4f}")
