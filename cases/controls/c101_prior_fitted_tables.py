"""Fit a small TabPFN-style network on synthetic tables and classify real tables in context, without training on them."""
import argparse
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_wine

NUM_FEATURES = 8


def get_batch(batch_size, seq_len):
    """Prior: random features pushed through a random one-hidden-layer network, cut at a random quantile."""
    used = torch.randint(2, NUM_FEATURES + 1, (batch_size,))
    live = (torch.arange(NUM_FEATURES)[None] < used[:, None]).float()
    mix = torch.eye(NUM_FEATURES) + 0.5 * torch.randn(batch_size, NUM_FEATURES, NUM_FEATURES)
    x = torch.randn(seq_len, batch_size, NUM_FEATURES)
    x = torch.einsum('sbf,bfg->sbg', x, mix) * live

    w1 = torch.randn(batch_size, NUM_FEATURES, 6) / used[:, None, None].sqrt()
    w2 = torch.randn(batch_size, 6)
    hidden = torch.einsum('sbf,bfh->sbh', x, w1)
    linear = torch.rand(batch_size) < 0.6
    score = torch.einsum('sbh,bh->sb', torch.where(linear[None, :, None], hidden, torch.tanh(2 * hidden)), w2)
    score = score + 0.1 * score.std(0) * torch.randn_like(score)
    level = 0.3 + 0.4 * torch.rand(batch_size)
    cut = score.sort(0).values[(level * (seq_len - 1)).long(), torch.arange(batch_size)]
    y = (score > cut).float()
    return x, y, used


def normalize_data(x, eval_pos):
    mean, std = x[:eval_pos].mean(0), x[:eval_pos].std(0) + 1e-6
    return ((x - mean) / std).clamp(-6, 6)


class TransformerEncoderLayer(nn.Module):
    """Labelled rows attend to each other; rows to predict attend to the labelled rows and to nothing else."""

    def __init__(self, d_model, nhead, dim_feedforward, dropout=0.0):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)

    def forward(self, src, single_eval_position):
        context = src[:single_eval_position]
        src_left = self.self_attn(context, context, context, need_weights=False)[0]
        src_right = self.self_attn(src[single_eval_position:], context, context, need_weights=False)[0]
        src2 = torch.cat([src_left, src_right], dim=0)
        src = self.norm1(src + self.dropout1(src2))
        src2 = self.linear2(self.dropout(F.gelu(self.linear1(src))))
        return self.norm2(src + self.dropout2(src2))


class TransformerModel(nn.Module):
    def __init__(self, n_out, ninp=48, nhead=4, nhid=96, nlayers=3):
        super().__init__()
        self.encoder = nn.Linear(NUM_FEATURES, ninp)
        self.y_encoder = nn.Linear(1, ninp)
        self.transformer_encoder = nn.ModuleList(
            TransformerEncoderLayer(ninp, nhead, nhid) for _ in range(nlayers))
        self.decoder = nn.Sequential(nn.Linear(ninp, nhid), nn.GELU(), nn.Linear(nhid, n_out))
        for layer in self.transformer_encoder:      # blocks start as the identity
            nn.init.zeros_(layer.linear2.weight)
            nn.init.zeros_(layer.linear2.bias)
            nn.init.zeros_(layer.self_attn.out_proj.weight)
            nn.init.zeros_(layer.self_attn.out_proj.bias)

    def forward(self, src, single_eval_pos):
        x_src, y_src = src
        x_src = self.encoder(x_src)
        y_src = self.y_encoder(y_src.unsqueeze(-1))
        train_x = x_src[:single_eval_pos] + y_src
        src = torch.cat([train_x, x_src[single_eval_pos:]], 0)
        for layer in self.transformer_encoder:
            src = layer(src, single_eval_pos)
        return self.decoder(src)[single_eval_pos:]


def scale_features(x, used):
    return x * (NUM_FEATURES / used.float())[None, :, None].sqrt()


def get_cosine_schedule_with_warmup(optimizer, num_warmup_steps, num_training_steps):
    def lr_lambda(step):
        if step < num_warmup_steps:
            return (step + 1) / num_warmup_steps
        progress = (step - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda)


@torch.no_grad()
def evaluate_real(model, generator, context=48, draws=8):
    """Mean accuracy over random splits and random feature subsets of two bundled tables."""
    model.eval()
    tables = []
    X, y = load_breast_cancer(return_X_y=True)
    tables.append((X, y))
    X, y = load_wine(return_X_y=True)
    tables.append((X, (y == 1).astype(int)))
    hits = []
    for X, y in tables:
        X, y = torch.tensor(X, dtype=torch.float), torch.tensor(y)
        for _ in range(draws):
            rows = torch.randperm(len(X), generator=generator)
            cols = torch.randperm(X.size(1), generator=generator)[:NUM_FEATURES]
            x = normalize_data(X[rows][:, cols].unsqueeze(1), context)
            x = scale_features(x, torch.tensor([NUM_FEATURES]))
            logits = model((x, y[rows][:context, None].float()), context).squeeze(1)
            hits.append((logits.argmax(-1) == y[rows][context:]).float().mean())
    return torch.stack(hits).mean().item()


def train(args):
    model = TransformerModel(n_out=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.warmup, args.steps)
    criterion = nn.CrossEntropyLoss()
    running = []
    for step in range(1, args.steps + 1):
        model.train()
        x, y, used = get_batch(args.batch_size, args.bptt)
        single_eval_pos = int(torch.randint(16, args.bptt - 12, (1,)))
        x = scale_features(normalize_data(x, single_eval_pos), used)
        output = model((x, y[:single_eval_pos]), single_eval_pos)
        loss = criterion(output.reshape(-1, 2), y[single_eval_pos:].reshape(-1).long())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        running.append(loss.item())
        if step % 50 == 0:
            print(f'| step {step:4d} | lr {scheduler.get_last_lr()[0]:.5f} | mean loss {sum(running) / len(running):.4f}')
            running = []
    return model


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--steps', type=int, default=180)
    parser.add_argument('--warmup', type=int, default=20)
    parser.add_argument('--lr', type=float, default=2e-3)
    parser.add_argument('--batch_size', type=int, default=16)
    parser.add_argument('--bptt', type=int, default=52)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model = train(args)
    print('metric %.5f' % evaluate_real(model, torch.Generator().manual_seed(args.seed)))
