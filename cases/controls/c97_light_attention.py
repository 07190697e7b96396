"""Light attention network that predicts the subcellular location of proteins of different lengths."""
import argparse

import numpy as np
import torch
import torch.nn as nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Subset

AMINO = 'ACDEFGHIKLMNPQRSTVWY'
FREQ = np.array([8.3, 1.4, 5.5, 6.7, 3.9, 7.1, 2.3, 5.9, 5.8, 9.7, 2.4, 4.1, 4.7, 3.9, 5.5, 6.6, 5.3, 6.9, 1.1, 2.9])
LOCATIONS = ['Cytoplasm', 'Nucleus', 'Extracellular', 'Mitochondrion', 'ER', 'Peroxisome']


def sample_protein(rng, loc):
    seq = rng.choice(list(AMINO), size=rng.randint(30, 71), p=FREQ / FREQ.sum())
    name = LOCATIONS[loc]
    if name == 'Nucleus':                      # basic stretch anywhere
        at = rng.randint(3, len(seq) - 9)
        seq[at:at + 7] = [a if rng.rand() < 0.9 else rng.choice(list(AMINO)) for a in 'PKKKRKV']
    elif name == 'Extracellular':              # hydrophobic signal peptide
        seq[0] = 'M'
        seq[2:12] = rng.choice(list('LLLAVFI'), 10)
    elif name == 'Mitochondrion':              # R/S/A rich presequence without acidic residues
        seq[0] = 'M'
        seq[1:14] = rng.choice(list('RRRSSALLK'), 13)
    elif name == 'ER':
        seq[-4:] = list(rng.choice(['KDEL', 'HDEL', 'RDEL']))
    elif name == 'Peroxisome':
        seq[-3:] = list(rng.choice(['SKL', 'AKL', 'SRL']))
    return ''.join(seq)


class EmbeddingsLocalizationDataset(Dataset):
    def __init__(self, n, seed):
        rng = np.random.RandomState(seed)
        labels = rng.choice(6, n, p=[0.25, 0.2, 0.2, 0.15, 0.1, 0.1])
        self.items = [(sample_protein(rng, loc), int(loc)) for loc in labels]
        self.lookup = {a: i + 1 for i, a in enumerate(AMINO)}

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        seq, loc = self.items[i]
        return torch.tensor([self.lookup[a] for a in seq]), loc, {'length': len(seq)}


def padded_permuted_collate(batch):
    seqs = pad_sequence([item[0] for item in batch], batch_first=True)
    localization = torch.tensor([item[1] for item in batch])
    lengths = torch.tensor([item[2]['length'] for item in batch])
    mask = torch.arange(seqs.size(1))[None, :] < lengths[:, None]
    return seqs, localization, mask


class LightAttention(nn.Module):
    def __init__(self, embeddings_dim=24, hidden=48, output_dim=6, dropout=0.1, kernel_size=9, conv_dropout=0.1):
        super().__init__()
        self.residues = nn.Embedding(len(AMINO) + 1, embeddings_dim, padding_idx=0)
        self.feature_convolution = nn.Conv1d(embeddings_dim, hidden, kernel_size, stride=1, padding=kernel_size // 2)
        self.attention_convolution = nn.Conv1d(embeddings_dim, hidden, kernel_size, stride=1, padding=kernel_size // 2)
        self.softmax = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(conv_dropout)
        self.linear = nn.Sequential(
            nn.Linear(2 * hidden, 32),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.BatchNorm1d(32)
        )
        self.output = nn.Linear(32, output_dim)

    def forward(self, x, mask):
        x = self.residues(x).transpose(1, 2)          # [batch_size, embeddings_dim, sequence_length]
        o = self.feature_convolution(x)               # [batch_size, hidden, sequence_length]
        o = self.dropout(o)
        attention = self.attention_convolution(x)     # [batch_size, hidden, sequence_length]

        # the padding must take no part in the distribution over residues
        attention = attention.masked_fill(mask[:, None, :] == False, -1e9)  # noqa: E712
        o1 = torch.sum(o * self.softmax(attention), dim=-1)
        o2, _ = torch.max(o.masked_fill(mask[:, None, :] == False, -1e9), dim=-1)  # noqa: E712
        o = torch.cat([o1, o2], dim=-1)
        o = self.linear(o)
        return self.output(o)


class Solver:
    def __init__(self, model, lr=2e-3):
        self.model = model
        self.optim = torch.optim.Adam(model.parameters(), lr=lr)
        self.loss_func = nn.CrossEntropyLoss()

    def predict(self, loader, optim=None):
        running_loss, results = 0.0, []
        for seqs, loc, mask in loader:
            prediction = self.model(seqs, mask)
            loss = self.loss_func(prediction, loc)
            if optim:
                loss.backward()
                optim.step()
                optim.zero_grad()
            running_loss += loss.item() * len(loc)
            results.append(torch.stack((prediction.argmax(-1), loc), dim=1).detach().numpy())
        results = np.concatenate(results)
        return running_loss / len(results), (results[:, 0] == results[:, 1]).mean()

    def train(self, train_loader, val_loader, num_epochs):
        for epoch in range(num_epochs):
            self.model.train()
            loss, acc = self.predict(train_loader, self.optim)
            val_loss, val_acc = self.evaluation(val_loader)
            print('[Epoch %d] train loss: %.4f acc: %.3f | val loss: %.4f acc: %.3f' % (
                epoch + 1, loss, acc, val_loss, val_acc))

    def evaluation(self, loader):
        self.model.eval()
        with torch.no_grad():
            return self.predict(loader)


if __name__ == '__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--seed', type=int, default=0)
    args = p.parse_args()
    torch.set_num_threads(1)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)

    data = EmbeddingsLocalizationDataset(2000, args.seed)
    train_loader = DataLoader(Subset(data, range(1500)), batch_size=32, shuffle=True, drop_last=True,
                              collate_fn=padded_permuted_collate)
    test_loader = DataLoader(Subset(data, range(1500, 2000)), batch_size=100, collate_fn=padded_permuted_collate)
    solver = Solver(LightAttention())
    solver.train(train_loader, test_loader, num_epochs=5)
    print('metric %.5f' % solver.evaluation(test_loader)[1])
