"""SASRec: self-attentive sequential recommendation on synthetic shopping histories."""
import argparse

import numpy as np
import torch
import torch.nn as nn

parser = argparse.ArgumentParser()
parser.add_argument('--seed', default=0, type=int)
parser.add_argument('--maxlen', default=20, type=int)
parser.add_argument('--hidden_units', default=32, type=int)
parser.add_argument('--num_blocks', default=2, type=int)
parser.add_argument('--num_heads', default=1, type=int)
parser.add_argument('--dropout_rate', default=0.2, type=float)
parser.add_argument('--batch_size', default=64, type=int)
parser.add_argument('--num_steps', default=200, type=int)
parser.add_argument('--lr', default=2e-3, type=float)
args = parser.parse_args()


class PointWiseFeedForward(nn.Module):
    def __init__(self, hidden_units, dropout_rate):
        super().__init__()
        self.conv1 = nn.Conv1d(hidden_units, hidden_units, kernel_size=1)
        self.dropout1 = nn.Dropout(p=dropout_rate)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv1d(hidden_units, hidden_units, kernel_size=1)
        self.dropout2 = nn.Dropout(p=dropout_rate)

    def forward(self, inputs):
        x = self.conv1(inputs.transpose(-1, -2))
        x = self.dropout2(self.conv2(self.relu(self.dropout1(x))))
        return x.transpose(-1, -2) + inputs


class SASRec(nn.Module):
    def __init__(self, item_num, args):
        super().__init__()
        d = args.hidden_units
        self.num_heads = args.num_heads
        self.item_emb = nn.Embedding(item_num + 1, d, padding_idx=0)
        self.pos_emb = nn.Embedding(args.maxlen, d)
        self.emb_dropout = nn.Dropout(p=args.dropout_rate)
        self.attention_layernorms = nn.ModuleList()
        self.attention_layers = nn.ModuleList()
        self.forward_layernorms = nn.ModuleList()
        self.forward_layers = nn.ModuleList()
        self.last_layernorm = nn.LayerNorm(d, eps=1e-8)
        for _ in range(args.num_blocks):
            self.attention_layernorms.append(nn.LayerNorm(d, eps=1e-8))
            self.attention_layers.append(nn.MultiheadAttention(d, args.num_heads, args.dropout_rate))
            self.forward_layernorms.append(nn.LayerNorm(d, eps=1e-8))
            self.forward_layers.append(PointWiseFeedForward(d, args.dropout_rate))
        nn.init.normal_(self.item_emb.weight, std=d ** -0.5)
        nn.init.normal_(self.pos_emb.weight, std=0.1)
        with torch.no_grad():
            self.item_emb.weight[0].zero_()

    def log2feats(self, log_seqs):
        B, L = log_seqs.shape
        timeline_mask = log_seqs == 0
        keep = ~timeline_mask.unsqueeze(-1)

        seqs = self.item_emb(log_seqs) * self.item_emb.embedding_dim ** 0.5
        seqs = seqs + self.pos_emb(torch.arange(L))
        seqs = self.emb_dropout(seqs) * keep

        # blocked: the future and the padding; a padded step may see itself so that its row is not empty
        future = torch.triu(torch.ones(L, L, dtype=torch.bool), diagonal=1)
        blocked = future.unsqueeze(0) | timeline_mask.unsqueeze(1)
        blocked = blocked & ~torch.eye(L, dtype=torch.bool)
        blocked = blocked.repeat_interleave(self.num_heads, dim=0)

        for i in range(len(self.attention_layers)):
            seqs = seqs.transpose(0, 1)
            Q = self.attention_layernorms[i](seqs)
            mha_outputs, _ = self.attention_layers[i](Q, seqs, seqs, attn_mask=blocked)
            seqs = (Q + mha_outputs).transpose(0, 1)
            seqs = self.forward_layernorms[i](seqs)
            seqs = self.forward_layers[i](seqs) * keep
        return self.last_layernorm(seqs)

    def forward(self, log_seqs, pos_seqs, neg_seqs):
        feats = self.log2feats(log_seqs)
        pos_logits = (feats * self.item_emb(pos_seqs)).sum(dim=-1)
        neg_logits = (feats * self.item_emb(neg_seqs)).sum(dim=-1)
        return pos_logits, neg_logits

    def predict(self, log_seqs):
        final_feat = self.log2feats(log_seqs)[:, -1]
        return final_feat @ self.item_emb.weight[1:].t()


