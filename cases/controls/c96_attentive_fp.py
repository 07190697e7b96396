"""Attentive FP (graph attention with GRU updates and an attentive readout) on a molecular property."""
import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import GRUCell, Linear, Parameter

ATOMS = ['C', 'N', 'O', 'F', 'S', 'Cl']
VALENCE = [4, 3, 2, 1, 2, 1]
PROB = [0.62, 0.12, 0.12, 0.05, 0.05, 0.04]


def random_molecule(rng):
    """Grow a molecular tree under the valence rules, close some rings, raise some bond orders."""
    n = rng.randint(5, 15)
    types, free, bonds = [0], [4], {}
    while len(types) < n:
        open_atoms = [i for i, f in enumerate(free) if f > 0]
        if not open_atoms:
            break
        i, t = open_atoms[rng.randint(len(open_atoms))], rng.choice(6, p=PROB)
        if VALENCE[t] == 1 and sum(f > 0 for f in free) == 1 and free[i] == 1:
            t = 0
        types.append(int(t))
        free.append(VALENCE[t] - 1)
        free[i] -= 1
        bonds[(i, len(types) - 1)] = 1
    for _ in range(2):
        i, j = sorted(rng.randint(len(types), size=2))
        if j - i > 1 and (i, j) not in bonds and free[i] > 0 and free[j] > 0:
            bonds[(i, j)] = 1
            free[i] -= 1
            free[j] -= 1
    for i, j in list(bonds):
        if free[i] > 0 and free[j] > 0 and rng.rand() < 0.3:
            bonds[(i, j)] = 2
            free[i] -= 1
            free[j] -= 1
    return types, free, bonds


def crippen_like(types, hydrogens, bonds):
    """Additive contributions that depend on an atom's surroundings, as in fragment models of logP."""
    hetero = [0] * len(types)
    double = [0] * len(types)
    for (i, j), order in bonds.items():
        hetero[i] += types[j] != 0
        hetero[j] += types[i] != 0
        double[i] += order == 2
        double[j] += order == 2
    y = 0.0
    for t, h, het, dbl in zip(types, hydrogens, hetero, double):
        if t == 0:
            y += 0.30 - 0.45 * (het > 0) + 0.15 * dbl
        elif t == 1:
            y += -1.0 + 0.5 * dbl - 0.2 * h
        elif t == 2:
            y += (-0.9 if h else -0.2) - 0.3 * dbl
        else:
            y += [0.4, 0.6, 0.7][t - 3] - 0.3 * (het > 0)
    return y


def featurize(mol):
    types, hydrogens, bonds = mol
    deg = np.zeros(len(types), int)
    for i, j in bonds:
        deg[i] += 1
        deg[j] += 1
    x = np.concatenate([np.eye(6)[types], np.eye(5)[deg], np.eye(5)[hydrogens]], 1)
    src, dst, attr = [], [], []
    for (i, j), order in bonds.items():
        src += [i, j]
        dst += [j, i]
        attr += [[order == 1, order == 2]] * 2
    return {'x': torch.tensor(x, dtype=torch.float), 'edge_index': torch.tensor([src, dst]),
            'edge_attr': torch.tensor(attr, dtype=torch.float), 'y': crippen_like(*mol)}


def collate(mols):
    sizes = torch.tensor([len(m['x']) for m in mols])
    offset = torch.cumsum(sizes, 0) - sizes
    return {'x': torch.cat([m['x'] for m in mols]),
            'edge_index': torch.cat([m['edge_index'] + o for m, o in zip(mols, offset)], 1),
            'edge_attr': torch.cat([m['edge_attr'] for m in mols]),
            'batch': torch.repeat_interleave(torch.arange(len(mols)), sizes),
            'y': torch.tensor([m['y'] for m in mols], dtype=torch.float)}


def scatter_sum(src, index, num):
    return src.new_zeros(num, *src.shape[1:]).index_add(0, index, src)


def segment_softmax(alpha, index, num):
    top = alpha.new_full((num,), float('-inf')).scatter_reduce(0, index, alpha.detach(), 'amax')
    out = (alpha - top[index]).exp()
    return out / (scatter_sum(out, index, num)[index] + 1e-16)


class GATEConv(nn.Module):
    """First layer: the neighbour is described by its atom together with the bond."""

    def __init__(self, in_channels, out_channels, edge_dim, dropout=0.0):
        super().__init__()
        self.dropout = dropout
        self.att_l = Parameter(torch.empty(out_channels))
        self.att_r = Parameter(torch.empty(in_channels))
        self.lin1 = Linear(in_channels + edge_dim, out_channels, bias=False)
        self.lin2 = Linear(out_channels, out_channels, bias=False)
        self.bias = Parameter(torch.zeros(out_channels))
        nn.init.normal_(self.att_l, std=out_channels ** -0.5)
        nn.init.normal_(self.att_r, std=in_channels ** -0.5)

    def forward(self, x, edge_index, edge_attr):
        src, dst = edge_index
        x_j = F.leaky_relu(self.lin1(torch.cat([x[src], edge_attr], dim=-1)))
        alpha = F.leaky_relu(x_j @ self.att_l + x[dst] @ self.att_r)
        alpha = segment_softmax(alpha, dst, x.size(0))
        alpha = F.dropout(alpha, p=self.dropout, training=self.training)
        return scatter_sum(self.lin2(x_j) * alpha.unsqueeze(-1), dst, x.size(0)) + self.bias


