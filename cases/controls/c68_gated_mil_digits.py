"""Multiple-instance learning with gated attention pooling: does a bag of digits contain a nine?"""
import argparse

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.data as data_utils
from sklearn.datasets import load_digits


class DigitBags(data_utils.Dataset):
    def __init__(self, images, labels, target_number, num_bags, mean_length, std_length, rng):
        self.bags, self.labels = [], []
        is_target = labels == target_number
        negatives, positives = np.flatnonzero(~is_target), np.flatnonzero(is_target)
        for b in range(num_bags):
            n = max(3, int(round(rng.normal(mean_length, std_length))))
            k = rng.choice([1, 2]) if b % 2 == 0 else 0       # half of the bags are positive
            idx = np.concatenate([rng.choice(positives, k), rng.choice(negatives, n - k)])
            rng.shuffle(idx)
            self.bags.append(images[idx])
            self.labels.append(is_target[idx])

    def __len__(self):
        return len(self.bags)

    def __getitem__(self, i):
        inst = torch.from_numpy(self.labels[i])
        return self.bags[i], [inst.any().float(), inst]


class GatedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.M, self.L, self.ATTENTION_BRANCHES = 64, 32, 1
        self.feature_extractor_part1 = nn.Sequential(nn.Conv2d(1, 12, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2, stride=2))
        self.feature_extractor_part2 = nn.Sequential(nn.Linear(12 * 4 * 4, self.M), nn.ReLU())
        self.attention_V = nn.Sequential(nn.Linear(self.M, self.L), nn.Tanh())
        self.attention_U = nn.Sequential(nn.Linear(self.M, self.L), nn.Sigmoid())
        self.attention_w = nn.Linear(self.L, self.ATTENTION_BRANCHES)
        self.classifier = nn.Sequential(nn.Linear(self.M * self.ATTENTION_BRANCHES, 1), nn.Sigmoid())

    def forward(self, x):
        x = x.squeeze(0)
        H = self.feature_extractor_part1(x)
        H = H.view(-1, 12 * 4 * 4)
        H = self.feature_extractor_part2(H)             # K x M

        A = self.attention_w(self.attention_V(H) * self.attention_U(H))
        A = torch.transpose(A, 1, 0)                    # BRANCHES x K
        A = F.softmax(A, dim=1)                         # over the instances of the bag
        Z = torch.mm(A, H)
        Y_prob = self.classifier(Z)
        return Y_prob, torch.ge(Y_prob, 0.5).float(), A

    def objective(self, X, Y):
        Y_prob, Y_hat, A = self.forward(X)
        Y_prob = torch.clamp(Y_prob, min=1e-5, max=1.0 - 1e-5)
        nll = -1.0 * (Y * torch.log(Y_prob) + (1.0 - Y) * torch.log(1.0 - Y_prob))
        return nll.squeeze(), (Y_hat.squeeze() == Y.squeeze()).item()


def train(epoch, model, loader, optimizer):
    model.train()
    train_loss, hits = 0.0, 0
    for data, label in loader:
        optimizer.zero_grad()
        loss, ok = model.objective(data, label[0])
        loss.backward()
        optimizer.step()
        train_loss += loss.item()
        hits += ok
    print("Epoch: {}, Loss: {:.4f}, Train accuracy: {:.4f}".format(epoch, train_loss / len(loader), hits / len(loader)))


def test(model, loader):
    model.eval()
    test_loss, hits = 0.0, 0
    with torch.no_grad():
        for data, label in loader:
            loss, ok = model.objective(data, label[0])
            test_loss += loss.item()
            hits += ok
    print("Test Set, Loss: {:.4f}".format(test_loss / len(loader)))
    print("metric {:.4f}".format(hits / len(loader)))


def main():
    parser = argparse.ArgumentParser(description="Attention MIL on digit bags")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--reg", type=float, default=1e-4, help="weight decay")
    parser.add_argument("--target_number", type=int, default=9)
    parser.add_argument("--mean_bag_length", type=int, default=7)
    parser.add_argument("--var_bag_length", type=int, default=2)
    parser.add_argument("--num_bags_train", type=int, default=300)
    parser.add_argument("--num_bags_test", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)
    images = (images - 4.9) / 6.0
    order = rng.permutation(len(images))
    tr, te = order[:1200], order[1200:]           # no image is in bags of both sides
    bag = (args.target_number,)
    size = (args.mean_bag_length, args.var_bag_length ** 0.5, rng)
    train_set = DigitBags(images[tr], digits.target[tr], *bag, args.num_bags_train, *size)
    test_set = DigitBags(images[te], digits.target[te], *bag, args.num_bags_test, *size)
    train_loader = data_utils.DataLoader(train_set, batch_size=1, shuffle=True)
    test_loader = data_utils.DataLoader(test_set, batch_size=1, shuffle=False)

    model = GatedAttention()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.reg)
    for epoch in range(1, args.epochs + 1):
        train(epoch, model, train_loader, optimizer)
    test(model, test_loader)


if __name__ == "__main__":
    main()
