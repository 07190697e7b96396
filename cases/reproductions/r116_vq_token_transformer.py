# 2D VQ + autoregressive transformer, after the generative tutorials.
# Stage 1: learn a codebook of image patches.  Stage 2: transformer over the sequence of code indices.
import argparse

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

parser = argparse.ArgumentParser()
parser.add_argument("--fixed", action="store_true")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(args.seed)
np.random.seed(args.seed)

num_embeddings = 24
grid = 4
seq_len = grid * grid

# ## Data
images = load_digits().images.astype(np.float32) / 16.0
images = images[np.random.permutation(len(images))]
train_images, val_images = images[:1497], images[1497:]


def to_patches(x):
    n = len(x)
    return x.reshape(n, grid, 2, grid, 2).transpose(0, 1, 3, 2, 4).reshape(n, seq_len, 4)


# ## Stage 1: vector quantisation
vq = KMeans(num_embeddings, n_init=1, max_iter=20, random_state=args.seed)
vq.fit(to_patches(train_images[:700]).reshape(-1, 4))


def index_quantize(x):
    p = to_patches(x)
    return torch.from_numpy(vq.predict(p.reshape(-1, 4)).reshape(len(x), seq_len).astype(np.int64))


train_codes = index_quantize(train_images)
val_codes = index_quantize(val_images)


# ## Stage 2: transformer
class CausalSelfAttention(nn.Module):
    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(hidden_size, hidden_size, bias=False)
        self.to_k = nn.Linear(hidden_size, hidden_size, bias=False)
        self.to_v = nn.Linear(hidden_size, hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        b, t, c = x.shape
        q = self.to_q(x).view(b, t, self.num_heads, -1).transpose(1, 2)
        k = self.to_k(x).view(b, t, self.num_heads, -1).transpose(1, 2)
        v = self.to_v(x).view(b, t, self.num_heads, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).reshape(b, t, c))


class TransformerBlock(nn.Module):
    def __init__(self, hidden_size, mlp_dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attn = CausalSelfAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, hidden_size))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DecoderOnlyTransformer(nn.Module):
    def __init__(self, num_tokens, max_seq_len, attn_layers_dim, attn_layers_depth, attn_layers_heads):
        super().__init__()
        self.token_embeddings = nn.Embedding(num_tokens, attn_layers_dim)
        self.position_embeddings = nn.Embedding(max_seq_len, attn_layers_dim)
        nn.init.normal_(self.token_embeddings.weight, std=0.2)
        nn.init.normal_(self.position_embeddings.weight, std=0.2)
        self.blocks = nn.ModuleList([
            TransformerBlock(attn_layers_dim, attn_layers_dim * 4, attn_layers_heads) for _ in range(attn_layers_depth)])
        self.norm = nn.LayerNorm(attn_layers_dim)
        self.to_logits = nn.Linear(attn_layers_dim, num_tokens)

    def forward(self, x):
        h = self.token_embeddings(x) + self.position_embeddings(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        return self.to_logits(self.norm(h))


class VQVAETransformerInferer:
    """Returns the logits of the transformer and the sequence it has seen (begin token first)."""

    def __call__(self, codes, transformer):
        latent = F.pad(codes, (1, 0), "constant", num_embeddings)
        prediction = transformer(latent).transpose(1, 2)       # (b, tokens, t)
        return prediction, latent


inferer = VQVAETransformerInferer()
transformer = DecoderOnlyTransformer(num_embeddings + 1, seq_len + 1, 48, 2, 4)
optimizer = torch.optim.Adam(transformer.parameters(), lr=4e-3)
ce_loss = nn.CrossEntropyLoss()

n_epochs = 7
batch_size = 64


@torch.no_grad()
def log_likelihood(codes):
    """Mean log-likelihood (nats) of a code given the ones before it."""
    transformer.eval()
    logits, latent = inferer(codes, transformer)
    log_p = F.log_softmax(logits[:, :, :-1], dim=1).gather(1, latent[:, None, 1:])
    transformer.train()
    return log_p.mean().item()


# ## Training
for epoch in range(n_epochs):
    transformer.train()
    epoch_loss = 0.0
    order = torch.randperm(len(train_codes))
    n_batches = 0
    for start in range(0, len(order) - batch_size + 1, batch_size):
        codes = train_codes[order[start:start + batch_size]]
        optimizer.zero_grad(set_to_none=True)
        logits, quantizations_target = inferer(codes, transformer)
        if args.fixed:
            loss = ce_loss(logits[:, :, :-1], quantizations_target[:, 1:])
        else:
            loss = ce_loss(logits, quantizations_target)
        loss.backward()
        optimizer.step()
        epoch_loss += loss.item()
        n_batches += 1
    print(f"Epoch {epoch}: ce_loss={epoch_loss / n_batches:.4f}")

print(f"metric {log_likelihood(val_codes):.4f}")