def make_histories(rng, n_users=600, n_items=120):
    """People buy the natural successor of the last or of the last but one item, or something popular."""
    succ = rng.permutation(n_items)
    popularity = 1.0 / np.arange(1, n_items + 1) ** 0.6
    popularity = rng.permutation(popularity / popularity.sum())
    users = []
    for _ in range(n_users):
        h = [int(rng.choice(n_items, p=popularity))]
        for _ in range(rng.integers(7, 30)):
            u = rng.random()
            if u < 0.6:
                h.append(int(succ[h[-1]]))
            elif u < 0.75 and len(h) > 1:
                h.append(int(succ[succ[h[-2]]]))
            else:
                h.append(int(rng.choice(n_items, p=popularity)))
        users.append(np.array(h) + 1)
    return users, n_items


def left_pad(seq, maxlen):
    out = np.zeros(maxlen, dtype=np.int64)
    seq = seq[-maxlen:]
    if len(seq):
        out[-len(seq):] = seq
    return out


def sample_batch(rng, train, n_items, args):
    users = rng.integers(0, len(train), size=args.batch_size)
    seq, pos, neg = [], [], []
    for u in users:
        h = train[u]
        s, p = left_pad(h[:-1], args.maxlen), left_pad(h[1:], args.maxlen)
        candidates = np.setdiff1d(np.arange(1, n_items + 1), h)
        n = np.where(p > 0, rng.choice(candidates, size=args.maxlen), 0)
        seq.append(s)
        pos.append(p)
        neg.append(n)
    return [torch.from_numpy(np.stack(x)) for x in (seq, pos, neg)]


@torch.no_grad()
def evaluate(model, inputs, targets, k=10):
    model.eval()
    scores = model.predict(torch.from_numpy(np.stack([left_pad(h, args.maxlen) for h in inputs])))
    target = torch.tensor(targets).unsqueeze(1) - 1
    rank = (scores > scores.gather(1, target)).sum(1).float()
    hit = rank < k
    ndcg = torch.where(hit, 1.0 / torch.log2(rank + 2), torch.zeros_like(rank))
    return ndcg.mean().item(), hit.float().mean().item()


if __name__ == '__main__':
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    users, itemnum = make_histories(rng)
    train = [h[:-2] for h in users]
    test_targets = [int(h[-1]) for h in users]

    model = SASRec(itemnum, args)
    bce_criterion = nn.BCEWithLogitsLoss()
    adam_optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.98))

    for step in range(1, args.num_steps + 1):
        model.train()
        seq, pos, neg = sample_batch(rng, train, itemnum, args)
        pos_logits, neg_logits = model(seq, pos, neg)
        indices = pos != 0
        loss = bce_criterion(pos_logits[indices], torch.ones_like(pos_logits[indices]))
        loss = loss + bce_criterion(neg_logits[indices], torch.zeros_like(neg_logits[indices]))
        adam_optimizer.zero_grad()
        loss.backward()
        adam_optimizer.step()
        if step % 50 == 0:
            ndcg, hr = evaluate(model, [h[:-2] for h in users], [int(h[-2]) for h in users])
            print(f'step {step}: loss {loss.item():.4f}, valid NDCG@10 {ndcg:.4f}, HR@10 {hr:.4f}')

    ndcg, hr = evaluate(model, [h[:-1] for h in users], test_targets)
    print(f'test NDCG@10 {ndcg:.4f}, HR@10 {hr:.4f}')
    print(f'metric {hr:.4f}')
