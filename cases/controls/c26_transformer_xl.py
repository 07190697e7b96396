"""Transformer-XL language model over long synthetic melodies, one segment at a time with cached memory."""
import argparse

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

N_NOTES, BAR = 10, 12


def compose(n_bars, rng):
    bar = rng.integers(0, N_NOTES, BAR)
    out = []
    for _ in range(n_bars):
        if rng.random() < 0.06:
            bar = rng.integers(0, N_NOTES, BAR)
        change = rng.random(BAR) < 0.06
        bar = np.where(change, rng.integers(0, N_NOTES, BAR), bar)
        out.append(bar)
    return np.concatenate(out)


class LMOrderedIterator:
    """(data, target) segments of parallel streams, time first, in order."""

    def __init__(self, streams, bptt):
        self.data, self.bptt = streams, bptt                   # (length, batch)

    def __iter__(self):
        for i in range(0, self.data.size(0) - 1, self.bptt):
            seq_len = min(self.bptt, self.data.size(0) - 1 - i)
            yield self.data[i:i + seq_len], self.data[i + 1:i + 1 + seq_len]


class PositionalEmbedding(nn.Module):
    def __init__(self, demb):
        super().__init__()
        inv_freq = 1 / (10000 ** (torch.arange(0.0, demb, 2.0) / demb))
        self.register_buffer('inv_freq', inv_freq)

    def forward(self, pos_seq):
        sinusoid = torch.outer(pos_seq, self.inv_freq)
        return torch.cat([sinusoid.sin(), sinusoid.cos()], dim=-1)


class PositionwiseFF(nn.Module):
    def __init__(self, d_model, d_inner, dropout):
        super().__init__()
        self.CoreNet = nn.Sequential(nn.Linear(d_model, d_inner), nn.ReLU(inplace=True), nn.Dropout(dropout),
                                     nn.Linear(d_inner, d_model), nn.Dropout(dropout))
        self.layer_norm = nn.LayerNorm(d_model)

    def forward(self, inp):
        return self.layer_norm(inp + self.CoreNet(inp))


class RelPartialLearnableMultiHeadAttn(nn.Module):
    def __init__(self, n_head, d_model, d_head, dropout):
        super().__init__()
        self.n_head, self.d_head = n_head, d_head
        self.qkv_net = nn.Linear(d_model, 3 * n_head * d_head, bias=False)
        self.r_net = nn.Linear(d_model, n_head * d_head, bias=False)
        self.o_net = nn.Linear(n_head * d_head, d_model, bias=False)
        self.drop = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(d_model)
        self.scale = d_head ** -0.5

    @staticmethod
    def _rel_shift(x):
        zero_pad = x.new_zeros(x.size(0), 1, *x.size()[2:])
        x_padded = torch.cat([zero_pad, x], dim=1)
        x_padded = x_padded.view(x.size(1) + 1, x.size(0), *x.size()[2:])
        return x_padded[1:].view_as(x)

    def forward(self, w, r, r_w_bias, r_r_bias, attn_mask, mem):
        qlen, bsz = w.size(0), w.size(1)
        cat = torch.cat([mem, w], 0)
        klen = cat.size(0)
        w_head_q, w_head_k, w_head_v = torch.chunk(self.qkv_net(cat), 3, dim=-1)
        w_head_q = w_head_q[-qlen:].view(qlen, bsz, self.n_head, self.d_head)
        w_head_k = w_head_k.view(klen, bsz, self.n_head, self.d_head)
        w_head_v = w_head_v.view(klen, bsz, self.n_head, self.d_head)
        r_head_k = self.r_net(r).view(klen, self.n_head, self.d_head)

        AC = torch.einsum('ibnd,jbnd->ijbn', w_head_q + r_w_bias, w_head_k)
        BD = torch.einsum('ibnd,jnd->ijbn', w_head_q + r_r_bias, r_head_k)
        attn_score = (AC + self._rel_shift(BD)) * self.scale
        attn_score = attn_score.masked_fill(attn_mask[:, :, None, None], -float('inf'))
        attn_prob = F.softmax(attn_score, dim=1)
        attn_vec = torch.einsum('ijbn,jbnd->ibnd', attn_prob, w_head_v).reshape(qlen, bsz, -1)
        return self.layer_norm(w + self.drop(self.o_net(attn_vec)))


