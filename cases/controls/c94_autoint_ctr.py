"""Train AutoInt (multi-head self-attention between fields) on a click log with sparse and dense features."""
import argparse

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.metrics import log_loss, roc_auc_score
from torch.utils.data import DataLoader, TensorDataset

VOCAB = {'user_group': 12, 'item_cat': 15, 'hour': 8, 'device': 4, 'ad_slot': 6, 'city': 20}
N_DENSE = 3


def make_log(n, seed):
    rng = np.random.RandomState(seed)
    names = list(VOCAB)
    sparse = np.stack([rng.randint(0, VOCAB[f], n) for f in names], 1)
    dense = rng.uniform(-1, 1, (n, N_DENSE)).astype(np.float32)
    g, c, h, d, s, city = sparse.T
    logit = 1.3 * rng.randn(12, 15)[g, c] + 1.0 * rng.randn(8, 4)[h, d]
    logit += 0.6 * rng.randn(6)[s] + 0.3 * rng.randn(20)[city] + 1.5 * rng.randn(6)[s] * dense[:, 0]
    logit += 0.8 * dense[:, 1] - 0.8
    y = (rng.rand(n) < 1 / (1 + np.exp(-2.0 * logit))).astype(np.float32)
    return sparse, dense, y


class InteractingLayer(nn.Module):
    """Correlations between the feature fields, learnt with the multi-head self-attention mechanism."""

    def __init__(self, embedding_size, att_embedding_size=8, head_num=2, use_res=True):
        super().__init__()
        self.att_embedding_size = att_embedding_size
        self.head_num = head_num
        self.use_res = use_res
        out = att_embedding_size * head_num
        self.W_Query = nn.Parameter(torch.Tensor(embedding_size, out))
        self.W_key = nn.Parameter(torch.Tensor(embedding_size, out))
        self.W_Value = nn.Parameter(torch.Tensor(embedding_size, out))
        if self.use_res:
            self.W_Res = nn.Parameter(torch.Tensor(embedding_size, out))
        for tensor in self.parameters():
            nn.init.xavier_uniform_(tensor)

    def forward(self, inputs):
        # None F D
        querys = torch.tensordot(inputs, self.W_Query, dims=([-1], [0]))
        keys = torch.tensordot(inputs, self.W_key, dims=([-1], [0]))
        values = torch.tensordot(inputs, self.W_Value, dims=([-1], [0]))

        # head_num None F D/head_num
        querys = torch.stack(torch.split(querys, self.att_embedding_size, dim=2))
        keys = torch.stack(torch.split(keys, self.att_embedding_size, dim=2))
        values = torch.stack(torch.split(values, self.att_embedding_size, dim=2))

        inner_product = torch.einsum('bnik,bnjk->bnij', querys, keys)
        normalized_att_scores = F.softmax(inner_product, dim=-1)
        result = torch.matmul(normalized_att_scores, values)
        result = torch.cat(torch.split(result, 1), dim=-1).squeeze(0)
        if self.use_res:
            result = result + torch.tensordot(inputs, self.W_Res, dims=([-1], [0]))
        return F.relu(result)


class AutoInt(nn.Module):
    def __init__(self, vocab_sizes, n_dense, embedding_size=16, att_layer_num=3, att_embedding_size=8,
                 att_head_num=2, l2_reg_embedding=1e-6):
        super().__init__()
        self.l2_reg_embedding = l2_reg_embedding
        self.embedding_dict = nn.ModuleList(nn.Embedding(v, embedding_size) for v in vocab_sizes)
        self.dense_embedding = nn.Parameter(torch.empty(n_dense, embedding_size))
        self.linear_dict = nn.ModuleList(nn.Embedding(v, 1) for v in vocab_sizes)
        self.linear_dense = nn.Linear(n_dense, 1)
        for emb in self.embedding_dict:
            nn.init.normal_(emb.weight, std=0.2)
        nn.init.normal_(self.dense_embedding, std=0.2)
        for emb in self.linear_dict:
            nn.init.zeros_(emb.weight)

        width, layers = embedding_size, []
        for _ in range(att_layer_num):
            layers.append(InteractingLayer(width, att_embedding_size, att_head_num))
            width = att_embedding_size * att_head_num
        self.int_layers = nn.ModuleList(layers)
        self.dnn_linear = nn.Linear((len(vocab_sizes) + n_dense) * width, 1, bias=False)

    def regularization(self):
        return self.l2_reg_embedding * sum(e.weight.pow(2).sum() for e in self.embedding_dict)

    def forward(self, sparse, dense):
        logit = self.linear_dense(dense)
        logit = logit + sum(lin(sparse[:, i]) for i, lin in enumerate(self.linear_dict))
        fields = [emb(sparse[:, i]) for i, emb in enumerate(self.embedding_dict)]
        att_input = torch.cat([torch.stack(fields, 1), dense.unsqueeze(-1) * self.dense_embedding], dim=1)
        for layer in self.int_layers:
            att_input = layer(att_input)
        logit = logit + self.dnn_linear(torch.flatten(att_input, start_dim=1))
        return torch.sigmoid(logit).squeeze(1)


def predict(model, loader):
    model.eval()
    with torch.no_grad():
        return np.concatenate([model(s, d).numpy() for s, d, _ in loader])


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    sparse, dense, y = make_log(10000, args.seed)
    n_train = 8000
    to = torch.from_numpy
    train = TensorDataset(to(sparse[:n_train]), to(dense[:n_train]), to(y[:n_train]))
    test = TensorDataset(to(sparse[n_train:]), to(dense[n_train:]), to(y[n_train:]))
    train_loader = DataLoader(train, batch_size=200, shuffle=True)
    test_loader = DataLoader(test, batch_size=1024)

    model = AutoInt(list(VOCAB.values()), N_DENSE)
    optim = torch.optim.Adagrad(model.parameters(), lr=0.1)
    for epoch in range(6):
        model.train()
        total = 0.0
        for s, d, label in train_loader:
            pred = model(s, d)
            loss = F.binary_cross_entropy(pred, label, reduction='sum') / len(label)
            total_loss = loss + model.regularization()
            optim.zero_grad()
            total_loss.backward()
            optim.step()
            total += loss.item() * len(label)
        prob = predict(model, test_loader)
        print(f'Epoch {epoch + 1}/6 - loss: {total / n_train:.4f} - val_binary_crossentropy: '
              f'{log_loss(y[n_train:], prob.astype(np.float64)):.4f} - val_auc: {roc_auc_score(y[n_train:], prob):.4f}')
    print('metric %.5f' % roc_auc_score(y[n_train:], prob))
