"""Graph attention network (dense adjacency) for node classification on a citation-like graph."""
import argparse

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim


class GraphAttentionLayer(nn.Module):
    def __init__(self, in_features, out_features, dropout, alpha, concat=True):
        super(GraphAttentionLayer, self).__init__()
        self.dropout = dropout
        self.out_features = out_features
        self.concat = concat

        self.W = nn.Parameter(torch.empty(size=(in_features, out_features)))
        nn.init.xavier_uniform_(self.W.data, gain=1.414)
        self.a = nn.Parameter(torch.empty(size=(2 * out_features, 1)))
        nn.init.xavier_uniform_(self.a.data, gain=1.414)
        self.leakyrelu = nn.LeakyReLU(alpha)

    def forward(self, h, adj):
        Wh = torch.mm(h, self.W)
        Wh1 = torch.matmul(Wh, self.a[:self.out_features, :])
        Wh2 = torch.matmul(Wh, self.a[self.out_features:, :])
        e = self.leakyrelu(Wh1 + Wh2.T)

        zero_vec = -9e15 * torch.ones_like(e)
        attention = torch.where(adj > 0, e, zero_vec)
        attention = F.softmax(attention, dim=1)
        attention = F.dropout(attention, self.dropout, training=self.training)
        h_prime = torch.matmul(attention, Wh)
        return F.elu(h_prime) if self.concat else h_prime


class GAT(nn.Module):
    def __init__(self, nfeat, nhid, nclass, dropout, alpha, nheads):
        super(GAT, self).__init__()
        self.dropout = dropout
        self.attentions = nn.ModuleList(
            [GraphAttentionLayer(nfeat, nhid, dropout, alpha, concat=True) for _ in range(nheads)])
        self.out_att = GraphAttentionLayer(nhid * nheads, nclass, dropout, alpha, concat=False)

    def forward(self, x, adj):
        x = F.dropout(x, self.dropout, training=self.training)
        x = torch.cat([att(x, adj) for att in self.attentions], dim=1)
        x = F.dropout(x, self.dropout, training=self.training)
        x = F.elu(self.out_att(x, adj))
        return F.log_softmax(x, dim=1)


def load_graph(rng, n=280, nclass=4, nwords=80):
    """Papers of four fields; they cite mostly their own field and use a noisy bag of words."""
    labels = rng.permutation(np.arange(n) % nclass)
    same = labels[:, None] == labels[None, :]
    prob = np.where(same, 0.06, 0.006)
    upper = np.triu(rng.random((n, n)) < prob, k=1)
    adj = (upper | upper.T).astype(np.float32)
    np.fill_diagonal(adj, 1.0)

    topic = rng.random((nclass, nwords)) < 0.15
    word_prob = np.where(topic[labels], 0.14, 0.05)
    feats = (rng.random((n, nwords)) < word_prob).astype(np.float32)
    feats /= np.maximum(feats.sum(1, keepdims=True), 1.0)

    order = rng.permutation(n)
    idx_train, idx_val, idx_test = order[:80], order[80:130], order[130:]
    return (torch.from_numpy(adj), torch.from_numpy(feats), torch.from_numpy(labels),
            torch.from_numpy(idx_train), torch.from_numpy(idx_val), torch.from_numpy(idx_test))


def accuracy(output, labels):
    return (output.argmax(1) == labels).double().mean().item()


parser = argparse.ArgumentParser()
parser.add_argument('--seed', type=int, default=0)
parser.add_argument('--epochs', type=int, default=180)
parser.add_argument('--lr', type=float, default=0.01)
parser.add_argument('--weight_decay', type=float, default=5e-4)
parser.add_argument('--hidden', type=int, default=8)
parser.add_argument('--nb_heads', type=int, default=4)
parser.add_argument('--dropout', type=float, default=0.4)
parser.add_argument('--alpha', type=float, default=0.2)
args = parser.parse_args()

torch.set_num_threads(1)
np.random.seed(args.seed)
torch.manual_seed(args.seed)

adj, features, labels, idx_train, idx_val, idx_test = load_graph(np.random.default_rng(args.seed))
model = GAT(features.shape[1], args.hidden, int(labels.max()) + 1, args.dropout, args.alpha, args.nb_heads)
optimizer = optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)

for epoch in range(args.epochs):
    model.train()
    optimizer.zero_grad()
    output = model(features, adj)
    loss_train = F.nll_loss(output[idx_train], labels[idx_train])
    loss_train.backward()
    optimizer.step()

    if (epoch + 1) % 20 == 0:
        model.eval()
        with torch.no_grad():
            output = model(features, adj)
        print('Epoch: {:04d}'.format(epoch + 1),
              'loss_train: {:.4f}'.format(loss_train.item()),
              'loss_val: {:.4f}'.format(F.nll_loss(output[idx_val], labels[idx_val]).item()),
              'acc_val: {:.4f}'.format(accuracy(output[idx_val], labels[idx_val])))

model.eval()
with torch.no_grad():
    output = model(features, adj)
print('metric {:.4f}'.format(accuracy(output[idx_test], labels[idx_test])))
