"""Train the attention model with REINFORCE and a greedy rollout baseline on random TSP instances."""
import argparse
import copy
import math

import numpy as np
import torch
import torch.nn as nn
from torch.nn.utils import clip_grad_norm_


class SkipConnection(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, input):
        return input + self.module(input)


class MultiHeadAttention(nn.Module):
    def __init__(self, n_heads, input_dim, embed_dim):
        super().__init__()
        val_dim = key_dim = embed_dim // n_heads
        self.n_heads = n_heads
        self.norm_factor = 1 / math.sqrt(key_dim)
        self.W_query = nn.Parameter(torch.Tensor(n_heads, input_dim, key_dim))
        self.W_key = nn.Parameter(torch.Tensor(n_heads, input_dim, key_dim))
        self.W_val = nn.Parameter(torch.Tensor(n_heads, input_dim, val_dim))
        self.W_out = nn.Parameter(torch.Tensor(n_heads, val_dim, embed_dim))
        for param in self.parameters():
            stdv = 1. / math.sqrt(param.size(-1))
            param.data.uniform_(-stdv, stdv)

    def forward(self, h):
        batch_size, graph_size, input_dim = h.size()
        hflat = h.contiguous().view(-1, input_dim)
        shp = (self.n_heads, batch_size, graph_size, -1)
        Q = torch.matmul(hflat, self.W_query).view(shp)
        K = torch.matmul(hflat, self.W_key).view(shp)
        V = torch.matmul(hflat, self.W_val).view(shp)
        compatibility = self.norm_factor * torch.matmul(Q, K.transpose(2, 3))
        attn = torch.softmax(compatibility, dim=-1)
        heads = torch.matmul(attn, V)
        return torch.mm(
            heads.permute(1, 2, 0, 3).contiguous().view(batch_size * graph_size, -1),
            self.W_out.view(-1, self.W_out.size(-1)),
        ).view(batch_size, graph_size, -1)


class Normalization(nn.Module):
    def __init__(self, embed_dim):
        super().__init__()
        self.normalizer = nn.BatchNorm1d(embed_dim, affine=True)

    def forward(self, input):
        return self.normalizer(input.view(-1, input.size(-1))).view(*input.size())


class MultiHeadAttentionLayer(nn.Sequential):
    def __init__(self, n_heads, embed_dim, feed_forward_hidden):
        super().__init__(
            SkipConnection(MultiHeadAttention(n_heads, embed_dim, embed_dim)),
            Normalization(embed_dim),
            SkipConnection(nn.Sequential(
                nn.Linear(embed_dim, feed_forward_hidden),
                nn.ReLU(),
                nn.Linear(feed_forward_hidden, embed_dim))),
            Normalization(embed_dim))


