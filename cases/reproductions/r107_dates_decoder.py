# Lecture demo: a small transformer decoder, next-token prediction on dates
import argparse
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

parser = argparse.ArgumentParser()
parser.add_argument('--seed', type=int, default=0)
parser.add_argument('--fixed', action='store_true')
args = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(args.seed)

# ## Data: dates written in two ways, "12 march 1987 > 1987-03-12"
months = ['january', 'february', 'march', 'april', 'may', 'june', 'july', 'august',
          'september', 'october', 'november', 'december']
g = torch.Generator().manual_seed(args.seed)
all_dates = [(d, m, y) for y in range(1950, 2020) for m in range(12) for d in range(1, 29)]
perm = torch.randperm(len(all_dates), generator=g)[:6600].tolist()
texts = []
for i in perm:
    d, m, y = all_dates[i]
    texts.append(f'{d} {months[m]} {y} > {y}-{m + 1:02d}-{d:02d}')

chars = ['[PAD]', '[S]'] + sorted({c for t in texts for c in t})
token_to_index = {c: i for i, c in enumerate(chars)}
max_len = max(len(t) for t in texts) + 1
rows = torch.zeros(len(texts), max_len, dtype=torch.long)
for i, t in enumerate(texts):
    ids = [1] + [token_to_index[c] for c in t]
    rows[i, :len(ids)] = torch.tensor(ids)
train_data, test_data = rows[:6000], rows[6000:]
print(train_data.shape, test_data.shape, len(chars))


# ## Model
class SelfAttention(nn.Module):
    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.Wq = nn.Linear(d_model, d_model, bias=False)
        self.Wk = nn.Linear(d_model, d_model, bias=False)
        self.Wv = nn.Linear(d_model, d_model, bias=False)
        self.Wo = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x):
        B, T, D = x.shape
        heads = lambda z: z.view(B, T, self.num_heads, -1).transpose(1, 2)
        q, k, v = heads(self.Wq(x)), heads(self.Wk(x)), heads(self.Wv(x))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
        future = torch.triu(torch.ones(T, T, dtype=torch.bool, device=x.device), diagonal=1)
        scores = scores.masked_fill(future, float('-inf'))
        out = scores.softmax(dim=-1) @ v
        return self.Wo(out.transpose(1, 2).reshape(B, T, D))


class TransformerBlock(nn.Module):
    def __init__(self, d_model, num_heads, d_ff):
        super().__init__()
        self.ln1 = nn.LayerNorm(d_model)
        self.attn = SelfAttention(d_model, num_heads)
        self.ln2 = nn.LayerNorm(d_model)
        self.ff = nn.Sequential(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model))

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.ff(self.ln2(x))


class TransformerLM(nn.Module):
    def __init__(self, vocab_size, d_model=64, num_heads=4, num_layers=2, d_ff=128, max_len=64):
        super().__init__()
        self.tok_emb = nn.Embedding(vocab_size, d_model)
        self.pos_emb = nn.Embedding(max_len, d_model)
        self.blocks = nn.ModuleList([TransformerBlock(d_model, num_heads, d_ff) for _ in range(num_layers)])
        self.ln = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size)
        nn.init.normal_(self.tok_emb.weight, std=0.3)
        nn.init.normal_(self.pos_emb.weight, std=0.3)

    def forward(self, x):
        if args.fixed:
            pos = torch.arange(x.size(1), device=x.device).unsqueeze(0)
        else:
            pos = torch.arange(x.size(0), device=x.device).unsqueeze(1)
        h = self.tok_emb(x) + self.pos_emb(pos)
        for block in self.blocks:
            h = block(h)
        return self.head(self.ln(h))


@torch.no_grad()
def evaluate(model, data):
    """Accuracy on the characters after the '>' sign."""
    model.eval()
    correct, total = 0, 0
    for batch in data.split(batch_size):
        logits = model(batch[:, :-1])
        gold = batch[:, 1:]
        after = (batch[:, :-1] == token_to_index['>']).cumsum(1) > 0
        keep = after & (gold != 0) & (gold != token_to_index[' '])
        correct += (logits.argmax(-1)[keep] == gold[keep]).sum().item()
        total += keep.sum().item()
    model.train()
    return correct / total


# ## Training
batch_size = 32
num_steps = 220
model = TransformerLM(len(chars), max_len=64)
optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 20) * max(0.02, 1 - s / num_steps))
loss_fn = nn.CrossEntropyLoss(ignore_index=0)

for step in range(num_steps):
    batch = train_data[torch.randint(0, len(train_data), (batch_size,))]
    logits = model(batch[:, :-1])
    loss = loss_fn(logits.flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    if step % 50 == 0 or step == num_steps - 1:
        print(f'step {step:4d}  train loss {loss.item():.4f}  test acc {evaluate(model, test_data[:128]):.4f}')

print(f'metric {evaluate(model, test_data):.4f}')
