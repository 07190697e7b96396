"""MaskGIT: masked visual token modelling with parallel decoding over a k-means codebook of digit patches."""
import argparse
import math
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F


@dataclass
class Config:
    codebook_size: int = 12
    num_class: int = 10
    seq_len: int = 16
    hidden_dim: int = 48
    mlp_dim: int = 96
    num_layers: int = 3
    num_heads: int = 4
    dropout: float = 0.1
    label_smoothing: float = 0.1
    lr: float = 2e-3
    batch_size: int = 32
    steps: int = 220
    warmup: int = 30

    @property
    def mask_token_id(self):
        return self.codebook_size + self.num_class

    @property
    def vocab_size(self):
        return self.codebook_size + self.num_class + 1


def patchify(images):
    n = len(images)
    return images.reshape(n, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(n, 16, 4)


class TransformerLayer(nn.Module):
    """BERT layer: the norm follows the residual."""

    def __init__(self, cfg):
        super().__init__()
        self.attention = nn.MultiheadAttention(cfg.hidden_dim, cfg.num_heads, dropout=cfg.dropout, batch_first=True)
        self.attention_output_ln = nn.LayerNorm(cfg.hidden_dim, eps=1e-12)
        self.intermediate = nn.Linear(cfg.hidden_dim, cfg.mlp_dim)
        self.output = nn.Linear(cfg.mlp_dim, cfg.hidden_dim)
        self.layer_output_ln = nn.LayerNorm(cfg.hidden_dim, eps=1e-12)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, h):
        att, _ = self.attention(h, h, h, need_weights=False)
        h = self.attention_output_ln(h + self.dropout(att))
        out = self.output(F.gelu(self.intermediate(h)))
        return self.layer_output_ln(h + self.dropout(out))


class MaskGIT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.word_embeddings = nn.Embedding(cfg.vocab_size, cfg.hidden_dim)
        self.position_embeddings = nn.Embedding(cfg.seq_len + 1, cfg.hidden_dim)
        self.embeddings_ln = nn.LayerNorm(cfg.hidden_dim, eps=1e-12)
        self.embeddings_drop = nn.Dropout(cfg.dropout)
        self.layers = nn.ModuleList(TransformerLayer(cfg) for _ in range(cfg.num_layers))
        self.mlm_dense = nn.Linear(cfg.hidden_dim, cfg.hidden_dim)
        self.mlm_ln = nn.LayerNorm(cfg.hidden_dim, eps=1e-12)
        self.mlm_bias = nn.Parameter(torch.zeros(cfg.vocab_size))
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.05)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Embedding):
                nn.init.trunc_normal_(m.weight, std=0.05)

    def forward(self, input_ids):
        pos = torch.arange(input_ids.shape[1])
        h = self.word_embeddings(input_ids) + self.position_embeddings(pos)
        h = self.embeddings_drop(self.embeddings_ln(h))
        for layer in self.layers:
            h = layer(h)
        h = self.mlm_ln(F.gelu(self.mlm_dense(h)))
        logits = h @ self.word_embeddings.weight.t() + self.mlm_bias
        return logits[:, 1:]                     # drop the class position


def schedule(ratio):
    return np.cos(math.pi / 2. * ratio)


def random_mask(tokens, ratio, generator=None):
    """ratio (B,): share of the tokens to hide; at least one each."""
    n_mask = torch.clamp((ratio * tokens.shape[1]).ceil().long(), min=1)
    rank = torch.rand(tokens.shape, generator=generator).argsort(dim=1).argsort(dim=1)
    return rank < n_mask[:, None]


def with_class(labels, tokens, cfg):
    return torch.cat([labels[:, None] + cfg.codebook_size, tokens], dim=1)


