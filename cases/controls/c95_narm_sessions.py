"""NARM: neural attentive session-based recommendation (GRU encoder, local attention, bilinear decoder)."""
import argparse
import random

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, Dataset

parser = argparse.ArgumentParser()
parser.add_argument('--seed', type=int, default=0)
parser.add_argument('--batch_size', type=int, default=100)
parser.add_argument('--hidden_size', type=int, default=64)
parser.add_argument('--embed_dim', type=int, default=32)
parser.add_argument('--epoch', type=int, default=6)
parser.add_argument('--lr', type=float, default=4e-3)
parser.add_argument('--lr_dc', type=float, default=0.3)
parser.add_argument('--lr_dc_step', type=int, default=4)
parser.add_argument('--topk', type=int, default=5)
args = parser.parse_args()

N_ITEMS = 90  # 1 ... 90, zero is the padding


def synth_sessions(n, rng):
    """Shoppers follow one of six purposes; each purpose has its own usual next click, with detours."""
    n_purpose, block = 6, N_ITEMS // 6
    nxt = np.stack([rng.permutation(N_ITEMS) for _ in range(n_purpose)])
    members = rng.permutation(N_ITEMS).reshape(n_purpose, block)
    for p in range(n_purpose):
        nxt[p, members[p]] = np.roll(members[p], -1)
    seen, sessions = set(), []
    while len(sessions) < n:
        p = rng.randint(n_purpose)
        item = rng.choice(members[p])
        s = []
        for _ in range(rng.randint(3, 13)):
            s.append(int(item) + 1)
            u = rng.rand()
            if u < 0.72:
                item = nxt[p, item] if item in members[p] else rng.choice(members[p])
            elif u < 0.9:
                item = rng.choice(members[p])
            else:
                item = rng.randint(N_ITEMS)
        if tuple(s) not in seen:
            seen.add(tuple(s))
            sessions.append(s)
    return sessions


def prefixes(sessions):
    return [(s[:i], s[i]) for s in sessions for i in range(1, len(s))]


class RecSysDataset(Dataset):
    def __init__(self, data):
        self.data = data

    def __getitem__(self, index):
        return self.data[index]

    def __len__(self):
        return len(self.data)


def collate_fn(data):
    """Sessions sorted by length, padded time-first."""
    data.sort(key=lambda x: len(x[0]), reverse=True)
    lens = [len(sess) for sess, label in data]
    padded = torch.zeros(len(data), max(lens)).long()
    for i, (sess, label) in enumerate(data):
        padded[i, :lens[i]] = torch.LongTensor(sess)
    return padded.transpose(0, 1), torch.tensor([label for _, label in data]).long(), lens


class NARM(nn.Module):
    def __init__(self, n_items, hidden_size, embedding_dim, n_layers=1):
        super().__init__()
        self.n_items = n_items
        self.hidden_size = hidden_size
        self.emb = nn.Embedding(n_items, embedding_dim, padding_idx=0)
        self.emb_dropout = nn.Dropout(0.25)
        self.gru = nn.GRU(embedding_dim, hidden_size, n_layers)
        self.a_1 = nn.Linear(hidden_size, hidden_size, bias=False)
        self.a_2 = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_t = nn.Linear(hidden_size, 1, bias=False)
        self.ct_dropout = nn.Dropout(0.5)
        self.b = nn.Linear(embedding_dim, 2 * hidden_size, bias=False)

    def forward(self, seq, lengths):
        embs = self.emb_dropout(self.emb(seq))
        gru_out, hidden = self.gru(pack_padded_sequence(embs, lengths))
        gru_out, lengths = pad_packed_sequence(gru_out)

        ht = hidden[-1]                     # last true state: the global encoder
        gru_out = gru_out.permute(1, 0, 2)
        c_global = ht
        q1 = self.a_1(gru_out.contiguous().view(-1, self.hidden_size)).view(gru_out.size())
        q2 = self.a_2(ht)
        mask = torch.where(seq.permute(1, 0) > 0, 1.0, 0.0)
        q2_expand = q2.unsqueeze(1).expand_as(q1)
        alpha = self.v_t(torch.sigmoid(q1 + q2_expand).view(-1, self.hidden_size)).view(mask.size())
        alpha = alpha * mask
        c_local = torch.sum(alpha.unsqueeze(2) * gru_out, 1)

        c_t = self.ct_dropout(torch.cat([c_local, c_global], 1))
        item_embs = self.emb.weight[1:]
        return torch.matmul(c_t, self.b(item_embs).t())


def validate(loader, model):
    model.eval()
    hits, ranks, n = 0, 0.0, 0
    with torch.no_grad():
        for seq, target, lens in loader:
            top = model(seq, lens).topk(args.topk, dim=1).indices + 1
            eq = top == target[:, None]
            hits += eq.any(1).sum().item()
            ranks += (eq.float() / torch.arange(1, args.topk + 1)).sum().item()
            n += len(target)
    return hits / n, ranks / n


def main():
    torch.set_num_threads(1)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)

    sessions = synth_sessions(1200, np.random.RandomState(args.seed))
    train = prefixes(sessions[:900])
    known = {(tuple(s), t) for s, t in train}
    test = [(s, t) for s, t in prefixes(sessions[900:]) if (tuple(s), t) not in known]
    train_loader = DataLoader(RecSysDataset(train), args.batch_size, shuffle=True, collate_fn=collate_fn)
    test_loader = DataLoader(RecSysDataset(test), 500, shuffle=False, collate_fn=collate_fn)

    model = NARM(N_ITEMS + 1, args.hidden_size, args.embed_dim)
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    criterion = nn.CrossEntropyLoss()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=args.lr_dc_step, gamma=args.lr_dc)

    for epoch in range(args.epoch):
        model.train()
        sum_loss = 0.0
        for seq, target, lens in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(seq, lens), target - 1)
            loss.backward()
            optimizer.step()
            sum_loss += loss.item()
        scheduler.step()
        recall, mrr = validate(test_loader, model)
        print('Epoch {} loss: {:.4f}, Recall@{}: {:.4f}, MRR@{}: {:.4f}'.format(
            epoch, sum_loss / len(train_loader), args.topk, recall, args.topk, mrr))

    print('metric %.5f' % validate(test_loader, model)[0])


if __name__ == '__main__':
    main()
