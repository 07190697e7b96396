"""Compact convolutional transformer (CCT) on scikit-learn's 8x8 digits."""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Attention(nn.Module):
    def __init__(self, dim, num_heads, projection_dropout=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(projection_dropout)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attn = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))


class TransformerEncoderLayer(nn.Module):
    def __init__(self, d_model, nhead, dim_feedforward, dropout, norm_in_branch):
        super().__init__()
        self.norm_in_branch = norm_in_branch
        self.pre_norm = nn.LayerNorm(d_model)
        self.self_attn = Attention(d_model, nhead, projection_dropout=dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.dropout2 = nn.Dropout(dropout)

    def forward(self, src):
        src = src + self.self_attn(self.pre_norm(src))
        if self.norm_in_branch:
            src2 = self.norm1(src)
        else:
            src = src2 = self.norm1(src)
        src2 = self.linear2(self.dropout1(F.gelu(self.linear1(src2))))
        return src + self.dropout2(src2)


class CCT(nn.Module):
    def __init__(self, norm_in_branch, dim=24, depth=4, heads=2, mlp_ratio=2, classes=10):
        super().__init__()
        self.tokenizer = nn.Sequential(
            nn.Conv2d(1, dim, kernel_size=3, padding=1, bias=False),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        self.positional_emb = nn.Parameter(torch.empty(1, 16, dim))
        nn.init.trunc_normal_(self.positional_emb, std=0.2)
        self.blocks = nn.ModuleList(
            [
                TransformerEncoderLayer(dim, heads, dim * mlp_ratio, 0.1, norm_in_branch)
                for _ in range(depth)
            ]
        )
        self.norm = nn.LayerNorm(dim)
        self.attention_pool = nn.Linear(dim, 1)
        self.fc = nn.Linear(dim, classes)
        self.apply(self.init_weight)

    @staticmethod
    def init_weight(m):
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.05)
            if m.bias is not None:
                nn.init.zeros_(m.bias)

    def forward(self, x):
        x = self.tokenizer(x).flatten(2).transpose(1, 2) + self.positional_emb
        for blk in self.blocks:
            x = blk(x)
        x = self.norm(x)
        weights = F.softmax(self.attention_pool(x), dim=1)
        return self.fc((weights.transpose(1, 2) @ x).squeeze(1))


def validate(model, loader):
    model.eval()
    correct = total = 0
    with torch.no_grad():
        for images, target in loader:
            correct += (model(images).argmax(dim=1) == target).sum().item()
            total += len(target)
    return correct / total


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("-b", "--batch-size", type=int, default=24)
    parser.add_argument("--lr", type=float, default=4e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    digits = load_digits()
    images = digits.images[:, None].astype("float32") / 16.0
    x_train, x_val, y_train, y_val = train_test_split(
        images, digits.target, test_size=597, random_state=args.seed, stratify=digits.target
    )
    mean, std = x_train.mean(), x_train.std()
    train = TensorDataset(torch.tensor((x_train - mean) / std), torch.tensor(y_train))
    val = TensorDataset(torch.tensor((x_val - mean) / std), torch.tensor(y_val))
    train_loader = DataLoader(train, batch_size=args.batch_size, shuffle=True)
    val_loader = DataLoader(val, batch_size=300)

    model = CCT(norm_in_branch=args.fixed)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=3e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.epochs * len(train_loader), pct_start=0.2
    )
    for epoch in range(args.epochs):
        model.train()
        loss_sum = 0.0
        for images, target in train_loader:
            loss = criterion(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            loss_sum += loss.item()
        acc1 = validate(model, val_loader)
        print(f"[{epoch + 1}] loss {loss_sum / len(train_loader):.4f} acc@1 {100 * acc1:.2f}")
    print(f"metric {acc1:.4f}")


if __name__ == "__main__":
    main()
