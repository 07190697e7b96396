"""Matching network with full context embeddings, five-way one-shot glyph recognition."""
import argparse

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

SIZE = 12


def draw(keypoints, rng):
    """Render strokes through jittered key points. keypoints: (n, 4, 2) in [0, 1]."""
    n = len(keypoints)
    pts = keypoints + 0.035 * rng.normal(size=keypoints.shape) + 0.03 * rng.normal(size=(n, 1, 2))
    w = np.linspace(0, 1, 7)[None, None, :, None]
    line = (pts[:, :-1, None] * (1 - w) + pts[:, 1:, None] * w).reshape(n, -1, 2)
    g = (np.arange(SIZE) + 0.5) / SIZE
    dx = (line[:, :, 0, None] - g) ** 2
    dy = (line[:, :, 1, None] - g) ** 2
    ink = np.exp(-(dy[:, :, :, None] + dx[:, :, None, :]) / (2 * 0.05 ** 2)).max(1)
    return ink.astype(np.float32)


def make_alphabet(num_classes, per_class, rng):
    keys = rng.uniform(0.12, 0.88, size=(num_classes, 4, 2))
    images = np.stack([draw(np.repeat(k[None], per_class, 0), rng) for k in keys])
    return torch.from_numpy(images).unsqueeze(2)        # (class, example, 1, H, W)


def sample_episode(images, way, shot, queries, rng):
    classes = rng.choice(len(images), way, replace=False)
    sx, qx = [], []
    for c in classes:
        pick = rng.choice(images.shape[1], shot + queries, replace=False)
        sx.append(images[c, pick[:shot]])
        qx.append(images[c, pick[shot:]])
    sy, qy = torch.arange(way).repeat_interleave(shot), torch.arange(way).repeat_interleave(queries)
    return torch.cat(sx), sy, torch.cat(qx), qy


class Embedder(nn.Sequential):
    def __init__(self, channels):
        def block(i, o):
            return [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*block(1, channels), *block(channels, channels), *block(channels, channels), nn.Flatten())


class SupportEncoder(nn.Module):
    """g: the support set read by a bidirectional LSTM, with a skip connection."""

    def __init__(self, dim):
        super().__init__()
        self.lstm = nn.LSTM(dim, dim, bidirectional=True)

    def forward(self, support):
        out, _ = self.lstm(support.unsqueeze(1))
        fwd, bwd = out.squeeze(1).chunk(2, dim=-1)
        return fwd + bwd + support


class AttLSTM(nn.Module):
    """f: K steps of an LSTM that reads the support set by content."""

    def __init__(self, dim, steps):
        super().__init__()
        self.steps = steps
        self.cell = nn.LSTMCell(2 * dim, dim)

    def forward(self, queries, support):
        h = torch.zeros_like(queries)
        c = torch.zeros_like(queries)
        r = torch.zeros_like(queries)
        for k in range(self.steps):
            if k > 0:
                r = torch.softmax(h @ support.t(), dim=1) @ support
            h_hat, c = self.cell(torch.cat([queries, r], dim=1), (h, c))
            h = h_hat + queries
        return h


class MatchingNetwork(nn.Module):
    def __init__(self, channels=24, steps=3):
        super().__init__()
        self.encoder = Embedder(channels)
        self.g = SupportEncoder(channels)
        self.f = AttLSTM(channels, steps)

    def forward(self, support_x, support_y, query_x, way):
        z = self.encoder(torch.cat([support_x, query_x]))
        support, query = z[: len(support_x)], z[len(support_x):]
        order = torch.randperm(len(support)) if self.training else torch.arange(len(support))
        g = self.g(support[order])
        f = self.f(query, g)
        attention = F.softmax(F.cosine_similarity(f.unsqueeze(1), g.unsqueeze(0), dim=-1), dim=1)
        return attention @ F.one_hot(support_y[order], way).float()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=400)
    parser.add_argument("--way", type=int, default=5)
    parser.add_argument("--shot", type=int, default=1)
    parser.add_argument("--queries", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    background = make_alphabet(60, 15, rng)
    evaluation = make_alphabet(20, 15, rng)       # glyphs never met in training

    net = MatchingNetwork()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    loss_fn = nn.NLLLoss()
    net.train()
    recent = []
    for episode in range(1, args.episodes + 1):
        sx, sy, qx, qy = sample_episode(background, args.way, args.shot, args.queries, rng)
        p = net(sx, sy, qx, args.way)
        loss = loss_fn(torch.log(p.clamp(1e-7, 1 - 1e-7)), qy)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        recent.append((p.argmax(1) == qy).float().mean().item())
        if episode % 80 == 0:
            print(f"episode {episode}: loss {loss.item():.3f}, accuracy {np.mean(recent[-80:]):.3f}")

    net.eval()
    correct = []
    with torch.no_grad():
        for _ in range(80):
            sx, sy, qx, qy = sample_episode(evaluation, args.way, args.shot, args.queries, rng)
            correct.append((net(sx, sy, qx, args.way).argmax(1) == qy).float().mean().item())
    print(f"metric {np.mean(correct):.4f}")