class AttentionModel(nn.Module):
    def __init__(self, embed_dim=64, n_heads=4, n_layers=2, tanh_clipping=10.):
        super().__init__()
        self.n_heads = n_heads
        self.tanh_clipping = tanh_clipping
        self.init_embed = nn.Linear(2, embed_dim)
        self.embedder = nn.Sequential(*(
            MultiHeadAttentionLayer(n_heads, embed_dim, 128) for _ in range(n_layers)))
        # learned input symbols for the first step, when there is no first and no last node
        self.W_placeholder = nn.Parameter(torch.Tensor(2 * embed_dim).uniform_(-1, 1))
        self.project_node_embeddings = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.project_fixed_context = nn.Linear(embed_dim, embed_dim, bias=False)
        self.project_step_context = nn.Linear(2 * embed_dim, embed_dim, bias=False)
        self.project_out = nn.Linear(embed_dim, embed_dim, bias=False)

    def _make_heads(self, v):
        b, n, d = v.size()
        return v.view(b, n, self.n_heads, d // self.n_heads).transpose(1, 2)

    def forward(self, coords, greedy=False):
        embeddings = self.embedder(self.init_embed(coords))
        b, n, d = embeddings.size()
        fixed_context = self.project_fixed_context(embeddings.mean(1))[:, None, :]
        glimpse_K, glimpse_V, logit_K = self.project_node_embeddings(embeddings).chunk(3, dim=-1)
        glimpse_K, glimpse_V = self._make_heads(glimpse_K), self._make_heads(glimpse_V)

        visited = torch.zeros(b, n, dtype=torch.bool)
        rows = torch.arange(b)
        first = last = None
        log_p_sum, sequence = 0., []
        for i in range(n):
            if i == 0:
                step_context = self.W_placeholder.expand(b, -1)
            else:
                step_context = torch.cat((embeddings[rows, first], embeddings[rows, last]), -1)
            query = fixed_context + self.project_step_context(step_context)[:, None, :]

            glimpse_Q = self._make_heads(query)
            compat = torch.matmul(glimpse_Q, glimpse_K.transpose(-2, -1)) / math.sqrt(glimpse_Q.size(-1))
            compat = compat.masked_fill(visited[:, None, None, :], -math.inf)
            heads = torch.matmul(torch.softmax(compat, dim=-1), glimpse_V)
            glimpse = self.project_out(heads.transpose(1, 2).reshape(b, 1, d))

            logits = torch.matmul(glimpse, logit_K.transpose(-2, -1)).squeeze(1) / math.sqrt(d)
            logits = torch.tanh(logits) * self.tanh_clipping
            logits = logits.masked_fill(visited, -math.inf)
            log_p = torch.log_softmax(logits, dim=-1)

            if greedy:
                selected = log_p.argmax(-1)
            else:
                selected = log_p.exp().multinomial(1).squeeze(1)
            log_p_sum = log_p_sum + log_p[rows, selected]
            visited = visited.scatter(1, selected[:, None], True)
            first = selected if first is None else first
            last = selected
            sequence.append(selected)
        pi = torch.stack(sequence, 1)
        return tour_length(coords, pi), log_p_sum, pi


def tour_length(coords, pi):
    d = coords.gather(1, pi[..., None].expand_as(coords))
    return (d - d.roll(-1, dims=1)).norm(p=2, dim=-1).sum(1)


def rollout(model, dataset):
    model.eval()
    with torch.no_grad():
        cost, _, _ = model(dataset, greedy=True)
    return cost


def main():
    p = argparse.ArgumentParser()
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--graph_size', type=int, default=7)
    p.add_argument('--batch_size', type=int, default=48)
    p.add_argument('--n_epochs', type=int, default=4)
    p.add_argument('--steps_per_epoch', type=int, default=38)
    p.add_argument('--lr', type=float, default=1e-3)
    opts = p.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(opts.seed)
    np.random.seed(opts.seed)

    val_gen = torch.Generator().manual_seed(100_000 + opts.seed)
    val_set = torch.rand(512, opts.graph_size, 2, generator=val_gen)

    model = AttentionModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=opts.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.85 ** epoch)

    bl_model, bl_set, bl_vals = None, None, None
    ema = None
    for epoch in range(opts.n_epochs):
        model.train()
        train_set = torch.rand(opts.steps_per_epoch * opts.batch_size, opts.graph_size, 2)
        bl_costs = None if bl_model is None else rollout(bl_model, train_set)
        costs = []
        for step in range(opts.steps_per_epoch):
            sl = slice(step * opts.batch_size, (step + 1) * opts.batch_size)
            cost, ll, _ = model(train_set[sl])
            if bl_costs is None:      # first epoch: exponential moving average
                ema = cost.mean().item() if ema is None else 0.8 * ema + 0.2 * cost.mean().item()
                bl = ema
            else:
                bl = bl_costs[sl]
            loss = ((cost - bl) * ll).mean()
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            costs.append(cost.mean().item())
        scheduler.step()

        # one-sided paired comparison on a separate set decides if the baseline policy is replaced
        if bl_model is None:
            replace = True
        else:
            diff = rollout(model, bl_set) - bl_vals
            t = diff.mean() / (diff.std() / math.sqrt(len(diff)))
            replace = t.item() < -1.645
        if replace:
            bl_model = copy.deepcopy(model)
            bl_set = torch.rand(256, opts.graph_size, 2)
            bl_vals = rollout(bl_model, bl_set)
        val_cost = rollout(model, val_set).mean().item()
        print('epoch %d  train cost %.4f  val cost %.4f%s' % (
            epoch, np.mean(costs), val_cost, '  [baseline updated]' if replace else ''))

    print('metric %.5f' % -val_cost)


if __name__ == '__main__':
    main()