class DecoderLayer(nn.Module):
    def __init__(self, n_head, d_model, d_head, d_inner, dropout):
        super().__init__()
        self.dec_attn = RelPartialLearnableMultiHeadAttn(n_head, d_model, d_head, dropout)
        self.pos_ff = PositionwiseFF(d_model, d_inner, dropout)

    def forward(self, x, r, u, v, attn_mask, mem):
        return self.pos_ff(self.dec_attn(x, r, u, v, attn_mask, mem))


class MemTransformerLM(nn.Module):
    def __init__(self, n_token, n_layer=2, n_head=4, d_model=48, d_inner=96, dropout=0.05, mem_len=16):
        super().__init__()
        d_head = d_model // n_head
        self.mem_len, self.d_model = mem_len, d_model
        self.word_emb = nn.Embedding(n_token, d_model)
        nn.init.normal_(self.word_emb.weight, std=d_model ** -0.5)
        self.pos_emb = PositionalEmbedding(d_model)
        self.r_w_bias = nn.Parameter(torch.zeros(n_head, d_head))
        self.r_r_bias = nn.Parameter(torch.zeros(n_head, d_head))
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList([DecoderLayer(n_head, d_model, d_head, d_inner, dropout) for _ in range(n_layer)])
        self.crit_proj = nn.Linear(d_model, n_token)

    def init_mems(self, bsz):
        return [torch.zeros(0, bsz, self.d_model) for _ in range(len(self.layers))]

    def _update_mems(self, hids, mems):
        with torch.no_grad():
            return [torch.cat([m, h], 0)[-self.mem_len:].detach() for m, h in zip(mems, hids)]

    def forward(self, data, mems):
        qlen, mlen = data.size(0), mems[0].size(0)
        klen = qlen + mlen
        core_out = self.drop(self.word_emb(data) * self.d_model ** 0.5)
        dec_attn_mask = torch.triu(torch.ones(qlen, klen), diagonal=1 + mlen).bool()
        pos_seq = torch.arange(klen - 1, -1, -1.0)
        r = self.drop(self.pos_emb(pos_seq))
        hids = []
        for layer, mem in zip(self.layers, mems):
            hids.append(core_out)
            core_out = layer(core_out, r, self.r_w_bias, self.r_r_bias, dec_attn_mask, mem)
        return self.crit_proj(self.drop(core_out)), self._update_mems(hids, mems)


def evaluate(model, it, bsz):
    model.eval()
    mems, hit, total = model.init_mems(bsz), 0, 0
    with torch.no_grad():
        for data, target in it:
            logit, mems = model(data, mems)
            hit += (logit.argmax(-1) == target).sum().item()
            total += target.numel()
    return hit / total


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--tgt_len', type=int, default=16)
    parser.add_argument('--lr', type=float, default=3e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    streams = torch.from_numpy(np.stack([compose(54, rng) for _ in range(24)], 1))
    tr_iter = LMOrderedIterator(streams[:, :18], args.tgt_len)
    va_iter = LMOrderedIterator(streams[:, 18:], args.tgt_len)
    model = MemTransformerLM(N_NOTES)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7 * 41, eta_min=1e-4)
    step = 0
    for epoch in range(7):
        model.train()
        mems, train_loss, n = model.init_mems(18), 0.0, 0
        for data, target in tr_iter:
            logit, mems = model(data, mems)
            loss = F.cross_entropy(logit.view(-1, N_NOTES), target.reshape(-1))
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()
            scheduler.step()
            step += 1
            train_loss += loss.item()
            n += 1
        print(f'| epoch {epoch + 1} step {step} | loss {train_loss / n:.3f}')
    print(f'metric {evaluate(model, va_iter, 6):.4f}')
