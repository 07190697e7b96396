# Graph Transformer, full attention, node classification on SBM graphs (semi-supervised communities,
# one labelled node per community, as in the CLUSTER benchmark but smaller).
import argparse

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

parser = argparse.ArgumentParser()
parser.add_argument('--fixed', action='store_true')
parser.add_argument('--seed', type=int, default=0)
parser.add_argument('--epochs', type=int, default=8)
parser.add_argument('--hidden', type=int, default=32)
parser.add_argument('--layers', type=int, default=3)
parser.add_argument('--heads', type=int, default=4)
parser.add_argument('--pos_enc_dim', type=int, default=6)
args = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(args.seed)
np.random.seed(args.seed)

K = 4            # communities
N = 32           # nodes in a graph
P_IN, P_OUT = 0.6, 0.08


def sbm_graph(rng):
    label = rng.permutation(np.arange(N) % K)
    prob = np.where(label[:, None] == label[None, :], P_IN, P_OUT)
    upper = np.triu(rng.rand(N, N) < prob, 1)
    adj = (upper | upper.T).astype(np.float64)
    feat = np.zeros(N, dtype=np.int64)
    for c in range(K):
        feat[rng.choice(np.where(label == c)[0])] = c + 1
    return {'adj': adj, 'feat': feat, 'label': label}


def make_full_graph(g):
    g = dict(g)
    g['adj'] = np.ones((N, N)) - np.eye(N)
    return g


def laplacian_positional_encoding(g, dim):
    A = g['adj']
    d = np.clip(A.sum(1), 1, None) ** -0.5
    L = np.eye(N) - d[:, None] * A * d[None, :]
    val, vec = np.linalg.eigh(L)
    g = dict(g)
    g['lap_pos_enc'] = vec[:, 1:dim + 1]
    return g


class SBMs(torch.utils.data.Dataset):
    def __init__(self, n, seed):
        rng = np.random.RandomState(seed)
        self.graphs = [sbm_graph(rng) for _ in range(n)]

    def _add_laplacian_positional_encodings(self, dim):
        self.graphs = [laplacian_positional_encoding(g, dim) for g in self.graphs]

    def _make_full_graph(self):
        self.graphs = [make_full_graph(g) for g in self.graphs]

    def __len__(self):
        return len(self.graphs)

    def __getitem__(self, i):
        g = self.graphs[i]
        return (torch.tensor(g['feat']), torch.tensor(g['lap_pos_enc'], dtype=torch.float32),
                torch.tensor(g['adj'] > 0), torch.tensor(g['label']))


class GraphTransformerLayer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.Q = nn.Linear(dim, dim, bias=False)
        self.K = nn.Linear(dim, dim, bias=False)
        self.V = nn.Linear(dim, dim, bias=False)
        self.O = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn1 = nn.Linear(dim, 2 * dim)
        self.ffn2 = nn.Linear(2 * dim, dim)

    def forward(self, h, adj):
        B, n, d = h.shape
        q, k, v = (m(h).view(B, n, self.heads, -1).transpose(1, 2) for m in (self.Q, self.K, self.V))
        score = q @ k.transpose(-1, -2) / (d // self.heads) ** 0.5
        edges = adj | torch.eye(n, dtype=torch.bool)
        score = score.masked_fill(~edges[:, None], float('-inf'))
        out = (score.softmax(-1) @ v).transpose(1, 2).reshape(B, n, d)
        h = self.norm1(h + self.O(out))
        return self.norm2(h + self.ffn2(F.relu(self.ffn1(h))))


class GraphTransformerNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding_h = nn.Embedding(K + 1, args.hidden)
        self.embedding_lap_pos_enc = nn.Linear(args.pos_enc_dim, args.hidden)
        self.layers = nn.ModuleList([GraphTransformerLayer(args.hidden, args.heads) for _ in range(args.layers)])
        self.readout = nn.Sequential(nn.Linear(args.hidden, args.hidden // 2), nn.ReLU(),
                                     nn.Linear(args.hidden // 2, K))

    def forward(self, feat, pe, adj):
        h = self.embedding_h(feat) + self.embedding_lap_pos_enc(pe * N ** 0.5)
        for layer in self.layers:
            h = layer(h, adj)
        return self.readout(h)


def prepare(dataset):
    if args.fixed:
        dataset._add_laplacian_positional_encodings(args.pos_enc_dim)
        dataset._make_full_graph()
    else:
        dataset._make_full_graph()
        dataset._add_laplacian_positional_encodings(args.pos_enc_dim)
    return dataset


def accuracy(model, loader):
    model.eval()
    right = total = 0
    with torch.no_grad():
        for feat, pe, adj, label in loader:
            pred = model(feat, pe, adj).argmax(-1)
            right += (pred == label)[feat == 0].sum().item()
            total += (feat == 0).sum().item()
    return right / total


trainset = prepare(SBMs(500, 1000 + args.seed))
testset = prepare(SBMs(200, 500000 + args.seed))
train_loader = torch.utils.data.DataLoader(trainset, batch_size=24, shuffle=True)
test_loader = torch.utils.data.DataLoader(testset, batch_size=100)

model = GraphTransformerNet()
print('parameters:', sum(p.numel() for p in model.parameters()))
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

for epoch in range(args.epochs):
    model.train()
    running = 0.0
    for feat, pe, adj, label in train_loader:
        # eigenvectors are defined up to sign
        pe = pe * (torch.randint(0, 2, (pe.size(0), 1, pe.size(2))) * 2 - 1)
        out = model(feat, pe, adj)
        loss = F.cross_entropy(out[feat == 0], label[feat == 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running += loss.item()
    print('epoch %2d  train loss %.4f' % (epoch + 1, running / len(train_loader)))

print('metric %.4f' % accuracy(model, test_loader))
