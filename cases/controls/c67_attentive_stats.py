"""Speaker classifier: an LSTM over frames of differing length with attentive statistics pooling."""
import argparse

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset

NUM_SPEAKERS, FEAT_DIM = 10, 12


class Utterances(Dataset):
    """Speakers differ in the mean and in the spread of their voiced frames; a part of the frames is silence."""

    def __init__(self, n, mean, spread, rng):
        self.items = []
        for _ in range(n):
            spk = int(rng.integers(NUM_SPEAKERS))
            length = int(rng.integers(15, 46))
            voiced = mean[spk] + spread[spk] * rng.standard_normal((length, FEAT_DIM))
            silence = -1.0 + 0.5 * rng.standard_normal((length, FEAT_DIM))
            # voiced and silent stretches alternate
            state = np.cumsum(rng.random(length) < 0.15) % 2 == int(rng.integers(2))
            state[length // 2: length // 2 + 5] = True
            channel = 0.3 * rng.standard_normal(FEAT_DIM)
            frames = np.where(state[:, None], voiced, silence) + channel
            self.items.append((torch.tensor(frames, dtype=torch.float32), spk))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def collate(batch):
    """Longest first, padded to (T, B, F)."""
    batch = sorted(batch, key=lambda item: len(item[0]), reverse=True)
    frames = pad_sequence([f for f, _ in batch])
    lengths = torch.tensor([len(f) for f, _ in batch])
    return frames, lengths, torch.tensor([s for _, s in batch])


class AttentiveStatisticsPooling(nn.Module):
    def __init__(self, dim, attention_dim):
        super().__init__()
        self.W = nn.Linear(dim, attention_dim)
        self.v = nn.Linear(attention_dim, 1, bias=False)

    def forward(self, h, lengths):
        # h: (T, B, D)
        e = self.v(torch.tanh(self.W(h))).squeeze(-1)
        valid = torch.arange(h.size(0))[:, None] < lengths[None, :]
        alpha = torch.softmax(e.masked_fill(~valid, -float("inf")), dim=0).unsqueeze(-1)
        mu = torch.sum(alpha * h, dim=0)
        var = torch.sum(alpha * h * h, dim=0) - mu * mu
        sigma = torch.sqrt(var.clamp(min=1e-6))
        return torch.cat([mu, sigma], dim=1)


class SpeakerNet(nn.Module):
    def __init__(self, hidden=40, embedding_dim=32):
        super().__init__()
        self.lstm = nn.LSTM(FEAT_DIM, hidden)
        self.pooling = AttentiveStatisticsPooling(hidden, 24)
        self.embedding = nn.Sequential(nn.Linear(2 * hidden, embedding_dim), nn.ReLU(), nn.BatchNorm1d(embedding_dim))
        self.output = nn.Linear(embedding_dim, NUM_SPEAKERS)

    def forward(self, frames, lengths):
        packed = pack_padded_sequence(frames, lengths)
        h, _ = pad_packed_sequence(self.lstm(packed)[0])
        return self.output(self.embedding(self.pooling(h, lengths)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    mean = 0.6 * rng.standard_normal((NUM_SPEAKERS, FEAT_DIM))
    spread = rng.uniform(0.3, 1.3, (NUM_SPEAKERS, FEAT_DIM))
    train_set = Utterances(900, mean, spread, rng)
    test_set = Utterances(300, mean, spread, rng)
    train_loader = DataLoader(train_set, batch_size=30, shuffle=True, collate_fn=collate)
    test_loader = DataLoader(test_set, batch_size=100, collate_fn=collate)

    net = SpeakerNet()
    loss_fn = nn.CrossEntropyLoss()
    optim = torch.optim.RMSprop(net.parameters(), lr=3e-3)
    sched = torch.optim.lr_scheduler.ExponentialLR(optim, 0.8)

    for epoch in range(args.epochs):
        net.train()
        seen = hit = 0
        total = 0.0
        for frames, lengths, speaker in train_loader:
            logits = net(frames, lengths)
            loss = loss_fn(logits, speaker)
            optim.zero_grad()
            loss.backward()
            nn.utils.clip_grad_value_(net.parameters(), 1.0)
            optim.step()
            total += loss.item() * len(speaker)
            hit += (logits.argmax(1) == speaker).sum().item()
            seen += len(speaker)
        sched.step()
        print(f"epoch {epoch + 1}: loss {total / seen:.4f}, training accuracy {hit / seen:.4f}")

    net.eval()
    hit = 0
    with torch.no_grad():
        for frames, lengths, speaker in test_loader:
            hit += (net(frames, lengths).argmax(1) == speaker).sum().item()
    print(f"metric {hit / len(test_set):.4f}")


if __name__ == "__main__":
    main()
