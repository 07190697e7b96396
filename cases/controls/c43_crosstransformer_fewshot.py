"""Few-shot digit recognition: query features attend to the support features of every class."""
import argparse

import torch
from sklearn.datasets import load_digits
from torch import einsum, nn
from torch.nn import functional as F


class Embedding(nn.Module):
    """8x8 image -> 4x4 map of features, flattened to 16 tokens."""

    def __init__(self, dim):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(),
        )

    def forward(self, x):
        return self.net(x).flatten(2).transpose(1, 2)


class CrossTransformer(nn.Module):
    def __init__(self, dim=32, dim_key=24, dim_value=24):
        super().__init__()
        self.embedding = Embedding(dim)
        self.key_head = nn.Linear(dim, dim_key, bias=False)       # shared by the queries and the support
        self.value_head = nn.Linear(dim, dim_value, bias=False)   # shared as well
        self.scale = dim_key ** -0.5

    def forward(self, query, support):
        """query: Q 1 8 8, support: way shot 1 8 8 -> logits Q way"""
        way, shot = support.shape[:2]
        n_query = query.shape[0]
        feats = self.embedding(torch.cat((query, support.flatten(0, 1))))
        keys, values = self.key_head(feats), self.value_head(feats)
        q, qv = keys[:n_query], values[:n_query]
        k = keys[n_query:].reshape(way, -1, keys.shape[-1])       # way (shot hw) d
        v = values[n_query:].reshape(way, -1, values.shape[-1])

        sim = einsum('q i d, w j d -> q w i j', q, k) * self.scale
        attn = sim.softmax(dim=-1)
        proto = einsum('q w i j, w j d -> q w i d', attn, v)      # prototype aligned to each query position
        dist = (qv.unsqueeze(1) - proto).square().sum(-1).mean(-1)
        return -dist


def sample_episode(images_by_class, classes, way, shot, n_query, gen):
    chosen = [classes[i] for i in torch.randperm(len(classes), generator=gen)[:way].tolist()]
    support, query = [], []
    for c in chosen:
        pool = images_by_class[c]
        pick = torch.randperm(len(pool), generator=gen)[:shot + n_query]
        support.append(pool[pick[:shot]])
        query.append(pool[pick[shot:]])
    labels = torch.arange(way).repeat_interleave(n_query)
    return torch.stack(support), torch.cat(query), labels


def test(model, data, classes, opt, episodes=60):
    gen = torch.Generator().manual_seed(opt.seed + 1)
    model.eval()
    hits = total = 0
    with torch.no_grad():
        for _ in range(episodes):
            s, q, y = sample_episode(data, classes, opt.way, opt.shot, opt.query, gen)
            hits += (model(q, s).argmax(-1) == y).sum().item()
            total += len(y)
    return hits / total


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--episodes', type=int, default=250)
    parser.add_argument('--way', type=int, default=4)
    parser.add_argument('--shot', type=int, default=5)
    parser.add_argument('--query', type=int, default=6)
    opt = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(opt.seed)

    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    y = torch.tensor(raw.target)
    data = {c: x[y == c] for c in range(10)}
    order = torch.randperm(10).tolist()
    base, novel = order[:6], order[6:]
    print('base classes', sorted(base), 'novel classes', sorted(novel))

    model = CrossTransformer()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=100, gamma=0.5)
    gen = torch.Generator().manual_seed(opt.seed)
    loss_avg = 0.0
    for episode in range(1, opt.episodes + 1):
        model.train()
        support, query, labels = sample_episode(data, base, opt.way, opt.shot, opt.query, gen)
        loss = F.cross_entropy(model(query, support), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        loss_avg += loss.item()
        if episode % 50 == 0:
            print(f'episode {episode}  loss {loss_avg / 50:.4f}  novel acc {test(model, data, novel, opt, 20):.4f}')
            loss_avg = 0.0
    print(f'metric {test(model, data, novel, opt):.4f}')


if __name__ == '__main__':
    main()
