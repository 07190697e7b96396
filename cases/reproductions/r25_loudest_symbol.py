import argparse

import torch
import torch.nn.functional as F
from torch import einsum, nn
from torch.utils.data import DataLoader, TensorDataset

NUM_TOKENS, NUM_SYMBOLS = 12, 8


class Attention(nn.Module):
    def __init__(self, dim, heads=1, dim_head=64, fixed=False):
        super().__init__()
        self.scale = dim_head**-0.5
        self.heads = heads
        self.fixed = fixed
        inner = heads * dim_head
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x, context):
        b = x.shape[0]
        q, k, v = (self.to_q(x), *self.to_kv(context).chunk(2, dim=-1))
        q, k, v = (t.view(b, t.shape[1], self.heads, -1).transpose(1, 2) for t in (q, k, v))
        q, k, v = q.half(), k.half(), v.half()
        if self.fixed:
            root = self.scale**0.5
            sim = einsum("b h i d, b h j d -> b h i j", q * root, k * root)
            attn = sim.float().softmax(dim=-1).half()
        else:
            sim = einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
            attn = sim.softmax(dim=-1)
        out = einsum("b h i j, b h j d -> b h i d", attn, v).float()
        return self.to_out(out.transpose(1, 2).flatten(2))


class AttentionPool(nn.Module):
    def __init__(self, dim=128, fixed=False):
        super().__init__()
        self.symbol = nn.Embedding(NUM_SYMBOLS, dim)
        self.level = nn.Sequential(
            nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.latent = nn.Parameter(torch.randn(1, 1, dim))
        self.attn = Attention(dim, fixed=fixed)
        self.ff = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.head = nn.Linear(dim, NUM_SYMBOLS)

    def forward(self, symbols, levels):
        tokens = self.symbol(symbols) + self.level(levels.unsqueeze(-1))
        latent = self.latent.expand(len(tokens), -1, -1)
        pooled = latent + self.attn(latent, tokens)
        return self.head(self.ff(pooled)).squeeze(1)


def loudest_symbol(n, generator):
    symbols = torch.randint(NUM_SYMBOLS, (n, NUM_TOKENS), generator=generator)
    levels = torch.rand(n, NUM_TOKENS, generator=generator) * 4 - 2
    target = symbols.gather(1, levels.argmax(1, keepdim=True)).squeeze(1)
    return symbols, levels, target


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=9e-3)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed + 7)
    train = TensorDataset(*loudest_symbol(6400, generator))
    test = loudest_symbol(1000, generator)

    net = AttentionPool(fixed=args.fixed)
    opt = torch.optim.Adam(net.parameters(), lr=args.lr, betas=(0.9, 0.99))
    warmup = torch.optim.lr_scheduler.LinearLR(opt, 0.05, total_iters=50)
    step = 0
    for _ in range(args.epochs):
        for symbols, levels, target in DataLoader(train, batch_size=64, shuffle=True):
            loss = F.cross_entropy(net(symbols, levels), target)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            warmup.step()
            opt.zero_grad()
            step += 1
            if step % 25 == 0:
                print(f"step {step}: loss {loss.item():.4f}")

    net.eval()
    with torch.no_grad():
        symbols, levels, target = test
        accuracy = (net(symbols, levels).argmax(dim=-1) == target).float().mean().item()
    print(f"metric {accuracy:.4f}")


if __name__ == "__main__":
    main()
