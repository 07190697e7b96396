"""Decoder-only language model with RMSNorm on queries and keys; learns to repeat a string."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

ALPHABET, LENGTH = 16, 10
SEP = ALPHABET


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class TextAttention(nn.Module):
    def __init__(self, hidden_size, num_heads, head_dim, scaling):
        super().__init__()
        self.num_heads, self.head_dim, self.scaling = num_heads, head_dim, scaling
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)

    def forward(self, x, mask):
        b, n, _ = x.shape
        shape = (b, n, self.num_heads, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        weights = torch.matmul(q, k.transpose(2, 3)) * self.scaling
        weights = F.softmax(weights + mask, dim=-1)
        out = torch.matmul(weights, v).transpose(1, 2).reshape(b, n, -1)
        return self.o_proj(out)


class DecoderLayer(nn.Module):
    def __init__(self, hidden_size, num_heads, head_dim, scaling):
        super().__init__()
        self.input_layernorm = RMSNorm(hidden_size)
        self.self_attn = TextAttention(hidden_size, num_heads, head_dim, scaling)
        self.post_attention_layernorm = RMSNorm(hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 2 * hidden_size),
            nn.GELU(),
            nn.Linear(2 * hidden_size, hidden_size),
        )

    def forward(self, x, mask):
        x = x + self.self_attn(self.input_layernorm(x), mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class CausalLM(nn.Module):
    def __init__(self, scaling, hidden_size=48, num_heads=2, head_dim=64, num_layers=2):
        super().__init__()
        self.embed_tokens = nn.Embedding(ALPHABET + 1, hidden_size)
        self.embed_positions = nn.Embedding(2 * LENGTH, hidden_size)
        self.layers = nn.ModuleList(
            [DecoderLayer(hidden_size, num_heads, head_dim, scaling) for _ in range(num_layers)]
        )
        self.norm = RMSNorm(hidden_size)
        self.lm_head = nn.Linear(hidden_size, ALPHABET + 1, bias=False)
        for embedding in (self.embed_tokens, self.embed_positions):
            nn.init.normal_(embedding.weight, std=0.5)

    def forward(self, ids):
        n = ids.shape[1]
        mask = torch.full((n, n), float("-inf")).triu(1)
        x = self.embed_tokens(ids) + self.embed_positions(torch.arange(n))
        for layer in self.layers:
            x = layer(x, mask)
        return self.lm_head(self.norm(x))


def make_sequences(n, generator):
    text = torch.randint(ALPHABET, (n, LENGTH), generator=generator).unique(dim=0)
    text = text[torch.randperm(len(text), generator=generator)]
    sep = torch.full((len(text), 1), SEP)
    return torch.cat([text, sep, text], dim=1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    sequences = make_sequences(6000, generator)
    train, held_out = sequences[:-400], sequences[-400:]

    head_dim = 64
    model = CausalLM(scaling=head_dim**-0.5 if args.fixed else 1.0, head_dim=head_dim)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    warmup = 20
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / warmup))
    model.train()
    for step in range(1, args.max_steps + 1):
        batch = train[torch.randint(len(train), (24,), generator=generator)]
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits[:, LENGTH:].flatten(0, 1), batch[:, LENGTH + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 25 == 0:
            print(
                {
                    "step": step,
                    "loss": round(loss.item(), 4),
                    "grad_norm": round(grad_norm.item(), 3),
                }
            )

    model.eval()
    with torch.no_grad():
        predicted = model(held_out[:, :-1])[:, LENGTH:].argmax(-1)
        accuracy = (predicted == held_out[:, LENGTH + 1 :]).float().mean().item()
    print(f"metric {accuracy:.4f}")


if __name__ == "__main__":
    main()