class GATConv(nn.Module):
    """Single-head graph attention; source and target may be different node sets."""

    def __init__(self, channels, dropout=0.0, negative_slope=0.01):
        super().__init__()
        self.dropout = dropout
        self.negative_slope = negative_slope
        self.lin = Linear(channels, channels, bias=False)
        self.att_src = Parameter(torch.empty(channels))
        self.att_dst = Parameter(torch.empty(channels))
        self.bias = Parameter(torch.zeros(channels))
        nn.init.xavier_uniform_(self.lin.weight)
        nn.init.normal_(self.att_src, std=channels ** -0.5)
        nn.init.normal_(self.att_dst, std=channels ** -0.5)

    def forward(self, x, edge_index):
        x_src, x_dst = x if isinstance(x, tuple) else (x, x)
        src, dst = edge_index
        h_src, h_dst = self.lin(x_src), self.lin(x_dst)
        alpha = (h_src @ self.att_src)[src] + (h_dst @ self.att_dst)[dst]
        alpha = segment_softmax(F.leaky_relu(alpha, self.negative_slope), dst, x_dst.size(0))
        alpha = F.dropout(alpha, p=self.dropout, training=self.training)
        return scatter_sum(h_src[src] * alpha.unsqueeze(-1), dst, x_dst.size(0)) + self.bias


class AttentiveFP(nn.Module):
    def __init__(self, in_channels, hidden_channels, out_channels, edge_dim, num_layers, num_timesteps, dropout=0.0):
        super().__init__()
        self.num_timesteps = num_timesteps
        self.dropout = dropout
        self.lin1 = Linear(in_channels, hidden_channels)
        self.gate_conv = GATEConv(hidden_channels, hidden_channels, edge_dim, dropout)
        self.gru = GRUCell(hidden_channels, hidden_channels)
        self.atom_convs = nn.ModuleList(GATConv(hidden_channels, dropout) for _ in range(num_layers - 1))
        self.atom_grus = nn.ModuleList(GRUCell(hidden_channels, hidden_channels) for _ in range(num_layers - 1))
        self.mol_conv = GATConv(hidden_channels, dropout)
        self.mol_gru = GRUCell(hidden_channels, hidden_channels)
        self.lin2 = Linear(hidden_channels, out_channels)

    def forward(self, x, edge_index, edge_attr, batch):
        # Atom embedding
        x = F.leaky_relu(self.lin1(x))
        h = F.elu(self.gate_conv(x, edge_index, edge_attr))
        h = F.dropout(h, p=self.dropout, training=self.training)
        x = self.gru(h, x).relu()
        for conv, gru in zip(self.atom_convs, self.atom_grus):
            h = F.elu(conv(x, edge_index))
            h = F.dropout(h, p=self.dropout, training=self.training)
            x = gru(h, x).relu()

        # Molecule embedding: a virtual node per molecule, linked to all its atoms
        n_mols = int(batch.max()) + 1
        edge_index = torch.stack([torch.arange(batch.size(0)), batch], dim=0)
        out = scatter_sum(x, batch, n_mols).relu()
        for _ in range(self.num_timesteps):
            h = F.elu(self.mol_conv((x, out), edge_index))
            h = F.dropout(h, p=self.dropout, training=self.training)
            out = self.mol_gru(h, out).relu()

        out = F.dropout(out, p=self.dropout, training=self.training)
        return self.lin2(out)


@torch.no_grad()
def test(model, loader, mean, std):
    model.eval()
    pred, true = [], []
    for data in loader:
        out = model(data['x'], data['edge_index'], data['edge_attr'], data['batch']).squeeze(-1)
        pred.append(out * std + mean)
        true.append(data['y'])
    pred, true = torch.cat(pred), torch.cat(true)
    rmse = F.mse_loss(pred, true).sqrt().item()
    r2 = 1 - ((pred - true) ** 2).sum() / ((true - true.mean()) ** 2).sum()
    return rmse, r2.item()


parser = argparse.ArgumentParser()
parser.add_argument('--seed', type=int, default=0)
seed = parser.parse_args().seed
torch.set_num_threads(1)
torch.manual_seed(seed)
rng = np.random.RandomState(seed)

library = {}
while len(library) < 1400:
    mol = random_molecule(rng)
    library.setdefault((tuple(mol[0]), tuple(sorted(mol[2].items()))), mol)
dataset = [featurize(m) for m in library.values()]
train_set, test_set = dataset[:1100], dataset[1100:]
train_loader = torch.utils.data.DataLoader(train_set, batch_size=50, shuffle=True, collate_fn=collate)
test_loader = torch.utils.data.DataLoader(test_set, batch_size=100, collate_fn=collate)
ys = np.array([m['y'] for m in train_set])
mean, std = float(ys.mean()), float(ys.std())

model = AttentiveFP(in_channels=16, hidden_channels=48, out_channels=1, edge_dim=2,
                    num_layers=2, num_timesteps=2, dropout=0.05)
optimizer = torch.optim.Adam(model.parameters(), lr=10 ** -2.5, weight_decay=10 ** -5)

for epoch in range(1, 11):
    model.train()
    total_loss = total_examples = 0
    for data in train_loader:
        optimizer.zero_grad()
        out = model(data['x'], data['edge_index'], data['edge_attr'], data['batch']).squeeze(-1)
        loss = F.mse_loss(out, (data['y'] - mean) / std)
        loss.backward()
        optimizer.step()
        total_loss += loss.item() * len(data['y'])
        total_examples += len(data['y'])
    print(f'Epoch: {epoch:03d}, Loss: {(total_loss / total_examples) ** 0.5:.4f} '
          f'Test RMSE: {test(model, test_loader, mean, std)[0]:.4f}')
print('metric %.5f' % test(model, test_loader, mean, std)[1])
