"""Vision transformer on the 8x8 digits whose every second block routes tokens to two of several experts."""
import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Expert(nn.Module):
    def __init__(self, d_model, d_ff):
        super().__init__()
        self.wi = nn.Linear(d_model, d_ff)
        self.wo = nn.Linear(d_ff, d_model)

    def forward(self, x):
        return self.wo(F.gelu(self.wi(x)))


class Top2MoE(nn.Module):
    def __init__(self, d_model, d_ff, num_experts):
        super().__init__()
        self.num_experts = num_experts
        self.gate = nn.Linear(d_model, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(d_model, d_ff) for _ in range(num_experts))

    def forward(self, x):
        shape = x.shape
        tokens = x.reshape(-1, shape[-1])
        probs = F.softmax(self.gate(tokens), dim=-1)
        top_p, top_i = probs.topk(2, dim=-1)
        top_p = top_p / top_p.sum(-1, keepdim=True)

        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            rows, slot = (top_i == e).nonzero(as_tuple=True)
            if rows.numel() == 0:
                continue
            out = out.index_add(0, rows, expert(tokens[rows]) * top_p[rows, slot].unsqueeze(-1))

        # fraction of tokens whose first choice is e, times the mean router probability of e
        first = F.one_hot(top_i[:, 0], self.num_experts).float().mean(0)
        aux = self.num_experts * torch.sum(first * probs.mean(0))
        return out.view(shape), aux


class Block(nn.Module):
    def __init__(self, d_model, heads, d_ff, num_experts=0, p=0.1):
        super().__init__()
        self.ln1 = nn.LayerNorm(d_model)
        self.attn = nn.MultiheadAttention(d_model, heads, batch_first=True)
        self.ln2 = nn.LayerNorm(d_model)
        self.is_moe = num_experts > 0
        self.ffn = Top2MoE(d_model, d_ff, num_experts) if self.is_moe else Expert(d_model, d_ff)
        self.drop = nn.Dropout(p)

    def forward(self, x):
        h = self.ln1(x)
        x = x + self.drop(self.attn(h, h, h, need_weights=False)[0])
        h = self.ln2(x)
        if self.is_moe:
            h, aux = self.ffn(h)
        else:
            h, aux = self.ffn(h), x.new_zeros(())
        return x + self.drop(h), aux


class MoEViT(nn.Module):
    def __init__(self, d_model=32, heads=4, depth=2, num_experts=4, n_classes=10):
        super().__init__()
        self.patchify = nn.Conv2d(1, d_model, kernel_size=2, stride=2)
        self.pos = nn.Parameter(torch.randn(1, 16, d_model) * 0.02)
        self.blocks = nn.ModuleList(
            Block(d_model, heads, 2 * d_model, num_experts if i % 2 else 0) for i in range(depth))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, n_classes)

    def forward(self, img):
        x = self.patchify(img).flatten(2).transpose(1, 2) + self.pos
        aux_total = 0.0
        for block in self.blocks:
            x, aux = block(x)
            aux_total = aux_total + aux
        return {"logits": self.head(self.norm(x).mean(1)), "aux_loss": aux_total}


def main():
    cli = argparse.ArgumentParser()
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--aux-weight", type=float, default=0.01)
    cfg = cli.parse_args()
    torch.manual_seed(cfg.seed)
    torch.set_num_threads(1)

    digits = load_digits()
    X = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.3
    y = torch.tensor(digits.target)
    tr, te = train_test_split(range(len(y)), test_size=0.25, random_state=cfg.seed, stratify=digits.target)
    Xtr, ytr, Xte, yte = X[tr], y[tr], X[te], y[te]

    net = MoEViT()
    optim = torch.optim.AdamW(net.parameters(), lr=6e-3, weight_decay=0.02)
    steps, bs = 240, 40
    sched = torch.optim.lr_scheduler.OneCycleLR(optim, max_lr=6e-3, total_steps=steps, pct_start=0.15)
    step = 0
    while step < steps:
        perm = torch.randperm(len(ytr))
        for b in range(0, len(perm) - bs + 1, bs):
            if step == steps:
                break
            idx = perm[b:b + bs]
            net.train()
            out = net(Xtr[idx])
            ce = F.cross_entropy(out["logits"], ytr[idx])
            loss = ce + cfg.aux_weight * out["aux_loss"]
            optim.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optim.step()
            sched.step()
            step += 1
            if step % 40 == 0:
                print(f"step {step}: ce {ce.item():.3f} aux {out['aux_loss'].item():.3f}")

    net.eval()
    with torch.no_grad():
        acc = (net(Xte)["logits"].argmax(-1) == yte).float().mean()
    print(f"metric {acc.item():.4f}")


if __name__ == "__main__":
    main()
