# Graphormer-like classifier on packed batches of small random graphs.
# Nodes of all graphs in a batch are concatenated, `ptr` holds where each graph starts.
import argparse
import torch
from torch import nn
import torch.nn.functional as F

MAX_DIST, TYPES = 4, 4


def shortest_paths(adj):
    n = adj.size(0)
    dist = torch.full((n, n), MAX_DIST)
    reach = torch.eye(n)
    dist[reach > 0] = 0
    for d in range(1, MAX_DIST):
        reach = ((reach @ adj) > 0).float()
        dist = torch.where((reach > 0) & (dist == MAX_DIST), torch.full_like(dist, d), dist)
    return dist


def sample_graph(gen):
    n = int(torch.randint(6, 12, (1,), generator=gen))
    adj = torch.triu((torch.rand(n, n, generator=gen) < 0.22).float(), 1)
    for v in range(1, n):                      # keep it connected
        u = int(torch.randint(v, (1,), generator=gen))
        adj[u, v] = 1
    adj = adj + adj.T
    kind = torch.randint(TYPES, (n,), generator=gen)
    # node label: does some neighbour carry the same type?
    same = (kind[:, None] == kind[None]).float() * adj
    return {"kind": kind, "deg": adj.sum(1).long().clamp(max=7), "dist": shortest_paths(adj),
            "y": (same.sum(1) > 0).float()}


def collate(graphs):
    sizes = [len(g["kind"]) for g in graphs]
    ptr = [0]
    for s in sizes:
        ptr.append(ptr[-1] + s)
    dist = torch.full((ptr[-1], ptr[-1]), -1)
    for i, g in enumerate(graphs):
        dist[ptr[i]:ptr[i + 1], ptr[i]:ptr[i + 1]] = g["dist"]
    cat = lambda k: torch.cat([g[k] for g in graphs])
    return cat("kind"), cat("deg"), dist, ptr, cat("y")


class SpatialEncoding(nn.Module):
    """A learned scalar for every hop distance; zero where no path exists."""

    def __init__(self):
        super().__init__()
        self.b = nn.Parameter(torch.randn(MAX_DIST + 1))

    def forward(self, dist):
        return torch.where(dist >= 0, self.b[dist.clamp(min=0)], torch.zeros(()))


class AttentionHead(nn.Module):
    def __init__(self, dim, dim_head, fill):
        super().__init__()
        self.fill = fill
        self.q = nn.Linear(dim, dim_head)
        self.k = nn.Linear(dim, dim_head)
        self.v = nn.Linear(dim, dim_head)

    def forward(self, x, bias, ptr):
        block = torch.zeros(len(x), len(x), dtype=torch.bool)
        for i in range(len(ptr) - 1):
            block[ptr[i]:ptr[i + 1], ptr[i]:ptr[i + 1]] = True
        scores = self.q(x).mm(self.k(x).t()) / self.k.out_features ** 0.5
        scores = (scores + bias).masked_fill(~block, self.fill)
        return torch.softmax(scores, dim=-1).mm(self.v(x))


class MultiHeadAttention(nn.Module):
    def __init__(self, dim, heads, fill):
        super().__init__()
        self.heads = nn.ModuleList([AttentionHead(dim, dim // heads, fill) for _ in range(heads)])
        self.linear = nn.Linear(dim, dim)

    def forward(self, x, bias, ptr):
        return self.linear(torch.cat([h(x, bias, ptr) for h in self.heads], dim=-1))


class GraphLayer(nn.Module):
    def __init__(self, dim, heads, fill):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attention = MultiHeadAttention(dim, heads, fill)
        self.ln_2 = nn.LayerNorm(dim)
        self.ff = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x, bias, ptr):
        x = x + self.attention(self.ln_1(x), bias, ptr)
        return x + self.ff(self.ln_2(x))


class Graphormer(nn.Module):
    def __init__(self, fill, dim=32, heads=2, layers=2):
        super().__init__()
        self.kind = nn.Embedding(TYPES, dim)
        self.degree = nn.Embedding(8, dim)
        self.spatial = SpatialEncoding()
        self.layers = nn.ModuleList([GraphLayer(dim, heads, fill) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, 1)

    def forward(self, kind, deg, dist, ptr):
        x = self.kind(kind) + self.degree(deg)
        bias = self.spatial(dist)
        for layer in self.layers:
            x = layer(x, bias, ptr)
        return self.out(self.norm(x)).squeeze(-1)


def test(model, batches):
    model.eval()
    right = total = 0
    with torch.no_grad():
        for kind, deg, dist, ptr, y in batches:
            right += ((model(kind, deg, dist, ptr) > 0).float() == y).sum().item()
            total += len(y)
    model.train()
    return right / total


if __name__ == "__main__":
    cli = argparse.ArgumentParser()
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--fixed", action="store_true")
    cli.add_argument("--lr", type=float, default=4e-3)
    args = cli.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    gen = torch.Generator().manual_seed(args.seed + 5)

    graphs, known = [], set()
    while len(graphs) < 700:                   # no graph twice
        g = sample_graph(gen)
        name = (tuple(g["kind"].tolist()), tuple(g["dist"].flatten().tolist()))
        if name not in known:
            known.add(name)
            graphs.append(g)
    train, held = graphs[:560], graphs[560:]
    held = [collate(held[i:i + 8]) for i in range(0, len(held), 8)]

    net = Graphormer(fill=-1e6 if args.fixed else 0.0)
    opt = torch.optim.Adam(net.parameters(), lr=args.lr, foreach=True)
    for epoch in range(1, 5):
        order = torch.randperm(len(train), generator=gen).tolist()
        losses = []
        for i in range(0, len(train), 8):
            kind, deg, dist, ptr, y = collate([train[j] for j in order[i:i + 8]])
            loss = F.binary_cross_entropy_with_logits(net(kind, deg, dist, ptr), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            losses.append(loss.item())
        print(f"Epoch: {epoch:03d}, Loss: {sum(losses) / len(losses):.4f}, Test: {test(net, held):.4f}")
    print("metric", f"{test(net, held):.4f}")