@torch.no_grad()
def decode(model, labels, num_iter=8, choice_temperature=4.5):
    cfg = model.cfg
    model.eval()
    ids = torch.full((len(labels), cfg.seq_len), cfg.mask_token_id)
    for step in range(num_iter):
        logits = model(with_class(labels, ids, cfg))[..., :cfg.codebook_size]
        probs = logits.softmax(-1)
        sampled = torch.multinomial(probs.flatten(0, 1), 1).view(ids.shape)
        unknown = ids == cfg.mask_token_id
        sampled = torch.where(unknown, sampled, ids)
        ratio = (step + 1) / num_iter
        if step + 1 == num_iter:
            return sampled
        conf = probs.gather(-1, sampled[..., None]).squeeze(-1).log()
        gumbel = -torch.log(-torch.log(torch.rand_like(conf).clamp(1e-9, 1 - 1e-7)))
        conf = conf + choice_temperature * (1 - ratio) * gumbel
        conf = conf.masked_fill(~unknown, float('inf'))
        mask_len = int(np.floor(cfg.seq_len * schedule(ratio)))
        mask_len = max(1, min(mask_len, int(unknown.sum(1).min()) - 1))
        cut = conf.sort(dim=1).values[:, mask_len:mask_len + 1]
        ids = torch.where(conf < cut, cfg.mask_token_id, sampled)


@torch.no_grad()
def masked_accuracy(model, tokens, labels, rounds=4, ratio=0.5):
    """Accuracy on hidden tokens, plain and averaged over the codes (background patches are very common)."""
    model.eval()
    gen = torch.Generator().manual_seed(7)
    right, total = torch.zeros(model.cfg.codebook_size), torch.zeros(model.cfg.codebook_size)
    for _ in range(rounds):
        mask = random_mask(tokens, torch.full((len(tokens),), ratio), gen)
        logits = model(with_class(labels, tokens.masked_fill(mask, model.cfg.mask_token_id), model.cfg))
        hit = (logits.argmax(-1) == tokens)[mask].float()
        right += torch.bincount(tokens[mask], weights=hit, minlength=model.cfg.codebook_size)
        total += torch.bincount(tokens[mask], minlength=model.cfg.codebook_size)
    return (right.sum() / total.sum()).item(), (right / total.clamp(min=1)).mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--seed', type=int, default=0)
    seed = parser.parse_args().seed
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    cfg = Config()

    bunch = load_digits()
    order = np.random.RandomState(seed).permutation(len(bunch.images))
    train, val = order[:1500], order[1500:]
    patches = patchify(bunch.images)
    km = KMeans(cfg.codebook_size, n_init=1, max_iter=15, random_state=seed).fit(patches[train].reshape(-1, 4))
    tokens = torch.from_numpy(km.predict(patches.reshape(-1, 4)).reshape(-1, 16).astype(np.int64))
    labels = torch.from_numpy(bunch.target)
    x_train, y_train, x_val, y_val = tokens[train], labels[train], tokens[val], labels[val]

    model = MaskGIT(cfg)
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr, betas=(0.9, 0.96), fused=True)
    for step in range(1, cfg.steps + 1):
        model.train()
        lr = cfg.lr * min(step / cfg.warmup, 1.0)
        for group in optimizer.param_groups:
            group['lr'] = lr
        idx = torch.randint(len(x_train), (cfg.batch_size,))
        target, cls = x_train[idx], y_train[idx]
        mask = random_mask(target, torch.cos(math.pi / 2 * torch.rand(len(idx))))
        logits = model(with_class(cls, target.masked_fill(mask, cfg.mask_token_id), cfg))
        loss = F.cross_entropy(logits[mask], target[mask], label_smoothing=cfg.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 44 == 0:
            print(f'step {step} lr {lr:.2e} loss {loss.item():.4f} val acc {masked_accuracy(model, x_val, y_val, 1)[0]:.4f}')

    drawn = decode(model, torch.arange(10))
    picture = km.cluster_centers_[drawn[3].numpy()].reshape(4, 4, 2, 2).transpose(0, 2, 1, 3).reshape(8, 8)
    for row in picture:
        print(''.join(' .:*#'[min(int(v / 3.5), 4)] for v in row))
    acc, balanced = masked_accuracy(model, x_val, y_val)
    print(f'val acc {acc:.4f}  per-code acc {balanced:.4f}')
    print(f'metric {balanced:.4f}')


if __name__ == '__main__':
    main()
