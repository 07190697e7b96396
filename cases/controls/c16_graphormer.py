"""Graph-level regression with a Graphormer: shortest-path attention biases and degree encodings."""
import argparse

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset

N_TYPES = 4
MAX_DIST = 6          # farther pairs share the last bucket
MAX_DEGREE = 8


def floyd_warshall(adj):
    n = len(adj)
    dist = np.where(adj > 0, 1, 510)
    np.fill_diagonal(dist, 0)
    for k in range(n):
        dist = np.minimum(dist, dist[:, k:k + 1] + dist[k:k + 1, :])
    return dist


class RandomMolecules(Dataset):
    """Connected labelled graphs; the target is the share of bonds joining an atom of type 1 to one of type 2."""

    def __init__(self, count, rng):
        self.items = []
        for _ in range(count):
            n = int(rng.integers(6, 13))
            adj = np.zeros((n, n), dtype=np.int64)
            for v in range(1, n):
                free = np.flatnonzero(adj[:v, :v].sum(1) < 4)
                u = rng.choice(free)
                adj[u, v] = adj[v, u] = 1
            for _ in range(int(rng.integers(0, 3))):
                u, v = rng.choice(n, 2, replace=False)
                adj[u, v] = adj[v, u] = 1
            types = rng.choice(N_TYPES, size=n, p=[0.2, 0.35, 0.35, 0.1])
            u, v = np.nonzero(np.triu(adj))
            polar = ((types[u] == 1) & (types[v] == 2)) | ((types[u] == 2) & (types[v] == 1))
            self.items.append({
                "x": torch.from_numpy(types),
                "degree": torch.from_numpy(adj.sum(1)).clamp(max=MAX_DEGREE),
                "spatial": torch.from_numpy(floyd_warshall(adj)).clamp(max=MAX_DIST),
                "y": float(polar.mean()),
            })

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def collator(items):
    n = max(len(it["x"]) for it in items)
    B = len(items)
    # index 0 is reserved for padding everywhere
    x = torch.zeros(B, n, dtype=torch.long)
    degree = torch.zeros(B, n, dtype=torch.long)
    spatial = torch.zeros(B, n, n, dtype=torch.long)
    for b, it in enumerate(items):
        k = len(it["x"])
        x[b, :k] = it["x"] + 1
        degree[b, :k] = it["degree"] + 1
        spatial[b, :k, :k] = it["spatial"] + 1
    return {"x": x, "degree": degree, "spatial_pos": spatial, "y": torch.tensor([it["y"] for it in items])}


class GraphNodeFeature(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.atom_encoder = nn.Embedding(N_TYPES + 1, dim, padding_idx=0)
        self.degree_encoder = nn.Embedding(MAX_DEGREE + 2, dim, padding_idx=0)
        self.graph_token = nn.Embedding(1, dim)

    def forward(self, batch):
        h = self.atom_encoder(batch["x"]) + self.degree_encoder(batch["degree"])
        token = self.graph_token.weight.unsqueeze(0).expand(h.size(0), -1, -1)
        return torch.cat([token, h], dim=1)


class GraphAttnBias(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.heads = heads
        self.spatial_pos_encoder = nn.Embedding(MAX_DIST + 2, heads, padding_idx=0)
        self.graph_token_virtual_distance = nn.Embedding(1, heads)

    def forward(self, batch):
        sp = batch["spatial_pos"]
        B, n, _ = sp.shape
        bias = sp.new_zeros(B, self.heads, n + 1, n + 1, dtype=torch.float)
        bias[:, :, 1:, 1:] = self.spatial_pos_encoder(sp).permute(0, 3, 1, 2)
        t = self.graph_token_virtual_distance.weight.view(1, self.heads, 1)
        bias[:, :, 1:, 0] = bias[:, :, 1:, 0] + t
        bias[:, :, 0, :] = bias[:, :, 0, :] + t
        return bias


class MultiheadAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.scaling = heads, (dim // heads) ** -0.5
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        for lin in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(lin.weight)
            nn.init.zeros_(lin.bias)

    def forward(self, h, attn_bias, key_padding_mask):
        B, n, D = h.shape
        q = (self.q_proj(h) * self.scaling).view(B, n, self.heads, -1).transpose(1, 2)
        k = self.k_proj(h).view(B, n, self.heads, -1).transpose(1, 2)
        v = self.v_proj(h).view(B, n, self.heads, -1).transpose(1, 2)
        w = torch.matmul(q, k.transpose(-1, -2)) + attn_bias
        w = w.masked_fill(key_padding_mask[:, None, None, :], float("-inf"))
        w = torch.softmax(w, dim=-1)
        return self.out_proj(torch.matmul(w, v).transpose(1, 2).reshape(B, n, D))


class EncoderLayer(nn.Module):
    def __init__(self, dim, ffn, heads, dropout):
        super().__init__()
        self.attn_norm = nn.LayerNorm(dim)
        self.attn = MultiheadAttention(dim, heads)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.GELU(), nn.Linear(ffn, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, h, bias, pad):
        h = h + self.dropout(self.attn(self.attn_norm(h), bias, pad))
        return h + self.dropout(self.ffn(self.ffn_norm(h)))


class Graphormer(nn.Module):
    def __init__(self, dim=48, heads=4, layers=3, dropout=0.0):
        super().__init__()
        self.features = GraphNodeFeature(dim)
        self.attn_bias = GraphAttnBias(heads)
        self.layers = nn.ModuleList(EncoderLayer(dim, dim, heads, dropout) for _ in range(layers))
        self.final_norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, 1)
        for m in self.modules():
            if isinstance(m, nn.Embedding):
                nn.init.normal_(m.weight, std=0.1)
                if m.padding_idx is not None:
                    with torch.no_grad():
                        m.weight[m.padding_idx].zero_()

    def forward(self, batch):
        h = self.features(batch)
        bias = self.attn_bias(batch)
        pad = torch.nn.functional.pad(batch["x"].eq(0), (1, 0), value=False)
        for layer in self.layers:
            h = layer(h, bias, pad)
        return self.out(self.final_norm(h[:, 0])).squeeze(-1)


def lr_lambda(step, warmup=30, total=270):
    if step < warmup:
        return (step + 1) / warmup
    return max(0.02, (total - step) / (total - warmup))


def main(seed):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    train, test = RandomMolecules(1440, rng), RandomMolecules(400, rng)
    mean = np.mean([it["y"] for it in train.items])
    std = np.std([it["y"] for it in train.items])
    loader = DataLoader(train, batch_size=48, shuffle=True, collate_fn=collator)
    model = Graphormer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda)
    for epoch in range(9):
        model.train()
        total = 0.0
        for batch in loader:
            target = (batch["y"] - mean) / std
            loss = nn.functional.l1_loss(model(batch), target.float())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            scheduler.step()
            total += loss.item()
        print(f"epoch {epoch}: train mae {total / len(loader):.4f}")

    model.eval()
    pred, true = [], []
    with torch.no_grad():
        for batch in DataLoader(test, batch_size=100, collate_fn=collator):
            pred.append(model(batch) * std + mean)
            true.append(batch["y"])
    pred, true = torch.cat(pred), torch.cat(true)
    r2 = 1 - ((pred - true) ** 2).sum() / ((true - true.mean()) ** 2).sum()
    print(f"metric {r2.item():.4f}")


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--seed", type=int, default=0)
    main(p.parse_args().seed)
